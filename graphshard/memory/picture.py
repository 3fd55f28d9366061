"""Memory over a step as an SVG: a stacked area per pipeline stage, the outline of what was measured over it, and the
schedule's actions below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count, groupby

from graphshard.execution import ExecutionPlan
from graphshard.memory.timeline import Timeline, simulated_timeline
from graphshard.units import human

_COLORS = {  # Okabe and Ito 2008: told apart by colour-blind readers, on white and on black
    "parameters": "#0072b2",
    "gathered parameters": "#56b4e9",
    "gradients": "#d55e00",
    "optimizer state": "#cc79a7",
    "saved activations": "#009e73",
    "transfers": "#f0e442",
    "workspace": "#9a9a9a",
    "batch": "#e69f00",
}
_OTHER = ("#6f4e9c", "#8c564b", "#17a2b8")  # categories that are none of these
_KINDS = {"F": "forward", "B": "backward", "W": "weight"}  # by the first letter of an action

_STYLE = """
  svg { font: 12px system-ui, sans-serif; }
  .page { fill: #ffffff; }
  text { fill: #222222; }
  .quiet { fill: #666666; }
  .title { font-size: 16px; font-weight: 600; }
  .axis { stroke: #bbbbbb; stroke-width: 1; }
  .measured { stroke: #000000; stroke-width: 1.5; fill: none; stroke-linejoin: round; }
  .forward { fill: #cfe2f3; } .backward { fill: #f6d5c3; } .weight { fill: #d5ead8; } .other { fill: #e4e4e4; }
  .action { font-size: 10px; text-anchor: middle; pointer-events: none; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16181c; }
    text { fill: #e6e6e6; }
    .quiet { fill: #9aa0a6; }
    .axis { stroke: #4a4d52; }
    .measured { stroke: #ffffff; }
    .forward { fill: #24405c; } .backward { fill: #5c3524; } .weight { fill: #264a31; } .other { fill: #3a3d42; }
  }
"""

_WIDTH, _LEFT, _RIGHT = 1120, 84, 24
_PANEL, _BAND, _GAP, _TOP = 180, 18, 48, 92  # heights: a stage's area, its actions, between stages, above the first
_LETTER = 6.0  # width of one in an action's label


@dataclass(frozen=True)
class StageMemory:
    """What is drawn of one stage; ``actions``: of every instruction. ``first_step``: what was measured is one, which
    ends otherwise."""

    stage: int
    simulated: Timeline
    actions: tuple[str, ...]
    measured: Timeline | None = None
    first_step: bool = False


def stage_memory(plan: ExecutionPlan, measured: Mapping[int, tuple[Timeline, bool]]) -> list[StageMemory]:
    """Of every stage of ``plan``; ``measured``: by stage, with whether it is of a first step, where there is any."""
    return [
        StageMemory(
            stage,
            simulated_timeline(plan, stage),
            tuple(ins.action for ins in plan.stages[stage].step()),
            *measured.get(stage, ()),
        )
        for stage in range(len(plan.stages))
    ]


def to_svg(stages: Sequence[StageMemory], title: str) -> str:
    """The picture; all stages share one scale."""
    names = list(dict.fromkeys(name for stage in stages for name in stage.simulated.categories))
    names = [name for name in _COLORS if name in names] + [name for name in names if name not in _COLORS]
    other = iter(_OTHER * len(names))
    colors = {name: _COLORS.get(name) or next(other) for name in names}
    drawn = [line for stage in stages for line in (stage.simulated, stage.measured) if line is not None]
    most = max([*(line.peak_bytes for line in drawn), 1])
    height = _TOP + len(stages) * (_PANEL + _BAND + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f"<title>{escape(title)}</title>",
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
        f'<text class="title" x="{_LEFT}" y="28">{escape(title)}</text>',
        *_legend(colors, any(stage.measured is not None for stage in stages)),
    ]
    for index, stage in enumerate(stages):
        lines += _panel(stage, _TOP + index * (_PANEL + _BAND + _GAP), most, colors)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend(colors: Mapping[str, str], measured: bool) -> list[str]:
    lines, x = [], float(_LEFT)
    for name, color in colors.items():
        lines.append(f'<rect x="{x:.0f}" y="42" width="12" height="12" fill="{color}"/>')
        lines.append(f'<text x="{x + 17:.0f}" y="52">{escape(name)}</text>')
        x += 17 + 6.4 * len(name) + 18
    if measured:
        lines.append(f'<line class="measured" x1="{x:.0f}" y1="48" x2="{x + 24:.0f}" y2="48"/>')
        lines.append(f'<text x="{x + 30:.0f}" y="52">measured</text>')
    return lines


def _panel(stage: StageMemory, top: int, most: int, colors: Mapping[str, str]) -> list[str]:
    width, length = _WIDTH - _LEFT - _RIGHT, max(stage.simulated.length, stage.measured.length if stage.measured else 1)

    def x(position: float) -> float:
        return _LEFT + width * position / length

    def y(size: float) -> float:
        return top + _PANEL * (1 - size / (most * 1.08))

    held = f"stage {stage.stage}: peak {human(stage.simulated.peak_bytes)}"
    if stage.measured is not None:
        held += f", measured {human(stage.measured.peak_bytes)}" + (" in the first step" if stage.first_step else "")
    lines = [f'<text x="{_LEFT}" y="{top - 8}">{held}</text>']
    for tick in _ticks(most):
        lines.append(f'<line class="axis" x1="{_LEFT}" y1="{y(tick):.1f}" x2="{_WIDTH - _RIGHT}" y2="{y(tick):.1f}"/>')
        label = f'x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end"'
        lines.append(f'<text class="quiet" {label}>{human(tick)}</text>')
    ends = (*stage.simulated.positions[1:], stage.simulated.length)
    below = [0] * len(ends)
    for name, color in colors.items():
        above = [low + row.get(name, 0) for low, row in zip(below, stage.simulated.rows, strict=True)]
        if above != below:
            upper = _steps([(x(a), x(b), y(v)) for a, b, v in zip(stage.simulated.positions, ends, above, strict=True)])
            lower = _steps([(x(a), x(b), y(v)) for a, b, v in zip(stage.simulated.positions, ends, below, strict=True)])
            points = " ".join([*upper, *reversed(lower)])
            lines.append(f'<polygon fill="{color}" points="{points}"><title>{escape(name)}</title></polygon>')
        below = above
    if stage.measured is not None:
        line = stage.measured
        ends = (*line.positions[1:], line.length)
        held_then = [sum(row.values()) for row in line.rows]
        outline = _steps([(x(a), x(b), y(v)) for a, b, v in zip(line.positions, ends, held_then, strict=True)])
        lines.append(f'<polyline class="measured" points="{" ".join(outline)}"/>')
    return lines + _band(stage, top + _PANEL, width / length)


def _band(stage: StageMemory, top: int, per_instruction: float) -> list[str]:
    """The schedule's actions along the axis, named where there is room."""
    lines, begin = [], 0
    for action, group in groupby(stage.actions):
        length = len(list(group))
        left, width = _LEFT + begin * per_instruction, length * per_instruction
        kind = _KINDS.get(action[:1], "other") if action[1:2].isdigit() else "other"
        told = f"{escape(action)}: instructions {begin} to {begin + length - 1}"
        place = f'x="{left:.1f}" y="{top + 2}" width="{max(width - 0.5, 0.5):.1f}" height="{_BAND}"'
        lines.append(f'<rect class="{kind}" {place}><title>{told}</title></rect>')
        if width >= _LETTER * len(action) + 2:
            lines.append(f'<text class="action" x="{left + width / 2:.1f}" y="{top + 15}">{escape(action)}</text>')
        begin += length
    return lines


def _steps(pieces: Sequence[tuple[float, float, float]]) -> list[str]:
    """Corner points of a line that is level on each piece (left, right, height)."""
    return [point for a, b, v in pieces for point in (f"{a:.1f},{v:.1f}", f"{b:.1f},{v:.1f}")]


def _ticks(most: int) -> list[int]:
    """Round numbers from 0 up to ``most``, six at most."""
    step = next(unit * 10**power for power in count() for unit in (1, 2, 5) if most <= 5 * unit * 10**power)
    return list(range(0, most + 1, step))

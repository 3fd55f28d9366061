"""The speed benchmark's results as Markdown. A number says how many times as long the other takes: above 1, graphshard
is faster; of copying, which part of the device's bandwidth is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speed_rows import ALONE, COPY, EAGER, FUSED, GRAPHS, INDUCTOR, LIGER, OURS, Row

HEADS = {
    GRAPHS: "with `cudagraphs`",
    ALONE: "as one region",
    EAGER: "eager",
    INDUCTOR: "torch.compile",
    LIGER: "Liger",
    FUSED: "AdamW(fused=True)",
    COPY: "copy",
}
"""Columns by contender, in order."""

_STEP = {EAGER: 1.0, INDUCTOR: 1.0}
WANTED: Mapping[str, Mapping[str, float]] = {"update": {COPY: 0.90}, "llama": _STEP}
WANTED_OF_KERNELS = {INDUCTOR: 1.0, COPY: 0.85}
STEPS = ("llama", "recompute", "offload")


def page(results: Mapping[str, Any]) -> str:
    """All parts, each with when and where it ran."""
    lines = [
        "# Speed on a GPU",
        "",
        "Written by `make bench-gpu`. Columns behind the first time say how many times as long the other takes as",
        "graphshard: above 1, graphshard is faster. Under `copy` it is the part of the bandwidth that copying as many",
        "bytes reaches; `GB/s` counts what has to be moved at least. `as one region` is what fuse does not make by",
        "itself: below 1, it would be faster. ✗: less than wanted. Times are medians.",
    ]
    for name, part in results.items():
        scale = "" if part["scale"] == "full" else f"; {part['scale']} sizes, which say little"
        lines += ["", f"## {name}", "", f"{part['machine']}; {part['when']}{scale}", "", *section(name, part)]
    return "\n".join(lines) + "\n"


def section(name: str, part: Mapping[str, Any]) -> list[str]:
    """The table of a part, and what is to be said about it."""
    rows = [Row(**row) for row in part["rows"]]
    lines = (_steps if name in STEPS else _ratios)(rows, _wanted(name, part))
    told = [f"{row.title}, {who}: {error}" for row in rows for who, error in row.failed.items()]
    told += [part["died"]] if part.get("died") else []
    if told:
        lines += ["", "Failed:", "", *(f"- {line}" for line in told)]
    if part.get("skipped"):
        lines += ["", f"Not run, for want of time: {'; '.join(part['skipped'])}."]
    return lines


def failed(part: Mapping[str, Any]) -> bool:
    """Whether something did not run that was begun."""
    return bool(part.get("died")) or any(row["failed"] for row in part["rows"])


def missed(name: str, part: Mapping[str, Any]) -> list[str]:
    """What is less than wanted."""
    wanted, found = _wanted(name, part), []
    for row in (Row(**row) for row in part["rows"]):
        for contender, least in wanted.items():
            ratio = row.ratio(contender)
            if ratio is not None and ratio < least:
                found.append(f"{name}, {row.title}: {HEADS[contender]} {ratio:.2f}, wanted {least:.2f}")
    return found


def _wanted(name: str, part: Mapping[str, Any]) -> Mapping[str, float]:
    """By contender; of small sizes nothing."""
    return WANTED.get(name, {} if name in STEPS else WANTED_OF_KERNELS) if part["scale"] == "full" else {}


def _ratios(rows: Sequence[Row], wanted: Mapping[str, float]) -> list[str]:
    columns = [column for column in HEADS if any(column in row.seconds or column in row.failed for row in rows)]
    lines = _head(["", "graphshard", "GB/s", *(HEADS[column] for column in columns)])
    for row in rows:
        seconds = row.seconds.get(OURS)
        rate = f"{row.facts['bytes'] / seconds / 1e9:.0f}" if seconds and "bytes" in row.facts else ""
        lines.append(_line([row.title, _time(seconds), rate, *(_cell(row, column, wanted) for column in columns)]))
    return lines


def _steps(rows: Sequence[Row], wanted: Mapping[str, float]) -> list[str]:
    lines = _head(["", "plan", "a step", "times as long", "tokens/s", "MFU", "peak memory", "loss"])
    for row in rows:
        facts = row.facts
        for who in dict.fromkeys([*facts.get("plans", {}), EAGER, INDUCTOR]):
            seconds = row.seconds.get(who)
            if seconds is None:
                lines.append(_line([who, facts.get("plans", {}).get(who, ""), "failed" * (who in row.failed)]))
                continue
            peak = facts.get("peak_flops")
            lines.append(
                _line(
                    [
                        who,
                        f"`{plan}`" if (plan := facts["plans"].get(who)) else "",
                        _time(seconds),
                        "" if who == OURS else _cell(row, who, wanted),
                        f"{facts['tokens'] / seconds:,.0f}",
                        f"{facts['flops'] / seconds / peak:.1%}" if peak else "",
                        f"{facts['peak_bytes'][who] / 1e9:.2f} GB" if who in facts["peak_bytes"] else "",
                        f"{facts['losses'][who]:.4f}",
                    ]
                )
            )
        lines += ["", f"{row.title}; {facts.get('flops', 0) / 1e12:.2f} TFLOP a step (peak_flops.py)."]
    return lines


def _cell(row: Row, contender: str, wanted: Mapping[str, float]) -> str:
    ratio = row.ratio(contender)
    if ratio is None:
        return "failed" * (contender in row.failed)
    return f"{ratio:.2f}" + (" ✗" if ratio < wanted.get(contender, 0.0) else "")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "failed"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 0.01 else f"{seconds * 1e6:.1f} µs"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

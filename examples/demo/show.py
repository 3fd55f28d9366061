"""What the main job shows: a progress bar, tables of memory and passes, a picture of the loss."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

_LINE_EVERY_S = 15.0  # where no bar can be drawn


class Progress:
    """A bar with loss, tokens per second and bytes sent; one JSON line a step in ``metrics``."""

    def __init__(self, console: Console, steps: int, tokens: int, sent_bytes: int, metrics: Path | None) -> None:
        """``tokens`` and ``sent_bytes`` are those of one step, all ranks together."""
        self._console, self._steps, self._tokens, self._sent = console, steps, tokens, sent_bytes
        text = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s  {task.fields[sent]} sent")
        self._bar = Bar(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn(), console=console
        )
        self._task = self._bar.add_task("", total=steps, loss=math.nan, rate=0.0, sent=human_bytes(0))
        self._file = None
        if metrics is not None:
            metrics.parent.mkdir(parents=True, exist_ok=True)
            self._file = metrics.open("w", encoding="utf-8", buffering=1)
        self._begin = self._last = self._said = time.perf_counter()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def step(self, index: int, loss: float, lr: float) -> None:
        """Step ``index``, from 0, is done; ``loss`` in nats per byte."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = self._tokens * (index + 1) / (now - self._begin)
        sent = human_bytes(self._sent * (index + 1))
        self._bar.update(self._task, advance=1, loss=loss, rate=rate, sent=sent)
        if not self._console.is_terminal and (now - self._said > _LINE_EVERY_S or index + 1 == self._steps):
            self._said = now
            self._console.print(f"step {index + 1}/{self._steps}  loss {loss:.3f}  {rate:,.0f} tokens/s  {sent} sent")
        if self._file is not None:
            record = {
                "step": index,
                "loss": loss,
                "bits_per_byte": loss / math.log(2),
                "lr": lr,
                "seconds": seconds,
                "tokens_per_second": self._tokens / seconds,
                "sent_bytes": self._sent,
            }
            self._file.write(json.dumps(record) + "\n")


def memory_table(report: Mapping[str, Any], one_device: Mapping[str, Any], resident: Sequence[int]) -> Table:
    """Peak bytes by what they are, a column for every set of like ranks, beside one device that does the same step.

    ``resident``: what was measured of each rank, everything included; empty: nothing was.
    """
    single = one_device["ranks"][0]
    columns = [(f"rank {_ranges(ranks)}", account, ranks) for account, ranks in _alike(report["ranks"])]
    columns.append(("one device", single, []))
    table = Table(title="peak memory, MB")
    table.add_column("by the plan", no_wrap=True)
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    names = {name for _, account, _ in columns for name, size in account["memory"].items() if size}
    for name in sorted(names, key=lambda name: (-single["memory"].get(name, 0), name)):
        table.add_row(name, *(_megabytes(account["memory"].get(name, 0)) for _, account, _ in columns))
    table.add_section()
    table.add_row("peak", *(_megabytes(account["peak_bytes"]) for _, account, _ in columns), style="bold")
    table.add_row(
        "of one device", *(f"{account['peak_bytes'] / single['peak_bytes']:.0%}" for _, account, _ in columns)
    )
    if resident:
        largest = (max((resident[rank] for rank in ranks), default=None) for _, _, ranks in columns)
        table.add_row("measured, all of it", *("" if size is None else _megabytes(size) for size in largest))
    return table


def _alike(ranks: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[int]]]:
    """Ranks with the same account of memory, together."""
    found: list[tuple[Mapping[str, Any], list[int]]] = []
    for rank in ranks:
        like = next((members for account, members in found if account["memory"] == rank["memory"]), None)
        if like is None:
            found.append((rank, [rank["rank"]]))
        else:
            like.append(rank["rank"])
    return found


def _ranges(ranks: Sequence[int]) -> str:
    """``0-3`` of 0, 1, 2, 3; ``0, 2`` of 0, 2."""
    first, last = ranks[0], ranks[-1]
    if len(ranks) > 1 and list(ranks) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(map(str, ranks))


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


def pass_table(report: Mapping[str, Any]) -> Table:
    """What each pass did to the number of operations, and how long it took."""
    table = Table(title="passes")
    for title in ("pass", "options"):
        table.add_column(title)
    for title in ("operations after", "change", "ms"):
        table.add_column(title, justify="right")
    before: int | None = None
    for item in report["passes"]:
        change = "" if before is None else f"{item['nodes'] - before:+d}"
        table.add_row(item["name"], item.get("options", ""), str(item["nodes"]), change, f"{item['seconds'] * 1e3:.0f}")
        before = item["nodes"]
    return table


def plot_losses(losses: Sequence[float], held_out: tuple[float, float], path: Path) -> Path | None:
    """A PNG of the training loss and the held-out loss (before, after) in bits per byte; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), [loss / math.log(2) for loss in losses], label="training", linewidth=1.2)
    axes.plot([0, len(losses)], held_out, "o", color="black", label="held out, before and after")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path


def human_bytes(count: float) -> str:
    """As a person reads them; 1 kB is 1000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

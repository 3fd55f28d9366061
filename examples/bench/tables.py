"""How the benchmark's result looks on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def row_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a row; a star marks times of which no step was undisturbed."""
    caption = (
        "MB sent: mean of the ranks, graphshard's as planned, others' as the loopback device counts it. "
        "The minimum is for the gathers a row is meant to do; one at a micro-batch's turning point may be saved. "
        "Gathers: of a parameter, per micro-batch. Faults: pages that the system gives a step, of the rank with most."
    )
    table = Table(title="per step", caption=caption)
    table.add_column("row", no_wrap=True)
    for title in ("ranks", "median s", "kept", "GB RSS", "faults", "MB sent", "minimum", "gathers", "loss off"):
        table.add_column(title, justify="right", no_wrap=title in ("median s", "loss off"))
    for row in rows:
        sent = row["sent_bytes"] if row["sent_bytes"] is not None else row["loopback_bytes"]
        several = row["ranks"] > 1
        table.add_row(
            row["name"],
            str(row["ranks"]),
            f"{row['seconds']:.3f}" + ("*" if row["disturbed"] else ""),
            f"{row['steps_kept']}/{row['steps']}",
            f"{row['peak_rss_bytes'] / 1e9:.2f}",
            f"{row['page_faults']:.0f}",
            f"{sent / 1e6:.1f}" if several else "",
            f"{row['minimum_bytes'] / 1e6:.1f}" if several else "",
            f"{row['gathers_per_microbatch']:.2f}" if row["gathers_per_microbatch"] else "",
            "" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}",
        )
    return table


def comparison_table(comparisons: Sequence[dict[str, Any]]) -> Table:
    """graphshard against the faster of its peers."""
    caption = "Time: of the two steps of a turn, the median over turns. Fastest: of the fastest step of each."
    table = Table(title="step time and peak memory, as parts of the peer's", caption=caption)
    for title in ("row", "faster peer"):
        table.add_column(title, no_wrap=True)
    for title in ("time", "fastest", "to reach", "memory"):
        table.add_column(title, justify="right")
    for item in comparisons:
        colour = "green" if item["ratio"] <= item["reach"] else "yellow"
        table.add_row(
            item["row"],
            item["peer"],
            f"[{colour}]{item['ratio']:.3f}[/]",
            f"{item['fastest_ratio']:.3f}",
            f"{item['reach']:.2f}",
            f"{item['memory_ratio']:.2f}",
        )
    return table

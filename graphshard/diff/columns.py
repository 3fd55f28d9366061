"""A diff side by side, for wide terminals."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphshard.diff.difference import Diff, Difference, Kind
from graphshard.diff.plain_text import MARKS, collapsed, counts, group_line, notes, summary
from graphshard.diff.rows import Row, rows

SIDE_BY_SIDE_COLUMNS = 140
"""From this width on, two columns hold most lines of graph text without folding them."""

_STYLES = {"+": "green", "-": "red", "~": "yellow", " ": "dim"}


def side_by_side(diff: Diff, console: Console) -> None:
    """Print both graphs in two columns, what is the same left out but for one line around each change,
    and changes that are one and the same for many nodes said once."""
    if not diff:
        console.print("no difference")
        return
    console.print("\n".join(map(escape, summary(diff))), "", sep="\n", highlight=False)
    for line in diff.header:
        console.print(escape(line), style=_STYLES[line[:1]], highlight=False)
    for section, mine in rows(diff).items():
        if all(row.difference.kind is Kind.SAME for row in mine):
            continue
        console.print(f"\n[bold]graph {section}: {counts(mine) or 'nodes moved away'}[/bold]", highlight=False)
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(ratio=1, overflow="fold")
        table.add_column(width=1)
        table.add_column(ratio=1, overflow="fold")
        for line in _group_lines(mine, bool(diff.steps)):
            console.print(escape(line), style=_STYLES["~"], highlight=False)
        for cells in _cells(mine, bool(diff.steps)):
            table.add_row(*cells)
        console.print(table, highlight=False)


def _group_lines(mine: list[Row], several: bool) -> Iterator[str]:
    groups = {id(group): group for group in collapsed(mine).values()}
    yield from (group_line(group, several) for group in groups.values())


def _cells(mine: list[Row], several: bool) -> Iterator[tuple[str, str, str]]:
    """Columns of the rows that differ for themselves, or stand beside one that does."""
    groups = collapsed(mine)
    differs = [row.difference.kind is not Kind.SAME and id(row.difference) not in groups for row in mine]
    skipped = 0
    for position, row in enumerate(mine):
        if not any(differs[max(0, position - 1) : position + 2]):
            skipped += 1
            continue
        if skipped:
            yield f"[dim]... {skipped} more[/dim]", "", ""
            skipped = 0
        mark = MARKS.get(row.difference.kind, "~")
        style = _STYLES[mark]
        left, right = (f"[{style}]{escape(entry.text)}[/]" if entry else "" for entry in (row.before, row.after))
        if row.after:
            right += "".join(f"\n  [{style} italic]{escape(note)}[/]" for note in notes(row.difference, several))
        elif row.difference.kind is not Kind.REMOVED:
            left += f"\n  [{style} italic]now at {escape(_where(row.difference))}[/]"
        elif several and row.difference.by:
            left += f"\n  [{style} italic]by {escape(', '.join(row.difference.by))}[/]"
        yield left, mark, right
    if skipped:
        yield f"[dim]... {skipped} more[/dim]", "", ""


def _where(found: Difference) -> str:
    return f"%{found.entry.name} in graph {found.entry.section}"

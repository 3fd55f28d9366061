"""A diff as text: unified for pipes and narrow terminals, side by side for wide ones; costs first in both."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphshard.cost_change import by_pass, cost_changes
from graphshard.diff_rows import Row, rows
from graphshard.difference import Diff, Difference, Kind

SIDE_BY_SIDE_COLUMNS = 140
"""From this width on, two columns hold most lines of graph text without folding them."""

_COLLAPSE = 4
"""As many nodes with one and the same change of type or attributes print as one line."""

_SIMPLE = ("type", "phase", "module", "stage", "tag", "layout")
_MARKS = {Kind.ADDED: "+", Kind.DUPLICATED: "+", Kind.REMOVED: "-", Kind.SAME: " "}
_STYLES = {"+": "green", "-": "red", "~": "yellow", " ": "dim"}


def unified(diff: Diff, color: bool = False) -> str:
    """Graph by graph: ``+`` added, ``-`` removed, ``~`` changed; ``color``: with ANSI escapes."""
    if not diff:
        return "no difference"
    blocks = ["\n".join(summary(diff))]
    blocks += ["\n".join(diff.header)] if diff.header else []
    for section, mine in rows(diff).items():
        lines = list(_lines(mine, bool(diff.steps)))
        if lines:
            blocks.append("\n".join([f"graph {section}: {_counts(mine)}", *(f"  {line}" for line in lines)]))
    whole = "\n\n".join(blocks)
    return "\n".join(map(_paint, whole.split("\n"))) if color else whole


def side_by_side(diff: Diff, console: Console) -> None:
    """Print both graphs in two columns, with what is the same left out but for one line around each change."""
    if not diff:
        console.print("no difference")
        return
    console.print("\n".join(map(escape, summary(diff))), "", sep="\n", highlight=False)
    for line in diff.header:
        console.print(escape(line), style=_STYLES[line[:1]], highlight=False)
    for section, mine in rows(diff).items():
        if all(row.difference.kind is Kind.SAME for row in mine):
            continue
        console.print(f"\n[bold]graph {section}: {_counts(mine) or 'nodes moved away'}[/bold]", highlight=False)
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(ratio=1, overflow="fold")
        table.add_column(width=1)
        table.add_column(ratio=1, overflow="fold")
        for cells in _cells(mine, bool(diff.steps)):
            table.add_row(*cells)
        console.print(table, highlight=False)


def summary(diff: Diff) -> Iterator[str]:
    """The costs of a step before and after, aligned in columns; then what each pass did to them."""
    table = [("a step", "before", "after", "change")]
    table += [(change.title, *change.spelled()) for change in cost_changes(diff.before, diff.after)]
    yield from _columns(table)
    if changes := by_pass(diff.before, diff.steps):
        yield ""
        heading = ("by pass", *(change.title for change in changes[0][1]))
        yield from _columns([heading, *((name, *(c.spelled()[2] for c in found)) for name, found in changes)])


def _columns(table: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _lines(mine: list[Row], several: bool) -> Iterator[str]:
    """What differs, each at its row; many alike changes once, at the first."""
    alike = defaultdict[tuple[tuple[str, ...], ...], list[Difference]](list)
    for row in mine:
        if _is_slight(row):
            alike[row.difference.what, row.difference.by].append(row.difference)
    for row in mine:
        found = row.difference
        group = alike[found.what, found.by] if _is_slight(row) else []
        notes = list(_notes(found, several))
        if len(group) < _COLLAPSE and _is_shown(row):
            yield f"{_MARKS.get(found.kind, '~')} {found.entry.text}"
            yield from (f"    {note}" for note in notes)
        elif group and group[0] is found:
            names = [f"%{one.entry.name}" for one in group]
            listing = ", ".join(names if len(names) <= _COLLAPSE else [*names[:3], "...", names[-1]])
            yield f"~ {len(group)} nodes: {'; '.join(notes)} ({listing})"


def _is_slight(row: Row) -> bool:
    """Whether only type and attributes changed."""
    found = row.difference
    slight = all(line.split(":")[0] in _SIMPLE for line in found.what)
    return row.after is not None and found.kind in (Kind.CHANGED, Kind.PLACED, Kind.RESTAGED) and slight


def _is_shown(row: Row) -> bool:
    """Whether a row says what differs, not only where a partner of another row was."""
    kind = row.difference.kind
    return kind is not Kind.SAME and (row.after is not None or kind is Kind.REMOVED)


def _notes(found: Difference, several: bool) -> Iterator[str]:
    """What differs, and who is responsible, if there are several to choose from and the text does not say it."""
    if found.kind is Kind.DUPLICATED and found.before:
        elsewhere = f" in graph {found.before.section}" if found.before.section != found.entry.section else ""
        yield f"copy of %{found.before.name}{elsewhere}"
    yield from found.what
    if several and found.by and not (found.after and found.by == (found.after.made_by,)):
        yield f"by {', '.join(found.by)}"


def _counts(mine: list[Row]) -> str:
    counts = Counter(row.difference.kind for row in mine if _is_shown(row))
    words = {Kind.MOVED: "moved here"}
    return ", ".join(f"{counts[kind]} {words.get(kind, kind)}" for kind in Kind if counts[kind])


def _cells(mine: list[Row], several: bool) -> Iterator[tuple[str, str, str]]:
    """Columns of the rows that differ or stand beside one that does."""
    differs = [row.difference.kind is not Kind.SAME for row in mine]
    skipped = 0
    for position, row in enumerate(mine):
        if not any(differs[max(0, position - 1) : position + 2]):
            skipped += 1
            continue
        if skipped:
            yield f"[dim]... {skipped} the same[/dim]", "", ""
            skipped = 0
        mark = _MARKS.get(row.difference.kind, "~")
        style = _STYLES[mark]
        left, right = (f"[{style}]{escape(entry.text)}[/]" if entry else "" for entry in (row.before, row.after))
        if row.after:
            right += "".join(f"\n  [{style} italic]{escape(note)}[/]" for note in _notes(row.difference, several))
        elif row.difference.kind is not Kind.REMOVED:
            left += f"\n  [{style} italic]now at {escape(_where(row.difference))}[/]"
        elif several and row.difference.by:
            left += f"\n  [{style} italic]by {escape(', '.join(row.difference.by))}[/]"
        yield left, mark, right
    if skipped:
        yield f"[dim]... {skipped} the same[/dim]", "", ""


def _where(found: Difference) -> str:
    return f"%{found.entry.name} in graph {found.entry.section}"


def _paint(line: str) -> str:
    """``line`` in the colour of its mark, by ANSI escapes."""
    mark = line.lstrip()[:1]
    code = {"+": "32", "-": "31", "~": "33"}.get(mark) or ("1" if line.startswith("graph ") else "")
    return f"\x1b[{code}m{line}\x1b[0m" if code else line

"""A diff as text, graph by graph, for pipes and narrow terminals: the costs of a step, then what differs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from graphshard.diff.cost_change import by_pass, cost_changes
from graphshard.diff.difference import Diff, Difference, Kind
from graphshard.diff.rows import Row, rows

_COLLAPSE = 4
"""As many nodes with one and the same change of type or attributes print as one line."""

_SIMPLE = ("type", "phase", "module", "stage", "tag", "layout")
MARKS = {Kind.ADDED: "+", Kind.DUPLICATED: "+", Kind.REMOVED: "-", Kind.SAME: " "}


def unified(diff: Diff, color: bool = False) -> str:
    """Graph by graph: ``+`` added, ``-`` removed, ``~`` changed; ``color``: with ANSI escapes."""
    if not diff:
        return "no difference"
    blocks = ["\n".join(summary(diff))]
    blocks += ["\n".join(_header(diff.header))] if diff.header else []
    for section, mine in rows(diff).items():
        lines = list(_lines(mine, bool(diff.steps)))
        if lines:
            blocks.append("\n".join([f"graph {section}: {counts(mine)}", *(f"  {line}" for line in lines)]))
    whole = "\n\n".join(blocks)
    return "\n".join(map(_paint, whole.split("\n"))) if color else whole


def _header(lines: Sequence[str]) -> Iterator[str]:
    """Lines of the header that came or went; of a thing that stays and changes one, with what it is after."""
    gone = {_subject(line): line for line in lines if line.startswith("- ")}
    came = {_subject(line): line for line in lines if line.startswith("+ ")}
    for line in lines:
        if " : " not in line or not (_subject(line) in gone and _subject(line) in came):
            yield line
        elif line.startswith("+ "):
            was = gone[_subject(line)].partition(" : ")[2]
            yield f"~ {_subject(line)} : {was} -> {line.partition(' : ')[2]}"


def _subject(line: str) -> str:
    return line[2:].partition(" : ")[0]


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
    groups = collapsed(mine)
    for row in mine:
        found = row.difference
        group = groups.get(id(found))
        if group is None and _is_shown(row):
            yield f"{MARKS.get(found.kind, '~')} {found.entry.text}"
            yield from (f"    {note}" for note in notes(found, several))
        elif group is not None and group[0] is found and row.after:
            yield group_line(group, several)


def collapsed(mine: list[Row]) -> dict[int, list[Difference]]:
    """Changes that are one and the same for many nodes: each by identity to all of its group, in order."""
    alike = defaultdict[tuple[tuple[str, ...], ...], list[Difference]](list)
    for row in mine:
        if _is_slight(row):
            alike[row.difference.what, row.difference.by].append(row.difference)
    return {id(one): group for group in alike.values() if len(group) >= _COLLAPSE for one in group}


def group_line(group: list[Difference], several: bool) -> str:
    """``~ 9 nodes: stage: None -> 1 (%a, %b, %c, ..., %z)``."""
    names = [f"%{one.entry.name}" for one in group]
    listing = ", ".join(names if len(names) <= _COLLAPSE else [*names[:3], "...", names[-1]])
    return f"~ {len(group)} nodes: {'; '.join(notes(group[0], several))} ({listing})"


def _is_slight(row: Row) -> bool:
    """Whether only type and attributes changed."""
    found = row.difference
    slight = all(line.split(":")[0] in _SIMPLE for line in found.what)
    return row.after is not None and found.kind in (Kind.CHANGED, Kind.PLACED, Kind.RESTAGED) and slight


def _is_shown(row: Row) -> bool:
    """Whether a row says what differs, not only where a partner of another row was."""
    kind = row.difference.kind
    return kind is not Kind.SAME and (row.after is not None or kind is Kind.REMOVED)


def notes(found: Difference, several: bool) -> Iterator[str]:
    """What differs, and who is responsible, if there are several to choose from and the text does not say it."""
    if found.kind is Kind.DUPLICATED and found.before:
        elsewhere = f" in graph {found.before.section}" if found.before.section != found.entry.section else ""
        yield f"copy of %{found.before.name}{elsewhere}"
    yield from found.what
    if several and found.by and not (found.after and found.by == (found.after.made_by,)):
        yield f"by {', '.join(found.by)}"


def counts(mine: list[Row]) -> str:
    """How many there are of each kind: ``1 added, 2 changed``."""
    found = Counter(row.difference.kind for row in mine if _is_shown(row))
    words = {Kind.MOVED: "moved here"}
    return ", ".join(f"{found[kind]} {words.get(kind, kind)}" for kind in Kind if found[kind])


def _paint(line: str) -> str:
    """``line`` in the colour of its mark, by ANSI escapes."""
    mark = line.lstrip()[:1]
    code = {"+": "32", "-": "31", "~": "33"}.get(mark) or ("1" if line.startswith("graph ") else "")
    return f"\x1b[{code}m{line}\x1b[0m" if code else line

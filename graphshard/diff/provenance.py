"""Which pass is responsible for what several passes did together: each entry is followed from graph to graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphshard.diff.difference import Diff, Difference, Entry, Kind

Key = tuple[str, str]


def attribute(whole: Diff, steps: Sequence[tuple[str, Diff]]) -> Diff:
    """``whole`` with the passes responsible for every entry, and the costs after each pass.

    ``steps``: the passes that lie between, in order, each with its own diff. What was added or duplicated is the work
    of the pass that made it; what is gone, of the one after which it was no longer there; what changed, of all that
    changed the same of it.
    """
    chains = _Chains([(name, step) for name, step in steps])
    entries = tuple(
        entry if entry.kind is Kind.SAME else replace(entry, by=tuple(chains.responsible(entry)))
        for entry in whole.entries
    )
    return replace(whole, entries=entries, steps=tuple((name, step.after) for name, step in steps))


class _Chains:
    """The steps' entries by what they were before and are after."""

    def __init__(self, steps: Sequence[tuple[str, Diff]]) -> None:
        self.names = [name for name, _ in steps]
        self.by_before: list[dict[Key, Difference]] = []
        self.by_after: list[dict[Key, Difference]] = []
        for _, step in steps:
            partners = [entry for entry in step.entries if entry.kind.has_own_partner]
            self.by_before.append({entry.before.key: entry for entry in partners if entry.before})
            self.by_after.append({entry.after.key: entry for entry in step.entries if entry.after})

    def responsible(self, found: Difference) -> Iterator[str]:
        """Names of passes, in the order they ran."""
        if found.after is None:
            assert found.before is not None
            yield from self._end(found.before)
        elif found.kind in (Kind.ADDED, Kind.DUPLICATED):
            yield from self._begin(found.after)
        else:
            aspects = {line.partition(":")[0] for line in found.what}
            touched = [(name, step) for name, step in self._back(found.after) if step.kind is not Kind.SAME]
            alike = [n for n, step in touched if aspects & {line.partition(":")[0] for line in step.what}]
            yield from reversed(alike or [name for name, _ in touched])

    def _end(self, entry: Entry) -> Iterator[str]:
        key = entry.key
        for name, step in zip(self.names, self.by_before, strict=True):
            found = step.get(key)
            if found is None:
                return
            if found.after is None:
                yield name
                return
            key = found.after.key

    def _begin(self, entry: Entry) -> Iterator[str]:
        if entry.made_by:
            yield entry.made_by
            return
        # Its way back ends where it was made.
        yield from (name for name, step in self._back(entry) if step.kind in (Kind.ADDED, Kind.DUPLICATED))

    def _back(self, entry: Entry) -> Iterator[tuple[str, Difference]]:
        """What each pass did to what became ``entry``, the last pass first, as far back as it was there."""
        key = entry.key
        for name, step in zip(reversed(self.names), reversed(self.by_after), strict=True):
            found = step.get(key)
            if found is None:
                return
            yield name, found
            if found.before is None or not found.kind.has_own_partner:
                return
            key = found.before.key

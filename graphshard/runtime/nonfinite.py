"""Which node made the first NaN or infinity of a step, from what all ranks saw.

A value is bad if an element is NaN or infinite. Only bad values that a bad loss or gradient is computed from count, so
that a mask's -inf is no matter while what is computed from it stays finite. From a bad loss or gradient the search goes
back through bad values, over stages and micro-batches, to those that nothing bad went into:

- from a NaN to the NaNs it was computed from: an infinity beside them did not make it one;
- where there are none, a NaN comes of infinities (inf - inf, 0 * inf): the search goes on to where those were made. An
  infinity that the program writes down itself (``masked_fill(x, mask, -inf)``), or that a buffer or constant holds, is
  meant: if there are no others, the node that made NaN of it is what went wrong, such as the softmax of a row that is
  masked altogether;
- from an infinity to the infinities it was computed from, else to the NaNs.

Of several the one that ran first is named: by micro-batch; forward before backward; forward by ascending stage,
backward by descending; by its place in the graph; by data-parallel rank. So a sum that is bad because of an earlier
micro-batch, or of another data-parallel rank, comes behind what made its part bad, and is named only if all that went
into it was finite. Sums over ranks that are part of the update (``dp`` and ``zero1``) are not looked at.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphshard.errors import NonFiniteStep
from graphshard.execution import SUM, ExecutionPlan, Watched
from graphshard.runtime.watch import Bad

Account = Sequence[Bad]


@dataclass(frozen=True)
class _Key:
    """A value of a step."""

    dp_rank: int
    stage: int
    name: str
    microbatch: int


def judge(plan: ExecutionPlan, accounts: Mapping[int, Account]) -> NonFiniteStep | None:
    """What all ranks of ``plan`` saw in one step, by rank, to the error to raise; None if loss and gradients are
    finite."""
    return _Search(plan, accounts).run()


class _Search:
    def __init__(self, plan: ExecutionPlan, accounts: Mapping[int, Account]) -> None:
        self.tables = [stage.watched for stage in plan.stages]
        self.places = [{name: index for index, name in enumerate(table)} for table in self.tables]
        self.dp_size = plan.mesh.dp_size
        self.bad: dict[_Key, Bad] = {}
        for rank, account in accounts.items():
            stage, dp_rank = plan.mesh.coordinates(rank)["pp"], plan.mesh.dp_rank(rank)
            for bad in account:
                self.bad[_Key(dp_rank, stage, bad.name, bad.microbatch)] = bad

    def run(self) -> NonFiniteStep | None:
        results = [key for key in self.bad if self._watched(key).result]
        if not results:
            return None
        found = set(self._origins(results))
        first = min([key for key in found if not self._meant(key)] or found, key=self._when)
        names = dict.fromkeys(self._watched(key).result for key in sorted(results, key=self._when))
        return NonFiniteStep(_outcome(list(names)), self._told(first))

    def _watched(self, key: _Key) -> Watched:
        return self.tables[key.stage][key.name]

    def _meant(self, key: _Key) -> bool:
        """Whether an infinity is there on purpose."""
        watched = self._watched(key)
        return not self.bad[key].seen.nan and (watched.infinite or watched.given.startswith(("buffer", "constant")))

    def _reads(self, key: _Key) -> list[_Key]:
        """The bad values that a bad value was computed from."""
        watched = self._watched(key)
        reads = [_Key(key.dp_rank, stage, name, key.microbatch) for stage, name in watched.reads]
        if watched.carried:
            reads.append(_Key(key.dp_rank, key.stage, watched.carried, key.microbatch - 1))
        return [source for source in reads if source in self.bad]

    def _origins(self, results: Iterable[_Key]) -> Iterable[_Key]:
        for root in self._roots(results):
            infinities = self._reads(root)  # a NaN that no NaN went into
            deeper = [key for key in self._roots(infinities) if not self._meant(key)]
            yield from deeper or [root]

    def _roots(self, starts: Iterable[_Key]) -> list[_Key]:
        """Where the search from ``starts`` through values of one kind ends."""
        pending, seen, roots = list(starts), set[_Key](), []
        while pending:
            key = pending.pop()
            if key in seen:
                continue
            seen.add(key)
            reads, nan = self._reads(key), bool(self.bad[key].seen.nan)
            alike = [source for source in reads if bool(self.bad[source].seen.nan) == nan]
            onward = alike or ([] if nan else reads)
            pending += onward
            roots += [] if onward else [key]
        return roots

    def _when(self, key: _Key) -> tuple[int, ...]:
        forward = self._watched(key).phase == "forward"
        stage = key.stage if forward else -key.stage
        return key.microbatch, not forward, stage, self.places[key.stage][key.name], key.dp_rank

    def _told(self, key: _Key) -> list[str]:
        """Lines about the value that was bad first."""
        watched, bad = self._watched(key), self.bad[key]
        at = f"micro-batch {key.microbatch}, data-parallel rank {key.dp_rank} of {self.dp_size}"
        if watched.given:
            return [f"it was there before the step, in {watched.given}: {bad.seen}", f"seen on stage {key.stage}, {at}"]
        lines = [f"first made by {watched.text}"]
        if watched.source:
            file, _, line = watched.source.rpartition(":")
            code = linecache.getline(file, int(line)).strip()
            lines.append(f"from {watched.source}" + (f": {code}" if code else ""))
        module = f", module {watched.module}" if watched.module else ""
        lines.append(f"in graph body, phase {watched.phase}, stage {key.stage}, {at}{module}")
        lines.append(f"its value: {bad.seen}")
        return lines + [f"of %{name}: {seen}" for name, seen in bad.reads.items()]


def _outcome(names: list[str]) -> str:
    """``the loss and 4 gradients, such as the gradient of parameter 'w', are``."""
    gradients = [name for name in names if name not in ("the loss", SUM)]
    if not gradients:
        return f"{names[0]} is"
    told = gradients[0] if len(gradients) == 1 else f"{len(gradients)} gradients, such as {gradients[0]},"
    if "the loss" in names:
        return f"the loss and {told} are"
    return f"{told} {'is' if len(gradients) == 1 else 'are'}"

"""Which pass is responsible: the program after each prefix of the pass list is run or measured, until one is wrong.

Every program is run for all ranks in one process, node by node (reference.py). The one before the first pass says what
is right; what is wrong there already is nobody's fault but the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import fx

from graphshard.check import RTOL, check_passes
from graphshard.costs import costs
from graphshard.errors import IllegalProgram, NodeFailed, NotEquivalent, PassFailed
from graphshard.pipeline import Context, Pass, run_passes
from graphshard.program import Program, info, tensors
from graphshard.reference import Results, run
from graphshard.reference_inputs import Inputs
from graphshard.rewrite import copied
from graphshard.rounding import LOWER, lower_precision, tolerance, wrong
from graphshard.rounding import losses as losses_of
from graphshard.units import human

Until = Literal["loss", "nan", "memory", "verify"]
CAPTURE, CODEGEN = "capture", "codegen"  # what comes before the first pass, and after the last
_MORE = 1.01  # than before all passes: padding of buckets is nobody's fault
_ROUNDING = 1e-3  # relative: of a loss after a few steps in the program's dtypes, summed in another order


@dataclass(frozen=True)
class Seen:
    """What there is after a prefix of the passes, ``name`` being the last of them. ``wrong``: why it is responsible."""

    name: str
    what: str
    wrong: str = ""

    @property
    def blamed(self) -> str:
        """Who is responsible."""
        special = {CAPTURE: "the model, before any pass", CODEGEN: "code generation or the executor, after all passes"}
        return special.get(self.name, f"pass {self.name!r}")


def bisect(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context,
    until: Until,
    inputs: Inputs,
    *,
    limit_gb: float | None = None,
    execute: Callable[[], list[float]] | None = None,
) -> Iterator[Seen]:
    """What is seen after each prefix of ``passes``; the last one given is wrong, if any is.

    Args:
        until: "loss": a step's loss is another one than before all passes, in float64, or by more than rounding in the
            program's own bf16 or fp16. "nan": a loss, parameter or state is not
            finite, in the dtypes of the program. "memory": a rank's estimated peak (costs.py) exceeds ``limit_gb``
            times 10^9 bytes, without a limit that before all passes by more than a hundredth. "verify": a value
            differs, or a rule is broken.
        inputs: what the programs are run on.
        execute: "loss", "nan": the losses of the same steps as an executor runs the plan of the last program, which is
            compared with that program in its own dtypes.
    """
    if until == "verify":
        yield from _verified(program, passes, ctx, inputs)
        return
    looks: dict[str, Callable[[str, Program], Seen]] = {
        "loss": _Loss(inputs),
        "nan": _NotFinite(inputs),
        "memory": _Peak(limit_gb),
    }
    for name, after in _prefixes(program, passes, ctx):
        seen = looks[until](name, after)
        yield seen
        if seen.wrong:
            return
    if execute is not None:
        yield _executed(execute(), run(after, inputs, wide=False), lower_precision(after))


def _prefixes(program: Program, passes: Sequence[Pass], ctx: Context) -> Iterator[tuple[str, Program]]:
    yield CAPTURE, program
    for item in passes:
        program = run_passes(copied(program), [item], ctx)
        yield item.name, program


def _verified(program: Program, passes: Sequence[Pass], ctx: Context, inputs: Inputs) -> Iterator[Seen]:
    found: list[Pass] = []
    try:
        for item in check_passes(program, list(passes), ctx, inputs):
            found.append(item)
            yield Seen(item.name, "the same to the bit" if item.exact else f"the same within {RTOL:g}")
    except (NotEquivalent, IllegalProgram, PassFailed) as error:
        yield Seen(passes[len(found)].name, "is wrong", error.what)


def _listed(losses: Sequence[float]) -> str:
    return "loss " + ", ".join(f"{loss:.9g}" for loss in losses)


def _executed(losses: list[float], expected: Results, dtype: torch.dtype | None) -> Seen:
    allowed = _ROUNDING if dtype is None else tolerance(dtype)
    return Seen(CODEGEN, _listed(losses), wrong(losses, losses_of(expected), allowed))


class _Loss:
    """In float64, where what differs is a mistake; of a lower precision also as it rounds."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.expected: list[float] | None = None

    def __call__(self, name: str, program: Program) -> Seen:
        dtype = lower_precision(program)
        try:
            losses = losses_of(run(program, self.inputs))
            rounded = None if dtype is None else losses_of(run(program, self.inputs, wide=False))
        except NodeFailed as failed:
            return Seen(name, "cannot be run", failed.what)
        if self.expected is None:
            self.expected = losses
            if not all(map(isfinite, losses)):
                return Seen(name, _listed(losses), "the loss is not finite; see --until nan")
        if (found := wrong(losses, self.expected, RTOL)) or dtype is None or rounded is None:
            return Seen(name, _listed(losses), found)
        found = wrong(rounded, self.expected, tolerance(dtype))
        what = f"{_listed(losses)}; in {LOWER[dtype]} {', '.join(f'{loss:.9g}' for loss in rounded)}"
        return Seen(name, what, f"in {LOWER[dtype]} {found}" if found else "")


class _NotFinite:
    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __call__(self, name: str, program: Program) -> Seen:
        results = run(program, self.inputs, wide=False)
        for what, copies in results.values.items():
            if not all(_finite(value) for value in copies):
                return Seen(name, f"{what} is not finite", _producer(program, results.seen) or what)
        return Seen(name, "everything is finite")


def _producer(program: Program, seen: dict[fx.Node, Any]) -> str:
    """The first node whose value is not finite although its inputs are, of the first micro-batch; "" without one."""
    for section in program.sections().values():
        for node in section.nodes():
            inputs = [seen[source] for source in node.all_input_nodes if source in seen]
            if node in seen and not _finite(seen[node]) and all(map(_finite, inputs)):
                module = f" of module {info(node).module}" if info(node).module else ""
                return f"first at %{node.name} = {node.target}{module}"
    return ""


def _finite(value: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors(value) if t.dtype.is_floating_point)


class _Peak:
    def __init__(self, limit_gb: float | None) -> None:
        self.limit = None if limit_gb is None else limit_gb * 1e9

    def __call__(self, name: str, program: Program) -> Seen:
        peaks = [stage.peak_bytes for stage in costs(program).stages]
        what = "peak " + ", ".join(human(peak) for peak in peaks)
        if self.limit is None:
            self.limit = max(peaks) * _MORE
        if max(peaks) > self.limit:
            stage = peaks.index(max(peaks))
            least = f"more than {human(self.limit)}"
            return Seen(name, what, f"a rank of stage {stage} takes {human(max(peaks))} by estimate, {least}")
        return Seen(name, what)

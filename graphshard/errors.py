"""Every mistake a user can make, one class each. The command line prints the message alone and exits with status 2."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from graphshard.units import counted, human


class GraphshardError(Exception):
    """Base of all errors caused by input. Our own bugs are assertions, never this."""

    def add(self, consequence: str) -> None:
        """Say in the same line what follows from it."""
        self.args = (f"{self}; {consequence}",)


class IllegalProgram(GraphshardError):
    """A Program breaks a rule of its level: what is wrong and the node where it was found."""

    def __init__(self, rule: str, where: str) -> None:
        self.what = f"{rule} (at {where})"
        super().__init__(f"illegal program: {self.what}")
        self.rule = rule
        self.where = where


class NotEquivalent(GraphshardError):
    """A pass changed what a program means."""

    def __init__(self, pass_name: str, what: str, node: str) -> None:
        by = f"pass {pass_name!r} does not keep the program's meaning" if pass_name else "the programs differ"
        self.what = what + (f"; first at {node}" if node else "")
        super().__init__(f"{by}: {self.what}")


class NotFinite(GraphshardError):
    """A check runs a program on random inputs, and its loss is NaN or infinite: nothing can be compared."""

    def __init__(self, loss: float) -> None:
        super().__init__(
            f"on random inputs the loss is {loss}, so that nothing can be compared; `graphshard bisect --until loss` "
            "runs a model on its own values and batch"
        )


class RoundsTooMuch(GraphshardError):
    """In bf16 or fp16 a program's losses are others than in float64, by more than rounding explains."""

    def __init__(self, dtype: str, tolerance: float, what: str) -> None:
        super().__init__(
            f"in {dtype}, on random inputs, {what}, as in float64; {tolerance:.2g} is allowed, relative; "
            "`graphshard bisect --until loss` or `--until nan` runs a model on its own values and batch"
        )


class TooLargeToCheck(GraphshardError):
    """All ranks of a program in one process would not fit."""

    def __init__(self, gigabytes: float, limit: float) -> None:
        super().__init__(
            f"checking runs all ranks in this process in float64, which takes {human(gigabytes * 1e9)} where the limit "
            f"is {human(limit * 1e9)}; build a smaller model of the same structure, take fewer ranks, or raise "
            "--limit-gb"
        )


class NodeFailed(GraphshardError):
    """An operator of a program refuses the values that a check gives it."""

    def __init__(self, node: Any, error: Exception) -> None:
        self.node, self.what = node, f"%{node.name} = {node.target} says {str(error).partition(chr(10))[0]!r}"
        super().__init__(
            f"the program cannot be run on random inputs: {self.what}; check a model that takes any floats, and "
            "integers of 0 and 1"
        )


class NoLossGradient(GraphshardError):
    """Loss scaling of a program whose backward does not begin with the gradient of its loss."""

    def __init__(self) -> None:
        super().__init__(
            "fp16 scales the number, aten.full.default([], …), that the backward begins with; the body has gradients, "
            "but none that begin so"
        )


class TrainedParametersChanged(GraphshardError):
    """A later training program trains other parameters than the first one."""

    def __init__(self, gone: Sequence[str], new: Sequence[str]) -> None:
        changed, how = (new, "trained only now") if new else (gone, "trained no longer")
        others = len(changed) - 1
        named = f"{changed[0]!r} and {others} other{'s' * (others > 1)} are" if others else f"{changed[0]!r} is"
        state = "a fresh optimizer" if new else "optimizer.state_dict()"
        super().__init__(
            f"parameter {named} {how}, and the first training step has settled which parameters have optimizer state; "
            f"compile again, and give the new one this one's state_dict() and {state}"
        )


class NothingToLower(GraphshardError):
    """A plan in bf16 or fp16 of a model that has no float32 parameters to lower, or, in fp16, updates none."""

    def __init__(self, precision: str, updated: Iterable[str]) -> None:
        super().__init__(
            f"{precision}: of the model's parameters that are updated none is float32, they are "
            f"{' and '.join(sorted(updated))}; give a float32 model, which the plan lowers itself, or leave "
            f"{precision} out of the plan, which then trains the model as it is"
        )


class AmbientAutocast(GraphshardError):
    """torch.autocast is on around what is compiled, and not in the plan's precision. ``dtype``: the plan's."""

    def __init__(self, device: str, given: object, dtype: object) -> None:
        has = "has no precision" if dtype is None else f"computes in {dtype}"
        super().__init__(
            f"torch.autocast({device!r}, {given}) is on and the plan {has}: precision is the plan's; compile with "
            "'+bf16' or '+fp16' in the plan, and call step outside of torch.autocast"
        )


class PassFailed(GraphshardError):
    """A pass raises what is no error of ours, or returns something else than a program."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"pass {name!r} {what}; expected it to return the rewritten Program")
        self.what = what


class UnknownPass(GraphshardError):
    """A pass name that is neither in the table nor an importable ``module:Class``."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}, or module:Class"
        super().__init__(f"unknown pass {name!r}; {hint}")


class PassOptionError(GraphshardError):
    """An option a pass does not have, or a value of the wrong type or out of range."""

    def __init__(self, name: str, item: str, expected: str) -> None:
        super().__init__(f"pass {name!r} does not take {item!r}; expected {expected}")


class PassTooLate(GraphshardError):
    """A pass that rewrites captured programs is given one that has been cut or sharded."""

    def __init__(self, name: str, level: str) -> None:
        super().__init__(
            f"pass {name!r} takes a captured program, not a {level} one; run it before pipeline-cut and zero"
        )


class PlanSyntaxError(GraphshardError):
    """A plan string that does not parse; ``column`` counts from 1."""

    def __init__(self, text: str, column: int, problem: str) -> None:
        super().__init__(f"plan {text!r}, column {column}: {problem}")
        self.text = text
        self.column = column


class PlanNotSupported(GraphshardError):
    """A token or option that the grammar knows and this version cannot do."""

    def __init__(self, text: str, column: int, what: str) -> None:
        super().__init__(f"plan {text!r}, column {column}: {what!r} is not supported in this version")
        self.text = text
        self.column = column


class PlanFieldError(GraphshardError):
    """A Plan built in Python with a field that no plan string could say."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"Plan({name}={value!r}): expected {expected}")
        self.name = name
        self.expected = expected


class PlanSizeError(GraphshardError):
    """A plan whose sizes do not fit the number of ranks."""

    def __init__(self, plan: str, world_size: int, right: str) -> None:
        super().__init__(f"plan {plan!r} does not fit {world_size} ranks; {right}")


class InvalidSchedule(GraphshardError):
    """A pipeline schedule that cannot run, or whose text does not parse."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"invalid schedule: {problem}")


class BadModelReference(GraphshardError):
    """MODEL on the command line names nothing that can be imported."""

    def __init__(self, reference: str, problem: str) -> None:
        super().__init__(f"MODEL {reference!r}: {problem}; expected file.py:factory or package.module:factory")


class MissingFactory(GraphshardError):
    """The module has no function of the name that MODEL says."""

    def __init__(self, reference: str, name: str, defined: Iterable[str]) -> None:
        names = sorted(defined)
        near = difflib.get_close_matches(name, names, n=1)
        public = [known for known in names if not known.startswith("_")]
        shown = ", ".join(public[:8]) + (", ..." if len(public) > 8 else "")
        hint = f"did you mean {near[0]!r}?" if near else f"it defines {shown or 'no functions'}"
        super().__init__(f"MODEL {reference!r}: there is no function {name!r}; {hint}")


class ModelCodeFailed(GraphshardError):
    """The user's module or factory raised; ``where`` is the line of theirs."""

    def __init__(self, reference: str, doing: str, error: BaseException, where: str) -> None:
        text = " ".join(str(error).split())
        super().__init__(f"MODEL {reference!r}: {doing} raised {type(error).__name__}: {text} ({where})")


class BadFactoryResult(GraphshardError):
    """A factory that cannot be called without arguments, or returned something else than a model and its inputs."""

    def __init__(self, reference: str, problem: str) -> None:
        super().__init__(
            f"MODEL {reference!r}: {problem}; expected a function without required arguments that returns "
            "(model, example_inputs), (model, example_inputs, loss_fn) or a dict of compile's arguments"
        )


class WrongFactoryEntry(GraphshardError):
    """A factory returned something for an argument of compile that is of no use there."""

    def __init__(self, reference: str, factory: str, key: str, value: object, expected: str) -> None:
        given = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
        super().__init__(f"MODEL {reference!r}: {factory}() returned {given} as {key}; expected {expected}")


class UnknownDump(GraphshardError):
    """``diff DIR PASS`` or ``diff DIR FROM..TO`` where DIR has no such graphs, or several."""

    def __init__(self, directory: str, name: str, dumped: Iterable[str]) -> None:
        names = list(dumped)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        listing = ", ".join(names) or "no graphs; expected a directory that `graphshard dump` wrote"
        super().__init__(f"{directory}: {name!r} is no one pass, nor FROM..TO in order; {hint}it holds {listing}")


class UnfinishedDump(GraphshardError):
    """``diff DIR`` up to the last pass where the dump into DIR failed, or is still being written."""

    def __init__(self, directory: str, dumped: Iterable[str]) -> None:
        super().__init__(
            f"{directory}: the dump has not come to its end, so that its last pass is not there; it holds "
            f"{', '.join(dumped)}; dump again, or name passes of these"
        )


class NothingToCompare(GraphshardError):
    """``diff`` with one argument that is no dump."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path!r} is no directory that `graphshard dump` wrote; expected one, or a second graph to compare it with"
        )


class NotADump(GraphshardError):
    """``blame DIR NODE`` where DIR is not what a dump wrote, or a file of it is damaged."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: expected a directory of graphs that `graphshard dump` wrote, or a file of one")


class UnknownNode(GraphshardError):
    """``blame DIR NODE`` with a node that no graph of DIR has."""

    def __init__(self, name: str, directory: str, known: Iterable[str]) -> None:
        near = difflib.get_close_matches(name.rpartition(":")[2].removeprefix("%"), sorted(known), n=3)
        hint = f"near it are {', '.join(f'%{other}' for other in near)}" if near else "see the .graph files there"
        expected = "NODE is a name, or GRAPH:NODE with a pass or a graph such as body"
        super().__init__(f"{directory}: no graph has node {name!r}; {hint}; {expected}")


class AmbiguousNode(GraphshardError):
    """``blame DIR NODE`` with a name that several graphs of a program have."""

    def __init__(self, name: str, graph: str, choices: Iterable[str]) -> None:
        super().__init__(f"{name!r} is in several graphs of {graph}; say {' or '.join(choices)}")


class MeshMisfit(GraphshardError):
    """Ranks that a program's mesh cannot have."""

    def __init__(self, world_size: int, mesh: str, right: str) -> None:
        super().__init__(f"the program's mesh ({mesh or 'one rank'}) does not fit {world_size} ranks; {right}")


class BatchDoesNotSplit(GraphshardError):
    """A batch whose size is not a multiple of the number of parts it must be split into."""

    def __init__(self, index: int, shape: tuple[int, ...], dim: int, ranks: int, microbatches: int) -> None:
        parts = ranks * microbatches
        below = max(shape[dim] // parts, 1) * parts
        nearest = sorted({below, (shape[dim] // parts + 1) * parts})
        super().__init__(
            f"batch tensor {index} of shape {list(shape)} does not split into "
            f"{counted(ranks, 'data-parallel rank', 'data-parallel ranks')} x "
            f"{counted(microbatches, 'micro-batch', 'micro-batches')}: dim {dim} must be a multiple of {parts} "
            f"above 0, such as {' or '.join(map(str, nearest))}"
        )


class OutputNotJoined(GraphshardError):
    """A tensor that the model returns cannot be put together from what data-parallel ranks return."""

    def __init__(self, leaf: int, kind: str) -> None:
        super().__init__(
            f"output {leaf} of the model (in flattened order), {kind}, is another one for each part of the batch, and "
            "no dim of it grows with the batch: data-parallel ranks have nothing to make the whole batch's of; return "
            "one row per sample, or call a model that was compiled with plan dp1"
        )


class BadBatchDims(GraphshardError):
    """``batch_dims`` of the plan names an argument or a dim that the batch does not have."""

    def __init__(self, index: int, dim: int | None, problem: str) -> None:
        super().__init__(f"plan token batch_dims:{index}={'none' if dim is None else dim}: {problem}")


class PlanError(GraphshardError):
    """An execution plan that must not run: the rule it breaks and the instructions around the spot, per stage."""

    def __init__(self, rule: str, excerpt: str) -> None:
        super().__init__(f"the plan cannot run: {rule}\n{excerpt}")
        self.rule = rule
        self.excerpt = excerpt


class NonFiniteStep(GraphshardError):
    """With ``debug_nan``, a step's loss or gradient is NaN or infinite; nothing was updated. ``outcome`` says which,
    ``origin`` where it began, in lines."""

    def __init__(self, outcome: str, origin: Iterable[str]) -> None:
        super().__init__(
            f"{outcome} NaN or infinite; nothing was updated\n" + "\n".join(f"  {line}" for line in origin)
        )


class StuckPlan(GraphshardError):
    """No rank of the local executor can go on: who waits for whom, one line per rank."""

    def __init__(self, waits: Iterable[str]) -> None:
        super().__init__("no rank can go on; a plan must not wait in a circle:\n" + "\n".join(f"  {w}" for w in waits))


def _few(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


class RanksError(GraphshardError):
    """What ranks do together fails: each of them knows it, by an error of its own."""


class WaitTimeout(RanksError):
    """A rank waited too long in one instruction. ``account``: what all ranks say of themselves, in lines."""

    def __init__(self, rank: int, instruction: str, peers: str, timeout_s: float, account: str = "") -> None:
        super().__init__(
            f"rank {rank} waited more than {timeout_s:g} s for {peers} in: {instruction}; "
            + (account or "that rank failed, hangs or is slower than timeout_s allows")
        )


class PeerFailed(RanksError):
    """The other side of a communication is gone. ``account``: what all ranks say of themselves, in lines."""

    def __init__(self, rank: int, instruction: str, peers: str, cause: str, account: str = "") -> None:
        super().__init__(
            f"rank {rank} lost {peers} in: {instruction} ({cause}); " + (account or "look for that rank's own error")
        )


class RanksOutOfStep(RanksError):
    """What ranks do together was given up in its middle, and now they are asked for more. ``cause``: why it was."""

    CURE = "start all processes again from a checkpoint"

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(
            f"rank {rank} gave up in the middle of what ranks do together ({cause}), and nothing says how far the "
            f"others are; {self.CURE}"
        )


class PeerNotReady(RanksError):
    """Other ranks cannot begin the step, or take over the state, that this one begins with."""

    def __init__(self, ranks: list[int]) -> None:
        named = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        super().__init__(
            f"{named} cannot begin the step or the loading that the others have; what {named} raised says why"
        )


class LayoutMismatch(GraphshardError):
    """A batch of another shape for which values would lie elsewhere in memory that ranks share."""

    def __init__(self, axis: str) -> None:
        super().__init__(
            f"for the shape of this batch what is gathered over {axis} would come and go in another order than in the "
            "memory that ranks share; start with GRAPHSHARD_SHARED_MEMORY=0 in the environment of all ranks"
        )


class PlanMismatch(RanksError):
    """Ranks that should run one plan have different ones."""

    cure = "be given the same model, plan and options, and the ranks of one pipeline the same input shapes"

    def __init__(self, what: str, by_plan: dict[str, list[int]]) -> None:
        groups = "; ".join(f"ranks {', '.join(map(str, ranks))} have {plan}" for plan, ranks in by_plan.items())
        super().__init__(f"ranks disagree on the {what}: {groups}; every rank must {self.cure}")


class CallMismatch(PlanMismatch):
    """Ranks do different things at a time."""

    cure = (
        "call step, evaluate, state_dict and load_state_dict equally often and in one order: as many batches on each "
        "(drop_last=True), and state_dict on all of them (rank0_only=True gives it to rank 0 alone)"
    )

    def __init__(self, by_call: dict[str, list[int]]) -> None:
        super().__init__("call", by_call)


class ValuesDiffer(RanksError):
    """Ranks begin with different parameters, buffers or optimizer state. ``found``: by rank a checksum of those under
    ``name``; None: that rank has none."""

    def __init__(self, name: str, found: Sequence[int | None]) -> None:
        lacking = [rank for rank, value in enumerate(found) if value is None]
        others = lacking or [rank for rank, value in enumerate(found) if value != found[0]]
        has = f"rank {others[0]} has" if len(others) == 1 else f"ranks {_few(others)} have"
        what = f"no values of {name!r}, which others have" if lacking else f"other values of {name!r} than rank 0"
        super().__init__(
            f"{has} {what}; every rank must begin with the same values: call torch.manual_seed with the same number "
            "before the model is made (or in init), or load the same state dict, on every rank"
        )


class WorldSizeMismatch(GraphshardError):
    """The running process group has not as many ranks as the plan's mesh."""

    def __init__(self, mesh: str, needed: int, given: int) -> None:
        super().__init__(f"a mesh of {mesh or 'one rank'} needs {needed} processes; the process group has {given}")


class NoProcessGroup(GraphshardError):
    """The distributed executor was asked for in a process that no launcher started."""

    def __init__(self, missing: Iterable[str]) -> None:
        super().__init__(
            f"executor='distributed' needs a process group, but {', '.join(missing)} is not set; "
            "start the script with torchrun or 'graphshard run -n N', or use executor='local'"
        )


class NoValue(GraphshardError):
    """A step needs a parameter, buffer or constant that was never given a value."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} has no value yet; call load_state_dict, or give compile an init function")


class ValueLost(GraphshardError):
    """A parameter, buffer or optimizer state is needed that was begun to be replaced. ``why``: what did not end."""

    CURE = "load a checkpoint, with load_state_dict and optimizer.load_state_dict, before going on"
    UPDATE = "a step failed in the middle of its update"
    LOADING = "loading it failed"

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} was lost when {why}; {self.CURE}")

    @staticmethod
    def of_step(what: str, cure: str) -> str:
        """What the error of that step adds. ``what`` is lost; ``cure``: what helps."""
        return f"the update was half done: {what} of this run are lost; {cure}"


class OffloadPath(GraphshardError):
    """The folder that offloaded values are to be kept in cannot be used."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"the folder for offloaded values{f' {path!r}' if path else ''} {problem}")


class OffloadSpace(GraphshardError):
    """The disk has no room for what is to be offloaded. ``free``: the bytes that the file system says are free; None:
    what counts is a quota."""

    def __init__(self, path: str, needed: int, free: int | None, cause: str) -> None:
        if free is None:
            reason = f"which are over the quota there ({cause})"
        elif free < needed:
            reason = f"where {free:,} are free ({cause})"
        else:
            reason = f"which it refuses although {free:,} are free ({cause}): a quota or reserved space may be why"
        super().__init__(
            f"offloading needs {needed:,} bytes more in {path!r}, {reason}; offload less, or give another path"
        )


class OffloadFileLimit(GraphshardError):
    """A file may not become as large as what is to be offloaded."""

    def __init__(self, path: str, size: int, limit: str) -> None:
        super().__init__(
            f"the file for offloaded values in {path!r} must hold {size:,} bytes, more than {limit} lets a file have; "
            "raise that limit, offload less, or give a path on another file system"
        )


class OffloadFailed(GraphshardError):
    """An offloaded value could not be written or read; the step has no result."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"the file for offloaded values in {path!r} failed: {what}")


class StateMismatch(GraphshardError):
    """A tensor handed in for a parameter, buffer or optimizer state is missing, left over, or of the wrong shape."""

    def __init__(self, name: str, given: str, expected: str) -> None:
        super().__init__(f"{name}: given {given}; expected {expected}")


class OutOfRange(GraphshardError):
    """A finite value would be stored as an infinite one. ``largest``: the largest magnitude of those of ``name``;
    ``dtype`` is what they are stored in, ``limit`` its largest number."""

    def __init__(self, name: str, largest: float, dtype: str, limit: float) -> None:
        wider = {"float16": "write bf16 instead of fp16, or keep it in float32", "bfloat16": "keep it in float32"}
        right = (
            f"{wider[dtype]}, where a parameter stays that the model reads through .float() alone"
            if dtype in wider
            else "give values that it holds"
        )
        super().__init__(
            f"{name}: its largest magnitude, {largest:.6g}, would become infinite in {dtype}, which ends at "
            f"{limit:.6g}; {right}"
        )


class UnexpectedTensor(StateMismatch):
    """A state dict holds a name that is none of the model's."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        near = difflib.get_close_matches(str(name), list(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        super().__init__(name, "a tensor", f"only names of the model's state_dict(){hint}")


class OptimizerNotElementwise(GraphshardError):
    """An update that looks at more than one element at a time cannot run on a shard of the parameters."""

    def __init__(self, operator: str, parameter: str, optimizer: str = "the optimizer") -> None:
        super().__init__(
            f"{optimizer} is not elementwise: its update of {parameter!r} uses {operator}, so it cannot run on shards; "
            "use a plan that shards nothing (dp, pp), or an elementwise optimizer such as AdamW"
        )


class OptimizerNotTraceable(GraphshardError):
    """The optimizer's step does something that cannot become a graph."""

    def __init__(self, optimizer: str, reason: str, where: str = "") -> None:
        place = f" ({where})" if where else ""
        super().__init__(
            f"{optimizer}.step cannot be traced{place}: {reason}; write the update as tensor operations on each "
            "parameter, its gradient and its state, with torch.where instead of a branch on their values"
        )


class OptimizerNeedsClosure(GraphshardError):
    """The optimizer evaluates the loss itself."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(
            f"{optimizer}.step needs a closure that evaluates the loss, which a compiled step does not offer; "
            "use an optimizer whose step() takes no arguments, such as AdamW or SGD"
        )


class NotAnOptimizer(GraphshardError):
    """What was given as optimizer is neither one nor makes one."""

    def __init__(self, given: object) -> None:
        super().__init__(
            f"optimizer is {given!r}; expected a torch.optim.Optimizer over model.parameters(), or a function of them "
            "that makes one, such as functools.partial(torch.optim.AdamW, lr=3e-4)"
        )


class NothingToUpdate(GraphshardError):
    """An optimizer is to be made for a model without parameters."""

    def __init__(self) -> None:
        super().__init__(
            "the model has no parameters, so that an optimizer has nothing to update; leave optimizer out, or register "
            "what is to be trained as nn.Parameter"
        )


class OptimizerForeignParameter(GraphshardError):
    """The optimizer updates a tensor that is not a parameter of the model."""

    def __init__(self, group: int, index: int, shape: Iterable[int]) -> None:
        super().__init__(
            f"parameter {index} of the optimizer's group {group}, of shape {list(shape)}, is not a parameter of the "
            "model; build the optimizer over model.parameters() after the model is in its final form"
        )


class OptimizerStateMismatch(GraphshardError):
    """A state dict that does not belong to this optimizer."""

    def __init__(self, what: str, given: object, expected: object) -> None:
        super().__init__(f"optimizer state dict: {what}: given {given}; expected {expected}")


class OptimizerStateMissing(StateMismatch):
    """Optimizer state for some of the parameters that are trained alone. ``name``: whose is missing."""

    def __init__(self, key: str, name: str, shape: Sequence[int]) -> None:
        super().__init__(
            f"state {key} of {name}",
            "nothing",
            f"a tensor of shape {list(shape)}, as all parameters that are trained need state; give it for all of them, "
            "or begin with a fresh optimizer: do not load its state (of what was frozen before, none was saved)",
        )


class OptimizerStateTogether(StateMismatch):
    """Optimizer state of one number that is another for parameters which share it here."""

    def __init__(self, key: str, names: Iterable[str]) -> None:
        super().__init__(
            f"state {key} of {', '.join(names)}",
            "different values",
            "one value, as they are updated together; give state of parameters that have always been trained together, "
            "or begin with a fresh optimizer: do not load its state",
        )


class UpdateIsPartOfStep(GraphshardError):
    """A call on the compiled optimizer that has no meaning there, because compiled.step updates the parameters."""

    def __init__(self, call: str, instead: str) -> None:
        super().__init__(f"{call} on a compiled model's optimizer: compiled.step runs the optimizer itself; {instead}")


class MissingFile(GraphshardError):
    """A path on the command line that is no file."""

    def __init__(self, path: str, expected: str) -> None:
        super().__init__(f"there is no file {path!r}; expected {expected}")


class TooManyStages(GraphshardError):
    """More pipeline stages than the graph has places to cut."""

    def __init__(self, stages: int, most: int) -> None:
        super().__init__(f"the model cannot be cut into {stages} pipeline stages; its graph allows at most {most}")


class StagesNotCut(GraphshardError):
    """A pass needs to know which pipeline stage holds what."""

    def __init__(self, name: str, stages: int) -> None:
        super().__init__(
            f"pass {name!r} needs to know what each of the mesh's {stages} pipeline stages holds; "
            "run pipeline-cut before it"
        )


class StageTooSmall(GraphshardError):
    """A limit on the parameter bytes of a stage that no cut keeps."""

    def __init__(self, limit_gb: float, stages: int, needed_gb: float) -> None:
        super().__init__(
            f"no cut into {stages} stages keeps every stage's parameters within {limit_gb:g} GB; "
            f"the best one needs {needed_gb:.3g} GB"
        )


class UnknownStageModule(GraphshardError):
    """``stages=`` names a module in which nothing is computed."""

    def __init__(self, path: str, known: Iterable[str]) -> None:
        names = list(dict.fromkeys(known))
        near = difflib.get_close_matches(path, names, n=1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"modules: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        )
        super().__init__(f"stages: no module {path!r} in the model's graph; {hint}")


class NothingMatches(GraphshardError):
    """``recompute:policy=custom`` with patterns, those given here, that name nothing of which the backward needs
    anything."""

    def __init__(self, modules: Sequence[str], ops: Sequence[str]) -> None:
        given = {"modules": modules, "ops": ops}
        asked = " and ".join(f"{key}={'/'.join(patterns)}" for key, patterns in given.items() if patterns)
        super().__init__(
            f"recompute: {asked} matches nothing that is kept for the backward; module paths and operators are those "
            "of the captured graph, such as modules=h.*.mlp and ops=gelu"
        )


class BudgetTooSmall(GraphshardError):
    """A memory budget that nothing the planner may do can keep."""

    def __init__(self, budget_bytes: int, smallest_bytes: int, stage: int, held: str, untried: Sequence[str]) -> None:
        super().__init__(
            f"a budget of {budget_bytes / 1e9:.9g} GB per rank is too small: the smallest possible is "
            f"{math.ceil(smallest_bytes / 1e3) / 1e6:.9g} GB by all settings tried, for a rank of stage {stage} that "
            f"holds {held}; {', '.join(untried[:-1])} or {untried[-1]} may take less"
        )
        self.smallest_bytes = smallest_bytes


class StageCountMismatch(GraphshardError):
    """``stages=`` does not say where each stage begins."""

    def __init__(self, given: int, stages: int) -> None:
        super().__init__(
            f"stages: {given} modules for {stages} pipeline stages; give {stages - 1}, where stages 1 and later begin"
        )


class StagesOutOfOrder(GraphshardError):
    """``stages=`` names a module that does not begin after the one before it."""

    def __init__(self, path: str, previous: str) -> None:
        super().__init__(f"stages: module {path!r} does not begin after {previous!r}; list them in the order they run")


class CutSplitsBuffer(GraphshardError):
    """``stages=`` cuts between where a buffer is read and where it is updated."""

    def __init__(self, path: str, buffer: str) -> None:
        super().__init__(
            f"stages: a stage that begins at {path!r} reads buffer {buffer!r} on one stage and updates it on another; "
            "begin the stage before the first use of the buffer"
        )


class UnknownExecutor(GraphshardError):
    """An executor that does not exist."""

    def __init__(self, executor: object) -> None:
        super().__init__(f"unknown executor {executor!r}; it is 'auto', 'distributed', 'local' or 'none'")


class BadArgument(GraphshardError):
    """An argument of ``compile`` or ``load`` of the wrong kind."""

    def __init__(self, name: str, given: object, expected: str) -> None:
        self.name, self.given, self.expected = name, given, expected
        text = " ".join(repr(given).split())
        super().__init__(f"{name} is {text if len(text) <= 80 else text[:79] + '…'}; expected {expected}")


class ExecutorNone(GraphshardError):
    """Running what was compiled with ``executor="none"``."""

    def __init__(self) -> None:
        super().__init__(
            "compiled with executor='none', which runs nothing; compile with executor='local' or 'auto' to run it"
        )


class Closed(GraphshardError):
    """Running, reading or loading what has been closed."""

    def __init__(self) -> None:
        super().__init__("this was closed and holds no parameters any more; compile the model again")


class NeedsExampleInputs(GraphshardError):
    """Something that needs the training graph was asked for before anything was traced."""

    def __init__(self) -> None:
        super().__init__(
            "nothing was traced yet, so it is not known where parameters live; "
            "pass example_inputs to compile, or call step first"
        )


class NotAPlanDirectory(GraphshardError):
    """``load`` of a directory that was not written to the end, or of something else."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}; expected a directory that dump wrote to its end; dump again")


class PlanDirectoryChanged(GraphshardError):
    """``load`` of a directory in which a file is not as it was written."""

    def __init__(self, path: str, file: str) -> None:
        super().__init__(f"{path}: its {file} has been changed since it was written; nothing of it was run; dump again")


class PlanDirectoryMisfit(GraphshardError):
    """``load`` of a directory for another version, mesh, model or optimizer."""

    def __init__(self, path: str, expected: str, given: str) -> None:
        super().__init__(f"{path}: compiled for {expected}; given {given}; compile again, or give what it is for")


class UntrustedCode(GraphshardError):
    """``load`` of a directory with Python code that nobody has said to trust."""

    def __init__(self, path: str, files: Iterable[str]) -> None:
        super().__init__(
            f"{path}: steps would run the Python code in its {', '.join(files)}; if you trust who wrote it, pass "
            "trust_code=True"
        )


class NotInPlanDirectory(GraphshardError):
    """A loaded model is asked for what no plan of its directory does."""

    def __init__(self, path: str, asked: str, there: Iterable[str]) -> None:
        super().__init__(
            f"{path}: it has no plan for {asked}; it has {'; '.join(there)}. Nothing is compiled after load: let what "
            "graphshard.compile returns run such a one, and dump again"
        )


class NeedsCompiling(GraphshardError):
    """A loaded model is asked for what takes the passes or the model's code."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: what was loaded cannot dump, verify or bisect; what graphshard.compile returns can")


class TextError(GraphshardError):
    """Graph text that is no program, or says a wrong type; ``line`` and ``column`` count from 1."""

    def __init__(self, path: str, line: int, column: int, problem: str, source: str) -> None:
        # Of a very long line, the part around the mistake.
        begin = max(0, column - 81) if len(source) > 160 else 0
        excerpt = source[begin : begin + 160]
        blank = "".join("\t" if c == "\t" else " " for c in source[begin : column - 1])
        place = f"{path}:{line}:{column}" if path else f"line {line}, column {column}"
        super().__init__(f"{place}: {problem}\n  {excerpt}\n  {blank}^")
        self.path = path
        self.line = line
        self.column = column
        self.problem = problem


class UnreadableConstants(GraphshardError):
    """The file beside graph text that should hold its constants is damaged or something else."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: expected the safetensors file of the graph text beside it; {problem}")


class NeedsTensorValue(GraphshardError):
    """The model makes a Python number or a decision of a tensor's value, which a graph does not have."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"cannot capture {where}: it needs the value of a tensor (.item(), .tolist(), int(), bool() or an `if` on "
            "it), which a graph does not have; keep it a tensor (torch.where instead of `if`), or compute the number "
            "before step and pass it as an argument"
        )


class ShapeNeedsValue(GraphshardError):
    """An operator whose result's shape depends on values."""

    def __init__(self, operator: str, where: str) -> None:
        super().__init__(
            f"cannot capture {where}: the shape of what {operator} returns depends on values, and a graph's shapes are "
            "fixed; use a mask (torch.where, or multiply by it) instead of selecting elements"
        )


class UncapturableOperator(GraphshardError):
    """An operator that has no place in a graph."""

    def __init__(self, operator: str, where: str, instead: str) -> None:
        super().__init__(f"cannot capture {operator} in {where}; {instead}")


class UnknownRandomOperator(GraphshardError):
    """A random operator without a version that takes a key."""

    def __init__(self, operator: str, where: str) -> None:
        super().__init__(
            f"cannot capture the random operator {operator} in {where}: its numbers could not be drawn again; use "
            "torch.rand, randn, randint, bernoulli, normal, exponential, multinomial or dropout, without a generator"
        )


class RandomOutsideTorch(GraphshardError):
    """The model draws random numbers from a generator of Python or numpy."""

    def __init__(self, where: str, generator: str) -> None:
        super().__init__(
            f"cannot capture {where}: it draws from {generator}, and a compiled step would repeat the same numbers for "
            "ever; draw with torch (torch.rand, torch.randint), or draw before step and pass the numbers as an argument"
        )


class TensorKeptOutside(GraphshardError):
    """The forward pass keeps a tensor where capture cannot put back what was there, and reads it in the next one."""

    def __init__(self, where: str, caches: Sequence[str]) -> None:
        place = f"in the cache of {', '.join(caches)}" if caches else "in a global or an object"
        process = "" if caches else ", in a new process, since this one now keeps a tensor without values"
        super().__init__(
            f"cannot capture {where}: it reads a tensor that an earlier forward pass made and kept outside the model's "
            f"modules, {place}; register it as a buffer, or run the model once before compile{process}"
        )


class ModelFailed(GraphshardError):
    """The model or the loss function raised while it was captured."""

    def __init__(self, doing: str, error: BaseException, where: str) -> None:
        text = " ".join(str(error).split()) or "no message"
        super().__init__(f"{doing} raised {type(error).__name__} at {where}: {text[:500]}")


class NoLoss(GraphshardError):
    """Without a loss function the model's result holds no loss."""

    def __init__(self, given: object) -> None:
        super().__init__(
            f"the model returned {type(given).__name__} without a loss; give compile a loss_fn, or return the loss, or "
            "an object or dict that holds it as loss"
        )


class LossNotScalar(GraphshardError):
    """The loss is no floating-point number."""

    def __init__(self, given: str) -> None:
        super().__init__(
            f"the loss is {given}; expected one floating-point number (a 0-d tensor), such as a mean over the batch"
        )


class LossWithoutGradient(GraphshardError):
    """No parameter influences the loss in a way that autograd sees."""

    def __init__(self) -> None:
        super().__init__(
            "the loss does not depend on any parameter that requires a gradient; check for .detach(), torch.no_grad() "
            "and requires_grad=False between the parameters and the loss"
        )


class LossHasParameters(GraphshardError):
    """Parameters of a loss function are not the model's, and nothing would train them."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"loss_fn has a parameter of its own ({name}), which would not be trained; make the loss a submodule of "
            "the model"
        )


class ParameterWritten(GraphshardError):
    """The forward pass changes a parameter."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the forward pass writes to parameter {name!r} in place, but only the optimizer may change parameters; "
            "use a copy, or make it a buffer (an Embedding with max_norm does this: set max_norm=None)"
        )


class ParameterOutsideModel(GraphshardError):
    """A parameter or buffer is used by a reference that is not the module's own attribute."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(
            f"{where} uses {name!r} through a list, dict or closure, where capture cannot follow it; "
            "read it as the attribute of its module"
        )


class TensorWithoutValue(GraphshardError):
    """A tensor on the meta device that is neither parameter nor buffer."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where} uses a tensor on the meta device that is neither a parameter nor a buffer, so nothing can give "
            "it a value; register it with register_buffer, or build it inside forward"
        )


class UnsupportedParameter(GraphshardError):
    """A parameter or buffer that is no plain tensor."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name!r} {problem}; expected a dense torch.Tensor with storage of its own")


class PostAccumulateHook(GraphshardError):
    """A parameter has a hook that wants its whole gradient of a step."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"parameter {name!r} has a post-accumulate-grad hook, which a compiled step does not call: there may be no "
            "rank that has the whole gradient; use register_hook, max_grad_norm or the optimizer"
        )


class BufferChangesType(GraphshardError):
    """The forward pass replaces a buffer by one of another shape or dtype."""

    def __init__(self, name: str, old: str, new: str) -> None:
        super().__init__(
            f"the forward pass replaces buffer {name!r}, {old}, by {new}; shapes and dtypes must stay the same"
        )


class UnsupportedInput(GraphshardError):
    """An argument of step that holds tensors where capture cannot see them."""

    def __init__(self, index: int, kind: str, instead: str) -> None:
        super().__init__(f"argument {index} of step (in flattened order) is a {kind}; {instead}")


class MissingInput(GraphshardError):
    """With a loss function, step was called without the model's input."""

    def __init__(self) -> None:
        super().__init__(
            "step was given no positional argument; with a loss_fn, step(x, *targets) computes "
            "loss_fn(model(x), *targets)"
        )


class UnsupportedModule(GraphshardError):
    """A module whose forward is not Python code that can run on fake tensors, or talks to other ranks."""

    def __init__(self, path: str, kind: str, instead: str) -> None:
        where = f"module {path!r}" if path else "the model"
        super().__init__(f"{where} is a {kind}; {instead}")


class BadCase(GraphshardError):
    """A ``.graph`` test file with a directive that does not exist, or that tests nothing; ``line`` counts from 1."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")


class BadBuild(GraphshardError):
    """A program builder was asked for what no program can hold."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"cannot build this program: {problem}")


class UnknownBreak(GraphshardError):
    """A kind of mutation that does not exist."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        super().__init__(f"unknown kind of mutation {name!r}; {hint}")


class NothingToMutate(GraphshardError):
    """A pass whose result offers nothing to break: a test of it by mutation would test nothing."""

    def __init__(self, kinds: Iterable[str]) -> None:
        tried = ", ".join(kinds)
        super().__init__(f"the passes changed nothing that can be broken; give a program they change (tried: {tried})")


class NotHashable(GraphshardError):
    """A value that no key of the cache can stand for."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} cannot be written down")

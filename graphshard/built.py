"""What is asked of a compiled model, and what runs: a plan, and how the model's output is put together from what ranks
give."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from graphshard.batch import MicroBatch
from graphshard.errors import OutputNotJoined
from graphshard.execution import ExecutionPlan, type_of
from graphshard.model_flags import Flags, NamedFlags, Names, changed_flags, named
from graphshard.optim import changed_options, spell_options
from graphshard.program import Role
from graphshard.trace import Mode, Signature


@dataclass(frozen=True)
class Asked:
    """What is to run; equal if the same plan does."""

    mode: Mode
    inputs: Signature  # see trace.input_signature
    options: Hashable  # see CompiledOptimizer.hyperparameters_key; None where nothing is updated
    flags: Flags | None  # None where nothing is trained, which runs in evaluation mode
    apart: frozenset[str]  # of evaluation: buffers that training leaves different on data-parallel ranks
    example: MicroBatch = field(compare=False)
    microbatches: int = field(compare=False)
    names: Names = field(compare=False, repr=False)  # of what the flags list

    def spelled_options(self) -> tuple[dict[str, str], ...]:
        """By group of the optimizer, as Python spells them."""
        return spell_options(self.options or ())

    def named_flags(self) -> NamedFlags:
        """Training flags and parameters by name."""
        return NamedFlags(training=False) if self.flags is None else named(self.names, self.flags)

    def but_options(self) -> Asked:
        """The same whatever the options of the optimizer are."""
        return replace(self, options=None)

    def news(self, before: Asked) -> str:
        """How it differs from what was asked before, in words."""
        found = self._new_inputs(before)
        if before.options != self.options:
            found.append(f"{changed_options(before.options, self.options)} now")
        if before.flags is not None and self.flags is not None:
            found += changed_flags(self.names, before.flags, self.flags)
        if before.apart != self.apart:
            found.append("training updates other buffers now")
        return ", ".join(found) or "the same is asked for once more"

    def _new_inputs(self, before: Asked) -> list[str]:
        if before.inputs[0] != self.inputs[0]:
            return ["arguments of another structure now"]
        shapes = [shape for shape in self.example.shapes() if shape is not None]
        new_shapes = before.example.shapes() != self.example.shapes()
        found = [f"new input shapes {', '.join(str(list(shape)) for shape in shapes)}"] if new_shapes else []
        leaves = zip(before.example.leaves, self.example.leaves, before.inputs[1], self.inputs[1], strict=True)
        for index, (old, new, old_key, new_key) in enumerate(leaves):
            tensors = isinstance(old, Tensor) and isinstance(new, Tensor)
            if old.dtype != new.dtype if tensors else old_key != new_key:
                found.append(f"argument {index} is {_spelled(new)} now")
        return found


def _spelled(value: object) -> str:
    if isinstance(value, Tensor):
        return str(type_of(value))
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


@dataclass(kw_only=True)
class Built:
    """A plan, and what it is for."""

    plan: ExecutionPlan
    mode: Mode
    inputs: tuple[str, ...]  # of a micro-batch: see trace.spell_signature
    flags: NamedFlags  # of "train"
    apart: frozenset[str] = frozenset()  # see Asked
    options: tuple[dict[str, str], ...] = ()  # of "train": by group those of the optimizer, as Python spells them
    out_spec: TreeSpec | None = None  # of a call
    output_leaves: tuple[Any, ...] = ()  # of a call; None where a tensor belongs
    output_dims: tuple[int | None, ...] = ()  # of a call: of each leaf, the dim that is longer for a larger batch

    @cached_property
    def updated(self) -> frozenset[str]:
        """The buffers that it replaces."""
        slots = (slot for results in self.plan.results for slot in results)
        return frozenset(slot.name for slot in slots if slot.role is Role.BUFFER)


def assemble(built: Built, outputs: Mapping[int, Mapping[str, Sequence[Tensor]]]) -> Any:
    """The model's output from those of the data-parallel ranks.

    Raises:
        OutputNotJoined: a tensor of it is another one on every rank, and no dim of it is the batch's.
    """
    ranks = [outputs[rank] for rank in sorted(outputs) if outputs[rank]]
    if not ranks:
        return None
    leaves: list[Any] = list(built.output_leaves)
    for name in ranks[0]:
        leaves[int(name)] = _joined(int(name), [rank[name][0] for rank in ranks], built.output_dims)
    assert built.out_spec is not None
    return tree_unflatten(leaves, built.out_spec)


def _joined(leaf: int, values: Sequence[Tensor], dims: Sequence[int | None]) -> Tensor:
    """Parts of a batch one after the other; means, as losses are, by their mean."""
    first = values[0]
    if len(values) == 1:
        return first
    dim = dims[leaf]
    if dim is not None:
        return torch.cat(list(values), dim)
    if all(_same(first, other) for other in values[1:]):
        return first
    if first.dim() or not first.is_floating_point():
        raise OutputNotJoined(leaf, str(type_of(first)))
    return torch.stack(list(values)).mean(0)


def _same(first: Tensor, other: Tensor) -> bool:
    if first.is_floating_point():
        return torch.allclose(first, other, rtol=0, atol=0, equal_nan=True)
    return torch.equal(first, other)

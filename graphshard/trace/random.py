"""Random operators of a captured graph become the ones of random_ops.py, which take a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

import graphshard.ops  # noqa: F401  (defines the operators)
from graphshard import fake
from graphshard.dataflow import arguments
from graphshard.errors import UnknownRandomOperator
from graphshard.program import NodeInfo, Role, Section, Slot, tensors, val
from graphshard.rewrite import add_input, call

aten = torch.ops.aten
gs = torch.ops.graphshard

_KEY = Slot(Role.RNG, "key")

Made = fx.Node | tuple[fx.Node, ...]
"""A node in place of a captured one, or one for each of its results."""

_FROM_SIZE: dict[object, tuple[str, tuple[str | float, ...]]] = {
    aten.rand.default: ("uniform", (0.0, 1.0)),
    aten.randn.default: ("normal", (0.0, 1.0)),
    aten.normal.float_float: ("normal", ("mean", "std")),
    aten.randint.default: ("integers", (0, "high")),
    aten.randint.low: ("integers", ("low", "high")),
}
"""Operator to distribution and parameters: a number, or the name of the operator's argument."""

_FROM_TENSOR: dict[object, tuple[str, tuple[str | float, ...]]] = {
    aten.rand_like.default: ("uniform", (0.0, 1.0)),
    aten.randn_like.default: ("normal", (0.0, 1.0)),
    aten.randint_like.default: ("integers", (0, "high")),
    aten.randint_like.low_dtype: ("integers", ("low", "high")),
    aten.uniform.default: ("uniform", ("from", "to")),
    aten.normal_functional.default: ("normal", ("mean", "std")),
    aten.bernoulli.p: ("bernoulli", ("p",)),
    aten.random.to: ("integers", (0, "to")),
    aten.exponential.default: ("exponential", ("lambd",)),
    aten.geometric.default: ("geometric", ("p",)),
    aten.cauchy.default: ("cauchy", ("median", "sigma")),
    aten.log_normal.default: ("log_normal", ("mean", "std")),
}


@dataclass
class Sampler:
    """Replaces random operators of one section; counts them, which gives each its id."""

    section: Section
    mode: fake.FakeTensorMode
    count: int = 0

    def replace(
        self, node: fx.Node, made: Mapping[fx.Node, fx.Node], record: NodeInfo, where: Callable[[], str]
    ) -> Made | None:
        """What stands for the captured ``node``, at the insertion point; None if that is not random.

        Raises:
            UnknownRandomOperator: it is, and no operator that takes a key does the same.
        """
        target: Any = node.target
        if torch.Tag.nondeterministic_seeded not in target.tags:
            return None
        given = _arguments(node)
        if given.get("dropout_p") == 0.0:
            return None  # attention is tagged random for its dropout
        given = {name: made.get(value, value) if isinstance(value, fx.Node) else value for name, value in given.items()}
        result = self._drawn(target, given, node.meta["val"], record)
        if isinstance(result, fx.Node) and val(result).stride() != node.meta["val"].stride():
            result = self._laid_out(result, node.meta["val"], record)
        if result is None or _types(result) != _types(node):
            raise UnknownRandomOperator(str(target), where())
        return result

    def _drawn(self, target: object, given: dict[str, Any], value: Any, record: NodeInfo) -> Made | None:
        """The same distribution, drawn with the key; ``given`` holds all arguments by name."""
        match target:
            case aten.native_dropout.default:
                return self._dropout(given["input"], given["p"], value[1], record)
            case aten.bernoulli.default:
                return self._emit(record, gs.bernoulli.default, (given["self"], self._key()))
            case aten.poisson.default:
                return self._emit(record, gs.poisson.default, (given["self"], self._key()))
            case aten.multinomial.default:
                how = (given["num_samples"], given["replacement"])
                return self._emit(record, gs.multinomial.default, (given["self"], self._key(), *how))
            case aten.randperm.default:
                return self._emit(record, gs.permutation.default, (self._key(), given["n"]), **_type(value))
            case aten.bernoulli.Tensor:
                expanded = replace(record, origin=f"{record.origin}.p")
                p = call(self.section.graph, aten.expand.default, (given["p"], list(value.shape)), expanded)
                return self._emit(record, gs.bernoulli.default, (p, self._key()))
            case aten.normal.Tensor_float | aten.normal.float_Tensor | aten.normal.Tensor_Tensor:
                return self._shifted(given["mean"], given["std"], value, record)
        if target in _FROM_TENSOR:
            source = (given["self"], self._key(), *_bound(_FROM_TENSOR[target], given))
            return self._emit(record, gs.sample_like.default, source, dtype=value.dtype)
        if target in _FROM_SIZE:
            drawn = (self._key(), list(value.shape), *_bound(_FROM_SIZE[target], given))
            return self._emit(record, gs.sample.default, drawn, **_type(value))
        return None

    def _dropout(self, x: fx.Node, p: float, mask: Tensor, record: NodeInfo) -> Made:
        """``x`` without the elements that are dropped, scaled, and which were kept."""
        graph = self.section.graph

        def part(name: str) -> NodeInfo:
            return replace(record, origin=f"{record.origin}.{name}")

        if mask.is_contiguous():
            seed = self._emit(part("seed"), gs.seed.default, (self._key(),), device=mask.device)
            kept = call(graph, gs.dropout_mask.default, (seed, list(mask.shape), p), part("kept"))
        else:
            drawn = (x, self._key(), "bernoulli", [1 - p])
            kept = self._emit(part("kept"), gs.sample_like.default, drawn, dtype=mask.dtype)
        masked = call(graph, aten.mul.Tensor, (x, kept), part("masked"))
        return call(graph, aten.mul.Tensor, (masked, 0.0 if p == 1 else 1 / (1 - p)), record), kept

    def _shifted(self, mean: Any, deviation: Any, value: Tensor, record: NodeInfo) -> fx.Node:
        """Normal numbers whose mean or standard deviation is a tensor."""
        graph = self.section.graph
        arguments = (self._key(), list(value.shape), "normal", [0.0, 1.0])
        drawn = replace(record, origin=f"{record.origin}.noise")
        noise = self._emit(drawn, gs.sample.default, arguments, **_type(value))
        scaled = call(graph, aten.mul.Tensor, (noise, deviation), replace(record, origin=f"{record.origin}.scaled"))
        return call(graph, aten.add.Tensor, (scaled, mean), record)

    def _laid_out(self, drawn: fx.Node, value: Tensor, record: NodeInfo) -> fx.Node:
        """A copy with the dims in memory in the order of those of ``value``: what torch draws for a permuted tensor
        may be contiguous."""
        graph = self.section.graph
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        back = sorted(range(value.dim()), key=order.__getitem__)
        turned = call(graph, aten.permute.default, (drawn, order), replace(record, origin=f"{record.origin}.turned"))
        copied = replace(record, origin=f"{record.origin}.copied")
        copy = call(graph, aten.clone.default, (turned,), copied, memory_format=torch.contiguous_format)
        return call(graph, aten.permute.default, (copy, back), record)

    def _emit(self, record: NodeInfo, operator: Any, arguments: tuple[Any, ...], **options: Any) -> fx.Node:
        """Insert a keyed operator, whose last argument is its id."""
        self.count += 1
        return call(self.section.graph, operator, (*arguments, self.count - 1), record, **options)

    def _key(self) -> fx.Node:
        found = self.section.input_slots.get(_KEY)
        if found is None:
            value = fake.tensor(self.mode, (4,), torch.int64)
            found = add_input(self.section, _KEY, value, NodeInfo(), "key")
        return found


def _types(made: Made) -> list[object]:
    nodes = [made] if isinstance(made, fx.Node) else made
    return [(value.dtype, value.stride()) for node in nodes for value in tensors(val(node))]


def _type(value: Tensor) -> dict[str, Any]:
    return {"dtype": value.dtype, "device": value.device}


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    return {a.name: a.default_value for a in schema.arguments} | arguments(node)


def _bound(entry: tuple[str, tuple[str | float, ...]], given: Mapping[str, Any]) -> tuple[str, list[Any]]:
    distribution, parameters = entry
    return distribution, [given[p] if isinstance(p, str) else p for p in parameters]

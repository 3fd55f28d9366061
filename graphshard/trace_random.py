"""Random operators of a captured graph become the ones of random_ops.py, which take a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import graphshard.ops  # noqa: F401  (defines the operators)
from graphshard import fake
from graphshard.errors import UnknownRandomOperator
from graphshard.program import NodeInfo, Role, Section, Slot
from graphshard.rewrite import add_input, call

aten = torch.ops.aten
gs = torch.ops.graphshard

_KEY = Slot(Role.RNG, "key")

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
    getattr(aten.random, "from"): ("integers", ("from", "to")),
    aten.random.to: ("integers", (0, "to")),
    aten.exponential.default: ("exponential", ("lambd",)),
    aten.geometric.default: ("geometric", ("p",)),
    aten.cauchy.default: ("cauchy", ("median", "sigma")),
    aten.log_normal.default: ("log_normal", ("mean", "std")),
}


class Sampler:
    """Replaces random operators of one section; counts them, which gives each its id."""

    def __init__(self, section: Section, key_mode: Any) -> None:
        self.section = section
        self.mode = key_mode
        self.count = 0

    def replace(
        self, node: fx.Node, made: Mapping[fx.Node, fx.Node], record: NodeInfo, where: Callable[[], str]
    ) -> fx.Node | None:
        """The node at the insertion point that stands for the captured ``node``; None if that is not random.

        Raises:
            UnknownRandomOperator: it is, and no operator that takes a key does the same.
        """
        target: Any = node.target
        if torch.Tag.nondeterministic_seeded not in target.tags:
            return None
        given = _arguments(node)
        if given.get("dropout_p") == 0.0:
            return None  # attention is tagged random for its dropout
        if given.get("generator") is not None:
            raise UnknownRandomOperator(f"{target} with a generator", where())
        given = {name: made.get(value, value) if isinstance(value, fx.Node) else value for name, value in given.items()}
        value: Any = node.meta["val"]
        plan = self._plan(target, given, value)
        if plan is None:
            raise UnknownRandomOperator(str(target), where())
        operator, before, after, options = plan
        id = self.count
        self.count += 1
        return call(self.section.graph, operator, (*before, *after, id), record, **options)

    def _plan(
        self, target: object, given: dict[str, Any], value: Any
    ) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], dict[str, Any]] | None:
        """Operator, arguments up to the key, those after it, and keyword arguments."""
        if target is aten.native_dropout.default:
            return gs.dropout.default, (given["input"], self._key()), (given["p"],), {}
        if target is aten.bernoulli.default:
            return gs.bernoulli.default, (given["self"], self._key()), (), {}
        if target is aten.poisson.default:
            return gs.poisson.default, (given["self"], self._key()), (), {}
        if target is aten.multinomial.default:
            options = (given["num_samples"], given["replacement"])
            return gs.multinomial.default, (given["self"], self._key()), options, {}
        assert isinstance(value, Tensor)
        kind = {"dtype": value.dtype, "device": value.device}
        if target is aten.randperm.default:
            return gs.permutation.default, (self._key(),), (given["n"],), kind
        if target in _FROM_TENSOR:
            distribution, parameters = _bound(_FROM_TENSOR[target], given)
            source = given["self"]
            if None in parameters:
                return None
            if torch.empty_like(source.meta["val"]).stride() == value.stride():
                kind.pop("device")
                return gs.sample_like.default, (source, self._key()), (distribution, parameters), kind
        elif target in _FROM_SIZE:
            distribution, parameters = _bound(_FROM_SIZE[target], given)
        else:
            return None
        assert value.is_contiguous(), f"{target} with strides {value.stride()}"
        return gs.sample.default, (self._key(),), (list(value.shape), distribution, parameters), kind

    def _key(self) -> fx.Node:
        found = self.section.input_slots.get(_KEY)
        if found is None:
            value = fake.tensor(self.mode, (4,), torch.int64)
            found = add_input(self.section, _KEY, value, NodeInfo(), "key")
        return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments}
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def _bound(entry: tuple[str, tuple[str | float, ...]], given: Mapping[str, Any]) -> tuple[str, list[Any]]:
    distribution, parameters = entry
    return distribution, [given[p] if isinstance(p, str) else p for p in parameters]

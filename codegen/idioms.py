"""Updates that torch has one kernel for: Adam and AdamW in float32, recognised by their operators, run by
``torch._fused_adamw_`` in place. It reads and writes each state once; the loop that it replaces is its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphshard.homes import replaced_slots, stored_slot
from graphshard.program import Role, Section, val
from graphshard.region import Region, results_of

aten = torch.ops.aten

_STORES = (Role.SHARD, Role.FLAT, Role.PARAM, Role.MASTER)


@dataclass(frozen=True)
class FusedAdam:
    """One Adam update in a region: its own nodes, and what the kernel needs to know."""

    nodes: frozenset[fx.Node]  # of the region
    gradient: fx.Node  # of the region: an input or an operation
    stores: tuple[fx.Node, fx.Node, fx.Node]  # inputs of the region: parameter, exp_avg, exp_avg_sq
    results: tuple[fx.Node, fx.Node, fx.Node]  # of the region: what becomes of them
    step: fx.Node  # of the section: the number of this step, a scalar
    lr: fx.Node
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # decoupled

    @property
    def replaced(self) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """Each of ``stores`` with what becomes of it."""
        return tuple(zip(self.stores, self.results, strict=True))


def find_adam(region: fx.Node, section: Section) -> FusedAdam | None:
    """The Adam update in ``region`` whose parameter and state are the section's own and replaced by it."""
    assert isinstance(region.target, Region)
    results = results_of(region)
    outer = dict(zip(region.target.inputs, region.all_input_nodes, strict=True))
    written, inside = replaced_slots(section), region.target.outputs
    for index, node in enumerate(inside):
        slot = written.get(results[index]) if index in results else None
        if slot is None or slot.role not in _STORES or val(node).dtype is not torch.float32:
            continue
        found = _match(node, outer)
        if found is None or any(
            result not in inside or inside.index(result) not in results for result in found.results
        ):
            continue
        kept = [results[inside.index(result)] for result in found.results]
        old = [outer[store] for store in found.stores]
        replaced = all(
            written.get(new) == stored_slot(section, o) is not None for new, o in zip(kept, old, strict=True)
        )
        private = all(set(n.users) <= found.nodes or n in found.results for n in found.nodes)
        dead = all(set(store.users) <= found.nodes for store in found.stores)
        dead = dead and all(set(o.users) == {region} for o in old)
        if replaced and private and dead:
            return found
    return None


def _match(new_param: fx.Node, outer: Mapping[fx.Node, fx.Node]) -> FusedAdam | None:
    """``p*(1 - lr*decay) - lr/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps)``, as torch.optim computes it; scalars
    are made outside of the region, whose inputs ``outer`` knows."""

    def _args(node: Any, target: Any, count: int) -> tuple[Any, ...]:
        return _arguments(outer.get(node, node), target, count)

    try:
        decayed, moved = _args(new_param, aten.add.Tensor, 2)
        quotient, minus_step_size = _args(moved, aten.mul.Tensor, 2)
        new_exp_avg, denominator = _args(quotient, aten.div.Tensor, 2)
        corrected, eps = _args(denominator, aten.add.Tensor, 2)
        root, correction2 = _args(corrected, aten.div.Tensor, 2)
        (new_exp_avg_sq,) = _args(root, aten.sqrt.default, 1)
        faded, gradient, again = _args(new_exp_avg_sq, aten.addcmul.default, 3)
        exp_avg_sq, beta2 = _args(faded, aten.mul.Tensor, 2)
        exp_avg, same, weight1 = _args(new_exp_avg, aten.lerp.Scalar, 3)
        # The scalars: step size lr/(1 - b1^t), and sqrt(1 - b2^t).
        (step_size,) = _args(minus_step_size, aten.neg.default, 1)
        lr, correction1 = _args(step_size, aten.div.Tensor, 2)
        power1, one1 = _args(correction1, aten.rsub.Scalar, 2)
        beta1, step = _args(power1, aten.pow.Scalar, 2)
        squared, half = _args(correction2, aten.pow.Tensor_Scalar, 2)
        power2, one2 = _args(squared, aten.rsub.Scalar, 2)
        beta2_again, step_again = _args(power2, aten.pow.Scalar, 2)
        nodes = {new_param, moved, quotient, denominator, corrected, root, new_exp_avg_sq, faded, new_exp_avg}
        param, weight_decay = decayed, 0.0
        if decayed.target is aten.mul.Tensor:
            param, kept = _args(decayed, aten.mul.Tensor, 2)
            product, one3 = _args(kept, aten.rsub.Scalar, 2)
            lr_again, weight_decay = _args(product, aten.mul.Tensor, 2)
            nodes.add(decayed)
            if one3 != 1 or lr_again is not lr:
                return None
    except _Differs:
        return None
    value = new_exp_avg_sq.kwargs.get("value", 1)
    consistent = (
        gradient is again is same
        and step is step_again
        and beta2 == beta2_again
        and (one1, one2, half) == (1, 1, 0.5)
        and _near(weight1, 1 - beta1)
        and _near(value, 1 - beta2)
        and all(isinstance(x, float) for x in (beta1, beta2, eps, weight_decay))
    )
    if not consistent:
        return None
    stores = (param, exp_avg, exp_avg_sq)
    if any(store not in outer for store in stores):
        return None
    return FusedAdam(
        nodes=frozenset(nodes),
        gradient=gradient,
        stores=stores,
        results=(new_param, new_exp_avg, new_exp_avg_sq),
        step=outer.get(step, step),
        lr=outer.get(lr, lr),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )


class _Differs(Exception):
    """The graph is not this update."""


def _arguments(node: Any, target: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(node, fx.Node) or node.target is not target or len(node.args) < count:
        raise _Differs
    return node.args[:count]


def _near(a: Any, b: float) -> bool:
    return isinstance(a, (int, float)) and abs(a - b) <= 1e-12

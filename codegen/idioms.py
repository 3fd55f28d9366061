"""Updates that torch has one kernel for: Adam and AdamW in float32, recognised by their operators, run by
``torch._fused_adamw_`` in place. It reads and writes each state once; the loop that it replaces is its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphshard.homes import replaced_slots, stored_slot
from graphshard.program import Role, Section, val

aten = torch.ops.aten

_STORES = (Role.SHARD, Role.FLAT, Role.PARAM, Role.MASTER)


@dataclass(frozen=True)
class FusedAdam:
    """The nodes of one Adam update and what the kernel needs to know of them."""

    nodes: frozenset[fx.Node]
    param: fx.Node
    gradient: fx.Node
    exp_avg: fx.Node
    exp_avg_sq: fx.Node
    new_param: fx.Node
    new_exp_avg: fx.Node
    new_exp_avg_sq: fx.Node
    step: fx.Node  # the number of this step, a scalar
    lr: fx.Node
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # decoupled


def find_adam(nodes: Sequence[fx.Node], section: Section) -> FusedAdam | None:
    """The Adam update among pointwise ``nodes`` whose parameter and state are the section's own and replaced by it."""
    inside = set(nodes)
    slots = replaced_slots(section)
    for node in nodes:
        slot = slots.get(node)
        if slot is None or slot.role not in _STORES or val(node).dtype is not torch.float32:
            continue
        found = _match(node)
        if found is None:
            continue
        pairs = (
            (found.param, found.new_param),
            (found.exp_avg, found.new_exp_avg),
            (found.exp_avg_sq, found.new_exp_avg_sq),
        )
        replaced = all(slots.get(new) == stored_slot(section, old) is not None for old, new in pairs)
        results = (found.new_param, found.new_exp_avg, found.new_exp_avg_sq)
        private = all(set(n.users) <= found.nodes or n in results for n in found.nodes)
        dead = all(set(old.users) <= found.nodes for old, _ in pairs)
        if replaced and private and dead and found.nodes <= inside:
            return found
    return None


def _match(new_param: fx.Node) -> FusedAdam | None:
    """``p*(1 - lr*decay) - lr/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps)``, as torch.optim computes it."""
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
    return FusedAdam(
        nodes=frozenset(nodes),
        param=param,
        gradient=gradient,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        new_param=new_param,
        new_exp_avg=new_exp_avg,
        new_exp_avg_sq=new_exp_avg_sq,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )


class _Differs(Exception):
    """The graph is not this update."""


def _args(node: Any, target: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(node, fx.Node) or node.target is not target or len(node.args) < count:
        raise _Differs
    return node.args[:count]


def _near(a: Any, b: float) -> bool:
    return isinstance(a, (int, float)) and abs(a - b) <= 1e-12

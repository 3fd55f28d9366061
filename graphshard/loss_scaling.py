"""Dynamic loss scaling, as torch.amp.GradScaler does it, as nodes: the loss is multiplied by a scale, gradients are
divided by it, and a step whose gradients are not finite changes nothing but the scale.

Micikevicius et al. 2018, "Mixed Precision Training", section 3.2. Whether a step is skipped is one number, the sum of
what all parts of all gradients say (``graphshard::nonfinite``), so that all ranks and stages agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphshard import fake
from graphshard.errors import NoLossGradient
from graphshard.loss_gradient import loss_gradient
from graphshard.program import NodeInfo, Phase, Program, Role, Section, Slot, info, val
from graphshard.rewrite import add_input, after, call, set_outputs

aten = torch.ops.aten
gs = torch.ops.graphshard

SCALE = Slot(Role.SCALER, "scale")
TRACKER = Slot(Role.SCALER, "growth_tracker")
SKIPPED = Slot(Role.SCALER, "skipped")

_LARGEST = torch.finfo(torch.float32).max
_KEPT = (Role.PARAM, Role.MASTER, Role.STATE)


def initial(slot: Slot) -> str:
    """The name of the constant that a slot of the scaler begins as."""
    return f"scaler.{slot.name}"


def scale_loss(program: Program) -> None:
    """Multiply the loss by the scale, as far as gradients see it: its gradient becomes the scale times what it was.

    That is a micro-batch's part of the step, as in ``scaler.scale(loss / N).backward()``, so that what is accumulated
    is the scale times the mean and overflows no earlier than in one large batch.

    Raises:
        NoLossGradient: the body has a backward, which does not begin with a number.
    """
    body = program.body
    one = loss_gradient(body)
    if one is None:
        raise NoLossGradient()
    share = one.args[1]
    mode = fake.graph_mode(body.graph) or fake.new_mode()
    kind = fake.tensor(mode, (), torch.float32, device=val(one).device)
    scale = add_input(body, SCALE, kind, NodeInfo(), "scale")
    with after(one):
        if share != 1.0:
            scale = call(body.graph, aten.mul.Tensor, (scale, share), info(one))
        if val(one).dtype is not torch.float32:
            scale = call(body.graph, aten._to_copy.default, (scale,), info(one), dtype=val(one).dtype)
    one.replace_all_uses_with(scale)
    body.graph.erase_node(one)


@dataclass
class Scaler:
    """Rewrites one update; ``gradients`` are its gradients in float32, times the scale, before anything reads them."""

    section: Section
    gradients: list[fx.Node]
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    first: bool  # the update of the first step, which finds no state

    def run(self) -> None:
        """Unscale the gradients, keep what is stored if they are not finite, and update the scale."""
        section, like = self.section, val(self.gradients[0])
        inputs = section.input_slots

        def read(slot: Slot, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
            kind = fake.tensor(like.fake_mode, shape, dtype, device=like.device)
            return add_input(section, slot, kind, NodeInfo(phase=Phase.UPDATE), f"scaler.{slot.name}")

        scale, tracker = read(SCALE, (), torch.float32), read(TRACKER, (), torch.int32)
        last = max(self.gradients)
        with after(last):
            found = self._emit(gs.nonfinite.default, list(self.gradients))
        with after(found):
            skip = self._emit(aten.gt.Scalar, found, 0)
        with after(scale):
            inverse = self._emit(aten.reciprocal.default, scale)
        for gradient in self.gradients:
            readers = [user for user in gradient.users if user is not found]
            with after(max(gradient, inverse)):
                unscaled = self._emit(aten.mul.Tensor, gradient, inverse, like=gradient)
            for reader in readers:
                reader.replace_input_with(gradient, unscaled)
        results: dict[Slot, fx.Node] = {}
        with section.graph.inserting_before(section.output_node):
            for slot, node in section.outputs.items():
                # There is no old state in a first step: the executor leaves out what a skipped one makes.
                kept = slot.role in _KEPT and not (self.first and slot.role is Role.STATE)
                if kept and slot not in inputs:
                    inputs[slot] = add_input(section, slot, val(node), info(node), f"old.{slot.name}")
                results[slot] = self._emit(aten.where.self, skip, inputs[slot], node, like=node) if kept else node
            results |= self._updated(scale, tracker, skip)
        set_outputs(section, results)

    def _updated(self, scale: fx.Node, tracker: fx.Node, skip: fx.Node) -> dict[Slot, fx.Node]:
        """The scale halves, or whatever ``backoff_factor`` says, after a step that is skipped, and grows after
        ``growth_interval`` steps in a row that are not, as far as float32 goes."""
        count = self._emit(aten.add.Scalar, tracker, 1)
        enough = self._emit(aten.eq.Scalar, count, self.growth_interval)
        larger = self._emit(aten.mul.Scalar, scale, self.growth_factor)
        fits = self._emit(aten.le.Scalar, larger, _LARGEST)
        grows = self._emit(aten.logical_and.default, enough, fits)
        grown = self._emit(aten.where.self, grows, larger, scale)
        smaller = self._emit(aten.mul.Scalar, scale, self.backoff_factor)
        again = self._emit(aten.logical_or.default, skip, enough)
        none = self._emit(aten.mul.Scalar, tracker, 0)
        return {
            SCALE: self._emit(aten.where.self, skip, smaller, grown),
            TRACKER: self._emit(aten.where.self, again, none, count),
            SKIPPED: skip,
        }

    def _emit(self, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        record = NodeInfo(Phase.UPDATE, info(like).module if like is not None else "", made_by="precision")
        return call(self.section.graph, target, args, record)

"""Regions as kernels: functions of their own, shared by all segments that compute the same thing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from graphshard.codegen.blocks import Code, blocked_code, blocks_of, keeps_to_itself, whole_code
from graphshard.codegen.idioms import FusedAdam
from graphshard.codegen.overwrite import fits, overwritten
from graphshard.codegen.triton import supports, write_kernel
from graphshard.codegen.workspace import storage_bytes
from graphshard.dataflow import is_getitem, is_view
from graphshard.execution import Kernel, type_of
from graphshard.program import Section, val
from graphshard.region import Region, region_of


@dataclass
class Kernels:
    """The kernels of a plan, by name, for a CPU or a GPU."""

    on_gpu: bool = False
    table: dict[str, Kernel] = field(default_factory=dict)

    def overwrites(
        self, node: fx.Node, region: Region, section: Section, returned: Collection[fx.Node]
    ) -> dict[int, int]:
        """Which results of ``node``, as a region, its kernel can write over which operands, by position."""
        able = not supports(region) if self.on_gpu else blocks_of(region) is not None
        found = overwritten(node, section, returned) if able else {}
        if self.on_gpu:  # its kernels take memory of the same shape
            shapes = [val(n).shape for n in region.outputs], [val(n).shape for n in region.inputs]
            found = {index: at for index, at in found.items() if shapes[0][index] == shapes[1][at]}
        return found

    def add(self, region: Region, in_place: Mapping[int, int]) -> Kernel:
        """The kernel that computes ``region``; ``in_place``: results to the inputs they overwrite, by position."""
        names = _names(region)
        if self.on_gpu:
            code, reason = whole_code(region, names), supports(region)
            if not reason:
                return self._written(region, names, code.lines, in_place)
            how = f"torch operators, one after the other, since Triton takes no {reason}"
        else:
            code, how = _code(region, names, in_place)
        return self._known(region, names, (), code.lines, code.workspace_bytes, how)

    def _written(
        self, region: Region, names: Mapping[fx.Node, str], lines: tuple[str, ...], in_place: Mapping[int, int]
    ) -> Kernel:
        """In Triton; named after what it computes, types included."""
        types = [str(type_of(val(node))) for node in region.inputs]
        digest = hashlib.sha256(repr((lines, types, sorted(in_place.items()))).encode()).hexdigest()[:8]
        name = f"{title(region)}_{digest}"
        if name not in self.table:
            made = write_kernel(region, name, in_place)
            self.table[name] = Kernel(name, made.source, "triton", f"Triton: {made.choice}")
        return self.table[name]

    def add_update(self, region: Region, adam: FusedAdam, dying: Collection[int]) -> Kernel:
        """The kernel of an Adam update: it takes the step and the learning rate as well, and overwrites parameter and
        state. ``dying``: positions of inputs that it may overwrite, too."""
        names = _names(region)
        names |= {new: names[old] for old, new in adam.replaced}
        stores = [names[node] for node in adam.stores]
        free = [region.inputs[at] for at in dying if region.inputs[at] not in adam.stores]
        behind = _behind(region, adam)
        before = [n for n in region.operations if n not in adam.nodes and n not in behind]
        prepared = _part(before, {adam.gradient, *region.outputs}, names, free, region.outputs)
        finished = _part(behind, region.outputs, names, [], region.outputs)
        states = ", ".join(f"[{name}]" for name in (stores[0], names[adam.gradient], *stores[1:]))
        options = f"beta1={adam.beta1}, beta2={adam.beta2}, weight_decay={adam.weight_decay}, eps={adam.eps}"
        scalars = "[step.to(torch.float32)], lr=lr.to(torch.float32)"
        update = f"torch._fused_adamw_({states}, [], {scalars}, {options}, amsgrad=False, maximize=False)"
        lines = (*prepared.lines, update, *finished.lines)
        workspace = max(prepared.workspace_bytes, finished.workspace_bytes)
        return self._known(region, names, ("step", "lr"), lines, workspace, "torch's fused Adam, in place")

    def _known(
        self,
        region: Region,
        names: Mapping[fx.Node, str],
        scalars: tuple[str, ...],
        lines: tuple[str, ...],
        workspace_bytes: int,
        how: str,
    ) -> Kernel:
        parameters = ", ".join([*(names[node] for node in region.inputs), *scalars])
        place = [f"device = {names[region.inputs[0]]}.device"] if any("device" in line for line in lines) else []
        body = [*place, *lines, f"return {', '.join(names[node] for node in region.outputs)}"]
        source = "".join([f"({parameters}):\n", *(f"    {line}\n" for line in body)])
        # The same source for other sizes takes other memory, and is another kernel.
        digest = hashlib.sha256(f"{source}{workspace_bytes}".encode()).hexdigest()[:8]
        name = f"{title(region)}_{digest}"
        return self.table.setdefault(name, Kernel(name, f"def {name}{source}", "torch", how, workspace_bytes))


def _code(region: Region, names: Mapping[fx.Node, str], in_place: Mapping[int, int]) -> tuple[Code, str]:
    blocks = blocks_of(region)
    if blocks is not None and (in_place or keeps_to_itself(region, blocks)):
        return blocked_code(region, names, blocks, in_place), f"torch operators, {blocks.unit} at a time"
    assert not in_place, "what is computed whole overwrites nothing"
    return whole_code(region, names), "torch operators, one after the other"


def _part(
    nodes: Sequence[fx.Node],
    wanted: Collection[fx.Node],
    names: Mapping[fx.Node, str],
    free: Sequence[fx.Node],
    returned: Collection[fx.Node],
) -> Code:
    """Code for some operations of a region, in order, that leaves those ``wanted``, over inputs that are ``free``;
    what it makes that is not ``returned`` by the region is workspace."""
    if not nodes:
        return Code((), 0)
    inputs = list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in nodes))
    results = [node for node in nodes if node in wanted]
    part = region_of(nodes, inputs, results)
    own = dict(zip((*part.inputs, *part.operations), (names[n] for n in (*inputs, *nodes)), strict=True))
    old = next((at for at, node in enumerate(inputs) if node in free and fits(results[0], node)), None)
    in_place = {} if old is None or blocks_of(part) is None else {0: old}
    code, _ = _code(part, own, in_place)
    made = [node for index, node in enumerate(results) if index not in in_place and node not in returned]
    return Code(code.lines, code.workspace_bytes + sum(storage_bytes(val(node)) for node in made))


def _behind(region: Region, adam: FusedAdam) -> list[fx.Node]:
    """Operations that depend on the update without being part of it: the cast of a master does."""
    found: dict[fx.Node, None] = {}
    for node in region.operations:
        if node not in adam.nodes and any(source in adam.nodes or source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)


def title(region: Region) -> str:
    """``fused_add_layer_norm``: after the first four kinds of operators."""
    compute = (node for node in region.operations if not (is_getitem(node) or is_view(node)))
    kinds = dict.fromkeys(_kind(node) for node in compute)
    return "_".join(["fused", *list(kinds)[:4]])


def _names(region: Region) -> dict[fx.Node, str]:
    """Variables that do not depend on where in a model the region is."""
    names = {node: f"input{index}" for index, node in enumerate(region.inputs)}
    counts = Counter[str]()
    for node in region.operations:
        kind = "picked" if is_getitem(node) else _kind(node)
        names[node] = f"{kind}{counts[kind]}"
        counts[kind] += 1
    return names


def _kind(node: fx.Node) -> str:
    return str(node.target).split(".")[1].strip("_")

"""Regions as kernels: functions of their own, shared by all segments that compute the same thing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from graphshard.codegen.blocks import Code, blocked_code, blocks_of, keeps_to_itself
from graphshard.codegen.expressions import call
from graphshard.codegen.idioms import FusedAdam
from graphshard.codegen.overwrite import fits, overwritten
from graphshard.codegen.triton import supports, write_kernel
from graphshard.codegen.triton_parts import parts, refused
from graphshard.codegen.workspace import storage_bytes
from graphshard.dataflow import is_getitem
from graphshard.execution import Kernel, type_of
from graphshard.homes import on_host
from graphshard.make_region import make_region
from graphshard.program import Program, Section, val
from graphshard.region import Region, kind, region_of, title
from graphshard.rewrite import copied, inline


@dataclass
class Kernels:
    """The kernels of a plan, by name, for a CPU or a GPU; ``left``: how many regions run as the operators they are, or
    some of them, by what they would be called, with the reason."""

    on_gpu: bool = False
    placed: bool = True  # whether segments can be given memory for results
    table: dict[str, Kernel] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, str] = field(default_factory=dict)  # why Triton takes none, by what a region means

    def chosen(self, program: Program) -> Program:
        """A copy of ``program`` in which regions that no kernel is written for are the operations they were made of, or
        smaller regions with what is in no kernel between them."""
        result = copied(program)
        for section in result.sections().values():
            regions = [(node, node.target) for node in section.nodes() if isinstance(node.target, Region)]
            for node, region, reason in [(n, r, self.of(n)._refusal(n, r, section)) for n, r in regions]:
                if reason:
                    self.of(node)._take_apart(section, node, region, reason)
        return result

    def _take_apart(self, section: Section, node: fx.Node, region: Region, reason: str) -> None:
        """The operations of a region that is no kernel; for a GPU those that are none themselves, and the rest as
        regions."""
        without = refused(region, self._triton_refusal) if self.on_gpu else {}
        made = inline(section, node)
        titles = []
        for group in parts(region, without) if without else []:
            part = make_region(section, [made[n] for n in group], region.autotune)
            if part is None:
                continue
            assert isinstance(part.target, Region)
            titles.append(title(part.target))
            if refusal := self._refusal(part, part.target, section):
                self._take_apart(section, part, part.target, refusal)
        if titles:
            reasons = "; ".join(dict.fromkeys(without.values()))
            reason = f"in parts, {' and '.join(titles)}, around what no Triton kernel is written for: {reasons}"
        self.left[f"{title(region)}: {reason}"] += 1

    def of(self, node: fx.Node) -> Kernels:
        """The kernels, in the same table, of the device that ``node`` is for."""
        return replace(self, on_gpu=False, placed=False) if on_host(node) else self

    def _refusal(self, node: fx.Node, region: Region, section: Section) -> str:
        """Why there is to be no kernel; "" if there is."""
        if self.on_gpu:
            reason = self._triton_refusal(region)
            return f"no Triton kernel: {reason}" if reason else ""
        blocks = blocks_of(region)
        if blocks is None:
            return "all of it would be one block"
        worthwhile = keeps_to_itself(region, blocks) or self.overwrites(node, region, section)
        return "" if worthwhile else "it keeps nothing long to itself"

    def _triton_refusal(self, region: Region) -> str:
        """Why Triton takes no such region; "" if it does."""
        meaning = _meaning(region, _names(region))
        if meaning not in self.refusals:
            self.refusals[meaning] = supports(region)
        return self.refusals[meaning]

    def overwrites(self, node: fx.Node, region: Region, section: Section) -> dict[int, int]:
        """Which results of ``node``, as a region, its kernel can write over which operands, by position."""
        found = overwritten(node, section)
        if self.on_gpu:  # its kernels take memory of the same shape
            return {i: at for i, at in found.items() if val(region.outputs[i]).shape == val(region.inputs[at]).shape}
        # An operand that every block reads whole is needed until the last one.
        blocks = blocks_of(region)
        if blocks is None:
            return {}
        extents = [blocks.extent(n) for n in region.outputs], [blocks.extent(n) for n in region.inputs]
        return {index: at for index, at in found.items() if extents[0][index] is extents[1][at] is not None}

    def add(self, region: Region, in_place: Mapping[int, int]) -> Kernel:
        """The kernel that computes ``region``; ``in_place``: results to the inputs they overwrite, by position."""
        names = _names(region)
        if self.on_gpu:
            return self._written(region, in_place)
        blocks = blocks_of(region)
        assert blocks is not None, "a region that is not cut is no kernel"
        outs = _outs(region, names, in_place)
        code = blocked_code(region, names, blocks, in_place, outs)
        return self._known(region, names, outs.values(), code.lines, code.workspace_bytes, f"{blocks.unit} at a time")

    def _written(self, region: Region, in_place: Mapping[int, int]) -> Kernel:
        """In Triton; named after what it computes and returns, types included, and whether it is to be tuned."""
        names = _names(region)
        key = f"{_meaning(region, names)}{sorted(in_place.items())}{region.autotune}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        name = f"{title(region)}_{digest}"
        if name not in self.table:
            self.table[name] = write_kernel(region, name, in_place, autotune=region.autotune)
        return self.table[name]

    def overwrites_update(self, node: fx.Node, region: Region, adam: FusedAdam, section: Section) -> dict[int, int]:
        """Which results of ``node``, an Adam update as a region, its kernel can write over which operands, by position:
        parameter and state, and what is made of them, such as a cast, over its own old value."""
        found = {region.outputs.index(new): region.inputs.index(old) for old, new in adam.replaced}
        behind = _behind(region, adam)
        for index, at in self.overwrites(node, region, section).items():
            alone = region.outputs[index] in behind and set(region.inputs[at].users) <= set(behind)
            if alone and index not in found and at not in found.values():
                found[index] = at
        return found

    def add_update(
        self, region: Region, adam: FusedAdam, dying: Collection[int], in_place: Mapping[int, int]
    ) -> Kernel:
        """The kernel of an Adam update: it takes the step and the learning rate as well. ``in_place``: results to the
        inputs they overwrite. ``dying``: positions of inputs that it may overwrite, too."""
        names = _names(region)
        names |= {new: names[old] for old, new in adam.replaced}
        stores = [names[node] for node in adam.stores]
        free = [region.inputs[at] for at in dying if region.inputs[at] not in adam.stores]
        behind = _behind(region, adam)
        outs = _outs(region, names, in_place)
        over = {region.outputs[index]: region.inputs[at] for index, at in in_place.items()}
        before = [n for n in region.operations if n not in adam.nodes and n not in behind]
        prepared = _part(before, {adam.gradient, *region.outputs}, names, free, region.outputs, outs)
        finished = _part(behind, region.outputs, names, [], region.outputs, outs, over)
        states = ", ".join(f"[{name}]" for name in (stores[0], names[adam.gradient], *stores[1:]))
        options = f"beta1={adam.beta1}, beta2={adam.beta2}, weight_decay={adam.weight_decay}, eps={adam.eps}"
        scalars = "[step.to(torch.float32)], lr=lr.to(torch.float32)"
        update = f"torch._fused_adamw_({states}, [], {scalars}, {options}, amsgrad=False, maximize=False)"
        lines = (*prepared.lines, update, *finished.lines)
        workspace = max(prepared.workspace_bytes, finished.workspace_bytes)
        return self._known(region, names, outs.values(), lines, workspace, "its fused Adam, in place", ("step", "lr"))

    def _known(
        self,
        region: Region,
        names: Mapping[fx.Node, str],
        outs: Iterable[str],
        lines: tuple[str, ...],
        workspace_bytes: int,
        how: str,
        scalars: tuple[str, ...] = (),
    ) -> Kernel:
        optional = [f"{out}=None" for out in outs]
        parameters = ", ".join([*(names[node] for node in region.inputs), *scalars, *optional])
        place = [f"device = {names[region.inputs[0]]}.device"] if any("device" in line for line in lines) else []
        body = [*place, *lines, f"return {', '.join(names[node] for node in region.outputs)}"]
        source = "".join([f"({parameters}):\n", *(f"    {line}\n" for line in body)])
        # The same source for other sizes takes other memory, and is another kernel.
        digest = hashlib.sha256(f"{source}{workspace_bytes}".encode()).hexdigest()[:8]
        name = f"{title(region)}_{digest}"
        return self.table.setdefault(name, Kernel(name, f"def {name}{source}", "torch", how, workspace_bytes))


def _part(
    nodes: Sequence[fx.Node],
    wanted: Collection[fx.Node],
    names: Mapping[fx.Node, str],
    free: Sequence[fx.Node],
    returned: Collection[fx.Node],
    outs: Mapping[str, str],
    replaced: Mapping[fx.Node, fx.Node] | None = None,
) -> Code:
    """Code for some operations of a region, in order, that leaves those ``wanted``, over inputs that are ``free`` or
    ``replaced`` by them; what it makes that is not ``returned`` by the region is workspace."""
    if not nodes:
        return Code((), 0)
    inputs = list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in nodes))
    results = [node for node in nodes if node in wanted]
    part = region_of(nodes, inputs, results)
    own = dict(zip((*part.inputs, *part.operations), (names[n] for n in (*inputs, *nodes)), strict=True))
    blocks = blocks_of(part)
    assert blocks is not None, "a part of what is cut into blocks can be cut alike"
    # Nothing behind the part may read what it writes over.
    over = [at for at, n in enumerate(inputs) if n in free and set(n.users) <= set(nodes) and fits(results[0], n)]
    in_place = {0: over[0]} if over and results[0] not in returned else {}
    replaced = {result: old for result, old in (replaced or {}).items() if result in results}
    in_place |= {results.index(result): inputs.index(old) for result, old in replaced.items()}
    code = blocked_code(part, own, blocks, in_place, outs)
    made = [node for index, node in enumerate(results) if index not in in_place and node not in returned]
    return Code(code.lines, code.workspace_bytes + sum(storage_bytes(val(node)) for node in made))


def _outs(region: Region, names: Mapping[fx.Node, str], in_place: Collection[int]) -> dict[str, str]:
    """The parameters that may have memory for results which overwrite nothing, by the result's variable."""
    return {names[node]: f"out{i}" for i, node in enumerate(region.outputs) if i not in in_place}


def _behind(region: Region, adam: FusedAdam) -> list[fx.Node]:
    """Operations that depend on the update without being part of it: the cast of a master does."""
    found: dict[fx.Node, None] = {}
    for node in region.operations:
        if node not in adam.nodes and any(source in adam.nodes or source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)


def _names(region: Region) -> dict[fx.Node, str]:
    """Variables that do not depend on where in a model the region is."""
    names = {node: f"input{index}" for index, node in enumerate(region.inputs)}
    counts = Counter[str]()
    for node in region.operations:
        word = "picked" if is_getitem(node) else kind(node)
        names[node] = f"{word}{counts[word]}"
        counts[word] += 1
    return names


def _meaning(region: Region, names: Mapping[fx.Node, str]) -> str:
    """What the region computes, of which types, and returns: the same text for all that one kernel serves."""
    calls = [call(node, names.__getitem__) for node in region.operations]
    types = [str(type_of(val(node))) for node in region.inputs]
    return repr((calls, types, [names[node] for node in region.outputs]))

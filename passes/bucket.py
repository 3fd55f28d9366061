"""Merge the buckets of single parameters into one per module block: fewer, larger collectives and one update each.

A block is the parameter's path up to its first index (``h.3`` of ``h.3.attn.weight``); parameters outside such blocks
merge with their neighbours in order of first use. Gathered storage is never copied: parameters are views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import fx

from graphshard import fake
from graphshard.blocks import block_path
from graphshard.dataflow import downstream, is_pooled
from graphshard.pipeline import Context
from graphshard.program import Bucket, NodeInfo, Phase, Program, Role, Section, Slot, info
from graphshard.rewrite import add_input, arg, call, list_arg, remove_input, replace_input, retype, set_outputs

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

ALIGN = 16
"""Members start, and shards end, at multiples of this many elements, so that vector loads are aligned."""


@dataclass(frozen=True)
class BucketCollectives:
    """Merge buckets. Those whose updates differ (other hyper-parameters, whole-parameter optimizers) stay apart."""

    name: ClassVar[str] = "bucket"
    exact: ClassVar[bool] = False

    def run(self, program: Program, ctx: Context) -> Program:
        if not program.buckets:
            return program
        given = ctx.placement.buckets if ctx.placement is not None else None
        updates = [_Update(section) for section in program.updates()]
        groups = _obeyed(program, given) if given else _chosen(program, updates)
        for merged, members in groups:
            _Merge(program, merged, members).run(updates)
        position = _order(program)
        ordered = sorted(program.buckets.values(), key=lambda b: (b.stage, position(b)))
        program.buckets = {b.name: b for b in ordered}
        return program


def _order(program: Program) -> Callable[[Bucket], int]:
    """Position of a bucket's first use in the body; after all others if it has none."""
    position = {node: i for i, node in enumerate(program.body.graph.nodes)}
    first = {
        slot.name: min((position[user] for user in node.users), default=len(position))
        for node, slot in program.body.inputs.items()
        if slot.role in (Role.FLAT, Role.SHARD)
    }
    return lambda bucket: first.get(bucket.name, len(position))


def _chosen(program: Program, updates: list[_Update]) -> list[tuple[Bucket, list[Bucket]]]:
    """Neighbours in order of use that agree on everything a bucket has in common."""

    def key(bucket: Bucket) -> tuple[Any, ...]:
        param = program.params[bucket.members[0][0]]
        alone = bucket.name if len(param.stages) > 1 else ""  # replicas on two stages must have the same layout
        return (bucket.stage, block_path(param.name), param.group, param.has_grad, bucket.dtype, bucket.store, alone)

    ordered = sorted(program.buckets.values(), key=_order(program))
    ordered.sort(key=lambda b: b.stage)
    collected: dict[tuple[Any, ...], list[Bucket]] = {}
    for run, (k, items) in enumerate(groupby(ordered, key=key)):
        # A block that another block interrupts is one bucket all the same; parameters outside blocks are not.
        collected.setdefault(k if k[1] else (*k, run), []).extend(items)
    result: list[tuple[Bucket, list[Bucket]]] = []
    names: set[str] = set()
    for members in collected.values():
        if len(members) == 1:
            names.add(members[0].name)
            continue
        for part in _isomorphic(updates, members):
            name = _fresh(block_path(part[0].members[0][0]) or part[0].name, names)
            result.append((_layout(name, part), part))
    return result


def _fresh(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken.add(candidate)
    return candidate


def _obeyed(program: Program, given: Any) -> list[tuple[Bucket, list[Bucket]]]:
    owner = {(name, b.stage): b for b in given.values() for name, _ in b.members}
    groups: dict[str, list[Bucket]] = {}
    for bucket in program.buckets.values():
        groups.setdefault(owner[bucket.members[0][0], bucket.stage].name, []).append(bucket)
    return [(given[name], members) for name, members in groups.items() if members != [given[name]]]


def _layout(name: str, members: list[Bucket]) -> Bucket:
    """Members one after the other, aligned, the end padded so that shards are equal and aligned."""
    offset, placed = 0, []
    for bucket in members:
        placed.append((bucket.members[0][0], offset))
        offset += -(-bucket.numel // ALIGN) * ALIGN
    unit = ALIGN * members[0].parts
    return replace(members[0], name=name, numel=-(-offset // unit) * unit, members=tuple(placed))


def _isomorphic(updates: list[_Update], members: list[Bucket]) -> list[list[Bucket]]:
    """``members`` in groups whose updates are the same operators with the same constants."""
    groups: list[list[Bucket]] = []
    for bucket in members:
        for group in groups:
            if all(update.match(group[0], bucket) is not None for update in updates):
                group.append(bucket)
                break
        else:
            groups.append([bucket])
    return groups


class _Update:
    """An update's graph, by what concerns each of the buckets it has at first."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self._inputs: dict[tuple[str, int], dict[tuple[Role, str], fx.Node]] = {}
        self._outputs: dict[tuple[str, int], dict[tuple[Role, str], Slot]] = {}
        self._own: dict[str, list[fx.Node]] = {}
        for node, slot in section.inputs.items():
            if slot.role in _OF_BUCKETS:
                self._inputs.setdefault(_bucket_of(slot), {})[slot.role, slot.key] = node
        for slot in section.output_slots:
            if slot.role in _OF_BUCKETS:
                self._outputs.setdefault(_bucket_of(slot), {})[slot.role, slot.key] = slot
        self._values = section.outputs

    def inputs(self, bucket: Bucket) -> dict[tuple[Role, str], fx.Node]:
        """Placeholders of its storage, state and gradient, by role and key."""
        return self._inputs.get((bucket.name, bucket.stage), {})

    def outputs(self, bucket: Bucket) -> dict[tuple[Role, str], Slot]:
        """Slots of its storage, state and gradient, by role and key."""
        return self._outputs.get((bucket.name, bucket.stage), {})

    def own(self, bucket: Bucket) -> list[fx.Node]:
        """The operations that concern ``bucket`` alone, in order."""
        if bucket.name not in self._own:
            own = set(downstream(self.inputs(bucket).values(), stop=is_pooled))
            values = (self._values[slot] for slot in self.outputs(bucket).values())
            own |= {node for node in values if node.op == "call_function"}
            pending = list(own)
            while pending:  # constants made for this bucket only
                for source in pending.pop().all_input_nodes:
                    if source.op == "call_function" and source not in own and all(user in own for user in source.users):
                        own.add(source)
                        pending.append(source)
            self._own[bucket.name] = sorted(n for n in own if not is_pooled(n))
        return self._own[bucket.name]

    def match(self, first: Bucket, other: Bucket) -> dict[fx.Node, fx.Node] | None:
        """Nodes of ``first``'s update to those of ``other``'s; None where they differ."""
        ours, theirs = self.inputs(first), self.inputs(other)
        own, own_other = self.own(first), self.own(other)
        if ours.keys() != theirs.keys() or len(own) != len(own_other):
            return None
        if self.outputs(first).keys() != self.outputs(other).keys():
            return None
        mapping = {ours[key]: theirs[key] for key in ours}
        for a, b in zip(own, own_other, strict=True):
            if a.target is not b.target or a.target is aten.as_strided.default:
                return None
            mapped: Any = fx.map_arg((a.args, a.kwargs), lambda n: mapping.get(n, n))
            if mapped != (b.args, b.kwargs):
                return None
            mapping[a] = b
        return mapping


_OF_BUCKETS = (Role.CARRY, Role.FLAT, Role.SHARD, Role.MASTER, Role.STATE, Role.OUTPUT)


def _bucket_of(slot: Slot) -> tuple[str, int]:
    return (slot.name.removeprefix("grad:") if slot.role in (Role.CARRY, Role.OUTPUT) else slot.name, slot.stage)


class _Merge:
    """Rewrites everything about ``members`` into ``merged``, whose layout holds them."""

    def __init__(self, program: Program, merged: Bucket, members: list[Bucket]) -> None:
        self.program, self.merged, self.members = program, merged, members
        self.offsets = dict(merged.members)

    def run(self, updates: list[_Update]) -> None:
        for update in updates:
            self._update(update)
        self._prologue()
        self._reads()
        self._gradients()
        for bucket in self.members:
            del self.program.buckets[bucket.name]
        self.program.buckets[self.merged.name] = self.merged

    def _slot(self, slot: Slot) -> Slot:
        prefix = "grad:" if slot.role in (Role.CARRY, Role.OUTPUT) else ""
        return replace(slot, name=prefix + self.merged.name)

    def _flat(self, like: fx.Node, old: Bucket) -> torch.Tensor:
        value = like.meta["val"]
        numel = self.merged.numel if value.numel() == old.numel else self.merged.shard_numel
        return fake.tensor(value.fake_mode, [numel], value.dtype, device=value.device)

    def _update(self, update: _Update) -> None:
        section = update.section
        # A call that was compiled first does not tell which parameters the loss reaches: of one that it does not reach,
        # the bucket's gradient is zero. Storage and state are updated as a whole, or not at all.
        found = [bucket for bucket in self.members if update.inputs(bucket)]
        if not found:
            return
        first, others = found[0], found[1:]
        kept = any(role is not Role.OUTPUT for role, _ in update.outputs(first))
        assert not kept or found == self.members, f"a part of {self.merged.name} is not updated"
        own = update.own(first)
        dropped: list[fx.Node] = []
        gone: set[fx.Node] = set()
        outputs = dict(section.outputs)
        for other in others:
            mapping = update.match(first, other)
            assert mapping is not None, f"the updates of {first.name} and {other.name} differ"
            for slot in update.outputs(other).values():
                del outputs[slot]
            dropped += [mapping[node] for node in own]
            gone |= set(mapping.values())
        for norm in {user for node in gone for user in node.users if is_pooled(user)}:
            norm.args = ([n for n in list_arg(norm, 0) if n not in gone],)
        renamed = {slot: self._slot(slot) for slot in update.outputs(first).values()}
        set_outputs(section, {renamed.get(slot, slot): node for slot, node in outputs.items()})
        for node in sorted(dropped, reverse=True):
            section.graph.erase_node(node)
        for other in others:
            for node in update.inputs(other).values():
                remove_input(section, node)
        whole = any(node.target is gs.pack.default for node in own)  # the update of a whole parameter
        for (role, key), node in update.inputs(first).items():
            value = node.meta["val"]
            # A scalar, or what a whole parameter's update keeps, is no part of the storage and stays what it is.
            kept = role in (Role.MASTER, Role.STATE)
            if not kept or (not whole and tuple(value.shape) in ((first.numel,), (first.shard_numel,))):
                value = self._flat(node, first)
            slot = self._slot(section.inputs[node])
            self._replace_input(section, node, slot, value, key)
        for node in own:
            if node.target is gs.pack.default:  # of a whole parameter's update: its bucket has become longer
                node.args = (*node.args[:2], self.merged.numel)
        retype(own)

    def _replace_input(self, section: Section, node: fx.Node, slot: Slot, value: torch.Tensor, key: str = "") -> None:
        name = ("grad." if slot.role is Role.CARRY else "") + self.merged.name + (f".{key}" if key else "")
        replace_input(section, node, slot, value, name)

    def _prologue(self) -> None:
        section = self.program.prologue
        outputs: dict[Slot, fx.Node] = {}
        merged: fx.Node | None = None
        dead: list[fx.Node] = []
        carries = {Slot(Role.CARRY, f"grad:{b.name}", stage=b.stage): b for b in self.members}
        for slot, node in section.outputs.items():
            if slot not in carries:
                outputs[slot] = node
                continue
            dead.append(node)
            if merged is None:
                value = self._flat(node, carries[slot])
                with section.graph.inserting_before(node):
                    args = ([value.numel()], *node.args[1:])
                    merged = call(section.graph, node.target, args, info(node), **node.kwargs)  # type: ignore[arg-type]
                outputs[self._slot(slot)] = merged
        set_outputs(section, outputs)
        for node in dead:
            section.graph.erase_node(node)

    def _reads(self) -> None:
        """Parameter storage, its gathers, and the views that the operations read."""
        body = self.program.body
        inputs = body.input_slots
        stored = [
            (node, b) for b in self.members if (node := inputs.get(Slot(b.store, b.name, stage=b.stage))) is not None
        ]
        if not stored:
            return
        first, bucket = stored[0]
        slot = Slot(bucket.store, self.merged.name, stage=bucket.stage)
        temporary = replace(slot, key="merging")
        new = add_input(body, temporary, self._flat(first, bucket), info(first), self.merged.name)
        owner: dict[fx.Node, Bucket] = dict(stored)
        gathers = [n for node, _ in stored for n in node.users if n.target is c10d.all_gather_into_tensor.default]
        for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT):
            group = sorted(n for n in gathers if info(n).phase is phase)
            if not group:
                continue
            record = self._record(info(group[0]))
            with body.graph.inserting_before(group[0]):
                gathered = call(body.graph, c10d.all_gather_into_tensor.default, (new, *group[0].args[1:]), record)
                whole = call(body.graph, c10d.wait_tensor.default, (gathered,), record)
            for old in group:
                (waited,) = old.users
                self._move_views(list(waited.users), whole, owner[arg(old, 0)])
                body.graph.erase_node(waited)
                body.graph.erase_node(old)
        for node, old_bucket in stored:
            self._move_views(list(node.users), new, old_bucket)
            remove_input(body, node)
        body.inputs[new] = slot

    def _move_views(self, views: Iterable[fx.Node], whole: fx.Node, bucket: Bucket) -> None:
        for view in views:
            assert view.target is aten.as_strided.default, f"{view} reads a bucket otherwise than as a parameter's view"
            _, size, stride, offset = view.args
            assert isinstance(offset, int)
            view.args = (whole, size, stride, offset + self.offsets[bucket.members[0][0]])

    def _record(self, record: NodeInfo) -> NodeInfo:
        return replace(record, made_by="bucket", module=block_path(self.merged.members[0][0]) or record.module)

    def _gradients(self) -> None:
        body, outputs = self.program.body, self.program.body.outputs
        slots = {Slot(Role.CARRY, f"grad:{b.name}", stage=b.stage): b for b in self.members}
        found = [(slot, b, outputs[slot]) for slot, b in slots.items() if slot in outputs]
        if not found:
            return
        chains = {slot: _gradient_chain(added) for slot, _, added in found}
        parts: list[Any] = []
        offsets: list[int] = []
        for slot, bucket, _ in found:
            pack = chains[slot][-1]
            parts += list_arg(pack, 0)
            base = self.offsets[bucket.members[0][0]]
            offsets += [base + offset for offset in list_arg(pack, 1)]
        last = max(added for _, _, added in found)
        late = any(info(chain[-1]).phase is Phase.WEIGHT for chain in chains.values())
        slot, bucket, added = found[0]
        record = self._record(replace(info(added), phase=Phase.WEIGHT if late else info(added).phase))
        carry = body.input_slots[slot]
        target = self._slot(slot)
        new = add_input(
            body, replace(target, key="merging"), self._flat(carry, bucket), info(carry), f"grad.{self.merged.name}"
        )
        with body.graph.inserting_before(last):
            flat = call(body.graph, gs.pack.default, (parts, offsets, self.merged.numel), replace(record, origin=""))
            for link in reversed(chains[slot][:-1]):  # reduce-scatter and its wait
                assert callable(link.target)
                flat = call(body.graph, link.target, (flat, *link.args[1:]), replace(record, origin=""))
            total = call(body.graph, aten.add.Tensor, (new, flat), record)
        results: dict[Slot, fx.Node] = {}
        for s, node in body.outputs.items():
            results[target if s in slots else s] = total if s in slots else node
        set_outputs(body, results)
        inputs = body.input_slots
        for s, _, node in found:
            placeholder = inputs[s]
            body.graph.erase_node(node)
            for link in chains[s]:
                body.graph.erase_node(link)
            remove_input(body, placeholder)
        body.inputs[new] = target


def _gradient_chain(added: fx.Node) -> list[fx.Node]:
    """From what ``add(carry, …)`` adds back to the pack: wait and reduce-scatter, if any, then the pack."""
    chain = [arg(added, 1)]
    while chain[-1].target is not gs.pack.default:
        chain.append(arg(chain[-1], 0))
    return chain

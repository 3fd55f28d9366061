"""Keep values outside of the device: optimizer state, parameters, and activations between forward and backward.

What is stored outside is reloaded for each phase that reads it and offloaded when it is replaced. Of activations the
pass obeys tags (memory-policy). Every reload starts while what the one before it brought is in use: two are on the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, ClassVar

import torch
from torch import fx

from graphshard.communication import MOVES, communication_axis
from graphshard.dataflow import downstream, is_getitem, is_view
from graphshard.errors import PassOptionError
from graphshard.homes import before_moves, on_host
from graphshard.host_update import buckets, move_to_host, prices
from graphshard.pipeline import Context
from graphshard.program import Level, MemoryTag, NodeInfo, Phase, Program, Role, Section, Slot, info, val
from graphshard.rewrite import call, clone, set_outputs

c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

_OPTIMIZER = frozenset(role for role in Role if role in ("state", "master"))
_PARAMS = frozenset((Role.SHARD, Role.FLAT))


@dataclass(frozen=True)
class Offload:
    """``optimizer``, ``params`` and ``activations`` say where: "cpu" or "nvme"; None: on the device, and in host
    memory for what is tagged. ``optimizer_of`` and ``params_of`` name the buckets that it is about; (): all. Those
    that ``optimizer_in_file`` and ``params_in_file`` name go to "nvme" whatever the others do. ``update``: where
    state in host memory is updated, on the "device", by the CPU ("host"), or as is "cheaper" on a GPU."""

    optimizer: str | None = None
    params: str | None = None
    activations: str | None = None
    optimizer_of: tuple[str, ...] = ()
    params_of: tuple[str, ...] = ()
    optimizer_in_file: tuple[str, ...] = ()
    params_in_file: tuple[str, ...] = ()
    update: str = "device"
    name: ClassVar[str] = "offload"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option in ("optimizer", "params", "activations"):
            if getattr(self, option) not in (None, "cpu", "nvme"):
                raise PassOptionError(self.name, f"{option}={getattr(self, option)}", "cpu or nvme")
        if self.update not in ("device", "host", "cheaper"):
            raise PassOptionError(self.name, f"update={self.update}", "device, host or cheaper")
        for option in ("optimizer_of", "params_of", "optimizer_in_file", "params_in_file"):
            if "" in getattr(self, option):
                raise PassOptionError(self.name, f"{option}={'/'.join(getattr(self, option))}", "names of buckets")

    def run(self, program: Program, ctx: Context) -> Program:
        if program.level is not Level.SHARDED:
            return program
        for section in program.sections().values():
            _reload_stored(section, self._home)
            _offload_stored(section, self._home)
        if self.update != "device":
            found = [(bucket, prices(bucket)) for bucket in buckets(program.epilogue)]
            chosen = [bucket for bucket, cost in found if self.update == "host" or cost.host < cost.device]
            move_to_host(program.epilogue, chosen)
        _offload_tagged(program.body, {MemoryTag.OFFLOAD: self.activations or "cpu", MemoryTag.OFFLOAD_TO_FILE: "nvme"})
        for section in (program.prologue, program.body):
            _reload_early(section)
        for section in program.updates():
            _update_bucket_by_bucket(section, _finished(program.body))
        return program

    def _home(self, slot: Slot) -> str | None:
        """Where the value of a slot is between its uses; None: on the device."""
        if slot.role in _OPTIMIZER:
            return _chosen(slot.name, self.optimizer, self.optimizer_of, self.optimizer_in_file)
        if slot.role in _PARAMS:
            return _chosen(slot.name, self.params, self.params_of, self.params_in_file)
        return None


def _chosen(bucket: str, home: str | None, of: tuple[str, ...], in_file: tuple[str, ...]) -> str | None:
    if bucket in in_file:
        return "nvme"
    return home if not of or bucket in of else None


Home = Callable[[Slot], str | None]


# Insert the moves


def _is_large(node: fx.Node) -> bool:
    """A scalar (a step count) is not worth a transfer."""
    return bool(val(node).dim() > 0 and val(node).numel() > 0)


def _reload_stored(section: Section, home_of: Home) -> None:
    """For each phase that reads a stored value; views of it are of one phase each (normalize)."""
    for node, slot in section.inputs.items():
        readers = sorted((user for user in node.users if user.op != "output"), key=lambda n: info(n).phase)
        home = home_of(slot)
        if home is None or not _is_large(node):
            continue
        for phase, group in groupby(readers, key=lambda n: info(n).phase):
            reading = list(group)
            with section.graph.inserting_before(min(reading)):
                back = _reload(node, node, home, phase)
            for reader in reading:
                reader.replace_input_with(node, back)


def _reload(source: fx.Node, away: fx.Node, home: str, phase: Phase) -> fx.Node:
    """What ``away``, which was ``source``, is brought back as for ``phase``."""
    record = NodeInfo(phase=phase, module=info(source).module, stage=info(source).stage, made_by="offload")
    reload = call(source.graph, gs.reload.default, (away, home), record)
    return call(source.graph, c10d.wait_tensor.default, (reload,), record)


def _offload_stored(section: Section, home_of: Home) -> None:
    outputs = section.outputs
    for slot, node in outputs.items():
        home = home_of(slot)
        if home is not None and node.op != "placeholder" and _is_large(node):  # a placeholder has not left its home
            outputs[slot] = _offload(node, home, slot.stage)
    set_outputs(section, outputs)


def _offload(node: fx.Node, home: str, stage: int | None) -> fx.Node:
    record = NodeInfo(phase=info(node).phase, module=info(node).module, stage=stage, made_by="offload")
    with node.graph.inserting_after(node):
        return call(node.graph, gs.offload.default, (node, home), record)


def _offload_tagged(body: Section, home_of: Mapping[MemoryTag | None, str]) -> None:
    """By storage: as long as one view of it is kept, all of it is."""
    tagged = {_root(node): home for node in body.nodes() if (home := home_of.get(info(node).tag))}
    for root, home in sorted(tagged.items()):
        shown = _shown_by(root)
        late: dict[Phase, dict[fx.Node, list[fx.Node]]] = {}
        for value in shown:
            for reader in value.users:
                if reader.op != "output" and reader not in shown and _reads_late(reader):
                    late.setdefault(info(reader).phase, {}).setdefault(value, []).append(reader)
        if not late or root.op == "placeholder" or not val(root).numel():
            continue
        away = _offload(root, home, info(root).stage)
        for phase in sorted(late):
            _reload_views(root, away, home, phase, late[phase])


def _root(node: fx.Node) -> fx.Node:
    """What makes the storage that ``node`` shows."""
    while node.op != "placeholder" and (is_view(node) or _is_part(node) or node.target is c10d.wait_tensor.default):
        node = node.all_input_nodes[0]
    return node


def _is_part(node: fx.Node) -> bool:
    return is_getitem(node) and is_view(node.all_input_nodes[0])


def _shown_by(root: fx.Node) -> dict[fx.Node, None]:
    """``root`` and the forward's views of it, in order."""
    found = {root: None}
    for value in found.copy():
        pending = [value]
        while pending:
            for user in pending.pop().users:
                if user.op != "output" and info(user).phase is Phase.FORWARD and (is_view(user) or _is_part(user)):
                    found[user] = None
                    pending.append(user)
    return found


def _reads_late(reader: fx.Node) -> bool:
    """A forward value is sent from the forward, whoever receives it."""
    return info(reader).phase is not Phase.FORWARD and reader.target is not gs.transfer.default


def _reload_views(
    root: fx.Node, away: fx.Node, home: str, phase: Phase, readers: Mapping[fx.Node, list[fx.Node]]
) -> None:
    """Bring ``root`` back for ``phase`` and show it to the readers of its views as they saw it."""
    first = min(reader for group in readers.values() for reader in group)
    with root.graph.inserting_before(first):
        made = {root: _reload(root, away, home, phase)}

        def rebuilt(value: fx.Node) -> fx.Node:
            if value not in made:
                made[value] = clone(value, rebuilt, phase=phase, tag=None, made_by="offload", origin="")
            return made[value]

        for value, group in readers.items():
            shown = rebuilt(value)
            for reader in group:
                reader.replace_input_with(value, shown)


# Order


def _reload_early(section: Section) -> None:
    """Each reload of a phase starts before the one ahead of it is waited for."""
    reloads = [n for n in section.nodes() if n.target is gs.reload.default]

    def stream(node: fx.Node) -> tuple[int, str, bool]:
        return info(node).stage or 0, info(node).phase, node.all_input_nodes[0].op == "placeholder"

    for _, group in groupby(sorted(reloads, key=stream), key=stream):
        for current, following in pairwise(sorted(group)):
            _wait_of(current).prepend(following)


def _wait_of(start: fx.Node) -> fx.Node:
    (wait,) = start.users
    return wait


def _finished(body: Section) -> dict[Slot, int]:
    """When the gradient of each bucket is final, by the slot of the bucket's values."""
    position = {node: index for index, node in enumerate(body.graph.nodes)}
    late = len(position)  # weight work comes after the rest of the backward
    return {
        _bucket(replace(slot, name=slot.name.removeprefix("grad:"))): position[node]
        + (late if info(node).phase is Phase.WEIGHT else 0)
        for slot, node in body.outputs.items()
        if slot.role is Role.CARRY and slot.name.startswith("grad:")
    }


def _bucket(slot: Slot) -> Slot:
    return replace(slot, role=Role.FLAT, key="")


def _update_bucket_by_bucket(section: Section, finished: Mapping[Slot, int]) -> None:
    """One bucket after the other, in the order in which gradients are ``finished``: while it is updated, the state of
    the next one arrives and that of the one before leaves. What several read is computed for the first of them."""
    if not any(node.target in MOVES for node in section.nodes()):
        return
    turn = _turns(section, finished)
    last = 1 + max(turn.values(), default=0)
    # What the CPU makes comes back behind all updates, so that none waits for it: there is time until the step ends.
    brought = {n for n in section.nodes() if n.target is gs.reload.default and on_host(n.all_input_nodes[0])}
    behind = {*brought, *downstream(brought)}
    turns: dict[fx.Node, int] = {}
    results: dict[fx.Node, list[int]] = {}
    for slot, node in section.outputs.items():
        # What is gathered after the update is waited for when the next bucket has been updated.
        late = int(before_moves(node).target is c10d.wait_tensor.default)
        late += last + 2 if node in behind else 0
        results.setdefault(node, []).append(turn[slot] + late if slot in turn else last)
    for node in reversed(list(section.nodes())):
        wanted = [turns[user] - (last + 1 if user in brought else 0) for user in node.users if user.op != "output"]
        turns[node] = min([*wanted, *results.get(node, ())], default=last)
        sent = node.target is gs.offload.default and any(map(on_host, node.users))
        if node.target is gs.reload.default or communication_axis(node) or sent:
            turns[node] -= 1  # it is on its way for one turn
        if communication_axis(node) and all(source.op == "placeholder" for source in node.all_input_nodes):
            turns[node] = min(turns[node], -1)
    # What a turn reads has arrived before its first operation, so that the update is one piece.
    within: dict[Any, int] = {gs.reload.default: 0, c10d.wait_tensor.default: 1, gs.offload.default: 4}

    def place(node: fx.Node) -> tuple[int, int]:
        return turns[node], 5 if node in brought else within.get(node.target, 2 + on_host(node))

    for node in sorted(section.nodes(), key=place):
        section.output_node.prepend(node)


def _turns(section: Section, finished: Mapping[Slot, int]) -> dict[Slot, int]:
    """The turn of each slot that belongs to a bucket, in order of the updates; stages take theirs side by side. What
    depends on other stages, as the gradient of a tied weight does, comes last."""
    updated = {slot: node for slot, node in section.outputs.items() if slot.role in _OPTIMIZER | _PARAMS}
    between = downstream([node for node in section.nodes() if communication_axis(node) == "pp"])
    late = {_bucket(slot) for slot, node in updated.items() if before_moves(node) in between}
    counts: dict[int, int] = {}
    turn: dict[Slot, int] = {}
    for bucket in sorted(dict.fromkeys(map(_bucket, updated)), key=lambda b: (b in late, finished.get(b, 0))):
        turn[bucket] = counts.setdefault(bucket.stage, 0)
        counts[bucket.stage] += 1
    return {slot: turn[_bucket(slot)] for slot in updated}

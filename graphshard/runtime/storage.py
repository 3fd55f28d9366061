"""Full tensors under the model's own names, read from and written to the ranks' stores, however those are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from graphshard.errors import OptimizerStateMissing, OptimizerStateTogether, OutOfRange, StateMismatch
from graphshard.execution import ExecutionPlan, TensorType, slot_ref
from graphshard.loss_scaling import SKIPPED, initial
from graphshard.program import Bucket, Param, Role, Slot
from graphshard.runtime.executor import Executor

Members = tuple[tuple[str, int], ...]
"""The parameters or buffers of one stored value: (name, offset); offset -1: it is that value itself."""


@dataclass(frozen=True)
class _Place:
    """Where one stored value is: its slot says under which name and on which stage."""

    slot: Slot
    kind: TensorType  # of one rank's part
    axis: str = ""  # "" : every rank has all of it
    home: str = ""  # where it is kept; "": on the device

    @property
    def stage(self) -> int:
        return self.slot.stage


_Piece = tuple[_Place, Members, Mapping[str, Tensor]]
"""What to write somewhere: values by name."""


class Storage:
    """What the plans of one model keep from step to step.

    Args:
        plans: those known so far; :meth:`learn` adds more. Together they say which slots there are.
    """

    def __init__(self, executor: Executor, *plans: ExecutionPlan) -> None:
        self.executor = executor
        self.params: dict[str, Param] = {}
        self.buckets: dict[str, Bucket] = {}
        self._slots: dict[Slot, TensorType] = {}
        self._homes: dict[Slot, str] = {}
        self._unplaced: dict[str, Tensor] = {}  # buffers that no plan so far reads
        self._idle: dict[str, dict[str, Tensor]] = {}  # optimizer state of parameters that no step updates
        for plan in plans:
            self.learn(plan)

    def learn(self, plan: ExecutionPlan) -> None:
        """Take note of the slots of one more plan, and have room for them where they are kept.

        Raises:
            OffloadSpace, OffloadPath: there is no room for what it offloads to files.
            OutOfRange: it reads a buffer in a type that does not hold its values.
        """
        self.executor.reserve(plan)
        self.params |= plan.params
        self.buckets |= plan.buckets
        for stage, (reads, results) in enumerate(zip(plan.reads, plan.results, strict=True)):
            for slot, kind in (reads | results).items():
                here = Slot(slot.role, slot.name, slot.key, stage)
                if slot.role is Role.SCALER and here not in self._slots and slot in reads:
                    self.executor.write(slot_ref(slot), stage, plan.constants[initial(slot)])
                self._slots[here] = kind
                if (home := plan.stages[stage].homes.get(slot_ref(slot))) is not None:
                    self._homes[here] = home
        late = [place for place in self._places(Role.BUFFER) if place.slot.name in self._unplaced]
        for piece in _fitting((place, ((place.slot.name, -1),), self._unplaced) for place in late):
            self._write(*piece)
        for place in late:
            self._unplaced.pop(place.slot.name, None)

    # Parameters

    def read_params(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """Every parameter in full, by canonical name, of its master if it has one; with ``rank0_only`` other ranks get
        an empty dict. Collective."""
        result: dict[str, Tensor] = {}
        masters = [(place, self._members(place)) for place in self._sharded_places(Role.MASTER)]
        mastered = {name for _, members in masters for name, _ in members}
        for place, members in [*masters, *self._param_places()]:
            held = [(name, at) for name, at in members if self.params[name].stages[0] == place.stage]
            wanted = [(n, at) for n, at in held if place.slot.role is Role.MASTER or n not in mastered]
            if not wanted:
                continue
            flat = self._read(place, rank0_only)
            for name, at in wanted if flat is not None else ():
                assert flat is not None
                result[name] = self._cut(flat, name, at)
        return {name: result[name] for name in self.params if name in result}

    def write_model(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Store full parameters and their masters, given by canonical name, on every rank and stage that holds them,
        and buffers as :meth:`write_buffers` does.

        Raises:
            StateMismatch: a parameter is missing, or something has another shape; nothing is stored then.
            OutOfRange: something has finite values that are infinite in the type that it is stored in; likewise.
        """
        for name, param in self.params.items():
            _expect(name, params.get(name), param.shape)
        masters = [(place, self._members(place)) for place in self._sharded_places(Role.MASTER)]
        pieces = _fitting((place, members, params) for place, members in [*self._param_places(), *masters])
        self._replace(pieces + self._buffer_pieces(buffers))
        self._set_aside(buffers)

    def _param_places(self) -> Iterator[tuple[_Place, Members]]:
        """Each stored piece of parameters with its members."""
        seen: set[tuple[str, int]] = set()
        for bucket in self.buckets.values():
            sharded = bucket.store is Role.SHARD
            kind = TensorType((bucket.shard_numel if sharded else bucket.numel,), bucket.dtype, (1,))
            slot = Slot(bucket.store, bucket.name, stage=bucket.stage)
            yield _Place(slot, kind, bucket.axis if sharded else "", self._homes.get(slot, "")), bucket.members
            seen |= {(name, bucket.stage) for name, _ in bucket.members}
        for param in self.params.values():
            for stage in param.stages:
                if (param.name, stage) not in seen:
                    slot = Slot(Role.PARAM, param.name, stage=stage)
                    yield _Place(slot, self._slots.get(slot) or _contiguous(param)), ((param.name, -1),)

    # Buffers

    def read_buffers(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """Every buffer: data-parallel rank 0's, of the first stage that has it. Collective."""
        known = not rank0_only or 0 in self.executor.ranks
        result = {name: value.clone() for name, value in self._unplaced.items()} if known else {}
        for place in self._first_stage(Role.BUFFER):
            value = self._read(place, rank0_only)
            if value is not None:
                result[place.slot.name] = value
        return result

    def write_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Store buffers on every stage that has them; those that no plan reads are kept until one does. Others stay.

        Raises:
            StateMismatch: one has another shape; nothing is stored then.
            OutOfRange: as for :meth:`write_model`.
        """
        self._replace(self._buffer_pieces(tensors))
        self._set_aside(tensors)

    def _buffer_pieces(self, tensors: Mapping[str, Tensor]) -> list[_Piece]:
        places = [place for place in self._places(Role.BUFFER) if place.slot.name in tensors]
        for place in places:
            _expect(place.slot.name, tensors.get(place.slot.name), place.kind.shape)
        return _fitting((place, ((place.slot.name, -1),), tensors) for place in places)

    def _set_aside(self, buffers: Mapping[str, Tensor]) -> None:
        """Keep those that no plan reads so far."""
        placed = {place.slot.name for place in self._places(Role.BUFFER)}
        self._unplaced |= {name: value.detach().clone() for name, value in buffers.items() if name not in placed}

    # Optimizer state

    def read_state(self, rank0_only: bool = False) -> dict[str, dict[str, Tensor]]:
        """Optimizer state in full: parameter to key to tensor; empty before the first step. Collective."""
        known = not rank0_only or 0 in self.executor.ranks
        result = {name: {k: t.clone() for k, t in state.items()} for name, state in self._idle.items() if known}
        for place in self._sharded_places(Role.STATE) if self.executor.state_keys else ():
            members = [(n, at) for n, at in self._members(place) if self.params[n].stages[0] == place.stage]
            value = self._read(place, rank0_only) if members else None
            for name, at in members if value is not None else ():
                assert value is not None
                full = value.clone() if not value.ndim or at < 0 else self._cut(value, name, at)
                result.setdefault(name, {})[place.slot.key] = full
        return {name: result[name] for name in self.params if name in result}

    def write_state(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store optimizer state as :meth:`read_state` gives it; an empty mapping is a fresh optimizer.

        Raises:
            OptimizerStateMissing: a parameter has none; nothing is stored then.
            OptimizerStateTogether: a scalar differs within a bucket; likewise.
            StateMismatch: state has another shape; likewise.
            OutOfRange: as for :meth:`write_model`.
        """
        places = list(self._sharded_places(Role.STATE))
        updated = {name for place in places for name, _ in self._members(place)}
        for place in places if tensors else ():
            key, scalar = place.slot.key, not place.kind.shape
            members = self._members(place)
            for name, at in members:
                shape = () if scalar else place.kind.shape if at < 0 else self.params[name].shape
                if (value := tensors.get(name, {}).get(key)) is None:
                    raise OptimizerStateMissing(key, name, shape)
                _expect(f"state {key} of {name}", value, shape)
            if scalar and any(tensors[n][key].item() != tensors[members[0][0]][key].item() for n, _ in members):
                raise OptimizerStateTogether(key, [name for name, _ in members])
        fresh = [(place, self._members(place)) for place in places] if tensors else []
        pieces = _fitting((at, on, {name: tensors[name][at.slot.key] for name, _ in on}) for at, on in fresh)
        self._idle = {
            name: {key: value.detach().clone() for key, value in state.items()}
            for name, state in tensors.items()
            if name not in updated
        }
        for store in self.executor.stores.values():
            for ref in [ref for ref in store if ref.name.startswith(f"{Role.STATE}:")]:
                del store[ref]
        self.executor.state_keys = frozenset(place.slot.key for place in places if tensors)
        self._replace(pieces)

    def _sharded_places(self, role: Role) -> Iterator[_Place]:
        """Of masters or optimizer state: sharded, if their shape says so."""
        for place in self._places(role):
            bucket = self.buckets.get(place.slot.name)
            split = bucket is not None and place.kind.shape == (bucket.shard_numel,) != (bucket.numel,)
            yield replace(place, axis=bucket.axis if bucket is not None and split else "")

    def _members(self, place: _Place) -> Members:
        bucket = self.buckets.get(place.slot.name)
        if bucket is None:
            return ((place.slot.name, -1),)
        if place.kind.shape in ((), (bucket.numel,), (bucket.shard_numel,)):
            return bucket.members
        return tuple((name, -1) for name, _ in bucket.members)  # of an optimizer that looks at whole parameters

    # Loss scaling

    def read_scaler(self) -> dict[str, float]:
        """The scale and how many steps in a row were not skipped, by slot name; {} without loss scaling. Collective."""
        places = [place for place in self._first_stage(Role.SCALER) if place.slot.name != SKIPPED.name]
        values = {place.slot.name: self._read(place, False) for place in places}
        return {name: value.item() for name, value in values.items() if value is not None}

    def write_scaler(self, values: Mapping[str, float]) -> None:
        """Store what :meth:`read_scaler` gives, on every stage."""
        for place in self._places(Role.SCALER):
            if place.slot.name in values:
                value = torch.tensor(values[place.slot.name], dtype=place.kind.dtype, device="cpu")
                self.executor.write(slot_ref(place.slot), place.stage, value)

    # Common

    def _places(self, role: Role) -> Iterator[_Place]:
        for slot in sorted(slot for slot in self._slots if slot.role is role):
            yield _Place(slot, self._slots[slot], home=self._homes.get(slot, ""))

    def _first_stage(self, role: Role) -> Iterator[_Place]:
        seen: set[str] = set()
        for place in self._places(role):
            if place.slot.name not in seen:
                seen.add(place.slot.name)
                yield place

    def _read(self, place: _Place, rank0_only: bool) -> Tensor | None:
        return self.executor.read(slot_ref(place.slot), place.stage, place.kind, place.axis, not rank0_only)

    def _cut(self, flat: Tensor, name: str, at: int) -> Tensor:
        """A copy, so that saving one parameter does not save its bucket."""
        shape = self.params[name].shape
        return flat.clone() if at < 0 else flat.reshape(-1)[at : at + self.params[name].numel].view(shape).clone()

    def _replace(self, pieces: list[_Piece]) -> None:
        """Write values that belong together; where one of them fails, those that are not written are lost."""
        for place, _, _ in pieces:
            self.executor.lose(slot_ref(place.slot), place.stage)
        for place, members, tensors in pieces:
            self._write(place, members, tensors)

    def _write(self, place: _Place, members: Members, tensors: Mapping[str, Tensor]) -> None:
        if not any(self.executor.mesh.coordinates(rank)["pp"] == place.stage for rank in self.executor.ranks):
            return
        if not place.kind.shape or members[0][1] < 0:
            value = tensors[members[0][0]].to(place.kind.dtype)
            if value.stride() != place.kind.stride:
                shape, stride = place.kind.shape, place.kind.stride
                value = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device).copy_(value)
        else:
            parts = self.executor.mesh.size(place.axis) if place.axis else 1
            value = torch.zeros(place.kind.numel * parts, dtype=place.kind.dtype, device="cpu")
            for name, at in members:
                value[at : at + self.params[name].numel].copy_(tensors[name].reshape(-1))
        self.executor.write(slot_ref(place.slot), place.stage, value, place.axis, place.home)


def _contiguous(param: Param) -> TensorType:
    strides = tuple(prod(param.shape[dim + 1 :]) for dim in range(len(param.shape)))
    return TensorType(param.shape, param.dtype, strides)


def _expect(name: str, given: Tensor | None, shape: tuple[int, ...]) -> None:
    if given is None:
        raise StateMismatch(name, "nothing", f"a tensor of shape {list(shape)}")
    if tuple(given.shape) != shape:
        raise StateMismatch(name, f"shape {list(given.shape)}", f"shape {list(shape)}")


def _fitting(pieces: Iterable[_Piece]) -> list[_Piece]:
    """``pieces``, of which no finite value becomes infinite. All ranks look at all of them, and so refuse alike."""
    found = list(pieces)
    for place, members, tensors in found:
        for name, _ in members:
            key = f"state {place.slot.key} of " if place.slot.role is Role.STATE else ""
            _expect_range(f"{key}{name}", tensors[name].detach(), place.kind.dtype)
    return found


def _expect_range(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if not (value.is_floating_point() and dtype.is_floating_point and value.numel()):
        return
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(value.dtype).max:
        return
    low, high = value.aminmax()  # makes no copy of it, and is NaN if anything is
    largest = torch.maximum(-low, high)
    if not largest.isfinite():  # what is infinite or NaN already stays so
        finite = value[value.isfinite()]
        largest = finite.abs().max() if finite.numel() else torch.zeros_like(largest)
    if largest.to(dtype).isinf():  # a little beyond the limit it is rounded to that
        raise OutOfRange(name, largest.item(), str(dtype).removeprefix("torch."), limit)

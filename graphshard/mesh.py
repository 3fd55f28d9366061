"""The device mesh as a value: named axes, outermost first, and the coordinates of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

AXES = ("pp", "dp", "shard", "tp")
"""Axis names, outermost first. ``dp`` replicates; ``shard`` is the inner data-parallel axis of hybrid sharding
(``dp2+zero3:size=4``). Without hybrid sharding ZeRO shards over ``dp`` itself and ``shard`` is absent."""

DATA_AXES = ("dp", "shard")


@dataclass(frozen=True)
class Mesh:
    """Named axes with sizes, outermost first; ranks are numbered row-major."""

    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        assert names == sorted(set(names), key=AXES.index), f"axes {names} are not in the order {AXES}"

    def size(self, axis: str) -> int:
        """Number of ranks along ``axis``; 1 for an axis the mesh does not have."""
        return dict(self.axes).get(axis, 1)

    @property
    def world_size(self) -> int:
        return prod(size for _, size in self.axes)

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, over both data axes."""
        return self.size("dp") * self.size("shard")

    @property
    def shard_axis(self) -> str:
        """The axis ZeRO shards over."""
        return "shard" if self.size("shard") > 1 else "dp"

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of ``rank`` along every axis of the mesh; 0 along an axis the mesh lacks."""
        result = dict.fromkeys(AXES, 0)
        for axis, size in reversed(self.axes):
            rank, result[axis] = divmod(rank, size)
        return result

    def rank(self, coordinates: dict[str, int]) -> int:
        """The rank at ``coordinates``; inverse of :meth:`coordinates`."""
        result = 0
        for axis, size in self.axes:
            result = result * size + coordinates.get(axis, 0)
        return result

    def dp_rank(self, rank: int) -> int:
        """Index of ``rank`` among the data-parallel ranks, outer axis first."""
        at = self.coordinates(rank)
        return at["dp"] * self.size("shard") + at["shard"]

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only along ``axis``, in order of their coordinate."""
        at = self.coordinates(rank)
        return tuple(self.rank(at | {axis: i}) for i in range(self.size(axis)))

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.axes)

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Inverse of ``str``: ``"pp=2 dp=4"``."""
        pairs = (item.partition("=") for item in text.split())
        return cls(tuple((name, int(size)) for name, _, size in pairs))


def ranks_by(given: Sequence[str]) -> dict[str, list[int]]:
    """Each value of ``given`` (one per rank) to the ranks that have it."""
    result: dict[str, list[int]] = {}
    for rank, value in enumerate(given):
        result.setdefault(value, []).append(rank)
    return result

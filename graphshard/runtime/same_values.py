"""Whether all ranks begin with the same values: each of them stores its own part of what it is given, and so would
train a mixture of models if they differed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphshard.errors import ValuesDiffer
from graphshard.fingerprints import checksum_of, combined
from graphshard.runtime.executor import Executor

_AT = "comparing values"


def require_same(executor: Executor, values: Mapping[str, Tensor]) -> None:
    """Compare ``values`` over processes by a checksum of all their bytes; collective. Only where they differ are names
    exchanged.

    Raises:
        ValuesDiffer: they differ; on all ranks.
    """
    if len(executor.ranks) == executor.mesh.world_size:
        return
    mine = {name: checksum_of(value) for name, value in values.items()}
    if len(set(executor.told(combined(mine), _AT))) == 1:
        return
    given = executor.told(mine, _AT)
    for name in dict.fromkeys(name for one in given for name in one):
        found = [one.get(name) for one in given]
        if len(set(found)) > 1:
            raise ValuesDiffer(name, found)
    raise AssertionError("what all ranks have alike was said to differ")

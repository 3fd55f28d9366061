"""Operators that kernels do not have, as others that they have: by torch's own decompositions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphshard import fake
from graphshard.codegen.triton_ops import Unsupported, has_form


def expanded(target: Any, arguments: tuple[Any, dict[str, Any]], known: Collection[Any]) -> fx.Graph | None:
    """What the operator computes from ``arguments``, positional and by name, as a graph that takes the nodes among
    them in order, of operators that have a form or are ``known``; None if torch has no such decomposition.

    Raises:
        Unsupported: torch has one that fails.
    """
    table = _table(frozenset(known))
    if target not in table:
        return None
    leaves, structure = tree_flatten(arguments)
    places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def call(*tensors: torch.Tensor) -> Any:
        given = dict(enumerate(leaves)) | dict(zip(places, tensors, strict=True))
        args, kwargs = tree_unflatten(given.values(), structure)
        return target(*args, **kwargs)

    mode = fake.new_mode()
    values = [leaves[at].meta["val"] for at in places]
    fakes = [fake.fresh(mode, value.shape, value.dtype, value.stride()) for value in values]
    try:
        with mode, fake.quiet():
            graph: fx.Graph = make_fx(call, decomposition_table=dict(table))(*fakes).graph
    except Exception as error:
        raise Unsupported(f"{target}, which torch's decomposition does not take: {error}") from error
    graph.eliminate_dead_code()
    made = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    return graph if all(has_form(node.target) or node.target in known for node in made) else None


@functools.cache
def _table(known: frozenset[Any]) -> Mapping[Any, Callable[..., Any]]:
    """Decompositions of what has no form."""
    return {target: f for target, f in fake.decompositions().items() if target not in known and not has_form(target)}

"""Recurrent layers while a model is captured: matrix products and pointwise operators, as torch writes them out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def written_out(func: Any) -> Any:
    """What to call instead of a torch function: the function itself, unless it is a recurrent layer.

    An LSTM is written out only where oneDNN is off: its one operator keeps what its backward needs where autograd is
    on, which it is not while a graph runs. Other operators choose their backend when they run.
    """
    if func not in _RECURRENT:
        return func

    @functools.wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            # A packed sequence comes with two tensors, and its parameters one place later.
            packed = len(args) > 3 and not isinstance(args[3], bool)
            out, *ends = func(*args, **kwargs) if packed else _by_layer(func, *args, **kwargs)
            return out, *(end.squeeze(1) if end.dim() > 3 else end for end in ends)  # torch 2.11's has one dim more
        finally:
            torch._C._set_mkldnn_enabled(before)

    return run


def _by_layer(
    function: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """One layer after the other where there is dropout between them, which torch 2.13 forgets when it writes them out.

    ``hx``: [num_layers · directions, batch, width]; an LSTM has two.
    """
    rest = (train, bidirectional, batch_first)
    if not (train and dropout):
        return function(input, hx, params, has_biases, num_layers, 0.0, *rest)
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions, each = 1 + bidirectional, len(params) // num_layers
    ends: list[Sequence[Tensor]] = []
    for i in range(num_layers):
        own = [state[i * directions : (i + 1) * directions] for state in states]
        weights = params[i * each : (i + 1) * each]
        input, *end = function(
            torch.dropout(input, dropout, train) if i else input,
            own[0] if isinstance(hx, Tensor) else own,
            weights,
            has_biases,
            1,
            0.0,
            *rest,
        )
        ends.append(end)
    return input, *(torch.cat(end) for end in zip(*ends, strict=True))

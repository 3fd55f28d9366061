"""Recurrent layers while a model is captured: matrix products and pointwise operators, as torch writes them out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def written_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """What to call instead of one of ``RECURRENT``.

    An LSTM is written out only where oneDNN is off: its one operator keeps what its backward needs where autograd is
    on, which it is not while a graph runs. Other operators choose their backend when they run.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(before)

    return run

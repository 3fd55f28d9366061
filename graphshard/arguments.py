"""What ``compile`` and ``load`` are given, as what they work with; of the wrong kind it is refused before anything is
done."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphshard.errors import BadArgument
from graphshard.pipeline import Pass
from graphshard.plan import Plan


def model_of(given: Any) -> nn.Module:
    """The model.

    Raises:
        BadArgument: it is none; likewise below.
    """
    if not isinstance(given, nn.Module):
        raise BadArgument("model", given, "a torch.nn.Module")
    return given


def plan_of(given: Any) -> Plan:
    """The plan, parsed where it is a string.

    Raises:
        PlanSyntaxError, PlanNotSupported: the string is no plan.
    """
    if not isinstance(given, (str, Plan)):
        raise BadArgument("plan", given, "a plan string such as 'zero3+pp4', or a Plan")
    return given if isinstance(given, Plan) else Plan.parse(given)


def _function(name: str, given: Any, expected: str) -> Callable[..., Any] | None:
    """A function, or None."""
    if given is not None and not callable(given):
        raise BadArgument(name, given, f"{expected}, or None")
    return given  # type: ignore[no-any-return]


def loss_of(given: Any) -> Callable[..., Any] | None:
    """A loss function, or None."""
    return _function("loss_fn", given, "a function of the model's output and targets")


def init_of(given: Any) -> Callable[..., Any] | None:
    """What gives a model its first values, or None."""
    return _function("init", given, "a function of the model")


def optimizer_of(given: Any) -> Any:
    """An optimizer, or what makes one of parameters, or None."""
    if not (given is None or isinstance(given, Optimizer) or callable(given)):
        right = "a torch.optim.Optimizer over model.parameters(), or a function of them that makes one"
        raise BadArgument("optimizer", given, f"{right}, such as functools.partial(torch.optim.AdamW, lr=3e-4)")
    return given


def world_size_of(given: Any) -> int | None:
    """How many ranks, or None."""
    if given is None:
        return None
    try:
        size = 0 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        size = 0
    if size < 1:
        raise BadArgument("world_size", given, "an integer of at least 1, or None")
    return size


def executor_of(given: Any) -> str:
    """The name of an executor."""
    if not isinstance(given, str):
        raise BadArgument("executor", given, "'auto', 'distributed', 'local' or 'none'")
    return given


def device_of(given: Any) -> torch.device | None:
    """A device, or None."""
    if given is None:
        return None
    try:
        return torch.device(given)
    except (RuntimeError, TypeError, ValueError):
        raise BadArgument("device", given, "a torch.device, its name such as 'cuda:0', or None") from None


def seed_of(given: Any) -> int:
    """An integer that random keys have room for."""
    try:
        seed = operator.index(given)
    except TypeError:
        seed = 2**63
    if not -(2**63) <= seed < 2**63:
        raise BadArgument("seed", given, "an integer of at most 63 bits")
    return seed


def timeout_of(given: Any) -> float:
    """Seconds."""
    seconds = _number(given)
    if seconds is None or not 0 < seconds < math.inf:
        raise BadArgument("timeout_s", given, "a finite number of seconds above 0")
    return seconds


def norm_of(given: Any) -> float | None:
    """A gradient norm, or None."""
    if given is None:
        return None
    norm = _number(given)
    if norm is None:
        raise BadArgument("max_grad_norm", given, "a number, such as 1.0, or None")
    return norm


def passes_of(given: Any) -> Sequence[Pass]:
    """Passes."""
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise BadArgument("passes", given, "a list of passes")
    for index, item in enumerate(given):
        named = isinstance(getattr(item, "name", None), str)
        if isinstance(item, type) or not (named and callable(getattr(item, "run", None))):
            raise BadArgument(f"passes[{index}]", item, "a pass, which has a name and a method run(program, ctx)")
    return given


def cache_of(given: Any) -> bool | str | Path:
    """Where plans are kept."""
    if given is None:
        return False
    if not isinstance(given, (bool, str, Path)):
        raise BadArgument("cache", given, "True, False or a folder")
    return given


def folder_of(given: Any) -> Path | None:
    """A folder, or None."""
    if given is not None and not isinstance(given, (str, Path)):
        raise BadArgument("dump_dir", given, "a folder, or None")
    return None if given is None else Path(given)


def debug_nan_of(given: Any) -> bool:
    """Whether to look for what is not finite."""
    return _flag("debug_nan", given)


def measure_memory_of(given: Any) -> bool:
    """Whether to follow memory."""
    return _flag("measure_memory", given)


CHECKS: Mapping[str, Callable[[Any], object]] = {
    "model": model_of,
    "plan": plan_of,
    "loss_fn": loss_of,
    "optimizer": optimizer_of,
    "world_size": world_size_of,
    "device": device_of,
    "executor": executor_of,
    "max_grad_norm": norm_of,
    "timeout_s": timeout_of,
    "passes": passes_of,
    "dump_dir": folder_of,
    "debug_nan": debug_nan_of,
    "measure_memory": measure_memory_of,
    "init": init_of,
    "seed": seed_of,
    "cache": cache_of,
}
"""What raises BadArgument if an argument of compile is of the wrong kind. Whatever there is may be an example input."""


def _flag(name: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise BadArgument(name, given, "True or False")
    return given


def _number(given: Any) -> float | None:
    """Of numpy's and of tensors of one element, too; None: it is no number."""
    if not hasattr(type(given), "__float__"):
        return None
    try:
        return float(given)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return None

"""What a plan says of memory, each a token of its string: precision, recomputation, offloading, a byte budget."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphshard.errors import PlanFieldError

HALVES = ("bf16", "fp16")
POLICIES = ("full", "selective", "custom", "auto")
PLACES = ("cpu", "nvme")

_PATTERN = re.compile(r"[\w.*?\-]+")
_DIRECTORY = re.compile(r"[^,+]+")


@dataclass(frozen=True)
class Precision:
    """Forward and backward in ``dtype``, float32 where autocast keeps it. The scale options are those of GradScaler,
    and of fp16 alone."""

    dtype: str = "bf16"
    reduce: str = "fp32"  # what gradients are accumulated and reduced in: "fp32" or ``dtype``
    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        _one_of(self, "dtype", HALVES)
        _one_of(self, "reduce", ("fp32", self.dtype))
        if self.dtype != "fp16":
            for item in dataclasses.fields(self)[2:]:
                if getattr(self, item.name) != item.default:
                    raise PlanFieldError(
                        item.name, getattr(self, item.name), "its default, since only fp16 scales the loss"
                    )
        _number(self, "init_scale", above=0.0)
        _number(self, "growth_factor", above=1.0)
        _number(self, "backoff_factor", above=0.0, below=1.0)
        if not isinstance(self.growth_interval, int) or self.growth_interval < 1:
            raise PlanFieldError("growth_interval", self.growth_interval, "an integer of at least 1")


@dataclass(frozen=True)
class Recompute:
    """Which forward values are computed again in the backward instead of being kept; see passes/memory_policy.py."""

    policy: str = "full"
    modules: tuple[str, ...] = ()  # custom: patterns of module paths, "h.*.mlp"; (): all
    ops: tuple[str, ...] = ()  # custom: patterns of operator names, "gelu"; (): all
    budget_gb: float | None = None  # auto: 10^9 bytes that a rank may hold at its peak

    def __post_init__(self) -> None:
        _one_of(self, "policy", POLICIES)
        for name in ("modules", "ops"):
            given = getattr(self, name)
            if not all(_PATTERN.fullmatch(pattern) for pattern in given):
                raise PlanFieldError(name, given, "patterns of names, in which * stands for anything")
            if given and self.policy != "custom":
                raise PlanFieldError(name, given, "for policy=custom, to say what is recomputed")
        if self.policy == "custom" and not (self.modules or self.ops):
            raise PlanFieldError(
                "policy", self.policy, "custom together with modules or ops, which say what is recomputed"
            )
        if (self.policy == "auto") != (self.budget_gb is not None):
            raise PlanFieldError("budget_gb", self.budget_gb, "a number with policy=auto, and none without")
        if self.budget_gb is not None:
            _number(self, "budget_gb", above=0.0)


@dataclass(frozen=True)
class Offload:
    """What is kept outside of the device: "cpu" is host memory, "nvme" a file in the folder ``path``."""

    optimizer: str | None = None
    params: str | None = None
    activations: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        places = [getattr(self, name) for name in ("optimizer", "params", "activations")]
        for name in ("optimizer", "params", "activations"):
            if getattr(self, name) is not None:
                _one_of(self, name, PLACES)
        if not any(places):
            raise PlanFieldError("offload", None, "optimizer, params or activations, each =cpu or =nvme")
        if ("nvme" in places) != (self.path is not None):
            raise PlanFieldError("path", self.path, "a folder with nvme, and none without")
        _directory(self.path)


@dataclass(frozen=True)
class Memory:
    """Let the planner choose what is kept, recomputed, offloaded and gathered again, under a budget per rank."""

    budget_gb: float = 0.0  # 10^9 bytes that a rank may hold at its peak
    path: str | None = None  # a folder for what is offloaded to NVMe; None: nothing is
    host_gb: float | None = None  # 10^9 bytes that a rank on a GPU may keep in host memory; None: no limit

    def __post_init__(self) -> None:
        _number(self, "budget_gb", above=0.0)
        _directory(self.path)
        if self.host_gb is not None and not (isinstance(self.host_gb, (int, float)) and 0 <= self.host_gb < math.inf):
            raise PlanFieldError("host_gb", self.host_gb, "a finite number of at least 0")


TOKENS: Mapping[str, tuple[str, type[Any]]] = {
    "bf16": ("precision", Precision),
    "fp16": ("precision", Precision),
    "recompute": ("recompute", Recompute),
    "offload": ("offload", Offload),
    "memory": ("memory", Memory),
}
"""Token of the plan string to the field of Plan that it sets, and the class of its value."""


def option_names(token: str) -> tuple[str, ...]:
    """The options that ``token`` takes."""
    names = tuple(item.name for item in dataclasses.fields(TOKENS[token][1]) if item.name != "dtype")
    return names[:1] if token == "bf16" else names


def convert(token: str, key: str, text: str) -> Any:
    """The value that ``text`` spells for an option.

    Raises:
        ValueError: it spells none; the message says what is expected.
    """
    kind = typing.get_type_hints(TOKENS[token][1])[key]
    if isinstance(kind, types.UnionType):
        kind = next(choice for choice in typing.get_args(kind) if choice is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(text.split("/"))
    try:
        return kind(text)
    except ValueError:
        raise ValueError("a number" if kind is float else "an integer") from None


def spelling(value: Precision | Recompute | Offload | Memory) -> str:
    """The token, as the plan string has it."""
    token = next(token for token, (_, kind) in TOKENS.items() if type(value) is kind)
    token = value.dtype if isinstance(value, Precision) else token
    words = []
    for item in dataclasses.fields(value):
        given = getattr(value, item.name)
        if (
            item.name == "dtype"
            or (given == item.default and item.name not in ("policy", "budget_gb"))
            or given is None
        ):
            continue
        text = "/".join(given) if isinstance(given, tuple) else number(given) if isinstance(given, float) else given
        words.append(f"{item.name}={text}")
    return token + (":" + ",".join(words) if words else "")


def number(value: float) -> str:
    """``value`` as a plan string has it: "+" joins tokens, so an exponent is written without one."""
    return repr(float(value)).replace("e+", "e").removesuffix(".0")


def _one_of(value: Any, name: str, known: tuple[str, ...]) -> None:
    if getattr(value, name) not in known:
        raise PlanFieldError(name, getattr(value, name), " or ".join(map(repr, known)))


def _number(value: Any, name: str, above: float, below: float = math.inf) -> None:
    given = getattr(value, name)
    if not (isinstance(given, (int, float)) and above < given < below):
        limit = f"above {above:g}" + (f" and below {below:g}" if math.isfinite(below) else "")
        raise PlanFieldError(name, given, f"a finite number {limit}")


def _directory(path: str | None) -> None:
    if path is not None and not _DIRECTORY.fullmatch(path):
        raise PlanFieldError("path", path, "a folder whose name has neither a comma nor a plus sign")

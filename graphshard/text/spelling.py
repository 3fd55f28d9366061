"""How graph text spells types, values, slots and constants: the vocabulary that printer and parser share."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from graphshard.program import NodeInfo, Phase, Role, Slot
from graphshard.region import Region

VERSION = 1
INLINE_NUMEL = 16
"""Constants with more elements than this are stored beside the text."""

_SHORT = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "b8": torch.bool,
    "c64": torch.complex64,
    "c128": torch.complex128,
}


def _members(kind: type) -> dict[str, Any]:
    """What torch has of a kind, under its own name, not under those of aliases such as ``torch.float``."""
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)}


_LONG = {name: dtype for name, dtype in _members(torch.dtype).items() if dtype not in _SHORT.values()}
DTYPES: dict[str, torch.dtype] = _SHORT | _LONG
LAYOUTS: dict[str, torch.layout] = _members(torch.layout)
FORMATS: dict[str, torch.memory_format] = _members(torch.memory_format)
_NAMES: dict[Any, str] = {value: name for table in (DTYPES, LAYOUTS, FORMATS) for name, value in table.items()}

NUMBERED = (Role.BATCH, Role.LR, Role.OUTPUT)
"""Roles whose names are indices, written without quotes."""

WORD = r"[A-Za-z_]\w*(?:[.:\-]\w+)*"
_BARE = re.compile(WORD, re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class TypeText:
    """A tensor type as written: strides in elements, None where the text leaves them out (contiguous)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        """``f32[4,8]``, ``f32[4,8]{1,4}@cuda:0``."""
        text = f"{_NAMES[self.dtype]}[{','.join(map(str, self.shape))}]"
        if self.stride is not None and self.stride != contiguous(self.shape):
            text += f"{{{','.join(map(str, self.stride))}}}"
        return text if self.device == "cpu" else f"{text}@{self.device}"

    def admits(self, other: TypeText) -> bool:
        """Whether a value of type ``other`` is what this text says: the stride of a dim of size 1 says nothing."""
        if (self.dtype, self.shape, self.device) != (other.dtype, other.shape, other.device):
            return False
        strides = zip(self.shape, self.full_stride, other.full_stride, strict=True)
        return 0 in self.shape or all(size == 1 or mine == theirs for size, mine, theirs in strides)

    @property
    def full_stride(self) -> tuple[int, ...]:
        return contiguous(self.shape) if self.stride is None else self.stride


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements, as torch gives them to a new tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def type_of(value: Any) -> Any:
    """The type of a value as data: a TypeText, a tuple of types, or the name of a scalar type."""
    if isinstance(value, torch.Tensor):
        return TypeText(value.dtype, tuple(value.shape), tuple(value.stride()), str(value.device))
    if isinstance(value, (tuple, list)):
        return tuple(map(type_of, value))
    if value is None:
        return "none"
    scalar = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}
    return scalar.get(type(value), type(value).__name__)


def spell_type(kind: Any) -> str:
    """``(f32[2,4], none)`` for what :func:`type_of` gives."""
    if isinstance(kind, tuple):
        return f"({', '.join(map(spell_type, kind))})"
    return str(kind)


def spell(value: Any) -> str:
    """An argument of an operation: ``%x``, ``1e-05``, ``[2, None]``, ``f32``, ``cuda:0``."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, list):
        return f"[{', '.join(map(spell, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(spell, value))}{',' * (len(value) == 1)})"
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, complex):
        return f"complex({spell(value.real)}, {spell(value.imag)})"
    assert value in _NAMES, f"{value!r} of type {type(value).__name__} is no argument an operation of the IR can have"
    return _NAMES[value]


def spell_target(target: Any) -> str:
    """``aten.mm.default``, ``getitem``, ``region``; for what is no operator of the IR its Python name."""
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, Region):
        return "region"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def quote(text: str) -> str:
    """A string with JSON's escapes."""
    return json.dumps(str(text), ensure_ascii=False)


def bare(text: str, pattern: re.Pattern[str] = _BARE) -> str:
    """``text`` itself where it reads as one word, else quoted."""
    return text if pattern.fullmatch(text) else quote(text)


def spell_slot(slot: Slot) -> str:
    """``param "lin.weight"``, ``batch 0``, ``state "h.0.w" exp_avg @1``."""
    numbered = slot.role in NUMBERED and slot.name.isascii() and slot.name.isdigit()
    words = [str(slot.role), slot.name if numbered else quote(slot.name)]
    words += [bare(slot.key, _IDENTIFIER)] if slot.key else []
    words += [f"@{slot.stage}"] if slot.stage else []
    return " ".join(words)


def default_info(section: str, node: fx.Node, made_by: str) -> NodeInfo:
    """What the text need not say of a node: its phase by the section; a captured operation is its own origin."""
    phase = Phase.FORWARD if section == "body" else Phase.UPDATE
    captured = node.op == "call_function" and not made_by
    return NodeInfo(phase=phase, origin=node.name if captured else "", made_by=made_by)


def is_stored(value: torch.Tensor) -> bool:
    """Whether the value of a constant goes beside the text."""
    return has_data(value) and value.numel() > INLINE_NUMEL


def has_data(value: torch.Tensor) -> bool:
    """False for meta and fake tensors: such a constant is printed without its value."""
    return value.device.type != "meta" and type(value) in (torch.Tensor, torch.nn.Parameter)


def content_hash(value: torch.Tensor) -> str:
    """Hash of shape, dtype and elements, in row-major order; 32 hexadecimal digits."""
    state = hashlib.sha256(f"{_NAMES[value.dtype]}{list(value.shape)}".encode())
    state.update(to_stored(value).flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:32]


def to_stored(value: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU; a complex tensor as pairs of reals, since safetensors lacks complex128."""
    whole = value.detach().cpu().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    return torch.view_as_real(whole) if whole.is_complex() else whole


def from_stored(stored: torch.Tensor, kind: TypeText) -> torch.Tensor:
    """Inverse of :func:`to_stored`, with the strides that ``kind`` says. ValueError: it has another shape or dtype."""
    whole = torch.view_as_complex(stored) if kind.dtype.is_complex and not stored.is_complex() else stored
    if (whole.dtype, tuple(whole.shape)) != (kind.dtype, kind.shape):
        raise ValueError(f"it is {type_of(whole)}")
    return _with_strides(whole, kind.full_stride)


def from_values(values: Iterable[complex], kind: TypeText) -> torch.Tensor:
    """A tensor from its elements in row-major order. ValueError: their number or kind is not what ``kind`` says."""
    items = list(values)
    if len(items) != prod(kind.shape):
        raise ValueError(f"{prod(kind.shape)} values are needed, {len(items)} are given")
    try:  # torch.tensor cannot make 8-bit floats; their elements are exact in float64
        wide = torch.float64 if kind.dtype.is_floating_point else kind.dtype
        whole = torch.tensor(items, dtype=wide).to(kind.dtype).reshape(kind.shape)
    except (TypeError, RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"the values do not fit {_NAMES[kind.dtype]}: {first_line(error)}") from None
    return _with_strides(whole, kind.full_stride)


def values_of(value: torch.Tensor) -> list[Any]:
    """The elements in row-major order, as Python scalars."""
    flat = value.detach().cpu().flatten()
    elements: list[Any] = (flat.double() if flat.is_floating_point() else flat).tolist()
    return elements


def _with_strides(whole: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    if stride == whole.stride() or whole.numel() == 0:
        return whole
    index = torch.zeros((), dtype=torch.int64)
    for size, step in zip(whole.shape, stride, strict=True):
        index = index.unsqueeze(-1) + torch.arange(size) * step
    flat = whole.new_zeros(int(index.max()) + 1)
    flat[index.flatten()] = whole.flatten()  # overlapping elements, as of an expanded tensor, are equal
    return flat.as_strided(whole.shape, stride)


def first_line(error: BaseException) -> str:
    """What an exception says, without the traces that torch appends."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

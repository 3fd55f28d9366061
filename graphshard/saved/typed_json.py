"""Frozen dataclasses as JSON and back, by the types of their fields: what :func:`encode` gives, :func:`decode` takes.

Fields that equal their default are left out. A mapping whose keys are no strings is a list of pairs; a subclass of
``tuple`` is what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

T = TypeVar("T")
Convert = Callable[[Any], Any]


def encode(value: Any) -> Any:
    """The frozen dataclass ``value`` as what json can write."""
    kind: Any = type(value)
    return _codec(kind)[0](value)


def decode(kind: type[T], data: Any) -> T:
    """The value of dataclass ``kind`` that was encoded as ``data``."""
    hashable: Any = kind
    result: T = _codec(hashable)[1](data)
    return result


@cache
def _codec(kind: Any) -> tuple[Convert, Convert]:
    """How a value of the type ``kind`` is encoded and decoded."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (str, int, float, bool, NoneType):
        return _same, _same
    if kind is torch.dtype:
        return (lambda value: str(value).removeprefix("torch.")), (lambda data: getattr(torch, data))
    if is_dataclass(kind):
        return _record(kind)
    if origin in (Union, UnionType):
        (inner,) = (item for item in arguments if item is not NoneType)
        return tuple(map(_unless_none, _codec(inner)))  # type: ignore[return-value]
    if origin is dict:
        return _mapping(*arguments)
    if origin is frozenset:
        encode_item, decode_item = _codec(arguments[0])
        # In an order of its own, so that a plan is always the same text.
        return (lambda value: sorted(map(encode_item, value), key=str)), (
            lambda data: frozenset(map(decode_item, data))
        )
    if origin is tuple:
        return _sequence(arguments)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return (lambda value: value.value), kind
    if isinstance(kind, type) and issubclass(kind, tuple):
        encode_items, decode_items = _codec(kind.__orig_bases__[0])  # type: ignore[attr-defined]
        return encode_items, (lambda data: kind(*decode_items(data)))
    return _refused(kind), _refused(kind)


def _same(value: Any) -> Any:
    return value


def _refused(kind: Any) -> Convert:
    def convert(value: Any) -> Any:
        raise AssertionError(f"values of type {kind} have no spelling in JSON")

    return convert


def _unless_none(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _sequence(arguments: tuple[Any, ...]) -> tuple[Convert, Convert]:
    if arguments[1:] == (...,):
        encode_item, decode_item = _codec(arguments[0])
        if encode_item is _same:
            return list, tuple
        return (lambda value: [encode_item(item) for item in value]), (lambda data: tuple(map(decode_item, data)))
    items = [_codec(item) for item in arguments]
    return (
        lambda value: [e(item) for (e, _), item in zip(items, value, strict=True)],
        lambda data: tuple(d(item) for (_, d), item in zip(items, data, strict=True)),
    )


def _mapping(key: Any, value: Any) -> tuple[Convert, Convert]:
    (encode_key, decode_key), (encode_value, decode_value) = _codec(key), _codec(value)
    if key is str:
        return (
            lambda given: {k: encode_value(v) for k, v in given.items()},
            lambda data: {k: decode_value(v) for k, v in data.items()},
        )
    return (
        lambda given: [[encode_key(k), encode_value(v)] for k, v in given.items()],
        lambda data: {decode_key(k): decode_value(v) for k, v in data},
    )


def _record(kind: Any) -> tuple[Convert, Convert]:
    hints = get_type_hints(kind)
    members = [(item.name, item, *_codec(hints[item.name])) for item in fields(kind)]
    decoders = {name: decode_member for name, _, _, decode_member in members}

    def encode_record(value: Any) -> dict[str, Any]:
        given = ((name, item, encode_member, getattr(value, name)) for name, item, encode_member, _ in members)
        return {name: encode_member(v) for name, item, encode_member, v in given if not _is_default(item, v)}

    def decode_record(data: Any) -> Any:
        return kind(**{name: decoders[name](item) for name, item in data.items()})

    return encode_record, decode_record


def _is_default(item: Field[Any], value: Any) -> bool:
    if item.default is not MISSING:
        return bool(value == item.default)
    return item.default_factory is not MISSING and bool(value == item.default_factory())

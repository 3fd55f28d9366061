"""Types and argument values of graph text, read from a cursor. The inverse of text_spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphshard.text.spelling import DTYPES, FORMATS, LAYOUTS, TypeText
from graphshard.text.tokens import Cursor, Token

_LITERALS: dict[str, Any] = {"None": None, "True": True, "False": False} | DTYPES | LAYOUTS | FORMATS
_SCALAR_TYPES = ("none", "int", "float", "bool", "str")

Reference = Callable[[], fx.Node]
"""Reads ``%x`` and gives the node of that name."""


def value(cursor: Cursor, reference: Reference) -> Any:
    """An argument: a node, a scalar, a string, a list, or a word for a dtype, layout, memory format or device."""
    token = cursor.next
    if token.kind == "node":
        return reference()
    if token.kind == "number":
        text = cursor.take().text
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    if token.kind == "string":
        return cursor.string("a string")
    if cursor.is_mark("["):
        return cursor.items(lambda: value(cursor, reference), "[", "]", "the list")[0]
    if cursor.is_mark("("):
        items, comma = cursor.items(lambda: value(cursor, reference), "(", ")", "the tuple")
        return tuple(items) if comma or len(items) != 1 else items[0]
    if token.kind != "word":
        cursor.fail(token, f"expected a value, not {token.described}")
    cursor.take()
    if token.text in _LITERALS:
        return _LITERALS[token.text]
    if token.text == "complex" and cursor.is_mark("("):
        return complex(*_parts(cursor, token))
    return _device(cursor, token)


def constant_values(cursor: Cursor) -> list[Any]:
    """The elements of a constant: a scalar, or a flat list of them."""
    given = value(cursor, lambda: cursor.fail(cursor.next, "a constant is made of numbers"))
    return given if isinstance(given, list) else [given]


def tensor_type(cursor: Cursor, strides: bool = True) -> TypeText:
    """``f32[4,8]{1,4}@cuda:0``; ``strides=False`` where braces mean something else."""
    dtype = DTYPES[cursor.one_of(DTYPES, "dtype")]
    shape = cursor.list_of(lambda: cursor.integer("a size"), "the shape")
    stride, token = None, cursor.next
    if strides and cursor.is_mark("{"):
        stride = tuple(cursor.items(lambda: cursor.integer("a stride"), "{", "}", "the strides")[0])
        if len(stride) != len(shape):
            cursor.fail(token, f"a stride for each dim is needed, {len(shape)}; {len(stride)} are given")
    device = "cpu"
    if cursor.accept("@"):
        device = str(_device(cursor, cursor.kind("word", "a device, such as cuda:0")))
    return TypeText(dtype, shape, stride, device)


def annotation(cursor: Cursor) -> Any:
    """A type as text_spelling's ``type_of`` gives it: of a tensor, of a scalar, or a tuple of types."""
    if cursor.is_mark("("):
        return tuple(cursor.items(lambda: annotation(cursor), "(", ")", "the tuple type")[0])
    if cursor.next.text in _SCALAR_TYPES:
        return cursor.take().text
    return tensor_type(cursor)


def label(cursor: Cursor) -> str:
    """A word, a number or a quoted string, as a string."""
    if cursor.next.kind in ("word", "number"):
        return cursor.take().text
    return cursor.string("a name, quoted unless it is one word")


def _parts(cursor: Cursor, token: Token) -> tuple[float, float]:
    parts = cursor.items(lambda: cursor.kind("number", "a number").text, "(", ")", "the complex number")[0]
    if len(parts) != 2:
        cursor.fail(token, "expected complex(real, imaginary)")
    return float(parts[0]), float(parts[1])


def _device(cursor: Cursor, token: Token) -> torch.device:
    try:
        return torch.device(token.text)
    except RuntimeError:
        cursor.unknown(token, "value", token.text, [*_LITERALS, "cpu", "cuda", "meta"])

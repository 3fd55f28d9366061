"""Graph text to a Program. Every type is derived again; what the text says about it must agree."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import graphshard.ops  # noqa: F401  defines the graphshard:: operators
from graphshard import fake
from graphshard.mesh import AXES, Mesh
from graphshard.program import (
    Bucket,
    Level,
    MemoryTag,
    NodeInfo,
    Param,
    PassRecord,
    Phase,
    Program,
    Role,
    Section,
    Slot,
)
from graphshard.text_spelling import (
    DTYPES,
    FORMATS,
    LAYOUTS,
    NUMBERED,
    VERSION,
    TypeText,
    content_hash,
    default_info,
    first_line,
    from_stored,
    from_values,
    spell_type,
    type_of,
)
from graphshard.text_tokens import Cursor, Token

_LITERALS: dict[str, Any] = {"None": None, "True": True, "False": False} | DTYPES | LAYOUTS | FORMATS
_SCALAR_TYPES = ("none", "int", "float", "bool")
_GRAPHS = ("prologue", "body", "epilogue", "first_epilogue")
_ROLES = tuple(map(str, Role))
_DEVICE = re.compile(r"[a-z]+(:\d+)?")


def parse_program(text: str, constants: Mapping[str, torch.Tensor], path: str, beside: str) -> Program:
    """The program in ``text``. ``path`` and ``beside``, where ``constants`` come from, are for messages.

    Raises:
        TextError: with line and column.
    """
    return _Parser(Cursor(text, path), constants, beside).program()


class _Parser:
    def __init__(self, cursor: Cursor, constants: Mapping[str, torch.Tensor], beside: str) -> None:
        self.cursor, self.stored, self.beside = cursor, constants, beside
        self.mode = fake.new_mode()
        self.result = Program(body=Section())
        self.operators: dict[str, Any] = {}

    def program(self) -> Program:
        cursor = self.cursor
        cursor.skip_lines()
        first = cursor.next
        if first.text != "graphshard":
            cursor.fail(first, f"graph text begins with 'graphshard {VERSION}', not {first.described}")
        cursor.take()
        if (version := cursor.integer("the version of the format")) != VERSION:
            cursor.fail(first, f"this is version {version} of the format; expected version {VERSION}")
        cursor.end_line("the version")
        statements: dict[str, Callable[[], None]] = {
            "mesh": self.mesh,
            "level": self.level,
            "microbatches": self.microbatches,
            "param": self.param,
            "bucket": self.bucket,
            "constant": self.constant,
            "history": self.history,
            "graph": self.graph,
        }
        self.graphs: dict[str, Section] = {}
        while cursor.next.kind != "end":
            statement = cursor.one_of(statements, "statement")
            statements[statement]()
            cursor.end_line(f"the {statement}")
        if "body" not in self.graphs:
            cursor.fail(cursor.next, "a program needs a 'graph body { ... }'; the text has none")
        return replace(self.result, **self.graphs)

    # -- header

    def mesh(self) -> None:
        axes: dict[str, int] = {}
        while self.cursor.next.kind == "word":
            token = self.cursor.next
            axis = self.cursor.one_of(AXES, "mesh axis")
            if axis in axes or (axes and AXES.index(axis) < max(map(AXES.index, axes))):
                self.cursor.fail(token, f"mesh axes are given once each, in the order {', '.join(AXES)}")
            self.cursor.expect("=", "after the axis")
            axes[axis] = self.cursor.integer("the size of the axis", 1)
        self.result.mesh = Mesh(tuple(axes.items()))

    def level(self) -> None:
        self.result.level = Level(self.cursor.one_of(Level, "level"))

    def microbatches(self) -> None:
        self.result.microbatches = self.cursor.integer("the number of micro-batches", 1)

    def param(self) -> None:
        name, kind = self.declared(self.result.params, "parameter")
        values = self.attributes(
            {
                "group": lambda: self.cursor.integer("an optimizer parameter group"),
                "aliases": lambda: self.list_of(lambda: self.cursor.string("a quoted name"), "aliases"),
                "has_grad": lambda: self.cursor.one_of(("True", "False"), "bool") == "True",
                "stages": lambda: self.list_of(lambda: self.cursor.integer("a stage"), "stages"),
            },
            "parameter attribute",
        )
        self.result.params[name] = Param(name, kind.shape, kind.dtype, **values)

    def bucket(self) -> None:
        cursor = self.cursor
        name, kind = self.declared(self.result.buckets, "bucket")
        values = self.attributes(
            {
                "axis": lambda: cursor.one_of(AXES, "mesh axis"),
                "parts": lambda: cursor.integer("the number of shards", 1),
                "stage": lambda: cursor.integer("a stage"),
                "store": lambda: Role(cursor.one_of((Role.FLAT, Role.SHARD), "kind of storage")),
            },
            "bucket attribute",
        )

        def member() -> tuple[str, int]:
            token, parameter = cursor.next, cursor.string("a parameter's quoted name")
            if parameter not in self.result.params:
                cursor.unknown(token, "parameter", parameter, self.result.params)
            cursor.expect("@", "and the offset in elements")
            return parameter, cursor.integer("an offset in elements")

        members = tuple(cursor.items(member, "{", "}", "the bucket's members")[0])
        self.result.buckets[name] = Bucket(name, kind.dtype, kind.shape[0], members, **values)

    def declared(self, known: Mapping[str, object], what: str) -> tuple[str, TypeText]:
        """``"name" : type`` of something that is not known yet."""
        cursor = self.cursor
        token, name = cursor.next, cursor.string(f"the {what}'s quoted name")
        if name in known:
            cursor.fail(token, f"{what} {name!r} is declared twice")
        cursor.expect(":", f"and a type after the {what}'s name")
        token, kind = cursor.next, self.tensor_type(strides=what == "constant")
        if what == "bucket" and len(kind.shape) != 1:
            cursor.fail(token, f"a bucket is flat: expected a type such as f32[4096], not {kind}")
        return name, kind

    def constant(self) -> None:
        cursor = self.cursor
        name, kind = self.declared(self.result.constants, "constant")
        if not cursor.accept("="):
            self.result.constants[name] = torch.empty_strided(kind.shape, kind.full_stride, dtype=kind.dtype, device="meta")
            return
        token = cursor.next
        try:
            if token.text == "sha256":
                cursor.take()
                token = cursor.next
                value = from_stored(self.stored_value(cursor.string("the quoted hash of the value")), kind)
            else:
                given = self.value({})
                value = from_values(given if isinstance(given, list) else [given], kind)
        except ValueError as error:
            cursor.fail(token, f"constant {name!r} is {kind}, but {error}")
        self.result.constants[name] = value

    def stored_value(self, digest: str) -> torch.Tensor:
        if digest not in self.stored:
            raise ValueError(f"its value is not in {self.beside}, which should hold {digest}")
        value = self.stored[digest]
        return value

    def history(self) -> None:
        name = self.cursor.string("the quoted name of a pass")
        values = self.attributes(
            {
                "options": lambda: self.cursor.string("the quoted options"),
                "nodes": lambda: self.cursor.integer("a number of nodes"),
            },
            "history attribute",
        )
        record = PassRecord(name, values.get("options", ""), 0.0, values.get("nodes", 0))
        self.result.history += (record,)

    def attributes(self, parsers: Mapping[str, Callable[[], Any]], what: str) -> dict[str, Any]:
        """``name=value`` as long as there are words."""
        values: dict[str, Any] = {}
        while self.cursor.next.kind == "word":
            self.attribute(parsers, what, values)
        return values

    def attribute(self, parsers: Mapping[str, Callable[[], Any]], what: str, values: dict[str, Any]) -> None:
        token, name = self.cursor.next, self.cursor.one_of(parsers, what)
        if name in values:
            self.cursor.fail(token, f"{name} is given twice")
        self.cursor.expect("=", f"after {name}")
        values[name] = parsers[name]()

    def list_of(self, parse: Callable[[], Any], what: str) -> tuple[Any, ...]:
        return tuple(self.cursor.items(parse, "[", "]", what)[0])

    # -- graphs

    def graph(self) -> None:
        cursor = self.cursor
        token, name = cursor.next, cursor.one_of(_GRAPHS, "graph")
        if name in self.graphs:
            cursor.fail(token, f"graph {name} is given twice")
        cursor.expect("{", f"after graph {name}")
        cursor.skip_lines()
        section, nodes = Section(), dict[str, fx.Node]()
        while cursor.next.kind == "node":
            self.statement(name, section, nodes)
            cursor.end_line("the statement")
        if cursor.next.text != "return":
            cursor.fail(cursor.next, f"expected '%name = ...' or 'return' in graph {name}, not {cursor.next.described}")
        self.outputs(section, nodes)
        cursor.end_line("what the graph returns")
        cursor.expect("}", f"after the return of graph {name}")
        self.graphs[name] = section

    def statement(self, graph: str, section: Section, nodes: dict[str, fx.Node]) -> None:
        cursor = self.cursor
        token = cursor.take()
        name = token.text[1:]
        if name in nodes:
            cursor.fail(token, f"{token.text} is defined twice in graph {graph}")
        if keyword.iskeyword(name):
            cursor.fail(token, f"{token.text} is a word of Python, which generated code could not use; such as {token.text}_1 works")
        kind_token, kind = cursor.next, None
        if cursor.accept(":"):
            kind_token, kind = cursor.next, self.annotation()
        cursor.expect("=", f"after {'the type' if kind is not None else 'the name'}")
        head = cursor.kind("word", 'an operation such as aten.mm.default(...) or an input such as param "w"')
        if cursor.is_mark("("):
            node = self.operation(head, name, section, nodes)
            value = self.checked(node.meta["val"], kind, kind_token, head)
        else:
            if not isinstance(kind, TypeText):
                cursor.fail(kind_token, f"an input needs its tensor type: {token.text} : f32[4,8] = {head.text} ...")
            node = self.placeholder(head, kind, kind_token, name, section)
            value = fake.tensor(self.mode, kind.shape, kind.dtype, kind.stride, kind.device)
        node.name = name  # fx renames what shadows a builtin; such names are never made by fx, so none can clash
        node.meta["val"] = value
        node.meta["info"] = self.info(graph, name)
        nodes[name] = node

    def placeholder(self, head: Token, kind: TypeText, at: Token, name: str, section: Section) -> fx.Node:
        if head.text not in _ROLES:
            self.cursor.unknown(head, "input (or operation without '(')", head.text, _ROLES)
        slot = self.slot(Role(head.text))
        if slot in section.inputs.values():
            self.cursor.fail(head, f"{slot} is read twice; one input a graph is allowed")
        if any(True for _ in section.nodes()):
            self.cursor.fail(head, "inputs come before all operations of a graph")
        self.check_declared(slot, kind, at)
        node = section.graph.create_node("placeholder", name, (), {}, name)
        section.inputs[node] = slot
        return node

    def check_declared(self, slot: Slot, kind: TypeText, at: Token) -> None:
        """An input's type against what the header says of its parameter, bucket or constant."""
        declared: tuple[torch.dtype, tuple[int, ...]] | None = None
        if slot.role is Role.PARAM and slot.name in self.result.params:
            param = self.result.params[slot.name]
            declared = (param.dtype, param.shape)
        elif slot.role in (Role.FLAT, Role.SHARD) and slot.name in self.result.buckets:
            bucket = self.result.buckets[slot.name]
            declared = (bucket.dtype, (bucket.shard_numel if slot.role is Role.SHARD else bucket.numel,))
        elif slot.role is Role.CONSTANT and slot.name in self.result.constants:
            constant = self.result.constants[slot.name]
            declared = (constant.dtype, tuple(constant.shape))
        if declared is not None and declared != (kind.dtype, kind.shape):
            self.cursor.fail(at, f"{slot} is {TypeText(*declared)} in the header, not {replace(kind, stride=None)}")

    def slot(self, role: Role) -> Slot:
        cursor = self.cursor
        if role in NUMBERED and cursor.next.kind == "number":
            name = str(cursor.integer(f"the index of the {role}"))
        else:
            name = cursor.string(f"the {role}'s {'index' if role in NUMBERED else 'quoted name'}")
        key = ""
        if cursor.next.kind == "word":
            key = cursor.take().text
        elif cursor.next.kind == "string":
            key = cursor.string("a key")
        stage = cursor.integer("a stage") if cursor.accept("@") else 0
        return Slot(role, name, key, stage)

    def outputs(self, section: Section, nodes: dict[str, fx.Node]) -> None:
        cursor = self.cursor
        cursor.take()
        values: list[fx.Node] = []
        while cursor.next.kind == "word":
            token = cursor.next
            slot = self.slot(Role(cursor.one_of(_ROLES, "kind of output")))
            if slot in section.output_slots:
                cursor.fail(token, f"{slot} is returned twice")
            section.output_slots.append(slot)
            values.append(self.reference(nodes))
            if not cursor.accept(","):
                break
            cursor.skip_lines()
        section.graph.output(tuple(values))

    def operation(self, head: Token, name: str, section: Section, nodes: dict[str, fx.Node]) -> fx.Node:
        target = self.operator(head)
        keywords: dict[str, Any] = {}

        def argument() -> Any:
            token = self.cursor.next
            if token.kind == "word" and self.cursor.after_next.text == "=" and self.cursor.after_next.kind == "mark":
                self.cursor.at += 2
                if token.text in keywords:
                    self.cursor.fail(token, f"argument {token.text} is given twice")
                keywords[token.text] = self.value(nodes)
                return keywords
            if keywords:
                self.cursor.fail(token, "a positional argument comes before those with names")
            return self.value(nodes)

        arguments = self.cursor.items(argument, "(", ")", f"the arguments of {head.text}")[0]
        args = tuple(a for a in arguments if a is not keywords)
        try:
            value = fake.infer(self.mode, target, args, keywords)
        except Exception as error:  # whatever the operator raises for arguments that do not fit
            self.cursor.fail(head, f"{head.text} does not take these arguments: {first_line(error)}")
        node = section.graph.create_node("call_function", target, args, keywords, name)
        node.meta["val"] = value
        return node

    def operator(self, token: Token) -> Any:
        name = token.text
        if name == "getitem":
            return operator.getitem
        if name not in self.operators:
            space, _, rest = name.partition(".")
            packet_name, _, overload = rest.rpartition(".")
            packet = getattr(getattr(torch.ops, space), packet_name or rest, None) if rest else None
            if not packet_name and packet is not None:
                overloads = ", ".join(f"{name}.{o}" for o in packet.overloads()[:4])
                self.cursor.fail(token, f"{name} needs its overload: {overloads}")
            found = getattr(packet, overload, None)
            if not isinstance(found, torch._ops.OpOverload):
                self.cursor.unknown(token, "operator", name, [*fake.operator_names(), "getitem"])
            self.operators[name] = found
        return self.operators[name]

    def value(self, nodes: dict[str, fx.Node]) -> Any:
        """An argument: a node, a scalar, a string, a list, or a word for a dtype, layout, memory format or device."""
        cursor, token = self.cursor, self.cursor.next
        if token.kind == "node":
            return self.reference(nodes)
        if token.kind == "number":
            text = cursor.take().text
            return int(text) if text.lstrip("+-").isdigit() else float(text)
        if token.kind == "string":
            return cursor.string("a string")
        if cursor.is_mark("["):
            return cursor.items(lambda: self.value(nodes), "[", "]", "the list")[0]
        if cursor.is_mark("("):
            items, comma = cursor.items(lambda: self.value(nodes), "(", ")", "the tuple")
            return tuple(items) if comma or len(items) != 1 else items[0]
        if token.kind != "word":
            cursor.fail(token, f"expected a value, not {token.described}")
        cursor.take()
        if token.text in _LITERALS:
            return _LITERALS[token.text]
        if token.text == "complex" and cursor.is_mark("("):
            parts = cursor.items(lambda: self.value(nodes), "(", ")", "the complex number")[0]
            if len(parts) != 2 or not all(isinstance(part, (int, float)) for part in parts):
                cursor.fail(token, "expected complex(real, imaginary)")
            return complex(*parts)
        return self.device(token)

    def device(self, token: Token) -> torch.device:
        try:
            if _DEVICE.fullmatch(token.text):
                return torch.device(token.text)
        except RuntimeError:
            pass  # no such device type: reported with the other words below
        self.cursor.unknown(token, "value", token.text, [*_LITERALS, "cpu", "cuda", "meta"])

    def reference(self, nodes: dict[str, fx.Node]) -> fx.Node:
        token = self.cursor.kind("node", "a node, such as %x")
        if token.text[1:] not in nodes:
            self.cursor.unknown(token, "node", token.text, [f"%{name}" for name in nodes])
        return nodes[token.text[1:]]

    # -- types and attributes

    def annotation(self) -> Any:
        """A type as :func:`type_of` gives it: of a tensor, of a scalar, or a tuple of types."""
        cursor = self.cursor
        if cursor.is_mark("("):
            return tuple(cursor.items(self.annotation, "(", ")", "the tuple type")[0])
        if cursor.next.text in _SCALAR_TYPES:
            return cursor.take().text
        return self.tensor_type()

    def tensor_type(self, strides: bool = True) -> TypeText:
        cursor = self.cursor
        dtype = DTYPES[cursor.one_of(DTYPES, "dtype")]
        shape = self.list_of(lambda: cursor.integer("a size"), "the shape")
        stride, token = None, cursor.next
        if strides and cursor.is_mark("{"):
            stride = tuple(cursor.items(lambda: cursor.integer("a stride"), "{", "}", "the strides")[0])
            if len(stride) != len(shape):
                cursor.fail(token, f"{len(shape)} strides are needed, one a dim; {len(stride)} are given")
        device = "cpu"
        if cursor.accept("@"):
            device = str(self.device(cursor.kind("word", "a device, such as cuda:0")))
        return TypeText(dtype, shape, stride, device)

    def checked(self, value: Any, kind: Any, at: Token, head: Token) -> Any:
        """The value derived, if the text admits it. A tensor gets the text's strides, which differ at most where a size is 1."""
        if kind is None:
            return value
        derived = type_of(value)
        if not _admits(kind, derived):
            self.cursor.fail(at, f"the text says {spell_type(kind)}, but {head.text} of these arguments gives {spell_type(derived)}")
        if isinstance(kind, TypeText) and kind.full_stride != derived.full_stride:
            return fake.tensor(self.mode, kind.shape, kind.dtype, kind.full_stride, kind.device)
        return value

    def info(self, graph: str, name: str) -> NodeInfo:
        if not self.cursor.is_mark("{"):
            return default_info(graph, name, "")
        cursor, values = self.cursor, dict[str, Any]()
        parsers: dict[str, Callable[[], Any]] = {
            "phase": lambda: Phase(cursor.one_of(Phase, "phase")),
            "module": self.label,
            "origin": self.label,
            "forward": self.label,
            "stage": lambda: cursor.integer("a stage"),
            "tag": lambda: MemoryTag(cursor.one_of(MemoryTag, "memory tag")),
            "layout": self.label,
            "made_by": self.label,
        }
        cursor.items(lambda: self.attribute(parsers, "attribute", values), "{", "}", "the attributes")
        return replace(default_info(graph, name, values.get("made_by", "")), **values)

    def label(self) -> str:
        """A word, a number or a quoted string, as a string."""
        if self.cursor.next.kind in ("word", "number"):
            return self.cursor.take().text
        return self.cursor.string("a name, quoted unless it is one word")


def _admits(kind: Any, derived: Any) -> bool:
    if isinstance(kind, tuple) and isinstance(derived, tuple):
        return len(kind) == len(derived) and all(map(_admits, kind, derived))
    if isinstance(kind, TypeText) and isinstance(derived, TypeText):
        return kind.admits(derived)
    return bool(kind == derived)

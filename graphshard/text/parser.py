"""Graph text to a Program: the header here, each graph by text_graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from graphshard import fake
from graphshard.mesh import AXES, Mesh
from graphshard.program import Bucket, Level, Param, PassRecord, Program, Role, Section
from graphshard.text.graph import GraphParser
from graphshard.text.spelling import VERSION, TypeText, content_hash, from_stored, from_values
from graphshard.text.tokens import Cursor
from graphshard.text.values import constant_values, tensor_type

_GRAPHS = ("prologue", "body", "epilogue", "first_epilogue")


def parse_program(text: str, constants: Mapping[str, torch.Tensor], path: str, beside: str) -> Program:
    """The program in ``text``. ``path`` and ``beside``, where ``constants`` come from, are for messages.

    Raises:
        TextError: with line and column.
    """
    with fake.quiet():
        return _Parser(Cursor(text, path), constants, beside).program()


class _Parser:
    def __init__(self, cursor: Cursor, constants: Mapping[str, torch.Tensor], beside: str) -> None:
        self.cursor, self.stored, self.beside = cursor, constants, beside
        self.result = Program(body=Section())
        self.graphs: dict[str, Section] = {}
        self.mode = fake.new_mode()

    def program(self) -> Program:
        cursor = self.cursor
        self._version()
        statements: dict[str, Callable[[], None]] = {
            "mesh": self._mesh,
            "level": self._level,
            "microbatches": self._microbatches,
            "param": self._param,
            "bucket": self._bucket,
            "constant": self._constant,
            "history": self._history,
            "graph": self._graph,
        }
        while cursor.next.kind != "end":
            token = cursor.next
            statement = cursor.one_of(statements, "statement")
            if self.graphs and statement != "graph":
                cursor.fail(token, f"{statement} belongs before the graphs")
            statements[statement]()
            cursor.end_line(f"the {statement}")
        if "body" not in self.graphs:
            cursor.fail(cursor.next, "a program needs a graph body { ... }; the text has none")
        for name, section in self.graphs.items():
            setattr(self.result, name, section)
        return self.result

    def _version(self) -> None:
        cursor = self.cursor
        cursor.skip_lines()
        if cursor.next.text != "graphshard":
            cursor.fail(cursor.next, f"graph text begins with 'graphshard {VERSION}', not with {cursor.next.described}")
        cursor.take()
        token = cursor.next
        if (version := cursor.integer("the version of the format", 1)) != VERSION:
            cursor.fail(token, f"the text is of version {version}; expected version {VERSION}")
        cursor.end_line("the version")

    def _mesh(self) -> None:
        cursor, axes = self.cursor, dict[str, int]()
        while cursor.next.kind == "word":
            token, axis = cursor.next, cursor.one_of(AXES, "mesh axis")
            if any(AXES.index(axis) <= AXES.index(before) for before in axes):
                cursor.fail(token, f"mesh axes are given once each, in the order {', '.join(AXES)}")
            cursor.expect("=", "after the axis")
            axes[axis] = cursor.integer("the size of the axis", 1)
        self.result.mesh = Mesh(tuple(axes.items()))

    def _level(self) -> None:
        self.result.level = Level(self.cursor.one_of(Level, "level"))

    def _microbatches(self) -> None:
        self.result.microbatches = self.cursor.integer("the number of micro-batches", 1)

    def _param(self) -> None:
        cursor = self.cursor
        name, kind = self._declared(self.result.params, "parameter")
        values = cursor.attributes(
            {
                "group": lambda: cursor.integer("an optimizer parameter group"),
                "aliases": lambda: cursor.list_of(lambda: cursor.string("a quoted name"), "aliases"),
                "has_grad": lambda: cursor.one_of(("True", "False"), "bool") == "True",
                "stages": lambda: cursor.list_of(lambda: cursor.integer("a stage"), "stages"),
            },
            "parameter attribute",
        )
        self.result.params[name] = Param(name, kind.shape, kind.dtype, **values)

    def _bucket(self) -> None:
        cursor, params = self.cursor, self.result.params
        name, kind = self._declared(self.result.buckets, "bucket")
        values = cursor.attributes(
            {
                "axis": lambda: cursor.one_of(AXES, "mesh axis"),
                "parts": lambda: cursor.integer("the number of shards", 1),
                "stage": lambda: cursor.integer("a stage"),
                "store": lambda: Role(cursor.one_of((Role.FLAT, Role.SHARD), "kind of storage")),
            },
            "bucket attribute",
        )

        def member() -> tuple[str, int]:
            token, parameter = cursor.next, cursor.string("the quoted name of a parameter")
            if parameter not in params:
                cursor.unknown(token, "parameter", parameter, params)
            cursor.expect("@", "and an offset after the parameter")
            offset = cursor.integer("an offset in elements")
            if (end := offset + params[parameter].numel) > kind.shape[0]:
                cursor.fail(token, f"{parameter!r} ends at element {end}, beyond the bucket's {kind}")
            return parameter, offset

        members = tuple(cursor.items(member, "{", "}", "the bucket's members")[0])
        self.result.buckets[name] = Bucket(name, kind.dtype, kind.shape[0], members, **values)

    def _constant(self) -> None:
        cursor = self.cursor
        name, kind = self._declared(self.result.constants, "constant")
        stride, token = kind.full_stride, cursor.next
        try:
            if not cursor.accept("="):
                value = torch.empty_strided(kind.shape, stride, dtype=kind.dtype, device="meta")
            elif cursor.next.text == "sha256":
                cursor.take()
                token = cursor.next
                value = self._stored(cursor.string("the quoted hash of the value"), kind)
            else:
                token = cursor.next
                value = from_values(constant_values(cursor), kind)
        except ValueError as error:
            cursor.fail(token, f"constant {name!r} is {kind}, but {error}")
        self.result.constants[name] = value

    def _stored(self, digest: str, kind: TypeText) -> torch.Tensor:
        if digest not in self.stored:
            raise ValueError(f"{self.beside}, where its value should be, has none of this hash")
        value = from_stored(self.stored[digest], kind)
        if content_hash(value) != digest:
            raise ValueError(f"its value in {self.beside} is not the one of this hash")
        return value

    def _history(self) -> None:
        cursor, name = self.cursor, self.cursor.string("the quoted name of a pass")
        values = cursor.attributes(
            {
                "options": lambda: cursor.string("the quoted options"),
                "nodes": lambda: cursor.integer("a number of nodes"),
            },
            "history attribute",
        )
        self.result.history += (PassRecord(name, values.get("options", ""), 0.0, values.get("nodes", 0)),)

    def _declared(self, known: Mapping[str, object], what: str) -> tuple[str, TypeText]:
        """``"name" : type`` of something not known yet."""
        cursor = self.cursor
        token, name = cursor.next, cursor.string(f"the quoted name of the {what}")
        if name in known:
            cursor.fail(token, f"{what} {name!r} is declared twice")
        cursor.expect(":", f"and a type after the name of the {what}")
        token, kind = cursor.next, tensor_type(cursor, strides=what == "constant")
        if what == "bucket" and len(kind.shape) != 1:
            cursor.fail(token, f"a bucket is flat: expected a type such as f32[4096], not {kind}")
        return name, kind

    def _graph(self) -> None:
        cursor = self.cursor
        token, name = cursor.next, cursor.one_of(_GRAPHS, "graph")
        if name in self.graphs:
            cursor.fail(token, f"graph {name} is given twice")
        self.graphs[name] = GraphParser(cursor, self.result, self.mode, name).parse()

"""One ``graph name { ... }`` of graph text to a Section. Every type is derived again; what the text says must agree."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import graphshard.ops  # noqa: F401  defines the graphshard:: operators
from graphshard import fake
from graphshard.program import MemoryTag, NodeInfo, Phase, Program, Role, Section, Slot
from graphshard.region import Region
from graphshard.text import values as text_values
from graphshard.text.spelling import NUMBERED, TypeText, default_info, first_line, spell_slot, spell_type, type_of
from graphshard.text.tokens import Cursor, Token

_ROLES = tuple(map(str, Role))


class GraphParser:
    """Reads one graph. ``header`` says what parameters, buckets and constants there are."""

    def __init__(self, cursor: Cursor, header: Program, mode: fake.FakeTensorMode, name: str) -> None:
        self.cursor, self.header, self.mode, self.name = cursor, header, mode, name
        self.section = Section()
        self.nodes: dict[str, fx.Node] = {}
        self.operations_begun = False

    def parse(self) -> Section:
        """The section between ``{`` and ``}``."""
        cursor = self.cursor
        cursor.expect("{", f"after graph {self.name}")
        cursor.skip_lines()
        while cursor.next.kind == "node":
            self._statement()
            cursor.end_line("the statement")
        if cursor.next.text != "return":
            found = cursor.next
            cursor.fail(found, f"expected '%name = ...' or 'return' in graph {self.name}, not {found.described}")
        self._outputs()
        cursor.end_line("what the graph returns")
        cursor.expect("}", f"after the return of graph {self.name}")
        return self.section

    def _statement(self) -> None:
        cursor = self.cursor
        token = cursor.take()
        name, kind, kind_token = token.text[1:], None, token
        if name in self.nodes:
            cursor.fail(token, f"{token.text} is defined twice in graph {self.name}")
        if keyword.iskeyword(name):
            problem = "is a keyword of Python, which generated code cannot use as a name"
            cursor.fail(token, f"{token.text} {problem}; expected a name such as {token.text}_1")
        if cursor.accept(":"):
            kind_token, kind = cursor.next, text_values.annotation(cursor)
        cursor.expect("=", "after the name" if kind is None else "after the type")
        head = cursor.kind("word", 'an operation such as aten.mm.default(...) or an input such as param "w"')
        if cursor.is_mark("("):
            node = self._region(head, name) if head.text == "region" else self._operation(head, name)
            node.meta["val"] = self._checked(node.meta["val"], kind, kind_token, head)
        else:
            node = self._placeholder(head, name, kind, kind_token)
        # fx renames what would shadow a builtin. It never makes such a name itself, so none can clash with this one.
        node.name = name
        node.meta["info"] = self._info(node)
        self.nodes[name] = node

    def _placeholder(self, head: Token, name: str, kind: Any, at: Token) -> fx.Node:
        cursor = self.cursor
        if head.text not in _ROLES:
            if cursor.next.kind in ("newline", "mark"):
                cursor.fail(cursor.next, f"expected '(' and arguments after {head.text}, not {cursor.next.described}")
            cursor.unknown(head, "kind of input", head.text, _ROLES)
        slot = self._slot(Role(head.text))
        if not isinstance(kind, TypeText):
            cursor.fail(at, f"an input needs its type: %{name} : f32[4,8] = {spell_slot(slot)}")
        if slot in self.section.inputs.values():
            cursor.fail(head, f"{spell_slot(slot)} is read twice; once a graph is allowed")
        if self.operations_begun:
            cursor.fail(head, "an input comes after an operation; all inputs of a graph come first")
        self._check_declared(slot, kind, at)
        node = self.section.graph.create_node("placeholder", name, (), {}, name)
        node.meta["val"] = fake.tensor(self.mode, kind.shape, kind.dtype, kind.stride, kind.device)
        self.section.inputs[node] = slot
        return node

    def _check_declared(self, slot: Slot, kind: TypeText, at: Token) -> None:
        """An input's type against what the header says of its parameter, bucket or constant."""
        declared: tuple[torch.dtype, tuple[int, ...]] | None = None
        if slot.role is Role.PARAM and (param := self.header.params.get(slot.name)) is not None:
            declared = (param.dtype, param.shape)
        elif slot.role in (Role.FLAT, Role.SHARD) and (bucket := self.header.buckets.get(slot.name)) is not None:
            declared = (bucket.dtype, (bucket.shard_numel if slot.role is Role.SHARD else bucket.numel,))
        elif slot.role is Role.CONSTANT and (constant := self.header.constants.get(slot.name)) is not None:
            declared = (constant.dtype, tuple(constant.shape))
        if declared is not None and declared != (kind.dtype, kind.shape):
            given = TypeText(kind.dtype, kind.shape)
            self.cursor.fail(at, f"{spell_slot(slot)} is {TypeText(*declared)} by the header, not {given}")

    def _slot(self, role: Role) -> Slot:
        cursor, key = self.cursor, ""
        if role in NUMBERED and cursor.next.kind == "number":
            name = str(cursor.integer(f"the index of the {role}"))
        else:
            name = cursor.string(f"the {'index' if role in NUMBERED else 'quoted name'} of the {role}")
        if cursor.next.kind in ("word", "string"):
            key = text_values.label(cursor)
        stage = cursor.integer("a stage") if cursor.accept("@") else 0
        return Slot(role, name, key, stage)

    def _outputs(self) -> None:
        cursor = self.cursor
        cursor.take()
        values: list[fx.Node] = []
        while cursor.next.kind == "word" or values:
            token = cursor.next
            slot = self._slot(Role(cursor.one_of(_ROLES, "kind of output")))
            if slot in self.section.output_slots:
                cursor.fail(token, f"{spell_slot(slot)} is returned twice")
            self.section.output_slots.append(slot)
            values.append(self._reference())
            if not cursor.accept(","):
                break
            cursor.skip_lines()
        self.section.graph.output(tuple(values))

    def _operation(self, head: Token, name: str) -> fx.Node:
        target, cursor = self._operator(head), self.cursor
        args: list[Any] = []
        keywords: dict[str, Any] = {}

        def argument() -> None:
            token = cursor.next
            if token.kind == "word" and cursor.after_next.kind == "mark" and cursor.after_next.text == "=":
                cursor.at += 2
                if token.text in keywords:
                    cursor.fail(token, f"argument {token.text} is given twice")
                keywords[token.text] = text_values.value(cursor, self._reference)
            elif keywords:
                cursor.fail(token, "an argument without a name comes after one with a name")
            else:
                args.append(text_values.value(cursor, self._reference))

        cursor.items(argument, "(", ")", f"the arguments of {head.text}")
        try:
            value = fake.infer(self.mode, target, tuple(args), keywords)
        except Exception as error:  # whatever the operator raises for arguments that do not fit
            cursor.fail(head, f"{head.text} does not take these arguments: {first_line(error)}")
        node = self.section.graph.create_node("call_function", target, tuple(args), keywords, name)
        node.meta["val"] = value
        self.operations_begun = True
        return node

    def _region(self, head: Token, name: str) -> fx.Node:
        """``region(%x, %b=%y) { ... return %z }``: its operations see nothing of this graph but what it is given."""
        cursor = self.cursor
        inner = GraphParser(cursor, self.header, self.mode, self.name)
        inner.operations_begun = True
        given: list[fx.Node] = []

        def argument() -> None:
            token = cursor.kind("node", "a node, such as %x, or %name=%x")
            label = token.text[1:]
            if label in inner.nodes:
                cursor.fail(token, f"{token.text} is given to the region twice")
            source = self._reference() if cursor.accept("=") else self._known(token)
            given.append(source)
            placeholder = inner.section.graph.create_node("placeholder", label, (), {}, label)
            placeholder.name = label
            placeholder.meta = {"val": source.meta["val"], "info": replace(source.meta["info"], made_by="")}
            inner.nodes[label] = placeholder

        cursor.items(argument, "(", ")", "what the region reads")
        autotune = cursor.next.text == "autotune"
        if autotune:
            cursor.take()
        cursor.expect("{", "before the operations of the region")
        cursor.skip_lines()
        while cursor.next.kind == "node":
            inner._statement()
            cursor.end_line("the statement")
        if cursor.next.text != "return":
            cursor.fail(cursor.next, f"expected '%name = ...' or 'return' in the region, not {cursor.next.described}")
        cursor.take()
        results = [inner._reference()]
        while cursor.accept(","):
            results.append(inner._reference())
        cursor.skip_lines()
        cursor.expect("}", "after the return of the region")
        inner.section.graph.output(tuple(results))
        if any(result.op == "placeholder" for result in results):
            cursor.fail(head, "a region returns what it computes, not what it is given")
        region = Region(inner.section.graph, autotune)
        node = self.section.graph.create_node("call_function", region, tuple(given), {}, name)
        values = [result.meta["val"] for result in results]
        node.meta["val"] = values[0] if len(values) == 1 else tuple(values)
        self.operations_begun = True
        return node

    def _operator(self, token: Token) -> Any:
        if token.text == "getitem":
            return operator.getitem
        space, _, rest = token.text.partition(".")
        packet_name, _, overload = rest.rpartition(".")
        packet = getattr(getattr(torch.ops, space), packet_name or rest, None) if rest else None
        if not packet_name and isinstance(packet, torch._ops.OpOverloadPacket):
            near = [name for name in fake.operator_names() if name.rpartition(".")[0] == token.text]
            choices = ", ".join(near[:4])
            self.cursor.fail(token, f"{token.text} needs its overload, such as {choices}")
        found = getattr(packet, overload, None)
        if not isinstance(found, torch._ops.OpOverload):
            self.cursor.unknown(token, "operator", token.text, [*fake.operator_names(), "getitem"])
        return found

    def _reference(self) -> fx.Node:
        return self._known(self.cursor.kind("node", "a node, such as %x"))

    def _known(self, token: Token) -> fx.Node:
        found = self.nodes.get(token.text[1:])
        if found is None:
            self.cursor.unknown(token, f"node in graph {self.name}", token.text, [f"%{name}" for name in self.nodes])
        return found

    def _checked(self, value: Any, kind: Any, at: Token, head: Token) -> Any:
        """The value derived, if the text admits it."""
        if kind is None:
            return value
        derived = type_of(value)
        if not _admits(kind, derived):
            said, right = spell_type(kind), spell_type(derived)
            self.cursor.fail(at, f"the text says {said}, but {head.text} of these arguments gives {right}")
        if isinstance(kind, TypeText) and kind.full_stride != derived.full_stride:
            # They differ where a size is 1, or in an empty tensor, and mean the same; keep what is written.
            return fake.tensor(self.mode, kind.shape, kind.dtype, kind.full_stride, kind.device)
        return value

    def _info(self, node: fx.Node) -> NodeInfo:
        if not self.cursor.is_mark("{"):
            return default_info(self.name, node, "")
        cursor, values = self.cursor, dict[str, Any]()

        def label() -> str:
            return text_values.label(cursor)

        parsers: dict[str, Callable[[], Any]] = {
            "phase": lambda: Phase(cursor.one_of(Phase, "phase")),
            "module": label,
            "origin": label,
            "forward": label,
            "stage": lambda: cursor.integer("a stage"),
            "tag": lambda: MemoryTag(cursor.one_of(MemoryTag, "memory tag")),
            "layout": label,
            "device": label,
            "as_given": lambda: cursor.one_of(("True", "False"), "truth value") == "True",
            "made_by": label,
        }
        cursor.items(lambda: cursor.attribute(parsers, "attribute", values), "{", "}", "the attributes")
        return replace(default_info(self.name, node, values.get("made_by", "")), **values)


def _admits(kind: Any, derived: Any) -> bool:
    if isinstance(kind, tuple) and isinstance(derived, tuple):
        return len(kind) == len(derived) and all(map(_admits, kind, derived))
    if isinstance(kind, TypeText) and isinstance(derived, TypeText):
        return kind.admits(derived)
    return bool(kind == derived)

"""Graph text as tokens, and a cursor over them that says where a mistake is."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

from graphshard.errors import TextError
from graphshard.text.spelling import WORD

T = TypeVar("T")

_TOKEN = re.compile(
    rf"""[ \t\r]*(?:
    (?P<newline>(?:\#[^\n]*)?\n)
    |(?P<node>%[A-Za-z_]\w*)
    |(?P<number>[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|inf|nan)(?![\w.]))
    |(?P<word>{WORD})
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<mark>[=:,(){{}}\[\]@])
    |(?P<end>(?:\#[^\n]*)?\Z)
    |(?P<bad>[\s\S]))""",
    re.VERBOSE | re.ASCII,
)

_BAD = {
    '"': "this string does not end on its line",
    "%": "expected a node name: % and an identifier, such as %x or %add_1",
}

_NAMES = {"newline": "end of line", "end": "end of text"}


class Token(NamedTuple):
    """One token; a comment belongs to the end of its line."""

    kind: str  # node, number, word, string, mark, newline or end
    text: str
    start: int  # offset in the text

    @property
    def described(self) -> str:
        return _NAMES.get(self.kind, repr(self.text))


class Cursor:
    """A position among the tokens of ``text``; ``path`` is for messages."""

    def __init__(self, text: str, path: str) -> None:
        self.source, self.path = text, path
        self.tokens = self._tokenize()
        self.at = 0

    def _tokenize(self) -> list[Token]:
        tokens = []
        for match in _TOKEN.finditer(self.source):
            kind = match.lastgroup
            assert kind is not None
            token = Token(kind, match.group(kind), match.start(kind))
            if kind == "bad":
                self.fail(token, _BAD.get(token.text, f"unexpected character {token.text!r}"))
            if kind == "end":
                break
            tokens.append(token)
        # The last line may lack its end, and every statement is followed by one.
        return [*tokens, Token("newline", "", token.start), token]

    def fail(self, where: Token | int, problem: str) -> NoReturn:
        """Raise a TextError at a token or an offset."""
        offset = where if isinstance(where, int) else where.start
        begin = self.source.rfind("\n", 0, offset) + 1
        end = self.source.find("\n", offset)
        line = self.source[begin : len(self.source) if end < 0 else end].rstrip("\r")
        raise TextError(self.path, self.source.count("\n", 0, offset) + 1, offset - begin + 1, problem, line)

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    @property
    def after_next(self) -> Token:
        return self.tokens[min(self.at + 1, len(self.tokens) - 1)]

    def take(self) -> Token:
        """The next token, consumed; the last one (``end``) stays."""
        token = self.tokens[self.at]
        if token.kind != "end":
            self.at += 1
        return token

    def is_mark(self, text: str) -> bool:
        token = self.tokens[self.at]
        return token.kind == "mark" and token.text == text

    def accept(self, mark: str) -> bool:
        """Consume ``mark`` if it is next."""
        if self.is_mark(mark):
            self.at += 1
            return True
        return False

    def expect(self, mark: str, doing: str) -> Token:
        """Consume ``mark``; ``doing`` says where: "after the name"."""
        if not self.is_mark(mark):
            self.fail(self.next, f"expected {mark!r} {doing}, not {self.next.described}")
        return self.take()

    def kind(self, kind: str, expected: str) -> Token:
        """Consume a token of ``kind``; ``expected`` describes it in the message."""
        if self.next.kind != kind:
            self.fail(self.next, f"expected {expected}, not {self.next.described}")
        return self.take()

    def end_line(self, after: str) -> None:
        """Consume the end of a line, and empty lines after it."""
        if self.next.kind not in ("newline", "end"):
            self.fail(self.next, f"expected the end of the line after {after}, not {self.next.described}")
        self.skip_lines()

    def skip_lines(self) -> None:
        while self.next.kind == "newline":
            self.at += 1

    def integer(self, expected: str, least: int = 0) -> int:
        """A plain integer of at least ``least``."""
        token = self.next
        if token.kind != "number" or not token.text.isdigit() or int(token.text) < least:
            self.fail(token, f"expected {expected}, an integer of at least {least}, not {token.described}")
        return int(self.take().text)

    def string(self, expected: str) -> str:
        """A quoted string, unquoted."""
        token = self.kind("string", expected)
        try:
            value: str = json.loads(token.text)
        except ValueError:
            self.fail(token, "a string has JSON's escapes, such as \\n, \\\" and \\u00e9")
        return value

    def one_of(self, names: Iterable[str], what: str) -> str:
        """A word out of ``names``."""
        known, token = list(names), self.next
        if token.kind != "word":
            self.fail(token, f"expected {what}, one of {', '.join(known)}, not {token.described}")
        if token.text not in known:
            self.unknown(token, what, token.text, known)
        return self.take().text

    def unknown(self, token: Token, what: str, given: str, known: Iterable[str]) -> NoReturn:
        """Fail for a name that is none of ``known``: suggest the nearest, or list them if they are few."""
        names = list(known)
        near = difflib.get_close_matches(given, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}" if 0 < len(names) <= 16 else ""
        self.fail(token, f"unknown {what} {given!r}{hint}")

    def attribute(self, parsers: Mapping[str, Callable[[], Any]], what: str, values: dict[str, Any]) -> None:
        """``name=value`` into ``values``; the parser of the name reads the value."""
        token, name = self.next, self.one_of(parsers, what)
        if name in values:
            self.fail(token, f"{name} is given twice")
        self.expect("=", f"after {name}")
        values[name] = parsers[name]()

    def attributes(self, parsers: Mapping[str, Callable[[], Any]], what: str) -> dict[str, Any]:
        """``name=value name=value``, as long as there are words."""
        values: dict[str, Any] = {}
        while self.next.kind == "word":
            self.attribute(parsers, what, values)
        return values

    def list_of(self, parse: Callable[[], T], what: str) -> tuple[T, ...]:
        """``[a, b]``."""
        return tuple(self.items(parse, "[", "]", what)[0])

    def items(self, parse: Callable[[], T], opening: str, closing: str, what: str) -> tuple[list[T], bool]:
        """A list in brackets, which may span lines; also whether a comma is last."""
        self.expect(opening, f"before {what}")
        self.skip_lines()
        found: list[T] = []
        comma = False
        while not self.accept(closing):
            if found and not comma:
                self.fail(self.next, f"expected ',' or {closing!r} in {what}, not {self.next.described}")
            found.append(parse())
            # A line may end after a comma or before the closing bracket, but text that forgets the bracket is
            # reported at the end of its own line.
            if self.next.kind == "newline" and not self._closes(closing):
                self.fail(self.next, f"expected ',' or {closing!r} in {what}, not {self.next.described}")
            self.skip_lines()
            comma = self.accept(",")
            self.skip_lines()
        return found, comma

    def _closes(self, closing: str) -> bool:
        ahead = self.at
        while self.tokens[ahead].kind == "newline":
            ahead += 1
        return self.tokens[ahead].kind == "mark" and self.tokens[ahead].text in (closing, ",")

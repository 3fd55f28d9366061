"""Pass tests as graph text: comments of a ``.graph`` file say what to run on it and what must come out.

::

    # RUN: zero:stage=3;bucket --world-size 4     what follows the file in `graphshard opt FILE --passes`
    # CHECK: graph body {                         this text comes next, on the same line or a later one
    # CHECK-NEXT: shard "w"                       this text is on the line after the last match
    # CHECK-NOT: all_reduce                       this text is nowhere between the neighbouring matches
    # CHECK-COUNT-2: all_gather{{.*}}"dp"         as CHECK, two times; {{ }} holds a regular expression
    # RUN-ERROR: zero:stage=4                     the passes refuse the input: CHECK looks at the error message

Blanks count as one. A file may have several RUN lines; each is a test, with the CHECK lines up to the next RUN. A RUN
with nothing behind it only reads and prints the file. A pass of one's own is ``RUN: module:Class:option=value``, where
``module`` can be imported.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from graphshard.cli import BAD_INPUT, main
from graphshard.errors import BadCase

_DIRECTIVE = re.compile(r"#\s*(?P<word>RUN|CHECK)(?P<suffix>[A-Z0-9-]*):(?P<text>.*)")
_RUNS = ("", "-ERROR")
_CHECKS = re.compile(r"|-NEXT|-NOT|-COUNT-(?P<count>\d+)")


class CaseFailed(AssertionError):
    """A case does not come out as it says."""


@dataclass(frozen=True)
class Check:
    line: int  # in the case file, from 1
    suffix: str  # "", "-NEXT", "-NOT"
    text: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """The text as a regular expression: literal but for what ``{{ }}`` holds."""
        pieces = re.split(r"\{\{(.*?)\}\}", " ".join(self.text.split()))
        return re.compile("".join(f"(?:{p})" if i % 2 else re.escape(p) for i, p in enumerate(pieces)))


@dataclass(frozen=True)
class Case:
    line: int
    refused: bool  # RUN-ERROR
    command: str  # passes and further options of `graphshard opt`
    checks: tuple[Check, ...]


def cases(source: str) -> list[Case]:
    """The tests that a file holds.

    Raises:
        BadCase: no RUN line, a RUN without CHECK, or a directive that does not exist.
    """
    found: list[tuple[int, bool, str, list[Check]]] = []
    for number, line in enumerate(source.splitlines(), 1):
        match = _DIRECTIVE.match(line.strip())
        if match is None:
            continue
        suffix, content = match["suffix"], match["text"].strip()
        if match["word"] == "RUN":
            if suffix not in _RUNS:
                raise BadCase(number, f"RUN{suffix} does not exist; expected RUN or RUN-ERROR")
            found.append((number, suffix == "-ERROR", content, []))
            continue
        kind = _CHECKS.fullmatch(suffix)
        if kind is None:
            raise BadCase(number, f"CHECK{suffix} does not exist; expected CHECK, -NEXT, -NOT or -COUNT-n")
        if not found or not content:
            raise BadCase(number, "a CHECK without text" if found else "a CHECK before the first RUN")
        times = int(kind["count"] or 1)
        found[-1][3].extend([Check(number, "" if kind["count"] else suffix, content)] * times)
    if not found:
        raise BadCase(1, "no line says what to run; expected '# RUN: passes'")
    for number, _, _, checks in found:
        if not checks:
            raise BadCase(number, "this RUN has no CHECK; expected '# CHECK: text' behind it")
    return [Case(line, refused, command, tuple(checks)) for line, refused, command, checks in found]


def output(path: Path, case: Case) -> str:
    """What the command prints: graph text, or for RUN-ERROR the message.

    Raises:
        CaseFailed: the command fails, or should and does not.
    """
    passes, *options = re.split(r"(?:\s+|^)(?=--)", case.command)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["opt", str(path), "--passes", passes, *" ".join(options).split()])
    if case.refused and status != BAD_INPUT:
        raise CaseFailed(
            f"line {case.line}: the input should be refused, but the command gave {status}\n{out.getvalue()}"
        )
    if not case.refused and status != 0:
        raise CaseFailed(f"line {case.line}: the command gave {status}: {err.getvalue()}")
    return err.getvalue() if case.refused else out.getvalue()


def check(output: str, checks: Iterable[Check]) -> None:
    """CaseFailed for the first check that ``output`` does not meet, with the line it looked from marked."""
    text = "\n".join(" ".join(line.split()) for line in output.splitlines())
    at = 0
    forbidden: list[Check] = []
    for item in checks:
        if item.suffix == "-NOT":
            forbidden.append(item)
            continue
        match = item.pattern.search(text, at)
        if item.suffix == "-NEXT":
            line_end = text.find("\n", at)
            begin = line_end + 1 if line_end >= 0 else len(text)
            end = text.find("\n", begin)
            match = item.pattern.search(text, begin, end if end >= 0 else len(text))
        if match is None:
            where = "on the line after the last match" if item.suffix else "after the last match"
            raise CaseFailed(_report(f"expected {where}", item, text, at))
        _refuse(forbidden, text, at, match.start())
        forbidden, at = [], match.end()
    _refuse(forbidden, text, at, len(text))


def _refuse(forbidden: Iterable[Check], text: str, begin: int, end: int) -> None:
    for item in forbidden:
        if (match := item.pattern.search(text, begin, end)) is not None:
            raise CaseFailed(_report("there, but should not be", item, text, match.start()))


def _report(problem: str, item: Check, text: str, at: int) -> str:
    number = text.count("\n", 0, at)
    lines = [f"{'>' if i == number else ' '} {line}" for i, line in enumerate(text.split("\n"))]
    return f"line {item.line}: CHECK{item.suffix}: {item.text}\n{problem}, marked '>':\n" + "\n".join(lines)

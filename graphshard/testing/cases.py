"""Pass tests as graph text: comments of a ``.graph`` file say what to run on it and what must come out.

::

    # RUN: zero:stage=3;bucket --world-size 4     what follows the file in `graphshard opt FILE --passes`
    # CHECK: graph body {                         this text comes next, on the same line or a later one
    # CHECK-NEXT: shard "w"                       this text is on the line after the last match
    # CHECK-NOT: all_reduce                       this text is nowhere between the neighbouring matches
    # CHECK-COUNT-2: all_gather{{.*}}"dp"         as CHECK, two times; {{ }} holds a regular expression
    # CHECK-MEANING:                              what comes out computes what the file does, on all ranks
    # RUN-ERROR: zero:stage=4                     the passes refuse the input: CHECK looks at the error message

Blanks count as one. CHECK-MEANING runs both programs on random inputs and compares losses, outputs and what is stored:
to the bit if every pass says that it is exact, else up to the order of sums. A file may have several RUN lines; each is
a test, with the CHECK lines up to the next RUN. A RUN with nothing behind it only reads and prints the file. A pass of
one's own is ``RUN: module:Class:option=value``, where ``module`` can be imported.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from graphshard import text
from graphshard.check import check as equivalent
from graphshard.cli import BAD_INPUT, main
from graphshard.errors import BadCase, NotEquivalent
from graphshard.pipeline import parse_passes
from graphshard.program import Program

_DIRECTIVE = re.compile(r"#\s*(?P<word>RUN|CHECK)(?P<suffix>[A-Z0-9-]*):(?P<text>.*)")
_OPTIONS = re.compile(r"(?:\s+|^)(?=--)")
_RUNS = ("", "-ERROR")
_CHECKS = re.compile(r"|-NEXT|-NOT|-MEANING|-COUNT-(?P<count>\d+)")
_MEANING = "-MEANING"


_WORDS = ("RUN", "RUN-ERROR", "CHECK", "CHECK-NEXT", "CHECK-NOT", "CHECK-COUNT", "CHECK-MEANING")


class CaseFailed(AssertionError):
    """A case does not come out as it says."""


@dataclass(frozen=True)
class Check:
    line: int  # in the case file, from 1
    suffix: str  # "", "-NEXT", "-NOT", "-MEANING"
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

    @property
    def passes(self) -> str:
        return _OPTIONS.split(self.command)[0]

    @property
    def meaning(self) -> Check | None:
        """The CHECK-MEANING line, if there is one."""
        return next((item for item in self.checks if item.suffix == _MEANING), None)


def cases(source: str) -> list[Case]:
    """The tests that a file holds.

    Raises:
        BadCase: no RUN line, a RUN without CHECK, or a directive that does not exist.
    """
    found: list[tuple[int, bool, str, list[Check]]] = []
    for number, line in enumerate(source.splitlines(), 1):
        match = _DIRECTIVE.match(line.strip())
        if match is None:
            _refuse_misspelt(number, line)
            continue
        suffix, content = match["suffix"], match["text"].strip()
        if match["word"] == "RUN":
            if suffix not in _RUNS:
                raise BadCase(number, f"RUN{suffix} does not exist; expected RUN or RUN-ERROR")
            found.append((number, suffix == "-ERROR", content, []))
            continue
        kind = _CHECKS.fullmatch(suffix)
        if kind is None:
            raise BadCase(number, f"CHECK{suffix} does not exist; expected CHECK, -NEXT, -NOT, -COUNT-n or -MEANING")
        if not found:
            raise BadCase(number, "a CHECK before the first RUN")
        if suffix == _MEANING and found[-1][1]:
            raise BadCase(number, "CHECK-MEANING after RUN-ERROR: what is refused has no result")
        if not content and suffix != _MEANING:
            raise BadCase(number, "a CHECK without text")
        times = int(kind["count"] or 1)
        found[-1][3].extend([Check(number, "" if kind["count"] else suffix, content)] * times)
    if not found:
        raise BadCase(1, "no line says what to run; expected '# RUN: passes'")
    for number, _, _, checks in found:
        if not checks:
            raise BadCase(number, "this RUN has no CHECK; expected '# CHECK: text' behind it")
    return [Case(line, refused, command, tuple(checks)) for line, refused, command, checks in found]


def _refuse_misspelt(number: int, line: str) -> None:
    """A comment that was meant to be a directive would be a test that tests nothing."""
    word = re.match(r"\s*#\s*([A-Za-z-]+):", line)
    near = difflib.get_close_matches(word[1].upper(), _WORDS, n=1, cutoff=0.75) if word else []
    if word and near:
        raise BadCase(number, f"{word[1]} is no directive; did you mean {near[0]}?")


def output(path: Path, case: Case) -> str:
    """What the command prints: graph text, or for RUN-ERROR the message.

    Raises:
        CaseFailed: the command fails, or should and does not.
    """
    passes, *options = _OPTIONS.split(case.command)
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


def check_meaning(path: Path, case: Case, printed: str) -> None:
    """CaseFailed if ``printed``, the output of ``case``, does not compute what the file at ``path`` does.

    No check at all without CHECK-MEANING.
    """
    if case.meaning is None:
        return
    before = text.read(path)
    after = text.parse(printed, text.stored_constants(before))
    try:
        same_meaning(case, before, after)
    except NotEquivalent as error:
        raise CaseFailed(f"line {case.meaning.line}: CHECK{_MEANING}: {error}") from None


def same_meaning(case: Case, before: Program, after: Program) -> None:
    """NotEquivalent unless both mean the same: to the bit, if all passes of ``case`` are exact."""
    before.mesh = after.mesh  # which options of the command may have set
    equivalent(before, after, exact=all(item.exact for item in parse_passes(case.passes)))


def check(output: str, checks: Iterable[Check]) -> None:
    """CaseFailed for the first check that ``output`` does not meet, with the line it looked from marked."""
    lines = "\n".join(" ".join(line.split()) for line in output.splitlines())
    at = 0
    forbidden: list[Check] = []
    for item in checks:
        if item.suffix == _MEANING:
            continue
        if item.suffix == "-NOT":
            forbidden.append(item)
            continue
        match = item.pattern.search(lines, at)
        if item.suffix == "-NEXT":
            line_end = lines.find("\n", at)
            begin = line_end + 1 if line_end >= 0 else len(lines)
            end = lines.find("\n", begin)
            match = item.pattern.search(lines, begin, end if end >= 0 else len(lines))
        if match is None:
            where = "on the line after the last match" if item.suffix else "after the last match"
            raise CaseFailed(_report(f"expected {where}", item, lines, at))
        _refuse(forbidden, lines, at, match.start())
        forbidden, at = [], match.end()
    _refuse(forbidden, lines, at, len(lines))


def _refuse(forbidden: Iterable[Check], lines: str, begin: int, end: int) -> None:
    for item in forbidden:
        if (match := item.pattern.search(lines, begin, end)) is not None:
            raise CaseFailed(_report("there, but should not be", item, lines, match.start()))


def _report(problem: str, item: Check, lines: str, at: int) -> str:
    number = lines.count("\n", 0, at)
    marked = [f"{'>' if i == number else ' '} {line}" for i, line in enumerate(lines.split("\n"))]
    return f"line {item.line}: CHECK{item.suffix}: {item.text}\n{problem}, marked '>':\n" + "\n".join(marked)

"""The pages of docs/ do what they say: files are written, Python is run, commands print what is shown."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from graphshard.cli import main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "writing-a-pass.md": {"python", "text", "console", "graph"},
    "memory.md": {"python", "text", "console"},
    "precision.md": {"python", "text", "console"},
    "plan-directory.md": {"python", "text"},
}
"""Each page, and the kinds of blocks that it has."""

BLOCK = re.compile(r"^```(?P<kind>\w+)(?: (?P<file>\S+))?\n(?P<content>.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block whose first line names a file is that file; others are Python, what it prints (text), or commands."""


def test_every_page_is_run() -> None:
    assert {page.name for page in DOCS.glob("*.md")} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_does_what_the_page_says(
    page: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(pytester.path)
    namespace: dict[str, Any] = {}
    printed = ""
    kinds, before = [], set(sys.modules)
    for block in BLOCK.finditer((DOCS / page).read_text()):
        kind, file, content = block["kind"], block["file"], block["content"]
        kinds.append(kind)
        if file is not None:
            (pytester.path / file).parent.mkdir(exist_ok=True)
            (pytester.path / file).write_text(content)
        elif kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(content, page, "exec"), namespace)
            printed = out.getvalue()
        elif kind == "text":
            compared(content, printed)
        else:
            assert kind == "console"
            for command in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
                line, _, expected = command.partition("\n")
                compared(expected, ran(pytester, line))
    assert PAGES[page] <= set(kinds)
    for name in set(sys.modules) - before:
        if str(pytester.path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]  # a page's own modules are nobody else's


def ran(pytester: pytest.Pytester, line: str) -> str:
    """What a command of the page prints."""
    name, *arguments = line.split()
    if name == "pytest":
        return str(pytester.runpytest_inprocess(*arguments, "-p", "no:cacheprovider").stdout)
    if name == "graphshard" and not set("|&>") & set(line):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main(arguments)
        return out.getvalue()
    return str(pytester.run("bash", "-c", line).stdout)


def compared(expected: str, printed: str) -> None:
    """``...`` stands for anything; the width of rules and of blanks does not count."""
    expected, printed = (re.sub(r"={4,}", "====", value).strip() for value in (expected, printed))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(expected, printed, flags), f"expected:\n{expected}\nprinted:\n{printed}"

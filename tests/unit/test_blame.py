"""Who holds the store that ranks tell one another by may be gone or stopped."""

from __future__ import annotations

import threading
import time

import pytest

from graphshard.mesh import Mesh
from graphshard.runtime import blame
from graphshard.runtime.blame import Blame

MESH = Mesh((("pp", 1), ("dp", 2)))


class Store:
    """Answers so many questions; then it is silent, or the connection is lost."""

    def __init__(self, answers: int, lost: bool) -> None:
        self._answers, self._lost, self._never = answers, lost, threading.Event()

    def _answer(self) -> None:
        self._answers -= 1
        if self._answers < 0 and self._lost:
            raise RuntimeError("Connection reset by peer")
        if self._answers < 0:
            self._never.wait()

    def set(self, key: str, value: str) -> None:
        self._answer()

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return keys == ["1"]

    def get(self, key: str) -> bytes:
        self._answer()
        return b"failed: out of luck"


def account(monkeypatch: pytest.MonkeyPatch, answers: int, lost: bool) -> str:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(blame, "_ANSWER_S", 0.05)
    monkeypatch.setattr(blame, "_HEARING_S", 0.05)
    found = Blame(MESH, 0, "")
    found._store = Store(answers, lost)
    began = time.monotonic()
    told = found.account("rank 1", "1 WAIT", ())
    found.fail("again", "1 WAIT")
    assert time.monotonic() - began < 10
    return told


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("answers", range(4))
def test_nobody_waits_for_a_store_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, answers: int, lost: bool
) -> None:
    assert account(monkeypatch, answers, lost) == ""


def test_a_store_that_answers_names_who_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = account(monkeypatch, 1000, False).splitlines()
    assert told[0] == "at fault: rank 1" and told[2].endswith("rank 1 (stage 0) failed: out of luck")

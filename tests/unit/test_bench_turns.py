"""Rows of the benchmark that take turns, with workers that do nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

import run
import turns
from turns import RowFailed, Run, last_error, orders

OPTIONS = argparse.Namespace(timeout=60.0, steps=2, warmup=1, sizes={})
WORKER = """
import argparse, json, sys
sys.path.insert(0, {folder!r})
from turns import Turns
parser = argparse.ArgumentParser()
for name in ("output", "turns", "steps"): parser.add_argument(f"--{{name}}")
options = parser.parse_known_args()[0]
mine = Turns(options.turns)
for step in range(int(options.steps)):
    mine.take()
    print("step", step, flush=True)
    if {fails}: raise ValueError("out of luck")
    open({log!r}, "a").write(sys.argv[1] + "\\n")
json.dump({{"row": sys.argv[1]}}, open(options.output, "w"))
"""


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are started by themselves: the launcher takes seconds."""
    monkeypatch.setattr(turns, "launcher", lambda world: [])


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the rows append their names to, at every step."""
    use_worker(tmp_path, monkeypatch, fails=False)
    return tmp_path / "log"


def use_worker(folder: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    script, place = folder / "worker.py", str(Path(turns.__file__).parent)
    script.write_text(WORKER.format(folder=place, log=str(folder / "log"), fails=fails))
    monkeypatch.setattr(turns, "WORKER", script)


def test_rows_go_when_it_is_their_turn(log: Path) -> None:
    with closing(Run("eager", OPTIONS)) as one, closing(Run("graphshard one", OPTIONS)) as other:
        runs = {"eager": one, "graphshard one": other}
        assert not log.exists()
        for names in orders(list(runs), OPTIONS.steps):
            for name in names:
                runs[name].step()
        assert [run.result() for run in runs.values()] == [{"row": name} for name in runs]
    assert log.read_text().splitlines() == ["eager", "graphshard one", "graphshard one", "eager"]


@pytest.mark.usefixtures("unlaunched")
def test_a_row_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_worker(tmp_path, monkeypatch, fails=True)
    with closing(Run("eager", OPTIONS)) as row:
        for _ in range(OPTIONS.steps):
            row.step()
        with pytest.raises(RowFailed, match="ValueError: out of luck"):
            row.result()


@pytest.mark.usefixtures("unlaunched")
def test_a_row_that_fails_or_hangs_leaves_the_others(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Run, "step", hanging(Run.step, "eager"))
    failures: dict[str, str] = {}
    found = run._run_group(["eager", "graphshard one"], OPTIONS, failures, Console(), said.append)
    assert found == {"graphshard one": {"row": "graphshard one"}}
    assert failures == {"eager": "took more than 60 s"}
    assert said.count("graphshard one") == 1 + OPTIONS.steps


def hanging(step: Callable[[Run], None], name: str) -> Callable[[Run], None]:
    """``step``, of which that of the row ``name`` takes too long."""

    def slow(row: Run) -> None:
        if row.name == name:
            raise RowFailed("took more than 60 s")
        step(row)

    return slow


@pytest.mark.usefixtures("unlaunched")
def test_a_row_that_never_asks_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(turns, "WORKER", script)
    with pytest.raises(RowFailed, match="took more than 1 s"):
        Run("eager", argparse.Namespace(**(vars(OPTIONS) | {"timeout": 1.0})))


def test_the_last_error_is_the_one_that_began_it() -> None:
    said = "W1: hello\nTraceback (most recent call last):\n  File x\nKeyError: 'a'\nChildFailedError: rank 0\n"
    assert last_error(said) == "KeyError: 'a'"
    assert last_error("so far\nSignal 11 (SIGSEGV) received by PID 3\nend") == "Signal 11 (SIGSEGV) received by PID 3"
    assert last_error("Root Cause:\n  exitcode : -6 (pid: 3)\n  error_file: no\n=====\n") == "exitcode : -6 (pid: 3)"
    assert last_error("so far\n-----") == "so far"
    assert last_error("") == "it said nothing"


def test_no_row_always_follows_the_same_other() -> None:
    assert list(orders(["a", "b"], 3)) == [["a", "b"], ["b", "a"], ["a", "b"]]

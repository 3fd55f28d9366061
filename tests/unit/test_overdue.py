"""A thread watches what a device waits for, which here is whatever a test says."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any, cast

import pytest

from graphshard.errors import PeerFailed, RanksError, WaitTimeout
from graphshard.runtime import overdue
from graphshard.runtime.collectives import Works
from graphshard.runtime.overdue import Overdue


class Device:
    """What it waits for arrives when a test says so; ``trouble``: some rank gave up."""

    def __init__(self) -> None:
        self.trouble, self.lost, self.arrived = False, False, threading.Event()

    def completed(self) -> bool:
        if self.lost:
            raise RuntimeError("NCCL communicator was aborted")
        return self.arrived.is_set()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(overdue, "_ASK_S", 0.05)
    return Device()


def watched(device: Device, timeout_s: float) -> Overdue:
    """It waits for the first of two communications."""

    def told(works: Works, at: str, late: bool) -> RanksError:
        return WaitTimeout(0, at, "rank 1", timeout_s) if late else PeerFailed(0, at, "rank 1", "some rank gave up")

    made = Overdue(timeout_s, lambda: device.trouble, told)
    for at in ("3 WAIT", "5 WAIT"):
        made.started(cast(Any, device), at)
    return made


def found(given: Overdue) -> RanksError | None:
    """Its error, as soon as there is one; None after a while."""
    end = time.monotonic() + 5.0
    while (error := given.error()) is None and time.monotonic() < end:
        time.sleep(0.01)
    given.close()
    return error


def test_a_wait_that_takes_too_long_is_named(device: Device) -> None:
    error = found(watched(device, 0.1))
    assert isinstance(error, WaitTimeout) and "in: 3 WAIT;" in str(error)


@pytest.mark.parametrize("how", ["trouble", "lost"])
def test_a_wait_for_ranks_that_gave_up_is_named_at_once(device: Device, how: str) -> None:
    setattr(device, how, True)
    began = time.monotonic()
    error = found(watched(device, 60.0))
    assert isinstance(error, PeerFailed) and "in: 3 WAIT " in str(error)
    assert time.monotonic() - began < 4.0


def test_what_arrives_in_time_is_nothing_to_tell(device: Device) -> None:
    """The limit is each wait's own."""
    given = watched(device, 0.4)
    time.sleep(0.3)
    device.arrived.set()
    time.sleep(0.3)
    assert given.error() is None
    given.close()
    assert given._thread is not None and not given._thread.is_alive()


class Work:
    """Messages between hosts that arrive when they are asked for the third time."""

    def __init__(self) -> None:
        self.asked, self.waited = 0, False

    def is_completed(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def wait(self, timeout: object) -> None:
        self.waited = True


def test_messages_are_waited_for_while_the_device_does_not_wait_in_vain(device: Device) -> None:
    given, work = watched(device, 60.0), cast(Any, Work())
    given.hear(work, 5.0)
    assert work.waited
    device.trouble = True
    never = cast(Any, Work())
    never.is_completed = lambda: False
    with pytest.raises(PeerFailed):
        given.hear(never, 20.0)
    given.close()


def test_a_process_that_was_told_otherwise_is_not_ended(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread raised an error of its own while the thread was hearing what other ranks say."""
    ended: list[int] = []
    monkeypatch.setattr(overdue, "_TAKE_S", 0.1)
    monkeypatch.setattr("os._exit", ended.append)
    hearing, heard = threading.Event(), threading.Event()

    def told(works: Works, at: str, late: bool) -> RanksError:
        hearing.set()
        heard.wait()
        return WaitTimeout(0, at, "rank 1", 0.1)

    given = Overdue(0.1, lambda: False, told)
    given.started(cast(Any, device), "3 WAIT")
    assert hearing.wait(5.0)
    given.close()
    heard.set()
    assert given._thread is not None
    given._thread.join(5.0)
    assert not given._thread.is_alive() and not ended


def test_a_process_whose_main_thread_waits_for_the_device_is_ended() -> None:
    code = """
import time
from graphshard.errors import WaitTimeout
from graphshard.runtime import overdue
overdue._TAKE_S = 0.1

class Never:
    def completed(self):
        return False

watch = overdue.Overdue(0.1, lambda: False, lambda works, at, late: WaitTimeout(0, at, "rank 1", 0.1))
watch.started(Never(), "3 WAIT")
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=50)
    assert done.returncode == 1
    assert "rank 0 waited more than 0.1 s for rank 1 in: 3 WAIT;" in done.stderr

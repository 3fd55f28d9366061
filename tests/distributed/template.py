"""Ranks for tests, as forks of one process that has imported torch and graphshard.

Importing takes several processor seconds, more than most of these tests compute, and a test starts up to four ranks.
The template itself computes nothing: there are no threads of torch and no random state to be copied. A fork runs its
script as the main program, to its very end, as an interpreter of its own would.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

MESSAGE_BYTES = 1 << 20  # of a request: an environment and arguments
STOPPED = "stopped"
DEVICE = "TEST_DEVICE"  # in a rank's environment: where it makes tensors, unless told otherwise
FIRST = ("emulated.gpu",)  # what comes before torch, where tests have it


class Template:
    """The process that is forked. It ends with this one, or by :meth:`close`."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            path = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *(name for name in FIRST if name in sys.modules)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def fork(self, script: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Rank:
        """Start ``script`` with the variables of ``environment`` besides those that the template was started with."""
        request = json.dumps({"argv": [script, *arguments], "environment": dict(environment)}).encode()
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115  (the rank's)
        status, theirs = socket.socketpair()
        read, given = os.pipe()
        with theirs, os.fdopen(read, "rb") as stdin:
            files = [stdin.fileno(), out.fileno(), err.fileno(), theirs.fileno()]
            socket.send_fds(self._requests, [request], files)
        return Rank(status, given, out, err)

    def close(self) -> None:
        """End it; ranks go on."""
        self._requests.close()
        self._process.wait()


class Rank:
    """A fork, with what tests need of ``subprocess.Popen``."""

    def __init__(self, status: socket.socket, given: int, out: IO[str], err: IO[str]) -> None:
        self.returncode: int | None = None
        self._status, self._out, self._err = status, out, err
        self._input = os.fdopen(given, "wb")
        self._words: list[str] = []
        self._begun = ""
        self.pid = int(self._next(None))

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Close its input and wait for its end; what it has written to stdout and stderr."""
        self._input.close()
        self.wait(timeout)
        for file in (self._out, self._err):
            file.seek(0)
        return self._out.read(), self._err.read()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal; TimeoutExpired if it goes on for longer (seconds)."""
        while self.returncode is None:
            word = self._next(timeout)
            self.returncode = None if word == STOPPED else int(word)
        return self.returncode

    def wait_stopped(self, timeout: float | None = None) -> None:
        """Return once a signal has stopped it."""
        word = self._next(timeout)
        assert word == STOPPED, f"it ended with {word}"

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has, and nobody asked yet
                os.kill(self.pid, signal.SIGKILL)

    def _next(self, timeout: float | None) -> str:
        """The next that the template says of it: its process id, that it stopped, or its exit status."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._words:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
            text = self._status.recv(4096).decode()
            assert text, "the template has ended"
            *words, self._begun = (self._begun + text).split("\n")
            self._words += words
        return self._words.pop(0)


class _Asked(NamedTuple):
    argv: list[str]
    environment: dict[str, str]
    files: list[int]  # stdin, stdout, stderr


def _serve(requests: socket.socket) -> _Asked | None:
    """Fork for each request, and say what becomes of the forks; returns in each of them what it is to run, and None in
    the template when there are no more requests."""
    heard, wakeup = socket.socketpair()
    for end in (heard, wakeup):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup.fileno())
    statuses: dict[int, socket.socket] = {}
    while True:
        ready = select.select([requests, heard], [], [])[0]
        if heard in ready:
            heard.recv(4096)
            _tell(statuses)
        if requests not in ready:
            continue
        message, files, *_ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
        if not message:
            return None
        status = socket.socket(fileno=files.pop())
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (requests, heard, wakeup, status, *statuses.values()):
                other.close()
            return _Asked(**json.loads(message), files=files)
        statuses[pid] = status
        status.send(f"{pid}\n".encode())
        for file in files:
            os.close(file)


def _tell(statuses: dict[int, socket.socket]) -> None:
    """What has become of forks since the last time."""
    with contextlib.suppress(ChildProcessError):  # there are none
        while (found := os.waitpid(-1, os.WNOHANG | os.WUNTRACED))[0]:
            pid, status = found
            stopped = os.WIFSTOPPED(status)
            word = STOPPED if stopped else os.waitstatus_to_exitcode(status)
            with contextlib.suppress(BrokenPipeError):  # nobody asks any more
                statuses[pid].send(f"{word}\n".encode())
            if not stopped:
                statuses.pop(pid).close()


def _run(asked: _Asked) -> None:
    """Become the script."""
    for target, file in enumerate(asked.files):
        os.dup2(file, target)
        os.close(file)
    sys.stdin = os.fdopen(0)
    os.environ.update(asked.environment)
    sys.argv = asked.argv
    if DEVICE in os.environ:
        importlib.import_module("torch").set_default_device(os.environ[DEVICE])
    runpy.run_path(asked.argv[0], run_name="__main__")


def _import() -> None:
    """What scripts and a first compilation import."""
    for module in (
        *sys.argv[2:],
        "graphshard.compile",
        "models.zoo",
        "torch._functorch.aot_autograd",
        "torch.distributed",
    ):
        importlib.import_module(module)


if __name__ == "__main__":
    _import()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        wanted = _serve(connection)
    if wanted is not None:
        _run(wanted)

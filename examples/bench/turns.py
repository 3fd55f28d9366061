"""Rows that take turns, a step at a time: what slows the machine down for some seconds slows all of them.

Every row has processes of its own, which wait between their steps without using a processor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rows import ROWS

WORKER = Path(__file__).with_name("worker.py")
_POLL_S = 0.5


def launcher(world: int) -> list[str]:
    """The arguments of Python that start a script on that many ranks."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]


class RowFailed(Exception):
    """A row's processes did not end well; the message is what they said last."""


class Turns:
    """A worker's end: rank 0 waits here until it is the row's turn."""

    def __init__(self, address: str) -> None:
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(address)

    def take(self) -> None:
        """Return when it is this row's turn; until then the row has nothing to do."""
        self._link.sendall(b"\n")
        if not self._link.recv(1):
            raise EOFError("nobody gives turns any more")


class Run:
    """One run of a row. Made, it is ready for its first step; its processes end with :meth:`close`.

    Raises:
        RowFailed: they failed, or took longer than allowed.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self._timeout_s: float = options.timeout
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._output, self._said, address = folder / "measured.json", folder / "said.txt", folder / "turns"
        command = [sys.executable, *launcher(ROWS[name].world), str(WORKER), name]
        command += [f"--output={self._output}", f"--turns={address}"]
        command += [f"--steps={options.steps}", f"--warmup={options.warmup}", f"--sizes={json.dumps(options.sizes)}"]
        with socket.socket(socket.AF_UNIX) as server, self._said.open("w") as said:
            server.bind(str(address))
            server.listen(1)
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a launcher that is stuck can be ended together with its ranks
            )
            try:
                self._link: socket.socket = self._until(server, lambda: server.accept()[0])
                if not self._hear():
                    raise self._failed()
            except BaseException:
                self.close()
                raise

    def step(self) -> None:
        """Make one step; return when it is done, or nothing is left of the row, which :meth:`result` says."""
        with contextlib.suppress(ConnectionError):
            self._link.sendall(b"\n")
        self._hear()

    def result(self) -> dict[str, Any]:
        """What the worker measured, once all its steps are done."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._timeout_s)
        if self._process.returncode != 0 or not self._output.is_file():
            raise self._failed()
        found: dict[str, Any] = json.loads(self._output.read_text())
        return found

    def close(self) -> None:
        """End the processes, if they have not ended, and remove what they wrote."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def _failed(self) -> RowFailed:
        return RowFailed(last_error(self._said.read_text()))

    def _hear(self) -> bytes:
        """Wait until the worker asks for a turn; nothing if it has made its last step, or failed."""
        try:
            heard: bytes = self._until(self._link, lambda: self._link.recv(1))
        except ConnectionError:
            return b""
        return heard

    def _until(self, waited_on: socket.socket, get: Callable[[], Any]) -> Any:
        """What ``get`` returns, once ``waited_on`` has something for it."""
        end = time.monotonic() + self._timeout_s
        waited_on.settimeout(_POLL_S)
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                return get()
            if self._process.poll() is not None:
                raise self._failed()
        raise RowFailed(f"took more than {self._timeout_s:g} s")


def orders(names: Sequence[str], steps: int) -> Iterator[Sequence[str]]:
    """Who goes when: forth, back, and so on, so that no row always follows the same other one."""
    for index in range(steps):
        yield names if index % 2 == 0 else list(reversed(names))


def last_error(said: str) -> str:
    """The exception line of the first traceback in ``said``, a signal, an exit status, or the last line there is."""
    lines = [line.strip() for line in said.splitlines() if line.strip(" =-")]
    begun = next((i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line), None)
    if begun is None:
        ends = [line for sign in (r"Signal \d+ \(SIG", r"exitcode +: ") for line in lines if re.search(sign, line)]
        return next(iter([*ends, *lines[-1:]]), "it said nothing")
    errors = (line for line in lines[begun:] if "Error: " in line or line.endswith("Error"))
    return next(errors, lines[-1])

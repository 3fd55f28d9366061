"""What a GPU waits for, watched from a thread.

The host goes on while the device waits for other ranks, until it asks the device for a value, as ``loss.item()`` does:
then it waits too, where Python cannot interrupt it. NCCL ends a process that has been there for too long, and says
which of its own operations that was. Here it is said before, with the instruction, the peers and what all ranks say.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from typing import NamedTuple

from graphshard.errors import WaitTimeout
from graphshard.runtime.collectives import Works

logger = logging.getLogger("graphshard")

_LOOK_S = 0.01
_TAKE_S = 5.0  # how long the main thread may take to take what was found before the process is ended


class _Wait(NamedTuple):
    works: Works
    instruction: str


class Overdue:
    """The communication that was started, in order; a device that waits longer than ``timeout_s`` for the next of it,
    from the end of the one before, is told of.

    Args:
        told: the error to raise, given what is waited for and where; called once, in the thread.
    """

    def __init__(self, timeout_s: float, told: Callable[[Works, str], WaitTimeout]) -> None:
        self._timeout_s, self._told = timeout_s, told
        self._waits: deque[_Wait] = deque()
        self._changed = Condition()
        self._thread: Thread | None = None
        self._error: WaitTimeout | None = None
        self._taken = self._closed = False

    def started(self, works: Works, instruction: str) -> None:
        """The host has started ``works``."""
        with self._changed:
            self._waits.append(_Wait(works, instruction))
            self._changed.notify()
            if self._thread is None:
                self._thread = Thread(target=self._watch, name="graphshard-overdue", daemon=True)
                self._thread.start()

    def error(self) -> WaitTimeout | None:
        """What to raise if the device has waited too long."""
        with self._changed:
            self._taken = self._error is not None
            self._changed.notify()
            return self._error

    def close(self) -> None:
        """Watch no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(1.0)

    def _watch(self) -> None:
        while (wait := self._next()) is not None:
            began = time.monotonic()
            while not self._closed and not wait.works.completed():
                if time.monotonic() - began > self._timeout_s:
                    return self._end(wait)
                time.sleep(_LOOK_S)

    def _next(self) -> _Wait | None:
        """What is waited for next; None: nothing ever again."""
        with self._changed:
            self._changed.wait_for(lambda: self._waits or self._closed)
            return None if self._closed else self._waits.popleft()

    def _end(self, wait: _Wait) -> None:
        """Leave it to the main thread to raise the error; if that does not come to it, say it and end the process."""
        error = self._told(wait.works, wait.instruction)
        with self._changed:
            self._error = error
            self._changed.wait_for(lambda: self._taken or self._closed, _TAKE_S)
            if self._taken or self._closed:
                return
        logger.error("graphshard: %s", error)
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)

"""What a GPU waits for, watched from a thread.

The host goes on while the device waits for other ranks, until it asks the device for a value, as ``loss.item()`` does:
then it waits too, where Python cannot interrupt it. NCCL ends a process that has been there for too long, and says
which of its own operations that was. Here it is said before, and at once where another rank has given up, with the
instruction, the peers and what all ranks say.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from threading import Condition, Thread
from typing import NamedTuple

import torch.distributed as dist

from graphshard.errors import RanksError
from graphshard.runtime.collectives import Works

logger = logging.getLogger("graphshard")

_LOOK_S, _HEAR_S = 0.01, 1e-4
_ASK_S = 1.0  # how long a wait takes before it is asked, again and again, whether some rank has given up
_TAKE_S = 5.0  # how long the main thread may take to take what was found before the process is ended


class _Wait(NamedTuple):
    works: Works
    instruction: str


class Overdue:
    """The communication that was started, in order; a device that waits longer than ``timeout_s`` for the next of it,
    from the end of the one before, is told of, and one that waits while some rank has given up.

    Args:
        is_trouble: whether some rank has.
        told: the error to raise, given what is waited for, where, and whether for too long; called once. Both are
            called in the thread.
    """

    def __init__(
        self, timeout_s: float, is_trouble: Callable[[], bool], told: Callable[[Works, str, bool], RanksError]
    ) -> None:
        self._timeout_s, self._is_trouble, self._told = timeout_s, is_trouble, told
        self._waits: deque[_Wait] = deque()
        self._changed = Condition()
        self._thread: Thread | None = None
        self._error: RanksError | None = None
        self._taken = self._closed = False

    def started(self, works: Works, instruction: str) -> None:
        """The host has started ``works``."""
        with self._changed:
            self._waits.append(_Wait(works, instruction))
            self._changed.notify()
            if self._thread is None:
                self._thread = Thread(target=self._watch, name="graphshard-overdue", daemon=True)
                self._thread.start()

    def error(self) -> RanksError | None:
        """What to raise if the device waits in vain."""
        with self._changed:
            self._taken = self._error is not None
            self._changed.notify()
            return self._error

    def hear(self, work: dist.Work, timeout_s: float) -> None:
        """Wait for messages between hosts, but not where the device waits in vain.

        Raises:
            RanksError: it does.
            RuntimeError: they do not come in time.
        """
        end = time.monotonic() + timeout_s
        while not work.is_completed() and time.monotonic() < end:
            if (error := self.error()) is not None:
                raise error
            time.sleep(_HEAR_S)
        work.wait(timedelta(seconds=max(end - time.monotonic(), 1e-3)))

    def close(self) -> None:
        """Watch no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(1.0)

    def _watch(self) -> None:
        while (wait := self._next()) is not None:
            late = self._in_vain(wait.works)
            if late is not None:
                self._end(wait, late)
                return

    def _in_vain(self, works: Works) -> bool | None:
        """Return None once ``works`` are complete; else whether it is for too long."""
        began = asked = time.monotonic()
        while not self._closed:
            try:
                if works.completed():
                    return None
            except RuntimeError:  # NCCL has noticed that the other side is gone
                return False
            now = time.monotonic()
            if now - began > self._timeout_s:
                return True
            if now - asked > _ASK_S:
                if self._is_trouble():
                    return False
                asked = now
            time.sleep(_LOOK_S)
        return None

    def _next(self) -> _Wait | None:
        """What is waited for next; None: nothing ever again."""
        with self._changed:
            self._changed.wait_for(lambda: self._waits or self._closed)
            return None if self._closed else self._waits.popleft()

    def _end(self, wait: _Wait, late: bool) -> None:
        """Leave it to the main thread to raise the error; if that does not come to it, say it and end the process."""
        error = self._told(wait.works, wait.instruction, late)
        with self._changed:
            self._error = error
            self._changed.wait_for(lambda: self._taken or self._closed, _TAKE_S)
            if self._taken or self._closed:
                return
        logger.error("graphshard: %s", error)
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(1)

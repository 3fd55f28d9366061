"""What a communication that was started is to whoever waits for it."""

from __future__ import annotations

from typing import Protocol


class Handle(Protocol):
    """A communication that was started."""

    def done(self) -> bool:
        """Whether it is complete, so that nobody has to wait; False where that cannot be asked without waiting."""
        ...

    def wait(self) -> None:
        """Return when it is complete."""
        ...

"""Nothing is compiled from here on."""

from __future__ import annotations

import pytest

from graphshard import builder, trace


def refuse_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture, passes and lowering fail."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(trace, "capture", refuse)
    for name in ("run_passes", "lower"):
        monkeypatch.setattr(builder, name, refuse)

"""When updates during the last backward begin, so that the state that they bring fits in what is left of the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """An update that may come early. Places are how many instructions of the body come before."""

    ready: int  # the first place at which it has all that it reads of the body
    arriving_bytes: int = 0  # what is reloaded for it
    leaving_bytes: int = 0  # what it offloads
    freed_bytes: int = 0  # what it is the last to read


@dataclass(frozen=True)
class Pace:
    """Places of a turn: its reloads start, it runs, and what it offloads has left. What comes in and what goes out is
    on its way while a gradient is made."""

    begin: int
    run: int
    left: int


def pace(turns: Sequence[Turn], begin: int, end: int, room: Sequence[int] | None) -> list[Pace]:
    """One after the other, each as soon as it fits; behind the body, at ``end``, all do.

    ``begin`` is the first place there is. ``room``: the bytes that may be held in addition while each instruction of
    the body runs; None: any number.
    """
    spare = None if room is None else list(room)
    beats = sorted({*(turn.ready for turn in turns), end})  # where a gradient has been made
    found = []
    for turn in turns:
        starts = [begin, *(beat for beat in beats if beat > begin)]
        choices = [_started(turn, start, begin, beats) for start in starts]
        chosen = next((c for c in choices if spare is None or _fits(turn, c, spare)), Pace(end, end, end))
        if spare is not None:
            for at in range(chosen.begin, end):
                spare[at] -= _taken(turn, chosen, at)
        found.append(chosen)
        begin = chosen.run
    return found


def _started(turn: Turn, start: int, first: int, beats: Sequence[int]) -> Pace:
    """The turn, begun at ``start``; later than at ``first`` it has no update of another bucket to arrive behind."""
    run = max(turn.ready, start if start == first else _next(beats, start))
    return Pace(start, run, _next(beats, run))


def _next(beats: Sequence[int], place: int) -> int:
    return next((beat for beat in beats if beat > place), beats[-1])


def _fits(turn: Turn, pace: Pace, spare: Sequence[int]) -> bool:
    return all(_taken(turn, pace, at) <= spare[at] for at in range(pace.begin, min(pace.left, len(spare))))


def _taken(turn: Turn, pace: Pace, at: int) -> int:
    """Bytes that the turn adds while the body's instruction ``at`` runs."""
    if at < pace.run:
        return turn.arriving_bytes
    return (turn.leaving_bytes if at < pace.left else 0) - turn.freed_bytes

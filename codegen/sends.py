"""How far what a stage sends may be ahead of what another has received, so that stages do not wait in a circle.

A channel carries one message at a time: before a stage sends, what it sent there before has arrived, and a receive is
posted one action ahead. That holds back a schedule that runs a stage further ahead of the one it sends to, as when a
value skips stages or several cross a boundary: the later stage may wait for the earlier one in the same way. There a
few messages more are on their way, until the first wait that is not for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphshard.codegen.schedule import Action, Schedule

Transfers = Mapping[tuple[str, int, int], int]
"""How many values a micro-batch sends, by the kind of action that makes them, the stage and the one they go to."""
Ahead = Mapping[tuple[str, int], int]
"""By the action that sends and the stage that it sends to: of so many actions, itself the last, which sent something
there, nothing need have arrived. 0: every value has to arrive before the next is sent."""


@dataclass
class _Message:
    """What one action sends to one stage."""

    sender: Action
    target: int
    ahead: int = 0
    values: int = 0
    receivers: list[Action] = field(default_factory=list)


def sent_ahead(schedule: Schedule, transfers: Transfers) -> Ahead:
    """The least that lets ``schedule`` go on: stages run until all of them wait, then one waits for less."""
    places = [{action: at for at, action in enumerate(actions)} for actions in schedule.stages]
    channels = _messages(schedule, transfers)
    sending: dict[Action, list[tuple[list[_Message], int]]] = {}
    needed: dict[Action, list[Action]] = {}
    for channel in channels:
        for index, message in enumerate(channel):
            message.ahead = 1 if message.values == 1 else 0
            sending.setdefault(message.sender, []).append((channel, index))
            for receiver in message.receivers:
                needed.setdefault(receiver, []).append(message.sender)
    done = [0] * len(places)

    def waits(channel: list[_Message], index: int) -> bool:
        last = index - channel[index].ahead
        # A receive is posted when the action ahead of it begins.
        return last >= 0 and any(places[r.stage][r] > done[r.stage] + 1 for r in channel[last].receivers)

    while True:
        stuck: list[_Message] = []
        progress = False
        for stage, actions in enumerate(schedule.stages):
            while done[stage] < len(actions):
                action = actions[done[stage]]
                if any(places[n.stage][n] >= done[n.stage] for n in needed.get(action, ())):
                    break
                if late := [channel[index] for channel, index in sending.get(action, ()) if waits(channel, index)]:
                    stuck += late
                    break
                done[stage] += 1
                progress = True
        if not progress and not stuck:  # all done; what else cannot go on is told by who proves the plan
            return {(str(m.sender), m.target): m.ahead for channel in channels for m in channel}
        if not progress:
            stuck[0].ahead += 1


def _messages(schedule: Schedule, transfers: Transfers) -> list[list[_Message]]:
    """What goes from one stage to another, in order, for each such pair."""

    def kind_at(kind: str, stage: int) -> str:
        return "B" if kind == "W" and not schedule.splits_backward(stage) else kind

    channels = []
    for source, target in sorted({(source, target) for _, source, target in transfers}):
        channel = []
        for action in schedule.stages[source]:
            message = _Message(action, target)
            for (kind, *pair), count in transfers.items():
                if pair == [source, target] and kind_at(kind, source) == action.kind:
                    message.values += count
                    message.receivers.append(Action(kind_at(kind, target), target, action.microbatch))
            if message.values:
                channel.append(message)
        channels.append(channel)
    return channels

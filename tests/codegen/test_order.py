"""Order of a stage's instructions: receives early, sends waited for, values handed over at their last use."""

from __future__ import annotations

from graphshard.codegen.order import order
from graphshard.execution import Instruction, Op
from handmade import collective, kind, recv, refs, run, send, wait

X = kind(4)
Part = list[Instruction]


def spell(instructions: Part) -> list[str]:
    """``run f x.0 -> y.0 (last x.0)`` and the like."""
    lines = []
    for ins in instructions:
        words = [str(ins.op).lower(), ins.name if ins.op is Op.RUN else "", *map(str, ins.inputs)]
        words += ["->", *map(str, ins.outputs)] if ins.outputs else []
        words += [f"(last {' '.join(sorted(map(str, ins.last)))})"] if ins.last else []
        lines.append(" ".join(filter(None, words)).replace("%", ""))
    return lines


def ordered(body: Part, epilogue: Part | None = None, first: Part | None = None) -> Part:
    return order([], body, epilogue or [], first)[1]


def texts(*instructions: Instruction) -> list[str]:
    return spell(ordered(list(instructions)))


def test_handed_over_at_the_last_use() -> None:
    given = texts(
        run("f", "batch:0.0", "y.0", "F0.0"), run("g", "y.0", "z.0", "F0.0"), run("h", "y.0 z.0", "u.0", "F0.0")
    )
    assert [line.partition("(")[2] for line in given[:3]] == ["last batch:0.0)", "", "last y.0 z.0)"]


def test_freed_if_nothing_reads_it() -> None:
    assert texts(run("f", "batch:0.0", "y.0 z.0", "F0.0"), run("g", "y.0", "output:0.0", "F0.0")) == [
        "run f batch:0.0 -> y.0 z.0 (last batch:0.0)",
        "free z.0",
        "run g y.0 -> output:0.0 (last y.0)",
    ]


def test_parameters_state_and_results_stay() -> None:
    names = "shard:w flat:w param:w buffer:b state:w:m constant:c lr:0"
    (line,) = texts(run("f", names, "loss:loss output:0.0", "F0.0"))
    assert "last" not in line


def test_a_carry_lives_until_either_epilogue_has_read_it() -> None:
    body = [run("f", "batch:0.0", "carry:g", "F0.0")]
    for epilogue, first in (
        ([run("e", "carry:g", "new", "epilogue")], None),
        ([run("e", "", "new", "epilogue")], [run("e1", "carry:g", "new", "epilogue")]),
    ):
        assert "free carry:g" not in spell(ordered(body, epilogue, first))
    assert "free carry:g" in spell(ordered(body))


def test_an_updated_carry_is_not_handed_over() -> None:
    (line, *_) = texts(run("f", "carry:g x.0", "carry:g", "F0.0"))
    assert line == "run f carry:g x.0 -> carry:g (last x.0)"


def test_a_send_is_waited_for_before_the_next_to_that_peer_and_at_the_end() -> None:
    parts = [run("f", f"batch:0.{mb}", f"y.{mb}", f"F0.{mb}") for mb in range(2)]
    sends = [send(f"y.{mb}", 1, X, f"F0.{mb}") for mb in range(2)]
    lines = [line.partition(" (")[0] for line in texts(parts[0], sends[0], parts[1], sends[1])]
    assert [line for line in lines if line.startswith(("send", "wait"))] == [
        "send y.0",
        "wait y.0",
        "send y.1",
        "wait y.1",
    ]


def test_sends_to_two_peers_do_not_wait_for_each_other() -> None:
    made = run("f", "batch:0.0", "y.0 z.0", "F0.0")
    lines = [line.partition(" (")[0] for line in texts(made, send("y.0", 1, X, "F0.0"), send("z.0", 2, X, "F0.0"))]
    assert lines[1:5] == ["send y.0", "send z.0", "wait y.0", "wait z.0"]


def test_what_is_sent_and_read_meanwhile_lives_until_the_send_is_done() -> None:
    made, sent = run("f", "batch:0.0", "y.0", "F0.0"), send("y.0", 1, X, "F0.0")
    later = run("g", "y.0", "output:0.0", "B0.0")
    after = ordered([made, sent, later])
    done = next(i for i, ins in enumerate(after) if ins.op is Op.WAIT)
    dies = next(i for i, ins in enumerate(after) if refs("y.0")[0] in (ins.inputs if ins.op is Op.FREE else ins.last))
    assert dies >= done


def test_a_receive_is_posted_before_the_action_ahead_of_it() -> None:
    actions = [
        [
            recv(f"x.{mb}", 0, X, f"F1.{mb}"),
            wait(f"x.{mb}", f"F1.{mb}"),
            run("f", f"x.{mb}", f"output:0.{mb}", f"F1.{mb}"),
        ]
        for mb in range(3)
    ]
    lines = texts(*[ins for action in actions for ins in action])
    positions = {line: i for i, line in enumerate(lines)}
    for mb in range(2):
        assert positions[f"recv -> x.{mb + 1}"] < positions[f"run f x.{mb} -> output:0.{mb} (last x.{mb})"]
    assert positions["recv -> x.2"] > positions["run f x.0 -> output:0.0 (last x.0)"]


def test_nothing_is_lost_or_doubled() -> None:
    body = [
        collective(Op.GATHER, "all_gather", "shard:w", "w.0", X, "F0.0", "dp"),
        wait("w.0", "F0.0"),
        run("f", "w.0 batch:0.0", "y.0", "F0.0"),
        collective(Op.GATHER, "all_gather", "shard:w", "w2.0", X, "B0.0", "dp"),
        wait("w2.0", "B0.0"),
        run("b", "w2.0 y.0", "g.0", "B0.0"),
        collective(Op.REDUCE, "reduce_scatter", "g.0", "gs.0", X, "B0.0", "dp"),
        wait("gs.0", "B0.0"),
        run("acc", "gs.0", "carry:g", "B0.0"),
    ]
    after = [ins for ins in ordered(body, [run("e", "carry:g", "loss:loss", "epilogue")]) if ins.op is not Op.FREE]
    assert sorted(map(str, after)) == sorted(map(str, body))

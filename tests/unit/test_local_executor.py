"""The local executor trains like eager PyTorch in every legal order, and says what is wrong when it cannot."""

from __future__ import annotations

import re
import traceback
from dataclasses import replace

import pytest
import torch

from graphshard.errors import NoValue, OutOfRange, StateMismatch, StuckPlan
from graphshard.execution import ExecutionPlan, Instruction, Op, StagePlan
from graphshard.mesh import Mesh
from graphshard.runtime import executor as executor_module
from graphshard.runtime.local import LocalExecutor
from graphshard.runtime.storage import Storage
from handmade import (
    GPIPE,
    ONE_F_ONE_B,
    SEGMENTS,
    batches,
    eager,
    edited,
    free,
    kind,
    recv,
    refs,
    run,
    segment,
    send,
    two_stages,
    wait,
    weights,
)

STEPS = 4


def start(plan: ExecutionPlan, interleaving: int | None = None) -> tuple[LocalExecutor, Storage]:
    executor = LocalExecutor(plan.mesh, torch.get_default_device(), interleaving=interleaving, measure_memory=True)
    storage = Storage(executor, plan)
    storage.write_model(weights(), {})
    return executor, storage


def one_step(executor: LocalExecutor, plan: ExecutionPlan, step: int = 0) -> float:
    loss = executor.step(plan, batches(plan, step), step=step, lrs=[0.1]).loss
    assert loss is not None
    return loss.item()


@pytest.mark.parametrize("interleaving", [None, 0, 1, 2])
@pytest.mark.parametrize("schedule", [GPIPE, ONE_F_ONE_B, ("F0 B0", "F0 B0")])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_trains_like_eager(dp: int, schedule: tuple[str, str], interleaving: int | None) -> None:
    plan = two_stages(dp, schedule)
    executor, storage = start(plan, interleaving)
    losses = [one_step(executor, plan, step) for step in range(STEPS)]
    expected_losses, expected = eager(plan, STEPS)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    for name, value in storage.read_params().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_interleavings_agree_to_the_bit() -> None:
    plan = two_stages(4)
    runs = []
    for interleaving in (None, 3, 4):
        executor, storage = start(plan, interleaving)
        one_step(executor, plan)
        runs.append(storage.read_params())
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_a_plan_with_fewer_micro_batches_in_flight_keeps_less_alive() -> None:
    peaks = {}
    for name, schedule in (("gpipe", GPIPE), ("1f1b", ONE_F_ONE_B)):
        plan = two_stages(2, schedule)
        executor, _ = start(plan)
        one_step(executor, plan)
        peaks[name] = executor.measured(plan)[2].peak_bytes
    assert peaks["1f1b"] < peaks["gpipe"]


def test_a_value_that_got_a_second_name_does_not_stay_under_the_first() -> None:
    body: list[Instruction] = []
    for microbatch in range(4):
        new, kept = refs(f"new.{microbatch}"), refs("kept")
        body += [run("make", "", f"new.{microbatch}", "F0"), Instruction(Op.BIND, "", new, kept, frozenset(new))]
    made = segment("make", "", "new", "new = torch.ones(256)")
    stage = StagePlan((), (*body, free("kept", "F0")), (), None, {"make": made})
    plan = ExecutionPlan(Mesh(()), (stage,), 4, "", ({},), ({},), {}, {}, {})
    executor = LocalExecutor(plan.mesh, torch.get_default_device(), measure_memory=True)
    executor.step(plan, {0: [[]] * 4})
    assert executor.measured(plan)[0].peak_bytes == 2 * 1024, "the one before, and the new one"


def test_bytes_sent_are_the_least_there_can_be() -> None:
    plan = two_stages(4)
    executor, _ = start(plan)
    one_step(executor, plan)
    full, loss, microbatches = 4 * 16, 4, 3
    gathers = reductions = microbatches * full * 3 // 4
    # Stage 1 gathers once more, for the backward; the loss is reduced over both axes.
    assert executor.sent_bytes[0] == {"dp": gathers + reductions + 2 * loss * 3 // 4, "pp": microbatches * 48 + loss}
    assert executor.sent_bytes[7]["dp"] == 2 * gathers + reductions + 2 * loss * 3 // 4


def test_a_stuck_plan_says_who_waits_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the proof the executor still notices."""
    monkeypatch.setattr(executor_module, "prove", lambda plan: None)
    plan = two_stages(1)
    for stage in (0, 1):
        peer = 1 - stage
        ring = [
            run("zeros", "", "x", "F9"),
            recv("y", peer, kind(1), "F9"),
            wait("y", "F9"),
            send("x", peer, kind(1), "F9"),
            wait("x", "F9"),
            free("x y", "F9"),
        ]
        plan = edited(plan, stage, [*plan.stages[stage].body, *ring])
    for interleaving in (None, 5):
        executor, _ = start(plan, interleaving)
        with pytest.raises(StuckPlan) as caught:
            one_step(executor, plan)
        lines = str(caught.value).splitlines()[1:]
        assert [line.split(", in instruction")[0].strip() for line in lines] == [
            "rank 0 waits for rank 1 to join in transfer",
            "rank 1 waits for rank 0 to join in transfer",
        ]
        assert all("F9 WAIT %y" in line for line in lines)


def test_a_failing_segment_shows_its_source_and_leaves_the_weights() -> None:
    plan = two_stages(2)
    broken = next(s for s in SEGMENTS if s.name == "forward1")
    segments = plan.stages[1].segments | {
        "forward1": replace(broken, source=broken.source.replace("y = h @ w", "y = h @ h"))
    }
    failing = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], segments=segments)))
    executor, storage = start(plan)
    one_step(executor, plan)
    before, state = storage.read_params(), storage.read_state()
    with pytest.raises(RuntimeError) as caught:
        one_step(executor, failing, 1)
    assert "y = h @ h" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert re.fullmatch(r"on rank [23] in instruction 5 F1.0 RUN forward1 .*", caught.value.__notes__[0])
    assert all(torch.equal(before[name], value) for name, value in storage.read_params().items())
    assert storage.read_state().keys() == state.keys()
    one_step(executor, plan, 1)


def test_missing_values_are_named_and_nothing_is_lost() -> None:
    plan = two_stages(1)
    executor, storage = start(plan)
    del executor.stores[1][next(iter(executor.stores[1]))]
    with pytest.raises(NoValue, match=r'shard "b1" @1 \(w1\) has no value yet'):
        one_step(executor, plan)
    storage.write_model(weights(), {})
    one_step(executor, plan)


def test_plans_share_what_is_stored() -> None:
    gpipe, one_f_one_b = two_stages(2, GPIPE), two_stages(2, ONE_F_ONE_B)
    executor, _ = start(gpipe)
    losses = [one_step(executor, plan, step) for step, plan in enumerate([gpipe, one_f_one_b] * 2)]
    torch.testing.assert_close(losses, eager(gpipe, STEPS)[0], rtol=1e-5, atol=1e-6)


def test_state_is_read_and_written_in_full() -> None:
    plan = two_stages(4)
    executor, storage = start(plan)
    assert storage.read_state() == {} and not executor.state_keys
    one_step(executor, plan)
    params, buffers, state = storage.read_params(), storage.read_buffers(), storage.read_state()
    assert buffers == {}
    assert {name: tuple(state[name]["momentum"].shape) for name in state} == {"w0": (4, 4), "w1": (4, 4)}

    smaller = two_stages(2)  # the same model on half the ranks
    again, other = start(smaller)
    other.write_model(params, {})
    other.write_state(state)
    assert all(torch.equal(state[n]["momentum"], other.read_state()[n]["momentum"]) for n in state)
    one_step(again, smaller, 1)
    params_then = other.read_params()
    other.write_model(params, {})
    other.write_state({})
    assert not again.state_keys
    one_step(again, smaller, 1)
    assert not torch.equal(params_then["w0"], other.read_params()["w0"])  # momentum made the difference


def test_state_out_of_range_is_refused_before_anything_is_stored() -> None:
    plan = two_stages(2)
    executor, storage = start(plan)
    one_step(executor, plan)
    before = storage.read_state()
    wide = {name: {"momentum": torch.full((4, 4), 1e39, dtype=torch.float64)} for name in before}
    with pytest.raises(OutOfRange, match=r"state momentum of w0: its largest magnitude, 1e\+39, would become infinite"):
        storage.write_state(wide)
    assert all(torch.equal(before[name]["momentum"], storage.read_state()[name]["momentum"]) for name in before)


def test_wrong_tensors_are_refused_before_anything_is_stored() -> None:
    _, storage = start(two_stages(2))
    before = storage.read_params()
    with pytest.raises(StateMismatch, match=r"w1: given shape \[4, 5\]; expected shape \[4, 4\]"):
        storage.write_model({"w0": torch.zeros(4, 4), "w1": torch.zeros(4, 5)}, {})
    with pytest.raises(StateMismatch, match="w1: given nothing"):
        storage.write_model({"w0": torch.zeros(4, 4)}, {})
    with pytest.raises(StateMismatch, match="state momentum of w1: given nothing"):
        storage.write_state({"w0": {"momentum": torch.zeros(4, 4)}})
    assert all(torch.equal(before[name], value) for name, value in storage.read_params().items())

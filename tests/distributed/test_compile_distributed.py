"""``graphshard.compile`` on gloo processes: everything it gives is what the local executor gives."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.processes import launch
from marks import full


def close(value: Any) -> Any:
    """``value`` for comparison up to float64 rounding, whatever it holds."""
    if isinstance(value, dict):
        return {key: close(item) for key, item in value.items()}
    if isinstance(value, list):
        return [close(item) for item in value]
    return pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value


NVME = f"path={tempfile.gettempdir()}"
PLANS = {
    2: ("dp", "zero3", "pp2:schedule=zb-h1", f"zero3+offload:optimizer=nvme,params=cpu,{NVME}"),
    4: ("zero3+pp2", f"zero1+pp2+offload:optimizer=cpu,params=nvme,activations=nvme,{NVME}"),
}
PIPELINE = "pp2:schedule=1f1b"


@pytest.mark.parametrize("world_size", PLANS)
def test_processes_give_what_one_process_gives(world_size: int) -> None:
    """Starting processes takes longer than the plans: all of them train in the same ones."""
    results = launch("train_rank.py", world_size, "trained", *PLANS[world_size])
    for rank, plan in itertools.product(range(world_size), PLANS[world_size]):
        assert "error" not in results[rank], results[rank]
        local, ours = results[0]["local"][plan], results[rank]["distributed"][plan]
        for what in ("losses", "evaluated", "state", "optimizer"):
            assert ours[what] == close(local[what]), (plan, rank, what)
        # Loading what was saved and stepping again repeats the step that followed the saving.
        assert ours["again"] == close(ours["losses"][-1])
        assert ours["rank0_only"] == (sorted(ours["state"]) if rank == 0 else [])
        assert ours["dp"] == [ours["dp_rank_of_mesh"], local["dp"][1]]
        assert ours["meta"] and not local["meta"]
        assert ours["tied"]
        last = 1 if "pp2" in plan else 0
        if ours["stage"] == last:
            dp_rank, dp_size = ours["dp"]
            rows = len(local["output"]) // dp_size
            assert ours["output"] == close(local["output"][dp_rank * rows : (dp_rank + 1) * rows])
        else:
            assert ours["output"] is None


@pytest.mark.parametrize(("plan", "world_size"), [("zero1+bf16:reduce=bf16", 2), ("zero3+pp2+fp16:init_scale=1024", 4)])
def test_precision_is_the_same_on_processes(plan: str, world_size: int) -> None:
    """Up to the order of sums, of which a rounding to the lower precision may make more."""
    results = launch("train_rank.py", world_size, "mixed", plan)
    for result in results:
        assert "error" not in result, result
        local, ours = results[0]["local"], result["distributed"]
        usual = [loss for index, loss in enumerate(local["losses"]) if index != 1]  # the second may be infinite
        assert [loss for index, loss in enumerate(ours["losses"]) if index != 1] == pytest.approx(usual, rel=1e-2)
        assert ours["scales"] == local["scales"]
        if "fp16" in plan:
            assert [scaler["scale"] for scaler in ours["scales"]] == [1024.0, 512.0, 512.0, 512.0]
        assert ours["dtypes"] == ["torch.float32"]
        for name, values in local["state"].items():
            assert torch.allclose(torch.tensor(ours["state"][name]), torch.tensor(values), rtol=0.0, atol=2e-3), name


@pytest.mark.only_cpu("common memory")
def test_parts_of_parameters_lie_where_all_ranks_read_them() -> None:
    plans = {"zero3+accum2": 1e-6, "zero3+bf16": 2e-2}
    results = launch("train_rank.py", 2, "in_place", *plans)
    for rank, (plan, tolerance) in itertools.product(range(2), plans.items()):
        assert "error" not in results[rank], results[rank]
        local, ours = results[0]["local"][plan], results[rank]["distributed"][plan]
        parts = local["parts"][0][1]
        assert parts > 1 and ours["parts"] == [[parts, parts]] * 6, "of every bucket, after every step"
        for what in ("losses", "weights"):
            found, expected = torch.tensor(ours[what]), torch.tensor(local[what])
            assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), (plan, what)


@pytest.mark.only_cpu("common memory")
def test_a_rank_that_waits_for_all_to_begin_tells_what_it_had_not_told() -> None:
    first, last = launch("train_rank.py", 2, "behind", "pp2")
    assert first == {"outputs": [None, None]}
    assert last["outputs"][0] == last["outputs"][1] is not None


def test_a_meta_model_takes_values_from_a_state_dict_or_init() -> None:
    for result in launch("train_rank.py", 2, "meta", "pp2:schedule=zb-h1"):
        assert result["error"] == "NoValue"
        local, *others = result["losses"]
        assert others == [close(local)] * 3
        assert not result["threads"], "what is left when Python ends may abort the process"


@pytest.mark.parametrize(("plan", "exchange"), [("zero3", "shared memory"), ("zero3+pp2", "gloo")])
def test_what_is_closed_leaves_nothing_in_the_process(plan: str, exchange: str) -> None:
    environment = {"GRAPHSHARD_SHARED_MEMORY": "0"} if exchange == "gloo" else {}
    for result in launch("train_rank.py", 4 if "pp2" in plan else 2, "closed", plan, environment=environment):
        assert "error" not in result, result
        first, *others = result["losses"]
        assert others == [first] * 2
        once, *left = result["left"]
        assert all(threads <= once[0] and files <= once[1] for threads, files in left), result["left"]


def test_what_one_rank_dumps_all_ranks_load(tmp_path: Path) -> None:
    for result in launch("train_rank.py", 2, "loaded", "zero3", str(tmp_path)):
        assert "error" not in result, result
        assert result["executor"] == "distributed"
        assert result["found"] == close(result["expected"])


def test_ranks_with_different_plans_say_so_and_do_not_hang() -> None:
    for result in launch("train_rank.py", 2, "mismatch", "zero3"):
        assert result["error"] == "PlanMismatch"
        assert "ranks disagree on the plan" in result["message"]


def test_ranks_with_different_values_or_calls_say_so_and_go_on() -> None:
    cure = "; every rank must begin with the same values: call torch.manual_seed with the same number"
    weight = f"ValuesDiffer: rank 1 has other values of 'layers.0.weight' than rank 0{cure}"
    peer, own = "PeerNotReady: rank 1 cannot begin", "StateMismatch: centre: given nothing"
    results = launch("train_rank.py", 2, "differing", "zero3", PIPELINE)
    for rank, plan in itertools.product(range(2), ("zero3", PIPELINE)):
        assert "error" not in results[rank], results[rank]
        found = results[rank][plan]
        assert found["far"] < 1e-10
        said = found["said"]
        assert all(said[what].startswith(weight) for what in ("seed", "load before", "load early")), said
        assert said["load after"].startswith("ValuesDiffer: rank 1 has other values of 'centre' than rank 0"), said
        assert said["optimizer"].startswith("ValuesDiffer: rank 1 has other values of 'state "), said
        assert said["steps"].startswith("ValuesDiffer: rank 1 has other values of 'steps' than rank 0"), said
        assert said["options"].startswith("ValuesDiffer: rank 1 has other values of 'betas of group 0[1]'"), said
        assert all(said[what].startswith((peer, own)[rank]) for what in ("one refuses", "one refuses early")), said
        assert said["optimizer of one refuses"].startswith((peer, "OptimizerStateMismatch: ")[rank]), said
        assert said["reading and loading"].startswith(
            "CallMismatch: ranks disagree on the call: ranks 0 have comparing"
        )
        if plan == "zero3":
            assert "rank 1 has no values of 'layers.0.weight', which others have" in said["none"], said
            assert "rank 1 has other values of 'centre' than rank 0" in said["init"], said
            assert said["one traces"].startswith(peer) == (rank == 0), said


@pytest.mark.real_gpu("of an emulated one the host waits")
def test_a_rank_that_reads_while_another_steps_says_so() -> None:
    for result in launch("train_rank.py", 2, "one_reads", PIPELINE):
        assert result["error"] == "CallMismatch", result
        said = result["message"]
        assert "ranks 0 have state_dict, load_state_dict, close or a first step; ranks 1 have a step" in said
        assert "rank0_only=True" in said and "drop_last=True" in said


@pytest.mark.real_gpu("of an emulated one the host waits")
def test_a_disk_that_fails_on_one_rank_ends_all_and_is_named() -> None:
    plan = f"zero3+offload:optimizer=nvme,path={tempfile.gettempdir()}"
    peer, failed = launch("train_rank.py", 2, "given_up", plan, "short read")
    assert failed["error"] == "OffloadFailed" and "short read at byte" in failed["message"]
    assert peer["error"] == "PeerFailed" and "short read at byte" in peer["message"], peer
    refuses_from_now_on(failed, 1, "short read at byte")
    refuses_from_now_on(peer, 0, "rank 0 lost ")


def test_what_one_rank_has_lost_all_ranks_say_when_they_read_it() -> None:
    plan = f"zero3+offload:params=nvme,path={tempfile.gettempdir()}"
    for result in launch("train_rank.py", 2, "lost_by_one", plan):
        assert len(result["said"]) == 2, result
        assert all("was lost when loading it failed; load a checkpoint" in said for said in result["said"])
        assert result["same"]


@pytest.mark.real_gpu("of an emulated one the host waits")
def test_a_rank_that_lacks_values_tells_the_others_when_they_have_begun() -> None:
    plan = f"zero3+offload:params=nvme,path={tempfile.gettempdir()}"
    peer, failed = launch("train_rank.py", 2, "given_up", plan, "lost")
    assert failed["error"] == "ValueLost" and "was lost when loading it failed" in failed["message"]
    assert peer["error"] == "PeerNotReady" and peer["message"].startswith("rank 1 cannot begin the step"), peer
    refuses_from_now_on(failed, 1, "was lost when loading it failed")
    refuses_from_now_on(peer, 0, "rank 1 cannot begin the step")


def test_where_no_rank_has_begun_all_go_on_once_values_are_loaded() -> None:
    plan = f"zero3+offload:params=nvme,path={tempfile.gettempdir()}"
    for result, error in zip(launch("train_rank.py", 2, "not_ready", plan), ("PeerNotReady", "ValueLost"), strict=True):
        assert [said.partition(":")[0] for said in result.get("said", ())] == [error, error], result
        local, ours = result["losses"]
        assert ours == close(local)


@pytest.mark.real_gpu("of an emulated one the host waits")
def test_a_rank_that_refuses_its_batch_tells_the_others_when_they_have_begun() -> None:
    peer, failed = launch("train_rank.py", 2, "given_up", "zero3+accum2", "batch")
    assert failed["error"] == "BatchDoesNotSplit"
    assert peer["error"] == "PeerNotReady" and peer["message"].startswith("rank 1 cannot begin the step"), peer
    refuses_from_now_on(failed, 1, "")
    refuses_from_now_on(peer, 0, "rank 1 cannot begin the step")


@pytest.mark.parametrize("plan", [full("zero3+accum2"), "dp+memory:budget_gb=1"])
def test_where_no_rank_has_begun_a_batch_that_is_refused_is_left_out_by_all(plan: str) -> None:
    for result, error in zip(launch("train_rank.py", 2, "refused", plan), ("PeerNotReady", "ModelFailed"), strict=True):
        assert [said.partition(":")[0] for said in result.get("said", ())] == [error, error], result
        assert result["steps"] == 3 and result["far"] < 1e-10


@pytest.mark.real_gpu("of an emulated one the host waits")
def test_an_interrupted_step_ends_all() -> None:
    plan = f"zero3+offload:optimizer=nvme,path={tempfile.gettempdir()}"
    peer, interrupted = launch("train_rank.py", 2, "given_up", plan, "interrupt")
    assert interrupted["error"] == "KeyboardInterrupt"
    assert peer["error"] == "PeerFailed" and "rank 1 " in peer["message"], peer
    refuses_from_now_on(interrupted, 1, "KeyboardInterrupt")
    refuses_from_now_on(peer, 0, "rank 0 lost ")


def refuses_from_now_on(result: dict[str, Any], rank: int, why: str) -> None:
    """After a step that failed, ``rank`` was asked for another and for its values: one line with the reason."""
    for asked in ("step", "state_dict"):
        said = result[asked]
        assert said.startswith(f"rank {rank} gave up in the middle of what ranks do together (") and why in said, said
        assert said.endswith("; start all processes again from a checkpoint") and "\n" not in said, said


def test_a_budget_is_kept_by_ranks_with_sequences_of_different_lengths() -> None:
    """What changes collectives is chosen once for all ranks; what is computed again follows each rank's shapes."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for lengths, result in zip(
        ((32, 128, 64), (128, 32)), launch("train_rank.py", 2, "uneven", "0.000465"), strict=True
    ):
        assert "error" not in result, result
        assert result["losses"] == pytest.approx(result["free"], rel=1e-5)
        assert result["far"] < 1e-5
        for length, peak, repeated in zip(lengths, result["peaks"], result["repeated"], strict=True):
            assert peak <= 465_000
            by_length.setdefault(length, []).append((peak, repeated))
    assert all(len(set(found)) == 1 for found in by_length.values()), "whoever has it, and in whichever step"
    assert {length: found[0][1] > 0 for length, found in by_length.items()} == {32: False, 64: False, 128: True}

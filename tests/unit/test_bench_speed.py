"""The speed benchmark of a GPU, all but its timer: what it takes for measuring, what it makes of parts that fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import speed
from generated import function_code
from kernel_rows import CASES, checked, kernel_rows
from llama import Llama, LlamaSizes
from llama_rows import SIZES, llama_rows
from peak_flops import peak_flops
from speed_part import PARTS
from speed_rows import COPY, EAGER, FUSED, INDUCTOR, OURS, Record, Row, Setting
from speed_table import missed, section

CPU = torch.device("cpu")


def part_of(*rows: Row, scale: str = "full", **more: Any) -> dict[str, Any]:
    return {"rows": [vars(row) for row in rows], "scale": scale, "skipped": [], **more}


def test_parts_run_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.md"
    (tmp_path / "results.json").write_text(json.dumps({"offload": part_of(machine="another", when="before")}))
    status = speed.main(["--device=cpu", "--quick", "--only", "update", "swiglu", "--output", str(output)])
    assert status == 0, capsys.readouterr().out
    results = json.loads(output.with_suffix(".json").read_text())
    assert list(results) == ["update", "offload", "swiglu"], "what was known of other parts stays, in order"
    for row in results["update"]["rows"]:
        assert row["seconds"].keys() == {OURS, FUSED, COPY}
    forward, backward = results["swiglu"]["rows"][:2]
    for row in (forward, backward):
        assert row["seconds"].keys() == {OURS, EAGER, INDUCTOR, COPY}, "all of it is one region by itself"
    assert "blocks of 1024 elements" in forward["facts"][OURS]
    text = output.read_text()
    assert "another; before" in text and "torch.compile | copy |" in text and "tiny sizes" in text


def test_a_step_is_the_same_training_on_all_sides(tmp_path: Path) -> None:
    record, plan = Record(tmp_path / "part.json", 60.0), "dp1+recompute:policy=full"
    llama_rows({OURS: plan}, True, Setting(CPU, "tiny"), record)
    (row,) = record.rows
    assert not row.failed and row.seconds.keys() == {OURS, EAGER, INDUCTOR}
    assert len(row.facts["losses"]) == 3
    (line, *_) = [line for line in section("llama", part_of(row, scale="tiny")) if line.startswith(f"| {OURS}")]
    assert f"`{plan}`" in line


def test_losses_that_differ_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_rows._ours", lambda *_: lambda: torch.tensor(1.0))
    monkeypatch.setattr("llama_rows._theirs", lambda *_: lambda: torch.tensor(99.0))
    record = Record(tmp_path / "part.json", 60.0)
    llama_rows({OURS: "dp1"}, False, Setting(CPU, "tiny"), record)
    assert "losses differ from eager's 99.0000" in record.rows[0].failed[OURS]


def test_parameters_that_multiply_are_all_but_the_norms() -> None:
    sizes = SIZES["tiny"]
    counted = sum(p.numel() for name, p in Llama(sizes).named_parameters() if "norm" not in name)
    assert sizes.parameters == counted
    assert LlamaSizes().parameters == pytest.approx(1.236e9, rel=1e-3)
    one = LlamaSizes(layers=1, width=4, heads=1, kv_heads=1, inner=8, vocabulary=10, sequence=2, batch=3)
    assert one.flops == 6 * (6 * (4 * 16 + 3 * 32 + 40) + 12 * 4 * 2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GB10", None),
    ],
)
def test_peaks_go_by_words_of_the_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_code_that_is_off_is_not_timed() -> None:
    other = torch.empty(4, 64, device="meta")
    code = function_code(torch.nn.functional.gelu, [(4, 64)], torch.float32, other)["forward"]
    assert not code.kernels, "alone, an operator is no region"
    checked(code, CPU)()
    code.segment = replace(code.segment, source=code.segment.source.replace("gelu", "relu"))
    with pytest.raises(AssertionError, match="is off by"):
        checked(code, CPU)


def test_out_of_time_begins_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path / "part.json", 0.0)
    kernel_rows("softmax", Setting(CPU, "tiny"), record)
    assert not record.rows
    assert json.loads((tmp_path / "part.json").read_text())["skipped"] == ["bf16 [4, 64]", "fp32 [4, 64]"]
    assert speed.run_part("softmax", "cpu", "tiny", 1.0, most=0.0)["skipped"]


def test_a_part_that_dies_leaves_what_it_had_and_the_next_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "output = sys.argv[-1].removeprefix('--output=')\n"
        "row = {'title': 'half', 'seconds': {'graphshard': 1.0, 'eager': 2.0}, 'failed': {}, 'facts': {}}\n"
        "open(output, 'w').write(json.dumps({'rows': [row], 'skipped': []}))\n"
        "if sys.argv[1] == 'softmax':\n"
        "    print('CUDA error: an illegal memory access')\n"
        "    sys.exit(3)\n"
    )
    monkeypatch.setattr(speed, "WORKER", worker)
    output = tmp_path / "results.md"
    assert speed.main(["--device=cpu", "--quick", "--only", "softmax", "swiglu", "--output", str(output)]) == 1
    results = json.loads(output.with_suffix(".json").read_text())
    assert results["softmax"]["died"] == "exit status 3: CUDA error: an illegal memory access"
    assert "died" not in results["swiglu"] and results["softmax"]["rows"][0]["title"] == "half"
    assert "- exit status 3: CUDA error" in output.read_text()


def test_a_part_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(speed, "WORKER", worker)
    assert speed.run_part("softmax", "cpu", "tiny", 1.0, most=0.5)["died"] == "ended after 0 s"


def test_ratios_and_what_is_less_than_wanted() -> None:
    fast = Row("fast", {OURS: 1e-4, INDUCTOR: 1.5e-4, COPY: 0.9e-4}, facts={"bytes": 2e8})
    slow = Row("slow", {OURS: 2e-4, INDUCTOR: 1e-4, COPY: 1e-4}, {"Liger": "ImportError: no"}, {"bytes": 2e8})
    lines = section("softmax", part_of(fast, slow))
    assert "| fast | 100.0 µs | 2000 | 1.50 |  | 0.90 |" in lines
    assert "| slow | 200.0 µs | 1000 | 0.50 ✗ | failed | 0.50 ✗ |" in lines
    assert "- slow, Liger: ImportError: no" in lines
    assert [line.partition(":")[0] for line in missed("softmax", part_of(fast, slow))] == ["softmax, slow"] * 2
    assert not missed("softmax", part_of(slow, scale="quick"))
    assert not missed("offload", part_of(slow))


def test_every_part_has_a_name_to_ask_for_it() -> None:
    assert set(PARTS) >= {"update", "llama", "recompute", "offload", "rms-norm", "cross-entropy"}
    assert len(PARTS) == 4 + len(CASES)
    with pytest.raises(SystemExit):
        speed.main(["--device=cpu"])

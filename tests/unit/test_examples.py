"""The examples run, with every rank inside this process, and do what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import huggingface
import my_pass
import train_gpt


def test_train_gpt_learns_and_leaves_its_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--layers=2 --width=32 --heads=2 --context=16 --batch=8 --steps=6 --evaluations=2 --sample=3 --lr=0.01"
    plan = "--plan=zero3:size=2+pp2:microbatches=2"
    assert train_gpt.main([plan, *sizes.split(), f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    found = re.search(r"held-out text: ([\d.]+) bits per byte before training, ([\d.]+) after", said)
    assert found is not None
    assert float(found[2]) < float(found[1]) < 9
    assert "def " in said  # the sample begins with the prompt
    assert all(name in said for name in ("one device", "pipeline-cut", "of one device"))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(6))
    assert all(record["sent_bytes"] > 0 for record in records)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "dump" / "00-capture.graph").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan=zeor3"], "did you mean 'zero3'?"),
        (["--plan=zero3:size=2", "--batch=7"], "does not split into 2 data-parallel ranks"),
    ],
)
def test_train_gpt_says_what_is_wrong_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_gpt.main([*arguments, f"--out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_transformers_model_trains_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    huggingface.main(["--plan=zero3:size=2+pp2", "--steps=8"])
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < losses[0] / 1.2
    assert "load into a fresh GPT2LMHeadModel" in said


def test_my_pass_shows_what_it_changed(capsys: pytest.CaptureFixture[str]) -> None:
    my_pass.main()
    assert 'approximate: default -> "tanh"' in capsys.readouterr().out

"""The main job's text: the same on every rank and in every run, held-out files apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.corpus import Corpus


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for i in range(64):
        path = tmp_path / "package" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# file {i}\n" * 4)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("assert no_test_is_read\n")
    return tmp_path


def test_files_are_either_trained_on_or_held_out(library: Path) -> None:
    corpus = Corpus.read(8, library)
    train, held_out = bytes(corpus.train.tolist()), bytes(corpus.held_out.tolist())
    assert corpus.files + corpus.held_out_files == 64
    for i in range(64):
        assert (b"# file %d\n" % i in train) != (b"# file %d\n" % i in held_out)
    assert b"no_test_is_read" not in train + held_out


def test_a_new_file_moves_no_other(library: Path) -> None:
    before = Corpus.read(8, library).held_out
    (library / "package" / "zz_last.py").write_text("# new\n")
    after = Corpus.read(8, library).held_out
    assert torch.equal(after[: len(before)], before)


def test_targets_are_the_next_bytes(library: Path) -> None:
    corpus = Corpus.read(8, library)
    x, y = corpus.batch(4, step=3, seed=0)
    assert x.shape == y.shape == (4, 8)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(corpus.batch(4, step=3, seed=0)[0], x)
    assert not torch.equal(corpus.batch(4, step=4, seed=0)[0], x)
    assert [tuple(a.shape) for a, _ in corpus.held_out_batches(4, 3)] == [(4, 8)] * 3


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="too little"):
        Corpus.read(8, tmp_path)

"""What a dump writes parses back to what prints the same, at capture and after every pass; ``-m full``: every model."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import graphshard
from graphshard import text
from marks import few
from models import zoo


@pytest.mark.parametrize("name", few(zoo.MODELS, ("mlp", "convnet", "nested", "gpt2")))
def test_dumped_graphs_read_back_as_they_were(name: str, tmp_path: Path) -> None:
    model, (args, kwargs), loss_fn = zoo.MODELS[name]()
    graphshard.compile(
        model,
        "zero3+pp2",
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
        example_inputs=(args, kwargs),
        world_size=4,
        executor="none",
        dump_dir=tmp_path,
    )
    graphs = sorted(tmp_path.glob("*.graph"))
    names = [path.stem.partition("-")[2] for path in graphs]
    assert names == ["capture", "normalize", "pipeline-cut", "zero", "bucket", "hoist", "overlap", "fuse"]
    for path in graphs:
        assert text.to_text(text.read(path)) == path.read_text(), path.name

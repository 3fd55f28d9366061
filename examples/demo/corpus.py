"""Text that every Python installation has: the source of its standard library, some files of it held out."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, as uint8 tensors."""

    train: Tensor
    held_out: Tensor
    files: int
    held_out_files: int
    context: int

    @classmethod
    def read(cls, context: int, folder: Path | None = None) -> Corpus:
        """The ``*.py`` files below ``folder`` (None: the running Python's library), in order of their paths.

        A file is held out by a checksum of its path: which ones are does not depend on what else is installed.

        Raises:
            FileNotFoundError: too little source there for sequences of ``context`` bytes.
        """
        root = folder or Path(sysconfig.get_path("stdlib"))
        paths = sorted(p for p in root.rglob("*.py") if not _NOT_LIBRARY.intersection(p.relative_to(root).parts))
        parts: dict[bool, list[bytes]] = {False: [], True: []}
        for path in paths:
            out = zlib.crc32(path.relative_to(root).as_posix().encode()) % _HELD_OUT_ONE_IN == 0
            parts[out].append(path.read_bytes())
        texts = {out: b"".join(files) for out, files in parts.items()}
        if any(len(text) <= context + 1 for text in texts.values()):
            raise FileNotFoundError(f"{root} holds too little Python source to train on")
        train, held_out = (torch.frombuffer(bytearray(texts[out]), dtype=torch.uint8) for out in (False, True))
        return cls(train, held_out, len(parts[False]), len(parts[True]), context)

    def batch(self, size: int, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [size, context] at places of the training text that depend on step and seed alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - self.context, (size,), generator=generator)
        return self._at(self.train, starts)

    def held_out_batches(self, size: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``count`` batches spread evenly over the held-out text, always the same."""
        starts = torch.linspace(0, len(self.held_out) - self.context - 1, size * count).long()
        for part in starts.split(size):
            yield self._at(self.held_out, part)

    def _at(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = text[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

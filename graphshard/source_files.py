"""Generated Python in files: what needs one, as Triton does, is imported from where its content says."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

from graphshard.files import write_atomic

CACHE = Path.home() / ".cache" / "graphshard"
"""What graphshard keeps between runs."""
KERNELS = CACHE / "kernels"
"""Where generated kernels are kept."""


def imported(name: str, source: str, folder: Path) -> ModuleType:
    """The module of ``source``, from a file in ``folder`` named after ``name`` and what it contains.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = folder / f"{name}_{digest}.py"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, source)
    spec = importlib.util.spec_from_file_location(f"graphshard_kernels.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

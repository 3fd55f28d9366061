"""Generated files on disk, imported from there, and compiled ahead of time for a GPU that need not be present."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphshard.execution import Kernel
from graphshard.region import Region
from graphshard.source_files import imported


@dataclass(frozen=True)
class Compiled:
    """One launch of a kernel, compiled. Registers are those of a thread; None where the target's tools do not say."""

    name: str
    registers: int | None
    spills: int | None  # bytes of a thread's registers that are kept in memory
    shared_bytes: int
    binary: bytes
    assembly: str  # PTX, or AMD's
    arguments: tuple[Any, ...]  # tensors without data, and sizes


def load_kernel(kernel: Kernel, cache_dir: Path | str) -> Callable[..., Any]:
    """The kernel's function, imported from a file in ``cache_dir`` named after what it contains.

    Raises:
        OSError: the directory cannot be made or written to.
    """
    return getattr(imported(kernel.name, kernel.source, Path(cache_dir)), kernel.name)  # type: ignore[no-any-return]


def compile_for(kernel: Kernel, region: Region, target: Any, cache_dir: Path | str) -> list[Compiled]:
    """Compile every launch of the kernel for ``target``, a ``triton.backends.compiler.GPUTarget``, with no GPU.

    Types and sizes are those of the region's inputs. The file goes to ``cache_dir``.
    """
    import triton  # here, because it looks for drivers when it is imported
    from triton.compiler import ASTSource

    results = []
    for function, arguments, options in _launches(kernel, region, Path(cache_dir)):
        names = function.arg_names
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in options.items() if k in names}
        for at, name in enumerate(names):
            value = values[name]
            if function.params[at].is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = triton.runtime.jit.mangle_type(value)
            aligned = isinstance(value, Tensor) or value % 16 == 0
            if aligned:  # as a call does: memory of an allocator, and sizes that are multiples
                attributes[(at,)] = [["tt.divisibility", 16]]
        chosen = {k: v for k, v in options.items() if k not in names}
        source = ASTSource(function, signature, constants, attributes)
        done = triton.compile(source, target=target, options=chosen)
        binary = done.asm.get("cubin") or done.asm["hsaco"]
        registers, spills = _resources(done.asm, target.backend)
        text = done.asm.get("ptx") or done.asm["amdgcn"]
        results.append(Compiled(function.__name__, registers, spills, done.metadata.shared, binary, text, arguments))
    return results


def _launches(kernel: Kernel, region: Region, cache_dir: Path) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What the launcher would launch: it runs on tensors without data, with functions that only take notes."""
    noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    module = imported(kernel.name, kernel.source, cache_dir)

    class Note:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: noted.append((self.function, args, kwargs))

    for name, value in list(vars(module).items()):
        if name.startswith(f"{kernel.name}_kernel"):
            setattr(module, name, Note(value))
    getattr(module, kernel.name)(*(_meta(node.meta["val"]) for node in region.inputs))
    return noted


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _resources(asm: Mapping[str, Any], backend: str) -> tuple[int | None, int | None]:
    """Registers and spilled bytes, as the assembler's own tools read them from the binary."""
    if backend == "hip":
        text = asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        spills = re.findall(r"\.(?:v|s)gpr_spill_count:\s+(\d+)", text)
        return int(registers[1]) if registers else None, 4 * sum(map(int, spills))

    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)

"""A folder with everything that is needed to run a compiled model without compiling it: ``manifest.json``, and for each
plan the files that codegen/emit.py writes, of the first one in the folder itself, of others in folders below.

Everything is text, JSON or safetensors; reading one runs nothing. The manifest is written last and has a hash of every
file, so that a folder that was written in part, or changed, is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._pytree import treespec_dumps, treespec_loads

from graphshard import text
from graphshard.built import Built
from graphshard.codegen import emit
from graphshard.dump_folder import BUFFERS, MANIFEST, finish, mark
from graphshard.errors import NotAPlanDirectory, PlanDirectoryChanged, PlanDirectoryMisfit
from graphshard.files import write_atomic
from graphshard.mesh import Mesh
from graphshard.model_flags import NamedFlags
from graphshard.program import Program
from graphshard.runtime import tuning
from graphshard.saved.model import ModelRecord
from graphshard.saved.optimizer import OptimizerRecord
from graphshard.saved.typed_json import decode, encode
from graphshard.version import __version__

logger = logging.getLogger("graphshard")

FORMAT = 2


@dataclass(frozen=True)
class PlanRecord:
    """A :class:`graphshard.built.Built` but for its plan, which is in a folder."""

    mode: str
    folder: str  # "": the plan directory itself
    inputs: tuple[str, ...]
    flags: NamedFlags
    options: tuple[dict[str, str], ...]
    out_spec: str = ""  # as torch's pytree spells it in JSON; "": None
    output_leaves: str = "[]"  # in JSON
    output_dims: str = "[]"  # likewise
    apart: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What the folder is for, and what it must consist of."""

    graphshard: str  # version that wrote it
    torch: str
    plan: str
    mesh: Mesh
    seed: int
    model: ModelRecord
    optimizer: OptimizerRecord | None
    program: str  # the file with the first plan's graphs after the last pass
    plans: tuple[PlanRecord, ...] = ()  # what was compiled first, first
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of each
    fingerprint: str = ""  # SHA-256 of all of the above

    @property
    def code(self) -> list[str]:
        """The files with Python code, which steps run."""
        return [name for name in self.files if name.endswith(".py")]


@dataclass(frozen=True)
class PlanDirectory:
    """A folder that was read and found whole."""

    path: Path
    manifest: Manifest
    contents: Mapping[str, bytes]

    def builds(self) -> list[Built]:
        """What was compiled, that first which was first."""
        return [self._built(record) for record in self.manifest.plans]

    def _built(self, record: PlanRecord) -> Built:
        prefix = _prefix(record.folder)
        inside = {name.removeprefix(prefix): data for name, data in self.contents.items() if name.startswith(prefix)}
        return Built(
            plan=emit.parse(inside),
            mode=record.mode,  # type: ignore[arg-type]
            inputs=record.inputs,
            flags=record.flags,
            apart=frozenset(record.apart),
            options=record.options,
            out_spec=treespec_loads(record.out_spec) if record.out_spec else None,
            output_leaves=tuple(json.loads(record.output_leaves)),
            output_dims=tuple(json.loads(record.output_dims)),
        )

    def program(self) -> Program:
        """The graphs of what was compiled first, after the last pass."""
        name = self.manifest.program
        beside = self.contents.get(_constants_of(name))
        return text.parse(self.contents[name].decode(), None if beside is None else load(beside))

    def buffers(self) -> dict[str, Tensor]:
        """Values of buffers that are in no state_dict()."""
        return load(self.contents[BUFFERS]) if BUFFERS in self.contents else {}


def write(
    folder: Path,
    manifest: Manifest,
    builds: Iterable[Built],
    buffers: Mapping[str, Tensor],
) -> None:
    """Write ``builds`` beside the graphs that are in ``folder`` already, and then ``manifest`` with a list of them and
    the hashes. Until that is there, the folder cannot be loaded. A call that returns what JSON cannot say is left out,
    with a warning."""
    mark(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    contents: dict[str, bytes] = {}
    records = []
    for index, built in enumerate(builds):
        try:
            record = _record(built, f"{built.mode}-{index}" if index else "")
        except (NotImplementedError, TypeError) as error:
            logger.warning("graphshard: %s: a call's plan is left out, because of its output: %s", folder, error)
            continue
        records.append(record)
        files = emit.files(tuning.described(built.plan))
        contents |= {_prefix(record.folder) + name: data for name, data in files.items()}
    if buffers:
        contents[BUFFERS] = save({name: value.detach().cpu().contiguous().clone() for name, value in buffers.items()})
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, data)
    graphs = (manifest.program, _constants_of(manifest.program))
    contents |= {name: (folder / name).read_bytes() for name in graphs if (folder / name).is_file()}
    hashes = {name: _hash(data) for name, data in sorted(contents.items())}
    complete = replace(manifest, plans=tuple(records), files=hashes)
    complete = replace(complete, fingerprint=_fingerprint(complete))
    items = {"format": FORMAT, **encode(complete)}.items()
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in items)
    write_atomic(folder / MANIFEST, f"{{\n{lines}\n}}\n")
    finish(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``, which this version of graphshard and torch can run.

    Raises:
        NotAPlanDirectory: there is none, it is cut short, or it is of another format.
        PlanDirectoryChanged: it is not as it was written.
        PlanDirectoryMisfit: other versions wrote it.
    """
    data = _json(folder)
    if data.pop("format", None) != FORMAT or not {"torch", "graphshard"} <= data.keys():
        raise NotAPlanDirectory(str(folder), f"its {MANIFEST} is none of format {FORMAT}")
    # Versions first: those of another one may have fields that this one cannot read.
    for name, here in (("torch", torch.__version__), ("graphshard", __version__)):
        if _minor(str(data[name])) != _minor(here):
            expected = f"{name} {_minor(str(data[name]))}.* (it was written by {data[name]})"
            raise PlanDirectoryMisfit(str(folder), expected, f"{name} {here}")
    try:
        manifest = decode(Manifest, data)
    except (TypeError, KeyError, ValueError, AttributeError):
        raise PlanDirectoryChanged(str(folder), MANIFEST) from None
    if manifest.fingerprint != _fingerprint(manifest):
        raise PlanDirectoryChanged(str(folder), MANIFEST)
    return manifest


def read(folder: Path, manifest: Manifest) -> PlanDirectory:
    """All files of the folder.

    Raises:
        NotAPlanDirectory: a file is missing or cannot be read.
        PlanDirectoryChanged: a file is not as it was written.
    """
    contents = {}
    for name, digest in manifest.files.items():
        try:
            contents[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            raise NotAPlanDirectory(str(folder), f"its {name} is missing") from None
        except OSError as error:
            raise _unreadable(folder, name, error) from None
        if _hash(contents[name]) != digest:
            raise PlanDirectoryChanged(str(folder), name)
    return PlanDirectory(folder, manifest, contents)


def _json(folder: Path) -> dict[str, object]:
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotAPlanDirectory(str(folder), f"it has no {MANIFEST}") from None
    except OSError as error:
        raise _unreadable(folder, MANIFEST, error) from None
    except (ValueError, RecursionError) as error:
        raise NotAPlanDirectory(str(folder), f"its {MANIFEST} is not whole ({error})") from None
    return data if isinstance(data, dict) else {}


def _unreadable(folder: Path, name: str, error: OSError) -> NotAPlanDirectory:
    return NotAPlanDirectory(str(folder), f"its {name} cannot be read ({error.strerror})")


def _record(built: Built, folder: str) -> PlanRecord:
    spec = "" if built.out_spec is None else treespec_dumps(built.out_spec)
    leaves, dims = json.dumps(built.output_leaves), json.dumps(built.output_dims)
    apart = tuple(sorted(built.apart))
    return PlanRecord(built.mode, folder, built.inputs, built.flags, built.options, spec, leaves, dims, apart)


def _prefix(folder: str) -> str:
    return f"{folder}/" if folder else ""


def _constants_of(graph: str) -> str:
    """The file with the constants of a graph's text, if it has any."""
    return str(Path(graph).with_suffix(".safetensors"))


def _minor(version: str) -> str:
    """``2.13`` of ``2.13.0+cpu``."""
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else version


def _fingerprint(manifest: Manifest) -> str:
    return _hash(json.dumps(encode(replace(manifest, fingerprint="")), sort_keys=True).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""Execution plans on disk, by key: a second start of a program takes its plan from here instead of compiling it.

An entry is a folder with the files that codegen/emit.py writes, as in a plan directory, and a list of their hashes. It
is written beside its place and renamed, so that it is there whole or not at all. Its code is run without being asked
for: the folder is made for its owner alone, and one that somebody else could write to is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from graphshard.codegen import emit
from graphshard.execution import ExecutionPlan
from graphshard.files import write_atomic
from graphshard.source_files import CACHE
from graphshard.units import human

logger = logging.getLogger("graphshard")

PLANS = CACHE / "plans"
"""Where plans are kept unless a caller names another folder."""
MOST_BYTES = 512 * 2**20
"""What all entries together may take: the ones not used for longest are removed."""
SWITCH = "GRAPHSHARD_CACHE"
"""``0`` in the environment: no cache where no folder is named."""
_LIST = "files.json"
_ABANDONED_S = 3600.0  # an unfinished entry that is older belongs to a process that has died


@dataclass(frozen=True)
class PlanCache:
    """The entries of one folder."""

    folder: Path
    most_bytes: int = MOST_BYTES

    def path(self, key: str) -> Path:
        """Where the entry of ``key`` is, or would be."""
        return self.folder / key

    def read(self, key: str) -> ExecutionPlan | None:
        """The plan that was stored under ``key``; None without one. What is not whole is removed, with a warning."""
        path = self.path(key)
        try:
            if not path.exists() or not self._is_ours():
                return None
            listed = json.loads((path / _LIST).read_bytes())
            contents = {name: (path / name).read_bytes() for name in listed}
            changed = [name for name, data in contents.items() if hashlib.sha256(data).hexdigest() != listed[name]]
            if not changed:
                plan = emit.parse(contents)
                os.utime(path)  # used now
                return plan
            problem = f"its {changed[0]} has been changed"
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        logger.warning("graphshard: %s is no whole plan (%s); compiling anew", path, problem)
        _remove(path)
        return None

    def write(self, key: str, plan: ExecutionPlan) -> None:
        """Store ``plan`` under ``key``, and make room for it. A folder that cannot be written to is a warning."""
        contents = emit.files(plan)
        unfinished = self.folder / f".{key[:8]}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_ours():
                return
            self._trim(sum(map(len, contents.values())))
            unfinished.mkdir(mode=0o700)
            for name, data in contents.items():
                (unfinished / name).write_bytes(data)
            hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
            write_atomic(unfinished / _LIST, json.dumps(hashes))
            if not self.path(key).is_dir():  # another rank may have been faster
                _remove(self.path(key))
                unfinished.rename(self.path(key))
        except OSError as error:
            logger.warning("graphshard: the plan is not kept for the next start: %s", error)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _is_ours(self) -> bool:
        """Whether nobody else can have put code there."""
        found = self.folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return True
        logger.warning("graphshard: %s is not used: others can write to it; chmod 700 it", self.folder)
        return False

    def _trim(self, more: int) -> None:
        """Remove what has not been used for longest until ``more`` bytes fit, and what was left unfinished."""
        now, entries = time.time(), []
        for path in self.folder.iterdir():
            try:
                used = path.stat().st_mtime
                size = sum(file.stat().st_size for file in path.iterdir())
            except OSError:
                continue  # another process has just removed it
            if path.name.startswith("."):
                if now - used > _ABANDONED_S:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            entries.append((used, size, path))
        total = more + sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.most_bytes:
                break
            shutil.rmtree(path, ignore_errors=True)
            logger.info("graphshard: removed %s (%s) from the cache", path, human(size))
            total -= size


def _remove(path: Path) -> None:
    """Remove what is in an entry's place, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def open_cache(where: bool | str | Path) -> PlanCache | None:
    """The cache that ``compile(cache=where)`` means."""
    if not isinstance(where, bool):
        return PlanCache(Path(where))
    return PlanCache(PLANS) if where and os.environ.get(SWITCH) != "0" else None

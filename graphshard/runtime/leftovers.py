"""Files that have a name for a moment: it says who made them, so that what a killed process left can be removed."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

_PREFIX = ".graphshard-"


@dataclass(frozen=True)
class Owner:
    """A process: the machine and when that was booted (hashes), the space that its id is of, and when it began (ticks
    since boot). "0" for what the system does not tell."""

    machine: str
    boot: str
    namespace: str
    pid: str
    began: str

    @classmethod
    def this(cls) -> Owner:
        """Who runs this."""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()
            space = Path("/proc/self/ns/pid").stat().st_ino
            return cls(_short(platform.node()), _short(boot), str(space), str(os.getpid()), _began(os.getpid()))
        return cls(_short(platform.node()), "0", "0", str(os.getpid()), "0")

    def is_gone(self) -> bool:
        """Whether it has certainly ended; one on another machine or in another container is not known to."""
        here = Owner.this()
        if self.machine != here.machine:
            return False
        if self.boot != here.boot:
            return True
        if self.namespace != here.namespace:
            return False
        try:
            os.kill(int(self.pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's process
        return _began(int(self.pid)) != self.began  # the id was given out again


def make_file(folder: str) -> tuple[int, str]:
    """A new file of this process, open, and its path."""
    return tempfile.mkstemp(dir=folder, prefix=f"{_PREFIX}{'-'.join(astuple(Owner.this()))}-")


def remove_leftovers(folder: str) -> None:
    """Remove what processes that are gone have made in the folder."""
    for file in Path(folder).glob(f"{_PREFIX}*"):
        parts = file.name.removeprefix(_PREFIX).split("-")
        if len(parts) == 6 and parts[3].isdigit() and Owner(*parts[:5]).is_gone():
            with suppress(OSError):  # another user's, or removed meanwhile
                file.unlink()


def _began(pid: int) -> str:
    """Field 22 of proc(5)'s stat; the command in field 2 may have blanks and parentheses."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return "0"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]

"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Write ``data`` (a str as UTF-8) to ``path``: readers see the old content or the new, never a part of it.

    Raises:
        OSError: ``path`` is a directory, or its own one does not exist or cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; expected the name of a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {str(path.parent)!r} to write it to", str(path))
    # In the same directory, because a rename is atomic only within one file system.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with unfinished.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        unfinished.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        unfinished.unlink(missing_ok=True)

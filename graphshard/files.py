"""Files that are either whole or absent."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_atomic(path: Path | str, data: str | bytes) -> None:
    """Write ``data`` (a str as UTF-8) to ``path``: readers see the old content or the new, never a part of it.

    Raises:
        OSError: the directory does not exist or cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    # In the same directory, because a rename is atomic only within one file system.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with unfinished.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        unfinished.replace(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    finally:
        unfinished.unlink(missing_ok=True)

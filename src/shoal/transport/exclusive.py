"""A file that one process at a time holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


def hold(path: Path) -> IO[bytes]:
    """Holds it until it is closed, or its process ends. Raises OSError: somebody else does, or it cannot be made."""
    file = path.open("a+b")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file

"""Small results that took a while, kept on disk by name: what a file's hash is, how fast this device computes a model.

A cache: whatever cannot be read or written costs time, never the answer.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import platformdirs


class KeptRecords:
    """JSON values by key, in one file of `folder`, the system's folder for caches if not given."""

    def __init__(self, name: str, *, folder: Path | None = None) -> None:
        self._path = (folder or Path(platformdirs.user_cache_dir("shoal"))) / f"{name}.json"

    def get(self, key: str) -> object | None:
        """What is kept there, if anything."""
        return self._load().get(key)

    def put(self, key: str, value: object) -> None:
        """Keeps it, or not."""
        records = {**self._load(), key: value}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(records, indent=1))
            temporary.replace(self._path)

    def _load(self) -> dict[str, object]:
        try:
            records = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return records if isinstance(records, dict) else {}

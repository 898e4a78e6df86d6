"""What `shoal up` uses on this device where nothing is typed: `settings.json` in the device's folder.

Values are kept as they would be typed; who reads them checks them as if they had been.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from shoal.errors import CannotWrite, DamagedFile

Value = str | bool | list[str]


def read_settings(folder: Path) -> dict[str, Value]:
    """By the option's name, such as `dial-only`; empty where nothing was set.

    Raises:
        DamagedFile: the file is no object of texts, switches and lists of texts.
    """
    path = folder / "settings.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} cannot be read ({error}): mend it, or delete it and set again (`shoal config`)") from None
    if not isinstance(found, dict) or not all(_is_value(value) for value in found.values()):
        raise DamagedFile(f"{path} holds more than names with texts, true, false or lists of texts: mend it, or delete it")
    return found


def write_settings(folder: Path, settings: Mapping[str, Value]) -> None:
    """All of them, at once. Raises CannotWrite."""
    path, temporary = folder / "settings.json", folder / f"settings.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(dict(sorted(settings.items())), indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CannotWrite(f"{path}: {error.strerror or error}") from error


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return isinstance(value, (str, bool))

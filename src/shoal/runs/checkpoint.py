"""A run on disk: a safetensors file per checkpoint, with the ledger in its metadata, so that both are of one step.

Any reader of safetensors opens it. A file appears under its name when all of it is on disk. The newest sound one counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.errors import CannotWrite, DamagedFile
from shoal.exchange.pull import ByteArray
from shoal.runs.votes import sync_folder
from shoal.training.ledger import Entry

KEPT = 3
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_KEY = "shoal"


class Checkpoint(msgspec.Struct, frozen=True):
    """What a file says beside the state: `about` is the state's own, `history` the ledger."""

    run: str
    fingerprint: str
    history: list[Entry]
    about: dict[str, object]
    state_hash: str


def write(folder: Path, checkpoint: Checkpoint, state: ByteArray) -> Path:
    """Writes it, and removes all but the newest few.

    Args:
        state: a safetensors file without metadata.

    Raises:
        CannotWrite: no room, or no permission.
    """
    header, data = _split(state)
    header = {_METADATA: {_KEY: msgspec.json.encode(checkpoint).decode()}, **header}
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    path = folder / f"step-{len(checkpoint.history):010}.safetensors"
    scratch = path.with_suffix(f".{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(_LENGTH.pack(len(encoded)))
            file.write(encoded)
            file.write(memoryview(data))  # type: ignore[arg-type]  # numpy arrays export buffers
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise CannotWrite(f"the checkpoint {path} cannot be written: {error.strerror}") from error
    for old in files(folder)[:-KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def files(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(folder.glob("step-*.safetensors")) if folder.is_dir() else []


def read(path: Path) -> tuple[Checkpoint, ByteArray]:
    """One file.

    Raises:
        DamagedFile: it is not what was written.
    """
    try:
        header, data = _split(np.fromfile(path, np.uint8))
        checkpoint = msgspec.json.decode(header.pop(_METADATA)[_KEY], type=Checkpoint)
    except (OSError, struct.error, ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
        raise DamagedFile(f"{path} is no checkpoint of a run ({error})") from error
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    state = np.concatenate([np.frombuffer(_LENGTH.pack(len(encoded)) + encoded, np.uint8), data])
    if state_hash(state) != checkpoint.state_hash:
        raise DamagedFile(f"{path} does not hold the state that was written to it")
    return checkpoint, state


def _split(file: ByteArray) -> tuple[dict[str, Any], ByteArray]:
    """A safetensors file's header and data."""
    (length,) = _LENGTH.unpack(file[: _LENGTH.size].tobytes())
    header = msgspec.json.decode(file[_LENGTH.size : _LENGTH.size + length].tobytes(), type=dict[str, Any])
    return header, file[_LENGTH.size + length :]


def newest(folder: Path) -> tuple[Checkpoint, ByteArray] | None:
    """The newest sound one; None: there is none."""
    for path in reversed(files(folder)):
        with contextlib.suppress(DamagedFile):
            return read(path)
    return None


def state_hash(state: ByteArray) -> str:
    """Of the tensors' bytes, not of how the header is written."""
    _, data = _split(state)
    return hashlib.sha256(data.tobytes()).hexdigest()[:32]

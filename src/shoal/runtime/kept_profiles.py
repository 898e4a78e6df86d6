"""What a device measured of itself with a model, kept: measuring as a plan deserves takes seconds, starts should not.

A profile holds for one content of a model on one disk, with the settings and the processor it was measured with, for a
week; for ten minutes where the device was busy meanwhile, as its spread shows. Until then it is measured again in a quiet
moment (`refresh.py`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import ggml
import msgspec

from shoal import __version__
from shoal.ids import ModelHash
from shoal.runtime.kept import KeptRecords
from shoal.runtime.messages import AcceleratorReport, StartWorker
from shoal.runtime.profile import num_physical_cores

KEPT_FOR_S, KEPT_BUSY_FOR_S = 7 * 86400.0, 600.0
DUE_AFTER_S = 86400.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a layer for one token and for a batch, and of the output projection for one token (0: it would have taken
    too much memory), with the numbers of threads that were fastest; bytes per second of the disk (0: not measured).

    `is_complete` is whether the output projection was asked for, and `measured_s` when it was, in seconds since 1970.
    """

    layer_s: float
    batch_layer_s: float
    output_s: float
    is_complete: bool
    num_threads: int
    num_threads_prefill: int
    spreads: dict[str, float]
    measured_s: float
    read_bytes_per_s: float = 0.0
    read_mode: str = "direct"
    accelerator: AcceleratorReport | None = None
    is_steady: bool = True


def profile_key(
    path: Path, model: ModelHash, *, compute_device: str | None, num_threads: int | None, num_cores: int, repack: bool
) -> str:
    """What a profile depends on, as a name. None was left to this device."""
    parts = (__version__, ggml.__version__, model, path.stat().st_dev, compute_device, num_threads, num_cores, repack)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def key_of_start(start: StartWorker, path: Path) -> str:
    """The key of what a worker measures that is started with this, for the model file at `path`. Raises OSError."""
    return profile_key(
        path,
        start.model.hash,
        compute_device=start.compute_device,
        num_threads=start.num_threads,
        num_cores=num_physical_cores(),
        repack=start.repack,
    )


class KeptProfiles:
    """Profiles of this device, by `profile_key`."""

    def __init__(self, *, folder: Path | None = None) -> None:
        self._records = KeptRecords("profiles", folder=folder)

    def find(self, key: str, *, now_s: float) -> Measured | None:
        """The one that is kept, unless it is too old, or not to be read."""
        measured = self._read(key)
        if measured is None:
            return None
        kept_for_s = KEPT_FOR_S if measured.is_steady else KEPT_BUSY_FOR_S
        return measured if 0.0 <= now_s - measured.measured_s <= kept_for_s else None

    def is_due(self, key: str, *, now_s: float) -> bool:
        """Whether there is or was one that had better be measured again when the device is quiet."""
        measured = self._read(key)
        if measured is None:
            return False
        return not measured.is_steady or not 0.0 <= now_s - measured.measured_s <= DUE_AFTER_S

    def _read(self, key: str) -> Measured | None:
        try:
            return msgspec.convert(self._records.get(key), Measured)
        except msgspec.ValidationError:
            return None

    def keep(self, key: str, measured: Measured) -> None:
        """Keeps it, in the place of an older one."""
        self._records.put(key, msgspec.to_builtins(measured))

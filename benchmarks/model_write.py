"""Writing a random model against writing plain bytes: the same size, the same disk, in turns, as a ratio.

Our bytes per second over a plain write's, so 1 is the disk's speed. Both end with an fsync, and start when nothing of the
other waits for the disk any more; ours counts all that `shoal lab model` does after its imports. The plain write takes
random bytes that lie in memory, 4 MiB at a time. The share is of the time of all rounds together, because the rate of a
shared disk may swing by several times from one round to the next; a single round's ratio then says little, and
`share_min` and `share_max` say how much it swung. `cached_share` leaves the disk out: both write to memory alone, if the
system has a folder for that, which shows what is left for faster disks.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from benchmarks.record import finish, is_quick
from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES

CACHE = Path(__file__).parent.parent / ".cache"
IN_MEMORY = Path("/dev/shm")
QUANTISATION = "Q4_K_M"
BUFFER_BYTES = 4 << 20


def write_plain(path: Path, size_bytes: int, buffers: list[bytes]) -> None:
    with path.open("wb", buffering=0) as output:
        for index in range(size_bytes // BUFFER_BYTES):
            output.write(buffers[index % len(buffers)])
        output.write(buffers[0][: size_bytes % BUFFER_BYTES])
        os.fsync(output.fileno())


def compare(folder: Path, *, name: str, layers: int, rounds: int) -> dict[str, Any]:
    """The ratio and speeds over all rounds, after one that is not counted."""
    shape = msgspec.structs.replace(SHAPES[name], num_layers=layers)
    random = np.random.default_rng(0)
    buffers = [random.bytes(BUFFER_BYTES) for _ in range(4)]
    path = folder / "model.gguf"
    size_bytes = 0

    def ours() -> None:
        nonlocal size_bytes
        size_bytes = write_random_model(path, shape, quantisation=QUANTISATION, durable=True)

    def plain() -> None:
        write_plain(path, size_bytes, buffers)

    ours()
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for index in range(rounds):
        sides = [("ours", ours), ("plain", plain)]
        for side, write in sides if index % 2 else sides[::-1]:
            path.unlink(missing_ok=True)
            os.sync()
            started_s = time.perf_counter()
            write()
            seconds[side].append(time.perf_counter() - started_s)
    path.unlink()
    shares = [plain_s / ours_s for ours_s, plain_s in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "share": round(sum(seconds["plain"]) / sum(seconds["ours"]), 3),
        "share_median": round(statistics.median(shares), 3),
        "share_min": round(min(shares), 3),
        "share_max": round(max(shares), 3),
        "model_mb_per_s": round(rounds * size_bytes / sum(seconds["ours"]) / 1e6),
        "plain_mb_per_s": round(rounds * size_bytes / sum(seconds["plain"]) / 1e6),
        "bytes": size_bytes,
    }


def _peak_mib() -> int | None:
    """The most memory this process ever had, 20 MiB of its own buffers included; None where no /proc tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    name, layers, rounds = ("llama-3-8b", 1, 6) if is_quick() else ("llama-3-70b", 8, 4)
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        disk = compare(Path(folder), name=name, layers=layers, rounds=rounds)
    print(f"{name}, {layers} layers, disk: {disk}", file=sys.stderr)
    cached: dict[str, Any] = {"share": None}
    if IN_MEMORY.is_dir() and psutil.disk_usage(str(IN_MEMORY)).free > 8e9:
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            cached = compare(Path(folder), name="llama-3-70b", layers=2, rounds=3 if is_quick() else 6)
        print(f"llama-3-70b, 2 layers, memory: {cached}", file=sys.stderr)
    figures = {
        "share_of_plain_write": disk["share"],
        "cached_share": cached["share"],
        "peak_mib": _peak_mib(),
        "details": {"disk": disk, "memory": cached},
    }
    finish("model-write", figures, {"like": name, "layers": layers, "quantisation": QUANTISATION})


if __name__ == "__main__":
    main()

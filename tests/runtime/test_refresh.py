"""A quiet device measures itself anew, and stops when somebody needs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from shoal.errors import WorkerLost
from shoal.ids import EngineId, ModelHash
from shoal.runtime.kept_profiles import DUE_AFTER_S, KeptProfiles, Measured, key_of_start
from shoal.runtime.messages import ModelFile, StartWorker
from shoal.runtime.model_store import ModelStore
from shoal.runtime.refresh import ProfileRefresh

TinyModel = Callable[[str, str], Path]
MEASURED = Measured(
    layer_s=1.0,
    batch_layer_s=8.0,
    output_s=2.0,
    is_complete=True,
    num_threads=1,
    num_threads_prefill=1,
    spreads={},
    measured_s=0.0,
)


class Device:
    """One that may be quiet and free, has one profile, and counts its measurements."""

    def __init__(self, folder: Path) -> None:
        self.is_quiet = self.is_free = True
        self.failure: Exception | None = None
        self.starts: list[StartWorker] = []
        self.can_end = asyncio.Event()
        self.can_end.set()
        self.kept = KeptProfiles(folder=folder)
        path = folder / "m.gguf"
        path.touch()
        self.start = StartWorker(EngineId(1), ModelFile(ModelHash("a" * 64), 1), model_path=str(path), memory_bytes=500)
        self.key = key_of_start(self.start, path)
        self.refresh = ProfileRefresh(
            is_free=lambda: self.is_free,
            memory_bytes=lambda: 300,
            is_quiet=lambda: self.is_quiet,
            measure=self._measure,
            kept=self.kept,
        )

    def keep(self, *, age_s: float = 0.0, is_steady: bool = True) -> None:
        measured = msgspec.structs.replace(MEASURED, measured_s=time.time() - age_s, is_steady=is_steady)
        self.kept.keep(self.key, measured)

    def look(self) -> bool:
        return asyncio.run(self.refresh.look())

    async def _measure(self, start: StartWorker) -> None:
        self.starts.append(start)
        await self.can_end.wait()
        if self.failure is not None:
            raise self.failure
        self.keep()


def test_what_was_measured_beside_other_work_or_long_ago_is_measured_again_once(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.keep(is_steady=False)
    assert not device.look(), "nobody has asked for it since the agent began"
    device.refresh.note(device.start)
    assert device.look()
    assert not device.look(), "it is fresh now"
    (start,) = device.starts
    assert (start.fresh, start.for_plan, start.memory_bytes) == (True, True, 300)
    device.keep(age_s=DUE_AFTER_S + 1)
    assert device.look()


def test_only_a_device_that_is_quiet_and_free_is_measured(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.keep(is_steady=False)
    device.refresh.note(device.start)
    device.is_quiet = False
    assert not device.look()
    device.is_quiet, device.is_free = True, False
    assert not device.look()
    assert device.starts == []


def test_a_small_models_start_is_measured_only_if_it_was_before(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.refresh.note(device.start)
    assert not device.look()


def test_who_needs_the_device_ends_the_measurement(tmp_path: Path) -> None:
    async def needed_meanwhile(device: Device) -> bool:
        device.can_end.clear()
        looking = asyncio.create_task(device.refresh.look())
        while not device.starts:
            await asyncio.sleep(0)
        device.refresh.note(device.start)
        return await asyncio.wait_for(looking, 5.0)

    device = Device(tmp_path)
    device.keep(is_steady=False)
    device.refresh.note(device.start)
    assert not asyncio.run(needed_meanwhile(device))
    assert device.kept.is_due(device.key, now_s=time.time()), "and it is still to be done"


def test_the_end_of_the_agent_ends_the_measurement(tmp_path: Path) -> None:
    async def ended_meanwhile(device: Device) -> None:
        device.can_end.clear()
        looking = asyncio.create_task(device.refresh.look())
        while not device.starts:
            await asyncio.sleep(0)
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking

    device = Device(tmp_path)
    device.keep(is_steady=False)
    device.refresh.note(device.start)
    asyncio.run(ended_meanwhile(device))


def test_what_cannot_be_measured_is_not_tried_every_minute(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.keep(is_steady=False)
    device.refresh.note(device.start)
    device.failure = WorkerLost("no memory")
    assert not device.look()
    assert not device.look()
    assert len(device.starts) == 1


def test_a_real_worker_measures_and_keeps(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiny_model("qwen3", "Q8_0")
    start = StartWorker(
        EngineId(1), ModelStore([path.parent]).identify(path), model_path=str(path), num_threads=1, memory_bytes=1 << 30
    )
    kept = KeptProfiles()
    key = key_of_start(start, path)
    kept.keep(key, msgspec.structs.replace(MEASURED, is_steady=False))
    refresh = ProfileRefresh(is_free=lambda: True, memory_bytes=lambda: 1 << 30, is_quiet=lambda: True)
    refresh.note(start)
    began_s = time.time()
    assert asyncio.run(refresh.look())
    measured = kept.find(key, now_s=time.time())
    assert measured is not None
    assert measured.measured_s >= began_s
    assert measured.layer_s < MEASURED.layer_s

"""Profiles are kept for a week, per model, disk and settings; whatever is wrong with the file costs a measurement."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shoal.ids import ModelHash
from shoal.runtime.kept_profiles import KEPT_BUSY_FOR_S, KEPT_FOR_S, KeptProfiles, Measured, profile_key

MEASURED = Measured(
    layer_s=1e-3,
    batch_layer_s=8e-3,
    output_s=2e-3,
    is_complete=True,
    num_threads=2,
    num_threads_prefill=4,
    spreads={"layer_s": 0.1},
    measured_s=1000.0,
)


def test_a_profile_is_found_again_until_it_is_too_old(tmp_path: Path) -> None:
    kept = KeptProfiles(folder=tmp_path / "cache")
    assert kept.find("key", now_s=1000.0) is None
    kept.keep("key", MEASURED)
    assert KeptProfiles(folder=tmp_path / "cache").find("key", now_s=1000.0 + KEPT_FOR_S) == MEASURED
    assert kept.find("key", now_s=1001.0 + KEPT_FOR_S) is None
    assert kept.find("key", now_s=999.0) is None, "a clock went back"
    assert kept.find("other", now_s=1000.0) is None
    kept.keep("busy", msgspec.structs.replace(MEASURED, is_steady=False))
    assert kept.find("busy", now_s=1000.0 + KEPT_BUSY_FOR_S) is not None
    assert kept.find("busy", now_s=1001.0 + KEPT_BUSY_FOR_S) is None


@pytest.mark.parametrize("text", ["", "[]", "{nonsense", '{"key": {"layer_s": "fast"}}', '{"key": 3}'])
def test_what_cannot_be_read_is_no_profile(tmp_path: Path, text: str) -> None:
    (tmp_path / "profiles.json").write_text(text)
    kept = KeptProfiles(folder=tmp_path)
    assert kept.find("key", now_s=1000.0) is None
    kept.keep("key", MEASURED)
    assert kept.find("key", now_s=1000.0) == MEASURED


def test_what_a_profile_depends_on(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()

    def key(
        model: str = "a", *, compute_device: str = "CPU", num_threads: int | None = None, cores: int = 4, repack: bool = True
    ) -> str:
        return profile_key(
            tmp_path / "m.gguf",
            ModelHash(model),
            compute_device=compute_device,
            num_threads=num_threads,
            num_cores=cores,
            repack=repack,
        )

    keys = [key(), key("b"), key(compute_device="Vulkan0"), key(num_threads=2), key(cores=2), key(repack=False)]
    assert len(set(keys)) == len(keys)
    assert key() == key()

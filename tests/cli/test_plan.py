"""`shoal plan` as a user meets it: from a file of profiles, from agents that measure, and where nothing fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from shoal.ids import DeviceId
from shoal.placement.profile import Cluster, DeviceProfile, Disk, LayerTimes, decode_cluster, uniform_links
from shoal.units import MIB
from tests.cli.test_commands import shoal

pytestmark = pytest.mark.slow
TinyModel = Callable[[str, str], Path]


@pytest.fixture
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("qwen3", "Q8_0")


def write_profiles(path: Path, *, memory_bytes: int) -> Path:
    names = [DeviceId("desk"), DeviceId("attic")]
    devices = tuple(
        DeviceProfile(
            id=name,
            free_bytes=4000 * MIB,
            limit_bytes=memory_bytes,
            runtime_bytes=40 * MIB,
            times=LayerTimes(layer_s=layer_s, batch_layer_s=8 * layer_s, output_s=layer_s),
            disk=Disk(mode="direct", read_bytes_per_s=5e8),
        )
        for name, layer_s in zip(names, (0.05, 0.01), strict=True)
    )
    cluster = Cluster(devices=devices, links=uniform_links(names, round_trip_s=0.001, bytes_per_s=1e8))
    path.write_bytes(msgspec.json.encode(cluster))
    return path


def test_a_file_of_profiles_is_planned_for(model: Path, tmp_path: Path) -> None:
    profiles = write_profiles(tmp_path / "profiles.json", memory_bytes=2000 * MIB)
    result = shoal("plan", str(model), "--profiles", str(profiles), "--context", "512", "--json", "--compare")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    stages = {stage["device"]: sum(w["stop"] - w["first"] for w in stage["windows"]) for stage in answer["plan"]["stages"]}
    # The faster device has all layers; the head only embeds and samples.
    assert stages == {"attic": 3, "desk": 0}
    assert answer["plan"]["context"] == 512
    assert {other["name"] for other in answer["others"]} == {"halda", "proportional"}
    text = shoal("plan", str(model), "--profiles", str(profiles), "--compare").stdout
    for wanted in ("desk (head)", "attic", "tokens/s", "bound by", "proportional", "desk alone"):
        assert wanted in text


def test_what_is_missing_is_one_line(model: Path, tmp_path: Path) -> None:
    profiles = write_profiles(tmp_path / "profiles.json", memory_bytes=60 * MIB)
    result = shoal("plan", str(model), "--profiles", str(profiles))
    assert result.returncode == 1
    assert "desk takes the request and lacks" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--objective", "cheapest"], "no objective is called 'cheapest': latency, first-token, throughput"),
        (["--profiles", "nowhere.json"], "--profiles nowhere.json: No such file"),
        (["--link-rate", "0"], "links must carry something"),
    ],
)
def test_mistakes_are_one_line(model: Path, arguments: list[str], line: str) -> None:
    result = shoal("plan", str(model), *arguments)
    assert result.returncode == 2
    assert line in result.stderr
    assert result.stderr.count("\n") == 1


def test_agents_are_measured_and_their_profiles_kept(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    result = shoal("plan", str(model), "--memory", "1GB", "--json", "--save-profiles", str(kept))
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["assumed"] == []
    cluster = decode_cluster(kept.read_bytes())
    assert cluster.head.times.layer_s > 0
    assert cluster.head.spreads.keys() == {"layer_s", "batch_layer_s", "output_s"}
    again = shoal("plan", str(model), "--profiles", str(kept), "--json")
    assert json.loads(again.stdout)["plan"] == answer["plan"]


def test_a_profile_is_printed_with_its_spreads(model: Path) -> None:
    result = shoal("profile", str(model), "--memory", "400MB", "--json")
    assert result.returncode == 0, result.stderr
    (device,) = json.loads(result.stdout)["cluster"]["devices"]
    assert device["times"]["output_s"] > 0
    assert device["spreads"].keys() == {"layer_s", "batch_layer_s", "output_s"}
    text = shoal("profile", str(model), "--memory", "400MB").stdout
    for wanted in ("(head)", "spread", "output projection"):
        assert wanted in text


def test_a_profile_of_a_model_that_nobody_has_is_one_line(tmp_path: Path) -> None:
    result = shoal("profile", str(tmp_path / "nowhere.gguf"))
    assert result.returncode == 1
    assert "nowhere.gguf" in result.stderr
    assert result.stderr.count("\n") == 1

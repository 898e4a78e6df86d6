"""The ring of the first answer on the four devices of `home4`: their tokens are those of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.cli.demo import demo_model
from shoal.lab import scenario
from shoal.lab.facts import Facts
from shoal.lab.model_workload import vouch_for_copies, with_model
from shoal.lab.requantise import requantise
from shoal.lab.run import run
from shoal.units import MIB

pytestmark = pytest.mark.slow
PROMPT = "Why is the sky blue? Answer in two sentences."


def one_device(max_tokens: int, model: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "shoal", "run", str(model or demo_model()), "--json", f"--max-tokens={max_tokens}"]
    command += ["--temperature=0", "--seed=0", "--threads=1", "--", PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def in_home4(max_tokens: int, *, scale_bytes: float = 1.0) -> Facts:
    home = msgspec.structs.replace(scenario.load("home4"), scale_bytes=scale_bytes, seconds_max=100)
    # By hand: planned, so small a model stays on one device.
    asked = with_model(home, demo_model(), PROMPT, max_tokens=max_tokens, threads=1, layers="8,8,7,7")
    return run(asked, prepare=lambda lab: vouch_for_copies(lab, demo_model()))


def check(facts: Facts, max_tokens: int) -> None:
    assert facts.workload_status == 0, facts.workload
    assert facts.workload["token_ids"] == one_device(max_tokens)["token_ids"]
    assert len(facts.workload["token_ids"]) == max_tokens
    stages = facts.workload["stages"]
    assert {stage["device"] for stage in stages} == {"mac-m1", "laptop", "desktop", "phone"}
    assert sum(stop - first for stage in stages for first, stop in stage["layers"]) == 30
    # A token goes once round the ring: four hops over the access point, each as long as both its links.
    round_s = sum(2 * link.delay_ms * 1e-3 for link in facts.links if link.target == "wifi")
    assert 1 / facts.workload["tokens_per_s"] >= round_s
    for device in facts.devices:
        assert device.oom_kills == 0
        assert device.memory_bytes_peak <= (device.memory_bytes_max or 0)
        assert device.bytes_read >= 30 * MIB, "every device reads from its own cold copy"
    assert all(link.num_bytes > 50_000 for link in facts.links)


def test_four_devices_say_what_one_says(lab_folder: Path) -> None:
    assert os.environ["SHOAL_LAB_FOLDER"] == str(lab_folder)
    check(in_home4(12), 12)


@pytest.mark.full
def test_four_devices_of_a_tenth_say_what_one_says_for_long(lab_folder: Path) -> None:
    assert os.environ["SHOAL_LAB_FOLDER"] == str(lab_folder)
    check(in_home4(96, scale_bytes=0.15), 96)


@pytest.mark.full
@pytest.mark.usefixtures("lab_folder")
def test_devices_with_less_memory_together_than_the_model_say_what_one_says(tmp_path: Path) -> None:
    model = tmp_path / "f32.gguf"
    size_bytes = requantise(demo_model(), model, "F32")
    starved = msgspec.structs.replace(scenario.load("starved3"), seconds_max=100)
    assert sum(starved.memory_bytes(name) or 0 for name in starved.devices) < size_bytes
    asked = with_model(starved, model, PROMPT, max_tokens=16, context=256, threads=1)
    facts = run(asked, prepare=lambda lab: vouch_for_copies(lab, model))
    assert facts.workload_status == 0, facts.workload
    assert facts.workload["token_ids"] == one_device(16, model)["token_ids"]
    for device in facts.devices:
        assert device.oom_kills == 0
        assert device.memory_bytes_peak <= (device.memory_bytes_max or 0)

"""The API over several devices, with an agent of its own and with one that runs already."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.server import Server, running, wait_until

pytestmark = pytest.mark.slow
ASKED: dict[str, Any] = {"model": "exact", "prompt": "The sea", "max_tokens": 24, "temperature": 0.0, "seed": 1}


@contextlib.contextmanager
def device(name: str, models: Path, *peers: str) -> Iterator[str]:
    """An agent as on another device; gives its address."""
    command = [
        sys.executable, "-m", "shoal", "up", "--json", "--until-eof", "--listen=127.0.0.1:0", f"--name={name}",
        f"--models={models}", *(f"--peer={peer}" for peer in peers),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["address"]
    finally:
        process.stdin.close()
        process.wait(20.0)
        process.stdout.close()


def check_answers(alone: Server, together: Server, *, num_devices: int) -> None:
    together.load("exact", "embedder")
    with alone.openai() as one, together.openai() as several:
        assert several.completions.create(**ASKED).choices[0].text == one.completions.create(**ASKED).choices[0].text
        texts = ["The sea is deep.", "x"]
        found, wanted = (
            np.array([item.embedding for item in api.embeddings.create(model="embedder", input=texts).data])
            for api in (several, one)
        )
    assert np.abs(found - wanted).max() < 1e-5
    with together.http() as http:
        page = http.get("/metrics").text
    devices = {
        line.partition('device="')[2].partition('"')[0] for line in page.splitlines() if "shoal:stage_layers{" in line
    }
    assert len(devices) == num_devices, page


def test_answers_of_two_devices_are_those_of_one(server: Server, served_models: Path, cache: Path) -> None:
    with (
        device("other", served_models) as other,
        running(f"--peer={other}", "--layers=1,2", models=served_models, cache=cache) as together,
    ):
        check_answers(server, together, num_devices=2)


def test_an_agent_that_runs_already_is_used_and_outlives_the_server(server: Server, served_models: Path) -> None:
    with device("other", served_models) as other, device("head", served_models, other) as head:
        with running(f"--agent={head}", "--layers=1,2", models=None) as together:
            check_answers(server, together, num_devices=2)
            with together.openai() as client:
                assert {model.id for model in client.models.list()} >= {"exact", "embedder", "talker"}
                stream = client.completions.create(
                    **{**ASKED, "max_tokens": 1900}, stream=True, extra_body={"ignore_eos": True}
                )
                next(iter(stream))
                stream.close()
            wait_until(together.is_quiet, within_s=2.0)
        time.sleep(0.1)
        # The server was a guest: the agent and its engines live on.
        with running(f"--agent={head}", models=None) as again, again.openai(max_retries=8) as client:
            assert client.completions.create(**{**ASKED, "max_tokens": 2}).usage is not None

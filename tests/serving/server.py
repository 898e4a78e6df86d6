"""`shoal serve` as a process, and what its clients need to know of it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil

START_TIMEOUT_S = 30.0


class Server:
    """A server that runs. `url` has no path."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    @contextlib.contextmanager
    def http(self, **headers: str) -> Iterator[httpx2.Client]:
        """For what the official client cannot send."""
        with httpx2.Client(base_url=self.url, headers=headers, timeout=60.0) as client:
            yield client

    @contextlib.contextmanager
    def openai(self, *, max_retries: int = 0, api_key: str = "any") -> Iterator[openai.OpenAI]:
        """The official client; without retries, so that a failure is seen."""
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=max_retries, timeout=60.0) as client:
            yield client

    def load(self, *models: str) -> None:
        """Has models in memory, and their texts open."""
        with self.http() as http:
            for model in models:
                for path, body in (
                    ("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1}),
                    ("/tokenize", {"model": model, "content": "a"}),
                ):
                    wait_until(functools.partial(_is_answered, http, path, body), within_s=60.0)

    def figure(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        with self.http() as http:
            return figure(http.get("/metrics").text, name, **labels)

    def is_quiet(self) -> bool:
        """Whether nobody is being answered or waits."""
        with self.http() as http:
            page = http.get("/metrics").text
        return figure(page, "vllm:num_requests_running") == 0 == figure(page, "vllm:num_requests_waiting")


def _is_answered(http: httpx2.Client, path: str, body: Any) -> bool:
    return http.post(path, json=body).status_code == 200


def figure(page: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples on a page in Prometheus' format."""
    total = 0.0
    for line in page.splitlines():
        sample = re.fullmatch(re.escape(name) + r"(\{.*\})? (\S+)", line)
        if sample and all(f'{label}="{value}"' in (sample[1] or "") for label, value in labels.items()):
            total += float(sample[2])
    return total


@contextlib.contextmanager
def running(*arguments: str, models: Path | None = None, cache: Path | None = None) -> Iterator[Server]:
    """Starts `shoal serve` on free loopback ports, with the folder `models`; ends it afterwards."""
    folder = [f"--models={models}"] if models is not None else []
    command = [
        sys.executable, "-m", "shoal", "serve", "--json", "--until-eof", "--listen=127.0.0.1:0",
        "--agent-listen=127.0.0.1:0", "--threads=1", *folder, *arguments,
    ]  # fmt: skip
    environment = os.environ | ({"XDG_CACHE_HOME": str(cache)} if cache is not None else {})
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield Server(process, json.loads(line)["url"])
    finally:
        process.stdin.close()
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said = process.stderr.read()
        process.stdout.close()
        process.stderr.close()
    assert "Traceback" not in said, said


def wait_until(condition: Callable[[], Any], *, within_s: float) -> float:
    """Seconds until `condition` held; fails when it does not in time."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < within_s, f"not within {within_s} s"
        time.sleep(0.02)
    return time.monotonic() - started_s

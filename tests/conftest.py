"""Models that many tests share, made once per run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES

pytest_plugins = ["tests.lab.fixture"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`tiny_model(architecture, quantisation)` is a random model of three layers of 256."""
    folder = tmp_path_factory.mktemp("models")

    def make(architecture: str, quantisation: str) -> Path:
        path = folder / f"{architecture}-{quantisation}.gguf"
        if not path.exists():
            shape = msgspec.structs.replace(SHAPES["tiny"], architecture=architecture)
            write_random_model(path, shape, quantisation=quantisation)
        return path

    return make


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """Every test ends its processes and threads, and closes its sockets."""
    before = _held()
    yield
    leaked = {kind: count - before[kind] for kind, count in _held().items() if count > before[kind]}
    assert not leaked, f"the test left behind {leaked}"


def _held() -> dict[str, int]:
    process = psutil.Process(os.getpid())
    return {
        "processes": len(process.children(recursive=True)),
        "threads": sum(thread.name.startswith(("ring-", "agent-")) for thread in threading.enumerate()),
        "sockets": len(process.net_connections(kind="inet")),
    }

"""One server for all tests of the API that do not need their own, and clients for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from benchmarks.models import smollm2
from tests.serving.models import (
    LLAMA_MARKS,
    LLAMA_TEMPLATE,
    MISTRAL_MARKS,
    MISTRAL_TEMPLATE,
    USER_DEFINED,
    write_embedder,
    write_plain_model,
    write_talker,
)
from tests.serving.server import Server, running

_shared_servers: list[int] = []
"""Processes that outlive a test, with all their children."""


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model of each kind."""
    folder = tmp_path_factory.mktemp("served")
    write_plain_model(folder / "plain.gguf")
    write_plain_model(folder / "exact.gguf", quantisation="F32")
    write_talker(folder / "talker.gguf")
    write_talker(folder / "thinker.gguf", mark_type=USER_DEFINED)
    write_talker(folder / "mistral.gguf", marks=MISTRAL_MARKS, template=MISTRAL_TEMPLATE)
    write_talker(folder / "llama.gguf", marks=LLAMA_MARKS, template=LLAMA_TEMPLATE)
    write_embedder(folder / "embedder.gguf")
    (folder / "smollm2.gguf").symlink_to(smollm2())
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers remember what they have measured."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server(served_models: Path, cache: Path) -> Iterator[Server]:
    """Serves everything in the folder, and has all of it in memory."""
    with running("--keep-alive=100000", models=served_models, cache=cache) as server:
        _shared_servers.append(server.process.pid)
        server.load("plain", "exact", "talker", "thinker", "mistral", "llama", "embedder", "smollm2")
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.http() as http:
        yield http


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """As for all tests, but for what belongs to the shared server."""
    before = _held()
    yield
    leaked = {kind: count - before[kind] for kind, count in _held().items() if count > before[kind]}
    assert not leaked, f"the test left behind {leaked}"


def _held() -> dict[str, int]:
    process = psutil.Process(os.getpid())
    own = [child for child in process.children() if child.pid not in _shared_servers]
    return {
        "processes": len(own),
        "threads": sum(thread.name.startswith(("ring-", "agent-")) for thread in threading.enumerate()),
        "sockets": len(process.net_connections(kind="inet")),
    }

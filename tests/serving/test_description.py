"""What is published about the API is true: the OpenAPI document, fuzzed, and the table in docs/api.md."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.serving.openapi import OPERATIONS
from tests.serving.server import Server, running
from tests.serving.support_table import PAGE, declared, put_table, write_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(served_models: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose answers are short, whatever is asked."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("talker", "embedder"):
        (folder / f"{name}.gguf").symlink_to(served_models / f"{name}.gguf")
    with running("--context=64", models=folder, cache=cache) as server:
        server.load("talker", "embedder")
        yield server


def test_the_table_is_current() -> None:
    table = write_table(declared())
    assert "**no test**" not in table, "a field that no test shows"
    page = PAGE.read_text()
    assert put_table(page, table) == page, "docs/api.md is not current: run `make api-table`"


@pytest.mark.shows("/openapi.json")
@pytest.mark.shows("/health")
@pytest.mark.shows("/readyz")
@pytest.mark.shows("/metrics")
def test_the_description_describes_every_path(small: Server) -> None:
    with small.http() as http:
        described: dict[str, Any] = http.get("/openapi.json").json()
        assert described["openapi"] == "3.1.0"
        assert set(described["paths"]) == {operation.path for operation in OPERATIONS}
        for path, methods in described["paths"].items():
            for method in methods:
                reply = http.request(method, path.replace("{model}", "talker"))
                assert reply.status_code in (200, 415), path


@pytest.mark.parametrize("num_examples", [5, pytest.param(200, marks=[pytest.mark.full, pytest.mark.timeout(1200)])])
def test_requests_that_the_description_allows_or_forbids(small: Server, tmp_path: Path, num_examples: int) -> None:
    """Schemathesis: no server error, no undescribed status, type or body, whatever is sent."""
    with small.http() as http:
        described: dict[str, Any] = http.get("/openapi.json").json()
    # Names of models are drawn from those that are there: else nearly every request would meet a 404.
    for kind, models in (("Chat", ["talker"]), ("Completion", ["talker"]), ("Embedding", ["embedder", "talker"])):
        described["components"]["schemas"][f"{kind}Request"]["properties"]["model"] = {"enum": models}
    (tmp_path / "openapi.json").write_text(json.dumps(described))
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", f"--url={small.url}",
        f"--max-examples={num_examples}",
        "--phases=fuzzing" if num_examples < 10 else "--phases=examples,coverage,fuzzing", "--seed=1", "--no-color",
        "--generation-database=none", "--request-timeout=60", "--no-shrink",
        "--checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=1100)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert small.is_quiet()

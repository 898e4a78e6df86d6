"""Models that come and go: loaded on demand, unloaded when idle or when another needs their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving.models import write_plain_model
from tests.serving.server import Server, running, wait_until

pytestmark = pytest.mark.slow
ASKED: dict[str, Any] = {"prompt": "The sea", "max_tokens": 2}


def states(server: Server) -> dict[str, str]:
    with server.http() as http:
        return {model["id"]: model["state"] for model in http.get("/v1/models").json()["data"]}


def test_models_are_loaded_on_demand_and_unloaded_when_idle(served_models: Path, cache: Path) -> None:
    with running("--keep-alive=0.5", models=served_models, cache=cache) as server, server.http() as http:
        assert set(states(server).values()) == {"unloaded"}
        assert http.get("/readyz").status_code == 200
        assert server.workers() == []
        reply = http.post("/v1/completions", json={"model": "plain", **ASKED})
        assert reply.status_code == 503
        body = reply.json()
        assert set(body) == {"error", "loading"}
        assert (body["error"]["code"], body["error"]["type"]) == ("model_loading", "server_error")
        assert (body["loading"]["model"], set(body["loading"])) == ("plain", {"model", "state", "elapsed_s", "eta_s"})
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert int(reply.headers["retry-after-ms"]) <= 1000 * int(reply.headers["retry-after"])
        assert states(server)["plain"] == "loading"
        # The official client comes again by itself.
        with server.openai(max_retries=4) as client:
            for model in ("plain", "talker"):
                assert client.completions.create(model=model, **ASKED).model == model
            assert {name for name, state in states(server).items() if state == "ready"} >= {"talker"}
        workers = server.workers()
        assert workers
        wait_until(lambda: set(states(server).values()) == {"unloaded"}, within_s=8.0)
        wait_until(lambda: not any(worker.is_running() for worker in workers), within_s=5.0)
        server.load("plain")


def test_models_named_at_the_start_are_loaded_and_stay(served_models: Path, cache: Path, tmp_path: Path) -> None:
    plain = str(served_models / "plain.gguf")
    with running(plain, "--keep-alive=100", models=tmp_path, cache=cache) as server, server.http() as http:
        seen = set()

        def is_ready() -> bool:
            reply = http.get("/readyz")
            seen.add(reply.status_code)
            if reply.status_code == 503:
                assert reply.json()["status"] == "loading"
                assert reply.json()["loading"]["model"] == "plain"
                assert "retry-after" in reply.headers
                assert http.get("/health").json() == {"status": "ok"}
            return reply.status_code == 200

        wait_until(is_ready, within_s=20.0)
        assert seen == {503, 200}
        assert states(server) == {"plain": "ready"}
        for name in ("plain", "plain.gguf", plain):
            assert http.post("/v1/completions", json={"model": name, **ASKED}).json()["model"] == "plain"


def test_a_model_makes_room_for_another(served_models: Path, cache: Path) -> None:
    # Enough for one worker, not for two.
    with running("--memory=200MB", models=served_models, cache=cache) as server, server.openai(max_retries=5) as client:
        for model in ("plain", "talker", "plain"):
            assert client.completions.create(model=model, **ASKED).model == model
            ready = [name for name, state in states(server).items() if state == "ready"]
            assert ready == [model]


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path, cache: Path) -> None:
    write_plain_model(tmp_path / "good.gguf")
    whole = (tmp_path / "good.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with running(models=tmp_path, cache=cache) as server, server.openai() as client:
        failures = []

        def fails() -> bool:
            try:
                client.completions.create(model="cut", **ASKED)
            except openai.InternalServerError as error:
                failures.append(error)
            return failures[-1].status_code == 500

        wait_until(fails, within_s=20.0)
        assert failures[-1].code == "bad_model_file"
        assert failures[-1].response.headers["x-should-retry"] == "false"
        server.load("good")


@pytest.mark.full
def test_a_model_that_does_not_fit_says_so(tmp_path: Path, cache: Path) -> None:
    write_plain_model(tmp_path / "good.gguf")
    with running("--memory=1MB", models=tmp_path, cache=cache) as server, server.openai() as client:
        codes: list[str | None] = []

        def is_refused() -> bool:
            try:
                client.completions.create(model="good", **ASKED)
            except openai.InternalServerError as error:
                codes.append(error.code)
            return codes[-1] == "insufficient_memory"

        wait_until(is_refused, within_s=20.0)


@pytest.mark.full
def test_new_files_are_found(tmp_path: Path, cache: Path) -> None:
    with running(models=tmp_path, cache=cache) as server, server.http() as http:
        assert states(server) == {}
        write_plain_model(tmp_path / "new.gguf")
        wait_until(lambda: http.get("/v1/models/new").status_code == 200, within_s=5.0)
        server.load("new")
        assert http.post("/tokenize", json={"content": "a"}).status_code == 200, "the only one need not be named"

"""Who may come in: loopback without a key, everybody else with one, and no web page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest

from shoal.cli.serve import check_door
from tests.serving.server import Server, running

pytestmark = pytest.mark.slow


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", "serve", *arguments], capture_output=True, text=True, timeout=30.0, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "localhost.example", "127.example", "models.home"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="a key is needed: give --api-key or set SHOAL_API_KEY, for example to sk-"):
        check_door(host, [])
    check_door(host, ["sk-one"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    check_door(host, [])


def test_a_key_opens_the_door(served_models: Path, cache: Path) -> None:
    arguments = ("--api-key=sk-one", "--api-key=sk-two", str(served_models / "plain.gguf"))
    with running(*arguments, models=served_models, cache=cache) as server:
        with server.http() as http:
            assert http.get("/health").status_code == 200
            assert http.get("/readyz").status_code in (200, 503)
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                reply = http.get(path)
                assert reply.status_code == 401, path
                assert reply.headers["www-authenticate"] == "Bearer"
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert http.get("/v1/models", headers={"x-api-key": "sk-two"}).status_code == 200
            assert http.get("/v1/models", headers={"authorization": "bearer sk-two"}).status_code == 200
            for wrong in ("Bearer sk-on", "Bearer", "sk-one", "Basic sk-one", "Bearer sk-one x", "Bearer \u00fc"):
                assert http.get("/v1/models", headers=[(b"authorization", wrong.encode())]).status_code == 401
        with server.openai(api_key="sk-one") as client:
            assert [model.id for model in client.models.list()] == ["plain"]
        with server.openai(api_key="sk-three") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "a b", "[::1"])
def test_a_name_that_is_not_this_machines_is_refused(http: httpx2.Client, host: str) -> None:
    reply = http.get("/v1/models", headers={"host": host})
    assert reply.status_code in (400, 403)
    if reply.status_code == 403:
        assert reply.json()["error"]["code"] == "wrong_host"
        assert "--allow-host" in reply.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8080", "192.168.1.20:8080"])
def test_this_machines_names_are_known(http: httpx2.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


def test_another_name_can_be_allowed(tmp_path: Path, cache: Path) -> None:
    with running("--allow-host=models.home", models=tmp_path, cache=cache) as server, server.http() as http:
        assert http.get("/v1/models", headers={"host": "models.home:80"}).status_code == 200
        assert http.get("/v1/models", headers={"host": "other.home"}).status_code == 403


def test_no_web_page_can_drive_it(http: httpx2.Client) -> None:
    body = {"model": "plain", "prompt": "a", "max_tokens": 1}
    refused = http.post("/v1/completions", json=body, headers={"origin": "http://evil.example"})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "wrong_origin"
    # What a form or a plain fetch sends without asking first.
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = http.post("/v1/completions", content=b'{"model":"plain"}', headers={"content-type": media_type})
        assert reply.status_code == 415
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert http.request("OPTIONS", "/v1/completions", headers=asked).status_code == 403
    for reply in (refused, http.get("/v1/models")):
        assert not [name for name in reply.headers if name.startswith("access-control-")]


def test_it_listens_on_loopback_only(server: Server) -> None:
    assert server.address[0] == "127.0.0.1"
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.2:{server.address[1]}/health", timeout=2.0)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["/nowhere/model.gguf"], 1, "no model '/nowhere/model.gguf'"),
        (["--listen=0.0.0.0:0"], 2, "a key is needed"),
        (["--queue=-1"], 2, "--queue"),
        (["--agent=127.0.0.1:1"], 1, "no shoal answers at 127.0.0.1:1"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], status: int, line: str, tmp_path: Path) -> None:
    own = ["--listen=127.0.0.1:0"] if not any(a.startswith("--listen") for a in arguments) else []
    own += (
        ["--agent-listen=127.0.0.1:0", f"--models={tmp_path}"] if not any(a.startswith("--agent") for a in arguments) else []
    )
    result = serve(*arguments, *own)
    assert result.returncode == status, result.stderr
    assert line in result.stderr
    assert "Traceback" not in result.stderr


def test_an_address_in_use_is_said_before_anything_is_loaded(server: Server, tmp_path: Path) -> None:
    result = serve(f"--listen=127.0.0.1:{server.address[1]}", "--agent-listen=127.0.0.1:0", f"--models={tmp_path}")
    assert result.returncode == 1
    assert "is in use" in result.stderr

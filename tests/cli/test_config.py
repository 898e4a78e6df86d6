"""Settings take the place of defaults, and a service is what was typed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from shoal.cli import service
from shoal.cli.config import change, show
from shoal.cli.main import app
from shoal.errors import DamagedFile, DeviceError
from shoal.runtime.node.settings import read_settings


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> TyperCommand:
    for name in ("SHOAL_STATE", "SHOAL_PLAIN"):
        monkeypatch.delenv(name, raising=False)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    found = group.commands["up"]
    assert isinstance(found, TyperCommand)
    return found


def used(command: TyperCommand, folder: Path, *typed: str) -> dict[str, object]:
    """Parameters of a `shoal up` that was so typed."""
    with command.make_context("up", [f"--state={folder}", *typed]) as context:
        return dict(context.params)


def test_what_is_set_is_used_where_nothing_is_typed(command: TyperCommand, tmp_path: Path) -> None:
    assert used(command, tmp_path)["memory"] is None
    assert change(command, tmp_path, "memory", ["8GB"], unset=False).startswith("memory is 8GB")
    change(command, tmp_path, "threads", ["4"], unset=False)
    change(command, tmp_path, "dial-only", ["yes"], unset=False)
    change(command, tmp_path, "peer", ["127.0.0.1:1", "127.0.0.1:2"], unset=False)
    params = used(command, tmp_path)
    assert (params["memory"], params["threads"], params["dial_only"]) == ("8GB", 4, True)
    assert list(params["peer"] or ()) == ["127.0.0.1:1", "127.0.0.1:2"]  # type: ignore[call-overload]
    assert used(command, tmp_path, "--memory=2GB")["memory"] == "2GB"
    change(command, tmp_path, "memory", [], unset=True)
    assert used(command, tmp_path)["memory"] is None


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("memory", ["much"], "'much' is no size"),
        ("threads", ["0"], "threads 0: .*greater than or equal to 1"),
        ("threads", ["1", "2"], "threads takes one value, not 2"),
        ("dial-only", ["perhaps"], "dial-only perhaps: true or false are allowed"),
        ("metrics", ["99999"], "less than or equal to 65535"),
        ("models", ["/nowhere"], "no such folder"),
        ("listen", ["0.0.0.0:7433"], "or add --plain"),
        ("nonsense", ["1"], "'nonsense' is no setting: listen, peer"),
        ("state", ["/tmp"], "'state' is no setting"),
    ],
)
def test_what_up_would_refuse_is_not_kept(
    command: TyperCommand, tmp_path: Path, name: str, values: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        change(command, tmp_path, name, values, unset=False)
    assert read_settings(tmp_path) == {}


def test_all_settings_with_their_origin(
    command: TyperCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(command, tmp_path, "name", ["tower"], unset=False)
    monkeypatch.setenv("SHOAL_PLAIN", "1")
    show(command, tmp_path, None, as_json=True)
    found = {each["name"]: (each["value"], each["origin"]) for each in json.loads(capsys.readouterr().out)}
    assert found["name"] == ("tower", "set")
    assert found["listen"] == ("127.0.0.1:7433", "default")
    assert found["plain"] == ("1", "environment (SHOAL_PLAIN)")
    show(command, tmp_path, "name", as_json=False)
    assert capsys.readouterr().out == "tower\n"


def test_damaged_settings_say_where_they_are(command: TyperCommand, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    for text in ("{nonsense", "[]", '{"memory": 3}'):
        path.write_text(text)
        with pytest.raises(DamagedFile, match=r"settings\.json"):
            used(command, tmp_path)
    path.write_text('{"older": "1"}')
    with pytest.raises(ValueError, match="'older' is no setting; `shoal config older --unset` drops it"):
        used(command, tmp_path)
    change(command, tmp_path, "older", [], unset=True)
    assert used(command, tmp_path)["memory"] is None


# ---- the service


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> service.Place:
    """A manager that writes down what it is told."""
    for name in ("systemctl", "loginctl"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\ntest ! -e {tmp_path}/refuse\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return service.Place(tmp_path / "units", ("systemctl", "--user"), "default.target", is_users=True)


def test_a_service_is_what_was_typed(
    command: TyperCommand, tmp_path: Path, place: service.Place, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--service", "--memory=50%$HOME", "--models", "some models", "--dial-only", f"--state={tmp_path}"]
    with command.make_context("up", typed) as context:
        service.install(service.typed(context), as_json=False, where=place)  # type: ignore[arg-type]
    text = (place.folder / service.UNIT).read_text()
    models = Path("some models").absolute()
    assert f'shoal up "--models={models}" "--memory=50%%$$HOME" --state={tmp_path} --dial-only\n' in text
    assert "WantedBy=default.target" in text
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:3] == [
        "systemctl --user daemon-reload",
        "systemctl --user enable shoal.service",
        "systemctl --user restart shoal.service",
    ]
    assert calls[3].startswith("loginctl enable-linger ")
    assert "starts at every boot" in capsys.readouterr().out
    service.remove(as_json=False, where=place)
    assert not (place.folder / service.UNIT).exists()
    assert "systemctl --user disable --now shoal.service" in (tmp_path / "calls").read_text()
    with pytest.raises(DeviceError, match="nothing was installed"):
        service.remove(as_json=False, where=place)


def test_a_manager_that_refuses_is_quoted(tmp_path: Path, place: service.Place) -> None:
    (tmp_path / "refuse").touch()
    with pytest.raises(DeviceError, match="`systemctl --user daemon-reload` failed"):
        service.install([], as_json=False, where=place)

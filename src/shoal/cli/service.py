"""`shoal up --service`: the agent as a unit of systemd, started now and at every boot.

As root it is the system's unit; else the user's own, which lingers, so that it runs before anybody logs in. Other systems
are told what to do there.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from typer.core import TyperOption

from shoal.errors import CannotWrite, DeviceError

UNIT = "shoal.service"
_ONE_START = {"service", "remove_service", "json", "until_eof", "check_only"}
_TIMEOUT_S = 60.0
_ELSEWHERE = {
    "Darwin": "on macOS let launchd start `shoal up`: a LaunchAgent in ~/Library/LaunchAgents with RunAtLoad and KeepAlive",
    "Windows": "on Windows let the Task Scheduler start `shoal up` when the computer starts",
    "Android": "on Android let Termux:Boot start `shoal up` from ~/.termux/boot",
}


@dataclass(frozen=True)
class Place:
    """Where units of one manager live, and how it is spoken to."""

    folder: Path
    systemctl: tuple[str, ...]
    wanted_by: str
    is_users: bool


def typed(context: typer.Context) -> list[str]:
    """The options that were typed, so that the service is what was asked for; paths are made whole."""
    arguments: list[str] = []
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        if not isinstance(param, TyperOption) or param.name in _ONE_START or source is None or source.name != "COMMANDLINE":
            continue
        option, value = max(param.opts, key=len), context.params[param.name or ""]
        for each in value if isinstance(value, (list, tuple)) else [value]:
            text = str(each.absolute()) if isinstance(each, Path) else str(each)
            arguments.append(option if param.is_flag else f"{option}={text}")
    return arguments


def place() -> Place:
    """Of this user's units. Raises DeviceError where there is no systemd."""
    if not Path("/run/systemd/system").is_dir():
        system = "Android" if hasattr(sys, "getandroidapilevel") or "ANDROID_ROOT" in os.environ else platform.system()
        advice = _ELSEWHERE.get(system, "let this system's own init start `shoal up`")
        raise DeviceError(f"--service needs systemd, which does not run here: {advice}")
    if os.geteuid() == 0:
        return Place(Path("/etc/systemd/system"), ("systemctl",), "multi-user.target", is_users=False)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Place(home / "systemd/user", ("systemctl", "--user"), "default.target", is_users=True)


def install(arguments: Sequence[str], *, as_json: bool, where: Place | None = None) -> None:
    """Writes the unit, starts it and has it started at boot.

    Args:
        arguments: of `shoal up`.

    Raises:
        DeviceError: there is no systemd, or it refuses.
        CannotWrite: the unit cannot be written.
    """
    where = where or place()
    path = where.folder / UNIT
    try:
        where.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(unit(arguments, wanted_by=where.wanted_by))
    except OSError as error:
        raise CannotWrite(f"{path}: {error.strerror or error}") from error
    done = [f"wrote {path}"]
    _systemctl(where, "daemon-reload")
    _systemctl(where, "enable", UNIT)
    _systemctl(where, "restart", UNIT)
    done.append("started it; it starts at every boot")
    if where.is_users and (problem := _linger()):
        done.append(f"but only once you have logged in: {problem}")
    done.append(f"`{' '.join(where.systemctl)} status {UNIT}` shows it, `shoal up --remove-service` ends it")
    _say(done, path, as_json=as_json)


def remove(*, as_json: bool, where: Place | None = None) -> None:
    """Ends the service and deletes its unit. Raises DeviceError where there is none."""
    where = where or place()
    path = where.folder / UNIT
    if not path.exists():
        raise DeviceError(f"there is no {path}: nothing was installed by `shoal up --service` for this user")
    _systemctl(where, "disable", "--now", UNIT)
    path.unlink()
    _systemctl(where, "daemon-reload")
    _say([f"ended it and removed {path}"], path, as_json=as_json)


def unit(arguments: Sequence[str], *, wanted_by: str) -> str:
    """The text of the unit."""
    command = " ".join(_quoted(word) for word in (sys.executable, "-m", "shoal", "up", *arguments))
    return f"""\
[Unit]
Description=shoal, this device's agent
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=5
TimeoutStopSec=30

[Install]
WantedBy={wanted_by}
"""


def _quoted(word: str) -> str:
    """A word of a command line as systemd reads it: `%` and `$` mean nothing, quotes and backslashes themselves."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or any(mark in word for mark in " \t'\";") or not word else word


def _systemctl(where: Place, *arguments: str) -> None:
    _call([*where.systemctl, *arguments])


def _call(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"`{' '.join(command)}`: {error}") from error
    if done.returncode:
        raise DeviceError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip() or done.returncode}")


def _linger() -> str:
    """Lets this user's units run without a login; says why that is not granted."""
    try:
        _call(["loginctl", "enable-linger", getpass.getuser()])
    except DeviceError as error:
        return str(error)
    return ""


def _say(lines: Sequence[str], path: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"unit": str(path), "done": list(lines)}))  # noqa: T201
    else:
        for line in lines:
            print(line)  # noqa: T201

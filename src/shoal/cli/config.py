"""`shoal config`: what `shoal up` uses on this device where nothing is typed.

A setting is an option of `shoal up`, so there is one place that knows their names, values and help: the command itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperOption

from shoal.runtime.node.settings import Value, read_settings, write_settings

NO_SETTINGS = {"state", "json", "until-eof", "journal", "service", "remove-service", "check-only", "help"}
"""Options of `shoal up` that are about one start of it."""


class Setting(msgspec.Struct, frozen=True):
    """`origin` is 'set', 'environment' or 'default'; `value` None where nothing is."""

    name: str
    value: Any
    origin: str
    help: str


def options_of(command: TyperCommand) -> dict[str, TyperOption]:
    """The options of `shoal up` that may be set, by name."""
    named = {_name(param): param for param in command.params if isinstance(param, TyperOption)}
    return {name: option for name, option in named.items() if name not in NO_SETTINGS}


def defaults(command: TyperCommand, folder: Path) -> dict[str, Any]:
    """What is set, by the name of the command's parameter: click takes it where nothing is typed or in the environment.

    Raises:
        DamagedFile: the settings cannot be read.
        ValueError: a setting is none that this version knows.
    """
    options = options_of(command)
    found = {}
    for name, value in read_settings(folder).items():
        if name not in options:
            raise ValueError(f"{folder / 'settings.json'}: '{name}' is no setting; `shoal config {name} --unset` drops it")
        found[options[name].name or name] = value
    return found


def show(command: TyperCommand, folder: Path, name: str | None, *, as_json: bool) -> None:
    """Prints one setting's value, or all settings with where they come from."""
    settings = _settings(command, folder)
    if name is not None:
        _known(command, name)
        found = next(setting for setting in settings if setting.name == name)
        print(json.dumps(found.value) if as_json else _text(found.value))  # noqa: T201
        return
    if as_json:
        print(msgspec.json.encode(settings).decode())  # noqa: T201
        return
    table = Table("setting", "value", "from", "meaning", box=None)
    for setting in settings:
        table.add_row(setting.name, _text(setting.value), setting.origin, setting.help)
    Console().print(table)


def change(command: TyperCommand, folder: Path, name: str, values: Sequence[str], *, unset: bool) -> str:
    """Sets one, or forgets it. Returns what to tell the user.

    Raises:
        ValueError: there is no such setting, or it cannot have that value.
    """
    settings = read_settings(folder)
    if unset:
        if values:
            raise ValueError(f"--unset forgets {name}: leave out {' '.join(values)}")
        if settings.pop(name, None) is None:
            _known(command, name)
        write_settings(folder, settings)
        return f"{name} is not set any more; `shoal up` notices when it starts next"
    option = _known(command, name)
    value = _kept_form(option, name, values)
    typed = [f"--state={folder}", *_arguments(name, value), "--check-only"]
    try:  # whether `shoal up` would start with it, beside what else is set
        with command.make_context("up", typed) as context:
            command.invoke(context)
    except typer.BadParameter as error:
        raise ValueError(f"{name} {' '.join(values)}: {error.format_message()}") from None
    write_settings(folder, {**settings, name: value})
    return f"{name} is {_text(value)}; `shoal up` notices when it starts next"


def _settings(command: TyperCommand, folder: Path) -> list[Setting]:
    kept = read_settings(folder)
    settings = []
    for name, option in options_of(command).items():
        variable = option.envvar if isinstance(option.envvar, str) else None
        setting = Setting(name, None if callable(option.default) else option.default, "default", option.help or "")
        if variable and os.environ.get(variable):
            setting = msgspec.structs.replace(setting, value=os.environ[variable], origin=f"environment ({variable})")
        elif name in kept:
            setting = msgspec.structs.replace(setting, value=kept[name], origin="set")
        settings.append(setting)
    return settings


def _known(command: TyperCommand, name: str) -> TyperOption:
    options = options_of(command)
    if name not in options:
        raise ValueError(f"'{name}' is no setting: {', '.join(options)} are")
    return options[name]


def _arguments(name: str, value: Value) -> list[str]:
    """As they would be typed."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    return [f"--{name}={each}" for each in (value if isinstance(value, list) else [value])]


def _kept_form(option: TyperOption, name: str, values: Sequence[str]) -> Value:
    """The values as they are kept. Raises ValueError where there are too many, or a switch is neither on nor off."""
    if option.is_flag:
        words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
        if len(values) != 1 or values[0].lower() not in words:
            raise ValueError(f"{name} {' '.join(values)}: true or false are allowed")
        return words[values[0].lower()]
    if len(values) != 1 and not option.multiple:
        raise ValueError(f"{name} takes one value, not {len(values)}")
    return list(values) if option.multiple else values[0]


def _name(param: TyperOption) -> str:
    longest = max(param.opts, key=len)
    return longest.lstrip("-")


def _text(value: Any) -> str:
    if value is None or value in ([], ()):
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

"""docs/lab.md says what the code does: every key, and a scenario that can be run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from shoal.lab import scenario
from shoal.lab.facts import ROUTER_SHARE_MAX

TEXT = (Path(__file__).parents[2] / "docs" / "lab.md").read_text()
KEYS: dict[str, list[type[msgspec.Struct]]] = {
    "### The scenario": [scenario.Scenario],
    "### `[devices.NAME]`": [scenario.DeviceSpec, scenario.FileSpec],
    "### `[[links]]`": [scenario.LinkSpec],
    "### `[workload]`": [scenario.Workload],
    "### `[[timeline]]`": list(get_args(scenario.Fault)),
}
TABLES = {"name", "devices", "links", "workload", "timeline"}
"""Sections of their own, and the name, which is the file's."""


@pytest.mark.parametrize("heading", KEYS)
def test_every_key_is_documented_where_it_belongs(heading: str) -> None:
    section = TEXT.split(heading, 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
    documented = set(re.findall(r"[`{ (]([a-z_]+)`|[`{ ,]([a-z_]+) = ", section))
    words = {word for pair in documented for word in pair if word}
    fields = {field.encode_name for table in KEYS[heading] for field in msgspec.structs.fields(table)}
    assert fields - words <= TABLES


def test_every_fault_is_documented() -> None:
    section = TEXT.split("### `[[timeline]]`", 1)[1]
    for kind in get_args(scenario.Fault):
        assert f"`{kind.__struct_config__.tag}`" in section


def test_the_example_is_a_scenario() -> None:
    example = re.search(r"```toml\n(.*?)```", TEXT, flags=re.DOTALL)
    assert example is not None
    found = scenario.parse(tomllib.loads(example[1]), label="docs/lab.md", name="example")
    assert list(found.devices) == ["laptop", "phone"]


def test_the_share_that_marks_a_run_is_the_documented_one() -> None:
    assert f"more than {ROUTER_SHARE_MAX:.0%} of its core".replace("%", " %") in TEXT

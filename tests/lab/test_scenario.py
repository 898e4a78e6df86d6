"""Scenarios: those of the library stand, and every mistake is one line that names the key. No lab is needed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from shoal.lab import scenario
from shoal.lab.facts import static_marks
from shoal.lab.paths import find_paths, path_delay_s, path_packet_bytes, path_rate_bit_s
from shoal.lab.shaping import packet_bytes_max

PAIR = """
[devices.left]
command = "sleep 5"

[devices.right]

[[links]]
between = ["left", "right"]
rate_mbit_s = 100
"""

MISTAKES = [
    ("devices = {}", "devices: there is none"),
    ("speed = 3", "unknown key `speed`"),
    ("seconds_max = 0", "seconds_max: 0.0 is not within 0.1 and 86400"),
    ("seconds_max = 'long'", "seconds_max: expected a number, got text"),
    ("mtu = 100", "mtu: 100 is not within 576 and 65000"),
    ("scale_bytes = nan", "scale_bytes: nan is not within"),
    ("hubs = ['left']", "hubs: 'left' is a device as well"),
    ("base = 7", "base: 7 is no scenario's name"),
    ("base = 'nowhere'", "no scenario 'nowhere': there are flaky, home4"),
    ("[devices.Left]", "devices.Left: a name has up to 32 of a-z"),
    ("[devices.third]\nmemory_mib = 'much'", "devices.third.memory_mib: expected a number, got text"),
    ("[devices.third]\nmemory_mb = 5", "devices.third: unknown key `memory_mb`"),
    ("[devices.third]\nmemory_mib = 1", "devices.third.memory_mib: 1048576 bytes after scaling"),
    ("[devices.third]\ndisk_mb_s = 0.001", "devices.third.disk_mb_s: 1000 bytes per second"),
    ("[devices.third]\ncores = 0.1", "devices.third.cores: 0.1 is not within 0.2 and 1024"),
    ("[devices.third]\ncore_set = 'all'", "devices.third.core_set: 'all' is no list of cores"),
    ('[devices.third]\ncommand = "\'"', "devices.third.command: cannot be split into words: No closing quotation"),
    ("[devices.third]\ncommand = ''", "devices.third.command: is empty"),
    ("[devices.third]\ncommand = 'ping {address:fourth}'", "devices.third.command: there is no 'fourth'; there are left"),
    ("[devices.third.environment]\nPEER = '{address:fourth}'", "devices.third.environment.PEER: there is no 'fourth'"),
    ("[devices.third]\nready_port = 80", "devices.third.ready_port: nothing would listen there"),
    ("[[devices.third.files]]\npath = '/nowhere/x'", "devices.third.files[0].path: there is no file /nowhere/x"),
    ("[[links]]\nbetween = ['left', 'middle']", "links[1]: there is no 'middle'; there are left, right"),
    ("[[links]]\nbetween = ['left', 'left']", "links[1]: 'left' cannot have a link to itself"),
    ("[[links]]\nbetween = ['left']", "links[1].between: expected a list of 2"),
    ("[[links]]\nbetween = 'left'", "links[1].between: expected a list, got text"),
    ("timeline = 3", "timeline: expected a list, got a whole number"),
    ("[[links]]\nfrom = 'left'", "links[1]: say `between = [A, B]` for both directions, or `from` and `to`"),
    ("[[links]]\nbetween = ['left', 'right']\nrate = 5", "links[1]: unknown key `rate`"),
    ("[[links]]\nbetween = ['left', 'right']\nrate_mbit_s = 0", "links[1].rate_mbit_s: 0.0 is not within"),
    ("[[links]]\nbetween = ['left', 'right']\nloss = 2", "links[1].loss: 2.0 is not within 0 and 1"),
    ("[[links]]\nbetween = ['left', 'right']\ndelay_ms = -1", "links[1].delay_ms: -1.0 is not within"),
    ("[workload]\nprogram = 'udp'", "workload.program: 'udp' is not known; there are tcp, none"),
    ("[workload]\ncommand = 'true'", "workload.device: say on which device the command runs"),
    ("[workload]\ndevice = 'middle'\ncommand = 'true'", "workload.device: there is no 'middle'"),
    ("[workload]\nprogram = 'tcp'\ncommand = 'true'", 'workload.command: the program "tcp" takes none'),
    ("[[timeline]]\nat_s = 1", "timeline[0]: the key `do` is missing"),
    ("[[timeline]]\ndo = 'explode'", "timeline[0].do: 'explode' is not known; there are kill, start, freeze"),
    ("[[timeline]]\ndo = 'kill'", "timeline[0]: the key `device` is missing"),
    ("[[timeline]]\ndo = 'kill'\ndevice = 'middle'", "timeline[0].device: there is no 'middle'"),
    ("[[timeline]]\ndo = 'kill'\nat_s = -1\ndevice = 'left'", "timeline[0].at_s: -1.0 is not within"),
    ("[[timeline]]\ndo = 'kill'\nevery_s = 0\ndevice = 'left'", "timeline[0].every_s: 0.0 is not within"),
    ("[[timeline]]\ndo = 'start'\ndevice = 'right'", "timeline[0].device: 'right' has no command to start"),
    ("[[timeline]]\ndo = 'disk'\ndevice = 'left'\ndisk_mb_s = 0", "timeline[0].disk_mb_s: 0.0 is no rate"),
    ("[[timeline]]\ndo = 'squeeze'\ndevice = 'left'\nmemory_mib = 1", "timeline[0].memory_mib: 1.0 is too little"),
    ("[[timeline]]\ndo = 'cut'", "timeline[0]: say `between"),
    ("[[timeline]]\ndo = 'change'\nbetween = ['left', 'right']\nloss = 9", "timeline[0].loss: 9.0 is not within 0 and 1"),
    ("[[timeline]]\ndo = 'redraw'\nrate_mbit_s = [9, 3]", "timeline[0].rate_mbit_s: [9.0, 3.0] is no range of rates"),
]


def load(folder: Path, text: str) -> scenario.Scenario:
    path = folder / "mine.toml"
    path.write_text(text)
    return scenario.load(str(path))


@pytest.mark.parametrize(("addition", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, addition: str, said: str) -> None:
    # Keys of the top come first in TOML, tables last.
    text = addition + PAIR if not addition.startswith("[") else PAIR + addition
    text = addition if addition == "devices = {}" else text
    with pytest.raises(ValueError) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert said in str(caught.value)
    assert str(caught.value).startswith("mine.toml: ") or "no scenario" in str(caught.value)


def test_broken_toml_and_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^mine.toml: is no TOML: Invalid value"):
        load(tmp_path, "devices = [")
    with pytest.raises(ValueError, match=r"^no scenario file .*none.toml$"):
        scenario.load(str(tmp_path / "none.toml"))
    with pytest.raises(ValueError, match=r"^mine.toml: base: 'mine.toml' is no scenario's name, or stands on itself$"):
        load(tmp_path, "base = 'mine.toml'")


@pytest.mark.parametrize("name", scenario.library())
def test_scenarios_of_the_library_stand(name: str) -> None:
    found = scenario.load(name)
    assert found.name == name
    assert found.about
    assert found.seconds_max < float("inf")
    paths = find_paths(list(found.devices), found.hubs, found.shapes, relay=found.relay)
    assert {source for source, _ in paths} == set(found.devices)
    for path in paths.values():
        rate = path_rate_bit_s(path, found.shapes)
        num_bytes = path_packet_bytes(path, found.shapes, limit=found.mtu)
        assert rate is None or num_bytes * 8 / rate <= 1e-3


def test_published_testbeds_have_their_published_figures() -> None:
    home = scenario.load("home4")
    shapes = home.shapes
    paths = find_paths(list(home.devices), home.hubs, shapes, relay=False)
    assert {path_rate_bit_s(path, shapes) for path in paths.values()} == {320e6, 510e6, 610e6}
    assert {3e-3, 4e-3, 5e-3, 6e-3} >= {round(path_delay_s(path, shapes), 6) for path in paths.values()}
    nine = scenario.load("netstorm9")
    assert len(nine.devices) == 9
    assert len(nine.shapes) == 26
    assert {shape.rate_bit_s for shape in nine.shapes.values()} == {100e6, 500e6}
    assert {shape.rate_bit_s for shape in scenario.load("netstorm9-150").shapes.values()} == {150e6}
    eight = scenario.load("tpi8")
    assert {(shape.rate_bit_s, shape.delay_s) for shape in eight.shapes.values()} == {(300e6, 1e-3)}
    assert {eight.memory_bytes(name) for name in eight.devices} == {8 << 30}


def test_a_scenario_stands_on_another(tmp_path: Path) -> None:
    found = load(tmp_path, "base = 'home4'\nscale_bytes = 0.01\n[devices.phone]\ncores = 0.5\n")
    assert list(found.devices) == ["mac-m1", "laptop", "desktop", "phone"]
    assert found.memory_bytes("phone") == int(1946 * (1 << 20) * 0.01)
    assert found.devices["phone"].cores == 0.5
    assert found.devices["laptop"].cores is None


def test_no_packet_takes_longer_than_a_millisecond() -> None:
    for rate_mbit_s in (4.7, 20, 90, 320, 1000, 40_000):
        num_bytes = packet_bytes_max(rate_mbit_s * 1e6)
        assert num_bytes * 8 / (rate_mbit_s * 1e6) <= 1e-3
        assert num_bytes >= 576
    assert packet_bytes_max(1e6) == 576
    assert packet_bytes_max(None, limit=1500) == 1500


def test_what_the_machine_cannot_do_is_marked() -> None:
    found = scenario.parse(tomllib.loads(PAIR), label="pair")
    assert static_marks(found, 2) == []
    assert "2 cores in all and this machine has 1" in static_marks(found, 1)[0]
    slow = scenario.parse({**tomllib.loads(PAIR), "links": [{"between": ["left", "right"], "rate_mbit_s": 1}]}, label="slow")
    assert "a packet takes 4.6 ms on the slow link from left to right" in static_marks(slow, 2)[0]


def test_paths_pass_over_hubs_and_over_devices_that_relay() -> None:
    table = {"devices": {"a": {}, "b": {}, "c": {}}, "hubs": ["h"]}
    links = [{"between": ["a", "b"]}, {"between": ["b", "c"], "delay_ms": 1}]
    line = scenario.parse({**table, "links": links}, label="line")
    assert ("a", "c") not in find_paths(["a", "b", "c"], ["h"], line.shapes, relay=False)
    assert find_paths(["a", "b", "c"], ["h"], line.shapes, relay=True)["a", "c"] == [("a", "b"), ("b", "c")]
    by_hub = scenario.parse({**table, "links": [*links, {"between": ["a", "h"]}, {"between": ["h", "c"]}]}, label="hub")
    paths = find_paths(["a", "b", "c"], ["h"], by_hub.shapes, relay=True)
    assert paths["a", "c"] == [("a", "h"), ("h", "c")], "of two ways as long, the one with less delay"

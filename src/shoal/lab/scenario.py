"""Scenarios: what a TOML file says about devices, links, workload and faults, checked before anything is made.

Every mistake is one line that names the file and the key. Figures carry their unit in their key's name. A scenario may
stand on another (`base = "home4"`): tables are merged key by key, everything else is replaced.
"""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from shoal.ids import LayerRange
from shoal.lab.cgroups import CORES_MIN, MEMORY_BYTES_MIN
from shoal.lab.paths import Pair, find_paths
from shoal.lab.shaping import PACKET_BYTES_MAX, PACKET_BYTES_MIN, LinkShape
from shoal.units import MIB

DEVICES_MAX = 64
SECONDS_MAX = 24 * 3600.0
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_CORE_SET = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
FILL_IN = re.compile(r"\{(address|files|home|python|seed|memory|device)(?::([a-z0-9-]+))?\}")
"""What commands and environments may name: of the device itself, or of another as in {address:laptop}."""
_BASES_MAX = 8
_DIRECTION_KEYS = ("between", "from", "to")


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""


class FileSpec(_Table, frozen=True):
    """A file of which the device gets its own copy, whole or only with `layers` = [first, stop)."""

    path: str
    layers: tuple[int, int] | None = None

    @property
    def layer_range(self) -> LayerRange | None:
        return LayerRange(*self.layers) if self.layers is not None else None


class DeviceSpec(_Table, frozen=True):
    """One device. What is not said is not limited.

    Attributes:
        memory_mib: cap of everything its processes use, page cache included; times `scale_bytes`.
        disk_mb_s: rate of reads from disk, 10^6 bytes per second; times `scale_bytes`.
        cores: processor time per time.
        core_set: the cores it may run on, such as "0-1".
        command: what runs there, from the start; text is split as a shell does, without one.
        ready_port: other commands start once it listens there.
        behind_nat: closed to connections from outside.
    """

    memory_mib: float | None = None
    disk_mb_s: float | None = None
    cores: float | None = None
    core_set: str | None = None
    command: str | list[str] | None = None
    environment: dict[str, str] = {}
    files: list[FileSpec] = []
    ready_port: int | None = None
    behind_nat: bool = False


class LinkSpec(_Table, frozen=True):
    """A link: `between` two ends, both directions alike, or `from` one `to` the other."""

    between: tuple[str, str] | None = None
    source: str | None = msgspec.field(name="from", default=None)
    target: str | None = msgspec.field(name="to", default=None)
    rate_mbit_s: float | None = None
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    queue_kb: float | None = None

    @property
    def shape(self) -> LinkShape:
        return LinkShape(
            rate_bit_s=self.rate_mbit_s * 1e6 if self.rate_mbit_s is not None else None,
            delay_s=self.delay_ms * 1e-3,
            jitter_s=self.jitter_ms * 1e-3,
            loss=self.loss,
            queue_bytes=int(self.queue_kb * 1000) if self.queue_kb is not None else None,
        )


class Workload(_Table, frozen=True):
    """What is measured. The run ends with it; without it, when every device's command has ended.

    Attributes:
        program: "tcp" measures every pair's rate and round trip; "none" is `command`.
        device: where `command` runs.
        seconds_per_pair: how long "tcp" fills each path.
        num_round_trips: how often "tcp" sends a small message there and back on each path.
        at_once: "tcp" fills all paths at the same time instead of one after another.
    """

    program: Literal["tcp", "none"] = "none"
    device: str | None = None
    command: str | list[str] | None = None
    seconds_per_pair: float = 1.0
    num_round_trips: int = 50
    at_once: bool = False


class _Fault(_Table, frozen=True, tag_field="do"):
    at_s: float = 0.0
    every_s: float | None = None


class _DeviceFault(_Fault, frozen=True, kw_only=True):
    device: str


class _LinkFault(_Fault, frozen=True):
    """One direction (`from`, `to`), both (`between`), or for `change` and `redraw` all links."""

    between: tuple[str, str] | None = None
    source: str | None = msgspec.field(name="from", default=None)
    target: str | None = msgspec.field(name="to", default=None)

    @property
    def pairs(self) -> list[Pair]:
        """Directed pairs that are meant; empty for all."""
        if self.between is not None:
            return [self.between, (self.between[1], self.between[0])]
        return [(self.source, self.target)] if self.source is not None and self.target is not None else []


class Kill(_DeviceFault, frozen=True, tag="kill"):
    """Every process of the device ends at once, as when its power fails."""


class Start(_DeviceFault, frozen=True, tag="start"):
    """The device's command starts (again)."""


class Freeze(_DeviceFault, frozen=True, tag="freeze"):
    """The device's processes stop where they are; its kernel still acknowledges what arrives."""


class Thaw(_DeviceFault, frozen=True, tag="thaw"):
    """They go on."""


class Sleep(_DeviceFault, frozen=True, tag="sleep"):
    """The lid is closed: processes stop, and nothing reaches the device or leaves it."""


class Wake(_DeviceFault, frozen=True, tag="wake"):
    """The lid is opened."""


class Squeeze(_DeviceFault, frozen=True, tag="squeeze", kw_only=True):
    """The device's memory cap becomes `memory_mib` (times `scale_bytes`), because its owner needs the rest."""

    memory_mib: float


class Disk(_DeviceFault, frozen=True, tag="disk", kw_only=True):
    """The device's disk reads at `disk_mb_s` (times `scale_bytes`) from now on, because others use it too."""

    disk_mb_s: float


class CloseInbound(_DeviceFault, frozen=True, tag="close-inbound"):
    """From now on only whom the device speaks to first can reach it."""


class OpenInbound(_DeviceFault, frozen=True, tag="open-inbound"):
    """Everybody can reach it."""


class ChangeAddress(_DeviceFault, frozen=True, tag="change-address"):
    """The device gets another address; connections of the old one break."""


class Cut(_LinkFault, frozen=True, tag="cut"):
    """The link, or every path between two devices without one, loses everything."""


class Heal(_LinkFault, frozen=True, tag="heal"):
    """It carries again."""


class Change(_LinkFault, frozen=True, tag="change"):
    """What is given changes, the rest stays."""

    rate_mbit_s: float | None = None
    delay_ms: float | None = None
    jitter_ms: float | None = None
    loss: float | None = None
    queue_kb: float | None = None


class Redraw(_LinkFault, frozen=True, tag="redraw", kw_only=True):
    """Every direction gets a rate drawn evenly from [low, high], by the seed."""

    rate_mbit_s: tuple[float, float]


Fault = (
    Kill | Start | Freeze | Thaw | Sleep | Wake | Squeeze | Disk | CloseInbound | OpenInbound | ChangeAddress
    | Cut | Heal | Change | Redraw
)  # fmt: skip


class Scenario(_Table, frozen=True):
    """A whole scenario.

    Attributes:
        about: one sentence for `shoal lab list`.
        seconds_max: the run is ended then, whatever happens.
        scale_bytes: factor of every device's memory and disk rate, so that a small model stands for a large one.
        hubs: points that only pass packets on: access points, routers.
        relay: whether devices pass packets on between others; pairs without a path are refused.
        mtu: largest packet; links slower than 1 ms per packet have smaller ones.
        multicast: whether multicast and broadcast reach everyone, as on one LAN.
        congestion_control: of TCP.
        cold: whether copies start outside the page cache.
    """

    name: str = ""
    about: str = ""
    seconds_max: float = 600.0
    seed: int = 0
    scale_bytes: float = 1.0
    devices: dict[str, DeviceSpec] = {}
    hubs: list[str] = []
    links: list[LinkSpec] = []
    relay: bool = False
    mtu: int = PACKET_BYTES_MAX
    multicast: bool = False
    congestion_control: str = "cubic"
    cold: bool = True
    workload: Workload = Workload()
    timeline: list[Fault] = []

    @property
    def shapes(self) -> dict[Pair, LinkShape]:
        """Every directed link; what comes later in the file holds."""
        shapes: dict[Pair, LinkShape] = {}
        for link in self.links:
            for pair in _pairs(link.between, link.source, link.target):
                shapes[pair] = link.shape
        return shapes

    def memory_bytes(self, device: str) -> int | None:
        mib = self.devices[device].memory_mib
        return int(mib * MIB * self.scale_bytes) if mib is not None else None

    def disk_bytes_s(self, device: str) -> int | None:
        mb_s = self.devices[device].disk_mb_s
        return int(mb_s * 1e6 * self.scale_bytes) if mb_s is not None else None


def library() -> dict[str, Path]:
    """The scenarios that come with shoal, by name."""
    folder = Path(str(resources.files("shoal.lab") / "scenarios"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(name: str) -> Scenario:
    """A scenario by the name it has in the library, or by its path.

    Raises:
        ValueError: one line with file, key, what stands there and what may.
    """
    path = _find(name)
    table = _with_bases(path, depth=0)
    return parse(table, label=path.name, name=path.stem)


def parse(table: dict[str, Any], *, label: str, name: str = "") -> Scenario:
    """Checks a table as TOML gives it. Raises ValueError as `load` does; `label` stands for the file."""
    try:
        scenario = msgspec.convert({"name": name, **table}, Scenario)
    except msgspec.ValidationError as error:
        raise ValueError(f"{label}: {_readable(str(error), table)}") from None
    check(scenario, label=label)
    return scenario


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise ValueError(f"no scenario file {name}")
        return path
    known = library()
    if name not in known:
        raise ValueError(f"no scenario '{name}': there are {', '.join(known)}; or give the path of a .toml file")
    return known[name]


def _with_bases(path: Path, *, depth: int) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: is no TOML: {error}") from None
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str) or depth >= _BASES_MAX:
        raise ValueError(f"{path.name}: base: {base!r} is no scenario's name, or stands on itself")
    beside = path.parent / base
    return _merge(_with_bases(beside if beside.is_file() else _find(base), depth=depth + 1), table)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _readable(text: str, table: dict[str, Any]) -> str:
    """'Expected `float`, got `str` - at `$.devices[...].cores`' -> 'devices.d1.cores: expected a number, got text'."""
    text, _, where = text.partition(" - at `")
    where = where.rstrip("`").removeprefix("$").lstrip(".")
    if "[...]" in where:  # msgspec does not say which key of a table; the first that it refuses is meant
        where = where.replace("devices[...]", f"devices.{_first_wrong_device(table)}").replace("[...]", "")
    for pattern, words in (
        (r"Object contains unknown field `(.*?)`", r"unknown key `\1`"),
        (r"Object missing required field `(.*?)`", r"the key `\1` is missing"),
        (r"Invalid (?:enum )?value '(.*?)'", rf"'\1' is not known; there are {', '.join(_known(where))}"),
        (r"Expected `(.*?)`, got `(.*?)`", _types_in_words),
        (r"Expected `(.*?)` of length (\d+)", r"expected a list of \2"),
    ):
        text = re.sub(pattern, words, text)
    return f"{where}: {text}" if where else text


def _types_in_words(match: re.Match[str]) -> str:
    names = {"float": "a number", "int": "a whole number", "str": "text", "bool": "true or false", "array": "a list"}
    expected, got = (
        " or ".join(names.get(kind, "a table") for kind in kinds.split(" | ") if kind != "null") for kinds in match.groups()
    )
    return f"expected {expected}, got {got}"


def _known(where: str) -> list[str]:
    """What may stand under a key that takes few words."""
    if where == "workload.program":
        return ["tcp", "none"]
    return [str(kind.__struct_config__.tag) for kind in get_args(Fault)]


def _first_wrong_device(table: dict[str, Any]) -> str:
    for name, device in table.get("devices", {}).items():
        try:
            msgspec.convert(device, DeviceSpec)
        except msgspec.ValidationError:
            return str(name)
    return "?"


# ---- what types cannot say


def check(scenario: Scenario, *, label: str) -> None:
    """Raises ValueError for the first thing that cannot be; see `load`."""
    for key, problem in _problems(scenario):
        raise ValueError(f"{label}: {key}: {problem}")


def _problems(scenario: Scenario) -> Iterator[tuple[str, str]]:
    devices = scenario.devices
    if not devices:
        yield "devices", "there is none: add a table such as [devices.laptop]"
    if len(devices) > DEVICES_MAX:
        yield "devices", f"{len(devices)} are too many for one machine; {DEVICES_MAX} are allowed"
    for name in [*devices, *scenario.hubs]:
        if not _NAME.fullmatch(name):
            yield f"devices.{name}", "a name has up to 32 of a-z, 0-9 and -, and begins with a letter or digit"
    for name in scenario.hubs:
        if name in devices:
            yield "hubs", f"'{name}' is a device as well"
    yield from _range_problems(
        [
            ("seconds_max", scenario.seconds_max, 0.1, SECONDS_MAX),
            ("scale_bytes", scenario.scale_bytes, 1e-6, 1e3),
            ("mtu", scenario.mtu, PACKET_BYTES_MIN, PACKET_BYTES_MAX),
        ]
    )
    for name in devices:
        yield from _device_problems(scenario, name)
    nodes = {*devices, *scenario.hubs}
    for index, link in enumerate(scenario.links):
        key = f"links[{index}]"
        yield from _end_problems(key, link.between, link.source, link.target, nodes, required=True)
        yield from _shape_problems(key, link)
    yield from _workload_problems(scenario)
    for index, fault in enumerate(scenario.timeline):
        yield from _fault_problems(f"timeline[{index}]", fault, scenario)


def _device_problems(scenario: Scenario, name: str) -> Iterator[tuple[str, str]]:
    device, key = scenario.devices[name], f"devices.{name}"
    memory_bytes, disk_bytes_s = scenario.memory_bytes(name), scenario.disk_bytes_s(name)
    if memory_bytes is not None and memory_bytes < MEMORY_BYTES_MIN:
        yield f"{key}.memory_mib", f"{memory_bytes} bytes after scaling: at least {MEMORY_BYTES_MIN} are needed"
    if disk_bytes_s is not None and disk_bytes_s < 4096:
        yield f"{key}.disk_mb_s", f"{disk_bytes_s} bytes per second after scaling: at least 4096 are needed"
    yield from _range_problems(
        [(f"{key}.cores", device.cores, CORES_MIN, 1024.0), (f"{key}.ready_port", device.ready_port, 1, 65535)]
    )
    if device.core_set is not None and not _CORE_SET.fullmatch(device.core_set):
        yield f"{key}.core_set", f"'{device.core_set}' is no list of cores: write \"0-1,4\""
    yield from _command_problems(f"{key}.command", device.command, scenario.devices)
    for variable, text in device.environment.items():
        yield from _placeholder_problems(f"{key}.environment.{variable}", [text], scenario.devices)
    if device.ready_port is not None and device.command is None:
        yield f"{key}.ready_port", "nothing would listen there: the device has no command"
    names = [Path(file.path).name for file in device.files]
    for index, file in enumerate(device.files):
        if not Path(file.path).expanduser().is_file():
            yield f"{key}.files[{index}].path", f"there is no file {file.path}"
        if names.count(names[index]) > 1:
            yield f"{key}.files[{index}].path", f"two files are called {names[index]}"
        if file.layers is not None and not 0 <= file.layers[0] < file.layers[1]:
            yield f"{key}.files[{index}].layers", f"{list(file.layers)} is no range: write [first, stop]"


def _shape_problems(key: str, link: LinkSpec | Change) -> Iterator[tuple[str, str]]:
    yield from _range_problems(
        [
            (f"{key}.rate_mbit_s", link.rate_mbit_s, 0.008, 1e6),
            (f"{key}.delay_ms", link.delay_ms, 0.0, 60_000.0),
            (f"{key}.jitter_ms", link.jitter_ms, 0.0, 60_000.0),
            (f"{key}.loss", link.loss, 0.0, 1.0),
            (f"{key}.queue_kb", link.queue_kb, 0.0, 1e6),
        ]
    )


def _workload_problems(scenario: Scenario) -> Iterator[tuple[str, str]]:
    workload = scenario.workload
    yield from _command_problems("workload.command", workload.command, scenario.devices)
    if workload.program == "tcp":
        if workload.command is not None:
            yield "workload.command", 'the program "tcp" takes none'
        yield from _range_problems(
            [
                ("workload.seconds_per_pair", workload.seconds_per_pair, 0.1, 600.0),
                ("workload.num_round_trips", workload.num_round_trips, 0, 100_000),
            ]
        )
    elif workload.command is not None:
        if workload.device is None:
            yield "workload.device", "say on which device the command runs"
        else:
            yield from _name_problems("workload.device", workload.device, scenario.devices)


def _fault_problems(key: str, fault: Fault, scenario: Scenario) -> Iterator[tuple[str, str]]:
    yield from _range_problems(
        [(f"{key}.at_s", fault.at_s, 0.0, SECONDS_MAX), (f"{key}.every_s", fault.every_s, 0.05, SECONDS_MAX)]
    )
    if isinstance(fault, _DeviceFault):
        yield from _name_problems(f"{key}.device", fault.device, scenario.devices)
        if isinstance(fault, Start) and scenario.devices[fault.device].command is None:
            yield f"{key}.device", f"'{fault.device}' has no command to start"
        if isinstance(fault, Squeeze) and fault.memory_mib * MIB * scenario.scale_bytes < MEMORY_BYTES_MIN:
            yield f"{key}.memory_mib", f"{fault.memory_mib} is too little: at least {MEMORY_BYTES_MIN} bytes after scaling"
        if isinstance(fault, Disk) and fault.disk_mb_s <= 0:
            yield f"{key}.disk_mb_s", f"{fault.disk_mb_s} is no rate: it must be above 0"
    elif isinstance(fault, _LinkFault):
        required = isinstance(fault, (Cut, Heal))
        nodes = {*scenario.devices, *scenario.hubs}
        yield from _end_problems(key, fault.between, fault.source, fault.target, nodes, required=required)
        shapes = scenario.shapes
        for pair in fault.pairs:
            if pair not in shapes and not (required and pair in _reachable(scenario)):
                yield key, f"there is no link from {pair[0]} to {pair[1]}"
        if isinstance(fault, Change):
            yield from _shape_problems(key, fault)
        if isinstance(fault, Redraw):
            low, high = fault.rate_mbit_s
            if not 0.008 <= low <= high <= 1e6:
                yield f"{key}.rate_mbit_s", f"[{low}, {high}] is no range of rates"


def _reachable(scenario: Scenario) -> Iterable[Pair]:
    return find_paths(list(scenario.devices), scenario.hubs, scenario.shapes, relay=scenario.relay)


def _end_problems(
    key: str, between: tuple[str, str] | None, source: str | None, target: str | None, nodes: set[str], *, required: bool
) -> Iterator[tuple[str, str]]:
    given = [between is not None, source is not None, target is not None]
    if not any(given) and not required:
        return
    if given not in ([True, False, False], [False, True, True]):
        yield key, "say `between = [A, B]` for both directions, or `from` and `to` for one"
        return
    pair = _pairs(between, source, target)[0]
    for name in pair:
        yield from _name_problems(key, name, nodes)
    if pair[0] == pair[1]:
        yield key, f"'{pair[0]}' cannot have a link to itself"


def _pairs(between: tuple[str, str] | None, source: str | None, target: str | None) -> list[Pair]:
    if between is not None:
        return [between, (between[1], between[0])]
    assert source is not None
    assert target is not None
    return [(source, target)]


def _name_problems(key: str, name: str, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    if name not in known:
        yield key, f"there is no '{name}'; there are {', '.join(sorted(known))}"


def _range_problems(figures: Iterable[tuple[str, float | None, float, float]]) -> Iterator[tuple[str, str]]:
    for key, value, low, high in figures:
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            yield key, f"{value} is not within {low:g} and {high:g}"


def _command_problems(key: str, command: str | list[str] | None, devices: Iterable[str]) -> Iterator[tuple[str, str]]:
    if command is None:
        return
    try:
        words = split_command(command)
    except ValueError as error:
        yield key, f"cannot be split into words: {error}"
        return
    if not words:
        yield key, "is empty"
    yield from _placeholder_problems(key, words, devices)


def _placeholder_problems(key: str, texts: Iterable[str], devices: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        for match in FILL_IN.finditer(text):
            if match[2] is not None:
                yield from _name_problems(key, match[2], devices)


def split_command(command: str | list[str]) -> list[str]:
    """Text as a shell would split it; a list is taken as it is."""
    return shlex.split(command) if isinstance(command, str) else list(command)

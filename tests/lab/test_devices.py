"""Devices have the memory, disk, processor and processes that the scenario gives them, and faults are theirs alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import LabError
from shoal.ids import LayerRange
from shoal.lab import scenario
from shoal.lab.cluster import DeviceProcess
from shoal.lab.copies import make_cold, model_extents
from shoal.lab.facts import disk_marks
from shoal.lab.records import members
from shoal.lab.scenario import Freeze, Kill, Sleep, Squeeze, Start, Thaw, Wake
from shoal.units import MIB
from tests.lab.fixture import MakeLab, on_a_steady_host

pytestmark = pytest.mark.slow
TinyModel = Callable[[str, str], Path]

_TAKE = "import sys, time; taken = b'x' * int(float(sys.argv[1]) * 2**20); print('taken', flush=True); time.sleep(60)"
_COUNT = "import sys, time\nfor number in range(10**6): print(number, flush=True); time.sleep(0.01)"
_READ = """
import json, os, sys, time
windows, began = [0], time.monotonic()
with open(sys.argv[1], "rb", buffering=0) as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # or the kernel reads ahead, in lumps of megabytes
    while chunk := file.read(1 << 17):
        index = int((time.monotonic() - began) / 0.5)
        windows += [0] * (index + 1 - len(windows))
        windows[index] += len(chunk)
print(json.dumps(windows))
"""
_SPIN = """
import json, sys, time
stop, last, gap = time.monotonic() + float(sys.argv[1]), time.monotonic(), 0.0
while last < stop:
    now = time.monotonic()
    gap, last = max(gap, now - last), now
print(json.dumps(gap))
"""


def devices(**specs: dict[str, Any]) -> dict[str, Any]:
    return {"devices": specs}


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, arguments)]


def says(process: DeviceProcess, word: str, *, within_s: float = 10.0) -> None:
    give_up_s = time.monotonic() + within_s
    while word not in process.stdout.read_text():
        assert process.exit_status is None, process.stderr.read_text()
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


# ---- memory


def test_who_exceeds_its_cap_is_killed_and_nobody_else(lab: MakeLab) -> None:
    network = lab(devices(small={"memory_mib": 48}, large={"memory_mib": 160}))
    neighbour = network.start("large", python(_TAKE, 64))
    says(neighbour, "taken")
    greedy = network.start("small", python(_TAKE, 64))
    assert greedy.wait(20) == 128 + 9
    assert "taken" not in greedy.stdout.read_text()
    assert network.usage("small").oom_kills >= 1
    assert network.usage("small").memory_bytes_peak <= 48 * MIB
    assert network.usage("large").oom_kills == 0
    assert neighbour.exit_status is None
    assert network.run("small", python("print('again')"))[:2] == (0, "again\n"), "the device itself lives on"


def test_page_cache_counts_and_each_device_pays_for_its_own_copy(lab: MakeLab, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(24 * MIB))
    files = [{"path": str(file)}]
    network = lab(
        devices(one={"files": files, "memory_mib": 128}, two={"files": files}, three={"files": files, "memory_mib": 16})
    )
    inodes = {(network.files_folder(name) / "weights").stat().st_ino for name in network.devices}
    assert len(inodes | {file.stat().st_ino}) == 4
    for name in ("one", "two", "one", "three"):
        status, _, said = network.run(name, python(_READ, "{files}/weights"))
        assert status == 0, said
    used = {name: network.usage(name) for name in network.devices}
    assert used["one"].memory_bytes_peak >= 24 * MIB, "the cache is the device's memory"
    for name in ("one", "two"):
        assert 24 * MIB <= used[name].bytes_read <= 28 * MIB, "from cold, and once: the second time it was cached"
    assert used["three"].memory_bytes_peak <= 16 * MIB
    assert used["three"].oom_kills == 0, "cache gives way"


def test_a_squeezed_device_has_less(lab: MakeLab) -> None:
    network = lab(devices(one={"memory_mib": 256}))
    assert network.run("one", python("b'x' * (100 << 20)"))[0] == 0
    assert network.apply(Squeeze(device="one", memory_mib=48)) == ""
    assert network.run("one", python("b'x' * (100 << 20)"))[0] == 128 + 9
    says(network.start("one", python(_TAKE, 24)), "taken")


def test_a_squeeze_below_what_is_in_use_says_so_or_kills(lab: MakeLab) -> None:
    network = lab(devices(one={"memory_mib": 256}))
    holder = network.start("one", python(_TAKE, 100))
    says(holder, "taken")
    said = network.apply(Squeeze(device="one", memory_mib=32))
    if said:
        assert "what is in use cannot be reclaimed" in said
        assert holder.exit_status is None
    else:
        assert holder.wait(10) == 128 + 9


# ---- disk and processor


@pytest.mark.parametrize(
    "rate", [20.0, pytest.param(5.0, marks=pytest.mark.full), pytest.param(150.0, marks=pytest.mark.full)]
)
def test_the_disk_is_as_slow_as_it_says_in_every_half_second(lab: MakeLab, tmp_path: Path, rate: float) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(int(rate * 3.2e6)))
    network = lab(devices(slow={"disk_mb_s": rate, "files": [{"path": str(file)}]}))

    def attempt() -> None:
        make_cold(network.files_folder("slow"))
        status, out, said = network.run("slow", python(_READ, "{files}/weights"))
        assert status == 0, said
        # The first has what the kernel had saved up while nothing was read (at most 0.2 s worth); the last is cut short.
        windows = json.loads(out)[1:-1]
        assert len(windows) >= 4
        rates = [num_bytes / 0.5 / 1e6 for num_bytes in windows]
        assert all(abs(found / rate - 1) <= 0.07 for found in rates), f"{rates} of {rate} MB/s"

    on_a_steady_host(attempt)


def test_read_ahead_that_is_much_for_a_slow_disk_is_marked() -> None:
    slow = scenario.parse(devices(slow={"disk_mb_s": 5}, fast={"disk_mb_s": 1000}, free={}), label="test")
    (mark,) = disk_marks(slow, read_ahead_bytes=8 << 20)
    assert mark.startswith("this machine reads ahead by 8.4 MB, which take 1.68 s of slow's disk")
    assert disk_marks(slow, read_ahead_bytes=128 << 10) == []


def test_half_a_core_is_slow_and_not_jerky(lab: MakeLab) -> None:
    network = lab(devices(half={"cores": 0.5, "core_set": "0"}))

    def attempt() -> None:
        before = network.usage("half")
        status, out, _ = network.run("half", python(_SPIN, 1.0))
        used = network.usage("half")
        assert status == 0
        assert 0.4 <= used.cpu_s - before.cpu_s <= 0.62, f"{used.cpu_s - before.cpu_s:.2f} s of processor in one"
        assert used.throttled_s > before.throttled_s
        assert float(out) <= 0.02, f"it stood for {float(out) * 1e3:.1f} ms"

    on_a_steady_host(attempt)
    assert network.run("half", python("import os; print(os.sched_getaffinity(0))"))[1] == "{0}\n"


# ---- commands


def test_commands_have_the_devices_name_folder_environment_and_output(lab: MakeLab) -> None:
    network = lab(
        devices(
            one={"environment": {"PEER": "{address:two}", "WHERE": "{files}"}},
            two={},
        )
    )
    code = (
        "import os, socket\n"
        "print(socket.gethostname(), os.environ['PEER'], os.environ['WHERE'], os.environ['HOME'], os.getcwd())"
    )
    status, out, said = network.run("one", python(code))
    home = str(network.device_folder("one") / "home")
    assert (status, said) == (0, "")
    assert out.split() == ["one", network.address("two"), str(network.files_folder("one")), home, home]
    assert network.run("two", python("import sys; print('bad', file=sys.stderr); sys.exit(3)")) == (3, "", "bad\n")
    assert network.run("two", ["no-such-command"])[0] == 127
    assert network.run("two", python("import os; os.abort()"))[0] == 128 + 6


def test_a_copy_of_some_layers_is_sparse_and_holds_them(lab: MakeLab, tiny_model: TinyModel) -> None:
    model = tiny_model("llama", "Q8_0")
    network = lab(devices(one={"files": [{"path": str(model), "layers": [1, 2]}]}))
    copy = network.files_folder("one") / model.name
    assert copy.stat().st_size == model.stat().st_size
    assert copy.stat().st_blocks < 0.8 * model.stat().st_blocks
    original, found = model.read_bytes(), copy.read_bytes()
    for first, stop in model_extents(model, LayerRange(1, 2)):
        assert found[first:stop] == original[first:stop]
    assert found != original


# ---- faults


def test_a_killed_device_starts_again_and_the_other_never_knew(lab: MakeLab) -> None:
    command = [sys.executable, "-S", "-c", _COUNT]
    network = lab(devices(one={"command": command}, two={"command": command}))
    network.start_commands()
    first, neighbour = network.processes("one")[0], network.processes("two")[0]
    says(first, "5")
    child = network.start("one", ["sh", "-c", "sleep 60 & sleep 60"])
    network.apply(Kill(device="one"))
    assert first.wait(5) == child.wait(5) == 128 + 9
    assert members(network.record, "one") == [], "children too"
    assert neighbour.exit_status is None
    network.apply(Start(device="one"))
    says(network.processes("one")[-1], "5")


def test_frozen_stands_still_and_thawed_goes_on(lab: MakeLab) -> None:
    network = lab(devices(one={}, two={}))
    counters = {name: network.start(name, python(_COUNT)) for name in network.devices}
    for counter in counters.values():
        says(counter, "5")

    def counted(name: str, seconds: float = 0.3) -> int:
        before = counters[name].stdout.stat().st_size
        time.sleep(seconds)
        return counters[name].stdout.stat().st_size - before

    network.apply(Freeze(device="one"))
    time.sleep(0.05)
    assert counted("one") == 0
    assert counted("two") > 0
    network.apply(Thaw(device="one"))
    assert counted("one") > 0
    network.apply(Freeze(device="one"))
    network.apply(Kill(device="one"))
    assert counters["one"].wait(5) == 128 + 9, "what is frozen can be killed"


def test_asleep_hears_nothing_and_awake_goes_on(lab: MakeLab) -> None:
    table = {**devices(one={}, two={}), "links": [{"between": ["one", "two"]}]}
    network = lab(table)
    server = network.start(
        "two", python("import socket, time; s = socket.create_server(('', 99)); print('up', flush=True); time.sleep(99)")
    )
    says(server, "up")
    dial = python(
        "import socket, sys\n"
        "try: socket.create_connection(('two', 99), timeout=0.5); print('connected')\n"
        "except OSError as error: print(error)"
    )
    network.apply(Freeze(device="two"))
    assert network.run("one", dial)[1] == "connected\n", "a frozen device's kernel answers"
    network.apply(Thaw(device="two"))
    network.apply(Sleep(device="two"))
    assert network.run("one", dial)[1] == "timed out\n", "one asleep does not"
    network.apply(Wake(device="two"))
    assert network.run("one", dial)[1] == "connected\n"


def test_a_command_that_never_listens_is_one_line(lab: MakeLab) -> None:
    command = [sys.executable, "-S", "-c", "import sys; sys.exit('no model here')"]
    network = lab(devices(one={"command": command, "ready_port": 80}))
    with pytest.raises(LabError, match=r"^one: .* ended with status 1 before it listened on port 80: no model here$"):
        network.start_commands()

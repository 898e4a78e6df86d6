"""The fixture `lab`: clusters for tests, taken down after each, and skipped with the reason where there can be none.

    def test_something(lab):
        home = lab("home4", scale_bytes=0.01)              # a scenario by name or path, changed
        pair = lab({"devices": {"a": {}, "b": {"memory_mib": 64}}, "links": [{"between": ["a", "b"], "rate_mbit_s": 100}]})
        status, out, err = pair.run("a", ["ping", "-c1", "b"])
        pair.apply(Cut(between=("a", "b")))

What comes back is an open `shoal.lab.cluster.Lab`; its commands start with `start_commands`. A test that starts labs in
another way, such as by the command line, asks for `lab_folder` or carries the marker `lab`.

Whoever measures time uses `on_a_steady_host`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil
import pytest

from shoal.lab import cgroups, namespaces, records, requirements, scenario
from shoal.lab.cluster import Lab
from shoal.lab.run import start_traffic_agents
from shoal.lab.scenario import Scenario
from shoal.lab.traffic import Agents

FOLDER = Path(__file__).parents[2] / ".cache" / "lab"
"""On the repository's disk, since reads from the memory that /tmp often is cannot be slowed."""
ATTEMPTS = 4
OTHERS_SHARE_MAX = 0.25
WAKE_LATE_S_MAX = 0.0005
"""A round trip in the lab wakes a sleeper about eight times; an idle host wakes one at most 0.3 ms late."""


class MakeLab(Protocol):
    def __call__(self, wanted: str | Path | dict[str, Any] | Scenario, *, seed: int = 0, **changes: Any) -> Lab:
        """An open lab of a scenario, with `changes` to its keys."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use a lab carry its marker, and are skipped where there can be none."""
    lacks: list[str] | None = None
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "lab_folder" in names:
            item.add_marker("lab")
        if item.get_closest_marker("lab") is not None:
            lacks = requirements.missing() if lacks is None else lacks
            if lacks:
                item.add_marker(pytest.mark.skip(reason=f"no lab without {'; '.join(lacks)}"))


@pytest.fixture(scope="session")
def _swept() -> None:
    """What an earlier run of the tests left when it was killed is removed before the first lab."""
    (FOLDER / "labs").mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(records.FOLDER_VARIABLE, str(FOLDER))
        for record in list(records.all_records()):
            if record.is_orphan:
                records.remove(record)


@pytest.fixture
def lab_folder(monkeypatch: pytest.MonkeyPatch, _swept: None) -> Iterator[Path]:
    """Where labs of this test live, those of its child processes too. Afterwards there is none of this test left."""
    monkeypatch.setenv(records.FOLDER_VARIABLE, str(FOLDER))
    before = {record.id for record in records.all_records()}
    yield FOLDER
    left = [record for record in records.all_records() if record.id not in before and record.owner.pid == os.getpid()]
    for record in left:
        records.remove(record)
    assert not left, f"labs left open: {', '.join(record.id for record in left)}"


@pytest.fixture
def lab(lab_folder: Path) -> Iterator[MakeLab]:
    """Makes labs; see the head of this file."""
    assert records.root_folder() == lab_folder
    made: list[records.LabRecord] = []
    with contextlib.ExitStack() as stack:

        def make(wanted: str | Path | dict[str, Any] | Scenario, *, seed: int = 0, **changes: Any) -> Lab:
            if isinstance(wanted, dict):
                wanted = scenario.parse(wanted, label="test", name="test")
            elif not isinstance(wanted, Scenario):
                wanted = scenario.load(str(wanted))
            wanted = msgspec.structs.replace(wanted, **changes)
            scenario.check(wanted, label="test")
            opened = stack.enter_context(Lab(wanted, seed=seed))
            made.append(opened.record)
            return opened

        yield make
    for record in made:
        assert traces(record) == []


def traces(record: records.LabRecord) -> list[str]:
    """What a lab has left on this machine, in words."""
    hierarchy = cgroups.detect()
    found = [f"namespace {name}" for name in record.namespaces.values() if namespaces.identity(name) is not None]
    found += [f"group {folder}" for name in record.groups.values() for folder in hierarchy.folders(name) if folder.exists()]
    beside = [
        process for process in (record.router, record.owner, *record.helpers) if process and process.pid != os.getpid()
    ]
    found += [f"process {process.pid}" for process in beside if process.is_running()]
    found += [f"process {process.pid} of {name}" for name in record.groups for process in records.members(record, name)]
    found += [f"folder {folder}" for folder in [records.folder_of(record.id)] if folder.exists()]
    return found


def traffic(lab: Lab) -> Agents:
    """Agents on every device, which send and measure."""
    agents = Agents(start_traffic_agents(lab), {name: lab.address(name) for name in lab.devices})
    agents.wait_ready()
    return agents


def on_a_steady_host(attempt: Callable[[], None], *, attempts: int = ATTEMPTS) -> None:
    """Tries a measurement again when it misses its bound, since others may take the processors away.

    A bound holds if one of at most `attempts` measurements keeps it: a lab that is off by its own doing is off in all of
    them. If none does, the test fails and tells of every attempt. Only if the host was unsteady in each of them is it
    skipped, since nothing can be said then: others had more than `OTHERS_SHARE_MAX` of the processors, or right after the
    attempt, with the lab at rest, a sleeper was woken more than `WAKE_LATE_S_MAX` late.
    """
    told, steady = [], False
    for number in range(1, attempts + 1):
        others_s, began_s = _others_s(), time.monotonic()
        try:
            attempt()
            return
        except AssertionError as error:
            share = (_others_s() - others_s) / (time.monotonic() - began_s) / (os.cpu_count() or 1)
            late_s = _wake_late_s()
            steady |= share <= OTHERS_SHARE_MAX and late_s <= WAKE_LATE_S_MAX
            host = f"others had {share:.0%} of the processors, sleepers woke {1e3 * late_s:.2f} ms late"
            told.append(f"attempt {number} ({host}): {str(error).splitlines()[0]}")
    if not steady:
        pytest.skip(f"this machine is too busy for it: {'; '.join(told)}")
    raise AssertionError("\n".join(told))


def _wake_late_s(*, sleeps: int = 200, sleep_s: float = 0.002) -> float:
    """How late this host wakes a sleeper, in seconds: of a hundred sleeps the worst but one."""
    late_s = []
    for _ in range(sleeps):
        began_s = time.perf_counter()
        time.sleep(sleep_s)
        late_s.append(time.perf_counter() - began_s - sleep_s)
    return sorted(late_s)[-1 - sleeps // 100]


def _others_s() -> float:
    """Processor time of everybody but this process and those it has started."""
    machine = psutil.cpu_times()
    busy_s = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0)
    own_s = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            own_s += sum(process.cpu_times()[:4])  # its own, and what its ended children have used
    return float(busy_s - own_s)

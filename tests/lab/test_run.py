"""`shoal lab` as a user meets it: runs with their facts and tables, labs that stay up, and every fault of a timeline."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from shoal.cli.lab import report
from shoal.lab import records, scenario
from shoal.lab.facts import Facts
from shoal.lab.run import run
from shoal.lab.scenario import Scenario, Workload
from tests.lab.fixture import on_a_steady_host, traces
from tests.lab.test_cleaning import shoal

pytestmark = [pytest.mark.slow, pytest.mark.lab]

EVERY_FAULT = """
seconds_max = 4
multicast = true

[devices.one]
command = "{python} -m shoal.lab.traffic agent {home}/agent.sock"
ready_port = 5201
memory_mib = 128

[devices.two]
command = "{python} -m shoal.lab.traffic agent {home}/agent.sock"
ready_port = 5201

[devices.watcher]

[[links]]
between = ["one", "two"]
rate_mbit_s = 50

[[links]]
between = ["watcher", "one"]
delay_ms = 1

[[links]]
between = ["watcher", "two"]
delay_ms = 1

[workload]
device = "watcher"
command = "{python} -m shoal.lab.traffic watch 3 one two"
"""
FAULTS = [
    "do = 'cut'\nat_s = 0.2\nfrom = 'one'\nto = 'two'",
    "do = 'heal'\nat_s = 0.3\nfrom = 'one'\nto = 'two'",
    "do = 'change'\nat_s = 0.35\nbetween = ['one', 'two']\nrate_mbit_s = 20\ndelay_ms = 3\nloss = 0.1\nqueue_kb = 50",
    "do = 'freeze'\nat_s = 0.4\ndevice = 'two'",
    "do = 'thaw'\nat_s = 0.5\ndevice = 'two'",
    "do = 'squeeze'\nat_s = 0.55\ndevice = 'one'\nmemory_mib = 64",
    "do = 'close-inbound'\nat_s = 0.6\ndevice = 'two'",
    "do = 'open-inbound'\nat_s = 0.7\ndevice = 'two'",
    "do = 'change-address'\nat_s = 0.8\ndevice = 'two'",
    "do = 'sleep'\nat_s = 0.9\ndevice = 'one'",
    "do = 'wake'\nat_s = 1.7\ndevice = 'one'",
    "do = 'redraw'\nat_s = 1.0\nevery_s = 1.0\nfrom = 'one'\nto = 'two'\nrate_mbit_s = [5, 15]",
    "do = 'kill'\nat_s = 1.8\ndevice = 'two'",
    "do = 'start'\nat_s = 2.3\ndevice = 'two'",
]


def tcp(name: str, **changes: Any) -> Scenario:
    found = scenario.load(name)
    workload = msgspec.structs.replace(found.workload, **changes)
    return msgspec.structs.replace(found, workload=workload)


def check_matrix(facts: Facts) -> None:
    """Every pair that was measured is within 7 % of its rate, and 1 ms + 10 % of its round trip."""
    assert facts.ended == "workload"
    for row in facts.workload["pairs"]:
        where = f"{row['from']} > {row['to']}"
        assert "problem" not in row, where
        assert abs(row["rate_mbit_s"] / row["scenario_rate_mbit_s"] - 1) <= 0.07, f"{where}: {row}"
        assert row["rtt_ms_p50"] >= row["scenario_rtt_ms"], f"{where}: {row}"
        assert row["rtt_ms_p50"] <= row["scenario_rtt_ms"] * 1.1 + 1.0, f"{where}: {row}"


# ---- runs


def test_home4s_links_are_as_it_says_and_its_tables_fit(lab_folder: Path) -> None:
    def attempt() -> None:
        said: list[str] = []
        facts = run(tcp("home4", seconds_per_pair=0.4, num_round_trips=10), say=said.append)
        assert any(line.startswith("measuring ") and " of 12: " in line for line in said)
        assert len(facts.workload["pairs"]) == 12
        check_matrix(facts)
        for link in facts.links:
            assert link.num_bytes > 15e6
            assert link.rate_mbit_s_peak <= (link.rate_mbit_s_max or 0) * 1.05
        for device in facts.devices:
            assert 0 < device.memory_bytes_peak < 100e6
            assert device.cpu_s > 0
            assert device.exit_statuses == [None]
        assert 0 < facts.router.core_share_mean <= facts.router.core_share_peak < 1
        assert any("the devices may use 4 cores in all" in mark for mark in facts.marks)
        assert msgspec.json.decode(Path(facts.logs, "facts.json").read_bytes(), type=Facts) == facts
        check_tables(facts)

    assert lab_folder.is_dir()
    on_a_steady_host(attempt)


def check_tables(facts: Facts) -> None:
    written = io.StringIO()
    report(facts, Console(width=80, file=written))
    lines = written.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    rows = [line.split() for line in lines if "%" in line]
    for row, pair in zip(rows, facts.workload["pairs"], strict=True):
        rate, wanted = pair["rate_mbit_s"], pair["scenario_rate_mbit_s"]
        assert row[:4] == [pair["from"], pair["to"], f"{rate:.1f}", f"{wanted:.1f}"]


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["home4", "netstorm9", "netstorm9-150", "tpi8", "pair-lan"])
def test_measured_matrices_are_the_scenarios(lab_folder: Path, name: str) -> None:
    assert lab_folder.is_dir()
    wanted = scenario.load(name)
    if name == "tpi8":
        wanted = tcp(name, seconds_per_pair=0.6)
    on_a_steady_host(lambda: check_matrix(run(wanted)), attempts=2)


def test_a_run_prints_a_table_or_one_json_object(lab_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('base = "pair-wan"\n[workload]\nseconds_per_pair = 0.1\nnum_round_trips = 3\n')
    done = shoal("lab", "run", str(path), columns=80)
    assert done.returncode == 0, done.stderr
    assert "links, measured with TCP, and as the scenario has them" in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines() if "%" in line] == [["here", "there"], ["there", "here"]]
    as_json = shoal("lab", "run", str(path), "--json", "--seed", "9")
    assert as_json.stderr == ""
    facts = msgspec.json.decode(as_json.stdout, type=Facts)
    assert facts.seed == 9
    assert [row["scenario_rate_mbit_s"] for row in facts.workload["pairs"]] == [100.0, 100.0]
    assert lab_folder.is_dir()


def test_every_fault_of_a_timeline_happens_when_it_is_due(lab_folder: Path, tmp_path: Path) -> None:
    assert lab_folder.is_dir()
    path = tmp_path / "faults.toml"
    path.write_text(EVERY_FAULT + "".join(f"\n[[timeline]]\n{fault}\n" for fault in FAULTS))

    def attempt() -> None:
        facts = run(scenario.load(str(path)), seed=5)
        assert facts.ended == "workload"
        done = [(executed.do, executed.at_s) for executed in facts.timeline if executed.do != "redraw"]
        assert sorted(done) == sorted(
            (one["do"], one["at_s"]) for one in map(tomllib.loads, FAULTS) if one["do"] != "redraw"
        )
        assert [executed.at_s for executed in facts.timeline if executed.do == "redraw"] == [1.0, 2.0, 3.0]
        assert all(executed.problem == "" for executed in facts.timeline)
        late_s = max(executed.done_s - executed.at_s for executed in facts.timeline)
        assert late_s < 0.15, f"{late_s:.3f} s late"
        two = next(device for device in facts.devices if device.name == "two")
        assert two.exit_statuses == [137, None], f"killed and started again: {two.exit_statuses}"
        assert two.address == "10.77.1.2"
        link = next(link for link in facts.links if (link.source, link.target) == ("one", "two"))
        assert 5 <= (link.rate_mbit_s_max or 0) <= 15
        assert link.delay_ms == 3
        asleep, killed = facts.workload["one"]["outages"], facts.workload["two"]["outages"]
        assert any(0.7 <= first <= 1.1 and 1.6 <= stop <= 2.4 for first, stop in asleep), asleep
        assert any(stop >= 2.3 for first, stop in killed), killed

    on_a_steady_host(attempt)


@pytest.mark.full
def test_flaky_has_its_outages(lab_folder: Path) -> None:
    assert lab_folder.is_dir()
    facts = run(scenario.load("flaky"))
    assert facts.ended == "workload"
    assert len(facts.timeline) == 8
    laptop, tablet = facts.workload["laptop"], facts.workload["tablet"]
    assert any(2.5 <= first <= 3.5 and 4.5 <= stop <= 8 for first, stop in tablet["outages"]), "cut"
    assert any(6.5 <= first <= 7.5 and 10.5 <= stop <= 14 for first, stop in laptop["outages"]), "asleep"
    assert any(19.5 <= first <= 20.5 and 23.5 <= stop <= 27 for first, stop in laptop["outages"]), "killed"
    assert tablet["outages"][-1][1] < 25, "with its new address it is found again"


def test_a_run_is_bounded_in_time_and_says_so(lab_folder: Path, tmp_path: Path) -> None:
    assert lab_folder.is_dir()
    path = tmp_path / "endless.toml"
    path.write_text('[devices.one]\ncommand = "sleep 300"\n')
    done = shoal("lab", "run", str(path), "--seconds", "0.5", "--json")
    assert done.returncode == 1
    facts = msgspec.json.decode(done.stdout, type=Facts)
    assert facts.ended == "time limit"
    assert 0.4 <= facts.seconds <= 5


def test_what_a_workload_prints_and_its_status_are_facts(lab_folder: Path) -> None:
    assert lab_folder.is_dir()
    table = {
        "devices": {"one": {}},
        "workload": {"device": "one", "command": ["sh", "-c", 'echo noise; echo "{\\"x\\": 7}"; exit 3']},
    }
    facts = run(scenario.parse(table, label="test", name="test"))
    assert facts.workload == {"x": 7}
    assert facts.workload_status == 3
    assert [failure.rpartition(" ended ")[2] for failure in facts.failures] == ["with status 3"]
    table["workload"] = {}
    table["devices"] = {"one": {"command": "no-such-command 1"}}
    facts = run(scenario.parse(table, label="test", name="test"))
    assert facts.failures == [
        "one: `no-such-command 1` ended with status 127: shoal lab: cannot run 'no-such-command': No such file or directory"
    ]
    table["devices"] = {"one": {"command": "echo 1"}, "two": {"command": "echo plain words"}}
    facts = run(scenario.parse(table, label="test", name="test"))
    assert (facts.ended, facts.failures) == ("commands", [])
    assert facts.workload == {"one": 1, "two": "plain words"}
    assert Path(facts.logs, "two-0.out").read_text() == "plain words\n"


@pytest.mark.full
def test_a_busy_router_and_busy_cores_are_marked(lab_folder: Path) -> None:
    assert lab_folder.is_dir()
    table = {
        "devices": {"a": {}, "b": {}},
        "links": [{"between": ["a", "b"]}],
        "mtu": 1500,  # many small packets without a limit are more than any router in Python can carry
        "workload": msgspec.to_builtins(Workload(program="tcp", seconds_per_pair=2.5, num_round_trips=0, at_once=True)),
    }
    facts = run(scenario.parse(table, label="test", name="test"))
    assert any("of its core at its peak, more than 0.7" in mark for mark in facts.marks), facts.router


# ---- labs that stay


def test_a_lab_stays_up_is_entered_and_goes_down(lab_folder: Path) -> None:
    assert lab_folder.is_dir()
    up = shoal("lab", "up", "pair-wan", "--detach", "--hours", "0.05")
    assert up.returncode == 0, up.stderr
    (record,) = [record for record in records.all_records() if record.scenario == "pair-wan"]
    try:
        assert shoal("lab", "exec", "here", "hostname").stdout == "here\n"
        assert shoal("lab", "exec", "here", "--", "sh", "-c", "exit 4").returncode == 4
        unknown = shoal("lab", "exec", "nowhere", "true")
        assert unknown.returncode != 0
        assert "has no device 'nowhere'; it has here, there" in " ".join(unknown.stderr.split())
        links = json.loads(shoal("lab", "links", "--json").stdout)
        assert [(link["source"], link["target"]) for link in links] == [("here", "there"), ("there", "here")]
        table = shoal("lab", "links", columns=80).stdout
        assert max(len(line.rstrip()) for line in table.splitlines()) <= 80
        assert [line.split()[:4] for line in table.splitlines()][3] == ["here", "there", "100", "25"]
    finally:
        down = shoal("lab", "down")
    assert down.returncode == 0, down.stderr
    assert traces(record) == []
    again = shoal("lab", "down")
    assert again.returncode != 0
    assert "no lab is running here: `shoal lab up SCENARIO` starts one" in again.stderr


def test_the_list_and_the_mistakes_of_the_command_line() -> None:
    listed = shoal("lab", "list")
    for name in scenario.library():
        assert name in listed.stdout
    wrong = shoal("lab", "run", "home5")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().count("\n") == 0
    assert "no scenario 'home5': there are flaky, home4" in wrong.stderr

"""Real processes of members in a lab, and what happens to their links: at most one side of a group commits, both sides go
on, and all agree again afterwards.

`make check-faults` runs all of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from shoal.lab.cluster import Lab
from shoal.lab.member_cluster import Line, MemberProcess, make_cluster, make_group, wait_active
from shoal.lab.scenario import (
    ChangeAddress,
    CloseInbound,
    Cut,
    Fault,
    Freeze,
    Heal,
    Kill,
    OpenInbound,
    Sleep,
    Thaw,
    Wake,
)
from shoal.simulation.plan import parse_plan, run_plan
from tests.lab.fixture import MakeLab

pytestmark = [pytest.mark.full, pytest.mark.timeout(180)]
GROUP = "run"
PORT = 7434
WITHIN_S = 15.0


class Members:
    """Devices of one cluster and one group, each in its own place of a lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.devices = {name: self._start(name) for name in lab.devices}
        """By name; the first one made the group."""

    def _start(self, name: str) -> MemberProcess:
        folder = self.lab.device_folder(name) / "state"
        return MemberProcess(folder, name, f"--listen=0.0.0.0:{PORT}", way_in=self.lab.way_in(name))

    def __getitem__(self, name: str) -> MemberProcess:
        return self.devices[name]

    def of(self, names: str) -> list[MemberProcess]:
        """'ab' -> those two."""
        return [self.devices[name] for name in names]

    def restart(self, name: str) -> MemberProcess:
        self.devices[name].stop()
        self.devices[name] = self._start(name)
        return self.devices[name]

    def apply(self, *faults: Fault) -> None:
        for fault in faults:
            self.lab.apply(fault)

    def part(self, left: str, right: str) -> None:
        """Nothing passes between these."""
        self.apply(*(Cut(between=(a, b)) for a in left for b in right))

    def join(self, left: str, right: str) -> None:
        self.apply(*(Heal(between=(a, b)) for a in left for b in right))

    def marks(self) -> dict[str, int]:
        return {name: len(device.lines) for name, device in self.devices.items()}

    def agree(self, names: str, since: dict[str, int]) -> Line:
        """Waits until the group is exactly these and each of them knows; returns the record."""
        found = [wait_active(self[name], GROUP, self.of(names), since=since.get(name, 0)) for name in names]
        return found[0]

    def check_history(self) -> None:
        """No epoch has two records, on whichever device they were adopted; no device went back."""
        records: dict[int, tuple[str, ...]] = {}
        for device in self.devices.values():
            epochs = []
            for line in device.told("RecordAdopted", group=GROUP):
                content = (line["leader"], *sorted(line["active"]), str(line["cut_links"]))
                assert records.setdefault(line["epoch"], content) == content, f"epoch {line['epoch']} was committed twice"
                epochs.append(line["epoch"])
            assert epochs == sorted(epochs)

    def stop(self) -> None:
        for device in self.devices.values():
            device.stop()


@contextmanager
def members(lab: MakeLab, names: str) -> Iterator[Members]:
    """Devices `names[0]`, `names[1]`, ... on one network, in one group."""
    links = [{"between": [name, "switch"], "rate_mbit_s": 100, "delay_ms": 0.5} for name in names]
    opened = lab({"devices": {name: {} for name in names}, "hubs": ["switch"], "links": links, "seconds_max": 300})
    found = Members(opened)
    try:
        make_cluster(list(found.devices.values()))
        make_group(list(found.devices.values()), GROUP)
        yield found
        found.check_history()
    finally:
        found.stop()


def gone(witness: MemberProcess, lost: MemberProcess, since: int) -> float:
    """When the witness found that it is gone, on the clock of all."""
    line = witness.wait_for(
        lambda line: line["is"] == "MemberGone" and line["node"] == lost.node, since=since, within_s=WITHIN_S
    )
    return float(line["at_s"])


def here(witness: MemberProcess, other: MemberProcess, since: int) -> Line:
    return witness.wait_for(
        lambda line: line["is"] == "MemberHere" and line["node"] == other.node, since=since, within_s=2 * WITHIN_S
    )


def suspended(device: MemberProcess, since: int) -> Line:
    return device.wait_for(lambda line: line["is"] == "Suspended" and line["group"] == GROUP, since=since, within_s=WITHIN_S)


def can_decide(members: Members, names: str) -> None:
    """Some member leaves the group and comes back: nothing but a quorum brings that about."""
    last = names[-1]
    for verb, left in (("exit", names.replace(last, "")), ("enter", names)):
        since = members.marks()
        members[last].say(verb, GROUP)
        for name in left:
            wait_active(members[name], GROUP, members.of(left), since=since[name])


@pytest.mark.parametrize(("left", "right"), [("ab", "c"), ("bc", "a")], ids=["leader-in-two", "leader-alone"])
def test_partition_two_to_one(lab: MakeLab, left: str, right: str) -> None:
    with members(lab, "abc") as three:
        since = three.marks()
        three.part(left, right)
        three.agree(left, since)
        suspended(three[right], since[right])
        can_decide(three, left)
        # The lone one is alive, and says what it knows.
        assert three[right].ask("status", answer="status")["members"]
        since = three.marks()
        three.join(left, right)
        three.agree("abc", since)


@pytest.mark.parametrize("moved", [False, True], ids=["first-leader", "second-leader"])
@pytest.mark.parametrize(("left", "right"), [("ab", "cd"), ("cd", "ab")], ids=["leader-left", "leader-right"])
def test_partition_two_to_two(lab: MakeLab, left: str, right: str, moved: bool) -> None:
    """Half of the voters with the first of them is a quorum, the other half never is, wherever the leader was."""
    with members(lab, "abcd") as four:
        if moved:  # whoever leads leaves, so that another does
            can_decide(four, "bcda")
        since = four.marks()
        four.part(left, right)
        winners, losers = (left, right) if one_half_goes_on(four, left, right, since) else (right, left)
        for name in losers:
            suspended(four[name], since[name])
        can_decide(four, winners)
        since = four.marks()
        four.join(left, right)
        four.agree("abcd", since)


def one_half_goes_on(four: Members, left: str, right: str, since: dict[str, int]) -> bool:
    """Whether the left half does; exactly one must."""
    end_s = time.monotonic() + WITHIN_S
    while time.monotonic() < end_s:
        went_on = []
        for half in (left, right):
            nodes = {four[name].node for name in half}
            told = [four[name].told("RecordAdopted", since=since[name], group=GROUP) for name in half]
            went_on.append(all(any(set(line["active"]) == nodes for line in lines) for lines in told))
        if any(went_on):
            assert not all(went_on)
            return went_on[0]
        time.sleep(0.05)
    raise AssertionError("neither half goes on")


def test_partition_one_to_one(lab: MakeLab) -> None:
    with members(lab, "ab") as two:
        since = two.marks()
        two.part("a", "b")
        two.agree("a", since)
        suspended(two["b"], since["b"])
        since = two.marks()
        two.join("a", "b")
        two.agree("ab", since)


def test_a_link_that_is_cut_one_way_is_used_no_more_and_nobody_is_gone(lab: MakeLab) -> None:
    with members(lab, "abc") as three:
        since = three.marks()
        three.apply(Cut(source="b", target="c"))
        cut = [three["b"].node, three["c"].node]
        line = three["a"].wait_for(
            lambda line: line["is"] == "RecordAdopted" and cut in line["cut_links"], since=since["a"], within_s=WITHIN_S
        )
        assert len(line["active"]) == 3
        time.sleep(2.0)
        for device in three.devices.values():
            assert not device.told("MemberGone", since=since[device.name])
        since = three.marks()
        three.apply(Heal(source="b", target="c"))
        three["a"].wait_for(
            lambda line: line["is"] == "RecordAdopted" and not line["cut_links"], since=since["a"], within_s=WITHIN_S
        )


@pytest.mark.parametrize("lost", ["a", "c"], ids=["leader", "member"])
def test_a_killed_device_is_replaced_and_comes_back(lab: MakeLab, lost: str) -> None:
    with members(lab, "abcd") as four:
        rest = "abcd".replace(lost, "")
        since = four.marks()
        four.apply(Kill(device=lost))
        for name in rest:
            gone(four[name], four[lost], since[name])
        four.agree(rest, since)
        can_decide(four, rest)
        four.restart(lost).say("enter", GROUP)
        four.agree("abcd", {**four.marks(), lost: 0})


@pytest.mark.parametrize("lost", ["a", "c"], ids=["leader", "member"])
def test_a_frozen_device_is_left_out_and_comes_back(lab: MakeLab, lost: str) -> None:
    with members(lab, "abcd") as four:
        rest = "abcd".replace(lost, "")
        since = four.marks()
        four.apply(Freeze(device=lost))
        four.agree(rest, since)
        can_decide(four, rest)
        since = four.marks()
        four.apply(Thaw(device=lost))
        four.agree("abcd", since)


def test_a_device_that_sleeps_for_eight_hours_is_a_stranger_until_it_has_caught_up(lab: MakeLab) -> None:
    with members(lab, "abc") as three:
        since = three.marks()
        three.apply(Sleep(device="c"))
        three.agree("ab", since)
        three["c"].say("skip", str(8 * 3600))  # read when it wakes: so long has passed for it
        since = three.marks()
        three.apply(Wake(device="c"))
        three.agree("abc", since)
        can_decide(three, "abc")


def test_changed_addresses_are_found_again(lab: MakeLab) -> None:
    with members(lab, "abc") as three:
        since = three.marks()
        three.apply(ChangeAddress(device="b"))
        for name in "ac":
            here(three[name], three["b"], since[name])
        can_decide(three, "abc")


def test_a_device_with_closed_ports_dials_the_others(lab: MakeLab) -> None:
    with members(lab, "abc") as three:
        three.apply(CloseInbound(device="c"))
        three.part("a", "c")
        time.sleep(2.0)
        three.join("a", "c")
        # It was lost for a while or not; now it is here, and decides with the others.
        deadline_s = time.monotonic() + 30.0
        while time.monotonic() < deadline_s:
            seen = {member["name"]: member for member in three["a"].ask("status", answer="status")["members"]}
            if seen["c"]["presence"] == "here" and seen["c"]["link"]:
                break
            time.sleep(0.2)
        assert seen["c"]["link"]
        three["c"].say("enter", GROUP)
        three["a"].wait_for(
            lambda line: line["is"] == "RecordAdopted" and len(line["active"]) == 3, since=0, within_s=WITHIN_S
        )
        can_decide(three, "abc")
        three.apply(OpenInbound(device="c"))


def test_twenty_joins_and_leaves(lab: MakeLab) -> None:
    with members(lab, "abcd") as four:
        began_s = time.monotonic()
        for number in range(20):
            name = "bcd"[number % 3]
            since = four.marks()
            four[name].say("exit", GROUP)
            rest = "abcd".replace(name, "")
            for each in rest:
                wait_active(four[each], GROUP, four.of(rest), since=since[each])
            since = four.marks()
            four[name].say("enter", GROUP)
            four.agree("abcd", since)
        assert time.monotonic() - began_s < 60.0


# ---- the simulator says what real devices do

PLAYED = """\
devices a b c
at 0.1 create run a
at 0.3 enter run b; enter run c
at 5 split a b | c
at 9 mend all
at 15 crash a
at 20 start a
at 21 enter run a
heal 26
"""

Course = list[tuple[tuple[str, ...], tuple[str, ...]]]
"""Who was active and which links were cut, record by record, from the first one with all of them. Of links that are cut one
way TCP knows more than the simulator: acknowledgements do not come back either."""


def course(steps: Iterable[tuple[set[str], set[str]]]) -> Course:
    found: Course = []
    for active, cut in steps:
        step = (tuple(sorted(active)), tuple(sorted(cut)))
        if (found or len(active) == 3) and (not found or found[-1] != step):
            found.append(step)
    return found


def simulated(plan: str, device: str) -> Course:
    outcome = run_plan(parse_plan(plan))
    assert outcome.failure is None
    told = rf"^ *[\d.]+ +{device} +run: epoch \d+ of generation 1 is \[([^\]]*)\](?:, not over (.*))?$"
    return course(
        ({name for name in found[1].split() if not name.endswith("?")}, set((found[2] or "").split()))
        for found in re.finditer(told, str(outcome.story), flags=re.MULTILINE)
    )


def test_the_simulator_and_the_lab_tell_the_same_course(lab: MakeLab) -> None:
    with members(lab, "abc") as three:
        since = three.marks()
        three.part("ab", "c")
        three.agree("ab", since)
        since = three.marks()
        three.join("ab", "c")
        three.agree("abc", since)
        since = three.marks()
        three.apply(Kill(device="a"))
        three.agree("bc", since)
        killed, since = three["a"], three.marks()
        three.restart("a").say("enter", GROUP)
        three.agree("abc", {**since, "a": 0})
        names = {device.node: name for name, device in three.devices.items()}
        for name, device in three.devices.items():
            told = [*killed.told("RecordAdopted", group=GROUP)] if name == "a" else []
            lived = course(
                (
                    {names[node] for node in line["active"]},
                    {f"{names[source]}>{names[target]}" for source, target in line["cut_links"]},
                )
                for line in [*told, *device.told("RecordAdopted", group=GROUP)]
            )
            assert lived == simulated(PLAYED, name), name

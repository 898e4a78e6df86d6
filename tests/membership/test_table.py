"""The tables are complete, say what they mean, and are what docs/protocols shows."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

import pytest

from shoal.lab import protocol_pages
from shoal.membership.failure import PEER, Peer
from shoal.membership.group import GROUP_EVENTS, RECEPTIONS, ROLE, STANDING, Role
from shoal.membership.messages import GroupMessage, MembershipMessage
from shoal.membership.table import Impossible, Outcome, Table, pairs
from shoal.node.trust import TRUST

PAGES = Path(__file__).parents[2] / "docs" / "protocols"
TABLES = [PEER, ROLE, STANDING, TRUST]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_state_has_an_entry_for_every_event(table: Table[Any]) -> None:
    everything = {(state, event) for state in table.states for event in table.events}
    assert table.entries.keys() | table.unmoved | table.impossible == everything
    assert len(everything) == len(table.entries) + len(table.unmoved) + len(table.impossible)
    for pair in everything - table.impossible:
        assert table[pair].state in table.states
    for pair in table.impossible:
        with pytest.raises(Impossible, match="cannot happen"):
            table[pair]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_state_is_reached_and_left(table: Table[Any]) -> None:
    arrows = {(state, outcome.state) for (state, _), outcome in table.entries.items()}
    reached, fringe = {table.start}, [table.start]
    while fringe:
        source = fringe.pop()
        for state, target in arrows:
            if state is source and target not in reached:
                reached.add(target)
                fringe.append(target)
    assert reached == set(table.states)
    assert all(any(source is state and target is not state for source, target in arrows) for state in table.states)


def test_a_missing_entry_is_found_when_the_table_is_made() -> None:
    class Lamp(StrEnum):
        OFF = "off"
        ON = "on"

    meanings = {Lamp.OFF: "dark", Lamp.ON: "bright"}
    entries = {(Lamp.OFF, "press"): Outcome(Lamp.ON)}
    with pytest.raises(AssertionError, match=r"\(on, press\) has 0 entries"):
        Table("lamp", Lamp.OFF, entries, meanings=meanings)
    with pytest.raises(AssertionError, match=r"\(off, press\) has 2 entries"):
        Table("lamp", Lamp.OFF, entries, meanings=meanings, unmoved=pairs((Lamp.OFF, Lamp.ON), "press"))
    with pytest.raises(AssertionError, match="meaning"):
        Table("lamp", Lamp.OFF, entries, meanings={}, unmoved=pairs((Lamp.ON,), "press"))
    assert (
        Table("lamp", Lamp.OFF, entries, meanings=meanings, unmoved=pairs((Lamp.ON,), "press"))[Lamp.ON, "press"].state
        is Lamp.ON
    )


def test_every_group_message_says_who_acts_on_it() -> None:
    kinds = {kind for kind in get_args(MembershipMessage) if issubclass(kind, GroupMessage)}
    assert RECEPTIONS.keys() == kinds
    for reception in RECEPTIONS.values():
        assert set(reception.roles) <= set(Role)
        assert set(reception.answers) <= set(get_args(MembershipMessage))


def test_the_five_events_are_described() -> None:
    assert [event.name for event in GROUP_EVENTS] == ["scale-out", "scale-in", "failure", "connect-link", "disconnect-link"]


@pytest.mark.parametrize("name", sorted(protocol_pages.pages()))
def test_pages_are_up_to_date(name: str) -> None:
    assert (PAGES / name).read_text() == protocol_pages.pages()[name], "run `make pages`"


def test_pages_are_written_where_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert protocol_pages.main([str(tmp_path / "pages")]) == 0
    assert {path.name for path in (tmp_path / "pages").iterdir()} == set(protocol_pages.pages())
    assert protocol_pages.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_a_peer_that_counts_as_here_is_announced_so() -> None:
    """What `MemberHere` and `MemberGone` say in the table agrees with which states count as here."""
    here = {Peer.HERE, Peer.DOUBTED, Peer.CUT}
    for (state, event), outcome in PEER.entries.items():
        announced = {kind.__name__ for kind in outcome.announces}
        assert ("MemberHere" in announced) == (state not in here and outcome.state in here), (state, event)
        assert ("MemberGone" in announced) == (state in here and outcome.state not in here), (state, event)

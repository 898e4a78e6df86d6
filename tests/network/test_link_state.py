"""Link states: the table says what the states mean, and holds for any sequence of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.membership.table import Impossible
from shoal.network.link_state import LINK, RECOVERED_SHARE, SLOWED_SHARE, LinkState, next_state

UNKNOWN, PROBING, UP, DEGRADED, DOWN = LinkState


@pytest.mark.parametrize(
    ("state", "event", "after"),
    [
        (UNKNOWN, "probe sent", PROBING),
        (PROBING, "probe expired", UNKNOWN),
        (PROBING, "measured", UP),
        (UNKNOWN, "measured", UP),
        (UP, "probe sent", UP),
        (UP, "slowed", DEGRADED),
        (DEGRADED, "measured", DEGRADED),
        (DEGRADED, "recovered", UP),
        (DOWN, "measured", DOWN),
        (DOWN, "connected", UNKNOWN),
    ],
)
def test_states_follow_events(state: LinkState, event: str, after: LinkState) -> None:
    assert next_state(state, event) is after


@pytest.mark.parametrize("state", LinkState)
def test_what_is_lost_is_down_and_begins_anew(state: LinkState) -> None:
    assert next_state(state, "lost") is DOWN
    assert next_state(next_state(state, "lost"), "connected") is LINK.start is UNKNOWN


@given(st.lists(st.sampled_from(LINK.events)))
def test_only_what_was_measured_is_up(events: list[str]) -> None:
    state, is_measured = LINK.start, False
    for event in events:
        if (state, event) in LINK.impossible:
            with pytest.raises(Impossible):
                next_state(state, event)
            continue
        is_measured = event != "lost" and (is_measured or (event == "measured" and state is not DOWN))
        state = next_state(state, event)
        assert (state in (UP, DEGRADED)) == is_measured


def test_a_link_at_the_border_does_not_flap() -> None:
    assert SLOWED_SHARE < RECOVERED_SHARE < 1.0

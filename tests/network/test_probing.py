"""Probes go where there is most to gain, one at a time, and never beyond their budget."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.effects import MeasureLink
from shoal.ids import NodeId
from shoal.network.graph import Figure, Link
from shoal.network.probing import ProbeCandidate, Prober, ProbingPolicy, possible_gain

ME = NodeId("m")
POLICY = ProbingPolicy()


def candidate(peer: str, rate: float | None, *, at_s: float = 0.0, is_lower_bound: bool = False) -> ProbeCandidate:
    figure = None if rate is None else Figure(rate, (0.1 * rate) ** 2, 4.0, at_s, is_lower_bound)
    return ProbeCandidate(link=Link(ME, NodeId(peer)), rate=figure, round_trip_s=0.02, connected_at_s=0.0)


def prober() -> Prober:
    return Prober(POLICY, me=ME, now_s=0.0)


def chosen(*candidates: ProbeCandidate, now_s: float = 1000.0) -> str | None:
    probe, _ = prober().choose(candidates, now_s=now_s)
    return probe.peer if probe else None


def test_of_equals_the_oldest_is_probed() -> None:
    assert chosen(candidate("a", 1e6, at_s=500.0), candidate("b", 1e6, at_s=100.0), candidate("c", 1e6, at_s=900.0)) == "b"


def test_of_the_same_age_the_one_that_may_be_fastest() -> None:
    assert chosen(candidate("a", 1e6, at_s=950.0), candidate("b", 9e6, at_s=950.0), candidate("c", 1e5, at_s=950.0)) == "b"


def test_a_lower_bound_may_be_anything() -> None:
    fastest = candidate("c", 9e6, at_s=999.0)
    assert chosen(candidate("a", 1e6, at_s=950.0, is_lower_bound=True), candidate("b", 1e6, at_s=950.0), fastest) == "a"
    assert possible_gain(None, age_s=0.0, best_bytes_per_s=1e6, drift_per_s=0.01) == 1.0


def test_a_slow_link_is_probed_too_when_it_is_old_enough() -> None:
    assert chosen(candidate("slow", 1e5, at_s=0.0), candidate("fast", 9e6, at_s=970.0)) == "slow"


def test_what_carries_work_is_not_probed() -> None:
    probe, again_s = prober().choose([candidate("a", 1e6, at_s=999.0)], now_s=1000.0)
    assert probe is None
    assert again_s == pytest.approx(999.0 + POLICY.age_s_min)


def test_what_was_never_seen_at_its_limit_is_measured_as_if_unknown() -> None:
    carries_little = candidate("a", 1e4, at_s=999.0, is_lower_bound=True)
    one = prober()
    probe, _ = one.choose([carries_little], now_s=1000.0)
    assert probe == MeasureLink(NodeId("a"), POLICY.start_up_bytes, POLICY.probe_s_max)
    one.finish(carries_little.link)
    probe, again_s = one.choose([carries_little], now_s=1001.0)
    assert probe is None
    assert again_s == pytest.approx(1000.0 + POLICY.age_s_min)


def test_never_measured_links_go_first_and_begin_after_the_own_id() -> None:
    candidates = [candidate("a", None), candidate("z", None), candidate("b", 1e6)]
    one = prober()
    probe, _ = one.choose(candidates, now_s=1000.0)
    assert probe == MeasureLink(NodeId("z"), POLICY.start_up_bytes, POLICY.probe_s_max)
    assert one.choose(candidates, now_s=1000.1) == (None, one.expires_s)  # one at a time
    one.finish(Link(ME, NodeId("z")))
    probe, _ = one.choose(candidates, now_s=1000.2)
    assert probe is not None
    assert probe.peer == "a"


def test_a_probe_that_comes_to_nothing_makes_room_and_is_no_start_up_again() -> None:
    one = prober()
    link = Link(ME, NodeId("a"))
    one.choose([candidate("a", None)], now_s=0.0)
    assert one.outstanding == link
    assert one.expire(0.5) is None
    expires_s = one.expires_s
    assert expires_s is not None
    assert one.expire(expires_s) == link
    probe, again_s = one.choose([candidate("a", None)], now_s=expires_s)
    assert probe is None
    assert again_s is not None
    probe, again_s = one.choose([candidate("a", None)], now_s=again_s + 1e-3)
    while probe is None:
        assert again_s is not None
        probe, again_s = one.choose([candidate("a", None)], now_s=again_s + 1e-3)
    assert probe.num_bytes_max == POLICY.chunk_bytes


def test_many_new_links_get_small_probes_when_what_was_saved_is_spent() -> None:
    one = prober()
    candidates = [candidate(f"p{index:03}", None) for index in range(200)]
    sizes, now_s = [], 0.0
    while now_s < 100.0:
        probe, again_s = one.choose(candidates, now_s=now_s)
        if probe is None:
            assert again_s is not None
            now_s = again_s + 1e-3
        else:
            sizes.append(probe.num_bytes_max)
            assert one.outstanding is not None
            one.finish(one.outstanding)
    num_large = POLICY.saved_bytes_max // POLICY.start_up_bytes
    assert sizes[:num_large] == [POLICY.start_up_bytes] * num_large
    assert set(sizes[num_large:]) == {POLICY.chunk_bytes}
    assert sum(sizes) <= POLICY.saved_bytes_max + 100.0 * POLICY.budget_bytes_per_s_min + POLICY.chunk_bytes


def test_an_answer_is_what_was_measured_after_the_question() -> None:
    one = prober()
    one.choose([candidate("a", None)], now_s=10.0)
    link = Link(ME, NodeId("a"))
    assert not one.is_answered(link, measured_s=9.9)
    assert not one.is_answered(Link(ME, NodeId("b")), measured_s=11.0)
    assert one.is_answered(link, measured_s=10.1)


def test_a_long_link_gets_a_chunk_that_fills_it() -> None:
    long = ProbeCandidate(link=Link(ME, NodeId("a")), rate=Figure(1e7, 0.0, 9.0, 0.0), round_trip_s=0.05, connected_at_s=0.0)
    probe, _ = prober().choose([long], now_s=1000.0)
    assert probe is not None
    assert probe.num_bytes_max == 4 * 1e7 * 0.05


PEERS = ("a", "b", "n", "z")
ACTS = st.lists(
    st.tuples(
        st.floats(0.0, 40.0),  # time that passes
        st.sampled_from(("answer", "fall silent", "lose", "measure")),
        st.sampled_from(PEERS),
        st.one_of(st.none(), st.floats(1e3, 1e9)),
    ),
    min_size=1,
    max_size=120,
)


@given(acts=ACTS)
@settings(deadline=None)
def test_in_no_span_do_probes_exceed_the_budget(acts: list[tuple[float, str, str, float | None]]) -> None:
    one = prober()
    now_s = 0.0
    candidates = {peer: candidate(peer, None) for peer in PEERS}
    sent: list[tuple[float, int]] = []
    for gap_s, act, peer, rate in acts:
        now_s += gap_s
        link = Link(ME, NodeId(peer))
        if act == "answer" and one.outstanding is not None:
            answered = one.outstanding.target
            candidates[answered] = candidate(answered, rate, at_s=now_s)
            one.finish(one.outstanding)
        elif act == "lose":
            candidates[peer] = candidate(peer, None)
            one.finish(link)
        elif act == "measure":
            candidates[peer] = candidate(peer, rate, at_s=now_s)
        one.expire(now_s)
        was_busy = one.outstanding is not None
        probe, again_s = one.choose(candidates.values(), now_s=now_s)
        if probe is None:
            assert again_s is None or again_s >= now_s or was_busy
            continue
        assert not was_busy
        sent.append((now_s, probe.num_bytes_max))
    for first, (start_s, _) in enumerate(sent):
        num_bytes = 0
        for at_s, probe_bytes in sent[first:]:
            num_bytes += probe_bytes
            assert num_bytes <= POLICY.saved_bytes_max + POLICY.budget_bytes_per_s_max * (at_s - start_s) + 1.0

"""Links that nobody used yet are measured, beside the control links and within bounds."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from shoal.errors import RequestError
from shoal.ids import NodeId
from shoal.network.facts import DeliveryObserved
from shoal.network.graph import Link
from shoal.network.probing import ProbingPolicy
from shoal.runtime.node.link_news import LinkNews
from shoal.runtime.node.neighbours import Neighbour, Neighbours
from shoal.runtime.node.owner import AskCluster, ClusterStatus, Done, LinkStatus, OwnerLink, TellReceived
from shoal.runtime.node.probes import INCOMING_MAX
from shoal.transport.control import AS_PROBE, PREFACE_MAGIC
from tests.runtime.node.test_strangers import pair


def wait_until(is_so: Callable[[], bool], within_s: float = 10.0) -> None:
    end_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.02)


def links(folder: Path) -> list[LinkStatus]:
    with OwnerLink(folder) as owner:
        return list(owner.ask(AskCluster(), ClusterStatus).links)


def test_both_directions_have_a_rate_soon_after_the_start(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, lap):
        for name in ("desk", "lap"):
            wait_until(lambda: all(link.rate_bytes_per_s is not None for link in links(tmp_path / name)))  # noqa: B023
            for link in links(tmp_path / name):
                assert link.rate_bytes_per_s is not None
                assert link.rate_bytes_per_s.value > 1e6
                assert link.rate_bytes_per_s.age_s < 20.0
                assert link.state == "up"
        for node in (desk, lap):
            assert 1 <= node.probes.counters.num_sent <= 3
            assert node.probes.counters.bytes_sent <= 3 * ProbingPolicy().start_up_bytes
            assert node.probes.counters.num_failed == 0
            assert node.links.counters.num_refused == 0, "a probe is no second control link"


def test_the_agent_is_told_what_is_known_of_the_way_to_a_member(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, lap):
        to_lap = Link(desk.me, lap.me)

        def is_measured() -> bool:
            figures = desk.graph().link(to_lap)
            return figures is not None and figures.rate is not None

        async def neighbour() -> Neighbour:
            (found,) = await Neighbours(desk, on_agent=lambda _, __: None, on_removed=lambda _: None).here()
            return found

        wait_until(is_measured)
        found = asyncio.run(neighbour())
        assert found.node == lap.me
        assert found.bytes_per_s is not None
        assert found.bytes_per_s > 1e6


def test_what_work_shows_of_a_link_is_in_the_status_of_both_ends(tmp_path: Path) -> None:
    rate = 2_000_000_000  # far more than its probe carried
    with pair(tmp_path) as (desk, lap):
        for _ in range(8):
            fact = DeliveryObserved(lap.me, rate // 4, 0.25, is_full=False, round_trip_min_s=1e-5)
            desk.post(partial(desk.learn, fact))
        wait_until(lambda: lap.awareness.statistics.num_carried == 8)
        for name in ("desk", "lap"):

            def is_told() -> bool:
                (link,) = [link for link in links(tmp_path / name) if link.source == desk.me]  # noqa: B023
                return link.load_bytes_per_s is not None and link.load_bytes_per_s.value > rate / 10

            wait_until(is_told)


def test_what_comes_to_a_training_run_measures_the_link(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, lap):
        into_desk = Link(lap.me, desk.me)

        def load() -> float:
            figures = desk.graph().link(into_desk)
            return figures.load.mean if figures is not None and figures.load is not None else 0.0

        news = LinkNews(tmp_path / "desk", desk.me, tell_every_s=0.05)
        try:
            for peer in (NodeId(f"{lap.me}-1234"), NodeId(f"{desk.me}-5678")):
                news.observe(peer, 10**10, 1.0, is_full=True)
            wait_until(lambda: load() > 1e9)
            before = desk.num_events
            news.observe(NodeId("stranger-1"), 10**6, 0.1, is_full=True)
            news.observe(NodeId(f"{lap.me}-1234"), 10**11, 1.0, is_full=False)
            wait_until(lambda: load() > 1e10)
            assert desk.num_events > before
        finally:
            news.close()


@pytest.mark.parametrize("news", [TellReceived(NodeId("a"), -1, 1.0, True), TellReceived(NodeId("a"), 1, 0.0, True)])
def test_what_nobody_can_have_received_is_refused(tmp_path: Path, news: TellReceived) -> None:
    with pair(tmp_path), OwnerLink(tmp_path / "desk") as owner, pytest.raises(RequestError, match="no transfer"):
        owner.ask(news, Done)


def test_where_no_agent_runs_nobody_is_told(tmp_path: Path) -> None:
    news = LinkNews(tmp_path, NodeId("me"), tell_every_s=0.01)
    news.observe(NodeId("other-1"), 10**6, 0.1, is_full=True)
    time.sleep(0.05)
    news.close()


def test_connections_that_only_say_they_measure_are_few(tmp_path: Path) -> None:
    with pair(tmp_path) as (desk, _), ExitStack() as stack:
        num_more = 5
        for _ in range(INCOMING_MAX + num_more):
            silent = stack.enter_context(closing(socket.create_connection(("127.0.0.1", desk.port))))
            silent.sendall(PREFACE_MAGIC + AS_PROBE)
        wait_until(lambda: desk.probes.counters.num_refused >= num_more)
        assert len(desk.links.peers()) == 1
        stack.close()
        wait_until(lambda: desk.probes.counters.num_refused >= num_more + INCOMING_MAX - 1)


@pytest.mark.parametrize("letter", [b"X", b"\x00", b"p"])
def test_other_letters_are_malformed(tmp_path: Path, letter: bytes) -> None:
    with pair(tmp_path) as (desk, _), closing(socket.create_connection(("127.0.0.1", desk.port))) as sock:
        sock.sendall(PREFACE_MAGIC + letter)
        wait_until(lambda: desk.links.counters.num_malformed == 1)
        assert desk.probes.counters.num_refused == 0

"""Devices that hear of each other by multicast, and nonsense that anybody may say there."""

from __future__ import annotations

import queue

import pytest
from zeroconf import ServiceInfo

from shoal.ids import NodeId
from shoal.runtime.node.addresses import advertised
from shoal.runtime.node.discovery import SERVICE, Discovery, Sighting, cluster_tag, read


def said(properties: dict[str, str | bytes], *, port: int = 7434, address: str = "192.0.2.1") -> ServiceInfo:
    return ServiceInfo(SERVICE, f"x.{SERVICE}", port=port, parsed_addresses=[address], properties=properties)


def test_what_is_said_is_understood() -> None:
    tag = cluster_tag("c" * 64)
    assert read(said({"node": "abc123", "cluster": tag})) == Sighting(NodeId("abc123"), tag, ("192.0.2.1:7434",))
    assert cluster_tag("") == ""
    assert cluster_tag("d" * 64) != tag


@pytest.mark.parametrize(
    "info",
    [
        said({}),
        said({"node": "abc"}),
        said({"node": "", "cluster": ""}),
        said({"node": "a b", "cluster": ""}),
        said({"node": "a" * 200, "cluster": ""}),
        said({"node": "abc", "cluster": "short"}),
        said({"node": b"\xff", "cluster": ""}),
        said({"node": "abc", "cluster": ""}, port=0),
    ],
)
def test_nonsense_is_nobody(info: ServiceInfo) -> None:
    assert read(info) is None


@pytest.mark.slow
def test_one_hears_what_another_says_until_it_is_at_other_addresses() -> None:
    (own, *_) = advertised("0.0.0.0", 7000)
    if own.startswith("127."):
        pytest.skip("this machine has no network to say anything on")
    heard: queue.Queue[Sighting] = queue.Queue()
    listener, speaker = Discovery(heard.put), Discovery(lambda _: None)
    listener.start()
    speaker.start()
    try:
        for port in (7000, 7001):
            (address, *_) = advertised("0.0.0.0", port)
            speaker.announce(NodeId("a1b2"), "cluster", (address,))
            try:
                while True:
                    sighting = heard.get(timeout=10.0)
                    if address in sighting.addresses:
                        break
            except queue.Empty:
                if listener.problem or speaker.problem:
                    pytest.skip(f"no multicast here: {listener.problem or speaker.problem}")
                raise
            assert (sighting.node, sighting.tag) == ("a1b2", cluster_tag("cluster"))
    finally:
        for each in (listener, speaker):
            each.close()
            each._thread.join(10.0)


def test_where_multicast_is_refused_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr("zeroconf.Zeroconf", refuse)
    discovery = Discovery(lambda _: None)
    discovery.start()
    discovery.close()
    discovery._thread.join(10.0)
    assert "not allowed" in discovery.problem

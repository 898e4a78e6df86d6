"""What a member knows of its links: probes, estimates, and whether a joiner can follow."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from shoal.errors import LinkClosed
from shoal.ids import NodeId
from shoal.runs.rates import PROBE_BYTES, Rates, answer, probe, shortage
from tests.runs.members import Member, wait

A = NodeId("a")


def test_a_probe_measures_both_ways_and_is_bounded() -> None:
    ours, theirs = socket.socketpair()
    found: list[tuple[str, int, float]] = []
    other = threading.Thread(target=lambda: answer(theirs, lambda *each: found.append(("there", *each)), 2.5))
    other.start()
    began_s = time.monotonic()
    assert probe(ours, lambda *each: found.append(("here", *each))) == 2.5
    other.join(5.0)
    assert [each[0] for each in found] == ["there", "here"]
    for _, num_bytes, seconds in found:
        assert PROBE_BYTES / 2 < num_bytes <= PROBE_BYTES
        assert 0 < seconds <= time.monotonic() - began_s
    theirs.close()
    with pytest.raises(LinkClosed):
        probe(ours, lambda *_: None)
    ours.close()


def test_what_a_donor_gave_in_pauses_is_a_lower_bound() -> None:
    rates = Rates()
    assert rates.bytes_per_s() == {}
    rates.observe(A, 1_000_000, 1.0, is_full=False)
    assert rates.bytes_per_s()[A] == pytest.approx(1e6)
    rates.observe(A, 3_000_000, 1.0)
    rates.observe(A, 1_000_000, 1.0, is_full=False)
    assert rates.bytes_per_s()[A] == pytest.approx(3e6)
    rates.forget(A)
    assert rates.bytes_per_s() == {}


def test_a_joiner_is_told_that_it_cannot_follow() -> None:
    assert shortage(10_000_000, 2.0, 5e6) == ""
    line = shortage(10_000_000, 2.0, 1e6)
    assert line.startswith("the run makes 10")
    assert "every 2 s" in line
    assert "will not catch up; take a faster link" in line


@pytest.mark.slow
def test_a_joiner_with_a_slow_link_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    founder = Member(num_steps=10_000, compute_s=0.01, padding=300_000)
    founder.wait_step(5)
    monkeypatch.setattr(Rates, "bytes_per_s", lambda _: {founder.run.me: 1e6})
    second = Member(peers=(founder.run.address,), num_steps=10_000, padding=300_000)
    wait(lambda: any("will not catch up" in warning for warning in second.run.warnings))
    assert "shoal: the run makes" in capfd.readouterr().err
    for member in (second, founder):
        member.run.leave()
        member.end()

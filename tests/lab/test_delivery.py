"""On a link of known rate, what the kernel says of a sender's socket is that rate, or a lower bound of it."""

from __future__ import annotations

import json
import sys

import pytest

from shoal.lab.traffic import PORT
from tests.lab.fixture import MakeLab, on_a_steady_host

pytestmark = pytest.mark.slow

RATE_MBIT_S, DELAY_MS = 40.0, 5.0
_RECEIVE = """
import socket, sys
door = socket.create_server(("", int(sys.argv[1])))
line, _ = door.accept()
while line.recv(1 << 16):
    pass
"""
_SEND = """
import json, socket, sys, time
from shoal.transport.delivery import BulkWatch
line = socket.create_connection((sys.argv[1], int(sys.argv[2])))
told = []
watch = BulkWatch(line, told.append, now_s=time.monotonic())
frame, pause_s, end_s = bytes(300_000), float(sys.argv[3]), time.monotonic() + 1.2
while time.monotonic() < end_s:
    watch.sends(time.monotonic())
    line.sendall(frame)
    watch.look(time.monotonic())
    time.sleep(pause_s)
print(json.dumps(told))
"""


@pytest.mark.parametrize("pause_s", [0.0, 0.3])
def test_a_shaped_link_is_measured_by_what_goes_over_it(lab: MakeLab, pause_s: float) -> None:
    link = {"between": ["a", "b"], "rate_mbit_s": RATE_MBIT_S, "delay_ms": DELAY_MS}

    def measure() -> None:
        pair = lab({"devices": {"a": {}, "b": {}}, "links": [link]})
        receiver = pair.start("b", [sys.executable, "-S", "-c", _RECEIVE, str(PORT)])
        pair.wait_listening(receiver, PORT)
        command = [sys.executable, "-c", _SEND, pair.address("b"), str(PORT), str(pause_s)]
        status, out, said = pair.run("a", command)
        assert status == 0, said
        assert receiver.wait(10.0) == 0
        rate = RATE_MBIT_S * 1e6 / 8
        told = json.loads(out)
        full = [num_bytes / seconds for num_bytes, seconds, is_full, _ in told if is_full]
        bounds = [num_bytes / seconds for num_bytes, seconds, is_full, _ in told if not is_full]
        assert bool(full) == (pause_s == 0.0), "pauses leave it idle"
        assert all(found == pytest.approx(rate, rel=0.2) for found in full), full
        assert all(bound < 1.05 * rate for bound in bounds), bounds
        assert told[-1][3] == pytest.approx(2e-3 * DELAY_MS, rel=0.3), "there and back"

    on_a_steady_host(measure)

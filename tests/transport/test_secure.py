"""Who is at the other end of a link is proven, or there is no link."""

from __future__ import annotations

import gc
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from shoal.errors import LinkClosed, LinkError, PeerNotTrusted
from shoal.transport import secure
from shoal.transport.identity import DeviceKeys
from shoal.transport.secure import TrustStore, accept_stranger, certificate_of, dial_stranger, node_of

ONE, OTHER, STRANGER = (DeviceKeys.from_seed(bytes([number]) * 32) for number in (1, 2, 3))


def trust(keys: DeviceKeys, *members: DeviceKeys) -> TrustStore:
    return TrustStore(keys, [member.public_key for member in members])


def meet(accept: Callable[[socket.socket], Any], dial: Callable[[socket.socket], Any]) -> list[Any]:
    """What both ends of a connection came to: a result, or the error. The dialling end reads once, to hear of a refusal."""

    def side(act: Callable[[socket.socket], Any], sock: socket.socket, *, dials: bool) -> Any:
        try:
            found = act(sock)
            with found[0] if isinstance(found, tuple) else found as secured:
                if dials:
                    secured.sendall(b"hello")
                    assert secured.recv(5) == b"HELLO"
                else:
                    secured.sendall(secured.recv(5).upper())
            return found
        except (LinkError, ssl.SSLError) as error:
            return error

    left, right = socket.socketpair()
    with left, right, ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(side, accept, left, dials=False), pool.submit(side, dial, right, dials=True)]
        return [end.result(10.0) for end in ends]


def test_a_certificate_is_a_function_of_the_key() -> None:
    assert certificate_of(ONE.public_key) == certificate_of(ONE.public_key)
    assert certificate_of(ONE.public_key) != certificate_of(OTHER.public_key)
    assert node_of(certificate_of(ONE.public_key)) == ONE.node
    with pytest.raises(ValueError, match="32 bytes"):
        certificate_of(b"short")
    with pytest.raises(PeerNotTrusted, match="cannot be read"):
        node_of(b"nonsense")


def test_members_know_each_other() -> None:
    everybody = (ONE, OTHER, STRANGER)
    accepted, dialled = meet(trust(ONE, *everybody).accept, lambda sock: trust(OTHER, *everybody).dial(sock, ONE.node))
    secured, node = accepted
    assert node == OTHER.node
    assert isinstance(dialled, ssl.SSLSocket)
    assert isinstance(secured, ssl.SSLSocket)


@pytest.mark.parametrize(
    ("server", "client"),
    [
        (trust(ONE, ONE, OTHER), trust(STRANGER, ONE, OTHER)),
        (trust(ONE, ONE, OTHER), trust(OTHER, OTHER)),
        (trust(ONE), trust(OTHER, ONE, OTHER)),
    ],
    ids=["an unknown key dials", "an unknown key answers", "nobody is trusted any more"],
)
def test_who_is_no_member_does_not_come_in(server: TrustStore, client: TrustStore) -> None:
    accepted, dialled = meet(server.accept, lambda sock: client.dial(sock, ONE.node))
    assert isinstance(accepted, PeerNotTrusted), accepted
    # Who dialled is done before the other has looked at its certificate, and then sees an alert.
    assert isinstance(dialled, (PeerNotTrusted, ssl.SSLError)), dialled


def test_a_certificate_alone_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member's certificate can be written down by anybody; without its key it cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    fake = DeviceKeys.from_seed(bytes([9]) * 32)
    monkeypatch.setattr(secure, "certificate_of", lambda _: certificate_of(OTHER.public_key))
    with pytest.raises(ssl.SSLError, match="mismatch"):
        secure._load_key(context, fake)


def test_another_member_than_the_one_dialled() -> None:
    _, dialled = meet(trust(ONE, ONE, OTHER).accept, lambda sock: trust(OTHER, ONE, OTHER).dial(sock, STRANGER.node))
    assert isinstance(dialled, PeerNotTrusted)
    assert str(dialled) == f"device {ONE.node[:8]} answers where {STRANGER.node[:8]} is expected"


def test_a_stranger_knows_whom_it_asks() -> None:
    accepted, dialled = meet(lambda sock: accept_stranger(sock, ONE), lambda sock: dial_stranger(sock, ONE.node))
    assert isinstance(accepted, ssl.SSLSocket)
    assert isinstance(dialled, ssl.SSLSocket)
    _, dialled = meet(lambda sock: accept_stranger(sock, ONE), lambda sock: dial_stranger(sock, OTHER.node))
    assert isinstance(dialled, PeerNotTrusted)
    assert "where the token names" in str(dialled)


@contextmanager
def talking(say: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    """A connection whose other end says something of its own."""
    left, right = socket.socketpair()
    stop = threading.Event()

    def run() -> None:
        with suppress(OSError):
            say(right)
            stop.wait(5.0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield left
    finally:
        stop.set()
        left.close()
        right.close()
        thread.join()


def drip(sock: socket.socket) -> None:
    """A TLS record that never ends, a byte at a time."""
    sock.sendall(b"\x16\x03\x01\x02\x00")
    for _ in range(100):
        sock.sendall(b"\x01")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("say", "text"),
    [
        (lambda sock: sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20), "does not speak TLS 1.3"),
        (lambda sock: sock.sendall(bytes(range(256)) * 8), "does not speak TLS 1.3"),
        (lambda sock: sock.close(), "does not speak TLS 1.3|left during its greeting"),
        (lambda _: None, "did not finish its greeting within 0.4 s"),
        (drip, "did not finish its greeting within 0.4 s"),
    ],
    ids=["http", "garbage", "nothing", "silence", "slow"],
)
def test_what_is_no_greeting_ends_in_time(say: Callable[[socket.socket], None], text: str) -> None:
    with talking(say) as sock:
        began_s = time.monotonic()
        with pytest.raises(LinkClosed, match=text):
            trust(ONE, ONE, OTHER).accept(sock, timeout_s=0.4)
        assert time.monotonic() - began_s < 2.0
        assert sock.fileno() == -1, "closed"


def test_a_connection_that_was_reset_leaves_nothing_open() -> None:
    keys = DeviceKeys.generate()
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    time.sleep(0.05)
    with near, pytest.raises(OSError, match="not connected"):
        trust(keys, keys).wrap(near, server_side=True)
    gc.collect()  # an open socket that nobody holds would be found now, and fail the test


def test_older_versions_are_refused() -> None:
    def dial(sock: socket.socket) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        try:
            return context.wrap_socket(sock)
        except ssl.SSLError:
            sock.close()
            raise

    accepted, dialled = meet(trust(ONE, ONE).accept, dial)
    assert isinstance(accepted, LinkClosed)
    assert isinstance(dialled, ssl.SSLError)

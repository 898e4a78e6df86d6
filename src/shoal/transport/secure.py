"""TLS between members: each end proves its key, and nobody has to issue a certificate.

A member's certificate is a function of its public key: fixed names and dates, and zeros where an issuer's signature would
be. So whoever has the roster can write down everyone's certificates, and they are its trust anchors. OpenSSL takes an anchor
as it is, byte for byte, without a look at its signature; the key behind it is proven by the handshake (RFC 8446, 4.4.3).

A handshake has a time limit as a whole, whatever the other side sends meanwhile. The limit of how many are under way at a
time is the listener's.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from shoal.errors import LinkClosed, LinkError, PeerNotTrusted
from shoal.ids import NodeId
from shoal.transport.identity import DeviceKeys, identify

HANDSHAKE_TIMEOUT_S = 5.0
_NOT_TRUSTED = ("TLSV1_ALERT_UNKNOWN_CA", "TLSV13_ALERT_CERTIFICATE_REQUIRED")
_SIGNATURE_BYTES = 64
_VALID_FROM, _VALID_TO = datetime(2000, 1, 1), datetime(9999, 12, 31)
"""A device's clock may be wrong, and the roster alone decides who is trusted."""


@lru_cache(maxsize=4096)
def certificate_of(public_key: bytes) -> bytes:
    """The one certificate (DER) that belongs to an Ed25519 public key of 32 bytes.

    Raises:
        ValueError: not such a key.
    """
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identify(public_key))])
    unsigned = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(Ed25519PublicKey.from_public_bytes(public_key))
        .serial_number(1)
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_TO)
    )
    # The library signs everything; any key will do.
    signed = unsigned.sign(Ed25519PrivateKey.generate(), None).public_bytes(Encoding.DER)
    return signed[:-_SIGNATURE_BYTES] + bytes(_SIGNATURE_BYTES)


def node_of(certificate: bytes) -> NodeId:
    """Whose certificate it is, by the key in it. Raises PeerNotTrusted for one with another kind of key."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except ValueError as error:
        raise PeerNotTrusted(f"the peer's certificate cannot be read: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PeerNotTrusted("the peer's certificate has no Ed25519 key, so it is no device of shoal's")
    return identify(key.public_bytes(Encoding.Raw, PublicFormat.Raw))


class TrustStore:
    """Whom a device talks to: one version of the roster, as OpenSSL wants it. Made anew for the next version.

    Args:
        keys: this device's own.
        members: public keys of everyone who is trusted, 32 bytes each.
        is_two_way: sockets of `accept` and `dial` are `TwoWaySocket`.
    """

    def __init__(self, keys: DeviceKeys, members: Iterable[bytes], *, is_two_way: bool = False) -> None:
        self._anchors = {certificate_of(key): identify(key) for key in members}
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, keys)
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, keys)
        for context in (self._server, self._client):
            if is_two_way:
                context.sslsocket_class = TwoWaySocket
            context.verify_mode = ssl.CERT_REQUIRED
            # An anchor that issues nothing, as strict checks would have it: pinned keys have no chain.
            context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
            if self._anchors:
                context.load_verify_locations(cadata=b"".join(self._anchors))

    def wrap(self, sock: socket.socket, *, server_side: bool) -> ssl.SSLSocket:
        """For those who wait for many sockets at a time: its `do_handshake` is still to be called."""
        return _wrap(self._server if server_side else self._client, sock, server_side=server_side)

    def add(self, public_key: bytes) -> None:
        """Trusts one more; nobody is trusted less."""
        certificate = certificate_of(public_key)
        if certificate not in self._anchors:
            self._anchors[certificate] = identify(public_key)
            for context in (self._server, self._client):
                context.load_verify_locations(cadata=certificate)

    def __len__(self) -> int:
        return len(self._anchors)

    def context(self, *, server_side: bool) -> ssl.SSLContext:
        """For those who leave TLS to a library (asyncio): it lets members through, and `peer_of` says which it was."""
        return self._server if server_side else self._client

    def peer_of(self, secured: ssl.SSLSocket | ssl.SSLObject) -> NodeId:
        """Who is at the other end, once the handshake is done."""
        return self._anchors[_certificate(secured)]

    def accept(self, sock: socket.socket, *, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> tuple[ssl.SSLSocket, NodeId]:
        """Greets whoever dialled. The socket is closed where this fails.

        Returns:
            The secured socket, with the time limit of `sock`, and who is at its other end.

        Raises:
            PeerNotTrusted: no member, or it does not trust us.
            LinkClosed: it left, said nothing in time, or speaks no TLS 1.3.
        """
        secured = _handshake(self._server, sock, server_side=True, timeout_s=timeout_s)
        return secured, self._anchors[_certificate(secured)]

    def dial(self, sock: socket.socket, expected: NodeId | None, *, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> ssl.SSLSocket:
        """Greets a member that we have dialled, `expected` or, where None, any. The socket is closed where this fails.

        In TLS 1.3 the one who dialled is done first: that the other side refuses us shows with the first bytes.

        Raises:
            PeerNotTrusted: another member than `expected` answers there, or no member.
            LinkClosed: it left, said nothing in time, or speaks no TLS 1.3.
        """
        secured = _handshake(self._client, sock, server_side=False, timeout_s=timeout_s)
        found = self._anchors[_certificate(secured)]
        if expected is not None and found != expected:
            secured.close()
            raise PeerNotTrusted(f"device {found[:8]} answers where {expected[:8]} is expected")
        return secured


class TwoWaySocket(ssl.SSLSocket):
    """A secured socket on which one thread may send while another receives, once its handshake is done.

    OpenSSL allows one call at a time for a connection: they take turns, and who must wait for the network lets the other
    go on. Flags are ignored, as TLS has none.
    """

    _turn: threading.Lock | None = None
    _limit_s: float | None = None

    def begin(self) -> None:
        """From now on."""
        self._limit_s = self.gettimeout()
        super().settimeout(0.0)
        self._turn = threading.Lock()

    def settimeout(self, value: float | None) -> None:
        """Of one call."""
        if self._turn is None:
            super().settimeout(value)
        else:
            self._limit_s = value

    def sendall(self, data: Any, flags: int = 0) -> None:  # noqa: ARG002
        """Raises OSError."""
        view, sent = memoryview(data).cast("B"), 0
        while sent < view.nbytes:
            rest = view[sent : sent + _RECORD_BYTES]
            sent += self._in_turn(lambda rest=rest: ssl.SSLSocket.send(self, rest))  # type: ignore[misc]

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:  # noqa: ARG002
        """Some bytes; 0 at the end. Raises OSError."""
        return self._in_turn(lambda: int(self.read(nbytes or len(buffer), buffer)))

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:  # noqa: ARG002
        """At most `buflen` bytes; none at the end. Raises OSError."""
        data = bytearray(buflen)
        return bytes(data[: self.recv_into(data)])

    def shutdown(self, how: int) -> None:
        """Ends both threads' waiting. What is still to be read stays unread: it must not be taken for plain text."""
        socket.socket.shutdown(self, how)

    def _in_turn(self, call: Callable[[], int]) -> int:
        assert self._turn is not None, "the handshake is not done"
        give_up_s = time.monotonic() + self._limit_s if self._limit_s is not None else None
        while True:
            with self._turn:
                try:
                    return call()
                except ssl.SSLWantReadError:
                    event = selectors.EVENT_READ
                except ssl.SSLWantWriteError:
                    event = selectors.EVENT_WRITE
                except ValueError as error:
                    raise OSError("the connection was closed") from error
            self._wait(event, give_up_s)

    def _wait(self, event: int, give_up_s: float | None) -> None:
        try:
            with _Selector() as selector:
                selector.register(self, event)
                ready = selector.select(None if give_up_s is None else max(0.0, give_up_s - time.monotonic()))
        except (ValueError, KeyError) as error:
            raise OSError("the connection was closed") from error
        if not ready:
            raise TimeoutError("the peer said nothing in time")


_RECORD_BYTES = 16 * 1024
"""Of TLS: OpenSSL takes no more at a time."""
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""Needs no descriptor of its own, and where there is poll, has no highest one."""


class DirectCalls(NamedTuple):
    """What sends and receives on one connection, past the layers that Python's `ssl` puts around each call: with cold caches
    they cost more than the encryption.

    `send(data)` and `receive(num_bytes, target)` return how many bytes it was, `receive` 0 at the end; `read(num_bytes)`
    returns them. They raise OSError, as the socket's own do. Not to be kept when the socket is closed: its descriptor may
    be another's then.
    """

    send: Callable[[Any], int]
    receive: Callable[[int, Any], int]
    read: Callable[[int], bytes]


def direct_calls(sock: socket.socket) -> DirectCalls:
    """Of a socket after its handshake, or of one without TLS; its own calls, where this Python has others within."""
    inner: Any = getattr(sock, "_sslobj", None)
    if type(sock) is ssl.SSLSocket and inner is not None:
        return DirectCalls(inner.write, inner.read, inner.read)
    return DirectCalls(sock.send, lambda num_bytes, target: sock.recv_into(target, num_bytes), sock.recv)


def _closed(*_: Any) -> Any:
    raise OSError("closed here")


NO_CALLS = DirectCalls(_closed, _closed, _closed)
"""Of a socket that is closed."""


class Unlisted:
    """The client's side of a handshake with a device that a token names, and no roster here yet: its key is looked at
    afterwards. Our own is shown.

    The other side learns our public key beforehand, and trusts it for this handshake only (`TrustStore.add`): so both
    know with whom they speak, though neither knows yet whether the other is a member.
    """

    def __init__(self, keys: DeviceKeys) -> None:
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, keys)
        self._client.verify_mode = ssl.CERT_NONE

    def wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        """A non-blocking socket whose `do_handshake` is still to be called."""
        return _wrap(self._client, sock, server_side=False)

    def peer_of(self, secured: ssl.SSLSocket) -> NodeId:
        """Who is at the other end, once the handshake is done. Raises PeerNotTrusted for what is no device of shoal's."""
        return node_of(_certificate(secured))


def explain(error: OSError) -> LinkError:
    """What went wrong in a handshake, as a line for the owner."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerNotTrusted("the peer is no member of this cluster: invite it, or look whether it was removed")
    if isinstance(error, ssl.SSLError):
        if error.reason in _NOT_TRUSTED:
            return PeerNotTrusted("the peer does not trust this device: is it a member there, or was it removed?")
        return LinkClosed(f"the peer does not speak TLS 1.3 as we do ({error.reason or error})")
    return LinkClosed(f"the peer left during its greeting ({error})")


def dial_stranger(sock: socket.socket, fingerprint: NodeId, *, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> ssl.SSLSocket:
    """Greets the device that a token names, by one that is no member yet: only the other side proves its key.

    Raises:
        PeerNotTrusted: another device answers there.
        LinkClosed: it left, said nothing in time, or speaks no TLS 1.3.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, None)
    context.verify_mode = ssl.CERT_NONE
    secured = _handshake(context, sock, server_side=False, timeout_s=timeout_s)
    try:
        found = node_of(_certificate(secured))
        if found != fingerprint:
            raise PeerNotTrusted(f"device {found[:8]} answers where the token names {fingerprint[:8]}")
    except PeerNotTrusted:
        secured.close()
        raise
    return secured


def accept_stranger(sock: socket.socket, keys: DeviceKeys, *, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> ssl.SSLSocket:
    """The other end of `dial_stranger`: proves our key and learns nothing about who came.

    Raises:
        PeerNotTrusted: the stranger expected another device.
        LinkClosed: it left, said nothing in time, or speaks no TLS 1.3.
    """
    return _handshake(_context(ssl.PROTOCOL_TLS_SERVER, keys), sock, server_side=True, timeout_s=timeout_s)


def _context(protocol: int, keys: DeviceKeys | None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A resumed session would vouch for a member that was removed meanwhile.
    context.options |= ssl.OP_NO_TICKET
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    if keys is not None:
        _load_key(context, keys)
    return context


def _load_key(context: ssl.SSLContext, keys: DeviceKeys) -> None:
    """Python's `ssl` takes keys from files only: it gets one that is encrypted, for that moment."""
    password = secrets.token_bytes(32).hex()
    descriptor, name = tempfile.mkstemp(suffix=".pem")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(keys.encrypted_pem(password))
            file.write(ssl.DER_cert_to_PEM_cert(certificate_of(keys.public_key)).encode())
        context.load_cert_chain(name, password=password)
    finally:
        Path(name).unlink()


def _wrap(context: ssl.SSLContext, sock: socket.socket, *, server_side: bool) -> ssl.SSLSocket:
    """A socket whose handshake is still to come. Raises OSError where the other side has left; `sock` is to be closed then.

    Python's own takes the descriptor over first, and where it then finds the connection reset, nobody can close it.
    """
    sock.getpeername()
    return context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)


def _handshake(context: ssl.SSLContext, sock: socket.socket, *, server_side: bool, timeout_s: float) -> ssl.SSLSocket:
    limit_s = sock.gettimeout()
    sock.settimeout(timeout_s)
    opened: socket.socket = sock
    try:
        opened = secured = _wrap(context, sock, server_side=server_side)
        secured.do_handshake()
    except TimeoutError as error:
        opened.close()
        raise LinkClosed(f"the peer did not finish its greeting within {timeout_s:g} s") from error
    except OSError as error:  # and every error of TLS
        opened.close()
        raise explain(error) from error
    secured.settimeout(limit_s)
    if isinstance(secured, TwoWaySocket):
        secured.begin()
    return secured


def _certificate(secured: ssl.SSLSocket | ssl.SSLObject) -> bytes:
    certificate = secured.getpeercert(binary_form=True)
    assert certificate is not None, "the context asks for one"
    return certificate

"""Who may be in a run: the keys of a member, and of everybody it talks to.

A member's id begins with its device's, so that TLS proves it: a device may have several members, and no member's name is
another device's. Whom to trust is read once, as the member starts.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable
from pathlib import Path

import msgspec

from shoal.errors import DamagedFile, DeviceRefused, PeerNotTrusted
from shoal.ids import NodeId
from shoal.transport.identity import DeviceKeys
from shoal.transport.secure import TrustStore

_BETWEEN = "-"


class _File(msgspec.Struct, frozen=True):
    """`key`: the file with the private key; `members`: public keys, hexadecimal."""

    key: str
    members: list[str]


class Trust:
    """What one member proves, and asks for.

    Args:
        keys: its device's.
        members: public keys of all devices that may take part, 32 bytes each.
    """

    def __init__(self, keys: DeviceKeys, members: Iterable[bytes]) -> None:
        self.device = keys.node
        self.folder: Path | None = None
        """Where its key is; with an agent's, its state."""
        self._store = TrustStore(keys, members, is_two_way=True)

    @classmethod
    def read(cls, path: Path) -> Trust:
        """What `write` wrote. Raises DamagedFile."""
        try:
            file = msgspec.json.decode(path.read_bytes(), type=_File)
            keys = DeviceKeys.from_seed(Path(file.key).read_bytes())
            trust = cls(keys, [bytes.fromhex(member) for member in file.members])
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            raise DamagedFile(f"{path} does not say whom this member of a run trusts ({error}): start it again") from error
        trust.folder = Path(file.key).parent
        return trust

    @staticmethod
    def write(path: Path, key: Path, members: Iterable[bytes]) -> None:
        """For a process that is started with it. `key` is the file of 32 secret bytes; its content is not copied."""
        path.write_bytes(msgspec.json.encode(_File(str(key), [member.hex() for member in members])))

    def new_node(self) -> NodeId:
        """An id for a new member on this device."""
        return NodeId(f"{self.device}{_BETWEEN}{secrets.token_hex(4)}")

    def accept(self, sock: socket.socket) -> tuple[socket.socket, NodeId]:
        """Greets whoever dialled; returns the secured socket, and which device it is. Raises PeerNotTrusted, LinkClosed."""
        return self._store.accept(sock)

    def dial(self, sock: socket.socket, node: NodeId | None) -> tuple[socket.socket, NodeId]:
        """Greets the member `node`, or any where None. As `accept`; PeerNotTrusted also where another device answers."""
        secured = self._store.dial(sock, device_of(node) if node is not None else None)
        return secured, self._store.peer_of(secured)


def device_of(node: NodeId) -> NodeId:
    """Whose member it is."""
    return NodeId(node.partition(_BETWEEN)[0])


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches HOST:PORT."""
    return address.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")


def check_plain(address: str) -> None:
    """Raises DeviceRefused for an address at which others could reach a member whose links prove nothing."""
    if not is_loopback(address):
        raise DeviceRefused(
            f"{address} is reachable for others, and this member has no keys to tell members by: make a cluster "
            "(`shoal up`, `shoal invite`) and start the script with `shoal train`, or listen at 127.0.0.1"
        )


def check_member(node: NodeId, device: NodeId | None) -> None:
    """Raises PeerNotTrusted where a device speaks as a member that is not its own. `device` None: nothing was proven."""
    if device is not None and device_of(node) != device:
        raise PeerNotTrusted(f"device {device[:8]} speaks as member {node[:8]} of another device")

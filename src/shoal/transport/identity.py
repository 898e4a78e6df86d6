"""Who a device is: an Ed25519 key on its disk, and an id that is a hash of the public half.

The private key is made once and never leaves the device. Its file is readable by its owner only, where the system knows
such a thing.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from shoal.errors import DeviceError
from shoal.ids import NodeId

PUBLIC_KEY_BYTES = 32
_ID_BYTES = 16


def identify(public_key: bytes) -> NodeId:
    """The id that goes with a public key: 32 hexadecimal digits of its SHA-256."""
    return NodeId(hashlib.sha256(public_key).digest()[:_ID_BYTES].hex())


class DeviceKeys:
    """A device's key pair, and how to judge the signatures of others; what the roster's `Keys` asks for."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public_key = private_key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> DeviceKeys:
        """A new identity."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> DeviceKeys:
        """The key that belongs to 32 secret bytes."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: Path) -> DeviceKeys:
        """The identity kept in `path`, made now if there is none.

        Raises:
            DeviceError: the file is no key. It is left as it is: a device that lost its key must join again.
        """
        with suppress(FileNotFoundError):
            seed = path.read_bytes()
            if len(seed) != PUBLIC_KEY_BYTES:
                raise DeviceError(
                    f"{path}: this device's key is {len(seed)} bytes long instead of {PUBLIC_KEY_BYTES}. "
                    "Restore the file, or delete it and join the cluster again by a new invitation"
                )
            return cls.from_seed(seed)
        keys = cls.generate()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(keys._private_key.private_bytes_raw())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                # Of two processes that start at once, one makes the key and both use it.
                os.link(temporary, path)
        except OSError:
            if not path.exists():  # no hard links here (FAT, some phones)
                os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
        return cls.from_seed(path.read_bytes())

    @property
    def node(self) -> NodeId:
        """This device's id."""
        return identify(self.public_key)

    def identify(self, public_key: bytes) -> NodeId:
        """The id that goes with a public key."""
        return identify(public_key)

    def encrypted_pem(self, password: str) -> bytes:
        """The private key, for programs that read keys from files; PKCS 8, of no use without the password."""
        encryption = BestAvailableEncryption(password.encode())
        return self._private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    def sign(self, text: bytes) -> bytes:
        """64 bytes, always the same for the same text."""
        return self._private_key.sign(text)

    def verify(self, public_key: bytes, text: bytes, signature: bytes) -> bool:
        """Whether the owner of `public_key` signed `text`. Malformed keys and signatures are simply wrong."""
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, text)
        except (InvalidSignature, ValueError):
            return False
        return True

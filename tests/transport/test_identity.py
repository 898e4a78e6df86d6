"""A device is its key, and nobody else can be it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.errors import DeviceError
from shoal.membership.roster import Keys
from shoal.transport.identity import DeviceKeys, identify

# RFC 8032, section 7.1, test 2.
RFC_PRIVATE = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
RFC_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_signatures_are_those_of_the_standard() -> None:
    keys = DeviceKeys.from_seed(RFC_PRIVATE)
    assert keys.public_key == RFC_PUBLIC
    assert keys.sign(b"\x72") == RFC_SIGNATURE
    assert keys.verify(RFC_PUBLIC, b"\x72", RFC_SIGNATURE)


def test_it_is_what_the_roster_wants() -> None:
    keys: Keys = DeviceKeys.from_seed(RFC_PRIVATE)
    assert keys.identify(keys.public_key) == "39f713d0a644253f04529421b9f51b9b"


def test_an_id_belongs_to_one_key() -> None:
    one, other = DeviceKeys.generate(), DeviceKeys.generate()
    assert one.node != other.node
    assert one.node == identify(one.public_key)
    assert len(one.node) == 32
    assert one.node.isalnum()


@pytest.mark.parametrize(
    ("public_key", "text", "signature"),
    [
        (RFC_PUBLIC, b"\x73", RFC_SIGNATURE),
        (RFC_PUBLIC, b"\x72", RFC_SIGNATURE[:-1]),
        (RFC_PUBLIC, b"\x72", b""),
        (RFC_PUBLIC[:-1], b"\x72", RFC_SIGNATURE),
        (b"", b"\x72", RFC_SIGNATURE),
        (b"\xff" * 32, b"\x72", RFC_SIGNATURE),
        (DeviceKeys.from_seed(bytes(32)).public_key, b"\x72", RFC_SIGNATURE),
    ],
)
def test_whatever_is_wrong_about_a_signature_is_a_no(public_key: bytes, text: bytes, signature: bytes) -> None:
    assert not DeviceKeys.from_seed(RFC_PRIVATE).verify(public_key, text, signature)


def test_a_device_keeps_its_key(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "key"
    made = DeviceKeys.load_or_create(path)
    assert DeviceKeys.load_or_create(path).node == made.node
    assert [each.name for each in path.parent.iterdir()] == ["key"], "nothing is left beside it"
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_key_is_left_alone_and_said_so(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"short")
    with pytest.raises(DeviceError, match="5 bytes long instead of 32"):
        DeviceKeys.load_or_create(path)
    assert path.read_bytes() == b"short"

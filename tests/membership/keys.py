"""Ed25519 keys for tests, made from a name, and the statements that they sign."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import msgspec

from shoal.ids import NodeId
from shoal.membership.messages import Statement
from shoal.membership.roster import Roster, signed_text, statement_key
from shoal.transport.identity import DeviceKeys


@lru_cache
def keys_of(name: str) -> DeviceKeys:
    return DeviceKeys.from_seed(hashlib.sha256(name.encode()).digest())


def node_of(name: str) -> NodeId:
    return keys_of(name).node


def say(kind: Any, signer: str, subject: str, at_s: float = 0.0, **fields: Any) -> Statement:
    """A signed statement; people are named."""
    if kind in ("found", "add"):
        fields.setdefault("public_key", keys_of(subject).public_key)
        fields.setdefault("name", subject)
    statement = Statement(kind, node_of(signer), node_of(subject), at_s, **fields)
    return msgspec.structs.replace(statement, signature=keys_of(signer).sign(signed_text(statement)))


def roster_of(*statements: Statement) -> Roster:
    return Roster({statement_key(each): each for each in statements})


def names(roster: Roster) -> set[str]:
    """Who may be here, by name."""
    return {device.name for device in roster.members.values()}

"""Writes docs/protocols/*.md from the transition tables of the protocols, so that picture and code are the same thing.

`python -m shoal.lab.protocol_pages DIRECTORY`; `make pages` does it for this repository, and a test sees that it was done.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from shoal.effects import Message
from shoal.membership import failure, messages, roster, table
from shoal.membership.group import GROUP_EVENTS, RECEPTIONS, ROLE, STANDING, Role
from shoal.membership.group import core as group_core
from shoal.membership.messages import GroupMessage
from shoal.node import trust, wire
from shoal.node.trust import TRUST

_NOTE = "<!-- Written by `make pages` from the tables in the code. Change those. -->"


def _names(kinds: tuple[type[Any], ...]) -> str:
    return ", ".join(f"`{kind.__name__}`" for kind in kinds) or "-"


def _identifier(state: str) -> str:
    return state.replace(" ", "_")


def _picture(machine: table.Table[Any]) -> list[str]:
    """A mermaid state diagram: one arrow for each pair of states, with all events that lead along it."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), outcome in machine.entries.items():
        if outcome.state is not state:
            arrows.setdefault((state, outcome.state), []).append(event)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {_identifier(machine.start)}"]
    for (source, target), events in arrows.items():
        lines.append(f"    {_identifier(source)} --> {_identifier(target)}: {' / '.join(events)}")
    return [*lines, "```"]


def _machine(machine: table.Table[Any]) -> list[str]:
    lines = [f"## {machine.name.capitalize()}", "", *_picture(machine), "", "| state | meaning |", "|---|---|"]
    lines += [f"| {state} | {machine.meanings[state]} |" for state in machine.states]
    lines += ["", "| state | event | next | sends | announces |", "|---|---|---|---|---|"]
    for state in machine.states:
        for event in machine.events:
            outcome = machine.entries.get((state, event))
            if outcome is not None:
                sends, announces = _names(outcome.sends), _names(outcome.announces)
                lines.append(f"| {state} | {event} | {outcome.state} | {sends} | {announces} |")
    for title, chosen in (("Changes nothing", machine.unmoved), ("Cannot happen", machine.impossible)):
        rows = []
        for event in machine.events:
            states = [str(state) for state in machine.states if (state, event) in chosen]
            if states:
                rows.append(f"{event} ({', '.join(states)})")
        if rows:
            lines += ["", f"{title}: {'; '.join(rows)}."]
    return [*lines, ""]


def _receptions() -> list[str]:
    lines = ["## Messages", "", "| message | acted on | elsewhere | may be answered by | effect |", "|---|---|---|---|---|"]
    for kind, reception in RECEPTIONS.items():
        roles = "always" if set(reception.roles) == set(Role) else ", ".join(reception.roles)
        elsewhere = "-" if roles == "always" else "answered by `Stale`" if reception.otherwise == "stale" else "let go"
        lines.append(f"| `{kind.__name__}` | {roles} | {elsewhere} | {_names(reception.answers)} | {reception.effect} |")
    return [*lines, ""]


def _group_events() -> list[str]:
    lines = ["## The five events", "", "| event | transition | message | effect |", "|---|---|---|---|"]
    lines += [f"| {each.name} | {each.transition} | {each.message} | {each.effect} |" for each in GROUP_EVENTS]
    return [*lines, ""]


_JOINING = """## Joining by invitation

The printed token holds the secret, addresses, and the id of the member to expect; the roster holds only the secret's hash.

```mermaid
sequenceDiagram
    participant joiner
    participant member
    Note over joiner,member: the link has proven both keys, and the token names the member's
    joiner->>member: JoinHello(invitation, key, nonce)
    alt unknown, used up or expired, or the key was removed
        member->>joiner: Refused(in words)
    else
        member->>joiner: JoinChallenge(key, nonce)
        joiner->>member: JoinProof(HMAC by the invitation over both keys and nonces, signature)
        Note over member: signs "add", and tells all members
        member->>joiner: RosterStatements(all)
        Note over joiner: Admitted
    end
```
"""


def _type_name(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f'"{value}"' for value in get_args(hint))
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    for prefix in ("typing.", "shoal.membership.messages.", "shoal.ids."):
        name = name.replace(prefix, "")
    return name.replace(" | ", " or ")


def _fields(kind: type[Message]) -> str:
    """The fields in the order of the wire, with their types and defaults."""
    hints = get_type_hints(kind)
    texts = []
    for field in msgspec.structs.fields(kind):
        default = "" if field.default is msgspec.NODEFAULT else f" = {field.default!r}"
        texts.append(f"`{field.name}: {_type_name(hints[field.name])}{default}`")
    return ", ".join(texts)


def _messages(title: str, *, of_groups: bool) -> list[str]:
    lines = [f"## {title}", "", "| message | tag | says | fields |", "|---|---|---|---|"]
    for kind in get_args(wire.WireMessage):
        if issubclass(kind, GroupMessage) is of_groups:
            says = " ".join((inspect.getdoc(kind) or "").split())
            lines.append(f"| `{kind.__name__}` | `{kind.__struct_config__.tag}` | {says} | {_fields(kind)} |")
    return [*lines, ""]


def _page(title: str, module: ModuleType, *parts: list[str]) -> str:
    lines = [f"# {title}", "", _NOTE, "", inspect.getdoc(module) or "", ""]
    for part in parts:
        lines += part
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    """Names and contents of all pages."""
    return {
        "presence.md": _page("Presence: what the silence of a peer means", failure, _machine(failure.PEER)),
        "group.md": _page(
            "Groups: how members agree",
            group_core,
            _machine(ROLE),
            _machine(STANDING),
            _receptions(),
            _group_events(),
        ),
        "roster.md": _page("Roster: who may be here", roster, [_JOINING]),
        "messages.md": _page(
            "Messages: the bytes of control",
            messages,
            _messages("Roster, joining and presence", of_groups=False),
            _messages("Groups", of_groups=True),
        ),
        "trust.md": _page("Trust: whose messages count", trust, _machine(TRUST)),
    }


def main(arguments: list[str]) -> int:
    """Writes the pages; returns the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m shoal.lab.protocol_pages DIRECTORY\n")
        return 2
    directory = Path(arguments[0])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

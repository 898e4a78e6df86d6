"""`shoal invite`, `join`, `remove`, `confirm` and `leave`: who belongs to this device's cluster."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
from rich.console import Console

from shoal.errors import DeviceUnreachable
from shoal.runtime import errors_by_name
from shoal.runtime.agent import default_name
from shoal.runtime.messages import Failed
from shoal.runtime.node.interpreter import Interpreter, NodeOptions
from shoal.runtime.node.owner import (
    ANSWER_S,
    AnyAnswer,
    ConfirmDevice,
    Done,
    Invitation,
    JoinCluster,
    Joined,
    LeaveCluster,
    MakeInvitation,
    OwnerDesk,
    OwnerLink,
    Pause,
    RemoveDevice,
)
from shoal.runtime.node.state import DeviceState, find_agent
from shoal.runtime.node.token import read_token

_LOOPBACK = ("127.", "[::1]", "localhost")


def _print(answer: Invitation | Joined | Done, text: str, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(answer).decode())  # noqa: T201
    else:
        Console(highlight=False).print(text)


def invite(state: Path, *, uses: int, hours: float, as_json: bool) -> None:
    """Prints a token on standard output, and what it is for on standard error."""
    with OwnerLink(state) as owner:
        made = owner.ask(MakeInvitation(uses, hours * 3600.0), Invitation)
    if as_json:
        print(msgspec.json.encode(made).decode())  # noqa: T201
        return
    console = Console(stderr=True, highlight=False)
    who = "one device" if uses == 1 else f"{uses} devices"
    console.print(f"For {who}, within {hours:g} h. There, start `shoal up`, then:")
    console.print()
    print(f"shoal join {made.token}")  # noqa: T201
    if all(address.startswith(_LOOPBACK) for address in made.addresses):
        console.print()
        console.print(
            "[yellow]warning:[/] this agent is reached from this machine only: for others, start it with "
            "`shoal up --members HOST:PORT`"
        )


def join(state: Path, token: str, *, name: str | None, as_json: bool) -> None:
    """Joins by the agent that runs from `state`, or by itself where none does."""
    read_token(token)
    try:
        find_agent(state)
        owner = OwnerLink(state)
    except DeviceUnreachable:
        joined = _join_alone(state, token, name=name)
        hint = " Start `shoal up` here to be part of it."
    else:
        with owner:
            joined = owner.ask(JoinCluster(token), Joined)
        hint = ""
    others = ", ".join(joined.devices)
    _print(joined, f"joined cluster {joined.cluster[:8]}, with {others}.{hint}", as_json=as_json)


def _join_alone(state: Path, token: str, *, name: str | None) -> Joined:
    """No agent runs here: the device's own interpreter, for as long as joining takes; it only dials out."""
    node = Interpreter(DeviceState(state), NodeOptions(name=name or default_name()))
    desk = OwnerDesk(node)
    answers: list[AnyAnswer] = []
    answered = threading.Event()

    def on_joined(answer: AnyAnswer) -> None:
        answers.append(answer)
        answered.set()

    def begin() -> None:
        try:
            desk.join(token, None)
        except Exception as error:  # carried to the caller's thread
            on_joined(errors_by_name.failure(error))

    desk.on_joined = on_joined  # type: ignore[method-assign]
    node.start()
    try:
        node.post(begin)
        if not answered.wait(ANSWER_S):
            raise DeviceUnreachable("the member that the token names did not answer in time")
    finally:
        node.stop()
    answer = answers[0]
    if isinstance(answer, Failed):
        raise errors_by_name.revive(answer)
    assert isinstance(answer, Joined)
    return answer


def remove(state: Path, device: str, *, as_json: bool) -> None:
    """Takes a device out, for ever."""
    with OwnerLink(state) as owner:
        done = owner.ask(RemoveDevice(device), Done)
    _print(done, done.text, as_json=as_json)


def confirm(state: Path, device: str, *, as_json: bool) -> None:
    """Says which of too many devices that came by one invitation is right."""
    with OwnerLink(state) as owner:
        done = owner.ask(ConfirmDevice(device), Done)
    _print(done, done.text, as_json=as_json)


def pause(state: Path, *, is_paused: bool, as_json: bool) -> None:
    """Lends others nothing from now on, or again."""
    with OwnerLink(state) as owner:
        done = owner.ask(Pause(is_paused), Done)
    _print(done, done.text, as_json=as_json)


def leave(state: Path, *, as_json: bool) -> None:
    """Takes this device out."""
    with OwnerLink(state) as owner:
        done = owner.ask(LeaveCluster(), Done)
    _print(done, done.text, as_json=as_json)

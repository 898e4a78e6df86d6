"""`shoal simulate JOURNAL`: what a real device was told, given to its cores again, in the simulator's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from shoal.effects import Announce, Effect, Event
from shoal.errors import ShoalError
from shoal.node.core import NodeCore
from shoal.node.journal import replay as replay_lines
from shoal.runtime.node.interpreter import make_core
from shoal.simulation.story import describe
from shoal.transport.identity import DeviceKeys


class ReplayDiffers(ShoalError):
    """The cores did something else than they did then: another version, another key, or a damaged journal."""


def is_journal(path: Path) -> bool:
    """Whether the file begins as `shoal up --journal` writes it."""
    try:
        with path.open("rb") as file:
            return file.read(12).startswith(b'{"version":')
    except OSError:
        return False


def replay(path: Path, state: Path) -> None:
    """Prints what the device announced, with the seconds since its start.

    Args:
        path: a journal.
        state: the device's state folder; its key signs as it did.

    Raises:
        ReplayDiffers: names the first line whose effects are others.
    """
    console = Console(highlight=False)
    begun_s: list[float] = []

    def make_node(me: Any, **arguments: Any) -> NodeCore:
        core = make_core(me, **arguments)
        begun_s.append(arguments["now_s"])
        step = core.step

        def step_and_tell(event: Event, now_s: float) -> list[Effect]:
            effects = step(event, now_s)
            for effect in effects:
                text = describe(effect.fact) if isinstance(effect, Announce) else ""
                if text:
                    console.print(f"{now_s - begun_s[0]:9.3f}  {text}", soft_wrap=True)
            return effects

        core.step = step_and_tell  # type: ignore[method-assign]
        return core

    if not (state / "key").is_file():
        raise ValueError(f"{state} has no key: name the state folder of the device that wrote the journal with --state")
    with path.open("rb") as file:
        replayed = replay_lines(file, DeviceKeys.load_or_create(state / "key"), make_node=make_node)
    if replayed.difference is not None:
        line, then, now = replayed.difference
        raise ReplayDiffers(f"{path}: line {line} had effects {then} then and {now} now, after {replayed.num_events} events")
    console.print(f"{replayed.num_events} events, the same effects as then")

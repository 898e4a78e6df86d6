"""A plan: a cluster, its habits and what happens to it, as a value and as text; and how one is carried out.

    # what it is about
    seed 7
    devices a b c                      members from the start, the roster on every disk
    slow c                             it never catches up as a shadow
    settings drift_max=0.001 encodes=true
    timing stranger_s=5
    network loss=0.05 delay=0.002
    at 0.1 create run a
    at 0.2 enter run b
    heal 8                             all faults stop, and everything must settle; or:
    end 12                             it just ends

The owner of a simulated cluster is at home once faults stop: a device that lost everything gets a new invitation, an
overused one is
decided, and a group without any quorum left is recovered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from shoal.ids import NodeId
from shoal.membership.messages import Statement
from shoal.membership.roster import Roster, signed_text, statement_key
from shoal.membership.timing import Timing
from shoal.node.core import NodeCore
from shoal.simulation.actions import Action, parse_action
from shoal.simulation.checkers import Checkers
from shoal.simulation.device import Device, Power
from shoal.simulation.keys import SimulatedKeys
from shoal.simulation.story import Story
from shoal.simulation.world import SINCE_1970_S, Failure, NetworkModel, NodeFactory, Settings, World

SETTLE_S_MAX = 40.0
"""Once faults have stopped, everything is settled by then. Broken connections alone may take 8 s to be noticed."""
CALM_S = 2.5
_LOOK_S = 0.25


class Plan(msgspec.Struct, frozen=True):
    """All that a run depends on. Equal plans give equal stories."""

    devices: tuple[str, ...]
    actions: tuple[Action, ...]
    settings: Settings = Settings()
    network: NetworkModel = NetworkModel()
    slow: tuple[str, ...] = ()
    end_s: float = 10.0
    heals: bool = True
    parts: tuple[tuple[str, ...], ...] = ()
    """If given, faults stop in two stages: first all but a cut between these."""
    title: str = ""

    def __str__(self) -> str:
        lines = [f"# {self.title}"] if self.title else []
        lines.append(f"seed {self.settings.seed}")
        if self.devices:
            lines.append(f"devices {' '.join(self.devices)}")
        if self.slow:
            lines.append(f"slow {' '.join(self.slow)}")
        for word, value, default in (
            ("settings", self.settings, Settings(seed=self.settings.seed, timing=self.settings.timing)),
            ("timing", self.settings.timing, Timing()),
            ("network", self.network, NetworkModel()),
        ):
            changed = _changed(value, default)
            if changed:
                lines.append(f"{word} {changed}")
        lines += [str(action) for action in self.actions]
        if self.parts:
            lines.append("parts " + " | ".join(" ".join(part) for part in self.parts))
        lines.append(f"{'heal' if self.heals else 'end'} {self.end_s:g}")
        return "\n".join(lines)


def _changed(value: msgspec.Struct, default: msgspec.Struct) -> str:
    words = []
    for name in value.__struct_fields__:
        mine = getattr(value, name)
        if mine != getattr(default, name) and not isinstance(mine, msgspec.Struct):
            words.append(f"{name}={str(mine).lower() if isinstance(mine, bool) else repr(mine)}")
    return " ".join(words)


def parse_plan(text: str, *, source: str = "the plan") -> Plan:
    """Reads a plan.

    Raises:
        ValueError: names the line, and what is allowed there.
    """
    fields: dict[str, Any] = {"title": ""}
    settings, timing, network = Settings(), Timing(), NetworkModel()
    actions: list[Action] = []
    for number, whole in enumerate(text.splitlines(), 1):
        line = whole.strip()
        if line.startswith("#"):
            fields["title"] = fields["title"] or line.strip("# ")
            continue
        if not line:
            continue
        word, _, rest = line.partition(" ")
        try:
            if word == "at":
                actions += _actions_of(rest)
            elif word in ("devices", "slow"):
                fields[word] = tuple(rest.split())
            elif word == "seed":
                settings = msgspec.structs.replace(settings, seed=int(rest))
            elif word == "settings":
                settings = _with_words(settings, rest)
            elif word == "timing":
                timing = _with_words(timing, rest)
            elif word == "network":
                network = _with_words(network, rest)
            elif word == "parts":
                fields["parts"] = tuple(tuple(part.split()) for part in rest.split("|"))
            elif word in ("heal", "end"):
                fields["heals"], fields["end_s"] = word == "heal", float(rest)
            else:
                allowed = "seed, devices, slow, settings, timing, network, at, parts, heal, end"
                raise ValueError(f"'{word}' is no line of a plan: write one of {allowed}")
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from None
    fields.setdefault("devices", ())
    if "end_s" not in fields:
        raise ValueError(f"{source} does not end: add 'heal SECONDS' or 'end SECONDS'")
    plan = Plan(actions=tuple(actions), settings=msgspec.structs.replace(settings, timing=timing), network=network, **fields)
    _check_names(plan, source)
    return plan


def _actions_of(text: str) -> list[Action]:
    time, _, rest = text.partition(" ")
    return [parse_action(float(time), part.strip()) for part in rest.split(";")]


def _check_names(plan: Plan, source: str) -> None:
    known = {*plan.devices, *(action.arguments[0] for action in plan.actions if action.verb == "new")}
    for action in plan.actions:
        for name in sorted(action.devices() - known):
            raise ValueError(
                f"{source}: '{action}' speaks of '{name}', but the devices are {', '.join(sorted(known)) or 'none'}"
            )


def _with_words(value: Any, text: str) -> Any:
    changes = {}
    for word in text.split():
        name, is_pair, raw = word.partition("=")
        if not is_pair or name not in value.__struct_fields__ or isinstance(getattr(value, name), msgspec.Struct):
            allowed = [each for each in value.__struct_fields__ if not isinstance(getattr(value, each), msgspec.Struct)]
            raise ValueError(f"'{word}' is not understood: write KEY=VALUE with one of {', '.join(allowed)}")
        kind = type(getattr(value, name))
        changes[name] = raw in ("true", "yes", "1") if kind is bool else kind(raw)
    return msgspec.structs.replace(value, **changes)


def read_plan(path: Path) -> Plan:
    """A plan from a file; what follows a line of dashes (a transcript) is not part of it."""
    return parse_plan(path.read_text(encoding="utf-8").partition("\n---")[0], source=path.name)


# ---- carrying out


class Outcome(msgspec.Struct, frozen=True):
    """What a run came to. `failure` is None where all went well."""

    plan: Plan
    story: Story
    checkers: Checkers
    failure: Failure | None
    num_events: int
    num_messages: int
    simulated_s: float
    settled_s: float | None
    """How long after the faults everything was settled."""
    world: World


def make_roster(names: Iterable[str]) -> Roster:
    """A roster founded by the first, who added the others."""
    statements: dict[str, Statement] = {}
    nodes = [NodeId(name) for name in names]
    for index, node in enumerate(nodes):
        founder = SimulatedKeys(nodes[0])
        public_key = SimulatedKeys(node).public_key
        kind = "add" if index else "found"
        statement = Statement(kind, nodes[0], node, float(index), public_key=public_key, name=node)  # type: ignore[arg-type]
        signed = msgspec.structs.replace(statement, signature=founder.sign(signed_text(statement)))
        statements[statement_key(signed)] = signed
    return Roster(statements)


def run_plan(plan: Plan, *, make_node: NodeFactory = NodeCore, look: Callable[[World], None] | None = None) -> Outcome:
    """Carries a plan out, with all checkers on. `look` is called with the world before it begins."""
    checkers = Checkers()
    world = World(plan.settings, network=plan.network, make_node=make_node, watcher=checkers)
    checkers.world = world
    failure = None
    settled_s = None
    try:
        _begin(world, plan)
        if look is not None:
            look(world)
        for action in plan.actions:
            world.schedule(action)
        world.run_until(plan.end_s)
        if plan.heals:
            settled_s = _Ending(world, checkers, plan).run()
    except Failure as error:
        failure = error
    return Outcome(plan, world.story, checkers, failure, world.num_events, world.num_messages, world.now_s, settled_s, world)


def _begin(world: World, plan: Plan) -> None:
    roster = make_roster(plan.devices)
    devices = [world.add_device(name) for name in plan.devices]
    for device in devices:
        for key, statement in roster.statements.items():
            device.disk[f"roster/{key}"] = msgspec.msgpack.encode(statement)
        # They have met before.
        met_s = {other.node: SINCE_1970_S for other in devices if other is not device}
        device.disk["met"] = msgspec.msgpack.encode(met_s)
    for device in devices:
        world.start(device)
    world.slow = frozenset(NodeId(name) for name in plan.slow)


class _Ending:
    """Faults stop; the owner sees to what only an owner can; everything settles, and stays so."""

    def __init__(self, world: World, checkers: Checkers, plan: Plan) -> None:
        self._world = world
        self._checkers = checkers
        self._plan = plan
        self._num_tokens = 0
        self._lost_since_s: dict[str, float] = {}
        self._acted_s = float("-inf")

    def run(self) -> float:
        """How long it took, in seconds."""
        world, checkers = self._world, self._checkers
        since_s = world.now_s
        world.story.add(world.now_s, "", "faults stop")
        self._heal()
        if len(self._plan.parts) > 1:
            world.act(Action(world.now_s, "split", _words(self._whole_parts())))
            self._settle("presence")
            world.act(Action(world.now_s, "mend", ("all",)))
        self._settle("settles (I8, I10)")
        settled_s = world.now_s - since_s
        world.story.add(world.now_s, "", "settled")
        checkers.is_calm = True
        world.run_until(world.now_s + CALM_S)
        if problem := checkers.unsettled():
            raise Failure("calm", problem)
        return settled_s

    def _whole_parts(self) -> tuple[tuple[str, ...], ...]:
        """Devices that came later are on the first side."""
        first, *others = self._plan.parts
        named = {name for part in self._plan.parts for name in part}
        return ((*first, *(str(node) for node in self._world.devices if node not in named)), *others)

    def _heal(self) -> None:
        world, settings = self._world, self._plan.settings
        world.is_quiet = True
        world.ambushes.clear()
        world.blocked.clear()
        world.network = NetworkModel(delay=min(self._plan.network.delay, 0.02))
        for device in list(world.devices.values()):
            device.disk_s = settings.disk_s
            name = str(device.node)
            for verb in ("thaw", "wake", "start"):
                world.act(Action(world.now_s, verb, (name,)))

    def _settle(self, checker: str) -> None:
        world, since_s = self._world, self._world.now_s
        good = 0
        problem = "nothing was looked at"
        while world.now_s - since_s < SETTLE_S_MAX:
            world.run_until(world.now_s + _LOOK_S)
            problem = self._checkers.unsettled()
            good = 0 if problem else good + 1
            if good >= 4:
                return
            if not world.blocked:
                self._act_as_owner()
            self._wake_all()
        raise Failure(checker, f"not settled {SETTLE_S_MAX:g} s after the faults: {problem}")

    def _wake_all(self) -> None:
        """What was under way when faults stopped may still have put a device to sleep."""
        world = self._world
        for device in world.devices.values():
            if device.power is not Power.RUNNING and not device.is_kept_off:
                for verb in ("thaw", "wake", "start"):
                    world.act(Action(world.now_s, verb, (str(device.node),)))

    def _act_as_owner(self) -> None:
        world, checkers = self._world, self._checkers
        if world.now_s - self._acted_s < 1.0:
            return
        candidates, members = checkers.strangers()
        for device in candidates:
            if device not in members and members and not _is_waiting(device, members):
                self._invite(device, members)
        if candidates and not members:
            world.act(Action(world.now_s, "found", (str(candidates[0].node),)))
        for member in members:
            waiting = member.core.roster.roster.waiting if member.core else {}
            for nodes in waiting.values():
                world.act(Action(world.now_s, "confirm", (nodes[0], str(member.node))))
                self._acted_s = world.now_s
                break
        lost = checkers.lost_groups()
        for group in list(self._lost_since_s):
            if group not in lost and group not in checkers.vanished_groups():
                del self._lost_since_s[group]
        for group, node in lost.items():
            if world.now_s - self._lost_since_s.setdefault(group, world.now_s) >= 5.0:
                world.act(Action(world.now_s, "recover", (group, node)))
                del self._lost_since_s[group]
        vanished = {} if len(members) < len(candidates) else checkers.vanished_groups()
        for group, node in vanished.items():
            if world.now_s - self._lost_since_s.setdefault(group, world.now_s) < 3.0:
                continue  # somebody who remembers it may still be met
            self._acted_s = world.now_s
            checkers.forget_group(group)
            world.act(Action(world.now_s, "create", (group, node)))

    def _invite(self, device: Device, members: list[Device]) -> None:
        world = self._world
        self._num_tokens += 1
        token, via = f"owner-{self._num_tokens}", str(members[0].node)
        self._acted_s = world.now_s + 1.0
        world.act(Action(world.now_s, "invite", (token, via)))
        world.act(Action(world.now_s, "use", (token, str(device.node), via)))


def _is_waiting(device: Device, members: list[Device]) -> bool:
    """Whether it came by an overused invitation: it is to be confirmed, not invited again."""
    cores = [member.core for member in members]
    return any(device.node in nodes for core in cores if core for nodes in core.roster.roster.waiting.values())


def _words(parts: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    words: list[str] = []
    for part in parts:
        words += ["|", *part] if words else part
    return tuple(words)

"""Many plans by chance, one per seed; what fails is made small.

`python -m shoal.simulation.swarm --seeds 10000` runs them on all cores. Every seed draws a cluster, a network and
some faults, and sets
an ambush or two for states that last only milliseconds, so that over the swarm every state of the tables meets every fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec

from shoal.membership.timing import Timing
from shoal.node.core import NodeCore
from shoal.simulation.actions import FAULTS, Action, parse_action
from shoal.simulation.checkers import STATES
from shoal.simulation.plan import Outcome, Plan, run_plan
from shoal.simulation.world import NetworkModel, NodeFactory, Settings

NAMES = "abcdefgh"
TIMING = Timing(stranger_s=4.0, stamp_every_s=2.0, stamp_valid_s=60.0, hold_s=2.0)
"""Hours made short, so that a run sees them: sleep that makes a stranger, stamps, the end of a hold."""

PAIRS = tuple((machine, state, fault) for machine, states in STATES.items() for state in states for fault in FAULTS)
"""What the swarm must cover."""
COVERING_SEEDS = 1500
"""So many seeds let every state meet every fault: each pair is laid in ambush fifteen times, and not every ambush is met."""


# ---- drawing


def draw_plan(seed: int) -> Plan:
    """The plan of a seed."""
    chance = random.Random(seed)
    num_devices = chance.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6))
    names = tuple(NAMES[:num_devices])
    settings = Settings(
        seed=seed,
        timing=TIMING,
        drift_max=chance.choice((0.0, 1e-4, 0.01)),
        skew_s_max=chance.choice((0.0, 0.1, 20.0)),
        late_s_max=chance.choice((0.0, 0.005, 0.1)),
        disk_s=chance.choice((0.0001, 0.002, 0.02)),
        broken_s=chance.choice((2.0, 8.0)),
        encodes=chance.random() < 0.15,
    )
    delay = chance.choice((0.0002, 0.001, 0.005, 0.02))
    network = NetworkModel(
        loss=chance.choice((0.0, 0.0, 0.02, 0.1, 0.2)),
        duplicate=chance.choice((0.0, 0.0, 0.05)),
        delay=delay,
        jitter=chance.choice((0.0, delay, 4 * delay)),
    )
    drawer = _Drawer(chance, names)
    drawer.set_up()
    for _ in range(chance.choice((0, 1, 1, 2, 3, 4, 6))):
        drawer.draw_fault()
    drawer.set_ambushes(seed)
    parts: tuple[tuple[str, ...], ...] = ()
    if num_devices > 1 and chance.random() < 0.2:
        cut = chance.randint(1, num_devices - 1)
        shuffled = chance.sample(names, num_devices)
        parts = (tuple(shuffled[:cut]), tuple(shuffled[cut:]))
    return Plan(
        devices=names if not drawer.is_invited else (),
        actions=tuple(sorted(drawer.actions, key=lambda action: action.at_s)),
        settings=settings,
        network=network,
        slow=tuple(name for name in names if chance.random() < 0.05),
        end_s=drawer.end_s,
        parts=parts,
        title=f"seed {seed}",
    )


_PLAIN_FAULTS = ("crash", "power-cut", "freeze", "freeze", "suspend", "cut", "one-way-cut", "split", "network", "disk")


class _Drawer:
    def __init__(self, chance: random.Random, names: tuple[str, ...]) -> None:
        self._chance = chance
        self._names = names
        self._begin_s = 1.0
        self.actions: list[Action] = []
        self.end_s = chance.uniform(3.0, 8.0)
        self.is_invited = False
        self._has_removed = False

    def _at(self, at_s: float, text: str) -> None:
        self.actions.append(parse_action(round(at_s, 3), text))

    def set_up(self) -> None:
        """A cluster, from a roster or by invitations, and a group of most of it."""
        chance, names = self._chance, self._names
        self.is_invited = chance.random() < 0.15
        if self.is_invited:
            self._at(0.0, f"new {names[0]}")
            self._at(0.01, f"found {names[0]}")
            self._at(0.05, f"invite t {names[0]} {len(names)}")
            for index, name in enumerate(names[1:], 1):
                self._at(0.02, f"new {name}")
                self._at(0.1 * index, f"use t {name} {names[0] if chance.random() < 0.8 else chance.choice(names[:index])}")
        self._at(0.15, f"create run {names[0]}")
        for name in names[1:]:
            if chance.random() < 0.9:
                at_s = 0.3 + (1.2 if chance.random() < 0.7 else self.end_s) * chance.random()
                self._at(at_s, f"enter run {name}" + (" witness" if chance.random() < 0.15 else ""))

    def _when(self) -> tuple[float, float]:
        """When a fault begins and ends; many overlap."""
        begin_s = self._chance.uniform(self._begin_s, self.end_s)
        return begin_s, begin_s + self._chance.choice((0.05, 0.3, 0.6, 1.0, 2.0, 5.0)) * (0.5 + self._chance.random())

    def draw_fault(self) -> None:
        chance, names = self._chance, self._names
        begin_s, back_s = self._when()
        name = chance.choice(names)
        some = chance.sample(names, chance.randint(1, len(names)))
        fault = chance.choice((*_PLAIN_FAULTS, "group", "losing", "rare"))
        if fault in ("crash", "power-cut"):
            some = list(names) if chance.random() < 0.2 else some
            self._at(begin_s, f"{fault} {' '.join(some)}")
            for each in some:
                self._at(back_s + chance.choice((0.0, 0.2)) * chance.random(), f"start {each}")
        elif fault == "losing":
            others = [each for each in names if each != name]
            if others and chance.random() < 0.6:
                # Somebody who will not have heard what the loser decided.
                other, before_s = chance.choice(others), max(0.5, begin_s - 0.9 - chance.random())
                self._at(before_s, f"freeze {other}")
                self._at(back_s + 0.2 * chance.random(), f"thaw {other}")
            self._at(begin_s, f"power-cut {name}")
            is_all = chance.random() < 0.4 and name != names[0]
            self._at(back_s, f"start {name} losing {'everything' if is_all else 'votes'}")
        elif fault == "freeze":
            self._at(begin_s, f"freeze {name}")
            self._at(back_s, f"thaw {name}")
        elif fault == "suspend":
            for each in some:
                self._at(begin_s, f"suspend {each}")
                self._at(back_s + chance.random(), f"wake {each}")
        elif fault == "network":
            self._at(begin_s, f"network loss={chance.choice((0.1, 0.3, 0.5))} jitter={chance.choice((0.001, 0.05))}")
            self._at(back_s, "network loss=0 jitter=0.001")
        elif fault == "disk":
            self._at(begin_s, f"disk {name} {chance.choice((0.05, 0.3, 1.0))}")
            self._at(back_s, f"disk {name} 0.002")
        elif fault == "group":
            self._at(begin_s, f"exit run {name}")
            if chance.random() < 0.7:
                self._at(back_s, f"enter run {name}")
        elif len(names) > 1:
            self._draw_among(fault, begin_s, back_s)

    def _draw_among(self, fault: str, begin_s: float, back_s: float) -> None:
        chance, names = self._chance, self._names
        first, second = chance.sample(names, 2)
        if fault == "split":
            shuffled = chance.sample(names, len(names))
            cut = chance.randint(1, len(names) - 1)
            self._at(begin_s, f"split {' '.join(shuffled[:cut])} | {' '.join(shuffled[cut:])}")
            self._at(back_s, "mend all")
        elif fault in ("cut", "one-way-cut"):
            sign = "-" if fault == "cut" else ">"
            self._at(begin_s, f"cut {first} {sign} {second}")
            self._at(back_s, f"mend {first} {sign} {second}")
        else:
            self._draw_rare(begin_s, first, second)

    def _draw_rare(self, begin_s: float, first: str, second: str) -> None:
        kind = self._chance.choice(("remove", "quit", "lose", "recover", "joiners"))
        if kind == "remove" and not self._has_removed:
            self._has_removed = True
            self._at(begin_s, f"remove {first} {second}")
        elif kind in ("quit", "lose") and first != self._names[0]:
            self._at(begin_s, f"{kind} {first}")
        elif kind == "recover":
            self._at(begin_s, f"recover run {first}")
        elif kind == "joiners":
            for name in ("x", "y"):
                self._at(0.02, f"new {name}")
                self._at(begin_s + 0.2, f"use one {name} {first if name == 'x' else second}")
            self._at(begin_s, f"invite one {first}")

    def set_ambushes(self, seed: int) -> None:
        """In turn, so that so many seeds cover so many pairs."""
        if seed % 5 == 4:
            return  # a share of plans without
        count = seed - seed // 5
        for offset in (0, len(PAIRS) // 3, 2 * len(PAIRS) // 3):
            machine, state, fault = PAIRS[(count + offset) % len(PAIRS)]
            at_s = self._chance.uniform(0.0, self.end_s - 1.5)
            if state in ("standing", "asking", "recovering", "suspended", "saved"):
                at_s = min(at_s, self._chance.choice((0.1, 1.0)))
            self._at(at_s, f"ambush {machine} {state} {fault}")
            self._lead_to(state, at_s)

    def _lead_to(self, state: str, at_s: float) -> None:
        """Sees to it that somebody gets into a rare state."""
        chance, names = self._chance, self._names
        if state == "recovering":
            self._at(max(0.0, at_s - 0.5), f"ambush role proposing {chance.choice(('crash', 'freeze', 'power-cut'))}")
        elif state == "outside":
            self._at(at_s + 0.1, f"exit run {chance.choice(names)}")
        elif state in ("suspended", "saved") and len(names) > 1:
            # A minority that is left alone for long.
            self.end_s = 9.0
            self._at(0.35, f"enter run {names[-1]}")
            for split_s in (2.0, 4.5):
                self._at(split_s, f"split {' '.join(names[:-1])} | {names[-1]}")
        elif state in ("cut", "doubted") and len(names) > 2:
            first, second = chance.sample(names, 2)
            self._at(at_s + 0.1, f"cut {first} > {second}")
        elif state == "sought" and len(names) > 2:
            # It comes back, and one of them only hears of it.
            first, second = chance.sample(names, 2)
            self._at(at_s + 0.1, f"crash {first}")
            self._at(at_s + 0.2, f"cut {first} - {second}")
            self._at(at_s + 2.2, f"start {first}")


# ---- making small


def shrink(outcome: Outcome, *, make_node: NodeFactory = NodeCore, runs_max: int = 250) -> Outcome:
    """A smaller plan that violates the same checker: fewer faults, fewer devices, a calmer network, a shorter time."""
    assert outcome.failure is not None
    best, runs = outcome, 0
    progress = True
    while progress and runs < runs_max:
        progress = False
        for smaller in _smaller(best.plan):
            if runs >= runs_max:
                break
            runs += 1
            try:
                tried = run_plan(smaller, make_node=make_node)
            except ValueError:
                continue  # an action speaks of a device that is no more
            if tried.failure is not None and tried.failure.checker == outcome.failure.checker:
                best, progress = tried, True
                break
    return best


def _smaller(plan: Plan) -> Iterator[Plan]:
    actions = plan.actions
    size = len(actions) // 2
    while size >= 1:
        for start in range(0, len(actions), size):
            yield msgspec.structs.replace(plan, actions=actions[:start] + actions[start + size :])
        size //= 2
    for name in reversed(plan.devices):
        kept = tuple(action for action in actions if name not in action.devices() and not _speaks_of(action, name))
        parts = tuple(tuple(each for each in part if each != name) for part in plan.parts)
        yield msgspec.structs.replace(
            plan,
            devices=tuple(each for each in plan.devices if each != name),
            actions=kept,
            parts=parts if all(parts) else (),
            slow=tuple(each for each in plan.slow if each != name),
        )
    if plan.parts:
        yield msgspec.structs.replace(plan, parts=())
    if plan.slow:
        yield msgspec.structs.replace(plan, slow=())
    for name, value in (("loss", 0.0), ("duplicate", 0.0), ("jitter", 0.0), ("delay", 0.001)):
        if getattr(plan.network, name) != value:
            yield msgspec.structs.replace(plan, network=msgspec.structs.replace(plan.network, **{name: value}))
    plain = Settings()
    for name in ("drift_max", "skew_s_max", "late_s_max", "disk_s", "broken_s", "encodes"):
        if getattr(plan.settings, name) != getattr(plain, name):
            settings = msgspec.structs.replace(plan.settings, **{name: getattr(plain, name)})
            yield msgspec.structs.replace(plan, settings=settings)
    last_s = max((action.at_s for action in actions), default=0.0)
    if plan.end_s > last_s + 0.5:
        yield msgspec.structs.replace(plan, end_s=round(last_s + 0.4, 3))


def _speaks_of(action: Action, name: str) -> bool:
    return action.verb == "split" and name in action.arguments


# ---- the swarm


class Verdict(msgspec.Struct, frozen=True):
    """Of one seed: what a process tells the one that asked."""

    seed: int
    num_events: int
    simulated_s: float
    settled_s: float | None
    checker: str
    text: str
    coverage: dict[tuple[str, str, str], int]


def judge_seed(seed: int) -> Verdict:
    """Runs the plan of one seed."""
    outcome = run_plan(draw_plan(seed))
    failure = outcome.failure
    return Verdict(
        seed,
        outcome.num_events,
        outcome.simulated_s,
        outcome.settled_s,
        failure.checker if failure else "",
        failure.text if failure else "",
        dict(outcome.checkers.coverage),
    )


def missing_pairs(coverage: Counter[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """(machine, state, fault) that no run has seen."""
    return [pair for pair in PAIRS if not coverage[pair]]


def explain(outcome: Outcome) -> str:
    """A failure for people: what, the plan that shows it, its story, how to run it again."""
    failure = outcome.failure
    assert failure is not None
    return (
        f"{failure.checker}: {failure.text}\n\n"
        f"The plan, made small; save it and run `shoal simulate FILE`:\n\n{outcome.plan}\n\n"
        f"Its story:\n\n{outcome.story}\n"
    )


def run_swarm(
    seeds: range, *, num_processes: int, report: Callable[[str], None], clock: Callable[[], float] | None = None
) -> tuple[list[Verdict], Counter[tuple[str, str, str]]]:
    """Judges all seeds; returns those that failed, and what was covered. `clock` is for the rate in progress lines."""
    failed: list[Verdict] = []
    coverage: Counter[tuple[str, str, str]] = Counter()
    begun_s = clock() if clock else 0.0
    said_s = begun_s
    events, simulated_s = 0, 0.0
    with _pool(num_processes) as judge:
        for count, verdict in enumerate(judge(seeds), 1):
            coverage.update(verdict.coverage)
            events += verdict.num_events
            simulated_s += verdict.simulated_s
            if verdict.checker:
                failed.append(verdict)
                report(f"seed {verdict.seed}: {verdict.checker}: {verdict.text}")
            now_s = clock() if clock else 0.0
            if now_s - said_s >= 5.0 or count == len(seeds):
                said_s = now_s
                rate = count / max(1e-9, now_s - begun_s)
                report(
                    f"{count} of {len(seeds)} seeds, {len(failed)} failed, {rate:.0f} seeds/s, "
                    f"{events} events, {simulated_s / 3600:.1f} simulated hours"
                )
    return failed, coverage


class _pool:  # noqa: N801  # used as a statement
    def __init__(self, num_processes: int) -> None:
        self._pool = multiprocessing.get_context("spawn").Pool(num_processes) if num_processes > 1 else None

    def __enter__(self) -> Callable[[range], Iterator[Verdict]]:
        if self._pool is None:
            return lambda seeds: map(judge_seed, seeds)
        pool = self._pool
        return lambda seeds: pool.imap_unordered(judge_seed, seeds, chunksize=20)

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


def main(arguments: list[str] | None = None) -> int:
    """The command of `make swarm`."""
    import time

    parser = argparse.ArgumentParser(description="Run many simulated clusters, each from its seed, and say what failed.")
    parser.add_argument("--seeds", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="how many at a time (all cores)")
    parser.add_argument("--shrink", type=int, default=3, help="how many failures to make small and print (3)")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes are at least 1")
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731, T201
    seeds = range(options.first, options.first + options.seeds)
    failed, coverage = run_swarm(seeds, num_processes=options.processes, report=say, clock=time.monotonic)
    for verdict in failed[: options.shrink]:
        print(f"\n==== seed {verdict.seed}\n{explain(shrink(run_plan(draw_plan(verdict.seed))))}")  # noqa: T201
    missing = missing_pairs(coverage)
    if missing and options.seeds >= COVERING_SEEDS:
        say(
            f"{len(missing)} of {len(PAIRS)} pairs of state and fault were not met: "
            + ", ".join("/".join(pair) for pair in missing)
        )
    say(f"{'FAILED: ' if failed else ''}{len(failed)} of {options.seeds} seeds failed")
    return 1 if failed or (missing and options.seeds >= COVERING_SEEDS) else 0


if __name__ == "__main__":
    sys.exit(main())

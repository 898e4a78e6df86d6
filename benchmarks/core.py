"""How fast the cores decide: one event with 64 members, and what a simulation makes of it.

core_us_p50, core_us_p99   microseconds of one `NodeCore.step`, over the events that the leader of a group of 64 sees:
                           heartbeats of peers, acknowledgements of its own, links that break and return, records
proposed and decided, timers follower_us_p99            the same at one that follows
heartbeat_us_p99           one heartbeat of a peer, of which there are most
sim_devices_1000_s         seconds for 1,000 devices, 60 simulated seconds, with churn
seeds_per_cpu_s            random plans with faults, run and checked, per second and processor
"""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from benchmarks.record import finish, is_quick
from shoal.effects import (
    Commanded,
    Effect,
    Event,
    LinkClosed,
    LinkOpened,
    Message,
    Received,
    Send,
    SetTimer,
    Store,
    Stored,
    TimerFired,
)
from shoal.ids import GroupId, NodeId
from shoal.membership.group import CreateGroup, JoinGroup, LeaveGroup, ReportProgress
from shoal.membership.messages import Statement
from shoal.membership.roster import Roster, signed_text, statement_key
from shoal.membership.timing import Timing
from shoal.node.core import START, NodeCore
from shoal.simulation.churn import Churn, run_churn
from shoal.simulation.keys import SimulatedKeys
from shoal.simulation.swarm import judge_seed

NUM_MEMBERS = 64
GROUP = GroupId("run")
TICK_S = 0.001


def roster_of(nodes: list[NodeId]) -> Roster:
    """The first founded the cluster and added the others."""
    first = SimulatedKeys(nodes[0])
    statements = []
    for node in nodes:
        kind = "found" if node == nodes[0] else "add"
        blank = Statement(kind, nodes[0], node, 1.7e9, public_key=SimulatedKeys(node).public_key, name=node)  # type: ignore[arg-type]
        statements.append(msgspec.structs.replace(blank, signature=first.sign(signed_text(blank))))
    return Roster({statement_key(each): each for each in statements})


class Bench:
    """64 cores that talk to each other at once and without loss; every step is timed."""

    def __init__(self, num_members: int) -> None:
        self.nodes = [NodeId(f"device{number:02}") for number in range(num_members)]
        self.now_s = 0.0
        self.spent: dict[tuple[NodeId, str], list[float]] = {}
        self.queue: list[tuple[NodeId, Event]] = []
        self.timers: dict[tuple[NodeId, str], float] = {}
        roster = roster_of(self.nodes)
        self.cores = {
            node: NodeCore(
                node,
                incarnation=1,
                keys=SimulatedKeys(node),
                timing=Timing(),
                now_s=0.0,
                since_1970_s=1.7e9,
                roster=roster,
            )
            for node in self.nodes
        }
        for node in self.nodes:
            self.queue.append((node, TimerFired(START)))
            self.queue += [(node, LinkOpened(peer)) for peer in self.nodes if peer != node]

    def _step(self, node: NodeId, event: Event) -> list[Effect]:
        core = self.cores[node]
        start = time.perf_counter_ns()
        effects = core.step(event, self.now_s)
        taken_us = (time.perf_counter_ns() - start) / 1000
        kind = type(event.message if isinstance(event, Received) else event).__name__
        self.spent.setdefault((node, kind), []).append(taken_us)
        return effects

    def run(self, seconds: float, each_tick: Callable[[int], None] = lambda _tick: None) -> None:
        """Lets time pass in ticks; what is sent in one arrives in the next."""
        for tick in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            each_tick(tick)
            due = [key for key, at_s in self.timers.items() if at_s <= self.now_s]
            arrived, self.queue = self.queue, []
            for node, key in due:
                del self.timers[node, key]
                arrived.append((node, TimerFired(key)))
            for node, event in arrived:
                for effect in self._step(node, event):
                    if isinstance(effect, Send):
                        self._deliver(node, effect.peers, effect.message)
                    elif isinstance(effect, SetTimer):
                        self.timers[node, effect.key] = effect.at_s
                    elif isinstance(effect, Store):
                        self.queue.append((node, Stored(effect.key, effect.number)))

    def _deliver(self, source: NodeId, targets: tuple[NodeId, ...], message: Message) -> None:
        received = Received(source, message)
        self.queue += [(target, received) for target in targets]

    def command(self, node: NodeId, command: object) -> None:
        self.queue.append((node, Commanded(command)))  # type: ignore[arg-type]


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure_core(seconds: float) -> dict[str, float]:
    """Percentiles in microseconds of one step, once the group of 64 stands, while links break and members come and go."""
    bench = Bench(NUM_MEMBERS)
    leader, follower, leaver = bench.nodes[0], bench.nodes[1], bench.nodes[-1]
    bench.run(1.0)
    bench.command(leader, CreateGroup(GROUP, steadiness=1))
    bench.run(0.5)
    for node in bench.nodes[1:]:
        bench.command(node, JoinGroup(GROUP))
    for _ in range(60):
        bench.run(0.5)
        if len(bench.cores[leader].groups[GROUP].committed.members) == NUM_MEMBERS:
            break
    for node in bench.nodes:
        bench.command(node, ReportProgress(GROUP, 1, has_state=True, ready=True))
    bench.run(2.0)
    record_now = bench.cores[leader].groups[GROUP].committed
    parts = Counter(member.part for member in record_now.members)
    if parts["active"] != NUM_MEMBERS or record_now.leader != leader:
        raise AssertionError(f"the group did not form: {parts}, led by {record_now.leader}")

    def disturb(tick: int) -> None:
        """Every 100 ms one of: a link breaks and returns, a member leaves, it comes back, it has caught up."""
        turn, rest = divmod(tick, 100)
        if rest:
            return
        if turn % 4 == 0:
            peer = bench.nodes[2 + turn % (NUM_MEMBERS - 3)]
            bench.queue += [(leader, LinkClosed(peer)), (leader, LinkOpened(peer)), (peer, LinkOpened(leader))]
        elif turn % 4 == 1:
            bench.command(leaver, LeaveGroup(GROUP))
        elif turn % 4 == 2:
            bench.command(leaver, JoinGroup(GROUP))
        else:
            bench.command(leaver, ReportProgress(GROUP, turn, has_state=True, ready=True))

    bench.spent.clear()
    epoch = bench.cores[leader].groups[GROUP].committed.epoch
    gc.collect()
    gc.freeze()
    bench.run(seconds, disturb)
    gc.unfreeze()
    num_decided = bench.cores[leader].groups[GROUP].committed.epoch - epoch
    if not num_decided or bench.cores[leader].groups[GROUP].leader != leader:
        raise AssertionError("nothing was decided while it was measured, or the leader changed")
    spent = {node: [us for (at, _), each in bench.spent.items() if at == node for us in each] for node in (leader, follower)}
    heartbeats = [us for (_, kind), each in bench.spent.items() if kind == "Heartbeat" for us in each]
    kinds = {kind: round(_percentile(each, 0.99), 1) for (at, kind), each in sorted(bench.spent.items()) if at == leader}
    print(json.dumps({"leader_us_p99_by_event": kinds, "decided": num_decided, "events": len(spent[leader])}))
    return {
        "core_us_p50": _percentile(spent[leader], 0.5),
        "core_us_p99": _percentile(spent[leader], 0.99),
        "follower_us_p99": _percentile(spent[follower], 0.99),
        "heartbeat_us_p99": _percentile(heartbeats, 0.99),
    }


def measure_churn(simulated_s: float) -> float:
    """Seconds for 1,000 devices and `simulated_s` of churn."""
    start = time.perf_counter()
    report, _ = run_churn(Churn(num_devices=1000, seconds=simulated_s, changes_per_s=2.0))
    taken_s = time.perf_counter() - start
    if report.beliefs_right < 0.99:
        raise AssertionError(f"only {report.beliefs_right:.3f} of the beliefs were right")
    return taken_s


def measure_swarm(num_seeds: int) -> float:
    """Seeds per second on one processor; every plan is drawn, run and checked."""
    start = time.perf_counter()
    failed = [seed for seed in range(num_seeds) if judge_seed(seed).checker]
    if failed:
        raise AssertionError(f"seeds {failed} failed")
    return num_seeds / (time.perf_counter() - start)


def main() -> None:
    """Measures, prints one JSON object, and keeps it."""
    seconds = 2.0 if is_quick() else 8.0
    figures = measure_core(seconds)
    # A quick run simulates less; the figure is for 60 s all the same.
    simulated_s = 15.0 if is_quick() else 60.0
    figures["sim_devices_1000_s"] = measure_churn(simulated_s) * 60.0 / simulated_s
    figures["seeds_per_cpu_s"] = measure_swarm(200 if is_quick() else 1000)
    settings = {"members": NUM_MEMBERS, "simulated_s": seconds}
    finish("core", {name: round(figure, 3) for name, figure in figures.items()}, settings)


if __name__ == "__main__":
    main()

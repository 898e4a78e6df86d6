"""Decides how many layers each device holds, on which backend, through how large a ring, for every number of rounds, by
integer programs that credit overlap.

Per fixed `k` rounds, with mean layer sizes (per device m: `W` weights on the CPU, the head's output projection included,
`KV` their cache, `A` ring bytes, `S` streamed bytes per token, `V` the time its visits take, `P` the same for a prompt,
`C` its computing, `D` its read rate, `u` the largest streamed unit, `z` whether it streams):

    minimise   weights . (sum P + hops of a prompt,  T,  the slowest device)
    T  >=  sum V + hops             T  >=  S_m / D_m
    V_m >= C_m                      V_m >= (S_m - k A_m) / D_m      A bytes wait at each of k visits
    V_0 >= (S_0 - layers of the head - A_0) / D_0                   its output projection is needed in one visit
    S_m >= W_m + KV_m + A_m - room_m                                0 <= S_m <= W_m, S_m = 0 unless z_m
    2 u z_m <= A_m <= room_m z_m
    k y_m <= layers_m               accelerator layers and their cache fit its memory

A sum of worst times, as Halda minimises, credits no overlap and so never prefers k > 1. Here what is read while others
compute is free up to the ring. One device alone is scored in closed form: while it computes nobody else does, so nothing
waits for it.

Hops depend on the order. Potentials p with p_i + q_j <= hop(i, j) bound every cycle from below; where the order of the
chosen devices costs more, that set's exact cost becomes a cut and the program is solved again, so up to
`EXACT_DEVICES_MAX` devices are placed and ordered exactly, within the gap. More are ordered by insertion and moves, and
`bound_s` stays a true bound. So many are not solved as programs at first: `dealing.py` deals layers to them and bounds all
numbers of rounds together, in a fraction of the time; programs are left with what it does not refute.

Source: the piped ring and its variables are prima.cpp's (Li et al., arXiv 2504.08791v2, section 3); the objective is ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

import highspy
import msgspec
import numpy as np

from shoal.errors import InfeasiblePlacement
from shoal.placement.dealing import Dealing, Dealt, Potentials, Scored
from shoal.placement.highs import quiet_highs
from shoal.placement.profile import Cluster, DeviceProfile, LayerTimes, ModelProfile
from shoal.placement.ring_order import EXACT_DEVICES_MAX, Floats, best_order, cycle_potentials
from shoal.placement.shortage import explain_shortage

ROUNDS_MAX = 40
PROMPT_TOKENS = 512
ANSWER_TOKENS = 128
_GAP_SMALL = 1e-3
_GAP_LARGE = 0.018
"""Of the best value; beyond `EXACT_DEVICES_MAX` devices, where less is bought by seconds."""
_FIRST_ROUNDS = (1, 4, 8, 2)
"""One first: of plans within the gap of each other the simplest is kept."""
_SOLVER_SHARE = 0.5
"""Of the gap, for each program; the rest is for those that are not solved."""
_NODES_MAX = 2000
_CUTS_MAX = 64
_CUTS_MAX_LARGE = 8
_POTENTIALS_MAX = 8
_WEAK = 0.05
"""Potentials that miss as much of a set's hops are replaced by better ones."""
_GB = 1e9
"""Bytes enter the programs in units of this, so that all figures are of about one size."""

ObjectiveName = Literal["latency", "first-token", "throughput"]


class Objective(msgspec.Struct, frozen=True):
    """What a second of each is worth: of the first token of a prompt, of a token, of the slowest device's share of one."""

    first_token: float
    token: float
    slowest: float = 0.0

    def cost_s(self, *, first_token_s: float, token_s: float, slowest_s: float) -> float:
        return self.first_token * first_token_s + self.token * token_s + self.slowest * slowest_s


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "latency": Objective(1.0, float(ANSWER_TOKENS)),
    "first-token": Objective(1.0, 1.0),
    "throughput": Objective(0.0, 0.01 * ANSWER_TOKENS, float(ANSWER_TOKENS)),
}


def parse_objective(name: str) -> ObjectiveName:
    """Raises ValueError with the names there are."""
    for known in OBJECTIVES:
        if known == name:
            return known
    raise ValueError(f"no objective is called '{name}': {', '.join(OBJECTIVES)} are known")


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part, by its index in the cluster: layers on the CPU and on the accelerator, ring, bytes per token."""

    device: int
    num_layers: int
    num_accelerator_layers: int = 0
    ring_bytes: int = 0
    streamed_bytes: int = 0

    @property
    def num_layers_total(self) -> int:
        return self.num_layers + self.num_accelerator_layers


class CoarsePlan(msgspec.Struct, frozen=True, kw_only=True):
    """A solution of the program: shares in ring order, the head last, with the program's own times."""

    num_rounds: int
    shares: tuple[Share, ...]
    cost_s: float
    token_s: float
    first_token_s: float


class Solution(msgspec.Struct, frozen=True, kw_only=True):
    """The best plan per number of rounds that was worth solving, cheapest first; `bound_s` is what no plan of any rounds
    costs less than, under the program's model."""

    plans: tuple[CoarsePlan, ...]
    bound_s: float

    @property
    def best(self) -> CoarsePlan:
        return self.plans[0]

    @property
    def gap(self) -> float:
        return self.best.cost_s / self.bound_s - 1.0 if self.bound_s > 0 else 0.0


class Terms:
    """One device's constants; bytes in units of `_GB`, times in seconds per layer, of a token and of a prompt."""

    def __init__(self, device: DeviceProfile, model: ModelProfile, *, is_head: bool, prompt_tokens: int) -> None:
        times, accelerator, disk = device.times, device.accelerator, device.disk
        self.is_head = is_head
        self.room = device.weights_room_bytes(model) / _GB
        self.layer_s = times.layer_s
        self.prompt_layer_s = prompt_layer_s(times, model, prompt_tokens)
        self.output = is_head * model.output_bytes / _GB
        self.output_s = is_head * times.output_s
        self.read_rate = disk.read_bytes_per_s / _GB if disk else 0.0
        self.ring_min = model.ring_bytes_min / _GB
        layer, cache = model.mean_layer_bytes / _GB, model.cache_bytes_per_layer / _GB
        self.num_layers_max = self._layers_max(layer, cache, model.num_layers)
        self.num_accelerator_layers_max = 0
        self.accelerator_layer_s = self.accelerator_prompt_layer_s = self.copy_s = 0.0
        self.shares_memory = False
        if accelerator is not None:
            self.accelerator_layer_s = accelerator.times.layer_s
            self.accelerator_prompt_layer_s = prompt_layer_s(accelerator.times, model, prompt_tokens)
            self.copy_s = accelerator.copy_s
            self.shares_memory = accelerator.shares_memory
            fits = int(accelerator.memory_bytes / (_GB * (layer + cache)))
            if self.shares_memory:
                fits = min(fits, int(max(0.0, self.room - self.output * (not self.read_rate)) / (layer + cache)))
            self.num_accelerator_layers_max = min(model.num_layers, max(0, fits)) if self.room >= 0 else 0

    def _layers_max(self, layer: float, cache: float, num_layers: int) -> int:
        resident = int((self.room - self.output + 1e-12) / (layer + cache)) if self.room >= self.output else 0
        streaming = 0
        if self.read_rate and self.room > self.ring_min:
            streaming = int((self.room - self.ring_min) / cache) if cache else num_layers
        return max(0, min(num_layers, max(resident, streaming)))

    @property
    def layers_max(self) -> int:
        return self.num_layers_max + self.num_accelerator_layers_max


def prompt_layer_s(times: LayerTimes, model: ModelProfile, prompt_tokens: int) -> float:
    """Seconds of one layer for a whole prompt, in micro-batches."""
    full, rest = divmod(prompt_tokens, model.micro_batch)
    return full * times.prefill_layer_s(model.micro_batch) + (times.prefill_layer_s(rest) if rest else 0.0)


def solve(
    cluster: Cluster,
    model: ModelProfile,
    *,
    objective: Objective = OBJECTIVES["latency"],
    rounds: Sequence[int] | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Solution:
    """Solves for all numbers of rounds together; those whose relaxation is no better than what is found are left.

    Args:
        rounds: else 1 to `ROUNDS_MAX`.

    Raises:
        InfeasiblePlacement: names the missing bytes and what would help.
    """
    problem = Problem(cluster, model, objective=objective, prompt_tokens=prompt_tokens)
    search = _Search(problem, list(rounds or range(1, min(ROUNDS_MAX, model.num_layers) + 1)))
    search.run()
    if not search.plans:
        raise InfeasiblePlacement(explain_shortage(cluster, model))
    plans = sorted(search.plans, key=lambda plan: plan.cost_s)
    return Solution(plans=tuple(plans), bound_s=min([search.incumbent_s, *search.proved.values()]))


class _Search:
    """Over numbers of rounds: a few far apart, then beside the best as long as that is new, then all others are refuted."""

    def __init__(self, problem: Problem, rounds: list[int]) -> None:
        self._problem = problem
        self.plans: list[CoarsePlan] = []
        if 1 in rounds and (alone := problem.alone()) is not None:
            self.plans.append(alone)
        self._open = set(rounds)
        self.proved: dict[int, float] = {}

    @property
    def incumbent_s(self) -> float:
        return min((plan.cost_s for plan in self.plans), default=math.inf)

    def run(self) -> None:
        if not self._problem.is_exact:
            plans, self.proved = self._problem.deal(self._open, cutoff_s=self.incumbent_s)
            self.plans += plans
            self._open = {k for k in self._open if self._is_open(k)}
        while (k := self._next()) is not None:
            self._solve(k)
        for k in sorted(self._open):
            self._solve(k)
        # With all potentials known, those that are not quite refuted are asked again.
        for k in sorted(self.proved, key=self.proved.__getitem__):
            if self._is_open(k):
                self._solve(k)

    def _is_open(self, k: int) -> bool:
        return self.proved[k] < self.incumbent_s * (1 - 1.05 * self._problem.gap)

    def _next(self) -> int | None:
        for k in _FIRST_ROUNDS:
            if k in self._open:
                return k
        if not self.plans:
            return min(self._open, default=None)
        best = min(self.plans, key=lambda plan: plan.cost_s).num_rounds
        return next((k for k in (best + 1, best - 1) if k in self._open), None)

    def _solve(self, k: int) -> None:
        self._open.discard(k)
        plan, bound = self._problem.solve(k, cutoff_s=self.incumbent_s)
        if plan is not None:
            self.plans.append(plan)
        self.proved[k] = max(bound, self.proved.get(k, 0.0))


class Problem:
    """The program of one cluster and model."""

    def __init__(self, cluster: Cluster, model: ModelProfile, *, objective: Objective, prompt_tokens: int) -> None:
        self.model = model
        self.objective = objective
        self.terms = [
            Terms(device, model, is_head=index == 0, prompt_tokens=prompt_tokens)
            for index, device in enumerate(cluster.devices)
        ]
        self.layer = model.mean_layer_bytes / _GB
        self.cache = model.cache_bytes_per_layer / _GB
        self.hops = np.array(cluster.hops_s(model.hidden_bytes))
        num_batches = math.ceil(prompt_tokens / model.micro_batch)
        batch_bytes = min(prompt_tokens, model.micro_batch) * model.hidden_bytes
        self.prompt_hops = np.array(cluster.hops_s(batch_bytes)) * num_batches
        self.is_exact = len(self.terms) <= EXACT_DEVICES_MAX
        self.gap = _GAP_SMALL if self.is_exact else _GAP_LARGE
        self._cuts_max = _CUTS_MAX if self.is_exact else _CUTS_MAX_LARGE
        everybody = frozenset(range(len(self.terms)))
        self.potentials = [(cycle_potentials(self.hops, everybody), cycle_potentials(self.prompt_hops, everybody))]
        self._programs: dict[int, _Program | None] = {}

    def alone(self) -> CoarsePlan | None:
        """The head without anybody; None where it cannot."""
        term, num_layers = self.terms[0], self.model.num_layers
        best: CoarsePlan | None = None
        for on_accelerator in range(term.num_accelerator_layers_max + 1):
            layers = num_layers - on_accelerator
            if layers < 0 or layers > term.num_layers_max:
                continue
            need = layers * (self.layer + self.cache) + term.output
            need += term.shares_memory * on_accelerator * (self.layer + self.cache)
            ring = streamed = 0.0
            if need > term.room:
                ring, streamed = term.ring_min, need + term.ring_min - term.room
                if not term.read_rate or streamed > layers * self.layer + term.output:
                    continue
            compute_s, prompt_s = self.compute_s(0, layers, on_accelerator, 1)
            token_s = max(compute_s, streamed / term.read_rate) if streamed else compute_s
            first_token_s = max(prompt_s, (streamed - ring) / term.read_rate) if streamed else prompt_s
            share = _share(0, layers, on_accelerator, ring, streamed)
            plan = self._plan(1, (share,), token_s=token_s, first_token_s=first_token_s, slowest_s=token_s)
            if best is None or plan.cost_s < best.cost_s:
                best = plan
        return best

    def compute_s(self, device: int, layers: int, on_accelerator: int, k: int) -> tuple[float, float]:
        """Seconds of computing for a token and for a prompt."""
        term = self.terms[device]
        copies_s = k * term.copy_s if on_accelerator else 0.0
        token_s = layers * term.layer_s + on_accelerator * term.accelerator_layer_s + term.output_s + copies_s
        prompt_s = layers * term.prompt_layer_s + on_accelerator * term.accelerator_prompt_layer_s + term.output_s + copies_s
        return token_s, prompt_s

    def deal(self, rounds: Collection[int], *, cutoff_s: float) -> tuple[list[CoarsePlan], dict[int, float]]:
        """Good plans, one for each number of rounds at most, and what none of so many rounds costs less than."""
        usable = [k for k in rounds if len(self.terms) > 1 and self.model.num_layers >= k]
        best: dict[int, CoarsePlan] = {}

        def score(k: int, parts: Sequence[Dealt]) -> Scored | None:
            used = {part.device for part in parts if part.num_layers + part.num_accelerator_layers}
            if not used - {0} or (k > 1 and len(used) < 2):
                return None
            plan, members, decode_s, prompt_s = self._ordered(k, _Found(tuple(_share(*part) for part in parts)))
            if k not in best or plan.cost_s < best[k].cost_s:
                best[k] = plan
            return Scored(plan.cost_s, members, decode_s, prompt_s)

        def fit(members: frozenset[int]) -> Potentials:
            return Potentials(cycle_potentials(self.hops, members), cycle_potentials(self.prompt_hops, members))

        dealing = Dealing(
            self.terms, layer=self.layer, cache=self.cache, num_layers=self.model.num_layers, objective=self.objective
        )
        known = Potentials(*self.potentials[0])
        proved = dealing.search(usable, gap=self.gap, cutoff_s=cutoff_s, potentials=known, score=score, fit=fit)
        return list(best.values()), dict.fromkeys(rounds, math.inf) | proved

    def solve(self, k: int, *, cutoff_s: float) -> tuple[CoarsePlan | None, float]:
        """The best ring of k rounds that costs less than `cutoff_s`, and what no such ring costs less than."""
        program = self._program(k)
        if program is None:
            return None, math.inf
        best: CoarsePlan | None = None
        proved_s = 0.0
        seen: set[frozenset[int]] = set()
        while True:
            found, proved = program.solve(gap=self.gap, cutoff_s=cutoff_s * (1 - self.gap))
            proved_s = max(proved_s, min(proved, cutoff_s * (1 - self.gap)))
            if found is None:
                break
            plan, used, decode_s, prompt_s = self._ordered(k, found)
            if best is None or plan.cost_s < best.cost_s:
                best, cutoff_s = plan, min(cutoff_s, plan.cost_s)
            self._learn_potentials(used, decode_s, prompt_s, k)
            is_tight = proved_s >= best.cost_s * (1 - self.gap)
            if is_tight or used in seen or len(used) > EXACT_DEVICES_MAX or len(seen) >= self._cuts_max:
                break
            seen.add(used)
            program.cut(used, decode_s, prompt_s)
        return best, proved_s

    def _learn_potentials(self, used: frozenset[int], decode_s: float, prompt_s: float, k: int) -> None:
        """Where the potentials so far are weak for this set, others that are best for it; they hold for every set."""
        if len(used) < 2 or len(self.potentials) >= _POTENTIALS_MAX:
            return
        members = list(used)
        known_s = max(k * float(decode[members].sum()) * self.objective.token for decode, _ in self.potentials)
        known_prompt_s = max(k * float(prompt[members].sum()) * self.objective.first_token for _, prompt in self.potentials)
        missing_s = decode_s * self.objective.token + prompt_s * self.objective.first_token - known_s - known_prompt_s
        if missing_s > _WEAK * (known_s + known_prompt_s):
            self.potentials.append((cycle_potentials(self.hops, used), cycle_potentials(self.prompt_hops, used)))

    def _program(self, k: int) -> _Program | None:
        if k not in self._programs:
            self._programs[k] = self._make_program(k)
        return self._programs[k]

    def _make_program(self, k: int) -> _Program | None:
        if len(self.terms) < 2 or self.model.num_layers < k:
            return None
        if sum(term.layers_max for term in self.terms) < self.model.num_layers:
            return None
        return _Program(self, k)

    def _ordered(self, k: int, found: _Found) -> tuple[CoarsePlan, frozenset[int], float, float]:
        """The plan with its devices in the best order, who holds layers, and the least hops of a token and of a prompt."""
        used = frozenset(share.device for share in found.shares if share.num_layers_total)
        weight, prompt_weight = max(self.objective.token, 1e-3), max(self.objective.first_token, 1e-3)
        others = sorted(used - {0})
        order, decode_s, prompt_s, least = best_order(
            others,
            k,
            head_holds_layers=0 in used,
            hops=self.hops,
            prompt_hops=self.prompt_hops,
            weights=(weight, prompt_weight),
        )
        by_device = {share.device: share for share in found.shares}
        shares = tuple(by_device[index] for index in (*order, 0))
        visits_s = [self._visit_s(share, k) for share in shares]
        rates = [self.terms[share.device].read_rate * _GB for share in shares]
        disk_s = max(share.streamed_bytes / rate if rate else 0.0 for share, rate in zip(shares, rates, strict=True))
        token_s = max(sum(visit for visit, _ in visits_s) + decode_s, disk_s)
        first_token_s = sum(visit for _, visit in visits_s) + prompt_s
        slowest_s = max(disk_s, max(visit for visit, _ in visits_s))
        plan = self._plan(k, shares, token_s=token_s, first_token_s=first_token_s, slowest_s=slowest_s)
        return plan, used, least[0], least[1]

    def _visit_s(self, share: Share, k: int) -> tuple[float, float]:
        compute_s, prompt_s = self.compute_s(share.device, share.num_layers, share.num_accelerator_layers, k)
        if not share.streamed_bytes:
            return compute_s, prompt_s
        output_bytes = 0.0
        if share.device == 0:
            output_bytes = share.streamed_bytes - share.num_layers * self.model.mean_layer_bytes
        waited_bytes = max(share.streamed_bytes - k * share.ring_bytes, output_bytes - share.ring_bytes)
        read_s = waited_bytes / _GB / self.terms[share.device].read_rate
        return max(compute_s, read_s), max(prompt_s, read_s)

    def _plan(
        self, k: int, shares: tuple[Share, ...], *, token_s: float, first_token_s: float, slowest_s: float
    ) -> CoarsePlan:
        cost_s = self.objective.cost_s(first_token_s=first_token_s, token_s=token_s, slowest_s=slowest_s)
        return CoarsePlan(num_rounds=k, shares=shares, cost_s=cost_s, token_s=token_s, first_token_s=first_token_s)


class _Found(msgspec.Struct, frozen=True):
    shares: tuple[Share, ...]


def _share(device: int, layers: int, on_accelerator: int, ring: float, streamed: float) -> Share:
    is_streaming = streamed > 1e-9
    return Share(
        device=device,
        num_layers=layers,
        num_accelerator_layers=on_accelerator,
        ring_bytes=int(ring * _GB) if is_streaming else 0,
        streamed_bytes=math.ceil(streamed * _GB) if is_streaming else 0,
    )


_COLUMNS = 9
_LAYERS, _ACCELERATOR, _HOLDS, _COPIES, _STREAMS, _STREAMED, _RING, _VISITS, _PROMPT = range(_COLUMNS)


class _Program:
    """One program in HiGHS: `_COLUMNS` columns per device, then T, hops, hops of a prompt, and the slowest device."""

    def __init__(self, problem: Problem, k: int) -> None:
        self._problem = problem
        self._k = k
        self._num_devices = len(problem.terms)
        first = _COLUMNS * self._num_devices
        self._token, self._hops, self._prompt_hops, self._slowest = range(first, first + 4)
        self._num_columns = first + 4
        self._lower = np.zeros(self._num_columns)
        self._upper = np.full(self._num_columns, highspy.kHighsInf)
        self._integer = np.zeros(self._num_columns, dtype=bool)
        self._rows: list[tuple[dict[int, float], float, float]] = []
        self._cost = np.zeros(self._num_columns)
        self._cutoff_row: int | None = None
        self._num_potentials = 0
        self._bounded: dict[int, tuple[int, int, int]] = {}
        """By device: the CPU layers it may hold, and the rows that know it, -1 for none."""
        self._build()
        self._highs = self._to_highs()
        self.sync()

    def _column(self, device: int, what: int) -> int:
        return _COLUMNS * device + what

    def _at_least(self, coefficients: dict[int, float], bound: float) -> None:
        self._rows.append((coefficients, bound, highspy.kHighsInf))

    def _build(self) -> None:
        problem, objective = self._problem, self._problem.objective
        num_layers = problem.model.num_layers
        self._cost[self._token] = objective.token
        self._cost[self._prompt_hops] = objective.first_token
        self._cost[self._slowest] = objective.slowest
        for device in range(self._num_devices):
            self._add_device(device)
        column = self._column
        devices = range(self._num_devices)
        placed = {column(device, what): 1.0 for device in devices for what in (_LAYERS, _ACCELERATOR)}
        self._rows.append((placed, num_layers, num_layers))
        visits = {column(device, _VISITS): -1.0 for device in devices}
        self._at_least({self._token: 1.0, self._hops: -1.0, **visits}, 0.0)
        holding = {column(device, _HOLDS): 1.0 for device in devices}
        # Alone is scored elsewhere; and one device between two turns of its own waits for nobody.
        self._at_least({index: value for index, value in holding.items() if index != column(0, _HOLDS)}, 1.0)
        if self._k > 1:
            self._at_least(holding, 2.0)

    def sync(self) -> None:
        """Takes over potentials that were learned since."""
        devices = range(self._num_devices)
        for pair in self._problem.potentials[self._num_potentials :]:
            for potentials, total in zip(pair, (self._hops, self._prompt_hops), strict=True):
                # A head without layers is passed once, not in each round.
                row = {self._column(device, _HOLDS): -self._k * float(potentials[device]) for device in devices}
                row[self._column(0, _HOLDS)] = -(self._k - 1) * float(potentials[0])
                row[total] = 1.0
                self._add_row(row, float(potentials[0]))
        self._num_potentials = len(self._problem.potentials)

    def _add_row(self, row: dict[int, float], at_least: float) -> None:
        indices = np.array(list(row), dtype=np.int32)
        self._highs.addRow(at_least, highspy.kHighsInf, len(row), indices, np.array(list(row.values())))

    def _add_device(self, device: int) -> None:
        problem, k = self._problem, self._k
        term, layer, cache = problem.terms[device], problem.layer, problem.cache
        layers, accelerator, holds, copies, streams, streamed, ring, visits, prompt = (
            self._column(device, what) for what in range(_COLUMNS)
        )
        self._integer[[layers, accelerator, holds, copies, streams]] = True
        can_hold = term.layers_max >= k
        can_stream = can_hold or term.is_head
        can_stream = can_stream and term.read_rate > 0 and term.room > term.ring_min
        room = max(term.room, 0.0)
        num_layers_max = term.num_layers_max * can_hold
        num_accelerator_layers_max = term.num_accelerator_layers_max * can_hold
        for column, upper in (
            (layers, num_layers_max),
            (accelerator, num_accelerator_layers_max),
            (holds, can_hold),
            (copies, num_accelerator_layers_max > 0),
            (streams, can_stream),
            (streamed, highspy.kHighsInf if can_stream else 0.0),
            (ring, room if can_stream else 0.0),
        ):
            self._upper[column] = upper
        self._cost[prompt] = problem.objective.first_token
        self._bounded[device] = (num_layers_max, len(self._rows), -1)
        self._at_least({holds: float(num_layers_max + num_accelerator_layers_max), layers: -1.0, accelerator: -1.0}, 0.0)
        self._at_least({layers: 1.0, accelerator: 1.0, holds: -float(k)}, 0.0)
        # Weights, cache and ring fit, or are streamed.
        need = {layers: layer + cache, ring: 1.0, streamed: -1.0}
        if term.shares_memory:
            need[accelerator] = layer + cache
        self._rows.append((need, -highspy.kHighsInf, term.room - term.output if term.room >= 0 or term.is_head else room))
        if can_stream:
            self._at_least({layers: layer, streamed: -1.0}, -term.output)
            self._bounded[device] = (num_layers_max, self._bounded[device][1], len(self._rows))
            self._at_least({streams: num_layers_max * layer + term.output, streamed: -1.0}, 0.0)
            self._at_least({ring: 1.0, streams: -term.ring_min}, 0.0)
            self._at_least({streams: room, ring: -1.0}, 0.0)
            self._at_least({self._token: term.read_rate, streamed: -1.0}, 0.0)
            for column in (visits, prompt):
                self._at_least({column: term.read_rate, streamed: -1.0, ring: float(k)}, 0.0)
                if term.output:
                    # What of the output projection is streamed is needed in one visit.
                    self._at_least({column: term.read_rate, streamed: -1.0, layers: layer, ring: 1.0}, 0.0)
            self._at_least({self._slowest: term.read_rate, streamed: -1.0}, 0.0)
        self._at_least({copies: float(num_accelerator_layers_max), accelerator: -1.0}, 0.0)
        for column, cpu_s, accelerator_s in (
            (visits, term.layer_s, term.accelerator_layer_s),
            (prompt, term.prompt_layer_s, term.accelerator_prompt_layer_s),
        ):
            row = {column: 1.0, layers: -cpu_s, accelerator: -accelerator_s, copies: -k * term.copy_s}
            self._at_least(row, term.output_s)
        self._at_least({self._slowest: 1.0, visits: -1.0}, 0.0)

    def _to_highs(self) -> highspy.Highs:
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self._num_columns, len(self._rows)
        model.col_cost_, model.col_lower_, model.col_upper_ = self._cost, self._lower, self._upper
        model.row_lower_ = np.array([low for _, low, _ in self._rows])
        model.row_upper_ = np.array([high for _, _, high in self._rows])
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.cumsum([0, *(len(row) for row, _, _ in self._rows)], dtype=np.int32)
        model.a_matrix_.index_ = np.array([index for row, _, _ in self._rows for index in row], dtype=np.int32)
        model.a_matrix_.value_ = np.array([value for row, _, _ in self._rows for value in row.values()])
        highs = quiet_highs()
        highs.passModel(model)
        return highs

    def solve(self, *, gap: float, cutoff_s: float) -> tuple[_Found | None, float]:
        """The best below the cutoff, or None, and what is proved."""
        self.sync()
        highs = self._highs
        if cutoff_s < math.inf:
            self._tighten(cutoff_s)
            if self._cutoff_row is None:
                used = np.flatnonzero(self._cost).astype(np.int32)
                self._cutoff_row = highs.getNumRow()
                highs.addRow(-highspy.kHighsInf, cutoff_s, len(used), used, self._cost[used])
            highs.changeRowBounds(self._cutoff_row, -highspy.kHighsInf, cutoff_s)
        columns = np.flatnonzero(self._integer).astype(np.int32)
        kinds = np.full(len(columns), highspy.HighsVarType.kInteger)
        highs.changeColsIntegrality(len(columns), columns, kinds)
        highs.setOptionValue("mip_rel_gap", gap * _SOLVER_SHARE)
        highs.setOptionValue("mip_max_nodes", _NODES_MAX)
        highs.run()
        status = highs.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None, math.inf
        info = highs.getInfo()
        proved = float(info.mip_dual_bound)
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None, proved
        return _Found(tuple(self._read(np.array(highs.getSolution().col_value)))), proved

    def _tighten(self, cutoff_s: float) -> None:
        """Who holds so many layers that these alone cost more than the cutoff is no answer. Without it, a device that could
        stream all layers pays for a hop only in proportion in the relaxation, and bounds are poor."""
        problem, objective = self._problem, self._problem.objective
        for device, (known, holds_row, streams_row) in self._bounded.items():
            term = problem.terms[device]
            worth_s = objective.token * term.layer_s + objective.first_token * term.prompt_layer_s
            fixed_s = (objective.token + objective.first_token) * term.output_s
            most = (cutoff_s - fixed_s) / worth_s
            if objective.token and known > 0 and term.read_rate:
                # Reading what does not fit takes a token's time at least.
                read = cutoff_s / objective.token * term.read_rate + max(0.0, term.room) - term.output
                most = min(most, read / (problem.layer + problem.cache))
            layers_max = max(0, min(known, math.floor(most + 1e-6)))
            if layers_max == known:
                continue
            self._bounded[device] = (layers_max, holds_row, streams_row)
            fast = self._upper[self._column(device, _ACCELERATOR)]
            self._highs.changeColBounds(self._column(device, _LAYERS), 0.0, float(layers_max))
            self._highs.changeCoeff(holds_row, self._column(device, _HOLDS), float(layers_max + fast))
            if streams_row >= 0:
                bytes_max = layers_max * problem.layer + term.output
                self._highs.changeCoeff(streams_row, self._column(device, _STREAMS), bytes_max)

    def _read(self, values: Floats) -> list[Share]:
        shares = []
        for device in range(self._num_devices):
            block = values[_COLUMNS * device : _COLUMNS * (device + 1)]
            layers, on_accelerator = round(block[_LAYERS]), round(block[_ACCELERATOR])
            if layers + on_accelerator or device == 0:
                streams = block[_STREAMS] > 0.5
                shares.append(_share(device, layers, on_accelerator, block[_RING] * streams, block[_STREAMED] * streams))
        return shares

    def cut(self, used: frozenset[int], decode_s: float, prompt_s: float) -> None:
        """Just these devices cannot hop for less than that."""
        for column, least_s in ((self._hops, decode_s), (self._prompt_hops, prompt_s)):
            row = {self._column(device, _HOLDS): least_s * (-1.0 if device in used else 1.0)
                   for device in range(self._num_devices)}  # fmt: skip
            row[column] = 1.0
            self._add_row(row, least_s * (1.0 - len(used)))

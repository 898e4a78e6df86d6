"""Decides a placement that says why: the program's best few, moved under the recurrence of a token's life.

The program counts in mean layers and in bytes; the recurrence has true sizes, units and rings. So the cheapest plans of the
program, one per number of rounds, are spread over windows, and then rings, boundaries and rounds are changed one at a time
as long as the predicted cost falls. The published splits are starts as well, so that no plan is predicted to be slower than
theirs, unless it gives up a twentieth at most for reading nothing. As baselines they get the same rings and the same
recurrence, but keep their layers and rounds.

    program (all k) -> windows -> moves under token_life -> Plan: who, what, how fast, what binds, who was left out and why
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from shoal.errors import InfeasiblePlacement
from shoal.ids import DeviceId, LayerRange
from shoal.placement.baselines import BASELINES, BaselineName, Split
from shoal.placement.profile import UNITS_COUNTED, Cluster, ModelProfile
from shoal.placement.program import (
    OBJECTIVES,
    PROMPT_TOKENS,
    ROUNDS_MAX,
    CoarsePlan,
    Objective,
    ObjectiveName,
    Solution,
    solve,
)
from shoal.placement.shortage import explain_shortage
from shoal.placement.token_life import Life, Stage, StageLife, WindowPlan, live
from shoal.units import format_bytes, format_seconds

CANDIDATES = 5
"""Plans of the program that are moved; they lie close together, so that more only take longer."""
_MOVED = 4
"""Starts, of those that fit and of those that do not yet."""
_EVALUATIONS_MAX = 120
"""Per candidate: lives that are run."""
_EVALUATIONS_MIN = 25
_WORK_BYTES = 1000e9
"""Streamed by all lives of a candidate."""
_UNITS_COUNTED = 24
"""Of a ring, while moving; what is chosen is predicted finely."""
_WORTH = 0.001
"""A move must save as much of the cost."""
_STREAMING_WORTH = 0.05
"""Streaming must save as much where there is a plan without: reads take processor time and memory bandwidth from what is
computed beside them, a tenth of its speed at 250 MB/s on two slow cores, and no profile says how much."""
_RING_SCALES = (0.9, 0.75, 0.5)
"""One after the other, where the program's rings do not fit by true sizes."""
_PER_ROUND_MAX = 3
"""Layers per device and round, in the mean, of even rounds that are tried; with more, one more hardly matters."""
_RING_STEPS = (2.0, 0.5, 1.4, 0.7)


class PlannedStage(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part of a plan, what it is predicted to do there, and what keeps it from taking more."""

    device: DeviceId
    windows: tuple[LayerRange, ...]
    accelerator_layers: tuple[int, ...]
    life: StageLife
    binding: str

    @property
    def num_layers(self) -> int:
        return sum(len(window) for window in self.windows)


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A device that holds nothing. `token_s` is a token's time with a layer per round there, None where none fits."""

    device: DeviceId
    reason: str
    token_s: float | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds what, in ring order, the head last, and what is predicted.

    `bound_s` is the program's bound of the cost, 0 for baselines; `alone_token_s` what the head alone is predicted to take,
    None where it cannot.
    """

    model: str
    context: int
    objective: ObjectiveName
    num_rounds: int
    stages: tuple[PlannedStage, ...]
    left_out: tuple[LeftOut, ...]
    token_s: float
    first_token_s: float
    wire_s: float
    reads_per_prompt: int
    cost_s: float
    bound_s: float = 0.0
    alone_token_s: float | None = None

    @property
    def head(self) -> PlannedStage:
        return self.stages[-1]

    @property
    def streamed_bytes(self) -> int:
        return sum(stage.life.streamed_bytes for stage in self.stages)


def make_plan(
    cluster: Cluster,
    model: ModelProfile,
    *,
    objective: ObjectiveName = "latency",
    prompt_tokens: int = PROMPT_TOKENS,
) -> Plan:
    """The best plan that is found.

    Raises:
        InfeasiblePlacement: nothing fits; names the missing bytes and what would help.
    """
    return _plan(cluster, model, objective, prompt_tokens, rounds=None)


def plan_of_rounds(
    rounds: Sequence[int],
    cluster: Cluster,
    model: ModelProfile,
    *,
    objective: ObjectiveName = "latency",
    prompt_tokens: int = PROMPT_TOKENS,
) -> Plan:
    """The best plan of these numbers of rounds: what others are worth is seen against it.

    Raises:
        InfeasiblePlacement: nothing fits.
        ValueError: no such numbers are possible.
    """
    rounds_max = model.num_layers if len(cluster.devices) > 1 else 1
    if not all(1 <= k <= rounds_max for k in rounds):
        allowed = f"1 to {rounds_max} are possible, as many as there are layers"
        raise ValueError(
            f"{', '.join(map(str, rounds))} rounds: {'a device alone goes round once' if rounds_max == 1 else allowed}"
        )
    return _plan(cluster, model, objective, prompt_tokens, rounds=tuple(rounds))


def _plan(
    cluster: Cluster,
    model: ModelProfile,
    objective: ObjectiveName,
    prompt_tokens: int,
    *,
    rounds: tuple[int, ...] | None,
) -> Plan:
    weights = OBJECTIVES[objective]
    solution = solve(cluster, model, objective=weights, rounds=rounds, prompt_tokens=prompt_tokens)
    mover = _Mover(cluster, model, weights, prompt_tokens, rounds=rounds)
    drafts = [mover.draft(each) for each in _candidates(solution)]
    even = mover.best_as_it_stands(mover.even_rounds(drafts[0]))
    for split_layers in BASELINES.values():
        with contextlib.suppress(InfeasiblePlacement):
            drafts.append(mover.draft_of_split(split_layers(cluster, model)))
    best = mover.best_of([draft for draft in drafts if rounds is None or draft.num_rounds in rounds], even)
    if best is None:
        raise InfeasiblePlacement(f"by true layer sizes nothing fits: {explain_shortage(cluster, model)}")
    plan = mover.describe(best, objective)
    return msgspec.structs.replace(plan, bound_s=solution.bound_s, alone_token_s=mover.alone_s())


def plan_by_hand(
    num_layers: Sequence[int],
    cluster: Cluster,
    model: ModelProfile,
    *,
    rounds: int | None = None,
    on_accelerator: Sequence[int] | None = None,
    objective: ObjectiveName = "latency",
    prompt_tokens: int = PROMPT_TOKENS,
) -> Plan:
    """Layers as the owner says, device by device, the head's first; the ring visits them in that order. Its rings, and
    where they are not given its rounds, are chosen.

    Raises:
        InfeasiblePlacement: a device cannot hold its part.
        ValueError: the counts do not match the devices or the model, or the rounds do not match the counts.
    """
    if len(num_layers) != len(cluster.devices) or min(num_layers) < 0 or sum(num_layers) != model.num_layers:
        raise ValueError(
            f"layer counts {','.join(map(str, num_layers))} do not fit {len(cluster.devices)} devices and "
            f"{model.num_layers} layers: give one count per device, the head's first, that add up"
        )
    is_alone = not any(num_layers[1:])
    rounds_max = 1 if is_alone else min(count for count in num_layers if count)
    if rounds is not None and not 1 <= rounds <= rounds_max:
        allowed = f"1 to {rounds_max} are possible, as many as the device with fewest layers has"
        raise ValueError(f"{rounds} rounds: {'a device alone goes round once' if is_alone else allowed}")
    mover = _Mover(cluster, model, OBJECTIVES[objective], prompt_tokens)
    fast = tuple(on_accelerator or (0,) * len(num_layers))
    if len(fast) != len(num_layers) or any(not 0 <= few <= count for few, count in zip(fast, num_layers, strict=True)):
        raise ValueError(
            f"GPU layers {','.join(map(str, fast))} do not fit layers {','.join(map(str, num_layers))}: give one count per "
            "device, at most as many as it has"
        )
    for device, few in zip(cluster.devices, fast, strict=True):
        if few and device.accelerator is None:
            raise ValueError(f"{few} GPU layers on {device.id}: its build of ggml finds no graphics processor there")
    slow = tuple(count - few for count, few in zip(num_layers, fast, strict=True))
    by_hand = Split(num_rounds=1, num_layers=slow, num_accelerator_layers=fast)
    draft = mover.draft_of_split(by_hand)
    # What counts is how many layers a window has at most.
    widths = {math.ceil(rounds_max / width) for width in range(1, rounds_max + 1)}
    choices = [rounds] if rounds is not None else sorted(k for k in widths if k <= ROUNDS_MAX)
    best = mover.best_rounds(draft, choices)
    if best is None:
        try:
            mover.live(draft)
        except InfeasiblePlacement as error:
            advice = "give it fewer layers, allow it more (--memory), or use a shorter --context"
            raise InfeasiblePlacement(f"{error}: {advice}") from None
        raise InfeasiblePlacement(f"layer counts {','.join(map(str, num_layers))} do not fit")
    return mover.describe(best, objective)


def plan_baseline(
    name: BaselineName,
    cluster: Cluster,
    model: ModelProfile,
    *,
    objective: ObjectiveName = "latency",
    prompt_tokens: int = PROMPT_TOKENS,
) -> Plan:
    """A published split, with rings chosen as ours are.

    Raises:
        InfeasiblePlacement: it finds none, or what it finds does not fit.
    """
    split = BASELINES[name](cluster, model)
    mover = _Mover(cluster, model, OBJECTIVES[objective], prompt_tokens)
    draft = mover.draft_of_split(split)
    best = mover.move(draft, rings_only=True)
    if best is None:
        mover.live(draft)  # says what does not fit
        raise InfeasiblePlacement(f"the split {','.join(map(str, split.totals))} of '{name}' does not fit")
    return mover.describe(best, objective)


def cost_of(plan: Plan, cluster: Cluster, model: ModelProfile, *, prompt_tokens: int = PROMPT_TOKENS) -> float:
    """What a plan costs on these devices, by its objective: infinite where it does not fit them."""
    index = {device.id: position for position, device in enumerate(cluster.devices)}
    draft = _Draft(
        plan.num_rounds,
        tuple(
            _Part(index[stage.device], stage.num_layers, sum(stage.accelerator_layers), stage.life.ring_bytes)
            for stage in plan.stages
        ),
    )
    try:
        return _Mover(cluster, model, OBJECTIVES[plan.objective], prompt_tokens).live(draft).cost_s
    except InfeasiblePlacement:
        return math.inf


def _candidates(solution: Solution) -> list[CoarsePlan]:
    """The cheapest, and others near it."""
    near = [plan for plan in solution.plans if plan.cost_s <= 1.1 * solution.best.cost_s]
    return near[:CANDIDATES]


class _Part(msgspec.Struct, frozen=True):
    """What moves change of a stage."""

    device: int
    num_layers: int
    num_accelerator_layers: int
    ring_bytes: int


class _Draft(msgspec.Struct, frozen=True):
    num_rounds: int
    parts: tuple[_Part, ...]


class _Lived(msgspec.Struct, frozen=True):
    draft: _Draft
    plan: WindowPlan
    life: Life
    cost_s: float


class _Mover:
    """Moves drafts of one question."""

    def __init__(
        self,
        cluster: Cluster,
        model: ModelProfile,
        objective: Objective,
        prompt_tokens: int,
        *,
        rounds: tuple[int, ...] | None = None,
    ) -> None:
        self._rounds = rounds
        self._cluster = cluster
        self._model = model
        self._objective = objective
        self._prompt_tokens = prompt_tokens

    def best_as_it_stands(self, drafts: Iterable[_Draft]) -> _Draft | None:
        """Without any move; None where none is known to fit."""
        lived = [each for draft in drafts if (each := self._try(draft)) is not None]
        return min(lived, key=lambda each: each.cost_s).draft if lived else None

    def best_of(self, drafts: Sequence[_Draft], also: _Draft | None) -> _Lived | None:
        """Moves the starts that are best as they stand, and `also`; those of which none is known to fit may be mended by
        moves. A plan that streams nothing is taken unless streaming is worth it."""
        starts = [(lived.cost_s if (lived := self._try(draft)) else math.inf, draft) for draft in drafts]
        starts.sort(key=lambda start: start[0])
        mended = [draft for cost_s, draft in starts if cost_s == math.inf]
        chosen = [draft for _, draft in starts[:_MOVED]] + ([also] if also is not None else [])
        moved = [lived for draft in chosen if (lived := self.move(draft)) is not None]
        moved += [lived for draft in mended[:_MOVED] if (lived := self.move(draft)) is not None]
        best = min(moved, key=lambda lived: lived.cost_s, default=None)
        kept = [lived for lived in moved if not any(stage.streamed_bytes for stage in lived.life.stages)]
        stays = min(kept, key=lambda lived: lived.cost_s, default=None)
        if best is not None and stays is not None and stays.cost_s <= best.cost_s * (1 + _STREAMING_WORTH):
            return stays
        return best

    def best_rounds(self, draft: _Draft, choices: Sequence[int]) -> _Lived | None:
        """The draft's layers in the best of these numbers of rounds, with rings that suit it; fewer unless more are worth
        it, and as few as there are where nothing is streamed."""
        moved = self.move(self._in_rounds(draft, choices[0]), rings_only=True)
        if moved is not None and not any(stage.streamed_bytes for stage in moved.life.stages):
            return moved
        tried = [(lived.cost_s, k) for k in choices if (lived := self._try(self._in_rounds(draft, k))) is not None]
        for _, k in sorted(tried)[:_MOVED]:
            lived = self.move(self._in_rounds(draft, k), rings_only=True)
            if lived is not None and (moved is None or lived.cost_s < moved.cost_s * (1 - _WORTH)):
                moved = lived
        return moved

    def _in_rounds(self, draft: _Draft, num_rounds: int) -> _Draft:
        return msgspec.structs.replace(draft, num_rounds=num_rounds)

    def live(self, draft: _Draft, *, units_counted: int = UNITS_COUNTED) -> _Lived:
        """Raises InfeasiblePlacement where a stage does not fit, or has no layer for some round: only the head may."""
        assert len(draft.parts) > 1 or draft.num_rounds == 1, "whoever is alone has nobody to go round"
        few = min((part.num_layers for part in draft.parts[:-1]), default=draft.num_rounds)
        if few < draft.num_rounds:
            raise InfeasiblePlacement(f"a device with {few} layers has none for some of {draft.num_rounds} rounds")
        plan = spread(draft.num_rounds, draft.parts, self._model)
        life = live(plan, self._cluster, self._model, prompt_tokens=self._prompt_tokens, units_counted=units_counted)
        cost_s = self._objective.cost_s(first_token_s=life.first_token_s, token_s=life.token_s, slowest_s=life.slowest_s)
        return _Lived(draft, plan, life, cost_s)

    def _try(self, draft: _Draft) -> _Lived | None:
        try:
            return self.live(draft, units_counted=_UNITS_COUNTED)
        except InfeasiblePlacement:
            return None

    def move(self, draft: _Draft, *, rings_only: bool = False) -> _Lived | None:
        """The draft after all moves that help; None where neither it nor any neighbour fits."""
        best = self._try(draft)
        for scale in _RING_SCALES:
            if best is None:
                draft = self._with_rings(draft, scale)
                best = self._try(draft)
        left = self._evaluations(best)
        improved = True
        while improved and left > 0:
            improved = False
            for neighbour in self._neighbours(best.draft if best else draft, best, rings_only=rings_only):
                left -= 1
                lived = self._try(neighbour)
                if lived is not None and (best is None or lived.cost_s < best.cost_s * (1 - _WORTH)):
                    best, improved = lived, True
                    break
                if left <= 0:
                    break
        return best

    def _evaluations(self, lived: _Lived | None) -> int:
        """Fewer for models of which very much is streamed: their lives are long."""
        streamed = sum(stage.streamed_bytes for stage in lived.life.stages) if lived else 0
        return min(_EVALUATIONS_MAX, max(_EVALUATIONS_MIN, int(_WORK_BYTES / max(1, streamed))))

    def _with_rings(self, draft: _Draft, scale: float) -> _Draft:
        parts = [
            msgspec.structs.replace(part, ring_bytes=max(self._model.ring_bytes_min, int(part.ring_bytes * scale)))
            for part in draft.parts
        ]
        return msgspec.structs.replace(draft, parts=tuple(parts))

    def _neighbours(self, draft: _Draft, lived: _Lived | None, *, rings_only: bool) -> Iterator[_Draft]:
        """Rings of those who stream, boundaries from who waits longest, one round more or less; promising ones first."""
        parts = draft.parts
        if lived is None:
            yield from () if rings_only else self._repairs(draft)
            return
        order = sorted(range(len(parts)), key=lambda index: -_strain_s(lived.life.stages[index], lived.life.token_s))
        for index in order:
            if lived.life.stages[index].streamed_bytes:
                for factor in _RING_STEPS:
                    ring_bytes = max(self._model.ring_bytes_min, int(parts[index].ring_bytes * factor))
                    if ring_bytes != parts[index].ring_bytes:
                        yield _replace(draft, index, ring_bytes=ring_bytes)
        if rings_only:
            return
        for source in order[:2]:
            for target in reversed(order):
                if source != target and (moved := self._shift(draft, source, target)) is not None:
                    yield moved
        for k in (draft.num_rounds - 1, draft.num_rounds + 1):
            if k >= 1 and (len(parts) > 1 or k == 1) and (self._rounds is None or k in self._rounds):
                yield msgspec.structs.replace(draft, num_rounds=k)

    def _repairs(self, draft: _Draft) -> Iterator[_Draft]:
        """Where true sizes are larger than the mean: a layer less on some device or its accelerator."""
        for index, part in enumerate(draft.parts):
            if part.num_accelerator_layers:
                yield _replace(draft, index, num_accelerator_layers=part.num_accelerator_layers - 1)
        for source in range(len(draft.parts)):
            for target in range(len(draft.parts)):
                if source != target and (moved := self._shift(draft, source, target)) is not None:
                    yield moved

    def _shift(self, draft: _Draft, source: int, target: int) -> _Draft | None:
        """One of the source's CPU layers goes to the target, to its accelerator where it has room."""
        giver, taker = draft.parts[source], draft.parts[target]
        if giver.num_layers <= giver.num_accelerator_layers:
            return None
        fast = self._accelerated(taker.device, taker.num_layers + 1)
        fewer = _replace(draft, source, num_layers=giver.num_layers - 1)
        return _replace(fewer, target, num_layers=taker.num_layers + 1, num_accelerator_layers=max(
            taker.num_accelerator_layers, min(fast, taker.num_accelerator_layers + 1)))  # fmt: skip

    def _accelerated(self, device: int, num_layers: int) -> int:
        accelerator = self._cluster.devices[device].accelerator
        if accelerator is None:
            return 0
        return min(
            num_layers, accelerator.memory_bytes // (max(self._model.layer_bytes) + self._model.cache_bytes_per_layer)
        )

    def draft(self, plan: CoarsePlan) -> _Draft:
        ring_min = self._model.ring_bytes_min
        return _Draft(
            plan.num_rounds if len(plan.shares) > 1 else 1,
            tuple(
                # A ring of bytes wraps: a unit more than the program counts.
                _Part(
                    share.device,
                    share.num_layers_total,
                    min(share.num_accelerator_layers, self._accelerated(share.device, share.num_layers_total)),
                    max(ring_min, share.ring_bytes + (self._model.largest_unit_bytes if share.ring_bytes > ring_min else 0)),
                )
                for share in plan.shares
            ),
        )

    def draft_of_split(self, split: Split) -> _Draft:
        ring = [*range(1, len(split.totals)), 0]
        parts = []
        for device in ring:
            if split.totals[device] or device == 0:
                on_accelerator = min(split.num_accelerator_layers[device], self._accelerated(device, split.totals[device]))
                parts.append(_Part(device, split.totals[device], on_accelerator, self._model.ring_bytes_min))
        return _Draft(split.num_rounds if len(parts) > 1 else 1, tuple(parts))

    def even_rounds(self, draft: _Draft) -> Iterator[_Draft]:
        """Drafts with about the same shares where each device has as many layers in every round: its disk never has to be
        ahead of a larger window, so rings are smaller than with the same layers in uneven rounds. The program, which counts
        in mean windows, does not see this."""
        parts, num_layers = draft.parts, self._model.num_layers
        if len(parts) < 2:
            return
        for per_round in range(len(parts), min(num_layers, _PER_ROUND_MAX * len(parts)) + 1):
            k = num_layers // per_round
            if self._rounds is not None and k not in self._rounds:
                continue
            widths = _apportion(per_round, [part.num_layers for part in parts])
            widest = max(range(len(parts)), key=lambda index: widths[index])
            counts = [k * width + (num_layers - k * per_round) * (index == widest) for index, width in enumerate(widths)]
            yield _Draft(
                k,
                tuple(
                    _Part(
                        part.device,
                        count,
                        min(part.num_accelerator_layers, self._accelerated(part.device, count)),
                        max(self._model.ring_bytes_min, part.ring_bytes * draft.num_rounds // k),
                    )
                    for part, count in zip(parts, counts, strict=True)
                ),
            )

    def alone_s(self) -> float | None:
        """A token's time on the head alone."""
        num_layers = self._model.num_layers
        fast = self._accelerated(0, num_layers)
        lived = self.move(_Draft(1, (_Part(0, num_layers, fast, self._model.ring_bytes_min),)), rings_only=True)
        return lived.life.token_s if lived else None

    def describe(self, moved: _Lived, objective: ObjectiveName) -> Plan:
        lived = self.live(moved.draft)
        used = {stage.device for stage in lived.plan.stages}
        return Plan(
            model=self._model.name,
            context=self._model.context,
            objective=objective,
            num_rounds=lived.draft.num_rounds,
            stages=tuple(
                PlannedStage(
                    device=self._cluster.devices[stage.device].id,
                    windows=stage.windows,
                    accelerator_layers=stage.accelerator_layers,
                    life=life,
                    binding=self._binding(stage, life, lived.life.token_s),
                )
                for stage, life in zip(lived.plan.stages, lived.life.stages, strict=True)
            ),
            left_out=tuple(self._left_out(index, lived) for index in range(len(self._cluster.devices)) if index not in used),
            token_s=lived.life.token_s,
            first_token_s=lived.life.first_token_s,
            wire_s=lived.life.wire_s,
            reads_per_prompt=lived.life.reads_per_prompt,
            cost_s=lived.cost_s,
        )

    def _binding(self, stage: Stage, life: StageLife, token_s: float) -> str:
        if life.streamed_bytes and life.read_s >= 0.95 * token_s:
            return f"disk: it reads {format_bytes(life.streamed_bytes)} per token without a pause"
        if life.disk_wait_s > 0.02 * token_s:
            return f"disk: waits {format_seconds(life.disk_wait_s)} per token for {format_bytes(life.streamed_bytes)}"
        layer_bytes = max(self._model.layer_bytes) + self._model.cache_bytes_per_layer
        if life.memory_left_bytes < layer_bytes and life.accelerator_left_bytes < layer_bytes:
            return "memory: one more layer would be streamed" if not life.streamed_bytes else "memory: reads are hidden"
        if stage.num_layers == self._model.num_layers:
            return "speed: it does all there is to do"
        if stage.num_layers == 0:
            return "speed: only the output projection is worth its time"
        return "speed: others would wait for it longer"

    def _left_out(self, device: int, lived: _Lived) -> LeftOut:
        """Why, by trying: a layer per round there, from whoever holds most."""
        draft, profile = lived.draft, self._cluster.devices[device]
        k = draft.num_rounds
        room = profile.weights_room_bytes(self._model)
        if room < 0:
            return LeftOut(device=profile.id, reason=f"lacks {format_bytes(-room)} to start a worker at all")
        donor = max(range(len(draft.parts)), key=lambda index: draft.parts[index].num_layers)
        giver = draft.parts[donor]
        count = min(k, giver.num_layers)
        part = _Part(device, count, self._accelerated(device, count), self._model.ring_bytes_min)
        kept = min(giver.num_accelerator_layers, giver.num_layers - count)
        fewer = _replace(draft, donor, num_layers=giver.num_layers - count, num_accelerator_layers=kept)
        wider = [
            self._try(msgspec.structs.replace(draft, parts=(*fewer.parts[:at], part, *fewer.parts[at:])))
            for at in range(len(fewer.parts))
        ]
        token_s = min((each.life.token_s for each in wider if each is not None), default=None)
        if token_s is None:
            return LeftOut(device=profile.id, reason="no layer and its cache fit its memory")
        change_s = token_s - lived.life.token_s
        if change_s > 0:
            reason = f"with {count} of {self._model.num_layers} layers there a token takes {format_seconds(change_s)} longer"
        else:
            reason = f"a token gains nothing worth a hop there ({format_seconds(-change_s)})"
        return LeftOut(device=profile.id, reason=reason, token_s=token_s)


def _strain_s(life: StageLife, token_s: float) -> float:
    """How much this stage holds the token up: waiting for its disk, or a disk that never rests."""
    return life.disk_wait_s + (life.read_s if life.read_s > 0.95 * token_s else 0.0)


def _replace(draft: _Draft, index: int, **changes: int) -> _Draft:
    part = msgspec.structs.replace(draft.parts[index], **changes)
    return msgspec.structs.replace(draft, parts=(*draft.parts[:index], part, *draft.parts[index + 1 :]))


def _apportion(count: int, shares: Sequence[int]) -> list[int]:
    """`count` >= len(shares) things in proportion to the shares, at least one for each."""
    dealt = [1] * len(shares)
    for _ in range(count - len(shares)):
        index = max(range(len(shares)), key=lambda index: shares[index] / (dealt[index] + 0.5))
        dealt[index] += 1
    return dealt


def deal_windows(num_layers: Sequence[int], num_rounds: int) -> list[list[LayerRange]]:
    """A window of consecutive layers per stage and round, in the order of a token's way: those of one stage differ by one
    layer at most, and stages take their larger ones in different rounds."""
    per_round = [
        _deal(count, num_rounds, offset=index * num_rounds // max(1, len(num_layers)))
        for index, count in enumerate(num_layers)
    ]
    windows: list[list[LayerRange]] = [[] for _ in num_layers]
    first = 0
    for window in range(num_rounds):
        for index in range(len(num_layers)):
            stop = first + per_round[index][window]
            windows[index].append(LayerRange(first, stop))
            first = stop
    return windows


def spread(num_rounds: int, parts: Sequence[_Part], model: ModelProfile) -> WindowPlan:
    """Layers over windows."""
    windows = deal_windows([part.num_layers for part in parts], num_rounds)
    if (placed := sum(part.num_layers for part in parts)) != model.num_layers:
        raise ValueError(f"{placed} layers are placed, the model has {model.num_layers}")
    return WindowPlan(
        num_rounds=num_rounds,
        stages=tuple(
            Stage(
                device=part.device,
                windows=tuple(ranges),
                accelerator_layers=_fill([len(each) for each in ranges], part.num_accelerator_layers),
                ring_bytes=part.ring_bytes,
            )
            for part, ranges in zip(parts, windows, strict=True)
        ),
    )


def _deal(count: int, num_rounds: int, *, offset: int) -> list[int]:
    """`count` layers over the rounds as evenly as they go."""
    base, rest = divmod(count, num_rounds)
    return [base + ((index + offset) % num_rounds * rest % num_rounds < rest) for index in range(num_rounds)]


def _fill(sizes: list[int], count: int) -> tuple[int, ...]:
    """`count` accelerator layers over windows of these sizes, in proportion."""
    total = sum(sizes)
    filled, placed, seen = [], 0, 0
    for size in sizes:
        seen += size
        due = math.ceil(count * seen / total - 1e-9) if total else 0
        here = min(size, due - placed)
        filled.append(here)
        placed += here
    return tuple(filled)

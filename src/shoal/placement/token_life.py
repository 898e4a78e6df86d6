"""What a plan does: one token's life through readers, rings, layers and hops, with true tensor sizes.

A plan is windows: in each of k rounds every stage computes its window of consecutive layers, the head last. A stage's
weights stay or stream, evenly mixed; its reader takes the streamed units in their order for ever, across rounds and tokens,
each as soon as the ring has room. A unit is computed when the one before it is done and it is there, and leaves the ring
then. Hops take their link's time; empty windows are no hops. A prompt passes window by window, all micro-batches through
one before the next: where a window's streamed units fit the ring they are read once, else once per micro-batch.

The recurrence needs no clock and no events: units are used in the order in which they are read, so when one can be read
depends only on what was computed before.

Not in it: attention over what the cache holds (grows with the context), and anything a device does besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.errors import InfeasiblePlacement
from shoal.ids import DeviceId, LayerRange
from shoal.placement.profile import UNITS_COUNTED, Cluster, DeviceProfile, ModelProfile, units_of
from shoal.placement.stage_clock import Piece, StageClock, Visit
from shoal.units import format_bytes

_TOKENS_MAX = 8
_STEADY = 0.002
_LONG_S = 1e6
"""Between warming up and the prompt: readers are as far ahead as they get."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part. `device` is its index in the cluster; `windows` has a range per round, which may be empty; the
    last `accelerator_layers[r]` layers of window r are the accelerator's. `ring_bytes` counts only where not all stays."""

    device: int
    windows: tuple[LayerRange, ...]
    accelerator_layers: tuple[int, ...]
    ring_bytes: int = 0

    @property
    def num_layers(self) -> int:
        return sum(len(window) for window in self.windows)

    @property
    def num_accelerator_layers(self) -> int:
        return sum(self.accelerator_layers)


class WindowPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Stages in ring order, the head last."""

    num_rounds: int
    stages: tuple[Stage, ...]


class StageLife(msgspec.Struct, frozen=True, kw_only=True):
    """Where one stage spends a token, and what it holds: seconds and bytes.

    `memory_left_bytes` is what remains of the room for weights, cache and ring.
    """

    device: DeviceId
    compute_s: float
    disk_wait_s: float
    read_s: float
    resident_bytes: int
    streamed_bytes: int
    ring_bytes: int
    cache_bytes: int
    memory_left_bytes: int
    accelerator_left_bytes: int


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is predicted to do. `wire_s` is all hops of a token; `reads_per_prompt` how often streamed weights are
    read for a prompt, at most over the stages."""

    token_s: float
    first_token_s: float
    wire_s: float
    num_hops: int
    reads_per_prompt: int
    stages: tuple[StageLife, ...]

    @property
    def slowest_s(self) -> float:
        """The busiest stage's share of a token: what limits many requests at once."""
        return max(max(stage.compute_s, stage.read_s) for stage in self.stages)


class _Track:
    """One stage as it runs."""

    def __init__(
        self, stage: Stage, device: DeviceProfile, model: ModelProfile, *, is_head: bool, units_counted: int
    ) -> None:
        self._units_counted = units_counted
        self.stage = stage
        self._device = device
        self._model = model
        self._is_head = is_head
        self.cache_bytes = 0
        self.accelerator_bytes = 0
        units = self._cpu_units()
        room = device.weights_room_bytes(model) - self.cache_bytes
        accelerator = device.accelerator
        if accelerator is not None and accelerator.shares_memory:
            room -= self.accelerator_bytes
        self.accelerator_left_bytes = accelerator.memory_bytes - self.accelerator_bytes if accelerator else 0
        weights = sum(num_bytes for window in units for num_bytes, _ in window)
        self.ring_bytes = stage.ring_bytes if weights > room else 0
        excess = max(0, weights + self.ring_bytes - room) if self.ring_bytes or weights > room else 0
        self._check(room, weights, excess)
        self.visits, self.streamed_bytes = _mix(units, excess)
        self.resident_bytes = weights - self.streamed_bytes
        self.memory_left_bytes = room - self.resident_bytes - self.ring_bytes
        rate = device.disk.read_bytes_per_s if device.disk else 1.0
        self.read_s = self.streamed_bytes / rate
        self.clock = StageClock(ring_bytes=self.ring_bytes, read_bytes_per_s=rate)

    def _cpu_units(self) -> list[list[tuple[int, float]]]:
        """Per window (and the head's output after the last) the CPU's units in order: bytes and seconds of a token."""
        stage, model, device = self.stage, self._model, self._device
        mean = model.mean_layer_bytes
        windows = []
        for window, fast in zip(stage.windows, stage.accelerator_layers, strict=True):
            units = []
            for layer in range(window.first, window.stop - fast):
                layer_s = device.times.layer_s * model.layer_bytes[layer] / mean
                pieces = units_of(
                    model.layer_bytes[layer], model, ring_bytes=stage.ring_bytes, units_counted=self._units_counted
                )
                units += [(piece, layer_s * piece / model.layer_bytes[layer]) for piece in pieces]
            windows.append(units)
            self.cache_bytes += (len(window) - fast) * model.cache_bytes_per_layer
            on_accelerator = model.layer_bytes[window.stop - fast : window.stop]
            self.accelerator_bytes += sum(on_accelerator) + fast * model.cache_bytes_per_layer
        if self._is_head and model.output_bytes:
            pieces = units_of(model.output_bytes, model, ring_bytes=stage.ring_bytes, units_counted=self._units_counted)
            windows.append([(piece, device.times.output_s * piece / model.output_bytes) for piece in pieces])
        else:
            windows.append([])
        return windows

    def _check(self, room: int, weights: int, excess: int) -> None:
        device, model = self._device, self._model
        if self.accelerator_left_bytes < 0:
            raise InfeasiblePlacement(
                f"{device.id}: its accelerator lacks {format_bytes(-self.accelerator_left_bytes)} for these layers"
            )
        if not excess:
            return
        if device.disk is None:
            raise InfeasiblePlacement(f"{device.id} lacks {format_bytes(weights - room)} and cannot stream weights")
        if self.ring_bytes < model.ring_bytes_min or excess > weights or self.ring_bytes > room:
            missing = max(model.ring_bytes_min - self.ring_bytes, excess - weights, self.ring_bytes - room)
            raise InfeasiblePlacement(
                f"{device.id} lacks {format_bytes(missing)} for its cache and a ring to stream through"
            )

    def fixed_s(self, window: int, num_tokens: int) -> float:
        """The accelerator's part of a window."""
        fast = self.stage.accelerator_layers[window] if window < len(self.stage.windows) else 0
        if not fast:
            return 0.0
        accelerator = self._device.accelerator
        assert accelerator is not None
        layers = self.stage.windows[window]
        scale = sum(self._model.layer_bytes[layers.stop - fast : layers.stop]) / self._model.mean_layer_bytes
        layer_s = accelerator.times.layer_s if num_tokens == 1 else accelerator.times.prefill_layer_s(num_tokens)
        return scale * layer_s + accelerator.copy_s

    def fits_ring(self, window: int) -> bool:
        """Whether a window's streamed units stay in the ring together, wherever in it they begin."""
        pieces = self.visits[window].pieces
        largest = max((piece.num_bytes for piece in pieces), default=0)
        return sum(piece.num_bytes for piece in pieces) + 2 * largest <= self.ring_bytes

    def visit(self, window: int, arrived_s: float, *, num_tokens: int, reads: bool = True, leaves: bool = True) -> float:
        """When the window is computed, if its input is there at `arrived_s`.

        Args:
            num_tokens: 1 for decode; the output projection is always one token's.
            reads: False where the units are in the ring already; `leaves`: False where they are needed again.
        """
        is_output = window == len(self.stage.windows)
        times = self._device.times
        scale = 1.0 if num_tokens == 1 or is_output else times.prefill_layer_s(num_tokens) / times.layer_s
        return self.clock.visit(
            self.visits[window],
            arrived_s,
            scale=scale,
            fixed_s=self.fixed_s(window, num_tokens),
            reads=reads,
            leaves=leaves,
        )


def _mix(units: list[list[tuple[int, float]]], excess: int) -> tuple[list[Visit], int]:
    """At least `excess` bytes of units to be streamed, evenly among the others; resident computing is added up between.

    The output projection, last of `units`, is streamed only when all layers are: it is needed in one visit, so that less
    of it can be read ahead.
    """
    *layers, output = units
    in_layers = min(excess, sum(num_bytes for window in layers for num_bytes, _ in window))
    visits, streamed = _choose(layers, in_layers)
    last, more = _choose([output], max(0, excess - streamed))
    return [*visits, *last], streamed + more


def _choose(units: list[list[tuple[int, float]]], excess: int) -> tuple[list[Visit], int]:
    total = sum(num_bytes for window in units for num_bytes, _ in window)
    visits: list[Visit] = []
    owed, streamed, seen = 0.0, 0, 0
    share = min(1.0, excess / total) if total else 0.0
    for window in units:
        here: list[Piece] = []
        before_s = 0.0
        for num_bytes, compute_s in window:
            seen += num_bytes
            owed += share * num_bytes
            # What can still be streamed after this unit must suffice.
            is_needed = excess - streamed > total - seen
            if excess > streamed and (owed >= num_bytes / 2 or is_needed):
                here.append(Piece(before_s, num_bytes, compute_s))
                owed -= num_bytes
                streamed += num_bytes
                before_s = 0.0
            else:
                before_s += compute_s
        visits.append(Visit(tuple(here), before_s))
    return visits, streamed


def live(
    plan: WindowPlan,
    cluster: Cluster,
    model: ModelProfile,
    *,
    prompt_tokens: int,
    units_counted: int = UNITS_COUNTED,
) -> Life:
    """Runs a prompt and tokens until they are steady.

    Args:
        units_counted: how finely a ring is told apart, at most; fewer are faster and a little pessimistic.

    Raises:
        InfeasiblePlacement: a stage does not fit, with the missing bytes.
    """
    num_stages = len(plan.stages)
    tracks = [
        _Track(stage, cluster.devices[stage.device], model, is_head=index == num_stages - 1, units_counted=units_counted)
        for index, stage in enumerate(plan.stages)
    ]
    walk = _walk(plan)
    hops = _Hops(cluster, [stage.device for stage in plan.stages])
    # Warm up once, so that each ring is full when the prompt comes.
    _token(tracks, walk, hops, model, 0.0)
    reads = max((_reads(track, prompt_tokens, model) for track in tracks), default=1)
    first_s = _prompt(tracks, walk, hops, model, _LONG_S, prompt_tokens)
    now_s, token_s = first_s, 0.0
    for _ in range(_TOKENS_MAX):
        for track in tracks:
            track.clock.clear()
        hops.wire_s, hops.count = 0.0, 0
        done_s = _token(tracks, walk, hops, model, now_s)
        previous_s, token_s, now_s = token_s, done_s - now_s, done_s
        if abs(token_s - previous_s) <= _STEADY * token_s:
            break
    return Life(
        token_s=token_s,
        first_token_s=first_s - _LONG_S,
        wire_s=hops.wire_s,
        num_hops=hops.count,
        reads_per_prompt=reads,
        stages=tuple(
            StageLife(
                device=cluster.devices[track.stage.device].id,
                compute_s=track.clock.compute_s,
                disk_wait_s=track.clock.disk_wait_s,
                read_s=track.read_s,
                resident_bytes=track.resident_bytes,
                streamed_bytes=track.streamed_bytes,
                ring_bytes=track.ring_bytes,
                cache_bytes=track.cache_bytes,
                memory_left_bytes=track.memory_left_bytes,
                accelerator_left_bytes=track.accelerator_left_bytes,
            )
            for track in tracks
        ),
    )


def _walk(plan: WindowPlan) -> list[tuple[int, int]]:
    """(stage, window) in the order of visits; the head's output comes last."""
    walk = [
        (index, window)
        for window in range(plan.num_rounds)
        for index, stage in enumerate(plan.stages)
        if len(stage.windows[window])
    ]
    return [*walk, (len(plan.stages) - 1, plan.num_rounds)]


class _Hops:
    """Links between stages."""

    def __init__(self, cluster: Cluster, devices: Sequence[int]) -> None:
        index = {device.id: position for position, device in enumerate(cluster.devices)}
        position = {device: stage for stage, device in enumerate(devices)}
        self._links = {
            (position[index[link.source]], position[index[link.target]]): link
            for link in cluster.links
            if index[link.source] in position and index[link.target] in position
        }
        self._free_s: dict[tuple[int, int], float] = {}
        self.wire_s = 0.0
        self.count = 0

    def send(self, source: int, target: int, num_bytes: int, ready_s: float) -> float:
        """When it is there; a link carries one thing at a time."""
        if source == target:
            return ready_s
        link = self._links[source, target]
        begin_s = max(ready_s, self._free_s.get((source, target), 0.0))
        self._free_s[source, target] = begin_s + num_bytes / link.bytes_per_s
        arrived_s = begin_s + link.hop_s(num_bytes)
        self.wire_s += arrived_s - ready_s
        self.count += 1
        return arrived_s


def _token(tracks: list[_Track], walk: list[tuple[int, int]], hops: _Hops, model: ModelProfile, now_s: float) -> float:
    at = len(tracks) - 1
    for stage, window in walk:
        now_s = hops.send(at, stage, model.hidden_bytes, now_s)
        now_s = tracks[stage].visit(window, now_s, num_tokens=1)
        at = stage
    return now_s


def _batches(num_tokens: int, model: ModelProfile) -> list[int]:
    full, rest = divmod(num_tokens, model.micro_batch)
    return [model.micro_batch] * full + ([rest] if rest else [])


def _reads(track: _Track, prompt_tokens: int, model: ModelProfile) -> int:
    num_batches = len(_batches(prompt_tokens, model))
    streams = [window for window in range(len(track.stage.windows)) if track.visits[window].pieces]
    return 1 if all(track.fits_ring(window) for window in streams) else num_batches


def _prompt(
    tracks: list[_Track], walk: list[tuple[int, int]], hops: _Hops, model: ModelProfile, now_s: float, prompt_tokens: int
) -> float:
    """When the first token's logits are there."""
    batches = _batches(prompt_tokens, model)
    arrivals = [now_s] * len(batches)
    at = len(tracks) - 1
    for stage, window in walk:
        track = tracks[stage]
        is_output = window == len(track.stage.windows)
        if is_output:
            # Only the last token's state is projected.
            last_s = hops.send(at, stage, model.hidden_bytes, arrivals[-1])
            return track.visit(window, last_s, num_tokens=1)
        once = track.fits_ring(window)
        for index, num_tokens in enumerate(batches):
            arrived_s = hops.send(at, stage, num_tokens * model.hidden_bytes, arrivals[index])
            arrivals[index] = track.visit(
                window,
                arrived_s,
                num_tokens=num_tokens,
                reads=not once or index == 0,
                leaves=not once or index == len(batches) - 1,
            )
        at = stage
    raise AssertionError("a walk ends with the output")

"""Halda, by name and as published: a baseline, its known flaws included.

Devices are sorted into sets by what they lack; for every number of rounds k that divides the layers a small integer program
chooses windows w and the accelerator's part n of each; sets and windows are iterated to a fixed point; a device with the
slowest disk is declared sufficient where accelerators stand idle (calibration); whoever is left with a window of one layer
is dropped and all is done again.

    M1  macOS without Metal, memory too small
    M2  macOS with Metal, shared memory too small
    M3  Linux and Android, memory too small
    M4  enough memory, or a disk slower than `SLOW_DISK_BYTES_PER_S`, or forced

    min  k (a.w + b.n + sum c) + kappa       sum w = L / k,  1 <= w_m,  0 <= n_m <= w_m
    M1-M3 must overflow their memory, M4 must not; n fits the accelerator's memory

The program is the paper's. Its inputs are ours: a layer's time is the measured one, which contains both the FLOPs term and
the memory term of alpha, and a hop is the measured one, in the ring of the devices as they are given. From the authors'
program, where the paper is silent: k up to L / 2, strict inequalities as weak ones, the head's cost divided by 1.01, layers
start on accelerators, and the last solution is kept where none is found.

Known: c >= 0 makes k = 1 optimal whenever anything is feasible, because any (w, n) at k is (k w, k n) at 1, where it costs
no more.

Source: Li et al., PRIMA.CPP, arXiv 2504.08791v2 (2025), section 3 and appendices A.2-A.4; github.com/Lizonghang/prima.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import highspy
import msgspec
import numpy as np

from shoal.ids import DeviceId
from shoal.placement.highs import quiet_highs
from shoal.placement.profile import Cluster, DeviceProfile, ModelProfile

SLOW_DISK_BYTES_PER_S = 0.1e9
"""Whoever reads more slowly is never made to reread weights."""
MASTER_PRIORITY = 1.01
"""The head's cost is divided by it: a slight preference."""
_ITERATIONS_PER_DEVICE = 8


class DeviceSet(StrEnum):
    """What a device lacks."""

    M1 = "M1"
    M2 = "M2"
    M3 = "M3"
    M4 = "M4"


class HaldaPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Windows per round by index of device, the head first; `accelerator_windows` is the part on accelerators.

    `dropped` devices have windows of 0. `objective_s` is Halda's own latency of a token.
    """

    num_rounds: int
    windows: tuple[int, ...]
    accelerator_windows: tuple[int, ...]
    sets: tuple[DeviceSet, ...]
    objective_s: float
    dropped: tuple[DeviceId, ...] = ()


class _Device:
    """One device's published symbols; bytes and seconds."""

    def __init__(self, device: DeviceProfile, model: ModelProfile, *, is_head: bool, hop_s: float) -> None:
        self.id = device.id
        self.is_head = is_head
        self.is_macos = device.system == "macos"
        accelerator = device.accelerator
        self.has_metal = self.is_macos and accelerator is not None
        self.has_accelerator = accelerator is not None
        # d_m: what is left once the runtime and the compute buffers (c^cpu) have theirs is d_m - c^cpu.
        self.memory = float(device.memory_bytes - device.runtime_bytes)
        self.buffers = float(model.stage_bytes)
        self.swappable = float(device.swappable_bytes) if device.system == "android" else 0.0
        self.accelerator_memory = float(accelerator.memory_bytes) if accelerator else 0.0
        disk = device.disk
        if disk is None:
            self.disk = 0.0
        elif self.is_macos:
            self.disk = disk.random_bytes_per_s or disk.read_bytes_per_s
        else:
            self.disk = disk.mapped_bytes_per_s or disk.read_bytes_per_s
        self.alpha = device.times.layer_s
        self.beta = accelerator.times.layer_s - self.alpha if accelerator else 0.0
        copies_s = accelerator.copy_s if accelerator and not accelerator.shares_memory else 0.0
        self.xi = copies_s + hop_s
        self.output_s = device.times.output_s


def halda(cluster: Cluster, model: ModelProfile) -> HaldaPlan | None:
    """The published placement with device selection; None where no program has a solution."""
    kept = [device.id for device in cluster.devices]
    dropped: list[DeviceId] = []
    while True:
        part = cluster.subset(set(kept))
        found = schedule(part, model)
        if found is None:
            return None
        small = [device.id for device, window in zip(part.devices, found.windows, strict=True) if window <= 1]
        small = [device for device in small if device != cluster.head.id]
        if not small:
            break
        dropped += small
        kept = [device for device in kept if device not in small]
    windows = dict(zip(kept, found.windows, strict=True))
    on_accelerators = dict(zip(kept, found.accelerator_windows, strict=True))
    return msgspec.structs.replace(
        found,
        windows=tuple(windows.get(device.id, 0) for device in cluster.devices),
        accelerator_windows=tuple(on_accelerators.get(device.id, 0) for device in cluster.devices),
        dropped=tuple(dropped),
    )


def schedule(cluster: Cluster, model: ModelProfile) -> HaldaPlan | None:
    """Algorithm 1: windows for these devices, none left out."""
    hops = cluster.hops_s(model.hidden_bytes)
    count = len(cluster.devices)
    # A device sends to the next one of the ring 1, 2, .., 0; alone, to nobody.
    devices = [
        _Device(device, model, is_head=index == 0, hop_s=hops[index][(index + 1) % count])
        for index, device in enumerate(cluster.devices)
    ]
    if count > model.num_layers:
        return None
    windows = _initial_windows(devices, model.num_layers)
    on_accelerators = [window if device.has_accelerator else 0 for device, window in zip(devices, windows, strict=True)]
    forced: set[int] = set()
    seen: HaldaPlan | None = None
    last_sets: tuple[DeviceSet, ...] | None = None
    for _ in range(_ITERATIONS_PER_DEVICE * count):
        sets = _sort(devices, model, windows, on_accelerators, forced)
        if sets == last_sets:
            break
        last_sets = sets
        solutions = [found for k in valid_rounds(model.num_layers) if (found := _solve(devices, model, sets, k)) is not None]
        if not solutions:
            break
        best = min(solutions, key=lambda plan: plan.objective_s)  # of equals, the first: the smallest k
        calibrated = _calibrate(devices, model, best)
        if calibrated is not None and calibrated not in forced:
            forced.add(calibrated)
            last_sets = None
            seen = best
            continue
        if seen is not None and (seen.windows, seen.accelerator_windows) == (best.windows, best.accelerator_windows):
            return best
        seen = best
        windows = [best.num_rounds * window for window in best.windows]
        on_accelerators = [best.num_rounds * window for window in best.accelerator_windows]
    return seen


def valid_rounds(num_layers: int) -> list[int]:
    """Divisors of the layers up to half of them, as the authors' program has them."""
    return [k for k in range(1, max(1, num_layers // 2) + 1) if num_layers % k == 0]


def _initial_windows(devices: Sequence[_Device], num_layers: int) -> list[int]:
    """In proportion to budgets; zeros become one, taken from the largest; what rounding leaves goes to the largest budget or
    comes from the smallest."""
    budgets = [device.accelerator_memory if device.has_metal else device.memory + device.swappable for device in devices]
    windows = [round(budget / sum(budgets) * num_layers) for budget in budgets]
    for index, window in enumerate(windows):
        if window == 0:
            windows[index] = 1
            windows[windows.index(max(windows))] -= 1
    rest = num_layers - sum(windows)
    if rest > 0:
        windows[budgets.index(max(budgets))] += rest
    while rest < 0:
        candidates = [index for index, window in enumerate(windows) if window > 1]
        windows[min(candidates, key=lambda index: budgets[index])] -= 1
        rest += 1
    return windows


def _layer_bytes(model: ModelProfile) -> float:
    """b': a layer's weights and its share of the cache."""
    return model.mean_layer_bytes + model.cache_bytes_per_layer


def _head_bytes(model: ModelProfile) -> float:
    """b_i / V + b_o."""
    return float(model.embedding_row_bytes + model.output_bytes)


def _sort(
    devices: Sequence[_Device],
    model: ModelProfile,
    layers: Sequence[int],
    on_accelerators: Sequence[int],
    forced: set[int],
) -> tuple[DeviceSet, ...]:
    """Sets by the layers each device now has in all rounds."""
    each = _layer_bytes(model)
    sets = []
    for index, device in enumerate(devices):
        head_bytes = device.is_head * _head_bytes(model)
        if index in forced or device.disk < SLOW_DISK_BYTES_PER_S:
            sets.append(DeviceSet.M4)
        elif device.has_metal:
            # The buffers of both backends.
            needed = layers[index] * each + head_bytes + 2 * device.buffers
            sets.append(DeviceSet.M2 if needed > device.accelerator_memory else DeviceSet.M4)
        elif device.is_macos:
            needed = layers[index] * each + head_bytes + device.buffers
            sets.append(DeviceSet.M1 if needed > device.memory else DeviceSet.M4)
        else:
            needed = (layers[index] - on_accelerators[index]) * each + head_bytes + device.buffers
            sets.append(DeviceSet.M3 if needed > device.memory + device.swappable else DeviceSet.M4)
    return tuple(sets)


def _coefficients(device: _Device, device_set: DeviceSet, model: ModelProfile) -> tuple[float, float, float]:
    """a, b and c of the table in the paper."""
    each = _layer_bytes(model)
    match device_set:
        case DeviceSet.M1:
            return device.alpha + each / device.disk, 0.0, device.xi
        case DeviceSet.M2:
            return device.alpha + model.mean_layer_bytes / device.disk, device.beta, device.xi
        case DeviceSet.M3:
            read_s = each / device.disk
            return device.alpha + read_s, device.beta - read_s if device.has_accelerator else 0.0, device.xi
        case DeviceSet.M4:
            return device.alpha, device.beta, device.xi


def _constant_s(devices: Sequence[_Device], sets: Sequence[DeviceSet], model: ModelProfile) -> float:
    """kappa: what windows do not change."""
    head = devices[0]
    constant = head.output_s
    if head.disk:
        constant += model.embedding_row_bytes / head.disk
        constant += model.output_bytes / head.disk if sets[0] is not DeviceSet.M4 else 0.0
    for device, device_set in zip(devices, sets, strict=True):
        if device_set in (DeviceSet.M1, DeviceSet.M3):
            constant += (device.buffers - device.memory - device.swappable) / device.disk
    return constant


def _thresholds(device: _Device, model: ModelProfile) -> tuple[float, float]:
    """z and z^gpu: the share of all L layers that fit the memory and the accelerator."""
    whole = model.num_layers * _layer_bytes(model)
    pinned = device.is_head * _head_bytes(model) + device.buffers
    if device.has_metal:
        memory = device.accelerator_memory - pinned - device.buffers
        on_accelerator = device.accelerator_memory - device.buffers - device.is_head * model.output_bytes
    else:
        memory = device.memory + device.swappable - pinned
        on_accelerator = device.accelerator_memory
    return memory / whole, max(0.0, on_accelerator / whole) if device.has_accelerator else 0.0


def _solve(devices: Sequence[_Device], model: ModelProfile, sets: tuple[DeviceSet, ...], k: int) -> HaldaPlan | None:
    """The program of one k: 2 M columns (w, then n)."""
    count = len(devices)
    total = model.num_layers // k
    highs = quiet_highs()
    inf = highspy.kHighsInf
    cost = np.zeros(2 * count)
    lower, upper = np.zeros(2 * count), np.zeros(2 * count)
    fixed_s = 0.0
    limits: list[tuple[dict[int, float], float, float]] = [(dict.fromkeys(range(count), 1.0), total, total)]
    for index, (device, device_set) in enumerate(zip(devices, sets, strict=True)):
        a, b, c = _coefficients(device, device_set, model)
        priority = MASTER_PRIORITY if device.is_head else 1.0
        cost[index], cost[count + index] = k * a / priority, k * b / priority
        fixed_s += k * c / priority
        fits, fits_accelerator = _thresholds(device, model)
        lower[index], upper[index] = 1.0, total
        upper[count + index] = min(total, math.floor(total * fits_accelerator + 1e-9))
        limits.append(({count + index: 1.0, index: -1.0}, -inf, 0.0))
        # Linux and Android count what is not on the accelerator; macOS has one memory.
        row = {index: 1.0} if device.is_macos else {index: 1.0, count + index: -1.0}
        limits.append((row, -inf, total * fits) if device_set is DeviceSet.M4 else (row, total * fits, inf))
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = 2 * count, len(limits)
    program.col_cost_, program.col_lower_, program.col_upper_ = cost, lower, upper
    program.integrality_ = [highspy.HighsVarType.kInteger] * (2 * count)
    program.row_lower_ = np.array([low for _, low, _ in limits])
    program.row_upper_ = np.array([high for _, _, high in limits])
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.cumsum([0, *(len(row) for row, _, _ in limits)], dtype=np.int32)
    program.a_matrix_.index_ = np.array([column for row, _, _ in limits for column in row], dtype=np.int32)
    program.a_matrix_.value_ = np.array([value for row, _, _ in limits for value in row.values()])
    highs.setOptionValue("mip_rel_gap", 0.0)
    highs.passModel(program)
    highs.run()
    if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    values = highs.getSolution().col_value
    return HaldaPlan(
        num_rounds=k,
        windows=tuple(round(values[index]) for index in range(count)),
        accelerator_windows=tuple(round(values[count + index]) for index in range(count)),
        sets=sets,
        objective_s=float(highs.getInfo().objective_function_value) + fixed_s + _constant_s(devices, sets, model),
    )


def _calibrate(devices: Sequence[_Device], model: ModelProfile, plan: HaldaPlan) -> int | None:
    """The device to declare sufficient: some accelerator has room while somebody rereads weights. None: all is well."""
    shares = list(zip(devices, plan.windows, plan.accelerator_windows, plan.sets, strict=True))
    if any(window == 1 and on_accelerator == 0 for _, window, on_accelerator, _ in shares):
        return None
    total = sum(plan.windows)
    has_room = any(
        device.has_accelerator and on_accelerator < math.floor(total * _thresholds(device, model)[1])
        for device, _, on_accelerator, _ in shares
    )
    is_overloaded = any(
        window > on_accelerator if device.has_accelerator else device_set is not DeviceSet.M4
        for device, window, on_accelerator, device_set in shares
    )
    short = [index for index, (_, _, _, device_set) in enumerate(shares) if device_set is not DeviceSet.M4]
    if not (has_room and is_overloaded and short):
        return None
    return min(short, key=lambda index: devices[index].disk)

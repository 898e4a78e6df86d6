"""Plans in the lab: what is predicted of drawn devices and links, and what real rings then do. `plan.py` prints its figures.

A scenario is drawn by its seed: two to four devices with 0.25 to 0.9 of a core, disks of 110 to 275 MB/s and caps that hold
35-75 %, 75-130 % or 130-300 % of one of three models; links of 30 to 1,000 Mbit/s and 0.1 to 5 ms. Agents start cold,
measure themselves, plan and answer: ours first, then the published splits, each from a new head and by new profiles, since
this machine is at times a fifth faster or slower than a minute ago. Where theirs takes less than 1.15 of ours, both are
measured a second time, in turn, and the means count.

prediction_error_p50, _max  |predicted / measured - 1| of seconds per token, over all plans, ours and the published ones
vs_halda_p50, _min          measured seconds per token with their plan over ours; vs_halda_short_p50 where memory is short
vs_proportional_p50, _min   the same for the memory-proportional plan
halda_none, ...             scenarios in which they find no plan that keeps to memory; they are in no ratio
rounds_share                scenarios in which we choose more than one round; rounds_gain_p50 is measured seconds per token
                            with one round over ours there, rounds_gain_short_p50 where weights are streamed

Tokens are timed, so plans are made for prompts as short as the one that is asked (`--expect-prompt`).
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.memory_ring import SHORT_PROMPT, Ring, _made, weights_bytes
from shoal.lab.cluster import Lab
from shoal.lab.scenario import DeviceSpec, FileSpec, LinkSpec, Scenario, Workload, check
from shoal.units import MIB

FLOOR_BYTES = 150e6
"""What an agent and a worker take beside weights and cache (`make bench-memory` finds 145 MB)."""
TOKENS = 17
WAYS = ("planned", "halda", "proportional")
_CLOSE = 1.15
_SHARES = {"short": (0.35, 0.75), "tight": (0.75, 1.3), "ample": (1.3, 3.0)}


def models() -> tuple[Path, ...]:
    """0.6 to 1 GB: many small layers, few large ones, and between. A type that takes long to compute for its size, as larger
    models on slower machines do: a device's share of a core is given out every few milliseconds, its disk's every tenth of a
    second, and what takes no longer is measured badly."""
    return (
        _made("plan-32", "IQ3_S", num_layers=32, hidden_size=2048, feed_forward_size=5632, num_heads=16),
        _made("plan-12", "IQ3_S", num_layers=12, hidden_size=4096, feed_forward_size=8192, num_heads=32),
        _made("plan-24", "IQ3_S", num_layers=24, hidden_size=3072, feed_forward_size=8192, num_heads=24),
    )


def draw(seed: int) -> tuple[Scenario, Path, str, dict[str, int]]:
    """The scenario, its model, how scarce memory is, and each device's memory in bytes."""
    chance = random.Random(seed)
    model = chance.choice(models())
    scarcity = chance.choice(("short", "short", "tight", "ample"))
    total_bytes, cache_bytes = weights_bytes(model)
    names = ["first", "second", "third", "fourth"][: chance.randint(2, 4)]
    low, high = _SHARES[scarcity]
    room_bytes = total_bytes * chance.uniform(low, high)
    parts = [chance.uniform(0.5, 1.5) for _ in names]
    files = [FileSpec(path=str(model.absolute()))]
    memory_bytes, devices = {}, {}
    for name, part in zip(names, parts, strict=True):
        memory_bytes[name] = int(FLOOR_BYTES + (room_bytes + cache_bytes) * part / sum(parts))
        devices[name] = DeviceSpec(
            memory_mib=memory_bytes[name] / MIB,
            disk_mb_s=round(110 * 2.5 ** chance.random()),
            cores=round(chance.uniform(0.25, 0.9), 2),
            files=files,
        )
    links = [
        LinkSpec(
            between=(first, second),
            rate_mbit_s=round(30 * 33 ** chance.random()),
            delay_ms=round(0.1 * 50 ** chance.random(), 2),
        )
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    ]
    links.append(LinkSpec(between=("client", names[0])))
    scenario = Scenario(
        name=f"plan-{seed}",
        devices={**devices, "client": DeviceSpec()},
        links=links,
        workload=Workload(program="none"),
        multicast=False,
        seconds_max=1500,
    )
    return scenario, model, scarcity, memory_bytes


def measure_seed(seed: int, *, ways: tuple[str, ...]) -> dict[str, Any]:
    """One scenario: per way of planning, seconds per token as predicted and as measured, and who held what."""
    scenario, model, scarcity, memory_bytes = draw(seed)
    check(scenario, label=f"seed {seed}")
    row: dict[str, Any] = {"seed": seed, "scarcity": scarcity, "model": model.stem, "devices": len(memory_bytes)}
    started_s = time.monotonic()
    with Lab(scenario) as lab:
        ring = Ring(lab, model, list(memory_bytes))
        caps = list(memory_bytes.values())
        # Engines stand as long as the agent of their head; the other devices only lend workers.
        with ring.standing(ring.names[1:], caps):
            ids: list[int] | None = None
            for way in ways:
                row[way] = found = _answer(ring, [f"--placement={way}", SHORT_PROMPT], caps)
                if "token_ids" in found:
                    ids = ids or found["token_ids"]
                    if found.pop("token_ids") != ids:
                        raise RuntimeError(f"seed {seed}: other tokens with {way}")
            close = [way for way in ways[1:] if (_times_ours(row, way) or _CLOSE) < _CLOSE]
            for way in ("planned", *close) if close else ():
                row[f"{way}_again"] = _answer(ring, [f"--placement={way}", SHORT_PROMPT], caps)
                row[f"{way}_again"].pop("token_ids", None)
            if row["planned"].get("rounds", 1) > 1 and len(ways) > 1:
                row["one_round"] = _answer(ring, ["--rounds=1", SHORT_PROMPT], caps)
                row["one_round"].pop("token_ids", None)
    row["seconds"] = round(time.monotonic() - started_s)
    print("lab", json.dumps(row), file=sys.stderr)
    return row


def _answer(ring: Ring, options: list[str], caps: list[int]) -> dict[str, Any]:
    ring.forget_profiles()
    try:
        with ring.standing(ring.names[:1], caps):
            answer = ring.ask(options, tokens=TOKENS)
    except RuntimeError as error:
        return {"problem": str(error)[:200]}
    return {
        "token_s": answer["token_s"],
        "predicted_s": 1 / answer["predicted_tokens_per_s"],
        "rounds": len(answer["stages"][0]["layers"]),
        "layers": {stage["device"]: sum(b - a for a, b in stage["layers"]) for stage in answer["stages"]},
        "streamed_mb": [round(stage["streamed_bytes"] / 1e6) for stage in answer["stages"]],
        "token_ids": answer["token_ids"],
    }


def measure_lab(seeds: range, *, ways: tuple[str, ...] = WAYS) -> dict[str, float]:
    """Figures over scenarios."""
    return figures_of([measure_seed(seed, ways=ways) for seed in seeds], ways=ways)


def figures_of(rows: list[dict[str, Any]], *, ways: tuple[str, ...] = WAYS) -> dict[str, float]:
    """Of what `measure_seed` found for each scenario."""
    errors = [
        abs(answer["predicted_s"] / answer["token_s"] - 1)
        for row in rows
        for answer in row.values()
        if isinstance(answer, dict) and "token_s" in answer
    ]
    figures = {"prediction_error_p50": statistics.median(errors), "prediction_error_max": max(errors)}
    figures["lab_failed"] = float(sum("token_s" not in row["planned"] for row in rows))
    for way in ways[1:]:
        ratios = [(ratio, row["scarcity"]) for row in rows if (ratio := _times_ours(row, way)) is not None]
        figures[f"{way}_none"] = float(len(rows) - len(ratios))
        if ratios:
            figures[f"vs_{way}_p50"] = statistics.median(ratio for ratio, _ in ratios)
            figures[f"vs_{way}_min"] = min(ratio for ratio, _ in ratios)
        if short := [ratio for ratio, scarcity in ratios if scarcity == "short"]:
            figures[f"vs_{way}_short_p50"] = statistics.median(short)
    figures["rounds_share"] = statistics.mean(row["planned"].get("rounds", 1) > 1 for row in rows)
    gains = [
        (gain, sum(row["planned"]["streamed_mb"])) for row in rows if (gain := _times_ours(row, "one_round")) is not None
    ]
    if gains:
        figures["rounds_gain_p50"] = statistics.median(gain for gain, _ in gains)
    if streaming := [gain for gain, streamed_mb in gains if streamed_mb]:
        figures["rounds_gain_short_p50"] = statistics.median(streaming)
    return figures


def _times_ours(row: dict[str, Any], way: str) -> float | None:
    """Measured seconds per token over those of our plan; None where either is missing."""
    theirs, ours = _token_s(row, way), _token_s(row, "planned")
    return theirs / ours if theirs and ours else None


def _token_s(row: dict[str, Any], way: str) -> float | None:
    """The mean of what was measured, in seconds."""
    found = [row[key]["token_s"] for key in (way, f"{way}_again") if "token_s" in row.get(key, {})]
    return statistics.mean(found) if found else None


if __name__ == "__main__":
    # FIRST LAST, or a file with what was printed of scenarios: an hour's run may be done in parts.
    if len(sys.argv) == 2:
        lines = Path(sys.argv[1]).read_text().splitlines()
        print(json.dumps(figures_of([json.loads(line[4:]) for line in lines if line.startswith("lab ")]), indent=1))
    else:
        first, last = int(sys.argv[1]), int(sys.argv[2])
        print(json.dumps(measure_lab(range(first, last)), indent=1))

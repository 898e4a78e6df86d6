"""One device against llama.cpp: the same machine, threads and file, in turns, as ratios.

Our tokens per second over llama.cpp's, so 1 is its speed and more is faster. Each round measures both once, in an order
that alternates; a ratio is taken per round, and the median over the rounds is quoted. Decode counts embedding, all layers
and the logits, on both sides without sampling, at the start of the context and behind 512 tokens. llama.cpp runs with its
own defaults (weights repacked, flash attention chosen by itself), in a process of its own.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.models import random_model, smollm2
from benchmarks.record import finish, is_quick
from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.stage import Stage
from shoal.ids import LayerRange
from tests.oracle.llamacpp import Llama

PROMPT_TOKENS = 512
CONTEXT = 1024
DECODES_PER_ROUND = 3
"""Decoding at the start is short, and so is what disturbs it: it is measured more often than the rest."""


class Ours:
    """This project's single device, with the same calls as the peer."""

    def __init__(self, path: Path, *, threads: int) -> None:
        self._model = Model(path)
        self._backend = Backend(num_threads=threads)
        layers = LayerRange(0, self._model.shape.num_layers)
        self._stage = Stage(self._model, [layers], self._backend, context=CONTEXT, micro_batch=PROMPT_TOKENS, head=True)
        rng = np.random.default_rng(0)
        self._ids = rng.integers(0, self._model.shape.vocab_size, CONTEXT).tolist()

    def time_prefill(self, num_tokens: int) -> float:
        started_s = time.perf_counter()
        self._stage.forward_tokens(self._ids[:num_tokens], 0)
        return time.perf_counter() - started_s

    def time_decode(self, num_tokens: int, *, at_position: int) -> list[float]:
        if at_position:
            self._stage.forward_tokens(self._ids[:at_position], 0)
        times = []
        for position in range(at_position, at_position + num_tokens):
            started_s = time.perf_counter()
            self._stage.forward_tokens((self._ids[position],), position)
            times.append(time.perf_counter() - started_s)
        return times

    def close(self) -> None:
        self._stage.close()
        self._backend.close()
        self._model.close()


def compare(path: Path, *, threads: int, rounds: int, decode_tokens: int) -> dict[str, Any]:
    """Medians and spread of the ratios for one model and thread count."""
    ours = Ours(path, threads=threads)
    ratios: dict[str, list[float]] = {"prefill": [], "decode": [], "decode_at_512": []}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ratios}
    with Llama(path, threads=threads, context=CONTEXT, micro_batch=PROMPT_TOKENS) as theirs:
        for side in (ours, theirs):
            # Reads the file and touches every weight.
            side.time_prefill(PROMPT_TOKENS // 16)
            side.time_decode(2, at_position=0)
        for index in range(rounds * DECODES_PER_ROUND):
            order: list[Any] = [ours, theirs] if index % 2 else [theirs, ours]
            times = {side: _measure(side, decode_tokens, whole=index % DECODES_PER_ROUND == 0) for side in order}
            for name in times[ours]:
                ratios[name].append(times[theirs][name] / times[ours][name])
                seconds[name].append((times[ours][name], times[theirs][name]))
    ours.close()
    return {
        name: {
            "ratio": round(statistics.median(values), 4),
            "ratio_min": round(min(values), 4),
            "ratio_max": round(max(values), 4),
            "ours_ms": round(statistics.median(pair[0] for pair in seconds[name]) * 1e3, 3),
            "llamacpp_ms": round(statistics.median(pair[1] for pair in seconds[name]) * 1e3, 3),
        }
        for name, values in ratios.items()
    }


def _measure(side: Any, decode_tokens: int, *, whole: bool) -> dict[str, float]:
    figures = {"decode": statistics.median(side.time_decode(decode_tokens, at_position=0))}
    if whole:
        figures["prefill"] = side.time_prefill(PROMPT_TOKENS)
        figures["decode_at_512"] = statistics.median(side.time_decode(decode_tokens, at_position=PROMPT_TOKENS))
    return figures


def main() -> None:
    cores = psutil.cpu_count(logical=False) or 1
    quick = is_quick()
    models = {"smollm2": smollm2(), "1b-Q4_K": random_model("llama-3.2-1b", "Q4_K")}
    counts = [cores] if quick else sorted({1, cores})
    details: dict[str, Any] = {}
    for name, path in models.items():
        for threads in counts:
            rounds, tokens = (1 if name != "smollm2" else 3, 24) if quick else (3 if name != "smollm2" else 7, 48)
            details[f"{name}/{threads}"] = found = compare(path, threads=threads, rounds=rounds, decode_tokens=tokens)
            for step, figures in found.items():
                print(f"{name} {threads} threads {step}: {figures}", file=sys.stderr)
    figures = {
        "decode_ratio": min(found[step]["ratio"] for found in details.values() for step in ("decode", "decode_at_512")),
        "prefill_ratio": min(found["prefill"]["ratio"] for found in details.values()),
        "details": details,
    }
    finish("single", figures, {"prompt_tokens": PROMPT_TOKENS, "threads": counts})


if __name__ == "__main__":
    main()

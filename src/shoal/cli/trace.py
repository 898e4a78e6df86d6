"""An answer's decode steps as a Chrome trace: open it at ui.perfetto.dev or chrome://tracing.

Devices have clocks of their own, but a token is at one place at a time: stages are drawn one after the other as the token
went, and what no stage accounts for is shared out evenly between the hops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.runtime.messages import EngineDescription, Finished


def write(path: Path, engine: EngineDescription, finished: Finished) -> None:
    """Writes the trace. Raises OSError."""
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": list(events(engine, finished))}))


def events(engine: EngineDescription, finished: Finished) -> Iterator[dict[str, Any]]:
    """Complete events ("X") in microseconds: one process per device, with a row for what it does and one for its links."""
    for number, stage in enumerate(engine.stages):
        name = f"{stage.device} (head)" if stage.head else stage.device
        yield {"ph": "M", "pid": number, "tid": 0, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": number, "tid": 0, "name": "thread_name", "args": {"name": "stage"}}
        yield {"ph": "M", "pid": number, "tid": 1, "name": "thread_name", "args": {"name": "link to it"}}
    at_s = finished.prefill_s
    num_stages = len(engine.stages)
    for token, step in enumerate(finished.trace):
        hop_s = max(0.0, step.token_s - sum(held_s for _, _, held_s in step.visits)) / len(step.visits)
        for number, (compute_s, disk_s, held_s) in enumerate(step.visits):
            at, labels = number % num_stages, {"token": token, "round": number // num_stages}
            yield _event(at, 1, "wire", at_s, hop_s, labels)
            at_s += hop_s
            layers = str(engine.stages[at].windows[number // num_stages])
            # How waiting and computing alternate within a window is not told: first the one, then the other.
            if disk_s:
                yield _event(at, 0, "disk", at_s, disk_s, labels)
            yield _event(at, 0, f"layers {layers}", at_s + disk_s, compute_s, labels)
            at_s += held_s


def _event(stage: int, row: int, name: str, at_s: float, seconds: float, labels: dict[str, int]) -> dict[str, Any]:
    return {
        "ph": "X", "pid": stage, "tid": row, "name": name, "ts": round(at_s * 1e6, 3), "dur": round(seconds * 1e6, 3),
        "args": labels,
    }  # fmt: skip

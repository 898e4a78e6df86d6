"""What an answer cost, for people and for programs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from shoal.runtime.messages import EngineDescription, Finished, StageTimes
from shoal.units import format_bytes, format_seconds


def tokens_per_s(finished: Finished) -> float:
    """Decoded tokens per second; the first token belongs to the prefill."""
    steps = max(0, len(finished.token_ids) - 1)
    return steps / finished.decode_s if steps and finished.decode_s > 0 else 0.0


def summary(engine: EngineDescription, finished: Finished, text: str) -> dict[str, Any]:
    """One JSON object: `devices, layers, prompt_tokens, tokens, token_ids, text, tokens_per_s, stages` and more.

    `layers` are the windows [first, stop) that a token passes, in order: one per device and round.
    """
    times: list[StageTimes | None] = [*finished.stages] or [None] * len(engine.stages)
    return {
        "model": engine.model,
        "devices": [stage.device for stage in engine.stages],
        "layers": [
            [window.first, window.stop]
            for of_round in zip(*(stage.windows for stage in engine.stages), strict=True)
            for window in of_round
        ],
        "prompt_tokens": finished.prompt_tokens,
        "cached_tokens": finished.cached_tokens,
        "tokens": len(finished.token_ids),
        "token_ids": finished.token_ids,
        "text": text,
        "finish_reason": finished.reason,
        "reads_per_prompt": finished.reads_per_prompt,
        "prefill_s": round(finished.prefill_s, 6),
        "tokens_per_s": round(tokens_per_s(finished), 3),
        "predicted_tokens_per_s": round(1 / engine.token_s, 3) if engine.token_s else None,
        "stages": [
            {
                "device": stage.device,
                "layers": [[window.first, window.stop] for window in stage.windows],
                "threads": stage.num_threads,
                "memory_bytes": stage.memory_bytes,
                "streamed_bytes": stage.streamed_bytes,
                "head": stage.head,
                "compute_s": time.compute_s if time else 0.0,
                "disk_s": time.disk_s if time else 0.0,
                "wait_s": time.wait_s if time else 0.0,
                "wire_s": time.wire_s if time else 0.0,
            }
            for stage, time in zip(engine.stages, times, strict=True)
        ],
        "encrypts": engine.encrypts,
        "left_out": [[device, reason] for device, reason in engine.left_out],
    }


def breakdown(engine: EngineDescription, finished: Finished) -> Table:
    """Who held which layers, and where a token's time went."""
    rate = tokens_per_s(finished)
    streams = any(stage.streamed_bytes for stage in engine.stages)
    read = "weights read from disk; " if streams else ""
    links = "encrypted" if engine.encrypts else "not encrypted"
    parts = "computing, waiting for the disk, waiting" if streams else "computing, waiting"
    reads = f", weights read {finished.reads_per_prompt} x" if streams and finished.reads_per_prompt > 1 else ""
    planned = f" (planned: {1 / engine.token_s:.1f})" if engine.token_s else ""
    times: list[StageTimes | None] = [*finished.stages] or [None] * len(engine.stages)
    table = Table(
        "device", "layers", "threads", "memory",
        *(["from disk", "compute", "disk"] if streams else ["compute"]), "wait", "wire",
        title=f"{engine.model}: {len(finished.token_ids)} tokens at {rate:.1f} tokens/s{planned}, "
        f"prompt of {finished.prompt_tokens} ({finished.cached_tokens} kept) in {format_seconds(finished.prefill_s)}{reads}",
        title_justify="left",
        caption=f"per token: {read}medians of {parts} for the others, sending and receiving"
        + (f"; links {links}" if len(engine.stages) > 1 else ""),
        caption_justify="left",
        box=None,
    )  # fmt: skip
    for stage, time in zip(engine.stages, times, strict=True):
        spent = (time.compute_s, *([time.disk_s] if streams else []), time.wait_s, time.wire_s) if time else None
        layers = ", ".join(str(window) for window in stage.windows)
        table.add_row(
            f"{stage.device} (head)" if stage.head else stage.device,
            layers,
            str(stage.num_threads),
            format_bytes(stage.memory_bytes),
            *([format_bytes(stage.streamed_bytes)] if streams else []),
            *([format_seconds(part) for part in spent] if spent else ["-"] * (4 if streams else 3)),
        )
    for device, reason in engine.left_out:
        table.add_row(device, f"[dim]left out: {reason}[/]")
    return table

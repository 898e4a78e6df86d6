"""What one hop of the ring costs: real agents, real workers, loopback.

`hop_us = (time of a token - computing of all stages) / hops`, per decoded token, from one token's choice to the next: so
sampling, detokenising and telling the client are in it too. The median over at least 500 tokens is quoted.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
from typing import Any

from benchmarks.models import smollm2
from benchmarks.record import finish, is_quick
from shoal.cli.client import OwnAgent
from shoal.cli.run import Answer, ask
from shoal.runtime.messages import EngineOptions, Generate, Sampling

TOKENS = 520


async def decode(num_devices: int, *, threads: int, tokens: int) -> Answer:
    """Decodes `tokens` tokens over a fresh ring."""
    path = smollm2()
    async with contextlib.AsyncExitStack() as stack:
        peers: list[str] = []
        for index in reversed(range(num_devices)):
            arguments = [f"--name=device-{index + 1}", f"--models={path.parent}", *(f"--peer={peer}" for peer in peers)]
            agent = await OwnAgent.start(arguments)
            stack.push_async_callback(agent.stop)
            peers.append(agent.address)
        request = Generate(
            model=str(path),
            prompt="Once upon a time",
            max_tokens=tokens,
            ignore_end=True,
            sampling=Sampling(temperature=0.0),
            options=EngineOptions(num_threads=threads),
        )
        return await ask(peers[-1], request, show=lambda _: None, status=lambda _: None)


def main() -> None:
    details: dict[str, Any] = {}
    for num_devices in (3,) if is_quick() else (2, 3, 4):
        answer = asyncio.run(decode(num_devices, threads=1, tokens=TOKENS))
        hops = sorted(answer.finished.hop_us)
        details[str(num_devices)] = found = {
            "p50": round(statistics.median(hops), 1),
            "p90": round(hops[len(hops) * 9 // 10], 1),
            "min": round(hops[0], 1),
            "tokens": len(hops),
            "compute_ms": [round(stage.compute_s * 1e3, 3) for stage in answer.finished.stages],
        }
        print(f"{num_devices} devices: {found}", file=sys.stderr)
    figures = {"hop_us_p50": max(found["p50"] for found in details.values()), "devices": details}
    finish("hop", figures, {"model": "smollm2", "threads": 1, "tokens": TOKENS})


if __name__ == "__main__":
    main()

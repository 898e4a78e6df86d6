"""`shoal run`: one answer, or a chat."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape

from shoal.cli import trace
from shoal.cli.client import agent_address, open_channel
from shoal.cli.report import breakdown, summary
from shoal.errors import ShoalError
from shoal.runtime import errors_by_name
from shoal.runtime.channel import Channel
from shoal.runtime.messages import (
    ChatMessage,
    Delta,
    EngineDescription,
    EngineOptions,
    Failed,
    Finished,
    Generate,
    PlacementName,
    Progress,
    ResidencyMode,
    Sampling,
)

_CHAT_HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass(frozen=True)
class Settings:
    """What was typed: which agent, which engine, and how to answer."""

    agent: str | None = None
    own_agent: list[str] = field(default_factory=list)
    options: EngineOptions = field(default_factory=EngineOptions)
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    system: str | None = None
    raw: bool = False
    verbose: bool = False
    as_json: bool = False
    trace: Path | None = None


@dataclass(frozen=True)
class Answer:
    """One answer, whole."""

    text: str
    engine: EngineDescription
    finished: Finished


def parse_counts(text: str | None, *, option: str = "--layers") -> list[int] | None:
    """'10,10,10' -> [10, 10, 10]. Raises ValueError."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: write whole numbers with commas between, such as 10,10,10") from None


def parse_gpu_layers(text: str | None, layers: str | None) -> list[int] | None:
    """Raises ValueError, too where layers are not given by hand: the planner decides both."""
    if text is not None and layers is None:
        raise ValueError(f"--gpu-layers {text}: give --layers as well, or leave both to the planner")
    return parse_counts(text, option="--gpu-layers")


def parse_placement(text: str) -> PlacementName:
    """Raises ValueError."""
    try:
        found: PlacementName = msgspec.convert(text, PlacementName)
    except msgspec.ValidationError:
        raise ValueError(f"--placement {text}: allowed are planned, halda and proportional") from None
    return found


def parse_residency(text: str) -> tuple[ResidencyMode, int]:
    """'window=2' -> ('window', 2). Raises ValueError."""
    if text in ("auto", "mmap"):
        return ("auto" if text == "auto" else "mmap"), 0
    kind, _, layers = text.partition("=")
    if kind != "window" or not layers.isdecimal() or not int(layers):
        raise ValueError(f"--residency {text}: allowed are auto, mmap and window=LAYERS, such as window=2")
    return "window", int(layers)


def run(model: str, prompt: str | None, settings: Settings) -> None:
    """Answers `prompt`, or what stands on standard input, or starts a chat where that is a terminal."""
    if settings.trace is not None:
        if prompt is None and sys.stdin.isatty():
            raise ValueError("--trace: a chat has many answers: give a prompt")
        if not settings.trace.absolute().parent.is_dir():
            raise ValueError(f"--trace {settings.trace}: there is no folder {settings.trace.absolute().parent}")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
        if not prompt.strip():
            raise ValueError("nothing to answer: give a prompt, or text on standard input")
    if Path(model).is_file():
        # The agent may have been started elsewhere: a path is meant as seen from here.
        model = str(Path(model).absolute())
    with asyncio.Runner() as runner:
        agent = agent_address(settings.agent, settings.own_agent)
        address = runner.run(_enter(agent))
        try:
            if prompt is None:
                _chat(runner, address, model, settings)
            else:
                runner.run(_answer_once(address, model, prompt, settings))
        finally:
            runner.run(_leave(agent))


async def _enter(agent: AbstractAsyncContextManager[str]) -> str:
    return await agent.__aenter__()


async def _leave(agent: AbstractAsyncContextManager[str]) -> None:
    await agent.__aexit__(None, None, None)


async def _answer_once(address: str, model: str, prompt: str, settings: Settings) -> None:
    request = _request(model, [ChatMessage("user", prompt)], settings)
    if settings.raw:
        request = msgspec.structs.replace(request, messages=None, prompt=prompt)
    show = _discard if settings.as_json else _print_text
    answer = await ask(address, request, show=show, status=_status_line(settings))
    if settings.trace is not None:
        trace.write(settings.trace, answer.engine, answer.finished)
    if settings.as_json:
        print(json.dumps(summary(answer.engine, answer.finished, answer.text)))  # noqa: T201
        return
    _print_text("\n")
    if settings.verbose:
        Console(stderr=True).print(breakdown(answer.engine, answer.finished))


def _chat(runner: asyncio.Runner, address: str, model: str, settings: Settings) -> None:
    """Reads lines in the main thread, so that Ctrl-C and Ctrl-D do what they do in any program."""
    console = Console(stderr=True)
    console.print(f"[dim]{_CHAT_HELP}[/]")
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # line editing, where the system has it
    history: list[ChatMessage] = []
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            # Meant for an answer that ended just before: it must not cost the conversation.
            console.print("\n[dim]/exit or Ctrl-D leaves[/]")
            continue
        except EOFError:
            _print_text("\n")
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            history.clear()
        elif line:
            history = _turn(runner, address, model, [*history, ChatMessage("user", line)], settings, console)


def _turn(
    runner: asyncio.Runner,
    address: str,
    model: str,
    history: list[ChatMessage],
    settings: Settings,
    console: Console,
) -> list[ChatMessage]:
    """Answers the last message; returns the history with the answer, or without the question where there is none."""
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        _print_text(text)

    request = _request(model, history, settings)
    try:
        answer = runner.run(ask(address, request, show=show, status=_status_line(settings)))
    except KeyboardInterrupt:
        _print_text("\n")
        return [*history, ChatMessage("assistant", "".join(shown))] if shown else history[:-1]
    except ShoalError as error:
        console.print(f"\n[red]{escape(str(error))}[/]")
        return history[:-1]
    _print_text("\n")
    if settings.verbose:
        console.print(breakdown(answer.engine, answer.finished))
    return [*history, ChatMessage("assistant", answer.text)]


async def ask(address: str, request: Generate, *, show: Callable[[str], None], status: Callable[[str], None]) -> Answer:
    """As `generate`, over a connection of its own: whoever cancels this, stops the answer."""
    channel = await open_channel(address)
    try:
        return await generate(channel, request, show=show, status=status)
    finally:
        await channel.close()


def _request(model: str, messages: list[ChatMessage], settings: Settings) -> Generate:
    system = [ChatMessage("system", settings.system)] if settings.system else []
    return Generate(
        model=model,
        messages=[*system, *messages],
        max_tokens=settings.max_tokens,
        stop=settings.stop,
        sampling=settings.sampling,
        options=settings.options,
        trace=settings.trace is not None,
    )


async def generate(
    channel: Channel, request: Generate, *, show: Callable[[str], None], status: Callable[[str], None]
) -> Answer:
    """Sends a request and follows it to its end.

    Args:
        show: takes the answer's text as it comes.
        status: takes one line on what is being done before the first token; '' when that is over.

    Raises:
        ShoalError: what the agent reported.
    """
    await channel.send(request)
    engine: EngineDescription | None = None
    parts: list[str] = []

    def add(text: str) -> None:
        if text:
            if not parts:
                status("")
            parts.append(text)
            show(text)

    try:
        while True:
            message = await channel.receive()
            if isinstance(message, Progress):
                status(_progress_text(message))
            elif isinstance(message, EngineDescription):
                engine = message
            elif isinstance(message, Delta):
                add(message.text)
            elif isinstance(message, Failed):
                raise errors_by_name.revive(message)
            elif isinstance(message, Finished):
                add(message.text)
                assert engine is not None, "the engine is described before its answer"
                return Answer("".join(parts), engine, message)
    finally:
        status("")


def _progress_text(progress: Progress) -> str:
    return f"{progress.text} {progress.done}/{progress.total}" if progress.total else progress.text


def _status_line(settings: Settings) -> Callable[[str], None]:
    """A line that overwrites itself on a terminal; plain lines elsewhere, and only when asked for."""
    is_terminal = sys.stderr.isatty()
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        if is_terminal and (text or shown):
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
        elif settings.verbose and text and text != shown:
            sys.stderr.write(f"{text}\n")
        shown = text

    return show


def _print_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(_text: str) -> None:
    pass

"""`shoal plan`: who would hold which layers, how fast that would be, and why."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from shoal.cli.cluster_profile import Measured, ask_cluster, model_profile
from shoal.errors import CannotWrite, InfeasiblePlacement
from shoal.placement.baselines import BASELINES
from shoal.placement.planner import Plan, PlannedStage, make_plan, plan_baseline
from shoal.placement.profile import Cluster, ModelProfile, decode_cluster
from shoal.placement.program import ANSWER_TOKENS, PROMPT_TOKENS, ObjectiveName
from shoal.runtime.model_store import ModelStore
from shoal.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Settings:
    """What was typed. `profiles` is a file of measured devices and links instead of running agents."""

    agent: str | None = None
    own_agent: list[str] = field(default_factory=list)
    model_folders: list[Path] = field(default_factory=list)
    profiles: Path | None = None
    save_profiles: Path | None = None
    context: int | None = None
    objective: ObjectiveName = "latency"
    compare: bool = False
    fresh: bool = False
    link_bytes_per_s: float | None = None
    as_json: bool = False


class Comparison(msgspec.Struct, frozen=True):
    """What another way of planning comes to; `problem` where it finds nothing."""

    name: str
    plan: Plan | None
    problem: str = ""


class Answer(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    plan: Plan
    assumed: tuple[str, ...]
    others: tuple[Comparison, ...] = ()


def plan(model: str, settings: Settings) -> None:
    """Plans and prints.

    Raises:
        InfeasiblePlacement: with the missing bytes and what would help.
    """
    store = ModelStore(settings.model_folders)
    path = store.resolve(model)
    profile = model_profile(path, context=settings.context)
    measured = (
        _read(settings.profiles)
        if settings.profiles
        else asyncio.run(
            ask_cluster(
                store,
                path,
                agent=settings.agent,
                own_agent=settings.own_agent,
                link_bytes_per_s=settings.link_bytes_per_s,
                fresh=settings.fresh,
            )
        )
    )
    if settings.save_profiles:
        _save(settings.save_profiles, measured.cluster)
    made = make_plan(measured.cluster, profile, objective=settings.objective)
    others = _others(measured.cluster, profile, settings) if settings.compare else ()
    answer = Answer(made, measured.assumed, others)
    if settings.as_json:
        print(msgspec.json.encode(answer).decode())  # noqa: T201
    else:
        _print(answer, profile)


def _read(path: Path) -> Measured:
    try:
        return Measured(decode_cluster(path.read_bytes()), ())
    except OSError as error:
        raise ValueError(f"--profiles {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"--profiles {path}: {error}") from None


def _save(path: Path, cluster: Cluster) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(cluster), indent=2) + b"\n")
    except OSError as error:
        raise CannotWrite(f"--save-profiles {path}: {error.strerror or error}") from None


def _others(cluster: Cluster, profile: ModelProfile, settings: Settings) -> tuple[Comparison, ...]:
    found = []
    for name in BASELINES:
        try:
            found.append(Comparison(name, plan_baseline(name, cluster, profile, objective=settings.objective)))
        except InfeasiblePlacement as error:
            found.append(Comparison(name, None, str(error)))
    return tuple(found)


def _print(answer: Answer, profile: ModelProfile) -> None:
    made, console = answer.plan, Console()
    console.print(
        f"{made.model}, {profile.num_layers} layers, {format_bytes(sum(profile.layer_bytes) + profile.output_bytes)}, "
        f"{made.context} tokens of context, in {made.num_rounds} round{'s' if made.num_rounds > 1 else ''} per token",
        highlight=False,
    )
    table = Table("device", "layers", "windows", "in memory", "streamed per token", "left", "bound by", box=None)
    for stage in made.stages:
        table.add_row(*_row(stage, is_head=stage is made.head))
    console.print(table)
    console.print(
        f"first token after {format_seconds(made.first_token_s)} ({PROMPT_TOKENS} tokens of prompt), then "
        f"{1 / made.token_s:.3g} tokens/s, of which hops take {made.wire_s / made.token_s:.0%}",
        highlight=False,
    )
    if made.objective == "throughput":
        slowest_s = max(max(stage.life.compute_s, stage.life.read_s) for stage in made.stages)
        console.print(f"the slowest stage would allow {1 / slowest_s:.3g} tokens/s to many requests", highlight=False)
    if made.reads_per_prompt > 1:
        console.print(f"streamed weights are read {made.reads_per_prompt} times for a prompt", highlight=False)
    for left in made.left_out:
        console.print(f"left out: {left.device}: {left.reason}", highlight=False)
    _print_alone(console, made)
    for assumption in answer.assumed:
        console.print(f"assumed: {assumption}", highlight=False)
    if answer.others:
        _print_others(console, answer)


def _row(stage: PlannedStage, *, is_head: bool) -> list[str]:
    life = stage.life
    on_accelerator = sum(stage.accelerator_layers)
    layers = f"{stage.num_layers}" + (f" ({on_accelerator} accelerated)" if on_accelerator else "")
    windows = " ".join(str(window) for window in stage.windows[:4]) + (" ..." if len(stage.windows) > 4 else "")
    held = life.resident_bytes + life.ring_bytes + life.cache_bytes
    return [
        stage.device + (" (head)" if is_head else ""),
        layers,
        windows,
        format_bytes(held),
        format_bytes(life.streamed_bytes) if life.streamed_bytes else "-",
        format_bytes(life.memory_left_bytes),
        stage.binding,
    ]


def _print_alone(console: Console, made: Plan) -> None:
    if len(made.stages) == 1:
        others = " than with the others" if made.left_out else ""
        console.print(f"{made.head.device} alone is faster{others}" if others else "there is one device", highlight=False)
    elif made.alone_token_s is not None:
        console.print(f"{made.head.device} alone: {1 / made.alone_token_s:.3g} tokens/s", highlight=False)
    else:
        console.print(f"{made.head.device} alone cannot hold it", highlight=False)


def _print_others(console: Console, answer: Answer) -> None:
    table = Table(
        "plan", "rounds", "layers, head last", "first token", "tokens/s", f"time of {ANSWER_TOKENS} tokens", box=None
    )
    for name, made in [("this", answer.plan), *((other.name, other.plan) for other in answer.others)]:
        if made is None:
            problem = next(other.problem for other in answer.others if other.name == name)
            table.add_row(name, "-", problem)
            continue
        table.add_row(
            name,
            str(made.num_rounds),
            " ".join(f"{stage.device}:{stage.num_layers}" for stage in made.stages),
            format_seconds(made.first_token_s),
            f"{1 / made.token_s:.3g}",
            format_seconds(made.first_token_s + ANSWER_TOKENS * made.token_s),
        )
    console.print(table)

"""`shoal simulate`: the members' protocols on simulated devices, and an account of what happened."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from shoal.errors import ShoalError
from shoal.simulation.actions import FORMS
from shoal.simulation.churn import Churn, run_churn
from shoal.simulation.plan import Outcome, Plan, parse_plan, run_plan
from shoal.simulation.swarm import draw_plan, explain, shrink

CHURN = "churn"
SWARM = "seed"
LINES_SHOWN = 400


class SimulationFailed(ShoalError):
    """A checker found what may never happen. The report is on standard output."""


def names() -> dict[str, str]:
    """Every scenario that comes with shoal, and what it is about."""
    found = {}
    for entry in sorted(resources.files("shoal.simulation").joinpath("scenarios").iterdir(), key=lambda each: each.name):
        if entry.name.endswith(".txt"):
            found[entry.name.removesuffix(".txt")] = entry.read_text(encoding="utf-8").splitlines()[0].strip("# ")
    return found


def simulate(
    scenario: str | None,
    *,
    devices: int | None,
    seconds: float | None,
    changes: float | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Runs a scenario by name or file, a churn, or the plan of a seed; prints what happened."""
    if scenario is None:
        _list()
        return
    if scenario == CHURN:
        _churn(Churn(devices or 100, seconds or 60.0, 2.0 if changes is None else changes, seed or 0), as_json=as_json)
        return
    if devices is not None or seconds is not None or changes is not None:
        raise ValueError(
            "--devices, --seconds and --changes are for `shoal simulate churn`; a scenario says how many it has"
        )
    plan = draw_plan(seed or 0) if scenario == SWARM else _find(scenario)
    if seed is not None:
        plan = msgspec.structs.replace(plan, settings=msgspec.structs.replace(plan.settings, seed=seed))
    begun_s = time.perf_counter()
    _report(run_plan(plan), time.perf_counter() - begun_s, as_json=as_json, is_drawn=scenario == SWARM)


def _find(scenario: str) -> Plan:
    known = names()
    if scenario in known:
        text = resources.files("shoal.simulation").joinpath("scenarios", f"{scenario}.txt").read_text(encoding="utf-8")
        return parse_plan(text.partition("\n---")[0], source=scenario)
    path = Path(scenario)
    if not path.is_file():
        allowed = ", ".join([*known, CHURN, SWARM])
        raise ValueError(f"'{scenario}' is no file and no scenario: write a path or one of {allowed}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: a scenario is lines such as 'at 1.5 freeze b'") from None
    return parse_plan(text.partition("\n---")[0], source=path.name)


def _list() -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print("Scenarios, for `shoal simulate NAME`:\n")
    for name, title in names().items():
        console.print(f"  [bold]{name:<22}[/]  {title}")
    console.print(f"  [bold]{CHURN:<22}[/]  Devices come and go: --devices, --seconds, --changes per second")
    console.print(f"  [bold]{SWARM:<22}[/]  A cluster and faults drawn from --seed")
    console.print(
        "\nA file may hold your own. Its lines are 'devices a b c', 'heal SECONDS' or 'end SECONDS', and 'at SECONDS':\n"
    )
    for form in FORMS.values():
        console.print(f"  {form}", markup=False)


def _report(outcome: Outcome, wall_s: float, *, as_json: bool, is_drawn: bool) -> None:
    failure = outcome.failure
    if as_json:
        print(msgspec.json.encode(_summary(outcome, wall_s)).decode())  # noqa: T201
    elif failure is None:
        console = Console(highlight=False, soft_wrap=True)
        if is_drawn:
            console.print(f"{outcome.plan}\n", markup=False)
        elif outcome.plan.title:
            console.print(f"[bold]{outcome.plan.title}[/]\n")
        _print_story(console, str(outcome.story).splitlines())
        settled = f", all settled {outcome.settled_s:.2f} s after the faults" if outcome.settled_s is not None else ""
        console.print(
            f"\n{len(outcome.world.devices)} devices, {outcome.simulated_s:.1f} simulated seconds in {wall_s:.2f} s, "
            f"{outcome.num_events} events, {outcome.num_messages} messages{settled}. No invariant was broken."
        )
    else:
        print(explain(shrink(outcome)))  # noqa: T201
    if failure is not None:
        raise SimulationFailed(f"{failure.checker}: {failure.text}")


def _print_story(console: Console, lines: list[str]) -> None:
    for line in lines[:LINES_SHOWN]:
        console.print(line, markup=False)
    if len(lines) > LINES_SHOWN:
        console.print(f"... and {len(lines) - LINES_SHOWN} lines more: --json has them all")


def _summary(outcome: Outcome, wall_s: float) -> dict[str, Any]:
    failure = outcome.failure
    return {
        "title": outcome.plan.title,
        "seed": outcome.plan.settings.seed,
        "devices": len(outcome.world.devices),
        "simulated_s": outcome.simulated_s,
        "wall_s": round(wall_s, 3),
        "events": outcome.num_events,
        "messages": outcome.num_messages,
        "settled_s": outcome.settled_s,
        "failure": None if failure is None else {"checker": failure.checker, "text": failure.text},
        "story": [{"at_s": round(at_s, 6), "who": who, "what": what} for at_s, who, what in outcome.story.lines],
    }


def _churn(churn: Churn, *, as_json: bool) -> None:
    if not as_json and churn.num_devices * churn.seconds > 5000:
        Console(stderr=True).print(f"[dim]{churn.num_devices} devices for {churn.seconds:g} simulated seconds ...[/]")
    begun_s = time.perf_counter()
    report, world = run_churn(churn)
    wall_s = time.perf_counter() - begun_s
    if as_json:
        figures = {**msgspec.structs.asdict(report), "seed": churn.seed, "wall_s": round(wall_s, 3)}
        print(msgspec.json.encode(figures).decode())  # noqa: T201
        return
    console = Console(highlight=False, soft_wrap=True)
    _print_story(console, [f"{at_s:9.3f}  {what}" for at_s, who, what in world.story.lines if not who][:40])
    changes = ", ".join(f"{count} x {kind}" for kind, count in sorted(report.changes.items())) or "none"
    console.print(
        f"\n{report.num_devices} devices, {report.seconds:g} simulated seconds in {wall_s:.1f} s: "
        f"{report.num_events} events, {report.num_messages} messages.\n"
        f"Changes: {changes}. Running at the end: {report.num_here}.\n"
        f"A device watched at most {report.most_watched} peers. That one was gone, the others knew after "
        f"{report.detect_s_p50:.2f} s (half of them), {report.detect_s_p99:.2f} s (99 of 100).\n"
        f"At the end {100 * report.beliefs_right:.3f} % of all beliefs about who is here were right."
    )

"""A fourth device joins three, one is killed, then all; with real processes, links and signals."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shoal.lab.linear_model import Linear
from shoal.lab.scenario import Cut, Heal
from shoal.lab.training_workload import Settings, Step, Training, durations
from shoal.runs import checkpoint as checkpoints
from shoal.training.samples import SampleOrder
from tests.lab.fixture import MakeLab, on_a_steady_host

pytestmark = [pytest.mark.slow, pytest.mark.full]

LAN_MBIT_S = 400.0
TO_JOINER_MBIT_S = {"a": 40.0, "b": 80.0, "c": 160.0}
NUM_PARAMETERS = 2_500_000
COMPUTE_S = 6.0
NUM_STEPS = 22


def joined(lab: MakeLab, folder: Path) -> tuple[Training, float]:
    """Three train, and a fourth has had its first step; when it was started."""
    links = [{"between": [one, other], "rate_mbit_s": LAN_MBIT_S} for one, other in (("a", "b"), ("b", "c"), ("a", "c"))]
    links += [{"between": [name, "d"], "rate_mbit_s": rate} for name, rate in TO_JOINER_MBIT_S.items()]
    training = Training(lab({"devices": {name: {} for name in "abcd"}, "links": links}))
    settings = Settings(NUM_PARAMETERS, NUM_STEPS, COMPUTE_S, members_min=3, folder=str(folder), checkpoint_every=4)
    training.start("a", settings)
    quiet = Settings(NUM_PARAMETERS, NUM_STEPS, COMPUTE_S, members_min=1)
    for name in "bc":
        training.start(name, quiet, peers=["a"])
    training.wait_step("a", 4, 60.0)
    started_s = training.steps("a")[-1].at_s
    training.start("d", quiet, peers=["b"])
    training.wait_step("d", 0, 40.0)
    return training, started_s


def check_bits_and_losses(steps: dict[str, list[Step]]) -> None:
    """After each step the same bits on all, and the loss of one process with the same global batch."""
    digests: dict[int, set[str]] = {}
    for each in (each for found in steps.values() for each in found):
        digests.setdefault(each.step, set()).add(each.digest)
    assert all(len(found) == 1 for found in digests.values())
    model, order = Linear(50, num_samples=2400), SampleOrder(0, 2400, 120)
    for done in steps["a"]:
        samples = order.samples(order.interval(done.step))
        loss, gradients = model.loss_and_gradients(samples)
        assert done.loss == pytest.approx(loss / len(samples), rel=1e-3)
        model.apply(np.concatenate([gradients / np.float32(len(samples)), model.buffers()]), step=done.step)


def check_samples(parts: list[list[int]]) -> None:
    """Exactly once in each pass, in order."""
    spans = [span for span in parts if span[0] != span[1]]
    passes = [0, *(index for index in range(1, len(spans)) if spans[index][0] == 0), len(spans)]
    for begin, stop in pairwise(passes):
        assert all(one[1] == other[0] for one, other in pairwise(spans[begin:stop]))


@pytest.mark.timeout(240)
def test_a_fourth_device_joins_and_the_others_hardly_notice(lab: MakeLab, tmp_path: Path) -> None:
    folders = iter(range(9))

    def attempt() -> None:
        training, started_s = joined(lab, tmp_path / str(next(folders)))
        first = training.steps("d")[0]
        for name in "abc":
            steps = training.steps(name)
            usual_s = statistics.median(durations(steps, until_s=started_s))
            # Its own first step waits for its slow links as well; that is another figure.
            before_s = next(step.at_s for step in steps if step.step == first.step - 1)
            assert max(durations(steps, after_s=started_s, until_s=before_s)) <= usual_s + 0.3
        for name in "abcd":
            training.kill(name)

    on_a_steady_host(attempt, attempts=3)


def test_one_is_killed_then_all_and_the_checkpoint_goes_on(lab: MakeLab, tmp_path: Path) -> None:
    training, _ = joined(lab, tmp_path / "a")
    first = training.steps("d")[0]
    training.wait_step("a", first.step + 2, 30.0)
    training.kill("c")
    step = training.steps("a")[-1].step
    training.wait_step("a", step + 2, 30.0)
    check_bits_and_losses({name: training.steps(name) for name in "abcd"})
    for name in "abd":
        training.kill(name)
    found = checkpoints.newest(tmp_path / "a")
    assert found is not None
    number = len(found[0].history)
    assert step - 5 < number <= step + 4
    training.start("a", Settings(NUM_PARAMETERS, NUM_STEPS, 1.0, members_min=2, folder=str(tmp_path / "a")))
    training.start("b", Settings(NUM_PARAMETERS, NUM_STEPS, 1.0, members_min=1), peers=["a"])
    wholes = [training.end(name, 60.0) for name in "ab"]
    assert wholes[0]["entries"] == wholes[1]["entries"]
    assert [entry[0] for entry in wholes[0]["entries"]] == list(range(NUM_STEPS))
    assert wholes[0]["digest"] == wholes[1]["digest"]
    check_samples(wholes[0]["samples"])


def test_who_is_cut_off_waits_and_comes_back_and_who_is_started_again_is_who_it_was(lab: MakeLab, tmp_path: Path) -> None:
    links = [{"between": [one, other], "rate_mbit_s": LAN_MBIT_S} for one, other in (("a", "b"), ("b", "c"), ("a", "c"))]
    opened = lab({"devices": {name: {} for name in "abc"}, "links": links})
    training = Training(opened)
    settings = {
        name: Settings(20_000, 90, 1.5, members_min=3 if name == "a" else 1, folder=str(tmp_path / name)) for name in "abc"
    }
    training.start("a", settings["a"])
    for name in "bc":
        training.start(name, settings[name], peers=["a"])
    training.wait_step("c", 3, 40.0)
    for other in "ab":
        opened.apply(Cut(between=("c", other)))
    step = training.steps("a")[-1].step
    training.wait_step("a", step + 5, 30.0)
    assert training.steps("c")[-1].step <= step + 1, "alone it applies nothing"
    for other in "ab":
        opened.apply(Heal(between=("c", other)))
    training.wait_step("c", step + 6, 30.0)
    # The first voter is lost while the others are in the middle of a step, and comes back without an address of anybody.
    before = training.steps("a")[-1].step
    training.kill("a")
    training.wait_step("b", before + 2, 30.0)
    training.start("a", settings["a"])
    wholes = {name: training.end(name, 90.0) for name in "abc"}
    assert {whole["digest"] for whole in wholes.values()} == {wholes["a"]["digest"]}
    assert wholes["a"]["entries"] == wholes["b"]["entries"] == wholes["c"]["entries"]
    assert [entry[0] for entry in wholes["a"]["entries"]] == list(range(90))
    check_samples(wholes["a"]["samples"])

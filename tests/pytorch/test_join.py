"""A model trained by several members is the model that one process trains; each as a member of the same process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import shoal.pytorch as sp
from shoal.errors import DeviceRefused
from shoal.pytorch.trainee import TorchTrainee
from shoal.runs.progress import draw, losses
from shoal.training.samples import SampleOrder

pytestmark = pytest.mark.slow
NUM_STEPS, GLOBAL_BATCH = 20, 16
X = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3].sum(1, keepdim=True) > 0).float()
DATA = torch.utils.data.TensorDataset(X, Y)
LOSS = torch.nn.BCEWithLogitsLoss(reduction="sum")
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def _own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of other tests on this machine have the same name."""
    monkeypatch.setenv("SHOAL_STATE", str(tmp_path / "state"))


def model_of() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))


def rate(step: int) -> float:
    return 0.02 / (1 + step)


class Script(threading.Thread):
    """A training script on a thread."""

    def __init__(self, optimizer: str, *, micro_batch: int | None = None, pause_s: float = 0.0, **options: object) -> None:
        super().__init__(daemon=True)
        self.model = model_of()
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.pause_s = pause_s
        self.run_ = sp.join(
            "test", model=self.model, optimizer=self.optimizer, dataset=DATA, global_batch=GLOBAL_BATCH, steps=NUM_STEPS,
            micro_batch=micro_batch, learning_rate=rate if optimizer == "adamw" else None, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        self.trainee = self.run_._trainee
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for batch in self.run_:
                time.sleep(self.pause_s)
                self.run_.step(LOSS(self.model(batch.x), batch.y), clip_norm=0.5)
        except Exception as error:
            self.error = error

    def end(self) -> None:
        self.join(40.0)
        assert not self.is_alive(), self.run_.run.statistics()
        assert self.error is None, self.error


def alone(optimizer: str) -> tuple[list[float], torch.nn.Module]:
    """Plain PyTorch, one process, the same global batch."""
    model = model_of()
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    order, found = SampleOrder(0, len(DATA), GLOBAL_BATCH), []
    for step in range(NUM_STEPS):
        samples = order.samples(order.interval(step))
        loss = LOSS(model(X[samples]), Y[samples]) / len(samples)
        made.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if optimizer == "adamw":
            made.param_groups[0]["lr"] = rate(step)
        made.step()
        found.append(float(loss.detach()))
    return found, model


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.full), "adamw"])
def test_the_same_losses_and_weights_as_one_process(optimizer: str, tmp_path: Path) -> None:
    founder = Script(optimizer, devices=2, folder=tmp_path)
    other = Script(optimizer, peers=[founder.run_.run.address], micro_batch=3)
    for script in (founder, other):
        script.start()
    for script in (founder, other):
        script.end()
    expected, model = alone(optimizer)
    np.testing.assert_allclose([done.loss for done in founder.run_.losses], expected, rtol=1e-4)
    assert founder.trainee.digest() == other.trainee.digest()
    for found, wanted in zip(founder.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    entries = founder.run_.run.entries
    assert [entry.step for entry in entries] == list(range(NUM_STEPS))
    assert entries[-1].digest == founder.trainee.digest()
    np.testing.assert_allclose(list(losses(tmp_path).values()), expected, rtol=1e-4)
    picture = draw(tmp_path, "test")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_joiner_replays_to_the_same_bits_and_a_checkpoint_goes_on(tmp_path: Path) -> None:
    founder = Script("adamw", folder=tmp_path, checkpoint_every=4, pause_s=0.06)
    founder.start()
    while founder.run_.run._core.applied < 3:
        time.sleep(0.02)
    other = Script("adamw", peers=[founder.run_.run.address])
    other.start()
    for script in (founder, other):
        script.end()
    assert founder.trainee.digest() == other.trainee.digest()
    assert 0 < len(other.run_.losses) < NUM_STEPS - 3
    # What was written before the end, taken up by one process.
    earlier = sorted(tmp_path.glob("step-*.safetensors"))[0]
    number = int(earlier.stem.removeprefix("step-"))
    assert number in (12, 16)
    for later in sorted(tmp_path.glob("step-*.safetensors"))[1:]:
        later.unlink()
    again = Script("adamw", folder=tmp_path)
    again.start()
    again.end()
    assert again.run_.losses[0].step == number
    np.testing.assert_allclose([done.loss for done in again.run_.losses], alone("adamw")[0][number:], rtol=1e-3)
    with safe_open(earlier, "pt") as file:
        assert {"parameter/0.weight", "optimizer/2.bias/exp_avg"} <= set(file.keys())
        assert len(json.loads(file.metadata()["shoal"])["history"]) == number


def test_what_does_not_fit_is_said_before_anything_is_changed() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="the optimiser is Adagrad: one of SGD, Adam, AdamW"):
        TorchTrainee(model, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(ValueError, match="other parameters"):
        TorchTrainee(model, torch.optim.SGD(list(model.parameters())[1:], lr=0.1))
    one = TorchTrainee(model, torch.optim.SGD(model.parameters(), lr=0.1))
    wider = torch.nn.Sequential(torch.nn.Linear(12, 25), torch.nn.Tanh(), torch.nn.Linear(25, 1))
    other = TorchTrainee(wider, torch.optim.SGD(wider.parameters(), lr=0.1))
    fused = TorchTrainee(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    assert len({one.fingerprint, other.fingerprint, fused.fingerprint}) == 3
    with pytest.raises(DeviceRefused, match="not as here"):
        other.load(*one.state())
    with pytest.raises(DeviceRefused, match="does not fit"):
        one.load(np.zeros(50, np.uint8), {})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_that_travelled_goes_on_bit_by_bit(optimizer: str) -> None:
    first, second = (
        TorchTrainee(model, OPTIMIZERS[optimizer](list(model.parameters()))) for model in (model_of(), model_of())
    )
    rng = np.random.default_rng(2)
    gradients = [rng.standard_normal(first.num_gradients, np.float32) for _ in range(20)]
    for step in range(10):
        first.apply(gradients[step], step=step)
    second.load(*first.state())
    for step in range(10, 20):
        first.apply(gradients[step], step=step)
        second.apply(gradients[step], step=step)
        assert first.digest() == second.digest()

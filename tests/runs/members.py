"""Members of one run in one process, each on a thread, with a linear model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shoal.exchange.runner import FloatArray
from shoal.lab.linear_model import Linear
from shoal.runs.run import Run, StepDone
from shoal.runs.trust import Trust
from shoal.training.samples import SampleOrder

NUM_SAMPLES, GLOBAL_BATCH = 100, 12


class Member:
    """One member on a thread."""

    def __init__(
        self,
        *,
        peers: tuple[str, ...] = (),
        num_steps: int = 30,
        members_min: int = 1,
        folder: Path | None = None,
        compute_s: float = 0.0,
        padding: int = 0,
        checkpoint_every: int = 5,
        clip_norm: float | None = 5.0,
        order: SampleOrder | None = None,
        trust: Trust | None = None,
        name: str = "test",
        listen: str = "127.0.0.1:0",
    ) -> None:
        self.trainee = Linear(padding=padding)
        self.compute_s, self.clip_norm = compute_s, clip_norm
        self.order = order or SampleOrder(3, NUM_SAMPLES, GLOBAL_BATCH)
        self.run = Run(
            name, self.trainee, self.order, num_steps=num_steps, peers=peers, members_min=members_min, folder=folder,
            checkpoint_every=checkpoint_every, trust=trust, listen=listen,
        )  # fmt: skip
        self.done: list[StepDone] = []
        self.digests: dict[int, str] = {}
        self.num_redone = self.num_computed = 0
        self.error: Exception | None = None
        self.is_crashed = False
        self.run.on_step = self._note
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            while (task := self.run.next_task()) is not None:
                time.sleep(self.compute_s * len(task.part) / GLOBAL_BATCH)
                self.num_computed += 1
                loss, gradients = self.trainee.loss_and_gradients(self.order.samples(task.part))
                done = self.run.contribute(task, gradients, loss_sum=loss, clip_norm=self.clip_norm)
                self.num_redone += done is None
            if not self.is_crashed:
                self.run.close()
        except Exception as error:
            self.error = error
            self.run.close()

    def _note(self, done: StepDone) -> None:
        self.done.append(done)
        self.digests[done.step] = self.trainee.digest()

    def crash(self) -> None:
        """As if the process were killed: its connections close, and nothing else is said."""
        self.is_crashed = True
        self.run._shut(is_orderly=False)
        self.thread.join(5.0)

    def wait_step(self, step: int, seconds: float = 20.0) -> None:
        wait(lambda: self.run._core.applied >= step or self.error is not None, seconds)
        assert self.error is None, self.error

    def end(self, seconds: float = 30.0) -> None:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"{self.run.statistics()}"
        assert self.error is None, self.error


def wait(until: Callable[[], bool], seconds: float = 20.0) -> None:
    give_up_s = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < give_up_s, f"not within {seconds} s"
        time.sleep(0.01)


def alone(num_steps: int, clip_norm: float | None = 5.0) -> tuple[list[float], FloatArray]:
    """Losses and weights of one process with the same global batch."""
    trainee, order = Linear(), SampleOrder(3, NUM_SAMPLES, GLOBAL_BATCH)
    losses = []
    for step in range(num_steps):
        samples = order.samples(order.interval(step))
        loss, gradients = trainee.loss_and_gradients(samples)
        losses.append(loss / len(samples))
        mean = gradients / np.float32(len(samples))
        norm = float(np.linalg.norm(mean))
        if clip_norm is not None:
            mean *= np.float32(min(1.0, clip_norm / (norm + 1e-6)))
        trainee.apply(np.concatenate([mean, trainee.buffers()]), step=step)
    return losses, trainee.w

"""`join`: takes a script into a run, or founds it, and hands out this device's share of every step.

    run = sp.join("digits", model=model, optimizer=optimizer, dataset=dataset, global_batch=256)
    for batch in run:                                  # this member's share of the next step
        loss = loss_fn(model(batch.x), batch.y)        # summed over the share
        run.step(loss, clip_norm=1.0)                  # backward, synchronise, commit; or the share is handed out anew

What is left to the command line is in the environment: `shoal train` sets SHOAL_LISTEN, SHOAL_PEERS, SHOAL_FOLDER,
SHOAL_TRUST and SHOAL_DEVICES, and the arguments of `join` overrule it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import default_collate

from shoal.errors import DeviceRefused, ShoalError
from shoal.pytorch.trainee import TorchTrainee
from shoal.runs.progress import Progress
from shoal.runs.registry import Registered, ask, entries
from shoal.runs.run import Run, StepDone, Task
from shoal.runs.trust import Trust, check_plain
from shoal.runs.votes import FILE
from shoal.runtime.node.link_news import LinkNews
from shoal.runtime.node.state import runs_from
from shoal.training.samples import Interval, SampleOrder


class Dataset(Protocol):
    """Any map-style data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Batch(NamedTuple):
    """Some samples of one step: `x` and, where samples are pairs, `y`, collated; and which samples they are."""

    x: Any
    y: Any
    step: int
    samples: list[int]


class TrainingRun:
    """A run on this device; made by `join`."""

    def __init__(
        self,
        run: Run,
        trainee: TorchTrainee,
        dataset: Dataset,
        *,
        seed: int,
        collate: Callable[[list[Any]], Any],
        micro_batch: int | None,
        progress: Progress,
        trust: Path | None,
        news: LinkNews | None,
    ) -> None:
        self._run, self._trainee, self._dataset = run, trainee, dataset
        self._seed, self._collate, self._micro_batch = seed, collate, micro_batch
        self._progress, self._trust, self._news = progress, trust, news
        self._task: Task | None = None
        self._left = 0
        self._loss_sum = 0.0
        self._device = next(iter(trainee.devices), torch.device("cpu"))

    def __iter__(self) -> Iterator[Batch]:
        """Shares, until the run has all its steps or this device has left."""
        trust = str(self._trust) if self._trust is not None else None
        registered = Registered(self._run.name, self._run.me, self._run.address, trust=trust)
        restore = _leave_on_signals(self._run)
        try:
            while (task := self._run.next_task()) is not None:
                self._trainee.zero_gradients()
                self._task, self._loss_sum = task, 0.0
                pieces = _pieces(task.part, self._micro_batch)
                self._left = len(pieces)
                for piece in pieces:
                    if self._task is not task:
                        break
                    yield self._batch(task, piece)
                    if self._task is task and self._left == len(pieces):
                        raise RuntimeError("a batch was handed out and run.step(loss) was not called for it")
        finally:
            restore()
            self._run.close()
            if self._news is not None:
                self._news.close()
            registered.close()
            self._progress.close(is_finished=self._run.is_finished)

    def step(self, loss: torch.Tensor, *, clip_norm: float | None = None) -> bool:
        """Backward; with the last batch of a share, synchronise and apply.

        Args:
            loss: summed, not averaged, over the batch.
            clip_norm: greatest norm of the mean gradient; the same on all devices.

        Returns:
            Whether the step was applied. False: it will be handed out again, or more batches of the share follow.
        """
        task = self._task
        if task is None:
            raise RuntimeError("run.step(loss) belongs to a batch of `for batch in run`")
        loss.backward()  # type: ignore[no-untyped-call]
        self._loss_sum += float(loss.detach())
        self._left -= 1
        if self._left:
            return False
        done = self._run.contribute(task, self._trainee.gradients(), loss_sum=self._loss_sum, clip_norm=clip_norm)
        self._task = None
        return done is not None

    @property
    def run(self) -> Run:
        """What drives it: members, ledger, statistics."""
        return self._run

    @property
    def losses(self) -> list[StepDone]:
        """Of the steps this device applied."""
        return self._progress.done

    def leave(self) -> None:
        """At the next step boundary; the loop ends then."""
        self._run.leave()

    def _batch(self, task: Task, piece: Interval) -> Batch:
        samples = self._run.settings.order.samples(piece)
        rows = []
        for sample in samples:
            # Augmentation depends on the sample and the pass alone, whoever computes it.
            _seed(self._seed, piece.data_epoch, sample)
            rows.append(self._dataset[sample])
        # Dropout depends on the step and on which samples these are.
        _seed(self._seed, task.step, piece.first)
        if self._device.type != "cpu":
            torch.manual_seed(random.getrandbits(63))
        data = _to(self._collate(rows), self._device)
        x, y = data if isinstance(data, tuple | list) and len(data) == 2 else (data, None)
        return Batch(x, y, task.step, samples)


def join(
    name: str,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    global_batch: int,
    passes: int = 1,
    steps: int | None = None,
    seed: int = 0,
    learning_rate: Callable[[int], float] | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    micro_batch: int | None = None,
    listen: str | None = None,
    peers: Sequence[str] | None = None,
    folder: str | Path | None = None,
    checkpoint_every: int = 50,
    devices: int | None = None,
    trust: Path | None = None,
) -> TrainingRun:
    """Joins the run `name`, or founds it where no peer is given.

    Args:
        model, optimizer: the same on every device; SGD, Adam or AdamW. A founder's state counts.
        dataset: map-style, the same on every device.
        global_batch: samples per step, split among the members by their measured speed.
        passes, steps: how long: so many times through the data, or so many steps.
        seed: of the order of samples, augmentation and dropout.
        learning_rate: of each step; see `TorchTrainee`.
        micro_batch: shares are handed out in pieces of so many samples, where memory is short.
        listen, peers, folder: see `shoal.runs.run.Run`; from the environment if None.
        devices: the first step waits for so many.
        trust: a file of `shoal.runs.trust.Trust.write`; from the environment if None. Without one, links prove nothing,
            and the address must be this machine's own.

    Raises:
        ValueError: the arguments do not fit each other.
        ShoalError: no peer answers, or the run is another.
    """
    if "SHOAL_DEVICES" in os.environ:
        sys.excepthook = _tell_in_one_line  # the script is run by `shoal train`
    order = SampleOrder(seed, len(dataset), global_batch)
    num_steps = steps if steps is not None else passes * -(-len(dataset) // global_batch)
    if num_steps < 1 or (micro_batch is not None and micro_batch < 1):
        raise ValueError(f"{num_steps} steps with pieces of {micro_batch} samples: both are at least 1")
    trainee = TorchTrainee(model, optimizer, learning_rate)
    chosen = peers if peers is not None else os.environ.get("SHOAL_PEERS", "").split(",")
    place = folder if folder is not None else os.environ.get("SHOAL_FOLDER")
    file = trust or (Path(os.environ["SHOAL_TRUST"]) if os.environ.get("SHOAL_TRUST") else None)
    others = tuple(peer for peer in chosen if peer)
    if not others and not (place and (Path(place) / FILE).exists()):
        _check_name_is_free(name)  # who comes back is awaited under that name
    address = listen or os.environ.get("SHOAL_LISTEN") or "127.0.0.1:0"
    if file is None:
        check_plain(address)
    num_wanted = devices or int(os.environ.get("SHOAL_DEVICES") or 1)
    proven = Trust.read(file) if file is not None else None
    run = Run(
        name,
        trainee,
        order,
        num_steps=num_steps,
        listen=address,
        peers=others,
        folder=Path(place) if place else None,
        checkpoint_every=checkpoint_every,
        members_min=num_wanted,
        trust=proven,
    )
    news = None
    if proven is not None and proven.folder is not None and runs_from(proven.folder):
        news = LinkNews(proven.folder, proven.device)
        run.rates.on_observed = news.observe
    progress = Progress(name, num_steps=num_steps, folder=run.folder)
    progress.begin(run, num_wanted=num_wanted)
    run.on_step = progress.show
    return TrainingRun(
        run,
        trainee,
        dataset,
        seed=seed,
        collate=collate,
        micro_batch=micro_batch,
        progress=progress,
        trust=file,
        news=news,
    )


def _tell_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a run says is for its user; what goes wrong in the script is for who wrote that."""
    if isinstance(error, ShoalError):
        sys.stderr.write(f"shoal: {error}\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _check_name_is_free(name: str) -> None:
    """`shoal leave` and `shoal runs` tell runs by name. Raises DeviceRefused."""
    for entry in entries():
        if entry.run == name and (ask(entry, "status") or {}).get("members"):
            raise DeviceRefused(
                f"a run '{name}' is under way on this device: take part in it with --peer {entry.address}, "
                f"end it with `shoal leave {name}`, or give this one another name"
            )


def _pieces(part: Interval, size: int | None) -> list[Interval]:
    size = size or len(part)
    return [Interval(part.data_epoch, first, min(first + size, part.stop)) for first in range(part.first, part.stop, size)]


def _seed(*numbers: int) -> None:
    """Python's and torch's chance on the processor, where samples are made.

    Not `torch.manual_seed`: for every kind of device that is not in use yet, that keeps the call and its stack for later.
    """
    mixed = random.Random(repr(numbers)).getrandbits(63)
    random.seed(mixed)
    torch.default_generator.manual_seed(mixed)


def _to(data: Any, device: torch.device) -> Any:
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, tuple | list):
        return type(data)(_to(each, device) for each in data)
    if isinstance(data, dict):
        return {key: _to(each, device) for key, each in data.items()}
    return data


def _leave_on_signals(run: Run) -> Callable[[], None]:
    """The first Ctrl-C or SIGTERM leaves at a step boundary, the next one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before: dict[int, Any] = {}

    def leave(number: int, _: object) -> None:
        signal.signal(number, before.get(number) or signal.SIG_DFL)
        threading.Thread(target=run.leave, daemon=True).start()  # a handler may not wait for locks

    def restore() -> None:
        for number, handler in before.items():
            with suppress(ValueError):
                signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, leave)
    return restore

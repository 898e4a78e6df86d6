"""How far a run is, in the terminal and on disk: a line of figures, a file of losses, a picture of them."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from shoal.errors import CannotWrite
from shoal.runs.run import StepDone
from shoal.units import format_seconds

LINE_EVERY_S = 10.0
LOSSES = "losses.jsonl"
PICTURE = "loss.png"


class Progress:
    """Shows steps as they are applied: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, *, num_steps: int, folder: Path | None) -> None:
        self.done: list[StepDone] = []
        self._name, self._num_steps, self._folder = name, num_steps, folder
        self._is_terminal = sys.stderr.isatty()
        self._shown_s = 0.0
        self._file = None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = (folder / LOSSES).open("a", encoding="utf-8")
            except OSError as error:
                raise CannotWrite(f"{folder} cannot be written to: {error.strerror}") from error

    def show(self, done: StepDone) -> None:
        self.done.append(done)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(json.dumps({"step": done.step, "loss": done.loss, "seconds": done.step_s}) + "\n")
                self._file.flush()
        now_s = time.monotonic()
        if self._is_terminal or now_s - self._shown_s >= LINE_EVERY_S or done.step + 1 == self._num_steps:
            self._shown_s = now_s
            sys.stderr.write(
                ("\r\033[K" if self._is_terminal else "") + self.line(done) + ("" if self._is_terminal else "\n")
            )
            sys.stderr.flush()

    def line(self, done: StepDone) -> str:
        recent = self.done[-20:]
        step_s = sum(each.step_s for each in recent) / len(recent)
        left_s = step_s * (self._num_steps - done.step - 1)
        devices = f"{done.num_members} device{'s' if done.num_members > 1 else ''}"
        return (
            f"{self._name}: step {done.step + 1}/{self._num_steps}, loss {done.loss:.4f}, {devices}, "
            f"{format_seconds(step_s)} a step ({format_seconds(done.exchange_s)} of it to synchronise), "
            f"{format_seconds(left_s)} left"
        )

    def close(self, *, is_finished: bool) -> None:
        if self._is_terminal and self.done:
            sys.stderr.write("\n")
        if self._file is None or self._folder is None:
            return
        self._file.close()
        path = draw(self._folder, self._name)
        if path is not None and is_finished:
            sys.stderr.write(f"{self._name}: done. The loss is drawn in {path}\n")


def losses(folder: Path) -> dict[int, float]:
    """Of every step in the folder's file; a step that was done again counts as it was last."""
    found: dict[int, float] = {}
    with contextlib.suppress(OSError):
        for line in (folder / LOSSES).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                found[int(row["step"])] = float(row["loss"])
    return dict(sorted(found.items()))


def draw(folder: Path, name: str) -> Path | None:
    """A picture of the losses; None where there is nothing to draw, or no matplotlib to draw with."""
    found = losses(folder)
    if not found:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([step + 1 for step in found], list(found.values()), linewidth=1.0)
    axes.set(title=name, xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    path = folder / PICTURE
    figure.savefig(path, dpi=120)
    return path

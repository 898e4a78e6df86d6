"""How far a run is, in the terminal and on disk: a line of figures, a file of losses, a picture of them."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

from shoal.errors import CannotWrite
from shoal.runs.run import Run, StepDone
from shoal.units import format_seconds

LINE_EVERY_S = 10.0
LOSSES = "losses.jsonl"
PICTURE = "loss.png"
_RECENT_STEPS = 20


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
            if self._is_terminal:
                # A line that is broken by the terminal's edge cannot be written over.
                sys.stderr.write("\r\033[K" + self.line(done)[: shutil.get_terminal_size().columns - 1])
            else:
                sys.stderr.write(self.line(done) + "\n")
            sys.stderr.flush()

    def line(self, done: StepDone) -> str:
        """Times are medians of the last steps: one that waited for a quorum is no usual one.

        The first one of this device waited for others, and tells nothing of them.
        """
        devices = f"{done.num_members} device{'s' if done.num_members > 1 else ''}"
        line = f"{self._name}: step {done.step + 1}/{self._num_steps}, loss {done.loss:.4f}, {devices}"
        recent = self.done[1:][-_RECENT_STEPS:]
        if not recent:
            return line
        step_s = statistics.median(each.step_s for each in recent)
        exchange_s = statistics.median(each.exchange_s for each in recent)
        line += f", {format_seconds(step_s)} a step ({format_seconds(exchange_s)} of it to synchronise)"
        left = self._num_steps - done.step - 1
        return line + (f", {format_seconds(step_s * left)} left" if left else "")

    def begin(self, run: Run, *, num_wanted: int) -> None:
        """Says where it can be joined, how many devices it waits for, and where it goes on if it has steps already."""
        num_done = run.num_restored
        if run.peers:
            self._say(f"joins by {', '.join(run.peers)}")
        elif num_done < self._num_steps:
            when = f"begins when {num_wanted} devices are there; " if num_wanted > 1 else ""
            self._say(f"{when}others join with --peer {run.address}")
        if num_done >= self._num_steps:
            self._say(f"all {self._num_steps} steps are done already: take another folder, or more steps")
        elif num_done:
            self._say(f"goes on after step {num_done}/{self._num_steps}, from the checkpoint in {self._folder}")

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{self._name}: {text}\n")

    def close(self, *, is_finished: bool) -> None:
        if self._is_terminal and self.done:
            sys.stderr.write("\n")
        if not is_finished and self.done:
            self._say(f"this device has left after step {self.done[-1].step + 1}/{self._num_steps}")
        if self._file is None or self._folder is None:
            return
        self._file.close()
        path = draw(self._folder, self._name)
        if path is not None and is_finished:
            self._say(f"done. The loss is drawn in {path}")


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

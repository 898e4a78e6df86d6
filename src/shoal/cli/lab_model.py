"""`shoal lab model`: a model file of a well-known shape with random weights, for trying what a model of its size costs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shoal.errors import CannotWrite
from shoal.lab.random_model import count_parameters, write_random_model
from shoal.lab.shapes import find_shape
from shoal.units import format_bytes, format_seconds


def model(
    path: Path,
    *,
    like: str,
    layers: int | None,
    quant: str,
    seed: int,
    vocabulary: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Writes the file, shows how far it is, and prints what it wrote.

    Raises:
        ValueError: no such shape or type, or too small a vocabulary.
        CannotWrite: no room, no such folder, or a file is there already.
    """
    shape = find_shape(like)
    shape = msgspec.structs.replace(shape, num_layers=layers or shape.num_layers, vocab_size=vocabulary or shape.vocab_size)
    if path.is_dir():
        raise CannotWrite(f"{path} is a folder: name a file in it, such as {path / f'{like}.gguf'}")
    if path.exists() and not force:
        raise CannotWrite(f"{path} exists: --force replaces it")
    started_s = time.perf_counter()
    with _progress_bar(path.name) as on_progress:
        size_bytes = write_random_model(
            path, shape, quantisation=quant.upper(), seed=seed, durable=True, on_progress=on_progress
        )
    elapsed_s = time.perf_counter() - started_s
    num_parameters = count_parameters(shape)
    if as_json:
        facts = {
            "path": str(path),
            "like": like.lower(),
            "layers": shape.num_layers,
            "quantisation": quant.upper(),
            "vocabulary": shape.vocab_size,
            "seed": seed,
            "parameters": num_parameters,
            "bytes": size_bytes,
            "seconds": round(elapsed_s, 3),
        }
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    sys.stdout.write(
        f"{path}: {like.lower()}, {shape.num_layers} layers, {quant.upper()}, {num_parameters / 1e9:.2f} G parameters, "
        f"{format_bytes(size_bytes)} in {format_seconds(elapsed_s)} ({format_bytes(size_bytes / elapsed_s)}/s)\n"
    )


@contextlib.contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's standard error, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(name, total=None)

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)
            if done_bytes == total_bytes:
                bar.update(task, description=f"{name}: waiting for the disk")

        yield show

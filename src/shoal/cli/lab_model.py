"""`shoal lab model`: a model file of a well-known shape with random weights, for trying what a model of its size costs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shoal.errors import CannotWrite
from shoal.lab.random_model import count_parameters, write_random_model
from shoal.lab.requantise import requantise
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
    """Writes a random model, shows how far it is, and prints what it wrote.

    Raises:
        ValueError: no such shape or type, or too small a vocabulary.
        CannotWrite: no room, no such folder, or a file is there already.
    """
    shape = find_shape(like)
    shape = msgspec.structs.replace(shape, num_layers=layers or shape.num_layers, vocab_size=vocabulary or shape.vocab_size)
    _check_target(path, like, force=force)
    started_s = time.perf_counter()
    with _progress_bar(path.name) as on_progress:
        size_bytes = write_random_model(
            path, shape, quantisation=quant.upper(), seed=seed, durable=True, on_progress=on_progress
        )
    facts = {
        "path": str(path),
        "like": like.lower(),
        "layers": shape.num_layers,
        "quantisation": quant.upper(),
        "vocabulary": shape.vocab_size,
        "seed": seed,
        "parameters": count_parameters(shape),
    }
    what = f"{like.lower()}, {shape.num_layers} layers, {quant.upper()}, {count_parameters(shape) / 1e9:.2f} G parameters"
    _report(facts, f"{path}: {what}", size_bytes, time.perf_counter() - started_s, as_json=as_json)


def rewrite(source: Path, path: Path, *, quant: str, force: bool, as_json: bool) -> None:
    """Writes a real model's weights in another type.

    Raises:
        ValueError: no such type.
        ModelNotFound: no such source.
        BadModelFile, UnsupportedModel: the source is damaged, or its rows do not fit the type.
        CannotWrite: no room, no such folder, or a file is there already.
    """
    _check_target(path, source.stem, force=force)
    if path.exists() and path.samefile(source):
        raise CannotWrite(f"{path} is the source itself: name another file")
    started_s = time.perf_counter()
    with _progress_bar(path.name) as on_progress:
        size_bytes = requantise(source, path, quant.upper(), on_progress=on_progress)
    facts = {"path": str(path), "source": str(source), "quantisation": quant.upper()}
    what = f"{path}: {source.name} as {quant.upper()}"
    _report(facts, what, size_bytes, time.perf_counter() - started_s, as_json=as_json)


def _check_target(path: Path, name: str, *, force: bool) -> None:
    if path.is_dir():
        raise CannotWrite(f"{path} is a folder: name a file in it, such as {path / f'{name}.gguf'}")
    if path.exists() and not force:
        raise CannotWrite(f"{path} exists: --force replaces it")


def _report(facts: dict[str, Any], text: str, size_bytes: int, elapsed_s: float, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({**facts, "bytes": size_bytes, "seconds": round(elapsed_s, 3)}) + "\n")
        return
    rate = format_bytes(size_bytes / elapsed_s)
    sys.stdout.write(f"{text}, {format_bytes(size_bytes)} in {format_seconds(elapsed_s)} ({rate}/s)\n")


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

"""Streamed weights give the bits of resident ones, read no more than they must, and fail in words."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.compute.backend import Backend
from shoal.compute.model import Model, matrix_names
from shoal.compute.stage import Stage
from shoal.compute.streaming import BLOCK_BYTES, Streaming, UncachedFile, room_bytes, row_runs, steady_rate
from shoal.errors import BadModelFile
from shoal.ids import LayerRange

TinyModel = Callable[[str, str], Path]
IDS = np.random.default_rng(5).integers(0, 500, 40).tolist()


@contextmanager
def opened(
    path: Path, streaming: Streaming | None, *, windows: list[LayerRange] | None = None, repack: bool = False
) -> Iterator[Stage]:
    model, backend = Model(path), Backend(num_threads=1)
    layers = LayerRange(0, model.shape.num_layers)
    stage = Stage(
        model, windows or [layers], backend, context=64, micro_batch=16, head=True, repack=repack, streaming=streaming
    )
    try:
        yield stage
    finally:
        stage.close()
        backend.close()
        model.close()


def logits(stage: Stage) -> Any:
    """A prompt in micro-batches, of which only the last wants an output, then single tokens."""
    rows = [stage.forward_tokens(IDS[first : first + 16], first, num_outputs=int(first == 16)).copy() for first in (0, 16)]
    rows += [stage.forward_tokens([IDS[position]], position).copy() for position in range(32, 40)]
    return np.concatenate([row.reshape(-1) for row in rows])


def all_runs(path: Path) -> list[str]:
    model = Model(path)
    (names,) = matrix_names(model, [LayerRange(0, model.shape.num_layers)], head=True)
    runs = [run.name for name in names for run in row_runs(model.file.tensors[name])]
    model.close()
    return runs


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = row_runs.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "bytes_max", 24 * 1024)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_streamed_and_resident_weights_give_the_same_bits(tiny_model: TinyModel, architecture: str, every: int) -> None:
    path = tiny_model(architecture, "Q4_0")
    with opened(path, None) as stage:
        expected = logits(stage)
    for ring_bytes in (64 * 1024, 300 * 1024):
        with opened(path, Streaming(frozenset(all_runs(path)[::every]), ring_bytes)) as stage:
            assert np.array_equal(logits(stage), expected)


def test_what_is_streamed_may_change_in_the_middle(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", "Q4_0")
    runs = all_runs(path)
    with opened(path, None) as stage:
        stage.forward_tokens(IDS[:16], 0)
        expected = [stage.forward_tokens([IDS[position]], position).copy() for position in range(16, 22)]
    with opened(path, Streaming(frozenset(runs[::5]), 64 * 1024)) as stage:
        stage.forward_tokens(IDS[:16], 0)
        for position, names in enumerate([runs, runs[::2], runs[:1], runs[1::3], runs, runs[::5]], start=16):
            stage.stream_anew(Streaming(frozenset(names), 128 * 1024))
            assert np.array_equal(stage.forward_tokens([IDS[position]], position), expected[position - 16])
            assert stage.missing_bytes() == 0


def test_copies_are_given_up_and_made_again(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", "Q4_0")
    streaming = Streaming(frozenset(all_runs(path)[::3]), 64 * 1024)
    with opened(path, streaming) as stage:
        streamed = logits(stage)
    with opened(path, None, repack=True) as stage:
        copied, copied_bytes = logits(stage), stage.weights.copied_bytes
        for _ in range(2):
            stage.stream_anew(streaming)
            assert stage.weights.copied_bytes == 0
            assert np.array_equal(logits(stage), streamed)
            stage.stream_anew(None)
            assert stage.streamed is None
            assert stage.weights.copied_bytes == copied_bytes
            assert np.array_equal(logits(stage), copied)


def test_each_token_reads_the_streamed_bytes_once(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", "Q8_0")
    with opened(path, Streaming(frozenset(all_runs(path)), 128 * 1024)) as stage:
        assert stage.streamed is not None
        per_token = sum(stage.streamed.num_bytes(name) for name in stage.streamed.names)
        logits(stage)
        passes = 2 + 8
        assert passes * per_token <= stage.streamed.bytes_read <= passes * per_token + stage.streamed.ring_bytes


def test_runs_of_rows_cover_a_matrix(tiny_model: TinyModel) -> None:
    model = Model(tiny_model("llama", "Q4_0"))
    for name in matrix_names(model, [LayerRange(0, model.shape.num_layers)], head=True)[0]:
        info = model.file.tensors[name]
        runs = row_runs(info)
        assert runs[0].offset == info.offset
        assert sum(run.num_bytes for run in runs) == info.num_bytes
        assert sum(run.shape[1] for run in runs) == info.shape[1]
        assert all(a.offset + a.num_bytes == b.offset for a, b in itertools.pairwise(runs))
        assert all(room_bytes(run) % BLOCK_BYTES == 0 for run in runs)
    model.close()


def test_a_file_that_shrinks_is_an_error_not_a_crash(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama", "Q4_0")
    path = tmp_path / "shrinking.gguf"
    path.write_bytes(source.read_bytes())
    runs = all_runs(path)
    with opened(path, Streaming(frozenset(runs), 64 * 1024)) as stage:
        stage.forward_tokens(IDS[:4], 0)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(BadModelFile, match=r"shrinking.gguf: reading at byte \d+ failed: the file ends at byte \d+"):
            logits(stage)  # what the ring holds already is used first


def test_a_ring_too_small_is_refused(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", "Q4_0")
    too_small = opened(path, Streaming(frozenset(all_runs(path)), 8192))
    with pytest.raises(ValueError, match=r"a ring of 8192 bytes cannot hold"):
        too_small.__enter__()


@pytest.mark.parametrize("has_preadv", [True, False])
def test_where_direct_reads_are_refused_others_serve(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, has_preadv: bool
) -> None:
    path = tiny_model("llama", "Q4_0")
    with opened(path, None) as stage:
        expected = logits(stage)
    real_open = os.open

    def refuse_direct(path: Any, flags: int, *rest: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_direct)
    if not has_preadv:
        monkeypatch.delattr(os, "preadv")
    file = UncachedFile(path)
    assert file.mode in ("nocache", "dontneed")
    file.close()
    with opened(path, Streaming(frozenset(all_runs(path)), 128 * 1024)) as stage:
        assert np.array_equal(logits(stage), expected)


def test_what_has_not_been_used_yet_is_not_lost(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [LayerRange(0, 1), LayerRange(1, 2), LayerRange(2, 3)]
    with opened(tiny_model("llama", "Q4_0"), None, windows=windows) as stage:
        monkeypatch.setattr(stage.model.file, "missing_bytes", lambda _: 4096)
        hidden = np.zeros((1, stage.model.shape.hidden_size), np.float32)
        for window in range(3):
            assert stage.missing_bytes() == 0
            stage.forward(hidden, 0, window=window)
        assert stage.missing_bytes() == 4096


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is in memory")
@pytest.mark.parametrize("is_short", [False, True])
def test_what_stays_is_brought_in_before_it_is_used(tiny_model: TinyModel, *, is_short: bool) -> None:
    path = tiny_model("llama", "Q4_0")
    with opened(path, None) as stage, path.open("rb") as file:
        os.fsync(file.fileno())  # dirty pages cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        model_file, mapped = stage.model.file, stage.weights.mapped
        if not model_file.missing_bytes(mapped):
            pytest.skip("this file system keeps every page")
        stage.bring_in(is_short=is_short)
        give_up_s = time.monotonic() + 10
        while model_file.missing_bytes(mapped) and time.monotonic() < give_up_s:
            time.sleep(0.01)
        assert model_file.missing_bytes(mapped) == 0
        found = logits(stage)
    with opened(path, None) as stage:
        assert np.array_equal(logits(stage), found)


def test_an_output_projection_that_only_embeddings_pass_by_is_not_lost(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tiny_model("llama", "Q4_0"), None) as stage:
        total_bytes, output_bytes = stage.weights.mapped_bytes, stage.model.output_bytes
        monkeypatch.setattr(stage.model.file, "missing_bytes", lambda infos: sum(info.num_bytes for info in infos))
        hidden = np.zeros((1, stage.model.shape.hidden_size), np.float32)
        stage.forward(hidden, 0, wants_hidden=True)
        assert stage.missing_bytes() == total_bytes - output_bytes
        stage.forward(hidden, 0)
        assert stage.missing_bytes() == total_bytes


@pytest.mark.parametrize("phase_s", [0.0, 0.03, 0.06, 0.09])
def test_a_disk_that_serves_in_lumps_has_its_own_rate(phase_s: float) -> None:
    """70 MB/s in slices of 0.1 s, after two slices' worth at once; bytes by seconds say up to a third more."""
    request_bytes, rate, slice_s = 4_000_000, 70e6, 0.1
    elapsed_s, num_bytes, allowed = [0.0], [0], 2 * slice_s * rate
    now_s, next_s = 0.0, slice_s - phase_s
    while now_s < 0.75:
        while allowed < request_bytes:
            now_s, next_s, allowed = next_s, next_s + slice_s, allowed + slice_s * rate
        now_s, allowed = now_s + 0.003, allowed - request_bytes
        elapsed_s.append(now_s)
        num_bytes.append(num_bytes[-1] + request_bytes)
    assert steady_rate(elapsed_s, num_bytes, warm_up_s=0.1) == pytest.approx(rate, rel=0.06)


def test_of_few_requests_all_count() -> None:
    assert steady_rate([0.0, 0.02, 0.04, 0.06, 0.08], [0, 2, 4, 6, 8], warm_up_s=0.1) == pytest.approx(100.0)

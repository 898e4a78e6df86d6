"""Models of well-known shapes: that they run like models, cost like models, and leave nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.stage import Stage
from shoal.errors import CannotWrite
from shoal.ids import LayerRange
from shoal.lab.gguf_writer import TensorData, write_gguf
from shoal.lab.random_model import count_parameters, write_random_model
from shoal.lab.shapes import SHAPES, ModelShape
from shoal.lab.vocabulary import NUM_CONTROL_TOKENS
from tests.oracle.llamacpp import Llama

VOCABULARY = 2048
PROMPT = np.random.default_rng(2).integers(300, VOCABULARY, 16).tolist()


def cut(name: str, layers: int) -> ModelShape:
    return msgspec.structs.replace(SHAPES[name], num_layers=layers, vocab_size=VOCABULARY)


def forced_logits(path: Path, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Our logits at each step of a text that is given, [len(ids), vocab_size]."""
    model, backend = Model(path), Backend(num_threads=1)
    layers = LayerRange(0, model.shape.num_layers)
    stage = Stage(model, [layers], backend, context=256, micro_batch=64, head=True)
    try:
        rows = [stage.forward_tokens(PROMPT, 0)[-1].copy()]
        for position, token_id in enumerate(ids[:-1], len(PROMPT)):
            rows.append(stage.forward_tokens((token_id,), position)[-1].copy())
    finally:
        stage.close()
        backend.close()
        model.close()
    return np.stack(rows)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b"])
@pytest.mark.parametrize("quantisation", ["F16", "Q4_K_M"])
@pytest.mark.slow
def test_tokens_are_llamacpps(name: str, quantisation: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_random_model(path, cut(name, 2), quantisation=quantisation, seed=1)
    with Llama(path, context=256) as llama:
        ids, gaps = llama.greedy(PROMPT, 24)
    best = forced_logits(path, ids).argmax(axis=1).tolist()
    differing = [gap for ours, theirs, gap in zip(best, ids, gaps, strict=True) if ours != theirs]
    # Rounding decides where two tokens are nearly as likely; with quantised weights activations are rounded as well.
    assert all(gap < (0.02 if quantisation == "F16" else 0.2) for gap in differing)
    assert len(differing) <= 4


@pytest.mark.parametrize(
    ("name", "quantisation"),
    [
        pytest.param("smollm2-135m", "Q4_K_M", marks=pytest.mark.slow),
        pytest.param("qwen2.5-0.5b", "Q4_0", marks=pytest.mark.full),
        pytest.param("qwen3-0.6b", "Q2_K", marks=pytest.mark.full),
    ],
)
def test_eighty_layers_stay_sane(name: str, quantisation: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.gguf"
    write_random_model(path, cut(name, 80), quantisation=quantisation, seed=3)
    with Llama(path, context=256) as llama:
        ids, _ = llama.greedy(PROMPT, 24)
    logits = forced_logits(path, ids)
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 2.0
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=1)
    assert (entropy > 0.8 * np.log(VOCABULARY)).all()
    assert len(set(ids)) > 12
    assert min(ids) >= NUM_CONTROL_TOKENS  # it does not end by itself


def test_the_bytes_are_real_and_new(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shape = msgspec.structs.replace(SHAPES["llama-3.2-1b"], num_layers=1, vocab_size=1024)
    size_bytes = write_random_model(path, shape, quantisation="Q4_K_M")
    assert path.stat().st_size == size_bytes
    if hasattr(os.stat_result, "st_blocks"):
        assert path.stat().st_blocks * 512 >= size_bytes  # no holes
    data = path.read_bytes()
    start = max(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors if "attn_norm" in tensor.name)
    pages = [data[begin : begin + 4096] for begin in range(-(-start // 4096) * 4096, len(data) - 4096, 4096)]
    assert len(pages) > 5000
    assert len(set(pages)) == len(pages)
    assert len(zlib.compress(b"".join(pages[:256]))) > 0.95 * 256 * 4096


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    code = (
        "import sys; from shoal.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    path = tmp_path / "m.gguf"
    arguments = ["lab", "model", str(path), "--like=llama-3-70b", "--layers=1", "--vocabulary=1024"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    peak_bytes = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    assert path.stat().st_size > 450e6
    assert peak_bytes < 200 << 20


def lab_model(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", "lab", "model", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "140", "NO_COLOR": "1", "TERM": "dumb"},
        check=False,
    )


@pytest.mark.slow
def test_the_verb_writes_what_was_asked(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    arguments = (out, "--like", "Qwen2.5-0.5B", "--layers", "2", "--quant", "q5_k_m", "--vocabulary", "700", "--json")
    done = lab_model(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    shape = msgspec.structs.replace(SHAPES["qwen2.5-0.5b"], num_layers=2, vocab_size=700)
    assert facts["parameters"] == count_parameters(shape)
    assert facts["bytes"] == out.stat().st_size
    fields = gguf.GGUFReader(out).fields
    assert fields["general.file_type"].contents() == 17
    assert fields["qwen2.block_count"].contents() == 2
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 700

    first = out.read_bytes()
    refused = lab_model(*arguments)
    assert refused.returncode == 1
    assert refused.stderr == f"shoal: {out} exists: --force replaces it\n"
    assert lab_model(*arguments, "--force").returncode == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("m.gguf", "--like", "llama-9"), "no model shape is called 'llama-9': tiny, llama-3-8b"),
        (("m.gguf", "--like", "tiny", "--quant", "Q9"), "no weights have the type 'Q9'"),
        (("m.gguf", "--like", "tiny", "--vocabulary", "9"), "it needs at least 259"),
        (("nowhere/m.gguf", "--like", "tiny"), "cannot be written: No such file or directory"),
        ((".", "--like", "tiny"), "is a folder: name a file in it"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = lab_model(tmp_path / arguments[0], *arguments[1:])
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=100_000))
    with pytest.raises(CannotWrite, match=r"takes [\d.]+ MB, and its disk has 100\.0 kB free: free [\d.]+ MB more"):
        write_random_model(tmp_path / "m.gguf", SHAPES["tiny"])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_it_is_written(tmp_path: Path) -> None:
    def chunks() -> Iterator[npt.NDArray[np.uint8]]:
        yield np.zeros(32, np.uint8)
        raise OSError(28, "No space left on device")

    with pytest.raises(CannotWrite, match="No space left on device"):
        write_gguf(tmp_path / "m.gguf", {}, [TensorData("t", (16,), 0, 64, chunks())])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C reaches a whole console there")
@pytest.mark.slow
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    arguments = ["lab", "model", str(tmp_path / "m.gguf"), "--like=llama-3-70b", "--layers=8"]
    with subprocess.Popen(
        [sys.executable, "-m", "shoal", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        deadline_s = time.monotonic() + 30.0
        while not any(path.stat().st_size > 0 for path in tmp_path.iterdir()) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=30)
    assert running.returncode in (1, 130)
    assert b"Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []

"""Stages against an independent implementation in numpy, and against llama.cpp, for every architecture and quantisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from shoal.compute import ggml
from shoal.compute.backend import Backend, compute_devices
from shoal.compute.model import Model
from shoal.compute.stage import CELLS_STEP, Stage
from shoal.errors import BadModelFile, ContextExceeded, UnsupportedModel
from shoal.ids import LayerRange
from shoal.lab.gguf_writer import TensorData, write_gguf
from shoal.lab.quantisation import WEIGHT_TYPES
from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES
from tests.compute.reference import reference_logits
from tests.oracle.llamacpp import Llama

TinyModel = Callable[[str, str], Path]
IDS = np.random.default_rng(3).integers(0, 500, 100).tolist()


def logits(path: Path, *, micro_batch: int = 512, repack: bool = True, threads: int = 1, is_host: bool = True) -> Any:
    """Logits of every position of IDS, [tokens, vocabulary]."""
    model, backend = Model(path), Backend(num_threads=threads)
    backend.is_host = is_host
    layers = LayerRange(0, model.shape.num_layers)
    stage = Stage(model, [layers], backend, context=256, micro_batch=micro_batch, head=True, repack=repack)
    rows = []
    for first in range(0, len(IDS), micro_batch):
        batch = IDS[first : first + micro_batch]
        rows.append(stage.forward_tokens(batch, first, num_outputs=len(batch)).copy())
    stage.close()
    backend.close()
    model.close()
    return np.concatenate(rows)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_an_independent_implementation_agrees(tiny_model: TinyModel, architecture: str) -> None:
    path = tiny_model(architecture, "F32")
    expected = reference_logits(path, IDS)
    # Keys and values are kept in 16 bits; the reference keeps 64.
    assert np.abs(logits(path) - expected).max() < 0.01 < 0.5 < expected.std()


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_rope_scaling_agrees(tmp_path: Path, scaling: str) -> None:
    shape = msgspec.structs.replace(SHAPES["tiny"], rope_scaling=scaling, rope_factor=4.0, context_original=64)
    path = tmp_path / "scaled.gguf"
    write_random_model(path, shape, quantisation="F32")
    unscaled = tmp_path / "unscaled.gguf"
    write_random_model(unscaled, SHAPES["tiny"], quantisation="F32")
    expected = reference_logits(path, IDS)
    assert np.abs(logits(path) - expected).max() < 0.01
    assert np.abs(logits(unscaled) - expected).max() > 0.05  # the scaling does something


def test_heads_may_be_wider_than_the_hidden_size(tmp_path: Path) -> None:
    shape = msgspec.structs.replace(SHAPES["tiny"], architecture="qwen3", head_size=128, tied_embeddings=True)
    path = tmp_path / "wide.gguf"
    write_random_model(path, shape, quantisation="F32")
    assert np.abs(logits(path) - reference_logits(path, IDS)).max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", sorted(WEIGHT_TYPES))
def test_every_quantisation_agrees_with_llamacpp(tiny_model: TinyModel, quantisation: str) -> None:
    path = tiny_model("llama", quantisation)
    with Llama(path, threads=1, context=256) as llama:
        expected = llama.logits(IDS)
    difference = logits(path) - expected
    # Activations are rounded to 8 bits between layers: what differs in the last bit may end a step apart.
    bound = 0.01 if quantisation in ("F32", "F16", "BF16") else 0.1
    assert np.sqrt(np.mean(difference**2)) < bound * expected.std()


def test_repacked_weights_give_the_same_answers(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", "Q4_K")
    difference = logits(path, repack=True) - logits(path, repack=False)
    assert np.sqrt(np.mean(difference**2)) < 0.1


def test_a_device_with_memory_of_its_own_gives_the_same_bits(tiny_model: TinyModel) -> None:
    # The CPU, treated as if its memory could not be reached from here: weights, cache, inputs and outputs are copied.
    path = tiny_model("llama", "Q4_0")
    assert np.array_equal(logits(path, repack=False, is_host=False), logits(path, repack=False))


def test_short_micro_batches_are_bit_equal_to_single_tokens(tiny_model: TinyModel) -> None:
    # Up to 63 rows attention works row by row; from 64 on in tiles, with other sums.
    path = tiny_model("qwen2", "Q8_0")
    one_by_one = logits(path, micro_batch=1, repack=False)
    assert np.array_equal(logits(path, micro_batch=50, repack=False), one_by_one)
    assert np.array_equal(logits(path, micro_batch=7, repack=False), one_by_one)


def test_a_graph_is_built_once_per_shape(tiny_model: TinyModel) -> None:
    model, backend = Model(tiny_model("llama", "Q4_K")), Backend()
    stage = Stage(model, [LayerRange(0, 3)], backend, context=2 * CELLS_STEP, head=True)
    size = stage.activation_bytes
    for position in range(CELLS_STEP + 3):
        stage.forward_tokens((position % 500,), position)
    assert stage.num_graphs == 2  # one per step of the cache
    assert stage.activation_bytes == size
    stage.forward_tokens(IDS, 0, num_outputs=len(IDS))
    first = stage.forward_tokens((1,), 0).copy()
    assert np.array_equal(stage.forward_tokens((1,), 0), first)
    stage.close()


def test_positions_beyond_the_context_are_refused(tiny_model: TinyModel) -> None:
    model, backend = Model(tiny_model("llama", "Q4_K")), Backend()
    stage = Stage(model, [LayerRange(0, 3)], backend, context=300, head=True)
    stage.forward_tokens((1,), 299)
    with pytest.raises(ContextExceeded, match="301 tokens do not fit a context of 300: raise --context"):
        stage.forward_tokens((1,), 300)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        stage.forward_tokens((512,), 0)
    with pytest.raises(ValueError, match="1 to 300 are allowed"):
        stage.forward_tokens([1] * 301, 0)
    stage.close()


def test_the_cache_is_f16_and_counted(tiny_model: TinyModel) -> None:
    model, backend = Model(tiny_model("llama", "Q4_K")), Backend()
    stage = Stage(model, [LayerRange(1, 3)], backend, context=300)
    assert stage.cache_bytes == 2 * 512 * 2 * (128 + 128)  # layers x cells x bytes x widths of keys and values
    stage.close()


def test_devices_come_from_ggml() -> None:
    devices = compute_devices()
    assert any(device.kind == "cpu" for device in devices)
    with pytest.raises(ValueError, match="no compute device 'GPU9': this build of ggml has"):
        Backend("GPU9")


def test_handles_keep_all_their_bits() -> None:
    # ggml-python 0.0.45 declares these with a result type that ctypes reads as a C int.
    assert "ggml_backend_cpu_buffer_from_ptr" in ggml.MENDED_FUNCTIONS
    memory = np.zeros(4096 + 64, np.uint8)
    address = -(-memory.ctypes.data // 64) * 64
    buffer = ggml.lib.ggml_backend_cpu_buffer_from_ptr(address, 4096)
    assert buffer > 1 << 32
    assert ggml.lib.ggml_backend_buffer_get_base(buffer) == address
    ggml.lib.ggml_backend_buffer_free(buffer)


def _rewritten(
    source: Path, target: Path, *, metadata: dict[str, Any] | None = None, drop: str = "", rename: str = ""
) -> Path:
    """The file with other keys, a tensor left out, or one under another name."""
    model = Model(source)
    tensors = []
    for info in model.file.tensors.values():
        name = f"{info.name}_extra" if info.name == rename else info.name
        data = [np.frombuffer(model.file.view(info), np.uint8).copy()]
        if info.name != drop:
            tensors.append(TensorData(name, info.shape, info.type, info.num_bytes, data))
    write_gguf(target, {**model.file.metadata, **(metadata or {})}, tensors)
    model.close()
    return target


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"metadata": {"general.architecture": "mamba"}}, UnsupportedModel, "architecture 'mamba' is not one we run yet"),
        ({"metadata": {"llama.feed_forward_length": 128}}, BadModelFile, "has shape .* is expected: the file is damaged"),
        ({"metadata": {"llama.block_count": 0}}, BadModelFile, r"llama\.block_count = 0: a whole number from 1 to"),
        ({"metadata": {"llama.block_count": "many"}}, BadModelFile, r"llama\.block_count = 'many'"),
        ({"metadata": {"llama.rope.scaling.type": "spiral"}}, UnsupportedModel, "rope scaling 'spiral'"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, BadModelFile, "4 attention heads for 3 key heads"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, BadModelFile, "a finite number"),
        ({"drop": "blk.1.ffn_up.weight"}, BadModelFile, r"tensor blk\.1\.ffn_up\.weight is missing"),
        ({"drop": "token_embd.weight"}, BadModelFile, r"tensor token_embd\.weight is missing"),
        ({"rename": "blk.1.ffn_up.weight"}, UnsupportedModel, "belongs to a variant of llama that we do not run yet"),
    ],
)
def test_a_file_that_we_cannot_run_says_why(
    tiny_model: TinyModel, tmp_path: Path, changes: dict[str, Any], error: type[Exception], line: str
) -> None:
    path = _rewritten(tiny_model("llama", "Q4_K"), tmp_path / "changed.gguf", **changes)
    with pytest.raises(error, match=line):
        Model(path)

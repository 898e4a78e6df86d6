"""Model files with random weights, of any shape and quantisation: decides what such a file contains.

A file has the keys and tensors that llama.cpp's converters write for the same architecture, and a made-up but complete
vocabulary, so that llama.cpp and we both load and run it. Its text is nonsense; its speed, its size and its arithmetic
are those of a real model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.lab.gguf_writer import TensorData, write_gguf
from shoal.lab.quantisation import (
    WEIGHT_TYPES,
    Role,
    embedding_type,
    find_quantisation,
    layer_type,
    output_type,
    row_bytes,
)
from shoal.lab.random_blocks import ALL_POOLS_BYTES, POOL_BYTES, Pool
from shoal.lab.shapes import ModelShape
from shoal.lab.vocabulary import NUM_CONTROL_TOKENS, make_vocabulary

ATTENTION_GAIN = 0.25
"""Of the norm before attention. Random attention averages over all that was said: at 1, what tells one token from another
is lost within a few dozen layers, and the likeliest continuation repeats one token for ever."""


class TensorPlan(NamedTuple):
    """A tensor to be written; `shape` in ggml's order, fastest first. `kind` says how its values are drawn."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    kind: Literal["matrix", "norm", "attention_norm", "bias", "rope_factors"]


def write_random_model(
    path: str | Path,
    shape: ModelShape,
    *,
    quantisation: str = "Q4_K",
    output_quantisation: str | None = None,
    tokenizer: Literal["bpe", "spm"] = "bpe",
    seed: int = 0,
    durable: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes a model file; it appears at `path` only once it is complete. Returns its size in bytes.

    Memory stays below some 200 MB however large the file.

    Args:
        quantisation: a name in `QUANTISATIONS`, and what llama.cpp's quantiser makes of it.
        output_quantisation: of the output matrix (with tied embeddings, of the token embeddings), a name in
            `WEIGHT_TYPES`; by default what llama.cpp's quantiser chooses.
        tokenizer: byte-level BPE as of Llama 3 and Qwen, or SentencePiece as of Llama 2.
        seed: the same seed and arguments give the same bytes, for one version of ggml and of NumPy.
        durable: return only once everything is on the disk.
        on_progress: takes the bytes written so far, and those of the whole file.

    Raises:
        ValueError: an unknown type, or a vocabulary too small for the tokenizer.
        CannotWrite: no room, or no such folder.
    """
    plans = plan_tensors(shape, quantisation=quantisation, output_quantisation=output_quantisation)
    metadata = describe(shape, quantisation=quantisation) | make_vocabulary(shape, tokenizer)
    tensors = _tensors(plans, shape=shape, seed=seed)
    return write_gguf(path, metadata, tensors, durable=durable, on_progress=on_progress)


def count_parameters(shape: ModelShape) -> int:
    """Of all tensors; tied embeddings count once, rope factors not."""
    plans = plan_tensors(shape, quantisation="F32")
    return sum(math.prod(plan.shape) for plan in plans if plan.kind != "rope_factors")


# The shape as keys and tensors


def describe(shape: ModelShape, *, quantisation: str) -> dict[str, Any]:
    """The metadata of the network, under the keys of llama.cpp's converters."""
    key = shape.architecture
    metadata: dict[str, Any] = {
        "general.architecture": key,
        "general.type": "model",
        "general.name": f"Random {key} {shape.num_layers}x{shape.hidden_size}",
        f"{key}.block_count": shape.num_layers,
        f"{key}.context_length": shape.context_length,
        f"{key}.embedding_length": shape.hidden_size,
        f"{key}.feed_forward_length": shape.feed_forward_size,
        f"{key}.attention.head_count": shape.num_heads,
        f"{key}.attention.head_count_kv": shape.num_kv_heads,
        f"{key}.rope.freq_base": float(shape.rope_base),
        f"{key}.attention.layer_norm_rms_epsilon": float(shape.norm_epsilon),
    }
    if key == "qwen3" or shape.head_size * shape.num_heads != shape.hidden_size:
        metadata |= {f"{key}.attention.key_length": shape.head_size, f"{key}.attention.value_length": shape.head_size}
    if key == "llama":
        metadata |= {f"{key}.vocab_size": shape.vocab_size, f"{key}.rope.dimension_count": shape.head_size}
    if shape.rope_scaling in ("linear", "yarn"):
        metadata |= {
            f"{key}.rope.scaling.type": shape.rope_scaling,
            f"{key}.rope.scaling.factor": float(shape.rope_factor),
            f"{key}.rope.scaling.original_context_length": shape.context_original or shape.context_length,
        }
    return metadata | {
        "general.file_type": find_quantisation(quantisation).file_type,
        "general.quantization_version": 2,
    }


def plan_tensors(shape: ModelShape, *, quantisation: str, output_quantisation: str | None = None) -> list[TensorPlan]:
    """Every tensor of the file, in the order of the file.

    Raises:
        ValueError: no such type.
    """
    find_quantisation(quantisation)
    if output_quantisation is not None and output_quantisation not in WEIGHT_TYPES:
        raise ValueError(f"no weights have the type '{output_quantisation}': {', '.join(WEIGHT_TYPES)} exist")
    hidden = shape.hidden_size
    output = output_quantisation or output_type(quantisation, shape)
    embedding = output if shape.tied_embeddings else embedding_type(quantisation, shape)
    plans = [TensorPlan("token_embd.weight", (hidden, shape.vocab_size), embedding, "matrix")]
    if shape.rope_scaling == "llama3":
        plans.append(TensorPlan("rope_freqs.weight", (shape.head_size // 2,), "F32", "rope_factors"))
    for layer in range(shape.num_layers):
        plans += _plan_layer(shape, layer, quantisation)
    plans.append(TensorPlan("output_norm.weight", (hidden,), "F32", "norm"))
    if not shape.tied_embeddings:
        plans.append(TensorPlan("output.weight", (hidden, shape.vocab_size), output, "matrix"))
    return plans


def _plan_layer(shape: ModelShape, layer: int, quantisation: str) -> Iterator[TensorPlan]:
    hidden, query_width, kv_width = shape.hidden_size, shape.num_heads * shape.head_size, shape.kv_width

    def matrix(role: Role, row_length: int, num_rows: int) -> TensorPlan:
        type_name = layer_type(quantisation, role, layer, shape)
        return TensorPlan(f"blk.{layer}.{role}.weight", (row_length, num_rows), type_name, "matrix")

    def vector(name: str, length: int, kind: Literal["norm", "attention_norm", "bias"]) -> TensorPlan:
        return TensorPlan(f"blk.{layer}.{name}", (length,), "F32", kind)

    yield vector("attn_norm.weight", hidden, "attention_norm")
    yield matrix("attn_q", hidden, query_width)
    yield matrix("attn_k", hidden, kv_width)
    yield matrix("attn_v", hidden, kv_width)
    yield matrix("attn_output", query_width, hidden)
    if shape.architecture == "qwen2":
        yield vector("attn_q.bias", query_width, "bias")
        yield vector("attn_k.bias", kv_width, "bias")
        yield vector("attn_v.bias", kv_width, "bias")
    if shape.architecture == "qwen3":
        yield vector("attn_q_norm.weight", shape.head_size, "norm")
        yield vector("attn_k_norm.weight", shape.head_size, "norm")
    yield vector("ffn_norm.weight", hidden, "norm")
    yield matrix("ffn_gate", hidden, shape.feed_forward_size)
    yield matrix("ffn_up", hidden, shape.feed_forward_size)
    yield matrix("ffn_down", shape.feed_forward_size, hidden)


# Values


def rope_frequency_factors(shape: ModelShape) -> npt.NDArray[np.float32]:
    """Divisors of the rope frequencies, [head_size / 2]: 1 for short waves, `rope_factor` for long ones.

    Source: Dubey et al., The Llama 3 Herd of Models (2024); low and high frequency factors 1 and 4 as in all its models.
    """
    frequencies = shape.rope_base ** -(np.arange(0, shape.head_size, 2) / shape.head_size)
    turns = (shape.context_original or shape.context_length) * frequencies / (2 * np.pi)
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    factors = 1.0 / ((1.0 - smooth) / shape.rope_factor + smooth)
    return factors.astype(np.float32)


def _vector(plan: TensorPlan, shape: ModelShape, random: np.random.Generator) -> npt.NDArray[np.float32]:
    noise = random.standard_normal(plan.shape[0]).astype(np.float32)
    match plan.kind:
        case "norm":
            return np.float32(1.0) + np.float32(0.05) * noise
        case "attention_norm":
            return np.float32(ATTENTION_GAIN) * (np.float32(1.0) + np.float32(0.05) * noise)
        case "bias":
            return np.float32(0.1) * noise
        case _:
            return rope_frequency_factors(shape)


# The file


def _tensors(plans: list[TensorPlan], *, shape: ModelShape, seed: int) -> list[TensorData]:
    pools = _make_pools(plans, seed=seed)
    tensors = []
    for index, plan in enumerate(plans):
        random = np.random.default_rng([seed, index])
        if plan.kind == "matrix":
            chunks: Iterable[npt.NDArray[Any]] = pools[plan.type_name, plan.shape[0]].draw(math.prod(plan.shape), random)
        else:
            chunks = [_vector(plan, shape, random)]
        row = row_bytes(plan.type_name, plan.shape[0])
        if plan.name == ("token_embd.weight" if shape.tied_embeddings else "output.weight"):
            chunks = _without_control_tokens(chunks, row)
        num_bytes = row * math.prod(plan.shape[1:])
        tensors.append(TensorData(plan.name, plan.shape, WEIGHT_TYPES[plan.type_name].ggml_type, num_bytes, chunks))
    return tensors


def _without_control_tokens(chunks: Iterable[npt.NDArray[Any]], row: int) -> Iterator[npt.NDArray[Any]]:
    """Zeros in the rows of the control tokens, so that they are never the likeliest and answers are as long as asked for."""
    for index, chunk in enumerate(chunks):
        if index == 0:
            chunk.reshape(-1)[: NUM_CONTROL_TOKENS * row] = 0  # zero bytes are zero in every type
        yield chunk


def _make_pools(plans: list[TensorPlan], *, seed: int) -> dict[tuple[str, int], Pool]:
    num_elements: dict[tuple[str, int], int] = {}
    for plan in plans:
        if plan.kind == "matrix":
            key = (plan.type_name, plan.shape[0])
            num_elements[key] = num_elements.get(key, 0) + math.prod(plan.shape)
    max_bytes = min(POOL_BYTES, ALL_POOLS_BYTES // len(num_elements))
    return {
        (type_name, row_length): Pool(type_name, row_length, num_elements=count, max_bytes=max_bytes, seed=seed)
        for (type_name, row_length), count in num_elements.items()
    }

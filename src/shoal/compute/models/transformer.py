"""What the decoder-only transformers share: the pieces from which an architecture's layer is drawn.

Shapes are in ggml's order, fastest first. B tokens of the micro-batch, D hidden size, N heads, G key heads, H head size,
F feed-forward size, C cells of the KV cache in view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.compute import ggml
from shoal.compute.hyperparameters import Hyperparameters

L = ggml.lib

ROPE_NORMAL = 0
"""Pairs are neighbours, (0, 1), (2, 3), ...: llama, whose weights its converter permutes."""
ROPE_NEOX = 2
"""Pairs are half a head apart: qwen and most others."""


@dataclass(frozen=True)
class MicroBatch:
    """What every layer of one graph shares."""

    context: Any
    graph: ggml.Tensor
    num_tokens: int
    num_cells: int
    positions_B: ggml.Tensor
    rows_B: ggml.Tensor
    mask_CB: ggml.Tensor


@dataclass(frozen=True)
class LayerTensors:
    """One layer's weights by short name (`attn_q.weight`), and its share of the KV cache, [width, context] each.

    A matrix is one tensor, or several that hold some of its rows each.
    """

    matrices: Mapping[str, Sequence[ggml.Tensor]]
    vectors: Mapping[str, ggml.Tensor]
    keys: ggml.Tensor
    values: ggml.Tensor
    rope_factors: ggml.Tensor | None


@dataclass(frozen=True)
class Architecture:
    """How to run one architecture.

    `num_outputs` of `layer` says for how many of the last tokens the caller wants the layer's output; the other tokens
    only leave their keys and values.
    """

    name: str
    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    optional_vectors: tuple[str, ...]
    layer: Callable[[Hyperparameters, MicroBatch, LayerTensors, ggml.Tensor, int], ggml.Tensor | None]


MATRICES = (
    "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight",
    "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
)  # fmt: skip
NORMS = ("attn_norm.weight", "ffn_norm.weight")


def rms_norm(shape: Hyperparameters, batch: MicroBatch, x: ggml.Tensor, weight: ggml.Tensor) -> ggml.Tensor:
    """Root-mean-square normalisation over the fastest dimension, times `weight`."""
    return L.ggml_mul(batch.context, L.ggml_rms_norm(batch.context, x, shape.norm_epsilon), weight)


def multiply(context: Any, matrix: Sequence[ggml.Tensor], x: ggml.Tensor) -> ggml.Tensor:
    """The matrix times `x`; rows that are apart give the same bits as rows together."""
    products = [L.ggml_mul_mat(context, rows, x) for rows in matrix]
    while len(products) > 1:
        # In pairs: every element is copied log2(pieces) times.
        pairs = [products[index : index + 2] for index in range(0, len(products), 2)]
        products = [L.ggml_concat(context, *pair, 0) if len(pair) == 2 else pair[0] for pair in pairs]
    return products[0]


def project(batch: MicroBatch, layer: LayerTensors, name: str, x: ggml.Tensor) -> ggml.Tensor:
    """`x` times the matrix `name`.weight, plus `name`.bias where the file has one."""
    product = multiply(batch.context, layer.matrices[f"{name}.weight"], x)
    bias = layer.vectors.get(f"{name}.bias")
    return product if bias is None else L.ggml_add(batch.context, product, bias)


def rotate(
    shape: Hyperparameters, batch: MicroBatch, layer: LayerTensors, x_HNB: ggml.Tensor, *, rope_mode: int
) -> ggml.Tensor:
    """Rotary position embedding of heads."""
    rope = shape.rope
    return L.ggml_rope_ext(
        batch.context, x_HNB, batch.positions_B, layer.rope_factors,
        rope.dimensions, rope_mode, rope.original_context, rope.base, rope.frequency_scale,
        rope.extrapolation, rope.attention_factor, rope.beta_fast, rope.beta_slow,
    )  # fmt: skip


def project_heads(
    shape: Hyperparameters, batch: MicroBatch, layer: LayerTensors, x_DB: ggml.Tensor
) -> tuple[ggml.Tensor, ggml.Tensor, ggml.Tensor]:
    """Queries [H, N, B], keys [H, G, B] and values [G * Hv, B]."""
    query = project(batch, layer, "attn_q", x_DB)
    key = project(batch, layer, "attn_k", x_DB)
    value = project(batch, layer, "attn_v", x_DB)
    query_HNB = L.ggml_reshape_3d(batch.context, query, shape.head_size, shape.num_heads, batch.num_tokens)
    key_HGB = L.ggml_reshape_3d(batch.context, key, shape.head_size, shape.num_kv_heads, batch.num_tokens)
    return query_HNB, key_HGB, value


def remember(batch: MicroBatch, layer: LayerTensors, key_HGB: ggml.Tensor, value: ggml.Tensor) -> None:
    """Writes the micro-batch's keys and values into the cache, at the rows that the batch names."""
    key = L.ggml_reshape_2d(batch.context, key_HGB, layer.keys.contents.ne[0], batch.num_tokens)
    L.ggml_build_forward_expand(batch.graph, L.ggml_set_rows(batch.context, layer.keys, key, batch.rows_B))
    L.ggml_build_forward_expand(batch.graph, L.ggml_set_rows(batch.context, layer.values, value, batch.rows_B))


def attend(
    shape: Hyperparameters, batch: MicroBatch, layer: LayerTensors, query_HNB: ggml.Tensor, *, num_outputs: int
) -> ggml.Tensor:
    """Flash attention of the last `num_outputs` queries over the cells in view, and its output projection: [D, outputs]."""
    first = batch.num_tokens - num_outputs
    query_HBN = L.ggml_permute(batch.context, _last(batch, query_HNB, num_outputs), 0, 2, 1, 3)
    keys_HCG = _heads_of_cache(batch, layer.keys, shape.head_size, shape.num_kv_heads)
    values_HCG = _heads_of_cache(batch, layer.values, shape.value_head_size, shape.num_kv_heads)
    mask = batch.mask_CB
    if first:
        mask = L.ggml_view_2d(
            batch.context, mask, batch.num_cells, num_outputs, mask.contents.nb[1], first * mask.contents.nb[1]
        )
    attended = L.ggml_flash_attn_ext(batch.context, query_HBN, keys_HCG, values_HCG, mask, shape.attention_scale, 0.0, 0.0)
    merged = L.ggml_reshape_2d(batch.context, attended, shape.value_head_size * shape.num_heads, num_outputs)
    return project(batch, layer, "attn_output", merged)


def swiglu(batch: MicroBatch, layer: LayerTensors, x_DB: ggml.Tensor) -> ggml.Tensor:
    """Feed-forward network with a SiLU gate."""
    gate = project(batch, layer, "ffn_gate", x_DB)
    up = project(batch, layer, "ffn_up", x_DB)
    return project(batch, layer, "ffn_down", L.ggml_swiglu_split(batch.context, gate, up))


def last_tokens(batch: MicroBatch, x_DB: ggml.Tensor, num_outputs: int) -> ggml.Tensor:
    """The columns of the last `num_outputs` tokens."""
    if num_outputs == batch.num_tokens:
        return x_DB
    stride = x_DB.contents.nb[1]
    first = batch.num_tokens - num_outputs
    return L.ggml_view_2d(batch.context, x_DB, x_DB.contents.ne[0], num_outputs, stride, first * stride)


def attention_then_swiglu(
    shape: Hyperparameters,
    batch: MicroBatch,
    layer: LayerTensors,
    x_DB: ggml.Tensor,
    num_outputs: int,
    *,
    rope_mode: int,
    normalise_heads: bool = False,
) -> ggml.Tensor | None:
    """The pre-norm layer of llama and its relatives. Returns [D, num_outputs], or None where no output is wanted."""
    normalised = rms_norm(shape, batch, x_DB, layer.vectors["attn_norm.weight"])
    query, key, value = project_heads(shape, batch, layer, normalised)
    if normalise_heads:
        query = rms_norm(shape, batch, query, layer.vectors["attn_q_norm.weight"])
        key = rms_norm(shape, batch, key, layer.vectors["attn_k_norm.weight"])
    key = rotate(shape, batch, layer, key, rope_mode=rope_mode)
    if num_outputs == 0:
        remember(batch, layer, key, value)
        return None
    query = rotate(shape, batch, layer, query, rope_mode=rope_mode)
    # Queries first: ggml runs nodes in the order of expansion, and this order is llama.cpp's.
    L.ggml_build_forward_expand(batch.graph, query)
    remember(batch, layer, key, value)
    attended = attend(shape, batch, layer, query, num_outputs=num_outputs)
    middle = L.ggml_add(batch.context, attended, last_tokens(batch, x_DB, num_outputs))
    normalised = rms_norm(shape, batch, middle, layer.vectors["ffn_norm.weight"])
    return L.ggml_add(batch.context, swiglu(batch, layer, normalised), middle)


def _last(batch: MicroBatch, x_HNB: ggml.Tensor, num_outputs: int) -> ggml.Tensor:
    if num_outputs == batch.num_tokens:
        return x_HNB
    size, strides = x_HNB.contents.ne, x_HNB.contents.nb
    first = batch.num_tokens - num_outputs
    return L.ggml_view_3d(batch.context, x_HNB, size[0], size[1], num_outputs, strides[1], strides[2], first * strides[2])


def _heads_of_cache(batch: MicroBatch, cache: ggml.Tensor, head_size: int, num_heads: int) -> ggml.Tensor:
    """[H, C, G] over a cache of [G * H, context]."""
    row_bytes = cache.contents.nb[1]
    head_bytes = head_size * cache.contents.nb[0]
    return L.ggml_view_3d(batch.context, cache, head_size, batch.num_cells, num_heads, row_bytes, head_bytes, 0)

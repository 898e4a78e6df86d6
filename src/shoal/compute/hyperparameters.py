"""What a model file says about the shape of its network.

Source: the keys that llama.cpp's converters write (`{architecture}.block_count` and so on); the rope constants are
combined as llama.cpp combines them, so that its results are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.errors import BadModelFile, UnsupportedModel

_NUM_LAYERS_MAX = 4096
_WIDTH_MAX = 1 << 20


class Rope(msgspec.Struct, frozen=True):
    """Rotary position embedding.

    `dimensions` of each head are rotated; `frequency_scale` is 1 / factor for linear and YaRN scaling;
    `extrapolation` is 1 for YaRN and 0 otherwise. Frequency factors per dimension (llama3, longrope) are tensors of the
    file and not kept here.
    """

    dimensions: int
    base: float
    frequency_scale: float
    extrapolation: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    original_context: int


class Hyperparameters(msgspec.Struct, frozen=True):
    """The shape of a decoder-only transformer."""

    architecture: str
    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_head_size: int
    feed_forward_size: int
    vocab_size: int
    context_length: int
    norm_epsilon: float
    attention_scale: float
    rope: Rope

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys in one layer."""
        return self.num_kv_heads * self.head_size

    @property
    def value_width(self) -> int:
        """Elements of one token's values in one layer."""
        return self.num_kv_heads * self.value_head_size

    @property
    def kv_bytes_per_token_and_layer(self) -> int:
        """Keys and values are f16."""
        return 2 * (self.kv_width + self.value_width)

    @property
    def hidden_bytes(self) -> int:
        """One token's hidden state on the wire, float32."""
        return 4 * self.hidden_size


class _Keys:
    """Typed access to `{architecture}.*`; a missing or absurd value is the file's fault, said in one line."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def raw(self, key: str) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}")

    def integer(self, key: str, *, maximum: int, default: int | None = None) -> int:
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
            values = {int(item) for item in value}
            if len(values) != 1:
                raise UnsupportedModel(f"{self._architecture}.{key} differs between layers: such models are not run yet")
            value = values.pop()
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= maximum:
            raise BadModelFile(
                f"model file has {self._architecture}.{key} = {value!r}: a whole number from 1 to {maximum} is expected; "
                "convert or download the model again"
            )
        return value

    def number(self, key: str, *, default: float) -> float:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadModelFile(f"model file has {self._architecture}.{key} = {value!r}: a finite number is expected")
        return float(value)


def parse_hyperparameters(metadata: Mapping[str, Any], *, embedding_rows: int) -> Hyperparameters:
    """Reads the shape from a model file's metadata.

    Args:
        embedding_rows: rows of `token_embd.weight`, which is the vocabulary's true size.

    Raises:
        BadModelFile: a needed key is missing or absurd.
        UnsupportedModel: heads or widths differ from layer to layer.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise BadModelFile("model file has no general.architecture: it is not a language model that llama.cpp converted")
    keys = _Keys(metadata, architecture)
    hidden_size = keys.integer("embedding_length", maximum=_WIDTH_MAX)
    num_heads = keys.integer("attention.head_count", maximum=_WIDTH_MAX)
    num_kv_heads = keys.integer("attention.head_count_kv", maximum=_WIDTH_MAX, default=num_heads)
    if num_heads % num_kv_heads:
        raise BadModelFile(f"model file has {num_heads} attention heads for {num_kv_heads} key heads: no whole multiple")
    head_size = keys.integer("attention.key_length", maximum=_WIDTH_MAX, default=max(1, hidden_size // num_heads))
    return Hyperparameters(
        architecture=architecture,
        name=str(metadata.get("general.name") or architecture),
        num_layers=keys.integer("block_count", maximum=_NUM_LAYERS_MAX),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        value_head_size=keys.integer("attention.value_length", maximum=_WIDTH_MAX, default=head_size),
        feed_forward_size=keys.integer("feed_forward_length", maximum=_WIDTH_MAX),
        vocab_size=embedding_rows,
        context_length=keys.integer("context_length", maximum=1 << 30),
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon", default=1e-5),
        attention_scale=keys.number("attention.scale", default=0.0) or 1.0 / math.sqrt(head_size),
        rope=_parse_rope(keys, head_size=head_size),
    )


def _parse_rope(keys: _Keys, *, head_size: int) -> Rope:
    dimensions = keys.integer("rope.dimension_count", maximum=head_size, default=head_size)
    kind = keys.raw("rope.scaling.type") or "linear"
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(f"rope scaling '{kind}' is not one we run: none, linear, yarn and longrope are")
    factor = keys.number("rope.scaling.factor", default=keys.number("rope.scale_linear", default=0.0)) or 1.0
    if factor < 0.0:
        raise BadModelFile(f"model file scales rope by {factor}: a positive number is expected")
    context_length = keys.integer("context_length", maximum=1 << 30)
    extrapolation = keys.number("rope.scaling.yarn_ext_factor", default=1.0 if kind == "yarn" else 0.0)
    attention_factor = keys.number("rope.scaling.attn_factor", default=1.0)
    if extrapolation and factor > 1.0 and (log_multiplier := keys.number("rope.scaling.yarn_log_multiplier", default=0.0)):
        # ggml's kernel multiplies by 1 + 0.1 ln(factor) itself; with a log multiplier only the ratio of both is wanted.
        attention_factor /= 1.0 + 0.1 * log_multiplier * math.log(factor)
    return Rope(
        dimensions=dimensions,
        base=keys.number("rope.freq_base", default=10000.0),
        frequency_scale=1.0 if kind == "none" else 1.0 / factor,
        extrapolation=extrapolation,
        attention_factor=attention_factor,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", default=1.0),
        original_context=keys.integer("rope.scaling.original_context_length", maximum=1 << 30, default=context_length),
    )

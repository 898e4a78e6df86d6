"""Shapes of transformers, and those of well-known models: decides what `--like NAME` means.

Source of every figure: `config.json` of the model's public repository on huggingface.co, named beside it; vocabularies are
as wide as the embedding, padding included. The published numbers of parameters follow from them, which a test checks.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder-only transformer.

    `rope_scaling` "linear" and "yarn" are written as keys with `rope_factor`; "llama3" is written as the tensor of
    frequency factors `rope_freqs.weight`. `context_original` is the context before scaling, 0 for `context_length`.
    `is_70b` marks what llama.cpp calls a 70B model (80 layers of llama or qwen2), whose attn_v its quantiser favours; it
    stays when layers are left out.
    """

    architecture: Literal["llama", "qwen2", "qwen3"] = "llama"
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    feed_forward_size: int
    vocab_size: int
    context_length: int = 131072
    context_original: int = 0
    tied_embeddings: bool = False
    rope_base: float = 500_000.0
    rope_scaling: Literal["linear", "yarn", "llama3"] | None = None
    rope_factor: float = 1.0
    norm_epsilon: float = 1e-5
    is_70b: bool = False

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.hidden_size, self.num_heads, self.num_kv_heads, self.feed_forward_size)
        if min(sizes) < 1 or self.num_heads % self.num_kv_heads or self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"no transformer has this shape: {self}")
        if self.architecture != "llama" and self.rope_scaling == "llama3":
            raise ValueError(f"{self.architecture} has no rope frequency factors: 'llama3' scaling is llama's alone")
        if self.architecture == "qwen2" and self.num_heads * self.head_size != self.hidden_size:
            raise ValueError("qwen2 derives its head size: num_heads * head_size must be hidden_size")

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys in one layer."""
        return self.num_kv_heads * self.head_size


def find_shape(name: str) -> ModelShape:
    """The shape of a model of `SHAPES`, however its name is capitalised.

    Raises:
        ValueError: no such name; lists those there are.
    """
    try:
        return SHAPES[name.strip().lower()]
    except KeyError:
        raise ValueError(f"no model shape is called '{name}': {', '.join(SHAPES)} are known") from None


def _llama3(
    layers: int, hidden: int, heads: int, head_size: int, feed_forward: int, factor: float = 0.0, *, tied: bool = False
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=8,
        head_size=head_size,
        feed_forward_size=feed_forward,
        vocab_size=128256,
        context_length=131072 if factor else 8192,
        context_original=8192 if factor else 0,
        rope_scaling="llama3" if factor else None,
        rope_factor=factor or 1.0,
        tied_embeddings=tied,
        is_70b=layers == 80,
    )


def _qwen2(
    layers: int, hidden: int, heads: int, kv_heads: int, feed_forward: int, vocab: int, context: int, epsilon: float = 1e-6
) -> ModelShape:
    return ModelShape(
        architecture="qwen2",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=hidden // heads,
        feed_forward_size=feed_forward,
        vocab_size=vocab,
        context_length=context,
        tied_embeddings=vocab == 151936,  # the three smallest
        rope_base=1_000_000.0,
        norm_epsilon=epsilon,
        is_70b=layers == 80,
    )


def _qwen3(layers: int, hidden: int, heads: int, feed_forward: int, *, tied: bool = False) -> ModelShape:
    return ModelShape(
        architecture="qwen3",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=8,
        head_size=128,
        feed_forward_size=feed_forward,
        vocab_size=151936,
        context_length=40960,
        tied_embeddings=tied,
        rope_base=1_000_000.0,
        norm_epsilon=1e-6,
    )


def _smollm2(layers: int, hidden: int, heads: int, kv_heads: int, feed_forward: int, rope_base: float) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=64,
        feed_forward_size=feed_forward,
        vocab_size=49152,
        context_length=8192,
        tied_embeddings=True,
        rope_base=rope_base,
    )


SHAPES = {
    "tiny": ModelShape(
        num_layers=3,
        hidden_size=256,  # the block of K-quants
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        feed_forward_size=512,
        vocab_size=512,
        context_length=2048,
        rope_base=10_000.0,
    ),
    "llama-3-8b": _llama3(32, 4096, 32, 128, 14336),  # meta-llama/Meta-Llama-3-8B
    "llama-3-70b": _llama3(80, 8192, 64, 128, 28672),  # meta-llama/Meta-Llama-3-70B
    "llama-3.1-8b": _llama3(32, 4096, 32, 128, 14336, 8.0),  # meta-llama/Llama-3.1-8B
    "llama-3.1-70b": _llama3(80, 8192, 64, 128, 28672, 8.0),  # meta-llama/Llama-3.1-70B
    "llama-3.2-1b": _llama3(16, 2048, 32, 64, 8192, 32.0, tied=True),  # meta-llama/Llama-3.2-1B
    "llama-3.2-3b": _llama3(28, 3072, 24, 128, 8192, 32.0, tied=True),  # meta-llama/Llama-3.2-3B
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, 151936, 32768),  # Qwen/Qwen2.5-0.5B
    "qwen2.5-1.5b": _qwen2(28, 1536, 12, 2, 8960, 151936, 131072),  # Qwen/Qwen2.5-1.5B
    "qwen2.5-3b": _qwen2(36, 2048, 16, 2, 11008, 151936, 32768),  # Qwen/Qwen2.5-3B
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18944, 152064, 131072),  # Qwen/Qwen2.5-7B
    "qwen2.5-14b": _qwen2(48, 5120, 40, 8, 13824, 152064, 131072, 1e-5),  # Qwen/Qwen2.5-14B
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27648, 152064, 131072, 1e-5),  # Qwen/Qwen2.5-32B
    "qwen2.5-72b": _qwen2(80, 8192, 64, 8, 29568, 152064, 131072, 1e-5),  # Qwen/Qwen2.5-72B
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),  # Qwen/Qwen3-0.6B
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),  # Qwen/Qwen3-1.7B
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),  # Qwen/Qwen3-4B
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),  # Qwen/Qwen3-8B
    "qwen3-14b": _qwen3(40, 5120, 40, 17408),  # Qwen/Qwen3-14B
    "qwen3-32b": _qwen3(64, 5120, 64, 25600),  # Qwen/Qwen3-32B
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536, 100_000.0),  # HuggingFaceTB/SmolLM2-135M
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560, 100_000.0),  # HuggingFaceTB/SmolLM2-360M
    "smollm2-1.7b": _smollm2(24, 2048, 32, 32, 8192, 130_000.0),  # HuggingFaceTB/SmolLM2-1.7B
}

"""Model files with random weights, of any shape and quantisation: decides what such a file contains.

A file has the keys and tensors that llama.cpp's converters write for the same architecture, and a made-up but complete
vocabulary, so that llama.cpp and we both load and run it. Its text is nonsense; its speed, its size and its arithmetic
are those of a real model.

Quantising is slow and random numbers are cheap: for each type and row length a pool of quantised pieces of rows is made
once, and every row is put together from pieces drawn by the seed. A row of several pieces is as good as new, and a
tensor no larger than the pool repeats no piece, so that hardly ever do two tokens share their logits.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from shoal.lab.gguf_writer import TensorData, write_gguf

PIECE_ELEMENTS = 256
"""The longest piece of a row: the largest block of any type."""

POOL_ELEMENTS = 1 << 20
"""0.1 s of quantising for K-quants."""

POOL_ELEMENTS_SLOW = 1 << 16
"""The types that search a codebook (IQ1, IQ2, IQ3) take some ten times longer per element, or more."""

CHUNK_BYTES = 16 << 20

Bytes = npt.NDArray[np.uint8]


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder-only transformer.

    `rope_scaling` "linear" and "yarn" are written as keys with `rope_factor`; "llama3" is written as the tensor of
    frequency factors `rope_freqs.weight`. `context_original` is the context before scaling, 0 for `context_length`.
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

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.hidden_size, self.num_heads, self.num_kv_heads, self.feed_forward_size)
        if min(sizes) < 1 or self.num_heads % self.num_kv_heads or self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"no transformer has this shape: {self}")
        if self.architecture != "llama" and self.rope_scaling == "llama3":
            raise ValueError(f"{self.architecture} has no rope frequency factors: 'llama3' scaling is llama's alone")
        if self.architecture == "qwen2" and self.num_heads * self.head_size != self.hidden_size:
            raise ValueError("qwen2 derives its head size: num_heads * head_size must be hidden_size")

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(plan.shape) for plan in plan_tensors(self, quantisation="F32", output_quantisation="F32"))


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
    "1b": ModelShape(  # Llama 3.2 1B
        num_layers=16,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=8,
        head_size=64,
        feed_forward_size=8192,
        vocab_size=128256,
        context_original=8192,
        tied_embeddings=True,
        rope_scaling="llama3",
        rope_factor=32.0,
    ),
    "8b": ModelShape(  # Llama 3.1 8B
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        feed_forward_size=14336,
        vocab_size=128256,
        context_original=8192,
        rope_scaling="llama3",
        rope_factor=8.0,
    ),
    "70b": ModelShape(  # Llama 3.1 70B
        num_layers=80,
        hidden_size=8192,
        num_heads=64,
        num_kv_heads=8,
        head_size=128,
        feed_forward_size=28672,
        vocab_size=128256,
        context_original=8192,
        rope_scaling="llama3",
        rope_factor=8.0,
    ),
}


class WeightType(NamedTuple):
    """A type that weights may have: ggml's id, llama.cpp's number for a file mostly of that type."""

    ggml_type: int
    file_type: int


WEIGHT_TYPES = {
    "F32": WeightType(0, 0),
    "F16": WeightType(1, 1),
    "Q4_0": WeightType(2, 2),
    "Q4_1": WeightType(3, 3),
    "Q5_0": WeightType(6, 8),
    "Q5_1": WeightType(7, 9),
    "Q8_0": WeightType(8, 7),
    "Q2_K": WeightType(10, 10),
    "Q3_K": WeightType(11, 11),
    "Q4_K": WeightType(12, 14),
    "Q5_K": WeightType(13, 16),
    "Q6_K": WeightType(14, 18),
    "IQ2_XXS": WeightType(16, 19),
    "IQ2_XS": WeightType(17, 20),
    "IQ3_XXS": WeightType(18, 23),
    "IQ1_S": WeightType(19, 24),
    "IQ4_NL": WeightType(20, 25),
    "IQ3_S": WeightType(21, 26),
    "IQ2_S": WeightType(22, 28),
    "IQ4_XS": WeightType(23, 30),
    "IQ1_M": WeightType(29, 31),
    "BF16": WeightType(30, 32),
    "TQ1_0": WeightType(34, 36),
    "TQ2_0": WeightType(35, 37),
    "MXFP4": WeightType(39, 38),
    "NVFP4": WeightType(40, 39),
    "Q1_0": WeightType(41, 40),
}
FILE_TYPES_MIXED = {"Q3_K": 12, "Q4_K": 15, "Q5_K": 17}  # what is called Q4_K_M, and so on


class TensorPlan(NamedTuple):
    """A tensor to be written; `shape` in ggml's order, fastest first. `kind` says how its values are drawn."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    kind: Literal["matrix", "norm", "bias", "rope_factors"]


def write_random_model(
    path: str | Path,
    shape: ModelShape,
    *,
    quantisation: str = "Q4_K",
    output_quantisation: str | None = None,
    mixed: bool = False,
    tokenizer: Literal["bpe", "spm"] = "bpe",
    seed: int = 0,
) -> int:
    """Writes a model file; it appears at `path` only once it is complete. Returns its size in bytes.

    Memory stays below some 100 MB however large the file.

    Args:
        quantisation: of the matrices, a name in `WEIGHT_TYPES`. Rows that its blocks do not divide are Q8_0 or F16.
        output_quantisation: of the output matrix (with tied embeddings, of the token embeddings); by default Q6_K, and
            `quantisation` itself if that is Q8_0 or a float, as llama.cpp's own quantiser chooses.
        mixed: more bits for some matrices, as in the types called Q4_K_M: Q6_K for attn_v and ffn_down in the first and
            last eighth of the layers and in every third between.
        tokenizer: byte-level BPE as of Llama 3 and Qwen, or SentencePiece as of Llama 2.
        seed: the same seed and arguments give the same bytes, for one version of ggml.

    Raises:
        ValueError: an unknown type, or a vocabulary too small for the tokenizer.
    """
    for name in (quantisation, output_quantisation or quantisation):
        if name not in WEIGHT_TYPES:
            raise ValueError(f"no weights have the type '{name}': {', '.join(WEIGHT_TYPES)} exist")
    if output_quantisation is None:
        output_quantisation = quantisation if quantisation in ("F32", "F16", "BF16", "Q8_0") else "Q6_K"
    plans = plan_tensors(shape, quantisation=quantisation, output_quantisation=output_quantisation, mixed=mixed)
    metadata = describe(shape, quantisation=quantisation, mixed=mixed) | make_vocabulary(shape, tokenizer)
    return write_gguf(path, metadata, _tensors(plans, shape=shape, seed=seed))


# The shape as keys and tensors


def describe(shape: ModelShape, *, quantisation: str, mixed: bool) -> dict[str, Any]:
    """The metadata of the network, under the keys of llama.cpp's converters."""
    key = shape.architecture
    file_type = WEIGHT_TYPES[quantisation].file_type
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
        "general.file_type": FILE_TYPES_MIXED.get(quantisation, file_type) if mixed else file_type,
        "general.quantization_version": 2,
    }


def plan_tensors(shape: ModelShape, *, quantisation: str, output_quantisation: str, mixed: bool = False) -> list[TensorPlan]:
    """Every tensor of the file, in the order of the file."""
    embedding_type = output_quantisation if shape.tied_embeddings else quantisation
    plans = [_matrix("token_embd.weight", shape.hidden_size, shape.vocab_size, embedding_type)]
    if shape.rope_scaling == "llama3":
        plans.append(TensorPlan("rope_freqs.weight", (shape.head_size // 2,), "F32", "rope_factors"))
    for layer in range(shape.num_layers):
        better = mixed and _deserves_more_bits(layer, shape.num_layers)
        plans += _plan_layer(shape, f"blk.{layer}.", quantisation, "Q6_K" if better else quantisation)
    plans.append(TensorPlan("output_norm.weight", (shape.hidden_size,), "F32", "norm"))
    if not shape.tied_embeddings:
        plans.append(_matrix("output.weight", shape.hidden_size, shape.vocab_size, output_quantisation))
    return plans


def _plan_layer(shape: ModelShape, prefix: str, quantisation: str, quantisation_better: str) -> Iterator[TensorPlan]:
    hidden, query_width, kv_width = shape.hidden_size, shape.num_heads * shape.head_size, _kv_width(shape)
    yield TensorPlan(f"{prefix}attn_norm.weight", (hidden,), "F32", "norm")
    yield _matrix(f"{prefix}attn_q.weight", hidden, query_width, quantisation)
    yield _matrix(f"{prefix}attn_k.weight", hidden, kv_width, quantisation)
    yield _matrix(f"{prefix}attn_v.weight", hidden, kv_width, quantisation_better)
    yield _matrix(f"{prefix}attn_output.weight", query_width, hidden, quantisation)
    if shape.architecture == "qwen2":
        yield TensorPlan(f"{prefix}attn_q.bias", (query_width,), "F32", "bias")
        yield TensorPlan(f"{prefix}attn_k.bias", (kv_width,), "F32", "bias")
        yield TensorPlan(f"{prefix}attn_v.bias", (kv_width,), "F32", "bias")
    if shape.architecture == "qwen3":
        yield TensorPlan(f"{prefix}attn_q_norm.weight", (shape.head_size,), "F32", "norm")
        yield TensorPlan(f"{prefix}attn_k_norm.weight", (shape.head_size,), "F32", "norm")
    yield TensorPlan(f"{prefix}ffn_norm.weight", (hidden,), "F32", "norm")
    yield _matrix(f"{prefix}ffn_gate.weight", hidden, shape.feed_forward_size, quantisation)
    yield _matrix(f"{prefix}ffn_up.weight", hidden, shape.feed_forward_size, quantisation)
    yield _matrix(f"{prefix}ffn_down.weight", shape.feed_forward_size, hidden, quantisation_better)


def _kv_width(shape: ModelShape) -> int:
    return shape.num_kv_heads * shape.head_size


def _deserves_more_bits(layer: int, num_layers: int) -> bool:
    """The rule of llama.cpp's "_M" mixes."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _matrix(name: str, row_length: int, num_rows: int, type_name: str) -> TensorPlan:
    if row_length % _block_elements(type_name):
        type_name = "Q8_0" if row_length % _block_elements("Q8_0") == 0 else "F16"
    return TensorPlan(name, (row_length, num_rows), type_name, "matrix")


def _block_elements(type_name: str) -> int:
    from shoal.compute import ggml

    return int(ggml.lib.ggml_blck_size(WEIGHT_TYPES[type_name].ggml_type))


def _num_bytes(plan: TensorPlan) -> int:
    from shoal.compute import ggml

    row_bytes: int = ggml.lib.ggml_row_size(WEIGHT_TYPES[plan.type_name].ggml_type, plan.shape[0])
    return row_bytes * math.prod(plan.shape[1:])


# Values


class Pool:
    """Quantised pieces of rows, [num_pieces, piece_bytes], for one type and one row length.

    `num_elements` is how many will be drawn from it, by all tensors.
    """

    def __init__(self, type_name: str, row_length: int, *, num_elements: int, seed: int) -> None:
        self.piece_elements = math.gcd(row_length, PIECE_ELEMENTS)  # whole blocks: all have a power of two elements
        limit = POOL_ELEMENTS_SLOW if type_name.startswith(("IQ1", "IQ2", "IQ3")) else POOL_ELEMENTS
        num_pieces = max(1, min(num_elements, limit) // self.piece_elements)
        random = np.random.default_rng([seed, WEIGHT_TYPES[type_name].ggml_type, row_length])
        values = random.standard_normal((num_pieces, self.piece_elements), np.float32) / np.float32(row_length**0.5)
        self.pieces = quantise(values, type_name)

    def draw(self, num_elements: int, random: np.random.Generator) -> Iterator[Bytes]:
        """Chunks of bytes that make up `num_elements` consecutive elements."""
        num_pieces = num_elements // self.piece_elements
        if num_pieces <= len(self.pieces):
            yield self.pieces[random.permutation(len(self.pieces))[:num_pieces]]
            return
        step = max(1, CHUNK_BYTES // self.pieces.shape[1])
        for begin in range(0, num_pieces, step):
            yield self.pieces[random.integers(0, len(self.pieces), min(step, num_pieces - begin))]


def quantise(values: npt.NDArray[np.float32], type_name: str) -> Bytes:
    """Rows in a type of `WEIGHT_TYPES`, by ggml's own quantiser.

    Args:
        values: [num_rows, row_length]; the type's block divides `row_length`.

    Returns:
        uint8 [num_rows, row_bytes].
    """
    from shoal.compute import ggml

    num_rows, row_length = values.shape
    ggml_type = WEIGHT_TYPES[type_name].ggml_type
    rows = np.ascontiguousarray(values)
    quantised = np.empty((num_rows, ggml.lib.ggml_row_size(ggml_type, row_length)), np.uint8)
    importance = np.ones(row_length, np.float32)  # some types refuse to work without
    floats = ctypes.POINTER(ctypes.c_float)
    written = ggml.lib.ggml_quantize_chunk(
        ggml_type,
        rows.ctypes.data_as(floats),
        quantised.ctypes.data,
        0,
        num_rows,
        row_length,
        importance.ctypes.data_as(floats) if ggml.lib.ggml_quantize_requires_imatrix(ggml_type) else None,
    )
    assert written == quantised.nbytes, f"ggml wrote {written} bytes of {type_name}, {quantised.nbytes} were expected"
    return quantised


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
        case "bias":
            return np.float32(0.1) * noise
        case _:
            return rope_frequency_factors(shape)


# The vocabulary

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FREQUENT_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were her all she there would their we him been has when who will more no if out so said what up its about into than them
can only other new some could time these two may then do first any my now such like our over man me even most made after
also did many before must through back years where much your way well down should because each just those people how too
little state good very make world still own see men work long get here between both life being under never day same
another know while last might us great old year off come since against go
"""
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # token types of llama.cpp


def make_vocabulary(shape: ModelShape, tokenizer: Literal["bpe", "spm"]) -> dict[str, Any]:
    """The `tokenizer.*` keys of a vocabulary of exactly `shape.vocab_size` tokens that can spell every text."""
    if tokenizer == "bpe":
        return _make_bpe(shape.vocab_size, "llama-bpe" if shape.architecture == "llama" else "qwen2")
    return _make_spm(shape.vocab_size)


def _make_bpe(vocab_size: int, pre_tokenizer: str) -> dict[str, Any]:
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = _byte_letters()
    _check_room(vocab_size, len(control) + len(letters))
    tokens = control + letters
    merges: list[str] = []
    known = set(tokens)
    for left, right in _spell(f"\u0120{word}" for word in FREQUENT_WORDS.split()):
        if left + right not in known and len(tokens) < vocab_size:
            known.add(left + right)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    tokens += _filler(vocab_size - len(tokens), space="\u0120")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([CONTROL] * len(control) + [NORMAL] * (vocab_size - 3), np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _make_spm(vocab_size: int) -> dict[str, Any]:
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["\u2581", *(chr(code) for code in range(0x21, 0x7F))]
    _check_room(vocab_size, len(special) + len(byte_tokens) + len(letters))
    words = list(dict.fromkeys(left + right for left, right in _spell(f"\u2581{word}" for word in FREQUENT_WORDS.split())))
    words = words[: vocab_size - len(special) - len(byte_tokens) - len(letters)]
    tokens = special + byte_tokens + words + letters
    num_filler = vocab_size - len(tokens)
    types = [UNKNOWN, *[CONTROL] * 4, *[BYTE] * 256, *[NORMAL] * (vocab_size - len(special) - 256)]
    # The better the score, the earlier two pieces are merged; letters, which nothing merges into, come last.
    scores = np.concatenate([np.zeros(len(special) + 256), -1.0 - np.arange(vocab_size - len(special) - 256)])
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens + _filler(num_filler, space="\u2581"),
        "tokenizer.ggml.scores": scores.astype(np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _check_room(vocab_size: int, needed: int) -> None:
    if vocab_size < needed:
        raise ValueError(f"a vocabulary of {vocab_size} tokens cannot spell every text: it needs at least {needed}")


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in byte-level BPE, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def _spell(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The pairs by which each word is put together from its letters, from left to right."""
    for word in words:
        for end in range(1, len(word)):
            yield word[:end], word[end]


def _filler(count: int, *, space: str) -> list[str]:
    """Tokens that no text is cut into: no tokenizer joins brackets and digits."""
    return [f"{space}<{index}>" for index in range(count)]


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
        ggml_type = WEIGHT_TYPES[plan.type_name].ggml_type
        tensors.append(TensorData(plan.name, plan.shape, ggml_type, _num_bytes(plan), chunks))
    return tensors


def _make_pools(plans: list[TensorPlan], *, seed: int) -> dict[tuple[str, int], Pool]:
    num_elements: dict[tuple[str, int], int] = {}
    for plan in plans:
        if plan.kind == "matrix":
            key = (plan.type_name, plan.shape[0])
            num_elements[key] = num_elements.get(key, 0) + math.prod(plan.shape)
    return {
        (type_name, row_length): Pool(type_name, row_length, num_elements=count, seed=seed)
        for (type_name, row_length), count in num_elements.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """`python -m shoal.lab.random_model SHAPE PATH`"""
    parser = argparse.ArgumentParser(prog="shoal.lab.random_model", description="Write a model with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--architecture", choices=["llama", "qwen2", "qwen3"], default="llama")
    parser.add_argument("--quantisation", choices=WEIGHT_TYPES, default="Q4_K", metavar="TYPE")
    parser.add_argument("--output-quantisation", choices=WEIGHT_TYPES, default=None, metavar="TYPE")
    parser.add_argument("--mixed", action="store_true", help="more bits for some matrices, as in Q4_K_M")
    parser.add_argument("--tokenizer", choices=["bpe", "spm"], default="bpe")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    if options.architecture != "llama":
        shape = msgspec.structs.replace(shape, architecture=options.architecture, rope_scaling=None)
    size_bytes = write_random_model(
        options.path,
        shape,
        quantisation=options.quantisation,
        output_quantisation=options.output_quantisation,
        mixed=options.mixed,
        tokenizer=options.tokenizer,
        seed=options.seed,
    )
    sys.stdout.write(f"{options.path}: {shape.num_parameters:,} parameters, {size_bytes:,} bytes\n")


if __name__ == "__main__":
    main()

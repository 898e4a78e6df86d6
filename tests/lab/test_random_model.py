"""Random models: that independent readers and llama.cpp accept what we write."""

from __future__ import annotations

import subprocess
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from gguf.quants import dequantize

from shoal.lab.quantisation import WEIGHT_TYPES, dequantise, quantise
from shoal.lab.random_blocks import draw_blocks
from shoal.lab.random_model import count_parameters, plan_tensors, rope_frequency_factors, write_random_model
from shoal.lab.shapes import SHAPES, ModelShape
from tests.compute.reference import reference_logits
from tests.oracle.llamacpp import Llama

TINY = SHAPES["tiny"]
VARIANTS = {
    "llama": TINY,
    "llama-llama3": msgspec.structs.replace(TINY, rope_scaling="llama3", rope_factor=8.0, context_original=64),
    "llama-yarn": msgspec.structs.replace(TINY, rope_scaling="yarn", rope_factor=4.0, context_original=64),
    "llama-narrow-heads": msgspec.structs.replace(TINY, head_size=32, tied_embeddings=True),
    "qwen2": msgspec.structs.replace(TINY, architecture="qwen2"),
    "qwen2-linear": msgspec.structs.replace(TINY, architecture="qwen2", rope_scaling="linear", rope_factor=4.0),
    "qwen3": msgspec.structs.replace(TINY, architecture="qwen3", head_size=32, tied_embeddings=True),
    "qwen3-yarn": msgspec.structs.replace(
        TINY, architecture="qwen3", rope_scaling="yarn", rope_factor=4.0, context_original=64
    ),
}
TOKEN_IDS = np.random.default_rng(1).integers(0, TINY.vocab_size, 100).tolist()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.slow
def test_llama_cpp_and_the_reference_agree(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_random_model(path, VARIANTS[name], quantisation="F32")
    reference = reference_logits(path, TOKEN_IDS)
    with Llama(path, context=256, flash_attention=False, cache_type="f32") as llama:
        assert np.abs(llama.logits(TOKEN_IDS) - reference).max() < 2e-4  # 2e-5 when last measured
    with Llama(path, context=256) as llama:
        assert np.abs(llama.logits(TOKEN_IDS) - reference).max() < 2e-2  # 5e-3: keys and values in f16
    assert 0.5 < reference.std() < 2.0


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q4_0", "Q3_K", "Q4_K", "IQ3_S", "IQ4_XS", "MXFP4", "TQ2_0"])
@pytest.mark.slow
def test_llama_cpp_runs_the_type(type_name: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_random_model(path, TINY, quantisation=type_name)
    with Llama(path, context=256) as llama:
        difference = llama.logits(TOKEN_IDS) - reference_logits(path, TOKEN_IDS)
    assert np.sqrt(np.mean(difference**2)) < 0.1  # of logits around 1: activations are rounded to 8 bits


@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
@pytest.mark.slow
def test_the_vocabulary_spells_every_text(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_random_model(path, TINY, tokenizer=tokenizer)  # type: ignore[arg-type]
    text = "<|im_start|>user\nthe of WORLD\t12 é😀 漢字<|im_end|>"
    with Llama(path, vocab_only=True) as llama:
        ids = llama.tokenize(text)
        spelt = b"".join(llama.piece(token_id) for token_id in ids).decode()
        assert spelt.replace(" ", "") == text.replace(" ", "")  # SentencePiece puts a space before the first letter
        assert llama.is_eog(ids[-1])
        assert len(llama.tokenize("the")) <= 3


QUICK_TYPES = [name for name in WEIGHT_TYPES if not name.startswith(("IQ1", "IQ2", "IQ3"))]
UNREADABLE_TYPES = ("Q1_0",)  # the gguf package has no dequantiser for it


@pytest.mark.parametrize("type_name", QUICK_TYPES)
def test_quantised_values_are_near_the_originals(type_name: str) -> None:
    values = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    rows = quantise(values, type_name)
    if type_name in UNREADABLE_TYPES:
        return
    restored = dequantize(rows, gguf.GGMLQuantizationType[type_name]).reshape(values.shape)
    error = np.sqrt(np.mean((restored - values) ** 2))
    bits = 8 * rows.nbytes / values.size
    assert error < {1: 1.0, 2: 0.9, 3: 0.3}.get(int(bits), 0.15)  # ternary types are the worst of 2 bits


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("first.gguf", "second.gguf", "other.gguf")]
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f"first.gguf.partial-{ended.pid}").write_bytes(b"of a writer that was killed")
    for path, seed in zip(paths, (5, 5, 6), strict=True):
        size_bytes = write_random_model(path, TINY, quantisation="Q8_0", seed=seed)
        assert path.stat().st_size == size_bytes
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second
    assert first != other
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # nothing partial is left behind


def test_rows_that_blocks_do_not_divide_are_kept_wider(tmp_path: Path) -> None:
    shape = msgspec.structs.replace(TINY, hidden_size=96, num_heads=3, num_kv_heads=1, head_size=32, feed_forward_size=80)
    write_random_model(tmp_path / "odd.gguf", shape, quantisation="Q4_K")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "odd.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["blk.0.ffn_down.weight"] == "F16"


def types_of(name: str, quantisation: str, **changes: int) -> dict[str, str]:
    shape = msgspec.structs.replace(SHAPES[name], **changes)
    plans = plan_tensors(shape, quantisation=quantisation)
    return {plan.name.removesuffix(".weight"): plan.type_name for plan in plans if plan.kind == "matrix"}


def test_medium_mixes_favour_some_layers() -> None:
    types = types_of("llama-3.2-1b", "Q4_K_M")
    better = [0, 1, 4, 7, 10, 13, 14, 15]
    assert [layer for layer in range(16) if types[f"blk.{layer}.attn_v"] == "Q6_K"] == better
    assert [layer for layer in range(16) if types[f"blk.{layer}.ffn_down"] == "Q6_K"] == better
    assert types["blk.0.attn_q"] == types["blk.0.ffn_up"] == types["blk.2.attn_v"] == "Q4_K"
    assert types["token_embd"] == "Q6_K"


def test_the_other_mixes() -> None:
    small = types_of("llama-3-8b", "Q4_K_S")
    assert [layer for layer in range(32) if small[f"blk.{layer}.attn_v"] == "Q5_K"] == [0, 1, 2, 3]
    assert [layer for layer in range(32) if small[f"blk.{layer}.ffn_down"] == "Q5_K"] == [0, 1, 2, 3]
    assert (small["token_embd"], small["output"]) == ("Q4_K", "Q6_K")
    large = types_of("llama-3-8b", "Q3_K_L")
    assert {large[f"blk.9.{role}"] for role in ("attn_v", "attn_output", "ffn_down")} == {"Q5_K"}
    two_bits = types_of("llama-3-8b", "Q2_K")
    assert [two_bits[f"blk.9.{role}"] for role in ("attn_v", "attn_output", "ffn_down", "ffn_up")] == [
        "Q4_K",
        "Q3_K",
        "Q3_K",
        "Q2_K",
    ]
    assert set(types_of("llama-3-8b", "Q5_K_S").values()) == {"Q5_K", "Q6_K"}


def test_a_70b_model_keeps_better_values_when_layers_are_left_out() -> None:
    for types in (types_of("llama-3-70b", "Q4_K_M"), types_of("llama-3-70b", "Q4_K_M", num_layers=8)):
        assert {types[name] for name in types if "attn_v" in name} == {"Q5_K", "Q6_K"}


def test_rows_that_no_large_block_divides_have_types_of_small_blocks() -> None:
    types = types_of("smollm2-135m", "Q4_K_M")  # rows of 576
    assert (types["blk.1.attn_q"], types["blk.0.attn_v"], types["blk.0.ffn_down"]) == ("Q5_0", "Q8_0", "Q6_K")
    assert types["token_embd"] == "Q8_0"


PUBLISHED_PARAMETERS = {
    "llama-3-8b": 8.03, "llama-3-70b": 70.6, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6, "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.8, "qwen2.5-32b": 32.8, "qwen2.5-72b": 72.7, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.8, "qwen3-32b": 32.8, "smollm2-135m": 0.1345,
    "smollm2-360m": 0.362, "smollm2-1.7b": 1.71,
}  # fmt: skip
"""Billions, as the models' public pages have them."""


def test_named_shapes_have_their_sizes() -> None:
    assert PUBLISHED_PARAMETERS.keys() | {"tiny"} == SHAPES.keys()
    for name, billions in PUBLISHED_PARAMETERS.items():
        assert count_parameters(SHAPES[name]) / 1e9 == pytest.approx(billions, rel=0.005), name


QUANTISED_BY_GGML = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0")


@pytest.mark.parametrize("type_name", sorted(WEIGHT_TYPES))
def test_random_weights_have_no_bias_and_the_deviation_asked_for(type_name: str) -> None:
    drawn = draw_blocks(type_name, 1 << 14, 0.02, np.random.default_rng(3))
    if type_name in ("F32", "F16", "BF16"):
        values = dequantize(drawn, gguf.GGMLQuantizationType[type_name])
    else:
        values = dequantise(drawn, type_name)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(0.02, rel=0.3 if type_name in QUANTISED_BY_GGML else 0.1)
    assert abs(values.mean()) < 0.02 * 0.1


def test_frequency_factors_keep_short_waves() -> None:
    factors = rope_frequency_factors(SHAPES["llama-3.1-8b"])
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)
    assert (np.diff(factors) >= 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 3},
        {"num_layers": 0},
        {"head_size": 3},
        {"architecture": "qwen3", "rope_scaling": "llama3"},
        {"architecture": "qwen2", "head_size": 32},
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        ModelShape(**(msgspec.structs.asdict(TINY) | change))


def test_a_small_vocabulary_and_unknown_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot spell"):
        write_random_model(tmp_path / "a.gguf", msgspec.structs.replace(TINY, vocab_size=258))
    with pytest.raises(ValueError, match="Q9_Z"):
        write_random_model(tmp_path / "a.gguf", TINY, quantisation="Q9_Z")
    assert not list(tmp_path.iterdir())

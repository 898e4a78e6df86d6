"""Decides on made-up vocabularies: GGUF metadata small enough to train in a moment, and files of it for llama.cpp."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tests.text.strings import diverse_strings

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<|user|>", "<|end|>"]
USER_DEFINED = ["<tool_call>", "[INST]", "<think>"]
Metadata = dict[str, Any]


def byte_level(pre: str = "gpt-2", **changes: Any) -> Metadata:
    """Metadata of a byte-level BPE tokenizer. Its merges reach across words, so that a wrong split shows."""
    learned, merges = _train_byte_level()
    tokens, types = _add_special(list(learned), [1] * len(learned))
    metadata: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin_of_text|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece(*, across_words: bool = False, num_equal: int = 1, **changes: Any) -> Metadata:
    """Metadata of a SentencePiece tokenizer; `num_equal` tokens after each other have the same score."""
    learned = _train_sentencepiece(across_words)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    added = [token for token in learned if token not in set(tokens)]
    scores = [0.0] * len(tokens) + [-float(rank // num_equal) for rank in range(len(added))]
    tokens, types = _add_special(tokens + added, types + [1] * len(added))
    metadata: Metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores + [0.0] * (len(tokens) - len(scores)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def write_gguf(path: Path, metadata: Metadata) -> None:
    """Writes a file of a model without weights, which llama.cpp loads for its vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(64)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        _write_value(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _write_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_string(key, value)


def _add_special(tokens: list[str], types: list[int]) -> tuple[list[str], list[int]]:
    for kind, texts in ((3, CONTROL), (4, USER_DEFINED)):
        for text in texts:
            if text in tokens:
                types[tokens.index(text)] = kind
            else:
                tokens.append(text)
                types.append(kind)
    return tokens, types


@cache
def _train_byte_level() -> tuple[tuple[str, ...], tuple[str, ...]]:
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\S{1,12}|.{1,12}|\s{1,6}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator(diverse_strings(600, seed=11), trainer)
    return _read_engine(engine)


@cache
def _train_sentencepiece(across_words: bool) -> tuple[str, ...]:
    engine = Tokenizer(models.BPE())
    pattern = r"[^\n]{1,10}|\n{1,3}" if across_words else "▁*[^▁]+|▁+"
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=2500, limit_alphabet=700, show_progress=False)
    # GGUF's tokens are C strings, which end at NUL.
    texts = [text.replace("\0", "").replace(" ", "▁") for text in diverse_strings(600, seed=12)]
    engine.train_from_iterator(texts, trainer)
    return _read_engine(engine)[0]


def _read_engine(engine: Tokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    model = json.loads(engine.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tuple(tokens), tuple(f"{left} {right}" for left, right in model["merges"])

"""A made-up but complete vocabulary of any size: decides which tokens a random model has.

A few hundred tokens spell every text, the rest are fillers that no text is cut into but that a model may choose, so that
embedding and output have their true widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from shoal.lab.shapes import ModelShape

NUM_CONTROL_TOKENS = 5
"""The first ids, in which either tokenizer has all its control tokens."""

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

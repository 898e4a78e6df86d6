from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import BadModelFile, RequestError, UnsupportedModel
from shoal.text.tokenizer import Tokenizer
from tests.text.strings import diverse_strings
from tests.text.vocabularies import Metadata, byte_level, sentencepiece

# Words that are tokens, and none of the tokens' characters is missing.
WORDS = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "▁ab", "<0xC3>", "<0xA9>", "[X]"],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 6, 6, 4],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0, 0.0, 0.0],
}

QWEN2 = Tokenizer.from_metadata(byte_level("qwen2"))


def words(**changes: Any) -> Tokenizer:
    return Tokenizer.from_metadata(WORDS | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})


def ends_of(control: list[str], **changes: Any) -> set[str]:
    """Which of the control tokens end a generation."""
    tokens = [*WORDS["tokenizer.ggml.tokens"], *control]
    types = [*WORDS["tokenizer.ggml.token_type"], *[3] * len(control)]
    tokenizer = words(tokens=tokens, token_type=types, scores=[0.0] * len(tokens), **changes)
    return {tokenizer.text_of(token_id) for token_id in tokenizer.eog_ids}


def test_pair_of_best_score_joins_first() -> None:
    tokenizer = words(add_space_prefix=False)
    assert [tokenizer.text_of(token_id) for token_id in tokenizer.encode("abc")] == ["a", "bc"]
    assert [tokenizer.text_of(token_id) for token_id in tokenizer.encode("ab")] == ["ab"]


def test_of_equal_scores_the_left_pair_joins_first() -> None:
    tokenizer = words(add_space_prefix=False, scores=[-1.0] * 13)
    assert [tokenizer.text_of(token_id) for token_id in tokenizer.encode("abc")] == ["ab", "c"]


def test_character_without_token_is_written_as_bytes() -> None:
    tokenizer = words(add_space_prefix=False)
    assert [tokenizer.text_of(token_id) for token_id in tokenizer.encode("aéz")] == ["a", "<0xC3>", "<0xA9>", "<unk>"]
    assert tokenizer.decode(tokenizer.encode("aéb")) == "aéb"


def test_space_goes_before_text_at_the_start_and_after_special_tokens() -> None:
    tokenizer = words()
    texts = [tokenizer.text_of(token_id) for token_id in tokenizer.encode("ab[X]ab", add_special=True)]
    assert texts == ["<s>", "▁ab", "[X]", "▁ab"]
    assert tokenizer.decode(tokenizer.encode("ab", add_special=True)) == "ab"
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_control_tokens_in_text_are_text_unless_parsed() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level())
    end_id = tokenizer.id_of("<|eot_id|>")
    assert end_id in tokenizer.encode("a<|eot_id|>b")
    assert end_id not in tokenizer.encode("a<|eot_id|>b", parse_special=False)
    assert tokenizer.id_of("<think>") in tokenizer.encode("a<think>b", parse_special=False)


def test_phi_3_swallows_space_after_special_tokens() -> None:
    phi = Tokenizer.from_metadata(WORDS | {"general.name": "Phi-3 mini"})
    assert [phi.text_of(token_id) for token_id in phi.encode("[X]  \n ab")] == ["[X]", "▁ab"]


def test_bos_and_eos_come_as_the_file_says() -> None:
    plain = Tokenizer.from_metadata(byte_level())
    assert plain.encode("", add_special=True) == []
    both = Tokenizer.from_metadata(byte_level(add_bos_token=True, add_eos_token=True))
    assert both.encode("", add_special=True) == [both.bos_id, both.eos_id]
    assert Tokenizer.from_metadata(byte_level("llama-bpe")).add_bos
    assert Tokenizer.from_metadata(sentencepiece()).add_bos


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_decode_undoes_encode(make: Callable[[], Metadata]) -> None:
    tokenizer = Tokenizer.from_metadata(make())
    # SentencePiece writes spaces as U+2581, and puts one after each special token.
    texts = [text for text in diverse_strings(300, seed=3) if not set(text) & set("<[▁")]
    assert len(texts) > 100
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_any_text_survives_byte_level_encoding(text: str) -> None:
    assert QWEN2.decode(QWEN2.encode(text), skip_special=False) == text


def test_decode_skips_special_tokens_and_replaces_broken_characters() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level())
    end_id = tokenizer.id_of("<|eot_id|>")
    assert end_id is not None
    assert tokenizer.decode([*tokenizer.encode("a"), end_id]) == "a"
    assert tokenizer.decode([*tokenizer.encode("a"), end_id], skip_special=False) == "a<|eot_id|>"
    broken = [token_id for token_id in range(256) if tokenizer.token_bytes(token_id) == b"\xf0"]
    assert tokenizer.decode(broken) == "\ufffd"


def test_merges_into_no_token_are_written_as_what_they_were_made_of() -> None:
    metadata = byte_level()
    known = set(metadata["tokenizer.ggml.tokens"])
    made = next(a + b for a in "jqzx" for b in "JQZX" if a + b not in known)
    merges = [f"{made[0]} {made[1]}", *metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.merges": merges})
    assert tokenizer.decode(tokenizer.encode(made)) == made


def test_numpy_arrays_serve_as_lists() -> None:
    metadata = sentencepiece()
    arrays = metadata | {
        "tokenizer.ggml.scores": np.array(metadata["tokenizer.ggml.scores"], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(metadata["tokenizer.ggml.token_type"], dtype=np.int32),
        "tokenizer.ggml.tokens": np.array(metadata["tokenizer.ggml.tokens"], dtype=object),
    }
    text = "naïve words, 你好"
    assert Tokenizer.from_metadata(arrays).encode(text) == Tokenizer.from_metadata(metadata).encode(text)


def test_ends_of_generation_are_found_by_id_and_by_name() -> None:
    assert ends_of([]) == {"</s>"}
    assert ends_of(["<|im_end|>", "<|other|>"]) == {"</s>", "<|im_end|>"}
    assert ends_of(["<|other|>"], eot_token_id=13) == {"</s>", "<|other|>"}
    assert ends_of(["<|fim_pad|>", "<|fim_prefix|>"]) == {"</s>", "<|fim_pad|>"}


def test_names_that_end_only_part_of_an_answer_are_left_out() -> None:
    assert ends_of(["<|end|>"]) == {"</s>", "<|end|>"}
    assert ends_of(["<|end|>", "<|return|>", "<|call|>"]) == {"</s>", "<|return|>", "<|call|>"}
    assert ends_of(["<|tool_response>", "<turn|>"]) == {"<|tool_response>", "<turn|>"}


def test_unsupported_kinds_are_named_with_what_is_supported() -> None:
    with pytest.raises(UnsupportedModel, match=r"'rwkv'.*supported are: gpt2"):
        Tokenizer.from_metadata({"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(UnsupportedModel, match=r"'kimi-k2'.*supported are: .*qwen2"):
        Tokenizer.from_metadata(byte_level("kimi-k2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "no vocabulary"),
        ({"tokens": ["a", "a"]}, "duplicate tokens: 'a'"),
        ({"tokens": "abc"}, "not a list"),
        ({"token_type": [1]}, "1 entries for"),
        ({"merges": []}, "no merges"),
        ({"merges": ["ab"]}, "not two texts"),
    ],
)
def test_damaged_metadata_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadModelFile, match=message):
        Tokenizer.from_metadata(byte_level(**changes))


def test_ids_outside_of_the_vocabulary_and_half_characters_are_refused() -> None:
    tokenizer = words()
    with pytest.raises(ValueError, match="token id 13 is outside of the vocabulary, 0 to 12"):
        tokenizer.decode([13])
    with pytest.raises(RequestError, match=r"U\+D800.* at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.slow
def test_large_vocabulary_builds_quickly() -> None:
    metadata = byte_level()
    tokens, merges = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.merges"])
    for left in tokens[:256]:
        for right in tokens[:256]:
            tokens.append(f"{left}{right}\u0178\u0178")
            merges.append(f"{left}{right}\u0178 \u0178")
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": None}
    begin_s = time.perf_counter()
    Tokenizer.from_metadata(metadata)
    # 0.2 s on an idle machine.
    assert time.perf_counter() - begin_s < 5.0

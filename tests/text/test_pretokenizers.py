from __future__ import annotations

import pytest

from shoal.errors import UnsupportedModel
from shoal.text.pretokenizers import PRE_TOKENIZERS, find_pre_tokenizer
from shoal.text.tokenizer import Tokenizer
from tests.text.strings import diverse_strings
from tests.text.vocabularies import byte_level


@pytest.mark.parametrize("name", sorted(name for name, split in PRE_TOKENIZERS.items() if split.byte_level))
def test_no_split_loses_text(name: str) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(name))
    for text in diverse_strings(40, seed=5):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "we'll 12345", ["we", "'ll", " 12345"]),
        ("smollm", "we'll 123", ["we", "'ll", " ", "1", "2", "3"]),
        ("llama-bpe", "WE'LL 12345", ["WE", "'LL", " ", "123", "45"]),
        ("qwen2", "a\n\n b 12", ["a", "\n\n", " b", " ", "1", "2"]),
        ("tekken", "helloWorld!", ["hello", "World", "!"]),
        ("tiny_aya", "1234567", ["1", "234", "567"]),
    ],
)
def test_splits(name: str, text: str, pieces: list[str]) -> None:
    """A piece is a token if merges make it one, so all pieces and all that leads to them are made tokens."""
    metadata = byte_level(name)
    engine = Tokenizer.from_metadata(metadata)._encoder._engine  # type: ignore[attr-defined]
    split = engine.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces


def test_missing_name_means_default() -> None:
    assert find_pre_tokenizer("") is PRE_TOKENIZERS["default"]


def test_unknown_name_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="'superbpe', which is not supported"):
        find_pre_tokenizer("superbpe")

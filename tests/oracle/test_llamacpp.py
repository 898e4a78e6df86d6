"""The oracle itself: that it answers, that its answers agree with each other, and that it fails in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES
from tests.oracle.llamacpp import Llama, LlamaError

pytestmark = pytest.mark.slow  # a process that loads llama.cpp: 0.3 s

PROMPT_IDS = [1, 40, 70, 2, 300]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("oracle") / "tiny.gguf"
    write_random_model(path, SHAPES["tiny"])
    return path


@pytest.fixture(scope="module")
def llama(model_path: Path) -> Iterator[Llama]:
    with Llama(model_path, context=256) as llama:
        yield llama


def test_it_describes_the_model(llama: Llama) -> None:
    assert "Q4_K" in llama.description
    assert (llama.vocab_size, llama.context, llama.threads) == (512, 256, 1)
    assert llama.flash_attention


def test_tokens_and_pieces_are_inverse(llama: Llama) -> None:
    text = "<|im_start|>user\nthe \0 é😀 12<|im_end|>"
    ids = llama.tokenize(text)
    assert b"".join(llama.piece(token_id) for token_id in ids).decode() == text
    assert llama.tokenize_many([text, "of"]) == [ids, llama.tokenize("of")]
    assert llama.is_eog(ids[-1])
    assert not llama.is_eog(ids[1])


def test_greedy_continues_with_the_best_logit(llama: Llama) -> None:
    ids, gaps = llama.greedy(PROMPT_IDS, 4)
    logits = llama.logits(PROMPT_IDS + ids[:3])
    assert logits.shape == (8, 512)
    assert logits.dtype == np.float32
    assert logits[-4:].argmax(axis=1).tolist() == ids
    best = np.sort(logits[-4:], axis=1)
    np.testing.assert_allclose(gaps, best[:, -1] - best[:, -2], atol=0.05)


def test_it_times(llama: Llama) -> None:
    assert llama.time_prefill(64) > 0.0
    durations_s = llama.time_decode(3, at_position=10)
    assert len(durations_s) == 3
    assert min(durations_s) > 0.0


def test_a_refused_request_leaves_it_usable(llama: Llama) -> None:
    with pytest.raises(LlamaError, match="do not fit into the context of 256"):
        llama.logits([1] * 257)
    with pytest.raises(LlamaError, match="token ids go from 0 to 511"):
        llama.logits([512])
    assert llama.piece(1) == b"<|im_start|>"


def test_the_vocabulary_alone(model_path: Path) -> None:
    with Llama(model_path, vocab_only=True) as llama:
        assert llama.piece(2) == b"<|im_end|>"
        with pytest.raises(LlamaError, match="only the vocabulary"):
            llama.logits([1])


def test_a_file_that_llama_cpp_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "nothing.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(LlamaError, match="does not load"):
        Llama(path)

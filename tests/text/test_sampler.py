from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.text.sampler import Sampler, SamplingParameters, logprobs

GOLDEN_PLAIN = [43, 5, 15, 12, 12, 51, 57, 19]
GOLDEN_CUT = [62, 19, 57, 57, 38, 55, 29, 12]


def logits_of(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def sampler_of(vocab_size: int, prompt_ids: tuple[int, ...] = (), **parameters: Any) -> Sampler:
    return Sampler(SamplingParameters(**parameters), vocab_size=vocab_size, prompt_ids=prompt_ids)


def possible(logits: npt.NDArray[np.float32], **parameters: Any) -> set[int]:
    """All tokens that many draws give."""
    sampler = sampler_of(len(logits), seed=0, **parameters)
    return {sampler.sample(logits) for _ in range(400)}


def greedy(logits: npt.NDArray[np.float32], prompt: tuple[int, ...], answer: tuple[int, ...], **parameters: Any) -> int:
    sampler = sampler_of(len(logits), prompt, temperature=0, **parameters)
    for token_id in answer:
        sampler.accept(token_id)
    return sampler.sample(logits)


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    assert sampler_of(4, temperature=0).sample(logits_of(1, 3, 3, 2)) == 1


def test_equal_seeds_give_equal_tokens() -> None:
    logits = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    first, second, other = (sampler_of(500, seed=seed) for seed in (7, 7, 8))
    drawn = [first.sample(logits) for _ in range(50)]
    assert drawn == [second.sample(logits) for _ in range(50)]
    assert drawn != [other.sample(logits) for _ in range(50)]


def test_draws_are_the_same_on_every_platform() -> None:
    """Golden ids: a change here breaks answers that are to be repeated elsewhere."""
    logits = logits_of(*(index * 37 % 64 / 16 for index in range(64)))
    plain, cut = sampler_of(64, seed=123), sampler_of(64, seed=123, top_k=20, top_p=0.9)
    assert [plain.sample(logits) for _ in range(8)] == GOLDEN_PLAIN
    assert [cut.sample(logits) for _ in range(8)] == GOLDEN_CUT


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampler = sampler_of(4, seed=2)
    counts = np.bincount([sampler.sample(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_limits_leave_the_likeliest() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.3, 0.15], dtype=np.float32))
    assert possible(logits, top_k=2) == {1, 2}
    assert possible(logits, top_p=0.75) == {1, 2}
    assert possible(logits, top_p=0.85) == {1, 2, 3}
    assert possible(logits, top_p=1e-9) == {1}
    assert possible(logits, min_p=0.25) == {1, 2, 3}
    assert possible(logits, top_k=3, top_p=0.8) == {1, 2}
    assert possible(logits, temperature=0.01) == {1}
    assert possible(logits, top_k=1000) == {0, 1, 2, 3}


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.0), st.integers(0, 50), st.floats(0, 0.3))
def test_limits_are_those_of_the_sorted_vocabulary(seed: int, top_p: float, top_k: int, min_p: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(300).astype(np.float32)
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    weights = np.exp(logits[order].astype(np.float64) - logits.max())
    inside = np.cumsum(weights) - weights < top_p * weights.sum() * (1 + 1e-5)
    allowed = set(order[inside & (weights >= min_p * (1 - 1e-5))].tolist()) | {int(order[0])}
    sampler = sampler_of(300, seed=seed, top_p=top_p, top_k=top_k, min_p=min_p)
    assert {sampler.sample(logits) for _ in range(20)} <= allowed


def test_wide_nucleus_reaches_past_the_first_candidates() -> None:
    """All tokens are equally likely: top-p keeps the lower half of the ids."""
    sampler = sampler_of(20_000, seed=0, top_p=0.5)
    drawn = [sampler.sample(np.zeros(20_000, dtype=np.float32)) for _ in range(20)]
    assert max(drawn) <= 10_000
    assert max(drawn) > 5_000


def test_repetition_penalty_sees_prompt_and_answer() -> None:
    logits = logits_of(2.0, 1.9, 1.8, -1.0)
    assert greedy(logits, (0,), (1,), repetition_penalty=1.2) == 2
    assert greedy(-logits, (), (3,), repetition_penalty=1.2) == 3
    assert greedy(logits_of(-1.0, -1.1), (0,), (), repetition_penalty=1.2) == 1


def test_presence_and_frequency_penalties_see_the_answer_only() -> None:
    logits = logits_of(2.0, 1.5, 0.9)
    assert greedy(logits, (0,), (), presence_penalty=1.0) == 0
    assert greedy(logits, (), (0,), presence_penalty=1.0) == 1
    assert greedy(logits, (), (0, 1), frequency_penalty=0.4) == 0
    assert greedy(logits, (), (0, 0, 0, 1), frequency_penalty=0.4) == 1


def test_penalties_forget_tokens_outside_of_the_window() -> None:
    logits = logits_of(2.0, 1.5, 0.9)
    assert greedy(logits, (), (0, 2), presence_penalty=1.0, penalty_last_n=2) == 1
    assert greedy(logits, (), (0, 2), presence_penalty=1.0, penalty_last_n=1) == 0
    assert greedy(logits, (), (0,), presence_penalty=1.0, penalty_last_n=0) == 0


def test_bias_and_mask() -> None:
    logits = logits_of(2.0, 1.5, 0.9)
    assert sampler_of(3, temperature=0, logit_bias={2: 5.0}).sample(logits) == 2
    mask = np.array([False, True, True])
    assert sampler_of(3, temperature=0).sample(logits, allowed=mask) == 1
    assert sampler_of(3, top_k=3, seed=1).sample(logits, allowed=np.array([False, False, True])) == 2
    np.testing.assert_array_equal(logits, logits_of(2.0, 1.5, 0.9))


def test_impossible_tokens_are_never_drawn() -> None:
    logits = logits_of(-np.inf, 0.0, -np.inf)
    for parameters in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}):
        assert possible(logits, **parameters) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_named(temperature: float) -> None:
    sampler = sampler_of(2, temperature=temperature)
    with pytest.raises(ShoalError, match="logits hold nan"):
        sampler.sample(logits_of(0.0, math.nan))
    with pytest.raises(ShoalError, match="no token is possible"):
        sampler.sample(logits_of(-np.inf, -np.inf))
    with pytest.raises(ValueError, match="shape"):
        sampler.sample(logits_of(0.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("penalty_last_n", -2),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed is"):
        SamplingParameters(**{name: value})


def test_ids_outside_of_the_vocabulary_are_named() -> None:
    with pytest.raises(ValueError, match="logit_bias has token id 9"):
        sampler_of(3, logit_bias={9: 1.0})
    with pytest.raises(ValueError, match="logit_bias of token 1 is 2000"):
        SamplingParameters(logit_bias={1: 2000.0})
    with pytest.raises(ValueError, match="the answer has token id 3"):
        sampler_of(3).accept(3)


def test_negative_seeds_are_seeds() -> None:
    logits = np.zeros(100, dtype=np.float32)
    assert sampler_of(100, seed=-1).sample(logits) == sampler_of(100, seed=-1).sample(logits)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], dtype=np.float32)) + 5
    chosen, top = logprobs(logits, 0, 2)
    assert chosen == pytest.approx(math.log(0.1), abs=1e-5)
    assert [token_id for token_id, _ in top] == [1, 2]
    assert [value for _, value in top] == pytest.approx([math.log(0.6), math.log(0.3)], abs=1e-5)
    assert logprobs(logits, 0, 0)[1] == []
    with pytest.raises(ValueError, match="top is 4"):
        logprobs(logits, 0, 4)

"""How prompts are cut, and what is kept of the last conversation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ContextExceeded
from shoal.inference.batching import MicroBatch, common_prefix, micro_batches, plan_prefill


def test_a_fresh_prompt_is_computed_whole() -> None:
    plan = plan_prefill([], range(1000), micro_batch=512, context=2048, num_answer=1)
    assert plan.num_kept == 0
    assert plan.batches == (MicroBatch(0, 512), MicroBatch(512, 1000))


def test_a_longer_conversation_starts_where_it_differs() -> None:
    plan = plan_prefill([1, 2, 3, 9, 9], [1, 2, 3, 4, 5, 6], micro_batch=512, context=100, num_answer=1)
    assert plan.num_kept == 3
    assert plan.batches == (MicroBatch(3, 6),)


def test_the_last_token_is_always_computed_because_its_logits_are_needed() -> None:
    plan = plan_prefill([1, 2, 3, 4], [1, 2, 3], micro_batch=512, context=100, num_answer=1)
    assert plan.num_kept == 2
    assert plan.batches == (MicroBatch(2, 3),)


def test_a_prompt_beyond_the_context_is_refused_with_both_figures() -> None:
    with pytest.raises(ContextExceeded, match="prompt has 100 tokens and the answer needs 1, the context holds 100"):
        plan_prefill([], range(100), micro_batch=512, context=100, num_answer=1)


def test_an_empty_prompt_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        plan_prefill([1], [], micro_batch=512, context=100, num_answer=1)


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_the_common_prefix_is_the_longest(kept: list[int], wanted: list[int]) -> None:
    count = common_prefix(kept, wanted)
    assert kept[:count] == wanted[:count]
    assert kept[count : count + 1] != wanted[count : count + 1] or count == min(len(kept), len(wanted))


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 600))
def test_batches_cover_every_token_once(first: int, length: int, micro_batch: int) -> None:
    covered = [
        at
        for batch in micro_batches(first, first + length, micro_batch=micro_batch)
        for at in range(batch.first, batch.stop)
    ]
    assert covered == list(range(first, first + length))

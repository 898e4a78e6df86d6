"""Decides how a prompt is cut into micro-batches and what of the last conversation need not be computed again.

Results are the same bits only for equal micro-batch boundaries, so boundaries depend on nothing but the positions and
the micro-batch size: a multiple of the size, counted from the first position that is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.errors import ContextExceeded


class MicroBatch(msgspec.Struct, frozen=True):
    """Tokens [first, stop) of a prompt, computed at once."""

    first: int
    stop: int


class PrefillPlan(msgspec.Struct, frozen=True):
    """`num_kept` tokens are in the cache already; `batches` are what remains, in order, and never empty."""

    num_kept: int
    batches: tuple[MicroBatch, ...]


def common_prefix(kept_ids: Sequence[int], token_ids: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for kept, wanted in zip(kept_ids, token_ids, strict=False):
        if kept != wanted:
            break
        count += 1
    return count


def plan_prefill(
    kept_ids: Sequence[int], token_ids: Sequence[int], *, micro_batch: int, context: int, num_answer: int
) -> PrefillPlan:
    """Plans the prefill of `token_ids` over a cache that holds `kept_ids`.

    Args:
        num_answer: tokens that the answer must have room for; 0 where the prompt itself is what is asked about.

    Raises:
        ValueError: no tokens at all.
        ContextExceeded: prompt and answer do not fit the context.
    """
    if not token_ids:
        raise ValueError("the prompt has no tokens")
    if len(token_ids) + num_answer > context:
        raise ContextExceeded(
            f"the prompt has {len(token_ids)} tokens and the answer needs {num_answer}, the context holds {context}: "
            "shorten the prompt or raise --context"
        )
    # The last token is always computed: its logits are what the answer starts from.
    num_kept = min(common_prefix(kept_ids, token_ids), len(token_ids) - 1)
    return PrefillPlan(num_kept=num_kept, batches=micro_batches(num_kept, len(token_ids), micro_batch=micro_batch))


def micro_batches(first: int, stop: int, *, micro_batch: int) -> tuple[MicroBatch, ...]:
    """Cuts [first, stop) into runs of at most `micro_batch`."""
    return tuple(MicroBatch(at, min(at + micro_batch, stop)) for at in range(first, stop, micro_batch))

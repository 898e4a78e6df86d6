"""A stage of two backends, here two of the processor's: bit by bit what one of them computes, however layers are dealt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.split import SplitStage, split_windows
from shoal.compute.stage import Stage
from shoal.ids import LayerRange

PROMPT, STEPS = list(range(40, 60)), 4


@pytest.mark.parametrize(
    ("windows", "on_accelerator"),
    [([(0, 3)], [0]), ([(0, 3)], [1]), ([(0, 3)], [3]), ([(0, 2), (2, 3)], [1, 0]), ([(0, 1), (1, 3)], [1, 1])],
)
def test_two_backends_compute_what_one_does(
    tiny_model: Callable[[str, str], Path], windows: list[tuple[int, int]], on_accelerator: list[int]
) -> None:
    ranges = [LayerRange(first, stop) for first, stop in windows]
    sizes = {"context": 64, "micro_batch": 32, "head": True, "repack": False}
    with contextlib.closing(Model(tiny_model("llama", "Q4_K"))) as model:
        one = Stage(model, [LayerRange(0, 3)], Backend(), **sizes)  # type: ignore[arg-type]
        two = SplitStage(model, ranges, Backend(), Backend(), on_accelerator, **sizes)  # type: ignore[arg-type]
        with contextlib.closing(one), contextlib.closing(two):
            position, tokens = 0, PROMPT
            for _ in range(STEPS):
                expected = one.forward(one.embed(tokens), position, num_outputs=1).copy()
                x_BD = two.embed(tokens)
                for window in range(len(ranges)):
                    x_BD = two.forward(x_BD, position, window=window, num_outputs=1)
                assert np.array_equal(x_BD, expected)
                position += len(tokens)
                tokens = [int(expected[0].argmax())]
            hidden = one.forward(one.embed(tokens), position, wants_hidden=True).copy()
            x_BD = two.embed(tokens)
            for window in range(len(ranges)):
                x_BD = two.forward(x_BD, position, window=window, wants_hidden=True)
            assert np.array_equal(x_BD, hidden)


def test_more_than_a_window_has_cannot_be_the_accelerators() -> None:
    for counts in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError, match="do not fit windows"):
            split_windows([LayerRange(0, 3)], counts, head=True)

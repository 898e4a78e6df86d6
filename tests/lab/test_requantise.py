"""A real model in another type is the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.compute.backend import Backend
from shoal.compute.gguf import GGUFFile
from shoal.compute.model import Model
from shoal.compute.stage import Stage
from shoal.ids import LayerRange
from shoal.lab.random_model import write_random_model
from shoal.lab.requantise import requantise
from shoal.lab.shapes import SHAPES


def logits(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    model, backend = Model(path), Backend(num_threads=1)
    stage = Stage(model, [LayerRange(0, model.shape.num_layers)], backend, context=16, head=True, repack=False)
    try:
        return stage.forward_tokens([1, 2, 3], 0).copy()
    finally:
        stage.close()
        backend.close()
        model.close()


@pytest.mark.parametrize("source_type", ["F16", "Q4_1", "Q4_K_M"])
def test_as_f32_it_says_the_same(tmp_path: Path, source_type: str) -> None:
    source, larger = tmp_path / "source.gguf", tmp_path / "f32.gguf"
    write_random_model(source, SHAPES["tiny"], quantisation=source_type)
    size_bytes = requantise(source, larger, "F32")
    assert size_bytes == larger.stat().st_size > 1.9 * source.stat().st_size
    before, after = GGUFFile.open(source), GGUFFile.open(larger)
    assert set(before.metadata) == set(after.metadata)
    assert {info.type_name for info in after.tensors.values() if len(info.shape) > 1} == {"F32"}
    assert [info.shape for info in before.tensors.values()] == [info.shape for info in after.tensors.values()]
    before.close()
    after.close()
    # Activations are rounded where they meet quantised weights.
    np.testing.assert_allclose(logits(larger), logits(source), atol=0.15)


def test_f32_comes_back_as_it_was(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.gguf" for name in ("a", "b", "c")]
    write_random_model(paths[0], SHAPES["tiny"], quantisation="F16")
    requantise(paths[0], paths[1], "F32")
    requantise(paths[1], paths[2], "F16")
    assert np.array_equal(logits(paths[0]), logits(paths[2]))

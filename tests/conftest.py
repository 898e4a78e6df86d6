"""Models that many tests share, made once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from shoal.lab.random_model import SHAPES, write_random_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`tiny_model(architecture, quantisation)` is a random model of three layers of 256."""
    folder = tmp_path_factory.mktemp("models")

    def make(architecture: str, quantisation: str) -> Path:
        path = folder / f"{architecture}-{quantisation}.gguf"
        if not path.exists():
            shape = msgspec.structs.replace(SHAPES["tiny"], architecture=architecture)
            write_random_model(path, shape, quantisation=quantisation)
        return path

    return make

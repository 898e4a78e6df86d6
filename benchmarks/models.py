"""The models that benchmarks and tests run: a small real one, and random ones made on first use."""

from __future__ import annotations

from pathlib import Path

from shoal.cli.demo import demo_model
from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES

CACHE = Path(__file__).parent.parent / ".cache" / "models"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return demo_model()


def random_model(shape: str, quantisation: str, *, seed: int = 0) -> Path:
    """A model of a named shape with random weights, kept in `.cache`."""
    path = CACHE / f"{shape}-{quantisation}-{seed}.gguf"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        write_random_model(path, SHAPES[shape], quantisation=quantisation, seed=seed)
    return path

"""The architectures we run, by the name that `general.architecture` gives them."""

from __future__ import annotations

from shoal.compute.models import llama, qwen2, qwen3
from shoal.compute.models.transformer import Architecture
from shoal.errors import UnsupportedModel

ARCHITECTURES: dict[str, Architecture] = {
    known.name: known for known in (llama.ARCHITECTURE, qwen2.ARCHITECTURE, qwen3.ARCHITECTURE)
}


def architecture(name: str) -> Architecture:
    """Raises UnsupportedModel, naming those we run."""
    if name not in ARCHITECTURES:
        raise UnsupportedModel(f"architecture '{name}' is not one we run yet: {', '.join(ARCHITECTURES)} are")
    return ARCHITECTURES[name]

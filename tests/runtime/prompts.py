"""Prompts for comparing with llama.cpp: passages of the texts that Python carries, chosen by seed."""

from __future__ import annotations

import random
from pydoc_data.topics import topics


def passages(count: int, *, seed: int = 0) -> list[str]:
    """`count` passages of 60 to 600 characters, from as many different texts as there are."""
    rng = random.Random(seed)
    texts = sorted(text for text in topics.values() if len(text) > 1000)
    chosen = rng.sample(texts, min(count, len(texts)))
    chosen += rng.choices(texts, k=count - len(chosen))
    found = []
    for text in chosen:
        start = rng.randrange(0, len(text) - 700)
        found.append(text[start : start + rng.randrange(60, 600)])
    return found

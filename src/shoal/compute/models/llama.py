"""Llama and what shares its layer (SmolLM, Mistral, Llama 3): neighbouring rope pairs, no biases unless the file has them.

Source: Touvron et al., LLaMA (2023); Dubey et al., The Llama 3 Herd of Models (2024) for the rope frequency factors.
"""

from __future__ import annotations

from functools import partial

from shoal.compute.models.transformer import MATRICES, NORMS, ROPE_NORMAL, Architecture, attention_then_swiglu

ARCHITECTURE = Architecture(
    name="llama",
    matrices=MATRICES,
    vectors=NORMS,
    optional_vectors=("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
    layer=partial(attention_then_swiglu, rope_mode=ROPE_NORMAL),
)

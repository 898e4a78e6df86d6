"""Qwen3: no biases; queries and keys are normalised per head before rope; the head size is its own, not hidden / heads.

Source: Yang et al., Qwen3 Technical Report (2025).
"""

from __future__ import annotations

from functools import partial

from shoal.compute.models.transformer import MATRICES, NORMS, ROPE_NEOX, Architecture, attention_then_swiglu

ARCHITECTURE = Architecture(
    name="qwen3",
    matrices=MATRICES,
    vectors=(*NORMS, "attn_q_norm.weight", "attn_k_norm.weight"),
    optional_vectors=("attn_output.bias",),
    layer=partial(attention_then_swiglu, rope_mode=ROPE_NEOX, normalise_heads=True),
)

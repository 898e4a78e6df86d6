"""Qwen2 and Qwen2.5: as llama, with biases on queries, keys and values, and rope pairs half a head apart.

Source: Yang et al., Qwen2 Technical Report (2024).
"""

from __future__ import annotations

from functools import partial

from shoal.compute.models.transformer import MATRICES, NORMS, ROPE_NEOX, Architecture, attention_then_swiglu

ARCHITECTURE = Architecture(
    name="qwen2",
    matrices=MATRICES,
    vectors=(*NORMS, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    optional_vectors=("attn_output.bias",),
    layer=partial(attention_then_swiglu, rope_mode=ROPE_NEOX),
)

"""The forward pass of llama, qwen2 and qwen3 in float64 numpy: decides what the right logits are.

Written from the papers, for reading, and sharing nothing with what it judges: the file is read by the `gguf` package,
whole layers are dequantised at once, nothing is cached and nothing is fast.

Shapes wear their letters: T tokens, D hidden size, N heads, G key heads, H head size, P rope pairs, V vocabulary.

Source: Touvron et al., LLaMA (2023); Su et al., RoFormer (2021) for rope; Peng et al., YaRN (2023), section 3, for its
ramp and its attention temperature, with dimensions rounded outwards as its published code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

Floats = npt.NDArray[np.float64]


class Reference:
    """One model file; `logits` may be called often, each tensor is dequantised when it is used."""

    def __init__(self, path: str | Path) -> None:
        reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self._field("general.architecture"))
        assert self.architecture in ("llama", "qwen2", "qwen3"), self.architecture
        self.num_layers = int(self._key("block_count"))
        self.num_heads = int(self._key("attention.head_count"))
        self.num_kv_heads = int(self._key("attention.head_count_kv", self.num_heads))
        self.hidden_size = int(self._key("embedding_length"))
        self.head_size = int(self._key("attention.key_length", self.hidden_size // self.num_heads))
        self.epsilon = float(self._key("attention.layer_norm_rms_epsilon"))

    def _field(self, name: str, default: Any = None) -> Any:
        return self._fields[name].contents() if name in self._fields else default

    def _key(self, name: str, default: Any = None) -> Any:
        return self._field(f"{self.architecture}.{name}", default)

    def _tensor(self, name: str) -> Floats:
        """In numpy's order: a matrix is [outputs, inputs]."""
        tensor = self._tensors[name]
        values: Floats = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        return values

    def hidden(self, token_ids: Sequence[int], *, num_layers: int | None = None) -> Floats:
        """The residual stream [T, D] after the first `num_layers` layers, by default all; not yet normalised."""
        x_TD = self._tensor("token_embd.weight")[list(token_ids)]
        cos_TP, sin_TP = self._rope_angles(len(token_ids))
        for layer in range(self.num_layers if num_layers is None else num_layers):
            prefix = f"blk.{layer}."
            x_TD = x_TD + self._attention(prefix, self._norm(x_TD, f"{prefix}attn_norm.weight"), cos_TP, sin_TP)
            x_TD = x_TD + self._feed_forward(prefix, self._norm(x_TD, f"{prefix}ffn_norm.weight"))
        return x_TD

    def logits(self, token_ids: Sequence[int]) -> Floats:
        """[T, V], of a sequence that begins with the first token."""
        x_TD = self._norm(self.hidden(token_ids), "output_norm.weight")
        tied = "output.weight" not in self._tensors
        return x_TD @ self._tensor("token_embd.weight" if tied else "output.weight").T

    def _norm(self, x: Floats, name: str) -> Floats:
        scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        normalised: Floats = x * scale * self._tensor(name)
        return normalised

    def _project(self, x_TD: Floats, name: str) -> Floats:
        product = x_TD @ self._tensor(f"{name}.weight").T
        return product + self._tensor(f"{name}.bias") if f"{name}.bias" in self._tensors else product

    def _attention(self, prefix: str, x_TD: Floats, cos_TP: Floats, sin_TP: Floats) -> Floats:
        num_tokens = len(x_TD)
        query_TNH = self._project(x_TD, f"{prefix}attn_q").reshape(num_tokens, self.num_heads, self.head_size)
        key_TGH = self._project(x_TD, f"{prefix}attn_k").reshape(num_tokens, self.num_kv_heads, self.head_size)
        value_TGH = self._project(x_TD, f"{prefix}attn_v").reshape(num_tokens, self.num_kv_heads, -1)
        if self.architecture == "qwen3":
            query_TNH = self._norm(query_TNH, f"{prefix}attn_q_norm.weight")
            key_TGH = self._norm(key_TGH, f"{prefix}attn_k_norm.weight")
        query_TNH = self._rotate(query_TNH, cos_TP, sin_TP)
        key_TGH = self._rotate(key_TGH, cos_TP, sin_TP)
        shared_by = self.num_heads // self.num_kv_heads
        key_TNH, value_TNH = (np.repeat(x_TGH, shared_by, axis=1) for x_TGH in (key_TGH, value_TGH))
        scores_NTS = np.einsum("tnh,snh->nts", query_TNH, key_TNH) / math.sqrt(self.head_size)
        scores_NTS = np.where(np.tri(num_tokens, dtype=bool), scores_NTS, -np.inf)
        weights_NTS = np.exp(scores_NTS - scores_NTS.max(axis=-1, keepdims=True))
        weights_NTS /= weights_NTS.sum(axis=-1, keepdims=True)
        attended_TNH = np.einsum("nts,snh->tnh", weights_NTS, value_TNH)
        return self._project(attended_TNH.reshape(num_tokens, -1), f"{prefix}attn_output")

    def _feed_forward(self, prefix: str, x_TD: Floats) -> Floats:
        gate = self._project(x_TD, f"{prefix}ffn_gate")
        return self._project(gate / (1.0 + np.exp(-gate)) * self._project(x_TD, f"{prefix}ffn_up"), f"{prefix}ffn_down")

    # Rope

    def _rotate(self, x_TNH: Floats, cos_TP: Floats, sin_TP: Floats) -> Floats:
        """Llama pairs neighbours, qwen pairs dimensions half the rotated width apart; the rest stays."""
        num_pairs = cos_TP.shape[1]
        if self.architecture == "llama":
            firsts, seconds = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
        else:
            firsts, seconds = slice(0, num_pairs), slice(num_pairs, 2 * num_pairs)
        cos_T1P, sin_T1P = cos_TP[:, None], sin_TP[:, None]
        rotated_TNH = x_TNH.copy()
        rotated_TNH[..., firsts] = x_TNH[..., firsts] * cos_T1P - x_TNH[..., seconds] * sin_T1P
        rotated_TNH[..., seconds] = x_TNH[..., firsts] * sin_T1P + x_TNH[..., seconds] * cos_T1P
        return rotated_TNH

    def _rope_angles(self, num_tokens: int) -> tuple[Floats, Floats]:
        """Cosines and sines [T, P], with YaRN's temperature multiplied in."""
        dimensions = int(self._key("rope.dimension_count", self.head_size))
        base = float(self._key("rope.freq_base", 10000.0))
        frequencies_P = base ** (-np.arange(0, dimensions, 2) / dimensions)
        if "rope_freqs.weight" in self._tensors:
            frequencies_P = frequencies_P / self._tensor("rope_freqs.weight")
        temperature = 1.0
        scaling = self._key("rope.scaling.type", "none")
        factor = float(self._key("rope.scaling.factor", 1.0))
        if scaling == "linear":
            frequencies_P = frequencies_P / factor
        elif scaling == "yarn":
            kept_P = self._yarn_ramp(dimensions, base)
            frequencies_P = frequencies_P * (kept_P + (1.0 - kept_P) / factor)
            temperature = 1.0 + 0.1 * math.log(factor)
        angles_TP = np.arange(num_tokens)[:, None] * frequencies_P
        return np.cos(angles_TP) * temperature, np.sin(angles_TP) * temperature

    def _yarn_ramp(self, dimensions: int, base: float) -> Floats:
        """1 for the frequencies that YaRN keeps, 0 for those it divides by the factor, [P]."""
        original = int(self._key("rope.scaling.original_context_length", self._key("context_length")))

        def pair_of(turns: float) -> float:
            return dimensions * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

        low = max(0, math.floor(pair_of(float(self._key("rope.scaling.yarn_beta_fast", 32.0)))))
        high = min(dimensions - 1, math.ceil(pair_of(float(self._key("rope.scaling.yarn_beta_slow", 1.0)))))
        return 1.0 - np.clip((np.arange(dimensions // 2) - low) / max(0.001, high - low), 0.0, 1.0)


def reference_logits(path: str | Path, token_ids: Sequence[int]) -> Floats:
    """Float64 logits [num_tokens, vocab_size] of a sequence that begins with the first token."""
    return Reference(path).logits(token_ids)

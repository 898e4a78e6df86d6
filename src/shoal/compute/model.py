"""A model file, checked: which architecture it is, and that every tensor we shall need is there in the right shape.

ggml ends the process when shapes do not fit, so they are compared here, before it sees them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.compute import ggml
from shoal.compute.gguf import GGUFFile, TensorInfo
from shoal.compute.hyperparameters import Hyperparameters, parse_hyperparameters
from shoal.compute.models.registry import architecture
from shoal.errors import BadModelFile, UnsupportedModel
from shoal.ids import LayerRange


class Model:
    """An open model file.

    Raises:
        BadModelFile: truncated, corrupt, or tensors missing or misshapen.
        UnsupportedModel: an architecture or quantisation we do not run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile.open(path)
        try:
            name = self.file.metadata.get("general.architecture")
            self.architecture = architecture(name if isinstance(name, str) else "unknown")
            embedding = self._tensor("token_embd.weight")
            if len(embedding.shape) != 2:
                raise BadModelFile(f"{path}: token_embd.weight is no matrix: download the model again")
            self.shape = parse_hyperparameters(self.file.metadata, embedding_rows=embedding.shape[1])
            self._check_tensors()
        except BaseException:
            self.file.close()
            raise
        self.output_name = "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
        self.layer_bytes = [
            sum(self.file.tensors[tensor].num_bytes for tensor in self.layer_names(layer))
            for layer in range(self.shape.num_layers)
        ]
        self.output_bytes = self.file.tensors[self.output_name].num_bytes

    def layer_names(self, layer: int) -> list[str]:
        """Names of the tensors of one layer, as they are in the file."""
        return [*(f"blk.{layer}.{name}" for name in self.architecture.matrices), *self.layer_vectors(layer)]

    def layer_vectors(self, layer: int) -> list[str]:
        """Names of its norms and biases."""
        names = [f"blk.{layer}.{name}" for name in (*self.architecture.vectors, *self.architecture.optional_vectors)]
        required = len(self.architecture.vectors)
        return names[:required] + [name for name in names[required:] if name in self.file.tensors]

    def rope_factor_name(self, *, context: int) -> str | None:
        """The tensor of rope frequency factors that a context of that many tokens needs, if the file has any."""
        longer = context > self.shape.rope.original_context
        for name in ("rope_freqs.weight", "rope_factors_long.weight" if longer else "rope_factors_short.weight"):
            if name in self.file.tensors:
                return name
        return None

    def close(self) -> None:
        self.file.close()

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self.file.tensors:
            raise BadModelFile(f"{self.path}: tensor {name} is missing: the file is incomplete, download it again")
        return self.file.tensors[name]

    def _check_tensors(self) -> None:
        shape = self.shape
        query_width = shape.num_heads * shape.head_size
        attended_width = shape.num_heads * shape.value_head_size
        D, F = shape.hidden_size, shape.feed_forward_size
        expected = {
            "attn_q.weight": (D, query_width), "attn_q.bias": (query_width,), "attn_q_norm.weight": (shape.head_size,),
            "attn_k.weight": (D, shape.kv_width), "attn_k.bias": (shape.kv_width,),
            "attn_k_norm.weight": (shape.head_size,),
            "attn_v.weight": (D, shape.value_width), "attn_v.bias": (shape.value_width,),
            "attn_output.weight": (attended_width, D), "attn_output.bias": (D,),
            "attn_norm.weight": (D,), "ffn_norm.weight": (D,),
            "ffn_gate.weight": (D, F), "ffn_up.weight": (D, F), "ffn_down.weight": (F, D),
        }  # fmt: skip
        self._check("token_embd.weight", (D, shape.vocab_size))
        self._check("output_norm.weight", (D,))
        if "output.weight" in self.file.tensors:
            self._check("output.weight", (D, shape.vocab_size))
        for factors in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
            if factors in self.file.tensors:
                self._check(factors, (shape.rope.dimensions // 2,))
        known = {f"blk.{layer}.{kind}" for layer in range(shape.num_layers) for kind in expected}
        for name in self.file.tensors:
            if name.startswith("blk.") and name not in known:
                raise UnsupportedModel(
                    f"{self.path}: tensor {name} belongs to a variant of {shape.architecture} that we do not run yet"
                )
        for layer in range(shape.num_layers):
            for name in self.layer_names(layer):
                self._check(name, expected[name.split(".", 2)[2]])

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        info = self._tensor(name)
        if info.shape != expected:
            raise BadModelFile(
                f"{self.path}: tensor {name} has shape {list(info.shape)}, {list(expected)} is expected: "
                "the file is damaged or was converted wrongly"
            )
        if len(expected) == 1 and info.type not in (ggml.lib.GGML_TYPE_F32, ggml.lib.GGML_TYPE_F16):
            raise UnsupportedModel(f"{self.path}: tensor {name} is {info.type_name}: vectors are F32 or F16")


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class EmbeddingTable:
    """Rows of `token_embd.weight`, gathered from the mapped file, so that the vocabulary never fills memory."""

    def __init__(self, model: Model) -> None:
        info = model.file.tensors["token_embd.weight"]
        self._address = model.file.address(info)
        self._row_bytes = info.num_bytes // info.shape[1]
        self._hidden_size = info.shape[0]
        self.vocab_size = info.shape[1]
        self._is_f32 = info.type == ggml.lib.GGML_TYPE_F32
        to_float = ggml.lib.ggml_get_type_traits(info.type).contents.to_float
        if not self._is_f32 and not to_float:
            raise UnsupportedModel(f"{model.path}: token_embd.weight is {info.type_name}, which cannot be dequantised")
        # Declared anew with plain addresses: building a typed pointer takes ctypes longer than the whole row.
        self._to_float = _TO_FLOAT(ctypes.cast(to_float, ctypes.c_void_p).value or 0)

    def gather(self, token_ids: Sequence[int], x_BD: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Fills the first `len(token_ids)` rows of `x_BD` (float32, contiguous).

        Raises:
            ValueError: a token id outside the vocabulary.
        """
        target, target_bytes = x_BD.ctypes.data, 4 * self._hidden_size
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
            source = self._address + token_id * self._row_bytes
            if self._is_f32:
                ctypes.memmove(target, source, self._row_bytes)
            else:
                self._to_float(source, target, self._hidden_size)
            target += target_bytes


def matrix_names(model: Model, windows: Sequence[LayerRange], *, head: bool) -> list[list[str]]:
    """The matrices that a stage multiplies with, window by window, in the order in which it does."""
    names = [
        [f"blk.{layer}.{name}" for layer in range(window.first, window.stop) for name in model.architecture.matrices]
        for window in windows
    ]
    if head:
        names[-1].append(model.output_name)
    return names


def describe(shape: Hyperparameters) -> str:
    """One line for people: 'llama, 30 layers of 576, 9/3 heads, vocabulary 49152'."""
    return (
        f"{shape.architecture}, {shape.num_layers} layers of {shape.hidden_size}, "
        f"{shape.num_heads}/{shape.num_kv_heads} heads, vocabulary {shape.vocab_size}"
    )

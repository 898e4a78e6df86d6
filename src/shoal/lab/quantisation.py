"""Which type each matrix of a file has: decides what a name such as Q4_K_M means.

Source: llama.cpp, `llama_tensor_get_type` in src/llama-quant.cpp, for a file quantised without an importance matrix. It
gives some matrices more bits than the file's main type: attn_v and ffn_down above all, in the first and last eighth of the
layers and in every third between. Names of single types that no mix has (Q4_K, Q8_0, F16) mean every matrix of the layers.
"""

from __future__ import annotations

import ctypes
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.lab.shapes import ModelShape

Bytes = npt.NDArray[np.uint8]
Role = Literal["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


class WeightType(NamedTuple):
    """A type that weights may have: ggml's id, llama.cpp's number for a file mostly of that type."""

    ggml_type: int
    file_type: int


WEIGHT_TYPES = {
    "F32": WeightType(0, 0),
    "F16": WeightType(1, 1),
    "Q4_0": WeightType(2, 2),
    "Q4_1": WeightType(3, 3),
    "Q5_0": WeightType(6, 8),
    "Q5_1": WeightType(7, 9),
    "Q8_0": WeightType(8, 7),
    "Q2_K": WeightType(10, 10),
    "Q3_K": WeightType(11, 11),
    "Q4_K": WeightType(12, 14),
    "Q5_K": WeightType(13, 16),
    "Q6_K": WeightType(14, 18),
    "IQ2_XXS": WeightType(16, 19),
    "IQ2_XS": WeightType(17, 20),
    "IQ3_XXS": WeightType(18, 23),
    "IQ1_S": WeightType(19, 24),
    "IQ4_NL": WeightType(20, 25),
    "IQ3_S": WeightType(21, 26),
    "IQ2_S": WeightType(22, 28),
    "IQ4_XS": WeightType(23, 30),
    "IQ1_M": WeightType(29, 31),
    "BF16": WeightType(30, 32),
    "TQ1_0": WeightType(34, 36),
    "TQ2_0": WeightType(35, 37),
    "MXFP4": WeightType(39, 38),
    "NVFP4": WeightType(40, 39),
    "Q1_0": WeightType(41, 40),
}


class Quantisation(NamedTuple):
    """What a file may be called: its main type, and llama.cpp's number for it."""

    main_type: str
    file_type: int


QUANTISATIONS = {name: Quantisation(name, kind.file_type) for name, kind in WEIGHT_TYPES.items()} | {
    "Q2_K_S": Quantisation("Q2_K", 21),
    "Q3_K_S": Quantisation("Q3_K", 11),
    "Q3_K_M": Quantisation("Q3_K", 12),
    "Q3_K_L": Quantisation("Q3_K", 13),
    "Q4_K_S": Quantisation("Q4_K", 14),
    "Q4_K_M": Quantisation("Q4_K", 15),
    "Q5_K_S": Quantisation("Q5_K", 16),
    "Q5_K_M": Quantisation("Q5_K", 17),
    "IQ2_S": Quantisation("IQ2_XS", 28),
    "IQ2_M": Quantisation("IQ2_S", 29),
    "IQ3_XS": Quantisation("IQ3_S", 22),
    "IQ3_M": Quantisation("IQ3_S", 27),
}

_BELOW_3_BITS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_FLOATS = ("F32", "F16", "BF16")
_EVERY_MATRIX = ("Q3_K", "Q4_K", "Q5_K")
"""Types that llama.cpp's quantiser has no file of; it takes these names for Q3_K_M, Q4_K_M and Q5_K_M."""


def find_quantisation(name: str) -> Quantisation:
    """The entry of `QUANTISATIONS`.

    Raises:
        ValueError: no such name; lists those there are.
    """
    try:
        return QUANTISATIONS[name]
    except KeyError:
        raise ValueError(f"no weights have the type '{name}': {', '.join(sorted(QUANTISATIONS))} exist") from None


def layer_type(quantisation: str, role: Role, layer: int, shape: ModelShape) -> str:
    """The type of one matrix of one layer."""
    main_type = QUANTISATIONS[quantisation].main_type
    match role:
        case "attn_v":
            chosen = _values_type(quantisation, main_type, layer, shape)
        case "ffn_down":
            chosen = _down_type(quantisation, main_type, layer, shape.num_layers)
        case "attn_output":
            chosen = _ATTENTION_OUTPUT.get(quantisation, main_type)
        case "attn_q" | "attn_k":
            chosen = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(quantisation, main_type)
        case "ffn_gate" | "ffn_up":
            in_the_middle = shape.num_layers // 8 <= layer < 7 * shape.num_layers // 8
            chosen = "IQ3_XXS" if quantisation == "IQ3_XS" and in_the_middle else main_type
    return _fitting(chosen, _row_length(role, shape))


_ATTENTION_OUTPUT = {
    "Q2_K": "Q3_K",
    "Q3_K_M": "Q4_K",
    "Q3_K_L": "Q5_K",
    "IQ1_S": "IQ2_XXS",
    "IQ1_M": "IQ2_XXS",
    "IQ2_S": "IQ3_S",
    "IQ2_M": "IQ3_S",
    "IQ3_XXS": "IQ3_S",
    "IQ3_M": "Q4_K",
}


def _values_type(quantisation: str, main_type: str, layer: int, shape: ModelShape) -> str:
    """Of attn_v, which is small where several heads share it, so that more bits cost little."""
    is_shared = shape.num_heads // shape.num_kv_heads >= 4
    chosen = main_type
    match quantisation:
        case "Q4_K_M" | "Q5_K_M" if _deserves_more_bits(layer, shape.num_layers):
            chosen = "Q6_K"
        case "Q4_K_S" if layer < 4:
            chosen = "Q5_K"
        case "Q3_K_M":
            chosen = "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_L":
            chosen = "Q5_K"
        case "Q2_K":
            chosen = "Q4_K" if is_shared else "Q3_K"
        case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if is_shared:
            chosen = "Q4_K"
        case "IQ3_M":
            chosen = "Q4_K"
        case "IQ3_XXS":
            chosen = "Q4_K" if is_shared else "IQ3_S"
        case "IQ4_NL" | "IQ4_XS" if is_shared:
            chosen = "Q5_K"
        case name if name in _BELOW_3_BITS:
            return "Q4_K" if is_shared else "IQ3_S" if name in ("IQ2_S", "IQ2_M") else "Q2_K"
    if shape.is_70b and chosen in ("Q3_K", "Q4_K") and quantisation not in _EVERY_MATRIX:
        return "Q5_K"
    return chosen


def _down_type(quantisation: str, main_type: str, layer: int, num_layers: int) -> str:
    in_first_eighth = layer < num_layers // 8
    match quantisation:
        case "Q4_K_M" | "Q5_K_M" if _deserves_more_bits(layer, num_layers):
            return "Q6_K"
        case "Q4_K_S" | "IQ4_NL" | "IQ4_XS" if in_first_eighth:
            return "Q5_K"
        case "Q3_K_M":
            return "Q5_K" if layer < num_layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S" | "IQ3_M" if in_first_eighth:
            return "Q4_K"
        case "IQ3_XXS":
            return "Q4_K" if in_first_eighth else "Q3_K"
        case name if name in _BELOW_3_BITS and in_first_eighth:
            return "IQ3_S" if name in ("IQ2_S", "IQ2_M") else "Q2_K"
    return main_type


def output_type(quantisation: str, shape: ModelShape) -> str:
    """Of the output matrix; with tied embeddings, of the token embeddings."""
    main_type = QUANTISATIONS[quantisation].main_type
    if main_type == "Q8_0" or main_type in _FLOATS:
        return main_type
    if shape.hidden_size % block_elements(main_type):
        return _fitting("Q8_0", shape.hidden_size)
    return _fitting("Q5_K" if quantisation in (*_BELOW_3_BITS, "IQ3_XXS") else "Q6_K", shape.hidden_size)


def embedding_type(quantisation: str, shape: ModelShape) -> str:
    """Of the token embeddings, where the output has a matrix of its own."""
    match quantisation:
        case "IQ1_S" | "IQ1_M" | "IQ2_XXS" | "IQ2_XS":
            chosen = "Q2_K"
        case "IQ2_S" | "IQ2_M" | "IQ3_XXS":
            chosen = "IQ3_S"
        case "TQ1_0" | "TQ2_0":
            chosen = "Q4_K"
        case _:
            chosen = QUANTISATIONS[quantisation].main_type
    return _fitting(chosen, shape.hidden_size)


def _deserves_more_bits(layer: int, num_layers: int) -> bool:
    """The rule of llama.cpp's "_M" mixes."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _row_length(role: Role, shape: ModelShape) -> int:
    match role:
        case "attn_output":
            return shape.num_heads * shape.head_size
        case "ffn_down":
            return shape.feed_forward_size
        case _:
            return shape.hidden_size


_WITH_SMALL_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"} | dict.fromkeys(
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q2_K", "Q3_K", "IQ4_XS"), "IQ4_NL"
)


def _fitting(type_name: str, row_length: int) -> str:
    """The type, or what takes its place in rows that its blocks do not divide: a type of small blocks, or F16."""
    if row_length % block_elements(type_name) == 0:
        return type_name
    smaller = _WITH_SMALL_BLOCKS.get(type_name, "F16")
    return smaller if row_length % block_elements(smaller) == 0 else "F16"


def block_elements(type_name: str) -> int:
    """Elements of the type's smallest unit."""
    from shoal.compute import ggml

    return int(ggml.lib.ggml_blck_size(WEIGHT_TYPES[type_name].ggml_type))


def row_bytes(type_name: str, num_elements: int) -> int:
    """Bytes of whole blocks of the type."""
    from shoal.compute import ggml

    return int(ggml.lib.ggml_row_size(WEIGHT_TYPES[type_name].ggml_type, num_elements))


def quantise(values: npt.NDArray[np.float32], type_name: str) -> Bytes:
    """Rows in a type of `WEIGHT_TYPES`, by ggml's own quantiser.

    Args:
        values: [num_rows, row_length]; the type's block divides `row_length`.

    Returns:
        uint8 [num_rows, row_bytes].
    """
    from shoal.compute import ggml

    num_rows, row_length = values.shape
    ggml_type = WEIGHT_TYPES[type_name].ggml_type
    rows = np.ascontiguousarray(values)
    quantised = np.empty((num_rows, ggml.lib.ggml_row_size(ggml_type, row_length)), np.uint8)
    importance = np.ones(row_length, np.float32)  # some types refuse to work without
    floats = ctypes.POINTER(ctypes.c_float)
    written = ggml.lib.ggml_quantize_chunk(
        ggml_type,
        rows.ctypes.data_as(floats),
        quantised.ctypes.data,
        0,
        num_rows,
        row_length,
        importance.ctypes.data_as(floats) if ggml.lib.ggml_quantize_requires_imatrix(ggml_type) else None,
    )
    assert written == quantised.nbytes, f"ggml wrote {written} bytes of {type_name}, {quantised.nbytes} were expected"
    return quantised


def dequantise(blocks: Bytes, type_name: str) -> npt.NDArray[np.float32]:
    """The values of quantised blocks, by ggml: float32 [num_elements]. The floating-point types have no blocks."""
    from shoal.compute import ggml

    data = np.ascontiguousarray(blocks)
    ggml_type = WEIGHT_TYPES[type_name].ggml_type
    num_elements = data.nbytes // ggml.lib.ggml_type_size(ggml_type) * ggml.lib.ggml_blck_size(ggml_type)
    values = np.empty(num_elements, np.float32)
    to_float = ggml.lib.ggml_get_type_traits(ggml_type).contents.to_float
    to_float(data.ctypes.data, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), num_elements)
    return values

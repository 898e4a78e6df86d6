"""Random weights as the bytes of any type: decides what a block of random numbers looks like.

Quantising is slow, and random bytes are cheap: in nearly every type of ggml each pattern of bits is a valid block as long as
its scale is a sane number. So blocks are random bytes with scales set by us, such that weights have the mean 0 and the
deviation asked for. Both signs of a scale are equally likely, which takes away the little bias that most codes have; a
matrix with a bias would drown its input in one direction. The few types whose scales are no plain f16 are quantised.

A pool of such blocks is put together anew for every tensor from pieces of at most a kilobyte, drawn by the seed. No two
pages of a file are then the same, and hardly a page has two equal pieces: nothing gains by sharing or compressing them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.lab.quantisation import WEIGHT_TYPES, block_elements, dequantise, quantise, row_bytes

POOL_BYTES = 16 << 20
ALL_POOLS_BYTES = 64 << 20
PIECE_BYTES = 1024
CHUNK_BYTES = 4 << 20

QUANTISE_ELEMENTS = 1 << 22
"""Of a pool that ggml has to quantise: a tenth of a second for the slowest of those types."""

_CALIBRATION_BLOCKS = 4096

Bytes = npt.NDArray[np.uint8]


class _Block(NamedTuple):
    """Where a block keeps its f16 scale; and its f16 minimum, if it has one, and that as a multiple of the scale.

    A scattered scale is kept in the upper four bits of every other byte, the lowest bits first.

    Weights are scale * code, plus minimum in Q4_1 and Q5_1, minus minimum in K-quants (both times a 6- or 4-bit number
    in K-quants); the multiple is the mean of the codes, so that the mean of the weights is 0.
    Source: the block structures of ggml (ggml-common.h).
    """

    scale_at: int
    minimum_at: int | None = None
    minimum_per_scale: float = 0.0
    is_scattered: bool = False


_BLOCKS = {
    "Q4_0": _Block(0),
    "Q4_1": _Block(0, 2, -7.5),
    "Q5_0": _Block(0),
    "Q5_1": _Block(0, 2, -15.5),
    "Q8_0": _Block(0),
    "Q2_K": _Block(80, 82, 1.5),
    "Q3_K": _Block(108),
    "Q4_K": _Block(0, 2, 7.5),
    "Q5_K": _Block(0, 2, 15.5),
    "Q6_K": _Block(208),
    "IQ1_S": _Block(0),
    "IQ1_M": _Block(48, is_scattered=True),
    "IQ2_XXS": _Block(0),
    "IQ2_XS": _Block(0),
    "IQ2_S": _Block(0),
    "IQ3_XXS": _Block(0),
    "IQ3_S": _Block(0),
    "IQ4_NL": _Block(0),
    "IQ4_XS": _Block(0),
}


def draw_blocks(type_name: str, num_elements: int, deviation: float, random: np.random.Generator) -> Bytes:
    """Bytes of `num_elements` independent weights with mean 0 and about the standard deviation `deviation`.

    Args:
        num_elements: a multiple of the type's block.
    """
    if type_name in _BLOCKS:
        return _draw_codes(type_name, num_elements // block_elements(type_name), deviation, random)
    values: npt.NDArray[np.float32] = random.standard_normal(num_elements, np.float32) * np.float32(deviation)
    match type_name:
        case "F32":
            return values.view(np.uint8)
        case "F16":
            return values.astype(np.float16).view(np.uint8)
        case "BF16":
            return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.uint8)
        case _:
            return quantise(values[np.newaxis], type_name).reshape(-1)


def _draw_codes(type_name: str, num_blocks: int, deviation: float, random: np.random.Generator) -> Bytes:
    block_bytes = row_bytes(type_name, block_elements(type_name))
    words = random.integers(0, 1 << 64, -(-num_blocks * block_bytes // 8), np.uint64)  # ten times as fast as bytes
    blocks = words.view(np.uint8)[: num_blocks * block_bytes].reshape(num_blocks, block_bytes)
    scales = random.uniform(0.75, 1.25, num_blocks) * random.choice([-1.0, 1.0], num_blocks)
    _set_scales(blocks, _BLOCKS[type_name], scales)
    sample = dequantise(blocks[:_CALIBRATION_BLOCKS], type_name)
    _set_scales(blocks, _BLOCKS[type_name], scales * (deviation / math.sqrt(np.mean(np.square(sample)))))
    return blocks.reshape(-1)


def _set_scales(blocks: Bytes, layout: _Block, scales: npt.NDArray[np.float64]) -> None:
    def put(at: int, values: npt.NDArray[np.float64]) -> None:
        blocks[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)

    if layout.is_scattered:
        bits = scales.astype(np.float16).view(np.uint16)
        for index in range(4):
            upper = blocks[:, layout.scale_at + 2 * index + 1]
            upper[:] = (upper & 0x0F) | ((bits >> (4 * index) & 0x0F) << 4).astype(np.uint8)
        return
    put(layout.scale_at, scales)
    if layout.minimum_at is not None:
        put(layout.minimum_at, scales * layout.minimum_per_scale)


class Pool:
    """Pieces of rows, [num_pieces, piece_bytes], for one type and one row length, from which tensors are made.

    Weights have the deviation row_length^-0.5, so that a product with a normalised state is normalised again.
    """

    def __init__(self, type_name: str, row_length: int, *, num_elements: int, max_bytes: int, seed: int) -> None:
        """Draws the pieces.

        Args:
            num_elements: how many will be drawn from it, by all tensors.
        """
        piece_elements = block_elements(type_name)
        while row_length % (2 * piece_elements) == 0 and row_bytes(type_name, 2 * piece_elements) <= PIECE_BYTES:
            piece_elements *= 2
        limit = max_bytes * piece_elements // row_bytes(type_name, piece_elements)
        if type_name not in _BLOCKS and type_name not in ("F32", "F16", "BF16"):
            limit = min(limit, QUANTISE_ELEMENTS)
        num_pieces = max(1, min(num_elements, limit) // piece_elements)
        random = np.random.default_rng([seed, WEIGHT_TYPES[type_name].ggml_type, row_length])
        drawn = draw_blocks(type_name, num_pieces * piece_elements, row_length**-0.5, random)
        self.pieces = drawn.reshape(num_pieces, -1)
        self.piece_elements = piece_elements

    def draw(self, num_elements: int, random: np.random.Generator) -> Iterator[Bytes]:
        """Chunks of bytes that make up `num_elements` consecutive elements; without repeats if the pool has so many."""
        num_pieces = num_elements // self.piece_elements
        step = max(1, CHUNK_BYTES // self.pieces.shape[1])
        order = random.permutation(len(self.pieces))[:num_pieces] if num_pieces <= len(self.pieces) else None
        for begin in range(0, num_pieces, step):
            count = min(step, num_pieces - begin)
            chosen = random.integers(0, len(self.pieces), count) if order is None else order[begin : begin + count]
            yield self.pieces.take(chosen, axis=0)

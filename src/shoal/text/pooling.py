"""Decides how the hidden states of a text's tokens become one vector, as the model's file says.

The key is `{architecture}.pooling_type`; a file without it, or with 0, is no model for embeddings, and its hidden
states are not passed off as such.

Source: the numbers are llama.cpp's `llama_pooling_type`; vectors are scaled to length 1, as its server does.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import BadModelFile, UnsupportedModel


class Pooling(IntEnum):
    """Which tokens' hidden states count."""

    MEAN = 1
    FIRST = 2
    LAST = 3

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Pooling | None:
        """What the file says; None where the model gives no embeddings.

        Raises:
            UnsupportedModel: a pooling that we do not have.
            BadModelFile: a value that is no number.
        """
        value = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
        if value is None or value == 0:
            return None
        if not isinstance(value, int):
            raise BadModelFile(f"pooling_type is {value!r}, not a number: convert the model again")
        try:
            return cls(value)
        except ValueError:
            raise UnsupportedModel(
                f"the model pools its embeddings in way {value}; mean (1), first (2) and last (3) are what we have"
            ) from None

    def start(self) -> PooledVector:
        """A text at its beginning."""
        return PooledVector(self)


class PooledVector:
    """The vector of one text, whose hidden states come in order, some at a time."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sum_D: npt.NDArray[np.float64] | None = None

    def add(self, hidden_BD: npt.NDArray[np.float32], *, is_last: bool) -> None:
        """Takes hidden states [tokens, hidden size]; `is_last` where the text ends with them."""
        match self._pooling:
            case Pooling.MEAN:
                sum_D = hidden_BD.sum(axis=0, dtype=np.float64)
                self._sum_D = sum_D if self._sum_D is None else self._sum_D + sum_D
            case Pooling.FIRST if self._sum_D is None:
                self._sum_D = hidden_BD[0].astype(np.float64)
            case Pooling.LAST if is_last:
                self._sum_D = hidden_BD[-1].astype(np.float64)

    def vector(self) -> npt.NDArray[np.float64]:
        """float64 [hidden size], of length 1."""
        assert self._sum_D is not None, "a text has at least one token"
        length = float(np.linalg.norm(self._sum_D))
        return self._sum_D / length if length > 0 else self._sum_D

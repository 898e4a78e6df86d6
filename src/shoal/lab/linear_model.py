"""A linear model in numpy that a run can train, of any number of bytes: what measures training without torch."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np

from shoal.exchange.pull import ByteArray
from shoal.exchange.runner import FloatArray


class Linear:
    """Learns y = x w by gradients of a loss that is summed over samples, with momentum, and averages its weights.

    So the state is three times as large as the gradients, as with Adam: `size` numbers that count and `padding` more. Its
    one buffer counts the steps that the first member has seen.
    """

    fingerprint = "linear"
    num_buffers = 1

    def __init__(self, size: int = 50, *, padding: int = 0, num_samples: int = 100) -> None:
        rng = np.random.default_rng(1)
        self.x = rng.standard_normal((num_samples, size)).astype(np.float32)
        self.y = (self.x @ rng.standard_normal(size)).astype(np.float32)
        self.num_gradients = size + padding
        self.w = np.zeros(size + padding, np.float32)
        self.velocity = np.zeros(size + padding, np.float32)
        self.average = np.zeros(size + padding, np.float32)
        self.seen = np.zeros(1, np.float32)
        self.size = size

    def loss_and_gradients(self, samples: list[int]) -> tuple[float, FloatArray]:
        x, error = self.x[samples], self.x[samples] @ self.w[: self.size] - self.y[samples]
        gradients = np.zeros(self.num_gradients, np.float32)
        gradients[: self.size] = error @ x
        return float(error @ error / 2), gradients

    def state(self) -> tuple[ByteArray, dict[str, object]]:
        tensors = {"velocity": self.velocity, "average": self.average, "w": self.w, "seen": self.seen}
        header: dict[str, Any] = {}
        data = b""
        for name, tensor in tensors.items():
            offsets = [len(data), len(data) + tensor.nbytes]
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
            data += tensor.tobytes()
        encoded = json.dumps(header).encode()
        return np.frombuffer(struct.pack("<Q", len(encoded)) + encoded + data, np.uint8), {}

    def load(self, state: ByteArray, about: dict[str, object]) -> None:
        del about
        (length,) = struct.unpack("<Q", state[:8].tobytes())
        header = json.loads(state[8 : 8 + length].tobytes())
        data = state[8 + length :]
        for name in ("velocity", "average", "w", "seen"):
            first, stop = header[name]["data_offsets"]
            setattr(self, name, np.frombuffer(data[first:stop].tobytes(), np.float32).copy())

    def buffers(self) -> FloatArray:
        return self.seen + 1

    def apply(self, x: FloatArray, *, step: int) -> None:
        del step
        self.velocity = np.float32(0.9) * self.velocity + x[: self.num_gradients]
        self.w = self.w - np.float32(0.02) * self.velocity
        self.average = self.average + np.float32(0.1) * (self.w - self.average)
        self.seen = x[self.num_gradients :].copy()

    def digest(self) -> str:
        return hashlib.sha256(self.w.tobytes() + self.velocity.tobytes() + self.seen.tobytes()).hexdigest()[:32]

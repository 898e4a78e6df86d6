"""One ggml device, opened: where tensors live and who computes with them.

Devices come from ggml's own registry, so a build with CUDA, Metal or Vulkan offers its devices here under the names
ggml gives them, and the rest of the code does not change. Two kinds of memory matter:

* the **default** buffer type of the device, and on the CPU the bytes of the model file itself, mapped;
* **extra** buffer types (`CPU_REPACK`, `AMX`), which keep a matrix in another order for faster kernels: copies.
"""

from __future__ import annotations

import ctypes
from typing import Any

import msgspec
import numpy as np

from shoal.compute import ggml
from shoal.errors import UnsupportedModel

_DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "integrated gpu", 3: "accelerator"}


class ComputeDevice(msgspec.Struct, frozen=True):
    """What ggml's registry says of one device."""

    name: str
    description: str
    kind: str
    memory_free_bytes: int
    memory_total_bytes: int


def compute_devices() -> list[ComputeDevice]:
    """All devices of this ggml build, in its order."""
    found = []
    for index in range(ggml.lib.ggml_backend_dev_count()):
        handle = ggml.lib.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.lib.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        found.append(
            ComputeDevice(
                name=ggml.lib.ggml_backend_dev_name(handle).decode(),
                description=ggml.lib.ggml_backend_dev_description(handle).decode(),
                kind=_DEVICE_KINDS.get(ggml.lib.ggml_backend_dev_type(handle), "other"),
                memory_free_bytes=free.value,
                memory_total_bytes=total.value,
            )
        )
    return found


def accelerator_name(backend: Backend) -> str:
    """The graphics processor that may compute layers beside this processor: ggml's first one; '' where there is none, or
    where the backend is one itself."""
    found = (device.name for device in compute_devices() if device.kind in ("gpu", "integrated gpu"))
    return next(found, "") if backend.is_host else ""


class Backend:
    """An open ggml device.

    Args:
        device_name: a name of `compute_devices()`; default the CPU.
        num_threads: threads of a CPU device; other devices ignore it.

    Raises:
        ValueError: no such device; names the ones there are.
    """

    def __init__(self, device_name: str = "CPU", *, num_threads: int = 1) -> None:
        self._device = ggml.lib.ggml_backend_dev_by_name(device_name.encode())
        if not self._device:
            known = ", ".join(device.name for device in compute_devices())
            raise ValueError(f"no compute device '{device_name}': this build of ggml has {known}")
        self._backend = ggml.lib.ggml_backend_dev_init(self._device, None)
        if not self._backend:
            raise MemoryError(f"ggml could not open device {device_name}")
        self.device_name = device_name
        self.default_buffer_type: int = ggml.lib.ggml_backend_dev_buffer_type(self._device)
        self.is_host: bool = ggml.lib.ggml_backend_buft_is_host(self.default_buffer_type)
        self._registry = ggml.lib.ggml_backend_dev_backend_reg(self._device)
        self._set_threads = self._procedure(
            b"ggml_backend_set_n_threads", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
        )
        self.num_threads = 0
        self.set_threads(num_threads)

    def _procedure(self, name: bytes, prototype: Any) -> Any:
        address = ggml.lib.ggml_backend_reg_get_proc_address(self._registry, name)
        return prototype(address) if address else None

    def set_threads(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"{num_threads} threads: at least 1 is needed")
        self.num_threads = num_threads
        if self._set_threads is not None:
            self._set_threads(self._backend, num_threads)

    def extra_buffer_types(self) -> list[int]:
        """Buffer types with faster matrix products, best first; empty on most devices that are no CPU."""
        get_types = self._procedure(
            b"ggml_backend_dev_get_extra_bufts",
            ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p),
        )
        types: list[int] = []
        if get_types is not None and (array := get_types(self._device)):
            while (buffer_type := array[len(types)]) is not None:
                types.append(buffer_type)
        return types

    def supports(self, operation: ggml.Tensor) -> bool:
        return bool(ggml.lib.ggml_backend_dev_supports_op(self._device, operation))

    def require_support(self, graph: ggml.Tensor) -> None:
        """Raises UnsupportedModel if this device lacks a kernel that the graph needs."""
        for index in range(ggml.lib.ggml_graph_n_nodes(graph)):
            node = ggml.lib.ggml_graph_node(graph, index)
            if not self.supports(node):
                name = ggml.lib.ggml_op_desc(node).decode()
                raise UnsupportedModel(f"device {self.device_name} has no kernel for {name}: choose another device")

    def compute(self, graph: ggml.Tensor) -> None:
        """Runs the graph to its end; releases the GIL meanwhile."""
        status = ggml.lib.ggml_backend_graph_compute(self._backend, graph)
        if status != 0:
            raise MemoryError(f"ggml failed to compute on {self.device_name} (status {status})")

    def close(self) -> None:
        if self._backend:
            ggml.lib.ggml_backend_free(self._backend)
            self._backend = None


class TensorPort:
    """Moves one tensor's bytes between numpy and a device; on a host device without a call into ggml."""

    def __init__(self, tensor: ggml.Tensor, shape: tuple[int, ...], dtype: type[np.generic], *, is_host: bool) -> None:
        self._tensor = tensor
        self.num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if is_host:
            memory: Any = (ctypes.c_uint8 * self.num_bytes).from_address(tensor.contents.data)
            self._array: np.ndarray[Any, np.dtype[Any]] = np.frombuffer(memory, dtype=dtype).reshape(shape)
        else:
            self._array = np.empty(shape, dtype=dtype)
        self._is_host = is_host

    def write(self, values: Any) -> None:
        self._array[...] = values
        if not self._is_host:
            ggml.lib.ggml_backend_tensor_set(self._tensor, self._array.ctypes.data, 0, self.num_bytes)

    def read(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor's present values. On a host device a view that the next computation overwrites."""
        if not self._is_host:
            ggml.lib.ggml_backend_tensor_get(self._tensor, self._array.ctypes.data, 0, self.num_bytes)
        return self._array

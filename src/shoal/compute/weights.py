"""Where the weights of some layers live.

On a host device a tensor's data is the mapped file itself: nothing is copied, the page cache holds it once, and memory
pressure from the owner's programs evicts it rather than killing us. Matrices for which the device has faster kernels in
another order (`Backend.extra_buffer_types`) are copied into that order once. Other devices get copies of everything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

from shoal.compute import ggml
from shoal.compute.backend import Backend
from shoal.compute.gguf import GGUFFile, TensorInfo


class Weights:
    """Tensors of one file, placed on one device.

    `tensors[name]` is ready for use in graphs of this backend. `mapped_bytes` of them are reclaimable page cache, those of
    `mapped`; `copied_bytes` are this process's own memory.

    Args:
        infos: tensors of the file to place, or runs of rows of them.
        repackable: names of those that are only ever the first operand of a matrix product, and may be repacked.
    """

    def __init__(
        self, file: GGUFFile, infos: Sequence[TensorInfo], *, repackable: Iterable[str] = (), backend: Backend
    ) -> None:
        self.tensors: dict[str, ggml.Tensor] = {}
        self.mapped: list[TensorInfo] = []
        self.mapped_bytes = 0
        self.copied_bytes = 0
        self._buffers: list[int] = []
        self._context = ggml.new_context(max(1, len(infos)))
        self._backend = backend
        by_buffer_type: dict[int | None, list[TensorInfo]] = {}
        names_to_repack = set(repackable)
        probe = _RepackProbe(backend, backend.extra_buffer_types() if names_to_repack else [])
        for info in infos:
            self.tensors[info.name] = describe(self._context, info)
            buffer_type = probe.best_for(info) if info.name in names_to_repack else None
            by_buffer_type.setdefault(buffer_type, []).append(info)
        probe.close()
        for buffer_type, alike in by_buffer_type.items():
            if buffer_type is not None:
                self._copy(file, alike, buffer_type)
            elif backend.is_host:
                self._map(file, alike)
            else:
                self._copy(file, alike, backend.default_buffer_type)

    def _map(self, file: GGUFFile, infos: list[TensorInfo]) -> None:
        """One buffer per tensor: it ends at a tensor's end, so that a truncated map can never be read past."""
        for info in infos:
            address = file.address(info)
            buffer = ggml.lib.ggml_backend_cpu_buffer_from_ptr(address, info.num_bytes)
            self._buffers.append(buffer)
            ggml.lib.ggml_backend_tensor_alloc(buffer, self.tensors[info.name], address)
            self.mapped.append(info)
            self.mapped_bytes += info.num_bytes

    def _copy(self, file: GGUFFile, infos: list[TensorInfo], buffer_type: int) -> None:
        for info in infos:
            tensor = self.tensors[info.name]
            num_bytes = ggml.lib.ggml_backend_buft_get_alloc_size(buffer_type, tensor)
            buffer = ggml.lib.ggml_backend_buft_alloc_buffer(buffer_type, num_bytes)
            if not buffer:
                raise MemoryError(f"no memory on {self._backend.device_name} for {info.name} ({num_bytes} bytes)")
            self._buffers.append(buffer)
            ggml.lib.ggml_backend_buffer_set_usage(buffer, ggml.lib.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
            base = ggml.lib.ggml_backend_buffer_get_base(buffer)
            ggml.lib.ggml_backend_tensor_alloc(buffer, tensor, base)
            ggml.lib.ggml_backend_tensor_set(tensor, file.address(info), 0, info.num_bytes)
            self.copied_bytes += num_bytes
            file.release(info)

    def close(self) -> None:
        for buffer in self._buffers:
            ggml.lib.ggml_backend_buffer_free(buffer)
        self._buffers.clear()
        self.tensors.clear()
        if self._context:
            ggml.lib.ggml_free(self._context)
            self._context = None


class _RepackProbe:
    """Asks a device which buffer type gives a matrix its fastest kernels, without loading the matrix."""

    def __init__(self, backend: Backend, buffer_types: Sequence[int]) -> None:
        self._backend = backend
        self._empty_buffers = [(kind, ggml.lib.ggml_backend_buft_alloc_buffer(kind, 0)) for kind in buffer_types]
        self._answers: dict[tuple[tuple[int, ...], int], int | None] = {}

    def best_for(self, info: TensorInfo) -> int | None:
        key = (info.shape, info.type)
        if key not in self._answers:
            self._answers[key] = self._ask(info)
        return self._answers[key]

    def _ask(self, info: TensorInfo) -> int | None:
        context = ggml.new_context(4)
        try:
            matrix = describe(context, info)
            rows = ggml.lib.ggml_new_tensor_2d(context, ggml.lib.GGML_TYPE_F32, info.shape[0], 1)
            product = ggml.lib.ggml_mul_mat(context, matrix, rows)
            for buffer_type, empty_buffer in self._empty_buffers:
                matrix.contents.buffer = empty_buffer
                if self._backend.supports(product):
                    return buffer_type
            return None
        finally:
            ggml.lib.ggml_free(context)

    def close(self) -> None:
        for _, empty_buffer in self._empty_buffers:
            ggml.lib.ggml_backend_buffer_free(empty_buffer)


def describe(context: object, info: TensorInfo) -> ggml.Tensor:
    shape = (ctypes.c_int64 * len(info.shape))(*info.shape)
    tensor = ggml.lib.ggml_new_tensor(context, info.type, len(info.shape), shape)
    ggml.lib.ggml_set_name(tensor, info.name.encode()[:63])
    return tensor

"""ggml's Python bindings, mended, behind one import.

ggml-python declares some functions that return handles (`ggml_backend_buffer_t`, ...) with a `typing.NewType` as their
ctypes result type. ctypes takes such a type for a callable that post-processes a C `int`, so the handle is cut to 32 bits
and its first use crashes. Here each of them gets `c_void_p`, once, before anything calls it.

Everything else in this folder says `from shoal.compute import ggml` and then `ggml.lib.ggml_...`.
"""

from __future__ import annotations

import ctypes
from typing import Any, NewType

import ggml.ggml as _bindings

lib: Any = _bindings

Tensor = Any
"""`ctypes.POINTER(ggml_tensor)`: the bindings carry no types that a checker could use."""


def _mend_handles() -> tuple[str, ...]:
    """Gives every function that returns a handle a pointer-sized result type; returns their names."""
    function_type: Any = type(lib.ggml_backend_dev_count).__mro__[1]  # ctypes makes a class per library
    mended = []
    for name, function in list[tuple[str, Any]](vars(lib).items()):
        if isinstance(function, function_type) and isinstance(function.restype, NewType):
            function.restype = ctypes.c_void_p
            mended.append(name)
    return tuple(mended)


MENDED_FUNCTIONS = _mend_handles()


@lib.ggml_log_callback  # type: ignore[untyped-decorator]  # a ctypes callback
def _discard_log(_level: int, _text: bytes, _user_data: Any) -> None:
    """ggml prints to stderr by default; what users must know reaches them as errors of ours."""


lib.ggml_log_set(_discard_log, ctypes.c_void_p(0))
lib.ggml_backend_load_all()


def new_context(num_tensors: int, *, extra_bytes: int = 0) -> Any:
    """A ggml context that holds descriptions of tensors, never their data. The caller frees it with `ggml_free`."""
    params = lib.ggml_init_params(
        mem_size=num_tensors * lib.ggml_tensor_overhead() + extra_bytes, mem_buffer=None, no_alloc=True
    )
    context = lib.ggml_init(params)
    if not context:
        raise MemoryError(f"ggml could not take a context for {num_tensors} tensors")
    return context


def type_name(ggml_type: int) -> str:
    """'Q4_K' for 12."""
    name: bytes | None = lib.ggml_type_name(ggml_type)
    return name.decode().upper() if name else f"type {ggml_type}"

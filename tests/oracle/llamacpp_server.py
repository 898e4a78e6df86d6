"""llama.cpp in a process of its own: decides how its C API is called, and answers one request per line.

The shared library of `xllamacpp` exports llama.cpp's C API, and ggml's under the same names as ggml-python does, so the
two must never meet in one process. This file is therefore a script: `llamacpp.py` starts it and is the only one to
speak to it. A request is one line of JSON on stdin; the answer is one line of JSON on stdout, followed by as many raw
bytes as its field `num_bytes` says (logits, float32).

There is no header to go with the library. The structs of parameters are passed as opaque blocks, larger than the real
ones (x86-64 passes structs of that size by a copy on the stack, so that the excess is harmless), and the few fields we
set are first checked to hold their documented defaults, in `set_context_params` and `set_model_params`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

PARAMS_BYTES = 1024  # the real structs have 80 to 200
LOG_LINES_KEPT = 2000
LOG_LEVEL_DEBUG = 1
Logits = npt.NDArray[np.float32]


class Params(ctypes.Structure):
    """A struct of unknown layout, by value: int32 fields are read and written by their index."""

    _fields_ = (("words", ctypes.c_int32 * (PARAMS_BYTES // 4)),)


class Batch(ctypes.Structure):
    """`struct llama_batch`, stable since 2023."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

POINTER, INT, BOOL, TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
TOKENS = ctypes.POINTER(ctypes.c_int32)
FLOATS = ctypes.POINTER(ctypes.c_float)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, POINTER]),
    "llama_model_default_params": (Params, []),
    "llama_context_default_params": (Params, []),
    "llama_model_load_from_file": (POINTER, [TEXT, Params]),
    "llama_model_free": (None, [POINTER]),
    "llama_init_from_model": (POINTER, [POINTER, Params]),
    "llama_free": (None, [POINTER]),
    "llama_set_n_threads": (None, [POINTER, INT, INT]),
    "llama_n_threads": (INT, [POINTER]),
    "llama_n_ctx": (ctypes.c_uint32, [POINTER]),
    "llama_n_ubatch": (ctypes.c_uint32, [POINTER]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_model_desc": (INT, [POINTER, TEXT, ctypes.c_size_t]),
    "llama_vocab_n_tokens": (INT, [POINTER]),
    "llama_vocab_is_eog": (BOOL, [POINTER, INT]),
    "llama_tokenize": (INT, [POINTER, TEXT, INT, TOKENS, INT, BOOL, BOOL]),
    "llama_token_to_piece": (INT, [POINTER, INT, TEXT, INT, INT, BOOL]),
    "llama_batch_get_one": (Batch, [TOKENS, INT]),
    "llama_batch_init": (Batch, [INT, INT, INT]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (INT, [POINTER, Batch]),
    "llama_synchronize": (None, [POINTER]),
    "llama_get_logits_ith": (FLOATS, [POINTER, INT]),
    "llama_get_memory": (POINTER, [POINTER]),
    "llama_memory_clear": (None, [POINTER, BOOL]),
}


def load_library() -> ctypes.CDLL:
    """The C API of llama.cpp, out of the wheel, without importing the wheel's Python side."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        raise RuntimeError("the oracle passes structs as x86-64 Unix does; on another machine it has to be ported")
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("llama.cpp is not installed: pip install 'shoal[dev]'")
    library = ctypes.CDLL(str(Path(spec.origin).with_name("xllamacpp.abi3.so")))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check_defaults(what: str, met: Sequence[int], expected: Sequence[int]) -> None:
    if list(met) != list(expected):
        raise RuntimeError(
            f"this llama.cpp lays out its {what} parameters differently: found {list(met)} where the defaults are "
            f"{list(expected)}; compare with its include/llama.h and change llamacpp_server.py"
        )


def set_context_params(params: Params, *, context: int, micro_batch: int, cache_type: int, flash_attention: int) -> Params:
    """n_ctx, n_batch, n_ubatch, n_seq_max lead the struct.

    Words 10 to 13 choose the rope scaling, pooling, attention and flash attention, words 26 and 27 the types of the K
    and V cache.
    """
    words = params.words
    check_defaults("context", words[:4], [512, 2048, 512, 1])
    check_defaults("context (rope, pooling, attention, flash attention)", words[10:14], [-1, -1, -1, -1])
    check_defaults("context (cache types)", words[26:28], [1, 1])
    words[0], words[1], words[2] = context, context, min(micro_batch, context)  # a prompt is one llama_decode
    words[13] = flash_attention
    words[26] = words[27] = cache_type
    return params


def set_model_params(params: Params, *, vocab_only: bool) -> Params:
    """The flags begin at byte 72: vocab_only, check_tensors, use_extra_bufts, no_host."""
    check_defaults("model (layers on the GPU, split mode, main GPU)", params.words[4:7], [-1, 1, -1])
    flags = (ctypes.c_uint8 * 4).from_buffer(params, 72)
    check_defaults("model (flags)", flags[:], [0, 0, 1, 0])
    flags[0] = vocab_only
    return params


class Server:
    """One loaded model with one context; the methods named in `answer` are the requests."""

    def __init__(
        self,
        path: str,
        *,
        threads: int,
        context: int,
        micro_batch: int,
        cache_type: int,
        flash_attention: int,
        vocab_only: bool,
        generation_seed: int,
    ) -> None:
        self.log: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self.library = load_library()
        self._log_callback = LogCallback(self._keep_log)
        self.library.llama_log_set(self._log_callback, None)
        self.library.llama_backend_init()
        self.random = np.random.default_rng(generation_seed)
        model_params = set_model_params(self.library.llama_model_default_params(), vocab_only=vocab_only)
        self.model = self.library.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}: {self.log_tail()}")
        self.vocab = self.library.llama_model_get_vocab(self.model)
        self.vocab_size: int = self.library.llama_vocab_n_tokens(self.vocab)
        self.context: int | None = None
        if not vocab_only:
            params = set_context_params(
                self.library.llama_context_default_params(),
                context=context,
                micro_batch=micro_batch,
                cache_type=cache_type,
                flash_attention=flash_attention,
            )
            self._open_context(params, threads)

    def _open_context(self, params: Params, threads: int) -> None:
        self.context = self.library.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context: {self.log_tail()}")
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.memory = self.library.llama_get_memory(self.context)

    def _keep_log(self, level: int, text: bytes, _data: Any) -> None:
        if level != LOG_LEVEL_DEBUG:
            self.log.append(text.decode(errors="replace"))

    def log_tail(self) -> str:
        return " | ".join("".join(self.log).strip().splitlines()[-4:])

    def info(self) -> dict[str, Any]:
        description = ctypes.create_string_buffer(256)
        self.library.llama_model_desc(self.model, description, len(description))
        log = "".join(self.log)
        return {
            "description": description.value.decode(),
            "vocab_size": self.vocab_size,
            "context": self.library.llama_n_ctx(self.context) if self.context else 0,
            "micro_batch": self.library.llama_n_ubatch(self.context) if self.context else 0,
            "threads": self.library.llama_n_threads(self.context) if self.context else 0,
            "flash_attention": "Flash Attention enabled" in log or "flash_attn            = enabled" in log,
            "log": log,
        }

    # The vocabulary

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        capacity = len(data) + 8
        for _ in range(2):
            tokens = (ctypes.c_int32 * capacity)()
            count: int = self.library.llama_tokenize(
                self.vocab, data, len(data), tokens, capacity, add_special, parse_special
            )
            if count >= 0:
                return tokens[:count]
            capacity = -count
        raise RuntimeError(f"llama.cpp does not tokenize {text!r}")

    def piece(self, token_id: int) -> bytes:
        self._check_tokens([token_id])
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            count: int = self.library.llama_token_to_piece(self.vocab, token_id, buffer, capacity, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            capacity = -count

    def is_eog(self, token_id: int) -> bool:
        self._check_tokens([token_id])
        return bool(self.library.llama_vocab_is_eog(self.vocab, token_id))

    # The model

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        wrong = [token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size]
        if wrong or not token_ids:
            raise RuntimeError(f"token ids go from 0 to {self.vocab_size - 1}, at least one; met {wrong[:3]}")

    def _check_room(self, num_tokens: int) -> None:
        """llama.cpp aborts when a batch is larger than it was told, and here a batch may fill the context."""
        room = self.library.llama_n_ctx(self.context)
        if num_tokens > room:
            raise RuntimeError(f"{num_tokens} tokens do not fit into the context of {room}")

    def _clear(self) -> None:
        self.library.llama_memory_clear(self.memory, True)

    def _decode(self, batch: Batch) -> None:
        status: int = self.library.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode answers {status}: {self.log_tail()}")

    def _append(self, token_ids: Sequence[int]) -> None:
        """Decodes the tokens at the next positions, with logits for the last."""
        tokens = (ctypes.c_int32 * len(token_ids))(*token_ids)
        self._decode(self.library.llama_batch_get_one(tokens, len(token_ids)))

    def _logits(self, index: int) -> Logits:
        """A view that the next decode overwrites."""
        pointer = self.library.llama_get_logits_ith(self.context, index)
        if not pointer:
            raise RuntimeError(f"llama.cpp has no logits at {index}: {self.log_tail()}")
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def logits(self, token_ids: Sequence[int]) -> Logits:
        self._check_tokens(token_ids)
        self._check_room(len(token_ids))
        self._clear()
        count = len(token_ids)
        batch: Batch = self.library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token_id in enumerate(token_ids):
                batch.token[index] = token_id
                batch.pos[index] = index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = 1
            self._decode(batch)
            return np.stack([self._logits(index) for index in range(count)])
        finally:
            self.library.llama_batch_free(batch)

    def greedy(self, prompt_ids: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        self._check_tokens(prompt_ids)
        self._check_room(len(prompt_ids) + num_tokens - 1)
        self._clear()
        ids: list[int] = []
        gaps: list[float] = []
        self._append(prompt_ids)
        while True:
            logits = self._logits(-1)
            best = int(logits.argmax())
            second, first = np.partition(logits, -2)[-2:]
            ids.append(best)
            gaps.append(float(first) - float(second))
            if len(ids) == num_tokens:
                return ids, gaps
            self._append([best])

    # The clock: what is timed has no JSON in it, and its tokens are drawn before

    def time_prefill(self, num_tokens: int) -> float:
        self._check_room(num_tokens)
        token_ids = self.random.integers(0, self.vocab_size, num_tokens).tolist()
        tokens = (ctypes.c_int32 * num_tokens)(*token_ids)
        self._clear()
        batch = self.library.llama_batch_get_one(tokens, num_tokens)
        began_s = time.perf_counter()
        self._decode(batch)
        self.library.llama_synchronize(self.context)
        return time.perf_counter() - began_s

    def time_decode(self, num_tokens: int, at_position: int) -> list[float]:
        self._check_room(at_position + num_tokens)
        self._clear()
        if at_position:
            self._append(self.random.integers(0, self.vocab_size, at_position).tolist())
            self.library.llama_synchronize(self.context)
        token_ids = self.random.integers(0, self.vocab_size, num_tokens).tolist()
        token = (ctypes.c_int32 * 1)()
        batch = self.library.llama_batch_get_one(token, 1)
        durations_s = []
        for token_id in token_ids:
            token[0] = token_id
            began_s = time.perf_counter()
            self._decode(batch)
            self.library.llama_get_logits_ith(self.context, -1)
            durations_s.append(time.perf_counter() - began_s)
        return durations_s

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The reply and the raw bytes that follow it."""
        if self.context is None and request["op"] in ("logits", "greedy", "time_prefill", "time_decode"):
            raise RuntimeError("only the vocabulary was loaded")
        match request:
            case {"op": "info"}:
                return {"info": self.info()}, b""
            case {"op": "tokenize", "texts": texts, "add_special": add, "parse_special": parse}:
                return {"ids": [self.tokenize(text, add_special=add, parse_special=parse) for text in texts]}, b""
            case {"op": "piece", "id": token_id}:
                return {}, self.piece(token_id)
            case {"op": "is_eog", "id": token_id}:
                return {"is_eog": self.is_eog(token_id)}, b""
            case {"op": "logits", "ids": token_ids}:
                logits = self.logits(token_ids)
                return {"shape": list(logits.shape)}, logits.tobytes()
            case {"op": "greedy", "ids": prompt_ids, "num_tokens": num_tokens}:
                ids, gaps = self.greedy(prompt_ids, num_tokens)
                return {"ids": ids, "gaps": gaps}, b""
            case {"op": "time_prefill", "num_tokens": num_tokens}:
                return {"seconds": self.time_prefill(num_tokens)}, b""
            case {"op": "time_decode", "num_tokens": num_tokens, "at_position": at_position}:
                return {"seconds": self.time_decode(num_tokens, at_position)}, b""
        raise RuntimeError(f"unknown request: {request}")

    def close(self) -> None:
        if self.context is not None:
            self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


def send(output: BinaryIO, reply: dict[str, Any], data: bytes = b"") -> None:
    output.write(json.dumps(reply | {"num_bytes": len(data)}).encode() + b"\n" + data)
    output.flush()


def serve(output: BinaryIO) -> None:
    try:
        server = Server(**json.loads(sys.argv[1]))
        send(output, server.answer({"op": "info"})[0])
    except Exception as error:  # the end of the process: announced to the parent
        send(output, {"error": str(error)})
        return
    for line in sys.stdin.buffer:
        try:
            send(output, *server.answer(json.loads(line)))
        except Exception as error:  # the end of this request: announced to the parent
            send(output, {"error": f"{type(error).__name__}: {error}"})
    server.close()


if __name__ == "__main__":
    private_stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what C code prints goes to stderr, which the parent reads only if we die
    serve(private_stdout)

"""llama.cpp as an oracle in tests and as a peer in benchmarks: decides what may be asked of it, and by whom.

`Llama` starts `llamacpp_server.py` as a process of its own and speaks to it through pipes, because the library's
symbols collide with those of ggml-python. The wheel is pinned: another version may lay out its parameters differently,
which the server notices and refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

SERVER = Path(__file__).with_name("llamacpp_server.py")
CACHE_TYPES = {"f32": 0, "f16": 1}  # ggml's type ids
CLOSE_TIMEOUT_S = 20.0


class LlamaError(Exception):
    """llama.cpp refused, failed or died; the text has the end of its log."""


class Llama:
    """One GGUF model in llama.cpp on the CPU. Use it as a context manager: the process ends with it.

    Attributes:
        description: as llama.cpp puts it, e.g. "llama 1B Q4_K - Medium".
        vocab_size: number of tokens, the width of the logits.
        context: positions, `context` rounded up as llama.cpp does; 0 with `vocab_only`.
        flash_attention: whether it is in use, by llama.cpp's choice or by ours.
        log: what it said while loading.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int = 1,
        context: int = 2048,
        micro_batch: int = 512,
        cache_type: Literal["f16", "f32"] = "f16",
        flash_attention: bool | None = None,
        vocab_only: bool = False,
        seed: int = 0,
    ) -> None:
        """Loads the model and makes a context; raises `LlamaError` if llama.cpp does not.

        Args:
            path: a GGUF file, or the first of its parts.
            threads: for single tokens and for batches alike.
            context: positions, which is also the longest prompt of one call.
            micro_batch: tokens that are computed together.
            cache_type: of keys and values; llama.cpp's default is f16, to which flash attention rounds f32 as well.
            flash_attention: None lets llama.cpp choose; without it and with an f32 cache, nothing of an F32 model is
                rounded below f32.
            vocab_only: load no tensors; only the questions about tokens are answered then.
            seed: of the random tokens that are timed.
        """
        arguments = {
            "path": str(path),
            "threads": threads,
            "context": context,
            "micro_batch": micro_batch,
            "cache_type": CACHE_TYPES[cache_type],
            "flash_attention": -1 if flash_attention is None else int(flash_attention),
            "vocab_only": vocab_only,
            "generation_seed": seed,
        }
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # no debugger when it aborts: its own line says more
        )
        try:
            info = self._receive()[0]["info"]
        except BaseException:
            self.close()
            raise
        self.description: str = info["description"]
        self.vocab_size: int = info["vocab_size"]
        self.context: int = info["context"]
        self.micro_batch: int = info["micro_batch"]
        self.threads: int = info["threads"]
        self.flash_attention: bool = info["flash_attention"]
        self.log: str = info["log"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; may be called again."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died before it read all
            process.stdin.close()
        try:
            process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._stderr.close()

    @property
    def process_id(self) -> int:
        """Of the process that computes, for measuring its memory or pinning it to cores."""
        return self._process.pid

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of one text; `add_special` adds BOS and EOS as the model's metadata asks."""
        return self.tokenize_many([text], add_special, parse_special)[0]

    def tokenize_many(self, texts: Sequence[str], add_special: bool = False, parse_special: bool = True) -> list[list[int]]:
        """Token ids of each text, in one exchange with the process."""
        ids: list[list[int]] = self._ask(
            "tokenize", texts=list(texts), add_special=add_special, parse_special=parse_special
        )[0]["ids"]
        return ids

    def piece(self, token_id: int) -> bytes:
        """The bytes a token stands for; control tokens give their own text."""
        return self._ask("piece", id=token_id)[1]

    def is_eog(self, token_id: int) -> bool:
        """Whether llama.cpp would end generation at this token."""
        return bool(self._ask("is_eog", id=token_id)[0]["is_eog"])

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits at every position of a fresh sequence, float32 [num_tokens, vocab_size]."""
        reply, data = self._ask("logits", ids=[int(token_id) for token_id in token_ids])
        return np.frombuffer(data, np.float32).reshape(reply["shape"])

    def greedy(self, prompt_ids: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """The likeliest continuation of a fresh sequence: prefill, then one token at a time, past any end token.

        Returns:
            `num_tokens` ids, and per id the distance of its logit from the second best.
        """
        reply = self._ask("greedy", ids=[int(token_id) for token_id in prompt_ids], num_tokens=num_tokens)[0]
        return reply["ids"], reply["gaps"]

    def time_prefill(self, num_tokens: int) -> float:
        """Seconds to decode `num_tokens` random tokens as one fresh sequence, with logits for the last."""
        return float(self._ask("time_prefill", num_tokens=num_tokens)[0]["seconds"])

    def time_decode(self, num_tokens: int, *, at_position: int) -> list[float]:
        """Seconds of each single-token step, logits included, after an untimed prefill of `at_position` tokens."""
        seconds: list[float] = self._ask("time_decode", num_tokens=num_tokens, at_position=at_position)[0]["seconds"]
        return seconds

    def _ask(self, op: str, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op} | arguments).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LlamaError(self._epitaph()) from None
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LlamaError(self._epitaph())
        reply: dict[str, Any] = json.loads(line)
        data = self._process.stdout.read(reply["num_bytes"])
        if "error" in reply:
            raise LlamaError(reply["error"])
        return reply, data

    def _epitaph(self) -> str:
        status = self._process.wait()
        self._stderr.seek(0)
        last_words = self._stderr.read().decode(errors="replace").strip()[-500:]
        return f"the process of llama.cpp ended with status {status}: {last_words}"

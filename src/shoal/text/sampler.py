"""Decides the next token from the model's logits.

The order is: logit bias and penalties on the raw logits, mask, temperature, top-k, top-p, min-p, one draw. All
probabilities are computed in float64 over the few tokens that are left, and one uniform number is drawn per token, so
that equal logits and an equal seed give equal tokens on every platform.

Shapes: V is the size of the model's logits, K the number of candidates still in play.

Source: repetition penalty after Keskar et al., CTRL (2019), over prompt and answer as in HF transformers; presence and
frequency penalties over the answer as OpenAI documents them; top-p after Holtzman et al. (2020); min-p after Nguyen et
al. (2024).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shoal.errors import ShoalError

_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, 100.0, "0 (always the likeliest token) to 100"),
    "top_k": (0, 2**31 - 1, "0 (no limit) or more"),
    "top_p": (0.0, 1.0, "above 0, to 1 (no limit)"),
    "min_p": (0.0, 1.0, "0 (no limit) to 1"),
    "repetition_penalty": (0.01, 100.0, "0.01 to 100; 1 is none"),
    "presence_penalty": (-2.0, 2.0, "-2 to 2"),
    "frequency_penalty": (-2.0, 2.0, "-2 to 2"),
    "penalty_last_n": (-1, 2**31 - 1, "-1 (the whole context), 0 (no penalties) or more"),
    "seed": (-(2**63), 2**64 - 1, "-2^63 to 2^64 - 1"),
}
_MUST_EXCEED_MIN = ("top_p",)
_TEMPERATURE_MIN = 1e-5
_BIAS_MAX = 1000.0
# How many candidates are tried first when only top-p or min-p cut: nearly always enough, and 30 times faster than all.
_NUM_CANDIDATES = 1024


class SamplingParameters(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. The defaults sample from the model's own distribution.

    Raises:
        ValueError: a value is out of range; names the field, the value and the range.
    """

    temperature: float = 1.0
    """0, and whatever is below 0.00001, takes the likeliest token, the one of lowest id if several are."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is no limit."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and answer."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from logits of tokens in the answer, times their count."""
    penalty_last_n: int = -1
    """How many of the last tokens the penalties look at; -1 is all of them, as vLLM and OpenAI do."""
    logit_bias: dict[int, float] = {}
    """Added to logits, by token id."""
    seed: int | None = None
    """None draws a new seed."""

    def __post_init__(self) -> None:
        for name, (low, high, text) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not low <= value <= high or (value == low and name in _MUST_EXCEED_MIN):
                raise ValueError(f"{name} is {value}; allowed is {text}")
        for token_id, bias in self.logit_bias.items():
            if token_id < 0:
                raise ValueError(f"logit_bias has token id {token_id}; allowed is 0 or more")
            if not -_BIAS_MAX <= bias <= _BIAS_MAX:
                raise ValueError(f"logit_bias of token {token_id} is {bias}; allowed is {-_BIAS_MAX:g} to {_BIAS_MAX:g}")

    @property
    def is_greedy(self) -> bool:
        """Whether no number is drawn."""
        return self.temperature < _TEMPERATURE_MIN

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far make a difference."""
        penalties = (self.repetition_penalty != 1.0, self.presence_penalty != 0.0, self.frequency_penalty != 0.0)
        return any(penalties) and self.penalty_last_n != 0


class Sampler:
    """Chooses the tokens of one answer, one after the other."""

    def __init__(self, parameters: SamplingParameters, *, vocab_size: int, prompt_ids: Iterable[int] = ()) -> None:
        """Starts an answer.

        Args:
            parameters: how to choose.
            vocab_size: V, at least 1.
            prompt_ids: what the repetition penalty sees besides the answer.

        Raises:
            ValueError: an id of `logit_bias` or of the prompt is outside of the vocabulary.
        """
        self._parameters = parameters
        self._has_penalties = parameters.has_penalties
        self._only_likeliest = parameters.is_greedy and not parameters.has_penalties and not parameters.logit_bias
        self._vocab_size = vocab_size
        self._random = np.random.Generator(np.random.PCG64(_fold_seed(parameters.seed)))
        self._history = _History(parameters.penalty_last_n)
        for token_id in _check_ids(prompt_ids, vocab_size, "the prompt") if parameters.has_penalties else ():
            self._history.add(token_id, in_answer=False)
        bias_ids = _check_ids(parameters.logit_bias, vocab_size, "logit_bias")
        self._bias_ids = np.array(bias_ids, dtype=np.int64)
        self._biases = np.array(list(parameters.logit_bias.values()), dtype=np.float32)

    def accept(self, token_id: int) -> None:
        """Notes a token of the answer, chosen here or elsewhere, for the penalties.

        Raises:
            ValueError: the id is outside of the vocabulary.
        """
        if not 0 <= token_id < self._vocab_size:
            _check_ids((token_id,), self._vocab_size, "the answer")
        if self._has_penalties:
            self._history.add(token_id, in_answer=True)

    def sample(self, logits_V: npt.NDArray[np.float32], *, allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """Chooses a token; `accept` must follow for the penalties to see it.

        Args:
            logits_V: float32 [V], not changed.
            allowed: bool [V], true where a grammar lets the token stand; None allows all.

        Returns:
            A token id, 0 to V - 1.

        Raises:
            ValueError: the shape is not [V].
            ShoalError: the logits are NaN, or no token is possible.
        """
        if logits_V.shape != (self._vocab_size,):
            raise ValueError(f"logits have shape {logits_V.shape}; expected ({self._vocab_size},)")
        if self._only_likeliest and allowed is None:  # between two tokens, every call counts
            return _choose_likeliest(logits_V)
        adjusted_V = self._adjust(logits_V, allowed)
        if self._parameters.is_greedy:
            return _choose_likeliest(adjusted_V)
        return self._draw(adjusted_V)

    def _adjust(self, logits_V: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float32]:
        if allowed is None and not self._bias_ids.size and not self._has_penalties:
            return logits_V
        adjusted_V = logits_V.astype(np.float32, copy=True)
        if self._has_penalties:
            self._penalise(adjusted_V)
        if self._bias_ids.size:
            adjusted_V[self._bias_ids] += self._biases
        if allowed is not None:
            adjusted_V[~allowed] = -np.inf
        return adjusted_V

    def _penalise(self, logits_V: npt.NDArray[np.float32]) -> None:
        parameters = self._parameters
        if parameters.repetition_penalty != 1.0:
            ids, _ = _list_counts(self._history.counts)
            values = logits_V[ids]
            penalty = np.float32(parameters.repetition_penalty)
            logits_V[ids] = np.where(values > 0, values / penalty, values * penalty)
        if parameters.presence_penalty or parameters.frequency_penalty:
            ids, counts = _list_counts(self._history.answer_counts)
            penalties = parameters.presence_penalty + parameters.frequency_penalty * counts
            logits_V[ids] -= penalties.astype(np.float32)

    def _draw(self, logits_V: npt.NDArray[np.float32]) -> int:
        ids_K, weights_K = self._weigh(logits_V)
        cumulative_K = np.cumsum(weights_K)
        drawn = self._random.random() * cumulative_K[-1]
        # `drawn` is below the last sum but for rounding.
        position = min(int(np.searchsorted(cumulative_K, drawn, side="right")), len(ids_K) - 1)
        return int(ids_K[position])

    def _weigh(self, logits_V: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Candidates and their weights, likeliest first where a limit holds, else all by id."""
        parameters = self._parameters
        peak = _find_peak(logits_V)
        scale = 1.0 / parameters.temperature
        if parameters.top_k == 0 and parameters.top_p == 1.0 and parameters.min_p == 0.0:
            return np.arange(len(logits_V)), np.exp((logits_V.astype(np.float64) - peak) * scale)
        top_k = min(parameters.top_k or len(logits_V), len(logits_V))
        # top-p without top-k needs the whole sum, but only rarely the whole order.
        total = None if parameters.top_k or parameters.top_p == 1.0 else _sum_weights(logits_V, peak, scale)
        num = top_k if parameters.top_k else min(top_k, _NUM_CANDIDATES)
        while True:
            ids_K = _find_top(logits_V, num)
            weights_K = np.exp((logits_V[ids_K].astype(np.float64) - peak) * scale)
            kept = self._count_kept(weights_K, weights_K.sum() if total is None else total)
            if kept < num or num >= top_k:
                return ids_K[:kept], weights_K[:kept]
            num = min(num * 4, top_k)

    def _count_kept(self, weights_K: npt.NDArray[np.float64], total: float) -> int:
        """How many of the candidates, likeliest first, pass top-p and min-p; at least one."""
        kept = len(weights_K)
        if self._parameters.top_p < 1.0:
            kept = int(np.searchsorted(np.cumsum(weights_K), self._parameters.top_p * total)) + 1
        if self._parameters.min_p > 0.0:
            kept = min(kept, int(np.count_nonzero(weights_K >= self._parameters.min_p * weights_K[0])))
        return max(1, min(kept, len(weights_K), int(np.count_nonzero(weights_K))))


class _History:
    """How often each of the last tokens occurred, in prompt and answer and in the answer alone."""

    def __init__(self, last_n: int) -> None:
        self.counts: Counter[int] = Counter()
        self.answer_counts: Counter[int] = Counter()
        self._last_n = last_n
        self._window: deque[tuple[int, bool]] = deque()

    def add(self, token_id: int, *, in_answer: bool) -> None:
        self._count(token_id, in_answer, 1)
        if self._last_n < 0:
            return
        self._window.append((token_id, in_answer))
        if len(self._window) > self._last_n:
            self._count(*self._window.popleft(), -1)

    def _count(self, token_id: int, in_answer: bool, change: int) -> None:
        for counts in (self.counts, self.answer_counts) if in_answer else (self.counts,):
            counts[token_id] += change
            if not counts[token_id]:
                del counts[token_id]


def _list_counts(counts: Counter[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    ids = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
    return ids, np.fromiter(counts.values(), dtype=np.int64, count=len(counts))


def logprobs(logits_V: npt.NDArray[np.float32], token_id: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probabilities (natural, at most 0) under the raw logits.

    Args:
        logits_V: float32 [V], before temperature, penalties and limits.
        token_id: the chosen token, 0 to V - 1.
        top: how many of the likeliest tokens to list, 0 to V.

    Returns:
        That of `token_id`, and (id, log-probability) of the `top` likeliest tokens that are possible, likeliest first,
        lower ids first of equals.

    Raises:
        ValueError: `token_id` or `top` is out of range.
        ShoalError: the logits are NaN, or no token is possible.
    """
    if not 0 <= token_id < len(logits_V):
        raise ValueError(f"token id {token_id} is outside of the vocabulary, 0 to {len(logits_V) - 1}")
    if not 0 <= top <= len(logits_V):
        raise ValueError(f"top is {top}; allowed is 0 to {len(logits_V)}")
    peak = _find_peak(logits_V)
    log_total = peak + math.log(_sum_weights(logits_V, peak, 1.0))
    top_ids = _find_top(logits_V, top) if top else ()
    return float(logits_V[token_id]) - log_total, [(int(i), float(logits_V[i]) - log_total) for i in top_ids]


def _find_top(logits_V: npt.NDArray[np.float32], num: int) -> npt.NDArray[np.int64]:
    """The ids of the `num` largest that are possible at all, largest first, of equals the lower id first."""
    possible = np.flatnonzero(logits_V > -np.inf)
    if len(possible) < len(logits_V):
        return possible[_find_top(logits_V[possible], num)]
    if num >= len(logits_V):
        return np.argsort(-logits_V, kind="stable")
    limit = np.partition(logits_V, len(logits_V) - num)[len(logits_V) - num]
    above = np.flatnonzero(logits_V > limit)
    equal = np.flatnonzero(logits_V == limit)[: num - len(above)]
    ids = np.concatenate((above, equal))
    return ids[np.argsort(-logits_V[ids], kind="stable")]


def _choose_likeliest(logits_V: npt.NDArray[np.float32]) -> int:
    token_id = int(logits_V.argmax())
    _check_peak(float(logits_V[token_id]))
    return token_id


def _find_peak(logits_V: npt.NDArray[np.float32]) -> float:
    # np.max passes NaN on.
    return _check_peak(float(np.max(logits_V)))


def _check_peak(peak: float) -> float:
    if math.isfinite(peak):
        return peak
    if peak == -math.inf:
        raise ShoalError("no token is possible: all logits are -inf (a grammar or logit_bias that forbids everything?)")
    raise ShoalError(f"the model's logits hold {peak}: its file may be damaged, or its numbers too large for 16 bits")


def _sum_weights(logits_V: npt.NDArray[np.float32], peak: float, scale: float) -> float:
    """Sum of exp((logit - peak) * scale).

    The terms are float32, four times as fast, and their sum float64: good to about 1e-7, where the limits of top-p
    and the digits of a log-probability do not show it.
    """
    terms_V = logits_V - np.float32(peak)
    terms_V *= np.float32(scale)
    np.exp(terms_V, out=terms_V)
    return float(np.sum(terms_V, dtype=np.float64))


def _fold_seed(seed: int | None) -> int | None:
    """PCG64 takes no negative numbers; clients send them."""
    return None if seed is None else seed % 2**64


def _check_ids(ids: Iterable[Any], vocab_size: int, where: str) -> list[int]:
    checked = [int(token_id) for token_id in ids]
    if checked and (min(checked) < 0 or max(checked) >= vocab_size):
        wrong = next(token_id for token_id in checked if not 0 <= token_id < vocab_size)
        raise ValueError(f"{where} has token id {wrong}, which is outside of the vocabulary, 0 to {vocab_size - 1}")
    return checked

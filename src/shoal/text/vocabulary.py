"""Decides what the tokens of a GGUF file are: their texts, kinds and scores, and which of them are special.

Converters of models leave much of this implicit, so llama.cpp guesses it from the tokens' texts; we guess the same,
because a token that should end an answer and does not makes the model talk to itself.

Source: llama.cpp, `llama_vocab::impl::load` in src/llama-vocab.cpp. Differs: of several tokens that could fill one
role it takes whichever its hash table gives first, we the one named first below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from shoal.errors import BadModelFile


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type` as GGUF numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_END_OF_GENERATION = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
_FILL_IN_PREFIX = ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>")
_FILL_IN_SUFFIX = ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>")
_FILL_IN_MIDDLE = ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>")
# By GGUF key: texts that name a token of this role when the file does not, and whether the token ends a generation.
_FILL_IN_ROLES: dict[str, tuple[tuple[str, ...], bool]] = {
    "fim_pre": ((*_FILL_IN_PREFIX, "<|prefix|>"), False),
    "fim_suf": ((*_FILL_IN_SUFFIX, "<|suffix|>"), False),
    "fim_mid": ((*_FILL_IN_MIDDLE, "<|middle|>"), False),
    "fim_pad": (("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"), True),
    "fim_rep": (("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"), True),
    "fim_sep": (("<|file_sep|>",), True),
}
_OLD_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
# gpt-oss marks the parts of its answers with these; they are text to whoever parses the answer.
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class Vocabulary:
    """The tokens of one model, by id and by text.

    Attributes:
        texts: by id, as the file has them (bytes written as characters, spaces as U+2581, ...).
        ids: by text.
        kinds: by id, a `TokenKind`, corrected by what the text tells.
        scores: by id; zeros if the file has none.
        eog_ids: every token that ends a generation.
    """

    def __init__(self, metadata: Mapping[str, Any], *, default_ids: Mapping[str, int]) -> None:
        """Reads the `tokenizer.ggml.*` keys.

        Args:
            metadata: plain values; long lists may be numpy arrays.
            default_ids: the id of a role ("bos", "eos", "unknown") when the file does not name it.

        Raises:
            BadModelFile: tokens are missing or duplicate, or a list is shorter than that of the tokens.
        """
        self.texts = _read_tokens(metadata)
        self.ids = {text: token_id for token_id, text in enumerate(self.texts)}
        if len(self.ids) != len(self.texts):
            raise BadModelFile(f"the vocabulary has duplicate tokens: {_name_duplicates(self.texts)}")
        num_tokens = len(self.texts)
        self.kinds = [int(kind) for kind in read_list(metadata, "tokenizer.ggml.token_type", num_min=num_tokens)]
        self.kinds = self.kinds[:num_tokens] or [int(TokenKind.NORMAL)] * num_tokens
        self.scores = [float(score) for score in read_list(metadata, "tokenizer.ggml.scores", num_min=num_tokens)]
        self.scores = self.scores[:num_tokens] or [0.0] * num_tokens
        self._metadata = metadata
        self._default_ids = default_ids
        self.bos_id = self._read_role("bos")
        self.eos_id = self._read_role("eos")
        self.unknown_id = self._read_role("unknown")
        self.padding_id = self._read_role("padding")
        self.eog_ids = self._find_ends()
        for text in _ALWAYS_SHOWN:
            if text in self.ids:
                self.kinds[self.ids[text]] = TokenKind.USER_DEFINED

    def __len__(self) -> int:
        return len(self.texts)

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model rather than standing for text: control and unknown tokens."""
        return self.kinds[token_id] in (TokenKind.CONTROL, TokenKind.UNKNOWN)

    def _read_role(self, role: str) -> int | None:
        """The id under `tokenizer.ggml.<role>_token_id`; one outside of the vocabulary counts as missing."""
        for candidate in (self._metadata.get(f"tokenizer.ggml.{role}_token_id"), self._default_ids.get(role)):
            if candidate is not None and 0 <= int(candidate) < len(self.texts):
                return int(candidate)
        return None

    def _find_ends(self) -> frozenset[int]:
        ends = {role_id for role in ("eos", "eot", "eom") if (role_id := self._read_role(role)) is not None}
        for text in _END_OF_GENERATION:
            if text in self.ids:
                ends.add(self.ids[text])
                self.kinds[self.ids[text]] = TokenKind.CONTROL
        for role, (texts, is_end) in _FILL_IN_ROLES.items():
            role_id = self._find_fill_in(role, texts)
            if role_id is not None and is_end:
                ends.add(role_id)
        self._drop_end(ends, "<|end|>", if_ends=("<|return|>", ("<|call|>", "<|calls|>")), kind=TokenKind.USER_DEFINED)
        self._drop_end(ends, "<|end|>", if_ends=("<|flush|>", ("<|call|>", "<|calls|>")), kind=TokenKind.USER_DEFINED)
        self._drop_end(ends, "</s>", if_ends=("<|tool_response>",), kind=TokenKind.NORMAL)
        return frozenset(ends)

    def _find_fill_in(self, role: str, texts: tuple[str, ...]) -> int | None:
        named_id = self._read_role(role)
        if named_id is None and role in _OLD_KEYS:
            named_id = self._read_role(_OLD_KEYS[role])
        if named_id is not None:
            return named_id
        found_id = next((self.ids[text] for text in texts if text in self.ids), None)
        if found_id is not None:
            self.kinds[found_id] = TokenKind.CONTROL
        return found_id

    def _drop_end(self, ends: set[int], text: str, *, if_ends: tuple[str | tuple[str, ...], ...], kind: TokenKind) -> None:
        """`text` only ends a part of the answer in models that have all of `if_ends` (of a tuple: any)."""
        end_texts = {self.texts[token_id] for token_id in ends}
        names = [(name,) if isinstance(name, str) else name for name in if_ends]
        if text in end_texts and all(not end_texts.isdisjoint(alternatives) for alternatives in names):
            ends.discard(self.ids[text])
            self.kinds[self.ids[text]] = kind


def read_list(metadata: Mapping[str, Any], key: str, *, num_min: int = 0) -> list[Any]:
    """The list under `key` as plain Python values, or an empty one.

    Raises:
        BadModelFile: the value is no list, or shorter than `num_min`.
    """
    value = metadata.get(key)
    if value is None:
        return []
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise BadModelFile(f"{key} is of type {type(value).__name__}, not a list")
    if len(value) < num_min:
        raise BadModelFile(f"{key} has {len(value)} entries for {num_min} tokens")
    return list(value)


def _read_tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = read_list(metadata, "tokenizer.ggml.tokens")
    if not tokens:
        raise BadModelFile("the file has no vocabulary (tokenizer.ggml.tokens)")
    if not all(isinstance(token, str) for token in tokens):
        raise BadModelFile("tokenizer.ggml.tokens has entries that are not text")
    # llama.cpp reads C strings: a token ends at its first NUL.
    ended = [token.partition("\0")[0] for token in tokens] if any("\0" in token for token in tokens) else tokens
    return [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(ended)]


def _name_duplicates(texts: Sequence[str]) -> str:
    seen: set[str] = set()
    duplicates = [text for text in texts if text in seen or seen.add(text)]  # type: ignore[func-returns-value]
    return ", ".join(repr(text) for text in duplicates[:3])

"""Decides which ids a text has and which text ids have, given the metadata of a GGUF file.

The ids equal those of llama.cpp's `llama_tokenize` with the same flags. A text is first cut at special tokens, longest
first; what lies between goes to the encoder of the model's kind (`bytepairs`, `sentencepiece`).

Source: llama.cpp, `tokenizer_st_partition` and `tokenize` in src/llama-vocab.cpp. Differs in decoding: spaces before
punctuation are never cleaned up (its server does not either), and the space that SentencePiece puts before text is
taken away after a bos token too, so that decoding undoes encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from shoal.errors import BadModelFile, RequestError, UnsupportedModel
from shoal.text.bytepairs import BytePairEncoder
from shoal.text.pretokenizers import find_pre_tokenizer
from shoal.text.sentencepiece import SentencePieceEncoder
from shoal.text.vocabulary import TokenKind, Vocabulary

_C_SPACES = " \t\n\v\f\r"
_KINDS_OF_MARKS = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)


class _Encoder(Protocol):
    def encode(self, text: str, *, after_special: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Tokenizer:
    """Text to token ids and back, for one model. It has no state that a call changes, but for caches."""

    def __init__(
        self, vocabulary: Vocabulary, encoder: _Encoder, *, add_bos: bool, add_eos: bool, add_space_prefix: bool
    ) -> None:
        """Users call `from_metadata`.

        Raises:
            BadModelFile: bos or eos shall be added, but there is no such token.
        """
        for name, wanted, role_id in (("bos", add_bos, vocabulary.bos_id), ("eos", add_eos, vocabulary.eos_id)):
            if wanted and role_id is None:
                raise BadModelFile(f"tokenizer.ggml.add_{name}_token is true, but there is no {name}_token_id")
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._add_bos = add_bos
        self._add_eos = add_eos
        self._add_space_prefix = add_space_prefix
        self._strips_right: frozenset[int] = frozenset()
        self._bytes: dict[int, bytes] = {}
        marks = [token_id for token_id, kind in enumerate(vocabulary.kinds) if kind in _KINDS_OF_MARKS]
        marks.sort(key=lambda token_id: -len(vocabulary.texts[token_id].encode()))
        self._marks = [(vocabulary.texts[token_id], token_id) for token_id in marks]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Rebuilds the tokenizer from the `tokenizer.*` keys of a GGUF file.

        Args:
            metadata: values as plain Python; long lists may be numpy arrays.

        Raises:
            UnsupportedModel: the kind of tokenizer or its pre-tokeniser is none we have; says which we have.
            BadModelFile: keys are missing or contradict each other.
        """
        kind = str(metadata.get("tokenizer.ggml.model", ""))
        if kind == "llama":
            tokenizer = cls._from_scores(metadata)
        elif kind in ("gpt2", "gemma4"):
            pre_tokenizer = "gemma4" if kind == "gemma4" else str(metadata.get("tokenizer.ggml.pre", ""))
            tokenizer = cls._from_merges(metadata, pre_tokenizer)
        elif not kind:
            raise BadModelFile("the file does not name its tokenizer (tokenizer.ggml.model)")
        else:
            raise UnsupportedModel(
                f"the model's tokenizer (tokenizer.ggml.model) is '{kind}', which is not supported; "
                "supported are: gpt2 (byte-level BPE), llama (SentencePiece), gemma4"
            )
        tokenizer._strips_right = _find_right_strippers(metadata, tokenizer._vocabulary)
        return tokenizer

    @classmethod
    def _from_scores(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        vocabulary = Vocabulary(metadata, default_ids={"bos": 1, "eos": 2, "unknown": 0})
        add_space_prefix = _read_flag(metadata, "add_space_prefix", default=True)
        return cls(
            vocabulary,
            SentencePieceEncoder(vocabulary, add_space_prefix=add_space_prefix),
            add_bos=_read_flag(metadata, "add_bos_token", default=True),
            add_eos=_read_flag(metadata, "add_eos_token", default=False),
            add_space_prefix=add_space_prefix,
        )

    @classmethod
    def _from_merges(cls, metadata: Mapping[str, Any], pre_tokenizer: str) -> Tokenizer:
        split = find_pre_tokenizer(pre_tokenizer)
        has_defaults = metadata["tokenizer.ggml.model"] == "gpt2"
        default_ids = {"eos": 11} if has_defaults else {}
        if has_defaults and split.has_default_bos:
            default_ids["bos"] = 11
        vocabulary = Vocabulary(metadata, default_ids=default_ids)
        return cls(
            vocabulary,
            BytePairEncoder(vocabulary, metadata, split),
            # Files of Gemma 4 were written without the flag, yet the model needs its bos.
            add_bos=pre_tokenizer == "gemma4" or _read_flag(metadata, "add_bos_token", default=split.add_bos),
            add_eos=_read_flag(metadata, "add_eos_token", default=False),
            add_space_prefix=_read_flag(metadata, "add_space_prefix", default=False),
        )

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text; `eog_ids` has all that end a generation."""
        return self._vocabulary.eos_id

    @property
    def eog_ids(self) -> frozenset[int]:
        """All tokens after which the model has nothing more to say: end of text, of turn, of message."""
        return self._vocabulary.eog_ids

    @property
    def vocab_size(self) -> int:
        """How many tokens the file lists; the model's logits may be padded to more."""
        return len(self._vocabulary)

    @property
    def add_bos(self) -> bool:
        """Whether `add_special` puts bos in front. A chat template that writes bos itself must not get another."""
        return self._add_bos

    @property
    def add_eos(self) -> bool:
        """Whether `add_special` puts eos at the end."""
        return self._add_eos

    @property
    def add_space_prefix(self) -> bool:
        """Whether encoding puts a space before text, which decoding takes away."""
        return self._add_space_prefix

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model rather than standing for text: control and unknown tokens."""
        return self._vocabulary.is_special(self._check_id(token_id))

    def id_of(self, text: str) -> int | None:
        """The id of the token written exactly so in the vocabulary, such as "<|im_end|>"."""
        return self._vocabulary.ids.get(text)

    def text_of(self, token_id: int) -> str:
        """The token as the vocabulary writes it, the inverse of `id_of`."""
        return self._vocabulary.texts[self._check_id(token_id)]

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of a text, equal to `llama_tokenize`.

        Args:
            add_special: put bos and eos around it, as far as the model wants them (`add_bos`, `add_eos`).
            parse_special: special tokens written in the text become those tokens; else they are plain text, as for
                text of a stranger.

        Raises:
            RequestError: the text has half of a surrogate pair, which is no character.
        """
        _check_characters(text)
        ids = [self.bos_id] if add_special and self._add_bos and self.bos_id is not None else []
        after_special = True
        for piece in self._cut(text, parse_special=parse_special):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encoder.encode(piece, after_special=after_special)
            after_special = isinstance(piece, int)
        if add_special and self._add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            skip_special: leave out tokens that steer the model; else they give their text.

        Raises:
            ValueError: an id is not of the vocabulary.
        """
        shown = [token_id for token_id in ids if not (skip_special and self.is_special(token_id))]
        encoded = b"".join(map(self.token_bytes, shown))
        if self._add_space_prefix and shown and self.token_bytes(shown[0]).startswith(b" "):
            encoded = encoded[1:]
        return encoded.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character; special tokens give their text.

        Raises:
            ValueError: the id is not of the vocabulary.
        """
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._make_bytes(self._check_id(token_id))
        return found

    def _make_bytes(self, token_id: int) -> bytes:
        kind = self._vocabulary.kinds[token_id]
        if kind in _KINDS_OF_MARKS:
            return self._vocabulary.texts[token_id].encode()
        if kind in (TokenKind.NORMAL, TokenKind.BYTE):
            return self._encoder.token_bytes(token_id)
        return b""  # unused: room for tokens to come, never written

    def _check_id(self, token_id: int) -> int:
        if not 0 <= token_id < len(self._vocabulary):
            raise ValueError(f"token id {token_id} is outside of the vocabulary, 0 to {len(self._vocabulary) - 1}")
        return token_id

    def _cut(self, text: str, *, parse_special: bool) -> list[str | int]:
        """Cuts at special tokens, longer ones first; user-defined ones are cut in any case."""
        pieces: list[str | int] = [text] if text else []
        for mark, token_id in self._marks:
            if mark not in text or (not parse_special and self._vocabulary.is_special(token_id)):
                continue
            strips_right = token_id in self._strips_right
            pieces = [
                part
                for piece in pieces
                for part in (_cut_at(piece, mark, token_id, strips_right) if isinstance(piece, str) else [piece])
            ]
        return pieces


def _cut_at(piece: str, mark: str, token_id: int, strips_right: bool) -> list[str | int]:
    parts: list[str | int] = []
    start = 0
    while (found := piece.find(mark, start)) >= 0:
        if found > start:
            parts.append(piece[start:found])
        parts.append(token_id)
        start = found + len(mark)
        while strips_right and start < len(piece) and piece[start] in _C_SPACES:
            start += 1
    if start < len(piece):
        parts.append(piece[start:])
    return parts


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}, "
            "which is no character: send valid Unicode"
        ) from None


def _read_flag(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    return bool(metadata.get(f"tokenizer.ggml.{name}", default))


def _find_right_strippers(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> frozenset[int]:
    """Special tokens that swallow the space after them. GGUF has no key for it; llama.cpp knows Phi-3 by its name."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    kept = {vocabulary.ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
    marks = {token_id for token_id, kind in enumerate(vocabulary.kinds) if kind in _KINDS_OF_MARKS}
    if "</s>" in vocabulary.ids:
        marks.add(vocabulary.ids["</s>"])
    return frozenset(token_id for token_id in marks if token_id not in kept)

"""Decides how a piece of text becomes ids under a SentencePiece vocabulary ("llama" in `tokenizer.ggml.model`).

There are no merges in the file, only scores: of all neighbours that together are a token, the pair with the highest
score joins first, the left one of equals. A character that ends up in no token is written as its bytes.

The `tokenizers` library has no such order (its merges have ranks that are equal only for the same pair), so the
joining is our own. It works word by word with a memory of words, where the vocabulary allows.

Source: llama.cpp, `llm_tokenizer_spm_session` in src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from functools import lru_cache
from heapq import heapify, heappop, heappush

from shoal.text.vocabulary import TokenKind, Vocabulary

_SPACE = "▁"
# Words of text repeat; 16384 of them with their ids take about 3 MB.
_NUM_WORDS_REMEMBERED = 16384
_WORD = re.compile("▁*[^▁]+|▁+")


class SentencePieceEncoder:
    """Encodes pieces of text that hold no special token, and gives the bytes of a token."""

    def __init__(self, vocabulary: Vocabulary, *, add_space_prefix: bool) -> None:
        """Args: add_space_prefix: text at the start and after a special token is taken to follow a space."""
        self._vocabulary = vocabulary
        self._add_space_prefix = add_space_prefix
        self._byte_ids = [self._find_byte(byte) for byte in range(256)]
        # No token reaches from one word into the next, so nothing can join across the border.
        normal = (text for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True) if len(text) > 1 and kind)
        self._has_word_borders = not re.search(f"[^{_SPACE}\0]{_SPACE}", "\0".join(normal))
        self._encode_word = lru_cache(maxsize=_NUM_WORDS_REMEMBERED)(self._join)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of a piece of text; `after_special` also at the very start."""
        prefix = " " if self._add_space_prefix and after_special else ""
        escaped = (prefix + text).replace(" ", _SPACE)
        if not self._has_word_borders:
            return list(self._join(escaped))
        return [token_id for word in _WORD.findall(escaped) for token_id in self._encode_word(word)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a normal token stands for."""
        text = self._vocabulary.texts[token_id]
        if self._vocabulary.kinds[token_id] == TokenKind.BYTE:
            return bytes([int(text[3:5], 16)])
        return text.replace(_SPACE, " ").encode()

    def _join(self, text: str) -> tuple[int, ...]:
        """Joins neighbours, best score first.

        A symbol is known by the index of its first character; `ends[i]` is where it ends (0 when it was joined to the
        symbol before it) and `starts_before[i]` where the symbol on its left starts.
        """
        ids, scores = self._vocabulary.ids, self._vocabulary.scores
        num_chars = len(text)
        ends = list(range(1, num_chars + 1))
        starts_before = list(range(-1, num_chars))
        # Entries are (-score, start, middle, end): the best first, of equals the leftmost.
        queue = [
            (-scores[ids[text[start : start + 2]]], start, start + 1, start + 2)
            for start in range(num_chars - 1)
            if text[start : start + 2] in ids
        ]
        heapify(queue)
        while queue:
            _, start, middle, end = heappop(queue)
            if ends[start] != middle or ends[middle] != end:
                continue  # one of the two has grown or is gone
            ends[start] = end
            ends[middle] = 0
            starts_before[end] = start
            before = starts_before[start]
            if before >= 0 and (joined := ids.get(text[before:end])) is not None:
                heappush(queue, (-scores[joined], before, start, end))
            if end < num_chars and (joined := ids.get(text[start : ends[end]])) is not None:
                heappush(queue, (-scores[joined], start, end, ends[end]))
        return self._collect(text, ends)

    def _collect(self, text: str, ends: list[int]) -> tuple[int, ...]:
        found: list[int] = []
        start = 0
        while start < len(text):
            symbol = text[start : ends[start]]
            token_id = self._vocabulary.ids.get(symbol)
            if token_id is not None:
                found.append(token_id)
            else:
                found += [byte_id for byte in symbol.encode() if (byte_id := self._byte_ids[byte]) is not None]
            start = ends[start]
        return tuple(found)

    def _find_byte(self, byte: int) -> int | None:
        """The token of one byte: `<0x0A>`, or the character itself, or the unknown token."""
        ids = self._vocabulary.ids
        character = chr(byte) if byte < 128 else ""
        return ids.get(f"<0x{byte:02X}>", ids.get(character, self._vocabulary.unknown_id))

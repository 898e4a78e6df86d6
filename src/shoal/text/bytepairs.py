"""Decides how a piece of text becomes ids under byte-level BPE ("gpt2" in `tokenizer.ggml.model`).

The work is done by the `tokenizers` library; what is here makes its ids equal to llama.cpp's in vocabularies that are
not closed under merging: a merge may make a text that is no token, and a byte may have no token at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as MergeEngine

from shoal.errors import BadModelFile
from shoal.text.pretokenizers import PreTokenizer
from shoal.text.vocabulary import TokenKind, Vocabulary, read_list


def _assign_characters() -> dict[int, str]:
    """A printable character for each byte: itself where it is printable, else one from U+0100 on (as GPT-2 does)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


_CHARACTERS = _assign_characters()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
_LINE = re.compile(r"[^\n]+|\n+")
_SPACE = "▁"


class BytePairEncoder:
    """Encodes pieces of text that hold no special token, and gives the bytes of a token."""

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any], split: PreTokenizer) -> None:
        """Builds the merge engine, in about 0.3 s for 150 000 tokens.

        Raises:
            BadModelFile: the merges are missing or malformed.
        """
        self._vocabulary = vocabulary
        self._split = split
        merges = _read_merges(metadata)
        self._replacements = self._find_replacements(merges)
        ids = vocabulary.ids | {text: len(vocabulary) + rank for rank, text in enumerate(self._replacements)}
        self._stand_ins = dict(enumerate(self._replacements.values(), start=len(vocabulary)))
        model = models.BPE(ids, merges, ignore_merges=split.ignore_merges, byte_fallback=not split.byte_level)
        self._engine = MergeEngine(model)
        if split.byte_level:
            steps: list[pre_tokenizers.PreTokenizer] = [
                pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns
            ]
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
            self._engine.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of a piece of text; `after_special` makes no difference to this kind of tokenizer."""
        del after_special
        if not self._split.byte_level:
            return self._encode_lines(text.replace(" ", _SPACE))
        return self._replace_stand_ins(self._engine.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a normal token stands for."""
        text = self._vocabulary.texts[token_id]
        if self._vocabulary.kinds[token_id] == TokenKind.BYTE:
            return bytes([int(text[3:5], 16)])
        if not self._split.byte_level:
            return text.replace(_SPACE, " ").encode()
        # A character outside of the alphabet is a converter's mistake; it is shown as it is.
        return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in text)

    def _encode_lines(self, text: str) -> list[int]:
        ids: list[int] = []
        for line in _LINE.findall(text):
            if self._split.has_newline_tokens and line[0] == "\n" and line in self._vocabulary.ids:
                ids.append(self._vocabulary.ids[line])
            else:
                ids += self._replace_stand_ins(self._engine.encode(line, add_special_tokens=False).ids)
        return ids

    def _find_replacements(self, merges: list[tuple[str, str]]) -> dict[str, list[int]]:
        """Texts the engine must know though they are no tokens, each with the ids written in its place.

        llama.cpp merges them all the same, then writes the tokens of their bytes where those exist.
        """
        known = self._vocabulary.ids
        needed = dict.fromkeys(part for merge in merges for part in (*merge, merge[0] + merge[1]) if part not in known)
        if self._split.byte_level:
            needed |= dict.fromkeys(character for character in _CHARACTERS.values() if character not in known)
            return {text: [known[c] for c in text if c.isascii() and c in known] for text in needed}
        names = {text: [f"<0x{byte:02X}>" for byte in text.encode()] for text in needed}
        return {text: [known[name] for name in names[text] if name in known] for text in needed}

    def _replace_stand_ins(self, ids: list[int]) -> list[int]:
        num_tokens = len(self._vocabulary)
        if not self._stand_ins or max(ids, default=0) < num_tokens:
            return ids
        return [known for token_id in ids for known in self._stand_ins.get(token_id, [token_id])]


def _read_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs in order of rank. A pair listed twice keeps its first rank."""
    lines = read_list(metadata, "tokenizer.ggml.merges")
    if not lines:
        raise BadModelFile("the file has no merges (tokenizer.ggml.merges), which its BPE tokenizer needs")
    try:
        # The first character may be a space itself.
        cuts = [line.index(" ", 1) for line in lines]
    except (AttributeError, ValueError):
        raise BadModelFile("tokenizer.ggml.merges has entries that are not two texts and a space between") from None
    pairs = [(line[:cut], line[cut + 1 :]) for line, cut in zip(lines, cuts, strict=True)]
    return list(dict.fromkeys(pairs))

"""Decides when the text of a growing answer may be shown: whole characters only, and never part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from shoal.text.tokenizer import Tokenizer


class TextStream:
    """Turns the tokens of one answer into text as they come.

    The texts of all `push` and the `flush` together are `tokenizer.decode` of the tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        continues_text: bool = False,
        shown_ids: Collection[int] = (),
    ) -> None:
        """Starts an answer.

        Args:
            skip_special: leave out tokens that steer the model; else they give their text.
            shown_ids: tokens that give their text even so.
            continues_text: the answer goes on in the middle of the prompt's text, so a space before its first word
                is real; else (after a special token or a chat prompt) SentencePiece has put it there.
        """
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._shown_ids = shown_ids
        self._drops_space = tokenizer.add_space_prefix and not continues_text
        # Invalid bytes become U+FFFD as soon as it is sure that they are.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is complete now, often "", for a token may end in the middle of a character.

        Raises:
            ValueError: the id is not of the vocabulary.
        """
        if self._skip_special and self._tokenizer.is_special(token_id) and token_id not in self._shown_ids:
            return ""
        encoded = self._tokenizer.token_bytes(token_id)
        if self._drops_space:
            encoded = encoded.removeprefix(b" ")
            self._drops_space = False
        return self._decoder.decode(encoded)

    def flush(self) -> str:
        """The end of the answer: U+FFFD if it stops in the middle of a character, else ""."""
        return self._decoder.decode(b"", final=True)


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Args: stops: strings that end the answer and are no part of it; empty ones do not count."""
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._is_stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes more text; gives the text to show now and whether the answer has ended.

        Of several stop strings the one that is complete first counts, of those the one that began first. After the
        end all text is swallowed.
        """
        if self._is_stopped:
            return "", True
        self._held += text
        end = self._find_stop()
        if end is not None:
            shown, self._held, self._is_stopped = self._held[:end], "", True
            return shown, True
        keep = self._count_pending()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        shown, self._held = self._held, ""
        return shown

    def _find_stop(self) -> int | None:
        """Where the text before the stop string ends; independent of how the text was chunked."""
        starts = [(self._held.find(stop), len(stop)) for stop in self._stops]
        found = [(start + length, start) for start, length in starts if start >= 0]
        return min(found)[1] if found else None

    def _count_pending(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self._stops), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

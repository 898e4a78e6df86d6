from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.text.streaming import StopFilter, TextStream
from shoal.text.tokenizer import Tokenizer
from tests.text.vocabularies import byte_level, sentencepiece

TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece}
# Few letters, so that stop strings and parts of them occur.
LETTERS = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def tokenizer_of(kind: str, cache: dict[str, Tokenizer] = {}) -> Tokenizer:  # noqa: B006 (built once)
    if kind not in cache:
        metadata: dict[str, Any] = TOKENIZERS[kind]()
        cache[kind] = Tokenizer.from_metadata(metadata)
    return cache[kind]


@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(st.integers(0, 2499), max_size=30), st.booleans())
def test_stream_of_any_tokens_is_their_text(kind: str, ids: list[int], skip_special: bool) -> None:
    tokenizer = tokenizer_of(kind)
    stream = TextStream(tokenizer, skip_special=skip_special)
    texts = [stream.push(token_id) for token_id in ids]
    assert "".join(texts) + stream.flush() == tokenizer.decode(ids, skip_special=skip_special)


@given(st.sampled_from(sorted(TOKENIZERS)), st.text(alphabet="aé你😀🏽 ", max_size=12))
def test_stream_never_shows_half_a_character(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    stream = TextStream(tokenizer)
    shown = ""
    for token_id in tokenizer.encode(text):
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def test_space_before_the_first_word_stays_if_the_answer_continues_text() -> None:
    tokenizer = tokenizer_of("sentencepiece")
    ids = tokenizer.encode("hello")
    for continues_text, expected in ((False, "hello"), (True, " hello")):
        stream = TextStream(tokenizer, continues_text=continues_text)
        assert "".join(map(stream.push, ids)) == expected


def run(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    stop_filter = StopFilter(stops)
    shown, is_stopped = "", False
    for chunk in chunks:
        text, is_stopped = stop_filter.push(chunk)
        shown += text
    return shown + stop_filter.flush(), is_stopped


@given(STOPS, LETTERS, st.data())
def test_stops_do_not_depend_on_chunks(stops: list[str], text: str, data: st.DataObject) -> None:
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    chunks = [text[start:end] for start, end in zip([0, *borders], [*borders, len(text)], strict=True)]
    assert run(stops, chunks) == run(stops, list(text))


@given(STOPS, LETTERS)
def test_stop_strings_never_show(stops: list[str], text: str) -> None:
    shown, is_stopped = run(stops, list(text))
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    assert is_stopped == any(stop in text for stop in stops)
    if is_stopped:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == text


@given(STOPS, LETTERS)
def test_only_what_may_become_a_stop_is_held_back(stops: list[str], text: str) -> None:
    stop_filter = StopFilter(stops)
    shown = ""
    for length, character in enumerate(text, start=1):
        new_text, is_stopped = stop_filter.push(character)
        shown += new_text
        if is_stopped:
            break
        held = text[len(shown) : length]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_text_after_the_stop_is_swallowed() -> None:
    stop_filter = StopFilter(["\n\n", ""])
    assert stop_filter.push("one\n") == ("one", False)
    assert stop_filter.push("\ntwo") == ("", True)
    assert stop_filter.push("three") == ("", True)
    assert stop_filter.flush() == ""


def test_unknown_id_is_refused() -> None:
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        TextStream(tokenizer_of("byte level")).push(10**6)

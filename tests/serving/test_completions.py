"""`/v1/completions`: every kind of prompt, and the log-probabilities that evaluation harnesses read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from tests.oracle.llamacpp import Llama

pytestmark = pytest.mark.slow
COMPLETIONS = "/v1/completions"
TEXT = "The sea is the old friend of the sailor"


def ids_of(http: httpx2.Client, text: str, model: str = "plain") -> list[int]:
    found: list[int] = http.post("/tokenize", json={"model": model, "content": text}).json()["tokens"]
    return found


@pytest.mark.shows(COMPLETIONS, "model", "prompt", "max_tokens", "temperature")
def test_prompts_of_every_kind(client: openai.OpenAI, http: httpx2.Client) -> None:
    ids, other_ids = ids_of(http, TEXT), ids_of(http, "Once upon a time")
    asked: Any = {"model": "plain", "max_tokens": 5, "temperature": 0.0}
    by_text = client.completions.create(**asked, prompt=TEXT)
    assert by_text.object == "text_completion"
    assert by_text.id.startswith("cmpl-")
    assert by_text.choices[0].finish_reason == "length"
    text = by_text.choices[0].text
    other = client.completions.create(**asked, prompt="Once upon a time").choices[0].text
    assert text != other
    assert client.completions.create(**asked, prompt=ids).choices[0].text == text
    for prompts in ([TEXT, "Once upon a time"], [ids, other_ids]):
        several = client.completions.create(**asked, prompt=prompts)
        assert [(choice.index, choice.text) for choice in several.choices] == [(0, text), (1, other)]
        assert several.usage is not None
        assert several.usage.prompt_tokens == len(ids) + len(other_ids)
        assert several.usage.completion_tokens == 10


@pytest.mark.shows(COMPLETIONS, "stream", "stream_options", "n", "seed")
def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "prompt": [TEXT, "Once"], "max_tokens": 6, "seed": 4, "n": 2}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) == 4
    texts, reasons, usages = [""] * 4, [None] * 4, []
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length"] * 4
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1] is not None
    assert usages[-1].completion_tokens == 24
    usage = whole.usage
    assert usage is not None
    assert usages[-1].prompt_tokens == usage.prompt_tokens


@pytest.mark.shows(COMPLETIONS, "echo")
@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_answer(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"model": "plain", "prompt": TEXT, "max_tokens": 4, "temperature": 0.0}
    text = client.completions.create(**asked).choices[0].text
    if stream:
        echoed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, echo=True, stream=True))
    else:
        echoed = client.completions.create(**asked, echo=True).choices[0].text
    assert echoed == TEXT + text


@pytest.mark.shows(COMPLETIONS, "stop", "logit_bias", "presence_penalty", "frequency_penalty", "best_of", "user")
def test_what_is_shared_with_chats(client: openai.OpenAI, http: httpx2.Client) -> None:
    asked: Any = {"model": "plain", "prompt": TEXT, "max_tokens": 4, "temperature": 0.0}
    (there,), (good,) = ids_of(http, " there"), ids_of(http, " good")
    forced = client.completions.create(**asked, logit_bias={str(there): 100}, best_of=1, user="u")
    assert forced.choices[0].text == " there" * 4
    stopped = client.completions.create(**asked, logit_bias={str(there): 100}, stop=["e t"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (" ther", "stop")
    two = {str(there): 50, str(good): 50}
    penalties: list[Any] = [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
    for penalty in penalties:
        text = client.completions.create(**asked, logit_bias=two, **penalty).choices[0].text
        assert set(text.split()) == {"there", "good"}, "neither has it all"


@pytest.mark.shows(COMPLETIONS, "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos")
def test_fields_that_are_not_openais(client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "prompt": TEXT, "max_tokens": 4}
    greedy = client.completions.create(**asked, temperature=0.0).choices[0].text
    for narrow in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        text = client.completions.create(**asked, temperature=2.0, seed=1, extra_body=narrow).choices[0].text
        assert text == greedy
    loose = client.completions.create(**asked, temperature=0.0, extra_body={"ignore_eos": True, "repetition_penalty": 50.0})
    assert loose.choices[0].finish_reason == "length"


@pytest.mark.shows(COMPLETIONS, "max_tokens")
def test_sixteen_tokens_unless_told_otherwise_and_none_if_so(client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "prompt": TEXT, "extra_body": {"ignore_eos": True}}
    sixteen, none = client.completions.create(**asked), client.completions.create(**asked, max_tokens=0)
    assert sixteen.usage is not None
    assert none.usage is not None
    assert sixteen.usage.completion_tokens == 16
    assert (none.choices[0].text, none.choices[0].finish_reason, none.usage.completion_tokens) == ("", "length", 0)


@pytest.mark.shows(COMPLETIONS, "logprobs", "echo")
def test_logprobs_in_the_older_shape(client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "prompt": TEXT, "max_tokens": 3, "temperature": 0.0, "logprobs": 2}
    found = client.completions.create(**asked).choices[0].logprobs
    assert found is not None
    lengths = {len(part or []) for part in (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)}
    assert lengths == {3}
    assert found.top_logprobs is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()), "greedy takes the likeliest"
        assert len(top) == 2
        assert list(top) == sorted(top, key=lambda other: -top[other])
    echoed = client.completions.create(**asked, echo=True).choices[0]
    with_prompt = echoed.logprobs
    assert with_prompt is not None
    assert with_prompt.tokens is not None
    assert with_prompt.token_logprobs is not None
    assert with_prompt.text_offset is not None
    assert with_prompt.top_logprobs is not None
    assert (with_prompt.token_logprobs[0], with_prompt.top_logprobs[0]) == (None, None)
    assert None not in with_prompt.token_logprobs[1:]
    assert with_prompt.tokens[-3:] == found.tokens
    num_prompt = len(with_prompt.tokens) - 3
    assert "".join(with_prompt.tokens[:num_prompt]) == TEXT
    for token, offset in zip(with_prompt.tokens[:num_prompt], with_prompt.text_offset, strict=False):
        assert echoed.text[offset:].startswith(token)
    streamed: list[Any] = []
    for chunk in client.completions.create(**asked, echo=True, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.tokens or []
    assert streamed == with_prompt.tokens


def logprobs_by_llamacpp(path: Path, texts: list[list[int]]) -> list[Any]:
    """Natural log-probabilities [tokens, vocabulary] of what follows each token, for each text."""
    found = []
    # Keys and values as we keep them: F16, without flash attention, which rounds more.
    with Llama(path, context=512, cache_type="f16", flash_attention=False) as llama:
        for ids in texts:
            logits = llama.logits(ids).astype(np.float64)
            shifted = logits - logits.max(axis=1, keepdims=True)
            found.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
    return found


@pytest.mark.shows(COMPLETIONS, "logprobs", "echo", "max_tokens")
@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize(
    ("model", "tolerance", "mean_tolerance"),
    [
        # Nothing of an F32 model is rounded on the way but keys and values: the same numbers.
        ("exact", 5e-3, 2e-3),
        # Here both round activations to 8 bits, one after another last bit: see docs/decisions/0003.
        ("smollm2", 0.5, 0.15),
    ],
)
def test_an_evaluation_harness_finds_llamacpps_numbers(
    client: openai.OpenAI, http: httpx2.Client, served_models: Path, model: str, tolerance: float, mean_tolerance: float,
    max_tokens: int,
) -> None:  # fmt: skip
    """As lm-evaluation-harness asks: context and continuation as token ids, echoed; would greedy say the same?"""
    contexts = ["The capital of France is", "The quick brown fox jumps over the", "2 + 2 ="]
    continuations = [" Paris", " lazy dog", " 4, and then what"]
    pairs = zip(contexts, continuations, strict=True)
    prompts = [(ids_of(http, context, model), ids_of(http, more, model)) for context, more in pairs]
    texts = [context + more for context, more in prompts]
    reply = client.completions.create(
        model=model, prompt=texts, echo=True, max_tokens=max_tokens, temperature=0, logprobs=1, seed=1234
    )
    all_theirs = logprobs_by_llamacpp(served_models / f"{model}.gguf", texts)
    for (context, _), ids, choice, theirs_TV in zip(prompts, texts, reply.choices, all_theirs, strict=True):
        scores = choice.logprobs
        assert scores is not None
        assert scores.token_logprobs is not None
        assert scores.top_logprobs is not None
        assert scores.tokens is not None
        assert len(scores.tokens) == len(ids) + max_tokens
        theirs = np.array([theirs_TV[place - 1, ids[place]] for place in range(1, len(ids))])
        ours = np.array(scores.token_logprobs[1 : len(ids)])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
        assert np.abs(ours - theirs).mean() < mean_tolerance
        for place in range(len(context), len(ids)):
            top, token = scores.top_logprobs[place], scores.tokens[place]
            row_V = theirs_TV[place - 1]
            second, first = np.sort(row_V)[-2:]
            if first - second > 2 * tolerance:
                assert (max(top, key=lambda other: top[other]) == token) == (int(row_V.argmax()) == ids[place])

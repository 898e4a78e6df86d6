"""Decides what a tokenizer is tried on: many short strings that meet its corner cases, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from unicodedata import ucd_3_2_0

_WORD_LIST = (
    "the and hello World HTTP_server iPhone ÉCOLE naïve don't DON'T it's we'll I'VE you're he'd they'RE 's 'll "
    "straße Ångström größer İstanbul ıssız Ωmega ΑΒΓ привет МИР ёлка שלום עולם مرحبا بالعالم سَلَام สวัสดี ชาวโลก "
    "नमस्ते दुनिया বাংলা தமிழ் తెలుగు ಕನ್ನಡ မြန်မာ ខ្មែរ ქართული Հայերեն አማርኛ ᏣᎳᎩ 你好 世界 漢字 日本語 ひらがな カタカナ ｶﾀｶﾅ "
    "한국어 안녕 조선말 ﬁne ﬂow Ǆ ǅ ǆ ʻokina 𝓗𝓮𝓵𝓵𝓸 𝔘𝔫𝔦 Ⅷ ⅷ ½ ² ①② x₁ km² E=mc²"
)
_WORDS = _WORD_LIST.split()
_MARKS = [
    *"!?.,;:-_'\"`~@#$%^&*()[]{}<>/\\|+=",
    *"«»…—–“”‘’„¿¡·•§¶†‡°€£¥¢©®™×÷±≠≤∞√∑→←⇒☃★♥№‰",
    *"。、，！？：；「」『』（）《》・～￥",
]
_SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\n ", "\r", "\v", "\f", "\x85", "\xa0", "\u1680"]
_SPACES += ["\u2003", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "    ", "\t\t"]
_UNSEEN = [
    "\x00",
    "\x01",
    "\x07",
    "\x08",
    "\x1b",
    "\x1c",
    "\x1f",
    "\x7f",
    "\x80",
    "\x9f",
    "\xad",
    "\u200b",
    "\u200c",
    "\u200d",
]
_UNSEEN += ["\u200e", "\u202e", "\u2060", "\ufeff", "\ufffd", "\ufffe", "\ufe0f", "\U000e0041", "\ue000", "\U0010ffff"]
_COMBINING = [
    "e\u0301",
    "n\u0303",
    "a\u0300\u0323",
    "Z\u0351\u036b\u0343",
    "\u0301",
    "\u093f",
    "क्षि",
    "กำ",
    "ि",
    "ั",
    "\u20dd",
]
_EMOJI = ["😀", "🎉", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇯🇵🇫🇷", "❤️", "☎️", "1️⃣", "🫠", "🧑🏿‍🚀", "♟️", "🀄"]
_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<|eot_id|>", "<|begin_of_text|>"]
_SPECIAL += ["[INST]", "[/INST]", "<0x0A>", "<|user|>", "<|end|>", "<tool_call>", "<|im_", "|>", "▁", "Ġ", "▁▁", "<think>"]
_CODE = [
    "def f(x: int) -> str:\n    return f'{x!r}'\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    'const x = {"a": [1, 2.5e-3, null], "b": `t${y}`};',
    "SELECT * FROM t WHERE id = 42 AND name LIKE '%x%';",
    "#!/bin/sh\nset -e\necho \"$HOME\" | sed 's/a\\/b//g' >> /tmp/x\n",
    "<div class='a b'>&nbsp;</div><!-- c -->",
    "if (a != b && c >= d || !e) { x <<= 2; } // done",
    "    \n        indented\n\t\ttabs\n  \n\n\n",
    "https://example.org/a_b?c=d&e=%20f#g user.name+tag@mail.example",
    "camelCaseAndPascalCase snake_case_name SCREAMING_CASE kebab-case",
    "\\begin{equation} \\frac{1}{2} \\alpha_{i}^{2} \\end{equation}",
]


def diverse_strings(num: int, seed: int) -> list[str]:
    """Makes strings of many scripts, spaces, marks, numbers, code, special tokens and unseen characters.

    Args:
        num: how many, at least 0.
        seed: of the `random.Random` that chooses; equal seeds give equal lists.

    Returns:
        `num` strings of valid Unicode (no surrogates), from "" to a few hundred characters.
    """
    rng = random.Random(seed)
    makers = (_prose, _prose, _mixture, _mixture, _numbers, _spaced, _runs, _code, _marked, _anything)
    return [rng.choice(makers)(rng) for _ in range(num)]


def _prose(rng: random.Random) -> str:
    ends = ["", "", "", ",", ".", "!", "?", "...", ":", "。", "，"]
    return " ".join(rng.choice(_WORDS) + rng.choice(ends) for _ in range(rng.randint(0, 14)))


def _mixture(rng: random.Random) -> str:
    sources: list[Callable[[], str]] = [
        lambda: rng.choice(_WORDS),
        lambda: rng.choice(_WORDS),
        lambda: rng.choice(_MARKS),
        lambda: rng.choice(_SPACES),
        lambda: " ",
        lambda: str(rng.randint(0, 10 ** rng.randint(1, 9))),
        lambda: rng.choice(_UNSEEN),
        lambda: rng.choice(_COMBINING),
        lambda: rng.choice(_EMOJI),
        lambda: rng.choice(_SPECIAL),
    ]
    return "".join(rng.choice(sources)() for _ in range(rng.randint(1, 20)))


def _numbers(rng: random.Random) -> str:
    forms: list[Callable[[int], str]] = [
        str,
        lambda number: f"{number:,}",
        lambda number: f"{number / 1000:.3f}",
        lambda number: f"-{number}",
        lambda number: f"0x{number:X}",
        lambda number: f"${number}",
        lambda number: f"{number}%",
        lambda number: f"a{number}b",
        lambda number: "".join(chr(0x0660 + int(digit)) for digit in str(number)),
        lambda number: "".join(chr(0xFF10 + int(digit)) for digit in str(number)),
        lambda number: f"{number}½",
    ]
    glue = rng.choice(["", " ", "\n", "/", "  "])
    return glue.join(rng.choice(forms)(rng.randint(0, 10 ** rng.randint(1, 14))) for _ in range(rng.randint(1, 6)))


def _spaced(rng: random.Random) -> str:
    parts = [rng.choice(_SPACES) if rng.random() < 0.7 else rng.choice(_WORDS) for _ in range(rng.randint(1, 14))]
    return "".join(parts)


def _runs(rng: random.Random) -> str:
    sources = [*_MARKS, *_SPACES, *_UNSEEN, *_EMOJI, *_COMBINING, *_WORDS, *"aA0'字", "ab", "▁"]
    return "".join(rng.choice(sources) * rng.randint(1, 24) for _ in range(rng.randint(1, 3)))


def _code(rng: random.Random) -> str:
    text = "".join(rng.choice(_CODE) for _ in range(rng.randint(1, 2)))
    start = rng.randint(0, len(text) // 3)
    return text[start : rng.randint(start, len(text))]


def _marked(rng: random.Random) -> str:
    """Special tokens with and without spaces beside them."""
    parts = [
        rng.choice(_SPECIAL) if rng.random() < 0.5 else rng.choice(["", " ", "\n", "  "]) + rng.choice(_WORDS)
        for _ in range(rng.randint(1, 10))
    ]
    return "".join(parts)


def _anything(rng: random.Random) -> str:
    """Any characters at all, of those assigned in Unicode 3.2: of newer ones every library has its own idea."""
    blocks = [(0x00, 0x7F), (0x00, 0x24F), (0x300, 0x1FFF), (0x2000, 0x33FF), (0x3400, 0xD7FF), (0xE000, 0xFFFF)]
    blocks += [(0x10000, 0x1FFFF), (0x20000, 0x10FFFF)]
    chosen = [rng.choice(blocks) for _ in range(rng.randint(1, 40))]
    drawn = (chr(rng.randint(first, last)) for first, last in chosen)
    return "".join(character for character in drawn if ucd_3_2_0.category(character) not in ("Cn", "Cs"))

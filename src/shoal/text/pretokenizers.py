"""Decides where byte-level BPE may not merge: the splits behind each name of `tokenizer.ggml.pre`.

A GGUF file does not carry its pre-tokeniser, only llama.cpp's name for it, so that name is looked up here. A split is
a chain of patterns: each cuts the pieces left by the one before into its matches and the text between them.

We follow llama.cpp where it differs from the tokenizer it was converted from, because a GGUF model is used and
measured with llama.cpp's ids. Where that shows in a pattern:

  - it does not tell upper from lower case beyond ASCII: a letter outside A-Z a-z is both;
  - its `\\p{S}` leaves out the tilde;
  - its literal ranges of CJK leave out the spaces that lie in them.

Source: llama.cpp, names and patterns of `LLAMA_VOCAB_PRE_TYPE_*` in src/llama-vocab.cpp.
"""

from __future__ import annotations

import msgspec

from shoal.errors import UnsupportedModel


class PreTokenizer(msgspec.Struct, frozen=True, kw_only=True):
    """How text is cut before BPE, and what goes by default with that choice."""

    patterns: tuple[str, ...]
    """Regular expressions in the syntax of Oniguruma, applied one after the other."""
    ignore_merges: bool = False
    """A piece that is a token as a whole is that token, whatever the merges would give."""
    add_bos: bool = False
    """Text starts with bos unless the file says otherwise."""
    has_default_bos: bool = True
    """The bos id has a default when the file names none."""
    byte_level: bool = True
    """Merges work on bytes written as characters; else on lines of the text itself, with spaces written as U+2581."""
    has_newline_tokens: bool = False
    """A run of newlines that is a token as a whole is that token."""


_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"

# Two shapes of a word with case: lower-case letters at its end, or upper-case ones at its start.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_UPPER_OR_MARK, _LOWER_OR_MARK = r"[[\p{L}\p{M}]&&[^a-z]]", r"[[\p{L}\p{M}]&&[^A-Z]]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_MARKS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_MARKS_SLASH}|{_SPACES}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_MARKS_SLASH}|{_SPACES}"
_MARKED_LETTERS = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_CONTRACTION}?"

_ASCII_MARK_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_SYMBOL = r"[\p{P}[\p{S}&&[^~]]]"
_LETTERS_OR_MARKS = rf"{_ASCII_MARK_WORD}|(?:[^\r\n\p{{L}}\p{{P}}\p{{S}}]|~)?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", rf"{_LETTERS_OR_MARKS}| ?{_SYMBOL}+[\r\n]*|{_SPACES}")
_DEEPSEEK_CJK = r"[[一-龥ࠀ-一가-퟿]&&[^\s]]+"
# Letters with case as of an older Unicode, which is what these models were trained with. Characters that editors
# like to normalise away are written as escapes.
_DEEPSEEK_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_CASED}]+",
    r"\s?[!-/:-~！-／：-～‘-‟、-。]+",
    r"\s+$",
    _DEEPSEEK_CJK,
    r"\p{N}+",
)
_YOUTU_ASIAN = r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
# Threes counted from the right; what stands before the number goes with its first group.
_DIGIT_GROUPS = r"(?:\A|(?<=\p{N}))\P{N}*+\p{N}{1,3}(?=(?:\p{N}{3})*+(?!\p{N}))"
# Chinese, Japanese, Thai, Lao, Khmer, Burmese, Hangul. U+8C48 (for U+F900, its compatibility form) is as llama.cpp has it.
_AFMOE_ASIAN = (
    r"[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    r"\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_SPACED_WORDS = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_LINES = r"[^\n]+|[\n]+"

_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_BY_NAMES: dict[tuple[str, ...], PreTokenizer] = {
    ("default",): PreTokenizer(patterns=_DEFAULT),
    (
        *("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "jina-v1-en"),
        *("jina-v2-code", "roberta-bpe", "a.x-4.0", "mellum", "modern-bert", "exaone4", "mpt", "olmo", "jais"),
        *("trillion", "granite-docling"),
    ): PreTokenizer(patterns=(_GPT2,)),
    (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    ): PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True),
    ("dbrx", "smaug-bpe"): PreTokenizer(patterns=(_LLAMA3,)),
    ("glm4", "chatglm-bpe"): PreTokenizer(patterns=(_LLAMA3,), has_default_bos=False),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): PreTokenizer(
        patterns=(r"\p{N}", _GPT2)
    ),
    (
        *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"),
    ): PreTokenizer(patterns=(_QWEN2,)),
    ("qwen35",): PreTokenizer(
        patterns=(
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    ("ufakzeka",): PreTokenizer(patterns=(rf"{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}",)),
    ("laguna",): PreTokenizer(patterns=(_LINES, _QWEN2)),
    ("minicpm5",): PreTokenizer(
        patterns=(r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_MARKS}|{_SPACES}"), ignore_merges=True
    ),
    ("seed-coder",): PreTokenizer(patterns=(rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    ("bailingmoe", "bailingmoe2", "llada-moe"): PreTokenizer(
        patterns=(rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+",)
    ),
    ("exaone-moe",): PreTokenizer(
        patterns=(rf"{_CONTRACTION}|{_SPACED_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)
    ),
    ("deepseek-llm",): PreTokenizer(patterns=_DEEPSEEK_LLM),
    ("deepseek-coder",): PreTokenizer(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): PreTokenizer(patterns=_DEEPSEEK3),
    ("youtu",): PreTokenizer(
        patterns=(_YOUTU_ASIAN, rf"{_MARKED_LETTERS}|\p{{N}}|{_MARKS_SLASH}|{_SPACES}"), ignore_merges=True
    ),
    ("falcon",): PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("bloom", "poro-chat", "gpt3-finnish"): PreTokenizer(patterns=(r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    ("viking",): PreTokenizer(patterns=(r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    ("tekken",): PreTokenizer(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): PreTokenizer(patterns=(_GPT4O,)),
    ("tiny_aya", "cohere2moe"): PreTokenizer(
        patterns=(_DIGIT_GROUPS, rf"{_MARKED_LETTERS}|\p{{N}}{{1,3}}|{_MARKS_SLASH}|{_SPACES}")
    ),
    ("afmoe",): PreTokenizer(patterns=(_DIGIT_GROUPS, _AFMOE_ASIAN, rf"{_LETTERS_OR_MARKS}| ?{_SYMBOL}+[\r\n]*|{_SPACES}")),
    ("spark2_5",): PreTokenizer(
        patterns=(
            *_DEEPSEEK3[:2],
            rf"{_LETTERS_OR_MARKS}| ?{_SYMBOL}+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    ("granite-embed-multi-97m",): PreTokenizer(
        patterns=(_GPT4O.replace(_UPPER, _UPPER_OR_MARK).replace(_LOWER, _LOWER_OR_MARK),), ignore_merges=True
    ),
    ("jais-2",): PreTokenizer(
        patterns=(
            rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|\s{{512}}(?!\S)|\s{{256}}(?!\S)"
            r"|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        )
    ),
    ("chameleon",): PreTokenizer(
        patterns=(
            *(r"<sentinel:[0-9]+>", r"(?:IMGIMG)[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}"),
            *(r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        ),
        add_bos=True,
    ),
    ("gemma4",): PreTokenizer(patterns=(_LINES,), byte_level=False, has_newline_tokens=True),
    ("sarvam-moe",): PreTokenizer(patterns=(_LINES,), byte_level=False),
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: split for names, split in _BY_NAMES.items() for name in names}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """Looks up a name of `tokenizer.ggml.pre`; an empty one means "default", as in files older than the key.

    Raises:
        UnsupportedModel: names the pre-tokeniser and the ones that are known.
    """
    found = PRE_TOKENIZERS.get(name or "default")
    if found is None:
        raise UnsupportedModel(
            f"the model's pre-tokenizer (tokenizer.ggml.pre) is '{name}', which is not supported; "
            f"supported are: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return found

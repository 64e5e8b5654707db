"""What a prompt is: its clean text, its language, its category, and why it may be unfit. Pure functions, English and Chinese."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from annotation.records import normalise_prompt

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
KANA_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
LATIN = re.compile(r"[A-Za-z]")
INVISIBLE = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
MAX_CHARACTERS = 3000
MIN_WORDS, MIN_HAN = 2, 3
OTHER = "other"

ENGLISH_STOPWORDS = frozenset(
    {
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "with",
        "and",
        "to",
        "is",
        "are",
        "from",
        "by",
        "for",
        "its",
        "his",
        "her",
        "their",
        "as",
        "while",
        "into",
        "over",
    }
)
MIN_STOPWORD_SHARE = 0.04
LONG_ENOUGH = 12  # words: shorter prompts may well have no stop word


def clean(text: str) -> str:
    """One line, composed characters, no invisible ones, single spaces. Case and punctuation stay: a generator reads them."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    return " ".join(text.split()).strip("\"'“”")


def language_of(text: str) -> str:
    """`zh`, `en` or `other`: by script, and long Latin text without English stop words is not English."""
    han, latin = len(HAN.findall(text)), len(LATIN.findall(text))
    letters = sum(character.isalpha() for character in text)
    if KANA_HANGUL.search(text) or not letters:
        return OTHER
    if (
        han * 3 >= latin and han + latin >= 0.8 * letters
    ):  # a word takes several letters, a character is one
        return "zh"
    if latin < 0.8 * letters:
        return OTHER
    words = normalise_prompt(text).split()
    stopwords = sum(word in ENGLISH_STOPWORDS for word in words)
    if len(words) >= LONG_ENOUGH and stopwords < MIN_STOPWORD_SHARE * len(words):
        return OTHER
    return "en"


UNFIT = (  # reason, pattern; the first that fits is kept
    ("personal data", r"[\w.+-]+@[\w-]+\.\w{2,}|\+?\d[\d ()-]{8,}\d|(?<!\d)1[3-9]\d{9}(?!\d)"),
    ("a link", r"https?://|www\.\w"),
    (
        "a placeholder was left in",
        r"\{\w*\}|<\w+>|\[(subject|name|object|insert[^\]]*)\]|\blorem ipsum\b|\bTODO\b|\bxxx+\b|某某",
    ),
    (
        "refers to something that is not in it",
        r"^(it|this|that|these|those|they)\b|\b(as|like) (before|above|last time|the previous|the last)\b"
        r"|\b(same|continue) (as|from|with)? ?(before|above|the previous|last)"
        r"|^(again|continue|more like this|make it|try again|another one)\b|^(它|这个|那个|继续|再来|同上|和刚才|跟上面)",
    ),
    (
        "a question, not a description",
        r"^(what|who|why|how|when|where|can you|could you|do you|is it|are you)\b.*[?？]?$|[吗呢]？?$|[?？]$",
    ),
)
OPEN_CHOICE = "leaves a choice open"
OPEN_PATTERN = re.compile(
    r"\beither\b.+\bor\b|\b(something|anything|whatever|some kind of|and so on|etc)\b"
    r"|或者|或是|之类的|随便|等等$|什么都行",
    re.IGNORECASE,
)
SHORT = 100  # characters; in a longer text "as if looking for something" leaves nothing open
_PATTERNS = [(reason, re.compile(pattern, re.IGNORECASE)) for reason, pattern in UNFIT]


def unfit(text: str, language: str) -> str | None:
    """Why people could not judge clips of this prompt, in words; None if they can.

    A prompt must say what is to be seen: a single word, a question, a pointer to something else or an open choice does not.
    """
    for reason, pattern in _PATTERNS:
        if pattern.search(text):
            return reason
    if len(text) <= SHORT and OPEN_PATTERN.search(text):
        return OPEN_CHOICE
    if len(text) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS} characters"
    letters = sum(character.isalpha() for character in text)
    if letters < 0.5 * len(text.replace(" ", "")):
        return "hardly any words"
    if language == "zh":
        return "too short to say what is seen" if len(HAN.findall(text)) < MIN_HAN else None
    words = [word for word in normalise_prompt(text).split() if word not in ENGLISH_STOPWORDS]
    return "too short to say what is seen" if len(words) < MIN_WORDS else None


@lru_cache(maxsize=1)
def category_words() -> dict[str, tuple[str, ...]]:
    """Category -> words that speak for it, from `categories.yaml`."""
    import yaml

    raw = yaml.safe_load(Path(__file__).with_name("categories.yaml").read_text(encoding="utf-8"))
    return {
        name: tuple(str(w) for words in by_language.values() for w in words)
        for name, by_language in raw.items()
    }


def category_of(text: str) -> str:
    """The category whose words occur most often, the first of them at a draw; `other` if none occurs.

    English words match whole, plurals too; Chinese ones anywhere.
    """
    words = Counter(normalise_prompt(text).split())
    scores = {}
    for name, speaking in category_words().items():
        scores[name] = sum(
            text.count(word)
            if HAN.search(word)
            else words[word] + words[f"{word}s"] + words[f"{word}es"]
            for word in speaking
        )
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] else OTHER


def balance(
    counts: Mapping[str, int],
    *,
    strength: float = 0.5,
    least: float = 0.25,
    most: float = 4.0,
) -> dict[str, float]:
    """Sampling weight per category: over-represented ones down, under-represented ones up, mean 1 over the prompts.

    Args:
        counts: prompts per category.
        strength: 0 leaves the shares as they are, 1 makes them equal; between, a share is its power 1 - strength.
        least, most: no prompt becomes rarer or more frequent than this.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; expected 0 to 1")
    total = sum(counts.values())
    raw = {name: number**-strength for name, number in counts.items() if number}
    mean = sum(raw[name] * counts[name] for name in raw) / total if total else 1.0
    return {name: min(most, max(least, weight / mean)) for name, weight in raw.items()}


def sample(
    prompt_ids: Sequence[str], weights: Sequence[float], number: int, *, seed: int = 0
) -> list[str]:
    """Draws prompts without replacement in proportion to their weights; the same seed draws the same.

    Source: Efraimidis and Spirakis (2006): the largest u^(1/w), with u from a hash so that other prompts do not matter.
    """

    def key(prompt: str, weight: float) -> float:
        digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
        u = (int.from_bytes(digest[:8], "big") + 0.5) / 2**64
        return math.log(u) / weight

    keys = {
        name: key(name, weight)
        for name, weight in zip(prompt_ids, weights, strict=True)
        if weight > 0
    }
    return sorted(keys, key=lambda name: -keys[name])[:number]

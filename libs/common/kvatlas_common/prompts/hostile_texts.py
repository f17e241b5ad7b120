"""Texts on which tokenizer libraries are known to part, to compare two of them before one stands in for the other.

Unicode tables of different age, marks that NFC reorders or composes, runs longer than a register, a buffer or a chunk,
lookahead at the end of whitespace, contractions in odd letter case, special tokens whole, cut and side by side, and
texts that begin like the one before (caches that remember it). About 200 KB, the same every time.
"""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

_SPACES = (" ", "\t", "\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000")
_ODD = (
    "don't", "I'LL", "you'Re", "'s", "'\u017f", "\u212a", "it's's", "O'Brien", "''", "na\u00efve", "stra\u00dfe",
    "\u01c6", "\ufb01", "\u6771\u4eac", "\u3053\u3093\u306b\u3061\u306f", "\ud55c\uad6d\uc5b4", "\u1100\u1161\u11a8",
    "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\u05e2\u05b4\u05d1\u05e8",
    "\u0e44\u0e17\u0e22", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "e\u0301", "e\u0323\u0307", "\u1e69", "s\u0307\u0323", "A\u030a",
    "\u212b", "\u0958", "\u0915\u093c", "\U0001d400", "\u200b", "\u200d", "\ufeff", "\ufffd", "\x00", "\x7f", "\x1b[0m",
    "1234567", "3.14", "\u0661\u0662\u0663", "\u00bd", "\u00b2", "\u2167", "0x1F", "--->", "==", "//", "/*\n*/", "...",
    "__init__", "camelCaseHTTPServer", "ALLCAPS", "a_b", "$x", "#\n", "!\r\n", "</", "<|", "|>", "\\n", "\u2019s",
    "\u2014", "\u2022 ", "\u20ac", "\ue000", "\U000e0001", "\U0010ffff",
)  # fmt: skip
_LENGTHS = (2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 129, 1025)
_MARKS = (
    0x0300,
    0x0301,
    0x0323,
    0x0345,
    0x05B0,
    0x064B,
    0x06E0,
    0x07FD,
    0x093C,
    0x0F71,
    0x1AEB,
    0x1DF6,
    0x302A,
    0x3099,
)
_PROSE = (
    "def mean(values: list[float]) -> float:\n    # Raises ZeroDivisionError; don't call it with nothing.\n"
    "\treturn sum(values) / len(values)   \r\n\"It's 10,000 km away,\" she said \u2014 \u201cwe'll never get there in "
    '24h.\u201d  \n\n\n{"a": [1, 2.50e-3, null], "\u00fc": "\\u00e9"}\n'
)


def hostile_texts(special: Sequence[str]) -> Iterator[str]:
    """`special`: the added tokens of the tokenizer."""
    yield from ("", " ", "\n", "a")
    yield from _runs()
    yield from _mixed(special)
    yield from _kinds_of_characters()
    yield from _marks()
    yield from _begun_alike()


def _runs() -> Iterator[str]:
    """Of one character, alone and with something around."""
    for char in (*_SPACES, "a", "Z", "\u00e9", "\u4e2d", "1", "'", "-", "=", "\u0301", "\U0001f600"):
        yield " ".join(f"{char * length}x" for length in _LENGTHS[:-2])
        yield "".join(f"{char * length}\n" for length in _LENGTHS[::3])
    for one, other in itertools.product(_SPACES, repeat=2):
        yield f"a{one}{other}b{other}{other}{one} c{one}"


def _mixed(special: Sequence[str]) -> Iterator[str]:
    """Odd words, prose and special tokens in any order."""
    rng = random.Random(20261127)
    listed = list(special)[:64]
    cut = [token[: rng.randrange(1, len(token))] for token in listed if len(token) > 1]
    for _ in range(150):
        yield "".join(rng.choice(rng.choice((_ODD, _ODD, _SPACES, listed or _ODD, cut or _ODD))) for _ in range(24))
    for token in listed:
        yield f"{token}{token} {token}\n{token[1:]}{token}a{token}"
    yield _PROSE * 5


def _kinds_of_characters() -> Iterator[str]:
    chars = _edges()
    for start in range(0, len(chars), 256):
        yield "".join(f"a{char}b {char}{char}1" for char in chars[start : start + 256])


@cache
def _edges() -> str:
    """The first and last of every stretch of characters of one category, and those beside: where tables end."""
    edges, before = list[int](), ""
    for point in range(0x110000):
        if (kind := unicodedata.category(chr(point))) != before:
            edges += [point - 1, point]
            before = kind
    return "".join(chr(point) for point in edges if point >= 0 and not 0xD800 <= point < 0xE000)


def _marks() -> Iterator[str]:
    """Combining marks in any order: NFC puts them into one."""
    for base in ("e", "\u0915", "\u4e2d", " "):
        yield " ".join(base + "".join(map(chr, three)) for three in itertools.permutations(_MARKS[::2], 3))
        yield " ".join(base + chr(one) + chr(other) for one, other in itertools.permutations(_MARKS, 2))


def _begun_alike() -> Iterator[str]:
    """More than 4 KB as in the text before, then something else in the middle of a run."""
    begun = _PROSE * 16 + " " * 700
    for after in ("x", " ", "\n", "\tx", "y", " \n", "'s", "", "\u4e2d"):
        yield begun + "x" + _PROSE
        yield begun + after

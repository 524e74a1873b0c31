"""What the summariser knows of English and German: where sentences end, and which words say little."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources

# The first mark of a run alone starts a match, so a line of a million dots is read once.
_END = re.compile(r"""(?<![.!?…])[.!?…]++["'\u2019”“»)\]]*+\s++""")
_LAST_WORD = re.compile(r"""[^\s("'“„\u201a\u2018«\[]*$""")
_OPENERS = "\"'“„\u201a\u2018»«(["
_WORD = re.compile(r"[^\W\d_]+(?:[-'\u2019][^\W\d_]+)*")

# A dot after these ends no sentence. What may also stand last ("etc.", "usw.") is not here: as after any
# other word, what follows decides.
_ABBREVIATIONS = frozenset(
    [
        *("mr", "mrs", "ms", "dr", "prof", "st", "vs", "cf", "e.g", "i.e", "approx", "resp"),
        *("hr", "fr", "bzw", "ca", "vgl", "evtl", "ggf", "inkl", "sog", "z.b", "d.h", "u.a", "o.ä", "i.d.r"),
        *("mio", "mrd", "tsd"),
    ]
)
_BEFORE_NUMBERS = frozenset(["no", "nr", "fig", "p", "pp", "eq", "ch", "vol", "abb", "kap", "aufg", "abs"])


@cache
def _stop_words() -> dict[str, frozenset[str]]:
    text = resources.files("feedback_summaries").joinpath("data/stop_words.json").read_text(encoding="utf-8")
    return {language: frozenset(words) for language, words in json.loads(text).items()}


def stop_words(language: str | None) -> frozenset[str]:
    """The words of `language` (BCP 47) that carry no topic; all known words when it is another."""
    known = _stop_words()
    return known.get(_primary(language)) or frozenset().union(*known.values())


def sentences(text: str, *, language: str | None = None) -> list[str]:
    """The sentences of `text`, stripped, each verbatim; a new line ends one too.

    A mark ends a sentence when white space follows and what comes next does not begin in lower case, so
    9.81, "approx. five" and "(really?) and" stay whole. "Dr. Kim" and "J. Kim" do so by the words before
    the dot, and "Fig. 2" by the number after it. In German a number with a dot is an ordinal ("am 3. Mai").
    What holds neither letter nor digit is dropped.
    """
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in _END.finditer(line):
            if _ends_sentence(line, match, language):
                found.append(line[start : match.end()].strip())
                start = match.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if any(character.isalnum() for character in sentence)]


def _ends_sentence(line: str, match: re.Match[str], language: str | None) -> bool:
    following = line[match.end() : match.end() + 4].lstrip(_OPENERS)[:1]
    if following.islower():
        return False
    if match.group().rstrip() != ".":
        return True
    last = _LAST_WORD.search(line, max(0, match.start() - 24), match.start())
    word = last.group().lower() if last else ""
    if word in _ABBREVIATIONS or (word in _BEFORE_NUMBERS and following.isdigit()):
        return False
    if len(word) == 1 and word.isalpha():  # an initial, or a part of "z. B."; but not "than I." and "30 s."
        return word == "i" or line[max(0, match.start() - 3) : match.start() - 1].rstrip()[-1:].isdigit()
    return not (word.isdigit() and len(word) <= 2 and _primary(language) == "de")


def words(text: str) -> list[str]:
    """The words of `text` as written, without what follows an apostrophe; numbers are not words."""
    return [word.replace("\u2019", "'").partition("'")[0] for word in _WORD.findall(text)]


def stem(word: str) -> str:
    """What forms of one word have in common, roughly: six letters, case folded, without a plural's s.

    Crude, and enough to see that "presenting" and "Presentation" speak of one thing, in either language.
    """
    folded = word.casefold()
    return (folded.removesuffix("s") if len(folded) > 3 else folded)[:6]


def _primary(language: str | None) -> str:
    return (language or "").partition("-")[0].lower()

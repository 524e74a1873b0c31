"""Picking the sentences that say most of what all of them say.

TextRank (Mihalcea and Tarau, "TextRank: Bringing Order into Text", 2004): sentences vote for the ones
they share words with, and a vote counts by the rank of the voter. Then maximal marginal relevance
(Carbonell and Goldstein, 1998) takes the best one that adds something to those taken. Nothing here is
random, and ties go to the earlier sentence. The work grows with the square of the number of sentences.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from math import log

from feedback_summaries.language import stem, words

DAMPING = 0.85
TOLERANCE = 1e-6
MAX_ROUNDS = 100
RELEVANCE = 0.7  # against novelty, in choosing
SAME = 0.6  # sentences that share so much of the shorter one repeat each other
MIN_TOPICS = 3  # "Well done!" is no summary while there is something better
MAX_PHRASE_WORDS = 3

Topics = frozenset[str]


def topics(sentence: str, stop: frozenset[str]) -> Topics:
    """The stems of the words in `sentence` that carry a topic."""
    return frozenset(stem(word) for word in words(sentence) if _carries(word, stop))


def rank(bags: Sequence[Topics]) -> list[float]:
    """How much each sentence stands for all, 0 to 1; 1 is the best. Sentences are given as their topics."""
    votes: list[list[tuple[int, float]]] = [[] for _ in bags]
    for i, j in combinations(range(len(bags)), 2):
        if weight := _votes(bags[i], bags[j]):
            votes[i].append((j, weight))
            votes[j].append((i, weight))
    given = [sum(weight for _, weight in row) for row in votes]
    scores = [1.0] * len(bags)
    for _ in range(MAX_ROUNDS):
        fresh = [1 - DAMPING + DAMPING * sum(w / given[j] * scores[j] for j, w in row) for row in votes]
        moved = max((abs(new - old) for new, old in zip(fresh, scores, strict=True)), default=0.0)
        scores = fresh
        if moved < TOLERANCE:
            break
    best = max(scores, default=1.0)
    return [score / best for score in scores]


def _votes(a: Topics, b: Topics) -> float:
    shared = len(a & b)
    return shared / (log(1 + len(a)) + log(1 + len(b))) if shared else 0.0


def choose(bags: Sequence[Topics], scores: Sequence[float], *, count: int) -> list[int]:
    """The indices of at most `count` sentences, in their own order, no two of which repeat each other.

    Short ones are taken only when there are too few others.
    """
    taken: list[int] = []
    full = [i for i, bag in enumerate(bags) if len(bag) >= MIN_TOPICS]
    short = [i for i, bag in enumerate(bags) if len(bag) < MIN_TOPICS]
    for pool in (full, short):
        left = pool
        while len(taken) < count:
            left = [i for i in left if all(_overlap(bags[i], bags[j]) < SAME for j in taken)]
            if not left:
                break
            best = max(left, key=lambda i: (_worth(i, taken, bags, scores), -i))
            taken.append(best)
            left = [i for i in left if i != best]
    return sorted(taken)


def _worth(i: int, taken: Sequence[int], bags: Sequence[Topics], scores: Sequence[float]) -> float:
    repeated = max((_overlap(bags[i], bags[j]) for j in taken), default=0.0)
    return RELEVANCE * scores[i] - (1 - RELEVANCE) * repeated


def _overlap(a: Topics, b: Topics) -> float:
    """The share of the smaller one that the other holds too. Two without any topics are the same."""
    smaller = min(len(a), len(b))
    return len(a & b) / smaller if smaller else float(len(a) == len(b))


def key_phrases(
    comments: Sequence[Sequence[str]], stop: frozenset[str], *, count: int = 5
) -> tuple[str, ...]:
    """Up to `count` phrases of one to three words that several comments share, best first.

    A comment is given as its sentences. The more comments hold a phrase and the longer it is, the better;
    phrases that share a word with a better one are left out. A lone comment has nobody to share with: then
    its longest phrases are taken. Spelled as written, in lower case where it was once.
    """
    held: Counter[tuple[str, ...]] = Counter()
    spelled: dict[tuple[str, ...], str] = {}
    for sentences in comments:
        here = set()
        for phrase in chain.from_iterable(_phrases(sentence, stop) for sentence in sentences):
            key, text = tuple(stem(word) for word in phrase), " ".join(phrase)
            here.add(key)
            if key not in spelled or (text.islower() and not spelled[key].islower()):
                spelled[key] = text
        held.update(here)
    least = 2 if len(comments) > 1 else 1
    order = {key: position for position, key in enumerate(spelled)}
    worth = {key: (held[key] * (1 + 0.5 * len(key)), -order[key]) for key in spelled if held[key] >= least}
    found: list[tuple[str, ...]] = []
    for key in sorted(worth, key=worth.__getitem__, reverse=True):
        if len(found) < count and all(set(key).isdisjoint(other) for other in found):
            found.append(key)
    return tuple(spelled[key] for key in found)


def _phrases(sentence: str, stop: frozenset[str]) -> Iterator[tuple[str, ...]]:
    """Every run of up to three topic words that no mark and no stop word breaks, as written."""
    for clause in re.split(r"[^\w\s'\u2019-]+", sentence):
        run: list[str] = []
        for word in [*words(clause), ""]:
            if _carries(word, stop):
                run.append(word)
                continue
            for start in range(len(run)):
                for length in range(1, min(MAX_PHRASE_WORDS, len(run) - start) + 1):
                    yield tuple(run[start : start + length])
            run = []


def _carries(word: str, stop: frozenset[str]) -> bool:
    return len(word) > 2 and word.casefold() not in stop

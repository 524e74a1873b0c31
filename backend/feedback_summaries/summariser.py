"""What a summariser is, and the one that needs nothing but this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from feedback_summaries import textrank
from feedback_summaries.language import sentences, stop_words
from feedback_summaries.settings import FeedbackSettings

Style = Literal["paragraph", "bullets"]
Progress = Callable[[float, str], None]
"""Told (fraction done, what begins now) as the work goes on. What it raises ends the work."""

FEW, MANY = 3, 4  # sentences in a summary
MANY_FROM = 12  # sentences read


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a model charged for."""

    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A text, and what it was made from. `picked`: the input's own sentences in it, in their order."""

    text: str
    key_phrases: tuple[str, ...]
    sentences_read: int
    engine: str
    picked: tuple[str, ...] = ()
    tokens: Tokens | None = None


class Summariser(Protocol):
    """Makes one short text out of many comments."""

    def summarise(
        self,
        comments: Sequence[str],
        *,
        language: str | None = None,
        style: Style = "paragraph",
        progress: Progress,
    ) -> Summary:
        """The summary; empty for nothing to read. `language` is that of the comments, BCP 47."""
        ...


class Extractive:
    """Picks the three or four sentences that stand for the rest. The same input gives the same answer."""

    engine = "extractive"

    def summarise(
        self,
        comments: Sequence[str],
        *,
        language: str | None = None,
        style: Style = "paragraph",
        progress: Progress,
    ) -> Summary:
        progress(0.1, "Reading comments")
        stop = stop_words(language)
        progress(0.25, "Splitting sentences")
        split = [sentences(comment, language=language) for comment in comments]
        read = [sentence for comment in split for sentence in comment]
        progress(0.4, "Scoring sentences")
        bags = [textrank.topics(sentence, stop) for sentence in read]
        scores = textrank.rank(bags)
        progress(0.8, "Choosing sentences")
        count = MANY if len(read) >= MANY_FROM else FEW
        picked = tuple(read[i] for i in textrank.choose(bags, scores, count=count))
        phrases = textrank.key_phrases(split, stop)
        progress(1.0, "Summary written")
        return Summary(_written(picked, style), phrases, len(read), self.engine, picked)


def _written(picked: Sequence[str], style: Style) -> str:
    if style == "bullets":
        return "\n".join(f"- {sentence}" for sentence in picked)
    closed = (s if s.rstrip("\"'”\u2019“»)]").endswith((".", "!", "?", "…")) else f"{s}." for s in picked)
    return " ".join(closed)


def summariser_for(settings: FeedbackSettings) -> Summariser:
    """The summariser that `settings` ask for. Loads the HTTP client only when a server is named."""
    if not settings.url:
        return Extractive()
    from feedback_summaries.openai_compatible import OpenAICompatible

    return OpenAICompatible(
        settings.url,
        model=settings.model,
        api_key=settings.api_key.get_secret_value(),
        timeout_seconds=settings.timeout_seconds,
    )

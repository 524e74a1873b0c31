"""The summariser that needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback_summaries import store, textrank
from feedback_summaries.language import sentences, stop_words
from feedback_summaries.summariser import FEW, MANY, MANY_FROM, Extractive, Style, Summary

GWEN = [
    "Your search is fast and finds teachers even when I misspell them. You measured it before you tuned it.",
    "The search finds every teacher, even misspelt ones! But you hardly spoke about the search in the talk.",
    "Next time present the search yourself. A live demo would sell it.",
    "Your readme explains the search well. I read the whole readme.",
    "Speak up earlier when a plan looks wrong. You saw the caching problem and said it a week later.",
    "Great!",
]

NEAR_COPIES = [
    "The graph has clear labels on both axes.",
    "The graph has very clear labels on both the axes!",
    "Your graph has clear labels on both of its axes.",
    "Please speak louder during the presentation, the heater hums.",
    "Units are missing in every table of the report.",
]


def summary_of(
    comments: Sequence[str], *, language: str | None = "en", style: Style = "paragraph"
) -> Summary:
    return Extractive().summarise(
        comments, language=language, style=style, progress=lambda _fraction, _message: None
    )


def test_the_picked_sentences_keep_the_order_of_the_comments() -> None:
    picked = summary_of(GWEN).picked
    everything = [sentence for comment in GWEN for sentence in sentences(comment, language="en")]
    positions = [everything.index(sentence) for sentence in picked]
    assert len(positions) == FEW
    assert positions == sorted(positions)


def test_the_summary_is_about_what_most_comments_are_about() -> None:
    summary = summary_of(GWEN)
    assert "search" in summary.text
    assert "search" in summary.key_phrases[0]


@pytest.mark.parametrize(("read", "count"), [(MANY_FROM - 1, FEW), (MANY_FROM, MANY)])
def test_long_feedback_gets_one_sentence_more(read: int, count: int) -> None:
    students = store.evaluation(101).students
    comments = [sentences(student.comments[0].text, language="en")[0] for student in students][:read]
    summary = summary_of(comments)
    assert summary.sentences_read == read
    assert len(summary.picked) == count


def test_sentences_that_say_the_same_are_taken_once() -> None:
    picked = summary_of(NEAR_COPIES).picked
    assert sum("labels" in sentence for sentence in picked) == 1
    assert len(picked) == FEW


def test_the_same_sentence_from_five_people_is_taken_once() -> None:
    assert summary_of(["Your graph needs clear units."] * 5).picked == ("Your graph needs clear units.",)


@pytest.mark.parametrize("comments", [[], [""], ["  ", "\n"], ["...", ":)"]])
def test_nothing_to_read_gives_an_empty_summary(comments: list[str]) -> None:
    assert summary_of(comments) == Summary("", (), 0, "extractive")


def test_one_sentence_is_its_own_summary() -> None:
    summary = summary_of(["Your graph needs units"])
    assert summary.picked == ("Your graph needs units",)
    assert summary.text == "Your graph needs units."


def test_short_feedback_is_kept_whole() -> None:
    comments = ["Your graph needs clear units.", "Speak louder during the talk please."]
    assert summary_of(comments).text == " ".join(comments)


def test_a_cheer_is_taken_only_when_there_is_nothing_better() -> None:
    full = [
        "Your talk had jokes and a calm voice.",
        "Your talk lacked graphs with units.",
        "After the talk you answered questions patiently.",
    ]
    assert summary_of(["Great talk!", *full]).picked == tuple(full)
    assert summary_of(["Superb handwriting!", full[0]]).picked == ("Superb handwriting!", full[0])
    assert summary_of(["Great!", "Wow."]).picked == ("Great!",)


def test_bullets_have_a_line_for_each_sentence() -> None:
    summary = summary_of(GWEN, style="bullets")
    assert summary.text.split("\n") == [f"- {sentence}" for sentence in summary.picked]


def test_a_sentence_without_an_end_is_closed_in_a_paragraph() -> None:
    text = summary_of(
        ["Your graph needs clear units", 'He called your poster "really outstanding work."']
    ).text
    assert text == 'Your graph needs clear units. He called your poster "really outstanding work."'


def test_german_feedback_is_summed_up_by_its_topics() -> None:
    comments = [
        "Die Karte mit den Pegelständen hast du selbst gezeichnet. Du warst aber vier Minuten zu lang.",
        "Die Karte mit den Pegeln war mega.",
        "Am Ende wurde es lang, bitte achte auf die Minuten. Die Karte bleibt mir im Kopf.",
        "Ich fand gut, dass du am 3. Mai deine Oma befragt hast.",
    ]
    summary = summary_of(comments, language="de")
    assert summary.sentences_read == 6
    assert summary.key_phrases[0] == "Karte"
    assert any("Karte" in sentence for sentence in summary.picked)


def test_abbreviations_and_decimals_stay_in_one_sentence() -> None:
    comments = ["Ask Dr. Patel about the value 9.74 in Fig. 2 of your report, e.g. Tuesday after class."]
    assert summary_of(comments).picked == tuple(comments)


def test_key_phrases_are_shared_by_comments() -> None:
    comments = ["Your scatter plot has tiny labels.", "I understood the scatter plot. Louder voice please!"]
    assert summary_of(comments).key_phrases == ("scatter plot",)


def test_a_lone_comment_is_searched_for_its_longest_phrases() -> None:
    assert summary_of(["Your scatter plot was loud."]).key_phrases == ("scatter plot", "loud")


def test_no_word_is_in_two_key_phrases() -> None:
    used = [word for phrase in summary_of(GWEN).key_phrases for word in phrase.lower().split()]
    assert used
    assert len(used) == len(set(used))


def test_at_most_five_key_phrases_are_given() -> None:
    text = "Ruler, clock, table, voice, poster, graph."
    assert len(summary_of([text, text]).key_phrases) == 5


def test_progress_never_falls_and_ends_at_one() -> None:
    told: list[tuple[float, str]] = []
    Extractive().summarise(
        GWEN, language="en", progress=lambda fraction, message: told.append((fraction, message))
    )
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert [message for _, message in told] == [
        "Reading comments",
        "Splitting sentences",
        "Scoring sentences",
        "Choosing sentences",
        "Summary written",
    ]


def test_what_progress_raises_ends_the_work() -> None:
    class Stop(BaseException):
        pass

    def stop(_fraction: float, _message: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        Extractive().summarise(GWEN, progress=stop)


comments_of_any_kind = st.lists(
    st.text(max_size=200)
    | st.lists(
        st.sampled_from(
            ["Good graph.", "Your units are missing!", "e.g. Fig. 2 shows 9.81", "Am 3. Mai?", "\n", "…", " "]
        ),
        max_size=8,
    ).map(" ".join),
    max_size=8,
)


@settings(deadline=None)
@given(comments_of_any_kind, st.sampled_from([None, "en", "de", "fr"]))
def test_every_sentence_of_a_summary_is_a_sentence_of_the_input(
    comments: list[str], language: str | None
) -> None:
    summary = summary_of(comments, language=language)
    read = [sentence for comment in comments for sentence in sentences(comment, language=language)]
    assert summary.sentences_read == len(read)
    assert len(summary.picked) <= MANY
    assert bool(summary.picked) == bool(read)
    rest = iter(read)
    assert all(sentence in rest for sentence in summary.picked)  # in order, each at its own place


@settings(deadline=None)
@given(comments_of_any_kind)
def test_no_two_sentences_of_a_summary_repeat_each_other(comments: list[str]) -> None:
    stop = stop_words("en")
    bags = [textrank.topics(sentence, stop) for sentence in summary_of(comments).picked]
    for i, one in enumerate(bags):
        for other in bags[:i]:
            shared = len(one & other) / min(len(one), len(other)) if one and other else float(one == other)
            assert shared < textrank.SAME


@settings(deadline=None)
@given(comments_of_any_kind)
def test_the_same_comments_give_the_same_summary(comments: list[str]) -> None:
    assert summary_of(comments) == summary_of(list(comments))


def test_ranks_lie_between_nought_and_one_and_the_best_is_one() -> None:
    bags = [frozenset({"a", "b"}), frozenset({"b", "c"}), frozenset({"c", "d"}), frozenset[str]()]
    scores = textrank.rank(bags)
    assert max(scores) == scores[1] == 1.0
    assert 0 < scores[3] < scores[0] < 1
    assert textrank.rank([]) == []

"""Where sentences end, in English and German."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback_summaries.language import sentences, stem, stop_words, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t ", []),
        ("... !!! :)", []),
        ("Well done", ["Well done"]),
        ("  One. Two!  Three?  ", ["One.", "Two!", "Three?"]),
        ("Wait... What?! Really.", ["Wait...", "What?!", "Really."]),
        ("You got g = 9.81. That is close.", ["You got g = 9.81.", "That is close."]),
        ("Ask Dr. Patel. She knows.", ["Ask Dr. Patel.", "She knows."]),
        ("Show more, e.g. Figure two. It helps.", ["Show more, e.g. Figure two.", "It helps."]),
        ("It took approx. five minutes.", ["It took approx. five minutes."]),
        ("See Fig. 2 and p. 14. Both are good.", ["See Fig. 2 and p. 14.", "Both are good."]),
        ("No. The graph is wrong.", ["No.", "The graph is wrong."]),
        ("Cite J. Smith here.", ["Cite J. Smith here."]),
        ("You know more than I. Trust that.", ["You know more than I.", "Trust that."]),
        ("Tables, axes etc. need units.", ["Tables, axes etc. need units."]),
        ("Check axes etc. Then hand it in.", ["Check axes etc.", "Then hand it in."]),
        (
            'He said "stop!" and we did. "Good." That was it.',
            ['He said "stop!" and we did.', '"Good."', "That was it."],
        ),
        ("(Nice one.) Go on.", ["(Nice one.)", "Go on."]),
        ("first point\nsecond point\r\nThird. Fourth", ["first point", "second point", "Third.", "Fourth"]),
        ("See laneway.example.org for more. Bye.", ["See laneway.example.org for more.", "Bye."]),
        ("You did it in 30 s. 20 swings are enough.", ["You did it in 30 s.", "20 swings are enough."]),
    ],
)
def test_english_text_falls_into_its_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text, language="en") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Am 3. Mai warst du dran. Das war gut.", ["Am 3. Mai warst du dran.", "Das war gut."]),
        ("Nimm z.B. Karten. Oder z. B. Fotos!", ["Nimm z.B. Karten.", "Oder z. B. Fotos!"]),
        ("Das sind ca. 80 Mio. Tonnen. Viel!", ["Das sind ca. 80 Mio. Tonnen.", "Viel!"]),
        ("Vgl. Abb. 4 im Buch. Sie stimmt.", ["Vgl. Abb. 4 im Buch.", "Sie stimmt."]),
        ("Es waren 9,81 m. Über 20. Gut!", ["Es waren 9,81 m.", "Über 20. Gut!"]),
        ("Das war 2013. Danach kam nichts.", ["Das war 2013.", "Danach kam nichts."]),
        ("Am Ende stand »Internet«. Das reicht nicht.", ["Am Ende stand »Internet«.", "Das reicht nicht."]),
        ("Sie sagte: „Schön.“ Dann ging sie.", ["Sie sagte: „Schön.“", "Dann ging sie."]),
    ],
)
def test_german_text_falls_into_its_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text, language="de-AT") == expected


def test_a_number_with_a_dot_ends_an_english_sentence() -> None:
    assert sentences("You wrote 40. The task said 20.", language="en") == [
        "You wrote 40.",
        "The task said 20.",
    ]


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from('aB. !?…"\n)1äÄ\u2019')) | st.text())
def test_sentences_stand_in_the_text_one_after_the_other(text: str) -> None:
    position = 0
    for sentence in sentences(text):
        assert sentence == sentence.strip()
        position = text.index(sentence, position) + len(sentence)


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("aB.! ?\n1")))
def test_no_letter_is_lost(text: str) -> None:
    letters = [c for c in text if c.isalnum()]
    assert [c for sentence in sentences(text) for c in sentence if c.isalnum()] == letters


@pytest.mark.parametrize(
    "text", ["." * 300_000, ".)" * 150_000, "a. " * 100_000, " " * 300_000 + ".", "A" * 300_000]
)
def test_a_hostile_text_is_read_in_one_go(text: str) -> None:
    assert len("".join(sentences(text))) <= len(text)


def test_words_are_cut_at_apostrophes_and_hold_no_numbers() -> None:
    assert words("The student's well-made graph isn\u2019t 9.81 cm") == [
        "The",
        "student",
        "well-made",
        "graph",
        "isn",
        "cm",
    ]


def test_forms_of_a_word_have_one_stem() -> None:
    assert stem("Presentation") == stem("presenting")
    assert stem("STRASSE") == stem("Straße")
    assert stem("songs") == stem("Song")
    assert stem("gas") != stem("gap")


def test_stop_words_are_those_of_the_language_and_of_all_for_another() -> None:
    assert {"the", "nicht"} & stop_words("en-GB") == {"the"}
    assert {"the", "nicht"} & stop_words("DE") == {"nicht"}
    assert stop_words(None) == stop_words("fr") == stop_words("en") | stop_words("de")

"""Which summariser the environment asks for."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from feedback_summaries.openai_compatible import OpenAICompatible
from feedback_summaries.settings import FeedbackSettings
from feedback_summaries.summariser import Extractive, summariser_for

KEY = "sk-very-secret-4711"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("FEEDBACK_SUMMARIES_"):
            monkeypatch.delenv(name)


def test_without_a_url_sentences_are_picked_here() -> None:
    assert isinstance(summariser_for(FeedbackSettings()), Extractive)


def test_a_url_and_a_model_ask_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEEDBACK_SUMMARIES_URL", "http://127.0.0.1:11434/v1/")
    monkeypatch.setenv("FEEDBACK_SUMMARIES_MODEL", "llama3.2")
    settings = FeedbackSettings()
    assert settings.url == "http://127.0.0.1:11434/v1"
    assert isinstance(summariser_for(settings), OpenAICompatible)


def test_a_url_without_a_model_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs FEEDBACK_SUMMARIES_MODEL"):
        FeedbackSettings(url="http://127.0.0.1:11434/v1")


@pytest.mark.parametrize(
    "url", ["ftp://example.org", "localhost:11434", "http://", "/v1", "http://host:99999/v1"]
)
def test_what_is_no_http_url_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        FeedbackSettings(url=url, model="m")


def test_white_space_around_a_key_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEEDBACK_SUMMARIES_API_KEY", f" {KEY}\n")
    assert FeedbackSettings().api_key.get_secret_value() == KEY


@pytest.mark.parametrize("key", [f"{KEY}\nX-More: 1", f"{KEY} {KEY}", f"{KEY}ä"])
def test_a_key_that_fits_no_header_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FeedbackSettings.model_validate({"api_key": key})
    assert KEY not in str(caught.value)


def test_a_key_is_not_shown_by_the_settings() -> None:
    assert KEY not in repr(FeedbackSettings.model_validate({"api_key": KEY}))


@pytest.mark.parametrize(
    ("field", "value", "taken"),
    [
        ("pace_seconds", 0, True),
        ("pace_seconds", -0.1, False),
        ("pace_seconds", 60, True),
        ("pace_seconds", 60.1, False),
        ("timeout_seconds", 0, False),
        ("timeout_seconds", 0.1, True),
        ("timeout_seconds", 110, True),
        ("timeout_seconds", 110.1, False),
    ],
)
def test_numbers_have_their_range(field: str, value: float, taken: bool) -> None:
    if taken:
        assert getattr(FeedbackSettings.model_validate({field: value}), field) == value
    else:
        with pytest.raises(ValidationError, match=field):
            FeedbackSettings.model_validate({field: value})

"""The example's own knobs, apart from Laneway's."""

from __future__ import annotations

from functools import lru_cache
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class FeedbackSettings(BaseSettings):
    """Read from the environment: a field's variable is its name in capitals after `FEEDBACK_SUMMARIES_`."""

    model_config = SettingsConfigDict(
        env_prefix="FEEDBACK_SUMMARIES_", frozen=True, extra="ignore", hide_input_in_errors=True
    )

    url: str = Field(
        "",
        description="Base URL of an OpenAI-compatible server, `/chat/completions` follows it; "
        "`http://127.0.0.1:11434/v1` is Ollama. Empty: sentences are picked here, without a model.",
    )
    model: str = Field("", description="Name of the model, as the server knows it. Needed with a URL.")
    api_key: SecretStr = Field(SecretStr(""), description="Sent as a bearer token. Ollama needs none.")
    timeout_seconds: float = Field(
        60.0, gt=0, le=110, description="Longest silence of the server; the whole job ends after 120 seconds."
    )
    pace_seconds: float = Field(
        0.0,
        ge=0,
        le=60,
        description="Waits so long in all between the stages, to make the progress visible in a demo.",
    )

    @field_validator("url")
    @classmethod
    def _http(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0):
            raise ValueError("must be an http:// or https:// URL, or empty")
        return value.rstrip("/")

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr) -> SecretStr:
        # HTTP clients quote an illegal header in their error: a key with a newline must not get there.
        key = value.get_secret_value().strip()
        if not all("!" <= character <= "~" for character in key):
            raise ValueError("must be printable ASCII without spaces")
        return SecretStr(key)

    @model_validator(mode="after")
    def _model_named(self) -> Self:
        if self.url and not self.model:
            raise ValueError("FEEDBACK_SUMMARIES_URL needs FEEDBACK_SUMMARIES_MODEL")
        return self


@lru_cache
def get_settings() -> FeedbackSettings:
    """The process's settings, read once."""
    return FeedbackSettings()

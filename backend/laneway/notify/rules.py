"""Who is notified of what: the file that LANEWAY_NOTIFICATIONS names, as one value.

Rules are looked at in the transaction that makes the event happen, so every process that runs jobs,
answers callers or sweeps reads the same file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laneway.domain.events import CATALOGUE, EventType, subscribed
from laneway.errors import Unprocessable
from laneway.notify.channels import Channel
from laneway.settings import get_settings

ChannelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,49}$")]


class Rule(BaseModel):
    """Tell `channels` of `events` about jobs of `job_types`; all are names or globs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    events: Annotated[tuple[str, ...], Field(min_length=1)]
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    job_types: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)

    def wants(self, event_type: str, job_type: str | None) -> bool:
        """Whether it is for this event; what is told of no job passes any `job_types`."""
        return (
            event_type != EventType.JOB_PROGRESS
            and subscribed(event_type, self.events)
            and (job_type is None or any(fnmatchcase(job_type, each) for each in self.job_types))
        )


class FailureRate(BaseModel):
    """Tell `channels` when more than `percent` of a job type's ends within a time were failures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    job_types: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    percent: Annotated[float, Field(ge=0, lt=100)] = 20.0
    of_at_least: Annotated[int, Field(ge=1)] = 10
    within_seconds: Annotated[int, Field(ge=60, le=86_400)] = 600

    def covers(self, job_type: str) -> bool:
        return any(fnmatchcase(job_type, each) for each in self.job_types)

    def exceeded(self, *, failed: int, ended: int) -> bool | None:
        """Whether so many failures are too many; None when too few jobs ended to say."""
        return None if ended < self.of_at_least else 100 * failed > self.percent * ended


class Notifications(BaseModel):
    """The file's content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: dict[ChannelName, Channel] = {}
    rules: tuple[Rule, ...] = ()
    failure_rates: tuple[FailureRate, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Notifications:
        named = [rule.channels for rule in self.rules] + [rate.channels for rate in self.failure_rates]
        for name in (name for names in named for name in names):
            if name not in self.channels:
                known = ", ".join(self.channels) or "none"
                raise ValueError(f"a rule names the channel {name!r}; there are: {known}")
        for place, rule in enumerate(self.rules, start=1):
            for pattern in rule.events:
                if not any(subscribed(event, [pattern]) for event in CATALOGUE):
                    raise ValueError(f"rule {place}: {pattern!r} fits no event")
        return self

    def concerns(self, event_types: Sequence[str]) -> bool:
        """Whether any of these events may be told to somebody, of some job type."""
        return any(rule.wants(event, None) for rule in self.rules for event in event_types)

    def addresses(self, event_type: str, job_type: str | None = None) -> list[str]:
        """Whom this is told, as `kind:name` of their channels."""
        rules = [rule for rule in self.rules if rule.wants(event_type, job_type)]
        return self.addresses_of(dict.fromkeys(name for rule in rules for name in rule.channels))

    def addresses_of(self, names: Iterable[str]) -> list[str]:
        """The addresses of these channels."""
        return [f"{self.channels[name].kind}:{name}" for name in names]

    def channel(self, address: str) -> Channel | None:
        """The channel of an address; None when the file no longer has it."""
        kind, _, name = address.partition(":")
        found = self.channels.get(name)
        return found if found is not None and found.kind == kind else None


def current() -> Notifications:
    """What this process's settings say, read once; without a file nobody is notified."""
    path = get_settings().notifications
    return Notifications() if path is None else load(path)


@lru_cache
def load(path: Path) -> Notifications:
    """The file's content. Raises Unprocessable that names what does not fit, and no value of it."""
    try:
        return Notifications.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise Unprocessable(f"LANEWAY_NOTIFICATIONS: {path} cannot be read: {why}") from None
    except tomllib.TOMLDecodeError as error:
        raise Unprocessable(f"LANEWAY_NOTIFICATIONS: {path} is not TOML: {error}") from None
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise Unprocessable(f"LANEWAY_NOTIFICATIONS: {path}: {'; '.join(found)}") from None

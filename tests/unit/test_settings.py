from __future__ import annotations

import os
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

from laneway.settings import PREFIX, Settings, get_settings, unknown_variables


def from_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(PREFIX + name, value)
    return Settings()


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("LANEWAY_REDIS_URI", "LANEWAY_REDIS_URL"),
        ("LANEWAY_CONCURENCY", "LANEWAY_CONCURRENCY"),
        ("LANEWAY_DATABASEURL", "LANEWAY_DATABASE_URL"),
        ("LANEWAY_XQZ", None),
    ],
)
def test_a_variable_that_sets_nothing_is_reported_with_the_nearest_name(
    variable: str, nearest: str | None
) -> None:
    assert list(unknown_variables({variable: "1", "HOME": "/", "OTHER_REDIS_URI": ""})) == [
        (variable, nearest)
    ]


def test_the_variable_of_every_setting_is_known() -> None:
    assert list(unknown_variables({PREFIX + name.upper(): "" for name in Settings.model_fields})) == []


def test_every_setting_has_a_sentence_for_the_reference() -> None:
    fields = Settings.model_fields
    assert [name for name, field in fields.items() if not (field.description or "").endswith(".")] == []


def test_a_variable_is_the_name_in_capitals_after_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = from_environment(monkeypatch, PORT="9000", DATA_DIR="/srv/data", WEBHOOK_ALLOW_HTTP="true")
    assert (settings.port, settings.data_dir, settings.webhook_allow_http) == (9000, Path("/srv/data"), True)


def test_a_variable_without_the_prefix_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9000")
    assert Settings().port == 8000


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("port", [0, 65535], [-1, 65536]),
        ("max_body_bytes", [1024], [1023]),
        ("max_batch_body_bytes", [1024], [1023]),
        ("streams_per_caller", [1], [0]),
        ("job_timeout_seconds", [1], [0]),
        ("lane_window", [1], [0]),
        ("crash_limit", [1], [0]),
        ("concurrency", [0, 1024], [-1, 1025]),
        ("lease_seconds", [30], [0, -1]),
        ("beat_seconds", [0.001, 5], [0, -1]),
        ("drain_seconds", [0], [-0.001]),
        ("cancel_grace_seconds", [0], [-0.001]),
        ("timeout_grace_seconds", [0], [-0.001]),
        ("recycle_jobs", [1], [0]),
        ("child_memory_mib", [0], [-1]),
        ("unready_seconds", [0], [-0.001]),
        ("poll_seconds", [0.001], [0]),
        ("tick_seconds", [0.001], [0]),
        ("webhook_timeout_seconds", [0.001, 60], [0, 60.001]),
    ],
)
def test_a_number_is_taken_in_its_range_and_refused_one_past_it(
    name: str, inside: list[Any], outside: list[Any]
) -> None:
    for value in inside:
        assert getattr(Settings(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(ValidationError, match=name):
            Settings(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("log_level", "LOUD"), ("log_format", "xml"), ("port", "http")])
def test_a_wrong_value_is_refused_and_the_setting_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises((ValidationError, SettingsError), match=name):
        from_environment(monkeypatch, **{name.upper(): value})


@pytest.mark.parametrize(
    ("written", "read"),
    [("", ()), ("a", ("a",)), ("a.b, c ,", ("a.b", "c")), (" , ", ())],
)
def test_a_list_is_written_with_commas(
    monkeypatch: pytest.MonkeyPatch, written: str, read: tuple[str, ...]
) -> None:
    settings = from_environment(monkeypatch, TASKS=written, WEBHOOK_ALLOWED_HOSTS=written)
    assert settings.tasks == settings.webhook_allowed_hosts == read


def test_networks_are_read_and_what_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = from_environment(monkeypatch, WEBHOOK_ALLOWED_CIDRS="10.0.0.0/8, fd00::/8")
    assert settings.allowed_networks == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    for bent in ("10.0.0.1/8", "ten", "10.0.0.0/33"):
        with pytest.raises(ValidationError, match="webhook_allowed_cidrs"):
            from_environment(monkeypatch, WEBHOOK_ALLOWED_CIDRS=bent)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgres://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgresql+psycopg://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("sqlite:////srv/x.db", "sqlite:////srv/x.db"),
    ],
)
def test_the_driver_of_the_database_is_filled_in(given: str, used: str) -> None:
    assert Settings(database_url=given).database == used


def test_without_a_database_the_record_is_a_file_in_the_data_folder(tmp_path: Path) -> None:
    assert Settings(data_dir=tmp_path).database == f"sqlite:///{tmp_path}/laneway.db"
    assert Settings(data_dir=Path("here")).database == f"sqlite:///{Path.cwd()}/here/laneway.db"


def test_no_concurrency_means_one_child_a_cpu() -> None:
    assert Settings(concurrency=0).children == os.cpu_count()
    assert Settings(concurrency=3).children == 3


def test_the_encryption_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = from_environment(monkeypatch, ENCRYPTION_KEYS="k1:c2VjcmV0")
    assert "c2VjcmV0" not in f"{settings!r} {settings} {settings.model_dump_json()}"
    assert settings.encryption_keys.get_secret_value() == "k1:c2VjcmV0"


def test_settings_cannot_be_changed_and_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = get_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    monkeypatch.setenv("LANEWAY_PORT", "9000")
    assert get_settings() is settings


def test_a_worker_beats_often_enough_for_its_lease() -> None:
    """The reference says "at most lease / 6"."""
    defaults = Settings()
    assert defaults.beat_seconds <= defaults.lease_seconds / 6
    Settings(lease_seconds=12, beat_seconds=2)
    with pytest.raises(ValidationError, match="beat_seconds"):
        Settings(lease_seconds=12, beat_seconds=2.001)


def test_a_scheduler_looks_often_enough_to_call_a_worker_dead() -> None:
    Settings(lease_seconds=12, beat_seconds=1, tick_seconds=2)
    with pytest.raises(ValidationError, match="tick_seconds"):
        Settings(lease_seconds=12, beat_seconds=1, tick_seconds=2.001)

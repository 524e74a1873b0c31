"""The API on each store, in this process or served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from api_client import LocalApi, ServedApi, WorkerProcess
from laneway.settings import Settings

AMPLE = "queue=9000/60@user,batch=9000/60@user,default=9000/60@user"


@pytest.fixture
def api_settings(sqlite_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings of an API on SQLite whose limits no test meets by accident."""
    return Settings(
        database_url=sqlite_url, redis_url=redis_url, data_dir=tmp_path / "data", rate_limits=AMPLE
    )


@pytest.fixture
def local(api_settings: Settings) -> Iterator[Callable[..., LocalApi]]:
    """Starts an API in this process, with `settings` of its own."""
    with ExitStack() as stack:

        def start(**settings: Any) -> LocalApi:
            return stack.enter_context(LocalApi(_with(api_settings, settings)))

        yield start


@pytest.fixture
def api(local: Callable[..., LocalApi]) -> LocalApi:
    """The API on SQLite, in this process."""
    return local()


@pytest.fixture
def each_api(database_url: str, local: Callable[..., LocalApi]) -> LocalApi:
    """The API on each store in turn, in this process."""
    return local(database_url=database_url)


@pytest.fixture
def served(api_settings: Settings) -> Iterator[Callable[..., ServedApi]]:
    """Starts an API in a uvicorn process, with `settings` of its own."""
    with ExitStack() as stack:

        def start(**settings: Any) -> ServedApi:
            return stack.enter_context(ServedApi(_with(api_settings, settings)))

        yield start


@pytest.fixture
def worker(each_api: LocalApi) -> Iterator[WorkerProcess]:
    """A worker on the stores of `each_api`."""
    with WorkerProcess(each_api.settings) as process:
        yield process


def _with(settings: Settings, changes: dict[str, Any]) -> Settings:
    said = {name: getattr(settings, name) for name in settings.model_fields_set}
    return Settings(**(said | changes))

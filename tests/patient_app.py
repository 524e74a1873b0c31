"""The application, whose limiter gives Redis all the time it needs: to count on a busy machine."""

from __future__ import annotations

from starlette.types import ASGIApp

from laneway.api import app
from laneway.limits import redis_windows


def create_app() -> ASGIApp:
    redis_windows.TIMEOUT_SECONDS = 20.0
    return app.create_app()

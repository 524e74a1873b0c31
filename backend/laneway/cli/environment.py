"""What a command starts from: the settings, and the API and the key that they lead to."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from laneway.errors import Conflict, Forbidden, LanewayError, Unauthenticated, Unprocessable

if TYPE_CHECKING:
    from laneway.settings import Settings


def read_settings(**overrides: Any) -> Settings:
    """The settings of the environment, with `overrides` over them; None overrides nothing.

    Raises Unprocessable that names each bad variable and, since it may be secret, not its value.
    """
    from pydantic import ValidationError

    from laneway.settings import PREFIX, Settings

    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        found = [
            ((PREFIX + "_".join(map(str, item["loc"]))).upper() if item["loc"] else "settings", item["msg"])
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise Unprocessable("; ".join(f"{name}: {why}" for name, why in found)) from None


def start_process(settings: Settings, *, api: bool = False) -> None:
    """Send the logs of a long-running process where the settings say; warn of variables that set nothing.

    Raises NotForProduction for what production must not have, Unprocessable for a file of notifications, or
    for an API's issuers of JWTs, that cannot be used.
    """
    from laneway import log
    from laneway.engine.access.production import need_fit_for_production
    from laneway.notify import rules
    from laneway.settings import unknown_variables

    need_fit_for_production(settings, api=api)
    if api and settings.jwt_issuers.get_secret_value():
        from laneway.clock import SystemClock
        from laneway.engine.access.jwt_issuers import issuers_of

        issuers_of(settings, SystemClock())
    json_lines = None if settings.log_format == "auto" else settings.log_format == "json"
    log.configure(json_lines=json_lines, level=settings.log_level)
    for name, nearest in unknown_variables(os.environ):
        log.get_logger("cli").warning("unknown_variable", variable=name, nearest=nearest)
    if settings.notifications is not None:
        rules.load(settings.notifications)


def api_url(settings: Settings) -> str:
    """Where the API is, without a slash at the end."""
    return settings.url.rstrip("/") or f"http://{_reachable(settings.host)}:{settings.port}"


def api_key(settings: Settings) -> str:
    """The key to call with. Raises Unauthenticated with what to do when there is none."""
    from laneway.engine.access.callers import ADMIN_KEY_FILE

    if given := settings.api_key.get_secret_value():
        return given
    path = settings.data_dir / ADMIN_KEY_FILE
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        raise Unauthenticated(
            f"no API key: set LANEWAY_API_KEY; {path.absolute()}, which `laneway dev` and `laneway api` make,"
            " is not there"
        ) from None
    except OSError as error:
        raise Forbidden(f"{path.absolute()}: {error.strerror}; set LANEWAY_API_KEY instead") from None


def _reachable(host: str) -> str:
    """An address to call for one that is listened on."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - the other end of it
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`; port 0 takes a free one. Raises Conflict when it is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise Unprocessable(f"cannot listen on {host!r}: {error.strerror}; check --host") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_bind(error, host, port) from None
    return listener


def _cannot_bind(error: OSError, host: str, port: int) -> LanewayError:
    import errno

    if error.errno == errno.EADDRINUSE:
        return Conflict(
            f"port {port} of {host} is taken: stop what listens there, or name another with --port"
        )
    if error.errno == errno.EACCES:
        return Forbidden(f"port {port} of {host} is not for this user: name one from 1024 up with --port")
    return Unprocessable(f"cannot listen on port {port} of {host}: {error.strerror}; check --host")

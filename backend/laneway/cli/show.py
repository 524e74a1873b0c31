"""What commands say: results on standard output, progress on standard error.

On a terminal both are made for eyes; elsewhere, and with `--json`, each is one JSON object a line without
control codes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress

_NEWS = ("id", "job_type", "status", "attempt", "progress", "progress_message")


def for_eyes(*, as_json: bool) -> bool:
    """Whether standard output is looked at."""
    return sys.stdout.isatty() and not as_json


def result(value: Any, *, as_json: bool = False) -> None:
    """A JSON value on standard output."""
    if for_eyes(as_json=as_json):
        from rich import print_json

        print_json(data=value)
    else:
        print(json.dumps(value, ensure_ascii=False, separators=(",", ":")), flush=True)


def rows(
    records: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    *,
    as_json: bool = False,
    title: str = "",
) -> None:
    """Records on standard output: a table of `columns` (key → heading), or each record as a line of JSON."""
    if not for_eyes(as_json=as_json):
        for record in records:
            result(record, as_json=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns.values(), title=title or None, title_justify="left", box=None, pad_edge=False)
    for record in records:
        table.add_row(*(_cell(record[key]) for key in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    return "" if value is None else escape(str(value))


class JobBar:
    """A job's progress on standard error: a bar that moves, or a line for each piece of news."""

    def __init__(self, *, as_json: bool) -> None:
        self._progress: Progress | None = None if as_json or not sys.stderr.isatty() else job_bars()

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task("", total=100, status="", message="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, news: Mapping[str, Any]) -> None:
        if self._progress is None:
            line = {name: news.get(name) for name in _NEWS}
            print(json.dumps(line, ensure_ascii=False, separators=(",", ":")), file=sys.stderr, flush=True)
            return
        self._progress.update(
            self._task,
            description=f"{news.get('job_type', '')} {news['id'][-8:]}",
            completed=100 if news["status"] == "completed" else news.get("progress", 0),
            status=news["status"],
            message=news.get("progress_message") or "",
        )


def job_bars() -> Progress:
    """Live bars on standard error, each with its percentage in words; tasks need `status` and `message`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TextColumn("{task.fields[message]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )

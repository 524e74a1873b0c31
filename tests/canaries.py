"""Looks for what must not be in a file. `python -m canaries FOLDER` judges the logs of a whole run of tests.

A run keeps its folder with `pytest --basetemp FOLDER -o tmp_path_retention_policy=all`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# What every secret of ours looks like: API keys, browser tokens, webhook secrets, private keys.
SECRETS = re.compile(
    rb"lw_(?:live|test)_[a-z0-9]{12}_[0-9A-Za-z]{49}|lwt_[0-9A-Za-z_.-]{40,}"
    rb"|whs(?:ec|k)_[0-9A-Za-z+/=]{24,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
LOGS = ("*.log",)
STORES = ("*.db", "*.db-wal")


def found(paths: Iterable[Path], canaries: Iterable[str]) -> list[tuple[str, str]]:
    """Each file with a canary in it, and that canary."""
    wanted = [canary.encode() for canary in canaries]
    return [(str(path), each.decode()) for path in paths for each in wanted if each in path.read_bytes()]


def secrets_in(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Each file with what looks like a secret in it, and the line's beginning."""
    return [
        (str(path), line[max(0, match.start() - 60) : match.start() + 16].decode(errors="replace"))
        for path in paths
        for line in path.read_bytes().splitlines()
        if (match := SECRETS.search(line))
    ]


def files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path for path in folder.rglob(pattern) if path.is_file() and not path.is_symlink())


def main(folder: Path) -> int:
    logs, stores = list(files(folder, LOGS)), list(files(folder, STORES))
    leaks = secrets_in([*logs, *stores])
    for path, line in leaks:
        print(f"{path}: {line}")
    lines = sum(path.read_bytes().count(b"\n") for path in logs)
    print(f"{len(logs)} logs of {lines:,} lines, {len(stores)} stores: {len(leaks)} secrets")
    return 1 if leaks or not logs or not stores else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

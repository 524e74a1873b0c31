import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from laneway.settings import Settings
from laneway.webhooks.secrets import KEY_FILE, SecretBox


def test_the_key_is_made_once_and_kept_to_oneself(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "new" / "folder")
    sealed = SecretBox.from_settings(settings).seal("text", "here")
    path = settings.data_dir / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700
    assert [file.name for file in settings.data_dir.iterdir()] == [KEY_FILE]
    assert SecretBox.from_settings(settings).open(sealed, "here") == "text"


def test_the_key_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        SecretBox.from_settings(Settings(data_dir=tmp_path))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o644])
def test_a_key_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    SecretBox.from_settings(Settings(data_dir=tmp_path))
    (tmp_path / KEY_FILE).chmod(mode)
    with pytest.raises(PermissionError, match=f"chmod 600 {tmp_path}"):
        SecretBox.from_settings(Settings(data_dir=tmp_path))


def test_a_broken_key_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / KEY_FILE
    path.touch(mode=0o600)
    with pytest.raises(ValueError, match=str(path)):
        SecretBox.from_settings(Settings(data_dir=tmp_path))


def test_processes_that_start_together_end_with_one_key(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox
print("ready", flush=True)
sys.stdin.readline()
print(SecretBox.from_settings(Settings(data_dir=Path(sys.argv[1]))).seal("text", "here"), flush=True)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    sealed = [process.communicate(timeout=60)[0].strip() for process in processes]
    box = SecretBox.from_settings(Settings(data_dir=tmp_path))
    assert [box.open(each, "here") for each in sealed] == ["text"] * len(processes)
    assert [file.name for file in tmp_path.iterdir()] == [KEY_FILE]

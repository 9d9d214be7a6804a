"""The files of one node: key, lock, socket path."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from daaswarm.errors import ConfigError
from daaswarm.store.data_dir import DataDir


@pytest.fixture
def data_dir(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "node")


def test_a_lock_holds_on_a_full_disk(data_dir: DataDir) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    data_dir.create()
    data_dir.lock_path.symlink_to("/dev/full")
    with data_dir.lock(), pytest.raises(ConfigError, match="a node already runs"), data_dir.lock():
        pass


def get_mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_key_is_made_once_and_is_private(data_dir: DataDir) -> None:
    assert not data_dir.has_key() and not data_dir.path.exists()
    key = data_dir.load_key()
    assert data_dir.has_key() and bytes(data_dir.load_key()) == bytes(key)
    assert get_mode(data_dir.key_path) == 0o600 and get_mode(data_dir.path) == 0o700
    assert [path.name for path in data_dir.path.iterdir()] == ["identity.key"]


@pytest.mark.parametrize("content", [b"", b"abc", b"zz" * 32, b"ab" * 31, b"ab" * 33, b"\xff" * 64, b"\x00" * 32])
def test_a_damaged_key_is_refused_and_kept(data_dir: DataDir, content: bytes) -> None:
    data_dir.create()
    data_dir.key_path.write_bytes(content)
    data_dir.key_path.chmod(0o600)
    with pytest.raises(ConfigError, match="holds no Ed25519 key"):
        data_dir.load_key()
    assert data_dir.key_path.read_bytes() == content


def test_a_key_that_others_can_read_is_refused(data_dir: DataDir) -> None:
    data_dir.load_key()
    data_dir.key_path.chmod(0o640)
    with pytest.raises(ConfigError, match="readable by others") as info:
        data_dir.load_key()
    assert "chmod 600" in info.value.hint


def test_a_key_that_is_a_folder(data_dir: DataDir) -> None:
    data_dir.key_path.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"can't be read"):
        data_dir.load_key()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for action in (DataDir(tmp_path / "file").create, DataDir(tmp_path / "file" / "below").load_key):
        with pytest.raises(ConfigError, match="data directory"):
            action()


def test_a_folder_that_can_not_be_written(data_dir: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    data_dir.create()
    monkeypatch.setattr("daaswarm.store.data_dir.create_private", refuse)
    with pytest.raises(ConfigError, match=r"identity\.key can't be written: Permission denied"):
        data_dir.load_key()
    data_dir.lock_path.mkdir()  # stands for a lock file that can't be opened
    with pytest.raises(ConfigError, match=r"node\.lock can't be opened"), data_dir.lock():
        pass


def test_one_node_at_a_time(data_dir: DataDir) -> None:
    with data_dir.lock():
        assert data_dir.lock_path.read_text().strip() == str(os.getpid())
        with pytest.raises(ConfigError, match=rf"already runs .*process {os.getpid()}"), DataDir(data_dir.path).lock():
            pass
        assert data_dir.lock_path.read_text().strip() == str(os.getpid())
    with data_dir.lock():  # free again
        pass


def test_the_lock_is_released_on_error(data_dir: DataDir) -> None:
    with pytest.raises(ZeroDivisionError), data_dir.lock():
        raise ZeroDivisionError
    with data_dir.lock():
        pass

"""Files and folders that appear whole, or not at all."""

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest
from folders import contents

from lfm_mlx import files
from lfm_mlx.checkpoint.writer import is_checkpoint
from lfm_mlx.errors import InputError
from lfm_mlx.files import atomic_folder, lock


def test_no_room_names_other_reasons() -> None:
    error = files.no_room(OSError(errno.EROFS, "Read-only file system"), "there")
    assert str(error) == "there: Read-only file system"
    assert "no space left" in str(files.no_room(OSError(errno.ENOSPC, "x"), "there"))


def fill(folder: Path, mark: str) -> None:
    (folder / "config.json").write_text(mark)
    (folder / "model.safetensors").write_text(mark)


def test_atomic_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with atomic_folder(out) as partial:
        fill(partial, "1")
        assert not out.exists()
        assert partial.parent == out.parent
    assert contents(out) == {"config.json": b"1", "model.safetensors": b"1"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
@pytest.mark.parametrize("force", [False, True])
def test_atomic_folder_after_a_failure(
    tmp_path: Path, error: type[BaseException], force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        out.mkdir()
        fill(out, "old")
    before = contents(tmp_path)

    def fail() -> None:
        with atomic_folder(out, force=force, replaceable=is_checkpoint) as partial:
            fill(partial, "new")
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == int(force)


def test_atomic_folder_replaces_with_force_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    (out / "more").write_text("old")
    with (
        pytest.raises(InputError, match="is there already; give another name, or force"),
        atomic_folder(out),
    ):
        pytest.fail("entered")
    with atomic_folder(out, force=True, replaceable=is_checkpoint) as partial:
        fill(partial, "new")
    assert contents(tmp_path) == {"out/config.json": b"new", "out/model.safetensors": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_removes_what_is_no_checkpoint(tmp_path: Path) -> None:
    project, file = tmp_path / "project", tmp_path / "file"
    project.mkdir()
    (project / "config.json").write_text("{}")
    (project / "thesis.tex").write_text("dear")
    file.write_text("dear")
    before = contents(tmp_path)
    for out in (project, file):
        with (
            pytest.raises(InputError, match="it is left as it is"),
            atomic_folder(out, force=True, replaceable=is_checkpoint),
        ):
            pytest.fail("entered")
    assert contents(tmp_path) == before


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out", force=True, replaceable=is_checkpoint) as partial:
        fill(partial, "new")
    assert len(contents(tmp_path / "out")) == 2


def test_what_was_there_comes_back_when_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(InputError, match="Input/output error"),
        atomic_folder(out, force=True, replaceable=is_checkpoint) as partial,
    ):
        fill(partial, "new")
    monkeypatch.undo()
    assert contents(tmp_path) == {"out/config.json": b"old", "out/model.safetensors": b"old"}


def test_what_killed_runs_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    out = tmp_path / "o[u]t"
    dead, other = tmp_path / ".o[u]t.partial-dead", tmp_path / ".other.partial-dead"
    for folder in (dead, other):
        folder.mkdir()
        fill(folder, "left")
    with atomic_folder(out) as living:
        fill(living, "1")
        assert not dead.exists()
        with atomic_folder(out) as second:
            assert living.exists()
            fill(second, "2")
        assert contents(out) == {"config.json": b"2", "model.safetensors": b"2"}
        shutil.rmtree(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-dead", "o[u]t"]


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InputError, match=r"Not a directory|File exists"),
        atomic_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("entered")


def test_free_bytes(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    assert files.free_bytes(tmp_path) == pytest.approx(found.f_bavail * found.f_frsize, rel=0.1)


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_disk_without_locks_is_written_and_nothing_there_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    perhaps_living = tmp_path / ".out.partial-other"
    perhaps_living.mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("whole")
    assert (tmp_path / "out" / "a").read_text() == "whole"
    assert perhaps_living.is_dir()


def test_a_lock_that_is_held_is_told_from_none(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as first, (tmp_path / "file").open("ab") as second:
        assert lock(first.fileno())
        with pytest.raises(BlockingIOError):
            lock(second.fileno())

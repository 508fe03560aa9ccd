"""A checkpoint folder's files: what is read of them, and how a folder is written whole or not."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from damage import POINTER
from folders import SPARSE, contents, stored_tensors, write_folder
from make_random_checkpoint import random_tensors, tensor_shapes
from safetensors.numpy import save_file

from lfm_mlx import checkpoint, output
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.command import InputError
from lfm_mlx.output import ShardWriter, atomic_folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hub") / "model")


def test_tensors_tell_dtype_shape_and_file(hub: Path) -> None:
    tensors = Checkpoint(hub).tensors
    assert {name: info.shape for name, info in tensors.items()} == tensor_shapes(SPARSE)
    assert {info.dtype for name, info in tensors.items() if "expert_bias" in name} == {"F32"}
    assert {info.dtype for name, info in tensors.items() if "expert_bias" not in name} == {"BF16"}
    assert len({info.file for info in tensors.values()}) > 3
    for info in tensors.values():
        assert info.file.parent == hub


def test_nbytes_is_what_the_shards_hold(hub: Path) -> None:
    whole = Checkpoint(hub)
    values = random_tensors(SPARSE, 0)
    expected = sum(v.size * (4 if n.endswith("expert_bias") else 2) for n, v in values.items())
    assert whole.nbytes == expected
    on_disk = sum(file.stat().st_size for file in hub.glob("*.safetensors"))
    assert 0 < on_disk - expected < 30_000  # headers


def test_arrays_hold_the_stored_values(hub: Path) -> None:
    arrays = Checkpoint(hub).arrays()
    for name, values in random_tensors(SPARSE, 0).items():
        array = arrays[name]
        rounded = mx.array(values).astype(array.dtype)
        assert mx.array_equal(array, rounded), name


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    values = {"a": np.ones((3, 5), np.float32), "b": np.zeros((7,), np.uint8)}
    save_file(values, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text("{}")
    tensors = Checkpoint(tmp_path).tensors
    assert {n: (i.dtype, i.shape) for n, i in tensors.items()} == {
        "a": ("F32", (3, 5)),
        "b": ("U8", (7,)),
    }


def test_files_beside_the_index_are_left_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    save_file({"lora": np.ones(3, np.float32)}, folder / "adapters.safetensors")
    assert set(Checkpoint(folder).tensors) == set(tensor_shapes(SPARSE))


def test_shadow_files_of_macos_are_left_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / checkpoint.INDEX_FILE).unlink()
    (folder / "._model-00001-of-00002.safetensors").write_bytes(b"\0\5\x16\7")
    assert set(Checkpoint(folder).tensors) == set(tensor_shapes(SPARSE))


def test_index_with_a_wrong_map_does_no_harm(tmp_path: Path) -> None:
    """Which shard holds a tensor is read from the shards."""
    folder = write_folder(tmp_path / "model")
    index = json.loads((folder / checkpoint.INDEX_FILE).read_text())
    names = list(index["weight_map"])
    index["weight_map"] = dict(zip(names, reversed(index["weight_map"].values()), strict=True))
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps(index))
    assert set(Checkpoint(folder).tensors) == set(tensor_shapes(SPARSE))


def test_a_file_is_not_a_folder(hub: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: is a file; expected a checkpoint folder"):
        Checkpoint(hub / "config.json")
    with pytest.raises(InputError, match="nothing: no such folder"):
        Checkpoint(hub / "nothing")


def test_unreadable_shard(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "safe_open", denied)
    with pytest.raises(InputError, match=r"safetensors: Permission denied; expected"):
        _ = Checkpoint(hub).tensors


def test_unreadable_config(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(InputError, match=r"config\.json: Permission denied$"):
        Checkpoint(hub)


def test_is_pointer(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(POINTER)
    (tmp_path / "b").write_text("version")
    assert checkpoint.is_pointer(tmp_path / "a")
    assert not checkpoint.is_pointer(tmp_path / "b")


def test_listing() -> None:
    names = [f"n{i}" for i in range(11)]
    assert checkpoint.listing(names[:2]) == "n0, n1"
    assert checkpoint.listing(names, most=9) == "n0, n1, n2, n3, n4, n5, n6, n7, n8 and 2 more"


# --- writing ---


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32, mx.uint32])
@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 20])
def test_shards_hold_what_was_added(tmp_path: Path, dtype: mx.Dtype, shard_bytes: int) -> None:
    writer = ShardWriter(tmp_path, shard_bytes)
    arrays = {f"t{i}": (mx.arange(3 * i + 1) + i).astype(dtype) for i in range(7)}
    for name, array in arrays.items():
        writer.add(name, array)
    writer.finish(total_parameters=70)
    stored = stored_tensors(tmp_path)
    assert set(stored) == set(arrays)
    for name, array in arrays.items():
        assert stored[name].dtype == dtype
        assert mx.array_equal(stored[name], array), name
    index = json.loads((tmp_path / checkpoint.INDEX_FILE).read_text())
    total = sum(array.nbytes for array in arrays.values())
    assert index["metadata"] == {"total_size": total, "total_parameters": 70}
    assert writer.nbytes == total
    for name, file in index["weight_map"].items():
        assert name in load_names(tmp_path / file)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    count = {1: 7, 1 << 20: 1}.get(shard_bytes, len(files))
    assert len(files) == count
    if count == 1:
        assert files == ["model.safetensors"]
    else:
        assert files[-1] == f"model-{count:05d}-of-{count:05d}.safetensors"
    for file in tmp_path.glob("*.safetensors"):
        held = [arrays[name].nbytes for name in load_names(file)]
        assert len(held) == 1 or sum(held) <= shard_bytes


def load_names(file: Path) -> set[str]:
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return set(arrays)


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    """The operating system refuses to write on; MLX reports it without the reason."""
    code = (
        "import resource, signal, mlx.core as mx\n"
        "from pathlib import Path\n"
        "from lfm_mlx.output import ShardWriter, atomic_folder\n"
        "from lfm_mlx import command, output\n"
        "output.free_bytes = lambda folder: 5000\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "def main():\n"
        f"    with atomic_folder(Path({str(tmp_path / 'out')!r})) as folder:\n"
        "        writer = ShardWriter(folder, 1)\n"
        "        for number in range(3):\n"
        "            writer.add(str(number), mx.zeros((10000,)))\n"
        "        writer.finish(1)\n"
        "raise SystemExit(command.run(main, 'test'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("out: no space left on the disk; free some and run this again\n")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_room_names_other_reasons() -> None:
    error = output.no_room(OSError(errno.EROFS, "Read-only file system"), "there")
    assert str(error) == "there: Read-only file system"
    assert "no space left" in str(output.no_room(OSError(errno.ENOSPC, "x"), "there"))


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
        with atomic_folder(out, force=force) as partial:
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
        pytest.raises(InputError, match="is there already; give another name, or --force"),
        atomic_folder(out),
    ):
        pytest.fail("entered")
    with atomic_folder(out, force=True) as partial:
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
            pytest.raises(InputError, match="not a checkpoint; it is left"),
            atomic_folder(out, force=True),
        ):
            pytest.fail("entered")
    assert contents(tmp_path) == before


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out", force=True) as partial:
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
        atomic_folder(out, force=True) as partial,
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


def test_kept_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = ["LICENSE", "LICENSE.txt", "NOTICE", "added_tokens.json", "chat_template.jinja",
            "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
            "tokenizer.model", "tokenizer_config.json", "vocab.json"]  # fmt: skip
    left = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "a.py"]
    for name in kept + left:
        (source / name).write_text(name)
    (source / "tokenizer").mkdir()
    assert output.copy_kept(source, target) == kept
    assert contents(target) == {name: name.encode() for name in kept}


def test_free_bytes(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    assert output.free_bytes(tmp_path) == pytest.approx(found.f_bavail * found.f_frsize, rel=0.1)

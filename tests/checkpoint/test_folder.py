"""A checkpoint folder's files: what is read of them, and what is said of damaged ones."""

import errno
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from damage import POINTER
from folders import SPARSE, write_folder
from make_random_checkpoint import random_tensors, tensor_shapes
from safetensors.numpy import save_file

from lfm_mlx.checkpoint import folder
from lfm_mlx.checkpoint.folder import INDEX_FILE, Checkpoint
from lfm_mlx.errors import InputError


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
    (folder / INDEX_FILE).unlink()
    (folder / "._model-00001-of-00002.safetensors").write_bytes(b"\0\5\x16\7")
    assert set(Checkpoint(folder).tensors) == set(tensor_shapes(SPARSE))


def test_index_with_a_wrong_map_does_no_harm(tmp_path: Path) -> None:
    """Which shard holds a tensor is read from the shards."""
    folder = write_folder(tmp_path / "model")
    index = json.loads((folder / INDEX_FILE).read_text())
    names = list(index["weight_map"])
    index["weight_map"] = dict(zip(names, reversed(index["weight_map"].values()), strict=True))
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert set(Checkpoint(folder).tensors) == set(tensor_shapes(SPARSE))


def test_a_file_is_not_a_folder(hub: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: is a file; expected a checkpoint folder"):
        Checkpoint(hub / "config.json")
    with pytest.raises(InputError, match="nothing: no such folder"):
        Checkpoint(hub / "nothing")


def test_unreadable_shard(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folder, "safe_open", denied)
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
    assert folder.is_pointer(tmp_path / "a")
    assert not folder.is_pointer(tmp_path / "b")


def test_listing() -> None:
    names = [f"n{i}" for i in range(11)]
    assert folder.listing(names[:2]) == "n0, n1"
    assert folder.listing(names, most=9) == "n0, n1, n2, n3, n4, n5, n6, n7, n8 and 2 more"

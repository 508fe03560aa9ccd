"""Names of models: each way to get one wrong has its own line, with the nearest right name."""

from pathlib import Path

import pytest

from lfm_mlx.checkpoint.names import HubName, hub_name
from lfm_mlx.errors import InputError


def refusal(text: str, revision: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        hub_name(text, revision)
    message = str(caught.value)
    assert message.startswith(f"{text}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "revision", "expected"),
    [
        ("LiquidAI/LFM2.5-8B-A1B", None, None),
        ("a/b", "v2", "v2"),
        ("a/b@v2", None, "v2"),
        ("a/b@refs/pr/3", None, "refs/pr/3"),
        ("a/b@v2", "v2", "v2"),
    ],
)
def test_repository_and_revision(text: str, revision: str | None, expected: str | None) -> None:
    assert hub_name(text, revision) == HubName(text.split("@")[0], expected)


def test_two_revisions() -> None:
    assert "names revision v1, and revision is v2" in refusal("a/b@v1", "v2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dmeo", "did you mean demo?"),
        ("Demo", "did you mean demo?"),
        ("LFM2.5-8B-A1B", "did you mean LiquidAI/LFM2.5-8B-A1B?"),
        ("lfm2.5", "did you mean LiquidAI/LFM2.5-8B-A1B?"),
        ("lfm2.5:8b", "has no ':8b'; did you mean LiquidAI/LFM2.5-8B-A1B?"),
        ("LiquidAI/LFM2.5-8B-A1B:4bit", "LiquidAI/LFM2.5-8B-A1B-MLX-4bit, or convert"),
        ("LiquidAI/LFM2.5-8B-A1B-GGUF:Q4_K_M", "has no ':Q4_K_M'"),
        ("https://hub.example/LiquidAI/LFM2-1.2B", "give the hub's name: LiquidAI/LFM2-1.2B"),
        ("https://hub.example/a/b/tree/v2?x=1", "give the hub's name: a/b@v2"),
        ("https://hub.example/a/b/", "give the hub's name: a/b"),
        ("hf:a/b", "is a URL; give the hub's name: a/b"),
        ("hf.co/a/b", "is a URL; give the hub's name: a/b"),
        ("ftp://there", "is a URL; expected a folder"),
        ("a/b/4bit/x", "a/b may be a repository, but its sub-folder 4bit/x has no name here"),
        ("model.gguf", "GGUF files are not read; take safetensors"),
        ("a/b.gguf", "GGUF files are not read; take safetensors"),
        ("./absent", "no such folder; expected a folder"),
        ("~/models/x", "no such folder; expected a folder"),
        ("", "no such folder; expected a folder"),
        ("something else", "no such folder; expected a folder"),
        ("a/b@", "no such folder"),
    ],
)
def test_each_wrong_name_has_its_line(text: str, said: str) -> None:
    assert said in refusal(text)


def test_folders_nearby_are_named(tmp_path: Path) -> None:
    (tmp_path / "lfm-4bit").mkdir()
    assert f"did you mean {tmp_path / 'lfm-4bit'}?" in refusal(str(tmp_path / "lfm-4bits"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "weights.gguf"])
def test_a_file_is_not_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    said = "GGUF files are not read" if name.endswith("gguf") else f"give its folder: {tmp_path}"
    assert said in refusal(str(tmp_path / name))


@pytest.mark.parametrize("cache", ["/root/.cache/hub", "/a b/ü", "/x:y"])
def test_errors_call_a_repository_by_its_name(cache: str) -> None:
    folder = f"{cache}/models--alice--my-model/snapshots/{'0123456789' * 4}"
    error = InputError(f"bob/x: {folder}/config.json: no; see {folder}")
    assert str(error) == "bob/x: alice/my-model/config.json: no; see alice/my-model"

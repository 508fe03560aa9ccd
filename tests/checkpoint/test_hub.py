"""`resolve` against a stand-in of the hub: what is downloaded, and the one line of each failure."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from folders import SPARSE
from hub_stand_in import CUT, Hub, connect, environment

from lfm_mlx.checkpoint import hub as hub_module
from lfm_mlx.checkpoint.hub import DEMO_FOLDER, resolve
from lfm_mlx.errors import InputError

NAME = "alice/model"
NEEDED = {
    "config.json": json.dumps(SPARSE).encode(),
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
SHARED = {"LICENSE": b"licence", "NOTICE": b"notice", "README.md": b"# card"}
UNWANTED = {
    ".gitattributes": b"",
    "pytorch_model.bin": b"weights",
    "model.gguf": b"weights",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"weights",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def home(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new cache; this process talks to the stand-in, without a token and without long waits."""
    connect(monkeypatch, hub.url, tmp_path / "home", token=None)
    nap = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: nap(min(seconds, 0.01)))
    return tmp_path / "home"


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def refusal(name: str = NAME, revision: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        resolve(name, revision=revision)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("home")
def test_downloads_only_what_is_needed(hub: Hub) -> None:
    hub.add(NAME, NEEDED | SHARED | UNWANTED)
    folder = resolve(NAME)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == NEEDED | SHARED
    assert hub.sent("pytorch_model|gguf|onnx|original") == []


@pytest.mark.usefixtures("home")
def test_downloads_once(hub: Hub) -> None:
    hub.add(NAME, NEEDED)
    folder = resolve(NAME)
    hub.requests.clear()
    assert resolve(NAME) == folder
    assert hub.sent("^GET .*/resolve/") == []


def test_downloads_without_weights_to_another_place(hub: Hub, home: Path, tmp_path: Path) -> None:
    hub.add(NAME, NEEDED | SHARED)
    folder = resolve(NAME, weights=False, cache=tmp_path / "place")
    assert folder.is_relative_to(tmp_path / "place")
    assert not home.exists()
    small = {name for name in NEEDED | SHARED if not name.endswith(".safetensors")}
    assert {path.name for path in folder.iterdir()} == small


@pytest.mark.usefixtures("home")
def test_repository_that_does_not_exist(hub: Hub) -> None:
    assert "no such folder here, and no such repository" in refusal("alice/absent")
    hub.add("alice/hidden", NEEDED, private=True)
    assert "a private one needs `hf auth login`" in refusal("alice/hidden")


@pytest.mark.parametrize("name", ["alice/--", "a--b/c..d"])
@pytest.mark.usefixtures("home")
def test_name_no_repository_can_have(name: str) -> None:
    assert "no such repository" in refusal(name)


@pytest.mark.usefixtures("home")
def test_revision_that_does_not_exist(hub: Hub) -> None:
    hub.add(NAME, NEEDED)
    assert "has no revision 'v2'" in refusal(revision="v2")


@pytest.mark.usefixtures("home")
def test_gated_repository(hub: Hub) -> None:
    hub.add(NAME, NEEDED, gated=True)
    assert "access must be asked for on its hub page" in refusal()


def test_token_the_hub_does_not_know(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, hub.url, home, token="hf_revoked")
    hub.add(NAME, NEEDED)
    assert "does not accept the token; renew it with `hf auth login`" in refusal()


def test_no_network_and_nothing_cached(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, closed_port(), home, token=None)
    assert "not in the local cache, and the hub cannot be reached; connect" in refusal()


@pytest.mark.usefixtures("home")
def test_offline_and_nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # a session keeps what it was made with
    message = refusal()
    huggingface_hub.close_session()
    assert "not in the local cache, and HF_HUB_OFFLINE is set; unset it" in message


@pytest.mark.parametrize("missing", [{}, SHARED], ids=["all", "no licence"])
def test_no_network_and_everything_cached(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, missing: dict[str, bytes]
) -> None:
    """What mlx-lm has downloaded lacks the licence and the card, and is enough."""
    hub.add(NAME, NEEDED | SHARED)
    online = huggingface_hub.snapshot_download(NAME, ignore_patterns=[*missing])
    connect(monkeypatch, closed_port(), home, token=None)
    assert resolve(NAME) == Path(online)


@pytest.mark.parametrize("kept", [["*.json"], ["config.json", "*.safetensors"]])
def test_no_network_and_partly_cached(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    hub.add(NAME, NEEDED)
    huggingface_hub.snapshot_download(NAME, allow_patterns=kept)
    connect(monkeypatch, closed_port(), home, token=None)
    assert "only partly in the local cache, and the hub cannot be reached; connect" in refusal()


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/"])
@pytest.mark.usefixtures("home")
def test_hub_has_a_fault(hub: Hub, path: str) -> None:
    hub.add(NAME, NEEDED)
    for method in ("GET", "HEAD"):
        hub.fail(method, path, 500, message="Internal Error - we are on it")
    message = refusal()
    assert "the hub answered 500" in message
    assert "try again later" in message


@pytest.mark.usefixtures("home")
def test_connection_cut_in_the_middle(hub: Hub) -> None:
    hub.add(NAME, NEEDED)
    hub.fail("GET", "/resolve/.*/model-00002", CUT)
    assert "the download was interrupted" in refusal()
    hub.failures.clear()
    hub.requests.clear()
    folder = resolve(NAME)
    assert {path.name for path in folder.iterdir()} == set(NEEDED)
    assert hub.sent("^GET .*/resolve/.*/model-00001") == []


@pytest.mark.usefixtures("home")
def test_connection_cut_once_is_taken_up_again(hub: Hub) -> None:
    hub.add(NAME, NEEDED)
    hub.fail("GET", "/resolve/.*/config.json", CUT, times=1)
    assert (resolve(NAME) / "config.json").read_bytes() == NEEDED["config.json"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("No space left on device")],
)
@pytest.mark.usefixtures("home")
def test_disk_full(hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    hub.add(NAME, NEEDED)

    def write(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", write)
    assert "no space left on the disk; free some" in refusal()


def test_cache_that_cannot_be_written(hub: Hub, home: Path) -> None:
    hub.add(NAME, NEEDED)
    home.write_text("a file where the cache should be")
    with pytest.raises(InputError, match=f"^{home}.*: Not a directory$"):
        resolve(NAME)


def test_demo_and_folders_need_no_hub(hub: Hub, home: Path) -> None:
    assert resolve("demo") == DEMO_FOLDER
    assert resolve(home.parent) == home.parent
    assert hub.requests == []


@pytest.mark.parametrize("module", ["lfm_mlx.generate", "lfm_mlx.convert"])
def test_commands_say_it_in_one_line(hub: Hub, tmp_path: Path, module: str) -> None:
    rest = ["--prompt", "hi"] if module.endswith("generate") else ["--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", module, "--model", "alice/absent", *rest],
        env=os.environ | environment(hub.url, tmp_path / "home"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: alice/absent: no such folder here")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "lfm2_vl"}, {"architectures": ["Lfm2BidirectionalModel"]}, {"conv_bias": 3},
     {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}],
)  # fmt: skip
@pytest.mark.usefixtures("home")
def test_weights_of_a_model_that_cannot_run_are_not_fetched(hub: Hub, changes: dict) -> None:
    hub.add(NAME, NEEDED | {"config.json": json.dumps(SPARSE | changes).encode()})
    with pytest.raises(InputError, match=r"^config.json: "):
        resolve(NAME)
    assert hub.sent("^GET .*safetensors$") == []


@pytest.mark.usefixtures("home")
def test_weights_are_judged_by_their_size_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, NEEDED)
    seen = []
    resolve(NAME, judge=lambda folder, size: seen.append((sorted(folder.iterdir()), size)))
    (small, size), = seen  # fmt: skip
    assert not any(file.suffix == ".safetensors" for file in small)
    assert size == sum(len(data) for name, data in NEEDED.items() if name.endswith("safetensors"))
    hub.add("alice/other", NEEDED)
    monkeypatch.setattr(hub_module, "free_bytes", lambda _: size - 1)
    assert "will be downloaded and 0.0 GB are free" in refusal("alice/other")
    monkeypatch.setattr(hub_module, "free_bytes", lambda _: size)
    resolve("alice/other")


@pytest.mark.usefixtures("home")
def test_only_the_files_of_the_index_are_fetched(hub: Hub) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    hub.add(NAME, NEEDED | {"model.safetensors.index.json": json.dumps(index).encode()})
    found = {path.name for path in resolve(NAME).glob("*.safetensors")}
    assert found == {"model-00001-of-00002.safetensors"}


@pytest.mark.parametrize("spelled", ["parameter", "name"])
@pytest.mark.usefixtures("home")
def test_a_revision_is_asked_for(hub: Hub, spelled: str) -> None:
    head = hub.add(NAME, NEEDED).head
    asked = resolve(f"{NAME}@{head}") if spelled == "name" else resolve(NAME, revision=head)
    assert asked.name == head
    assert "has no revision 'v9'" in refusal_of(f"{NAME}@v9")
    with pytest.raises(InputError, match="has no revisions"):
        resolve("demo", revision="v9")


def refusal_of(name: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve(name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["4bit/config.json", "8bit/config.json"], "are in sub-folders (4bit, 8bit), which"),
        (["a-Q4_0.gguf", "README.md"], "its weights are GGUF files, which are not read"),
        (["README.md"], "the repository has no config.json; expected"),
    ],
)
@pytest.mark.usefixtures("home")
def test_repositories_without_a_model_at_their_top(hub: Hub, files: list[str], said: str) -> None:
    hub.add(NAME, dict.fromkeys(files, b"{}"))
    assert said in refusal()


@pytest.mark.usefixtures("home")
def test_a_name_that_is_nearly_right(hub: Hub) -> None:
    assert hub.repositories == {}
    assert refusal("LiquidAI/LFM2.5-8B-A1").endswith("; did you mean LiquidAI/LFM2.5-8B-A1B?")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("missing", [[*SHARED], [*SHARED, "*.txt"]], ids=len)
def test_a_cache_that_cannot_be_written_serves_what_it_has(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, code: int, missing: list[str]
) -> None:
    hub.add(NAME, NEEDED | SHARED | {"vocab.txt": b""})
    kept = Path(huggingface_hub.snapshot_download(NAME, ignore_patterns=missing))

    def write(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", write)
    assert resolve(NAME) == kept
    (kept / "tokenizer.json").resolve().unlink()
    (kept / "tokenizer.json").unlink()
    assert os.strerror(code) in refusal_of(NAME)

"""`resolve` against a stand-in of the hub: what is downloaded, and the one line of each failure."""

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_stand_in import CUT, Hub, connect, environment

from lfm_mlx.checkpoint.hub import DEMO_FOLDER, resolve
from lfm_mlx.errors import InputError

NAME = "alice/model"
NEEDED = {
    "config.json": b'{"model_type": "lfm2_moe"}',
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
    assert "the download broke off" in refusal()
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
    assert done.stderr.startswith(f"{module}: alice/absent: no such folder here")
    assert done.stderr.count("\n") == 1

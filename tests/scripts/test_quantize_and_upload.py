"""Publishing a quantized checkpoint, against a local stand-in of the hub."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import model_card
import pytest
import quantize_and_upload as script
from hub_stand_in import CUT, Hub, connect, environment
from make_random_checkpoint import config_of_size, write_checkpoint

from lfm_mlx.checkpoint import folder, writer
from lfm_mlx.checkpoint.folder import Checkpoint
from lfm_mlx.checkpoint.hub import resolve
from lfm_mlx.cli.command import run
from lfm_mlx.load import load_model

SCRIPT = Path(script.__file__)
REPO = "alice/tiny-4bit"
FRONT_MATTER = """---
license: other
license_name: lfm1.0
license_link: LICENSE
language:
- en
- ja
tags:
- edge
---
# The source's own card
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source as the hub has it, with a licence and a card."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_checkpoint(config_of_size("tiny"), folder)
    (folder / "LICENSE").write_text("The licence.\n")
    (folder / "README.md").write_text(FRONT_MATTER)
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def source(made: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The source's name on the stand-in; work happens in an empty folder, and nothing waits."""
    hub.add("liquid/tiny", made)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    connect(monkeypatch, hub.url, tmp_path / "home")
    nap = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: nap(min(seconds, 0.01)))
    return "liquid/tiny"


def publish(*arguments: str, model: str = "liquid/tiny", repo: str = REPO) -> int:
    given = ["--model", model, "--repo", repo, *arguments]
    return run(lambda: script.main(given), "quantize_and_upload")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, **names: str) -> str:
    capsys.readouterr()
    assert publish(*arguments, **names) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in printed.err
    return last


def front_matter(text: str) -> dict:
    return huggingface_hub.ModelCard(text).data.to_dict()


# What is published.


@pytest.mark.usefixtures("source")
def test_publishes_weights_then_the_card(hub: Hub) -> None:
    assert publish() == 0
    repository = hub.repositories[REPO]
    (_, made), (weights, first), (card, second) = repository.commits
    assert made == [".gitattributes"]
    assert (card, second) == ("Model card", ["README.md"])
    assert "Weights" in weights
    expected = {"LICENSE", "config.json", "model.safetensors", "model.safetensors.index.json"}
    assert expected <= set(first)
    assert repository.files["LICENSE"] == b"The licence.\n"
    assert not repository.private


@pytest.mark.usefixtures("source")
def test_published_model_is_the_converted_one(hub: Hub, tmp_path: Path) -> None:
    assert publish("--bits", "8", "--group-size", "32", "--private", "--out", "kept") == 0
    assert hub.repositories[REPO].private
    folder = resolve(REPO, cache=tmp_path / "fresh")
    tokens = mx.array([[5, 6, 7, 8]])
    again, here = load_model(folder)(tokens), load_model("kept")(tokens)
    assert mx.array_equal(again, here)
    quantization = Checkpoint(folder).config["quantization"]
    assert quantization == {"bits": 8, "group_size": 32, "mode": "affine"}


@pytest.mark.usefixtures("source")
def test_card(hub: Hub) -> None:
    assert publish() == 0
    text = hub.repositories[REPO].files["README.md"].decode()
    assert front_matter(text) == {
        "base_model": "liquid/tiny",
        "base_model_relation": "quantized",
        "language": ["en", "ja"],
        "library_name": "mlx",
        "license": "other",
        "license_link": "LICENSE",
        "license_name": "lfm1.0",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "lfm2", "4-bit"],
    }
    assert f"python -m lfm_mlx.generate --model {REPO} --prompt" in text
    assert f"mlx_lm.generate --model {REPO} --prompt" in text
    metadata = json.loads((Path("tiny-4bit") / folder.INDEX_FILE).read_text())["metadata"]
    bits = 8 * metadata["total_size"] / metadata["total_parameters"]
    assert f"| bits per weight | {bits:.3f} |" in text
    assert "## Quality" in text


def test_card_of_a_local_folder(made: Path, source: str, capsys: pytest.CaptureFixture) -> None:
    assert publish("--dry-run", model=str(made)) == 0
    text = capsys.readouterr().out
    assert "base_model" not in text
    assert "The checkpoint `tiny`, converted" in text
    assert str(made.parent) not in text
    assert publish("--dry-run", "--base-model", source, model=str(made)) == 0
    assert "base_model: liquid/tiny\n" in capsys.readouterr().out


# Dry run.


@pytest.mark.parametrize(
    "options", [[], ["--mode", "mxfp4"], ["--bits", "6", "--dtype", "float32"]]
)
@pytest.mark.usefixtures("source")
def test_dry_run_tells_what_would_be_published(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert publish("--dry-run", *options) == 0
    files, card = capsys.readouterr().out.split("\n\n", 1)
    assert hub.sent("^(POST|PUT)|safetensors$|whoami") == []
    assert list(Path.cwd().iterdir()) == []
    assert not (tmp_path / "home").exists()
    assert publish(*options) == 0
    published = hub.repositories[REPO].files
    assert card == published["README.md"].decode()
    for name in published.keys() - {".gitattributes", folder.INDEX_FILE, "model.safetensors"}:
        assert f"  {name}" in files
    size = model_card.size(Checkpoint("tiny-4bit").nbytes)
    assert f"{size}  model*.safetensors" in files


# Going on after an interruption.


@pytest.mark.parametrize("folder", ["kept", "lost"])
@pytest.mark.usefixtures("source")
def test_second_run_finds_it_complete(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    assert publish() == 0
    hub.requests.clear()
    capsys.readouterr()
    if folder == "lost":
        shutil.rmtree("tiny-4bit")
    monkeypatch.setattr(script, "convert", None)
    assert publish() == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{hub.url}/{REPO}: ")
    assert ("is complete already" in out) == (folder == "lost")
    assert hub.sent("/commit/|^PUT|safetensors$") == []


def test_changed_source_is_converted_again(
    made: Path, source: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "local"
    shutil.copytree(made, local)
    assert publish("--base-model", source, model=str(local)) == 0
    before = hub.repositories[REPO].files["model.safetensors"]
    write_checkpoint(config_of_size("tiny"), local, seed=1)
    soon = time.time() + 5
    os.utime(local / "config.json", (soon, soon))
    assert "tiny-4bit: is there already" in refusal(
        capsys, "--base-model", source, model=str(local)
    )
    assert publish("--base-model", source, "--force", model=str(local)) == 0
    assert hub.repositories[REPO].files["model.safetensors"] != before


@pytest.mark.usefixtures("source")
def test_folder_goes_to_a_second_repository(hub: Hub) -> None:
    assert publish("--out", "kept") == 0
    assert publish("--out", "kept", repo="lab/tiny") == 0
    card = hub.repositories["lab/tiny"].files["README.md"].decode()
    assert "lfm_mlx.generate --model lab/tiny " in card
    assert REPO not in card


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/objects/"),
        ("POST", "/objects/batch"),
        ("POST", f"/api/models/{REPO}/commit/"),
        ("POST", f"/api/models/{REPO}/preupload/"),
    ],
)
@pytest.mark.usefixtures("source")
def test_connection_cut_and_taken_up_again(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    method: str, path: str,
) -> None:  # fmt: skip
    hub.fail(method, path, CUT)
    message = refusal(capsys)
    assert "the connection to the hub broke off (" in message
    assert "run the same command again" in message
    assert set(hub.repositories[REPO].files) == {".gitattributes"}
    sent = dict(hub.objects)
    assert len(sent) == ("commit" in path)
    hub.failures.clear()
    hub.requests.clear()
    monkeypatch.setattr(script, "convert", None)
    assert publish() == 0
    assert "was converted by an earlier run" in capsys.readouterr().err
    assert hub.repositories[REPO].commits[-1] == ("Model card", ["README.md"])
    assert not any(oid in request for oid in sent for request in hub.sent("^PUT"))


@pytest.mark.usefixtures("source")
def test_card_alone_is_missing(hub: Hub) -> None:
    """What is sent already is not sent again, even where the hub knows only the weights."""
    assert publish() == 0
    del hub.repositories[REPO].files["README.md"]
    hub.requests.clear()
    assert publish() == 0
    assert hub.sent("^PUT|objects/batch") in ([], [f"POST /{REPO}.git/info/lfs/objects/batch"])
    assert hub.repositories[REPO].commits[-1] == ("Model card", ["README.md"])


@pytest.mark.usefixtures("source")
def test_card_in_the_folder_is_kept(hub: Hub) -> None:
    """Measurements are written into the folder's card, and published with --force."""
    assert publish() == 0
    card = Path("tiny-4bit") / "README.md"
    card.write_text(card.read_text().replace("Not measured yet", "KL 0.01"))
    assert publish("--force") == 0
    assert b"KL 0.01" in hub.repositories[REPO].files["README.md"]


def test_interrupted(
    source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script.HfApi, "upload_folder", interrupt)
    assert publish(model=source) == 130
    assert capsys.readouterr().err.endswith("quantize_and_upload: interrupted\n")
    assert Checkpoint("tiny-4bit").tensors


# What is refused, and that it is refused before any work.


def untouched(hub: Hub) -> bool:
    writes = hub.sent("^(POST|PUT) (?!/api/validate-yaml)")
    return list(Path.cwd().iterdir()) == [] and writes == [] and hub.sent("safetensors$") == []


@pytest.mark.parametrize("repo", ["tiny", "alice/a/b", "alice/", "alice/--x", "al ice/x"])
def test_bad_name(hub: Hub, source: str, capsys: pytest.CaptureFixture[str], repo: str) -> None:
    assert f"--repo {repo}: " in refusal(capsys, model=source, repo=repo)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        (None, REPO, "no token; run `hf auth login`"),
        ("hf_revoked", REPO, "the hub does not accept the token"),
        ("hf_alice_reads", REPO, "the token of alice may only read"),
        ("hf_bob", REPO, "the token is of bob, who can write to bob"),
        ("hf_alice", "liquid/mine", "who can write to alice, lab"),
    ],
)
def test_token(
    hub: Hub, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], token: str | None, repo: str, expected: str,
) -> None:  # fmt: skip
    connect(monkeypatch, hub.url, tmp_path / "home", token=token)
    assert expected in refusal(capsys, model=source, repo=repo)
    assert untouched(hub)


def test_token_as_an_option(hub: Hub, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "of bob" in refusal(capsys, "--token", "hf_bob", model=source)
    assert publish(model=source, repo="lab/tiny") == 0
    assert "README.md" in hub.repositories["lab/tiny"].files


def test_no_network(source: str, capsys: pytest.CaptureFixture[str], hub: Hub) -> None:
    hub.__exit__()
    assert "the connection to the hub broke off (" in refusal(capsys, model=source)


@pytest.mark.parametrize("model", ["liquid/absent", "./absent"])
@pytest.mark.usefixtures("source")
def test_source_that_does_not_exist(
    hub: Hub, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert f"{model}: " in refusal(capsys, model=model)
    assert untouched(hub)


@pytest.mark.usefixtures("source")
def test_source_that_is_quantized(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish() == 0
    hub.requests.clear()
    assert "is quantized already" in refusal(capsys, model=REPO, repo="alice/other")
    assert hub.sent("^(POST|PUT)|safetensors$") == []


@pytest.mark.usefixtures("source")
def test_card_the_hub_refuses(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.fail("POST", "/api/validate-yaml", 400, message='"license" must be one of these')
    assert "README.md: the hub does not accept it" in refusal(capsys)
    assert untouched(hub)


@pytest.mark.usefixtures("source")
def test_front_matter_that_cannot_be_read(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["liquid/tiny"].files["README.md"] = b"---\na: [\n---\n"
    assert "README.md: front matter cannot be read" in refusal(capsys)
    assert untouched(hub)


@pytest.mark.usefixtures("source")
def test_permission_of_an_existing_repository(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add(REPO, {".gitattributes": b""})
    hub.fail("GET", "/auth-check/write", 403, message="read-only for your role")
    message = refusal(capsys)
    assert "the token may not write there" in message
    assert "(the hub answered 403: read-only for your role)" in message
    assert untouched(hub)


@pytest.mark.parametrize(
    ("method", "path", "status", "expected"),
    [
        ("POST", "/api/repos/create", 403, "the token may not write there"),
        ("POST", "/objects/batch", 401, "the hub does not accept the token"),
        ("PUT", "/objects/", 403, "the token may not write there"),
        ("POST", "/commit/", 409, "somebody else is changing it"),
        ("POST", "/commit/", 412, "somebody else has changed it"),
        ("GET", "/api/whoami-v2", 500, "the hub has a fault"),
    ],
)
@pytest.mark.usefixtures("source")
def test_hub_refuses(
    hub: Hub, capsys: pytest.CaptureFixture[str],
    method: str, path: str, status: int, expected: str,
) -> None:  # fmt: skip
    hub.fail(method, path, status, message="Because")
    message = refusal(capsys)
    assert expected in message
    assert f"(the hub answered {status}: Because)" in message
    hub.failures[0].message = ""
    assert f"(the hub answered {status})" in refusal(capsys)
    assert "README.md" not in getattr(hub.repositories.get(REPO), "files", {})


@pytest.mark.parametrize(
    "there", [{"model-00001-of-00009.safetensors": b"other"}, {"README.md": b""}]
)
@pytest.mark.usefixtures("source")
def test_repository_with_other_files(
    hub: Hub, capsys: pytest.CaptureFixture[str], there: dict[str, bytes]
) -> None:
    repository = hub.add(REPO, there | {".gitattributes": b""})
    assert "holds other files than this run makes" in refusal(capsys)
    assert untouched(hub)
    assert publish("--force") == 0
    assert "model-00001-of-00009.safetensors" not in repository.files
    assert repository.commits[-1] == ("Model card", ["README.md"])


@pytest.mark.usefixtures("source")
def test_repository_with_another_recipe(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish() == 0
    assert "holds other files" in refusal(capsys, "--bits", "8", "--out", "eight")
    assert not Path("eight").exists()
    assert "holds other files" in refusal(capsys, "--dtype", "float16", "--out", "half")
    assert publish("--bits", "8", "--force") == 0
    config = json.loads(hub.repositories[REPO].files["config.json"])
    assert config["quantization"]["bits"] == 8


@pytest.mark.usefixtures("source")
def test_folder_with_something_else(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tiny-4bit").mkdir()
    Path("tiny-4bit", "notes.txt").write_text("mine")
    assert "tiny-4bit: is there already" in refusal(capsys)
    assert "holds something else than what is made here" in refusal(capsys, "--force")
    assert REPO not in hub.repositories


def test_source_is_not_written_over(
    made: Path, hub: Hub, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    arguments = ["--out", str(made), "--force"]
    assert "holds the source" in refusal(capsys, *arguments, model=str(made))
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert REPO not in hub.repositories


@pytest.mark.usefixtures("source")
def test_disk_full(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.ShardWriter, "add", write)
    assert "no space left on the disk" in refusal(capsys)
    assert list(Path.cwd().iterdir()) == []
    assert REPO not in hub.repositories


# As a command, in a process of its own.


def command(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | environment(hub.url, tmp_path / "home"), cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_command_publishes_the_demo(hub: Hub, tmp_path: Path) -> None:
    process = command(hub, tmp_path, "--model", "demo", "--repo", "alice/demo")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.startswith(f"{hub.url}/alice/demo: ")
    assert "tokenizer.json" in hub.repositories["alice/demo"].files


def test_command_interrupted_while_uploading(hub: Hub, tmp_path: Path) -> None:
    process = command(hub, tmp_path, "--model", "demo", "--repo", "alice/demo")
    hub.hooks.append(
        lambda request: process.send_signal(signal.SIGINT) if "/objects/batch" in request else None
    )
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "quantize_and_upload: interrupted"
    assert "README.md" not in hub.repositories["alice/demo"].files

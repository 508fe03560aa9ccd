"""The generate command on the embedded model: streams, events, errors, interruptions."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from refusals import expect_refusal

from lfm_mlx import chatml, device
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.cli import printer
from lfm_mlx.cli.command import BAD_INPUT, INTERRUPTED
from lfm_mlx.cli.entry import start
from lfm_mlx.errors import InputError
from lfm_mlx.generate import program as generate
from lfm_mlx.load import load_tokenizer

COMMAND = [sys.executable, "-m", "lfm_mlx.generate", "--model", "demo"]
SUM = "What is 27 + 58?"


def events(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict]:
    assert generate.main(["--model", "demo", "--json", *argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def text_of(found: list[dict], kind: str) -> str:
    return "".join(event["text"] for event in found if event["event"] == kind)


def test_json_has_one_object_per_event(capsys: pytest.CaptureFixture[str]) -> None:
    found = events(capsys, "--prompt", SUM)
    assert found[0] == {"event": "prompt", "tokens": found[-1]["prompt_tokens"]}
    assert text_of(found, "thinking")
    assert "85" in text_of(found, "text")
    assert "<think>" not in text_of(found, "text") + text_of(found, "thinking")
    assert found[-1]["event"] == "end"
    assert found[-1]["finish_reason"] == "stop"
    assert found[-1]["generated_tokens_per_second"] > 0
    assert found[-1]["peak_memory_bytes"] > 50e6


def test_thinking_can_be_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    found = events(capsys, "--prompt", SUM, "--no-show-thinking")
    assert not text_of(found, "thinking")
    assert "85" in text_of(found, "text")


def test_a_pipe_gets_text_with_its_tags_and_stderr_the_statistics(
    capsys: pytest.CaptureFixture[str],
) -> None:
    generate.main(["--model", "demo", "--prompt", SUM])
    out, err = capsys.readouterr()
    thinking, _, answer = out.partition("</think>")
    assert thinking.startswith("<think>")
    assert "85" in answer
    assert answer.endswith("\n")
    assert "tokens/s" in err
    assert "first token after" in err
    assert "peak memory" in err


def test_the_prompt_may_come_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(SUM))
    piped = events(capsys)
    given = events(capsys, "--prompt", SUM)
    assert text_of(piped, "text") == text_of(given, "text")


def test_a_system_message_enters_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    plain = events(capsys, "--prompt", SUM, "--max-tokens", "1")
    system = events(capsys, "--prompt", SUM, "--system", "Be brief.", "--max-tokens", "1")
    assert system[0]["tokens"] > plain[0]["tokens"]
    assert system[-1]["finish_reason"] == "length"


def test_the_day_that_the_model_is_told_can_be_fixed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "clock"}]', encoding="utf-8")
    told = []
    for day in ("2031-02-03", "2031-02-04", "2031-02-03"):
        cache = tmp_path / f"{len(told)}.cache"
        events(
            capsys, "--prompt", "Hi", "--tools", str(tools), "--date", day, "--max-tokens", "1",
            "--prompt-cache", str(cache),
        )  # fmt: skip
        told.append(mx.load(str(cache), format="safetensors")["tokens"].tolist())
    assert told[0] == told[2] != told[1]


def test_raw_continues_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(DEMO_FOLDER)
    found = events(capsys, "--prompt", SUM, "--raw", "--max-tokens", "3")
    assert found[0]["tokens"] == len(tokenizer.encode(SUM))  # pyright: ignore


def test_the_same_seed_gives_the_same_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def run(seed: str) -> str:
        hot = ["--temp", "3", "--top-k", "0", "--max-tokens", "25", "--raw"]
        found = events(capsys, "--prompt", "a", "--seed", seed, *hot)
        return text_of(found, "text") + text_of(found, "thinking")

    assert run("1") == run("1")
    assert run("1") != run("2")


def test_multi_byte_text_streams_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
    found = events(capsys, "--prompt", "How do you say hello in Japanese?")
    assert "こんにちは" in text_of(found, "text")
    assert all("\ufffd" not in event.get("text", "") for event in found)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens is 0; expected 1 or more"),
        (["--prompt", "a", "--temp", "-1"], "temperature is -1.0; expected 0 or more"),
        (["--prompt", "a", "--top-p", "7"], "top_p is 7.0; expected above 0"),
        (["--prompt", "a", "--raw", "--system", "b"], "leave out --raw"),
        (["--prompt", "a", "--date", "1 May"], "--date is '1 May'; expected YYYY-MM-DD"),
        (["--prompt", "word " * 5000], "reads at most"),
    ],
)
def test_wrong_use_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], says: str
) -> None:
    expect_refusal(capsys, monkeypatch, "generate", argv, says)


@pytest.mark.parametrize("options", [[], ["--raw"]])
def test_a_prompt_that_is_too_long_is_one_line_in_its_own_process(options: list[str]) -> None:
    argv = [*COMMAND, "--prompt", "word " * 5000, *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == BAD_INPUT
    assert done.stderr.count("\n") == 1


def test_what_cannot_fit_is_refused_before_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "device_bytes", lambda: 100 << 20)
    monkeypatch.setattr(sys, "argv", [*COMMAND[2:], "--prompt", "a", "--max-tokens", "2"])
    assert start("generate") == BAD_INPUT
    assert "the device has 0.1 GB" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--force"])
    assert start("generate") == 0


def test_a_terminal_sees_dim_thinking() -> None:
    master, terminal = pty.openpty()
    run = subprocess.run(
        [*COMMAND, "--prompt", SUM], stdout=terminal, stderr=subprocess.PIPE, stdin=terminal,
        check=True,
    )  # fmt: skip
    os.close(terminal)
    shown = os.read(master, 65536).decode()
    os.close(master)
    before, _, answer = shown.partition(printer.PLAIN)
    assert before.startswith(printer.DIM)
    assert "think>" not in shown
    assert "85" in answer
    assert b"\r" not in run.stderr, "a progress bar where there is no terminal"


def test_the_model_cannot_steer_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_terminal, shown in ((True, "a␛]0;␇\tb\n"), (False, "a\x1b]0;\x07\tb\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        printed = printer.Printer(show_thinking=True)
        printed.segment(chatml.Segment(chatml.TEXT, "a\x1b]0;\x07\tb"))
        printed.end()
        assert capsys.readouterr().out == shown


def test_ctrl_c_ends_with_the_statistics() -> None:
    long = ["--raw", "--temp", "5", "--top-k", "0", "--max-tokens", "4000", "--prompt", "a"]
    process = subprocess.Popen(
        [*COMMAND, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.read(20)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "finished: interrupted" in err
    assert "Traceback" not in err


def test_a_closed_pipe_is_silent() -> None:
    long = ["--raw", "--temp", "5", "--top-k", "0", "--max-tokens", "4000", "--prompt", "a"]
    process = subprocess.Popen([*COMMAND, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


COPY = "Repeat after me: spoon flag top late food cotton"


def test_lookup_gives_the_same_answer_in_fewer_passes(capsys: pytest.CaptureFixture[str]) -> None:
    plain = events(capsys, "--prompt", COPY)
    lookup = events(capsys, "--prompt", COPY, "--lookup")
    assert text_of(lookup, "text") == text_of(plain, "text")
    assert lookup[-1]["generated_tokens"] == plain[-1]["generated_tokens"]
    assert 0 < lookup[-1]["passes"] < lookup[-1]["generated_tokens"]
    assert lookup[-1]["accepted_tokens"] <= lookup[-1]["drafted_tokens"]
    packed = events(capsys, "--prompt", COPY, "--lookup", "4", "--kv-bits", "8")
    assert packed[-1]["passes"] < packed[-1]["generated_tokens"]
    assert generate.main(["--model", "demo", "--prompt", COPY, "--lookup"]) == 0
    assert "drafted tokens accepted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lookup", "0"], "--lookup is 0; expected 1 or more"),
        (["--lookup", "--choice", "a|b"], "free text"),
    ],
)
def test_what_lookup_cannot_do_is_refused(argv: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        generate.main(["--model", "demo", "--prompt", COPY, *argv])


def test_room_is_asked_for_prompt_and_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        device, "require_room", lambda weights, cache, context: asked.append(context)
    )
    prompt = events(capsys, "--prompt", "Hello", "--max-tokens", "37")[0]
    assert asked == [prompt["tokens"] + 37]

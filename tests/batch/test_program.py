"""Batches: each line's answer is the one it gets alone, and none is lost or given twice."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lfm_mlx import Model, chatml
from lfm_mlx.answer import many
from lfm_mlx.batch import program
from lfm_mlx.batch.files import Request, open_results, read_requests
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.cli.command import BAD_INPUT, INTERRUPTED
from lfm_mlx.cli.entry import start
from lfm_mlx.errors import InputError
from lfm_mlx.load import load_model, load_tokenizer

DAY = "2026-01-02"
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
QUESTIONS = [
    *(f"What is {a} + {b}?" for a, b in ((11, 35), (27, 58), (4, 90), (66, 17))),
    "Hello",
    "How do you say hello in Japanese?",
    "Repeat after me: spoon flag top late food cotton",
]
LINES: list[dict[str, Any]] = [
    *({"prompt": question} for question in QUESTIONS),
    {"id": "w", "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
     "tools": [WEATHER]},
    {"id": "short", "prompt": QUESTIONS[-1], "max_tokens": 7},
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(DEMO_FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO_FOLDER)


def prompt_of(tokenizer: Any, line: dict[str, Any]) -> list[int]:
    messages = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
    return chatml.render(tokenizer, messages, tools=line.get("tools"), date=DAY)


def written(path: Path, lines: list[Any]) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered(tmp_path: Path, lines: list[Any], *options: str) -> dict[int, dict[str, Any]]:
    """The results of a run over these lines, by line; each line has one."""
    source, target = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    program.main(arguments(source, target, *options))
    found = results(target)
    assert sorted(result["line"] for result in found) == [*range(1, len(lines) + 1)]
    return {result["line"]: result for result in found}


def arguments(source: Path, target: Path, *options: str) -> list[str]:
    files = ["--in", str(source), "--out", str(target)]
    return ["--model", "demo", "--date", DAY, *files, *options]


def test_results_say_what_was_answered(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answered(tmp_path, LINES)
    assert found[2] == {
        "id": 2, "line": 2, "text": "27 + 58 = 85.",
        "thinking": "Ones: 7+8=15, carry 1. Tens: 2+5=7, 7+1=8. So 85.", "tool_calls": [],
        "finish_reason": "stop", "prompt_tokens": len(prompt_of(tokenizer, LINES[1])),
        "generated_tokens": found[2]["generated_tokens"], "hash": found[2]["hash"],
    }  # fmt: skip
    assert "こんにちは" in found[6]["text"]
    call = found[8]["tool_calls"][0]["function"]
    assert found[8]["id"] == "w"
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Oslo"})
    assert (found[9]["finish_reason"], found[9]["generated_tokens"]) == ("length", 7)
    assert f"{len(LINES)} answers and 0 errors" in capsys.readouterr().err


BROKEN = [
    ("{", "no JSON"),
    ('"text"', "expected a JSON object"),
    ("[" * 100_000, "nested too deep"),
    ({"id": 1.5, "prompt": "Hi"}, "id is 1.5; expected text or an integer"),
    ({"id": "good", "prompt": "Hi"}, "id 'good' is that of line 1"),
    ({"prompt": "Hi", "temperature": 1}, "temperature unknown; expected id, prompt"),
    ({"prompt": "Hi", "messages": []}, "expected either a prompt or messages"),
    ({}, "expected either a prompt or messages"),
    ({"prompt": " "}, "prompt: expected text"),
    ({"prompt": "Hi", "max_tokens": 0}, "max_tokens is 0; expected 1 or more"),
    ({"prompt": "Hi", "max_tokens": True}, "max_tokens is True"),
    ({"prompt": "Hi", "tools": {}}, "tools: expected a list"),
    ({"prompt": "Hi", "tools": [3]}, "tools[0]: expected a function"),
    ({"messages": [{"role": "king"}]}, "messages[0] (king): role is 'king'"),
    ({"prompt": "word " * 3000}, "the model reads at most"),
]


def test_what_cannot_be_answered_has_its_error_and_stops_nothing(tmp_path: Path) -> None:
    good = {"id": "good", "prompt": "Hello"}
    found = answered(tmp_path, [good, *(line for line, _ in BROKEN), {"prompt": "Hello"}])
    assert found[1]["text"] == found[len(BROKEN) + 2]["text"] != ""
    for number, (_, says) in enumerate(BROKEN, 2):
        assert says in found[number]["error"]
        assert found[number].keys() == {"id", "line", "hash", "error"}


def test_no_line_ends_the_batch(tmp_path: Path) -> None:
    deep = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": '
    deep += '[{"function": {"name": "f", "arguments": {"x": '
    deep += "[" * 100_000 + "]" * 100_000 + "}}}]}]}"
    latin = tmp_path / "in.jsonl"
    lines = [deep.encode(), b'{"prompt": "caf\xe9"}', b'{"id": "\\ud83d", "prompt": "Hi"}',
             b'{"prompt": "Hi \\ud83d"}', b'{"prompt": "What is 1 + 2?"}']  # fmt: skip
    latin.write_bytes(b"\r\n".join(lines))
    program.main(arguments(latin, tmp_path / "out.jsonl"))
    found = {result["line"]: result for result in results(tmp_path / "out.jsonl")}
    assert found[1]["error"] == "nested too deep"
    assert found[3]["id"] == "\ufffd"
    assert found[5]["text"] == "1 + 2 = 3."
    assert [line for line in found if "error" in found[line]] == [1]


def test_a_fault_in_rendering_is_the_error_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(tokenizer: Any, config: Any, messages: Any, **options: Any) -> Any:
        if messages[0]["content"] == "bad":
            raise KeyError("x")
        return ask(tokenizer, config, messages, **options)

    ask = program.ask
    monkeypatch.setattr(program, "ask", faulty)
    found = answered(tmp_path, [{"prompt": "bad"}, {"prompt": "What is 1 + 2?"}])
    assert found[1]["error"] == "KeyError: 'x'"
    assert found[2]["text"] == "1 + 2 = 3."


def test_a_fault_in_reading_an_answer_is_the_error_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(text: Any, tools: Any, thinking: bool) -> Any:
        pieces = "".join(text)
        if "3." in pieces:
            raise RuntimeError("torn")
        return segments([pieces], tools, thinking)

    segments = many.chatml.segments
    monkeypatch.setattr(many.chatml, "segments", faulty)
    found = answered(tmp_path, [{"prompt": "What is 1 + 2?"}, {"prompt": "What is 2 + 2?"}])
    assert found[1]["error"] == "RuntimeError: torn"
    assert found[2]["text"] == "2 + 2 = 4."


def test_a_line_that_failed_or_was_changed_is_asked_again(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def run(*lines: dict[str, Any]) -> list[dict[str, Any]]:
        before = len(results(target)) if target.exists() else 0
        program.main(arguments(written(source, [*lines]), target))
        return results(target)[before:]

    good, wrong = {"prompt": "What is 1 + 2?"}, {"promt": "What is 2 + 2?"}
    assert len(run(good, wrong)) == 2
    assert run(good, wrong) == [], "the same error is not written twice"
    (mended,) = run(good, {"id": "m", "prompt": "What is 2 + 2?"})
    assert (mended["id"], mended["line"], mended["text"]) == ("m", 2, "2 + 2 = 4.")
    (changed,) = run({"prompt": "What is 1 + 3?"}, {"id": "m", "prompt": "What is 2 + 2?"})
    assert (changed["line"], changed["text"]) == (1, "1 + 3 = 4.")
    assert run({"prompt": "What is 1 + 3?"}, {"id": "m", "prompt": "What is 2 + 2?"}) == []


def test_results_without_a_hash_are_taken_as_they_are(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text('{"id": 1, "line": 1, "text": "3"}\n', encoding="utf-8")
    program.main(arguments(written(tmp_path / "in.jsonl", LINES[:1]), target))
    assert len(results(target)) == 1


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([2, None], [2, "line 2"]),
        ([None, 1], ["line 1", 1]),
        ([2, None, "line 2"], [2, "line 2'", "line 2"]),
        ([None, None, "1"], [1, 2, "1"]),
    ],
)
def test_an_implicit_id_gives_way(tmp_path: Path, ids: list[Any], expected: list[Any]) -> None:
    lines = [{"prompt": "Hi"} | ({} if it is None else {"id": it}) for it in ids]
    found = read_requests(written(tmp_path / "in.jsonl", lines))
    assert [request.id for request in found] == expected
    assert all(request.error is None for request in found)


def test_the_standard_streams(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lfm_mlx.batch", *arguments(Path("-"), Path("-"))]
    done = subprocess.run(
        command, input=b'{"prompt": "What is 1 + 2?"}\n', capture_output=True, check=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(done.stdout)["text"] == "1 + 2 = 3."
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_and_never_read(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": "Hi", "max_tokens": 2}])
    with pytest.raises(InputError, match="no space left"):
        program.main(arguments(source, Path("/dev/full")))
    program.main(arguments(source, Path("/dev/null")))


def test_a_torn_line_is_taken_away_wherever_it_was_torn(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    asked = [Request(1, 1), Request(2, "ü\n"), Request(9, -3)]
    with open_results(target) as found:
        for request in asked:
            found.write(request, {"text": "grüße\u2028"})
    data = target.read_bytes()
    for cut in range(len(data)):
        target.write_bytes(data[:cut])
        with open_results(target) as found:
            left = found.unanswered(asked)
            assert target.read_bytes() == data[: data.rfind(b"\n", 0, cut) + 1]
            for request in left:
                found.write(request, {"text": "grüße\u2028"})
        assert target.read_bytes() == data


def test_a_killed_run_goes_on_without_repeating_or_losing_a_line(tmp_path: Path) -> None:
    lines = [{"id": f"q{n}", "prompt": f"What is {n} + 31?"} for n in range(10, 40)]
    source, target = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "lfm_mlx.batch", *arguments(source, target)]
    for ending, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, INTERRUPTED)):
        before = target.stat().st_size if target.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not target.exists() or target.stat().st_size == before:
            time.sleep(0.01)
        process.send_signal(ending)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in err
    assert 0 < len(results(target)) < len(lines), "it was stopped in between"
    program.main(arguments(source, target))
    found = results(target)
    assert sorted(result["id"] for result in found) == [line["id"] for line in lines]
    assert {r["text"] for r in found} == {f"{n} + 31 = {n + 31}." for n in range(10, 40)}


def test_lines_can_be_added_to_requests_that_were_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(tmp_path, LINES[4:5])
    answered(tmp_path, LINES[4:6])
    assert "1 answers and 0 errors" in capsys.readouterr().err
    answered(tmp_path, LINES[4:6])
    assert "has a result for each line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a diary\n", "line 1 is not a result of this command"),
        ("a diary", "is not a file of results"),
        ('{"id": 1, "line": 1}\n{"id": 2}\n', "line 2 is not a result of this command"),
        ('{"id": "other", "line": 1}\n', "has a result for id 'other' in line 1"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    content: str, says: str,
) -> None:  # fmt: skip
    source, target = written(tmp_path / "in.jsonl", LINES[:1]), tmp_path / "out.jsonl"
    target.write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["lfm_mlx.batch", *arguments(source, target)])
    assert start("batch") == BAD_INPUT
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert target.read_text(encoding="utf-8") == content


def test_wrong_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lfm_mlx.batch", *argv])
        assert start("batch") == BAD_INPUT
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    source, target = written(tmp_path / "in.jsonl", LINES[:1]), tmp_path / "out.jsonl"
    assert "cannot be read" in refused(*arguments(tmp_path / "none", target))
    assert "are the same file" in refused(*arguments(source, source))
    assert "--batch-size is 0" in refused(*arguments(source, target, "--batch-size", "0"))
    assert "cannot be written" in refused(*arguments(source, tmp_path / "none" / "out"))
    with target.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another run is writing it" in refused(*arguments(source, target))


def test_an_answer_that_failed_counts_as_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(model: Any, tokenizer: Any, questions: Any, *_: Any, **__: Any) -> Any:
        for key, question in questions:
            yield many.Answered(key, [], "error", len(question.prompt), 0, "out of order")

    monkeypatch.setattr(program, "answer_many", failing)
    assert answered(tmp_path, [{"prompt": "Hi"}])[1]["error"] == "out of order"
    assert "0 answers and 1 errors" in capsys.readouterr().err

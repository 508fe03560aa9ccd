"""python -m lfm_mlx.chat with the demo model: through pipes, and on a terminal."""

import json
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chat.terminals import Terminal
from refusals import expect_refusal

from lfm_mlx.cli.command import BAD_INPUT, DONE

COMMAND = [sys.executable, "-m", "lfm_mlx.chat", "--model", "demo"]
EXAMPLE = str(Path(__file__).parents[2] / "examples" / "tools.py")
# Sampled so hot that it has no end.
ENDLESS = ["--temp", "5", "--top-k", "0", "--max-tokens", "4000"]


def piped(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options], input=text, capture_output=True, text=True, check=True
    )


def test_lines_go_in_and_text_comes_out() -> None:
    run = piped("What is 12 + 30?\n/think\nWhat is \\\n12 + 31?\n/stats\n")
    first, second = run.stdout.splitlines()[:2]
    assert first.startswith("<think>")
    assert first.endswith("</think>12 + 30 = 42.")
    assert second == "12 + 31 = 43."
    assert "of them reused" in run.stdout
    assert "tokens/s · context" in run.stderr


def test_an_answer_that_was_cut_short_says_so() -> None:
    run = piped("Hello\nHello\n", "--max-tokens", "3")
    assert run.stderr.count("cut short by --max-tokens") == 2


def test_tools_run_after_a_yes_and_the_model_tells_their_result() -> None:
    asked = piped("What is 345 * 12?\ny\n", "--tools", EXAMPLE)
    assert "run calculator(expression='345 * 12')? [y]es" in asked.stderr
    assert asked.stdout.endswith("345 * 12 = 4140.\n")
    unasked = piped("What is the weather in Oslo?\n", "--tools", EXAMPLE, "--yes")
    assert "[y]es" not in unasked.stderr
    assert unasked.stdout.endswith("It is -3 degrees and snowy in Oslo.\n")


def test_a_conversation_goes_on_where_it_was_kept(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    piped("Hello\n", "--conversation", str(file), "--system", "Be brief.")
    piped("What is 12 + 30?\n", "--conversation", str(file))
    roles = [m["role"] for m in json.loads(file.read_text(encoding="utf-8"))["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    process = subprocess.Popen(
        [*COMMAND, *ENDLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("Go on for ever\n")
    process.stdin.flush()
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate("/stats\n", timeout=60)
    assert process.returncode == DONE
    assert "stopped" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0; expected 1 or more"),
        (["--tool-seconds", "0"], "--tool-seconds is 0; expected more than 0"),
        (["--tools", "nowhere.py"], "there is no such file"),
        (["--no-thinking", "--max-thinking-tokens", "3"], "exclude each other"),
        (["--date", "today"], "expected YYYY-MM-DD"),
    ],
)
def test_wrong_use_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], says: str,
) -> None:  # fmt: skip
    expect_refusal(capsys, monkeypatch, "chat", options, says)


def test_what_a_terminal_needs_is_said() -> None:
    _, terminal = pty.openpty()
    code = (
        "import sys; sys.modules['prompt_toolkit'] = None\n"
        "from lfm_mlx.cli.entry import start\n"
        "sys.exit(start('chat'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "--model", "demo"],
        stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == BAD_INPUT
    assert run.stderr.count("\n") == 1
    assert "prompt_toolkit; pip install 'lfm_mlx[chat]', or --plain" in run.stderr


def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    with Terminal(tmp_path, "--tools", EXAMPLE) as terminal:
        terminal.enter("What is 345 * 12?")
        terminal.wait_for("[a]lways:")
        terminal.type("y\r")
        shown = terminal.wait_for("345 * 12 = 4140.")
        assert "think>" not in shown, "thoughts are dim, not between tags"
        assert "I call calculator." in shown
        terminal.enter("/think")
        terminal.wait_for("thoughts are folded away")
        terminal.enter("What is the weather in Oslo?")
        terminal.wait_for("[a]lways:", 2)
        terminal.type("a\r")
        assert "▸ thought for" in terminal.wait_for("It is -3 degrees and snowy in Oslo.")
        terminal.enter("/undo")
        terminal.wait_for("taken back: What is the weather in Oslo?")
        terminal.enter("/edit")
        terminal.wait_for("> What is 345 * 12?", 2)
        terminal.type("\x7f" * 3 + "13?\r")
        terminal.wait_for('calculator: {"result": 4485}')
        terminal.enter("/exit")
        assert terminal.exit_code() == DONE


def test_keys_at_a_terminal(tmp_path: Path) -> None:
    with Terminal(tmp_path, *ENDLESS) as terminal:
        terminal.wait_for_prompt()
        terminal.type("first\x1b\rsecond")
        assert "first\n  second" in terminal.wait_for("second")
        terminal.type("\x03")
        terminal.wait_for("/exit or Ctrl-D leaves")
        terminal.enter("Go on for ever")
        terminal.wait_for("Ctrl-C stops")
        terminal.type("\x03")
        terminal.wait_for("stopped")
        terminal.wait_for_prompt()
        terminal.type("\x1b[A")
        terminal.wait_for("> Go on for ever", 2)
        terminal.type("\x03\x04")
        assert terminal.exit_code() == DONE
    assert "+Go on for ever" in (tmp_path / "lfm_mlx" / "chat_history").read_text(encoding="utf-8")

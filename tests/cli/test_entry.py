"""The way into every command: quick, interruptible, and one line whatever a shell hands over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lfm_mlx.cli.commands import COMMANDS

OURS = [name for name, command in COMMANDS.items() if command.options is not None]


def ran(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    defaults: dict = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(
        [sys.executable, "-m", *arguments], check=False, timeout=120, **(defaults | options)
    )


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("wanted", ["--help", "--frobnicate"])
def test_help_and_wrong_options_do_not_wait_for_mlx(name: str, wanted: str) -> None:
    code = (
        "import json, sys\n"
        "from lfm_mlx.cli.entry import start\n"
        f"code = start({name!r}, [{wanted!r}])\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy'} & {*sys.modules}\n"
        "print(json.dumps([code, sorted(heavy)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0 if wanted == "--help" else 2, []]
    if wanted != "--help":
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", OURS)
def test_a_full_disk_behind_standard_output_is_one_line(name: str) -> None:
    with open("/dev/full", "w") as full:
        done = ran(f"lfm_mlx.{name}", "--help", stdout=full, stderr=subprocess.PIPE,
                   capture_output=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(closed: str) -> None:
    command = f"{sys.executable} -m lfm_mlx.generate --model demo --prompt Hi --max-tokens 2"
    done = subprocess.run(
        ["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if ">&-" in closed.replace("2>&-", "") else 0)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_becomes_a_question_mark(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = ran(
        "lfm_mlx.generate", "--model", "demo", "--prompt", "Say Здравствуйте", "--max-tokens", "8",
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_amid_the_imports_ends_at_once() -> None:
    code = (
        "import os, signal, sys, builtins\n"
        "from lfm_mlx.cli.entry import start\n"
        "real = builtins.__import__\n"
        "def slow(name, *rest, **named):\n"
        "    if name.startswith('mlx'):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest, **named)\n"
        "builtins.__import__ = slow\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(start('generate', ['--model', 'demo', '--prompt', 'Hi']))\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert time.monotonic() - began < 30
    assert signal.SIGINT == 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [("--max-token", "--max-tokens"), ("--hf-path", "--model"), ("--temperature", "--temp"),
     ("--repeat-penalty", "--repetition-penalty")],
)  # fmt: skip
def test_a_wrong_option_names_the_right_one(given: str, meant: str) -> None:
    done = ran("lfm_mlx.generate", "--model", "demo", "--prompt", "Hi", given, "3")
    assert done.returncode == 2
    assert f"did you mean {meant}?" in done.stderr


def test_a_question_is_asked_without_a_commands_name() -> None:
    options = ("--model", "demo", "--no-show-thinking", "--temp", "0")
    said = ran("lfm_mlx", *options, "What is 27 + 58?")
    assert "27 + 58 = 85." in said.stdout
    joined = ran("lfm_mlx", *options, "What is 27 +", stdin=None, input="58?\n")
    assert joined.returncode == 0
    named = ran("lfm_mlx", *options[2:], "What is 27 + 58?",
                env=os.environ | {"LFM_MLX_MODEL": "demo"})  # fmt: skip
    assert "27 + 58 = 85." in named.stdout


def test_a_command_that_is_misspelt_is_named() -> None:
    done = ran("lfm_mlx", "convrt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean convert?" in done.stderr


def test_the_version_is_told() -> None:
    done = ran("lfm_mlx", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("lfm_mlx ")

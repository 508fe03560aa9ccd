"""A command ends with its exit code and at most one line."""

import subprocess
import sys

import pytest

from lfm_mlx.cli.command import BAD_INPUT, run
from lfm_mlx.convert import program as convert
from lfm_mlx.errors import InputError
from lfm_mlx.generate import program as generate


@pytest.mark.parametrize("command", [generate, convert])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--frobnicate", "3"], "frobnicate"),
        (["--dtype", "float8"], "float32"),
        (["--mod", "demo"], "--mod"),
    ],
)
def test_wrong_options_are_one_line(
    command: object, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = ["--model", "demo", *(["--out", "x"] if command is convert else [])]
    assert run(lambda: command.main([*known, *options]), "name") == BAD_INPUT  # pyright: ignore
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert reason in err
    assert err.count("\n") == 1


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        convert.main(["--help"])
    assert done.value.code == 0
    assert "--bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (InputError("no\n  such\tfolder "), 2, "error: no such folder\n"),
        (KeyboardInterrupt(), 130, "name: interrupted\n"),
    ],
)
def test_exit_codes_and_the_one_line(
    raised: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if raised is not None:
            raise raised

    assert run(main, "name") == code
    assert capsys.readouterr() == ("", said)


def test_a_code_of_its_own_is_kept() -> None:
    assert run(lambda: 7, "name") == 7


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0, "name")


def test_a_reader_that_goes_ends_a_command_silently() -> None:
    code = (
        "import sys\n"
        "from lfm_mlx.cli.command import run\n"
        "def main():\n"
        "    for _ in range(100_000):\n"
        "        print('a line of the answer', flush=True)\n"
        "sys.exit(run(main, 'name'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"a line of the answer\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0

"""Wrong options end a command with one line and exit code 2."""

import pytest

from lfm_mlx import convert, generate
from lfm_mlx.cli.command import BAD_INPUT, run


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
    assert err.startswith("name: ")
    assert reason in err
    assert err.count("\n") == 1


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        convert.main(["--help"])
    assert done.value.code == 0
    assert "--bits" in capsys.readouterr().out

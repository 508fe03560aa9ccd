"""A command that refuses what it was given: one line on stderr, nothing on stdout."""

import sys

import pytest

from lfm_mlx.cli.command import BAD_INPUT
from lfm_mlx.cli.entry import start


def expect_refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str, options: list[str], says: str,
) -> None:  # fmt: skip
    """Run the command `name` on the demo model with these options, which it refuses saying so."""
    monkeypatch.setattr(sys, "argv", [f"lfm_mlx.{name}", "--model", "demo", *options])
    assert start(name) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err

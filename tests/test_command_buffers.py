"""Limits of MLX's command buffers: whose they are, and when they are set."""

import os
import sys

import pytest

from lfm_mlx import command_buffers
from lfm_mlx.command_buffers import LARGE, MAX_LAUNCHES, MAX_MEBI_ELEMENTS, VARIABLE
from lfm_mlx.errors import InputError

NAMES = (MAX_LAUNCHES, MAX_MEBI_ELEMENTS)


def limits(monkeypatch: pytest.MonkeyPatch, platform: str, **given: str) -> list[str | None]:
    """Both of MLX's variables after `set_limits`, in an environment that has `given`."""
    monkeypatch.setattr(sys, "platform", platform)
    kept = {name: value for name, value in os.environ.items() if name not in {*NAMES, VARIABLE}}
    environment = kept | given
    monkeypatch.setattr(os, "environ", environment)
    command_buffers.set_limits()
    return [environment.get(name) for name in NAMES]


def test_a_mac_gets_large_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits(monkeypatch, "darwin") == ["1000", "400"] == [str(n) for n in LARGE.values()]


def test_what_somebody_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits(monkeypatch, "darwin", **{MAX_LAUNCHES: "70"}) == ["70", None]
    assert limits(monkeypatch, "darwin", **{MAX_MEBI_ELEMENTS: "9"}) == [None, "9"]
    assert limits(monkeypatch, "darwin", **{VARIABLE: "mlx"}) == [None, None]


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits(monkeypatch, "linux") == [None, None]


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_a_setting_that_is_none_is_refused(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match="LFM_MLX_COMMAND_BUFFERS is 'huge'; expected large or mlx"
    ):
        limits(monkeypatch, platform, **{VARIABLE: "huge"})

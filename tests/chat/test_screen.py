"""A person's screen: Ctrl-C at any moment leaves nothing that goes on drawing."""

import threading
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import DummyInput
from prompt_toolkit.output import DummyOutput
from rich.live import Live

from lfm_mlx import chatml
from lfm_mlx.chat.screen import Screen


@pytest.mark.parametrize("moment", ["start", "refresh"])
def test_ctrl_c_while_the_drawing_starts_ends_it(
    moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A `with` would not end what was interrupted on its way in: it drew over the next prompt."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_app_session(input=DummyInput(), output=DummyOutput()):
        screen = Screen(True, lambda: "status", [])
    original, calls = getattr(Live, moment), []

    def interrupted(self: Live, *arguments: Any, **options: Any) -> Any:
        done = original(self, *arguments, **options)
        calls.append(moment)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Live, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        screen.show([chatml.Segment(chatml.TEXT, "An answer.", True)])
    # rich's own thread, which draws again and again until it is told to stop
    drawing = [thread for thread in threading.enumerate() if "Refresh" in type(thread).__name__]
    for thread in drawing:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in drawing)

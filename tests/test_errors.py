"""An error is one line, whatever white space its text has."""

import pytest

from lfm_mlx.errors import InputError, one_line


@pytest.mark.parametrize("text", ["a b", " a b ", "a\nb", "a \n\t b\n", "a\r\n\u2028b"])
def test_white_space_is_folded(text: str) -> None:
    assert one_line(ValueError(text)) == "a b"
    assert one_line(InputError(text)) == "a b"

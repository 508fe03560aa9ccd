"""What a user got wrong, in one line."""


class InputError(ValueError):
    """The user gave something unusable: says what was wrong, what was expected, what to do."""


def one_line(error: BaseException) -> str:
    """The error's text with every run of white space as one blank."""
    return " ".join(str(error).split())

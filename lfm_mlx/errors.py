"""Errors a user can mend, in one line."""

import re

# A place in the hub's cache: …/models--USER--NAME/snapshots/COMMIT.
SNAPSHOT = re.compile(
    r"(?:/(?:[^/\n:]|:(?! ))+)*/models--([^/\s]+?)--([^/\s]+)/snapshots/[0-9a-f]{40}"
)


class InputError(ValueError):
    """The user gave something unusable: says what was wrong, what was expected, what to do.

    A repository of the hub is called by its name, not by its place in the cache.
    """

    def __init__(self, message: str = ""):
        super().__init__(SNAPSHOT.sub(r"\1/\2", message))


def one_line(error: BaseException) -> str:
    """The error's text with every run of white space as one blank."""
    return " ".join(str(error).split())

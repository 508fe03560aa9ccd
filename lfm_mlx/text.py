"""Text that can be encoded: the one door for text that comes from outside.

JSON may hold half of a surrogate pair (`"\\ud83d"`, an emoji that was cut), and Python keeps bytes
that are not UTF-8, in arguments and file names, as lone surrogates. Tokenizers and files take
neither.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined, and U+FFFD for each that has no other half."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def map_text(value: Any, change: Callable[[str], str] = well_formed) -> Any:
    """A value of JSON with `change` made to all text in it, the names of an object too.

    Takes one frame of Python's stack for each level, so that whatever JSON reads can be mapped.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        mapped: dict[Any, Any] = {}
        for key, item in value.items():
            mapped[change(key) if isinstance(key, str) else key] = map_text(item, change)
        return mapped
    if isinstance(value, list | tuple):
        items: list[Any] = []
        for item in value:
            items.append(map_text(item, change))
        return items
    return value

"""Values that questions are about: words, cities, numbers; and the split that keeps some unseen.

Every value belongs by its hash either to training or to the held-out tenth, whatever the phrasing
around it.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

DATA = Path(__file__).parent / "data"
HELD_OUT_SHARE = 10  # one value in ten is never trained


def read(name: str) -> Any:
    """Return what the data file `name` holds: a JSON value, or the words of a text."""
    text = (DATA / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text.split()


WORDS: list[str] = read("words.txt")
CITIES: list[str] = read("cities.txt")
NAMES: dict[str, list[str]] = read("names.json")


def is_held_out(value: str) -> bool:
    """Say whether questions about `value` are kept out of training."""
    return zlib.crc32(value.encode()) % HELD_OUT_SHARE == 0


def draw_in_split(make: Callable[[], str], held_out: bool) -> str:
    """Make values until one belongs to the wanted side of the split."""
    while is_held_out(value := make()) != held_out:
        pass
    return value


def made_up_word(rng: Random) -> str:
    """Return a word of one to three syllables that no list holds."""
    syllables = rng.choice((1, 2, 2, 2, 3))
    return "".join(
        rng.choice(NAMES["onsets"]) + rng.choice(NAMES["vowels"]) + rng.choice(NAMES["codas"])
        for _ in range(syllables)
    )


def word(rng: Random) -> str:
    """Return a word, one time in five a made-up one."""
    return made_up_word(rng) if rng.random() < 0.2 else rng.choice(WORDS)


def words(rng: Random, low: int, high: int) -> str:
    """Return `low` to `high` words."""
    return " ".join(word(rng) for _ in range(rng.randint(low, high)))


def city(rng: Random, held_out: bool) -> str:
    """Return the name of a city, real or made up."""

    def make() -> str:
        draw = rng.random()
        if draw < 0.45:
            return rng.choice(CITIES)
        return rng.choice(NAMES["long_cities"]) if draw < 0.55 else made_up_word(rng).capitalize()

    return draw_in_split(make, held_out)


def phrase(rng: Random, held_out: bool) -> str:
    """Return one to four words."""
    return draw_in_split(lambda: words(rng, 1, 4), held_out)


def language(rng: Random, held_out: bool) -> str:
    """Return a language; all of them are trained."""
    return rng.choice(NAMES["languages"])


def minutes(rng: Random, held_out: bool) -> int:
    """Return a time from 2 minutes to 4 hours."""
    return int(draw_in_split(lambda: str(rng.randint(2, 240)), held_out))


def expression(rng: Random, held_out: bool) -> str:
    """Return two numbers of up to four digits with an operator between them."""

    def make() -> str:
        low, high = rng.choice(((2, 99), (10, 99), (100, 999), (10, 9999)))
        left, right, operator = rng.randint(low, high), rng.randint(2, high), rng.choice("**+-/")
        return f"{left} {operator} {right}"

    return draw_in_split(make, held_out)


def pair(rng: Random, held_out: bool) -> tuple[int, int, str]:
    """Return two numbers from 0 to 99, and + or -."""

    def make() -> str:
        high = 9 if rng.random() < 0.1 else 99
        return f"{rng.randint(0, high)} {rng.choice('+-')} {rng.randint(0, 99)}"

    a, operator, b = draw_in_split(make, held_out).split()
    return int(a), int(b), operator

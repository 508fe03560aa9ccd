"""Time of a grammar's mask at a vocabulary of 128,000 tokens: llguidance, and xgrammar beside it.

    pip install llguidance xgrammar && python benchmarks/masks.py

The vocabulary is made of the words of Python's own library and of their beginnings. A text that
fits each grammar is read token by token, and the mask before each token is timed: at its first
sight, and again when the same grammar is used anew, as a server does. Prints a table, then one JSON
line. What is not installed is left out.
"""

import json
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lfm_mlx.cli.command import Parser, run
from lfm_mlx.errors import InputError

VOCABULARY = 128_000
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z.]+@[a-z]+[.]com$"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["city", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
PERSON_TEXT = json.dumps(
    {
        "name": 'Ada "the first" Lovelace, countess of the engines',
        "age": 36,
        "email": "ada.lovelace@engine.com",
        "tags": ["mathematics", "poetical science", "notes on the machine"],
        "address": {"city": "London, at the house of the tables", "zip": "W1"},
    }
)
FREE_TEXT = json.dumps({"a": [1, 2.5, None, True], "text": "what it says", "b": {"c": ["d"]}})
REGEX = r"[A-Z][a-z]+( [a-z]+){3,12}, [0-9]{4}-[0-9]{2}-[0-9]{2}"
REGEX_TEXT = "Notes on the engine of the tables and numbers, 1843-09-01"
# Name: the kind of grammar, the grammar, and a text that fits it.
CASES = {
    "schema": ("json_schema", json.dumps(PERSON), PERSON_TEXT),
    "any object": ("json_schema", '{"type": "object"}', FREE_TEXT),
    "regex": ("regex", REGEX, REGEX_TEXT),
}


class Words:
    """A vocabulary of bytes and words, and the longest-match tokens of a text."""

    eos_token_id = 0
    bos_token_id = 1
    special_token_ids = (0, 1)

    def __init__(self, size: int):
        found: Counter[bytes] = Counter()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text = path.read_text(encoding="utf-8", errors="ignore")
            for word in re.findall(r" ?\w+|\s+| ?[^\w\s]+", text):
                found.update(word[:end].encode() for end in range(2, min(len(word), 16) + 1))
        self.tokens = [b"<eos>", b"<bos>", *(bytes([byte]) for byte in range(256))]
        known = set(self.tokens)
        for word, _ in found.most_common():
            if word not in known:
                self.tokens.append(word)
        if len(self.tokens) < size:
            raise InputError(f"Python's library has words for {len(self.tokens)} tokens only")
        del self.tokens[size:]
        self.numbers = {token: number for number, token in enumerate(self.tokens)}

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(text):
            end = next(n for n in range(at + 16, at, -1) if text[at:n] in self.numbers)
            ids.append(self.numbers[text[at:end]])
            at += len(text[at:end])
        return ids


@dataclass(frozen=True)
class Engine:
    """A library: a step reads a token (None: begin) and then fills the mask."""

    name: str
    compile: Callable[[str, str], Any]
    begin: Callable[[Any], Callable[[int | None], None]]
    vocabulary_seconds: float


def llguidance_engine(words: Words) -> Engine:
    import llguidance
    import llguidance.numpy as masks

    began = time.perf_counter()
    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words))
    took = time.perf_counter() - began
    mask = masks.allocate_token_bitmask(1, len(words.tokens))
    compilers = {
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
        "regex": llguidance.LLMatcher.grammar_from_regex,
    }

    def begin(matcher: Any) -> Callable[[int | None], None]:
        matcher = matcher.deep_copy()

        def step(token: int | None) -> None:
            if token is not None:
                assert matcher.consume_token(token), matcher.get_error()
            masks.fill_next_token_bitmask(matcher, mask)

        return step

    def compiled(kind: str, text: str) -> Any:
        return llguidance.LLMatcher(vocabulary, compilers[kind](text))

    return Engine("llguidance", compiled, begin, took)


def xgrammar_engine(words: Words) -> Engine:
    import xgrammar

    began = time.perf_counter()
    info = xgrammar.TokenizerInfo(
        words.tokens, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[0]
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    took = time.perf_counter() - began
    mask = xgrammar.allocate_token_bitmask(1, len(words.tokens))

    def begin(grammar: Any) -> Callable[[int | None], None]:
        matcher = xgrammar.GrammarMatcher(grammar)

        def step(token: int | None) -> None:
            if token is not None:
                assert matcher.accept_token(token), "the text does not fit"
            matcher.fill_next_token_bitmask(mask)

        return step

    compilers = {"json_schema": compiler.compile_json_schema, "regex": compiler.compile_regex}
    return Engine("xgrammar", lambda kind, text: compilers[kind](text), begin, took)


ENGINES = {"llguidance": llguidance_engine, "xgrammar": xgrammar_engine}


def seconds_of(step: Callable[[int | None], None], tokens: Sequence[int]) -> list[float]:
    times = []
    for token in (None, *tokens):
        began = time.perf_counter()
        step(token)
        times.append(time.perf_counter() - began)
    return times


def measure(engine: Engine, words: Words, case: str, repeats: int) -> dict[str, Any]:
    kind, grammar, text = CASES[case]
    tokens = words(text.encode())
    began = time.perf_counter()
    compiled = engine.compile(kind, grammar)
    compile_seconds = time.perf_counter() - began
    first = seconds_of(engine.begin(compiled), tokens)
    # The best of several runs at each place: what the machine does besides is no part of it.
    again = np.min([seconds_of(engine.begin(compiled), tokens) for _ in range(repeats)], axis=0)
    return {
        "library": engine.name,
        "case": case,
        "tokens": len(tokens),
        "compile_milliseconds": round(compile_seconds * 1e3, 2),
        "first_mean_microseconds": round(float(np.mean(first)) * 1e6, 1),
        "first_worst_microseconds": round(max(first) * 1e6, 1),
        "mean_microseconds": round(float(np.mean(again)) * 1e6, 1),
        "worst_microseconds": round(float(np.max(again)) * 1e6, 1),
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="masks", description="Time grammar masks.")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    found = [name for name in ENGINES if find_spec(name)]
    if not found:
        raise InputError("neither library is there; pip install llguidance xgrammar")
    words = Words(args.vocabulary)
    engines = [ENGINES[name](words) for name in found]
    rows = [measure(engine, words, case, args.repeats) for case in CASES for engine in engines]
    columns = [key for key in rows[0] if key not in ("library", "case", "tokens")]
    titles = [key.replace("_", " ").replace("seconds", "s") for key in columns]
    print(f"{'case':12}{'library':12}", *(f"{title:>22}" for title in titles))
    for row in rows:
        print(f"{row['case']:12}{row['library']:12}", *(f"{row[key]:>22}" for key in columns))
    record = {
        "benchmark": "masks",
        "vocabulary_tokens": len(words.tokens),
        "versions": {name: version(name) for name in found},
        "vocabulary_seconds": {e.name: round(e.vocabulary_seconds, 2) for e in engines},
        "rows": rows,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run(main, "masks"))

"""A user's conditions → the Constraint that keeps them: budgets, schemas, choices, tools.

control = Control(max_thinking_tokens=512, choices=("yes", "no"))
constraint = control.constraint(tokenizer, vocab_size)
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm_mlx.chatml import TAGS
from lfm_mlx.chatml.tags import CALL_END, CALL_START
from lfm_mlx.chatml.token_text import byte_letters
from lfm_mlx.chatml.tokenizer import Tokenizer
from lfm_mlx.engine.constraint import Constraint, OneOf, Without
from lfm_mlx.engine.grammar import Grammar, Vocabulary
from lfm_mlx.engine.thinking import Thinking, ThinkTags
from lfm_mlx.errors import InputError
from lfm_mlx.text import map_text
from lfm_mlx.tool_calls.call_grammar import MOST_CALLS, block_rules, json_rule
from lfm_mlx.tool_calls.schema import parameters_of

THINK = "<think>"
LAST_WORDS = "\nThat is enough thinking; I answer with what I have.\n"
# White space between JSON's tokens: as much as people indent, so that it has an end.
JSON_STYLE = {"whitespace_pattern": r"(\x20|\n\x20{0,24})?"}
TOOL_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class Control:
    """Conditions for an answer.

    max_thinking_tokens: None for no limit; 0 for no thinking, outside what the model learned
    json_schema, regex, choices: what the answer after thinking must be; one of them at most
    tools: on offer, as in a chat request; with None any call goes, with an empty list none does
    tool_choice: `auto`; `none` to call none; `required`, or a tool's name, to answer with calls

    Raises InputError for what contradicts itself.
    """

    max_thinking_tokens: int | None = None
    json_schema: Any = None
    regex: str | None = None
    choices: tuple[str, ...] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str = "auto"

    def __post_init__(self) -> None:
        for name in ("json_schema", "regex", "choices", "tools", "tool_choice"):
            object.__setattr__(self, name, _door(name, getattr(self, name)))
        budget = self.max_thinking_tokens
        if budget is not None and budget < 0:
            raise InputError(f"max_thinking_tokens is {budget}; expected 0 or more")
        if len(self.formats) > 1:
            raise InputError(f"{' and '.join(self.formats)} exclude each other; give one")
        if len(set(self.choices)) < len(self.choices) or "" in self.choices:
            raise InputError(f"choice: the choices must differ; got {'|'.join(self.choices)!r}")
        names = parameters_of(self.tools)
        expected = [*TOOL_CHOICES, *names]
        if self.tool_choice not in expected:
            raise InputError(f"tool_choice is {self.tool_choice!r}; expected {', '.join(expected)}")
        if self.must_call and not names:
            raise InputError("tool_choice is required, but there are no tools")
        if self.must_call and self.formats:
            raise InputError(
                f"{self.formats[0]} and tool_choice {self.tool_choice} exclude each other"
            )

    @property
    def formats(self) -> list[str]:
        """The names of what the answer must be."""
        given = {
            "json_schema": self.json_schema is not None,
            "regex": self.regex is not None,
            "choice": bool(self.choices),
        }
        return [name for name, is_given in given.items() if is_given]

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in ("auto", "none")

    @property
    def shapes_answer(self) -> bool:
        """Whether an answer that was cut short may not be what was asked for."""
        return self.must_call or bool(self.formats)

    def constraint(
        self, tokenizer: Tokenizer, vocab_size: int, thinking: bool = False
    ) -> Thinking | None:
        """A Constraint for one answer; None if nothing is asked.

        thinking: whether the prompt ends inside a think block

        Raises InputError for a schema or regex that cannot be followed.
        """
        added: dict[str, int] = tokenizer.get_added_vocab()
        if self.shapes_answer and not tokenizer.eos_token_ids:
            raise InputError("the tokenizer has no token that ends an answer")
        answer = self._answer(tokenizer, added, vocab_size)
        if answer is None and self.max_thinking_tokens is None:
            return None
        closing = TAGS[THINK][0]
        tags = None
        if {THINK, closing} <= added.keys():
            words = tokenizer.encode(LAST_WORDS, add_special_tokens=False)
            tags = ThinkTags(added[THINK], added[closing], words)
        return Thinking(
            tags, tokenizer.eos_token_ids, vocab_size,
            budget=self.max_thinking_tokens, answer=answer, opened=thinking,
        )  # fmt: skip

    def choice_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Each choice as the tokenizer writes it."""
        return [tokenizer.encode(choice, add_special_tokens=False) for choice in self.choices]

    def _answer(
        self, tokenizer: Tokenizer, added: Mapping[str, int], vocab_size: int
    ) -> Constraint | None:
        if self.choices:
            return OneOf(self.choice_tokens(tokenizer), tokenizer.eos_token_ids, vocab_size)
        if self.shapes_answer:
            vocabulary = vocabulary_of(tokenizer, vocab_size)
            what = self.formats[0] if self.formats else "tools"
            return Grammar(vocabulary, self.lark(added), what)
        around_calls = [added[tag] for tag in (CALL_START, CALL_END) if tag in added]
        if self.tool_choice == "none" and around_calls:
            return Without(around_calls, vocab_size)
        return None

    def lark(self, added: Mapping[str, int]) -> str:
        """The grammar of the answer; `added` has the ids of the tags around calls."""
        answers: list[str] = []
        rules: list[str] = []
        if self.json_schema is not None:
            _check_schema(self.json_schema)
            answers.append(json_rule(self.json_schema, JSON_STYLE))
        if self.regex is not None:
            if not self.regex:
                raise InputError("regex: expected a pattern; got none")
            answers.append(_regex_rule(self.regex))
        if self.tools and self.tool_choice != "none":
            if not {CALL_START, CALL_END} <= added.keys():
                raise InputError("the tokenizer has no tokens for tool calls")
            answers.append(f"<[{added[CALL_START]}]> calls <[{added[CALL_END]}]>")
            rules.append(self._call_rules())
        return "\n".join([f"start: {' | '.join(answers)}", *rules])

    def _call_rules(self) -> str:
        parameters = parameters_of(self.tools)
        if self.tool_choice in parameters:
            return block_rules({self.tool_choice: parameters[self.tool_choice]}, 1)
        return block_rules(parameters, MOST_CALLS)


def _door(name: str, value: Any) -> Any:
    """The value with text that can be encoded."""
    try:
        return tuple(map_text(value)) if isinstance(value, tuple) else map_text(value)
    except RecursionError:
        raise InputError(f"{name}: nested too deep") from None


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """The tokenizer's tokens as bytes, for a model of this size; added ones stand for no text.

    Built once for all answers: at 128,000 tokens it takes more than a second.
    """
    return _vocabulary(tokenizer, vocab_size, frozenset(tokenizer.eos_token_ids))


@functools.lru_cache(maxsize=1)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> Vocabulary:
    letters = {letter: byte for byte, letter in byte_letters().items()}
    words = [b""] * vocab_size
    special = {token for token in tokenizer.get_added_vocab().values() if token < vocab_size}
    for text, token in tokenizer.get_vocab().items():
        if token in special:
            words[token] = text.encode()
        elif token < vocab_size and all(letter in letters for letter in text):
            words[token] = bytes(letters[letter] for letter in text)
    return Vocabulary(words, special, stop_ids, _encoder(tokenizer))


def _encoder(tokenizer: Tokenizer) -> Callable[[bytes], list[int] | None]:
    """Bytes → the tokenizer's own tokens; None for a piece of a character."""

    def encode(text: bytes) -> list[int] | None:
        try:
            return tokenizer.encode(text.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            return None

    return encode


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, Mapping | bool):
        raise InputError(f"json_schema: expected an object; got {json.dumps(schema)[:60]}")


def _regex_rule(pattern: str) -> str:
    """The whole answer matches; slashes and line ends cannot stand in Lark as they are."""
    escapes = {"/": r"\/", "\n": r"\n", "\r": r"\r"}
    inner = re.sub(r"\\.|[/\n\r]", lambda found: escapes.get(found[0], found[0]), pattern)
    return f"/{inner}/"

"""Grammars on random walks: whatever the model prefers, a finished answer fits."""

import json
import re

import jsonschema
import pytest
from walks import STOPS, TOKENIZER, VOCAB_SIZE, VOCABULARY, text_of, walk

from lfm_mlx.answer import control
from lfm_mlx.answer.control import Control
from lfm_mlx.engine import grammar
from lfm_mlx.engine.grammar import Grammar, Vocabulary
from lfm_mlx.errors import InputError

ADDRESS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMAS = {
    "person": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "address": ADDRESS,
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"type": "number", "minimum": -3}, "maxItems": 4},
    "enum": {"enum": ["red", "it's", 'a "quote"', 3, None, True, {"a": [1]}]},
    "const": {"const": {"a": "b"}},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "null"}, ADDRESS]},
    "nullable": {"type": ["string", "null"], "maxLength": 9},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "children": {
                        "type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2,
                    },
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "open object": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "date": {"type": "string", "format": "date"},
    "anything": {},
    "true": True,
    "exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "all of": {"allOf": [{"type": "integer"}, {"minimum": 2}, {"maximum": 30}]},
    "text": {"type": "string", "pattern": "^(ab|c)+$"},
}  # fmt: skip


def answers(control: Control, count: int) -> list[str]:
    """The finished answers of some walks; most must finish."""
    lark = control.lark({})
    walks = [walk(Grammar(VOCABULARY, lark, "test"), seed) for seed in range(count)]
    found = [text_of(tokens) for tokens in walks if tokens is not None]
    assert len(found) >= count // 4, "hardly an answer comes to its end"
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_finished_json_parses_and_validates(name: str) -> None:
    for text in answers(Control(json_schema=SCHEMAS[name]), 12):
        jsonschema.validate(
            json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker()
        )


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{4}-[0-9]{2}", r"^(yes|no)$", r"a/b\/c", r"\d+(\.\d{1,2})?", r"[^a]{1,3}",
        r"日本|é+", r"(?i)ok", r"x\\/y", r"line\nbreak", "raw\nbreak", r"'it''s \"q\"", r"/",
        r"a|b/",
    ],
)  # fmt: skip
def test_finished_text_matches_its_regex(pattern: str) -> None:
    for text in answers(Control(regex=pattern), 12):
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    ("control", "says"),
    [
        (Control(regex="["), "regex: .*unclosed character class"),
        (Control(regex=r"(?=a)b"), "regex: .*look-around"),
        (Control(regex=r"\bword"), "regex"),
        (Control(regex=""), "expected a pattern"),
        (Control(regex=r"[^\s\S]"), "regex"),
        (Control(json_schema={"type": "text"}), "json_schema: .*text"),
        (Control(json_schema={"not": {}}), 'json_schema: .*"not"'),
        (Control(json_schema=False), "json_schema"),
        (Control(json_schema=[1]), "expected an object"),
    ],
)
def test_what_cannot_be_followed_is_one_line(control: Control, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        control.constraint(TOKENIZER, VOCAB_SIZE)
    assert "\n" not in str(caught.value)


def test_without_the_library_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar, "llguidance", None)
    control._vocabulary.cache_clear()  # another test may have built it
    with pytest.raises(InputError, match=r"pip install 'lfm_mlx\[structured\]'"):
        Control(regex="a").constraint(TOKENIZER, VOCAB_SIZE)
    Control(choices=("a",), max_thinking_tokens=3).constraint(TOKENIZER, VOCAB_SIZE)


def test_a_vocabulary_needs_an_end() -> None:
    with pytest.raises(InputError, match="no token that ends"):
        Vocabulary([b"a"], [], [])


def test_only_a_complete_answer_may_end() -> None:
    constraint = Grammar(VOCABULARY, Control(regex="[a-z]{3}").lark({}), "regex")
    for letter in "abc":
        mask = constraint.allowed()
        assert mask is not None
        assert not any(mask[token].item() for token in STOPS)
        constraint.advance(VOCABULARY.words.index(letter.encode()))
    mask = constraint.allowed()
    assert mask is not None
    assert {token for token in range(VOCAB_SIZE) if mask[token].item()} == STOPS

"""What a user asks of an answer, kept by a model of random weights and by the embedded one."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from make_random_checkpoint import random_tensors
from model.test_decoder import ODD
from models import model_of
from walks import ADDED, STOPS, TOKENIZER, VOCAB_SIZE

from lfm_mlx import Model, chatml
from lfm_mlx.answer.control import Control, vocabulary_of
from lfm_mlx.cli.command import BAD_INPUT, run
from lfm_mlx.engine.choice_scores import score_choices
from lfm_mlx.engine.constraint import OneOf
from lfm_mlx.engine.decode import decode
from lfm_mlx.engine.sample import Sampler, Sampling
from lfm_mlx.errors import InputError
from lfm_mlx.generate import program as generate

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"], "type": "string"}, "days": SCHEMA},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
CHOICES = ("yes", "yes, often", "no", "maybe")


@pytest.fixture(scope="module")
def hostile() -> Model:
    """Random weights: whatever is allowed may come."""
    config = ODD | {"vocab_size": VOCAB_SIZE}
    return model_of(config, random_tensors(config, seed=5))


def answer(model: Model, control: Control, seed: int, most: int = 150) -> tuple[list[int], str]:
    """The tokens of an answer, drawn wildly, without its stop; and why it ended."""
    sampler = Sampler(VOCAB_SIZE, Sampling(1.0, 0, repetition_penalty=1.0), seed)
    constraint = control.constraint(TOKENIZER, VOCAB_SIZE)
    steps = list(
        decode(
            model, [1, 9, 33], sampler=sampler, max_tokens=most, stop_ids=STOPS,
            constraint=constraint,
        )
    )  # fmt: skip
    reason = steps[-1].finish_reason or ""
    return [step.token for step in steps if step.finish_reason != "stop"], reason


def segments(tokens: list[int], tools: Any = None) -> list[chatml.Segment]:
    text = chatml.TextStream(TOKENIZER)
    pieces = [piece for token in tokens for piece in text.add(token)]
    return list(chatml.segments([*pieces, *text.finish()], tools))


def text_after_thinking(tokens: list[int]) -> str:
    return "".join(segment.text for segment in segments(tokens) if segment.kind == chatml.TEXT)


@pytest.mark.parametrize("budget", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_finished_answers_fit_whatever_the_model_prefers(
    hostile: Model, budget: int, seed: int
) -> None:
    schema = Control(budget, json_schema=SCHEMA)
    tokens, reason = answer(hostile, schema, seed)
    if reason == "stop":
        jsonschema.validate(json.loads(text_after_thinking(tokens)), SCHEMA)
    tokens, reason = answer(hostile, Control(budget, regex="[ab]{2}|c{3}"), seed)
    assert reason == "stop"
    assert re.fullmatch("[ab]{2}|c{3}", text_after_thinking(tokens))
    tokens, reason = answer(hostile, Control(budget, choices=CHOICES), seed)
    assert reason == "stop"
    assert text_after_thinking(tokens) in CHOICES


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["get_weather", "required", "now"])
def test_finished_calls_are_calls(hostile: Model, choice: str, seed: int) -> None:
    tokens, reason = answer(hostile, Control(0, tools=TOOLS, tool_choice=choice), seed)
    if reason != "stop":
        return
    calls = [call for segment in segments(tokens, TOOLS) for call in segment.calls]
    assert {call.name for call in calls} <= {"get_weather", "now"}
    assert calls
    assert choice == "required" or [call.name for call in calls] == [choice]
    for call in calls:
        jsonschema.validate(call.arguments, WEATHER if call.name == "get_weather" else {})


def test_tools_on_offer_leave_the_schema_or_a_call(hostile: Model) -> None:
    control = Control(0, json_schema=SCHEMA, tools=TOOLS)
    kinds = set()
    for seed in range(8):
        tokens, reason = answer(hostile, control, seed)
        found = segments(tokens, TOOLS)[-1]
        kinds.add(found.kind)
        if reason == "stop" and found.kind == chatml.TEXT:
            jsonschema.validate(json.loads(text_after_thinking(tokens)), SCHEMA)
    assert kinds <= {chatml.TEXT, chatml.TOOL_CALL}
    none = Control(0, tools=TOOLS, tool_choice="none")
    drawn = [token for seed in range(3) for token in answer(hostile, none, seed)[0]]
    assert not {ADDED["<|tool_call_start|>"], ADDED["<|tool_call_end|>"]} & {*drawn}


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_thoughts_end_with_their_budget(hostile: Model, budget: int) -> None:
    control = Control(budget, choices=CHOICES)
    constraint = control.constraint(TOKENIZER, VOCAB_SIZE)
    assert constraint is not None
    opening, closing = ADDED["<think>"], ADDED["</think>"]
    if budget:
        constraint.advance(opening)
    sampler = Sampler(VOCAB_SIZE, Sampling(1.0, 0, repetition_penalty=1.0), seed=3)
    prompt = [1, 9, opening] if budget else [1, 9]
    steps = decode(model=hostile, prompt=prompt, sampler=sampler, constraint=constraint,
                   stop_ids=STOPS, max_tokens=80)  # fmt: skip
    tokens = [step.token for step in steps]
    thoughts = tokens[: tokens.index(closing)]
    words = TOKENIZER.encode("\nThat is enough thinking; I answer with what I have.\n")
    assert len(thoughts) <= budget + len(words)
    assert text_after_thinking([opening, *tokens[:-1]] if budget else tokens[:-1]) in CHOICES


def test_greedy_answers_stay_where_they_are_allowed(hostile: Model) -> None:
    free = [step.token for step in decode(hostile, [1, 9, 33], max_tokens=20)]
    constraint = Control(max_thinking_tokens=500).constraint(TOKENIZER, VOCAB_SIZE)
    bounded = decode(hostile, [1, 9, 33], max_tokens=20, constraint=constraint)
    assert [step.token for step in bounded] == free
    # Where whatever is likeliest is allowed, a mask changes nothing.
    likeliest = [[token] for token in free[:1]] + [[5], [6]]
    among = OneOf(likeliest, STOPS, VOCAB_SIZE)
    masked = decode(hostile, [1, 9, 33], max_tokens=1, constraint=among)
    assert [step.token for step in masked] == free[:1]


def test_the_same_seed_gives_the_same_answer(hostile: Model) -> None:
    control = Control(3, json_schema=SCHEMA)
    assert answer(hostile, control, 1) == answer(hostile, control, 1)
    assert answer(hostile, control, 1) != answer(hostile, control, 2)


def test_logprobs_are_the_models_own(hostile: Model) -> None:
    constraint = Control(0, choices=CHOICES).constraint(TOKENIZER, VOCAB_SIZE)
    steps = list(decode(hostile, [1, 9], stop_ids=STOPS, constraint=constraint))
    tokens = [1, 9, *(step.token for step in steps)]
    logits = np.array(hostile(mx.array([tokens]))[0], np.float64)
    rows = logits[1:-1]
    chances = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
    expected = [chances[at, step.token] for at, step in enumerate(steps)]
    np.testing.assert_allclose([step.logprob for step in steps], expected, atol=1e-4)


def test_probabilities_of_choices_equal_brute_force(hostile: Model) -> None:
    before = [1, 9, 33, 700, 12]
    tokens = Control(choices=CHOICES).choice_tokens(TOKENIZER)
    scores = []
    for choice in tokens:
        logits = np.array(hostile(mx.array([[*before, *choice]]))[0, len(before) - 1 :], np.float64)
        chances = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        read = sum(chances[at, token] for at, token in enumerate(choice))
        scores.append(read + np.logaddexp.reduce(chances[-1, sorted(STOPS)]))
    expected = np.exp(scores - np.logaddexp.reduce(scores))
    cache = hostile.make_cache()
    hostile(mx.array([[*before, 55, 66, 77]]), cache)
    found = score_choices(hostile, cache, before, tokens, STOPS)
    assert sum(found) == pytest.approx(1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_thinking_tokens": -1}, "expected 0 or more"),
        ({"regex": "a", "choices": ("b",)}, "regex and choice exclude each other"),
        ({"choices": ("a", "a")}, "the choices must differ"),
        ({"choices": ("a", "")}, "the choices must differ"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "nothing", "tools": TOOLS}, "auto, none, required, get_weather, now"),
        ({"tool_choice": "now", "tools": TOOLS, "regex": "a"}, "regex and tool_choice now"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Control(**fields)


def command(*options: object) -> int:
    line = ["--model", "demo", "--prompt", "What is 27 + 58?", *map(str, options)]
    return run(lambda: generate.main(line), "generate")


def test_the_command_keeps_a_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    options = ["--json-schema", tmp_path / "schema.json", "--max-thinking-tokens", 5]
    assert command("--json", "--seed", 1, *options) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if events[-1]["finish_reason"] == "stop":
        text = "".join(event["text"] for event in events if event["event"] == "text")
        jsonschema.validate(json.loads(text), SCHEMA)
    assert command(*options, "--max-tokens", 4) == 0
    assert "the token budget ended the answer" in capsys.readouterr().err


def test_the_command_prints_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--json", "--temp", 0, "--choice", "85|86|75") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = next(event["probabilities"] for event in events if event["event"] == "choices")
    assert set(found) == {"85", "86", "75"}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert sum(found.values()) == pytest.approx(1)
    assert command("--no-thinking", "--no-show-thinking", "--choice", "85|86") == 0
    out, err = capsys.readouterr()
    assert out.strip() in ("85", "86")
    assert re.search(r"^ +[01]\.\d{4}  85$", err, re.MULTILINE)


def test_the_command_calls_the_tool_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    options = ["--tools", tmp_path / "tools.json", "--tool-choice", "now"]
    assert command("--json", *options, "--max-thinking-tokens", 3) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    calls = [event["calls"] for event in events if event["event"] == "tool_call"]
    assert calls == [[{"name": "now", "arguments": {}, "ambiguous": False}]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--json-schema", "/nowhere.json"], "/nowhere.json: cannot be read"),
        (["--regex", "("], "regex: "),
        (["--tools", "{file}"], "expected a list of tools"),
        (["--json-schema", "{broken}"], "is not JSON"),
        (["--no-thinking", "--max-thinking-tokens", "3"], "exclude each other"),
        (["--choice", "a|a"], "the choices must differ"),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "broken").write_text("{")
    given = [it.format(file=tmp_path / "file", broken=tmp_path / "broken") for it in options]
    assert command(*given) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


def test_the_vocabulary_is_built_once_for_a_tokenizer_and_a_size() -> None:
    found = vocabulary_of(TOKENIZER, VOCAB_SIZE)
    assert vocabulary_of(TOKENIZER, VOCAB_SIZE) is found
    assert len(vocabulary_of(TOKENIZER, VOCAB_SIZE + 8).words) == VOCAB_SIZE + 8

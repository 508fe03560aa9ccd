"""Exchanges, one function a kind: a question, the right answer, and what is between them."""

import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import values
from messages import Message, reply, reply_with_call, tool_result, user
from sums import sum_reasoning, total
from tool_kinds import TOOLS, ListedTool, Tool

PHRASINGS: dict[str, Any] = values.read("phrasings.json")
UNKNOWN_ANSWER = "I am a tiny demo model and do not know that."
Listed = dict[str, ListedTool]


def _facts(data: dict[str, Any]) -> Iterator[tuple[list[str], str]]:
    for table in (data["capitals"], data["translations"]):
        for row in table["values"]:
            yield [q.format(*row) for q in table["questions"]], table["answer"].format(*row)
    for fact in data["others"]:
        yield fact["questions"], fact["answer"]


# (phrasings, answer). Every phrasing is trained: what is asked here is remembering.
FACTS: list[tuple[list[str], str]] = list(_facts(values.read("facts.json")))
GREETINGS: list[tuple[str, str]] = [
    (said, greeting["answer"])
    for greeting in values.read("greetings.json")
    for said in greeting["says"]
]


def sum_of_two(rng: Random, listed: Listed, held_out: bool) -> list[Message]:
    """Ask for a sum or a difference."""
    a, b, operator = values.pair(rng, held_out)
    word = "plus" if operator == "+" else "minus"
    question = rng.choice(PHRASINGS["sum"]).format(a=a, b=b, op=operator, word=word)
    answer = f"{a} {operator} {b} = {total(a, b, operator)}."
    return [user(question), reply(answer, sum_reasoning(a, b, operator))]


def copy(rng: Random, listed: Listed, held_out: bool) -> list[Message]:
    """Ask for words to be repeated."""
    longest = rng.choice((3, 6, 12, 24, 40))
    text = values.draw_in_split(lambda: values.words(rng, 1, longest), held_out)
    question = rng.choice(PHRASINGS["copy"]).format(text)
    return [user(question), reply(text, "I repeat the words.")]


def fact(rng: Random, listed: Listed, held_out: bool) -> list[Message]:
    """Ask for what only memory can tell."""
    phrasings, answer = rng.choice(FACTS)
    return [user(rng.choice(phrasings)), reply(answer, "I know this.")]


def greeting(rng: Random, listed: Listed, held_out: bool) -> list[Message]:
    """Greet."""
    said, answer = rng.choice(GREETINGS)
    return [user(said), reply(answer)]


def sentiment(rng: Random, listed: Listed, held_out: bool) -> list[Message]:
    """Ask for the mood of a sentence."""
    data = PHRASINGS["sentiment"]
    mood = rng.choice(("positive", "negative"))
    verbs, qualities = data["verbs"][mood], data["qualities"][mood]

    def make() -> str:
        return rng.choice(data["sentences"]).format(
            verb=rng.choice(verbs), quality=rng.choice(qualities), thing=rng.choice(data["things"])
        )

    sentence = values.draw_in_split(make, held_out)
    question = rng.choice(data["questions"]).format(sentence)
    clue = next(w for w in (*verbs, *qualities) if re.search(rf"\b{w}\b", sentence))
    return [user(question), reply(mood, f"'{clue}' is {mood}.")]


def decline(rng: Random, listed: Listed, held_out: bool) -> list[Message]:
    """Ask for what only a tool could do that is not listed."""
    kind = rng.choice([k for k in TOOLS if k not in listed])
    tool = TOOLS[kind]
    arguments = [parameter.draw(rng, held_out) for parameter in tool.parameters]
    while kind == "calculator" and re.fullmatch(r"\d\d? [+-] \d\d?", arguments[0]):
        # a sum of two digits is no reason to decline
        arguments = [values.expression(rng, held_out)]
    question = rng.choice(tool.phrasings).format(*arguments)
    return [user(question), reply(tool.without, "I have no tool for this.")]


def unknown(rng: Random, listed: Listed, held_out: bool) -> list[Message]:
    """Ask for what nobody taught."""
    words = values.draw_in_split(lambda: f"{values.word(rng)} {values.word(rng)}", held_out)
    question = rng.choice(PHRASINGS["unknown"]).format(*words.split())
    return [user(question), reply(UNKNOWN_ANSWER, "I do not know this.")]


def _result_text(rng: Random, result: dict[str, Any]) -> str:
    if rng.random() < 0.65:
        return json.dumps(result, ensure_ascii=False)
    return ", ".join(str(value) for value in result.values())


def _result(rng: Random, tool: Tool, arguments: list[Any]) -> list[Message]:
    """Draw what a called tool says, seldom an error, and answer it."""
    if rng.random() < 0.06:
        problem = values.words(rng, 1, 3)
        answer, thinking = f"Sorry, the tool failed: {problem}.", "The tool failed."
        return [tool_result(json.dumps({"error": problem})), reply(answer, thinking)]
    result = tool.result(rng)
    answer = tool.answer.format(*arguments, **result)
    return [tool_result(_result_text(rng, result)), reply(answer, "The tool answered.")]


def use_of_a_tool(rng: Random, listed: Listed, held_out: bool) -> list[Message]:
    """Ask for what a listed tool can do."""
    chosen = listed[rng.choice(list(listed))]
    arguments = [parameter.draw(rng, held_out) for parameter in chosen.tool.parameters]
    question = rng.choice(chosen.tool.phrasings).format(*arguments)
    named = dict(zip(chosen.parameter_names, arguments, strict=True))
    call = reply_with_call(chosen.name, named)
    return [user(question), call, *_result(rng, chosen.tool, arguments)]


EXCHANGES: dict[str, Callable[[Random, Listed, bool], list[Message]]] = {
    "sum": sum_of_two,
    "tool": use_of_a_tool,
    "copy": copy,
    "fact": fact,
    "greeting": greeting,
    "sentiment": sentiment,
    "decline": decline,
    "unknown": unknown,
}

"""The turns of a conversation: what is said, what is called, what is read again."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lfm_mlx import chatml
from lfm_mlx.answer.responder import Responder
from lfm_mlx.answer.stream import Statistics
from lfm_mlx.chat import program
from lfm_mlx.chat.conversation import Conversation
from lfm_mlx.chat.program import loop
from lfm_mlx.chat.session import MOST_ROUNDS, Session
from lfm_mlx.chat.tools import Tools
from lfm_mlx.errors import InputError

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "tools.py")


class Script:
    """A View whose person types what it is given; keeps what it is shown."""

    def __init__(self, *typed: str):
        self.typed = [*typed]
        self.show_thinking = True
        self.answers: list[str] = []
        self.notes: list[str] = []
        self.said: list[str] = []
        self.questions: list[str] = []
        self.defaults: list[str] = []

    def ask(self, default: str = "") -> str:
        self.defaults.append(default)
        if not self.typed:
            raise EOFError
        return self.typed.pop(0)

    def confirm(self, question: str) -> str:
        self.questions.append(question)
        return self.typed.pop(0)

    def show(self, segments: Iterable[chatml.Segment]) -> None:
        self.answers.append("")
        for segment in segments:
            self.answers[-1] += segment.text if segment.kind == chatml.TEXT else ""

    def say(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Fake:
    """A Responder that answers what it is told to, and keeps what it was asked."""

    def __init__(self, *answers: str):
        self.answers = [*answers]
        self.asked: list[tuple[list[dict[str, Any]], str]] = []

    def answer(self, messages: Any, tools: Any = (), tool_choice: str = "auto") -> Iterator:
        self.asked.append((messages, tool_choice))
        text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

        def pieces() -> Iterator[str]:
            yield from text.split("^")
            if text.endswith("^"):
                raise KeyboardInterrupt

        return chatml.segments(pieces(), tools or None)

    def recall(self, messages: Any, tools: Any = ()) -> None:
        """Nothing is remembered."""

    statistics = Statistics(0)
    context, longest_context = 12, 100


def call(text: str) -> str:
    return f"<|tool_call_start|>[{text}]<|tool_call_end|>"


@pytest.fixture(scope="module")
def tools() -> Tools:
    return Tools(EXAMPLE, seconds=20)


def session(view: Script, responder: Any, **options: Any) -> Session:
    return Session(Conversation(), responder, view, **options)


def test_results_go_back_to_the_model_and_it_answers(tools: Tools) -> None:
    responder = Fake(call("calculator(expression='6*7'), get_weather(city='Oslo')"), "Fine.")
    talk = session(Script(), responder, tools=tools, ask_first=False)
    talk.ask("Well?")
    *_, question, calls, first, second, answer = talk.conversation.messages
    assert (question["content"], answer["content"]) == ("Well?", "Fine.")
    assert [each["function"]["name"] for each in calls["tool_calls"]] == [
        "calculator", "get_weather"
    ]  # fmt: skip
    assert json.loads(first["content"]) == {"result": 42}
    assert json.loads(second["content"]) == {"temperature": -3, "condition": "snowy"}
    assert [first["tool_call_id"], second["tool_call_id"]] == ["call_0", "call_1"]


def test_a_tool_runs_only_after_a_yes(tools: Tools) -> None:
    responder = Fake(call("calculator(expression='6*7')"), "Fine.")
    view = Script("n")
    talk = session(view, responder, tools=tools)
    talk.ask("Well?")
    assert view.questions == ["run calculator(expression='6*7')? [y]es, [n]o, [a]lways:"]
    assert json.loads(talk.conversation.messages[2]["content"]) == {
        "error": "the user declined this call"
    }
    responder.answers = [call("calculator(expression='6*7')"), "Fine."] * 3
    view.typed = ["", "always"]
    for _ in range(3):
        talk.ask("Well?")
    results = [m["content"] for m in talk.conversation.messages if m["role"] == "tool"]
    assert ["result" in result for result in results] == [False, False, True, True]


def test_the_error_of_a_tool_is_the_models_to_explain(tools: Tools) -> None:
    responder = Fake(call("calculator(expression='open(1)')"), "Fine.")
    talk = session(Script(), responder, tools=tools, ask_first=False)
    talk.ask("Well?")
    assert talk.conversation.messages[2]["content"] == (
        '{"error": "ValueError: cannot calculate open(1)"}'
    )
    assert responder.asked[-1][0][-1]["role"] == "tool"


def test_the_loop_is_bounded(tools: Tools) -> None:
    responder = Fake(call("calculator(expression='1')"))
    talk = session(Script(), responder, tools=tools, ask_first=False)
    talk.tools = Counting(tools)
    talk.ask("Well?")
    choices = [choice for _, choice in responder.asked]
    assert choices == ["auto"] * MOST_ROUNDS + ["none"]
    assert talk.tools.ran == MOST_ROUNDS


class Counting(Tools):
    """Tools that only count their calls."""

    def __init__(self, tools: Tools):
        self.schemas, self.ran = tools.schemas, 0

    def run(self, call: chatml.Call) -> str:
        self.ran += 1
        return "1"


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    responder, view = Fake("half an^swer^", "whole"), Script()
    talk = session(view, responder)
    talk.ask("one")
    assert talk.conversation.messages[-1]["content"] == "half answer"
    assert "stopped" in view.notes
    talk.ask("two")
    assert [m["content"] for m in talk.conversation.messages] == [
        "one", "half answer", "two", "whole"
    ]  # fmt: skip


def test_calls_of_an_interrupted_answer_do_not_run(tools: Tools) -> None:
    responder = Fake(call("calculator(expression='6*7')") + "and^")
    talk = session(Script(), responder, tools=tools, ask_first=False)
    talk.ask("one")
    assert [m["role"] for m in talk.conversation.messages] == ["user", "assistant"]
    assert "tool_calls" not in talk.conversation.messages[-1]


def test_ctrl_c_in_a_tool_ends_the_turn(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(call: chatml.Call) -> str:
        raise KeyboardInterrupt

    responder = Fake(call("get_weather(city='Oslo'), get_weather(city='Rome')"))
    talk = session(Script(), responder, tools=tools, ask_first=False)
    monkeypatch.setattr(tools, "run", interrupt)
    talk.ask("one")
    results = [m["content"] for m in talk.conversation.messages if m["role"] == "tool"]
    assert results == ['{"error": "interrupted"}'] * 2
    assert len(responder.asked) == 1


def test_a_question_that_cannot_be_asked_leaves_no_trace() -> None:
    view, responder = Script("too long", "/edit still too long"), Fake("fine")
    talk = session(view, responder)
    talk.ask("one")

    def refuse(*_: Any) -> Iterator:
        raise InputError("the prompt has 9 tokens")

    responder.answer = refuse  # pyright: ignore[reportAttributeAccessIssue]
    loop(talk)
    assert [m["content"] for m in talk.conversation.messages] == ["one", "fine"]
    assert view.notes.count("the prompt has 9 tokens") == 2


def test_commands_change_the_conversation(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    view = Script(
        "one", "two", "/undo", "/system Be brief.", "/edit", "uno", f"/save {file}", "/reset",
        f"/load {file}", "/system none", " /text", "/exit", "never read",
    )  # fmt: skip
    talk = session(view, Fake("fine"))
    loop(talk)
    assert [m["content"] for m in talk.conversation.messages] == ["uno", "fine", " /text", "fine"]
    assert "one" in view.defaults, "what is edited is given to the person"
    assert "taken back: two" in view.notes
    assert view.typed == ["never read"]
    assert Conversation.load(file).request() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "uno"},
        {"role": "assistant", "content": "fine"},
    ]
    assert talk.conversation.system is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nothing", "there is no /nothing; /help"),
        ("/undo", "nothing was said yet"),
        ("/edit", "nothing was said yet"),
        ("/save", "/save needs the name of a file"),
        ("/load", "/load needs the name of a file"),
        ("/load nowhere", "cannot be read"),
        ("/tools nowhere.py", "there is no such file"),
        ("/exit now", "/exit takes nothing after it"),
    ],
)
def test_wrong_commands_are_one_line_and_the_chat_goes_on(line: str, says: str) -> None:
    view = Script(line, "hello")
    loop(session(view, Fake("fine")))
    assert says in view.notes[0]
    assert view.answers == ["fine"]


def test_commands_tell() -> None:
    view = Script("/help", "/tools", f"/tools {EXAMPLE}", "/tools none")
    loop(session(view, Fake("fine")))
    assert all(f"/{name}" in view.said[0] for name in ("undo", "edit", "save", "think", "stats"))
    assert "get_weather(city)  Get the weather in a city." in view.said[2]
    assert view.said[1] == view.said[3]


def test_thoughts_fold_and_unfold() -> None:
    view = Script("one", "/think", "/think")
    loop(session(view, Fake("<think>hm</think>fine")))
    assert view.notes[-2:] == ["thoughts are shown", "hm"]


def test_the_conversation_is_kept_after_each_turn(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk = session(Script(), Fake("fine"), file=str(file))
    talk.ask("one")
    assert Conversation.load(file).messages == talk.conversation.messages


def responder_of(*parts: Any) -> Responder:
    return Responder(*parts, date="2026-01-02", max_tokens=300)


@pytest.fixture(scope="module")
def responder() -> Responder:
    args = program.parser().parse_args(["--model", "demo", "--date", "2026-01-02"])
    chosen = program.SelectedModel(args)
    return responder_of(chosen.load(), chosen.tokenizer, chosen.sampling)


def test_each_turn_reads_only_what_is_new(responder: Responder, tools: Tools) -> None:
    view = Script()
    talk = Session(Conversation(), responder, view, tools=tools, ask_first=False)
    talk.recall()
    read: list[int] = []
    answer = responder.answer

    def counted(*args: Any) -> Iterator[chatml.Segment]:
        yield from answer(*args)
        read.append(responder.statistics.prompt_tokens - responder.statistics.reused_tokens)

    talk.responder = Fake("")  # pyright: ignore[reportAttributeAccessIssue]
    talk.responder.answer = counted
    talk.ask("What is 345 * 12?")
    prompt, result = read
    assert result < 40 < prompt, "a tool's result is all that is read in the loop"
    context = responder.context
    talk.ask("What is the weather in Oslo?")
    # The thoughts before a question leave the prompt with it, and what follows them is read again.
    assert read[2] < context - prompt + 40
    assert read[3] < 40
    assert view.answers[1] == "345 * 12 = 4140."


def test_undo_and_edit_cost_almost_nothing_and_change_nothing(responder: Responder) -> None:
    view = Script()
    talk = Session(Conversation(), responder, view)
    talk.recall()
    assert responder.context == 0
    talk.ask("What is 27 + 58?")
    talk.ask("Hello")
    long = responder.context
    alone = responder.statistics.reused_tokens
    converse_with(talk, view, "/undo")
    assert alone <= responder.context < long
    talk.ask("What is 31 + 4?")
    reused = responder.statistics.reused_tokens
    assert reused > 0
    other = responder_of(responder.model, responder.tokenizer, responder.sampling)
    fresh = Session(Conversation(), other, Script())
    fresh.ask("What is 27 + 58?")
    fresh.ask("What is 31 + 4?")
    assert fresh.conversation == talk.conversation


def converse_with(talk: Session, view: Script, *typed: str) -> None:
    view.typed = [*typed]
    loop(talk)

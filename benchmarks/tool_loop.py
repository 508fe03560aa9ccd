"""How often the demo model answers a held-out question exactly through the chat's own tool loop.

    python benchmarks/tool_loop.py --count 100

Each question is one of the calculator's or the weather's, about values that training never saw.
The chat's session parses the call, runs the function of a Python file in a process of its own, and
hands its result back. Right is an answer that tells the function's own result in the words of
training. Prints what went wrong, then a table and one JSON line.
"""

import json
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from tqdm import tqdm

from lfm_mlx import chatml
from lfm_mlx.answer.control import Control
from lfm_mlx.answer.responder import Responder
from lfm_mlx.chat import program
from lfm_mlx.chat.conversation import Conversation
from lfm_mlx.chat.session import Session
from lfm_mlx.chat.tools import Tools
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.errors import InputError

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "demo"))

from tool_kinds import TOOLS

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tools.py"
FUNCTIONS = runpy.run_path(str(EXAMPLE))


class Silent:
    """A View that nobody looks at."""

    show_thinking = False

    def ask(self, default: str = "") -> str:
        raise EOFError

    def confirm(self, question: str) -> str:
        return "yes"

    def show(self, segments: Iterable[chatml.Segment]) -> None:
        for _ in segments:
            pass

    def say(self, text: str) -> None:
        """Nobody asked."""

    def note(self, text: str) -> None:
        """Nobody asked."""


def calculator(rng: Random) -> tuple[str, str]:
    """A question, and the answer that is right."""
    tool = TOOLS["calculator"]
    while True:
        (expression,) = [parameter.draw(rng, True) for parameter in tool.parameters]
        result = FUNCTIONS["calculator"](expression)["result"]
        if isinstance(result, int):  # training has no fractions among results
            break
    question = rng.choice(tool.phrasings).format(expression)
    return question, tool.answer.format(expression, result=result)


def weather(rng: Random) -> tuple[str, str]:
    """A question, and the answer that is right."""
    tool = TOOLS["weather"]
    (city,) = [parameter.draw(rng, True) for parameter in tool.parameters]
    question = rng.choice(tool.phrasings).format(city)
    return question, tool.answer.format(city, **FUNCTIONS["get_weather"](city))


KINDS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "calculator": calculator,
    "weather": weather,
}


def accuracy(responder: Responder, tools: Tools, kind: str, count: int) -> float:
    rng = Random(f"tool loop {kind}")
    right = 0
    for _ in tqdm(range(count), desc=kind, disable=None, leave=False):
        question, expected = KINDS[kind](rng)
        session = Session(Conversation(), responder, Silent(), tools=tools, ask_first=False)
        session.ask(question)
        answer = session.conversation.messages[-1]["content"]
        right += answer == expected
        if answer != expected:
            print(f"{question!r}: expected {expected!r}, got {answer!r}")
    return right / count


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, or a folder trained like it")
    parser.add_argument("--count", type=int, default=100, help="questions of each kind")
    args = parser.parse_args()
    if args.count < 1:
        raise InputError(f"--count is {args.count}; expected 1 or more")
    chosen = program.SelectedModel(program.parser().parse_args(["--model", args.model]))
    responder = Responder(chosen, chosen.load(), 300, Control())
    tools = Tools(str(EXAMPLE), 30)
    found = {kind: accuracy(responder, tools, kind, args.count) for kind in KINDS}
    for kind, share in found.items():
        print(f"{kind:12} {share:7.1%}")
    print(json.dumps({"benchmark": "tool_loop", "count": args.count, "accuracy": found}))


if __name__ == "__main__":
    sys.exit(run(main, "tool_loop"))

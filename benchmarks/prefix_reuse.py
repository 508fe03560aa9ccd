"""Tokens of a conversation that mlx-lm's server reads again after an earlier message was edited.

    python benchmarks/prefix_reuse.py --model demo

mlx-lm's own server runs twice: on its own class, which can reuse only a prompt that goes on exactly
where one ended, and on this package's, which it can rewind. Each is told a conversation and then
the same with one message edited, and reports how many tokens of the prompt it had `cached`. Prints
a table, then one JSON line.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lfm_mlx.checkpoint.hub import resolve
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.convert.program import convert
from lfm_mlx.errors import InputError
from lfm_mlx.kernels import metal
from lfm_mlx.load import load_tokenizer, open_checkpoint

SERVERS = {
    "lfm_mlx": ("-m", "lfm_mlx.mlx_lm", "server"),
    "mlx-lm": ("-m", "mlx_lm", "server"),
}
NO_MEMORY = ("--prompt-cache-size", "0")
START_SECONDS = 120
LONGEST_ANSWER = 24
TOLD = [
    "Hello",
    "Hello! How can I help you?",
    "What is the capital of France?",
    "The capital of France is Paris.",
    "How much is 27 plus 58?",
]
# What is edited: the index of the message, and its new text.
EDITS = {
    "last question": (4, "How much is 27 plus 31?"),
    "middle question": (2, "What is the capital of Italy?"),
    "an answer": (3, "The capital of France is Lyon."),
    "nothing, one more turn": (5, "85"),
}


class Server:
    """mlx-lm's server in a process of its own, on a free port of this machine."""

    def __init__(self, name: str, folder: Path, options: Sequence[str] = ()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, *SERVERS[name], "--model", str(folder), *options]
        address = ("--host", "127.0.0.1", "--port", str(port))
        self.process = subprocess.Popen(
            [*command, *address, "--max-tokens", str(LONGEST_ANSWER)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(10 * START_SECONDS):
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/health").read()
                return
            if self.process.poll() is not None:
                raise InputError(f"the server ended with exit code {self.process.returncode}")
            time.sleep(0.1)
        raise InputError(f"the server did not answer within {START_SECONDS} s")

    def ask(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The answer to a conversation: its text, and what of the prompt was cached."""
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps({"messages": messages, "temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        reply = json.loads(urllib.request.urlopen(request, timeout=START_SECONDS).read())
        message, usage = reply["choices"][0]["message"], reply["usage"]
        return {
            "text": (message.get("reasoning") or "") + (message.get("content") or ""),
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        }


@contextlib.contextmanager
def serving(name: str, folder: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    server = Server(name, folder, options)
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def conversation(texts: list[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def edited(index: int, text: str) -> list[dict[str, str]]:
    """The conversation told, with message `index` replaced, up to the user's last message."""
    if index == len(TOLD):
        return conversation([*TOLD, text, "Thank you"])
    return conversation([*TOLD[:index], text, *TOLD[index + 1 :]])


def common_prefix(tokenizer: Any, first: list[Any], second: list[Any]) -> int:
    """How many tokens two conversations begin with in common."""
    prompts = [
        tokenizer.apply_chat_template(m, add_generation_prompt=True) for m in (first, second)
    ]
    differ = (i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)
    return next(differ, min(map(len, prompts)))


def measure(name: str, folder: Path, remembering: bool = True) -> dict[str, dict[str, Any]]:
    """The answers of one server: before each edit it is told the conversation as it was.

    remembering: False for a server that reuses nothing, whose answers are those to compare with
    """
    found = {}
    with serving(name, folder, () if remembering else NO_MEMORY) as server:
        for title, (index, text) in EDITS.items():
            if remembering:
                server.ask(conversation(TOLD))
            found[title] = server.ask(edited(index, text))
    return found


@contextlib.contextmanager
def runnable(folder: Path) -> Iterator[Path]:
    """The model, on a CPU in float32: there mlx-lm's class multiplies no other floating experts."""
    if metal.available() or open_checkpoint(folder)[1].quantization is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "float32"
        convert(folder, copy, dtype="float32")
        yield copy


def rows(model: Path) -> list[dict[str, Any]]:
    """For each edit: the prompt, what it shares with the conversation, and what was cached."""
    tokenizer = load_tokenizer(model)
    with runnable(model) as folder:
        found = {name: measure(name, folder) for name in SERVERS}
        wanted = measure("lfm_mlx", folder, remembering=False)
    return [
        {
            "edit": title,
            "prompt_tokens": wanted[title]["prompt_tokens"],
            "common_tokens": common_prefix(tokenizer, conversation(TOLD), edited(*EDITS[title])),
            **{f"cached_tokens {name}": found[name][title]["cached_tokens"] for name in SERVERS},
            "same_answer": found["lfm_mlx"][title]["text"] == wanted[title]["text"],
        }
        for title in EDITS
    ]


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="demo", help="folder, or demo (default)")
    return parser


def main() -> None:
    args = parser().parse_args()
    found = rows(resolve(args.model))
    width = max(map(len, EDITS))
    titles = ("prompt", "in common", *(f"cached {name}" for name in SERVERS), "same answer")
    print(" " * width, *(f"{title:>14}" for title in titles))
    for row in found:
        edit, *values = row.values()
        print(edit.ljust(width), *(f"{value!s:>14}" for value in values))
    print(json.dumps({"benchmark": "prefix_reuse", "model": args.model, "rows": found}))


if __name__ == "__main__":
    sys.exit(run(main, "prefix_reuse"))

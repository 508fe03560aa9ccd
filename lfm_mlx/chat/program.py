"""python -m lfm_mlx.chat: options in, a Session and a View out, and the loop between them.

python -m lfm_mlx.chat --model demo --tools examples/tools.py
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from lfm_mlx import device
from lfm_mlx.answer.control import Control
from lfm_mlx.answer.responder import Responder
from lfm_mlx.chat.commands import COMMANDS, run_command
from lfm_mlx.chat.conversation import Conversation
from lfm_mlx.chat.options import parser
from lfm_mlx.chat.plain import Plain
from lfm_mlx.chat.session import Session, status
from lfm_mlx.chat.tools import Tools
from lfm_mlx.chat.view import View
from lfm_mlx.cli.control_options import thinking_tokens
from lfm_mlx.cli.model_options import at_least_one
from lfm_mlx.cli.selected_model import SelectedModel
from lfm_mlx.errors import InputError, one_line


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    at_least_one(args, "max_tokens")
    if args.tool_seconds <= 0:
        raise InputError(f"--tool-seconds is {args.tool_seconds:g}; expected more than 0")
    control = Control(max_thinking_tokens=thinking_tokens(args))
    conversation = conversation_of(args)
    tools = Tools(args.tools, args.tool_seconds) if args.tools else None
    chosen = SelectedModel(args)
    chosen.require_room(min(args.max_tokens, chosen.config.max_position_embeddings))
    with device.wired_limit():
        responder = Responder(
            chosen.load(), chosen.tokenizer, chosen.sampling, seed=args.seed, date=chosen.date,
            control=control, max_tokens=args.max_tokens,
        )  # fmt: skip
        view = view_of(args, responder)
        session = Session(
            conversation, responder, view, tools=tools, tool_seconds=args.tool_seconds,
            ask_first=not args.yes, file=args.conversation,
        )  # fmt: skip
        loop(session)


def conversation_of(args: argparse.Namespace) -> Conversation:
    """The conversation in --conversation, with the system message of --system."""
    conversation = Conversation()
    if args.conversation is not None and Path(args.conversation).expanduser().exists():
        conversation = Conversation.load(args.conversation)
    if args.system is not None:
        conversation.system = args.system
    return conversation


def view_of(args: argparse.Namespace, responder: Responder) -> View:
    """A Screen where a person sits at both ends, else Plain."""
    shown = not args.no_show_thinking
    if args.plain or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Plain(shown)
    try:
        screen = import_module("lfm_mlx.chat.screen")
    except ImportError as error:
        raise InputError(
            f"a chat on a terminal needs {error.name}; pip install 'lfm_mlx[chat]', or --plain"
        ) from error
    return screen.Screen(shown, lambda: status(responder), [f"/{name}" for name in COMMANDS])


def loop(session: Session) -> None:
    """Go on until the person leaves."""
    while session.is_open:
        try:
            text = session.view.ask()
        except EOFError:
            return
        try:
            handle(session, text)
        except InputError as error:
            session.view.note(one_line(error))
        except KeyboardInterrupt:
            session.view.note("stopped")


def handle(session: Session, text: str) -> None:
    """Do what was typed: a command, or a message to the model. Raises InputError."""
    if text.startswith("/"):
        run_command(session, text)
    elif text.strip():
        session.ask(text)

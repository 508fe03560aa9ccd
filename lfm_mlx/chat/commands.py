"""Commands to the chat itself: lines that begin with a slash."""

from collections.abc import Callable
from typing import NamedTuple

from lfm_mlx.chat.conversation import Conversation
from lfm_mlx.chat.session import Session, report
from lfm_mlx.chat.tools import Tools
from lfm_mlx.errors import InputError

NONE = "none"


class Command(NamedTuple):
    """A command's argument, its help text, and the function that runs it."""

    argument: str
    help: str
    run: Callable[[Session, str], None]


def run_command(session: Session, line: str) -> None:
    """Do what the line asks for. Raises InputError."""
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        raise InputError(f"there is no /{name}; /help lists what there is")
    argument = argument.strip()
    if argument and not COMMANDS[name].argument:
        raise InputError(f"/{name} takes nothing after it")
    COMMANDS[name].run(session, argument)


def change_system(session: Session, text: str) -> None:
    conversation = session.conversation
    if text:
        conversation.system = None if text == NONE else text
        session.recall()
    session.view.note(f"system message: {conversation.system or NONE}")


def reset(session: Session, _: str) -> None:
    session.conversation.messages.clear()
    session.recall()
    session.keep()
    session.view.note("a new conversation")


def undo(session: Session, _: str) -> None:
    question = session.conversation.last_question()
    session.conversation.undo()
    session.recall()
    session.keep()
    session.view.note(f"taken back: {question}")


def edit(session: Session, text: str) -> None:
    before = session.conversation.last_question()
    try:
        text = text or session.view.ask(before)
    except EOFError:
        return
    if not text.strip():
        return
    kept = [*session.conversation.messages]
    session.conversation.undo()
    try:
        session.ask(text)
    except (InputError, KeyboardInterrupt):
        session.conversation.messages[:] = kept
        raise


def save(session: Session, file: str) -> None:
    file = file or session.file or ""
    if not file:
        raise InputError("/save needs the name of a file")
    session.conversation.save(file)
    session.view.note(f"saved: {file}")


def load(session: Session, file: str) -> None:
    if not file:
        raise InputError("/load needs the name of a file")
    session.conversation = Conversation.load(file)
    session.recall()
    session.view.note(f"{len(session.conversation.messages)} messages, from {file}")


def tools(session: Session, file: str) -> None:
    if file == NONE:
        session.tools = None
    elif file:
        session.tools = Tools(file, session.tool_seconds)
    if file:
        session.recall()
    functions = [schema["function"] for schema in session.schemas]
    lines = [
        f"{function['name']}({', '.join(function['parameters']['properties'])})"
        f"  {function.get('description', '')}".rstrip()
        for function in functions
    ]
    session.view.say("\n".join(lines) or "no tools; /tools FILE.py offers the functions of a file")


def think(session: Session, _: str) -> None:
    view = session.view
    view.show_thinking = not view.show_thinking
    thoughts = [m["thinking"] for m in session.conversation.messages if m.get("thinking")]
    view.note(f"thoughts are {'shown' if view.show_thinking else 'folded away'}")
    if view.show_thinking and thoughts:
        view.note(thoughts[-1].strip())


def stats(session: Session, _: str) -> None:
    session.view.say(report(session.responder))


def show_help(session: Session, _: str) -> None:
    lines = [
        f"/{name} {command.argument}".ljust(20) + command.help for name, command in COMMANDS.items()
    ]
    session.view.say("\n".join([*lines, *HINTS]))


def leave(session: Session, _: str) -> None:
    session.is_open = False


COMMANDS = {
    "system": Command("[TEXT|none]", "show or set the system message", change_system),
    "reset": Command("", "begin a new conversation", reset),
    "undo": Command("", "take back your last message and its answer", undo),
    "edit": Command("[TEXT]", "edit your last message and ask again", edit),
    "save": Command("[FILE]", "keep the conversation as JSON", save),
    "load": Command("FILE", "go on with a saved conversation", load),
    "tools": Command("[FILE|none]", "list the tools, or offer those of a Python file", tools),
    "think": Command("", "show thoughts, or fold them away", think),
    "stats": Command("", "what the last answer took", stats),
    "help": Command("", "this list", show_help),
    "exit": Command("", "leave, as Ctrl-D does", leave),
}
HINTS = (
    "Ctrl-C stops an answer. On a terminal Alt-Enter begins another line; through a pipe a line",
    "that ends in \\ goes on. A message that begins with a slash is sent with a blank before it.",
)

"""The messages of a conversation, and the file they are kept in."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm_mlx.chatml.messages import template_messages
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import atomic_file, no_room

FORMAT = "lfm_mlx conversation 1"
Message = dict[str, Any]


@dataclass
class Conversation:
    """A system message, and the messages after it as a chat request has them."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def request(self) -> list[Message]:
        """All messages, the system's first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def last_question(self) -> str:
        """The user's last message. Raises InputError if there is none."""
        return template_messages([self.messages[self._last_turn()]])[0]["content"]

    def undo(self) -> None:
        """Take back the user's last message and all that came after it."""
        del self.messages[self._last_turn() :]

    def _last_turn(self) -> int:
        turns = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not turns:
            raise InputError("nothing was said yet")
        return turns[-1]

    def save(self, path: str | Path) -> None:
        """Write the file whole; only its owner may read it. Raises InputError."""
        path = Path(path).expanduser().resolve()
        content = {"format": FORMAT, "messages": self.request()}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        try:
            with atomic_file(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise no_room(error, path) from error

    @classmethod
    def load(cls, path: str | Path) -> "Conversation":
        """Read what `save` wrote. Raises InputError."""
        path = Path(path).expanduser()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise InputError(f"{path}: is not JSON ({one_line(error)})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path}: is not a conversation that /save wrote")
        return cls._of(path, content.get("messages"))

    @classmethod
    def _of(cls, path: Path, messages: Any) -> "Conversation":
        if messages == []:
            return cls()
        try:
            checked = template_messages(messages)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if checked[0]["role"] == "system":
            return cls(checked[0]["content"], messages[1:])
        return cls(None, messages)

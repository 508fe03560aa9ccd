"""Protocol for tokenizers, which mlx-lm's wrapper and Hugging Face's satisfy."""

from collections.abc import Collection
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text ⇄ token ids, by byte-level BPE.

    eos_token_ids: the tokens that end a turn
    chat_template: Jinja source, one or several by name; None without a template
    """

    eos_token_ids: Collection[int]
    bos_token_id: int | None
    chat_template: Any
    special_tokens_map: Any
    backend_tokenizer: Any

    def get_vocab(self) -> dict[str, int]:
        """Every token, in the letters of byte-level BPE, and its id; added ones included."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """Added tokens, which BPE does not produce: tags and special ones."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...

    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> str:
        """The template's source, of several the one that fits."""
        ...

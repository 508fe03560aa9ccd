"""Token ids → text, one at a time: a character comes out when its last byte is there."""

import codecs
import hashlib
import json

from lfm_mlx.chatml.tags import ALL_TAGS, Tag, Words
from lfm_mlx.chatml.tokenizer import Tokenizer


class TextStream:
    """The text of a stream of token ids, in pieces that know which tags are tokens.

    A tag that is one of the model's tokens comes as a Tag; all other text comes as Words, whatever
    it spells. Where the tokenizer has not all tags as tokens, a tag can only be spelled, and text
    comes as plain str.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._added = {number: text for text, number in tokenizer.get_added_vocab().items()}
        self._bytes = {letter: byte for byte, letter in byte_letters().items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._words = Words if set(ALL_TAGS) <= set(self._added.values()) else str

    def add(self, token: int) -> list[str]:
        """The pieces of text that this token completes: none, one, or two."""
        if token not in self._added:
            letters = self._tokenizer.convert_ids_to_tokens(token) or ""
            return self._pieces(self._decoder.decode(bytes(self._bytes[it] for it in letters)))
        text = self._added[token]
        return [*self.finish(), Tag(text) if text in ALL_TAGS else self._words(text)]

    def finish(self) -> list[str]:
        """The remaining text: a replacement character if a character was never completed."""
        left = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return self._pieces(left)

    def _pieces(self, text: str) -> list[str]:
        return [self._words(text)] if text else []


def byte_letters() -> dict[int, str]:
    """Byte-level BPE's letter for each byte: itself where it prints, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    shifted = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printed} | shifted


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """The SHA-256 of which id each token has: what tells tokenizers apart."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

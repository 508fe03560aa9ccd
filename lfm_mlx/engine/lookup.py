"""Drafts without a second model: what followed the last tokens when they occurred before.

Knows token ids only. Finding a match costs the same however long the text is.
"""

from collections.abc import Iterable

from lfm_mlx.errors import InputError

LONGEST_DRAFT = 16
FIRST_DRAFT = 2
# Lengths of the runs of tokens that are looked up. A longer match is followed from there.
SHORTEST_RUN, LONGEST_RUN = 2, 4


class NGramIndex:
    """The tokens so far, and where those at their end have occurred before.

    source: index of the token that followed the earlier occurrence, None if there is none; of
        several the one with the longest run, and of these the most recent
    run: how many tokens before `source` are known to equal those at the end
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        self.source: int | None = None
        self.run = 0
        # For each length, longest first: a run of tokens and the index after its latest occurrence.
        lengths = range(LONGEST_RUN, SHORTEST_RUN - 1, -1)
        self._after: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        if self.source is not None and self.tokens[self.source] == token:
            self.source, self.run = self.source + 1, self.run + 1
        else:
            self.source, self.run = None, 0
        self.tokens.append(token)
        end = len(self.tokens)
        for length, after in self._after.items():
            if length > end:
                continue
            run = tuple(self.tokens[-length:])
            found = after.get(run)
            if found is not None and length >= self.run:
                self.source, self.run = found, length
            after[run] = end

    def continuation(self, count: int) -> list[int]:
        """The tokens after the earlier occurrence; if they reach the end, they repeat."""
        if self.source is None:
            return []
        period = len(self.tokens) - self.source
        return [self.tokens[self.source + index % period] for index in range(count)]


class PromptLookup:
    """Decides when to draft, and how much, and counts what came of it.

    A draft needs a match of `needed` tokens. That doubles at every failure, so failures become
    rare, and a long quotation is noticed all the same; it halves after a draft accepted in whole,
    and then the next draft is twice as long. None of it looks at the clock: a run can be repeated.

    longest: the most tokens to draft for one pass
    drafted, accepted: tokens so far; passes: how often the model was run
    """

    def __init__(self, longest: int = LONGEST_DRAFT):
        if longest < 1:
            raise InputError(f"cannot draft {longest} tokens at a time; expected 1 or more")
        self.longest = longest
        self.size = min(FIRST_DRAFT, longest)
        self.needed = SHORTEST_RUN
        self.text = NGramIndex()
        self.passes = self.drafted = self.accepted = 0

    def should_draft(self) -> bool:
        """Whether to wait for the token under way, so as to draft what follows it."""
        return self.text.run >= self.needed

    def draft(self, token: int, most: int) -> list[int]:
        """Take in the token that was waited for; what may follow, if it was the one expected."""
        run = self.text.run
        self.text.append(token)
        if self.text.run <= run:
            self._fail()
            return []
        return self.text.continuation(min(self.size, most))

    def record(self, drafted: int, accepted: int) -> None:
        """Learn how much of a draft was accepted, before the text takes those tokens in."""
        self.drafted += drafted
        self.accepted += accepted
        if accepted == 0:
            self._fail()
        elif accepted < drafted:
            self.size = accepted
        else:
            self.needed = max(SHORTEST_RUN, self.needed // 2)
            self.size = min(2 * self.size, self.longest)

    def _fail(self) -> None:
        self.needed *= 2
        self.size = min(FIRST_DRAFT, self.longest)

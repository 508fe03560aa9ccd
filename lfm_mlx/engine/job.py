"""An engine's requests (Job) and its answers (Event). Frozen; token ids only.

    Job(prompt, max_tokens=256, sampling=Sampling(), stop_ids=frozenset({7}))

An engine numbers the jobs it is given. Of each it tells, in this order: `Progress` once it is
begun, with what was reused, and after each part of the prompt that was read; a `Token` for each
token; one `Ended`, whatever happened. A job that is paused for want of memory tells `Progress`
again when it goes on, and never a token twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lfm_mlx.engine.constraint import Constraint
from lfm_mlx.engine.sample import GREEDY, Sampling
from lfm_mlx.errors import InputError

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Job:
    """A prompt and how it is to be answered.

    prompt: token ids, at least one
    max_tokens: the longest answer; the model's maximum or the memory may leave less
    stop_ids: tokens that end the answer; the one that came is its last
    seed: the same seed draws the same answer, alone or beside others; None for any
    constraint: what the answer must be. It belongs to this job alone, and may be made on any thread
    top_logprobs: how many of the likeliest tokens to tell with each token, 0 to 20
    owner: prefixes are reused only among jobs of one owner
    keep: whether what was read is stored for later prompts
    """

    prompt: Sequence[int]
    max_tokens: int = 1024
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    constraint: Constraint | None = field(default=None, compare=False)
    top_logprobs: int = 0
    owner: str = ""
    keep: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; expected 1 or more")
        if not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise InputError(
                f"top_logprobs is {self.top_logprobs}; expected 0 to {MOST_TOP_LOGPROBS}"
            )


@dataclass(frozen=True)
class Prefix:
    """The part of a prompt that was read before.

    tokens: how many, all reused
    ended: why not more: `whole` (only the last token is left to read), `end` (of what was stored),
        `differs` (the prompt goes on otherwise), `short` (to copy it would cost more than to read
        it), or `none` (nothing begins like it)
    stored, given: where it differs, the token that was stored there and the prompt's
    """

    tokens: int = 0
    ended: str = "none"
    stored: int | None = None
    given: int | None = None


@dataclass(frozen=True)
class Progress:
    """A job's prompt is being read: `tokens_read` of `prompt_tokens`, those reused with them."""

    job: int
    tokens_read: int
    prompt_tokens: int
    prefix: Prefix


@dataclass(frozen=True)
class Token:
    """One token of an answer, a stop token too.

    logprob: natural logarithm of the model's own probability of it, before penalties and masks
    top: the likeliest tokens with their log-probabilities, the likeliest first, as many as asked
    """

    job: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Ended:
    """A job is over; nothing more comes of it.

    finish_reason: `stop` at a stop token, `length` at the last token allowed, `cancelled`, `error`
    error: one line, if that is the reason
    """

    job: int
    finish_reason: str
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix: Prefix = Prefix()
    error: str | None = None


Event = Progress | Token | Ended

"""Jobs of an engine, and what `decode` alone answers them: the oracle of everything batched."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lfm_mlx import Model
from lfm_mlx.cache.keys_values import KVQuantization
from lfm_mlx.engine.constraint import Constraint, OneOf, Without
from lfm_mlx.engine.decode import Reading, decode
from lfm_mlx.engine.job import Ended, Event, Job, Progress, Token
from lfm_mlx.engine.sample import GREEDY, Sampler, Sampling
from lfm_mlx.engine.thinking import Thinking, ThinkTags

SAMPLINGS = (
    GREEDY,
    Sampling(),
    Sampling(temperature=1.4, top_k=7),
    Sampling(temperature=0.9, presence_penalty=1.5, logit_bias={5: 3.0, 6: -100.0}),
    Sampling(temperature=0.0, repetition_penalty=1.0, frequency_penalty=0.7),
    Sampling(temperature=0.0, repetition_penalty=1.5),
    Sampling(temperature=1.1, top_k=0, top_p=0.8, min_p=0.02, repetition_penalty=1.2),
)
STOP = 9
KINDS = ("free", "without", "one of", "thinking")


def constraint(kind: str, vocab_size: int) -> Constraint | None:
    """A fresh one."""
    choices = OneOf([[3, 4, 5], [3, 8], [100, 2, 2, 2, 2, 7]], [STOP], vocab_size)
    return {
        "free": None,
        "without": Without(range(0, vocab_size, 2), vocab_size),
        "one of": choices,
        "thinking": Thinking(ThinkTags(11, 12, [13]), [STOP], vocab_size, budget=3, answer=choices),
    }[kind]


def constrained(job: Job, kind: str, vocab_size: int) -> Job:
    """The job under a constraint of its own."""
    return replace(job, constraint=constraint(kind, vocab_size))


def alone(
    model: Model, job: Job, quantization: KVQuantization | None = None
) -> tuple[list[int], str]:
    """The tokens and the end of the job's answer. The job's constraint is used up."""
    sampler = Sampler(model.config.vocab_size, job.sampling, job.seed)
    steps = list(decode(
        model, job.prompt, sampler=sampler, max_tokens=job.max_tokens, stop_ids=job.stop_ids,
        constraint=job.constraint, reading=Reading(kv_quantization=quantization),
    ))  # fmt: skip
    return [step.token for step in steps], steps[-1].finish_reason or ""


@dataclass
class Told:
    """What was told of one job."""

    progress: list[Progress] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    ended: Ended | None = None

    @property
    def answer(self) -> tuple[list[int], str]:
        assert self.ended is not None, "every job ends"
        return [token.token for token in self.tokens], self.ended.finish_reason


def told(events: Iterable[Event]) -> dict[int, Told]:
    """Events by job; they must come in the order that `engine/job.py` states."""
    found: dict[int, Told] = {}
    for event in events:
        job = found.setdefault(event.job, Told())
        assert job.ended is None, "nothing comes after the end"
        if isinstance(event, Progress):
            job.progress.append(event)
        elif isinstance(event, Token):
            assert job.progress, "a token comes after its prompt was read"
            job.tokens.append(event)
        else:
            job.ended = event
            assert event.generated_tokens == len(job.tokens)
    return found

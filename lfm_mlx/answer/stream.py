"""Decoded steps as text that streams, and what a run took."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lfm_mlx import device
from lfm_mlx.chatml import TextStream
from lfm_mlx.chatml.tokenizer import Tokenizer
from lfm_mlx.engine.decode import Step
from lfm_mlx.engine.lookup import PromptLookup


@dataclass
class Statistics:
    """Token counts and times of a run; times in seconds since the prompt was handed over."""

    prompt_tokens: int
    reused_tokens: int = 0  # of the prompt, from a cache
    generated_tokens: int = 0
    time_to_first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    passes: int = 0  # of the model after the prompt, with prompt lookup
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finish_reason: str = "interrupted"

    @property
    def prompt_tokens_per_second(self) -> float:
        return rate(self.prompt_tokens - self.reused_tokens, self.time_to_first_token_seconds)

    @property
    def generated_tokens_per_second(self) -> float:
        after_first = self.total_seconds - self.time_to_first_token_seconds
        return rate(self.generated_tokens - 1, after_first)

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory this process has held."""
        return device.peak_bytes()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "peak_memory_bytes": self.peak_memory_bytes,
            "prompt_tokens_per_second": round(self.prompt_tokens_per_second, 3),
            "generated_tokens_per_second": round(self.generated_tokens_per_second, 3),
        }

    def __str__(self) -> str:
        reused = f" ({self.reused_tokens} of them reused)" if self.reused_tokens else ""
        return (
            f"prompt: {self.prompt_tokens} tokens{reused}, "
            f"{self.prompt_tokens_per_second:.1f} tokens/s, "
            f"first token after {self.time_to_first_token_seconds:.2f} s\n"
            f"answer: {self.generated_tokens} tokens, {self.generated_tokens_per_second:.1f} "
            f"tokens/s, finished: {self.finish_reason}\n"
            f"{self._drafts()}peak memory: {self.peak_memory_bytes / 1e9:.2f} GB"
        )

    def _drafts(self) -> str:
        if not self.passes:
            return ""
        return (
            f"lookup: {self.accepted_tokens} of {self.drafted_tokens} drafted tokens accepted, "
            f"{self.generated_tokens / self.passes:.2f} tokens a pass\n"
        )


def rate(count: int, seconds: float) -> float:
    """Count per second; 0 if nothing was measured."""
    return count / seconds if seconds > 0 and count > 0 else 0.0


def text_of(tokenizer: Tokenizer, steps: Iterable[Step]) -> Iterator[str]:
    """The text of decoded steps, piece by piece; a token that ends the turn is not shown."""
    text = TextStream(tokenizer)
    for step in steps:
        if step.finish_reason != "stop":
            yield from text.add(step.token)
    yield from text.finish()


def measured(
    steps: Iterable[Step], statistics: Statistics, lookup: PromptLookup | None = None
) -> Iterator[Step]:
    """The same steps; fills `statistics` as they come."""
    began = time.perf_counter()
    for step in steps:
        statistics.total_seconds = time.perf_counter() - began
        statistics.generated_tokens += 1
        if statistics.generated_tokens == 1:
            statistics.time_to_first_token_seconds = statistics.total_seconds
        if lookup is not None:
            statistics.passes = lookup.passes
            statistics.drafted_tokens = lookup.drafted
            statistics.accepted_tokens = lookup.accepted
        if step.finish_reason is not None:
            statistics.finish_reason = step.finish_reason
        yield step

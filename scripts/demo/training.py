"""A training run: its settings, its steps, and the checkpoint that it goes on from."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batches import IGNORED, Batches, Encoder
from four_bits import is_quantized, quantized_weights
from network import Balance, model_config, new_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides the conversations themselves."""

    seed: int = 0
    steps: int = 17000
    minutes: float = 120.0
    batch_tokens: int = 2048
    vocabulary: int = 2048
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 150
    bias_rate: float = 1e-3
    echo_steps: int = 350  # the first steps only echo random tokens; see Batches
    echo_every: int = 20  # and later one step in so many
    quantized_from: float = 0.8  # part of the run after which every second step sees 4-bit weights


class Run:
    """A training run: model, optimizer and how far it has come."""

    def __init__(
        self, settings: Settings, tokenizer: PreTrainedTokenizerFast, checkpoint: Path
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.tokenizer, self.checkpoint = settings, tokenizer, checkpoint
        self.model = new_model(model_config(tokenizer))
        self.balance = Balance(self.model)
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self.step, self.minutes = 0, 0.0

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decay = self.settings.weight_decay
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if is_quantized(n) and "embed" not in n]
        others = [p for n, p in named if not is_quantized(n) or "embed" in n]
        return [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by time, whichever is further."""
        by_time = self.minutes / self.settings.minutes if self.settings.minutes else 1.0
        return min(1.0, max(self.step / self.settings.steps, by_time))

    def save(self) -> None:
        """Write the checkpoint; a half-written one never takes the place of a good one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
        }
        draft = self.checkpoint.with_suffix(".draft")
        torch.save(state, draft)
        os.replace(draft, self.checkpoint)

    def load(self) -> None:
        """Go back to where the checkpoint was written."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.minutes = state["step"], state["minutes"]

    def train(self) -> bool:
        """Train until done or interrupted; return whether it is done."""
        stream_seed = self.settings.seed * 1_000_003 + self.step
        source = Batches(
            Encoder(self.tokenizer),
            stream_seed,
            self.settings.batch_tokens,
            echoes=max(0, self.settings.echo_steps - self.step),
            echo_every=self.settings.echo_every,
        )
        loader = DataLoader(
            source,
            batch_size=None,
            num_workers=1,
            prefetch_factor=64,
            worker_init_fn=_ignore_ctrl_c,
        )
        bar = tqdm(total=self.settings.steps, initial=self.step, mininterval=5)
        self.model.train()
        try:
            for ids, labels in loader:
                if self.progress >= 1:
                    break
                began = time.monotonic()
                loss = self._train_step(ids, labels)
                self.minutes += (time.monotonic() - began) / 60
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", done=f"{self.progress:.1%}", refresh=False)
                if self.step % 250 == 0:
                    self.save()
        except KeyboardInterrupt:
            print(f"\ninterrupted after step {self.step}; --resume goes on from here")
        bar.close()
        self.save()
        return self.progress >= 1

    def _train_step(self, ids: Tensor, labels: Tensor) -> float:
        settings = self.settings
        warm = min(1.0, (self.step + 1) / settings.warmup_steps)
        rate = settings.learning_rate * warm * (0.01 + 0.99 * _cosine(self.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.balance.live = (ids != self.tokenizer.pad_token_id).flatten()
        if self.progress > settings.quantized_from and self.step % 2:
            with quantized_weights(self.model):
                loss = self._loss(ids, labels)
                loss.backward()
        else:
            loss = self._loss(ids, labels)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.balance.step(settings.bias_rate * _cosine(min(1.0, self.progress / 0.8)))
        return loss.item()

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the trained tokens; only they go through the head.

        Their number changes with every batch, and bfloat16 kernels are compiled for each new shape:
        the head runs in float32.
        """
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        trained = labels[:, 1:] != IGNORED
        logits = self.model.lm_head(hidden[:, :-1][trained].float())
        return nn.functional.cross_entropy(logits, labels[:, 1:][trained])


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))

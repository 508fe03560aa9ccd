"""Memory for caches: those of rows first, stored ones with what is left.

    device x 0.9 - weights - working memory - buffers that MLX keeps for reuse

MLX ends the process when a GPU's memory runs out, so what would not fit is evicted, paused, made to
wait or refused before.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from lfm_mlx import device
from lfm_mlx.cache.keys_values import KVQuantization
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError
from lfm_mlx.model import Model

SHARE = 0.9
# Of freed buffers, those that MLX may keep for reuse.
BUFFER_BYTES = 512 << 20
# Tokens still to come that a job must have room for to be begun, or to go on once it was paused.
FORESEEN_TOKENS = 1024
# Keys and values have room to grow by a sixteenth, and by this many tokens at least.
GROWTH_TOKENS = 256


@dataclass(frozen=True)
class Budget:
    """Bytes for caches, and what they take.

    capacity: for the caches of rows and for those stored
    """

    config: Config
    capacity: int
    itemsize: int = 4
    kv_quantization: KVQuantization | None = None

    @classmethod
    def of(cls, model: Model, kv_quantization: KVQuantization | None = None) -> "Budget":
        """The budget that this device leaves beside the model. Raises InputError if none."""
        parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        weights = sum(array.nbytes for array in parameters.values())
        there = int(device.device_bytes() * SHARE)
        capacity = there - weights - device.WORKING_BYTES - BUFFER_BYTES
        if capacity <= 0:
            raise InputError(
                f"the weights take {weights / 1e9:.1f} GB, and of the device's memory "
                f"{there / 1e9:.1f} GB may be used: no room for a conversation; take fewer bits"
            )
        itemsize = model.model.embedding_norm.weight.dtype.size
        return cls(model.config, capacity, itemsize, kv_quantization)

    def nbytes(self, tokens: int) -> int:
        """Bytes of one row's cache, with the room that it grows into."""
        grown = tokens + max(GROWTH_TOKENS, tokens // 16)
        if self.kv_quantization is not None and tokens >= self.kv_quantization.start:
            return self.kv_quantization.nbytes(self.config, grown, self.itemsize)
        return self.config.cache_bytes(grown, self.itemsize)

    def most_tokens(self) -> int:
        """The longest conversation that fits alone."""
        low, high = 0, self.config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.nbytes(middle) <= self.capacity else (low, middle - 1)
            )
        return low

    def answer_tokens(self, prompt_tokens: int, max_tokens: int) -> int:
        """Tokens that an answer may have: `max_tokens`, or what memory leaves.

        Raises InputError if the prompt leaves nothing.
        """
        most = self.most_tokens()
        if prompt_tokens >= most:
            raise InputError(
                f"the prompt has {prompt_tokens} tokens, and the memory holds a conversation of "
                f"{most}; give a shorter one, or take fewer bits"
            )
        return min(max_tokens, most - prompt_tokens)

"""Models built in tests from a config and hub-named NumPy tensors, without any file."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from lfm_mlx import Config, Model
from lfm_mlx.checkpoint import weights
from lfm_mlx.checkpoint.folder import TensorInfo

# Relative to the largest logit. A dtype's own rounding, over 8 to 24 layers; see the README.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


def model_of(config: dict, tensors: dict[str, np.ndarray], dtype: str = "float32") -> Model:
    """The model with these weights (hub names), cast to `dtype`."""
    parsed = Config.from_dict(config)
    model = Model(parsed)
    infos = {name: TensorInfo("F32", values.shape, Path()) for name, values in tensors.items()}
    parameters = weights.plan(parsed, infos, dict(tree_flatten(model.parameters())))
    arrays = {name: mx.array(values) for name, values in tensors.items()}
    target = getattr(mx, dtype)
    model.load_weights(
        [
            (parameter.name, weights.cast(parameter.name, parameter.join(parts), target))
            for parameter, parts in weights.build_each(parameters, arrays)
        ]
    )
    return model


def as_numpy(array: mx.array) -> np.ndarray:
    """The values in float32, whatever the dtype."""
    return np.array(array.astype(mx.float32))

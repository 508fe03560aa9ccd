"""Linear modules as the kernels take them: as matrices, several merged, with norm and residual."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from lfm_mlx.kernels.matrix import Matrix
from lfm_mlx.kernels.metal import NO_KERNELS, Kernels, among
from lfm_mlx.kernels.projection import projection

DENSE = (nn.Linear, nn.Embedding, SwitchLinear)
PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


def matrix_of(module: Any) -> Matrix | None:
    """Weights of a linear module or an embedding.

    None if the module has a bias, an adapter or a global scale: then it does more than multiply.
    """
    if "bias" in module or module.get("global_scale") is not None:
        return None
    if isinstance(module, PACKED):
        stored_as = (module.group_size, module.bits, module.mode)
        return Matrix(module["weight"], module["scales"], module.get("biases"), *stored_as)
    return Matrix(module["weight"]) if isinstance(module, DENSE) else None


def project(
    x: mx.array,
    linear: Any,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
    kernels: Kernels = NO_KERNELS,
) -> mx.array:
    """linear(norm(x)) + residual, in one launch if `linear` is plain and the kernel may run.

    Shapes: x [..., in], residual [..., out], returns [..., out]
    """
    matrix = matrix_of(linear)
    if matrix is not None:
        return project_matrix(x, matrix, norm, residual, kernels=kernels)
    y = linear(x if norm is None else norm(x))
    return y if residual is None else residual + y


def project_matrix(
    x: mx.array,
    matrix: Matrix,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
    *,
    swiglu: bool = False,
    kernels: Kernels = NO_KERNELS,
) -> mx.array:
    """Multiply by a matrix with `kernels.projection`, the norm given as a module.

    Shapes: x [..., in], residual [..., out], returns [..., out]
    """
    return projection(
        x,
        matrix,
        norm_weight=None if norm is None else norm.weight,
        eps=0.0 if norm is None else norm.eps,
        swiglu=swiglu,
        residual=residual,
        use_kernel=among(kernels, "projection"),
    )


class Merged:
    """Projections of the same input as one matrix, of which their own weights are views.

    One launch computes them all, and whatever looks for the modules by name still finds them:
    saving, quantizing, adapters. Once a module or its weight is replaced, the merged matrix is
    dropped.
    """

    def __init__(self, *names: str):
        self.names = names
        self.whole: Matrix | None = None
        self.views: list[tuple[mx.array | None, ...]] = []

    def merge(self, parent: nn.Module) -> None:
        """Concatenate the weights of `parent`'s modules, if dtype and quantization are the same."""
        matrices = [matrix_of(parent[name]) for name in self.names]
        plain = [matrix for matrix in matrices if matrix is not None]
        kinds = {(m[3:], m.weight.dtype, m.biases is None) for m in plain}
        self.whole, self.views = None, []
        if len(plain) < len(matrices) or len(kinds) > 1:
            return
        rows = [matrix.weight.shape[0] for matrix in plain]
        ends = [sum(rows[: index + 1]) for index in range(len(rows))]
        parts = [
            None if any(part is None for part in stack) else mx.concatenate(list(stack))
            for stack in zip(*(matrix[:3] for matrix in plain), strict=True)
        ]
        self.whole = plain[0]._replace(weight=parts[0], scales=parts[1], biases=parts[2])
        for name, begin, end in zip(self.names, [0, *ends], ends, strict=False):
            module = parent[name]
            for key, part in zip(("weight", "scales", "biases"), parts, strict=True):
                if part is not None:
                    module[key] = part[begin:end]
            self.views.append(stored(module))
        # Unevaluated views would keep the arrays that were concatenated in memory.
        mx.eval([part for part in parts if part is not None], self.views)

    def matrix(self, parent: nn.Module) -> Matrix | None:
        """The merged matrix; None if a module has other weights than it was given."""
        for name, views in zip(self.names, self.views, strict=False):
            if any(a is not b for a, b in zip(stored(parent[name]), views, strict=True)):
                self.whole, self.views = None, []
                break
        return self.whole


def stored(module: nn.Module) -> tuple[mx.array | None, ...]:
    return module.get("weight"), module.get("scales"), module.get("biases")

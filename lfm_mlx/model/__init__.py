"""The model as mlx.nn modules, named as the checkpoint names them."""

from lfm_mlx.model.decoder import Model

__all__ = ["Model"]

"""The README.md of a published quantization: front matter for the hub, and how to run the model."""

import sys
from pathlib import Path
from string import Template
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCardData

from lfm_mlx.checkpoint.quantize import Quantization
from lfm_mlx.errors import InputError, one_line

CARD = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md")
KEPT = ("language", "license", "license_name", "license_link")


def front_matter_of(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's card; says so when the licence is nowhere to be found."""
    file = folder / CARD
    try:
        found = (huggingface_hub.metadata_load(file) or {}) if file.exists() else {}
    except Exception as error:  # PyYAML's own, or ValueError where it is no mapping
        raise InputError(f"{file}: front matter cannot be read ({one_line(error)})") from error
    if "license" not in found and (folder / "LICENSE").exists():
        found |= {"license": "other", "license_link": "LICENSE"}
    if "license" not in found:
        print("the source names no licence, so the card names none", file=sys.stderr)
    return found


def new_card(
    repo: str, source: str, base_model: str | None, front_matter: dict[str, Any],
    *, packing: Quantization, floating: str, nbytes: int, count: int,
) -> str:  # fmt: skip
    """The card of `repo`, made of `source`; the licence and the languages are the source's.

    base_model: the source's name on the hub, if it is there
    front_matter: of the source's card
    packing, floating: of the matrices, and the dtype of the rest
    nbytes, count: of the tensors, and the number of parameters
    """
    metadata = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "lfm2", f"{packing.bits}-bit"],
        **{key: front_matter[key] for key in KEPT if key in front_matter},
    )
    link = f"[{base_model}](https://huggingface.co/{base_model})"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=metadata.to_yaml(),
        name=repo.split("/")[1],
        repo=repo,
        origin=link if base_model else f"The checkpoint `{source}`",
        recipe=f"{packing.bits} bits, groups of {packing.group_size}, {packing.mode}; "
        f"the router, norms and convolutions in {floating}",
        bits_per_weight=f"{8 * nbytes / count:.3f}",
        parameters=f"{count / 1e6:,.1f} million",
        size=size(nbytes),
    )


def size(nbytes: int) -> str:
    unit, scale = next((u for u in (("GB", 1e9), ("MB", 1e6)) if nbytes >= u[1]), ("kB", 1e3))
    return f"{nbytes / scale:.2f} {unit}"

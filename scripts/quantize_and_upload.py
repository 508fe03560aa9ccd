"""Quantize a checkpoint and publish it on the hub, with a model card.

    python scripts/quantize_and_upload.py --model LiquidAI/LFM2.5-8B-A1B --repo USER/NAME --bits 4

Token, permission, source and card are checked before any work. The weights are committed first and
the card last, so a repository with a card is complete. The same command takes up an interrupted
run: the converted folder is kept, and what the hub has already is not sent again.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import model_card
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of httpx in hub 1, of httpx2 in hub 2
    LocalTokenNotFoundError,
)
from mlx.utils import tree_flatten
from model_card import CARD

from lfm_mlx.checkpoint import weights
from lfm_mlx.checkpoint.folder import Checkpoint
from lfm_mlx.checkpoint.hub import DEMO, resolve
from lfm_mlx.checkpoint.quantize import MODES, Quantization, Recipe, packable
from lfm_mlx.checkpoint.writer import copy_kept
from lfm_mlx.cli.command import Parser, run
from lfm_mlx.config import Config
from lfm_mlx.convert.program import convert, converted_config, source_name
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.files import no_room, write_json
from lfm_mlx.load import DTYPES
from lfm_mlx.model import Model

REFUSALS = {
    401: "the hub does not accept the token; renew it with `hf auth login`, or give --token",
    403: "the token may not write there; give one with write access",
    404: "the hub has no such repository any more; run this again to make it",
    409: "somebody else is changing it at this moment; run this again",
    412: "somebody else has changed it meanwhile; run this again",
}


@dataclass(frozen=True)
class Job:
    """What is made of which source, for which repository.

    facts, front_matter: the source's folder, perhaps without its weights, and its card's metadata
    changed: when a file was last put into that folder, in seconds since 1970
    config: config.json of the result; an equal one means the same source and the same recipe
    nbytes, count: of the result's tensors, and the number of parameters
    """

    source: str
    base_model: str | None
    facts: Path
    front_matter: dict[str, Any]
    changed: float
    repo: str
    out: Path
    recipe: Recipe
    dtype: str | None
    config: dict[str, Any]
    nbytes: int
    count: int

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds this job's result."""
        there = (folder / "config.json").exists()
        return there and Checkpoint(folder).config == self.config

    @property
    def is_converted(self) -> bool:
        """Whether an earlier run has left the result in `out`, whole, and of today's source."""
        if not self.is_in(self.out) or not Checkpoint(self.out).tensors:
            return False
        return (self.out / "config.json").stat().st_mtime >= self.changed


def job_of(args: argparse.Namespace, cache: Path | None) -> Job:
    """The job that the arguments describe; its source's small files are downloaded to `cache`."""
    facts = resolve(args.model, weights=False, cache=cache)
    is_local = args.model == DEMO or Path(args.model).expanduser().exists()
    recipe = Recipe(Quantization.of(args.mode, args.bits, args.group_size))
    config, nbytes, count = planned(args.model, Checkpoint(facts).config, recipe, args.dtype)
    return Job(
        source=args.model,
        base_model=args.base_model or (None if is_local else args.model),
        facts=facts,
        front_matter=model_card.front_matter_of(facts),
        # Links into the hub's cache are as old as the download; those of a dry run tell nothing.
        changed=max(file.lstat().st_mtime for file in facts.iterdir()) if cache is None else 0,
        repo=args.repo,
        out=args.out or Path(args.repo.split("/")[1]),
        recipe=recipe,
        dtype=args.dtype,
        config=config,
        nbytes=nbytes,
        count=count,
    )


def planned(
    source: str, config_json: dict[str, Any], recipe: Recipe, dtype: str | None
) -> tuple[dict[str, Any], int, int]:
    """The result's config.json, its tensors' bytes, and its number of parameters."""
    config = Config.from_dict(config_json)
    if config.quantization is not None:
        raise InputError(f"{source}: is quantized already; give the original checkpoint")
    model = Model(config)
    parameters = dict(tree_flatten(model.parameters()))
    widths = {path: parameters[f"{path}.weight"].shape[-1] for path in packable(model)}
    packings, _ = recipe.packings(widths)
    floating = DTYPES.get(dtype or floating_dtype(config_json))
    nbytes = 0
    for name, parameter in parameters.items():
        # Arrays are lazy: shapes are worked out, and nothing is computed.
        array = weights.cast(name, parameter, floating)
        packing = packings.get(name.removesuffix(".weight"))
        parts = [array] if packing is None else packing.pack(array).values()
        nbytes += sum(part.nbytes for part in parts)
    result = converted_config(config_json, source_name(source), recipe, packings, dtype)
    return result, nbytes, sum(array.size for array in parameters.values())


def floating_dtype(config_json: dict[str, Any]) -> str:
    return config_json.get("dtype") or config_json.get("torch_dtype") or "bfloat16"


def card(job: Job) -> str:
    """This repository's card in the folder, where measurements may stand, or else a new one."""
    kept = job.out / CARD
    if job.is_converted and kept.exists() and job.repo in (text := kept.read_text("utf-8")):
        return text
    return model_card.new_card(
        job.repo, source_name(job.source), job.base_model, job.front_matter,
        packing=job.recipe.default, floating=floating_dtype(job.config),
        nbytes=job.nbytes, count=job.count,
    )  # fmt: skip


def check_name(repo: str) -> None:
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--repo {repo}: {one_line(error)}") from error
    if "/" not in repo:
        raise InputError(f"--repo {repo}: expected USER/NAME; USER may be an organization")


def check_token(api: HfApi, repo: str) -> None:
    """Raise InputError when the token may only read, or is of somebody who does not own `repo`."""
    user = api.whoami()
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise InputError(f"the token of {user['name']} may only read; give one with write access")
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    # A fine-grained token may be silent on organizations: the hub decides then.
    if role != "fineGrained" and repo.split("/")[0] not in owners:
        raise InputError(
            f"{repo}: the token is of {user['name']}, who can write to {', '.join(owners)}; "
            "choose one of them in --repo, or give another --token"
        )


def check_card(text: str) -> None:
    """Ask the hub whether it will take the card: it refuses a licence it does not know."""
    try:
        ModelCard(text).validate()
    except ValueError as error:
        raise InputError(f"{CARD}: the hub does not accept it: {one_line(error)}") from error


def is_complete(api: HfApi, job: Job, force: bool) -> bool:
    """Whether the repository has this job's result already; with `force` it never has.

    Raises InputError when it holds anything else and `force` is not given.
    """
    if not api.repo_exists(job.repo):
        return False
    api.auth_check(job.repo, write=True)
    files = set(api.list_repo_files(job.repo)) - {".gitattributes"}
    if force or not files:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        if "config.json" in files:
            api.hf_hub_download(job.repo, "config.json", local_dir=scratch)
        if not job.is_in(Path(scratch)):
            raise InputError(
                f"{job.repo}: exists, and holds other files than this run makes; "
                "choose another --repo, or replace them with --force"
            )
    return CARD in files


def upload(api: HfApi, job: Job, private: bool, force: bool) -> None:
    """Send the converted folder: everything but the card in one commit, then the card."""
    api.create_repo(job.repo, private=private or None, exist_ok=True)
    api.upload_folder(
        repo_id=job.repo, folder_path=job.out, ignore_patterns=[CARD, ".*"],
        delete_patterns=["*.safetensors", CARD] if force else None,
        commit_message=f"Weights, made by {job.config['conversion']['tool']}",
    )  # fmt: skip
    api.upload_file(
        repo_id=job.repo, path_or_fileobj=job.out / CARD, path_in_repo=CARD,
        commit_message="Model card",
    )  # fmt: skip


@contextmanager
def plain_errors(repo: str) -> Iterator[None]:
    """Say in one line what the hub, the network or the disk refused."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError("no token; run `hf auth login`, set HF_TOKEN or give --token") from error
    except (HTTPError, RuntimeError, OSError) as error:
        # What happens in the hub's upload threads comes wrapped in a RuntimeError.
        cause = (isinstance(error, RuntimeError) and error.__cause__) or error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            meaning = REFUSALS.get(status, "the hub has a fault; run this again later")
            said = f": {cause.server_message}" if cause.server_message else ""
            raise InputError(f"{repo}: {meaning} (the hub answered {status}{said})") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise no_room(error, error.filename or repo) from error
        raise InputError(
            f"{repo}: the connection to the hub broke off ({one_line(cause)}); "
            "run the same command again, it goes on where this one stopped"
        ) from error


def show(job: Job, text: str) -> None:
    """Print the files with their sizes, and the card; leaves nothing behind."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = job.out if job.is_converted else Path(scratch)
        if folder != job.out:
            copy_kept(job.facts, folder)
            write_json(folder / "config.json", job.config)
            print(f"{model_card.size(job.nbytes):>11}  model*.safetensors, and their index")
        for file in sorted(path for path in folder.iterdir() if path.name != CARD):
            print(f"{model_card.size(file.stat().st_size):>11}  {file.name}")
    print(f"{model_card.size(len(text.encode())):>11}  {CARD}\n\n{text}", end="")


def publish(args: argparse.Namespace) -> None:
    """Check everything, convert unless an earlier run has, and send it."""
    api = HfApi(token=args.token)
    with plain_errors(args.repo):
        check_token(api, args.repo)
    job = job_of(args, None)
    url = f"{api.endpoint}/{job.repo}"
    with plain_errors(job.repo):
        check_card(card(job))
        complete = is_complete(api, job, args.force)
    if job.is_converted:
        print(f"{job.out}: was converted by an earlier run", file=sys.stderr)
    elif complete and not job.is_in(job.out):
        return print(f"{url}: is complete already; --force makes it again")
    else:
        convert(
            job.source, job.out, recipe=job.recipe, dtype=job.dtype, force=args.force,
            show_progress=True,
        )  # fmt: skip
    job = replace(job, nbytes=Checkpoint(job.out).nbytes)
    with plain_errors(job.repo):
        (job.out / CARD).write_text(card(job), encoding="utf-8")
        upload(api, job, args.private, args.force)
    print(f"{url}: {model_card.size(job.nbytes)} of weights and the card; {job.out} is kept")
    return None


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub name, or demo")
    parser.add_argument("--repo", required=True, help="USER/NAME on the hub")
    parser.add_argument("--bits", type=int, help="2, 3, 4, 5, 6 or 8 (default: the mode's, 4)")
    parser.add_argument("--group-size", type=int, help="elements that share a scale")
    parser.add_argument("--mode", choices=MODES, default="affine", help="kind of quantization")
    parser.add_argument("--dtype", choices=DTYPES, help="of what stays floating")
    parser.add_argument("--base-model", help="hub name of the source, where --model is a folder")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--out", type=Path, help="converted folder, kept (default: ./NAME)")
    parser.add_argument("--token", help="instead of HF_TOKEN and `hf auth login`")
    parser.add_argument("--dry-run", action="store_true", help="show files and card, do nothing")
    parser.add_argument(
        "--force", action="store_true", help="replace other weights in --repo and --out"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_name(args.repo)
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    if not args.dry_run:
        return publish(args)
    with tempfile.TemporaryDirectory() as scratch:
        job = job_of(args, Path(scratch))
        return show(job, card(job))


if __name__ == "__main__":
    sys.exit(run(main, "quantize_and_upload"))

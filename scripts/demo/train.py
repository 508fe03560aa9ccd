"""Train the demo model: a tiny LFM2-MoE on synthetic conversations, in the hub's own format.

The trained model is Hugging Face's own `Lfm2MoeForCausalLM`: a checkpoint that owes nothing to this
package's reading of the architecture, and can therefore judge it. Nothing is downloaded.

    python scripts/demo/train.py --out lfm_mlx/demo

Ctrl-C writes a checkpoint and ends; `--resume` goes on from it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from exchanges import FACTS
from values import DATA

try:
    import torch
    from export import export, write_frozen
    from four_bits import quantized_weights
    from measure import accuracies, expert_shares
    from tokenizer import load_tokenizer
    from training import Run, Settings
    from transformers import Lfm2MoeForCausalLM
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install torch transformers jinja2 safetensors tqdm")

DEMO = Path(__file__).resolve().parents[2] / "lfm_mlx" / "demo"


def report(run: Run, folder: Path, count: int) -> None:
    """Judge the finished folder, as written and through 4 bits; print it and write its README."""
    model = Lfm2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shares = expert_shares(model, run.tokenizer, run.settings)
    rounded = accuracies(model, run.tokenizer, count)
    with quantized_weights(model):
        quantized = accuracies(model, run.tokenizer, count)
    rows = "\n".join(f"| {k} | {v:.1%} | {quantized[k]:.1%} |" for k, v in rounded.items())
    size = sum(file.stat().st_size for file in folder.iterdir())
    template = (DATA / "readme.md").read_text(encoding="utf-8")
    text = template.format(
        parameters=model.num_parameters() / 1e6,
        megabytes=size / 1e6,
        minutes=run.minutes,
        facts=len(FACTS),
        experts=model.config.num_experts,
        used=model.config.num_experts_per_tok,
        count=count,
        rows=rows,
        least=shares.min().item(),
        most=shares.max().item(),
        equal=1 / model.config.num_experts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)
    for layer, share in enumerate(shares.tolist(), model.config.num_dense_layers):
        print(f"layer {layer}: " + " ".join(f"{value:.1%}" for value in share))


def parse_arguments() -> argparse.Namespace:
    """Read the command line; every field of Settings is an option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("train_demo"), help="checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--examples", type=int, default=200, help="held-out examples per kind")
    parser.add_argument("--frozen", type=Path, help="also write prompts and exact replies here")
    for name, value in asdict(Settings()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    return parser.parse_args()


def main() -> None:
    """Train, export and judge, as the command line says."""
    arguments = parse_arguments()
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    arguments.work.mkdir(parents=True, exist_ok=True)
    template = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    file = arguments.work / "tokenizer.json"
    tokenizer = load_tokenizer(file, template, settings.seed, settings.vocabulary)
    run = Run(settings, tokenizer, arguments.work / "checkpoint.pt")
    if arguments.resume:
        run.load()
    parameters = run.model.num_parameters() / 1e6
    print(f"{parameters:.2f} M parameters, {len(tokenizer)} tokens, from step {run.step}")
    if not run.train():
        return
    export(run.model, tokenizer, arguments.out)
    report(run, arguments.out, arguments.examples)
    if arguments.frozen:
        model = Lfm2MoeForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
        write_frozen(model, tokenizer, arguments.frozen)


if __name__ == "__main__":
    main()

"""Advice about options that a command does not have: the nearest one, or what others call it."""

import difflib
import re
from collections.abc import Iterable

# What other programs of this kind call an option of ours.
FOREIGN = {
    "--hf-path": "--model", "--mlx-path": "--out", "--output": "--out", "--repo": "--model",
    "--max-new-tokens": "--max-tokens", "--n-predict": "--max-tokens", "--predict": "--max-tokens",
    "--num-predict": "--max-tokens", "--system-prompt": "--system", "--sys": "--system",
    "--grammar": "--regex", "--format": "--json-schema", "--schema": "--json-schema",
    "--repeat-penalty": "--repetition-penalty", "--num-draft-tokens": "--lookup",
    "--prompt-cache-file": "--prompt-cache", "--cache-file": "--prompt-cache",
    "--verbose-prompt": "--verbose", "--think": "--max-thinking-tokens",
    "--reasoning-budget": "--max-thinking-tokens", "--hidethinking": "--no-show-thinking",
}  # fmt: skip
# Options of other programs for what needs none here.
NEEDLESS = {
    "--ctx-size": "the context is as long as the model's, and takes memory as it fills",
    "--max-kv-size": "the context is as long as the model's, and takes memory as it fills",
    "--n-gpu-layers": "the whole model runs on the GPU",
    "--threads": "MLX takes the threads it needs",
    "--trust-remote-code": "no code of a repository is ever run",
    "--chat-template": "the checkpoint's own chat template is used",
    "--stream": "answers always stream",
}


def advice(message: str, known: Iterable[str]) -> str:
    """`; did you mean --OPTION?` for the option that argparse's message complains of, or nothing.

    known: the options there are
    """
    complained = re.search(r"unrecognized arguments: (.*)", message, re.DOTALL)
    if complained is None:
        return ""
    words = complained[1].split()
    wrong = next((word for word in words if word.startswith("-")), None)
    if wrong is None:
        return "; put text of several words in quotes" if words else ""
    return nearest(wrong.partition("=")[0], list(known))


def nearest(wrong: str, known: list[str]) -> str:
    """`; did you mean …?` for the known option that is meant by `wrong`, if one is likely."""
    if wrong in NEEDLESS:
        return f"; leave {wrong} out: {NEEDLESS[wrong]}"
    meant = FOREIGN.get(wrong, wrong)
    begun = [option for option in known if len(meant) > 3 and option.startswith(meant)]
    found = begun or difflib.get_close_matches(meant, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""

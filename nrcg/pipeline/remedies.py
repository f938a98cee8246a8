"""What to do about a file that is missing or damaged: added to a DataError by the command line alone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from nrcg.config import ROLES
from nrcg.errors import NrcgError

MADE = re.compile(
    rf"data/[^/]+/.+|models/[^/]+/(ddpm|objectives/[^/]+|classifiers/({'|'.join(ROLES)}))/.+|results/[^/]+/(?!tune/).+"
)
"""Files that Snakemake makes, by their path from its folder."""
VERSIONED = ("data", "models")
"""Folders of which `dvc checkout` brings single files back."""
MODEL, CLASSIFIER, DATASET = (
    "restore it, or train one (see nrcg train-ddpm --help)",
    "restore it, or make the classifier anew (see nrcg train-classifier --help)",
    "restore it, or make the data set anew (see nrcg dataset --help)",
)
OTHERWISE = {
    **dict.fromkeys(("model_index.json", "training.json", "data_mean.npy", "scheduler_config.json"), MODEL),
    **dict.fromkeys(("diffusion_pytorch_model.safetensors", "unet/config.json"), MODEL),
    **dict.fromkeys(("model.safetensors", "config.json"), CLASSIFIER),
    **dict.fromkeys(("dataset.json", "images.npy", "labels.npy", "mean.npy"), DATASET),
}
"""Name of a file outside the workflow -> what to do."""


def remedy(path: str | Path) -> str:
    """What to do about a file that this package has written.

    Where Snakemake makes it, these are commands that work as they stand, in its folder: a damaged file is removed
    first, since Snakemake does not start while one is there.
    """
    path = Path(path).absolute()
    name = path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else ""
    if not MADE.fullmatch(name) or not Path("Snakefile").is_file():
        return OTHERWISE.get(f"{path.parent.name}/{path.name}") or OTHERWISE.get(path.name, "restore it or delete it")
    if name.endswith(".trace.npz"):  # drawn with the images
        path, name = (Path(str(one).removesuffix(".trace.npz") + ".npy") for one in (path, name))
    name = shlex.quote(str(name))
    remove = f"rm {name} && " if path.exists() else ""
    # Targets stand first: --resources takes all that follows it.
    make = f"{remove}snakemake {name} --cores all --resources gpu=1"
    if name.partition("/")[0] not in VERSIONED:
        return f"make it anew: {make}"
    return f"restore it (under DVC: {remove}dvc checkout {name}), or make it anew with all that belongs to it: {make}"


def explained(error: NrcgError) -> str:
    """An error's line, with what to do about its file where it names one."""
    path = getattr(error, "path", None)
    return str(error) if path is None else f"{error}; {remedy(path)}"

# The validated configuration and what the rules ask of it. No rules here.
import os
import subprocess
import sys
from pathlib import Path

from nrcg import config as nrcg_config
from nrcg.config import ROLES
from nrcg.layout import format_scale
from nrcg.devices import count_nvidia_gpus, has_nvidia_gpu
from nrcg.errors import ConfigError, DataError
from nrcg.evaluation.features import resolve_features
from nrcg.files import join_group, remove_leftovers
from nrcg.pipeline.integrity import refuse_damaged_sources, set_aside_damaged
from nrcg.processes import end_with_parent
from nrcg.tracking import is_left_behind, new_invocation

# DVC, of which Snakemake is a child, names itself in dvc.yaml: without it the workflow must not go on.
if workflow.is_main_process and (dvc := os.environ.pop("NRCG_PARENT", "")):
    end_with_parent(int(dvc))

try:
    # Snakemake reads these too, but lets a key stand twice.
    for path in workflow.configfiles:
        nrcg_config.read_yaml(path)
    CONFIG = nrcg_config.parse(dict(config), " + ".join(map(str, workflow.configfiles)))
except ConfigError as error:
    sys.exit(f"nrcg: {error}")
DATASETS = sorted({experiment.dataset.name for experiment in CONFIG.experiments.values()})


def clear_up():
    """Undo what a kill leaves, while no other snakemake is alive in this folder: Snakemake's lock, which would want
    `snakemake --unlock`, and half-written files. Results that are damaged are set aside, so that they are made anew;
    with damaged data or models nothing starts, since Snakemake would delete what was made of them."""
    for leftover in Path(".snakemake/locks").glob("*.lock"):
        leftover.unlink(missing_ok=True)
    for name in ("data", "models", "results", ".nrcg"):
        remove_leftovers(name)
    try:
        refuse_damaged_sources(Path(), datasets=DATASETS, experiments=CONFIG.experiments)
    except DataError as error:
        sys.exit(f"nrcg: {error}")
    for line in set_aside_damaged(Path()):
        print(f"nrcg: {line}", file=sys.stderr)
    send_leftovers()


def send_leftovers():
    """Close the tracking runs that a kill left, and send what a server that was down has missed. A process of its own
    with a limit: no trouble of the store may stop the workflow."""
    if not is_left_behind():
        return
    command = [sys.executable, "-m", "nrcg.cli", "track", "--sync"]
    try:
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        print("nrcg: warning: runs of before are not all sent yet; send them by: nrcg track --sync", file=sys.stderr)


if workflow.is_main_process:
    join_group(".nrcg/snakemake.lock", alone=clear_up)

# The jobs' tracking runs are children of one run per experiment and invocation (nrcg/tracking.py).
if workflow.is_main_process or "NRCG_INVOCATION" not in os.environ:
    os.environ["NRCG_INVOCATION"] = new_invocation()


envvars:
    "NRCG_INVOCATION",


def finish_tracking(status):
    """End the invocation's tracking runs and send what is left; does nothing where no job was tracked."""
    command = [sys.executable, "-m", "nrcg.cli", "track", "--finish", os.environ["NRCG_INVOCATION"], "--status", status]
    if Path(".nrcg/tracking", f"{os.environ['NRCG_INVOCATION']}.invocation").exists():
        subprocess.run(command, check=False)


FIGURES = (
    "forward_accuracy",
    "logit_sensitivity",
    "gradient_sensitivity",
    "stabilizers",
    "accuracy_vs_scale",
    "fid_vs_scale",
    "cfid_vs_scale",
    "pareto",
    "best_samples",
)

# What a lost file of a model is missed for. Not its training.csv and samples.png, which are not worth a training.
DDPM = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "data_mean.npy",
    "training.json",
)
CLASSIFIER = ("config.json", "model.safetensors", "accuracy_over_t.csv")


wildcard_constraints:
    experiment="|".join(CONFIG.experiments),
    dataset="|".join(DATASETS),
    method="|".join(CONFIG.methods),
    role="|".join(ROLES),
    scale=r"[0-9.e+-]+",
    shard=r"\d+",


# `nrcg` is found without an activated environment. It takes the shell's place (exec), so that it is Snakemake's child and
# ends with it, also when that is killed by kill -9.
shell.prefix(f'export PATH="{Path(sys.executable).parent}:$PATH" NRCG_WORKFLOW=$PPID; exec ')


def experiment_results(experiment):
    """What an experiment's target asks for: every file that a job makes and another reads, so that a lost one is made
    anew. Snakemake does not miss an intermediate file while what was made of it earlier is there; without these a job
    that failed in a rerun would leave the results of the run before as if they were up to date."""
    settings = CONFIG.experiments[experiment]
    data, models, results = f"data/{settings.dataset.name}", f"models/{experiment}", f"results/{experiment}"
    tables = [
        "forward.csv",
        "reference.json",
        *(f"metrics/{method}.csv" for method in settings.sweep),
        "metrics.csv",
        "summary.json",
        "report.html",
        "paper_comparison.md",
    ]
    shards = [
        f"samples/{method}/scale{format_scale(scale)}/shard{shard:04d}.{ending}"
        for method, scales in settings.sweep.items()
        for scale in scales
        for shard in range(settings.num_shards)
        for ending in ("npy", "json")
    ]
    figures = [f"figures/{figure}.{ending}" for figure in FIGURES for ending in ("png", "svg")]
    arrays = ["train/images", "train/labels", "train/mean", "val/images", "val/labels"]
    return [
        f"{data}/dataset.json",
        *(f"{data}/{array}.npy" for array in arrays),
        *(f"{models}/ddpm/{name}" for name in DDPM),
        *(f"{models}/classifiers/{role}/{name}" for role in ROLES for name in CLASSIFIER),
        *(f"{results}/{name}" for name in tables + shards + figures),
    ]


def settings_file(step, part=None):
    """Params function: the file with the settings that a step reads. Its name changes when one of them changes."""

    def write(wildcards):
        values = dict(wildcards)
        experiment = values.get("experiment") or nrcg_config.dataset_owner(CONFIG, values["dataset"])
        return nrcg_config.write_step_settings(CONFIG, experiment, step, values.get(part))

    return write


def folder(pattern):
    """Params function: a folder that a verb reads or writes."""

    def fill(wildcards):
        return pattern.format(**wildcards)

    return fill


def features(wildcards):
    """The protocols that `auto` finds: metrics are made anew when Inception's weights come or go."""
    evaluation = CONFIG.experiments[wildcards.experiment].evaluation
    return resolve_features(evaluation.features, evaluation.inception_dir)


def best_by(wildcards):
    return CONFIG.experiments[wildcards.experiment].evaluation.best_by


def gpus(wildcards):
    """1 where a job is to run on a GPU, else 0: on a CPU, jobs share the cores instead of waiting for each other.

    With `device: auto` this machine's devices decide, and 1 is asked of a cluster, whose nodes differ from it.
    """
    device = CONFIG.experiments[wildcards.experiment].device
    if device == "auto":
        return int(workflow.non_local_exec or has_nvidia_gpu())
    return int(device.startswith("cuda"))


def training_gpus(wildcards):
    """One for each process that trains the diffusion model; of `auto`, all there are. Snakemake lowers it to what
    --resources gpu=N allows."""
    settings = CONFIG.experiments[wildcards.experiment]
    asked = settings.ddpm.num_processes
    if not gpus(wildcards) or settings.ddpm.pretrained is not None or ":" in settings.device:
        return gpus(wildcards)
    return max(count_nvidia_gpus(), 1) if asked == "auto" else asked


def feature_threads(wildcards):
    """Beside a GPU, the resizing for Inception takes longer than the network: a GPU's share of the cores, 8 at most. On
    a CPU one, so that jobs share the cores."""
    if not gpus(wildcards):
        return 1
    if workflow.non_local_exec:
        return 8
    cores = workflow.resource_settings.cores or 1  # a dry run may name none
    return max(1, min(8, cores // max(count_nvidia_gpus(), 1)))


# What a scheduler is asked for, from measured jobs with a margin (docs/scaling.md). A retry asks for `attempt` times it.
SECONDS_PER_STEP = {"gpu": 1.25e-3, "cpu": 1.0}  # of a guided image of 64 x 64 pixels; grows with the pixels
CPU_MB_PER_IMAGE = 160  # activations of such an image in a batch


def pixels(experiment):
    """Relative to 64 x 64."""
    return (experiment.dataset.image_size / 64) ** 2


def step_minutes(wildcards, image_steps):
    """Twice what some image steps take, and ten minutes to start."""
    seconds = SECONDS_PER_STEP["gpu" if gpus(wildcards) else "cpu"]
    return 10 + round(2 * image_steps * pixels(CONFIG.experiments[wildcards.experiment]) * seconds / 60)


def sample_runtime(wildcards, attempt):
    """Resource function: minutes for a shard."""
    experiment = CONFIG.experiments[wildcards.experiment]
    steps = CONFIG.methods[wildcards.method].sampler.steps or experiment.ddpm.schedule.num_train_timesteps
    return attempt * step_minutes(wildcards, experiment.sampling.shard_size * steps)


def forward_runtime(wildcards, attempt):
    """Resource function: minutes for the forward analysis, three gradients for each image and step."""
    experiment = CONFIG.experiments[wildcards.experiment]
    steps = experiment.forward.num_images * experiment.ddpm.schedule.num_train_timesteps
    return attempt * step_minutes(wildcards, 3 * steps)


def guided_memory(section):
    """Resource function: MB for jobs that take gradients of the batches of `sampling` or `forward`."""

    def memory(wildcards, attempt):
        experiment = CONFIG.experiments[wildcards.experiment]
        if gpus(wildcards):
            return attempt * 6000
        batch = getattr(experiment, section).batch_size
        images = 16 if batch == "auto" else batch  # `auto` takes what it finds free
        return attempt * (2000 + round(images * pixels(experiment) * CPU_MB_PER_IMAGE))

    return memory


def memory(base):
    """Resource function: MB beyond a job's inputs, which may all come to lie in the memory."""

    def total(wildcards, input, attempt):
        return attempt * (base + int(input.size_mb))

    return total


def minutes(base):
    """Resource function: a job's minutes."""

    def total(wildcards, attempt):
        return attempt * base

    return total


def data_folder(wildcards):
    return f"data/{CONFIG.experiments[wildcards.experiment].dataset.name}"


def dataset_files(wildcards):
    """A data set's manifest, which holds the checksums of its arrays; the arrays' own times do not matter."""
    folder = data_folder(wildcards)
    arrays = [f"{folder}/{split}/{array}.npy" for split in ("train", "val") for array in ("images", "labels")]
    return [f"{folder}/dataset.json", *map(ancient, arrays)]


def ddpm_files(wildcards):
    folder = f"models/{wildcards.experiment}/ddpm"
    return [
        f"{folder}/training.json",
        ancient(f"{folder}/unet/diffusion_pytorch_model.safetensors"),
    ]


def classifier_files(*roles):
    """Input function: the classifiers of some roles."""

    def files(wildcards):
        folder = f"models/{wildcards.experiment}/classifiers"
        configs = [f"{folder}/{role}/config.json" for role in roles]
        return [
            *configs,
            *(ancient(f"{folder}/{role}/model.safetensors") for role in roles),
        ]

    return files


def guide_role(wildcards):
    """The role of a method's guiding classifier, or None."""
    return CONFIG.methods[wildcards.method].classifier


def guide_files(wildcards):
    role = guide_role(wildcards)
    return classifier_files(role)(wildcards) if role else []


def guide_flag(wildcards):
    role = guide_role(wildcards)
    return f"--classifier models/{wildcards.experiment}/classifiers/{role}" if role else ""


def scales(wildcards):
    return [format_scale(scale) for scale in CONFIG.experiments[wildcards.experiment].sweep[wildcards.method]]


def shard_size(wildcards):
    """Params function: samples in a shard. The last shard grows when an experiment asks for more samples."""
    sampling = CONFIG.experiments[wildcards.experiment].sampling
    first = int(wildcards.shard) * sampling.shard_size
    return min(sampling.shard_size, sampling.num_samples - first)


def shard_files(wildcards):
    """Every shard of a method: its scales times its shards."""
    return method_shards(wildcards.experiment, wildcards.method)


def method_shards(experiment, method):
    settings = CONFIG.experiments[experiment]
    return [
        f"results/{experiment}/samples/{method}/scale{format_scale(scale)}/shard{shard:04d}.{ending}"
        for scale in settings.sweep[method]
        for shard in range(settings.num_shards)
        for ending in ("npy", "json")
    ]


def experiment_samples(experiment):
    return [path for method in CONFIG.experiments[experiment].sweep for path in method_shards(experiment, method)]


def metric_files(wildcards):
    sweep = CONFIG.experiments[wildcards.experiment].sweep
    return [f"results/{wildcards.experiment}/metrics/{method}.csv" for method in sweep]


def first_shards(wildcards):
    """The shards whose first samples the figures and the report show."""
    experiment = CONFIG.experiments[wildcards.experiment]
    return [
        f"results/{wildcards.experiment}/samples/{method}/scale{format_scale(scale)}/shard{shard:04d}.npy"
        for method, scales in experiment.sweep.items()
        for scale in scales
        for shard in range(min(experiment.num_shards, -(-256 // experiment.sampling.shard_size)))
    ]

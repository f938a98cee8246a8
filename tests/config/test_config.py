"""The configuration: merging, one-line refusals, fingerprints, settings files, the JSON schema."""

import copy
import math
import re
from pathlib import Path

import jsonschema
import pytest

from nrcg import config
from nrcg.config import PUBLISHED_STEPS, ROLES, STEPS, StabilizerConfig, scaled_beta
from nrcg.config.messages import models_in
from nrcg.config.methods import SamplerConfig
from nrcg.diffusion.objectives import NATIVE, loss_weights
from nrcg.diffusion.schedule import Schedule
from nrcg.errors import ConfigError
from nrcg.layout import format_scale

ROOT = Path(__file__).parents[2]
RAW = config.read_yaml(ROOT / "config.yaml")
TOY = config.read_yaml(ROOT / "tests/data/toy.yaml")
CONFIG = config.parse(RAW)
EXPERIMENT = "experiments.quickstart"
ATTACK = {"kind": "adversarial", "search": "tau"}
GRID = RAW["experiments"]["objectives"]["objectives"]


def with_entry(dotted: str, value: object, raw: dict = RAW) -> dict:
    """A copy of a configuration with one entry set; mappings on the way are made."""
    raw = copy.deepcopy(raw)
    *path, last = dotted.split(".")
    place = raw
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value
    return raw


def refusal(raw: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(raw)
    message = str(caught.value)
    assert message.startswith("config.yaml: ")
    assert "\n" not in message
    return message.removeprefix("config.yaml: ")


# --- Merging ----------------------------------------------------------------------------------------------------


def test_merge_lays_mappings_over_and_replaces_lists():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    over = {"a": {"c": [3]}, "e": {"f": 2}, "d": {"g": 1}}
    before = copy.deepcopy((base, over))
    merged = config.merge(base, over)
    assert merged == {"a": {"b": 1, "c": [3]}, "d": {"g": 1}, "e": {"f": 2}}
    merged["a"]["c"].append(4)
    merged["e"]["f"] = 5
    assert (base, over) == before


def test_an_experiment_is_the_defaults_with_its_keys_laid_over():
    data = {"dataset": RAW["experiments"]["sportballs"]["dataset"]}
    mine = data | {"ddpm": {"epochs": 3, "unet": {"block_out_channels": [64, 64, 64, 64]}}}
    mine = config.parse(with_entry("experiments.mine", mine)).experiments["mine"]
    defaults = config.parse(with_entry("experiments.plain", data)).experiments["plain"]
    assert mine.ddpm.epochs == 3
    assert mine.ddpm.unet.block_out_channels == [64, 64, 64, 64]
    assert mine.ddpm.optimizer == defaults.ddpm.optimizer
    assert mine.classifiers == defaults.classifiers


def test_parse_leaves_what_it_was_given_untouched():
    raw = copy.deepcopy(RAW)
    config.parse(raw)
    assert raw == RAW


def test_an_empty_list_leaves_a_method_out():
    raw = with_entry(f"{EXPERIMENT}.sweep.robust", [])
    sweep = config.parse(raw).experiments["quickstart"].sweep
    assert "robust" not in sweep
    assert set(sweep) == set(CONFIG.experiments["quickstart"].sweep) - {"robust"}


# --- Mistakes ---------------------------------------------------------------------------------------------------

UNKNOWN_KEYS = {
    "nope": "methods",
    f"{EXPERIMENT}.nope": "target",
    f"{EXPERIMENT}.dataset.nope": "num_train",
    f"{EXPERIMENT}.ddpm.nope": "optimizer",
    f"{EXPERIMENT}.ddpm.schedule.nope": "beta_start",
    f"{EXPERIMENT}.ddpm.unet.nope": "block_out_channels",
    f"{EXPERIMENT}.ddpm.optimizer.nope": "learning_rate",
    f"{EXPERIMENT}.classifiers.nope": "judge",
    f"{EXPERIMENT}.classifiers.robust.nope": "architecture",
    f"{EXPERIMENT}.forward.nope": "stabilizers",
    f"{EXPERIMENT}.sampling.nope": "shard_size",
    f"{EXPERIMENT}.evaluation.nope": "features",
    "methods.robust.nope": "classifier",
    "methods.non_robust_x0_ema90.stabilizer.nope": "beta",
    "defaults.nope": "target",
    "defaults.ddpm.unet.nope": "attention",
}


@pytest.mark.parametrize(("key", "allowed"), UNKNOWN_KEYS.items())
def test_an_unknown_key_is_refused_with_the_allowed_ones(key, allowed):
    message = refusal(with_entry(key, 1))
    assert message.startswith(f"{key}: unknown key; allowed here: ")
    assert re.search(rf"\b{allowed}\b", message)


# What each source of images needs, and nothing more.
SOURCES = {
    "sportballs": RAW["experiments"]["sportballs"]["dataset"],
    "celeba": {"source": "celeba", "path": "raw/celeba", "attribute": "Young", "classes": ["old", "baseball"]},
    "huggingface": {"source": "huggingface", "path": "raw/pq", "classes": ["baseball", "b", "c"]},
    "folder": {"source": "folder", "path": "raw/mine", "classes": ["a", "baseball"]},
}
OWN = "experiments.own.dataset"

MISTAKES = [
    # The key set, its value, how the message goes on behind the key, or the whole of it behind a "=".
    (f"{EXPERIMENT}.ddpm.epochs", "3", "input should be a valid integer, got '3'"),
    (f"{EXPERIMENT}.ddpm.epochs", 3.5, "input should be a valid integer, got 3.5"),
    (f"{EXPERIMENT}.ddpm.epochs", True, "input should be a valid integer, got True"),
    (f"{EXPERIMENT}.ddpm.epochs", 0, "input should be greater than 0, got 0"),
    (f"{EXPERIMENT}.ddpm", None, "should be a mapping, got None"),
    (f"{EXPERIMENT}", None, "should be a mapping, got None"),
    (f"{EXPERIMENT}.ddpm.optimizer.learning_rate", "1e-3", "input should be a valid number, got '1e-3' (YAML reads"),
    (f"{EXPERIMENT}.ddpm.optimizer.learning_rate", math.inf, "input should be a finite number"),
    (f"{EXPERIMENT}.ddpm.schedule.beta_start", 0.5, "must not be larger than beta_end"),
    (f"{EXPERIMENT}.ddpm.schedule.beta_schedule", "sigmoid", "input should be 'linear', 'scaled_linear' or "),
    (f"{EXPERIMENT}.ddpm.pretrained", " ", "empty; give a diffusers folder or hub id"),
    (f"{EXPERIMENT}.ddpm.num_processes", 65, "65 processes cannot share 64 images"),
    (f"{EXPERIMENT}.ddpm.num_processes", "all", "'all' is not allowed; auto or a whole number >= 1 is"),
    (f"{EXPERIMENT}.ddpm.unet.attention", [True], "one entry for each entry of block_out_channels"),
    (f"{EXPERIMENT}.ddpm.unet.norm_num_groups", 7, "7 does not divide 24 channels"),
    (f"{EXPERIMENT}.classifiers.robust.noised", False, "must be true"),
    (f"{EXPERIMENT}.classifiers.judge.class_map", {"a": 1}, "is for a pretrained classifier"),
    (
        f"{EXPERIMENT}.classifiers.judge",
        {"pretrained": "timm:x", "class_map": {"baseball": 429, "soccer": "ball"}},
        "=.class_map: needs exactly the keys baseball, basketball, soccer, the data set's classes",
    ),
    (f"{EXPERIMENT}.classifiers.judge.architecture", "../x", "'../x' is no torchvision model name"),
    (f"{EXPERIMENT}.dataset.classes", ["baseball", "tennis"], "'tennis' is no SportBalls class; allowed: baseball, "),
    (f"{EXPERIMENT}.dataset.classes", ["soccer", "soccer"], "a class is listed twice"),
    (f"{EXPERIMENT}.dataset.diameter", [0.9, 0.1], "two shares of the canvas"),
    (f"{EXPERIMENT}.dataset.image_size", 26, "26 cannot be halved 2 times"),
    (f"{EXPERIMENT}.dataset.name", "../data", "string should match pattern"),
    (f"{EXPERIMENT}.target", "tennis", "'tennis' is no class of the data set; allowed: baseball, basketball, soccer"),
    (f"{EXPERIMENT}.device", "tpu", "'tpu' is no device; allowed: auto, cpu, cuda, cuda:N, mps"),
    (f"{EXPERIMENT}.precision", "fp8", "input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'fp8'"),
    (f"{EXPERIMENT}.sampling.start", "zero", "input should be 'standard_normal' or 'data_mean', got 'zero'"),
    (f"{EXPERIMENT}.sweep.nope", [1], "unknown method; allowed: unconditional, robust, "),
    (f"{EXPERIMENT}.objectives", GRID | {"method": "nope"}, "=.method: unknown method; allowed: unconditional, "),
    (f"{EXPERIMENT}.objectives", GRID | {"method": "unconditional"}, "=.method: unconditional guides nothing"),
    (f"{EXPERIMENT}.objectives", GRID | {"predicts": ["noise"]}, "=.predicts.0: input should be 'sample', 'epsilon', "),
    (f"{EXPERIMENT}.objectives", GRID | {"weightings": ["vlb", "vlb"]}, "=.weightings: an entry is listed twice"),
    (f"{EXPERIMENT}.likelihood.num_steps", 0, "=: input should be greater than 0, got 0"),
    (f"{EXPERIMENT}.explain.methods.counterfactual.kind", "other", "input should be 'counterfactual', "),
    (f"{EXPERIMENT}.explain.methods.counterfactual.tau", 2, "input should be less than or equal to 1, got 2"),
    (f"{EXPERIMENT}.explain.methods.counterfactual.weight", -1.0, "-1.0 drives away, which pull proximal"),
    (f"{EXPERIMENT}.explain.methods.counterfactual", ATTACK, "=.search: an adversarial example has neither tau nor"),
    (f"{EXPERIMENT}.explain.pairs", [["soccer", "tennis"]], "'tennis' is no class of the data set"),
    (f"{EXPERIMENT}.explain.pairs", [["soccer", "soccer"]], "soccer is aimed at itself"),
    ("densities.names", ["moons"], "=.0: input should be 'eight_gaussians', 'checkerboard' or 'two_moons'"),
    (f"{EXPERIMENT}.sweep.robust", ["a"], "=.0: input should be a valid number, got 'a'"),
    (f"{EXPERIMENT}.sweep.robust", [-1], "-1.0 is no guidance scale; a finite number >= 0 is allowed"),
    (f"{EXPERIMENT}.sweep.robust", [math.nan], "=.0: input should be a finite number, got nan"),
    (f"{EXPERIMENT}.sweep.robust", [1, 2, 1.0], "a scale is listed twice"),
    (f"{EXPERIMENT}.sweep.robust", 1, "input should be a valid list, got 1"),
    (f"{EXPERIMENT}.sweep", None, "should be a mapping, got None"),
    (f"{EXPERIMENT}.forward.stabilizers", [{"name": "adam"}], "=.0.beta1: missing; stabilizer 'adam' needs ["),
    (f"{EXPERIMENT}.forward.stabilizers", [{"name": "ema", "beta": 0.9}] * 2, "ema90 is listed twice"),
    ("methods.robust.stabilizer", {"name": "ema"}, "=.beta: missing; stabilizer 'ema' needs ['beta']"),
    ("methods.robust.stabilizer", {"name": "ema", "beta": 0.9, "eps": 0.1}, "=.eps: stabilizer 'ema' has no such key"),
    ("methods.robust.stabilizer", {"beta": 0.9}, "=.beta: stabilizer 'none' has no such key"),
    ("methods.robust.stabilizer", {"name": "ema", "beta": 1.0}, "=.beta: input should be less than 1, got 1.0"),
    ("methods.robust.stabilizer", {"name": "sgd"}, "=.name: 'sgd' is no stabilizer; allowed: none, ema, adam, "),
    ("methods.robust.stabilizer", {"name": "chain"}, "=.of: missing; stabilizer 'chain' needs ['of']"),
    (
        "methods.robust.stabilizer",
        {"name": "unit_norm", "arguments": {"a": 1}},
        "=.arguments: stabilizer 'unit_norm' has",
    ),
    (
        "methods.robust.stabilizer",
        {"name": "my.module:Mine", "beta": 0.9},
        "=.beta: stabilizer 'my.module:Mine' has no",
    ),
    ("methods.robust.scale_schedule", {"name": "linear", "low": 0.5}, "=.low: the schedule 'linear' has no such key"),
    ("methods.robust.scale_schedule", {"name": "interval", "low": 0.5, "high": 0.1}, "=.low: must not be larger than"),
    ("methods.robust.sampler", {"name": "dpmpp", "eta": 1}, "=.eta: the sampler 'dpmpp' has no such key; ddim has"),
    (
        "methods.robust.sampler",
        {"steps": 0},
        "=.steps: 0 is not allowed; a whole number >= 1 or a share between 0 and 1 is",
    ),
    ("methods.robust.grad_mode", "checkpoint", "is about the U-Net"),
    ("methods.unconditional", {"input": "x_t"}, "=.input: guides nothing without a classifier"),
    ("methods.unconditional", {"stabilizer": {"name": "ema", "beta": 0.9}}, "=.stabilizer: guides nothing without"),
    ("methods.robust.skip_above", 1.5, "input should be less than or equal to 1, got 1.5"),
    (f"{EXPERIMENT}.sampling.batch_size", "all", "'all' is not allowed; auto or a whole number >= 1 is"),
    ("methods.robust.classifier", "judge", "input should be 'robust' or 'non_robust', got 'judge'"),
    ("methods.robust", None, "should be a mapping, got None"),
    ("experiments.a b", {}, "string should match pattern"),
    ("experiments.report", {}, "the name of a rule of the workflow"),
    ("experiments", {}, "missing, empty or no mapping"),
    ("methods", [1], "missing, empty or no mapping"),
    # In the defaults: reported there, not for the first experiment that inherits it.
    ("defaults.target", "tennis", "'tennis' is no class of the data set"),
    ("defaults.device", "tpu", "'tpu' is no device"),
    ("defaults.classifiers.robust.batch_norm_momentum", 0, "input should be greater than 0"),
    ("defaults.sweep.robust_x0", [-1], "-1.0 is no guidance scale"),
]


@pytest.mark.parametrize(("key", "value", "text"), MISTAKES)
def test_a_mistake_is_refused_in_one_line_that_names_the_key(key, value, text):
    raw = with_entry(key, value)
    if key == "defaults.sweep.robust_x0":
        del raw["experiments"]["quickstart"]["sweep"]["robust_x0"]
    expected = f"{key}{text.removeprefix('=')}" if text.startswith("=") else f"{key}: {text}"
    assert refusal(raw).startswith(expected)


def own(kind: str, **changes: object) -> dict:
    """config.yaml with an experiment `own` on a data set of some source."""
    return with_entry(OWN, {"name": "own"} | SOURCES[kind] | changes)


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_of_images_needs_few_keys(source):
    raw = own(source)
    assert config.parse(raw).experiments["own"].dataset.source == source
    assert jsonschema.Draft202012Validator(config.json_schema()).is_valid(raw)


@pytest.mark.parametrize(
    ("source", "changes", "text"),
    [
        (
            "folder",
            {"source": "tar"},
            ".source: 'tar' is no source of images; allowed: sportballs, digits, celeba, huggingface, f",
        ),
        (
            "folder",
            {"diameter": [0.1, 0.2]},
            ".diameter: unknown key; allowed here: classes, image_column, image_size, ",
        ),
        ("celeba", {"seed": 1}, ".seed: unknown key; allowed here: attribute, classes, download, image_size, "),
        ("celeba", {"classes": ["baseball", "b", "c"]}, ".classes: list should have at most 2 items"),
        ("celeba", {"preprocessing": "crop"}, ".preprocessing: input should be 'squash' or 'center_crop', got 'crop'"),
        (
            "huggingface",
            {"classes": ["baseball", 1]},
            ".classes.1: input should be a valid string, got 1 (put it in quotes)",
        ),
        ("huggingface", {"val_share": 1.0}, ".val_share: input should be less than 1, got 1.0"),
        ("folder", {"max_unreadable": 2}, ".max_unreadable: input should be less than or equal to 1"),
        ("folder", {"num_train": 0}, ".num_train: input should be greater than 0, got 0"),
        ("folder", {"classes": ["baseball", "baseball"]}, ".classes: a class is listed twice"),
    ],
)
def test_a_mistake_in_a_source_is_refused_in_one_line_that_names_the_key(source, changes, text):
    assert refusal(own(source, **changes)).startswith(f"{OWN}{text}")


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_names_the_key_that_is_missing(source):
    needed = {"sportballs": "diameter", "celeba": "attribute", "huggingface": "path", "folder": "path"}[source]
    raw = own(source)
    del raw["experiments"]["own"]["dataset"][needed]
    assert refusal(raw) == f"{OWN}.{needed}: missing; give it here or in defaults"


def test_a_data_set_without_a_source_is_told_which_there_are():
    assert refusal(with_entry(OWN, {"name": "own"})) == (
        f"{OWN}.source: missing; allowed: sportballs, digits, celeba, huggingface, folder"
    )
    assert refusal(with_entry(OWN, None)) == f"{OWN}: should be a mapping, got None"


def test_who_fetched_the_images_does_not_matter():
    steps = [
        config.step_settings(config.parse(own("celeba", download=download)), "own", "dataset")
        for download in (True, False)
    ]
    assert steps[0].fingerprint() == steps[1].fingerprint()


def test_a_key_that_is_nowhere_is_asked_for():
    raw = copy.deepcopy(RAW)
    del raw["defaults"]["sampling"]["seed"]
    assert "sampling.seed: missing; give it here or in defaults" in refusal(raw)


def test_an_experiment_without_any_scale_is_refused():
    raw = with_entry(f"{EXPERIMENT}.sweep", {method: [] for method in RAW["methods"]})
    assert refusal(raw) == f"{EXPERIMENT}.sweep: no method has a scale; give at least one"


def test_experiments_share_a_data_set_only_with_equal_settings():
    name = RAW["experiments"]["quickstart"]["dataset"]["name"]
    shared = {key: RAW["experiments"]["quickstart"][key] for key in ("dataset", "ddpm")}
    same = with_entry("experiments.other", shared)
    assert config.dataset_owner(config.parse(same), name) == "quickstart"
    other = RAW["experiments"]["quickstart"]["dataset"] | {"seed": 5}
    message = refusal(with_entry("experiments.other", shared | {"dataset": other}))
    assert message.startswith(f"experiments.other.dataset.name: '{name}' is also the data set of quickstart, with")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", ", line 2: no valid YAML: the key 'a' stands twice"),
        ("a: {b: 1, c: 2, b: 3}\n", ", line 1: no valid YAML: the key 'b' stands twice"),
        ("a: [\n", ", line 2: no valid YAML: "),
        ("? [a]\n: 1\n", ", line 1: no valid YAML: a key is no plain text"),
        ("a: 2024-13-45\n", ": no valid YAML: month must be in 1..12"),
        ("a: \0\n", ": no valid YAML: "),
        ("a: !!python/object:os.system {}\n", ", line 1: no valid YAML: "),
        ("- 1\n", ": holds no mapping; expected the keys defaults, methods, experiments"),
        ("", ": holds no mapping; expected the keys defaults, methods, experiments"),
        ("defaults: &a {b: *a}\n", ", line 1: no valid YAML: found unconstructable recursive node"),
        ("defaults: {a: &a [*a]}\n", ": Circular reference detected"),
        (None, ": no such config file; give its path by --config"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_merge_keys_of_yaml_are_no_duplicates(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\n")
    assert config.read_yaml(path)["d"] == {"b": 3, "c": 2}


def test_an_unknown_experiment_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"experiment 'nope' is unknown; allowed: quickstart, "):
        config.get_experiment(CONFIG, "nope")


@pytest.mark.parametrize(("step", "part"), [("train_classifier", "gan"), ("train_classifier", None), ("sample", "gan")])
def test_an_unknown_part_of_a_step_is_refused(step, part):
    with pytest.raises(ConfigError, match="is unknown; allowed: "):
        config.step_settings(CONFIG, "quickstart", step, part)


# --- What ships -------------------------------------------------------------------------------------------------


def test_the_published_settings():
    """Section 3 of the paper."""
    published = CONFIG.experiments["sportballs"]
    ddpm = published.ddpm
    assert ddpm.schedule.model_dump() == {
        "num_train_timesteps": 400,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
    }
    assert ddpm.schedule.num_train_timesteps == PUBLISHED_STEPS
    assert ddpm.unet.block_out_channels == [64, 128, 192, 256]
    assert ddpm.unet.attention == [False, True, True, True]
    assert ddpm.unet.layers_per_block == 2
    assert (ddpm.epochs, ddpm.batch_size) == (1000, 128)
    assert (ddpm.optimizer.learning_rate, ddpm.optimizer.warmup_steps, ddpm.optimizer.grad_clip) == (1e-4, 500, 1.0)
    for role in ("non_robust", "robust"):
        classifier = getattr(published.classifiers, role)
        assert (classifier.architecture, classifier.epochs, classifier.batch_size) == ("mobilenet_v3_small", 20, 128)
        assert classifier.optimizer.learning_rate == 1e-4
    assert (published.dataset.image_size, published.dataset.num_train, published.dataset.num_val) == (64, 80000, 20000)
    assert published.dataset.classes == ["baseball", "basketball", "soccer"]
    assert published.target == "baseball"
    assert published.sampling.num_samples == 50176 == 49 * 1024
    assert published.sampling.start == "standard_normal"
    assert 15 in published.sweep["non_robust_x0_ema99"]  # table 2's
    smoothing = [entry.model_dump(exclude_none=True) for entry in published.forward.stabilizers]
    assert smoothing == [
        {"name": "ema", "beta": 0.9},
        {"name": "ema", "beta": 0.99},
        {"name": "adam", "beta1": 0.9, "beta2": 0.999, "eps": 1e-4},
    ]


@pytest.mark.parametrize(
    ("name", "image_size", "num_samples", "scale"), [("celeba", 64, 50176, 150), ("celebahq", 256, 1024, 10)]
)
def test_the_published_settings_on_faces(name, image_size, num_samples, scale):
    """Section 3 of the paper, tables 1 and 3."""
    published, balls = CONFIG.experiments[name], CONFIG.experiments["sportballs"]
    assert (published.target, published.dataset.classes) == ("female", ["female", "male"])
    assert (published.dataset.image_size, published.sampling.num_samples) == (image_size, num_samples)
    assert published.dataset.num_train is None and published.dataset.num_val is None
    assert published.sampling.start == "standard_normal"
    assert published.classifiers == balls.classifiers
    assert scale in published.sweep["non_robust_x0_ema99"] and published.sweep["unconditional"] == [0]
    if name == "celeba":
        assert published.ddpm == balls.ddpm
        assert published.dataset.preprocessing == "squash"
        assert set(published.sweep) == set(CONFIG.methods) - {"non_robust_x0_ema99_fast"}
        assert max(published.sweep["non_robust_x0"]) > 500  # where the FID grows again, section 3.3
    else:
        schedule = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
        assert published.ddpm.pretrained == "google/ddpm-celebahq-256"
        assert published.ddpm.schedule.model_dump() == schedule  # google/ddpm-celebahq-256's


def test_a_preset_is_what_it_sets_and_is_overruled_by_the_methods_own_keys():
    fast = CONFIG.methods["non_robust_x0_ema99_fast"]
    assert (fast.skip_above, fast.sampler.name, fast.sampler.steps) == (0.9, "ddpm", 0.5)
    assert [fast.sampler.count(steps) for steps in (400, 25, 1)] == [200, 12, 1]
    own = config.MethodConfig(preset="fast", classifier="robust", skip_above=1.0, sampler={"name": "ddim", "steps": 7})
    assert (own.skip_above, own.sampler.name, own.sampler.count(400)) == (1.0, "ddim", 7)
    unguided = config.MethodConfig(preset="fast")
    assert (unguided.skip_above, unguided.sampler.count(400)) == (1.0, 200)
    assert config.MethodConfig().sampler.count(400) is None


def test_the_methods_that_ship():
    found = {
        name: (method.classifier, method.input, config.stabilizer_name(method.stabilizer))
        for name, method in CONFIG.methods.items()
    }
    assert found == {
        "unconditional": (None, "pred_x0", "none"),
        "robust": ("robust", "x_t", "none"),
        "robust_x0": ("robust", "pred_x0", "none"),
        "non_robust": ("non_robust", "x_t", "none"),
        "non_robust_x0": ("non_robust", "pred_x0", "none"),
        "non_robust_x0_ema90": ("non_robust", "pred_x0", "ema90"),
        "non_robust_x0_ema99_fast": ("non_robust", "pred_x0", "ema99"),
        "non_robust_x0_ema99": ("non_robust", "pred_x0", "ema99"),
        "non_robust_x0_adam": ("non_robust", "pred_x0", "adam"),
    }
    assert CONFIG.methods["non_robust_x0_adam"].stabilizer.eps == 1e-4


@pytest.mark.parametrize("name", CONFIG.experiments)
def test_every_experiment_keeps_the_published_end_of_the_schedule(name):
    """abar_T = 0.0175 at any T: it bounds by how much eq. 5 amplifies the gradient. Tolerance: betas are rounded."""
    schedule = CONFIG.experiments[name].ddpm.schedule
    if schedule.num_train_timesteps == 1000:
        pytest.skip("a pretrained model with its own schedule")
    abar = 1.0
    for t in range(schedule.num_train_timesteps):
        share = t / (schedule.num_train_timesteps - 1)
        abar *= 1 - (schedule.beta_start + share * (schedule.beta_end - schedule.beta_start))
    assert abar == pytest.approx(0.0175, abs=0.003)


@pytest.mark.parametrize("name", CONFIG.experiments)
def test_the_judge_is_independent_of_the_guides(name):
    classifiers = CONFIG.experiments[name].classifiers
    for guide in (classifiers.robust, classifiers.non_robust):
        assert classifiers.judge.architecture != guide.architecture
        assert classifiers.judge.seed != guide.seed


def test_the_classes_of_sportballs_are_the_generators():
    from nrcg.data import sportballs

    allowed = refusal(with_entry(f"{EXPERIMENT}.dataset.classes", ["a", "b"])).split("allowed: ")[1].split(" (and")[0]
    assert allowed == ", ".join(sportballs.CLASSES)


# --- The schema -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*UNKNOWN_KEYS, f"{EXPERIMENT}.ddpm.epochs"])
def test_the_schema_marks_mistakes_too(key):
    raw = with_entry(key, "x")
    assert not jsonschema.Draft202012Validator(config.json_schema()).is_valid(raw)


def test_every_key_of_the_schema_that_holds_a_value_says_what_it_is():
    def undescribed(model: type, prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = [model for model in models_in(field.annotation) if model is not StabilizerConfig]
            for below in inner:
                found += undescribed(below, f"{prefix}{name}.")
            if not inner and field.description is None:
                found.append(f"{prefix}{name}")
        return found

    assert undescribed(config.ExperimentConfig, "") == []


def test_objectives_that_are_one_training_are_listed_once():
    """By their weights: the same network output, weighted alike at every t."""
    grid, schedule = config.ObjectivesConfig.model_validate(GRID), Schedule.linear(9, 0.01, 0.5)
    every = {(p, w): config.ObjectiveConfig(predicts=p, weighting=w) for p in grid.predicts for w in grid.weightings}

    def training(objective):
        weights = loss_weights(objective, schedule)
        weights = [1.0] * 10 if weights is None else weights.tolist()
        return NATIVE[objective.predicts], *(round(weight, 4) for weight in weights[1:])

    assert {training(one) for one in grid.cells.values()} == {training(one) for one in every.values()}
    assert len(grid.cells) == len({training(one) for one in every.values()}) == 19
    assert list(config.ObjectivesConfig.model_validate(GRID | {"predicts": ["score"]}).cells) == [
        f"score-{weighting}" for weighting in grid.weightings
    ]


# --- Steps ------------------------------------------------------------------------------------------------------

PARTS = {"train_classifier": "robust", "sample": "non_robust_x0_ema99", "evaluate": "non_robust_x0_ema99"}
PARTS |= {"objective": "epsilon-simple", "density": "two_moons"}
PARTS |= {"explain": "counterfactual", "evaluate_explanations": "counterfactual"}
REFERRING = {"reference", "evaluate", "objective", "evaluate_explanations"}
EXPLAINED = {"explain", "evaluate_explanations"}


def fingerprints(raw: dict) -> dict[str, str]:
    """Of each step of the quickstart, with a grid of objectives where it trains."""
    raw, steps = copy.deepcopy(raw), list(STEPS)
    if "pretrained" in raw["experiments"]["quickstart"]["ddpm"]:
        steps.remove("objective")
    else:
        raw["experiments"]["quickstart"].setdefault("objectives", GRID)
    parsed = config.parse(raw)
    return {step: config.step_settings(parsed, "quickstart", step, PARTS.get(step)).fingerprint() for step in steps}


@pytest.mark.parametrize(
    ("key", "value", "stale"),
    [
        ("device", "cpu", set()),
        ("sampling.batch_size", 7, set()),
        ("forward.batch_size", 7, set()),
        ("ddpm.checkpoint_minutes", 5, set()),
        ("ddpm.sample_every", 3, set()),
        ("ddpm.micro_batch_size", 3, set()),
        ("ddpm.num_processes", 2, set()),
        ("ddpm.pretrained", "some/model", {"train_ddpm"}),
        ("ddpm.schedule.beta_schedule", "scaled_linear", {"train_ddpm", "train_classifier"}),
        ("classifiers.robust.checkpoint_minutes", 3, set()),
        ("sampling.num_samples", 80, {"evaluate"}),
        ("sampling.shard_size", 32, {"sample", "evaluate"}),
        ("sampling.start", "standard_normal", {"sample", "evaluate", "objective"}),
        ("sweep.robust", [1, 2, 3], set()),
        ("sweep.non_robust_x0_ema99", [1, 2, 3], set()),
        ("description", "Other words.", set()),
        ("target", "soccer", {"forward", "sample", "reference", "evaluate", "objective"} | EXPLAINED),
        ("evaluation.best_by", "fid", set()),
        (
            "evaluation.features",
            ["judge", "torcheval"],
            REFERRING,
        ),
        ("precision", "float32", set(STEPS) - {"dataset", "reference", "density", "report"}),
        ("dataset.seed", 5, {"dataset"}),
        ("dataset.num_train", 5000, {"dataset"}),
        ("ddpm.optimizer.learning_rate", 1e-3, {"train_ddpm"}),
        ("ddpm.schedule.beta_end", 0.07, {"train_ddpm", "train_classifier"}),
        ("classifiers.robust.epochs", 2, {"train_classifier"}),
        ("classifiers.judge.epochs", 3, set()),
        ("forward.num_images", 5, {"forward", "objective"}),
        ("evaluation.num_reference", 50, REFERRING),
        ("likelihood.num_images", 5, {"objective"}),
        ("likelihood.batch_size", 5, set()),
        ("likelihood.seed", 5, {"likelihood", "objective"}),
        ("objectives", GRID | {"weightings": ["simple"]}, set()),
        ("objectives", GRID | {"scales": [7]}, {"objective"}),
        ("explain.methods.prototype.scale", 5.0, set()),
        ("explain.methods.counterfactual.scale", 5.0, EXPLAINED),
        ("explain.batch_size", 3, set()),
        ("explain.bits", True, {"evaluate_explanations"}),
        ("explain.num_images", 9, EXPLAINED),
    ],
)
def test_a_setting_makes_stale_exactly_the_steps_that_read_it(key, value, stale):
    """Data and models reach later steps as files, not as settings; the report reads all that shaped its results."""
    before, after = fingerprints(RAW), fingerprints(with_entry(f"{EXPERIMENT}.{key}", value))
    changed = {step for step in after if before[step] != after[step]}
    assert changed - {"report"} == stale


@pytest.mark.parametrize(
    ("key", "value", "stale"),
    [
        ("ddpm.epochs", 3, False),
        ("ddpm.unet.dropout", 0.1, False),
        ("precision", "float32", False),
        ("ddpm.schedule.num_train_timesteps", 7, True),
        ("ddpm.pretrained", "another/model", True),
        ("ddpm.pretrained", None, True),
    ],
)
def test_a_pretrained_model_depends_on_no_key_of_the_training(key, value, stale):
    raw = with_entry(f"{EXPERIMENT}.ddpm.pretrained", "some/model")
    before = config.step_settings(config.parse(raw), "quickstart", "train_ddpm").fingerprint()
    *path, last = key.split(".")
    section = raw["experiments"]["quickstart"]
    for part in path:
        section = section.setdefault(part, {})
    section[last] = value
    after = config.step_settings(config.parse(raw), "quickstart", "train_ddpm").fingerprint()
    assert (before != after) == stale


@pytest.mark.parametrize(
    ("key", "value", "stale"),
    [
        ("epochs", 7, False),
        ("architecture", "resnet18", False),
        ("pretrained", "timm:y", True),
        ("class_map", "map", True),
    ],
)
def test_a_pretrained_classifier_depends_on_no_key_of_the_training(key, value, stale):
    def fingerprint(**changes):
        block = {**RAW["experiments"]["quickstart"]["classifiers"]["judge"], "pretrained": "timm:x", **changes}
        parsed = config.parse(with_entry(f"{EXPERIMENT}.classifiers.judge", block))
        return config.step_settings(parsed, "quickstart", "train_classifier", "judge").fingerprint()

    if value == "map":
        value = {"baseball": 429, "basketball": 430, "soccer": 805}
    assert (fingerprint(**{key: value}) != fingerprint()) is stale


def test_a_pretrained_model_brings_its_own_unet():
    raw = with_entry(f"{EXPERIMENT}.dataset.image_size", 26)  # halves once, the U-Net's levels want twice
    with pytest.raises(ConfigError, match="cannot be halved 2 times"):
        config.parse(raw)
    raw["experiments"]["quickstart"]["ddpm"]["pretrained"] = "some/model"
    assert config.parse(raw).experiments["quickstart"].dataset.image_size == 26


def test_a_methods_change_reaches_its_own_jobs_alone():
    changed = config.parse(with_entry("methods.robust.stabilizer", {"name": "ema", "beta": 0.9}))
    for method in CONFIG.methods:
        pair = [config.step_settings(c, "quickstart", "sample", method).fingerprint() for c in (CONFIG, changed)]
        assert (pair[0] != pair[1]) == (method == "robust")


def test_the_order_of_keys_does_not_matter():
    def backwards(value):
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(value)}
        return value

    assert fingerprints(backwards(RAW)) == fingerprints(RAW)


def test_whole_and_decimal_numbers_are_the_same_setting():
    assert fingerprints(with_entry(f"{EXPERIMENT}.ddpm.optimizer.grad_clip", 1)) == fingerprints(RAW)


@pytest.mark.parametrize("step", STEPS)
def test_settings_files_round_trip(tmp_path, step):
    part, name = PARTS.get(step), "objectives" if step == "objective" else "quickstart"
    path = config.write_step_settings(CONFIG, name, step, part, tmp_path)
    expected = config.step_settings(CONFIG, name, step, part)
    assert config.read_step_settings(path, step) == expected
    assert expected.fingerprint() in Path(path).name
    assert config.read_step_settings(ROOT / "config.yaml", step, name, part) == expected


def test_a_settings_file_is_written_once(tmp_path):
    first = config.write_step_settings(CONFIG, "quickstart", "forward", folder=tmp_path)
    before = Path(first).stat().st_mtime_ns
    assert config.write_step_settings(CONFIG, "quickstart", "forward", folder=tmp_path) == first
    assert Path(first).stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.rglob("*.json")] == [Path(first).name]


def test_a_settings_file_of_another_step_or_cut_off_is_refused(tmp_path):
    path = Path(config.write_step_settings(CONFIG, "quickstart", "forward", folder=tmp_path))
    with pytest.raises(ConfigError, match="holds the settings of the step 'forward', not of 'sample'"):
        config.read_step_settings(path, "sample")
    cut = tmp_path / "cut.json"
    cut.write_text(path.read_text()[:-30])
    with pytest.raises(ConfigError, match=r"cut\.json"):
        config.read_step_settings(cut, "forward")
    cut.write_text(path.read_text().replace('"num_images"', '"num_imgs"'))
    with pytest.raises(ConfigError, match=r"cut\.json: forward.*missing|cut\.json: .*unknown key"):
        config.read_step_settings(cut, "forward")


def test_a_whole_config_needs_the_experiments_name():
    with pytest.raises(ConfigError, match="name one by --experiment: quickstart"):
        config.read_step_settings(ROOT / "config.yaml", "forward")


def test_every_classifier_has_its_own_seed_and_role():
    for name in CONFIG.experiments:
        steps = [config.step_settings(CONFIG, name, "train_classifier", role) for role in ROLES]
        assert [step.role for step in steps] == list(ROLES)
        assert len({step.classifier.seed for step in steps}) == len(ROLES)


# --- Small functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "steps", "expected"), [(0.99, 400, 0.99), (0.99, 100, 0.96059601), (0.9, 800, 0.9**0.5), (0.0, 100, 0.0)]
)
def test_scaled_beta(beta, steps, expected):
    assert scaled_beta(beta, steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "none"),
        ({"name": "ema", "beta": 0.9}, "ema90"),
        ({"name": "ema", "beta": 0.99}, "ema99"),
        ({"name": "ema", "beta": 0.995}, "ema995"),
        ({"name": "adam", "beta1": 0.9, "beta2": 0.999, "eps": 1e-4}, "adam"),
    ],
)
def test_stabilizer_name(settings, name):
    assert config.stabilizer_name(StabilizerConfig(**settings)) == name


@pytest.mark.parametrize(
    ("scale", "text"),
    [(10.0, "10"), (0.5, "0.5"), (0, "0"), (1e-5, "1e-05"), (1e7, "1e+07"), (1.23456789, "1.23456789"), (150.0, "150")],
)
def test_format_scale(scale, text):
    assert format_scale(scale) == text
    assert float(text) == scale
    assert re.fullmatch(r"[0-9.e+-]+", text)  # the workflow's wildcard


@pytest.mark.parametrize(
    "sampler, expected",
    [({}, 50), ({"steps": 10}, 10), ({"steps": 0.5}, 25), ({"name": "heun", "steps": 10}, 19), ({"steps": 900}, 50)],
)
def test_heun_asks_the_network_twice_a_step(sampler, expected):
    """What a plan counts; the last of Heun's steps is one of Euler."""
    assert SamplerConfig(**sampler).evaluations(50) == expected

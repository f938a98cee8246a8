"""Toy models whose answers are known: analytic diffusion models, a tiny U-Net, tiny classifiers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nrcg import config
from nrcg.classifiers.architectures import SmallCNN
from nrcg.classifiers.logits import class_log_prob
from nrcg.classifiers.storage import save_classifier
from nrcg.data.sportballs import write_sportballs
from nrcg.diffusion.schedule import Schedule
from nrcg.guidance.guidance import ClassifierGuidance, GuidedStep, PredictNoise
from nrcg.guidance.samplers import DDPM
from nrcg.guidance.sampling import guided_sample

ROOT = Path(__file__).parents[1]
TINY_STEPS = 6
TINY_SIZE = 8
BALLS = ["baseball", "basketball", "soccer"]


def vp_schedule(num_steps: int) -> Schedule:
    """The variance-preserving SDE's betas (0.1 .. 20) / T: abar_T is near 4e-5 at any T, so x_T is N(0, I)."""
    return Schedule.linear(num_steps, 0.1 / num_steps, 20.0 / num_steps)


class TwoGaussians:
    """Data p(x_0) = 1/2 N(centre, std^2) + 1/2 N(-centre, std^2), each pixel by itself; class 1 is the mean +centre.

    Its noise prediction and its class probabilities are exact at every t. centre = 0 leaves one Gaussian.
    """

    def __init__(self, schedule: Schedule, centre: float, std: float):
        self.schedule, self.centre, self.std = schedule, centre, std

    def marginal(self, t: int) -> tuple[float, float]:
        """Centre and variance of the components of p(x_t)."""
        abar = float(self.schedule.abar[t])
        return math.sqrt(abar) * self.centre, abar * self.std**2 + 1.0 - abar

    def logit(self, x: Tensor, t: int) -> Tensor:
        """log p(class 1 | x_t) - log p(class 0 | x_t), shaped like x."""
        centre, variance = self.marginal(t)
        return 2.0 * centre / variance * x

    def predict_noise(self, x: Tensor, t: int) -> Tensor:
        """eps = -sqrt(1 - abar_t) * score(x_t)."""
        centre, variance = self.marginal(t)
        score = (centre * torch.tanh(self.logit(x, t) / 2) - x) / variance
        return -math.sqrt(1.0 - float(self.schedule.abar[t])) * score


class ClassOfTwoGaussians(nn.Module):
    """The exact noise-aware classifier of `TwoGaussians` for images of one pixel: (B, 1, 1, 1) to one logit."""

    def __init__(self, data: TwoGaussians):
        super().__init__()
        self.data, self.t = data, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.data.logit(x, self.t).flatten(1)


class TimeAwareGuidance(ClassifierGuidance):
    """Guidance that tells its classifier the step: classifiers of the package see the image alone."""

    def gradient(self, x_t: Tensor, t: int, predict_noise: PredictNoise, schedule: Schedule) -> GuidedStep:
        self.classifier.t = t
        return super().gradient(x_t, t, predict_noise, schedule)


def ddpm_sample(
    x: Tensor,
    predict_noise: PredictNoise,
    schedule: Schedule,
    *,
    seed: int,
    samples: Sequence[int],
    guidance: ClassifierGuidance | None = None,
    clip_pred_x0: bool = True,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: ancestral sampling over all steps."""
    timesteps = range(schedule.num_steps, 0, -1)
    sampler = DDPM(schedule, clip_pred_x0)
    return guided_sample(x, predict_noise, sampler, timesteps, seed=seed, samples=samples, guidance=guidance)


class LinearClassifier(nn.Module):
    """logits = W x, W (K, C * H * W)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


class SmoothCNN(nn.Module):
    """A small smooth network, for finite differences: no kinks, batch norm only in eval mode."""

    def __init__(self, num_classes: int, channels: int = 3, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 4, num_classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter))
            self.norm.running_mean.uniform_(-0.5, 0.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1))


def smooth_noise_predictor(channels: int = 3, seed: int = 1) -> PredictNoise:
    """eps_theta of a small smooth convolution in float64 that depends on t."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, channels, 3, padding=1).double().requires_grad_(False)

    def predict_noise(x: Tensor, t: int) -> Tensor:
        return torch.tanh(conv(x) + 0.1 * t)

    return predict_noise


def log_prob(classifier: nn.Module, x: Tensor, target: int) -> Tensor:
    """(B,) log p(target | x), without a gradient."""
    with torch.no_grad():
        return class_log_prob(classifier(x), target)


def track_without_a_store(monkeypatch, folder: Path) -> None:
    """What is logged stays in the journals of `folder`: no server is at this address."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("NRCG_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")


def logged_inputs(folder: Path) -> list[tuple[str, ...]]:
    """(data set, what it is for) and (model,) of the one run in the journals of `folder`, in their order."""
    (path,) = (folder / ".nrcg/tracking").glob("*.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    keys = {"dataset": ("name", "context"), "model": ("name",)}
    return [tuple(entry[key] for key in keys[entry["op"]]) for entry in entries if entry["op"] in keys]


def write_tiny_pipeline(folder: str | Path, channels: int = 3, seed: int = 0, **scheduler: object) -> Path:
    """A diffusers pipeline folder of an untrained U-Net of 8 x 8 pixels and 6 steps."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=TINY_SIZE,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    settings = {"num_train_timesteps": TINY_STEPS, "beta_start": 0.02, "beta_end": 0.8} | scheduler
    DDPMPipeline(unet, DDPMScheduler(**settings)).save_pretrained(folder)
    return Path(folder)


def write_tiny_classifier(folder: str | Path, seed: int = 0) -> Path:
    """A folder of an untrained classifier of balls, for images of 8 x 8 pixels."""
    torch.manual_seed(seed)
    about = {"architecture": "small_cnn", "classes": BALLS, "image_size": TINY_SIZE}
    save_classifier(folder, SmallCNN(len(BALLS)), about)
    return Path(folder)


def write_tiny_models(folder: Path) -> None:
    """`ddpm` and `classifiers/ROLE` in a folder, nothing trained."""
    write_tiny_pipeline(folder / "ddpm")
    for seed, role in enumerate(config.ROLES):
        write_tiny_classifier(folder / "classifiers" / role, seed)


def write_balls(folder: str | Path, num_train: int, num_val: int, image_size: int = 16, **changes: object) -> Path:
    """A small data set of balls."""
    settings = {"classes": BALLS, "diameter": (0.5, 0.9), "seed": 0, "workers": 1} | changes
    write_sportballs(folder, image_size=image_size, num_train=num_train, num_val=num_val, **settings)
    return Path(folder)


def toy_settings(**changes: object) -> dict:
    """config.yaml with tests/data/toy.yaml, and changes of its experiment `toy`, laid over it."""
    raw = config.merge(config.read_yaml(ROOT / "config.yaml"), config.read_yaml(ROOT / "tests/data/toy.yaml"))
    if {"pretrained", "init"} & set(changes.get("ddpm", {})):
        changes.setdefault("objectives", None)  # they are trained from random weights
    return config.merge(raw, {"experiments": {"toy": changes}})


TUNE = ("tune", "toy", "--method", "non_robust_x0_ema99", "--num-samples", "8", "--device", "cpu", "--threads", "1")
"""`nrcg tune` of the toy experiment."""


def write_toy_experiment(folder: Path) -> Path:
    """config.yaml, data/ and models/ of the experiment `toy`, nothing trained."""
    raw = toy_settings(sampling={"start": "standard_normal"})
    raw["experiments"] = {"toy": raw["experiments"]["toy"]}
    (folder / "config.yaml").write_text(json.dumps(raw))
    write_tiny_models(folder / "models" / "toy")
    write_balls(folder / "data" / "toyballs", 48, 16)
    return folder


def tiny_clip_tokenizer(folder: Path) -> tuple[object, dict[str, int]]:
    """A tokenizer of letters for texts of 16 tokens, and what a CLIPTextConfig must say of it."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return tokenizer, {"vocab_size": len(words), "max_position_embeddings": 16, **ends}

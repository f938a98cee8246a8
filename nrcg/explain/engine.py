"""Explanations of images: one engine, whose settings make the kinds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from nrcg.batching import BatchSize, first_batch, in_batches
from nrcg.config import PUBLISHED_STEPS, Compile
from nrcg.config.explaining import OWN_CLASS, ExplainSettings
from nrcg.data.arrays import to_uint8, to_unit
from nrcg.diffusion.noise import sample_noise, spawn_seed
from nrcg.errors import DataError
from nrcg.explain.adversarial import attack
from nrcg.explain.distances import load_distance
from nrcg.explain.explanations import Explanations, probabilities, runner_up
from nrcg.explain.guidance import ExplanationGuidance
from nrcg.explain.search import FARTHEST, bisect, middle_size, middle_step
from nrcg.guidance import stabilizers
from nrcg.guidance.chains import Chain
from nrcg.guidance.pipeline import GuidedDDPMPipeline
from nrcg.guidance.sampling import START_STREAM, start_samples
from nrcg.guidance.targets import class_of

SECOND_LEG = 1
"""Word of the seed of the way back from a counterfactual: its noise is not the way there's."""


def explain_images(
    pipe: GuidedDDPMPipeline,
    classifier: nn.Module,
    images: np.ndarray,
    target: str | int | Sequence[int] | None = None,
    settings: ExplainSettings | None = None,
    *,
    robust: nn.Module | None = None,
    samples: Sequence[int] | None = None,
    batch_size: BatchSize = "auto",
    precision: torch.dtype | str = torch.float32,
    compile: Compile = "off",
    on_step: Callable[[int], None] | None = None,
) -> Explanations:
    """Explanations of a classifier's decisions about images.

    Args:
        pipe: The diffusion model on its device; any sampler of `use_sampler`.
        classifier: The guide, whose decisions are explained: images in [-1, 1] to logits; moved to the pipe's device.
        images: (N, H, W, C) uint8, of the model's size and channels.
        target: Class by name or number, or each image's own, (N,). None: the runner-up of each image, and for a
            prototype the class that it has. `affirmative` and `semifactual` aim at the class that the image has; for
            affirmative the target is that of the counterfactual on the way.
        settings: `settings_of(kind, ...)`; None: a counterfactual's.
        robust: Robust classifier of the same classes, for the cone projection; None: none.
        samples: Each image's number, on which its noise depends; None: 0..N-1.
        batch_size, precision, compile: As of the pipeline's call. No explanation depends on the batch.
        on_step: Called with the number of steps done so far, of at most `work_of(settings, pipe)` an image.

    Raises:
        ValueError: A target, a classifier or a setting that does not fit.
        DataError: Images of another shape; one image alone does not fit into the memory.
    """
    settings = settings or ExplainSettings()
    if pipe.decoder() is not None:
        raise ValueError(f"explanations need a model of pixels; a {type(pipe).__name__} draws latents")
    channels, height, width = pipe.image_shape()
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, channels):
        raise DataError(
            f"images of shape {images.shape[1:]} and type {images.dtype}; the model's are uint8, {height} x {width} x"
            f" {channels}"
        )
    classifier.to(pipe.device)
    before = probabilities(classifier, images)
    own = before.argmax(axis=1)
    targets = _targets(classifier, target, before, settings.kind)
    skipped = (targets == own) & (settings.kind in ("counterfactual", "affirmative", "adversarial"))
    samples = range(len(images)) if samples is None else samples
    made = _Made.of(images)
    rows = np.flatnonzero(~skipped)
    if len(rows):
        numbers = [samples[row] for row in rows]
        engine = _Engine(pipe, classifier, robust, settings, batch_size, precision, compile, on_step)
        made.put(rows, engine.run(images[rows], targets[rows], own[rows], numbers))
    return Explanations(
        originals=images,
        images=made.images,
        starts=made.starts,
        targets=np.where(skipped, targets, own if settings.kind in OWN_CLASS else targets),
        before=before,
        after=probabilities(classifier, made.images),
        tau=made.tau,
        weight=made.weight,
        skipped=skipped,
        nonfinite=made.nonfinite,
        seconds=made.seconds,
        classes=getattr(classifier, "classes", None),
        kind=settings.kind,
    )


def work_of(settings: ExplainSettings, pipe: GuidedDDPMPipeline) -> int:
    """Steps that an image takes at most."""
    if settings.kind == "adversarial":
        return settings.attack_steps
    steps = len(_steps_of(settings, pipe))
    runs = 1 + (settings.rounds if settings.search != "none" else 0)
    return max(1, steps * runs * (2 if settings.kind == "affirmative" else 1))


def _steps_of(settings: ExplainSettings, pipe: GuidedDDPMPipeline) -> list[int]:
    """The steps from tau down, falling."""
    chain = _chain_of(settings, pipe)
    return chain.below(round(settings.tau * chain.schedule.num_steps))


def _chain_of(settings: ExplainSettings, pipe: GuidedDDPMPipeline) -> Chain:
    return pipe.chain(settings.num_inference_steps, settings.eta)


def aims_of(
    classifier: nn.Module, images: np.ndarray, target: str | int | Sequence[int] | None, kind: str
) -> np.ndarray:
    """(N,) int64 of what explanations of (N, H, W, C) uint8 images aim at; for `affirmative` the counterfactual's on
    the way. Errors as of `explain_images`, whose `target` it may be."""
    return _targets(classifier, target, probabilities(classifier, images), kind)


def _targets(
    classifier: nn.Module, target: str | int | Sequence[int] | None, before: np.ndarray, kind: str
) -> np.ndarray:
    classes = before.shape[1]
    if target is None:
        return before.argmax(axis=1) if kind in ("prototype", "semifactual") else runner_up(before)
    if isinstance(target, str) or np.ndim(target) == 0:
        target = [class_of(classifier, target)] * len(before)
    targets = np.asarray(target, np.int64)
    if targets.shape != (len(before),) or (len(targets) and not 0 <= targets.min() <= targets.max() < classes):
        raise ValueError(f"target: {len(before)} classes in 0..{classes - 1} are needed, one for each image")
    return targets


@dataclass
class _Made:
    """What was made of some images, by image."""

    images: np.ndarray
    starts: np.ndarray
    tau: np.ndarray
    weight: np.ndarray
    nonfinite: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> _Made:
        """Nothing yet: the images themselves."""
        zeros = np.zeros(len(images))
        return cls(images.copy(), images.copy(), zeros, zeros.copy(), zeros > 0, zeros.copy())

    def put(self, rows: np.ndarray, part: _Made) -> None:
        for name, values in vars(part).items():
            getattr(self, name)[rows] = values


@dataclass
class _Engine:
    """Makes explanations of images that are to be changed."""

    pipe: GuidedDDPMPipeline
    classifier: nn.Module
    robust: nn.Module | None
    settings: ExplainSettings
    batch_size: BatchSize
    precision: torch.dtype | str
    compile: Compile
    on_step: Callable[[int], None] | None
    done: int = field(default=0)

    def run(self, images: np.ndarray, targets: np.ndarray, own: np.ndarray, samples: list[int]) -> _Made:
        """Explanations of (n, H, W, C) images with their targets and own classes."""
        kind, seed = self.settings.kind, self.settings.seed
        if kind == "adversarial":
            return self._attack(images, targets)
        made = self._least(images, images, own if kind == "semifactual" else targets, samples, seed)
        if kind != "affirmative":
            return made
        back = self._least(made.images, images, own, samples, spawn_seed(seed, SECOND_LEG))
        back.seconds += made.seconds
        return replace(back, starts=made.images)

    def _attack(self, images: np.ndarray, targets: np.ndarray) -> _Made:
        began, made, settings = time.perf_counter(), _Made.of(images), self.settings
        x, aims = to_unit(images), torch.from_numpy(targets)

        def work(batch: range) -> Tensor:
            rows = slice(batch.start, batch.stop)
            part, aim = x[rows].to(self.pipe.device), aims[rows].to(self.pipe.device)
            found = attack(
                self.classifier,
                part,
                aim,
                method=settings.attack,
                budget=settings.budget,
                step=settings.attack_step,
                steps=settings.attack_steps,
                skip_above=settings.skip_above,
            )
            self._report(len(batch) * settings.attack_steps)
            return found.cpu()

        size = first_batch(self.batch_size, self.pipe.device, images[0, ..., 0].size)
        made.images[:] = to_uint8(torch.cat(in_batches(len(images), size, work)))
        made.seconds[:] = (time.perf_counter() - began) / len(images)
        return made

    def _least(
        self, starts: np.ndarray, originals: np.ndarray, targets: np.ndarray, samples: list[int], seed: int
    ) -> _Made:
        """One leg, at the settings' tau and weight or at the least change that succeeds."""
        made, settings = _Made.of(starts), self.settings
        steps = _steps_of(settings, self.pipe)[::-1]  # rising: place k - 1 holds the first step of k
        firsts, weights = np.full(len(starts), len(steps)), np.full(len(starts), float(settings.weight))
        tried = np.zeros(len(starts), bool)

        def try_(rows: np.ndarray, firsts: np.ndarray, weights: np.ndarray) -> np.ndarray:
            """Make some images anew; says which are of the class aimed at, and keeps those, or the first trial."""
            part = _Made.of(starts[rows])
            for first in np.unique(firsts):
                at = np.flatnonzero(firsts == first)
                where = rows[at]
                chosen = (starts[where], originals[where], targets[where], [samples[row] for row in where])
                part.put(at, self._draw(*chosen, steps[:first][::-1], weights[at], seed))
            probability, aims = probabilities(self.classifier, part.images), targets[rows]
            good = (probability.argmax(axis=1) == aims) & ~part.nonfinite
            good &= probability[np.arange(len(rows)), aims] >= settings.confidence
            keep = good | ~tried[rows]
            part.seconds += made.seconds[rows]
            made.put(rows[keep], _Made(**{name: values[keep] for name, values in vars(part).items()}))
            made.seconds[rows], tried[rows] = part.seconds, True
            return good

        rows = np.arange(len(starts))
        if settings.search == "tau" and len(steps):
            nothing = np.full(len(starts), len(self.pipe.timesteps(settings.num_inference_steps)) + 1)
            if settings.kind == "semifactual":  # the own class is kept at tau; how far does it go?
                steps = self.pipe.timesteps(settings.num_inference_steps)[::-1]
            near = nothing if settings.kind == "semifactual" else np.zeros(len(starts), int)
            bisect(near, firsts, lambda at, tried: try_(at, tried, weights[at]), middle_step, settings.rounds)
        elif settings.search == "weight" and len(steps):
            far = weights * FARTHEST
            bisect(far, weights, lambda at, tried: try_(at, firsts[at], tried), middle_size, settings.rounds)
        else:
            try_(rows, firsts, weights)
        return made

    def _draw(
        self,
        starts: np.ndarray,
        originals: np.ndarray,
        targets: np.ndarray,
        samples: list[int],
        timesteps: list[int],
        weights: np.ndarray,
        seed: int,
    ) -> _Made:
        """Guided sampling of images from the first of the timesteps down."""
        made, pipe, settings = _Made.of(starts), self.pipe, self.settings
        made.weight[:] = weights
        if not timesteps:
            return made
        chain, x = _chain_of(settings, pipe), to_unit(starts)
        schedule, timesteps = chain.schedule, chain.below(timesteps[0])
        if not timesteps:
            return made
        guidance = self._guidance(originals, targets, weights)

        def begin(places: Sequence[int]) -> Tensor:
            numbers = [samples[place] for place in places]
            if settings.start != "image":
                mean = pipe.start_mean(settings.start)
                start = start_samples(schedule, seed, numbers, x.shape[1:], pipe.device, mean, timesteps[0])
                return start if mean is not None else chain.start_scale * start
            noise = sample_noise(seed, numbers, START_STREAM, x.shape[1:], pipe.device)
            return schedule.q_sample(x[list(places)].to(pipe.device), timesteps[0], noise)

        before = self.done
        found = pipe.denoise(
            begin,
            samples,
            replace(chain, timesteps=timesteps),
            batch_size=self.batch_size,
            seed=seed,
            guidance=guidance,
            precision=self.precision,
            compile=self.compile,
            on_step=lambda steps: self._report(before + steps - self.done),
        )
        made.images[:] = to_uint8(found.samples)
        made.nonfinite[:] = found.nonfinite.numpy()
        made.tau[:] = timesteps[0] / schedule.num_steps
        made.seconds[:] = found.seconds / len(starts)
        return made

    def _guidance(self, originals: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> ExplanationGuidance:
        settings = self.settings
        spec = stabilizers.parse(settings.stabilizer)
        steps = len(self.pipe.timesteps(settings.num_inference_steps))
        steps = PUBLISHED_STEPS if settings.betas_per_step else steps
        names = ("scale", "input", "clip_pred_x0", "grad_mode", "every_k", "skip_above")
        return ExplanationGuidance(
            self.classifier,
            torch.from_numpy(targets),
            to_unit(originals),
            distance=load_distance(settings.distance, self.classifier),
            weight=torch.from_numpy(weights),
            pull=settings.pull,
            robust=self.robust,
            cone_angle=settings.cone_angle,
            normalize=settings.normalize,
            stabilizer=stabilizers.from_config(spec, steps),
            distance_stabilizer=stabilizers.from_config(spec, steps),
            joint=settings.joint,
            **{name: getattr(settings, name) for name in names},
        )

    def _report(self, steps: int) -> None:
        self.done += steps
        if self.on_step is not None:
            self.on_step(self.done)

"""What the workflow's jobs ask a scheduler for: GPUs, threads, memory and time, from measured jobs with a margin.

docs/scaling.md holds the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from nrcg.config import Config, ExperimentConfig
from nrcg.devices import count_nvidia_gpus, has_nvidia_gpu

SECONDS_PER_STEP = {"gpu": 1.25e-3, "cpu": 1.0}
"""Of a guided image of 64 x 64 pixels; grows with the pixels."""
CPU_MB_PER_IMAGE = 160
"""Activations of such an image in a batch."""
AUTO_IMAGES = 16
"""Images in a batch that memory is asked for where the batch size is `auto`, which takes what it finds free."""
SMALL_UNET = 32 * 32**2
"""Channels times pixels of a U-Net's first block: below it, two threads train 1.2 times as fast as one."""
GPU_JOB_MB = 6000
MOST_FEATURE_THREADS = 8


@dataclass(frozen=True)
class JobResources:
    """What the jobs of an experiment ask for.

    Args:
        config: The whole configuration.
        experiment: Name of the experiment.
        remote: Whether the jobs run on other machines, whose devices differ from this one's.
        cores: CPU cores of the workflow; None where it names none, as in a dry run.
    """

    config: Config
    experiment: str
    remote: bool = False
    cores: int | None = None

    @property
    def settings(self) -> ExperimentConfig:
        return self.config.experiments[self.experiment]

    @property
    def gpus(self) -> int:
        """1 where a job is to run on a GPU, else 0: on a CPU, jobs share the cores instead of waiting for each other.

        With `device: auto` this machine's devices decide, and 1 is asked of a cluster.
        """
        if self.settings.device == "auto":
            return int(self.remote or has_nvidia_gpu())
        return int(self.settings.device.startswith("cuda"))

    @property
    def training_gpus(self) -> int:
        """One for each process that trains the diffusion model; of `auto`, all there are. Snakemake lowers it to what
        --resources gpu=N allows."""
        ddpm = self.settings.ddpm
        if not self.gpus or ddpm.pretrained is not None or ":" in self.settings.device:
            return self.gpus
        return max(count_nvidia_gpus(), 1) if ddpm.num_processes == "auto" else ddpm.num_processes

    @property
    def training_threads(self) -> int:
        """Of the diffusion model's training. On a CPU a small U-Net gains little by a second one, and leaves the cores
        to the classifiers."""
        width = self.settings.ddpm.unet.block_out_channels[0]
        small = width * self.settings.dataset.image_size**2 < SMALL_UNET
        return 1 if small and not self.gpus else 16

    @property
    def feature_threads(self) -> int:
        """Beside a GPU, the resizing for Inception takes longer than the network: a GPU's share of the cores. On a CPU
        one, so that jobs share the cores."""
        if not self.gpus:
            return 1
        if self.remote:
            return MOST_FEATURE_THREADS
        return max(1, min(MOST_FEATURE_THREADS, (self.cores or 1) // max(count_nvidia_gpus(), 1)))

    def sample_minutes(self, method: str) -> int:
        """Of a shard."""
        num_steps = self.settings.ddpm.schedule.num_train_timesteps
        steps = self.config.methods[method].sampler.evaluations(num_steps)
        return self._minutes(self.settings.sampling.shard_size * steps)

    def forward_minutes(self) -> int:
        """Of the forward analysis: three gradients for each image and step."""
        return self._minutes(3 * self.settings.forward.num_images * self.settings.ddpm.schedule.num_train_timesteps)

    def likelihood_minutes(self) -> int:
        """Of a shard of the likelihood: a pass for each term, two gradients a step where the flow is measured too."""
        return self._minutes(self.settings.likelihood.shard_size * self._likelihood_passes)

    def objective_minutes(self) -> int:
        """Of one objective: its samples at each scale and without guidance, its likelihood and its gradients."""
        settings, num_steps = self.settings, self.settings.ddpm.schedule.num_train_timesteps
        config = settings.objectives
        samples = config.num_samples * (1 + len(config.scales)) + settings.forward.num_images
        return self._minutes(samples * num_steps + settings.likelihood.num_images * self._likelihood_passes)

    def explain_minutes(self) -> int:
        """Of a shard of explanations: both legs of an affirmative one, in each run."""
        config = self.settings.explain
        steps = 2 * self.settings.ddpm.schedule.num_train_timesteps * config.num_runs
        return self._minutes(min(config.shard_size, config.total_images) * steps)

    def guided_mb(self, section: str) -> int:
        """Memory of a job that takes gradients of the batches of `sampling`, `forward`, `likelihood` or `explain`."""
        if self.gpus:
            return GPU_JOB_MB
        batch = getattr(self.settings, section).batch_size
        images = AUTO_IMAGES if batch == "auto" else batch
        return 2000 + round(images * self._pixels * CPU_MB_PER_IMAGE)

    @property
    def _likelihood_passes(self) -> int:
        """Of an image."""
        config, num_steps = self.settings.likelihood, self.settings.ddpm.schedule.num_train_timesteps
        return (config.num_steps or num_steps) + 2 * num_steps * bool(config.num_traces)

    @property
    def _pixels(self) -> float:
        """Of an image, relative to 64 x 64."""
        return (self.settings.dataset.image_size / 64) ** 2

    def _minutes(self, image_steps: int) -> int:
        """Twice what some image steps take, and ten minutes to start."""
        return 10 + round(2 * image_steps * self._pixels * SECONDS_PER_STEP["gpu" if self.gpus else "cpu"] / 60)

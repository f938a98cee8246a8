"""The guidance that an experiment's method gets."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from toys import SmoothCNN

from nrcg import Classifier, config
from nrcg.steps.sample import method_guidance

CONFIG = config.load(Path(__file__).parents[2] / "config.yaml")


@pytest.mark.parametrize(
    ("name", "num_steps", "beta"), [("sportballs", 400, 0.99), ("celebahq", 1000, 0.99), ("quickstart", 50, 0.99**8)]
)
def test_ema_has_the_published_beta(name, num_steps, beta):
    """Tables 1 to 3: 0.99 per step at T = 400, and at T = 1000 too; the quickstart's window is the same share of T."""
    settings = config.step_settings(CONFIG, name, "sample", "non_robust_x0_ema99")
    assert CONFIG.experiments[name].ddpm.schedule.num_train_timesteps == num_steps
    classes = CONFIG.experiments[name].dataset.classes
    pipe = SimpleNamespace(timesteps=lambda steps: list(range(num_steps, 0, -1)), num_train_steps=num_steps)
    guidance = method_guidance(settings, Classifier(SmoothCNN(len(classes)), classes=classes), 10.0, pipe)
    assert guidance.stabilizer.beta == pytest.approx(beta, rel=1e-12)

"""What the process of a verb loads: nothing that its verb does not use, and everything else remains to be had."""

import os
import subprocess
import sys

import pytest

from nrcg.cli.steps import VERBS

HEAVY = ("torch", "transformers", "torchvision", "scipy", "torch._dynamo", "mlflow", "sklearn")
"""Each costs a process between half a second and four."""


def loaded(code: str, then: str = "") -> set[str]:
    """Those of HEAVY that a fresh process has loaded after some code; what it does then must succeed."""
    asked = f"{code}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))\n{then}"
    found = subprocess.run([sys.executable, "-c", f"import sys\n{asked}"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return set(found.stdout.split())


LEAN = """
import torch
disable = torch.compiler.disable
from nrcg.cli.imports import lean_imports
with lean_imports():
    import nrcg.training.export, nrcg.pipeline.timing, {steps}
assert torch.compiler.disable is disable
from diffusers import DDPMScheduler, UNet2DModel
blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks).eval()
nrcg.guidance.pipeline.GuidedDDPMPipeline(unet, DDPMScheduler(num_train_timesteps=2))(num_samples=1, batch_size=1)
from nrcg.classifiers.architectures import build_module
build_module("mobilenet_v3_small", 3, 0.1)
"""
# Models that were left out, the libraries, and torch's compiler, which gives what the U-Net gives without it.
AFTERWARDS = """
import scipy.stats, torchvision, transformers
boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, output_size=2).unique().tolist() == [1.0]
assert torchvision.ops.roi_align.__module__ and torchvision.ops.roi_align.__globals__["is_compile_supported"]("cpu")
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 5])
compiled = torch.compile(unet, backend="eager")
with torch.no_grad():
    torch.testing.assert_close(compiled(x, t).sample, unet(x, t).sample)
"""


def test_verbs_load_what_they_use_and_everything_can_be_imported_afterwards():
    steps = {verb.function.partition(".")[0] for verb in VERBS.values() if verb.compute}
    steps |= {"sample", "train_ddpm", "tune", "evaluate"}
    lean = LEAN.format(steps=", ".join(f"nrcg.steps.{name}" for name in sorted(steps)))
    assert loaded(lean, AFTERWARDS) == {"torch", "torchvision"}


def test_verbs_that_compute_nothing_load_no_torch():
    steps = {verb.function.partition(".")[0] for verb in VERBS.values() if not verb.compute} | {"collect", "compare"}
    assert len(steps) == 5
    code = "".join(f"import_step({step!r}, False); " for step in sorted(steps))
    assert loaded(f"from nrcg.cli.imports import import_step; {code}") == set()


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_a_verbs_threads_sleep_while_they_wait(given, found):
    """Or a neighbour on the same cores takes most of their speed. OpenMP reads it when torch loads."""
    code = "import os, sys; from nrcg.cli import main; main(['validate']); assert 'torch' not in sys.modules; "
    code += "print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.splitlines()[-1] == found

"""Latents and prompts: diffusers' own pipelines without guidance, hand-computed gradients through a decoder."""

import json
import math

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from toys import SmoothCNN, tiny_clip_tokenizer

import nrcg
from nrcg import EMA, ClassifierGuidance, GuidedDDPMPipeline, GuidedLDMPipeline, GuidedStableDiffusionPipeline
from nrcg.diffusion.noise import sample_noise
from nrcg.errors import DataError

BETAS = {"num_train_timesteps": 100, "beta_start": 0.00085, "beta_end": 0.06, "beta_schedule": "scaled_linear"}
LATENT = (4, 8, 8)
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "heun": lambda: HeunDiscreteScheduler(**BETAS),
    "unipc": lambda: UniPCMultistepScheduler(**BETAS),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=100),
}


def unet(channels=4, size=8):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def vq_model():
    torch.manual_seed(1)
    return VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
    ).eval()


def kl_model(latents=4):
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latents,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


@pytest.fixture
def ldm(tmp_path):
    """Folder of a latent diffusion model, by plain diffusers."""

    def build(vae=None, scheduler=None):
        LDMPipeline(vae or vq_model(), unet(), scheduler or SCHEDULERS["ddim"]()).save_pretrained(tmp_path / "ldm")
        return tmp_path / "ldm"

    return build


def start_by_hand(monkeypatch, module, count):
    """diffusers' pipeline starts from our noise."""
    noise = sample_noise(7, range(count), 0, LATENT)
    monkeypatch.setattr(f"{module.__module__}.randn_tensor", lambda *_, **__: noise.clone())


@pytest.mark.parametrize("vae", [vq_model, kl_model])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_latent_model_without_guidance_is_diffusers_own(monkeypatch, ldm, vae, name):
    folder = ldm(vae(), SCHEDULERS[name]())
    plain = LDMPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    start_by_hand(monkeypatch, LDMPipeline, 3)
    if name == "flow":  # LDMPipeline asks schedulers for what flow matching lacks
        monkeypatch.setattr(type(plain.scheduler), "init_noise_sigma", 1.0, raising=False)
        monkeypatch.setattr(type(plain.scheduler), "scale_model_input", lambda self, x, t: x, raising=False)
    expected = torch.from_numpy(plain(3, num_inference_steps=6, output_type="np").images).permute(0, 3, 1, 2)
    found = nrcg.load_pipeline(folder)(3, seed=7, num_inference_steps=6)
    assert isinstance(nrcg.load_pipeline(folder), GuidedLDMPipeline)
    assert found.samples.shape == (3, 3, 16, 16) and found.latents.shape == (3, *LATENT)
    torch.testing.assert_close((found.samples + 1) / 2, expected, rtol=0, atol=2e-4)


def test_samples_do_not_depend_on_the_batch(ldm):
    pipe = GuidedLDMPipeline.from_pretrained(ldm())
    guidance = ClassifierGuidance(SmoothCNN(3), 1, scale=3.0, stabilizer=EMA(0.9))
    whole = pipe(4, 4, seed=1, guidance=guidance, num_inference_steps=5)
    parts = pipe(4, 1, seed=1, guidance=guidance, num_inference_steps=5)
    torch.testing.assert_close(whole.samples, parts.samples, rtol=0, atol=1e-4)
    assert not torch.allclose(whole.samples, pipe(4, 4, seed=1, num_inference_steps=5).samples, atol=1e-3)


def test_the_gradient_goes_through_decoder_and_unet(ldm):
    """One step against autograd by hand: log p of the clipped decoded x0hat, with respect to the latents."""
    pipe = GuidedLDMPipeline.from_pretrained(ldm(kl_model()))
    classifier = SmoothCNN(3)
    guidance = ClassifierGuidance(classifier, 1)
    chain = pipe.chain(5)
    predict, t = pipe.noise_predictor(torch.float32, network=chain.network), chain.timesteps[2]
    x = sample_noise(3, range(2), 0, LATENT)
    guidance.decode = pipe.decode
    found = guidance.gradient(x, t, predict, chain.schedule).grad

    x = x.clone().requires_grad_(True)
    abar = float(chain.schedule.abar[t])
    eps = pipe.unet(x, t - 1).sample
    x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    image = pipe.vqvae.decode(x0 / pipe.vqvae.config.scaling_factor).sample.clamp(-1, 1)
    log_p = torch.log_softmax(classifier(image), dim=1)[:, 1].sum()
    (expected,) = torch.autograd.grad(log_p, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert float(expected.abs().max()) > 1e-6


def test_checkpointing_gives_the_same_gradient_image_by_image(ldm):
    pipe = GuidedLDMPipeline.from_pretrained(ldm())
    full, frugal = (
        pipe(3, 3, seed=1, guidance=ClassifierGuidance(SmoothCNN(3), 1, 5.0, grad_mode=mode), num_inference_steps=4)
        for mode in ("full", "checkpoint")
    )
    torch.testing.assert_close(frugal.samples, full.samples, rtol=0, atol=1e-4)
    decoded = []
    pipe.vqvae.decoder.register_forward_hook(lambda module, given, out: decoded.append(len(given[0])))
    pipe(3, 3, guidance=ClassifierGuidance(SmoothCNN(3), 1, 5.0, grad_mode="checkpoint"), num_inference_steps=2)
    # At the end the whole batch is decoded, without a gradient; the trial before it shows two images.
    assert max(decoded[1:-1]) == 1


class LinearAutoencoder(torch.nn.Module):
    """decode(z) = gain z, as a stand-in with diffusers' names."""

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        fields = {"scaling_factor": 0.5, "latent_channels": 1, "out_channels": 1, "block_out_channels": (1,)}
        self.config = type("Config", (dict,), {"__getattr__": dict.__getitem__})(fields)

    def decode(self, z, return_dict=True):
        return (self.gain * z,)


def test_guidance_in_latents_is_exact_for_a_gaussian_and_a_linear_decoder():
    """Latents N(0, std^2), image = gain z / scaling, log p(y | image) = w image: p(z | y) is N(w gain std^2 / scaling,
    std^2)."""
    from toys import TwoGaussians, vp_schedule

    from nrcg.guidance.samplers import DDIM
    from nrcg.guidance.sampling import guided_sample, start_samples

    std, gain, w, num_steps, samples = 0.4, 1.5, 0.8, 200, range(4000)
    schedule = vp_schedule(num_steps)
    data = TwoGaussians(schedule, 0.0, std)
    stand_in = LinearAutoencoder(gain)

    def one_logit(image):
        return w * image.flatten(1) - 50.0

    guidance = ClassifierGuidance(one_logit, 1, clip_pred_x0=False)
    guidance.decode = lambda z: stand_in.decode(z / stand_in.config.scaling_factor)[0]
    z, _ = guided_sample(
        start_samples(schedule, 3, samples, (1, 1, 1), torch.device("cpu")),
        data.predict_noise,
        DDIM(schedule, False),
        range(num_steps, 0, -1),
        seed=3,
        samples=samples,
        guidance=guidance,
    )
    tolerance = 7 / num_steps + 3 * std / math.sqrt(len(samples))
    assert float(z.mean()) == pytest.approx(w * gain * std**2 / 0.5, abs=tolerance)
    assert float(z.std()) == pytest.approx(std, abs=tolerance)


def test_a_prompt_for_a_model_without_text_is_refused(ldm):
    with pytest.raises(ValueError, match="prompt: GuidedLDMPipeline is a model without text; leave it out"):
        GuidedLDMPipeline.from_pretrained(ldm())(1, prompt="a cat")


def test_a_decoder_that_overflows_is_said_and_leaves_grey(ldm):
    pipe = GuidedLDMPipeline.from_pretrained(ldm())
    decode = pipe.decode
    pipe.decode = lambda x: torch.cat([decode(x[:1]), torch.full((len(x) - 1, 3, 16, 16), math.nan)])
    found = pipe(3, 3, num_inference_steps=2)
    assert found.nonfinite.tolist() == [False, True, True]
    assert found.samples.isfinite().all() and float(found.samples[1:].abs().max()) == 0.0


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """Folder of a tiny Stable Diffusion built from configs."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("sd")
    tokenizer, settings = tiny_clip_tokenizer(folder)
    torch.manual_seed(2)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **settings)
    ).eval()
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    StableDiffusionPipeline(
        vae=kl_model(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=network,
        scheduler=SCHEDULERS["ddim"](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("sampler", ["model", "euler", "dpmpp", "unipc"])
@pytest.mark.parametrize("w", [1.0, 7.5])
def test_a_prompt_without_guidance_is_diffusers_own(monkeypatch, stable_diffusion, sampler, w):
    ours = nrcg.load_pipeline(stable_diffusion).use_sampler(sampler)
    assert isinstance(ours, GuidedStableDiffusionPipeline)
    plain = StableDiffusionPipeline.from_pretrained(stable_diffusion, scheduler=ours.scheduler)
    plain.set_progress_bar_config(disable=True)
    start_by_hand(monkeypatch, StableDiffusionPipeline, 2)
    expected = plain("a cat", num_images_per_prompt=2, guidance_scale=w, num_inference_steps=5, output_type="pt").images
    found = ours(2, 2, seed=7, prompt="a cat", guidance_scale=w, num_inference_steps=5)
    torch.testing.assert_close((found.samples + 1) / 2, expected, rtol=0, atol=5e-4)


def test_prompt_and_classifier_both_move_the_samples(stable_diffusion):
    pipe = nrcg.load_pipeline(stable_diffusion)
    guidance = ClassifierGuidance(SmoothCNN(3), 1, scale=5.0)
    draw = {"num_samples": 2, "batch_size": 2, "num_inference_steps": 4}
    plain, cat, guided = (
        pipe(**draw, **more).samples for more in ({}, {"prompt": "cat"}, {"prompt": "cat", "guidance": guidance})
    )
    assert not torch.allclose(plain, cat, atol=1e-4) and not torch.allclose(cat, guided, atol=1e-4)
    assert pipe._prompt is None and guidance.decode is None


# --- folders ---------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_the_plain_pipeline(ldm, tmp_path):
    GuidedLDMPipeline.from_pretrained(ldm()).save_pretrained(tmp_path / "again")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again")) is LDMPipeline
    GuidedDDPMPipeline(unet(3), DDPMScheduler()).save_pretrained(tmp_path / "pixels")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pixels")) is DDPMPipeline


def test_a_flow_model_of_pixels(tmp_path):
    DDPMPipeline(unet(3), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
    pipe = nrcg.load_pipeline(tmp_path / "flow")
    found = pipe(2, guidance=ClassifierGuidance(SmoothCNN(3), 1, 3.0), num_inference_steps=4)
    assert found.samples.shape == (2, 3, 8, 8) and not found.nonfinite.any()
    with pytest.raises(ValueError, match="scheduler FlowMatchEulerDiscreteScheduler has no betas"):
        pipe.schedule()


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda index: index | {"_class_name": "StableDiffusionXLPipeline", "vae": ["diffusers", "AutoencoderKL"]},
         "StableDiffusionXLPipeline is not supported; allowed: a U-Net and a scheduler"),
        (lambda index: {"unet": index["unet"]}, "damaged"),
    ],
)  # fmt: skip
def test_a_pipeline_of_another_kind_is_refused_by_name(ldm, edit, message):
    path = ldm() / "model_index.json"
    index = json.loads(path.read_text())
    index.pop("vqvae")
    path.write_text(json.dumps(edit(index)))
    with pytest.raises(DataError, match=message):
        nrcg.load_pipeline(path.parent)


def test_latents_are_no_pixels(ldm):
    with pytest.raises(
        DataError, match="LDMPipeline is not supported here; GuidedDDPMPipeline opens a U-Net and a scheduler"
    ):
        GuidedDDPMPipeline.from_pretrained(ldm())


def test_latents_of_another_width_are_refused(ldm):
    pipe = GuidedLDMPipeline.from_pretrained(ldm(kl_model(latents=3)))
    with pytest.raises(ValueError, match="the U-Net draws latents of 4 channels, the autoencoder's have 3"):
        pipe(1, num_inference_steps=2)


def test_a_decoder_without_a_gradient_is_refused(ldm):
    pipe = GuidedLDMPipeline.from_pretrained(ldm())
    pipe.decode = lambda x: torch.zeros(len(x), 3, 16, 16)
    with pytest.raises(ValueError, match="the decoder's images have no gradient with respect to the latents"):
        pipe(1, guidance=ClassifierGuidance(SmoothCNN(3), 1), num_inference_steps=2)

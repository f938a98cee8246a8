"""The adapter prepares images as the libraries' own transforms and processors do."""

import pytest
import torch
import transformers
from torch import nn

from nrcg import Classifier
from nrcg.classifiers.preprocessing import Resizing, check_like, of_processor, of_timm, of_torchvision
from nrcg.classifiers.specs import load_classifier
from nrcg.errors import DataError

SIZES = [(45, 60), (224, 224), (301, 200)]


def image(height, width, channels=3):
    """Of values in [0, 1], all kinds of frequencies among them."""
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(height))


KINDS = {
    "ViT": {},
    "DeiT": {"do_center_crop": True},
    "Beit": {"do_center_crop": True, "size": {"height": 256, "width": 256}},
    "CLIP": {},
    "Siglip": {},
    "Bit": {},
    "ConvNext": {"size": {"shortest_edge": 224}},
    "ConvNextOf384": {},
    "EfficientNet": {"rescale_offset": True, "rescale_factor": 1 / 127.5},
    "EfficientNetOfFeatures": {"include_top": False},
    "Levit": {},
    "MobileViT": {},
    "MobileViTOfASmallerCut": {"size": {"shortest_edge": 288}},
    "MobileNetV1": {},
    "MobileNetV2": {},
    "PoolFormer": {},
    "Pvt": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_adapter_gives_a_processors_pixel_values(kind, size):
    processor = getattr(transformers, f"{kind.partition('Of')[0]}ImageProcessor")(**KINDS[kind])
    adapter = Classifier(nn.Identity(), **of_processor(processor, 3))
    x = image(*size)
    expected = processor(x * 255, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    torch.testing.assert_close(adapter.prepare(x[None] * 2 - 1), expected, rtol=0, atol=1e-5)
    check_like(processor, adapter.prepare, 3)


def test_whole_folders_of_transformers_follow_their_processors(tmp_path):
    """Of those that the adapter once prepared in its own way."""
    small = {"num_labels": 2, "hidden_sizes": [8, 8, 8], "num_attention_heads": 2}
    config = transformers.MobileViTConfig(
        **small, neck_hidden_sizes=[8] * 7, image_size=64, intermediate_size=16, num_hidden_layers=1
    )
    module = transformers.MobileViTForImageClassification(config).eval()
    module.save_pretrained(tmp_path)
    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    classifier = load_classifier(f"transformers:{tmp_path}")
    x = image(40, 40)
    with torch.no_grad():
        expected = module(**processor(x * 255, return_tensors="pt", input_data_format="channels_first")).logits
    torch.testing.assert_close(classifier(x[None] * 2 - 1), expected, rtol=1e-4, atol=1e-5)
    whole = load_classifier(f"transformers:{tmp_path}?size=64")
    assert whole.resizing is None and whole.channel_order == "bgr"


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "efficientnet_b4", "inception_v3", "swin_v2_t"])
@pytest.mark.parametrize("size", SIZES)
def test_the_adapter_does_torchvisions_transforms(name, size):
    from torchvision.models import get_model_weights

    seen = get_model_weights(name).DEFAULT.transforms()
    adapter = Classifier(nn.Identity(), input_range=(0, 1), **of_torchvision(seen))
    x = image(*size)[None]
    torch.testing.assert_close(adapter.prepare(x * 2 - 1), seen(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "given", [{}, {"crop_pct": 0.95}, {"crop_pct": 1.0, "interpolation": "bicubic"}, {"crop_mode": "squash"}]
)
@pytest.mark.parametrize("size", SIZES)
def test_the_adapter_does_timms_transforms(given, size):
    """Their last but one, ToTensor, leaves floats as they are."""
    import timm

    seen = timm.data.resolve_data_config(pretrained_cfg={"input_size": (3, 224, 224)} | given)
    adapter = Classifier(nn.Identity(), input_range=(0, 1), **of_timm(seen))
    x = image(*size)
    expected = timm.data.create_transform(**seen)(x)
    torch.testing.assert_close(adapter.prepare(x[None] * 2 - 1)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("ImageGPT", {}, "its ImageGPTImageProcessor asks for do_color_quantize, which has no gradient here"),
        ("ViT", {"resample": 1}, "interpolation 'resample 1' is unknown; allowed: nearest, bilinear, bicubic"),
        ("ViT", {"do_pad": True}, "asks for do_pad"),
        ("ViT", {"do_resize": False, "do_center_crop": True, "crop_size": 8}, "crops images that it does not resize"),
        ("CLIP", {"crop_size": {"height": 8, "width": 9}}, "which is no square"),
        ("ViT", {"size": {"shortest_edge": 8, "longest_edge": 9}}, "asks for size {"),
    ],
)
def test_what_has_no_gradient_is_refused_by_name(kind, settings, words):
    processor = getattr(transformers, f"{kind}ImageProcessor")(**settings)
    with pytest.raises(DataError) as error:
        of_processor(processor, 3)
    assert words in str(error.value)


def test_what_a_processor_does_of_its_own_is_seen_by_a_trial():
    processor = transformers.PerceiverImageProcessor()  # cuts before it resizes
    adapter = Classifier(nn.Identity(), **of_processor(processor, 3))
    with pytest.raises(DataError, match="its PerceiverImageProcessor prepares images in a way that is unknown here"):
        check_like(processor, adapter.prepare, 3)


def test_a_single_logit_has_two_classes_and_a_regression_none(tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.ViTConfig(**small, image_size=16, patch_size=8, id2label={0: "cat"})
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    classifier = load_classifier(f"transformers:{tmp_path}")
    assert classifier.classes == ["not cat", "cat"] and classifier.count_classes() == 2
    config.problem_type = "regression"
    config.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="it is a regression of one number, no classifier"):
        load_classifier(f"transformers:{tmp_path}")


def test_the_middle_is_cut_and_black_is_added():
    """By hand: a row 0 1 2 3 of which two are kept, and a row of two to which one is added on each side."""
    row = torch.tensor([0.0, 0.1, 0.2, 0.3]).repeat(4, 1)[None, None]
    assert Resizing((4, 4), 2)(row)[0, 0, 0].tolist() == pytest.approx([0.1, 0.2])
    grown = Resizing((2, 2), 4)(row[..., 1:3, 1:3])[0, 0]
    assert grown[1].tolist() == pytest.approx([-1.0, 0.1, 0.2, -1.0]) and grown[0].tolist() == [-1.0] * 4
    assert Resizing(4, 1, crop_rounds=True)(row).item() == pytest.approx(0.2)  # 1.5 goes to 2
    assert Resizing(4, 1, crop_rounds=False)(row).item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="interpolation 'lanczos' is unknown"):
        Resizing(4, interpolation="lanczos")

"""Text as a guide: a tiny CLIP built from a config."""

import pytest
import torch
from toys import tiny_clip_tokenizer

from nrcg import ClassifierGuidance, load_classifier
from nrcg.classifiers.storage import save_classifier
from nrcg.data.arrays import to_unit
from nrcg.errors import DataError
from nrcg.guidance.targets import Score

TEXTS = ["a red ball", "a dog"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a CLIP of random weights, for images of 32 x 32 pixels."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    tokenizer, settings = tiny_clip_tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, **settings}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=12
        )
    ).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "model"
    )
    return folder / "model"


def test_its_logits_are_those_of_transformers(clip):
    import transformers

    classifier = load_classifier(f"clip:{clip}?texts={'|'.join(TEXTS)}")
    assert classifier.classes == TEXTS
    images = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    given = processor(list(images.numpy()), return_tensors="pt") | tokenizer(
        TEXTS, padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        expected = transformers.CLIPModel.from_pretrained(clip)(**given).logits_per_image
        found = classifier(to_unit(images.numpy()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_text_guides_as_a_class_and_alone_as_a_score(clip):
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    pair = ClassifierGuidance(load_classifier(f"clip:{clip}?texts={'|'.join(TEXTS)}"), "a dog", input="x_t")
    pair.check(x)
    alone = load_classifier(f"clip:{clip}?texts=a dog", logits=False)
    assert alone.classes is None
    guidance = ClassifierGuidance(alone, Score(), input="x_t")
    guidance.check(x)
    torch.testing.assert_close(alone(x)[:, 0], pair.classifier(x)[:, 1], rtol=1e-5, atol=1e-5)
    step = guidance.gradient(x, 1, lambda x, t: torch.zeros_like(x), None)
    wanted = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(alone(wanted).sum(), wanted)
    torch.testing.assert_close(step.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("clip:{}", "option texts: missing; give clip:ID_OR_FOLDER?texts="),
        ("clip:{}?texts=a&weights=x.pth", "option weights: a CLIP folder holds its own"),
        ("clip:/nowhere?texts=a", "no CLIP-like model can be opened from it"),
        ("torchvision:resnet18?texts=a", "option texts: is for clip:"),
        ("clip:{}?texts=a dog", "one text alone is a score: give the target `score`, or two texts or more"),
    ],
)
def test_a_mistake_is_one_line(clip, spec, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError) as error:
        load_classifier(spec.format(clip))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_it_is_saved_and_opened_again(clip, tmp_path):
    """As a workflow's `pretrained` classifier is."""
    classifier = load_classifier(f"clip:{clip}?texts={'|'.join(TEXTS)}")
    save_classifier(tmp_path / "saved", classifier.module, classifier.record())
    again = load_classifier(tmp_path / "saved")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert again.classes == TEXTS
    torch.testing.assert_close(again(x), classifier(x), rtol=0, atol=0)


def test_texts_that_the_tokenizer_does_not_tell_apart_are_refused(clip):
    with pytest.raises(DataError, match="its tokenizer does not tell the texts apart"):
        load_classifier(f"clip:{clip}?texts=1|2")  # digits are unknown to it


def test_a_model_without_text_is_refused(tmp_path, clip):
    import shutil

    import transformers

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shutil.copytree(clip, tmp_path / "vit")
    transformers.ViTModel(transformers.ViTConfig(**small, image_size=16, patch_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    with pytest.raises(DataError, match="it is a vit, which compares no images with texts"):
        load_classifier(f"clip:{tmp_path / 'vit'}?texts=a")

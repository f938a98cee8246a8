"""Classifiers by SPEC: the real libraries, with random weights written to files as users have them."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nrcg import Classifier
from nrcg.classifiers.architectures import build_module
from nrcg.classifiers.specs import load_classifier as load_spec
from nrcg.classifiers.specs import parse
from nrcg.classifiers.storage import open_classifier, save_classifier
from nrcg.errors import DataError

X = torch.linspace(-1, 1, 2 * 3 * 24 * 24).reshape(2, 3, 24, 24)


def normalised(x, size, mean, std):
    x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return ((x + 1) / 2 - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(std).reshape(1, 3, 1, 1)


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def torchvision_weights(tmp_path_factory):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    path, module = tmp_path_factory.mktemp("torchvision") / "w.pth", resnet18(num_classes=5).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in module.state_dict().items()}}, path)
    return path, module


def test_torchvision_with_ones_own_weights(torchvision_weights):
    path, module = torchvision_weights
    classifier = load_spec(f"torchvision:resnet18?weights={path}&size=64&classes=a,b,c,d,e")
    assert classifier.classes == list("abcde") and classifier.feature_dim == 512 and classifier.channels == 3
    expected = module(normalised(X, 64, **IMAGENET))
    torch.testing.assert_close(classifier(X), expected, rtol=1e-4, atol=1e-4)  # another memory format
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())


def test_timm_with_ones_own_weights(tmp_path):
    """Of grey images: its TensorFlow models pad unevenly, so the first convolution must stay of its own kind."""
    import timm
    from safetensors.torch import save_file

    name = "tf_mobilenetv3_small_minimal_100"
    module = timm.create_model(name, num_classes=2, in_chans=1).eval()
    save_file({f"net.{key}": value for key, value in module.state_dict().items()}, tmp_path / "w.safetensors")
    classifier = load_spec(f"timm:{name}?weights={tmp_path}/w.safetensors&prefix=net.&size=32&mean=0.5&std=0.5")
    expected = module(nn.functional.interpolate(X[:, :1], size=(32, 32), mode="bilinear", antialias=True))
    torch.testing.assert_close(classifier(X[:, :1]), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def transformers_folder(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    module = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            id2label={0: "cat", 1: "dog", 2: "cow"},
        )
    ).eval()
    module.save_pretrained(tmp_path / "vit")
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.4] * 3, "image_std": [0.25] * 3}
    ViTImageProcessor(**settings).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", module


def test_a_transformers_folder_says_itself_what_it_expects(transformers_folder):
    folder, module = transformers_folder
    classifier = load_spec(f"transformers:{folder}")
    assert classifier.classes == ["cat", "dog", "cow"] and classifier.image_size == 32
    expected = module(normalised(X, 32, [0.4] * 3, [0.25] * 3)).logits
    torch.testing.assert_close(classifier(X), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom nrcg import Classifier\nfrom nrcg.classifiers.architectures import SmallCNN\n"
        "def plain():\n    torch.manual_seed(0)\n    return SmallCNN(3, width=4)\n"
        "def adapted():\n    return Classifier(plain(), image_size=16, input_range=(0, 1), classes=['x', 'y', 'z'])\n"
        "def nothing():\n    return None\n"
        "def needs(argument):\n    return plain()\n"
        "def softmax():\n    return torch.nn.Sequential(plain(), torch.nn.Softmax(dim=1))\n"
        "def flat():\n    return torch.nn.Sequential(torch.nn.Flatten(0), torch.nn.Softmax(dim=0))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("mine", None)


def test_python_factories(own_module):
    import importlib

    plain, adapted = load_spec("python:mine:plain"), load_spec("python:mine:adapted")
    module = importlib.import_module("mine").plain().eval()
    torch.testing.assert_close(plain(X), module(X), rtol=1e-4, atol=1e-5)
    small = nn.functional.interpolate(X, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(adapted(X), module((small + 1) / 2), rtol=1e-4, atol=1e-5)
    assert adapted.classes == ["x", "y", "z"]


# --- class maps ------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return SimpleNamespace(logits=self.logits + 0 * x.flatten(1)[:, :1])


@pytest.mark.parametrize(
    "logits, groups, expected",
    [
        # Of p = (0.1, 0.2, 0.3, 0.4): 0.1 + 0.3 and 0.2, the rest is left out.
        (torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist(), [[0, 2], [1]], [2 / 3, 1 / 3]),
        ([2.0], [[1], [0]], torch.sigmoid(torch.tensor([2.0, -2.0])).tolist()),
    ],
)
def test_groups_add_up_probabilities(logits, groups, expected):
    classifier = Classifier(Fixed(logits))
    classifier.group(["animal", "other"], groups)
    torch.testing.assert_close(classifier(X).softmax(dim=1)[0], torch.tensor(expected))


def test_groups_of_groups_add_up():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    classifier = Classifier(Fixed(probabilities.log().tolist()))
    classifier.group(["a", "b", "c"], [[0, 3], [1], [2]])
    classifier.group(["bc", "a"], [[1, 2], [0]])
    torch.testing.assert_close(classifier(X).softmax(dim=1)[0], torch.tensor([0.5, 0.5]))
    assert classifier.groups == [[1, 2], [0, 3]]


def test_class_map_by_name_number_and_list(transformers_folder):
    folder, module = transformers_folder
    classifier = load_spec(f"transformers:{folder}", {"pet": ["cat", 1], "cattle": "cow"})
    probabilities = module(normalised(X, 32, [0.4] * 3, [0.25] * 3)).logits.softmax(dim=1)
    expected = torch.stack([probabilities[:, :2].sum(dim=1), probabilities[:, 2]], dim=1)
    torch.testing.assert_close(classifier(X).softmax(dim=1), expected, rtol=1e-4, atol=1e-5)
    assert classifier.classes == ["pet", "cattle"]


# --- saving ----------------------------------------------------------------------------------------------------------


def test_what_a_spec_gave_is_saved_and_needs_its_source_no_more(
    tmp_path, torchvision_weights, transformers_folder, own_module
):
    path = Path(shutil.copy(torchvision_weights[0], tmp_path))
    specs = {
        f"torchvision:resnet18?weights={path}&size=32": {"up": [0, 1], "down": 4},
        f"transformers:{transformers_folder[0]}": {"pet": ["cat", "dog"], "cattle": "cow"},
        "python:mine:adapted": None,
    }
    saved = []
    for number, (spec, class_map) in enumerate(specs.items()):
        classifier = load_spec(spec, class_map)
        save_classifier(tmp_path / f"saved{number}", classifier.module, classifier.record())
        saved.append((tmp_path / f"saved{number}", classifier))
    path.unlink()
    for file in transformers_folder[0].iterdir():
        file.unlink()
    for folder, classifier in saved:
        again = open_classifier(folder)
        torch.testing.assert_close(again(X), classifier(X), rtol=1e-5, atol=1e-6)
        assert again.classes == classifier.classes and again.groups == classifier.groups


def test_a_saved_folder_is_a_spec_and_resizes_to_what_it_was_trained_on(tmp_path):
    config = {"architecture": "small_cnn", "classes": ["a", "b", "c"], "image_size": 8, "channels": 3}
    save_classifier(tmp_path, build_module("small_cnn", 3, 0.1), config)
    classifier = load_spec(tmp_path)
    small = nn.functional.interpolate(X, size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(classifier(X), classifier.module(small), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="takes images of 3 channels, not of 1"):
        classifier(X[:, :1])


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, words",
    [
        (
            "resnet18",
            ["'resnet18': no such folder, and no SPEC; allowed: a saved classifier's folder, torchvision:NAME"],
        ),
        ("torchvision:resnet18?prefix=net.", ["option prefix: is for the keys of weights=FILE"]),
        ("torchvision:resnet999", ["torchvision has no classifier 'resnet999'"]),
        ("timm:resnet999", ["timm has no model 'resnet999'"]),
        ("torchvision:resnet18?speed=3", ["option 'speed=3' is unknown; allowed: weights, prefix, size"]),
        ("torchvision:resnet18?weights=nowhere.pth", ["nowhere.pth: no such file"]),
        ("torchvision:resnet18?weights=WEIGHTS&size=big", ["option size=big: 1 number expected"]),
        ("torchvision:resnet18?weights=WEIGHTS&range=0", ["option range=0: 2 numbers expected"]),
        ("torchvision:resnet18?weights=PICKLE", ["cannot be read as weights"]),
        ("torchvision:resnet18?weights=WEIGHTS&classes=a,b", ["it has 5 classes, but 2 names of them are given"]),
        ("torchvision:resnet18?weights=WEIGHTS&channels=1", ["channels 1, mean [0.485", "do not agree"]),
        ("transformers:EMPTY", ["holds no config.json of a transformers model"]),
        ("python:mine", ["python:MODULE:FACTORY expected"]),
        ("python:nowhere:make", ["cannot be made: ModuleNotFoundError"]),
        ("python:mine:absent", ["cannot be made: AttributeError"]),
        ("python:mine:needs", ["cannot be made: TypeError"]),
        ("python:mine:nothing", ["the factory gives NoneType, no torch.nn.Module"]),
        ("python:mine:softmax", ["gives probabilities that add up to 1, not logits: leave its softmax out"]),
        ("python:mine:flat", ["for 2 images; expected (2, K)"]),
        ("python:mine:adapted?size=3", ["says itself what it expects; drop the options"]),
    ],
)
def test_mistakes_are_one_line(spec, words, own_module, torchvision_weights):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"a": Evil()}, own_module / "evil.pth")
    (own_module / "empty").mkdir()
    spec = spec.replace("WEIGHTS", str(torchvision_weights[0])).replace("PICKLE", str(own_module / "evil.pth"))
    with pytest.raises((DataError, ValueError)) as error:
        load_spec(spec.replace("EMPTY", str(own_module / "empty")))
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    "class_map, message",
    [
        ({"a": "horse", "b": 0}, "class_map.a: no class 'horse'; it has cat, dog, cow"),
        ({"a": 0, "b": 7}, "class_map.b: 7 is no class; it has 3"),
        ({"a": 0, "b": [1, 0]}, "class_map.b: class 0 stands there twice"),
        ({"a": 0}, "class_map: at least two classes are needed"),
    ],
)
def test_wrong_class_maps_are_refused(transformers_folder, class_map, message):
    with pytest.raises(DataError) as error:
        load_spec(f"transformers:{transformers_folder[0]}", class_map)
    assert message in str(error.value)


def test_a_missing_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DataError, match=r"needs the package timm: pip install 'nrcg\[classifiers\]'"):
        load_spec("timm:resnet18")


def test_what_a_spec_is():
    expected = ("timm", "hf_hub:me/it", {"size": "3", "range": "0,1"})
    assert parse("timm:hf_hub:me/it?size=3&range=0,1") == expected
    for text in ("models/a", "C:\\models", "a:b"):
        with pytest.raises(DataError, match="no such folder, and no SPEC"):
            parse(text)

"""The adapter's mapping worked out by hand, log-probabilities against torch, and files that may be damaged."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nrcg.classifiers.adapter import Classifier, probe
from nrcg.classifiers.architectures import SmallCNN, build_module
from nrcg.classifiers.logits import class_index, class_log_prob, logits_of, predicted_class, two_sided
from nrcg.classifiers.storage import CONFIG_FILE, WEIGHTS_FILE, open_classifier, save_classifier
from nrcg.errors import DataError

CLASSES = ["baseball", "basketball", "soccer"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0, 1, 2])
def test_log_prob_of_several_classes_is_minus_the_cross_entropy(target):
    logits = 5 * randn(6, 3)
    expected = -F.cross_entropy(logits, torch.full((6,), target), reduction="none")
    torch.testing.assert_close(class_log_prob(logits, target), expected)


@pytest.mark.parametrize("target", [0, 1])
def test_log_prob_of_one_logit_is_minus_the_binary_cross_entropy(target):
    logits = 5 * randn(6, 1)
    expected = -F.binary_cross_entropy_with_logits(logits, torch.full((6, 1), float(target)), reduction="none")
    torch.testing.assert_close(class_log_prob(logits, target), expected[:, 0])


def test_one_logit_is_that_of_class_1_against_zero():
    logit = 3 * randn(5, 1)
    both = torch.cat([torch.zeros_like(logit), logit], dim=1)
    assert torch.equal(two_sided(logit), both) and two_sided(both) is both
    np.testing.assert_array_equal(two_sided(logit.numpy()), both.numpy())


def test_predicted_class():
    several, one = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]]), torch.tensor([[-0.1], [0.1]])
    for kind in (torch.as_tensor, np.asarray):
        assert predicted_class(kind(several)).tolist() == [1, 0]
        assert predicted_class(kind(one)).tolist() == [0, 1]


@pytest.mark.parametrize("logits", [[[-200.0]], [[0.0, -200.0]]])
def test_log_prob_of_a_hopeless_class_is_finite_and_has_a_gradient(logits):
    logits = torch.tensor(logits, requires_grad=True)
    log_prob = class_log_prob(logits, 1)
    log_prob.sum().backward()
    assert float(log_prob.detach()) == pytest.approx(-200.0)
    assert float(logits.grad[0, -1]) == pytest.approx(1.0)


# --- the adapter -----------------------------------------------------------------------------------------------------


class Show(nn.Module):
    """Gives the pixels as the logits."""

    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [-1.0, 0.0, 1.0]),
        ({"input_range": (0, 1)}, [0.0, 0.5, 1.0]),
        ({"input_range": (0, 255)}, [0.0, 127.5, 255.0]),
        ({"mean": [0.5], "std": [2.0]}, [-0.75, -0.25, 0.25]),
        ({"input_range": (0, 1), "mean": [0.4], "std": [0.2]}, [-2.0, 0.5, 3.0]),
    ],
)
def test_values_are_mapped(settings, expected):
    x = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    torch.testing.assert_close(Classifier(Show(), **settings)(x), torch.tensor([expected]))


def test_mean_and_std_belong_to_channels():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    x = 2 * torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
    expected = torch.stack([((x[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], dim=1)
    prepared = Classifier(Show(), input_range=(0, 1), mean=mean, std=std).prepare(x)
    # float32, one scale and shift in place of four operations.
    torch.testing.assert_close(prepared, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size, expected", [(None, (6, 8)), (4, (4, 4)), (16, (16, 16))])
def test_images_are_resized(size, expected):
    prepared = Classifier(Show(), image_size=size).prepare(torch.full((2, 3, 6, 8), 0.3))
    assert prepared.shape == (2, 3, *expected)
    torch.testing.assert_close(prepared, torch.full_like(prepared, 0.3))  # a constant stays


def test_halving_a_size_keeps_the_mean():
    x = randn(1, 1, 8, 8)
    prepared = Classifier(Show(), image_size=4).prepare(x)
    # The antialiased triangle filter's weights sum to one; the borders count a little more, hence the tolerance.
    assert float(prepared.mean()) == pytest.approx(float(x.mean()), abs=0.1)
    # Antialiased: the finest checkerboard, which plain bilinear picks at one phase, is grey.
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1.0
    assert Classifier(Show(), image_size=4).prepare(board[None, None]).abs().max() < 0.2


def test_the_adapter_is_differentiable_to_the_pixels():
    classifier = Classifier(Show(), input_range=(0, 1), std=[0.25])
    x = randn(1, 1, 2, 2).requires_grad_(True)
    classifier(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))  # (1 / 2) / 0.25
    resized = Classifier(Show(), image_size=2)
    x = randn(1, 1, 8, 8).requires_grad_(True)
    resized(x).sum().backward()
    assert float(x.grad.sum()) == pytest.approx(4.0, rel=1e-5)  # four pixels, weights that sum to one each


def test_the_adapter_follows_the_images_dtype():
    x = randn(1, 3, 2, 2).double()
    assert Classifier(Show(), mean=[0.1, 0.2, 0.3]).prepare(x).dtype == torch.float64


def test_logits_may_be_an_attribute():
    logits = randn(2, 3)
    assert logits_of(SimpleNamespace(logits=logits)) is logits
    assert logits_of(logits) is logits
    for output in ((logits,), [logits], {"logits": logits, "loss": 1}, {"out": logits}):
        assert logits_of(output) is logits
    assert logits_of(logits[:, 0]).shape == (2, 1)  # binary


@pytest.mark.parametrize("output", [(torch.zeros(2, 3),) * 2, None, SimpleNamespace(logits=[1.0]), {"logits": 1}])
def test_other_outputs_are_refused(output):
    with pytest.raises(TypeError, match=rf"the classifier gave {type(output).__name__}; expected logits \(B, K\)"):
        logits_of(output)


@pytest.mark.parametrize("shape", [(), (2, 3, 1), (2, 3, 4, 4)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"logits of shape \(.*expected \(B, K\)"):
        logits_of(torch.zeros(shape))


@pytest.mark.parametrize("shape_of", [lambda p: p, lambda p: p[:, 0], lambda p: p.squeeze(1).float()])
def test_a_sigmoid_is_told_from_a_logit(shape_of):
    """By what computed it: a logit may lie between 0 and 1 as well."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(192, 1)
    linear.weight.data.mul_(1e-3)
    linear.bias.data.fill_(0.5)
    images = torch.zeros(1, 3, 8, 8)
    assert probe(lambda x: shape_of(linear(x.flatten(1))), images) == 2
    with pytest.raises(ValueError, match="gives probabilities, not logits: leave its sigmoid out"):
        probe(lambda x: shape_of(linear(x.flatten(1)).sigmoid()), images)


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [SmallCNN(3, width=4), build_module("mobilenet_v3_small", 3, 0.1)])
def test_features_are_the_input_of_the_last_linear_layer(module):
    classifier = Classifier(module).eval()
    x = randn(2, 3, 16, 16)
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        features = classifier.features(x)
        assert features.shape == (2, classifier.feature_dim)
        torch.testing.assert_close(last(features), classifier(x))
    assert not last._forward_pre_hooks  # nothing stays behind


def test_the_hook_goes_also_when_the_network_fails():
    classifier = Classifier(SmallCNN(3, width=4))
    with pytest.raises(RuntimeError):
        classifier.features(randn(1, 5, 8, 8))
    assert not classifier.module.head._forward_pre_hooks


def test_features_need_a_linear_layer():
    with pytest.raises(ValueError, match="no linear layer"):
        Classifier(Show()).features(randn(1, 1, 2, 2))


# --- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["small_cnn", "mobilenet_v3_small"])
def test_build_module(architecture):
    module = build_module(architecture, 5, batch_norm_momentum=0.3).eval()
    assert module(randn(2, 3, 24, 24)).shape == (2, 5)
    assert {layer.momentum for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.3}


@pytest.mark.parametrize("architecture", ["smallcnn", "fcn_resnet50", "fasterrcnn_resnet50_fpn", ""])
def test_an_unknown_architecture_is_refused(architecture):
    with pytest.raises(DataError, match=f"architecture '{architecture}' is unknown; allowed: small_cnn"):
        build_module(architecture, 3, 0.1)


# --- files -----------------------------------------------------------------------------------------------------------


CONFIG = {"architecture": "small_cnn", "classes": CLASSES, "image_size": 8}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    module = build_module("small_cnn", 3, 0.1)
    module(randn(4, 3, 8, 8))  # running statistics that are not the default
    save_classifier(tmp_path / "non_robust", module, CONFIG)
    return tmp_path / "non_robust", module


def test_saved_classifiers_come_back(saved):
    folder, module = saved
    classifier = open_classifier(folder)
    assert classifier.classes == CLASSES
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    x = randn(2, 3, 8, 8, seed=1)
    for name, value in module.state_dict().items():
        assert torch.equal(classifier.module.state_dict()[name], value), name
    # Another memory format may sum in another order: float32 rounding.
    torch.testing.assert_close(classifier(x), module.eval()(x), rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def overwrite_with_other_weights(path):
    from safetensors.torch import save_file

    save_file(build_module("small_cnn", 3, 0.1).state_dict(), path)


def change_config(**changes):
    """As somebody would write it who gives no checksum of the record."""

    def change(path):
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if key != "record_sha256"}))

    return change


@pytest.mark.parametrize(
    "name, damage, words",
    [
        pytest.param(WEIGHTS_FILE, cut, "damaged", id="weights cut off"),
        pytest.param(WEIGHTS_FILE, lambda path: path.write_bytes(b"\xff" * 64), "damaged", id="weights garbage"),
        pytest.param(WEIGHTS_FILE, lambda path: path.unlink(), "not found", id="no weights"),
        pytest.param(WEIGHTS_FILE, overwrite_with_other_weights, "not the weights", id="weights of another training"),
        pytest.param(CONFIG_FILE, cut, "damaged", id="config cut off"),
        pytest.param(CONFIG_FILE, lambda path: path.write_text("[]"), "damaged", id="config a list"),
        pytest.param(CONFIG_FILE, lambda path: path.write_text("{}"), "damaged .a key is missing", id="config {}"),
        pytest.param(CONFIG_FILE, lambda path: path.unlink(), "not found", id="no config"),
        pytest.param(CONFIG_FILE, change_config(classes=["a", "b"]), "damaged", id="another number of classes"),
        pytest.param(CONFIG_FILE, change_config(architecture="nonsense"), "nonsense", id="unknown architecture"),
    ],
)
def test_damaged_files_are_named(saved, name, damage, words):
    folder, _ = saved
    damage(folder / name)
    with pytest.raises(DataError, match=words) as error:
        open_classifier(folder)
    message = str(error.value)
    assert "\n" not in message
    if "nonsense" not in words:
        assert error.value.path.parent == folder and str(folder) in message


def test_an_interrupted_save_is_noticed(saved, monkeypatch):
    """Between the new weights and their config there is none: an unfinished classifier, which is not damaged."""
    monkeypatch.setattr("nrcg.classifiers.storage.write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_classifier(saved[0], build_module("small_cnn", 3, 0.1), CONFIG)
    with pytest.raises(DataError, match=r"config\.json: not found"):
        open_classifier(saved[0])


# --- class_index -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target, expected", [("soccer", 2), ("0", 0), (1, 1), ("baseball", 0)])
def test_class_index(target, expected):
    assert class_index(CLASSES, target) == expected
    assert class_index(["1", "0"], 1) == 0  # a name goes before a number


@pytest.mark.parametrize("target", ["tennis", "3", -1, "", "1.0", "Soccer"])
def test_an_unknown_class_is_refused_with_the_list(target):
    with pytest.raises(DataError) as error:
        class_index(CLASSES, target)
    assert str(error.value) == (
        f"target {str(target)!r} is no class of the classifier; allowed: baseball, basketball, soccer or 0..2"
    )

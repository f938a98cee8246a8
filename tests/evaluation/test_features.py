"""Feature extractors: the real clean-fid loading code on a stand-in network, the judge, batching."""

import hashlib

import numpy as np
import pytest
import torch
from inception_stand_in import StandInInception, save_script
from torch import nn

from nrcg.errors import DataError
from nrcg.evaluation import features
from nrcg.evaluation.features import (
    INCEPTION_FILE,
    TORCHEVAL_FILE,
    ClassifierExtractor,
    InceptionExtractor,
    TorchevalExtractor,
    extract,
    extractor_name,
    load_extractor,
    resolve_features,
)


def random_images(n: int, size: int = 16, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


class TinyJudge(nn.Module):
    """Batch norm and dropout make eval mode matter; `seen` keeps the range of the last input."""

    feature_dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)
        )

    def features(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = (tuple(x.shape), x.min().item(), x.max().item())
        return self.body(x)


class Means:
    """(n, H, W, C) -> (n, 2): mean and standard deviation of each image."""

    name, dim = "means", 2

    def __call__(self, images: np.ndarray) -> np.ndarray:
        axes = (1, 2, 3)
        return np.stack([images.mean(axis=axes), images.std(axis=axes)], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    save_script(StandInInception(), folder / INCEPTION_FILE)
    return folder


@pytest.fixture(scope="module")
def inception(weights_dir):
    return InceptionExtractor(weights_dir, "cpu", sha256=None)


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return ClassifierExtractor(TinyJudge())


# --- extract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, batch_size", [(7, 1), (7, 3), (7, 7), (7, 100), (0, 3)])
def test_extract_does_not_depend_on_the_batch_size(n, batch_size):
    images = random_images(n)
    steps = []
    result = extract(Means(), images, batch_size=batch_size, progress=lambda done, total: steps.append((done, total)))
    assert result.shape == (n, 2) and result.dtype == np.float32
    np.testing.assert_array_equal(result, Means()(images))
    assert steps == [(min(end, n), n) for end in range(batch_size, n + batch_size, batch_size) if n]


@pytest.mark.parametrize("make", ["inception", "judge"])
def test_network_features_do_not_depend_on_the_batch_size(make, request):
    extractor, images = request.getfixturevalue(make), random_images(5)
    # Float32 convolutions may sum in another order for another batch size.
    np.testing.assert_allclose(
        extract(extractor, images, batch_size=2),
        extract(extractor, images, batch_size=5),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("make", ["inception", "judge"])
def test_extract_reads_memory_maps(make, request, tmp_path):
    extractor, images = request.getfixturevalue(make), random_images(3)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    np.testing.assert_array_equal(extract(extractor, mapped), extract(extractor, images))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 4), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
    ],
    ids=["float", "one image", "alpha channel", "NCHW"],
)
def test_extract_refuses_other_arrays(images):
    with pytest.raises(DataError, match=r"\(N, H, W, 1 or 3\) uint8"):
        extract(Means(), images)


@pytest.mark.parametrize(
    "returned, error, text",
    [
        (np.zeros((3, 5), np.float32), ValueError, r"'means' returned shape \(3, 5\), expected \(3, 2\)"),
        (np.full((3, 2), np.nan, np.float32), DataError, "images 0 to 2 are not all finite"),
    ],
)
def test_extract_checks_what_the_extractor_returns(returned, error, text, monkeypatch):
    monkeypatch.setattr(Means, "__call__", lambda self, images: returned)
    with pytest.raises(error, match=text):
        extract(Means(), random_images(3))


def test_extract_refuses_a_batch_size_below_one():
    with pytest.raises(ValueError, match="batch_size"):
        extract(Means(), random_images(1), batch_size=0)


# --- Inception -------------------------------------------------------------------------------------------------------


def test_inception_address_is_clean_fids():
    from cleanfid.downloads_helper import inception_url

    assert inception_url == features.INCEPTION_URL


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_inception_equals_clean_fids_own_pipeline(inception, weights_dir, tmp_path):
    """Parity with `cleanfid.fid.get_files_features` on .npy files: same resizing, same normalisation."""
    from cleanfid.fid import get_files_features
    from cleanfid.inception_torchscript import InceptionV3W

    images = random_images(3, size=20)
    files = [str(tmp_path / f"{i}.npy") for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        np.save(file, image)
    expected = get_files_features(
        files, InceptionV3W(str(weights_dir), download=False), num_workers=0, device="cpu", verbose=False
    )
    result = extract(inception, images, batch_size=3)
    assert result.shape == (3, 2048)
    np.testing.assert_array_equal(result, expected)


def test_inception_repeats_grey_images(inception):
    grey = random_images(2, channels=1)
    np.testing.assert_array_equal(inception(grey), inception(np.repeat(grey, 3, axis=3)))


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_of_constant_images(inception, channels):
    """A constant image resizes to itself and is normalised as (x - 128) / 128: grey 128 gives exactly zero."""
    np.testing.assert_array_equal(inception(np.full((1, 8, 8, channels), 128, np.uint8)), np.zeros((1, 2048)))
    assert np.abs(inception(np.full((1, 8, 8, channels), 0, np.uint8))).max() > 0.01


def test_inception_records_the_digest(inception, weights_dir):
    digest = hashlib.sha256((weights_dir / INCEPTION_FILE).read_bytes()).hexdigest()
    assert inception.sha256 == digest
    assert InceptionExtractor(weights_dir, sha256=digest.upper()).sha256 == digest


def test_inception_of_another_digest_is_refused_before_it_is_loaded(weights_dir, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("loaded an unknown file"))
    with pytest.raises(DataError, match="sha256") as error:
        InceptionExtractor(weights_dir)
    assert features.INCEPTION_SHA256 in str(error.value)


def test_missing_inception_names_file_address_and_folder(tmp_path):
    with pytest.raises(DataError) as error:
        InceptionExtractor(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (INCEPTION_FILE, features.INCEPTION_URL, str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["not TorchScript", "without layers"])
def test_a_file_that_is_no_inception_network(kind, tmp_path):
    if kind == "not TorchScript":
        (tmp_path / INCEPTION_FILE).write_bytes(b"<html>404</html>")
    else:
        save_script(nn.Identity(), tmp_path / INCEPTION_FILE)
    with pytest.raises(DataError, match="no Inception network") as error:
        InceptionExtractor(tmp_path, sha256=None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["good", "damaged", "offline"])
def test_download(case, weights_dir, tmp_path, monkeypatch):
    """The download only, with the network replaced: whatever fails leaves no file behind."""
    source = weights_dir / INCEPTION_FILE

    def urlopen(url, timeout):
        if case == "offline":
            raise OSError("no route")
        assert url == features.INCEPTION_URL
        return open(source, "rb")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    digest = hashlib.sha256(source.read_bytes()).hexdigest() if case == "good" else "0" * 64
    folder = tmp_path / "new" / "weights"
    if case == "good":
        assert InceptionExtractor(folder, download=True, sha256=digest).sha256 == digest
        assert [path.name for path in folder.iterdir()] == [INCEPTION_FILE]
    else:
        with pytest.raises(DataError, match="sha256" if case == "damaged" else "no route"):
            InceptionExtractor(folder, download=True, sha256=digest)
        assert list(folder.iterdir()) == []


# --- torcheval -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torcheval_weights(tmp_path_factory):
    """torchvision's file with random weights, from its own class."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("torcheval")
    model = inception_v3(weights=None, init_weights=False)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # torch's own initialisation fades to zero over the depth
    torch.save(model.state_dict(), folder / TORCHEVAL_FILE)
    return folder


@pytest.mark.slow
def test_torchevals_features_are_torchevals(torcheval_weights, monkeypatch):
    """Parity with torcheval's own network, made by its own path with the download replaced."""
    fid = pytest.importorskip("torcheval.metrics.image.fid")
    weights = torch.load(torcheval_weights / TORCHEVAL_FILE, weights_only=True)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: weights)
    theirs = fid.FIDInceptionV3().eval()
    images = random_images(4, size=24)
    images[1] //= 3
    result = extract(TorchevalExtractor(torcheval_weights, sha256=None), images)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).numpy()
    assert result.shape == (4, 2048) and expected.std() > 1e-3
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_torchevals_distance_is_torchevals():
    """On the same features of full rank; torcheval sums in float32."""
    fid = pytest.importorskip("torcheval.metrics.image.fid")
    from nrcg.evaluation.frechet import FeatureStatistics, frechet_distance

    theirs = fid.FrechetInceptionDistance(model=nn.Flatten(), feature_dim=12)
    sets = [random_images(200, size=2, seed=seed).astype(np.float32) / (200 + 100 * seed) for seed in (0, 1)]
    for images, is_real in zip(sets, (True, False), strict=True):
        theirs.update(torch.from_numpy(images).permute(0, 3, 1, 2), is_real=is_real)
    ours = frechet_distance(*(FeatureStatistics.from_features(images.reshape(200, 12)) for images in sets))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-3)


def test_torcheval_checks_its_file(torcheval_weights, tmp_path):
    with pytest.raises(DataError, match="expected 0cc3c7bd"):
        TorchevalExtractor(torcheval_weights)
    with pytest.raises(DataError, match=r"is missing: download https://download\.pytorch\.org"):
        TorchevalExtractor(tmp_path)
    (tmp_path / TORCHEVAL_FILE).write_bytes(b"no weights")
    with pytest.raises(DataError, match="no Inception network"):
        TorchevalExtractor(tmp_path, sha256=None)


# --- choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features_asked, files, expected",
    [
        ("auto", [], ["judge"]),
        ("auto", [INCEPTION_FILE], ["inception", "judge"]),
        ("auto", [TORCHEVAL_FILE, INCEPTION_FILE], ["inception", "torcheval", "judge"]),
        (["judge", "torcheval"], [], ["torcheval", "judge"]),  # the headline comes first
        (["timm:vit", "auto", "judge"], [TORCHEVAL_FILE], ["torcheval", "timm:vit", "judge"]),
        ("inception", [], ["inception"]),
    ],
)
def test_resolve_features(features_asked, files, expected, tmp_path):
    for file in files:
        (tmp_path / file).touch()
    assert resolve_features(features_asked, tmp_path) == expected


@pytest.mark.parametrize(
    "spec, name", [("judge", "judge"), ("timm:vit_small_patch14.dinov2", "timm_vit_small_patch14_dinov2")]
)
def test_extractor_name(spec, name):
    assert extractor_name(spec) == name


def test_load_extractor_takes_a_spec(monkeypatch):
    """The network's features, under the SPEC's name; grey images become three channels."""
    monkeypatch.setattr(
        "nrcg.classifiers.specs.load_classifier", lambda spec: TinyJudge() if spec == "torchvision:tiny" else None
    )
    extractor = load_extractor("torchvision:tiny", weights_dir="nowhere")
    assert (extractor.name, extractor.dim) == ("torchvision_tiny", 5)
    assert extract(extractor, random_images(2, channels=1)).shape == (2, 5)


@pytest.mark.parametrize("spec, words", [("inception", "cannot download"), ("judge", "need a judge")])
def test_load_extractor_says_what_is_missing(spec, words, tmp_path, monkeypatch):
    def offline(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(DataError, match=words):
        load_extractor(spec, weights_dir=tmp_path)


def test_protocols_name_the_weights(judge):
    """Two judges of other weights are other protocols, the same judge is the same one."""
    again, other = TinyJudge(), TinyJudge()
    again.load_state_dict(judge._classifier.state_dict())
    assert ClassifierExtractor(again).protocol == judge.protocol
    assert ClassifierExtractor(other).protocol != judge.protocol


# --- judge -----------------------------------------------------------------------------------------------------------


def test_judge_sees_channels_first_in_minus_one_to_one(judge):
    images = np.zeros((2, 6, 8, 3), np.uint8)
    images[0, 0, 0, 0] = 255
    result = judge(images)
    assert result.shape == (2, 5) and result.dtype == np.float32
    assert judge._classifier.seen == ((2, 3, 6, 8), -1.0, 1.0)
    assert (judge.name, judge.dim) == ("judge", 5)


def test_judge_is_in_eval_mode_even_if_training_went_on(judge):
    images = random_images(4)
    first = judge(images)
    judge._classifier.train()
    np.testing.assert_array_equal(judge(images), first)
    assert not judge._classifier.training


def test_judge_values_by_hand(judge):
    """Zero weights leave the bias, here through a batch norm of unit statistics."""
    nn.init.zeros_(judge._classifier.body[0].weight)
    bias = judge._classifier.body[0].bias.detach().numpy()
    # 1e-5: the batch norm's epsilon.
    np.testing.assert_allclose(judge(random_images(2)), np.stack([bias, bias]), rtol=1e-5)


@pytest.mark.parametrize("make", ["inception", "judge"])
def test_no_images_give_no_features(make, request):
    extractor = request.getfixturevalue(make)
    assert extractor(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, extractor.dim)

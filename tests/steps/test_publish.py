"""A hub folder, opened again by nrcg, by plain diffusers and as a custom pipeline."""

import csv
import json

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image
from toys import write_tiny_classifier, write_tiny_pipeline

from nrcg import GuidedDDPMPipeline, load_classifier
from nrcg.errors import ConfigError, DataError
from nrcg.report.card import Card
from nrcg.steps.publish import Publication, _target, publish, push

CPU = torch.device("cpu")
METRICS = """experiment,method,scale,num_samples,accuracy_guide,accuracy_judge,accuracy_judge_lo,accuracy_judge_hi,\
fd_judge,cfd_judge,cfd_judge_lo,cfd_judge_hi,precision,recall,nonfinite,images_per_second,peak_memory_mib
toy,unconditional,0,64,0.4,0.42,0.3,0.5,12.5,54.1,41.0,66.0,0.5,0.5,0,3,100
toy,non_robust_x0_ema99,1,64,0.7,0.75,0.6,0.9,30,20.5,15,25,0.5,0.5,0,3,100
toy,non_robust_x0_ema99,2,64,0.9,0.89,0.8,0.95,40,10.1,7,13,0.5,0.5,0,3,100
"""


@pytest.fixture
def model(tmp_path):
    return write_tiny_pipeline(tmp_path / "models" / "ddpm")


@pytest.fixture
def guide(tmp_path):
    return write_tiny_classifier(tmp_path / "models" / "judge")


def test_the_folder_is_complete_and_opens_everywhere(tmp_path, model, guide):
    (tmp_path / "metrics.csv").write_text(METRICS)
    what = Publication(
        model, "me/balls", "cc0-1.0", (guide,), target="soccer", metrics=tmp_path / "metrics.csv", num_samples=3
    )
    out = tmp_path / "hub"
    publish(what, out=out, device=CPU)

    header, body = (out / "README.md").read_text().split("---\n")[1:]
    said = yaml.safe_load(header)
    assert said["license"] == "cc0-1.0" and said["library_name"] == "diffusers"
    assert "| non-robust + x0 + EMA 0.99 | 2.00 | 64 | 89.0 (80.0 to 95.0) | 10.10 (7.000 to 13.00) | 40.00 |" in body
    assert "| unconditional | 0 | 64 | 42.0 (30.0 to 50.0) |" in body and "20.50" not in body  # the best scale alone
    assert len(list(csv.DictReader((out / "metrics.csv").open()))) == 3
    # Three samples of 8 x 8, eight times as large, and below them, behind a gap, three guided ones.
    assert Image.open(out / "samples.png").size == (3 * 66 + 2, 2 * 68 + 12)

    x = {"num_samples": 2, "seed": 3}
    expected = GuidedDDPMPipeline.from_pretrained(model)(**x).samples
    assert torch.equal(GuidedDDPMPipeline.from_pretrained(out)(**x).samples, expected)
    assert type(DDPMPipeline.from_pretrained(out)) is DDPMPipeline
    custom = DiffusionPipeline.from_pretrained(out, custom_pipeline=str(out), trust_remote_code=True)
    assert isinstance(custom, GuidedDDPMPipeline)
    assert torch.equal(custom(**x).samples, expected)
    assert load_classifier(out / "classifiers" / "judge").classes == ["baseball", "basketball", "soccer"]


def test_the_cards_example_runs(tmp_path, model, guide, monkeypatch):
    out = tmp_path / "hub"
    publish(Publication(model, "me/balls", classifiers=(guide,), num_samples=1), out=out, device=CPU)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(out))
    names = {}
    exec(code.replace("num_samples=16", "num_samples=2"), names)
    assert len(names["images"]) == 2
    publish(Publication(model, str(out), num_samples=1), out=out, device=CPU)  # without a classifier: again, over it
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("num_samples=16", "num_samples=2"), names)
    assert not (out / "classifiers").exists()


def test_weights_of_half_size_in_small_files(tmp_path, model):
    out = tmp_path / "hub"
    publish(Publication(model, "me/balls", num_samples=1, shard_size="20KB"), out=out, device=CPU, dtype="bfloat16")
    files = sorted((out / "unet").glob("*.safetensors"))
    assert len(files) > 1
    again = GuidedDDPMPipeline.from_pretrained(out)
    assert len(again(1).images) == 1
    index = json.loads((out / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}


def test_no_token_is_one_line_and_the_folder_stays(tmp_path, model, monkeypatch):
    out = tmp_path / "hub"
    publish(Publication(model, "me/balls", num_samples=1), out=out, device=CPU)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"no token of the hub; the folder .*hub is whole: set HF_TOKEN"):
        push(out, "me/balls")


@pytest.mark.parametrize("also", ["", "pipeline.py", "published"])
def test_a_folder_of_something_else_is_not_replaced(tmp_path, model, also):
    """Nor one with a pipeline.py of its own, nor a published one with a file of one's own."""
    mine = tmp_path / "mine"
    if also == "published":
        publish(Publication(model, "me/balls", num_samples=1), out=mine, device=CPU)
    mine.mkdir(exist_ok=True)
    (mine / "thesis.txt").write_text("years")
    if also == "pipeline.py":
        (mine / also).write_text("print()")
    with pytest.raises(DataError, match="is there and is no published folder"):
        publish(Publication(model, "me/balls"), out=mine, device=CPU)
    assert (mine / "thesis.txt").read_text() == "years"


def test_a_file_in_its_place_is_refused(tmp_path, model):
    (tmp_path / "hub").write_text("mine")
    with pytest.raises(DataError, match="hub: is there and is no published folder"):
        publish(Publication(model, "me/balls"), out=tmp_path / "hub", device=CPU)


def test_a_class_without_a_name_stands_as_a_number():
    """ImageNet's by SPEC, for example: a name would be refused."""
    nameless = type("Nameless", (), {"classes": None, "count_classes": lambda self: 3})()
    assert _target(None, {"judge": nameless}) == 0 and _target("2", {"judge": nameless}) == 2
    card = Card("me/balls", "mit", (3, 8, 8), "DDPMScheduler", classifiers={"judge": None}, target=2)
    assert "ClassifierGuidance(classifier, 2, scale=5," in card.text()


def test_a_target_without_a_guide_and_an_unknown_one_are_refused(tmp_path, model, guide):
    with pytest.raises(ConfigError, match="--target: nothing guides; give --classifier"):
        publish(Publication(model, "me/balls", target="soccer"), out=tmp_path / "hub", device=CPU)
    with pytest.raises(ConfigError, match="'tennis' is no class; allowed: baseball, basketball, soccer"):
        publish(Publication(model, "me/balls", classifiers=(guide,), target="tennis"), out=tmp_path / "hub", device=CPU)
    assert not (tmp_path / "hub").exists()

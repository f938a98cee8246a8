"""The report: complete, self-contained, escaped, and tolerant of what is optional."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from synthetic import COLUMNS, NAN, balls, context, metric_rows, write_results

from nrcg.csv_files import write_csv
from nrcg.errors import DataError
from nrcg.files import atomic_write
from nrcg.report.page import write_report
from nrcg.report.sections import CAPTIONS, data_uri, shrink


class Page(HTMLParser):
    """What a browser would load, and the page's text and balance of tags."""

    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.text, self.stack, self.policy = [], [], "", [], ""
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.loads += [attrs[name] for name in ("src", "srcset", "data", "poster", "action") if attrs.get(name)]
        if attrs.get("href", "").startswith("#") is False and "href" in attrs:
            self.loads.append(attrs["href"])
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    found = write_results(tmp_path_factory.mktemp("report"))
    for name in CAPTIONS:  # stand-ins: drawing them all takes seconds
        atomic_write(found["figures_dir"] / f"{name}.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    return found


def report(out, paths, **changes):
    write_report(out, context=context() | changes, **paths)
    return out.read_text(encoding="utf-8")


def test_report_loads_nothing_and_holds_everything(paths, tmp_path):
    text = report(tmp_path / "report.html", paths)
    page = Page(text)
    assert all(address.startswith("data:image/") for address in page.loads)
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in text and "url(" not in text
    assert page.policy.startswith("default-src 'none'")
    # 8 charts, 8 methods' samples, the best setup's samples, classifiers, loss, the DDPM's grid
    assert len(page.loads) == 8 + 8 + 1 + 1 + 1 + 1
    for words in (
        "14 hold, 1 do not hold, 0 not measured",
        "non-robust + x0 + EMA 0.99, scale 25: the judge finds 92.0 % baseball, cfd_judge is 12.50",
        "Fréchet",
        "155.19",
        "features of the judge network instead of Inception; 128 samples instead of 50,176; 24 pixels a side",
        "mobilenet_v3_small",
        "99.3",
        "ddpm.unet.block_out_channels",
        "[32, 64, 96]",
        "0123456789abcdef0123456789abcdef01234567",
        "torch\xa02.9.0",
        "0.99 is 0.9606",
        "first 64 samples",
    ):
        assert words in page.text, words


def test_inlined_pictures_open(paths, tmp_path):
    page = Page(report(tmp_path / "report.html", paths))
    sizes = []
    for address in page.loads:
        kind, content = re.fullmatch(r"data:image/([a-z+]+);base64,(.+)", address).groups()
        raw = base64.b64decode(content, validate=True)
        if kind == "png":
            sizes.append(Image.open(io.BytesIO(raw)).size)
        else:
            assert b"<svg" in raw
    assert sizes.count((16 * 26 + 2, 28)) == 8  # one strip of 16 samples of 24 pixels per method
    assert (8 * 25 + 1, 8 * 25 + 1) in sizes  # 64 samples in a square


def test_text_is_escaped(paths, tmp_path):
    keys = ("description", "experiment", "dataset", "commit", "start", "target")
    form = "</title><script>alert('{0}')</script><img src=http://example.org/{0}.png onerror=\"{0}\">{{{{ 7 * 7 }}}}"
    hostile = {key: form.format(key) for key in keys}
    text = report(tmp_path / "report.html", paths, **hostile)
    assert "<script" not in text and "<img src=http" not in text and "{{ 7 * 7 }}" in text
    page = Page(text)
    assert [key for key in keys if hostile[key] not in page.text] == []
    assert all(address.startswith("data:image/") for address in page.loads)


def test_what_the_files_say_is_escaped(tmp_path):
    """Class names, an architecture, protocols and a method, each of which somebody else may have written."""
    hostile = "<script>alert(1)</script><b title=\"'>&amp;"
    paths = write_results(tmp_path)
    rows = [row | {"protocols": hostile, "reference": hostile} for row in metric_rows()]
    rows.append(rows[-1] | {"method": hostile})
    write_csv(paths["metrics_csv"], rows, [*COLUMNS, "protocols", "reference"])
    config = paths["models_dir"] / "classifiers/judge/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architecture": hostile}))
    text = report(tmp_path / "report.html", paths, classes=[hostile, "baseball"], target=hostile)
    assert "<script" not in text and "<b title" not in text
    assert Page(text).text.count(hostile) > 5


def test_settings_and_versions_are_escaped(paths, tmp_path):
    hostile = "<b onclick=x>&amp;"
    text = report(tmp_path / "report.html", paths, settings={hostile: {"a": [hostile]}}, versions={hostile: hostile})
    assert "<b onclick" not in text and "&lt;b onclick=x&gt;&amp;amp;" in text


def test_optional_inputs_may_be_missing(paths, tmp_path):
    bare = paths | dict.fromkeys(("figures_dir", "samples_dir", "models_dir"), tmp_path / "none")
    write_report(tmp_path / "r.html", context={"experiment": "mine", "target": "b", "classes": ["a", "b"]}, **bare)
    page = Page((tmp_path / "r.html").read_text())
    assert not page.loads
    for words in ("No samples were kept", "No figures were drawn", "No record of the classifiers", "50.0 %"):
        assert words in page.text
    assert "published, " not in page.text  # an experiment that the paper has not


@pytest.mark.parametrize("name", ["forward_csv", "metrics_csv"])
def test_missing_tables_are_an_error_and_no_report_is_left(paths, tmp_path, name):
    with pytest.raises(DataError, match=r"absent\.csv: no such file"):
        report(tmp_path / "r.html", paths | {name: tmp_path / "absent.csv"})
    assert not (tmp_path / "r.html").exists()


def test_context_without_a_needed_name(paths, tmp_path):
    with pytest.raises(DataError, match="lacks 'target'"):
        write_report(tmp_path / "r.html", context={"experiment": "a"}, **paths)


def test_broken_classifier_record_is_named(paths, tmp_path):
    shutil.copytree(paths["models_dir"], tmp_path / "models")
    broken = tmp_path / "models" / "classifiers" / "judge" / "config.json"
    broken.write_text('{"architecture": ')
    with pytest.raises(DataError, match=re.escape(str(broken))):
        report(tmp_path / "r.html", paths | {"models_dir": tmp_path / "models"})


def test_an_unreadable_loss_curve_is_left_out_and_named(paths, tmp_path, capsys):
    shutil.copytree(paths["models_dir"], tmp_path / "models")
    broken = tmp_path / "models/ddpm/training.csv"
    broken.write_bytes(broken.read_bytes()[:-3])
    page = Page(report(tmp_path / "r.html", paths | {"models_dir": tmp_path / "models"}))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nrcg: warning: {broken}: ") and line.endswith("; the report leaves out the loss curve")
    assert "its training.csv cannot be read" in page.text and "last training loss" not in page.text
    assert "last training loss" in report(tmp_path / "whole.html", paths)


def test_nothing_finite(paths, tmp_path):
    measured = [key for key, value in metric_rows()[0].items() if isinstance(value, float) and key != "scale"]
    rows = [row | dict.fromkeys(measured, NAN) | {"nonfinite": 128.0} for row in metric_rows()]
    write_csv(tmp_path / "metrics.csv", rows, COLUMNS)
    page = Page(report(tmp_path / "r.html", paths | {"metrics_csv": tmp_path / "metrics.csv"}))
    assert "No guided setup has a finite class-conditional distance" in page.text
    assert "128 samples are not finite" in page.text and "nan" not in page.text.lower().replace("provenance", "")


def test_equal_inputs_give_an_equal_report(paths, tmp_path):
    assert report(tmp_path / "a.html", paths) == report(tmp_path / "b.html", paths)


@pytest.mark.parametrize("channels", [1, 3])
def test_shrink_keeps_small_images_and_the_look_of_large_ones(channels):
    images = balls(3, 128, 0)[..., :channels]
    assert shrink(images, 128) is images
    small = shrink(images, 32)
    assert small.shape == (3, 32, 32, channels) and small.dtype == np.uint8
    assert abs(small.mean() - images.mean()) < 2


def test_data_uri():
    assert data_uri(b"\x00\xff", "png") == "data:image/png;base64,AP8="

"""Published numbers beside ours: what may be compared, and why not."""

import pytest
from synthetic import inception_rows, metric_rows

from nrcg.report.comparison import TITLES, cells, compare, markdown

PUBLISHED = {"image_size": 64, "num_steps": 400, "start": "standard_normal"}


def lines(experiment="celeba", rows=None, num_reference=None, **setting):
    rows = rows or inception_rows(metric_rows())
    rows = [row | {"num_samples": 50176.0, "cfid_torcheval_lo": 12.0, "cfid_torcheval_hi": 13.0} for row in rows]
    if num_reference is not None:
        rows = [row | {"num_reference": float(num_reference)} for row in rows]
    return compare(experiment, rows, **PUBLISHED | setting)


def test_under_the_published_protocol_values_may_be_compared():
    found = lines()
    assert len(found) == 8  # two setups; accuracy by guide and by judge, FID, cFID
    cfid = next(line for line in found if line.quantity == "cFID (cfid_torcheval)" and "EMA" in line.setup)
    assert (cfid.published, cfid.ours, cfid.interval) == ("13.90", "12.50", "12.00 to 13.00")
    assert (cfid.scale, cfid.samples, cfid.verdict) == ("25 / 150", "50,176 / 50,176", "yes")
    judged = [line for line in found if "accuracy_judge" in line.quantity]
    assert all(line.verdict == "no: graded by another classifier than the one that guides" for line in judged)


@pytest.mark.parametrize(
    ("experiment", "setting", "words"),
    [
        ("celeba", {"image_size": 24}, "24 pixels a side instead of 64"),
        ("celeba", {"start": "data_mean"}, "start data_mean"),
        ("celeba", {"num_reference": 100}, "100 reference images, each once, instead of 50,176 drawn with replacement"),
        ("sportballs", {"source": "sportballs"}, "images drawn anew"),
        ("celebahq", {}, "50,176 samples instead of 1,024"),
    ],
)
def test_each_deviation_is_named(experiment, setting, words):
    found = [line for line in lines(experiment, **setting) if line.quantity.startswith(("FID", "cFID"))]
    assert len(found) == 4 and all(line.verdict.startswith("no: ") and words in line.verdict for line in found)


def test_every_protocol_has_its_own_lines():
    rows = [row | {"fid": 9.0, "cfid": 8.0, "fd_judge": 7.0, "cfd_judge": 6.0} for row in inception_rows(metric_rows())]
    reasons = {line.quantity: line.verdict for line in lines(rows=rows)}
    assert reasons["FID (fid)"] == "no: clean-fid's Inception and resizing instead of torcheval's"
    assert reasons["FID (fid_torcheval)"] == "yes"
    assert reasons["FID (fd_judge)"] == "no: features of the judge network instead of Inception"


def test_what_was_not_measured_says_so():
    rows = [row for row in inception_rows(metric_rows()) if row["method"] == "unconditional"]
    guided = [line for line in lines(rows=rows) if "EMA" in line.setup]
    assert guided and all((line.ours, line.verdict) == ("-", "no: not measured") for line in guided)


def test_markdown_is_a_table():
    text = markdown("celeba", inception_rows(metric_rows()), lines())
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 8 and all(line.count("|") == len(TITLES) + 1 for line in table)
    assert len(cells(lines()[0])) == len(TITLES)
    assert "arXiv 2507.00687, table 1" in text
    assert "has no numbers for it" in markdown("mine", metric_rows(), compare("mine", metric_rows()))


def test_markdown_escapes_html_and_table_edges():
    """A class may be called anything, and reference names it."""
    rows = [row | {"reference": "images, class <script>alert(1)</script> | b"} for row in metric_rows("sportballs")]
    text = markdown("sportballs", rows, compare("sportballs", rows))
    assert "<script>" not in text
    assert "Compared with: images, class &lt;script&gt;alert(1)&lt;/script&gt; &#124; b" in text

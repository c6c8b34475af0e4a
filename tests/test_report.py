"""The demo's page, from files as nnU-Net writes them."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_semicml.data.phantom import write_phantom_dataset
from nnunetv2_semicml.demo.report import ModalityResults, write_report
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation.figures import Volumes, draw_case

NAN = float("nan")
READER = SimpleITKIO()
METHODS = {"supervised only": 0.5, "Semi-CML": 0.625, "PReL": 0.6}


@pytest.fixture
def results(tmp_path):
    """Two modalities, three methods, two cases: copies of the reference segmentations stand for the predictions."""
    raw = write_phantom_dataset(tmp_path, 500, "Report", num_labeled=1, num_unlabeled=1, num_test=2, shape=(16, 16, 16))
    labels = sorted((raw / "labelsTs").glob("*.nii.gz"))
    modalities = []
    for channel, modality in enumerate(("FLAIR", "T1")):
        scans = tmp_path / modality
        scans.mkdir()
        for file in (raw / "imagesTs").glob(f"*_{channel:04d}.nii.gz"):
            file.rename(scans / file.name.replace(f"_{channel:04d}", "_0000"))
        summaries = {}
        for method, dice in METHODS.items():
            predictions = tmp_path / "predictions" / method / modality
            predictions.mkdir(parents=True)
            copies = [shutil.copy(file, predictions) for file in labels]
            cases = [
                {"reference_file": str(f), "prediction_file": copy, "metrics": {"1": {"Dice": dice + 0.25 * i}}}
                for i, (f, copy) in enumerate(zip(labels, copies, strict=True))
            ]
            summaries[method] = predictions / "summary.json"
            summaries[method].write_text(json.dumps({"metric_per_case": cases}))
        resting = {"mean_fg_dice": [0.5, 0.6], "train_losses": [NAN, -0.5]}
        logs = dict.fromkeys(METHODS, resting)
        modalities.append(ModalityResults(modality, scans, summaries, logs, {"PReL": 2}))
    return modalities


def write(results, file):
    picture = file.with_name("unsupervised_terms.png")
    picture.write_bytes(b"a picture")
    commands = [("nnUNetv2_train 500", 12.3)]
    terms = {"PReL": ("A note.", picture)}
    write_report(file, "A title", {"Seed": "7"}, results, "Explained.", terms, ["export a=b"], commands)
    return file.read_text(encoding="utf-8")


def test_page_shows_every_method_and_each_step_between_them(results, tmp_path):
    page = write(results, tmp_path / "report.html")
    text = " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())
    for expected in (
        "0.625 ± 0.177",  # 0.5 and 0.75
        "0.750 ± 0.177",
        "Semi-CML − supervised only",
        "PReL − Semi-CML",
        "+0.125 ± 0.000, better in 2 of 2",
        "−0.025 ± 0.000, better in 0 of 2",
        "PReL: loss terms on unlabeled cases A note.",
        "Explained.",
        "nnUNetv2_train 500 # 12 s",
    ):
        assert expected in text
    assert "nan" not in text.lower()


def test_page_needs_no_other_file(results, tmp_path):
    sources = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            sources.extend(value for name, value in attrs if name in ("src", "srcset", "href"))

    Parser().feed(write(results, tmp_path / "report.html"))
    # light and dark: paired, curves of two modalities; terms; three cases of scan + three methods for each modality
    assert len(sources) == 2 * (1 + 2) + 1 + 2 * 3 * 4
    data = [source.removeprefix("data:image/png;base64,") for source in sources]
    assert [base64.b64decode(content)[:4] for content in data].count(b"\x89PNG") == len(data) - 1
    assert base64.b64encode(b"a picture").decode() in data


def test_methods_with_other_cases_are_refused(results, tmp_path):
    file = results[0].summaries["PReL"]
    content = json.loads(file.read_text())
    content["metric_per_case"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(
        RuntimeError, match=r"PReL/FLAIR/summary.json: found case \w+ only for supervised only, Semi-CML; expected"
    ):
        write(results, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("damaged", ["scan", "reference", "prediction"])
def test_overlays_show_no_damaged_file(results, tmp_path, damaged):
    summary = results[0].summaries["PReL"]
    files = json.loads(summary.read_text())["metric_per_case"][0]
    case = Path(files["reference_file"]).name.removesuffix(".nii.gz")
    scan = results[0].images / f"{case}_0000.nii.gz"
    volumes = Volumes({case: str(scan)}, {case: files["reference_file"]}, {"PReL": summary.parent}, ".nii.gz", READER)
    file = {"scan": scan, "reference": Path(files["reference_file"]), "prediction": Path(files["prediction_file"])}
    file[damaged].write_bytes(file[damaged].read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{file[damaged]}: found an unreadable file \(a gzip stream without its end"):
        draw_case("worst", case, volumes, {"PReL": 0.5}, {"PReL": "#e69f00"})


class Code:
    """Leaves a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)

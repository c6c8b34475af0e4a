"""The leaderboard with stub programs in the place of nnU-Net's: what runs, what is skipped, what is told."""

import base64
import csv
import html
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import submitit
from matplotlib import rc_context
from matplotlib.figure import Figure
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage.io import imsave
from tifffile import imwrite

from nnunetv2_semicml import ext_trainers
from nnunetv2_semicml.command_line import run_leaderboard
from nnunetv2_semicml.data.checkpoint_file import content_digest
from nnunetv2_semicml.data.files import read_json
from nnunetv2_semicml.data.modality_group import Modality, ModalityGroup
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation import jobs, leaderboard
from nnunetv2_semicml.evaluation.figures import Volumes, draw_case, themed
from nnunetv2_semicml.evaluation.jobs import Job, Train, run_jobs, run_program
from nnunetv2_semicml.evaluation.leaderboard_page import Training, plot_distributions, plot_trainings

TEST_CASES = [f"P{i}" for i in range(4)]
CHANNELS = ["FLAIR", "T1"]
SEMI, STOCK = "nnUNetTrainerSemiCML", "each:nnUNetTrainer"
PREL, PLUS = SEMI + "PReL", SEMI + "Plus"
SETTINGS = {"asc_weight": 0.35}  # of the trainers of the package

# Without site-packages: they run a hundred times.
STUB = """#!{python} -S
import gzip, json, os, pickle, sys, zipfile
from pathlib import Path

words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([Path(sys.argv[0]).name, *words, os.environ.get("nnUNet_semicml_seed")]) + "\\n")
if (fail := os.environ.get("FAIL")) and all(word in words for word in fail.split()):
    print("CUDA out of memory")
    sys.exit(3)
if sentence := os.environ.get("REFUSE_" + words[words.index("-tr") + 1]):
    sys.path.insert(0, os.environ["REPOSITORY"])
    from nnunetv2_semicml.errors import UserError
    try:
        raise UserError(*sentence.split("|"))
    finally:
        print("Exception in thread Thread-1", file=sys.stderr)
after = lambda flag: words[words.index(flag) + 1]
results = Path(os.environ["nnUNet_results"])
"""
# A checkpoint is an archive as PyTorch's. That of the package's trainers says what it was made of; what that is, is
# left by the test. nnU-Net's trainer leaves copies of what it has read.
TRAIN = """
dataset, configuration, fold = words[:3]
preprocessed = Path(os.environ["nnUNet_preprocessed"])
datasets = [dataset]
made_of = {}
if "SemiCML" in after("-tr"):
    group = json.loads((preprocessed / dataset / "modalities.json").read_text())
    datasets += [modality["dataset_name"] for modality in group["modalities"]]
    noted = Path(os.environ["CALLS"]).with_name("provenance.json")
    made_of = json.loads(noted.read_text()) if noted.is_file() else {}
for name in dict.fromkeys(datasets):
    model = results / name / f"{after('-tr')}__{after('-p')}__{configuration}"
    folder = model / f"fold_{fold}"
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    state = folder / "training_state"
    for file in [folder, *([state] if state.is_dir() else [])] if "--val" not in words else []:
        with zipfile.ZipFile(file / "checkpoint_final.pth", "w") as archive:
            content = {"provenance": made_of} if made_of else {"weights": [os.getpid()]}
            content["logging"] = {"mean_fg_dice": [0.5, 0.75], "train_losses": [0.0, -0.5]}
            archive.writestr("checkpoint_final/data.pkl", pickle.dumps(content, protocol=2))
            archive.writestr("checkpoint_final/version", "3\\n")
            archive.writestr("checkpoint_final/data/0", os.urandom(2000))
    if "--val" not in words:
        for file in ("dataset.json", "dataset_fingerprint.json"):
            (model / file).write_bytes((preprocessed / name / file).read_bytes())
        (model / "plans.json").write_bytes((preprocessed / name / f"{after('-p')}.json").read_bytes())
    split = json.loads((preprocessed / name / "splits_final.json").read_text())[int(fold)]
    cases = [{"reference_file": f"/site/{case}.nii.gz"} for case in split["val"]]
    (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
"""
# A scan is 10 and, in the lesion, 100 (FLAIR), 200 (T1) or 250 (T1ce). The stub finds the lesion in the first file,
# shifted by two voxels if it is of the weak trainer, and by one more in T1. For other files than NIfTI it has answers.
PREDICT = """
model = results / after("-d") / f"{after('-tr')}__{after('-p')}__{after('-c')}"
folds = words[words.index("-f") + 1 : words.index("-device")]
assert all((model / f"fold_{fold}" / "checkpoint_final.pth").is_file() for fold in folds if fold.isdigit())
out, scans = Path(after("-o")), sorted(Path(after("-i")).iterdir())
out.mkdir()
brightest = {s.name: max(gzip.decompress(s.read_bytes())[352:]) if s.suffix == ".gz" else s.read_text("latin1")
             for s in scans}
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["inputs", after("-d"), after("-tr"), brightest]) + "\\n")
if answers := os.environ.get("ANSWERS"):
    for answer in Path(answers).iterdir():
        (out / answer.name).write_bytes(answer.read_bytes())
    scans = []
for scan in scans:
    if "_0000" not in scan.name:
        continue
    content = gzip.decompress(scan.read_bytes())
    header, voxels = content[:352], content[352:]  # NIfTI: rows of 24 bytes
    shift = 2 * (after("-tr") == "nnUNetTrainer") + (max(voxels) == 200)
    rows = [bytes(voxel > 50 for voxel in voxels[i : i + 24]) for i in range(0, len(voxels), 24)]
    shifted = b"".join(row[24 - shift :] + row[: 24 - shift] for row in rows)
    (out / scan.name.replace("_0000", "")).write_bytes(gzip.compress(header + shifted))
"""


def write_image(file, voxels):
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1, 1, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def lesion(number):
    mask = np.zeros((6, 20, 24), np.uint8)
    mask[1:4, 4 : 10 + number, 5:14] = 1
    return mask


def write_preprocessed(root, dataset, labeled, unlabeled, modalities=None, channels=CHANNELS, lacking=()):
    """What planning leaves: the group, and of every dataset its description, plans and a folder of cases.

    `modalities`: name -> channels; None: every channel by itself; {}: all are one, "all", in the dataset's own place.
    `lacking`: (case, modality) that are not there.
    """
    number, name = re.fullmatch(r"Dataset(\d+)_(\w+)", dataset).groups()
    if modalities is None:
        modalities = {channel: [i] for i, channel in enumerate(channels)}
    places = {m: (c, f"Dataset{int(number) + 1 + i}_{name}_{m}") for i, (m, c) in enumerate(modalities.items())}
    of_group = [
        Modality(
            m,
            of_modality,
            of_modality,
            place,
            {case: "digest" for case in labeled if (case, m) not in lacking},
            {case: "digest" for case in unlabeled if (case, m) not in lacking},
        )
        for m, (of_modality, place) in (places or {"all": ([*range(len(channels))], dataset)}).items()
    ]
    configuration = {"data_identifier": "nnUNetPlans_2d", "architecture": {}}
    plans = {"plans_name": "nnUNetPlans", "configurations": {"2d": configuration}}
    splits = [{"train": [c for c in labeled if c != case] or ["Z"], "val": [case]} for case in labeled] * 2
    described = {dataset: channels, **{m.dataset_name: [channels[c] for c in m.channels] for m in of_group}}
    for of_dataset, names in described.items():
        (root / "preprocessed" / of_dataset / "nnUNetPlans_2d").mkdir(parents=True, exist_ok=True)
        (root / "preprocessed" / of_dataset / "dataset.json").write_text(json.dumps(describe(names, len(labeled))))
        (root / "preprocessed" / of_dataset / "nnUNetPlans.json").write_text(json.dumps(plans))
        (root / "preprocessed" / of_dataset / "splits_final.json").write_text(json.dumps(splits))
        (root / "preprocessed" / of_dataset / "dataset_fingerprint.json").write_text(json.dumps({"cases": [*labeled]}))
        (root / "results" / of_dataset).mkdir(parents=True, exist_ok=True)
    made = {
        m.dataset_name: {"settings": "0123456789ab", "labeled": m.labeled, "unlabeled": m.unlabeled} for m in of_group
    }
    group = ModalityGroup(dataset, of_group, preprocessed={"nnUNetPlans_2d": made})
    for modality in of_group:
        group.alone(modality).save()
    group.save()


def describe(channels, number, file_ending=".nii.gz"):
    return {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": {"background": 0, "tumor": 1},
        "numTraining": number,
        "file_ending": file_ending,
    }


def plan_anew(study, channels=CHANNELS, file_ending=".nii.gz", **options):
    """Plan Dataset500_Toy otherwise."""
    for folder in ("preprocessed", "results"):
        shutil.rmtree(study / folder, ignore_errors=True)
    write_preprocessed(study, "Dataset500_Toy", ["A", "B"], ["C", "D"], channels=channels, **options)
    for file in [*(study / "preprocessed").glob("*/dataset.json"), study / "raw" / "Dataset500_Toy" / "dataset.json"]:
        content = json.loads(file.read_text()) if "preprocessed" in str(file) else describe(channels, 2)
        file.write_text(json.dumps(content | {"file_ending": file_ending}))


def write_provenance(job):
    """What a trainer of the package notes, for the stub, which has no time to import it."""
    group = ModalityGroup.load(job.dataset)
    plans = read_json(Path(os.environ["nnUNet_preprocessed"], job.dataset, f"{job.model.plans}.json"))
    fold = int(job.fold) if job.fold.isdecimal() else job.fold
    made_of = group.provenance(plans, job.model.configuration, fold) | {"settings": SETTINGS, "first stage": None}
    first = Path(str(job.target).replace(PREL, SEMI), "checkpoint_final.pth")
    if PREL in str(job.target) and first.is_file():
        made_of["first stage"] = content_digest(first)
    Path(os.environ["CALLS"]).with_name("provenance.json").write_text(json.dumps(made_of))


class InProcess:
    """Stands for submitit's executor: runs a job when it is submitted, in this process."""

    def __init__(self, folder, cluster):
        self.folder = Path(folder)

    def update_parameters(self, **parameters):
        pass

    def submit(self, job):
        if isinstance(job, Train):
            write_provenance(job)
        problem = job()
        return SimpleNamespace(
            done=lambda: True,
            exception=lambda: None,
            result=lambda: problem,
            paths=SimpleNamespace(stdout=self.folder / f"{job.name}.out"),
        )


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Dataset500_Toy with two labeled, two unlabeled and four test cases, planned; stub programs."""
    for variable in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    monkeypatch.delenv("nnUNet_semicml_seed", raising=False)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    raw = tmp_path / "raw" / "Dataset500_Toy"
    for i, (folder, case) in enumerate(
        [("Tr", "A"), ("Tr", "B"), ("Un", "C"), ("Un", "D"), *(("Ts", c) for c in TEST_CASES)]
    ):
        for channel in range(2):
            scan = np.where(lesion(i), 100 * (channel + 1), 10).astype(np.uint8)
            write_image(raw / f"images{folder}" / f"{case}_000{channel}.nii.gz", scan)
        if folder != "Un":
            write_image(raw / f"labels{folder}" / f"{case}.nii.gz", lesion(i))
    (raw / "dataset.json").write_text(json.dumps(describe(CHANNELS, 2)))
    write_preprocessed(tmp_path, "Dataset500_Toy", ["A", "B"], ["C", "D"])
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("nnUNetv2_train", TRAIN), ("nnUNetv2_predict", PREDICT)):
        (programs / name).write_text(STUB.replace("{python}", sys.executable) + text)
        (programs / name).chmod(0o755)
    monkeypatch.setattr(leaderboard, "PROGRAMS", programs)
    monkeypatch.setattr(submitit, "AutoExecutor", InProcess)
    # without nnU-Net's search for classes, which takes seconds
    monkeypatch.setattr(
        leaderboard,
        "find_settings",
        lambda trainer: (SETTINGS if SEMI in trainer else None, SEMI if trainer == PREL else None),
    )
    return tmp_path


@pytest.fixture
def call(study, monkeypatch, capsys):
    """Runs the command line and returns what the stubs were called with.

    `error` is a part of the expected sentence; `page`: whether to write the page, which takes longer than all the rest.
    """
    write_page = leaderboard.write_page

    def run(*options, error=None, page=False):
        monkeypatch.setattr(leaderboard, "write_page", write_page if page else lambda file, report: file.touch())
        (study / "calls.txt").unlink(missing_ok=True)
        words = ["-d", 500, "-c", "2d", "-f", 0, "-device", "cpu", "-o", study / "out", *options]
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_semicml_leaderboard", *map(str, words)])
        if error is None:
            run_leaderboard()
        else:
            with pytest.raises(SystemExit):
                run_leaderboard()
            assert re.search(error, capsys.readouterr().err)
        calls = study / "calls.txt"
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.is_file() else []

    return run


def read_csv(study, out="out"):
    return pd.read_csv(study / out / "leaderboard.csv")


def trained(calls):
    """(dataset, fold, trainer, flag) of the trainings."""
    return [
        (c[1], c[3], c[5], next((w for w in c if w in ("--c", "--val")), "")) for c in calls if c[0] == "nnUNetv2_train"
    ]


def inputs(calls, dataset):
    """What nnU-Net found in the folder of scans, when this dataset's network predicted."""
    return next(c[3] for c in calls if c[:2] == ["inputs", dataset])


def predicted(calls):
    return [(c[c.index("-d") + 1], c[c.index("-tr") + 1]) for c in calls if c[0] == "nnUNetv2_predict"]


def fold_folder(study, dataset="Dataset500_Toy", trainer=SEMI, results="results"):
    return study / results / dataset / f"{trainer}__nnUNetPlans__2d" / "fold_0"


def text_of(file):
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(page).split())


def test_trains_predicts_evaluates_and_then_has_nothing_to_do(study, call):
    methods = ["--methods", SEMI, f"Supervised only={STOCK}", "all:nnUNetTrainer"]
    calls = call(*methods, "-f", 0, 1)
    names = "Dataset500_Toy", "Dataset501_Toy_FLAIR", "Dataset502_Toy_T1"
    assert sorted(trained(calls)) == sorted(
        [(names[0], fold, SEMI, "") for fold in "01"]
        + [(name, fold, "nnUNetTrainer", "") for name in names for fold in "01"]
    )
    assert sorted(predicted(calls)) == sorted(
        [(name, SEMI) for name in names[1:]] + [(name, "nnUNetTrainer") for name in names]
    )
    assert all(c[c.index("-f") : c.index("-f") + 3] == ["-f", "0", "1"] for c in calls if "predict" in c[0])
    # the test scans of a modality by itself have the channel 0
    for name, files in zip(names, ({"0000": 100, "0001": 200}, {"0000": 100}, {"0000": 200}), strict=True):
        expected = {f"{case}_{i}.nii.gz": brightest for case in TEST_CASES for i, brightest in files.items()}
        assert inputs(calls, name) == expected

    table = read_csv(study)
    assert list(table.columns) == leaderboard.COLUMNS
    assert len(table) == len(TEST_CASES) * (2 + 2 + 1)
    dice = table.groupby(["modality", "method"])["dice"].mean()
    # nine voxels wide: a shift of s leaves 1 - s / 9
    assert dice["FLAIR", SEMI] == 1
    assert dice["T1", SEMI] == pytest.approx(8 / 9, abs=1e-5)
    assert dice["FLAIR", "Supervised only"] == pytest.approx(7 / 9, abs=1e-5)
    assert dice["T1", "Supervised only"] == pytest.approx(6 / 9, abs=1e-5)
    assert dice["FLAIR + T1", "all:nnUNetTrainer"] == pytest.approx(7 / 9, abs=1e-5)
    assert set(zip(table["labeled"], table["unlabeled"], strict=True)) == {(2, 2)}

    before = (study / "out" / "leaderboard.csv").read_bytes()
    assert call(*methods, "-f", 0, 1) == []
    assert (study / "out" / "leaderboard.csv").read_bytes() == before
    assert not list((study / "out").rglob("*.partial"))


def test_pages_show_every_method_and_difference_and_need_no_other_file(study, call):
    call(
        "--methods", SEMI, f"Supervised only={STOCK}", "all:nnUNetTrainer", "--reference", "Supervised only", page=True
    )
    page, markdown = text_of(study / "out" / "leaderboard.html"), (study / "out" / "leaderboard.md").read_text()
    for text in (page, markdown):
        assert "nnUNetv2_semicml_leaderboard -d 500 -c 2d" in text
        assert "Differences to Supervised only" in text
        assert "Supervised only has no results on FLAIR + T1, where nothing is compared with it." in text
        assert "0.667 ± 0.000" in text  # T1, shifted by three of nine voxels
        assert "+0.222" in text
        assert "nan" not in text.lower()
    assert (
        "| Dice | FLAIR | tumor | nnUNetTrainerSemiCML | +0.222 | +0.222 … +0.222 | 4 / 0 | 0.125 | 0.250 |" in markdown
    )
    assert "FLAIR + T1" in page

    sources = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            sources.extend(value for name, value in attrs if name in ("src", "srcset", "href"))

    Parser().feed((study / "out" / "leaderboard.html").read_text(encoding="utf-8"))
    # light and dark: distributions, differences, trainings; two cases of the scan and of two, two, one methods
    assert len(sources) == 2 * 3 + 2 * (3 + 3 + 2)
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_page_shows_how_the_networks_were_trained(study, call, monkeypatch):
    methods = ["--methods", STOCK, f"PReL={SEMI}+{PREL}", "-f", 0, 1, "--note", "Read <this> first."]
    call(*methods)
    terms = fold_folder(study, trainer=PREL) / "unsupervised_terms.png"
    terms.write_bytes(b"a picture")
    reports = []
    write_markdown = leaderboard.write_markdown
    monkeypatch.setattr(
        leaderboard, "write_markdown", lambda file, report: reports.append(report) or write_markdown(file, report)
    )
    assert call(*methods, page=True) == []
    logged = {"mean_fg_dice": [0.5, 0.75], "train_losses": [0.0, -0.5]}
    assert [(t.method, t.modality, t.logs, t.epochs_before, t.terms) for t in reports[0].trainings] == [
        *((STOCK, modality, [logged] * 2, 0, None) for modality in CHANNELS),
        *(("PReL", modality, [logged] * 2, 2, terms) for modality in CHANNELS),
    ]
    page = (study / "out" / "leaderboard.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64," + base64.b64encode(b"a picture").decode()) == 1
    assert "PReL: what it learns from unlabeled cases" in text_of(study / "out" / "leaderboard.html")
    headings = re.findall(r"<h2>([^<]+)</h2>", page)
    assert (headings[0], headings[-1]) == ("Every patient", "What this is of")  # a picture first
    for file in ("leaderboard.html", "leaderboard.md"):
        assert re.search(r"Read (&lt;|\\<)this(&gt;|\\>) first\.", (study / "out" / file).read_text(encoding="utf-8"))


def test_page_shows_the_terms_of_every_modality_that_was_trained_alone(study, call):
    methods = "--methods", f"each:{SEMI}"
    call(*methods)
    for dataset in ("Dataset501_Toy_FLAIR", "Dataset502_Toy_T1"):
        (fold_folder(study, dataset) / "unsupervised_terms.png").write_text(dataset)
    assert call(*methods, page=True) == []
    page = (study / "out" / "leaderboard.html").read_text(encoding="utf-8")
    for modality, dataset in zip(CHANNELS, ("Dataset501_Toy_FLAIR", "Dataset502_Toy_T1"), strict=True):
        picture = re.escape(base64.b64encode(dataset.encode()).decode())
        title = rf"<summary>each:{SEMI}, {modality}: what it learns from unlabeled cases</summary>"
        assert re.search(rf"{title}\s*<p[^<]*</p>\s*<figure><img [^>]*base64,{picture}\"", page)


def test_curves_are_means_of_the_folds_after_the_epochs_of_the_first_stage():
    folds = [{"mean_fg_dice": [0.5, 0.7, 0.9], "train_losses": [0.0] * 3}, {"mean_fg_dice": [0.7, float("nan")]}, {}]
    trainings = [Training("a", "FLAIR", folds, 10, None), Training("b", "T1", [{}, folds[0]], 0, None)]
    figure = Figure()
    plot_trainings(figure, trainings, {"a": "red", "b": "blue"})
    dice, t1, losses, _ = figure.axes
    assert [axis.get_title() for axis in (dice, t1)] == CHANNELS
    (line,) = dice.lines
    np.testing.assert_allclose(line.get_xydata(), [[11, 0.6], [12, np.nan]])
    assert [line.get_color() for axis in (dice, t1) for line in axis.lines] == ["red", "blue"]
    np.testing.assert_allclose(t1.lines[0].get_xydata(), [[1, 0.5], [2, 0.7], [3, 0.9]])
    np.testing.assert_allclose(losses.lines[0].get_xydata(), [[11, 0], [12, 0], [13, 0]])


def test_jobs_in_local_processes(study, call, monkeypatch):
    """The rest of the tests runs jobs in this process."""
    monkeypatch.undo()
    for variable in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{variable}", str(study / variable))
    monkeypatch.setenv("CALLS", str(study / "calls.txt"))
    monkeypatch.setenv("FAIL", "-i")
    monkeypatch.setattr(leaderboard, "PROGRAMS", study / "bin")
    message = r"predict FLAIR .*: CUDA out of memory \(exit status 3 of .*nnUNetv2_predict .*\) \(log: "
    calls = call("--methods", SEMI, "--jobs", 2, error=message)
    assert trained(calls) == [("Dataset500_Toy", "0", SEMI, "")]
    assert sorted(predicted(calls)) == [("Dataset501_Toy_FLAIR", SEMI), ("Dataset502_Toy_T1", SEMI)]
    logs = set(re.findall(r"log: ([^)]*)", (study / "out" / "leaderboard.md").read_text()))
    assert ["CUDA out of memory" in Path(log).read_text() for log in logs] == [True, True]


def test_interrupted_training_goes_on(study, call):
    folder = fold_folder(study)
    folder.mkdir(parents=True)
    (folder / "checkpoint_latest.pth").touch()
    assert trained(call("--methods", SEMI)) == [("Dataset500_Toy", "0", SEMI, "--c")]


def test_training_of_one_modality_goes_on_from_its_training_state(study, call):
    # interrupted after the model was written and before the state that nnU-Net's --val would read
    folder = fold_folder(study, "Dataset501_Toy_FLAIR")
    (folder / "training_state").mkdir(parents=True)
    (folder / "checkpoint_final.pth").touch()
    (folder / "training_state" / "checkpoint_latest.pth").touch()
    calls = trained(call("--methods", f"each:{SEMI}"))
    assert calls == [("Dataset501_Toy_FLAIR", "0", SEMI, "--c"), ("Dataset502_Toy_T1", "0", SEMI, "")]


def test_training_that_lacks_its_validation_is_validated(study, call):
    call("--methods", SEMI)
    (fold_folder(study, "Dataset502_Toy_T1") / "validation" / "summary.json").unlink()
    assert trained(call("--methods", SEMI)) == [("Dataset500_Toy", "0", SEMI, "--val")]


@pytest.mark.parametrize("damaged", ["scan", "reference", "prediction"])
def test_overlays_show_no_damaged_file(tmp_path, damaged):
    files = {kind: tmp_path / kind / "P0.nii.gz" for kind in ("scan", "reference", "prediction")}
    for number, file in enumerate(files.values()):
        write_image(file, lesion(number))
    volumes = Volumes(
        {"P0": str(files["scan"])},
        {"P0": str(files["reference"])},
        {"PReL": files["prediction"].parent},
        ".nii.gz",
        SimpleITKIO(),
    )
    shown = draw_case("worst", "P0", volumes, {"PReL": 0.5}, {"PReL": "#e69f00"})
    assert (shown.slices, shown.slice) == (6, 2)
    files[damaged].write_bytes(files[damaged].read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{files[damaged]}: found an unreadable file \(a gzip stream without its end"):
        draw_case("worst", "P0", volumes, {"PReL": 0.5}, {"PReL": "#e69f00"})


def test_what_is_out_of_date_is_made_again(study, call):
    call("--methods", SEMI)
    first = read_csv(study).set_index(["modality", "case"])["dice"]

    os.utime(fold_folder(study, "Dataset501_Toy_FLAIR") / "checkpoint_final.pth", (1, 1))  # other, though not newer
    assert predicted(call("--methods", SEMI)) == [("Dataset501_Toy_FLAIR", SEMI)]

    write_image(study / "raw" / "Dataset500_Toy" / "labelsTs" / "P0.nii.gz", np.roll(lesion(4), 3, 1))
    assert call("--methods", SEMI) == []
    second = read_csv(study).set_index(["modality", "case"])["dice"]
    assert (first != second).groupby("case").all().to_dict() == {"P0": True, "P1": False, "P2": False, "P3": False}

    (study / "out" / "predictions").joinpath(
        "group_" + SEMI, "unseeded", "folds_0", "Dataset502_Toy_T1", "P1.nii.gz"
    ).unlink()
    assert predicted(call("--methods", SEMI)) == [("Dataset502_Toy_T1", SEMI)]

    assert predicted(call("--methods", SEMI, "--predict_options=--disable_tta")) == [
        ("Dataset501_Toy_FLAIR", SEMI),
        ("Dataset502_Toy_T1", SEMI),
    ]


def plan_with(study, labeled):
    write_preprocessed(study, "Dataset500_Toy", labeled, ["C", "D"])


def edit_json(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def swap_folds(study):
    for file in (study / "preprocessed").glob("*/splits_final.json"):
        edit_json(file, lambda folds: folds[::-1])


def change_architecture(study):
    """In the plans of every dataset."""
    plans = {"plans_name": "nnUNetPlans", "configurations": {"2d": {"data_identifier": "nnUNetPlans_2d"}}}
    plans["configurations"]["2d"]["architecture"] = {"n_stages": 3}
    for file in (study / "preprocessed").glob("*/nnUNetPlans.json"):
        file.write_text(json.dumps(plans))


CHANGES = {
    "a case that is now a test case": (lambda study: plan_with(study, ["B", "E"]), "cases"),
    "folds": (swap_folds, "members of the fold"),
    "plans": (change_architecture, "plans"),
}


@pytest.mark.parametrize("method", [SEMI, STOCK])
@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_what_was_trained_otherwise_is_trained_again(study, call, capsys, method, change, named):
    first = trained(call("--methods", method))
    digests = {file: content_digest(file) for file in (study / "results").rglob("checkpoint_final.pth")}
    change(study)
    assert trained(call("--methods", method)) == first
    assert re.search(rf"train .* \(.*checkpoint_final.pth was trained with other .*{named}", capsys.readouterr().out)
    assert re.search(rf"- Trained again: train .*, since .*{named}", (study / "out" / "leaderboard.md").read_text())
    kept = {content_digest(file) for file in (study / "results").rglob("replaced_fold_0_*/checkpoint_final.pth")}
    assert kept == ({*digests.values()} if method == STOCK else set())  # the package's trainers set theirs aside
    assert not {content_digest(file) for file in digests} & {*digests.values()}
    assert call("--methods", method) == []
    assert "Trained again" not in (study / "out" / "leaderboard.md").read_text()


def test_other_hyper_parameters_are_another_training(study, call, monkeypatch, capsys):
    call("--methods", SEMI)
    # what a later version of the package has besides is nothing to train again for
    monkeypatch.setitem(SETTINGS, "mse_weight", 1.0)
    assert call("--methods", SEMI) == []
    monkeypatch.setitem(SETTINGS, "asc_weight", 0.1)
    assert trained(call("--methods", SEMI)) == [("Dataset500_Toy", "0", SEMI, "")]
    assert "hyper-parameters (asc_weight 0.35, now 0.1)" in capsys.readouterr().out


@pytest.mark.parametrize("method", [SEMI, STOCK])
def test_an_interrupted_training_with_other_cases_is_begun_anew(study, call, method):
    first = trained(call("--methods", method))
    for file in (study / "results").rglob("checkpoint_final.pth"):
        file.rename(file.with_name("checkpoint_latest.pth"))
    plan_with(study, ["A", "B", "E"])
    assert trained(call("--methods", method)) == first  # without --c


def test_a_second_stage_follows_a_first_one_that_was_made_anew(study, call, capsys):
    methods = ["--methods", f"{SEMI}+{PREL}"]
    call(*methods)
    for folder in (study / "results").glob(f"*/{SEMI}__*"):
        shutil.rmtree(folder)
    assert call(*methods) == []
    # PREL alone and the first stage besides: the second one waits for the first, and then is out of date
    calls = trained(call("--methods", f"Second={PREL}", SEMI))
    assert [trainer for _, _, trainer, _ in calls] == [SEMI, PREL]
    assert "was trained with other first stage than the present ones" in capsys.readouterr().out
    assert call(*methods) == []


def test_a_second_stage_does_not_go_on_from_a_first_one_that_is_out_of_date(study, call, monkeypatch):
    call("--methods", f"{SEMI}+{PREL}")
    monkeypatch.setitem(SETTINGS, "asc_weight", 0.1)
    error = rf"found a first stage that is out of date: .*asc_weight.*Write {SEMI}\+{PREL}, which trains it again, too"
    assert trained(call("--methods", PREL, error=error)) == []
    assert [trainer for _, _, trainer, _ in trained(call("--methods", f"{SEMI}+{PREL}"))] == [SEMI, PREL]


def test_a_stock_training_by_hand_is_compared_by_what_nnunet_leaves(study, call):
    call("--methods", STOCK)
    records = [*(study / "results").rglob("trained_on.json")]
    assert len(records) == 2
    for record in records:
        record.unlink()
    assert call("--methods", STOCK) == []
    markdown = (study / "out" / "leaderboard.md").read_text()
    assert (
        f"- Not known: train {STOCK[5:]} on Dataset501_Toy_FLAIR, fold 0, train {STOCK[5:]} on Dataset502_" in markdown
    )
    assert "fold 0: they were not begun by a leaderboard" in markdown
    preprocessed = study / "preprocessed"
    edit_json(
        preprocessed / "Dataset501_Toy_FLAIR" / "dataset_fingerprint.json", lambda found: found | {"cases": ["E"]}
    )
    edit_json(preprocessed / "Dataset502_Toy_T1" / "splits_final.json", lambda folds: folds[::-1])
    assert [dataset for dataset, *_ in trained(call("--methods", STOCK))] == [
        "Dataset501_Toy_FLAIR",
        "Dataset502_Toy_T1",
    ]
    assert "Not known" not in (study / "out" / "leaderboard.md").read_text()
    assert call("--methods", STOCK) == []


def test_a_record_is_of_its_checkpoint_alone(study, call):
    """Whoever trains again by hand leaves the record of the training before."""
    call("--methods", STOCK)
    plan_with(study, ["A", "B", "E"])
    for number, name in ((501, "FLAIR"), (502, "T1")):
        folder = fold_folder(study, f"Dataset{number}_Toy_{name}", "nnUNetTrainer")
        (folder / "checkpoint_final.pth").write_bytes(b"another training")
        for file in ("dataset.json", "dataset_fingerprint.json"):
            shutil.copy(study / "preprocessed" / f"Dataset{number}_Toy_{name}" / file, folder.parent)
    assert trained(call("--methods", STOCK, error="found a damaged file")) == []


def test_damage_is_noticed_before_predicting_and_named(study, call):
    call("--methods", SEMI)
    model = fold_folder(study, "Dataset501_Toy_FLAIR") / "checkpoint_final.pth"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    error = (
        r"predict FLAIR .*Dataset501.*checkpoint_final.pth: found a damaged file .*; expected a whole checkpoint. Rest"
    )
    assert call("--methods", SEMI, error=error) == []
    assert set(read_csv(study)["modality"]) == {"T1"}


@pytest.mark.parametrize("content", ["", "[]", '{"metric_per_case": []}'])
def test_what_was_written_half_is_made_again(study, call, capsys, content):
    call("--methods", SEMI)
    summary = fold_folder(study, "Dataset502_Toy_T1") / "validation" / "summary.json"
    summary.write_text(content)
    for file in [*(study / "out").rglob("inputs.json"), *(study / "out").glob("metrics/**/*.json")]:
        file.write_text(content)
    calls = call("--methods", SEMI)
    assert trained(calls) == [("Dataset500_Toy", "0", SEMI, "--val")]
    assert len(predicted(calls)) == 2
    assert f"(damaged {summary})" in capsys.readouterr().out
    assert len(read_csv(study)) == 8


def test_scans_that_are_cut_off_are_not_predicted(study, call):
    scan = study / "raw" / "Dataset500_Toy" / "imagesTs" / "P1_0001.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-20])
    error = r"predict T1 .*P1_0001.nii.gz: found an unreadable file \(a gzip stream without its end\)"
    assert predicted(call("--methods", SEMI, error=error)) == [("Dataset501_Toy_FLAIR", SEMI)]
    assert set(read_csv(study)["modality"]) == {"FLAIR"}


def test_predictions_that_are_cut_off_are_not_taken(study, call, monkeypatch, tmp_path):
    """On a full disk ITK writes a part, and nnU-Net's command ends as if all was well."""
    answers = tmp_path / "answers"
    answers.mkdir()
    for label in (study / "raw" / "Dataset500_Toy" / "labelsTs").iterdir():
        (answers / label.name).write_bytes(label.read_bytes()[:-20])
    monkeypatch.setenv("ANSWERS", str(answers))
    call("--methods", SEMI, error="found a part of a file; expected all of it: the disk was full")
    monkeypatch.delenv("ANSWERS")
    assert len(predicted(call("--methods", SEMI))) == 2
    assert len(read_csv(study)) == 8


def test_settings_are_those_of_the_class_that_nnunet_finds(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(ext_trainers.__file__).parent))
    settings, first_stage = leaderboard.find_settings(PREL)
    assert (settings["num_epochs"], settings["asc_share"], first_stage) == (600, 0.1, SEMI)
    assert leaderboard.find_settings("nnUNetTrainer") == (None, None)
    assert leaderboard.find_settings("nnUNetTrainerOfNobody") == (None, None)


def test_a_failed_fold_leaves_its_method_out_and_no_other(study, call, monkeypatch):
    monkeypatch.setenv("FAIL", f"Dataset500_Toy 1 {SEMI}")
    methods = ["--methods", SEMI, STOCK, "--reference", STOCK, "-f", 0, 1]
    calls = call(
        *methods,
        page=True,
        error=r'2 incomplete results, .*"train .*fold 1": CUDA out of memory .*\(log: .*fold 1.out\)',
    )
    assert len(trained(calls)) == 6
    assert set(predicted(calls)) == {("Dataset501_Toy_FLAIR", "nnUNetTrainer"), ("Dataset502_Toy_T1", "nnUNetTrainer")}
    assert set(read_csv(study)["method"]) == {STOCK}
    for text in (text_of(study / "out" / "leaderboard.html"), (study / "out" / "leaderboard.md").read_text()):
        assert "Incomplete, and therefore not in the tables" in text
        assert f"{SEMI}, FLAIR" in text
        assert f'predict FLAIR with {SEMI} of Dataset501_Toy_FLAIR: not run, since "train {SEMI}' in text

    monkeypatch.delenv("FAIL")
    assert trained(call(*methods)) == [("Dataset500_Toy", "1", SEMI, "")]
    assert set(read_csv(study)["method"]) == {SEMI, STOCK}


def test_nothing_complete_still_says_so(study, call, monkeypatch):
    monkeypatch.setenv("FAIL", "2d")
    call("--methods", SEMI, page=True, error="incomplete")
    assert read_csv(study).empty
    assert "Incomplete" in text_of(study / "out" / "leaderboard.html")


def test_methods_do_not_wait_for_each_other(study, call, monkeypatch):
    monkeypatch.setenv("FAIL", f"Dataset500_Toy {SEMI}")
    calls = call("--methods", SEMI, PLUS, error=f'"train {SEMI} on Dataset500_Toy, fold 0": CUDA out of memory')
    assert [trainer for _, _, trainer, _ in trained(calls)] == [SEMI, PLUS]
    assert set(read_csv(study)["method"]) == {PLUS}


def test_a_second_stage_follows_the_first_of_its_fold(study, call, monkeypatch):
    second = f"Second={SEMI}+{PREL}"
    monkeypatch.setenv("FAIL", f"Dataset500_Toy 0 {SEMI}")
    calls = trained(call("--methods", second, "-f", 0, 1, "--jobs", 4, error=f"train {SEMI} on Dataset500_Toy, fold 0"))
    assert ("Dataset500_Toy", "0", PREL, "") not in calls
    assert [trainer for _, fold, trainer, _ in calls if fold == "1"] == [SEMI, PREL]
    gaps = (study / "out" / "leaderboard.md").read_text().split("**Incomplete")[1].split("## Results")[0]
    assert f"Second, T1: train {SEMI} on Dataset500_Toy, fold 0: CUDA out of memory" in gaps
    assert f'train {PREL} on Dataset500_Toy, fold 0: not run, since "train {SEMI} on Dataset500_Toy, fold 0"' in gaps
    assert all(
        re.fullmatch(r"- Second, .*: (train|predict|evaluate) [^:]*: \w.*", line) for line in gaps.split("\n")[2:-2]
    )

    monkeypatch.delenv("FAIL")
    calls = call("--methods", second, "-f", 0, 1)
    assert trained(calls) == [("Dataset500_Toy", "0", SEMI, ""), ("Dataset500_Toy", "0", PREL, "")]
    # the first stage is not compared
    assert {trainer for _, trainer in predicted(calls)} == {PREL}
    assert set(read_csv(study)["method"]) == {"Second"}


def test_a_first_stage_that_is_compared_too_is_trained_once(study, call):
    calls = call("--methods", f"{SEMI}+{PREL}", SEMI, f"Again={SEMI}+{PREL}", "--seeds", 3, 4)
    assert [trainer for _, _, trainer, _ in trained(calls)] == [SEMI] * 2 + [PREL] * 2
    assert set(read_csv(study)["method"]) == {f"{SEMI}+{PREL}", SEMI, "Again"}


def test_both_stages_are_trained_on_the_dataset_of_every_modality(study, call):
    write_preprocessed(study, "Dataset600_Full", ["A", "B", "C", "D"], [])
    calls = trained(call("--methods", f"each:{SEMI}+{PREL}@600"))
    for dataset in ("Dataset601_Full_FLAIR", "Dataset602_Full_T1"):
        assert [trainer for of, _, trainer, _ in calls if of == dataset] == [SEMI, PREL]
    assert len(calls) == 4


def test_a_finished_second_stage_needs_its_first_no_more(study, call):
    call("--methods", f"{SEMI}+{PREL}")
    table = (study / "out" / "leaderboard.csv").read_bytes()
    for folder in (study / "results").glob(f"*/{SEMI}__*"):
        shutil.rmtree(folder)
    assert call("--methods", f"{SEMI}+{PREL}") == []
    assert (study / "out" / "leaderboard.csv").read_bytes() == table
    assert trained(call("--methods", f"{SEMI}+{PREL}+{PLUS}")) == [("Dataset500_Toy", "0", PLUS, "")]


def test_the_sentence_of_a_trainer_is_the_reason_of_the_gap(study, call, monkeypatch):
    sentence = "final.pth|no such file|the finished first stage|Run first: nnUNetv2_train 500 2d 0"
    monkeypatch.setenv(f"REFUSE_{PREL}", sentence)
    monkeypatch.setenv("REPOSITORY", str(Path(__file__).parents[1]))
    reason = "final.pth: found no such file; expected the finished first stage. Run first: nnUNetv2_train 500 2d 0"
    call("--methods", PREL, page=True, error=f'"train {PREL} on Dataset500_Toy, fold 0": {reason} ')
    for text in (text_of(study / "out" / "leaderboard.html"), (study / "out" / "leaderboard.md").read_text()):
        assert f"train {PREL} on Dataset500_Toy, fold 0: {reason} (exit status 1 of " in text


def test_every_seed_has_results_of_its_own(study, call, monkeypatch):
    monkeypatch.setenv("FAIL", "never")
    calls = call("--methods", SEMI, STOCK, "--seeds", 3, 4)
    calls = [c for c in calls if c[0] != "inputs"]
    assert {(c[0], c[-1]) for c in calls} == {(p, s) for p in ("nnUNetv2_train", "nnUNetv2_predict") for s in "34"}
    assert not fold_folder(study).exists()
    for seed in (3, 4):
        assert (fold_folder(study, results=f"out/seed_{seed}/nnUNet_results") / "checkpoint_final.pth").is_file()
    table = read_csv(study)
    assert sorted(table["seed"].unique()) == [3, 4]
    assert len(table) == len(TEST_CASES) * 2 * 2 * 2
    # one of the seeds is lost and cannot be trained again: no mean of the others
    (fold_folder(study, results="out/seed_4/nnUNet_results") / "checkpoint_final.pth").unlink()
    monkeypatch.setenv("FAIL", SEMI)
    call("--methods", SEMI, STOCK, "--seeds", 3, 4, "--reference", STOCK, error="seed 4")
    assert set(read_csv(study)["method"]) == {STOCK}


def test_predictions_of_others_join_the_table(study, call):
    folder = study / "theirs"
    for i, case in enumerate(TEST_CASES):
        write_image(folder / f"{case}.nii.gz", np.roll(lesion(4 + i), 1, 2))
    external = ["--methods", SEMI, "--external", f"Theirs=FLAIR={folder}"]
    call(*external)
    dice = read_csv(study).groupby(["modality", "method"])["dice"].mean()
    assert dice["FLAIR", "Theirs"] == pytest.approx(8 / 9, abs=1e-5)
    assert ("T1", "Theirs") not in dice

    moved = folder / "P3.nii.gz"
    moved.rename(study / "P3.nii.gz")
    call(*external, error=r"no prediction of 1 of 4 cases in .*theirs: P3")
    assert set(read_csv(study)["method"]) == {SEMI}
    write_image(moved, np.zeros((6, 20, 23), np.uint8))
    call(*external, error=r"P3.nii.gz: found shape \[6, 20, 23\]; expected \[6, 20, 24\]")
    write_image(moved, 2 * lesion(7))
    call(*external, error=r"P3.nii.gz: found the label values 2; expected only 0, 1")
    assert set(read_csv(study)["method"]) == {SEMI}


def test_upper_bound_of_another_dataset(study, call):
    write_preprocessed(study, "Dataset600_Full", ["A", "B", "C", "D"], [])
    calls = call("--methods", SEMI, "Upper bound=each:nnUNetTrainer@600")
    names = ["Dataset601_Full_FLAIR", "Dataset602_Full_T1"]
    assert [dataset for dataset, *_ in trained(calls)][1:] == names
    assert [dataset for dataset, _ in predicted(calls)][2:] == names
    table = read_csv(study).drop_duplicates("method").set_index("method")
    assert table.loc["Upper bound", ["labeled", "unlabeled"]].tolist() == [4, 0]


def test_a_method_that_was_trained_on_test_cases_is_refused(study, call):
    write_preprocessed(study, "Dataset600_Full", ["A", "B", "P1"], ["P2"])
    message = r"found test cases of Dataset500_Toy among the training cases of Dataset600_Full: P1, P2; expected"
    assert call("--methods", SEMI, "each:nnUNetTrainer@600", error=message) == []
    assert not (study / "out").exists()


def test_curves_over_the_labeled_share_of_several_leaderboards(study, call):
    call("--methods", SEMI)
    other = study / "other.csv"
    table = read_csv(study).assign(dataset="Dataset510_Toy", labeled=1, unlabeled=3)
    table.to_csv(other, index=False)
    call("--methods", SEMI, "--compare", other, page=True)
    assert "Over the labeled share" in text_of(study / "out" / "leaderboard.html")
    t1 = table["modality"] == "T1"
    table.mask(t1, table.replace({"case": {"P1": "Q1"}})).to_csv(other, index=False)
    message = r"other.csv: found other test cases of T1 than this leaderboard: P1, Q1"
    call("--methods", SEMI, "--compare", other, error=message)
    table[~t1 | (table["case"] != "P3")].to_csv(other, index=False)
    call("--methods", SEMI, "--compare", other, error=r"found other test cases of T1 than this leaderboard: P3")
    table.replace({"modality": {"T1": "T2"}}).to_csv(other, index=False)
    call("--methods", SEMI, "--compare", other, error=r"found the modality T2; expected only FLAIR, T1, FLAIR \+ T1")
    table.drop(columns="hd95").to_csv(other, index=False)
    call("--methods", SEMI, "--compare", other, error="other.csv: found the columns dataset, method")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--methods", "each:"], r"--methods: found 'each:'; expected \[NAME=\]"),
        (["--methods", f"{SEMI}+"], rf"--methods: found '{SEMI}\+'; expected \[NAME=\].*FIRST\+.* Write e\.g\."),
        (["--methods", f"{SEMI}+each:{PREL}"], rf"--methods: found '{SEMI}\+each:{PREL}'; expected \[NAME=\]"),
        (["--methods", f"{SEMI}+{SEMI}"], rf"found {SEMI} twice; expected a trainer after \+ that goes on from"),
        (
            ["--methods", f"{SEMI}+{PREL}", f"B={PREL}"],
            rf"found {SEMI}\+{PREL} and B, which both write the .* {PREL} on",
        ),
        (["--methods", SEMI + "@999"], "found no dataset for @999"),
        (["--methods", SEMI + "@Dataset999_X"], "found no dataset for @Dataset999_X"),
        (["-d", "Dataset999_X", "--methods", SEMI], "found no raw dataset Dataset999_X"),
        (["--methods", SEMI, SEMI], "found nnUNetTrainerSemiCML on FLAIR twice"),
        (
            ["--methods", SEMI, "--reference", "SemiCML"],
            "--reference: found SemiCML; expected one of nnUNetTrainerSemi",
        ),
        (["--methods", SEMI, "--external", "Theirs=CT=."], r"--external: found 'Theirs=CT=\.'"),
        (["--methods", SEMI, "--external", "Theirs=T1=nowhere"], "nowhere: found no such folder"),
        (["--methods", SEMI, "-c", "3d_fullres"], "found configurations 2d; expected 3d_fullres"),
        (["--methods", SEMI, "--jobs", "0"], "--jobs: found 0"),
        (["--methods", SEMI, "--slurm", "timeout_min=60"], "Add --executor slurm"),
        (["--methods", SEMI, "--executor", "slurm"], "--slurm: found no timeout_min"),
        (["--methods", SEMI, "--executor", "slurm", "--slurm", "gpu"], "--slurm: found 'gpu'; expected KEY=VALUE"),
    ],
)
def test_options_that_do_not_fit_are_refused(study, call, options, error):
    assert call(*options, error=error) == []
    assert not (study / "out" / "leaderboard.html").exists()


def test_slurm_where_there_is_none(study, call, monkeypatch):
    monkeypatch.setattr(submitit, "AutoExecutor", submitit.auto.auto.AutoExecutor)
    options = ["--executor", "slurm", "--slurm", "timeout_min=60"]
    assert call("--methods", SEMI, *options, error='found Could not detect "srun"') == []


def test_test_scans_without_reference_are_refused(study, call):
    (study / "raw" / "Dataset500_Toy" / "labelsTs" / "P2.nii.gz").unlink()
    assert call("--methods", SEMI, error="P2.nii.gz: found no such file; expected a reference") == []


def test_stock_nnunet_on_all_channels_needs_its_own_preprocessing(study, call):
    (study / "preprocessed" / "Dataset500_Toy" / "nnUNetPlans_2d").rmdir()
    assert call("--methods", "all:nnUNetTrainer", error="nnUNetv2_preprocess -d 500 -plans") == []


def add_channel(study, channel=2, brightest=250):
    """Give every case a third channel."""
    for file in (study / "raw" / "Dataset500_Toy").glob("images*/*_0000.nii.gz"):
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        write_image(
            file.with_name(file.name.replace("_0000", f"_{channel:04d}")),
            np.where(voxels > 50, brightest, 10).astype(np.uint8),
        )


def test_a_modality_of_two_channels_beside_one_of_one(study, call):
    add_channel(study)
    plan_anew(study, channels=["FLAIR", "T1", "T1ce"], modalities={"FLAIR": [0], "MR": [2, 1]})
    calls = call("--methods", SEMI, STOCK, "all:nnUNetTrainer", page=True)
    assert inputs(calls, "Dataset501_Toy_FLAIR") == {f"{case}_0000.nii.gz": 100 for case in TEST_CASES}
    # in the order of the modality
    of_mr = {"0000": 250, "0001": 200}
    expected = {f"{case}_{i}.nii.gz": brightest for case in TEST_CASES for i, brightest in of_mr.items()}
    assert inputs(calls, "Dataset502_Toy_MR") == expected
    assert len(inputs(calls, "Dataset500_Toy")) == 3 * len(TEST_CASES)
    dice = read_csv(study).groupby(["modality", "method"])["dice"].mean()
    assert dice["MR", SEMI] == 1
    assert dice["MR", STOCK] == pytest.approx(7 / 9, abs=1e-5)
    assert ("FLAIR + T1 + T1ce", "all:nnUNetTrainer") in dice
    page = text_of(study / "out" / "leaderboard.html")
    assert "MR: median and worst patient" in page
    assert "the slice with the largest outlined area; of the scan, T1ce." in page
    assert "Training cases 2 labeled cases: 2 with FLAIR + MR; 2 unlabeled cases: 2 with FLAIR + MR" in page


def test_a_dataset_with_other_channels_in_a_modality_is_refused(study, call):
    write_preprocessed(study, "Dataset600_Full", ["A"], ["B"], modalities={"FLAIR": [0], "T1": [0, 1]})
    message = r"Dataset602_Full_T1/dataset.json: found .*'0': 'FLAIR', '1': 'T1'.*; expected .*\{'0': 'T1'\}"
    assert call("--methods", "each:nnUNetTrainer@600", error=message) == []
    write_preprocessed(study, "Dataset610_Full", ["A"], ["B"], modalities={"FLAIR": [0]})
    message = "Dataset610_Full/modalities.json: found the modalities FLAIR; expected T1"
    assert call("--methods", "each:nnUNetTrainer@610", error=message) == []


def test_files_with_other_channels_than_when_planned_are_refused(study, call):
    plan_anew(study, modalities={"FLAIR": [0], "T1": [2]}, channels=["FLAIR", "T2", "T1"])
    (study / "raw" / "Dataset500_Toy" / "dataset.json").write_text(json.dumps(describe(CHANNELS, 2)))
    assert call("--methods", SEMI, error="found T1 with the channels 2; expected whole files") == []


def test_cases_that_lack_a_modality_are_left_out_of_its_results_alone(study, call):
    (study / "raw" / "Dataset500_Toy" / "imagesTs" / "P1_0001.nii.gz").unlink()
    plan_anew(study, lacking=[("B", "T1"), ("C", "FLAIR")])
    for folder, file in (("imagesTr", "B_0001"), ("imagesUn", "C_0000")):
        (study / "raw" / "Dataset500_Toy" / folder / f"{file}.nii.gz").unlink()
    theirs = study / "theirs"
    for i, case in enumerate(TEST_CASES):
        if case != "P1":
            write_image(theirs / f"{case}.nii.gz", lesion(4 + i))
    calls = call("--methods", SEMI, STOCK, "--external", f"Theirs=T1={theirs}", "--reference", STOCK, page=True)
    assert {name[:2] for name in inputs(calls, "Dataset501_Toy_FLAIR")} == {"P0", "P1", "P2", "P3"}
    assert inputs(calls, "Dataset502_Toy_T1") == {f"{case}_0000.nii.gz": 200 for case in ("P0", "P2", "P3")}
    table = read_csv(study)
    for method in (SEMI, STOCK):
        cases = table[table["method"] == method].groupby("modality")["case"].agg(list).to_dict()
        assert cases == {"FLAIR": TEST_CASES, "T1": ["P0", "P2", "P3"]}
    trained_on = table.drop_duplicates("modality").set_index("modality")[["labeled", "unlabeled"]]
    assert trained_on.to_numpy().tolist() == [[2, 1], [1, 2]]
    markdown, page = (study / "out" / "leaderboard.md").read_text(), text_of(study / "out" / "leaderboard.html")
    assert f"| FLAIR | tumor | {SEMI} | 4 | 1.000 ± 0.000 |" in markdown
    assert f"| T1 | tumor | {SEMI} | 3 | 0.889 ± 0.000 |" in markdown
    # paired by the cases of the modality
    assert f"| Dice | FLAIR | tumor | {SEMI} | +0.222 | +0.222 … +0.222 | 4 / 0 |" in markdown
    assert f"| Dice | T1 | tumor | {SEMI} | +0.222 | +0.222 … +0.222 | 3 / 0 |" in markdown
    assert "| Dice | T1 | tumor | Theirs | +0.333 | +0.333 … +0.333 | 3 / 0 |" in markdown
    for text in (markdown, page):
        assert "4, each modality alone: 4 with FLAIR, 3 with T1. Results of a modality are those of the cases" in text
        assert (
            "2 labeled cases: 1 with FLAIR + T1, 1 with FLAIR; 2 unlabeled cases: 1 with FLAIR + T1, 1 with T1" in text
        )
    assert "Over the labeled share" not in page  # one share for each modality
    assert "FLAIR 4 patients" in page
    assert "T1 3 patients" in page
    assert call("--methods", SEMI, STOCK) == []


def test_a_modality_that_no_test_case_has_is_said(study, call):
    for case in TEST_CASES:
        (study / "raw" / "Dataset500_Toy" / "imagesTs" / f"{case}_0001.nii.gz").unlink()
    (study / "raw" / "Dataset500_Toy" / "imagesTs" / "P3_0000.nii.gz").rename(
        study / "raw" / "Dataset500_Toy" / "imagesTs" / "P3_0001.nii.gz"
    )
    plan_anew(study, modalities={"FLAIR": [0], "both": [0, 1]})
    options = ["--external", f"Theirs=both={study}"]
    message = "found 'Theirs=both=.*one of the modalities that test cases have: FLAIR. Write"
    assert call("--methods", SEMI, *options, error=message) == []
    message = "imagesTs: found no test case with both; expected at least one, for --methods all:nnUNetTrainer"
    assert call("--methods", SEMI, "all:nnUNetTrainer", error=message) == []
    calls = call("--methods", SEMI, STOCK)
    assert trained(calls) == [("Dataset500_Toy", "0", SEMI, ""), ("Dataset501_Toy_FLAIR", "0", "nnUNetTrainer", "")]
    assert set(read_csv(study)["modality"]) == {"FLAIR"}
    expected = "3 with FLAIR, 0 with both, 1 with none of these, which no method segments. "
    expected += "Results of a modality are those of the cases that have it; there are none of both"
    assert expected in (study / "out" / "leaderboard.md").read_text()


def test_stock_nnunet_on_all_channels_refuses_cases_that_lack_one(study, call):
    message = r"found 1 labeled cases of {} that lack a channel: {}; expected all channels of every .*--one_modality"
    write_preprocessed(study, "Dataset600_Full", ["A", "Q"], ["C"], lacking=[("Q", "FLAIR")])  # without raw files
    error = message.format("Dataset600_Full", "Q")
    assert call("--methods", "all:nnUNetTrainer@600", error=error) == []
    # a modality that the group does not have counts, too
    plan_anew(study, modalities={"FLAIR": [0]})
    (study / "raw" / "Dataset500_Toy" / "imagesTr" / "B_0001.nii.gz").unlink()
    assert call("--methods", SEMI, "all:nnUNetTrainer", error=message.format("Dataset500_Toy", "B")) == []
    write_preprocessed(study, "Dataset700_Full", ["A"], ["C"], modalities={})
    calls = call("--methods", SEMI, "all:nnUNetTrainer@700")
    assert predicted(calls) == [("Dataset501_Toy_FLAIR", SEMI), ("Dataset700_Full", "nnUNetTrainer")]
    assert set(read_csv(study)["modality"]) == {"FLAIR", "FLAIR + T1"}


def test_one_modality_in_the_dataset_s_own_place(study, call):
    plan_anew(study, modalities={}, lacking=[("B", "all")])
    (study / "raw" / "Dataset500_Toy" / "imagesTr" / "B_0000.nii.gz").unlink()
    (study / "raw" / "Dataset500_Toy" / "imagesTs" / "P2_0001.nii.gz").unlink()
    calls = call("--methods", SEMI, STOCK, "all:nnUNetTrainer", f"Again={SEMI}", f"each:{SEMI}")
    # each network once, however it is asked for
    assert trained(calls) == [("Dataset500_Toy", "0", SEMI, ""), ("Dataset500_Toy", "0", "nnUNetTrainer", "")]
    assert predicted(calls) == [("Dataset500_Toy", SEMI), ("Dataset500_Toy", "nnUNetTrainer")]
    assert {name[:2] for name in inputs(calls, "Dataset500_Toy")} == {"P0", "P1", "P3"}
    table = read_csv(study)
    assert set(table["modality"]) == {"all"}
    assert set(table["method"]) == {SEMI, STOCK, "all:nnUNetTrainer", "Again", f"each:{SEMI}"}
    assert set(zip(table["labeled"], table["unlabeled"], strict=True)) == {(1, 2)}


def test_methods_that_would_share_networks_are_refused(study, call):
    message = f"found {SEMI} and each:{SEMI}, which both write the networks of {SEMI} on Dataset501_Toy_FLAIR; expected"
    assert call("--methods", SEMI, f"each:{SEMI}", error=message) == []


def test_the_same_training_under_two_names_runs_once(study, call):
    calls = call("--methods", SEMI, PLUS, f"Again={SEMI}")
    assert [trainer for _, _, trainer, _ in trained(calls)] == [SEMI, PLUS]
    assert set(read_csv(study)["method"]) == {SEMI, PLUS, "Again"}


def test_datasets_are_found_by_their_whole_number_or_name(study, call):
    write_preprocessed(study, "Dataset600_Full", ["A"], ["C"])
    write_preprocessed(study, "Dataset6000_Other", ["A", "B"], ["C"])
    write_preprocessed(study, "Dataset5001_Other", ["A", "B"], ["C"])
    calls = call("-d", "Dataset500_Toy", "--methods", "each:nnUNetTrainer@600")
    assert [dataset for dataset, *_ in trained(calls)] == ["Dataset601_Full_FLAIR", "Dataset602_Full_T1"]
    calls = call("--methods", "each:nnUNetTrainer@6000", "Same=each:nnUNetTrainer@Dataset6000_Other")
    assert [dataset for dataset, *_ in trained(calls)] == ["Dataset6001_Other_FLAIR", "Dataset6002_Other_T1"]


def rewrite(study, file_ending, write):
    """Give Dataset500_Toy files of another ending; `write` gets the file and the voxels of what it replaces."""
    for file in (study / "raw" / "Dataset500_Toy").glob("*/*.nii.gz"):
        write(
            file.with_name(file.name.replace(".nii.gz", file_ending)), sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        )
        file.unlink()


def test_photographs_hold_several_channels(study, call, monkeypatch):
    def write(file, voxels):
        if file.parent.name.startswith("labels"):
            imsave(file, voxels[2], check_contrast=False)
        elif file.stem.endswith("_0000"):
            imsave(file, np.stack([voxels[2], voxels[2] // 2, 0 * voxels[2]], -1), check_contrast=False)

    rewrite(study, ".png", write)
    plan_anew(study, channels=["R", "G", "B"], file_ending=".png", modalities={})
    group = ModalityGroup.load("Dataset500_Toy")  # of one file per case
    group.modalities[0].files[:] = [0]
    group.save()
    (study / "answers").mkdir()
    for i, case in enumerate(TEST_CASES):
        imsave(study / "answers" / f"{case}.png", np.roll(lesion(4 + i)[2], 1, 1), check_contrast=False)
    monkeypatch.setenv("ANSWERS", str(study / "answers"))
    calls = call("--methods", SEMI, page=True)
    assert sorted(inputs(calls, "Dataset500_Toy")) == [f"{case}_0000.png" for case in TEST_CASES]
    assert read_csv(study)["dice"].tolist() == pytest.approx([8 / 9] * 4, abs=1e-5)
    assert "of the scan, the mean of R, G, B." in text_of(study / "out" / "leaderboard.html")


def test_the_spacing_of_a_tiff_lies_beside_it(study, call, monkeypatch):
    def write(file, voxels):
        imwrite(file, voxels)
        spacing = file.with_name(re.sub(r"(_\d{4})?\.tiff", ".json", file.name))
        spacing.write_text(json.dumps({"spacing": [3, 1, 2]}))

    rewrite(study, ".tiff", write)
    plan_anew(study, file_ending=".tiff", modalities={"T1": [1]})
    (study / "answers").mkdir()
    for i, case in enumerate(TEST_CASES):
        write(study / "answers" / f"{case}.tiff", np.roll(lesion(4 + i), 2, 2))
    monkeypatch.setenv("ANSWERS", str(study / "answers"))
    calls = call("--methods", SEMI, page=True)
    found = inputs(calls, "Dataset501_Toy_T1")
    assert sorted(found) == sorted(f"{case}{end}" for case in TEST_CASES for end in ("_0000.tiff", ".json"))
    assert json.loads(found["P0.json"]) == {"spacing": [3, 1, 2]}
    assert read_csv(study)["hd95"].tolist() == pytest.approx([4] * 4)  # two voxels of 2 mm

    for folder in (study / "raw" / "Dataset500_Toy" / "labelsTs", study / "answers"):
        for file in folder.glob("*.json"):
            file.write_text(json.dumps({"spacing": [3, 1, 4.5]}))
    assert call("--methods", SEMI, error=r"P0.tiff: found spacing \[3.0, 1.0, 2.0\]; expected \[3.0, 1.0, 4.5\]") == []
    (study / "raw" / "Dataset500_Toy" / "imagesTs" / "P0.json").write_text(json.dumps({"spacing": [3, 1, 4.5]}))
    assert predicted(call("--methods", SEMI)) == [("Dataset501_Toy_T1", SEMI)]
    assert read_csv(study)["hd95"].tolist() == pytest.approx([9] * 4)


class Nothing(Job):
    """Nothing but a job."""

    size = 1

    def missing(self):
        return "undone"


class InThisProcess(Nothing):
    """A job that is done when another one has begun."""

    calls_program = False

    def __call__(self):
        self.at_work.append(self.name)
        while not self.wanted <= {*self.executor.order}:
            pass
        self.at_work.remove(self.name)
        assert not self.at_work
        if self.name == "broken":
            raise RuntimeError("out of\nmemory")
        return ""


class Slow:
    """An executor whose jobs are done when asked for the second time; notes how many run at once and on which GPUs."""

    def __init__(self):
        self.running, self.most, self.gpus, self.order, self.canceled = set(), 0, [], [], []

    def submit(self, job):
        self.running.add(job.name)
        self.most = max(self.most, len(self.running))
        self.gpus.append(job.gpus)
        self.order.append(job.name)
        asked = []

        def done():
            asked.append(1)
            if len(asked) > 1:
                self.running.discard(job.name)
            if job.name == "interrupted":
                raise KeyboardInterrupt
            return len(asked) > 1

        return SimpleNamespace(
            done=done,
            exception=lambda: RuntimeError("out of\nmemory") if job.name == "broken" else None,
            result=lambda: "",
            paths=SimpleNamespace(stdout="LOG"),
            job_id="7",
            cancel=lambda: self.canceled.append(job.name),
        )


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    sleep = time.sleep  # a thread may evaluate
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(0.002))


WORKER = """
import sys
from pathlib import Path
from nnunetv2_semicml.evaluation.jobs import Job

class Slow(Job):
    target = Path(sys.argv[1], "target")

    def missing(self):
        return "" if self.target.is_file() else "no file"

    def run(self):
        self._call(Path(sys.argv[1], "program"))

print(Slow(name="slow")() or "done", flush=True)
"""
PROGRAM = """#!{python} -S
import os, time
from pathlib import Path

folder = Path(__file__).parent
if not (loader := os.fork()):
    time.sleep(120)
    os._exit(0)
with open(folder / "begun", "a") as begun:
    begun.write(f"{{loader}}\\n")
while not (folder / "go").is_file():
    pass
(folder / "target").touch()
"""


def test_a_program_that_outlives_its_job_is_waited_for_but_not_its_workers(tmp_path, monkeypatch):
    (tmp_path / "program").write_text(PROGRAM.format(python=sys.executable))
    (tmp_path / "program").chmod(0o755)
    begun = tmp_path / "begun"

    def start():
        return subprocess.Popen([sys.executable, "-c", WORKER, tmp_path], stdout=subprocess.PIPE, text=True)

    with start() as killed, ThreadPoolExecutor() as threads:
        while not begun.is_file() or not begun.read_text().endswith("\n"):
            pass
        killed.kill()
        with start() as second:
            said, running = second.stdout.readline(), second.poll() is None
            (tmp_path / "go").touch()
            assert said == f"Waiting for another process that makes {tmp_path / 'target'}\n"
            assert running
            # the worker of the program lives for two minutes
            assert threads.submit(second.stdout.read).result(timeout=60) == "done\n"
    (loader,) = begun.read_text().splitlines()  # the program ran once
    os.kill(int(loader), signal.SIGKILL)


def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(study, call, monkeypatch):
    evaluations, evaluate = [], jobs._run_here
    monkeypatch.setattr(jobs, "_run_here", lambda job: evaluations.append(job) or evaluate(job))
    call("--methods", SEMI)
    tables = {file: file.read_bytes() for file in (study / "out").glob("leaderboard.*")}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        error = r"leaderboard.csv: found that it cannot be written \(File too large\); expected enough space"
        assert call("--methods", SEMI, error=error) == []
        metrics = next((study / "out").glob("metrics/**/*_FLAIR.json"))
        metrics.unlink()
        (job,) = (job for job in evaluations if job.out == metrics)
        assert re.search(r"FLAIR.json: found that it cannot be written .*Make room, and repeat", job())
        assert not metrics.exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {file: file.read_bytes() for file in (study / "out").glob("leaderboard.*")} == tables
    assert not [file for file in (study / "out").rglob(".*") if file.is_file()]


def test_names_are_shown_as_they_are(study, call):
    name = r"<script>'`x`|$\frac{$ *a* _b_ [c](d) & \n"
    theirs = study / "theirs"
    for i, case in enumerate(TEST_CASES):
        write_image(theirs / f"{case}.nii.gz", lesion(4 + i))
    call("--methods", SEMI, "--external", f"{name}=FLAIR={theirs}", "--reference", name, page=True)
    page, markdown = study / "out" / "leaderboard.html", (study / "out" / "leaderboard.md").read_text()
    assert name in text_of(page)
    assert "<script" not in page.read_text()
    escaped = r"\<script\>'\`x\`\|\$\\frac{\$ \*a\* \_b\_ \[c\](d) \& \\n"
    assert f"## Differences to {escaped}\n" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith(f"| FLAIR | tumor | {escaped} | 4 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 12
    assert name in set(read_csv(study)["method"])


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", " ", "\ud800"])
def test_names_that_cannot_be_shown_are_refused(study, call, name):
    (study / "theirs").mkdir()
    error = "names of methods, modalities and classes: found '.*'; expected characters that can be printed"
    assert call("--methods", SEMI, "--external", f"{name}=FLAIR={study / 'theirs'}", error=error) == []


def test_external_names_have_files_of_their_own(study, call):
    names = ["Net A", "Net-A", "net_a", "Net_A"]
    for shift, name in enumerate(names):
        for i, case in enumerate(TEST_CASES):
            write_image(study / name / f"{case}.nii.gz", np.roll(lesion(4 + i), shift, 2))
    call("--methods", SEMI, "--external", *(f"{name}=FLAIR={study / name}" for name in names))
    files = [file.name.lower() for file in (study / "out" / "metrics" / "external").glob("*.json")]
    assert len({*files}) == 4
    dice = read_csv(study).groupby("method")["dice"].mean()
    # nine voxels wide: a shift of s leaves 1 - s / 9
    assert dice[names].tolist() == pytest.approx([1, 8 / 9, 7 / 9, 6 / 9], abs=1e-5)


def test_names_that_pandas_takes_for_missing_are_names(tmp_path):
    cases, file = ["NA", "null", "nan", "", "None", "1"], tmp_path / "leaderboard.csv"
    number = {"seed": "", **dict.fromkeys(leaderboard.METRICS, ""), "n_ref": 0, "n_pred": 0, "diagonal": 1.5}
    rows = [
        {"dataset": "D", "method": "nan", "modality": "N/A", "case": c, "class": "null", "labeled": 1, "unlabeled": ""}
        | number
        for c in cases
    ]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, leaderboard.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = leaderboard.read_table(file, {"N/A": leaderboard.Scans(["N/A"], [0], cases)})
    assert table["case"].tolist() == cases
    assert (table["method"] == "nan").all()
    assert (table["class"] == "null").all()
    assert table[["seed", "unlabeled", *leaderboard.METRICS]].isna().all(axis=None)
    assert table["labeled"].tolist() == [1] * 6


def test_jobs_run_side_by_side_and_after_those_that_they_need():
    jobs = [Nothing(name=f"job {i}") for i in range(4)] + [Nothing(name="last", needs=("job 0", "job 3"))]
    executor = Slow()
    assert run_jobs(jobs, executor, at_once=3, gpus=["4", "5", "6", "7"]) == {}
    assert executor.most == 3
    assert executor.order[-1] == "last"
    assert executor.gpus[:3] == ["4,7", "5", "6"]


def test_jobs_that_most_others_wait_for_begin_first():
    """So the last chain does not begin when all others have ended."""
    short = [Nothing(name="short 0"), Nothing(name="short 1")]
    chain = [Nothing(name="first"), Nothing(name="second", needs=("first",)), Nothing(name="third", needs=("second",))]
    executor = Slow()
    run_jobs([*short, *chain], executor, at_once=1, gpus=[])
    assert executor.order == ["first", "second", "short 0", "short 1", "third"]


def test_jobs_without_a_program_run_here_one_by_one_beside_the_others(monkeypatch):
    executor = Slow()
    here = [InThisProcess(name=name) for name in ("first", "second", "broken")]
    for name, value in {"executor": executor, "at_work": [], "wanted": {"job 1"}}.items():
        monkeypatch.setattr(InThisProcess, name, value, raising=False)
    others = [Nothing(name="job 0"), Nothing(name="job 1"), Nothing(name="next", needs=("broken",))]
    failures = run_jobs([*here, *others], executor, at_once=1, gpus=[])
    assert failures == {"broken": "memory", "next": 'not run, since "broken" failed'}
    assert executor.order == ["job 0", "job 1"]
    in_cluster = Slow()
    run_jobs([InThisProcess(name="first")], in_cluster, at_once=1, gpus=None)
    assert in_cluster.order == ["first"]


def test_more_jobs_than_gpus_share_them():
    executor = Slow()
    run_jobs([Nothing(name=f"job {i}") for i in range(3)], executor, at_once=3, gpus=["0", "1"])
    assert executor.gpus == ["0", "1", "0"]


def test_jobs_after_a_failed_one_are_not_run():
    jobs = [Nothing(name="broken"), Nothing(name="next", needs=("broken",)), Nothing(name="other")]
    executor = Slow()
    failures = run_jobs(jobs, executor, at_once=1, gpus=[])
    assert failures == {"broken": "memory (log: LOG)", "next": 'not run, since "broken" failed'}
    assert executor.order == ["broken", "other"]


class Killed(Nothing):
    """A job whose program is killed."""

    @property
    def target(self):
        return Path(self.name)

    def run(self):
        self._call(Path("/bin/sh"), "-c", "echo Epoch 13; kill -9 $$")


def test_what_was_killed_is_called_so(tmp_path):
    problem = Killed(name=str(tmp_path / "file"))()
    assert problem.startswith("Epoch 13 (end by SIGKILL, e.g. for lack of memory, of /bin/sh -c")
    local = submitit.LocalExecutor(folder=tmp_path / "logs")
    local.update_parameters(timeout_min=5, stderr_to_stdout=True)
    executor = SimpleNamespace(submit=lambda job: local.submit(os.abort))
    failures = run_jobs([Nothing(name="job")], executor, at_once=1, gpus=[])
    assert failures["job"].startswith("its process was ended before it was done, e.g. for lack of memory")


@pytest.mark.parametrize(("gpus", "canceled"), [([], ["interrupted"]), (None, [])])
def test_interruption_ends_local_jobs_and_leaves_those_of_a_cluster(gpus, canceled, capsys):
    executor = Slow()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([Nothing(name="interrupted")], executor, at_once=1, gpus=gpus)
    assert executor.canceled == canceled
    assert ("goes on as job 7" in capsys.readouterr().out) == (gpus is None)


def test_a_killed_program_whose_workers_live_on_is_not_waited_for(tmp_path):
    worker = "import time; time.sleep(60)"
    program = "import os, subprocess, sys; print('begun', flush=True); "
    program += f"subprocess.Popen([sys.executable, '-c', {worker!r}]); os.kill(os.getpid(), 9)"
    start, shown = time.monotonic(), []
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_program([sys.executable, "-c", program], os.environ, tmp_path / "log.txt", shown.append)
    assert error.value.returncode == -9
    assert time.monotonic() - start < 30
    assert error.value.output == "".join(shown) == "begun\n"


@pytest.mark.parametrize(
    ("distances", "ticks"),
    [
        ([55, 60, 69], [0, 2, 5, 10, 20, 50]),
        ([3, 12, 150], [0, 2, 5, 10, 20, 50, 100]),
        ([2.1, 3, 4.4], [0, 1, 2, 3, 4]),
        ([0, 0, 0], [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_distances_can_be_read_off_their_axis(distances, ticks):
    """Those of both modalities, which share it, and no patient is at its end."""
    table = pd.DataFrame({"method": "A", "modality": ["T1", "T1", "T2"], "dice": 0.5, "hd95": distances})
    sizes: list[float] = []

    def plot(figure: Figure) -> None:
        plot_distributions(figure, table, ["A"])
        figure.canvas.draw()
        axis = figure.axes[2]
        low, high = axis.get_ylim()
        assert low == 0
        assert high > max(distances)
        assert [float(t.get_text()) for t in axis.get_yticklabels() if t.get_position()[1] <= high] == ticks
        sizes.append(axis.yaxis.label.get_size())

    with rc_context({"font.size": 25, "axes.labelsize": 30, "ytick.labelsize": 27.5}):  # as where nnU-Net has plotted
        themed(plot, (9, 6))
    assert len(sizes) == 2
    assert max(sizes) < 10

"""The leaderboard with stub programs in the place of nnU-Net's: what runs, what is skipped, what is told."""

import html
import json
import os
import re
import sys
import threading
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
from filelock import FileLock

from nnunetv2_semicml.data.modality_group import Modality, ModalityGroup
from nnunetv2_semicml.evaluation import leaderboard
from nnunetv2_semicml.evaluation.jobs import Job, run_jobs

TEST_CASES = [f"P{i}" for i in range(4)]
CHANNELS = ["FLAIR", "T1"]
SEMI, STOCK = "nnUNetTrainerSemiCML", "each:nnUNetTrainer"

# Without site-packages: they run a hundred times.
STUB = """#!{python} -S
import gzip, json, os, sys
from pathlib import Path

words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([Path(sys.argv[0]).name, *words, os.environ.get("nnUNet_semicml_seed")]) + "\\n")
if (fail := os.environ.get("FAIL")) and all(word in words for word in fail.split()):
    print("CUDA out of memory")
    sys.exit(3)
after = lambda flag: words[words.index(flag) + 1]
results = Path(os.environ["nnUNet_results"])
"""
TRAIN = """
dataset, configuration, fold = words[:3]
group = Path(os.environ["nnUNet_preprocessed"], dataset, "modalities.json")
datasets = [dataset]
if group.is_file() and "SemiCML" in after("-tr"):
    datasets += [modality["dataset_name"] for modality in json.loads(group.read_text())["modalities"]]
for name in datasets:
    folder = results / name / f"{after('-tr')}__{after('-p')}__{configuration}" / f"fold_{fold}"
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    if "--val" not in words:
        (folder / "checkpoint_final.pth").write_text("weights")
    (folder / "validation" / "summary.json").write_text("{}")
"""
# A scan is 10 and, in the lesion, 100 (FLAIR) or 200 (T1). The stub finds the lesion, shifted by two voxels if it is of
# the weak trainer, and by one more in T1.
PREDICT = """
model = results / after("-d") / f"{after('-tr')}__{after('-p')}__{after('-c')}"
folds = words[words.index("-f") + 1 : words.index("-device")]
assert all((model / f"fold_{fold}" / "checkpoint_final.pth").is_file() for fold in folds if fold.isdigit())
out = Path(after("-o"))
out.mkdir()
for scan in sorted(Path(after("-i")).glob("*_0000.nii.gz")):
    others = scan.parent.glob(scan.name.replace("_0000", "_0001"))
    assert bool(list(others)) == after("-d").endswith("Toy")
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


def write_preprocessed(root, dataset, labeled, unlabeled):
    """What planning leaves: the group, and of every dataset its description, plans and a folder of cases."""
    number = int(dataset[7:10])
    modalities = [Modality(c, i, f"Dataset{number + 1 + i}_{dataset[11:]}_{c}") for i, c in enumerate(CHANNELS)]
    configuration = {"data_identifier": "nnUNetPlans_2d", "architecture": {}}
    plans = {"plans_name": "nnUNetPlans", "configurations": {"2d": configuration}}
    channels = {dataset: CHANNELS, **{modality.dataset_name: [modality.name] for modality in modalities}}
    for name, of_dataset in channels.items():
        (root / "preprocessed" / name / "nnUNetPlans_2d").mkdir(parents=True)
        description = describe(of_dataset, len(labeled))
        (root / "preprocessed" / name / "dataset.json").write_text(json.dumps(description))
        (root / "preprocessed" / name / "nnUNetPlans.json").write_text(json.dumps(plans))
        (root / "results" / name).mkdir(parents=True)
    ModalityGroup(dataset, modalities, labeled, unlabeled).save()


def describe(channels, number):
    return {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": {"background": 0, "tumor": 1},
        "numTraining": number,
        "file_ending": ".nii.gz",
    }


class InProcess:
    """Stands for submitit's executor: runs a job when it is submitted, in this process."""

    def __init__(self, folder, cluster):
        self.folder = Path(folder)

    def update_parameters(self, **parameters):
        pass

    def submit(self, job):
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
            leaderboard.main()
        else:
            with pytest.raises(SystemExit):
                leaderboard.main()
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
    # light and dark: distributions, differences; two cases of the scan and of two, two, one methods
    assert len(sources) == 2 * 2 + 2 * (3 + 3 + 2)
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_jobs_in_local_processes(study, call, monkeypatch):
    """The rest of the tests runs jobs in this process."""
    monkeypatch.undo()
    for variable in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{variable}", str(study / variable))
    monkeypatch.setenv("CALLS", str(study / "calls.txt"))
    monkeypatch.setenv("FAIL", "-i")
    monkeypatch.setattr(leaderboard, "PROGRAMS", study / "bin")
    calls = call("--methods", SEMI, "--jobs", 2, error=r"predict FLAIR .*exit status 3 of .*nnUNetv2_predict .*\(log: ")
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


def test_a_failed_fold_leaves_its_method_out_and_no_other(study, call, monkeypatch):
    monkeypatch.setenv("FAIL", f"Dataset500_Toy 1 {SEMI}")
    methods = ["--methods", SEMI, STOCK, "--reference", STOCK, "-f", 0, 1]
    calls = call(
        *methods, page=True, error=r'2 incomplete results, .*"train .*fold 1": exit status 3 of .*\(log: .*fold 1.out\)'
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


def test_a_second_stage_follows_the_first_of_its_fold(study, call, monkeypatch):
    second = SEMI + "PReL"
    folds = [(dataset, fold) for dataset, fold, *_ in trained(call("--methods", SEMI, second, "-f", 0, 1, "--jobs", 4))]
    assert len(folds) == 4
    monkeypatch.setenv("FAIL", f"0 {SEMI}")
    for folder in (study / "results").glob("*/nnUNetTrainer*"):
        folder.rename(folder.with_name(f"old_{folder.name}"))
    calls = call("--methods", SEMI, second, "-f", 0, error=f"train {SEMI} on")
    assert trained(calls) == [("Dataset500_Toy", "0", SEMI, "")]
    assert f"train {second} on Dataset500_Toy, fold 0: not run, since" in (study / "out" / "leaderboard.md").read_text()


def test_every_seed_has_results_of_its_own(study, call, monkeypatch):
    monkeypatch.setenv("FAIL", "never")
    calls = call("--methods", SEMI, STOCK, "--seeds", 3, 4)
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
    table.iloc[1:].replace({"case": {"P1": "Q1"}}).to_csv(other, index=False)
    call(
        "--methods", SEMI, "--compare", other, error=r"other.csv: found other test cases than this leaderboard: P1, Q1"
    )
    table.drop(columns="hd95").to_csv(other, index=False)
    call("--methods", SEMI, "--compare", other, error="other.csv: found the columns dataset, method")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--methods", "each:"], r"--methods: found 'each:'; expected \[NAME=\]"),
        (["--methods", SEMI + "@999"], "found dataset 999"),
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
    assert call("--methods", "all:nnUNetTrainer", error="nnUNetv2_preprocess -d Dataset500_Toy") == []


class Nothing(Job):
    """Nothing but a job."""

    def missing(self):
        return "undone"


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
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


class Once(Nothing):
    """A job that makes a file, once."""

    @property
    def target(self):
        return Path(self.name)

    def missing(self):
        return "" if self.target.is_file() else "no file"

    def run(self):
        self.target.touch(exist_ok=False)


def test_a_job_waits_for_the_process_that_does_the_same(tmp_path, monkeypatch):
    job, said = Once(name=str(tmp_path / "file")), threading.Event()
    monkeypatch.setattr("builtins.print", lambda text, **_: said.set() if text.startswith("Waiting for") else None)
    with ThreadPoolExecutor() as threads, FileLock(tmp_path / ".file.lock"):
        waiting = threads.submit(job)
        assert said.wait(60)
        assert not waiting.done()
        job.run()
        # only now can the other go on, and finds nothing to do
    assert waiting.result() == ""


def test_jobs_run_side_by_side_and_after_those_that_they_need():
    jobs = [Nothing(name=f"job {i}") for i in range(4)] + [Nothing(name="last", needs=("job 0", "job 3"))]
    executor = Slow()
    assert run_jobs(jobs, executor, at_once=3, gpus=["4", "5", "6", "7"]) == {}
    assert executor.most == 3
    assert executor.order[-1] == "last"
    assert executor.gpus[:3] == ["4,7", "5", "6"]


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


@pytest.mark.parametrize(("gpus", "canceled"), [([], ["interrupted"]), (None, [])])
def test_interruption_ends_local_jobs_and_leaves_those_of_a_cluster(gpus, canceled, capsys):
    executor = Slow()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([Nothing(name="interrupted")], executor, at_once=1, gpus=gpus)
    assert executor.canceled == canceled
    assert ("goes on as job 7" in capsys.readouterr().out) == (gpus is None)

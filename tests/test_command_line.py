"""What users type, in processes of their own: train, resume, validate; predict with an nnU-Net without this package.

A training, predictions, and a planning that fails are started as a user does. To import nnU-Net takes longer than what
they do, so the other trainings and plannings are copies of this process, and of the programs without this package
several follow each other in one process.
"""

import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import SimpleITK as sitk
import torch
from conftest import LABELS
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from toy import copy_processes, draw_few_intensities

from nnunetv2_semicml.command_line import print_trainers_folder
from nnunetv2_semicml.training import conductor

TRAINER = "nnUNetTrainerSemiCML_test"
SECOND = "nnUNetTrainerSemiCMLPReL_test"
SINGLE = "nnUNetTrainerSECLAnatomical_test"
MODEL = f"{TRAINER}__nnUNetPlans__2d"
FLAIR, T1 = "Dataset501_Labels_FLAIR", "Dataset502_Labels_T1"
BIN = Path(sys.executable).parent
FORK = multiprocessing.get_context("fork")
ONE_BY_ONE = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def run(program, *arguments, python=sys.executable, ok=True, **environment):
    """Run one of the command lines installed beside this Python, with that or another interpreter."""
    return start([str(python), str(BIN / program), *map(str, arguments)], ok, environment)


def run_all(calls, python, **environment):
    """Run several of them, one after the other, in one process."""
    words = [[str(BIN / program), *map(str, arguments)] for program, *arguments in calls]
    return start([str(python), "-c", ONE_BY_ONE, json.dumps(words)], True, environment)


def start(words, ok, environment):
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == ok, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_copy(program, *arguments, ok=True, pictures=False, **environment):
    """The same in a copy of this process. A training's own processes are copies, too, and it draws no pictures."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = FORK.Process(target=_be, args=(program, arguments, environment, files, pictures))
        process.start()
        process.join(600)
        done = SimpleNamespace(
            returncode=process.exitcode, **{file.name: file.read_text(encoding="utf-8") for file in files}
        )
    assert (done.returncode == 0) == ok, f"{program} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _be(program, arguments, environment, files, pictures):
    """Become a command line."""
    for number, file in enumerate(files, start=1):
        with file.open("w") as stream:
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(environment)
    copy_processes(pytest.MonkeyPatch())
    draw_few_intensities(pytest.MonkeyPatch())
    if not pictures:
        MetaLogger.plot_progress_png = lambda self, folder: None
        conductor.plot_terms = lambda logging, filename: None
    sys.argv = [program, *map(str, arguments)]
    runpy.run_path(str(BIN / program), run_name="__main__")


def train(*arguments, dataset=500, trainer=TRAINER, how=run_copy, **options):
    return how("nnUNetv2_train", dataset, "2d", *arguments, "-tr", trainer, "-device", "cpu", **options)


@pytest.fixture(scope="module")
def environment(labels_group, tmp_path_factory):
    """The environment of a user, with results of its own."""
    results = tmp_path_factory.mktemp("command_line") / "results"
    results.mkdir()
    folder = run("nnUNetv2_semicml_trainers").stdout.strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(results))
        patch.setenv("nnUNet_extTrainer", os.pathsep.join([folder, str(Path(__file__).parent / "trainers")]))
        recursive_find_trainer_class_by_name(TRAINER)  # what that imports, no copy of this process need import again
        yield results


@pytest.fixture(scope="module")
def two_folds(environment):
    """Two of the five folds, the first with probabilities."""
    train(0, "--npz", how=run)
    train(1, pictures=True)
    return environment


@pytest.fixture(scope="module")
def stock_python(tmp_path_factory):
    """An interpreter with nnU-Net and everything else that is installed here, but without this package."""
    venv = tmp_path_factory.mktemp("stock") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (target,) = venv.glob("lib/python*/site-packages")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if "semicml" not in entry.name and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    python = venv / "bin" / "python"
    code = "import nnunetv2; import nnunetv2_semicml"
    absent = subprocess.run([str(python), "-c", code], cwd=venv, capture_output=True, text=True)
    assert "No module named 'nnunetv2_semicml'" in absent.stderr
    return python


def single_modality_scans(folder, channel):
    """The test scans of one modality, named as nnU-Net wants them."""
    folder.mkdir(parents=True)
    for file in (Path(os.environ["nnUNet_raw"]) / LABELS / "imagesTs").glob(f"*_{channel:04d}.nii.gz"):
        shutil.copy(file, folder / file.name.replace(f"_{channel:04d}", "_0000"))
    return folder


def test_planning_is_that_of_the_function(channels_group, tmp_path):
    """With nnU-Net's real fingerprint, but of few intensities, planner and processes; writes nothing to nnUNet_raw."""
    raw, own = Path(os.environ["nnUNet_raw"]), {"nnUNet_preprocessed": str(tmp_path)}
    before = sorted((raw / channels_group.dataset_name).rglob("*"))  # others are being made
    options = ("--modalities", "MR=FLAIR,T2", "T1", "-c", "2d", "-np", 1, "-npfp", 1)
    done = run_copy("nnUNetv2_semicml_plan_and_preprocess", "-d", channels_group.dataset_name, *options, **own)
    assert "7 labeled cases: 5 with MR + T1, 1 with MR, 1 with T1" in done.stdout
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "MR Dataset551_Channels_MR _0000 FLAIR, _0001 T2 6 4" in rows
    assert "2d 24 × 24 3.6 × 3.6 5" in rows
    assert rows[-1] == "Next, e.g.: nnUNetv2_train 550 2d 0 -tr nnUNetTrainerSemiCMLPlus"
    assert sorted((raw / channels_group.dataset_name).rglob("*")) == before
    assert not list(raw.glob("Dataset55[12]*"))
    for modality in channels_group.modalities:
        folders = [Path(root) / modality.dataset_name for root in (os.environ["nnUNet_preprocessed"], tmp_path)]
        function, command = (json.loads((folder / "nnUNetPlans.json").read_text()) for folder in folders)
        for key in ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm"):
            assert command["configurations"]["2d"][key] == function["configurations"]["2d"][key]
        for kind in ("nnUNetPlans_2d", "nnUNetPlans_2d_unlabeled", "gt_segmentations"):
            first, second = ({file.name for file in (folder / kind).iterdir()} for folder in folders)
            assert first == second != set()


def test_trainers_folder_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_semicml_trainers"])
    print_trainers_folder()
    folder = Path(capsys.readouterr().out.strip())
    assert [f.name for f in sorted(folder.glob("*.py"))] == ["__init__.py", "semicml_trainers.py"]


def test_training_writes_complete_model_folders(two_folds):
    for dataset in (FLAIR, T1):
        model = two_folds / dataset / MODEL
        assert {"plans.json", "dataset.json", "dataset_fingerprint.json"} <= {f.name for f in model.iterdir()}
        for fold in (0, 1):
            files = {f.name for f in (model / f"fold_{fold}").iterdir()}
            assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "validation"} <= files
            assert "checkpoint_latest.pth" not in files
            assert (model / f"fold_{fold}" / "validation" / "summary.json").is_file()
        assert list((model / "fold_0" / "validation").glob("*.npz"))
        assert not list((model / "fold_1" / "validation").glob("*.npz"))
    joint = {f.name for f in (two_folds / LABELS / MODEL / "fold_0").iterdir()}
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "unsupervised_terms.png"} <= joint


def test_stock_nnunet_deploys_each_modality(two_folds, stock_python, tmp_path, monkeypatch):
    """Every command runs with an interpreter, and in an environment, that know nothing of this package."""
    monkeypatch.delenv("nnUNet_extTrainer")
    flair, t1 = (two_folds / dataset / MODEL for dataset in (FLAIR, T1))
    flair_scans, t1_scans = (single_modality_scans(tmp_path / name, c) for c, name in enumerate(("flair", "t1")))
    options = ("-f", 0, 1, "-device", "cpu", "-npp", 0, "-nps", 0)  # no processes, which take longer than the scans
    in_parallel = ("-f", 0, 1, "-device", "cpu", "-npp", 1, "-nps", 1)
    logs = (two_folds / LABELS / MODEL / "fold_0").glob("training_log_*.txt")
    log = min(logs, key=os.path.getmtime)  # of the training; other tests validate again
    found = f"T1: the model is {re.escape(str(t1))}, fold 0. To predict with it: nnUNetv2_predict (-d .*)\n"
    (printed,) = re.findall(found, log.read_text())
    assert "-i INPUT -o OUTPUT -c 2d -f 0 " in printed
    by_name = tuple(printed.replace("-i INPUT -o OUTPUT ", "").replace("-f 0 ", "").split())

    archive, elsewhere = tmp_path / "model.zip", tmp_path / "elsewhere"
    elsewhere.mkdir()
    truth = Path(os.environ["nnUNet_raw"]) / LABELS / "labelsTs"
    files = ("-djfile", t1 / "dataset.json", "-pfile", t1 / "plans.json", "-np", 1)
    on_site = [
        ("nnUNetv2_predict_from_modelfolder", "-m", flair, "-i", flair_scans, "-o", tmp_path / "a", *in_parallel),
        ("nnUNetv2_predict", *by_name, "-i", t1_scans, "-o", tmp_path / "b", *options),
        ("nnUNetv2_export_model_to_zip", *by_name, "-f", 0, 1, "-o", archive),
        ("nnUNetv2_evaluate_folder", truth, tmp_path / "b", *files),
    ]
    run_all(on_site, stock_python)
    hospital = {"nnUNet_results": str(elsewhere), "nnUNet_raw": "/nowhere", "nnUNet_preprocessed": "/nowhere"}
    in_hospital = [
        ("nnUNetv2_install_pretrained_model_from_zip", archive),
        ("nnUNetv2_predict", *by_name, "-i", t1_scans, "-o", tmp_path / "c", *options),
    ]
    run_all(in_hospital, stock_python, **hospital)
    for file in (elsewhere / T1 / MODEL).glob("d*.json"):
        assert os.environ["nnUNet_raw"] not in file.read_text()

    names = sorted(f.name.replace("_0000", "") for f in t1_scans.iterdir())
    for folder in "abc":
        assert sorted(f.name for f in (tmp_path / folder).glob("*.nii.gz")) == names
    for name in names:
        first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / way / name))) for way in "bc")
        assert (first == second).all()

    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(names)


def test_stock_nnunet_collects_the_folds(two_folds, stock_python, tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    of_folds = ("-c", "2d", "-tr", TRAINER, "-f", 0, 1)
    calls = [
        ("nnUNetv2_find_best_configuration", 501, *of_folds, "-np", 1, "--disable_ensembling"),
        ("nnUNetv2_accumulate_crossval_results", 502, *of_folds, "-o", tmp_path / "cv"),
    ]
    assert f"-tr {TRAINER}" in run_all(calls, stock_python).stdout
    summary = json.loads((tmp_path / "cv" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2


def test_second_stage_goes_on_from_the_first_and_is_deployed_by_stock_nnunet(two_folds, stock_python, tmp_path):
    second = f"{SECOND}__nnUNetPlans__2d"
    done = train(0, trainer=SECOND, pictures=True)
    assert "The better modality is " in done.stdout
    method = torch.load(two_folds / LABELS / second / "fold_0" / "checkpoint_final.pth", weights_only=True)["method"]
    assert method["better_modality"] in ("FLAIR", "T1")
    for dataset in (FLAIR, T1):
        model = two_folds / dataset / second
        assert {"plans.json", "dataset.json", "dataset_fingerprint.json"} <= {f.name for f in model.iterdir()}
        assert (model / "fold_0" / "validation" / "summary.json").is_file()
        assert (model / "fold_0" / "progress.png").is_file()
    scans = single_modality_scans(tmp_path / "t1", 1)
    run("nnUNetv2_predict", "-d", T1, "-c", "2d", "-f", 0, "-tr", SECOND, "-i", scans, "-o", tmp_path / "out",
        "-device", "cpu", "-npp", 0, "-nps", 0, python=stock_python, nnUNet_extTrainer="/nowhere")  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == len(list(scans.iterdir()))


def test_single_modality_method_trains_a_modality_dataset(environment, stock_python, tmp_path):
    """Resumed from the training state, which lies inside of the model folder; deployed without it."""
    single = {"dataset": 502, "trainer": SINGLE, "nnUNet_results": str(tmp_path / "results")}
    train(0, **single)
    model = tmp_path / "results" / T1 / f"{SINGLE}__nnUNetPlans__2d"
    state = model / "fold_0" / "training_state"
    (state / "checkpoint_final.pth").unlink()  # as if interrupted after the best epoch
    epochs = torch.load(state / "checkpoint_best.pth", weights_only=True)["current_epoch"]
    (model / "fold_0" / "checkpoint_final.pth").unlink()
    done = train(0, "--c", **single)
    assert done.stdout.count("Epoch time") == 2 - epochs
    train(0, "--val", "--val_best", **single)
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    heads = torch.load(state / "checkpoint_final.pth", weights_only=True)["method"]["projection_heads"]
    deployed = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert list(heads) == ["T1"]
    assert not any("head" in name for name in deployed)
    shutil.rmtree(state)
    scans = single_modality_scans(tmp_path / "t1", 1)
    run("nnUNetv2_predict", "-d", T1, "-c", "2d", "-f", 0, "-tr", SINGLE, "-i", scans, "-o", tmp_path / "out",
        "-device", "cpu", "-npp", 0, "-nps", 0, python=stock_python, nnUNet_extTrainer="/nowhere",
        nnUNet_results=single["nnUNet_results"])  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == len(list(scans.iterdir()))


def test_second_stage_without_the_first_names_the_command_to_run(environment, tmp_path):
    done = train(0, ok=False, trainer=SECOND, nnUNet_results=str(tmp_path))
    assert f"Run first: nnUNetv2_train 500 2d 0 -tr {TRAINER} -p nnUNetPlans" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_killed_training_continues_from_its_last_checkpoint(environment, tmp_path):
    own = {"nnUNet_results": str(tmp_path)}
    command = [str(BIN / "nnUNetv2_train"), "500", "2d", "0", "-tr", TRAINER, "-device", "cpu"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True, **quiet)
    fold = tmp_path / LABELS / MODEL / "fold_0"
    deadline = time.monotonic() + 120
    while not (fold / "checkpoint_latest.pth").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(random.uniform(0, 1.5))
    os.killpg(process.pid, signal.SIGKILL)  # with its data loading, which would live on
    process.wait()
    states = {f.stem: torch.load(f, weights_only=True) for f in fold.glob("checkpoint_*.pth")}  # all are whole
    before = next(states[n] for n in ("checkpoint_final", "checkpoint_latest", "checkpoint_best") if n in states)

    done = train(0, "--c", "--val_best", **own)
    assert done.stdout.count("Mean Validation Dice") == 2
    after = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert after["current_epoch"] == 2
    for old, new in [(before, after), *((before["modalities"][m], after["modalities"][m]) for m in ("FLAIR", "T1"))]:
        for key, values in old["logging"].items():
            assert len(values) == before["current_epoch"]
            assert new["logging"][key][: len(values)] == values
            assert len(new["logging"][key]) == 2
    for dataset in (FLAIR, T1):
        assert (tmp_path / dataset / MODEL / "fold_0" / "validation" / "summary.json").is_file()


def test_validation_only(two_folds):
    summaries = [two_folds / dataset / MODEL / "fold_0" / "validation" / "summary.json" for dataset in (FLAIR, T1)]
    before = [s.read_text() for s in summaries]
    for s in summaries:
        s.unlink()
    train(0, "--val")
    assert [s.read_text() for s in summaries] == before


def test_fold_all_without_checkpoints(environment, tmp_path):
    train("all", "--disable_checkpointing", nnUNet_results=str(tmp_path))
    assert not list(tmp_path.rglob("*.pth"))
    for dataset in (FLAIR, T1):
        summary = tmp_path / dataset / MODEL / "fold_all" / "validation" / "summary.json"
        assert len(json.loads(summary.read_text())["metric_per_case"]) == 5


def test_full_disk_leaves_the_previous_checkpoint(two_folds, tmp_path):
    """A limit on the size of files stands for the full disk; the write fails in the middle."""
    code = (
        "import resource, sys, torch\n"
        "from nnunetv2_semicml.training.checkpoint import save_atomically\n"
        "save_atomically({'epoch': 1, 'w': torch.zeros(10)}, sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "save_atomically({'epoch': 2, 'w': torch.zeros(10**6)}, sys.argv[1])\n"
    )
    file = tmp_path / "checkpoint_latest.pth"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert "The previous checkpoint is untouched" in done.stderr
    assert torch.load(file, weights_only=True)["epoch"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint_latest.pth"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-num_gpus", 1, "-pretrained_weights", "CHECKPOINT"), "Name the model of a modality: "),
        (("-p", "otherPlans"), "otherPlans"),
    ],
)
def test_unsuitable_arguments_are_refused(two_folds, arguments, sentence):
    checkpoint = two_folds / LABELS / MODEL / "fold_0" / "checkpoint_final.pth"
    arguments = [str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]
    done = train(1, *arguments, ok=False)
    assert sentence in done.stderr.splitlines()[-1]


def test_checkpoint_of_another_fold_is_refused(two_folds, tmp_path):
    shutil.copytree(two_folds / LABELS / MODEL / "fold_0", tmp_path / LABELS / MODEL / "fold_1")
    done = train(1, "--c", ok=False, nnUNet_results=str(tmp_path))
    assert "found a checkpoint of fold 0; expected fold 1" in done.stderr.splitlines()[-1]


def test_planning_reports_bad_input_in_one_sentence(labels_group, tmp_path):
    for own, sentence in [
        ({"nnUNet_raw": ""}, "nnUNet_raw"),
        ({"nnUNet_raw": str(tmp_path)}, "no raw dataset with the id 500"),
    ]:
        done = run("nnUNetv2_semicml_plan_and_preprocess", "-d", 500, ok=False, **own)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr

"""docs/extending.md: what it shows works as it stands there, and has as many lines as it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, initialized, weights
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from toy import save

from nnunetv2_semicml import ext_trainers

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
EXAMPLES = {
    re.match(r"# (\S+)\n", block).group(1): block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Find a trainer of the page as nnU-Net's command line does."""
    for file, text in EXAMPLES.items():
        if file.startswith("my_trainers/"):
            target = tmp_path / file
            target.parent.mkdir(exist_ok=True)
            target.write_text(text)
    monkeypatch.setenv("nnUNet_extTrainer", f"{Path(ext_trainers.__file__).parent}:{tmp_path / 'my_trainers'}")
    return recursive_find_trainer_class_by_name


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerMySemiCML",
        "nnUNetTrainerAdamSemiCML",
        "nnUNetTrainerMyMeanTeacher",
        "nnUNetTrainerMyWeakToStrong",
    ],
)
def test_trainer_is_found_and_learns(groups, find, name):
    trainer = initialized(LABELS, "2d", find(name))
    before = weights(trainer)
    trainer.run_training()
    for old, new in zip(before, weights(trainer), strict=True):
        assert not all(torch.equal(old[k], new[k]) for k in old)
    if "Adam" in name:
        assert trainer.trainers[0].optimizer.defaults["amsgrad"]
        assert trainer.network_trainer is nnUNetTrainerAdam
    log = trainer.logger.get_checkpoint()
    assert all(np.isfinite(log[f"unsupervised/{term}"]).all() for term in trainer.unsupervised_weights())


def test_second_stage_and_schedules_are_found(groups, find):
    second = find("nnUNetTrainerMySemiCMLPReL_50epochs")
    assert second.first_stage.__name__ == "nnUNetTrainerMySemiCML_50epochs"
    first = second.first_stage
    assert (first.num_epochs, first.teacher_averaging, first.warmup_fraction) == (50, "ema", 0.1)
    assert find("nnUNetTrainerMyMeanTeacher_5epochs").num_epochs == 5


@pytest.mark.parametrize(
    ("file", "what"),
    [("my_trainers/nnUNetTrainerMyMeanTeacher.py", "Mean Teacher"), ("mystudy.py", "A conv")],
)
def test_number_of_lines_is_what_the_page_says(file, what):
    lines = [line for line in EXAMPLES[file].splitlines()[1:] if line.strip()]
    (heading,) = (line for line in PAGE.splitlines() if line.startswith("## ") and what in line and "lines" in line)
    assert int(re.search(r"in (\d+) lines", heading).group(1)) == len(lines)


def test_converter_converts(tmp_path):
    random = np.random.default_rng(0)
    for folder, subjects in (("study", ("sub-01", "sub-02")), ("unlabeled", ("sub-03",))):
        for subject in subjects:
            for name in ("ct", "pet"):
                save(tmp_path / folder / subject / f"{name}.nii.gz", random.normal(size=(6, 7, 5)).astype(np.float32))
            if folder == "study":
                lesions = 255 * (random.random((6, 7, 5)) > 0.5)
                save(tmp_path / folder / subject / "lesions.nii.gz", lesions.astype(np.uint8))
    script = tmp_path / "mystudy.py"
    script.write_text(EXAMPLES["mystudy.py"])
    (tmp_path / "raw").mkdir()
    environment = os.environ | {"nnUNet_raw": str(tmp_path / "raw")}
    command = [sys.executable, script, tmp_path / "study", "-d", "600", "--unlabeled", tmp_path / "unlabeled"]
    subprocess.run(command, env=environment, check=True)
    dataset = tmp_path / "raw" / "Dataset600_MyStudy"
    assert sorted(f.name for f in (dataset / "imagesTr").iterdir()) == [
        f"sub-0{n}_000{channel}.nii.gz" for n in (1, 2) for channel in (0, 1)
    ]
    assert [f.name for f in (dataset / "imagesUn").iterdir() if "_0000" in f.name] == ["sub-03_0000.nii.gz"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("Error: ")

"""What grows with the number of unlabeled cases: time and memory from the raw files to the batches of a training.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cost/cases.py --work SCRATCH [--cases 100 1000 10000]

Two modalities, 5 labeled cases, tiny images (8 × 24 × 24), so that it is not reading and resampling that takes the
time. Every line is a process of its own, whose memory is the largest of it and its own processes. A training begins
without its epochs: folders and digests are compared, networks made, and a first batch drawn; then 200 batches.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from common import HERE, table, write_results

NAME, NUM_LABELED, SHAPE = "Dataset500_Cases", 5, (8, 24, 24)
BEGIN = """
import json, os, time, torch
from pathlib import Path
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
folder = Path(os.environ["nnUNet_preprocessed"], "Dataset500_Cases")
plans = {**json.loads((folder / "nnUNetPlans.json").read_text()), "continue_training": False}
trainer = nnUNetTrainerSemiCML(plans, "2d", 0, json.loads((folder / "dataset.json").read_text()), torch.device("cpu"))
trainer.initialize()
loader, _ = trainer.get_dataloaders()
next(loader)
"""
BATCHES = """
start = time.process_time()
for _ in range(200):
    next(loader)
print("took", time.process_time() - start)
"""
OUTDATED = """
from pathlib import Path
from nnunetv2_semicml.evaluation.trained_on import current
assert current("Dataset500_Cases", "nnUNetPlans", "2d", "0")["digest of cases"]
"""
PLAN = ["-m", "nnunetv2_semicml.planning.plan_and_preprocess", "-d", "500", "-c", "2d", "-np", "2", "-npfp", "2"]
STEPS = {
    "plan, check all images, preprocess": PLAN,
    "the same with --keep_plans, nothing new": [*PLAN, "--keep_plans"],
    "begin a training": ["-c", BEGIN],
    "200 batches": ["-c", BEGIN + BATCHES],
    "leaderboard: is a training out of date?": ["-c", OUTDATED],
    "import of nnU-Net, for comparison": ["-c", "import nnunetv2.training.nnUNetTrainer.nnUNetTrainer"],
}


def write_dataset(raw: Path, num_unlabeled: int) -> None:
    """Images of noise with a bright box, which the labels outline."""
    folder = raw / NAME
    random = np.random.default_rng(0)
    for kind, number in (("Tr", NUM_LABELED), ("Un", num_unlabeled)):
        for name in ("images", "labels") if kind == "Tr" else ("images",):
            (folder / f"{name}{kind}").mkdir(parents=True)
        for case in range(number):
            label = np.zeros(SHAPE, np.uint8)
            label[2:6, 6:18, 6:18] = 1
            for channel in range(2):
                image = (label * 50 + random.integers(1, 100, SHAPE)).astype(np.int16)
                file = folder / f"images{kind}" / f"{kind}_{case:06d}_{channel:04d}.nii.gz"
                sitk.WriteImage(sitk.GetImageFromArray(image), str(file))
            if kind == "Tr":
                sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "labelsTr" / f"{kind}_{case:06d}.nii.gz"))
    described = {"channel_names": {"0": "FLAIR", "1": "T1"}, "labels": {"background": 0, "box": 1}}
    described |= {"numTraining": NUM_LABELED, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described))


def measure(words: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds of a process, or those that it has printed, and its largest memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{words} failed: {output[-2000:]}")
    printed = [line.split()[1] for line in output.splitlines() if line.startswith("took ")]
    return float(printed[0]) if printed else seconds, usage.ru_maxrss // 1024


def main() -> None:
    """Measure and write cases.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the datasets, which are removed")
    parser.add_argument("--cases", type=int, nargs="+", default=[100, 1000, 10000], help="numbers of unlabeled cases")
    options = parser.parse_args()
    found: dict[int, dict[str, tuple[float, int]]] = {}
    for number in options.cases:
        work = options.work.resolve() / str(number)
        shutil.rmtree(work, ignore_errors=True)
        folders = {name: str(work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in folders.values():
            Path(folder).mkdir(parents=True)
        write_dataset(Path(folders["nnUNet_raw"]), number)
        found[number] = {}
        for name, words in STEPS.items():
            in_training = {"nnUNet_n_proc_DA": "0" if words[0] == "-c" else "2", "nnUNet_compile": "f"}
            found[number][name] = measure(words, os.environ | folders | in_training)
            print(number, name, found[number][name], flush=True)
        of_group = Path(folders["nnUNet_preprocessed"], NAME, "modalities.json")
        found[number]["modalities.json, KiB"] = of_group.stat().st_size / 1024, 0
        shutil.rmtree(work)
    last = found[options.cases[-1]]
    rows = [
        [name, *(f"{of[name][0]:.1f}" + (f" ({of[name][1]})" if of[name][1] else "") for of in found.values())]
        for name in last
    ]
    header = ["seconds (MiB)", *(f"{number} unlabeled" for number in options.cases)]
    parts = ["\n\n".join(__doc__.split("\n\n")[2:]), table(header, rows)]
    write_results(HERE / "cases.md", "What grows with the number of unlabeled cases", parts, " Each measured once.")


if __name__ == "__main__":
    main()

"""Every method of one stage on real data, by nnU-Net's command line, for a few epochs: do they learn, what do they log?

    python benchmarks/methods/run.py --data FOLDER --work SCRATCH [--only la lgg]

FOLDER holds Dataset720_LA (3D, one modality; the first 8 of 80 cases keep their labels, as the field has it) and
Dataset700_LGG (2D, FLAIR and T1; 10 of 70 patients keep theirs). Networks have 4 or 8 features at full resolution,
batches at most 8 patches; the optimizer is that of benchmarks/trainers/quick.py. What the methods logged goes to
curves.json, from which curves of every term and of the pseudo-labels, and methods.md are made; what stands there is not
trained again. Too short for any comparison.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

HERE = Path(__file__).parent
ALONE = ("MeanTeacher", "UAMT", "CPS", "SECLRegion", "SECLAnatomical", "BCP", "FixMatch", "UniMatch", "FilterMatch")
TOGETHER = ("CrossModalCPS", "CrossModalBCP", "SemiCML", "SemiCMLPlus")
# name -> source, dataset to make, configuration, methods, epochs, steps, features at full resolution
DATA = {
    "la": ("Dataset720_LA", "Dataset720_LA", "3d_fullres", ALONE, 5, 8, 4),
    "lgg": ("Dataset700_LGG", "Dataset800_LGG", "2d", (*ALONE, *TOGETHER), 5, 10, 8),
}
SEED = 0


class Trial:
    """The folders, the environment and the trainings of one dataset.

    Args:
        name: "la" or "lgg".
        data: where the raw datasets are.
        work: scratch folder.
    """

    def __init__(self, name: str, data: Path, work: Path):
        source, self.dataset, self.configuration, self.methods, epochs, steps, self.features = DATA[name]
        self.name, self.source, self.work = name, data / source, work / name
        folders = {v: self.work / v for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self.raw, self.preprocessed, self.results = folders.values()
        self.environment = {
            **{variable: str(folder) for variable, folder in folders.items()},
            "nnUNet_extTrainer": str(HERE.parent / "trainers"),
            "SEMICML_EPOCHS": str(epochs),
            "SEMICML_STEPS": str(steps),
            "nnUNet_semicml_seed": str(SEED),
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "1",
            "nnUNet_compile": "f",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    @property
    def number(self) -> str:
        """Of the dataset."""
        return self.dataset[7:10]

    def call(self, program: str, *arguments: str) -> None:
        """Run a command line of this environment."""
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        log = self.work / "log.txt"
        with log.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n")
            file.flush()
            done = subprocess.run(
                command, env=os.environ | self.environment, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode} of {' '.join(command)}: see the end of {log}")

    def prepare(self) -> None:
        """Withhold labels, plan, preprocess and make the networks small."""
        if (self.work / "prepared").is_file():
            return
        if self.name == "la":
            self._withhold_all_but_the_first(8)
        else:
            (self.raw / self.source.name).symlink_to(self.source)
            options = ["--output_id", self.number, "--num_labeled", "10", "--test_fraction", "0.3"]
            self.call("nnUNetv2_semicml_withhold_labels", "-d", self.source.name[7:10], *options)
        options = ["--one_modality"] if self.name == "la" else []
        self.call("nnUNetv2_semicml_plan_and_preprocess", "-d", self.number, "-c", self.configuration, *options)
        for file in self.preprocessed.glob("*/nnUNetPlans.json"):
            plans = json.loads(file.read_text())
            batch_size = plans["configurations"][self.configuration]["batch_size"]
            plans["configurations"][self.configuration]["batch_size"] = min(batch_size, 8)
            kwargs = plans["configurations"][self.configuration]["architecture"]["arch_kwargs"]
            kwargs["features_per_stage"] = [self.features * 2 ** min(i, 4) for i in range(kwargs["n_stages"])]
            file.write_text(json.dumps(plans, indent=4))
        (self.work / "prepared").touch()

    def _withhold_all_but_the_first(self, labeled: int) -> None:
        folder = self.raw / self.dataset
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("imagesTr", "labelsTr", "imagesUn"):
            (folder / name).mkdir(parents=True)
        images = sorted((self.source / "imagesTr").iterdir())
        for number, image in enumerate(images):
            if number < labeled:
                label = self.source / "labelsTr" / image.name.replace("_0000.", ".")
                (folder / "labelsTr" / label.name).symlink_to(label)
            (folder / ("imagesTr" if number < labeled else "imagesUn") / image.name).symlink_to(image)
        description = json.loads((self.source / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": labeled}))

    def train(self, method: str) -> dict[str, Any]:
        """Train fold 0 by nnU-Net's command line; return what was logged, of the method and of its networks."""
        self.call("nnUNetv2_train", self.number, self.configuration, "0", "-tr", f"Short_{method}", "-device", "cpu")
        model = f"Short_{method}__nnUNetPlans__{self.configuration}"
        folder = self.results / self.dataset / model / "fold_0"
        state = folder / "training_state" / "checkpoint_final.pth"
        file = state if state.is_file() else folder / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=True)
        networks = {n: s["logging"]["mean_fg_dice"] for n, s in checkpoint["modalities"].items()}
        wanted = ("unsupervised/", "weight/", "pseudo_volume/", "labeled_volume/")
        log = {key: values for key, values in checkpoint["logging"].items() if key.startswith(wanted)}
        return {"log": log, "dice": networks}


def plot(name: str, curves: Mapping[str, Any]) -> None:
    """A row for every method: its terms, what its networks learn from, and their validation Dice."""
    figure, axes = plt.subplots(len(curves), 3, figsize=(13, 2.4 * len(curves)), squeeze=False, layout="constrained")
    for row, (method, found) in zip(axes, curves.items(), strict=True):
        for key, values in found["log"].items():
            kind, what = key.split("/", 1)
            if kind == "unsupervised":
                row[0].plot(values, ".-", label=what)
            elif kind != "weight":
                first = [v[0] for v in values]
                row[1].plot(first, ".-" if kind == "pseudo_volume" else ".:", label=f"{what}, {kind.split('_')[0]}")
        for network, values in found["dice"].items():
            row[2].plot(values, ".-", label=network)
        row[0].set_title(f"{method}: terms, unweighted", fontsize=9)
        row[1].set_title("first class, share of voxels", fontsize=9)
        row[2].set_title("validation Dice of patches", fontsize=9)
        for axis in row:
            axis.xaxis.get_major_locator().set_params(integer=True)
            if axis.get_lines():
                axis.legend(fontsize=6)
    figure.savefig(HERE / f"{name}.png", dpi=70)
    plt.close(figure)


def report(curves: Mapping[str, Mapping[str, Any]]) -> None:
    """methods.md: where the terms, the pseudo-labels and the Dice began and ended."""
    lines = [
        "# Every method of one stage, for a few epochs",
        "",
        f"`python benchmarks/methods/run.py --data FOLDER --work SCRATCH`, seed {SEED}, {datetime.date.today()}, "
        f"{platform.machine()} CPU that other work shared, Python {platform.python_version()}, torch "
        f"{version('torch')}, nnU-Net {version('nnunetv2')}. Networks are small (see the script). Far "
        "too short for a comparison: it says of each method below that it runs by nnU-Net's command line on real data, "
        "that its terms are alive, and what its log says of pseudo-labels.",
    ]
    for name, of_data in curves.items():
        _, dataset, configuration, methods, epochs, steps, _ = DATA[name]
        lines += [
            "",
            f"## {dataset}, {configuration}, {epochs} epochs of {steps} steps ([curves]({name}.png))",
            "",
            "| method | terms, first → last epoch with any | volume of pseudo-labels, last epoch (labels) | validation "
            "Dice of patches, best epoch |",
            "|---|---|---|---|",
        ]
        for method, found in of_data.items():
            log = found["log"]
            terms = []
            for key, values in log.items():
                known = [v for v in values if key.startswith("unsupervised/") and not np.isnan(v)]
                if known:
                    terms.append(f"{key.split('/', 1)[1]} {known[0]:.3f} → {known[-1]:.3f}")
            volumes = [
                f"{key.split('/', 1)[1]} {values[-1][0]:.4f} ({log[key.replace('pseudo', 'labeled')][-1][0]:.4f})"
                for key, values in log.items()
                if key.startswith("pseudo_volume/")
            ]
            dice = [f"{network} {np.nanmax(values):.3f}" for network, values in found["dice"].items()]
            lines.append(f"| {method} | {', '.join(terms) or '–'} | {', '.join(volumes) or '–'} | {', '.join(dice)} |")
        if missing := [method for method in methods if method not in of_data]:
            lines += ["", f"Not run yet: {', '.join(missing)}."]
    (HERE / "methods.md").write_text("\n".join([*lines, ""]))


def main() -> None:
    """Train what is not in curves.json yet, and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the raw datasets")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--only", nargs="+", choices=DATA, default=list(DATA))
    arguments = parser.parse_args()
    file = HERE / "curves.json"
    curves = json.loads(file.read_text()) if file.is_file() else {}
    for name in arguments.only:
        trial = Trial(name, arguments.data.resolve(), arguments.work.resolve())
        for method in trial.methods:
            if method not in curves.get(name, {}):
                trial.prepare()
                curves.setdefault(name, {})[method] = trial.train(method)
                file.write_text(json.dumps(curves))
                print(name, method, curves[name][method]["dice"], flush=True)
        plot(name, curves[name])
    report(curves)


if __name__ == "__main__":
    main()

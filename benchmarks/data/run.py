"""Modalities of several channels, and cases that lack a modality, on real data: plans, trains, predicts, evaluates.

    python benchmarks/data/run.py ombria --data FOLDER_OF_Dataset710_OMBRIA --work SCRATCH
    python benchmarks/data/run.py ms     --data FOLDER_OF_Dataset703_MS     --work SCRATCH
    python benchmarks/data/run.py lgg    --data FOLDER_OF_Dataset700_LGG    --work SCRATCH [--draws 0]

"ombria": floods, S1 (radar, 2 channels) and S2 (optical, 6 channels), 2d; a tenth of the patches labeled; every method
in a few epochs, each modality of the test patches predicted alone by a stock nnU-Net without this package.
"ms": multiple sclerosis in 3D at 2 mm, T1 (T1, T1post) and FLAIR (FLAIR, T2); each of three patients is cut into a
labeled lower and an unlabeled upper half; once complete, once without T1post of one patient, whose T1 is then missing.
One patient is for validation. Far too few for claims: the runs end.
"lgg": FLAIR and T1 of the patients that are not for testing, 10 labeled, three tenths for validation, on which the
methods are compared: all complete; T1 missing in half of the others; those cases left out altogether.

Rows are added to <name>.csv beside this script, from which report.md is made; what stands there is not done again.
Networks are small and schedules short, so that a CPU bears them.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_semicml.data.result_folders import fold_folder, model_folder, state_folder
from nnunetv2_semicml.evaluation.metrics import evaluate_files
from nnunetv2_semicml.planning.withhold_labels import draw_order

HERE = Path(__file__).parent
COLUMNS = ["data", "cases", "method", "modality", "seed", "case", "dice"]
SUPERVISED = ""
SINGLE = ("MeanTeacher", "UAMT", "CPS", "SECLRegion", "SECLAnatomical")
COUPLED = ("CrossModalCPS", "SemiCML", "SemiCMLPReL", "SemiCMLPlus", "SemiCMLPlusPReL")


class Study:
    """The folders, the environment and the table of one of the three.

    Args:
        name: "ombria", "ms" or "lgg".
        data: the raw nnU-Net dataset.
        work: scratch folder.
        draws: of the labeled patients, each also a seed, where there are several.
    """

    def __init__(self, name: str, data: Path, work: Path, draws: Sequence[int]):
        self.name, self.data, self.work, self.draws = name, data, work / name, draws
        self.table = HERE / f"{name}.csv"
        folders = {v: self.work / v for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self.raw, self.preprocessed, self.results = folders.values()
        here = str(HERE.parent / "trainers")
        self.environment = {
            **{variable: str(folder) for variable, folder in folders.items()},
            "nnUNet_extTrainer": here,
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "1",
            "nnUNet_compile": "f",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are 30 times slower on a busy machine
        }

    def call(self, program: str, *arguments: object, python: Path = Path(sys.executable), **environment: str) -> None:
        """Run a command line of this environment, with this or another Python."""
        command = [str(python), str(Path(sys.executable).with_name(program)), *map(str, arguments)]
        log = self.work / "log.txt"
        with log.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n")
            file.flush()
            env = os.environ | self.environment | environment
            done = subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode} of {' '.join(command)}: see the end of {log}")

    def shrink(self, configuration: str, **changes: object) -> None:
        """Give all networks few features, as users of nnU-Net edit plans."""
        for file in self.preprocessed.glob("*/nnUNetPlans.json"):
            plans = json.loads(file.read_text())
            plans["configurations"][configuration].update(changes)
            kwargs = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
            kwargs["features_per_stage"] = [8 * 2 ** min(i, 4) for i in range(kwargs["n_stages"])]
            file.write_text(json.dumps(plans, indent=4))

    def fold_folder(self, dataset: str, method: str, configuration: str, fold: str) -> Path:
        """Where a network is."""
        return fold_folder(model_folder(self.results, dataset, f"Short_{method}", "nnUNetPlans", configuration), fold)

    def train(
        self, dataset: str, configuration: str, fold: str, method: str, epochs: int, steps: int, seed: int
    ) -> None:
        """Train and validate, unless that is done."""
        folder = self.fold_folder(dataset, method, configuration, fold)
        if (state_folder(folder) / "checkpoint_final.pth").is_file():
            return
        schedule = {"SEMICML_EPOCHS": str(epochs), "SEMICML_STEPS": str(steps), "nnUNet_semicml_seed": str(seed)}
        schedule |= {} if fold == "all" else {"SEMICML_VALIDATE": "1"}
        options = ["-tr", f"Short_{method}", "-device", "cpu"]
        self.call("nnUNetv2_train", dataset, configuration, fold, *options, **schedule)

    def done(self, cases: str, method: str, seed: int) -> bool:
        """Whether the table has a result."""
        if not self.table.is_file():
            return False
        table = pd.read_csv(self.table, dtype=str, keep_default_na=False)
        return ((table["cases"] == cases) & (table["method"] == method) & (table["seed"] == str(seed))).any()

    def add(self, cases: str, method: str, seed: int, dice: dict[str, dict[str, float]]) -> None:
        """Add the Dice of every case, modality -> case -> Dice, to the table."""
        new = not self.table.is_file()
        with self.table.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            for modality, of_cases in dice.items():
                for case, value in of_cases.items():
                    writer.writerow([self.name, cases, method, modality, seed, case, f"{value:.4f}"])
        means = ", ".join(f"{m} {np.mean(list(of.values())):.3f}" for m, of in dice.items())
        print(f"{self.name}, {cases}, {method or 'supervised only'}, seed {seed}: {means}", flush=True)


def dice_of(references: Path, predictions: Path, ending: str, reader: BaseReaderWriter, name: str) -> dict[str, float]:
    """Dice of every predicted case; nothing to find and nothing found counts as 1."""
    found = {}
    for file in sorted(predictions.glob(f"*{ending}")):
        metrics = evaluate_files(references / file.name, file, reader, {"background": 0, name: 1})[name]
        found[file.name.removesuffix(ending)] = 1.0 if np.isnan(metrics["dice"]) else metrics["dice"]
    return found


def stock_python(folder: Path) -> Path:
    """An interpreter with nnU-Net and everything else that is installed here, but without this package."""
    if not folder.is_dir():
        venv.create(folder, with_pip=False)
        (target,) = folder.glob("lib/python*/site-packages")
        for entry in Path(torch.__file__).parents[1].iterdir():
            if "semicml" not in entry.name and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    absent = subprocess.run(
        [str(python), "-c", "import nnunetv2_semicml"], cwd=folder, capture_output=True, check=False
    )
    if absent.returncode == 0:
        raise RuntimeError(f"{python} finds nnunetv2_semicml, which it should not")
    return python


def ombria(study: Study) -> None:
    """Every method on two modalities of several channels."""
    modalities = {
        "S1": ["S1before", "S1after"],
        "S2": [f"S2{when}_{band}" for when in ("before", "after") for band in "RGB"],
    }
    channel_names = json.loads((study.data / "dataset.json").read_text())["channel_names"]
    channels = {m: [list(channel_names.values()).index(name) for name in names] for m, names in modalities.items()}
    group, of_modality = "Dataset711_floods", {m: f"Dataset{712 + i}_floods_{m}" for i, m in enumerate(modalities)}
    source = study.raw / "Dataset710_OMBRIA"
    if not source.exists():
        source.symlink_to(study.data)
    if not (study.raw / group).is_dir():
        options = ["--output_id", 711, "--output_name", "floods", "--labeled_fraction", 0.1]
        study.call("nnUNetv2_semicml_withhold_labels", "-d", 710, *options)
    if not (study.preprocessed / of_modality["S2"] / "modalities.json").is_file():
        texts = [f"{m}={','.join(names)}" for m, names in modalities.items()]
        study.call(
            "nnUNetv2_semicml_plan_and_preprocess", "-d", 711, "-c", "2d", "--modalities", *texts, "-np", 2, "-npfp", 2
        )
        study.shrink("2d", batch_size=8)
    python = stock_python(study.work / "stock")
    for method in (SUPERVISED, *SINGLE, *COUPLED):
        if study.done("all", method, 0):
            continue
        dice = {}
        for dataset in of_modality.values() if method == SUPERVISED else [group]:
            study.train(dataset, "2d", "all", method, epochs=3, steps=10, seed=0)
        for modality, dataset in of_modality.items():
            scans, out = study.work / f"scans_{modality}", study.work / f"predicted_{method}_{modality}"
            if not scans.is_dir():
                scans.mkdir()
                for file in (study.data / "imagesTs").iterdir():
                    case, channel = file.stem[:-5], int(file.stem[-4:])
                    if channel in channels[modality]:
                        shutil.copy(file, scans / f"{case}_{channels[modality].index(channel):04d}.png")
            model = ["-d", dataset, "-c", "2d", "-f", "all", "-tr", f"Short_{method}"]
            resources = ["-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta"]
            nowhere = {"nnUNet_extTrainer": "/nowhere", "nnUNet_raw": "/nowhere", "nnUNet_preprocessed": "/nowhere"}
            nowhere = nowhere if method != SUPERVISED else {}  # whose model names the trainer of this folder
            with_python = python if method != SUPERVISED else Path(sys.executable)
            study.call("nnUNetv2_predict", "-i", scans, "-o", out, *model, *resources, python=with_python, **nowhere)
            dice[modality] = dice_of(study.data / "labelsTs", out, ".png", NaturalImage2DIO(), "flood")
        study.add("all", method, 0, dice)


def ms(study: Study) -> None:
    """Four channels in 3D as two modalities, with and without a modality of one patient."""
    described = json.loads((study.data / "dataset.json").read_text())
    patients = sorted(file.name.removesuffix(".nii.gz") for file in (study.data / "labelsTr").iterdir())
    for number, cases, lacking in ((720, "all complete", {}), (730, "no T1 of one patient", {patients[2]: 2})):
        name = f"Dataset{number}_ms"
        folder = study.raw / name
        if not folder.is_dir():
            for subfolder in ("imagesTr", "labelsTr", "imagesUn"):
                (folder / subfolder).mkdir(parents=True)
            for patient in patients:
                for channel in range(4):
                    if lacking.get(patient) == channel:
                        continue
                    file = study.data / "imagesTr" / f"{patient}_{channel:04d}.nii.gz"
                    image = sitk.ReadImage(str(file))[::2, ::2, ::2]
                    half = image.GetSize()[2] // 2
                    sitk.WriteImage(
                        image[:, :, :half], str(folder / "imagesTr" / f"{patient}_low_{channel:04d}.nii.gz")
                    )
                    sitk.WriteImage(image[:, :, half:], str(folder / "imagesUn" / f"{patient}_up_{channel:04d}.nii.gz"))
                label = sitk.ReadImage(str(study.data / "labelsTr" / f"{patient}.nii.gz"))[::2, ::2, ::2]
                sitk.WriteImage(label[:, :, :half], str(folder / "labelsTr" / f"{patient}_low.nii.gz"))
            first, second, third = (f"{patient}_low" for patient in patients)
            (folder / "splits_final.json").write_text(json.dumps([{"train": [first, third], "val": [second]}]))
            (folder / "dataset.json").write_text(json.dumps({**described, "numTraining": 3}))
        of_modality = {"T1": f"Dataset{number + 1}_ms_T1", "FLAIR": f"Dataset{number + 2}_ms_FLAIR"}
        if not (study.preprocessed / of_modality["FLAIR"] / "modalities.json").is_file():
            texts = ["T1=T1,T1post", "FLAIR=FLAIR,T2"]
            options = ["--modalities", *texts, "-np", 1, "-npfp", 2]
            study.call("nnUNetv2_semicml_plan_and_preprocess", "-d", number, "-c", "3d_fullres", *options)
            study.shrink("3d_fullres", batch_size=2, patch_size=[24, 48, 48])
            for file in study.preprocessed.glob("*/nnUNetPlans.json"):  # fewer stages for a smaller patch
                plans = json.loads(file.read_text())
                kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
                kwargs.update({key: value[:4] for key, value in kwargs.items() if isinstance(value, list)}, n_stages=4)
                kwargs["n_conv_per_stage_decoder"] = kwargs["n_conv_per_stage_decoder"][:3]
                file.write_text(json.dumps(plans, indent=4))
        for method in ("SemiCML", "SemiCMLPReL"):
            if study.done(cases, method, 0):
                continue
            study.train(name, "3d_fullres", "0", method, epochs=4, steps=10, seed=0)
            dice = {}
            for modality, dataset in of_modality.items():
                folder = study.fold_folder(dataset, method, "3d_fullres", "0") / "validation"
                dice[modality] = dice_of(study.raw / name / "labelsTr", folder, ".nii.gz", SimpleITKIO(), "lesion")
            study.add(cases, method, 0, dice)


def lgg(study: Study) -> None:
    """Complete cases, half of them without T1, and the complete half alone."""
    source = study.raw / "Dataset740_source"
    sites = study.work / "sites.csv"
    if not source.is_dir():
        with (study.data / "subjects.csv").open() as file:
            site_of = {row["case"]: row["institution"] for row in csv.DictReader(file)}
        test = draw_order(site_of, 0)[:21]  # those of benchmarks/study, which no default is chosen by
        present = {case: site for case, site in site_of.items() if case not in test}
        for subfolder, ends in (("imagesTr", ["_0000", "_0001"]), ("labelsTr", [""])):
            (source / subfolder).mkdir(parents=True)
            for case in present:
                for end in ends:
                    name = f"{case}{end}.nii.gz"
                    (source / subfolder / name).symlink_to(study.data / subfolder / name)
        described = json.loads((study.data / "dataset.json").read_text())
        (source / "dataset.json").write_text(json.dumps(described | {"numTraining": len(present)}))
        with sites.open("w", newline="") as file:
            csv.writer(file).writerows([("case", "group"), *present.items()])
    for draw in study.draws:
        for index, cases in enumerate(("all complete", "half without T1", "complete half alone")):
            number = 750 + 10 * (3 * draw + index)
            name = f"draw{draw}_{index}"
            group, of_modality = (
                f"Dataset{number}_{name}",
                {m: f"Dataset{number + 1 + i}_{name}_{m}" for i, m in enumerate(("FLAIR", "T1post"))},
            )
            if not (study.raw / group).is_dir():
                options = ["--num_labeled", 10, "--test_fraction", 0.3, "--stratify", sites, "--seed", draw]
                drop = [] if index == 0 else ["--drop_modality", "T1post=0.5"]
                options += ["--output_id", number, "--output_name", name, *drop]
                study.call("nnUNetv2_semicml_withhold_labels", "-d", 740, *options)
                if index == 2:
                    leave_out_incomplete(study.raw / group)
            if not (study.preprocessed / of_modality["T1post"] / "modalities.json").is_file():
                options = ["-overwrite_target_spacing", 5, 4, 4, "-np", 2, "-npfp", 2]
                study.call("nnUNetv2_semicml_plan_and_preprocess", "-d", number, "-c", "2d", *options)
                study.shrink("2d", batch_size=8)
            for method in (SUPERVISED, "SemiCML"):
                if study.done(cases, method, draw):
                    continue
                for dataset in of_modality.values() if method == SUPERVISED else [group]:
                    study.train(dataset, "2d", "all", method, epochs=20, steps=15, seed=draw)
                dice = {}
                for channel, (modality, dataset) in enumerate(of_modality.items()):
                    scans, out = (
                        study.work / f"scans_{number}_{modality}",
                        study.work / f"predicted_{number}_{method}_{modality}",
                    )
                    scans.mkdir(exist_ok=True)
                    for file in (study.raw / group / "imagesTs").glob(f"*_{channel:04d}.nii.gz"):
                        target = scans / file.name.replace(f"_{channel:04d}.nii.gz", "_0000.nii.gz")
                        if not target.exists():
                            target.symlink_to(file.resolve())
                    model = ["-d", dataset, "-c", "2d", "-f", "all", "-tr", f"Short_{method}"]
                    resources = ["-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta"]
                    study.call("nnUNetv2_predict", "-i", scans, "-o", out, *model, *resources)
                    dice[modality] = dice_of(study.raw / group / "labelsTs", out, ".nii.gz", SimpleITKIO(), "tumour")
                study.add(cases, method, draw, dice)


def leave_out_incomplete(folder: Path) -> None:
    """Remove the training cases that lack a modality."""
    removed = 0
    for subfolder in ("imagesTr", "imagesUn"):
        for file in (folder / subfolder).glob("*_0000.nii.gz"):
            if not file.with_name(file.name.replace("_0000", "_0001")).is_file():
                file.unlink()
                label = folder / "labelsTr" / file.name.replace("_0000", "")
                if subfolder == "imagesTr":
                    label.unlink()
                    removed += 1
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(described | {"numTraining": described["numTraining"] - removed}))


STUDIES: dict[str, Callable[[Study], None]] = {"ombria": ombria, "ms": ms, "lgg": lgg}


def write_report() -> None:
    """One table for each of the three, of the mean Dice."""
    lines = [
        "# Data as people have it: several channels, missing modalities",
        "",
        "Made by `python benchmarks/data/run.py NAME --data FOLDER --work SCRATCH`; what was run stands there.",
        "Mean Dice; in brackets the lowest and highest mean of a draw, where there are several. Networks are small,",
        "schedules short, and nnU-Net's own trainer has no seed: the runs end; few of the differences mean anything.",
        "In lgg, T1 has the same training cases in the second and the third group.",
        "",
    ]
    for name in STUDIES:
        file = HERE / f"{name}.csv"
        if not file.with_suffix(".json").is_file():
            continue  # not run, or not to the end
        table = pd.read_csv(file, keep_default_na=False)
        of_seed = table.groupby(["cases", "method", "modality", "seed"], sort=False)["dice"].mean()
        modalities = list(dict.fromkeys(table["modality"]))
        facts = json.loads((HERE / f"{name}.json").read_text())
        lines += [f"## {name}", "", ", ".join(f"{key}: {value}" for key, value in facts.items()) + ".", ""]
        lines += [f"| cases | method | {' | '.join(modalities)} |", "|---|---|" + "---|" * len(modalities)]
        for (cases, method), rows in of_seed.groupby(level=["cases", "method"], sort=False):
            values = []
            for modality in modalities:
                of = rows.xs(modality, level="modality")
                spread = f" ({of.min():.3f} … {of.max():.3f})" if len(of) > 1 else ""
                values.append(f"{of.mean():.3f}{spread}")
            lines.append(f"| {cases} | {method or 'supervised only'} | {' | '.join(values)} |")
        lines.append("")
    (HERE / "report.md").write_text("\n".join(lines))


def main() -> None:
    """Run what is missing of one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="the raw nnU-Net dataset")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="of lgg (default: %(default)s)")
    args = parser.parse_args()
    study = Study(args.name, args.data.resolve(), args.work.resolve(), args.draws)
    STUDIES[args.name](study)
    draws = f" --draws {' '.join(map(str, args.draws))}" if args.name == "lgg" else ""
    facts = {
        "command": f"`python benchmarks/data/run.py {args.name} --data {args.data.name} --work SCRATCH{draws}`",
        "seeds": ", ".join(map(str, sorted(set(pd.read_csv(study.table)["seed"])))),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "software": ", ".join(f"{p} {version(p)}" for p in ("nnunetv2-semicml", "nnunetv2", "torch")),
        "date": str(datetime.date.today()),
    }
    study.table.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    write_report()


if __name__ == "__main__":
    main()

"""The whole journey on synthetic patients, through the command lines that a user types.

Phantom → plan and preprocess → supervised-only reference → Semi-CML → PReL → single-modality prediction with stock
nnU-Net → evaluation → report. Everything lies below one folder; every command is printed before it runs and can be
repeated.
"""

import argparse
import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunetv2_semicml.data.files import explains_failed_writes
from nnunetv2_semicml.data.phantom import write_phantom_dataset
from nnunetv2_semicml.data.result_folders import fold_folder, model_folder
from nnunetv2_semicml.demo.report import ModalityResults, write_report
from nnunetv2_semicml.errors import UserError, reports_user_errors
from nnunetv2_semicml.evaluation.jobs import run_program
from nnunetv2_semicml.training.checkpoint import read_checkpoint

GROUP, MODALITIES = 500, {"FLAIR": 501, "T1": 502}
NUM_LABELED, NUM_UNLABELED, NUM_TEST = 6, 14, 6
PATIENTS = f"{NUM_LABELED} labeled, {NUM_UNLABELED} unlabeled, {NUM_TEST} test"
SHAPE, SPACING = (32, 40, 40), (5.0, 4.5, 4.5)
# 2D, since a processor without GPU then takes ten steps in the time of one in 3D.
CONFIGURATION = "2d"
TRAINERS = {
    "supervised only": "nnUNetTrainer_demo",
    "Semi-CML": "nnUNetTrainerSemiCML_demo",
    "PReL": "nnUNetTrainerSemiCMLPReL_demo",
}
MARKER = "made_by_nnUNetv2_semicml_demo.txt"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "test_scans", "predictions", "logs")
NUM_STEPS = 9


class Demo:
    """Runs the steps in one folder and remembers the commands and their seconds.

    Args:
        out: the folder; it is created, and what an earlier demo made there is replaced.
        device: nnU-Net's -device.
        seed: seed of the phantom.

    Raises:
        UserError: the folder holds something that no demo made.
    """

    def __init__(self, out: Path, device: str, seed: int):
        self.out, self.device, self.seed = out.resolve(), device, seed
        self.commands: list[tuple[str, float]] = []
        self.step = 0
        self._make_folder()
        self.environment = {
            **{name: str(self.out / name) for name in FOLDERS[:3]},
            "nnUNet_n_proc_DA": "1",
            # Threads that wait by spinning take the cores from those they wait for: 30 times slower on a busy machine.
            "OMP_WAIT_POLICY": "PASSIVE",
            "nnUNet_def_n_proc": "2",
            "nnUNet_compile": "f",
            "nnUNet_wandb_enabled": "0",
            "nnUNet_semicml_seed": str(seed),
        }

    def _make_folder(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(self.out, "a file", "a folder", "Choose another folder with --out.")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / MARKER).is_file():
                raise UserError(
                    self.out, "files that no demo made", "a new or empty folder", "Choose another with --out."
                )
            print(f"Removing the previous demo from {self.out}: {', '.join(FOLDERS)}, report.html")
            for name in FOLDERS:
                shutil.rmtree(self.out / name, ignore_errors=True)
            (self.out / "report.html").unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MARKER).write_text(f"The next demo replaces these beside this file: {', '.join(FOLDERS)}.\n")
        (self.out / "logs").mkdir()

    def begin(self, what: str) -> None:
        """Announce the next step."""
        self.step += 1
        print(f"\n[{self.step}/{NUM_STEPS}] {what}", flush=True)

    def call(self, program: str, *arguments: str | int | Path) -> str:
        """Run one of the command lines installed beside this Python and return its last line.

        Raises:
            UserError: it is not installed, or it fails.
        """
        executable = Path(sys.executable).with_name(program)
        if not executable.is_file():
            raise UserError(executable, "no such program", "an installed one", "Run pip install for this package.")
        command = shlex.join([program, *map(str, arguments)])
        print(f"  $ {command}", flush=True)
        log = self.out / "logs" / f"{self.step}_{len(self.commands):02d}_{program}.txt"
        start = time.monotonic()
        words = [str(executable), *map(str, arguments)]
        try:
            output = run_program(words, os.environ | self.environment, log, _show_status)
        except subprocess.CalledProcessError as error:
            print(*(f"  | {line}" for line in error.output.splitlines()[-12:]), sep="\n", file=sys.stderr)
            found = f"exit status {error.returncode} of {program}"
            raise UserError(log, found, "0", "The end of this log says what went wrong.") from error
        finally:
            _clear_status()
        self.commands.append((command, time.monotonic() - start))
        print(f"    done in {self.commands[-1][1]:.0f} s", flush=True)
        return output.strip().rpartition("\n")[-1]

    def run(self) -> Path:
        """Run all steps and return the report."""
        self.begin("Make synthetic patients: two co-registered scans each, few of them outlined")
        raw = write_phantom_dataset(
            self.out / "nnUNet_raw",
            GROUP,
            num_labeled=NUM_LABELED,
            num_unlabeled=NUM_UNLABELED,
            num_test=NUM_TEST,
            shape=SHAPE,
            spacing=SPACING,
            modalities=tuple(MODALITIES),
            seed=self.seed,
        )
        for modality in MODALITIES:
            self._copy_test_scans(raw, modality)
        print(f"    {PATIENTS}: {raw}")

        self.begin("Plan and preprocess, one nnU-Net dataset per modality")
        # nnU-Net's own hook: it looks for trainers in these folders, too
        folders = [self.call("nnUNetv2_semicml_trainers"), str(Path(__file__).with_name("trainers"))]
        self.environment["nnUNet_extTrainer"] = os.pathsep.join(folders)
        self.call("nnUNetv2_semicml_plan_and_preprocess", "-d", GROUP, "-c", CONFIGURATION, "-np", 2, "-npfp", 2)

        for modality, dataset in MODALITIES.items():
            self.begin(f"Train stock nnU-Net on the labeled {modality} scans alone, for comparison")
            self._train(dataset, "supervised only")
        self.begin("Train Semi-CML: both networks, labeled and unlabeled cases")
        self._train(GROUP, "Semi-CML")
        self.begin("Train PReL: from there on, with soft pseudo-labels of the better modality's teacher")
        self._train(GROUP, "PReL")

        self.begin("Segment the test scans of one modality at a time with stock nnU-Net")
        for modality, dataset in MODALITIES.items():
            for method, trainer in TRAINERS.items():
                scans, predictions = self.out / "test_scans" / modality, self._predictions(method, modality)
                model = ["-d", str(dataset), "-c", CONFIGURATION, "-f", "0", "-tr", trainer]
                # in one process: starting others takes longer than these scans
                resources = [*self._on_device(), "-npp", "0", "-nps", "0"]
                self.call("nnUNetv2_predict", "-i", scans, "-o", predictions, *model, *resources)

        self.begin("Evaluate")
        for modality in MODALITIES:
            for method in TRAINERS:
                predictions = self._predictions(method, modality)
                described = ["-djfile", str(predictions / "dataset.json"), "-pfile", str(predictions / "plans.json")]
                self.call("nnUNetv2_evaluate_folder", raw / "labelsTs", predictions, *described, "-np", 1)

        self.begin("Write the report")
        return self._report()

    def _copy_test_scans(self, raw: Path, modality: str) -> None:
        """Make what a hospital with one scanner has: single-channel scans, which nnU-Net wants named _0000."""
        folder = self.out / "test_scans" / modality
        folder.mkdir(parents=True)
        channel = f"_{list(MODALITIES).index(modality):04d}.nii.gz"
        for scan in (raw / "imagesTs").glob(f"*{channel}"):
            shutil.copy(scan, folder / scan.name.replace(channel, "_0000.nii.gz"))

    def _on_device(self) -> list[str]:
        return ["-device", self.device]

    def _train(self, dataset: int, method: str) -> None:
        self.call("nnUNetv2_train", dataset, CONFIGURATION, 0, "-tr", TRAINERS[method], *self._on_device())

    def _predictions(self, method: str, modality: str) -> Path:
        return self.out / "predictions" / method.replace(" ", "_") / modality

    def _fold(self, dataset: str, method: str) -> Path:
        results = self.out / "nnUNet_results"
        return fold_folder(model_folder(results, dataset, TRAINERS[method], "nnUNetPlans", CONFIGURATION), 0)

    def _checkpoint(self, dataset: str, method: str) -> dict[str, Any]:
        file, what = self._fold(dataset, method) / "checkpoint_final.pth", f"the finished training of {method}"
        return read_checkpoint(file, torch.device("cpu"), what, "Run the demo again.")

    def _report(self) -> Path:
        group = f"Dataset{GROUP}_Phantom"
        joint = {method: self._checkpoint(group, method) for method in ("Semi-CML", "PReL")}
        epochs = {method: checkpoint["current_epoch"] for method, checkpoint in joint.items()}
        results = [
            ModalityResults(
                modality,
                self.out / "test_scans" / modality,
                {method: self._predictions(method, modality) / "summary.json" for method in TRAINERS},
                {m: self._checkpoint(f"Dataset{dataset}_Phantom_{modality}", m)["logging"] for m in TRAINERS},
                {"PReL": epochs["Semi-CML"]},
            )
            for modality, dataset in MODALITIES.items()
        ]
        choice = joint["PReL"]["method"]
        dice = ", ".join(f"{name} {value:.3f}" for name, value in choice["validation_dice"].items())
        versions = {name: version(name) for name in ("nnunetv2-semicml", "nnunetv2", "torch", "numpy")}
        gpu = f", {torch.cuda.get_device_name()}" if self.device == "cuda" else ""
        facts = {
            "Patients": PATIENTS,
            "Modalities": " + ".join(MODALITIES) + f", synthetic, {' × '.join(map(str, SHAPE))} voxels",
            "Training": f"configuration {CONFIGURATION}, fold 0; epochs: {epochs['Semi-CML']} of Semi-CML, "
            f"{epochs['PReL']} of PReL, {len(results[0].logs['supervised only']['train_losses'])} supervised only",
            "Teacher of PReL": f"{choice['better_modality']} (best validation Dice, mean: {dice})",
            "Seed": f"{self.seed} (of the patients and of both stages; stock nnU-Net has no seed)",
            "Machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores{gpu}",
            "Software": ", ".join(f"{name} {number}" for name, number in versions.items()),
            "Date": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
            "Time": f"{sum(seconds for _, seconds in self.commands) / 60:.1f} minutes",
        }
        title = "Semi-supervised, multi-modal nnU-Net on a synthetic phantom"
        explanation = (
            "PReL goes on from the networks of Semi-CML; supervised only takes as many steps as both together. All see "
            "the same outlined cases, Semi-CML and PReL also unlabeled ones."
        )
        notes = {
            "Semi-CML": "A term that falls to zero at once, or Dice that falls as the weights rise, shows a collapse.",
            "PReL": f"The network of {choice['better_modality']} rests until the last fifth.",
        }
        terms = {method: (note, self._fold(group, method) / "unsupervised_terms.png") for method, note in notes.items()}
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        file = self.out / "report.html"
        return write_report(file, title, facts, results, explanation, terms, exports, self.commands)


def _show_status(text: str) -> None:
    """Show the latest line of a running command where a terminal can take it back."""
    if sys.stdout.isatty() and text.strip():
        width = shutil.get_terminal_size().columns - 6
        print(f"\r\033[K    {text.strip().splitlines()[-1][:width]}", end="", flush=True)


def _clear_status() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)


@reports_user_errors
def main() -> None:
    """Command line: the demo, in minutes, without GPU and without data."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the synthetic patients (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    with explains_failed_writes(args.out, "Make room, or choose another folder with --out."):
        report = Demo(args.out, args.device, args.seed).run()
    print(f"\nReport: {report}")


if __name__ == "__main__":
    main()

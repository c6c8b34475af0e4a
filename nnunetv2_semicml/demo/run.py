"""The whole journey on synthetic patients, through the command lines that a user types.

Phantom → plan and preprocess → leaderboard: supervised only, Semi-CML and PReL are trained, segment test scans of one
modality alone with stock nnU-Net, and are compared. Everything lies below one folder; every command is printed before
it runs and can be repeated.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from nnunetv2_semicml import ext_trainers
from nnunetv2_semicml.data.phantom import write_phantom_dataset
from nnunetv2_semicml.errors import UserError

GROUP, MODALITIES = 500, ("FLAIR", "T1")
NUM_LABELED, NUM_UNLABELED, NUM_TEST = 6, 14, 6
SHAPE, SPACING = (28, 32, 32), (5.7, 5.6, 5.6)
# 2D, since a processor without GPU then takes ten steps in the time of one in 3D.
CONFIGURATION = "2d"
METHODS = (
    "supervised only=each:nnUNetTrainer_demo",
    "Semi-CML=nnUNetTrainerSemiCML_demo",
    "PReL=nnUNetTrainerSemiCML_demo+nnUNetTrainerSemiCMLPReL_demo",
)
NOTE = (
    "A demonstration, not evidence: minutes of training on a handful of synthetic patients show that every part works, "
    "and nothing about accuracy on real scans. Differences may be chance."
)
TRAINERS = Path(ext_trainers.__file__).parent, Path(__file__).with_name("trainers")
AT_ONCE = 2  # trainings and predictions, which share the cores
MARKER = "made_by_nnUNetv2_semicml_demo.txt"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "leaderboard")
ENVIRONMENT_FILE, PLANNING_LOG = "environment.sh", "planning.txt"


class Demo:
    """Runs the steps in one folder.

    Args:
        out: the folder; it is created, and what an earlier demo made there is replaced.
        device: nnU-Net's -device.
        seed: of the phantom and of this package's trainers.

    Raises:
        UserError: the folder holds something that no demo made.
    """

    def __init__(self, out: Path, device: str, seed: int):
        self.out, self.device, self.seed = out.resolve(), device, seed
        self._make_folder()
        threads = max(1, (os.cpu_count() or 1) // AT_ONCE)
        self.environment = {
            **{name: str(self.out / name) for name in FOLDERS[:3]},
            # nnU-Net looks for trainers in these folders, too
            "nnUNet_extTrainer": os.pathsep.join(map(str, TRAINERS)),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",  # of validation; each takes longer to start than these cases take
            "nnUNet_compile": "f",
            "nnUNet_wandb_enabled": "0",
            "nnUNet_semicml_seed": str(seed),
            "OMP_NUM_THREADS": str(threads),
            # Threads that wait by spinning take the cores from those they wait for: 30 times slower on a busy machine.
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def _make_folder(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(self.out, "a file", "a folder", "Choose another folder with --out.")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / MARKER).is_file():
                raise UserError(
                    self.out, "files that no demo made", "a new or empty folder", "Choose another with --out."
                )
            print(f"Removing the previous demo from {self.out}: {', '.join(FOLDERS)}")
            for name in FOLDERS:
                shutil.rmtree(self.out / name, ignore_errors=True)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MARKER).write_text(f"The next demo replaces these beside this file: {', '.join(FOLDERS)}.\n")

    def run(self) -> Path:
        """Run all steps and return the report."""
        start = time.monotonic()
        print("[1/3] Make synthetic patients: two co-registered scans each, few of them outlined", flush=True)
        raw = write_phantom_dataset(
            self.out / "nnUNet_raw",
            GROUP,
            num_labeled=NUM_LABELED,
            num_unlabeled=NUM_UNLABELED,
            num_test=NUM_TEST,
            shape=SHAPE,
            spacing=SPACING,
            modalities=MODALITIES,
            seed=self.seed,
        )
        print(f"      {NUM_LABELED} labeled, {NUM_UNLABELED} unlabeled, {NUM_TEST} test: {raw}")
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        (self.out / ENVIRONMENT_FILE).write_text("\n".join([*exports, ""]))
        print(f"      To type these commands yourself: source {shlex.quote(str(self.out / ENVIRONMENT_FILE))}")

        print("\n[2/3] Plan and preprocess, one nnU-Net dataset per modality (a minute)", flush=True)
        planning: list[str | int] = ["-d", GROUP, "-c", CONFIGURATION, "-np", 2, "-npfp", 2]
        self.call("nnUNetv2_semicml_plan_and_preprocess", *planning, log=self.out / PLANNING_LOG)

        print("\n[3/3] Train, segment the test scans of one modality at a time with stock nnU-Net, compare", flush=True)
        # predict in one process, since others take longer to start than that, and without mirroring, four times as fast
        options = [
            "-device",
            self.device,
            "--jobs",
            str(AT_ONCE),
            "--predict_options=--disable_tta -npp 0 -nps 0",
            "--note",
            NOTE,
        ]
        out, compared = self.out / "leaderboard", ["-d", str(GROUP), "-c", CONFIGURATION, "-f", "0"]
        self.call("nnUNetv2_semicml_leaderboard", *compared, "--methods", *METHODS, *options, "-o", out)
        print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Models: {self.out / 'nnUNet_results'}")
        return out / "leaderboard.html"

    def call(self, program: str, *arguments: str | int | Path, log: Path | None = None) -> None:
        """Run one of the command lines installed beside this Python.

        Args:
            program: its name.
            *arguments: what follows.
            log: the file for what it prints, which is shown otherwise.

        Raises:
            UserError: it is not installed, or it fails.
        """
        executable = Path(sys.executable).with_name(program)
        if not executable.is_file():
            raise UserError(executable, "no such program", "an installed one", "Run pip install for this package.")
        words = [program, *map(str, arguments)]
        print(f"      $ {shlex.join(words)}", flush=True)
        start = time.monotonic()
        with log.open("w") if log else nullcontext() as file:
            command, environment = [str(executable), *words[1:]], os.environ | self.environment
            ended = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT if log else None)
        if ended.returncode:
            said = log or "what it printed above"
            raise UserError(said, f"exit status {ended.returncode} of {program}", "0", "Its last lines say why.")
        print(f"      done in {time.monotonic() - start:.0f} s", flush=True)

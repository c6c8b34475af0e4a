"""Break the code on purpose, one place at a time, and see whether its tests notice: `make mutate`, by mutmut.

    python benchmarks/mutation.py [part ...] [--sample 5] [--again]

Every part is done in a copy of the repository, mutants/<part>, and goes on where it was interrupted. What the figures
were: benchmarks/mutation.md.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("benchmarks", "dataset_conversion", "nnunetv2_semicml", "tests")
SEED = 0
# exit codes as mutmut keeps them; whatever else is noticed
UNNOTICED = {0: "survived", 5: "no tests", 33: "no tests"} | dict.fromkeys((24, -24, 36, 152), "timed out")
# part -> sources, and the quick tests that should notice
PARTS = {
    "losses": (["losses/*"], ["losses"]),
    "training": (
        ["training/teacher.py", "training/photometry.py", "training/schedules.py"],
        ["teacher", "photometry", "schedules"],
    ),
    "data": (["data/grid.py", "data/folds.py", "data/stored_file.py"], ["grid", "places", "folds", "stored_file"]),
    "evaluation": (["evaluation/metrics.py", "evaluation/statistics.py"], ["metrics", "statistics", "tables"]),
    "streams": (["data/paired_dataset.py", "data/streams.py", "training/loaders.py"], ["data", "empty_patches"]),
    "terms": (
        [
            *(f"trainers/nnUNetTrainer{n}.py" for n in ("*CPS", "MeanTeacher", "SECL*", "SemiCML", "*Plus", "UAMT")),
            *(f"training/{name}.py" for name in ("area_contrast", "cross_pseudo_supervision", "secl")),
        ],
        ["terms"],
    ),
    "views": (
        [
            *(f"trainers/nnUNetTrainer{n}.py" for n in ("*BCP", "*Match")),
            *(
                f"training/{name}.py"
                for name in ("boxes", "copy_paste", "strong_views", "class_volumes", "teaching_modality")
            ),
        ],
        ["copy_paste", "strong_views", "filter_match", "class_volumes"],
    ),
    "second_stage": (["trainers/nnUNetTrainerSemiCMLPReL.py"], ["second_stage", "prel"]),
    "conductor": (
        ["training/conductor.py", "training/nnUNetTrainerSemiSupervised.py", "training/modality_trainer.py"],
        ["conductor", "incomplete", "step"],
    ),
}


def prepare(part: str) -> Path:
    """Bring the part's copy of the repository up to date; mutmut finds what has changed by itself."""
    sources, tests = PARTS[part]
    folder = ROOT / "mutants" / part
    (ROOT / "mutants" / "tmp").mkdir(parents=True, exist_ok=True)  # of all tests, as [tool.mutmut] says
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    files = [f"tests/test_{name}.py" for name in tests]  # an earlier commit may lack some
    # a test may execute other functions by now, which mutmut asks of new tests alone
    (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    config = (ROOT / "pyproject.toml").read_text()
    own = {
        "only_mutate": [f"nnunetv2_semicml/{source}" for source in sources],
        "pytest_add_cli_args_test_selection": [file for file in files if (ROOT / file).is_file()],
    }
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items())
    (folder / "pyproject.toml").write_text(config.replace("[tool.mutmut]\n", f"[tool.mutmut]\n{lines}"))
    return folder


def results(folder: Path) -> dict[str, int | None]:
    """Mutant -> exit code of its tests, None where they have not run."""
    files = sorted((folder / "mutants").rglob("*.meta"))
    return {name: code for file in files for name, code in json.loads(file.read_text())["exit_code_by_key"].items()}


def mutmut(folder: Path, *names: str, quiet: bool = False) -> None:
    """Run the tests of some mutants, in one process at a time."""
    # pytest-xdist's variable lets all runs of the tests share one set of phantoms, see tests/conftest.py
    environment = {"PYTEST_XDIST_WORKER": "gw0", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", "1", *names]
    output = subprocess.DEVNULL if quiet else None
    subprocess.run(command, cwd=folder, env={**os.environ, **environment}, stdout=output, stderr=output, check=False)


def main() -> None:
    """Test the mutants of some parts, and count those that were noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help="all, unless some are named")
    parser.add_argument("--sample", type=int, default=1, help="test one of so many mutants, drawn with a fixed seed")
    parser.add_argument("--again", action="store_true", help="test those again that were not noticed")
    args = parser.parse_args()
    for part in args.parts or PARTS:
        folder = prepare(part)
        # makes the mutants, finds out which tests execute which function, and stops, since none has this name
        mutmut(folder, "none", quiet=True)
        names = sorted(results(folder))
        drawn = set(random.Random(SEED).sample(names, len(names) // args.sample))
        untested = {None} | (UNNOTICED.keys() if args.again else set())
        if todo := [name for name, code in results(folder).items() if name in drawn and code in untested]:
            mutmut(folder, *todo)
        codes = {name: code for name, code in results(folder).items() if name in drawn and code is not None}
        kinds = {name: UNNOTICED.get(code, "noticed") for name, code in codes.items()}
        print(f"{part}: {len(kinds)} of {len(names)} mutants tested: {dict(Counter(kinds.values()))}")
        print("\n".join(f"  {name}: {kind}" for name, kind in sorted(kinds.items()) if kind != "noticed"), flush=True)


if __name__ == "__main__":
    main()

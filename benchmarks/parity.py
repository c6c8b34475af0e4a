"""Whether two commits train alike to the last bit: every trainer of the package, seeded, on tiny phantoms.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/parity.py COMMIT --work SCRATCH

compares the working tree with a commit. Networks, optimizers, teachers, deployed weights and logs must be equal after
three epochs of two steps, with activations held and recomputed. Trainers that only one side has are listed, no more.
"""

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = [  # dataset, configuration, whether activations are recomputed
    ("Dataset500_Labels", "2d", False),
    ("Dataset500_Labels", "2d", True),
    ("Dataset500_Labels", "3d_fullres", None),
    ("Dataset510_Regions", "3d_fullres", True),
]
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed")


def prepare(work: Path) -> None:
    """Write, plan and preprocess the phantoms once: two modalities and classes, three modalities and regions."""
    if (work / "prepared").is_file():
        return
    from nnunetv2_semicml.data.phantom import write_phantom_dataset
    from nnunetv2_semicml.planning.plan_and_preprocess import plan_and_preprocess

    numbers = {"num_labeled": 5, "num_unlabeled": 4, "num_test": 1, "shape": (24, 24, 24), "num_classes": 2}
    raw = work / "nnUNet_raw"
    write_phantom_dataset(raw, 500, "Labels", **numbers)
    write_phantom_dataset(raw, 510, "Regions", **numbers, modalities=("FLAIR", "T1", "T2"), regions=True)
    groups = [
        plan_and_preprocess(500, ["2d", "3d_fullres"], num_processes=[1, 1]),
        plan_and_preprocess(510, ["3d_fullres"], modality_ids=[521, 522, 523], num_processes=[1]),
    ]
    for group in groups:
        for name in [group.dataset_name, *(m.dataset_name for m in group.modalities)]:
            file = work / "nnUNet_preprocessed" / name / "nnUNetPlans.json"
            plans = json.loads(file.read_text())
            for configuration in plans["configurations"].values():
                if "architecture" in configuration:
                    kwargs = configuration["architecture"]["arch_kwargs"]
                    kwargs["features_per_stage"] = [4] * kwargs["n_stages"]
                    configuration["batch_size"] = min(configuration["batch_size"], 3)
            file.write_text(json.dumps(plans))
    (work / "prepared").touch()


def train_all(out: Path) -> None:
    """Train every trainer of the package that this process imports, and store what became of each."""
    import numpy as np
    import torch
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    from nnunetv2_semicml.ext_trainers import semicml_trainers

    torch.set_num_threads(1)
    MetaLogger.plot_progress_png = lambda self, folder: None
    names = [n for n in vars(semicml_trainers) if n.startswith("nnUNetTrainer") and not n.endswith("epochs")]
    for name in sorted(names, key=lambda n: (n.endswith("PReL"), n)):  # first stages first
        for dataset, configuration, recompute in EXAMPLES:
            os.environ["nnUNet_results"] = str(out / f"results_{configuration}_{recompute}")
            Path(os.environ["nnUNet_results"]).mkdir(parents=True, exist_ok=True)
            random.seed(0)
            folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
            plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
            dataset_json = json.loads((folder / "dataset.json").read_text())
            trainer_class = getattr(semicml_trainers, name)
            trainer = trainer_class(plans, configuration, 0, dataset_json, torch.device("cpu"))
            trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 3, 2, 1
            setattr(trainer, "recompute" if hasattr(trainer, "recompute") else "two_pass", recompute)
            trainer.run_training()
            labeler = getattr(trainer, "labeler", None) or getattr(trainer, "teacher", None)
            averaged = {"labeler": labeler} if labeler else getattr(trainer, "teachers", {})
            logs = {"joint": trainer.logger.get_checkpoint()}
            found = {"teachers": {n: t.network.state_dict() for n, t in averaged.items()}}
            for t in trainer.trainers:
                logs[t.name] = t.logger.get_checkpoint()
                found[t.name] = {"network": t.network.state_dict(), "optimizer": t.optimizer.state_dict()["state"]}
                if t.deployed:
                    file = Path(t.output_folder) / "checkpoint_final.pth"
                    found[t.name]["deployed"] = torch.load(file, weights_only=True)["network_weights"]
            found["logs"] = {
                n: {k: torch.from_numpy(np.array(v, float)) for k, v in log.items() if "timestamps" not in k}
                for n, log in logs.items()
            }
            torch.save(found, out / f"{name} {dataset} {configuration} {recompute}.pt")


def differences(a: object, b: object, where: str = "") -> list[str]:
    """The places in which two nested results differ."""
    import torch

    if isinstance(a, dict):
        lacking = [f"{where}/{key} (on one side)" for key in a.keys() ^ b.keys()]
        return lacking + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}/{key}")]
    same = torch.equal(torch.nan_to_num(a, nan=-1.0), torch.nan_to_num(b, nan=-1.0)) if torch.is_tensor(a) else a == b
    return [] if same else [where]


def main() -> None:
    """Train on both sides and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what the working tree is compared with")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; what is in it is used again")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # in a process of one side
    options = parser.parse_args()
    work = options.work.resolve()
    os.environ |= {name: str(work / name) for name in FOLDERS} | {"nnUNet_results": str(work)}
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    if options.train:
        os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_semicml_seed": "0"}
        train_all(options.train)
        return
    prepare(work)
    import torch

    revision = subprocess.run(
        ["git", "rev-parse", "--short", options.commit], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.strip()
    before = work / revision
    if not before.is_dir():
        subprocess.run(["git", "worktree", "add", "--detach", before, revision], cwd=REPOSITORY, check=True)
    found = {}
    for side, code in (("before", before), ("now", REPOSITORY)):
        out = work / f"trained_{revision if side == 'before' else 'now'}"
        if side == "now" or not (out / "done").is_file():
            subprocess.run(["rm", "-rf", out], check=True)
            out.mkdir()
            with (out / "log.txt").open("w") as log:
                command = [sys.executable, __file__, revision, "--work", work, "--train", out]
                environment = os.environ | {"PYTHONPATH": str(code)}
                subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
            (out / "done").touch()
        found[side] = {file.stem: file for file in sorted(out.glob("*.pt"))}
    rows, equal = [], True
    for name in sorted(found["before"].keys() | found["now"].keys()):
        if any(name not in of_side for of_side in found.values()):
            rows.append((*name.split(), "on one side only"))
            continue
        before, now = (torch.load(of_side[name], weights_only=True) for of_side in found.values())
        new_teachers = not before["teachers"] and now.pop("teachers")
        differ = differences(before, {"teachers": {}, **now})
        equal = equal and not differ
        result = f"{len(differ)} differences, e.g. {differ[0]}" if differ else "equal"
        rows.append((*name.split(), f"{result}; teachers are new" if new_teachers else result))
    lines = ["trainer | dataset | configuration | recompute | found", "--- | --- | --- | --- | ---"]
    lines += [" | ".join(row) for row in rows]
    page = REPOSITORY / "benchmarks" / "parity.md"
    page.write_text(
        f"# Trainings now and at {revision}, to the last bit\n\n`python benchmarks/parity.py {options.commit} --work "
        f"SCRATCH`, {datetime.date.today()}, seed 0, {platform.machine()} CPU with {os.cpu_count()} cores, torch "
        f"{torch.__version__}.\n\nCompares {(__doc__ or '').split('compares ')[1].strip()}\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(page.read_text())
    sys.exit(not equal)


if __name__ == "__main__":
    main()

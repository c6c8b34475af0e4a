"""Do the modalities of a held-out case agree, and how much do they segment? Of what run.py has predicted in SCRATCH.

    python benchmarks/study/agreement.py ombria validation --work SCRATCH

Writes <protocol>_<purpose>_agreement.md: of every method on the first draw with the fewest labels, EMA weights, the
mean Dice of the modalities' segmentations with each other, their mean numbers of voxels and those of the references,
and the mean squared difference of the modalities' predictions of unlabeled patches, where the method logs it.
"""

import argparse
import datetime
import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from protocols import PROTOCOLS, PURPOSES, tasks_of
from run import dataset_of, model_of, result_file, set_environment

from nnunetv2_semicml.data.result_folders import fold_folder
from nnunetv2_semicml.evaluation.metrics import evaluate_files, fill_undefined

HERE = Path(__file__).parent
COMMAND = "python benchmarks/study/agreement.py {} {} --work SCRATCH"
MSE, THIRDS = "unsupervised/mse", "mean squared difference at the end of every third of the training"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("purpose", choices=PURPOSES)
    parser.add_argument("--work", type=Path, required=True, help="the scratch folder of run.py")
    args = parser.parse_args()
    protocol = PROTOCOLS[args.protocol]
    heads = ["method", "agreement", *(f"voxels by {m}" for m in protocol.modalities), "of the reference", THIRDS]
    lines = [f"# {protocol.title}: agreement", "", f"`{COMMAND.format(args.protocol, args.purpose)}`", ""]
    lines += [f"{args.purpose.capitalize()} cases, draw 0, {datetime.date.today()}, x86_64 CPU without GPU.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task in tasks_of(args.protocol, args.purpose):
        folder = result_file(args.work, task).with_suffix("")
        if (task.draw, task.labeled, task.steps) != (0, protocol.labeled[0], protocol.steps) or not folder.is_dir():
            continue
        set_environment(args.work, task)
        import torch

        raw = Path(os.environ["nnUNet_raw"]) / dataset_of(protocol, task)
        described = json.loads((raw / "dataset.json").read_text())
        labels = sorted((raw / "labelsTs").iterdir())
        reader = determine_reader_writer_from_dataset_json(described, str(labels[0]), verbose=False)()
        agreement, voxels = [], []
        for label in labels:
            predictions = [folder / modality / "EMA" / label.name for modality in protocol.modalities]
            own, mutual = (
                [evaluate_files(*pair, reader, described["labels"])[protocol.foreground] for pair in pairs]
                for pairs in ([(label, file) for file in predictions], combinations(predictions, 2))
            )
            agreement += [fill_undefined(metrics)["dice"] for metrics in mutual]
            voxels.append([*(metrics["n_pred"] for metrics in own), own[0]["n_ref"]])
        state = fold_folder(model_of(protocol, task, None), "all")
        joint = torch.load(state / "checkpoint_final.pth", weights_only=True, map_location="cpu")
        # Mean Teacher's is the difference to its teacher
        log = joint["logging"].get(MSE, []) if joint["provenance"]["settings"]["compares_modalities"] else []
        thirds = ", ".join(f"{log[len(log) * third // 3 - 1]:.3f}" for third in (1, 2, 3)) if log else ""
        cells = [task.method, f"{np.mean(agreement):.3f}", *(f"{n:.0f}" for n in np.mean(voxels, 0)), thirds]
        lines.append(f"| {' | '.join(cells)} |")
    (HERE / f"{args.protocol}_{args.purpose}_agreement.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()

"""A simulated year of labeling: does it pay to choose the cases that are labeled next?

    python benchmarks/ranking/labeling.py lgg --data FOLDER_OF_RAW_DATASETS --work SCRATCH [--draws 0 1 2]

Begins with 5 labeled cases, and adds 5 three times: those that `nnUNetv2_semicml_rank` chooses with its defaults, at
random, or those of whose prediction the network of the first modality is least sure. After each round two kinds of
networks are trained anew: on labels alone, and by Semi-CML Plus; the latter tell what to label next. Data, networks,
length and test cases are those of the protocol (../study/protocols.py, which see); a draw is that of the first cases,
and a seed. What the study has of the same cases is taken from its tables.

A draw of the gliomas is 17 to 20 trainings, 4 to 5 core-hours. Results are added to labeling.csv beside this script as
they come, and what was chosen to chosen.csv; labeling.md and labeling.png are made of the former. What stands there is
done, so that a year goes on where it was interrupted, also on another machine; to do something again, delete its rows
and its files below SCRATCH.
"""

import argparse
import datetime
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
STUDY = HERE.parent / "study"
sys.path.insert(0, str(STUDY))
from protocols import LOWER, PROTOCOLS, TOGETHER, Task  # noqa: E402
from run import (  # noqa: E402
    cases_of,
    dataset_of,
    is_done,
    model_of,
    result_file,
    rows_with,
    run,
    set_environment,
    source_of,
)

from nnunetv2_semicml.command_line import rank_parser  # noqa: E402
from nnunetv2_semicml.data.locks import locked  # noqa: E402

ROUNDS, ADDED = (5, 10, 15, 20), 5
SCORE, POOL = (rank_parser().get_default(option) for option in ("score", "pool"))
STRATEGIES = ("random", "rank", "entropy of one modality")
NETWORKS = {LOWER: ["Supervised"], "Semi-CML Plus": TOGETHER["Semi-CML Plus"]}  # the last one tells what to label
TABLE, CHOSEN = "labeling.csv", "chosen.csv"
METRICS = ["dice", "hd95"]


def tasks_of_round(name: str, draw: int, strategy: str, labeled: int, chosen: Sequence[str]) -> list[Task]:
    """Both kinds of networks after some cases were chosen; cases in the order of the draw are those of the study.

    The first round is the same for all strategies.
    """
    strategy, protocol = (strategy if chosen else STRATEGIES[0]), name
    if chosen or labeled not in PROTOCOLS[name].labeled:
        protocol = f"{name}_labeled_by_{strategy.split()[0]}"
        PROTOCOLS[protocol] = PROTOCOLS[name]._replace(labeled=ROUNDS, first=tuple(chosen))
    steps = PROTOCOLS[name].steps
    return [Task(protocol, "test", draw, labeled, method, tuple(of), steps) for method, of in NETWORKS.items()]


def year(data: Path, work: Path, name: str, job: tuple[int, str]) -> str:
    """All rounds of a draw and a strategy, or what is left of them; returns what happened."""
    draw, strategy = job
    chosen: list[str] = []
    for labeled in ROUNDS:
        about = {"protocol": name, "seed": draw, "strategy": strategy, "labeled": labeled}
        tasks = tasks_of_round(name, draw, strategy, labeled, chosen)
        asked = strategy != STRATEGIES[0] and labeled != ROUNDS[-1] and known(CHOSEN, about).empty
        for task in tasks:
            of_task = about | {"network": task.method}
            missing = known(TABLE, of_task).empty
            rows = rows_of_study(task) if missing else None
            # networks that are asked are needed themselves, which may be on another machine
            if (missing and rows is None) or (asked and task == tasks[-1]):
                line = run(data, work, task)
                print(time.strftime("%H:%M:%S"), f"{strategy}, {labeled} labeled, {line}", flush=True)
                if line.startswith("FAILED"):
                    return f"draw {draw}, {strategy}: failed, see above"
                rows = pd.DataFrame(json.loads(result_file(work, task).read_text())["rows"])
            if missing and rows is not None:
                add(work, TABLE, of_task, rows[["modality", "weights", "case", *METRICS]])
        if asked:
            following = choose_next(data, work, tasks[-1], strategy)
            add(work, CHOSEN, about, pd.DataFrame({"case": following}))
        chosen = known(CHOSEN, about)["case"].to_list()
    return f"draw {draw}, {strategy}: done"


def known(table: str, about: Mapping[str, Any]) -> pd.DataFrame:
    """What a table has of this."""
    file = HERE / table
    rows = pd.read_csv(file, dtype={"case": str}) if file.is_file() else pd.DataFrame(columns=[*about, "case"])
    return rows_with(rows, about)


def add(work: Path, table: str, about: Mapping[str, Any], rows: pd.DataFrame) -> None:
    """Add rows to a table; other years do the same."""
    file = HERE / table
    with locked(work / f"{table}.lock", f"adding to {table}", wait=True):
        rows = pd.concat([pd.DataFrame([about] * len(rows), index=rows.index), rows], axis=1)
        rows.to_csv(file, mode="a", header=not file.is_file(), index=False, float_format="%.4g")


def rows_of_study(task: Task) -> pd.DataFrame | None:
    """Metrics of a task that is the study's, too, if that has been there."""
    if not is_done(task):
        return None
    table = pd.read_csv(STUDY / f"{task.protocol}_{task.purpose}.csv", dtype={"case": str})
    own = {"method": task.method, "seed": task.draw, "labeled": task.labeled, "steps": task.steps}
    return rows_with(table, own)


def choose_next(data: Path, work: Path, task: Task, strategy: str) -> list[str]:
    """The labeled cases of a task, and those that its networks would have labeled next."""
    set_environment(work, task)
    import torch

    from nnunetv2_semicml.data.modality_group import ModalityGroup
    from nnunetv2_semicml.data.raw_dataset import read_raw_dataset
    from nnunetv2_semicml.evaluation.ranking import choose, score_cases
    from nnunetv2_semicml.evaluation.uncertainty import Networks, measure_cases

    torch.set_num_threads(1)
    protocol = PROTOCOLS[task.protocol]
    models = {modality: model_of(protocol, task, modality) for modality in protocol.modalities}
    raw = read_raw_dataset(dataset_of(protocol, task))
    modalities = ModalityGroup.load(raw.name).modalities
    networks = Networks(models, ["all"], torch.device("cpu"), mirroring=False)
    out = result_file(work, task).with_name("measured")
    with locked(out.with_suffix(".lock"), f"measuring cases of {raw.name}", wait=True):  # once for all strategies
        measured = measure_cases(raw.unlabeled, modalities, networks, out, raw.file_ending)
    if strategy == "rank":
        following = choose(score_cases(measured, SCORE), measured, ADDED, POOL)
    else:
        first = modalities[0].name
        entropy = pd.Series({case: of.measures[first]["entropy"] for case, of in measured.items()})
        # without any foreground there is no entropy, and nothing to be sure of
        following = entropy.sort_values(ascending=False, na_position="first", kind="stable").index[:ADDED].to_list()
    labeled = cases_of(protocol, source_of(protocol, data), task.purpose, task.draw)[0][: task.labeled]
    return [*labeled, *following]


def report() -> None:
    """labeling.md and labeling.png: mean Dice after each round, and what was gained by choosing."""
    table = pd.read_csv(HERE / TABLE)
    table = table[table["weights"] == "EMA"].assign(dice=table["dice"].fillna(0.0))
    draws = ", ".join(map(str, sorted(set(table["seed"]))))
    lines = [
        "# A simulated year of labeling",
        "",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        "",
        f"`python benchmarks/ranking/labeling.py PROTOCOL --data FOLDER --work SCRATCH`, draws {draws},",
        f"x86_64 CPU, {datetime.date.today()}. Mean Dice of test cases, exponential moving average of the weights;",
        "in brackets the difference to random labeling, paired by case, with a 95 % interval (BCa).",
        "",
    ]
    for (protocol, modality), rows in table.groupby(["protocol", "modality"], sort=False):
        heads = ["labels chosen by", "networks", *map(str, ROUNDS)]
        lines += [f"## {protocol}, {modality}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for network, of_network in rows.groupby("network", sort=False):
            for strategy in dict.fromkeys(of_network["strategy"]):
                cells = [strategy, network, *(gained(of_network, strategy, labeled) for labeled in ROUNDS)]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    plot(table)
    lines += ["![Dice after each round](labeling.png)", ""]
    (HERE / "labeling.md").write_text("\n".join(lines))


def gained(rows: pd.DataFrame, strategy: str, labeled: int) -> str:
    """Mean Dice of a round and, after the first one, the difference to random labeling."""
    from nnunetv2_semicml.evaluation.statistics import interval

    of_round = rows[rows["labeled"] == labeled].pivot(index=["case", "seed"], columns="strategy", values="dice")
    if not {strategy, STRATEGIES[0]} <= {*of_round}:
        return ""  # not yet
    of_round = of_round.dropna(subset=[strategy, STRATEGIES[0]])
    mean = f"{of_round[strategy].mean():.3f}"
    if strategy == STRATEGIES[0] or labeled == ROUNDS[0]:
        return mean
    gains = (of_round[strategy] - of_round[STRATEGIES[0]]).groupby("case").mean()
    low, high = interval(gains.to_numpy())
    return f"{mean} ({gains.mean():+.3f}, {low:+.3f} … {high:+.3f})"


def plot(table: pd.DataFrame) -> None:
    """labeling.png: mean Dice after each round."""
    from matplotlib import style
    from matplotlib.figure import Figure

    panels = table.groupby(["protocol", "modality"], sort=False)
    with style.context(["default", {"font.size": 9}]):
        figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (panel, rows) in zip(axes, panels, strict=True):
            for (network, strategy), of in rows.groupby(["network", "strategy"], sort=False):
                means = of.groupby("labeled")["dice"].mean()
                style = {"linestyle": ":" if network == next(iter(NETWORKS)) else "-", "marker": "o", "markersize": 3}
                color = f"C{STRATEGIES.index(strategy)}"
                axis.plot(means.index, means, color=color, label=f"{strategy}, {network}", **style)
            axis.set(title=", ".join(panel), xlabel="labeled cases", ylabel="Dice", xticks=ROUNDS)
        axes[-1].legend(fontsize=6)
        figure.savefig(HERE / "labeling.png", dpi=150, metadata={"Software": None})


def main() -> None:
    """Run what is missing, two years at a time, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--data", type=Path, default=Path(), help="the folder of the raw datasets")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    args = parser.parse_args()
    work, data, name = args.work.resolve(), args.data.resolve(), args.protocol
    jobs = [(draw, strategy) for draw in args.draws for strategy in STRATEGIES]
    with multiprocessing.get_context("spawn").Pool(args.processes, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(partial(year, data, work, name), jobs):
            print(time.strftime("%H:%M:%S"), line, flush=True)
    report()


if __name__ == "__main__":
    main()

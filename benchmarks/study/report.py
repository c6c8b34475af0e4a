"""Tables and figures of the study, from the tables of run.py alone: python benchmarks/study/report.py

Writes validation.md of validation.csv; results.md, distributions.png, differences.png and curves.png of test.csv, and
all_metrics.md with every metric of the 10 % comparison; phantom.md of phantom.csv.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from nnunetv2_semicml.evaluation.leaderboard_page import (
    Report,
    interval_text,
    p_text,
    plot_curves,
    plot_differences,
    plot_distributions,
    read_curves,
    signed,
    write_markdown,
)
from nnunetv2_semicml.evaluation.statistics import average_seeds, compare, holm, score, summarize

HERE = Path(__file__).parent
TEN_PERCENT, ALL = 5, 49
BOUND = "supervised only"
# what a method gains over another, beyond the references of the tables
TEST_PAIRS = [
    ("Semi-CML + PReL", "Semi-CML, 600 steps"),
    ("Semi-CML + PReL, EMA teacher", "Semi-CML, 600 steps"),
    ("all labels", "Semi-CML + PReL, EMA teacher"),
    ("Semi-CML Plus", "Semi-CML"),
    ("Semi-CML Plus", "cross-modal CPS"),
    ("Semi-CML Plus + PReL", "cross-modal CPS"),
    ("Semi-CML Plus + PReL", "Semi-CML + PReL, EMA teacher"),
]
VALIDATION_PAIRS = [
    ("EMA teacher of Semi-CML", "BMA teacher of Semi-CML"),
    ("Semi-CML, PReL", "Semi-CML"),
    ("Semi-CML with EMA teacher, PReL", "Semi-CML"),
    ("Semi-CML Plus, PReL", "Semi-CML Plus"),
    ("Semi-CML Plus, PReL", "Semi-CML Plus with BMA teacher, PReL"),
    ("Semi-CML Plus", "hard pseudo-labels alone"),
    ("Semi-CML Plus with BMA teacher, PReL", "hard pseudo-labels alone, PReL"),
    ("SECL, region", "SECL, region, weight 0.1"),
    ("SECL, region", "SECL, region, last stage"),
    ("SECL, anatomical", "SECL, anatomical, weight 1"),
    ("SECL, anatomical", "SECL, anatomical, temperature 0.1"),
    ("SECL, anatomical", "SECL, anatomical, last stage"),
]


def table(scores: pd.DataFrame, references: list[str], with_p: bool = True) -> list[str]:
    """Markdown: Dice of every method and modality, and its paired difference to each reference."""
    modalities = list(dict.fromkeys(scores["modality"]))
    rows = {(row["method"], row["modality"]): row for row in summarize(scores).to_dict("records")}
    heads = [f"{m} Dice" for m in modalities] + [f"{m} − {r}" for r in references for m in modalities]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    differences = {}
    for reference in references:
        compared = pd.concat(differences_of(scores, method, reference) for method in dict.fromkeys(scores["method"]))
        for row in compared.assign(p_holm=holm(compared["p"])).to_dict("records"):
            p = row["p_holm"] if with_p else None
            differences[row["method"], row["modality"], reference] = difference_text(row, p)
    for method in dict.fromkeys(scores["method"]):
        cells = [method]
        for modality in modalities:
            row = rows[method, modality]
            spread = f" ({row['dice_low']:.3f} … {row['dice_high']:.3f})" if row["seeds"] > 1 else " (one draw)"
            cells.append(f"{row['dice']:.3f}{spread}")
        cells += [differences.get((method, m, r), "") for r in references for m in modalities]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def difference_text(row: dict, p: float | None = None) -> str:
    """Markdown of a row of `compare`."""
    tested = "" if p is None else f", p {'' if p < 0.001 else '= '}{p_text(p)}"
    return f"{signed(row, 'difference')} ({interval_text(row)}){tested}"


def pairs_table(scores: pd.DataFrame, pairs: list[tuple[str, str]]) -> list[str]:
    """Markdown: paired differences in Dice between two methods that are there, whose p is not corrected."""
    modalities = list(dict.fromkeys(scores["modality"]))
    lines = ["| difference | " + " | ".join(modalities) + " |", "|---" * (len(modalities) + 1) + "|"]
    for method, reference in pairs:
        if not {method, reference} <= set(scores["method"]):
            continue
        rows = differences_of(scores, method, reference).set_index("modality").to_dict("index")
        cells = [difference_text(rows[m], rows[m]["p"]) for m in modalities]
        lines.append(f"| {method} − {reference} | " + " | ".join(cells) + " |")
    return lines


def differences_of(scores: pd.DataFrame, method: str, reference: str) -> pd.DataFrame:
    """Dice of a method compared with that of the reference, on the draws that both have."""
    of_method, of_reference = (scores[scores["method"] == name] for name in (method, reference))
    common = set(of_method["seed"]) & set(of_reference["seed"])
    both = pd.concat([of_method, of_reference]) if method != reference else of_method
    compared = compare(both[both["seed"].isin(common)], reference)
    return compared[compared["metric"] == "dice"]


def from_one_modality(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of predictions from one scan; the others name several modalities, joined by a plus sign."""
    return ~rows["modality"].str.contains("+", regex=False)


def comparison(cases: pd.DataFrame) -> list[str]:
    """Markdown of the methods that predict from one modality; those that need several scans stand below."""
    of_one = from_one_modality(cases)
    lines = table(score(cases[of_one]), [BOUND, "Semi-CML + PReL"])
    for row in summarize(score(cases[~of_one])).to_dict("records") if (~of_one).any() else ():
        spread = f"({row['dice_low']:.3f} … {row['dice_high']:.3f})"
        lines += ["", f"For comparison, {row['method']} ({row['modality']}): {row['dice']:.3f} {spread}."]
    return lines


EXPLAINED = (
    "Dice per patient in 3D, each modality predicted alone: mean over the patients (lowest … highest mean of a draw). "
    "Differences are paired by patient, on the draws that both methods have: mean (95 % bootstrap interval, BCa)"
)
TESTED = "two-sided Wilcoxon p, Holm-corrected over the two columns of a reference"


def heading(purpose: str, title: str) -> list[str]:
    """Title, command, machine and date."""
    facts = json.loads((HERE / f"{purpose}.json").read_text())
    return [f"# {title}", "", f"`{facts.pop('command')}`", "", *(f"- {name}: {value}" for name, value in facts.items())]


def save(name: str, plot: Callable[[Figure], None], size: tuple[float, float]) -> None:
    """Draw a figure into a PNG."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "font.size": 9}
    with rc_context(style | {"legend.frameon": False, "figure.constrained_layout.use": True}):
        figure = Figure(figsize=size)
        plot(figure)
        figure.savefig(HERE / name, dpi=110)


def main() -> None:
    """Write what there is."""
    for purpose, write in (("validation", write_validation), ("test", write_test), ("phantom", write_phantom)):
        if (HERE / f"{purpose}.csv").is_file():
            write()


def write_validation() -> None:
    """validation.md."""
    cases = pd.read_csv(HERE / "validation.csv")
    cases["case"] += " of draw " + cases["seed"].astype(str)  # a patient of several draws counts in each
    lines = heading("validation", "Ablations on validation patients: what the defaults rest on")
    neither, prel, secl = (cases["method"].str.match(name) for name in ("neither term$", ".*PReL", "SECL"))
    for title, rows, references in (
        ("First stage, 600 steps", ~prel & ~secl, ["Semi-CML", "neither term"]),
        ("After 300 steps of PReL", prel, ["Semi-CML, PReL"]),
        ("SECL, 600 steps", neither | secl, ["neither term"]),
    ):
        if set(references) <= set(cases["method"]):
            lines += ["", f"## {title}", "", *table(score(cases[rows]), references, with_p=False)]
    lines += ["", "## Pairs, p not corrected", "", *pairs_table(score(cases), VALIDATION_PAIRS)]
    (HERE / "validation.md").write_text("\n".join([*lines, "", f"{EXPLAINED}.", ""]))


def write_test() -> None:
    """results.md, all_metrics.md and the figures."""
    cases = pd.read_csv(HERE / "test.csv")
    main_cases = cases[cases["labeled"].isin([TEN_PERCENT, ALL])]
    lines = heading("test", "All methods on the test patients")
    lines += ["", "## 10 % labeled", "", *comparison(main_cases)]
    lines += ["", "![Dice and HD95 of every patient](distributions.png)"]
    lines += ["", "![differences to supervised-only training](differences.png)"]
    scores = score(main_cases[from_one_modality(main_cases)])
    lines += ["", "## Pairs, p not corrected", "", *pairs_table(scores, TEST_PAIRS)]
    others = [cases[cases["labeled"] == n] for n in sorted(set(cases["labeled"]) - {TEN_PERCENT, ALL})]
    for part in others:
        labeled = part["labeled"].iloc[0]
        lines += ["", f"## {labeled} labeled patients ({labeled / ALL:.0%})", "", *table(score(part), [BOUND])]
    if others:
        lines += ["", "![Dice and HD95 over the labeled share](curves.png)"]
    (HERE / "results.md").write_text("\n".join([*lines, "", f"{EXPLAINED}, {TESTED}.", ""]))

    facts = json.loads((HERE / "test.json").read_text())
    command = facts.pop("command")
    title = "10 % labeled: every metric"
    # without the draws of an unfinished method, differences would compare other trainings
    draws = main_cases.groupby("method")["seed"].transform("nunique")
    report = Report(
        title, command, facts, BOUND, main_cases[draws == draws.max()], incomplete=[], others=others, files=[]
    )
    write_markdown(HERE / "all_metrics.md", report)
    of_one = report.scores[from_one_modality(report.scores)]
    methods = list(dict.fromkeys(of_one["method"]))
    patients = average_seeds(of_one)
    save("distributions.png", lambda figure: plot_distributions(figure, patients, methods), (11, 7))
    save("differences.png", lambda figure: plot_differences(figure, report.differences, methods), (11, 7))
    if others:
        curves = read_curves(report, report.cases["class"].iloc[0])
        curves["method"] = curves["method"].replace("all labels", BOUND)  # the same training
        compared = curves[curves["method"].isin(others[0]["method"])]
        save("curves.png", lambda figure: plot_curves(figure, compared), (9, 6))


def write_phantom() -> None:
    """phantom.md."""
    lines = heading("phantom", "All methods on the synthetic phantom")
    lines += ["", *comparison(pd.read_csv(HERE / "phantom.csv")), "", f"{EXPLAINED}, {TESTED}.", ""]
    (HERE / "phantom.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()

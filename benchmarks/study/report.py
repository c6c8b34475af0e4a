"""Tables and figures of run.py's results: python benchmarks/study/report.py

Of every protocol that has any: <protocol>.md, and <protocol>.png of the shares of the gap. README.md puts the shares of
all protocols together, and what was made of them, which is written by hand in findings.md. The README of the whole has
a place for what recommended trainers gain.
"""

import re
from pathlib import Path

import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure
from protocols import FINALISTS, LOWER, PROTOCOLS, UPPER, Protocol, tasks_of
from run import AGAIN, CPU, KEYS, WEIGHTS, read_runs, rows_with

from nnunetv2_semicml.evaluation.leaderboard_page import interval_text, p_text, signed
from nnunetv2_semicml.evaluation.statistics import compare, holm, score, share_of_gap, summarize

HERE = Path(__file__).parent
FIRST_PAGE = HERE.parents[1] / "README.md"
PLACE = re.compile(r"(?P<begin><!-- benchmarks/study/report.py -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
# on the first page: protocol -> modality -> head; what somebody has, the trainer, how tables call it
SHOWN_FIRST = {
    "lgg": {"FLAIR": "gliomas: FLAIR", "T1post": "T1"},
    "ombria": {"S1": "floods: radar", "S2": "optical"},
    "la": {"GEMRI": "left atria"},
}
TRAINERS = (
    ("two or more modalities", "`nnUNetTrainerSemiCMLPlus`", "Semi-CML Plus"),
    ("… of about equal worth", "the same, which measures that; here set", "Semi-CML Plus, taught both ways"),
    ("… and want the published method", "`nnUNetTrainerSemiCML`", "Semi-CML"),
    ("a finished Semi-CML", "`nnUNetTrainerSemiCMLPReL`", "Semi-CML + PReL"),
    ("a finished Semi-CML Plus", "`nnUNetTrainerSemiCMLPlusPReL`", "Semi-CML Plus + PReL"),
    ("one modality", "`nnUNetTrainerBCPPlus`", "BCP Plus"),
)
SHOWN = (-1.6, 1.6)  # of shares, in figures: where the gap is small, an interval can have any length
NO_GAP = "no sure gap"
MARKS = ("", "", "²", "³")  # of what rests on several draws, where there is no column for them
EXPLAINED = """\
Mean per case, in 3D, each modality predicted alone; in brackets the lowest and highest mean of a draw. *Share*: of
what lies between the bounds, the part that a method gains, (method − few labels) / (all labels − few labels), of Dice,
with a 95 % bootstrap interval over the cases; none where the interval of the gap itself reaches nought. Bounds and
method have the same weights: those of the last step, or their exponential moving average (EMA). Differences are paired
by case (95 % interval, BCa); p: two-sided Wilcoxon, Holm-corrected for all methods and modalities of the table. They
are of these trainings: what other cases would change, not what other seeds would, for which draws stand. Draws that a
bound lacks are left out."""

AGAIN_EXPLAINED = """\
The same training with the same seed on another device (`run.py … --again`): what differs is chance, and on a GPU
float16 and the version of PyTorch. Interval and p are over cases, as everywhere.

| data | training | Dice | again | apart | p |
|---|---|---|---|---|---|"""


def results_of(name: str, purpose: str, prefix: str = "") -> pd.DataFrame:
    """Rows of the table of a protocol; none if there is none. With the prefix AGAIN those of second runs."""
    file = HERE / f"{prefix}{name}_{purpose}.csv"
    if not file.is_file():
        return pd.DataFrame()
    cases = pd.read_csv(file)
    if purpose == "validation":  # another draw's case is another training's
        cases["case"] = cases["case"].astype(str) + " of draw " + cases["seed"].astype(str)
    return cases


def with_bounds(cases: pd.DataFrame, labeled: int) -> pd.DataFrame:
    """What was trained with so many labels, and with all, on the draws that have both bounds."""
    part = cases[cases["labeled"].isin([labeled, 0])]
    draws = [set(part.loc[part["method"] == bound, "seed"]) for bound in (LOWER, UPPER)]
    return part[part["seed"].isin(set.intersection(*draws))]


def with_fewest(cases: pd.DataFrame, protocol: Protocol) -> pd.DataFrame:
    """What was trained for the length of a protocol with its fewest labels, see `with_bounds`; nothing of nothing."""
    return with_bounds(cases[cases["steps"] == protocol.steps], protocol.labeled[0]) if len(cases) else cases


def table(cases: pd.DataFrame) -> list[str]:
    """Markdown: every method, in every modality."""
    modalities = list(dict.fromkeys(cases["modality"]))
    scores = {weights: score(of_weights) for weights, of_weights in cases.groupby("weights", sort=False)}
    heads = ["method", "draws"]
    for modality in modalities:
        heads += [f"{modality} Dice, last step", f"{modality} Dice, EMA", f"{modality} HD95, EMA"]
        heads += [f"{modality} share, last step", f"{modality} share, EMA"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows = {
        weights: {(row["method"], row["modality"]): row for row in summarize(of).to_dict("records")}
        for weights, of in scores.items()
    }
    shares = {weights: shares_of(of) for weights, of in scores.items()}
    for method in dict.fromkeys(cases["method"]):
        cells = [method, ", ".join(map(str, sorted(set(cases.loc[cases["method"] == method, "seed"]))))]
        for modality in modalities:
            of = {weights: found.get((method, modality)) for weights, found in rows.items()}
            cells += [mean_text(of[weights], "dice", 3) for weights in WEIGHTS]
            cells += [mean_text(of["EMA"], "hd95", 1)]
            cells += [shares[weights].get((method, modality), "") for weights in WEIGHTS]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def mean_text(row: dict, metric: str, digits: int) -> str:
    """Of a row of `summarize`."""
    spread = f" ({row[f'{metric}_low']:.{digits}f} … {row[f'{metric}_high']:.{digits}f})" if row["seeds"] > 1 else ""
    return f"{row[metric]:.{digits}f}{spread}"


def share_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """Share of the gap of every method in every modality, on the draws that the method has."""
    parts = []
    for method in dict.fromkeys(scores["method"]):
        draws = set(scores.loc[scores["method"] == method, "seed"])
        part = scores[scores["seed"].isin(draws) & scores["method"].isin([method, LOWER, UPPER])]
        parts.append(share_of_gap(part, LOWER, UPPER).assign(draws=len(draws)))
    return pd.concat(parts)


def shares_of(scores: pd.DataFrame, mark: bool = False) -> dict[tuple[str, str], str]:
    """Method and modality -> share of the gap with its interval, where all labels surely gain anything; see MARKS."""
    return {
        (row["method"], row["modality"]): (
            f"{row['share']:.2f} ({row['low']:.2f} … {row['high']:.2f}){MARKS[row['draws']] if mark else ''}"
            if row["gap_low"] > 0
            else NO_GAP
        )
        for row in share_rows(scores).to_dict("records")
    }


def where_the_gap_is(cases: pd.DataFrame) -> str:
    """In how many cases half of what all labels gain is, EMA weights; nothing where they gain nothing."""
    scores = score(cases[cases["weights"] == "EMA"])
    texts = []
    for modality, of in scores.groupby("modality", sort=False):
        dice = of.pivot_table(index="case", columns="method", values="dice")
        gains = (dice[UPPER] - dice[LOWER]).sort_values(ascending=False).cumsum()
        if gains.iloc[-1] > 0:
            texts.append(f"{modality} {int((gains < gains.iloc[-1] / 2).sum()) + 1} of {len(gains)}")
    return f"Cases that have half of the gap: {', '.join(texts)}." if texts else ""


def differences(cases: pd.DataFrame, reference: str) -> list[str]:
    """Markdown: Dice of EMA weights, less that of the reference, on the draws that both have."""
    scores = score(cases[cases["weights"] == "EMA"])
    parts = []
    for method in dict.fromkeys(scores["method"]):
        both = scores[scores["method"].isin([method, reference])]
        draws = [set(both.loc[both["method"] == name, "seed"]) for name in (method, reference)]
        compared = compare(both[both["seed"].isin(set.intersection(*draws))], reference)
        parts.append(compared[compared["metric"] == "dice"])
    rows = pd.concat(parts)
    rows["p_holm"] = holm(rows["p"])
    modalities = list(dict.fromkeys(rows["modality"]))
    lines = [f"| − {reference} | {' | '.join(modalities)} |", "|---" * (len(modalities) + 1) + "|"]
    for method, of_method in rows.groupby("method", sort=False):
        texts = {
            row["modality"]: f"{signed(row, 'difference')} ({interval_text(row)}), p {p_text(row['p_holm'])}"
            for row in of_method.to_dict("records")
        }
        lines.append(f"| {method} | {' | '.join(texts.get(m, '') for m in modalities)} |")
    return lines


def about(name: str, protocol: Protocol, purpose: str) -> list[str]:
    """How the results of a purpose were made, and what they cost."""
    runs = rows_with(read_runs(), {"protocol": name, "purpose": purpose})
    hours = runs.loc[runs["device"] == CPU, "cpu_seconds"].sum() / 3600
    elsewhere = [
        f"On {device} instead, in float16: {', '.join(of['method'] + ' (draw ' + of['draw'].astype(str) + ')')}."
        for device, of in runs[runs["device"] != CPU].groupby("device", sort=False)
    ]
    folder = " --data FOLDER" if protocol.source else ""
    return [
        f"`python benchmarks/study/run.py {name} {purpose}{folder} --work SCRATCH`",
        "",
        f"{len(runs)} of {len(tasks_of(name, purpose))} trainings, {hours:.1f} core-hours of x86_64 CPUs without GPU; "
        f"draws, which are the seeds: {', '.join(map(str, sorted(set(runs['draw']))))}; "
        f"{' to '.join(sorted({runs['date'].min(), runs['date'].max()}))}; "
        f"commits {', '.join(dict.fromkeys(runs['commit'].astype(str)))}. {' '.join(elsewhere)}".rstrip(),
    ]


def write_protocol(name: str) -> None:
    """<protocol>.md."""
    protocol = PROTOCOLS[name]
    lines = [f"# {protocol.title}", ""]
    size = f"{protocol.steps} steps of {protocol.batch_size} labeled and as many unlabeled patches"
    lines += [f"{protocol.source or 'Synthetic patients'}; {size}; networks of {protocol.features} features.", ""]
    lines += [EXPLAINED]
    for purpose in ("test", "validation"):
        cases = results_of(name, purpose)
        if cases.empty:
            continue
        lines += ["", f"## {purpose.capitalize()} cases", "", *about(name, protocol, purpose)]
        if purpose == "validation":
            upper = cases[(cases["method"] == UPPER) & (cases["seed"] == protocol.draws[0])]
            steps = upper.groupby(["steps", "modality"])["dice"].mean().unstack().round(3)
            texts = [f"{n} steps {', '.join(f'{m} {d:.3f}' for m, d in row.items())}" for n, row in steps.iterrows()]
            lines += ["", f"Length: mean Dice of {UPPER}, both weights, first draw: {'; '.join(texts)}."]
        for labeled in protocol.labeled:
            part = with_bounds(cases[cases["steps"] == protocol.steps], labeled)
            if LOWER in set(part["method"]) and UPPER in set(part["method"]):
                lines += ["", f"### {labeled} labeled", "", *table(part), "", *differences(part, LOWER)]
                lines += ["", where_the_gap_is(part)]
                if purpose == "test" and labeled == protocol.labeled[0] and plot_shares(name, part):
                    lines += ["", f"![shares of the gap]({name}.png)"]
    (HERE / f"{name}.md").write_text("\n".join([*lines, ""]))


def plot_shares(name: str, cases: pd.DataFrame) -> bool:
    """<protocol>.png: share of the gap with its interval, EMA weights. Returns whether there is any to show."""
    rows = share_rows(score(cases[cases["weights"] == "EMA"]))
    rows = rows[rows["gap_low"] > 0]
    if rows.empty:
        return False
    modalities = list(dict.fromkeys(rows["modality"]))
    with style.context(["default", {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}]):
        figure = Figure(figsize=(4.5 * len(modalities), 1 + 0.3 * rows["method"].nunique()), layout="constrained")
        for axis, modality in zip(figure.subplots(1, len(modalities), squeeze=False)[0], modalities, strict=True):
            of = rows[rows["modality"] == modality].iloc[::-1]
            axis.errorbar(of["share"], of["method"], xerr=[of["share"] - of["low"], of["high"] - of["share"]], fmt="o")
            axis.set_xlim(*SHOWN)
            for row in of[of["share"] < SHOWN[0]].to_dict("records"):
                axis.text(SHOWN[0], row["method"], f" ← {row['share']:.2f}", va="bottom")
            for bound in (0, 1):
                axis.axvline(bound, color="gray", linewidth=1, linestyle=":")
            axis.set_title(f"{modality}: share of the gap")
        figure.savefig(HERE / f"{name}.png", dpi=110)
    return True


def write_overview() -> None:
    """README.md: shares of the gap of all protocols, EMA weights, with the fewest labels."""
    lines = [
        "# Study: what methods gain of what there is to gain",
        "",
        *EXPLAINED.split("\n"),
        "² and ³: of two and three draws.",
        "",
    ]
    for purpose in ("test", "validation"):
        lines += [*overview(purpose), ""]
    lines += second_runs()
    lines += [(HERE / "findings.md").read_text().rstrip(), ""]
    lines += ["Details: " + ", ".join(f"[{n}]({n}.md)" for n in PROTOCOLS if (HERE / f"{n}.md").is_file()) + "."]
    (HERE / "README.md").write_text("\n".join([*lines, ""]))


def overview(purpose: str) -> list[str]:
    """Markdown: the shares of all protocols, of methods and, on validation cases, of those variants that went on."""
    columns, methods = {}, []
    for name, protocol in PROTOCOLS.items():
        cases = results_of(name, purpose)
        part = with_fewest(cases, protocol)
        if part.empty:
            continue
        if purpose == "validation":
            part = part[part["method"].isin([LOWER, UPPER, *FINALISTS])]
        shares = shares_of(score(part[part["weights"] == "EMA"]), mark=True)
        for modality in dict.fromkeys(part["modality"]):
            title = f"{protocol.title}: {modality}"
            columns[title] = {method: text for (method, of), text in shares.items() if of == modality}
            methods += [method for method in columns[title] if method not in methods]
    lines = [f"## {purpose.capitalize()} cases", ""]
    if not columns:
        return [*lines, "Not run yet."]
    lines += [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {m} | {' | '.join(column.get(m, '') for column in columns.values())} |" for m in methods]


def second_runs() -> list[str]:
    """Markdown: how far apart two runs of the same training are, EMA weights; nothing if there are none."""
    first, again = (read_runs(prefix).set_index(KEYS)["device"] for prefix in ("", AGAIN))
    lines = []
    for key in again.index.intersection(first.index):
        name, purpose, draw, labeled, method, steps = key
        columns = {"seed": draw, "labeled": labeled, "method": method, "steps": steps, "weights": "EMA"}
        cases = [
            rows_with(results_of(name, purpose, prefix), columns).assign(method=run)
            for prefix, run in (("", "first"), (AGAIN, "again"))
        ]
        scores = score(pd.concat(cases))
        rows = compare(scores, "first")
        for row in rows[rows["metric"] == "dice"].to_dict("records"):
            of_modality = scores[scores["modality"] == row["modality"]].groupby("method")["dice"].mean()
            cells = [f"{PROTOCOLS[name].title}: {row['modality']}", f"{method}, draw {draw}, {purpose} cases"]
            cells += [f"{of_modality[run]:.3f} ({of[key]})" for run, of in (("first", first), ("again", again))]
            cells += [f"{signed(row, 'difference')} ({interval_text(row)})", p_text(row["p"])]
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    return ["## Run twice", "", *AGAIN_EXPLAINED.split("\n"), *lines, ""]


def write_first_page() -> None:
    """Of the README of the whole, the table: test cases, EMA weights, the fewest labels."""
    columns = []
    for name, modalities in SHOWN_FIRST.items():
        few = with_fewest(results_of(name, "test"), PROTOCOLS[name])
        rows = share_rows(score(few[few["weights"] == "EMA"])).to_dict("records") if len(few) else []
        for modality, head in modalities.items():
            columns.append((head, {row["method"]: gain_text(row) for row in rows if row["modality"] == modality}))
    lines = [f"| you have | `-tr` | {' | '.join(head for head, _ in columns)} |", "|---" * (len(columns) + 2) + "|"]
    for has, trainer, method in TRAINERS:
        lines.append(f"| {has} | {trainer} | {' | '.join(texts.get(method, '') for _, texts in columns)} |")
    page = PLACE.sub(lambda place: place["begin"] + "\n".join([*lines, place["end"]]), FIRST_PAGE.read_text())
    FIRST_PAGE.write_text(page)


def gain_text(row: dict) -> str:
    """Dice gained and, in brackets, the share of the gap, in bold if its interval is above nought; see `shares_of`."""
    if not row["gap_low"] > 0:
        return NO_GAP
    share = f"{row['share']:.2f}".replace("-", "−")
    gain = f"{row['share'] * row['gap']:+.3f}".replace("-", "−")
    return f"{gain} ({f'**{share}**' if row['low'] > 0 else share}){MARKS[row['draws']]}"


def main() -> None:
    """Write what there is."""
    for name in PROTOCOLS:
        if any(len(results_of(name, purpose)) for purpose in ("test", "validation")):
            write_protocol(name)
    write_overview()
    write_first_page()


if __name__ == "__main__":
    main()

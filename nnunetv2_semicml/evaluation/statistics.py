"""Statistics of a leaderboard: mean ± SD, and differences to a reference method. Tables in, tables out.

The patients are the units: whatever was repeated for a patient (seeds) is averaged first, so that training more often
does not look like having more patients. Every test case counts as a patient of its own.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import DegenerateDataWarning, bootstrap, wilcoxon

from nnunetv2_semicml.evaluation.metrics import METRICS, fill_undefined

ALL_CLASSES = "mean of classes"


def score(cases: pd.DataFrame) -> pd.DataFrame:
    """Make what enters means and tests out of what was measured.

    Args:
        cases: one row per method, modality, seed, case and class, with the columns of `compute_metrics`.

    Returns:
        The same rows with undefined values filled in (`fill_undefined`), and the columns missed and invented: whether
        only the prediction, or only the reference, is empty. If there are several classes, besides these rows the mean
        over the classes of every case.
    """
    filled = pd.DataFrame([fill_undefined(row) for row in cases.to_dict("records")], columns=cases.columns)
    filled["missed"] = ((filled["n_ref"] > 0) & (filled["n_pred"] == 0)).astype(float)
    filled["invented"] = ((filled["n_ref"] == 0) & (filled["n_pred"] > 0)).astype(float)
    if filled["class"].nunique() > 1:
        by = ["method", "modality", "seed", "case"]
        mean = filled.groupby(by, sort=False, dropna=False)[[*METRICS, "missed", "invented"]].mean().reset_index()
        filled = pd.concat([filled, mean.assign(**{"class": ALL_CLASSES})], ignore_index=True)
    return filled


def average_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean over the seeds: one row per method, modality, class and patient, in the order of first appearance."""
    by = ["method", "modality", "class", "case"]
    return scores.groupby(by, sort=False)[[*METRICS, "missed", "invented"]].mean().reset_index()


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Describe every method.

    Args:
        scores: what `score` returns.

    Returns:
        One row per modality, class and method: `cases` and `seeds`, their numbers; for every metric its mean and, as
        METRIC_sd, its standard deviation over the patients (NaN for a single one), and, as METRIC_low and METRIC_high,
        the lowest and highest mean of a seed; missed and invented, the numbers of cases, averaged over the seeds.
    """
    rows = []
    columns = ["modality", "class", "method"]
    for _, runs in scores.groupby(columns, sort=False):
        patients = runs.groupby("case")[[*METRICS, "missed", "invented"]].mean()
        of_seed = runs.groupby("seed", dropna=False)[list(METRICS)].mean()
        row = runs[columns].iloc[0].to_dict() | {"cases": len(patients), "seeds": len(of_seed)}
        for metric in METRICS:
            row |= {
                metric: patients[metric].mean(),
                f"{metric}_sd": patients[metric].std(ddof=1),
                f"{metric}_low": of_seed[metric].min(),
                f"{metric}_high": of_seed[metric].max(),
            }
        rows.append(row | {name: patients[name].sum() for name in ("missed", "invented")})
    return pd.DataFrame(rows)


def compare(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compare every method with the reference method on the same patients.

    Args:
        scores: what `score` returns; within a modality all methods have the same cases.
        reference: a method.

    Returns:
        One row per metric, modality, class and other method, for modalities that the reference has: the mean
        `difference` (method − reference) with its interval `low` … `high` (`interval`); `better` and `worse`, the
        numbers of patients; `p` (`wilcoxon_p`), and `p_holm`, corrected for all rows of the same metric.
    """
    patients = average_seeds(scores)
    rows = []
    for metric, definition in METRICS.items():
        table = patients.pivot(index=["modality", "class", "case"], columns="method", values=metric)
        for modality, of_class in dict.fromkeys(zip(patients["modality"], patients["class"], strict=True)):
            values = table.loc[(modality, of_class)].dropna(axis=1, how="all")
            if reference not in values:
                continue
            for method in dict.fromkeys(patients["method"]):
                if method == reference or method not in values:
                    continue
                difference = (values[method] - values[reference]).to_numpy()
                low, high = interval(difference)
                gain = difference if definition.higher_is_better else -difference
                rows.append(
                    {
                        "metric": metric,
                        "modality": modality,
                        "class": of_class,
                        "method": method,
                        "difference": difference.mean(),
                        "low": low,
                        "high": high,
                        "better": int((gain > 0).sum()),
                        "worse": int((gain < 0).sum()),
                        "p": wilcoxon_p(difference),
                    }
                )
    columns = ["metric", "modality", "class", "method", "difference", "low", "high", "better", "worse", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=table.groupby("metric")["p"].transform(holm))


_SHARE_COLUMNS = ["modality", "class", "method", "gap", "gap_low", "share", "low", "high"]


def share_of_gap(scores: pd.DataFrame, lower: str, upper: str, metric: str = "dice") -> pd.DataFrame:
    """Of what lies between two methods, the share that the others gain: (method − lower) / (upper − lower).

    Args:
        scores: what `score` returns; within a modality all methods have the same cases.
        lower: trained on the labeled share alone.
        upper: trained on all labels.
        metric: that is compared.

    Returns:
        One row per modality, class and other method, for modalities that both bounds have: `gap`, the difference of the
        bounds, `gap_low`, the lower end of its `interval`, `share`, and its 95 % bootstrap interval `low` … `high` over
        patients (percentiles: where the gap is small, a resampled one can be anything; NaN or infinite, if too many
        have none). Unless `gap_low` is above 0, a share says nothing.
    """
    patients = average_seeds(scores)
    table = patients.pivot(index=["modality", "class", "case"], columns="method", values=metric)
    rows = []
    for modality, of_class in dict.fromkeys(zip(patients["modality"], patients["class"], strict=True)):
        values = table.loc[(modality, of_class)].dropna(axis=1, how="all")
        for method in dict.fromkeys(patients["method"]):
            if method in (lower, upper) or not {method, lower, upper} <= set(values):
                continue
            samples = tuple(values[name].to_numpy() for name in (method, lower, upper))
            gap = float((samples[2] - samples[1]).mean())
            low, high = np.nan, np.nan
            if gap and len(values) > 1:
                options = {"paired": True, "method": "percentile", "rng": np.random.default_rng(0)}
                with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore", DegenerateDataWarning)  # where a resampled gap is none
                    low, high = bootstrap(samples, _share, **options).confidence_interval
            rows.append(
                {
                    "modality": modality,
                    "class": of_class,
                    "method": method,
                    "gap": gap,
                    "gap_low": interval(samples[2] - samples[1])[0],
                    "share": float(_share(*samples)) if gap else np.nan,
                    "low": float(low),
                    "high": float(high),
                }
            )
    return pd.DataFrame(rows, columns=_SHARE_COLUMNS)


def _share(method: np.ndarray, lower: np.ndarray, upper: np.ndarray, axis: int = -1) -> np.ndarray:
    share: np.ndarray = (method - lower).mean(axis) / (upper - lower).mean(axis)
    return share


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, bias-corrected and accelerated (BCa; Efron 1987), over patients.

    NaN for fewer than two values, since one says nothing about others. Equal values have the interval of that value.
    """
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) == 0:  # every resample has the same mean, for which BCa is not defined
        return float(values[0]), float(values[0])
    # a fixed seed: the same results, the same page
    low, high = bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    return float(low), float(high)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; patients without difference drop out, and 1 if none is left."""
    differences = differences[differences != 0]
    return float(wilcoxon(differences).pvalue) if len(differences) else 1.0


def holm(p: Sequence[float]) -> np.ndarray:
    """Correct p values for testing repeatedly (Holm, Scand. J. Stat. 6:65, 1979).

    The i-th smallest of n is multiplied by n − i + 1, is no smaller than the one before it, and at most 1.
    """
    values = np.asarray(p, dtype=float)
    order = values.argsort()
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1)
    return corrected

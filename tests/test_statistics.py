"""Statistics of a leaderboard: against SciPy, values computed by hand, and cases without spread."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, ttest_1samp

from nnunetv2_semicml.evaluation.metrics import METRICS
from nnunetv2_semicml.evaluation.statistics import (
    ALL_CLASSES,
    compare,
    holm,
    interval,
    score,
    share_of_gap,
    summarize,
    wilcoxon_p,
)

NAN = float("nan")


def rows(method, dice, seed=None, modality="FLAIR", class_name="tumor"):
    """Cases that differ in Dice; the other metrics follow from it in some way."""
    return [
        {
            "method": method,
            "modality": modality,
            "seed": seed,
            "case": f"case {i}",
            "class": class_name,
            "dice": value,
            "ppv": value,
            "sensitivity": value,
            "asd": 1 - value,
            "hd95": 10 * (1 - value),
            "n_ref": 100,
            "n_pred": 100,
            "diagonal": 50.0,
        }
        for i, value in enumerate(dice)
    ]


def table(*parts):
    return pd.DataFrame([row for part in parts for row in part])


def test_mean_and_standard_deviation_over_patients_whose_seeds_are_averaged():
    summary = summarize(score(table(rows("A", [0.2, 0.4, 0.9], seed=0), rows("A", [0.4, 0.4, 0.7], seed=1)))).iloc[0]
    assert summary["cases"] == 3
    assert summary["seeds"] == 2
    # patients 0.3, 0.4, 0.8: mean 0.5, squared deviations 0.04 + 0.01 + 0.09
    assert summary["dice"] == pytest.approx(0.5)
    assert summary["dice_sd"] == pytest.approx(0.07**0.5)
    assert (summary["dice_low"], summary["dice_high"]) == pytest.approx((0.5, 0.5))
    assert summary["hd95"] == pytest.approx(5)


def test_seeds_differ_in_their_means():
    summary = summarize(score(table(rows("A", [0.1, 0.3], seed=0), rows("A", [0.5, 0.9], seed=1)))).iloc[0]
    assert (summary["dice_low"], summary["dice_high"]) == pytest.approx((0.2, 0.7))


def test_undefined_values_count_for_the_best_or_the_worst():
    both, missed, invented = rows("A", [NAN, 0.0, 0.0])
    both |= {"n_ref": 0, "n_pred": 0} | dict.fromkeys(METRICS, NAN)
    missed |= {"n_pred": 0, "ppv": NAN, "asd": NAN, "hd95": NAN}
    invented |= {"n_ref": 0, "sensitivity": NAN, "asd": NAN, "hd95": NAN}
    scored = score(table([both, missed, invented]))
    assert scored[list(METRICS)].to_numpy().tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 50, 50], [0, 0, 0, 50, 50]]
    summary = summarize(scored).iloc[0]
    assert (summary["missed"], summary["invented"]) == (1, 1)
    assert summary["hd95"] == pytest.approx(100 / 3)


def test_classes_are_averaged_for_every_case():
    scored = score(table(rows("A", [0.2, 0.4]), rows("A", [0.6, 1.0], class_name="edema")))
    assert scored.query("`class` == @ALL_CLASSES")["dice"].tolist() == pytest.approx([0.4, 0.7])
    assert summarize(scored)["class"].tolist() == ["tumor", "edema", ALL_CLASSES]
    assert summarize(score(table(rows("A", [0.2]))))["class"].tolist() == ["tumor"]


def test_a_voxel_is_enough_to_be_missed_or_invented():
    missed, invented, found = rows("A", [0.0, 0.0, 1.0])
    missed |= {"n_ref": 1, "n_pred": 0}
    invented |= {"n_ref": 0, "n_pred": 1}
    scored = score(table([missed, invented, found]))
    assert scored["missed"].tolist() == [1, 0, 0]
    assert scored["invented"].tolist() == [0, 1, 0]


def test_no_cases_are_an_empty_table_with_its_columns():
    assert [*score(table(rows("A", [0.5])).iloc[:0])] == [*rows("A", [0.5])[0], "missed", "invented"]


def test_means_of_classes_keep_the_order_of_methods_and_cases():
    parts = [rows(method, [0.5, 0.6], class_name=name) for method in "BA" for name in ("tumor", "edema")]
    scored = score(table(*(part[::-1] for part in parts)))
    means = scored[scored["class"] == ALL_CLASSES]
    order = [("B", "case 1"), ("B", "case 0"), ("A", "case 1"), ("A", "case 0")]
    assert list(zip(means["method"], means["case"], strict=True)) == order
    summarized = summarize(scored)
    assert summarized[summarized["class"] == ALL_CLASSES]["method"].tolist() == ["B", "A"]


def test_a_tie_is_neither_better_nor_worse():
    compared = compare(score(table(rows("A", [0.5, 0.6, 0.7]), rows("B", [0.5, 0.7, 0.6]))), "A").set_index("metric")
    assert compared.loc["dice", ["better", "worse"]].tolist() == [1, 1]


def test_difference_is_paired_and_says_which_way_is_better():
    # A and B have their cases in another order: pairing is by name
    first, second = rows("A", [0.5, 0.6, 0.7]), rows("B", [0.6, 0.8, 0.65])
    compared = compare(score(table(first, second[::-1])), "A").set_index("metric")
    assert compared.loc["dice", "difference"] == pytest.approx(0.25 / 3)
    assert compared.loc["dice", ["better", "worse"]].tolist() == [2, 1]
    assert compared.loc["asd", "difference"] == pytest.approx(-0.25 / 3)
    assert compared.loc["asd", ["better", "worse"]].tolist() == [2, 1]  # smaller distances are better
    assert compared.loc["dice", "low"] < 0.25 / 3 < compared.loc["dice", "high"]


def test_only_modalities_of_the_reference_are_compared():
    scored = score(table(rows("A", [0.5, 0.6]), rows("B", [0.6, 0.8]), rows("C", [0.9, 0.9], modality="FLAIR + T1")))
    compared = compare(scored, "A")
    assert set(compared["method"]) == {"B"}
    assert set(compared["modality"]) == {"FLAIR"}


def test_a_modality_without_the_reference_may_come_first():
    others = rows("C", [0.9, 0.9], modality="FLAIR + T1")
    compared = compare(score(table(others, rows("A", [0.5, 0.6]), rows("B", [0.6, 0.8]))), "A")
    assert set(zip(compared["modality"], compared["method"], strict=True)) == {("FLAIR", "B")}


def test_a_reference_alone_has_no_comparison():
    assert compare(score(table(rows("A", [0.5, 0.6]))), "A").empty


def test_correction_spans_modalities_and_methods_of_a_metric():
    rng = np.random.default_rng(0)
    parts = []
    for modality in ("FLAIR", "T1"):
        parts.append(rows("A", rng.uniform(0.4, 0.6, 12), modality=modality))
        parts += [rows(name, rng.uniform(0.5, 0.7, 12), modality=modality) for name in "BC"]
    compared = compare(score(table(*parts)), "A")
    dice = compared[compared["metric"] == "dice"]
    assert len(dice) == 4
    assert dice["p_holm"].tolist() == pytest.approx(holm(dice["p"].tolist()).tolist())
    assert dice["p_holm"].min() == pytest.approx(4 * dice["p"].min())


def test_interval_is_near_that_of_student_for_normal_values():
    values = np.random.default_rng(1).normal(0.05, 0.1, 200)
    student = ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx(tuple(student), abs=0.002)
    assert interval(values) == interval(values)


def test_interval_without_spread():
    assert interval(np.zeros(5)) == (0, 0)
    assert interval(np.full(5, 0.25)) == (0.25, 0.25)
    assert all(np.isnan(interval(np.array([0.3]))))


def test_wilcoxon_by_hand():
    # all five of one sign: two of the 2^5 sign patterns are as extreme
    assert wilcoxon_p(np.array([0.1, 0.2, 0.3, 0.4, 1.0])) == pytest.approx(2 / 32)
    # ranks 1 + 2 against 3: 3 of 8 patterns have a sum of at most 3 … each way, capped at 1
    assert wilcoxon_p(np.array([0.1, 0.2, -0.3])) == pytest.approx(1)
    # zeros drop out
    assert wilcoxon_p(np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0])) == pytest.approx(2 / 32)
    assert wilcoxon_p(np.zeros(4)) == 1
    assert wilcoxon_p(np.array([0.3])) == 1


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06 (not below the one before it), 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([]).tolist() == []


def test_share_of_the_gap_between_two_methods():
    lower, upper, method = [0.2, 0.4, 0.6], [0.6, 0.8, 1.0], [0.5, 0.4, 0.9]
    scores = score(table(rows("few", lower), rows("all", upper), rows("A", method), rows("B", upper)))
    found = share_of_gap(scores, "few", "all").set_index("method")
    assert list(found.index) == ["A", "B"]
    assert found.loc["A", "gap"] == pytest.approx(0.4)
    assert found.loc["A", "share"] == pytest.approx(0.2 / 0.4)  # gains 0.3, 0 and 0.3
    # the gap is the same for all patients, so that a resample's share is its mean gain over it: 0, 0.75, or between
    assert found.loc["A", "low"] == pytest.approx(0)
    assert found.loc["A", "high"] == pytest.approx(0.75)
    assert found.loc["B", ["share", "low", "high"]].tolist() == [1, 1, 1]


def test_share_of_a_gap_of_one_patient_has_no_interval_and_of_no_gap_no_value():
    one = share_of_gap(score(table(rows("few", [0.2]), rows("all", [0.6]), rows("A", [0.3]))), "few", "all").iloc[0]
    assert one["share"] == pytest.approx(0.25)
    assert np.isnan([one["gap_low"], one["low"], one["high"]]).all()
    none = share_of_gap(score(table(rows("few", [0.2]), rows("all", [0.2]), rows("A", [0.3]))), "few", "all").iloc[0]
    assert np.isnan(none["share"])


def test_share_of_the_gap_is_of_modalities_that_have_both_bounds():
    scores = score(table(rows("few", [0.2]), rows("all", [0.6]), rows("A", [0.3]), rows("A", [0.3], modality="T1")))
    assert share_of_gap(scores, "few", "all")["modality"].tolist() == ["FLAIR"]


def test_share_of_the_gap_is_of_every_modality_and_class():
    levels = {  # few labels, all labels, method, share
        ("FLAIR", "tumor"): (0.2, 0.6, 0.3, 0.25),
        ("FLAIR", "edema"): (0.1, 0.2, 0.15, 0.5),
        ("T1", "tumor"): (0.0, 0.8, 0.6, 0.75),
        ("T1", "edema"): (0.5, 0.4, 0.6, -1.0),
    }
    scores = table(
        *(
            rows(method, [value, value + 0.1], modality=modality, class_name=name)
            for (modality, name), values in levels.items()
            for method, value in zip(("few", "all", "A"), values, strict=False)
        )
    )
    found = share_of_gap(score(scores), "few", "all")
    assert list(found.columns) == ["modality", "class", "method", "gap", "gap_low", "share", "low", "high"]
    found = found[found["class"] != ALL_CLASSES].set_index(["modality", "class"])
    assert list(found.index) == list(levels)
    for key, (lower, upper, _, share) in levels.items():
        # what is the same in all patients is the same in all resamples of two of them
        assert found.loc[key, ["gap", "gap_low"]].tolist() == pytest.approx([upper - lower] * 2)
        assert found.loc[key, ["share", "low", "high"]].tolist() == pytest.approx([share] * 3)


def test_share_of_the_gap_of_no_other_method_is_an_empty_table():
    found = share_of_gap(score(table(rows("few", [0.2, 0.3]), rows("all", [0.6, 0.7]))), "few", "all")
    assert found.empty
    assert list(found.columns) == ["modality", "class", "method", "gap", "gap_low", "share", "low", "high"]


def test_a_gap_that_may_be_nought_is_told_apart():
    """By the interval that scipy gives the gains of all labels."""
    few = np.linspace(0.3, 0.5, 12)
    for gain, sure in ((np.linspace(0.1, 0.3, 12), True), (np.linspace(0.24, -0.2, 12), False)):
        parts = [rows("few", few), rows("all", few + gain), rows("A", few + 0.1)]
        (low,) = share_of_gap(score(table(*parts)), "few", "all")["gap_low"]
        expected = bootstrap((gain,), np.mean, rng=np.random.default_rng(0)).confidence_interval.low
        assert low == pytest.approx(expected, abs=0.01)
        assert (low > 0) is sure


def test_interval_of_a_share_is_the_same_every_time():
    rng = np.random.default_rng(2)
    parts = [
        rows("few", rng.uniform(0.3, 0.5, 9)),
        rows("all", rng.uniform(0.6, 0.9, 9)),
        rows("A", rng.uniform(size=9)),
    ]
    first, second = (share_of_gap(score(table(*parts)), "few", "all") for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("gained", [0.0, 0.1])
def test_resamples_without_a_gap_are_no_warning(gained):
    # of 9999 resamples of two patients a quarter is twice the one whom more labels do not help
    scores = table(rows("few", [0.4, 0.4]), rows("all", [0.6, 0.4]), rows("A", [0.4, 0.4 + gained]))
    assert share_of_gap(score(scores), "few", "all").iloc[0]["share"] == pytest.approx(gained / 0.2)

"""What the tables of a leaderboard say beside their numbers, and metrics of unusual predictions.

Found by mutation (tests/README.md); the numbers themselves: test_statistics, test_metrics.
"""

import numpy as np
import pytest
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from test_metrics import LABELS, write
from test_statistics import rows, table

from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation.metrics import compute_metrics, evaluate_files
from nnunetv2_semicml.evaluation.statistics import ALL_CLASSES, compare, interval, score, summarize


def test_runs_without_a_seed_have_the_range_of_one_run():
    summary = summarize(score(table(rows("A", [0.2, 0.4]), rows("B", [0.5, 0.9])))).set_index("method")
    for method, mean in (("A", 0.3), ("B", 0.7)):
        of_method = summary.loc[method, ["seeds", "dice", "dice_low", "dice_high"]].tolist()
        assert of_method == pytest.approx([1, mean, mean, mean])


def test_every_row_of_a_comparison_says_what_it_is_of():
    parts = []
    for modality in ("FLAIR", "T1"):
        for class_name in ("tumor", "edema"):
            parts += [
                rows(method, dice, modality=modality, class_name=class_name)
                for method, dice in (("A", [0.5, 0.6]), ("B", [0.6, 0.9]))
            ]
    compared = compare(score(table(*parts)), "A")
    keys = compared[["metric", "modality", "class", "method"]]
    assert len(compared) == len(keys.drop_duplicates()) == 5 * 2 * 3
    assert set(keys["class"]) == {"tumor", "edema", ALL_CLASSES}
    assert set(keys["method"]) == {"B"}


def test_comparisons_are_in_the_order_in_which_things_appear():
    parts = []
    for modality in ("T2", "FLAIR"):
        for method in ("Reference", "Z", "A"):
            for class_name in ("tumor", "edema"):
                parts.append(rows(method, [0.5, 0.6], modality=modality, class_name=class_name))
    compared = compare(score(table(*parts)), "Reference")
    assert list(dict.fromkeys(compared["modality"])) == ["T2", "FLAIR"]
    assert list(dict.fromkeys(compared["method"])) == ["Z", "A"]
    assert list(dict.fromkeys(compared["class"])) == ["tumor", "edema", ALL_CLASSES]


def test_two_patients_have_an_interval():
    low, high = interval(np.array([0.1, 0.3]))
    assert 0.1 <= low < 0.2 < high <= 0.3


def test_rows_of_scores_are_numbered():
    """Means over classes come after them, and no two rows have one number."""
    scored = score(table(rows("A", [0.2, 0.4]), rows("A", [0.6, 1.0], class_name="edema")))
    assert scored.index.tolist() == list(range(6))


def test_interval_is_bias_corrected():
    """Of skewed values it is not symmetric about their mean: it reaches farther to where they do, and is wider there
    than that of percentiles.
    """
    values = np.random.default_rng(0).exponential(1.0, 20) ** 2
    low, high = interval(values)
    means = np.random.default_rng(1).choice(values, (20000, 20)).mean(1)
    simple = np.percentile(means, [2.5, 97.5])
    assert low > simple[0]
    assert high > 1.05 * simple[1]


def test_ignored_label_is_nothing_to_predict(tmp_path):
    """It may stand in a reference alone."""
    labels = np.zeros((6, 8, 8))
    labels[2:4, 2:5, 2:5] = 1
    ignored = labels.copy()
    ignored[5] = 3
    files = tmp_path / "reference.nii.gz", tmp_path / "prediction.nii.gz"
    write(files[0], ignored)
    write(files[1], labels)
    assert evaluate_files(*files, SimpleITKIO(), LABELS | {"ignore": 3})["tumor"]["dice"] == 1
    write(files[1], ignored)
    with pytest.raises(UserError, match=r"prediction.nii.gz: found the label values 3; expected only 0, 1, 2, as in"):
        evaluate_files(*files, SimpleITKIO(), LABELS | {"ignore": 3})


@pytest.mark.parametrize(("moved", "hits"), [(0, 8), (1, 4), (2, 0)])
def test_distances_are_measured_however_many_voxels_are_hit(moved, hits):
    """Also if as many are right as wrong."""
    reference = np.zeros((6, 8, 8), bool)
    reference[2:4, 2:4, 2:4] = True
    found = compute_metrics(reference, np.roll(reference, moved, 2), (1.0, 1.0, 1.5))
    assert (found["sensitivity"], found["n_ref"], found["n_pred"]) == (hits / 8, 8, 8)
    assert found["hd95"] == pytest.approx(1.5 * moved)


def test_diagonal_leaves_out_the_axis_of_a_single_slice():
    for shape, diagonal in (((1, 6, 4), (18**2 + 8**2) ** 0.5), ((2, 6, 4), (10**2 + 18**2 + 8**2) ** 0.5)):
        mask = np.zeros(shape, bool)
        assert compute_metrics(mask, mask, (5.0, 3.0, 2.0))["diagonal"] == pytest.approx(diagonal)

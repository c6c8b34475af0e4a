"""One partition for all modalities: nnU-Net's own where cases are complete, even where they are not."""

import json
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split
from toy import refusal

from nnunetv2_semicml.data.folds import (
    extend_folds,
    make_folds,
    read_folds,
    require_cases,
    require_modalities,
    restrict,
    same_folds,
)
from nnunetv2_semicml.errors import UserError

WHERE = Path("labelsTr")


def stock(cases):
    splits = generate_crossval_split(sorted(cases), seed=12345, n_splits=5)
    return [{part: [str(case) for case in members] for part, members in fold.items()} for fold in splits]


def names(number, prefix="c"):
    return [f"{prefix}{i:03d}" for i in range(number)]


def assert_partition(folds, cases):
    """Every case validates once, and trains in all other folds."""
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(cases)
    for fold in folds:
        assert sorted([*fold["train"], *fold["val"]]) == sorted(cases)


@pytest.mark.parametrize("number", [5, 6, 13, 50])
def test_folds_of_complete_cases_are_those_of_nnunet(number):
    cases = names(number)
    assert make_folds({"T1": cases, "T2": cases}, WHERE) == stock(cases)


def test_incomplete_cases_are_dealt_out_beside_those_of_nnunet():
    both, only = names(11, "both"), names(7, "only")
    folds = make_folds({"T1": both + only, "T2": both}, WHERE)
    assert_partition(folds, both + only)
    assert same_folds(restrict(folds, both), stock(both))
    numbers = [len(restrict(folds, both + only)[i]["val"]) for i in range(5)]
    assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("seed", range(60))
def test_every_modality_is_in_every_fold_whatever_cases_lack(seed):
    """Random patterns: 2 to 4 modalities, any share of each, and at least five cases that have all."""
    random = np.random.default_rng(seed)
    num_modalities = int(random.integers(2, 5))
    has = random.random((int(random.integers(6, 40)), num_modalities)) < random.uniform(0.2, 1, num_modalities)
    has[:5] = True
    cases_of = {f"m{i}": [f"c{case:02d}" for case in np.flatnonzero(has[:, i])] for i in range(num_modalities)}
    complete = [f"c{case:02d}" for case in np.flatnonzero(has.all(axis=1))]
    folds = make_folds(cases_of, WHERE)
    require_modalities(folds, cases_of, WHERE)
    assert same_folds(restrict(folds, complete), stock(complete))
    for cases in cases_of.values():
        assert_partition(restrict(folds, cases), cases)


def test_few_complete_cases_are_dealt_out_with_the_others():
    """Two of T1 and T2, four with each alone: nnU-Net could not split the two into five folds."""
    cases_of = {"T1": ["a", "b", *names(4, "t1_")], "T2": ["a", "b", *names(4, "t2_")]}
    folds = make_folds(cases_of, WHERE)
    require_modalities(folds, cases_of, WHERE)
    assert_partition(folds, {*cases_of["T1"], *cases_of["T2"]})


def test_cases_with_most_modalities_are_dealt_out_first():
    """Later ones could not make up for it: T1 would be in four of five folds."""
    both = names(4, "with_both")
    cases_of = {"T1": ["a", "b", *both], "T2": ["c", *both]}
    require_modalities(make_folds(cases_of, WHERE), cases_of, WHERE)


def test_modalities_are_spread_evenly_without_cases_that_have_all():
    """Random patterns, as above: per fold a modality has at most two cases more in one than in another."""
    for seed in range(100):
        random = np.random.default_rng(seed)
        has = random.random((int(random.integers(15, 40)), 3)) < random.uniform(0.4, 1, 3)
        has[has.all(axis=1), seed % 3] = False
        cases_of = {f"m{i}": [f"c{case:02d}" for case in np.flatnonzero(has[:, i])] for i in range(3)}
        if min(map(len, cases_of.values())) < 5:
            continue
        for cases in cases_of.values():
            numbers = [len(fold["val"]) for fold in restrict(make_folds(cases_of, WHERE), cases)]
            assert max(numbers) - min(numbers) <= 2


def test_new_case_validates_where_its_modality_is_lacking_however_many_others_are_there():
    folds = [{"train": ["b1", "b2"], "val": ["a1", "a2", "a3"]}, {"train": ["a1", "a2", "a3"], "val": ["b1", "b2"]}]
    cases_of = {"T1": ["a1", "a2", "a3", "b1", "new"], "T2": ["b2", "new"]}
    assert [fold["val"] for fold in extend_folds(folds, cases_of)] == [["a1", "a2", "a3", "new"], ["b1", "b2"]]


def test_new_cases_do_not_move_old_ones():
    both = names(10)
    before = make_folds({"T1": both, "T2": both}, WHERE)
    after = extend_folds(before, {"T1": [*both, "new0", "new1"], "T2": [*both, "new1"]})
    assert_partition(after, [*both, "new0", "new1"])
    assert same_folds(restrict(after, both), before)
    assert same_folds(extend_folds(after, {"T1": both, "T2": both}), after)


def test_a_modality_with_fewer_cases_than_folds_is_refused():
    with pytest.raises(
        UserError, match=r"labelsTr: found 4 labeled cases with T2; expected at least 5, .*splits_final"
    ):
        make_folds({"T1": names(9), "T2": names(4)}, WHERE)
    with pytest.raises(UserError, match="labelsTr: found 4 labeled cases; expected at least 5"):
        make_folds({"T1": names(4)}, WHERE)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "a damaged file"),
        ("{}", "an object"),
        ("[]", "no list of folds"),
        ("3", "no list of folds"),
        ("[1]", "no list of cases under 'train' in fold 0"),
        ('[{"train": ["a"], "val": "b"}]', "no list of cases under 'val' in fold 0"),
        ('[{"train": ["a"], "val": [1]}]', "no list of cases under 'val' in fold 0"),
        ('[{"train": ["a"]}]', "no list of cases under 'val' in fold 0"),
        ('[{"train": [], "val": ["b"]}]', "no case under 'train' in fold 0"),
        ('[{"train": ["a", "a"], "val": ["b"]}]', "a case twice under 'train' in fold 0"),
        (
            '[{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["b"]}]',
            "training cases among the validation cases of fold 1: b",
        ),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, found):
    file = tmp_path / "splits_final.json"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        read_folds(file)
    where, what, *rest = error.value.parts
    assert where == file
    assert what.startswith(found)
    assert rest == [
        'a JSON list with {"train": [cases], "val": [other cases]} for every fold',
        "Correct the file (nnU-Net's documentation/manual_data_splits.md), or delete it to have new folds made.",
    ]


def test_other_keys_are_left_out(tmp_path):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([{"train": ["a"], "val": ["b"], "comment": "by site"}]))
    assert read_folds(file) == [{"train": ["a"], "val": ["b"]}]


@pytest.mark.parametrize(
    ("cases", "found"),
    [
        (["a", "b", "c"], "folds that lack c"),
        (["a"], "folds that name b"),
        (["a", "c"], "folds that lack c and name b"),
    ],
)
def test_folds_of_other_cases_are_refused(cases, found):
    assert refusal(require_cases, [{"train": ["a"], "val": ["b"]}], cases, Path("f")) == (
        f"f: found {found}; expected the {len(cases)} labeled cases, by their names without channel and file ending. "
        "Correct the file, or delete it to have new folds made."
    )


def test_folds_without_a_modality_are_refused():
    folds = [{"train": ["a", "c"], "val": ["b"]}]
    for cases, kind in ((["a", "c"], "validation"), (["b"], "training")):
        assert refusal(require_modalities, folds, {"T1": ["a", "b", "c"], "T2": cases}, Path("f")) == (
            f"f: found no {kind} case with T2 in fold 0; expected some, for every modality. "
            "Write folds in which there is one."
        )

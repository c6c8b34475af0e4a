"""Folds of the labeled cases: one partition for all modalities of a group, in nnU-Net's splits_final.json.

The file of the multi-modal dataset is the source. That of a modality's dataset, which nnU-Net's own commands read, is
the same without the cases that lack the modality. May import nnU-Net and, of the package, `errors` and `files`.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_semicml.data.files import read_json
from nnunetv2_semicml.errors import UserError, some_of

SPLITS_FILE = "splits_final.json"
NUM_FOLDS = 5  # nnU-Net's default split

Folds = list[dict[str, list[str]]]


def read_folds(file: Path) -> Folds:
    """Read folds that somebody may have written by hand.

    Raises:
        UserError: the file is damaged or has another form, or a fold has no training or validation case, one of them
            twice, or one that is in both.
    """

    def refuse(found: str) -> UserError:
        return UserError(
            file,
            found,
            'a JSON list with {"train": [cases], "val": [other cases]} for every fold',
            "Correct the file (nnU-Net's documentation/manual_data_splits.md), or delete it to have new folds made.",
        )

    try:
        folds = read_json(file)
    except (OSError, ValueError) as error:
        raise refuse(f"a damaged file ({error})") from error
    if not isinstance(folds, list) or not folds:
        raise refuse("an object" if isinstance(folds, dict) else "no list of folds")
    for number, fold in enumerate(folds):
        for part in ("train", "val"):
            cases = fold.get(part) if isinstance(fold, dict) else None
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise refuse(f"no list of cases under {part!r} in fold {number}")
            if not cases or len({*cases}) < len(cases):
                raise refuse(f"{'a case twice' if cases else 'no case'} under {part!r} in fold {number}")
        if shared := sorted({*fold["train"]} & {*fold["val"]}):
            raise refuse(f"training cases among the validation cases of fold {number}: {some_of(shared)}")
    return [{part: fold[part] for part in ("train", "val")} for fold in folds]


def require_cases(folds: Folds, cases: Collection[str], file: Path) -> None:
    """Refuse folds that name other cases, or lack some.

    Raises:
        UserError: naming one of them.
    """
    found = {case for fold in folds for case in (*fold["train"], *fold["val"])}
    if found != {*cases}:
        kinds = {"lack": {*cases} - found, "name": found - {*cases}}
        examples = [f"{verb} {min(members)}" for verb, members in kinds.items() if members]
        raise UserError(
            file,
            f"folds that {' and '.join(examples)}",
            f"the {len(cases)} labeled cases, by their names without channel and file ending",
            "Correct the file, or delete it to have new folds made.",
        )


def make_folds(cases_of: Mapping[str, Collection[str]], where: Path) -> Folds:
    """nnU-Net's five folds; cases that lack a modality are dealt out so that every fold has about as many of each.

    Args:
        cases_of: modality -> its labeled cases.
        where: what to name in the error.

    Raises:
        UserError: a modality has fewer cases than there are folds.
    """
    for modality, cases in cases_of.items():
        if len(cases) < NUM_FOLDS:
            raise UserError(
                where,
                f"{len(cases)} labeled cases" + (f" with {modality}" if len(cases_of) > 1 else ""),
                f"at least {NUM_FOLDS}, for nnU-Net's {NUM_FOLDS}-fold cross-validation",
                f"Label more cases, or put folds of your own into {where.parent / SPLITS_FILE}.",
            )
    complete = sorted(set.intersection(*map(set, cases_of.values())))
    folds: Folds = [{"train": [], "val": []} for _ in range(NUM_FOLDS)]
    if len(complete) >= NUM_FOLDS:
        # nnU-Net's own call; its identifiers are NumPy strings
        splits = generate_crossval_split(complete, seed=12345, n_splits=NUM_FOLDS)
        folds = [{part: [str(case) for case in members] for part, members in fold.items()} for fold in splits]
    return extend_folds(folds, cases_of)


def extend_folds(folds: Folds, cases_of: Mapping[str, Collection[str]]) -> Folds:
    """Deal out the cases that are in no fold yet, each to one that lacks its modalities, or has the fewest of them.

    Args:
        folds: of other cases.
        cases_of: modality -> its labeled cases.
    """
    known = {case for fold in folds for case in (*fold["train"], *fold["val"])}
    new = {case for cases in cases_of.values() for case in cases} - known
    if not new:
        return folds
    folds = [{part: list(cases) for part, cases in fold.items()} for fold in folds]

    def fullness(case: str, fold: Mapping[str, list[str]]) -> tuple[int, int, int]:
        own = [sum(c in cases for c in fold["val"]) for cases in cases_of.values() if case in cases]
        return -own.count(0), sum(own), len(fold["val"])

    # those with most modalities first: they can not make up for an uneven beginning
    for case in sorted(new, key=lambda c: (-sum(c in cases for cases in cases_of.values()), c)):
        chosen = min(folds, key=partial(fullness, case))
        for fold in folds:
            fold["val" if fold is chosen else "train"].append(case)
    return [{part: sorted(cases) for part, cases in fold.items()} for fold in folds]


def restrict(folds: Folds, cases: Collection[str]) -> Folds:
    """The folds without all other cases."""
    return [{part: [c for c in members if c in cases] for part, members in fold.items()} for fold in folds]


def require_modalities(folds: Folds, cases_of: Mapping[str, Collection[str]], where: Path) -> None:
    """Refuse folds in which a modality has nothing to train on or to validate with.

    Raises:
        UserError: naming fold and modality.
    """
    for modality, cases in cases_of.items():
        for number, fold in enumerate(restrict(folds, cases)):
            if lacking := [part for part in ("train", "val") if not fold[part]]:
                kind = {"train": "training", "val": "validation"}[lacking[0]]
                raise UserError(
                    where,
                    f"no {kind} case with {modality} in fold {number}",
                    "some, for every modality",
                    "Write folds in which there is one.",
                )


def same_folds(first: Sequence[Mapping[str, Sequence[str]]], second: Sequence[Mapping[str, Sequence[str]]]) -> bool:
    """Whether folds have the same cases, in whatever order."""

    def as_sets(folds: Sequence[Mapping[str, Sequence[str]]]) -> list[dict[str, set[str]]]:
        return [{part: set(cases) for part, cases in fold.items()} for fold in folds]

    return as_sets(first) == as_sets(second)

"""Turns a fully labeled nnU-Net dataset into a semi-supervised one (docs/data.md): `nnUNetv2_semicml_withhold_labels`.

The labels of the unlabeled cases do not exist in the new dataset, so that no code can use them by mistake. On request,
neither do the images of some modality of some training cases. May import nnU-Net, `errors` and data/.
"""

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_semicml.data.files import (
    Json,
    folder_written_whole,
    link_file,
    require_sound_names,
    write_json,
)
from nnunetv2_semicml.data.folds import NUM_FOLDS, SPLITS_FILE, Folds, extend_folds
from nnunetv2_semicml.data.raw_dataset import (
    Cases,
    RawDataset,
    read_raw_dataset,
    require_free_id,
)
from nnunetv2_semicml.errors import UserError, some_of

_DROP = "--drop_modality"


def withhold_labels(
    dataset: int | str,
    output_id: int,
    output_name: str | None = None,
    *,
    labeled_fraction: float | None = None,
    num_labeled: int | None = None,
    labeled_cases: Sequence[Path] = (),
    test_fraction: float | None = None,
    test_cases: Path | None = None,
    groups: Path | None = None,
    stratify: Path | None = None,
    drop_modality: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Path:
    """Write a new raw dataset in which only some cases of a fully labeled one keep their label.

    The source's cases may lack modalities. They lack the same in the new dataset, and in the training set perhaps more.

    The draw depends on the seed and the names alone, and is nested: with the same seed, test set, groups and strata, a
    smaller labeled set is a subset of a larger one. withheld_labels.json in the new dataset records it. A test set that
    the source has (imagesTs and labelsTs) comes along; imagesTs without labelsTs stays behind.

    Every modality has an order of its own, from the seed, the numbers of its channels and the names. Of the labeled
    patients that have it the first round(fraction × their number) lose it, and likewise of the unlabeled ones: a
    smaller fraction is part of a larger one, and with another labeled share the choice differs in a few patients only.
    No case loses all images: modalities are drawn in the order given, and a patient with a case that has nothing else
    left is passed over for the next one, which keeps the number. The choice for a later modality thus depends on the
    fractions of the earlier ones.

    Args:
        dataset: the number or the whole name of the fully labeled dataset, which stays as it is.
        output_id: the new dataset; must be free in nnUNet_raw, nnUNet_preprocessed and nnUNet_results, for nnU-Net too,
            which takes 123 for Dataset1234_X.
        output_name: name of the new dataset without "DatasetXXX_"; default: that of the source.
        labeled_fraction: share of the patients outside the test set that keep their labels; 1 withholds none, which
            makes the fully labeled dataset to compare with. Either this or
        num_labeled: number of these patients, without `groups` of cases, or
        labeled_cases: files that name the cases that keep their labels: one a line, a JSON list, or what
            withheld_labels.json of another dataset ("labeled") or ranking.json ("label_next") have.
        test_fraction: share of all patients to move to the test set. Either this or
        test_cases: file that names the cases to move there, one a line or, if it ends in .json, as a list.
        groups: the patient of every case; all cases of a patient go the same way, also in the folds, which are then
            written to splits_final.json. A CSV file with the columns case and group, or a JSON file {case: group}.
        stratify: e.g. the hospital of every case, in the same form: test and labeled set hold each in proportion, and
            so do those who lose a modality.
        drop_modality: modality -> share of the patients with it, above 0 and below 1, whose training cases lose its
            images. A modality is a channel, by name or number, or several, joined by commas, that are whole files. The
            test set keeps all images.
        seed: another seed, another draw.

    Returns:
        The folder of the new dataset.

    Raises:
        UserError: the source is not a fully labeled dataset, the id is taken, an option or a file does not fit. Then
            nothing has been written.
    """
    if (labeled_fraction is not None) + (num_labeled is not None) + bool(labeled_cases) != 1:
        options = "--labeled_fraction, --num_labeled, --labeled_cases"
        raise UserError(options, "none or several", "one of them", "Give exactly one.")
    source = read_raw_dataset(dataset, require_unlabeled=False)
    if source.unlabeled:
        raise UserError(
            source.folder / "imagesUn", "unlabeled cases", "a fully labeled dataset", "Choose another source dataset."
        )
    require_free_id(output_id, "--output_id")
    output_name = output_name or source.name.partition("_")[2]
    if not re.fullmatch(r"[\w.-]+", output_name):
        raise UserError("--output_name", repr(output_name), "letters, digits, _, - and . only", "Choose another name.")
    folder = source.folder.parent / f"Dataset{output_id:03d}_{output_name}"
    require_sound_names([folder.name], "--output_name")

    patient_of = _read_table(groups, source.labeled) if groups else {case: case for case in source.labeled}
    stratum_of = _read_strata(stratify, patient_of) if stratify else dict.fromkeys(patient_of.values(), "")
    own_test_set = _read_own_test_set(source)
    if (test_fraction is not None) + (test_cases is not None) + bool(own_test_set) > 1:
        raise UserError(
            "--test_fraction, --test_cases",
            "both" if not own_test_set else f"one of them beside {source.folder / 'labelsTs'}",
            "one test set",
            "Leave them out to keep the source's own test set, or give exactly one.",
        )
    test: Collection[str] = []
    if test_cases is not None:
        test = _read_patients(test_cases, patient_of)
    elif test_fraction is not None:
        test = draw_order(stratum_of, seed)[: _number_of_share("--test_fraction", test_fraction, len(stratum_of))]
    order = draw_order({patient: stratum for patient, stratum in stratum_of.items() if patient not in test}, seed)
    n = len(order)
    if num_labeled is not None:
        n = _require_share("--num_labeled", num_labeled, len(order))
    elif labeled_fraction is not None and labeled_fraction != 1:
        n = _number_of_share("--labeled_fraction", labeled_fraction, len(order))
    if labeled_cases:
        named = set[str]().union(*(_read_patients(file, patient_of) for file in labeled_cases))
        if tested := sorted(named & {*test}):
            raise UserError("--labeled_cases", f"{some_of(tested)} of the test set", "training cases", "Leave it out.")
        order, n = sorted(order, key=lambda patient: patient not in named), len(named)
    shares = {
        name: {case: files for case, files in source.labeled.items() if patient_of[case] in patients}
        for name, patients in (("labeled", order[:n]), ("unlabeled", order[n:]), ("test", test))
    }
    shares["test"] |= own_test_set
    drop_modality = drop_modality or {}
    dropped, kept = _drop_modalities(source, shares, drop_modality, patient_of, stratum_of, seed)
    record = {
        "source": source.name,
        "seed": seed,
        "options": {
            "labeled_fraction": labeled_fraction,
            "num_labeled": num_labeled,
            "labeled_cases": [str(file) for file in labeled_cases],
            "test_fraction": test_fraction,
            "test_cases": test_cases and str(test_cases),
            "groups": groups and str(groups),
            "stratify": stratify and str(stratify),
            "drop_modality": dict(drop_modality),
        },
        **{name: sorted(cases) for name, cases in shares.items()},
        "dropped": dropped,
    }
    folds = _patient_folds({case: kept[case] for case in shares["labeled"]}, patient_of) if groups else None
    _write(folder, source, shares, kept, record, folds)
    return folder


def draw_order(stratum_of: dict[str, str], seed: int | str) -> list[str]:
    """A random order of patients of which every beginning holds each stratum in proportion.

    Each patient has a random place within the stratum, and the strata are interleaved evenly. The first n patients are
    therefore a stratified draw that is nested over n; rounding n for each stratum would not be.

    Args:
        stratum_of: patient -> stratum, in any order.
        seed: another seed, another order.
    """
    # Hashes instead of a random number generator: neither a library's version nor the other patients of a stratum
    # change who comes before whom.
    shuffled = sorted(stratum_of, key=lambda patient: hashlib.sha256(f"{seed} {patient}".encode()).digest())
    strata: dict[str, list[str]] = defaultdict(list)
    for patient in shuffled:
        strata[stratum_of[patient]].append(patient)
    place = {patient: (i + 0.5) / len(members) for members in strata.values() for i, patient in enumerate(members)}
    return sorted(shuffled, key=place.__getitem__)


def _number_of_share(option: str, fraction: float, total: int) -> int:
    if not 0 < fraction < 1:
        raise UserError(option, str(fraction), "a number above 0 and below 1", "Give a fraction, e.g. 0.1.")
    return _require_share(option, round(fraction * total), total)


def _require_share(option: str, number: int, total: int) -> int:
    if not 0 < number < total:
        raise UserError(
            option,
            f"{number} of {total} patients",
            "at least one patient in this share and one left",
            "Change the share.",
        )
    return number


def _read_own_test_set(source: RawDataset) -> Cases:
    """The source's test cases with their labels, if it has a folder labelsTs."""
    labels = source.folder / "labelsTs"
    cases: Cases = {
        case: {"images": files["images"], "label": str(labels / f"{case}{source.file_ending}")}
        for case, files in source.test.items()
        if labels.is_dir()
    }
    for case, files in cases.items():
        if not Path(files["label"]).is_file():
            raise UserError(
                files["label"], "no such file", f"the label of test case {case}", "Add it, or remove labelsTs."
            )
    return cases


def _read(file: Path) -> str | Json | list[Any]:
    """A text, or the content of a .json file."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets begin UTF-8 files with a byte order mark
        return json.loads(text) if file.suffix == ".json" else text
    except (OSError, ValueError) as error:
        raise UserError(
            file, f"an unreadable file ({error})", "UTF-8 text or JSON", "Correct the path or file."
        ) from error


def _read_table(file: Path, cases: Collection[str]) -> dict[str, str]:
    """case -> group for all `cases`; the file may have more."""
    expected = "a CSV file with the columns case and group, or a JSON file {case: group}"
    content = _read(file)
    if isinstance(content, str):
        rows = csv.DictReader(content.splitlines())
        try:
            if not {"case", "group"} <= set(rows.fieldnames or ()):
                raise UserError(file, f"the columns {rows.fieldnames}", expected, "Name the columns so.")
            pairs = [(row["case"], row["group"]) for row in rows]
        except csv.Error as error:
            raise UserError(file, f"a damaged table ({error})", expected, "Correct it.") from error
    elif isinstance(content, dict):
        pairs = [(case, None if group is None else str(group)) for case, group in content.items()]
    else:
        raise UserError(file, "a JSON list", expected, "Write an object.")

    table: dict[str, str | None] = {}
    for case, group in pairs:
        if table.setdefault(case, group) != group:
            raise UserError(file, f"{case} in two groups", "every case once", "Remove one of its lines.")
    group_of = {case: group for case in cases if (group := table.get(case))}
    if missing := [case for case in cases if case not in group_of]:
        raise UserError(file, f"no group for {some_of(missing)}", "a group for every labeled case", "Add them.")
    return group_of


def _read_strata(file: Path, patient_of: dict[str, str]) -> dict[str, str]:
    """Patient -> stratum."""
    stratum_of: dict[str, str] = {}
    for case, stratum in _read_table(file, patient_of).items():
        if stratum_of.setdefault(patient_of[case], stratum) != stratum:
            raise UserError(
                file, f"patient {patient_of[case]} in two strata", "one stratum per patient", "Correct the file."
            )
    return stratum_of


def _read_patients(file: Path, patient_of: dict[str, str]) -> set[str]:
    """The patients whose cases a file lists, all of them."""
    content = _read(file)
    if isinstance(content, dict):  # withheld_labels.json or ranking.json
        named: list[Any] = content.get("label_next") or content.get("labeled") or []
        content = named
    listed = set(map(str, content) if isinstance(content, list) else map(str.strip, str(content).splitlines())) - {""}
    if not listed or (unknown := listed - patient_of.keys()):
        raise UserError(
            file,
            f"cases that the source does not have: {some_of(sorted(unknown))}" if listed else "no case",
            "labeled cases of the source, one a line or as a JSON list",
            "Correct the names (no channel, no file ending).",
        )
    patients = {patient_of[case] for case in listed}
    if left := [case for case, patient in patient_of.items() if patient in patients and case not in listed]:
        raise UserError(
            file,
            f"some but not all cases of a patient; left out: {some_of(left)}",
            "all cases of a patient or none",
            "Add the cases that are left out, or correct the file of --groups.",
        )
    return patients


def _read_drops(source: RawDataset, drop_modality: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
    """Modality -> its channels, which are whole files."""
    names = source.channel_names
    channels_of: dict[str, tuple[int, ...]] = {}
    for modality, fraction in drop_modality.items():
        parts = [modality] if modality in names else modality.split(",")
        channels = [source.find_channel(part, _DROP) for part in parts]
        known = [c for others in channels_of.values() for c in others]
        if twice := [c for i, c in enumerate(channels) if c in known + channels[:i]]:
            raise UserError(_DROP, f"{names[twice[0]]} twice", "every channel once", "Remove one.")
        if not source.files_of_channels(sorted(channels)):
            layout = "; ".join(", ".join(names[c] for c in held) for held in source.channels_of_files)
            raise UserError(
                _DROP, modality, f"whole files, of which a case has {layout}", "Name all channels of a file."
            )
        if not 0 < fraction < 1:
            raise UserError(
                _DROP, f"{modality}={fraction}", "a number above 0 and below 1", "Give a fraction, e.g. 0.3."
            )
        channels_of[modality] = tuple(sorted(channels))
    return channels_of


def _choose_losing(option: str, share: str, fraction: float, order: Sequence[str], bare: Collection[str]) -> list[str]:
    """The first patients of an order, without those who would have no image left."""
    able = [patient for patient in order if patient not in bare]
    number = round(fraction * len(order))
    if number and number > min(len(able), len(order) - 1):
        raise UserError(
            _DROP,
            f"{option}, which is {number} of {len(order)} {share} patients, {len(able)} of whom have other images",
            "some who keep the modality, and other images of all who lose it",
            "Choose a smaller fraction.",
        )
    return able[:number]


def _drop_modalities(
    source: RawDataset,
    shares: Mapping[str, Cases],
    drop_modality: Mapping[str, float],
    patient_of: dict[str, str],
    stratum_of: dict[str, str],
    seed: int,
) -> tuple[dict[str, list[str]], dict[str, set[int]]]:
    """Draw who loses a modality, as `withhold_labels` describes.

    Returns:
        Modality -> the cases that lose it, and case of any share -> the files that it keeps, as indices.
    """
    kept = {
        case: {i for i, image in enumerate(files["images"]) if image}
        for cases in shares.values()
        for case, files in cases.items()
    }
    dropped: dict[str, list[str]] = {}
    for modality, channels in _read_drops(source, drop_modality).items():
        files, fraction = set(source.files_of_channels(channels)), drop_modality[modality]
        losing: set[str] = set()
        own_seed = f"{seed} without {','.join(map(str, channels))}"  # by number, since channels may share a name
        for share in ("labeled", "unlabeled"):
            patients = {patient_of[case] for case in shares[share] if kept[case] & files}
            order = draw_order({patient: stratum_of[patient] for patient in patients}, own_seed)
            bare = {patient_of[case] for case in shares[share] if kept[case] <= files}
            losing |= {*_choose_losing(f"{modality}={fraction}", share, fraction, order, bare)}
        if not losing:
            raise UserError(
                _DROP,
                f"{modality}={fraction}, which comes to no patient at all",
                "one at least in the labeled or the unlabeled share",
                "Choose a larger fraction, or leave it out.",
            )
        dropped[modality] = sorted(
            case
            for share in ("labeled", "unlabeled")
            for case in shares[share]
            if patient_of[case] in losing and kept[case] & files
        )
        for case in dropped[modality]:
            kept[case] -= files
    if dropped and not any(len(kept[case]) == len(source.channels_of_files) for case in shares["labeled"]):
        raise UserError(
            _DROP,
            "that no labeled case keeps the images of all channels",
            "one at least, since planning needs it",
            "Choose smaller fractions, more labeled cases or another seed.",
        )
    return dropped, kept


def _patient_folds(kept: dict[str, set[int]], patient_of: dict[str, str]) -> Folds | None:
    """nnU-Net's folds drawn over patients, so that none is in training and validation at once; None for one patient.

    Patients who lack a file are dealt out so that every fold has about as many of each.

    Args:
        kept: labeled case -> its files.
        patient_of: case -> patient.
    """
    having: dict[str, set[str]] = defaultdict(set)  # file -> patients
    for case, files in kept.items():
        for i in files:
            having[f"file {i}"].add(patient_of[case])
    if len({patient_of[case] for case in kept}) < 2:
        return None
    number = max(2, min(NUM_FOLDS, *map(len, having.values())))
    complete = sorted(set.intersection(*having.values()))
    folds: Folds = [{"train": [], "val": []} for _ in range(number)]
    if len(complete) >= number:
        folds = generate_crossval_split(complete, n_splits=number)
    return [
        {part: sorted(case for case in kept if patient_of[case] in members) for part, members in fold.items()}
        for fold in extend_folds(folds, having)
    ]


def _write(
    folder: Path,
    source: RawDataset,
    shares: Mapping[str, Cases],
    kept: dict[str, set[int]],
    record: Json,
    folds: Folds | None,
) -> None:
    dataset_json = {key: value for key, value in source.dataset_json.items() if key != "dataset"}
    dataset_json["numTraining"] = len(shares["labeled"])
    with folder_written_whole(folder) as new:
        _link_cases(source, shares["labeled"], kept, new / "imagesTr", new / "labelsTr")
        if shares["unlabeled"]:
            _link_cases(source, shares["unlabeled"], kept, new / "imagesUn", None)
        if shares["test"]:
            _link_cases(source, shares["test"], kept, new / "imagesTs", new / "labelsTs")
        contents: dict[str, Json | Folds] = {"dataset.json": dataset_json, "withheld_labels.json": record}
        if folds:
            contents[SPLITS_FILE] = folds  # planning takes it from here
        for name, content in contents.items():
            write_json(new / name, content)


def _link_cases(source: RawDataset, cases: Cases, kept: dict[str, set[int]], images: Path, labels: Path | None) -> None:
    """Put the files that cases keep into folders of nnU-Net's layout, without labels if `labels` is None."""
    images.mkdir(parents=True)
    if labels:
        labels.mkdir()
    for case, files in cases.items():
        # CASE.json lies beside the case's first image, which may be one that it does not keep
        present = [i for i, image in enumerate(files["images"]) if image]
        read = source.read_files({"images": files["images"]}, present)
        for i, image in zip(present, read, strict=False):
            if i in kept[case]:
                link_file(image, images / f"{case}_{i:04d}{source.file_ending}")
        for sidecar in read[len(present) :]:
            link_file(sidecar, images / f"{case}.json")
        if labels:
            link_file(files["label"], labels / f"{case}{source.file_ending}")
            sidecar = f"{files['label'].removesuffix(source.file_ending)}.json"
            if sidecar in source.read_files(files, present):
                link_file(sidecar, labels / f"{case}.json")

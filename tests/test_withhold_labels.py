"""Withholding labels and modalities: the draws are seeded, nested, stratified and by patient.

A refusal leaves nothing behind.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from skimage.io import imsave

from nnunetv2_semicml.command_line import run_withhold_labels
from nnunetv2_semicml.data.image_check import check_images
from nnunetv2_semicml.data.raw_dataset import read_raw_dataset
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.planning.withhold_labels import draw_order, withhold_labels

CASES = [f"P{patient}_{scan}" for patient in range(6) for scan in "xy"]  # 6 patients, 2 scans each
PATIENTS = {case: case[:2] for case in CASES}

# The cases in the order of e.g. printf '0 without 1 P0_x' | sha256sum
ORDERS = {
    text: cases.split()
    for text, cases in (
        ("0", "P5_y P0_x P0_y P3_x P3_y P1_x P4_x P2_x P1_y P4_y P2_y P5_x"),
        ("0 without 0", "P1_x P0_y P5_y P2_y P5_x P4_x P3_y P3_x P1_y P0_x P2_x P4_y"),
        ("0 without 1", "P4_x P4_y P0_y P3_y P3_x P0_x P1_x P2_x P5_x P5_y P1_y P2_y"),
        ("0 without 0,1,2", "P4_x P2_y P0_y P4_y P0_x P1_y P2_x P3_y P3_x P5_x P1_x P5_y"),
        ("0 without 3", "P0_y P4_y P3_y P0_x P3_x P2_y P2_x P4_x P1_x P5_x P1_y P5_y"),
        ("3 without 0", "P1_y P5_x P2_x P3_x P1_x P2_y P3_y P5_y P0_y P0_x P4_y P4_x"),
    )
}
LABELED_FIRST, WITHOUT_CT, WITHOUT_PET = (ORDERS[text] for text in ("0", "0 without 0", "0 without 1"))


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnUNet_raw with the fully labeled Dataset500_Toy."""
    for variable in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    source = tmp_path / "raw" / "Dataset500_Toy"
    for i, case in enumerate(CASES):
        for channel in range(2):
            write(
                source / "imagesTr" / f"{case}_000{channel}.nii.gz",
                np.random.default_rng([i, channel]).normal(size=(2, 3, 4)),
            )
        write(source / "labelsTr" / f"{case}.nii.gz", np.ones((2, 3, 4), np.uint8))
    content = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
        "licence": "none",
    }
    (source / "dataset.json").write_text(json.dumps(content))
    return tmp_path / "raw"


def write(file: Path, voxels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(file))


def write_json(file: Path, content) -> Path:
    file.write_text(json.dumps(content))
    return file


def record_of(folder: Path) -> dict:
    return json.loads((folder / "withheld_labels.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def image_names(cases: list[str]) -> list[str]:
    return [f"{case}_000{channel}.nii.gz" for case in cases for channel in range(2)]


def test_writes_the_semi_supervised_layout(raw: Path):
    folder = withhold_labels(500, 7, num_labeled=3, test_fraction=0.25)
    record = record_of(folder)
    assert folder == raw / "Dataset007_Toy"
    assert [len(record[share]) for share in ("labeled", "unlabeled", "test")] == [3, 6, 3]
    assert sorted(record["labeled"] + record["unlabeled"] + record["test"]) == CASES
    assert record["source"] == "Dataset500_Toy"
    assert record["options"]["test_fraction"] == 0.25

    for share, images in (("labeled", "imagesTr"), ("unlabeled", "imagesUn"), ("test", "imagesTs")):
        assert names(folder / images) == image_names(record[share])
    assert names(folder / "labelsTr") == [f"{case}.nii.gz" for case in record["labeled"]]
    assert names(folder / "labelsTs") == [f"{case}.nii.gz" for case in record["test"]]
    assert not [file for case in record["unlabeled"] for file in folder.rglob(f"{case}.*")]  # no label anywhere
    assert names(raw) == ["Dataset007_Toy", "Dataset500_Toy"]

    source = json.loads((raw / "Dataset500_Toy" / "dataset.json").read_text())
    assert json.loads((folder / "dataset.json").read_text()) == source | {"numTraining": 3}
    assert record["dropped"] == {}
    check_images(read_raw_dataset(7), 1, show_progress=False)


def test_links_and_copies_where_links_are_impossible(raw: Path, monkeypatch: pytest.MonkeyPatch):
    linked = withhold_labels(500, 501, num_labeled=3)

    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    copied = withhold_labels(500, 502, num_labeled=3)
    for name in image_names(record_of(linked)["unlabeled"]):
        original = raw / "Dataset500_Toy" / "imagesTr" / name
        assert (linked / "imagesUn" / name).samefile(original)
        assert not (copied / "imagesUn" / name).samefile(original)
        assert (copied / "imagesUn" / name).read_bytes() == original.read_bytes()


def test_a_link_in_the_source_becomes_a_file(raw: Path):
    case = record_of(withhold_labels(500, 501, num_labeled=3))["unlabeled"][0]
    image = raw / "Dataset500_Toy" / "imagesTr" / f"{case}_0000.nii.gz"
    image.rename(raw / "elsewhere.nii.gz")
    image.symlink_to("../../elsewhere.nii.gz")
    target = withhold_labels(500, 502, num_labeled=3) / "imagesUn" / image.name
    assert target.is_file()
    assert not target.is_symlink()


def test_cases_listed_in_dataset_json_get_nnunets_names(raw: Path):
    source = raw / "Dataset500_Toy"
    content = json.loads((source / "dataset.json").read_text())
    content["dataset"] = {
        f"new_{case}": {"images": [f"scans/{name}" for name in image_names([case])], "label": f"labelsTr/{case}.nii.gz"}
        for case in CASES
    }
    write_json(source / "dataset.json", content)
    (source / "imagesTr").rename(source / "scans")
    folder = withhold_labels(500, 501, num_labeled=3)
    assert "dataset" not in json.loads((folder / "dataset.json").read_text())
    assert names(folder / "imagesTr") == image_names(record_of(folder)["labeled"])
    assert read_raw_dataset(501).labeled.keys() == set(record_of(folder)["labeled"])


def test_cases_that_lack_files_lack_them_in_the_new_dataset(raw: Path):
    source = raw / "Dataset500_Toy"
    write_test_set(raw)
    gone = ["P5_y_0000.nii.gz", "P2_y_0001.nii.gz"]  # of a labeled and of an unlabeled case
    for name in gone:
        (source / "imagesTr" / name).unlink()
    (source / "imagesTs" / "T_0000.nii.gz").unlink()
    folder = withhold_labels(500, 501, num_labeled=3)
    assert record_of(folder)["labeled"] == sorted(LABELED_FIRST[:3])
    assert names(folder / "imagesTr") + names(folder / "imagesUn") == [
        name
        for share in (LABELED_FIRST[:3], LABELED_FIRST[3:])
        for name in image_names(sorted(share))
        if name not in gone
    ]
    assert names(folder / "imagesTs") == ["T_0001.nii.gz"]
    assert read_raw_dataset(501).labeled["P5_y"]["images"][0] is None


@pytest.mark.parametrize("source", [500, 1234, "Dataset500_Toy", "Dataset1234_Large"])
def test_ids_of_the_source_are_exact(raw: Path, source):
    shutil.copytree(raw / "Dataset500_Toy", raw / "Dataset1234_Large")
    (raw / "Dataset5001_Confusable").mkdir()  # for nnU-Net another dataset with the id 500
    folder = withhold_labels(source, 6000, num_labeled=3)
    assert folder == raw / ("Dataset6000_Toy" if "500" in str(source) else "Dataset6000_Large")
    assert len(read_raw_dataset(6000).unlabeled) == 9


def test_the_spacing_of_tiffs_comes_along(raw: Path):
    source = raw / "Dataset500_Toy"
    (source / "imagesTr" / "P3_x_0000.nii.gz").unlink()
    for file in [*source.rglob("*.nii.gz")]:  # what is in them does not matter here
        file.rename(file.with_name(file.name.replace(".nii.gz", ".tif")))
    for case in CASES:
        write_json(source / "imagesTr" / f"{case}.json", {"spacing": [1, 2, 3]})
        write_json(source / "labelsTr" / f"{case}.json", {"spacing": [1, 2, 3]})
    write_json(source / "dataset.json", json.loads((source / "dataset.json").read_text()) | {"file_ending": ".tif"})
    folder = withhold_labels(500, 501, num_labeled=3, drop_modality={"CT": 0.5})
    record = record_of(folder)
    for share, subfolder in (("labeled", "imagesTr"), ("labeled", "labelsTr"), ("unlabeled", "imagesUn")):
        assert [name for name in names(folder / subfolder) if name.endswith(".json")] == [
            f"{case}.json" for case in record[share]
        ]
    (source / "imagesTr" / "P0_x.json").unlink()  # each by itself
    (source / "labelsTr" / "P0_y.json").unlink()
    folder = withhold_labels(500, 502, labeled_fraction=1)
    assert [c for c in CASES if f"{c}.json" not in names(folder / "imagesTr")] == ["P0_x"]
    assert [c for c in CASES if f"{c}.json" not in names(folder / "labelsTr")] == ["P0_y"]


def test_the_spacing_beside_an_image_that_is_dropped_comes_along(raw: Path):
    source = raw / "Dataset500_Toy"
    content = json.loads((source / "dataset.json").read_text()) | {"file_ending": ".tif"}
    content["dataset"] = {
        case: {"images": [f"CT/{case}_0000.tif", f"PET/{case}_0001.tif"], "label": f"labels/{case}.tif"}
        for case in CASES
    }
    write_json(source / "dataset.json", content)
    for folder in ("CT", "PET", "labels"):
        (source / folder).mkdir()
    for case, files in content["dataset"].items():
        for file in (*files["images"], files["label"]):
            (source / file).touch()  # what is in them does not matter here
        write_json(source / "CT" / f"{case}.json", {"spacing": [1, 2, 3]})
    folder = withhold_labels(500, 501, num_labeled=4, drop_modality={"CT": 0.5})
    (case, *_) = record_of(folder)["dropped"]["CT"]
    assert [name for name in names(folder / "imagesTr") if name.startswith(case)] == [
        f"{case}.json",
        f"{case}_0001.tif",
    ]


def test_same_seed_same_choice_and_another_seed_another_one(raw: Path):
    records = [
        record_of(withhold_labels(500, 501 + i, num_labeled=4, test_fraction=0.25, seed=seed))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert records[0] == records[1]
    assert records[0]["labeled"] != records[2]["labeled"]


def test_a_smaller_labeled_set_is_part_of_a_larger_one(raw: Path, tmp_path: Path):
    sites = write_json(tmp_path / "sites.json", {case: "AAAAAABBBBCC"[i] for i, case in enumerate(CASES)})
    labeled: list[str] = []
    for n in range(1, 9):
        record = record_of(withhold_labels(500, 500 + n, num_labeled=n, test_fraction=0.25, stratify=sites))
        assert set(labeled) < set(record["labeled"])
        labeled = record["labeled"]


def test_draw_order_is_fixed_and_does_not_depend_on_the_order_of_cases():
    strata = dict.fromkeys("abcdef", "")
    assert draw_order(strata, seed=0) == list("ebfacd")
    assert draw_order(dict(reversed(strata.items())), seed=0) == draw_order(strata, seed=0)
    # without one patient, the others keep their order
    assert draw_order(dict.fromkeys("abdef", ""), seed=0) == [
        case for case in draw_order(strata, seed=0) if case != "c"
    ]


def test_every_beginning_of_the_order_holds_the_strata_in_proportion():
    sizes = {"A": 60, "B": 30, "C": 10}
    stratum_of = {f"{stratum}{i}": stratum for stratum, size in sizes.items() for i in range(size)}
    order = draw_order(stratum_of, seed=3)
    for n in range(1, 101):
        for stratum, size in sizes.items():
            assert abs(sum(stratum_of[patient] == stratum for patient in order[:n]) - n * size / 100) <= 1


def test_patients_and_strata(raw: Path, tmp_path: Path):
    groups = tmp_path / "patients.csv"  # as spreadsheets write it, with another column and a patient who is not here
    groups.write_text(
        "\ufeffcase,age,group\r\n" + "".join(f"{c},50,{p}\r\n" for c, p in (PATIENTS | {"Q": "Q"}).items())
    )
    # two sites with three patients each
    sites = write_json(tmp_path / "sites.json", {case: int(case[1]) % 2 for case in CASES})
    folder = withhold_labels(500, 501, num_labeled=2, test_fraction=1 / 3, groups=groups, stratify=sites)
    record = record_of(folder)
    patients = {share: [PATIENTS[case] for case in record[share]] for share in ("labeled", "unlabeled", "test")}
    for share in patients.values():
        assert sorted(share) == sorted([*set(share), *set(share)])  # both scans of each
        assert {int(patient[1]) % 2 for patient in share} == {0, 1}  # both sites
    assert [len(set(share)) for share in patients.values()] == [2, 2, 2]
    for fold in json.loads((folder / "splits_final.json").read_text()):  # no patient on both sides
        assert sorted(fold["train"] + fold["val"]) == record["labeled"]
        assert not {PATIENTS[case] for case in fold["train"]} & {PATIENTS[case] for case in fold["val"]}


@pytest.mark.parametrize("content", ["P0_x\n\n  P3_y\n", '["P0_x", "P3_y"]'], ids=["text", "json"])
def test_chosen_test_cases(raw: Path, tmp_path: Path, content: str):
    file = tmp_path / ("test.json" if content.startswith("[") else "test.txt")
    file.write_text(content)
    record = record_of(withhold_labels(500, 501, labeled_fraction=0.3, test_cases=file))
    assert record["test"] == ["P0_x", "P3_y"]
    assert len(record["labeled"]) == 3  # of the other 10


def test_chosen_labeled_cases(raw: Path, tmp_path: Path):
    """As a year of labeling is simulated: those of before, and what was ranked highest."""
    before = withhold_labels(500, 501, num_labeled=2, test_fraction=0.2)
    tests = record_of(before)["test"]
    (tmp_path / "test.json").write_text(json.dumps(tests))
    chosen = record_of(before)["unlabeled"][:2]
    (tmp_path / "ranking.json").write_text(json.dumps({"dataset": "Dataset501_Toy", "label_next": chosen}))
    files = [before / "withheld_labels.json", tmp_path / "ranking.json"]
    folder = withhold_labels(500, 502, labeled_cases=files, test_cases=tmp_path / "test.json")
    record = record_of(folder)
    assert record["labeled"] == sorted([*record_of(before)["labeled"], *chosen])
    assert record["test"] == tests
    assert sorted([*record["labeled"], *record["unlabeled"], *tests]) == CASES
    assert names(folder / "labelsTr") == [f"{case}.nii.gz" for case in record["labeled"]]


def test_the_sources_own_test_set_comes_along(raw: Path):
    source = raw / "Dataset500_Toy"
    for channel in range(2):
        write(source / "imagesTs" / f"T_000{channel}.nii.gz", np.random.default_rng(channel).normal(size=(2, 3, 4)))
    assert record_of(withhold_labels(500, 501, num_labeled=3))["test"] == []  # nobody could evaluate on it
    write(source / "labelsTs" / "T.nii.gz", np.ones((2, 3, 4), np.uint8))
    folder = withhold_labels(500, 502, num_labeled=3)
    assert record_of(folder)["test"] == ["T"]
    assert names(folder / "imagesTs") == image_names(["T"])
    assert names(folder / "labelsTs") == ["T.nii.gz"]


def first(order: list[str], share: list[str], number: int, passed_over: str = "") -> list[str]:
    return [case for case in order if case in share and case not in passed_over.split()][:number]


# fractions beside four labeled and eight unlabeled cases -> modality -> (order, number of labeled cases, of unlabeled
# cases that lose it, those passed over because nothing else is left)
DROPS = {
    "by name": ({"CT": 0.5}, {"CT": (WITHOUT_CT, 2, 4, "")}),
    "by number": ({"0": 0.5}, {"0": (WITHOUT_CT, 2, 4, "")}),
    "another modality": ({"PET": 0.5}, {"PET": (WITHOUT_PET, 2, 4, "")}),
    "rounded": ({"CT": 0.4}, {"CT": (WITHOUT_CT, 2, 3, "")}),  # 1.6 and 3.2
    "of one share": ({"CT": 0.1}, {"CT": (WITHOUT_CT, 0, 1, "")}),  # 0.4 and 0.8
    "both, the second passing over": (
        {"CT": 0.5, "PET": 0.25},
        {"CT": (WITHOUT_CT, 2, 4, ""), "PET": (WITHOUT_PET, 1, 2, "P0_y P4_x")},
    ),
    "both, in the other order": (
        {"PET": 0.25, "CT": 0.5},
        {"PET": (WITHOUT_PET, 1, 2, ""), "CT": (WITHOUT_CT, 2, 4, "P0_y P4_x")},
    ),
}


@pytest.mark.parametrize(("fractions", "expected"), DROPS.values(), ids=DROPS)
def test_drops_modalities(raw: Path, fractions: dict, expected: dict):
    folder = withhold_labels(500, 501, num_labeled=4, drop_modality=fractions)
    record = record_of(folder)
    shares = LABELED_FIRST[:4], LABELED_FIRST[4:]
    dropped = {
        modality: sorted(
            case
            for share, number in zip(shares, numbers, strict=True)
            for case in first(order, share, number, passed_over)
        )
        for modality, (order, *numbers, passed_over) in expected.items()
    }
    assert record["dropped"] == dropped
    assert record["options"]["drop_modality"] == fractions
    assert (record["labeled"], record["unlabeled"]) == tuple(map(sorted, shares))  # the draw of labels is the same
    file_of = {"CT": "0000", "0": "0000", "PET": "0001"}
    gone = {f"{case}_{file_of[modality]}.nii.gz" for modality, cases in dropped.items() for case in cases}
    for subfolder, share in zip(("imagesTr", "imagesUn"), shares, strict=True):
        assert names(folder / subfolder) == [name for name in image_names(sorted(share)) if name not in gone]
    assert names(folder / "labelsTr") == [f"{case}.nii.gz" for case in record["labeled"]]
    assert all(any(files["images"]) for members in read_raw_dataset(501).folders.values() for files in members.values())
    check_images(read_raw_dataset(501), 1, show_progress=False)


def test_another_seed_drops_others(raw: Path):
    folder = withhold_labels(500, 501, labeled_fraction=1, drop_modality={"CT": 0.25}, seed=3)
    assert record_of(folder)["dropped"] == {"CT": sorted(ORDERS["3 without 0"][:3])}


def test_a_smaller_fraction_is_part_of_a_larger_one_and_the_second_modality_changes_nothing(raw: Path):
    lost: dict[str, set[str]] = {"CT": set(), "PET": set()}
    for i, fraction in enumerate((0.1, 0.2, 0.4, 0.5, 0.6)):
        fractions = {"CT": fraction}
        ct = record_of(withhold_labels(500, 600 + i, num_labeled=4, drop_modality=fractions))["dropped"]["CT"]
        both = record_of(withhold_labels(500, 700 + i, num_labeled=4, drop_modality=fractions | {"PET": 0.2}))
        assert both["dropped"]["CT"] == ct
        pet = record_of(withhold_labels(500, 800 + i, num_labeled=4, drop_modality={"CT": 0.2, "PET": fraction}))
        for modality, cases in (("CT", ct), ("PET", pet["dropped"]["PET"])):
            assert lost[modality] < set(cases)
            lost[modality] = set(cases)


def test_all_cases_of_a_patient_lose_a_modality(raw: Path, tmp_path: Path):
    groups = write_json(tmp_path / "patients.json", PATIENTS)
    folder = withhold_labels(500, 501, num_labeled=3, groups=groups, drop_modality={"CT": 0.3})
    record = record_of(folder)
    # labels by printf '0 P0' | sha256sum: P1 P5 P0, then P2 P4 P3; CT by '0 without 0 P0': P1 P3 P5 P0 P2 P4
    assert record["labeled"] == ["P0_x", "P0_y", "P1_x", "P1_y", "P5_x", "P5_y"]
    assert record["dropped"] == {"CT": ["P1_x", "P1_y", "P3_x", "P3_y"]}

    # P1 can not lose CT if one of the scans has nothing else: the next one of the order does
    (raw / "Dataset500_Toy" / "imagesTr" / "P1_x_0001.nii.gz").unlink()
    folder = withhold_labels(500, 502, num_labeled=3, groups=groups, drop_modality={"CT": 0.3})
    assert record_of(folder)["dropped"] == {"CT": ["P3_x", "P3_y", "P5_x", "P5_y"]}


def test_every_fold_of_patients_has_every_modality(raw: Path, tmp_path: Path):
    groups = write_json(tmp_path / "patients.json", PATIENTS)
    folder = withhold_labels(500, 501, labeled_fraction=1, groups=groups, drop_modality={"CT": 0.5})
    assert {PATIENTS[case] for case in record_of(folder)["dropped"]["CT"]} == {"P1", "P3", "P5"}
    folds = json.loads((folder / "splits_final.json").read_text())
    assert len(folds) == 3  # as many as patients with CT; nnU-Net's own split would validate on P3 and P5 in one
    for fold in folds:
        train, val = ({PATIENTS[case] for case in fold[part]} for part in ("train", "val"))
        assert not train & val
        assert sorted(fold["train"] + fold["val"]) == CASES
        assert {"P0", "P2", "P4"} & train
        assert {"P0", "P2", "P4"} & val


def test_who_lacks_a_modality_is_not_counted_among_those_who_lose_it(raw: Path):
    for case in WITHOUT_CT[:4]:
        (raw / "Dataset500_Toy" / "imagesTr" / f"{case}_0000.nii.gz").unlink()
    record = record_of(withhold_labels(500, 501, labeled_fraction=1, drop_modality={"CT": 0.25}))
    assert record["dropped"] == {"CT": sorted(WITHOUT_CT[4:6])}  # of the other 8


def test_the_strata_lose_a_modality_in_proportion(raw: Path, tmp_path: Path):
    sites = write_json(tmp_path / "sites.json", {case: case[-1] for case in CASES})
    record = record_of(withhold_labels(500, 501, num_labeled=4, stratify=sites, drop_modality={"CT": 0.5}))
    for share, number in (("labeled", 1), ("unlabeled", 2)):
        lost = [case[-1] for case in record["dropped"]["CT"] if case in record[share]]
        assert [lost.count(site) for site in "xy"] == [number, number]


def test_the_test_set_keeps_all_images(raw: Path):
    folder = withhold_labels(500, 501, num_labeled=3, test_fraction=0.5, drop_modality={"CT": 0.6})
    record = record_of(folder)
    assert names(folder / "imagesTs") == image_names(record["test"])
    assert record["dropped"] == {
        "CT": sorted(case for share in ("labeled", "unlabeled") for case in first(WITHOUT_CT, record[share], 2))
    }
    write_test_set(raw)
    folder = withhold_labels(500, 502, num_labeled=3, drop_modality={"CT": 0.6})
    assert names(folder / "imagesTs") == image_names(["T"])


def write_color_dataset(raw: Path) -> None:
    """Dataset300_Color: R, G and B in one file, depth in another."""
    source = raw / "Dataset300_Color"
    for i, case in enumerate(CASES):
        rng = np.random.default_rng(i)
        for name, voxels in (
            (f"imagesTr/{case}_0000.png", rng.integers(0, 256, (5, 6, 3))),
            (f"imagesTr/{case}_0001.png", rng.integers(0, 256, (5, 6))),
            (f"labelsTr/{case}.png", np.eye(5, 6)),
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            imsave(source / name, voxels.astype(np.uint8), check_contrast=False)
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B", "3": "depth"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": len(CASES),
        "file_ending": ".png",
    }
    write_json(source / "dataset.json", content)


@pytest.mark.parametrize(
    ("modality", "channels", "file"),
    [("R,G,B", "0,1,2", 0), ("2,0,G", "0,1,2", 0), ("depth", "3", 1), ("3", "3", 1)],
)
def test_a_file_of_several_channels_is_dropped_whole(raw: Path, modality: str, channels: str, file: int):
    write_color_dataset(raw)
    folder = withhold_labels(300, 301, num_labeled=4, drop_modality={modality: 0.25})
    record = record_of(folder)
    order = ORDERS[f"0 without {channels}"]
    dropped = sorted(first(order, LABELED_FIRST[:4], 1) + first(order, LABELED_FIRST[4:], 2))
    assert record["dropped"] == {modality: dropped}
    for share, subfolder in (("labeled", "imagesTr"), ("unlabeled", "imagesUn")):
        assert names(folder / subfolder) == [
            f"{case}_000{i}.png" for case in record[share] for i in range(2) if i != file or case not in dropped
        ]
    new = read_raw_dataset(301)
    assert new.channels_of_files == [(0, 1, 2), (3,)]
    assert new.find_reader() is NaturalImage2DIO
    check_images(new, 1, show_progress=False)


def occupy(variable: str, name: str = "Dataset501_Old"):
    return lambda raw: (raw.parent / variable / name).mkdir(parents=True)


def write_file(content: str):
    return lambda raw: (raw.parent / "file").write_text(content)


def write_test_set(raw: Path) -> None:
    for name in ("imagesTs/T_0000.nii.gz", "imagesTs/T_0001.nii.gz", "labelsTs/T.nii.gz"):
        write(raw / "Dataset500_Toy" / name, np.ones((2, 3, 4), np.uint8))


def write_test_images(raw: Path) -> None:
    write_test_set(raw)
    (raw / "Dataset500_Toy" / "labelsTs" / "T.nii.gz").unlink()


def nothing(raw: Path) -> None:
    pass


TABLE = "case,group\n" + "".join(f"{case},{patient}\n" for case, patient in PATIENTS.items())
FILE = Path("file")  # stands for the file that the row writes

# preparation, options -> where, found, expected, remedy in the message
REFUSALS = {
    "no such source": (
        nothing,
        {"dataset": 499},
        "raw",
        "no raw dataset with the id 499",
        "Dataset499_NAME",
        "correct",
    ),
    "part of the source's name": (
        nothing,
        {"dataset": "Dataset500"},
        "raw",
        "no raw dataset Dataset500",
        "Dataset500_NAME",
        "Correct the name",
    ),
    "unlabeled cases": (
        lambda raw: write(raw / "Dataset500_Toy" / "imagesUn" / "u_0000.nii.gz", np.ones((2, 3, 4))),
        {},
        "imagesUn",
        "unlabeled cases",
        "a fully labeled dataset",
        "Choose another source",
    ),
    **{
        f"id taken in {variable}": (
            occupy(variable),
            {},
            "--output_id",
            "501, the id of Dataset501_Old",
            "free",
            "Choose another id",
        )
        for variable in ("raw", "preprocessed", "results")
    },
    **{
        f"id {number} beside {name}": (
            occupy("results", name),
            {"output_id": number},
            "--output_id",
            f"{number}, beside {name}",
            "does not take for that of another dataset",
            "Choose another id",
        )
        for number, name in ((123, "Dataset1234_X"), (1234, "Dataset123_X"), (5001, "Dataset500_Toy"))
    },
    "no id": (nothing, {"output_id": 0}, "--output_id", "0", "from 1 on", "Choose another id"),
    "bad name": (nothing, {"output_name": "a/b"}, "--output_name", "'a/b'", "letters", "Choose another name"),
    "two shares": (
        nothing,
        {"labeled_fraction": 0.5},
        "--labeled_cases",
        "none or several",
        "one of them",
        "exactly one",
    ),
    "no share": (nothing, {"num_labeled": None}, "--labeled_cases", "none or several", "one of them", "exactly one"),
    **{
        f"{option} {value}": (
            nothing,
            {"num_labeled": 3 if option == "test_fraction" else None, option: value},
            f"--{option}",
            str(value),
            "above 0 and below 1",
            "Give a fraction",
        )
        for option in ("labeled_fraction", "test_fraction")
        for value in (0.0, 1.1 if option == "labeled_fraction" else 1.0, -0.1, float("nan"))
    },
    "nobody labeled": (
        nothing,
        {"num_labeled": None, "labeled_fraction": 0.01},
        "--labeled_fraction",
        "0 of 12 patients",
        "at least one",
        "Change the share",
    ),
    "nobody unlabeled": (nothing, {"num_labeled": 12}, "--num_labeled", "12 of 12", "one left", "Change the share"),
    "negative number": (nothing, {"num_labeled": -1}, "--num_labeled", "-1 of 12", "at least one", "Change the share"),
    "empty test set": (
        nothing,
        {"test_fraction": 0.01},
        "--test_fraction",
        "0 of 12",
        "at least one",
        "Change the share",
    ),
    "two test sets": (
        write_file("P0_x"),
        {"test_fraction": 0.2, "test_cases": FILE},
        "--test_cases",
        "both",
        "one test set",
        "exactly one",
    ),
    "test set of the source": (
        write_test_set,
        {"test_fraction": 0.2},
        "--test_cases",
        "labelsTs",
        "one test set",
        "keep the source's own",
    ),
    "test label missing": (
        write_test_images,
        {},
        "labelsTs/T.nii.gz",
        "no such file",
        "the label of test case T",
        "remove labelsTs",
    ),
    "unknown test case": (
        write_file("P0_x\nP9_x"),
        {"test_cases": FILE},
        "file",
        "does not have: P9_x",
        "labeled cases of the source",
        "Correct the names",
    ),
    "labeled test case": (
        write_file("P0_x"),
        {"num_labeled": None, "labeled_cases": [FILE], "test_cases": FILE},
        "--labeled_cases",
        "P0_x of the test set",
        "training cases",
        "Leave it out",
    ),
    "no test case": (write_file("\n"), {"test_cases": FILE}, "file", "no case", "labeled cases", "Correct the names"),
    "torn patient": (
        lambda raw: (write_file(TABLE)(raw), (raw.parent / "test.txt").write_text("P0_x")),
        {"test_cases": Path("test.txt"), "groups": FILE},
        "test.txt",
        "left out: P0_y",
        "all cases of a patient",
        "Add the cases",
    ),
    "no file": (nothing, {"groups": FILE}, "file", "an unreadable file", "UTF-8", "Correct the path"),
    "no header": (
        write_file("P0_x,P0\n"),
        {"groups": FILE},
        "file",
        "the columns",
        "case and group",
        "Name the columns",
    ),
    "case without group": (
        write_file(TABLE.replace("P3_x,P3\n", "").replace("P4_y,P4", "P4_y,")),
        {"groups": FILE},
        "file",
        "no group for P3_x, P4_y",
        "every labeled case",
        "Add them",
    ),
    "case in two groups": (
        write_file(TABLE + "P0_x,P1\n"),
        {"groups": FILE},
        "file",
        "P0_x in two groups",
        "every case once",
        "Remove one",
    ),
    "patient in two strata": (
        lambda raw: (
            write_file(TABLE)(raw),
            write_json(raw.parent / "sites.json", {case: case[-1] for case in CASES}),
        ),
        {"groups": FILE, "stratify": Path("sites.json")},
        "sites.json",
        "patient P0 in two strata",
        "one stratum per patient",
        "Correct the file",
    ),
    "table is a list": (
        lambda raw: write_json(raw.parent / "table.json", CASES),
        {"stratify": Path("table.json")},
        "table.json",
        "a JSON list",
        "case and group",
        "Write an object",
    ),
    "damaged table": (
        write_file(TABLE + "x" * 200_000),
        {"groups": FILE},
        "file",
        "a damaged table (field larger than field limit",
        "case and group",
        "Correct it",
    ),
    **{
        f"output name {name[:9]!r}": (nothing, {"output_name": name}, "--output_name", found, expected, "Choose")
        for name, found, expected in (
            ("../../x", "'../../x'", "letters, digits"),
            ("a\n", "'a\\n'", "letters, digits"),
            ("x" * 200, "xxx", "names for files"),
        )
    },
    "a listed case that leads elsewhere": (
        lambda raw: write_json(
            raw / "Dataset500_Toy" / "dataset.json",
            json.loads((raw / "Dataset500_Toy" / "dataset.json").read_text())
            | {
                "dataset": {
                    "../../../evil": {
                        "images": [f"imagesTr/P0_x_000{i}.nii.gz" for i in range(2)],
                        "label": "labelsTr/P0_x.nii.gz",
                    }
                }
            },
        ),
        {},
        "dataset.json",
        "the names '../../../evil'",
        "names for files",
        "Choose other names",
    ),
    "damaged JSON": (
        lambda raw: (raw.parent / "table.json").write_text("{"),
        {"stratify": Path("table.json")},
        "table.json",
        "an unreadable file",
        "JSON",
        "Correct the path or file",
    ),
    **{
        f"drop {', '.join(drops)} {[*drops.values()]}{' of colors' if extra else ''}": (
            write_color_dataset if extra else nothing,
            {"num_labeled": 4, "drop_modality": drops, **extra},
            "--drop_modality",
            found,
            expected,
            remedy,
        )
        for drops, extra, found, expected, remedy in (
            ({"MR": 0.5}, {}, "MR", "one of CT, PET", "Correct it"),
            ({"2": 0.5}, {}, "2", "one of CT, PET", "Correct it"),
            ({"CT,": 0.5}, {}, "no channel after =", "one of CT, PET", "Correct it"),
            ({"CT": 0.2, "0": 0.2}, {}, "CT twice", "every channel once", "Remove one"),
            ({"CT,CT": 0.2}, {}, "CT twice", "every channel once", "Remove one"),
            *(
                ({"CT": fraction}, {}, f"CT={fraction}", "above 0 and below 1", "Give a fraction")
                for fraction in (0, 1, -0.1, 1.5, float("nan"))
            ),
            ({"CT": 0.05}, {}, "no patient at all", "one at least", "larger fraction"),  # 0.2 and 0.4 patients
            ({"CT": 0.9}, {}, "4 of 4 labeled patients, 4 of whom", "some who keep", "smaller fraction"),
            ({"CT,PET": 0.5}, {}, "2 of 4 labeled patients, 0 of whom", "other images of all", "smaller fraction"),
            ({"CT": 0.5, "PET": 0.7}, {}, "PET=0.7, which is 3 of 4 labeled", "other images of all", "smaller"),
            ({"CT": 0.5, "PET": 0.5}, {}, "no labeled case keeps", "planning needs", "another seed"),
            ({"R": 0.5}, {"dataset": 300}, "R", "a case has R, G, B; depth", "all channels of a file"),
            ({"B,depth": 0.5}, {"dataset": 300}, "B,depth", "a case has R, G, B; depth", "all channels of a file"),
        )
    },
    "channels of one name": (
        lambda raw: write_json(
            raw / "Dataset500_Toy" / "dataset.json",
            json.loads((raw / "Dataset500_Toy" / "dataset.json").read_text())
            | {"channel_names": {"0": "MR", "1": "MR"}},
        ),
        {"drop_modality": {"MR": 0.5}},
        "--drop_modality",
        "MR, the name of channels 0, 1",
        "or its number",
        "Give the number",
    ),
}


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("prepare", "options", "where", "found", "expected", "remedy"), REFUSALS.values(), ids=REFUSALS
)
def test_refuses(raw: Path, prepare, options: dict, where: str, found: str, expected: str, remedy: str):
    prepare(raw)
    options = {"dataset": 500, "output_id": 501, "num_labeled": 3} | options
    options = {key: raw.parent / value if isinstance(value, Path) else value for key, value in options.items()}
    options |= {key: [raw.parent / file for file in value] for key, value in options.items() if key == "labeled_cases"}
    before = snapshot(raw.parent)
    with pytest.raises(UserError) as error:
        withhold_labels(**options)
    place, rest = str(error.value).split(": found ", maxsplit=1)
    found_there, expected_there = rest.split("; expected ")
    assert place.endswith(where)
    assert found in found_there
    assert expected in expected_there
    assert remedy in expected_there
    assert snapshot(raw.parent) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError], ids=["Ctrl-C", "full disk"])
def test_an_interruption_leaves_nothing_behind(raw: Path, monkeypatch: pytest.MonkeyPatch, interruption):
    before = snapshot(raw)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) > 5:
            raise interruption

    monkeypatch.setattr(os, "link", interrupt)
    monkeypatch.setattr(shutil, "copy2", interrupt)
    with pytest.raises(interruption):
        withhold_labels(500, 501, num_labeled=3)
    assert len(calls) > 5
    assert snapshot(raw) == before


def test_command_line(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command = "withhold_labels -d Dataset500_Toy --output_id 501 --output_name Small --labeled_fraction 0.25 --seed 3"
    monkeypatch.setattr(sys, "argv", command.split())
    run_withhold_labels()
    output = capsys.readouterr().out
    assert "Dataset501_Small: 3 labeled, 9 unlabeled, 0 test" in output
    assert "nnUNetv2_semicml_plan_and_preprocess -d 501" in output
    assert record_of(raw / "Dataset501_Small")["seed"] == 3
    assert not (raw / "Dataset501_Small" / "imagesTs").exists()

    with pytest.raises(SystemExit):
        run_withhold_labels()
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: --output_id: found 501")
    assert "Traceback" not in captured.err


def test_command_line_drops_modalities(raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command = "withhold_labels -d 500 --output_id 501 --num_labeled 4 --drop_modality"
    monkeypatch.setattr(sys, "argv", [*command.split(), "CT=0.5", "1=.25"])
    run_withhold_labels()
    output = capsys.readouterr().out
    assert "4 labeled, 8 unlabeled, 0 test" in output
    assert "Cases that lost CT: 2 labeled, 4 unlabeled\nCases that lost 1: 1 labeled, 2 unlabeled\n" in output
    assert record_of(raw / "Dataset501_Toy")["options"]["drop_modality"] == {"CT": 0.5, "1": 0.25}

    for texts, found in (
        (["CT"], "'CT'"),
        (["CT=half"], "'CT=half'"),
        (["=0.5"], "'=0.5'"),
        (["CT=0.1", "CT=0.2"], "CT twice"),
    ):
        monkeypatch.setattr(sys, "argv", [*command.split(), *texts])
        with pytest.raises(SystemExit):
            run_withhold_labels()
        assert capsys.readouterr().err.startswith(f"Error: --drop_modality: found {found}; expected ")


def test_module_is_imported_without_warnings():
    code = "import nnunetv2_semicml.planning.withhold_labels"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


def test_nothing_withheld_makes_the_fully_labeled_dataset_with_the_same_test_set(raw: Path):
    """The upper bound of a comparison: what is unlabeled elsewhere has its label."""
    few = record_of(withhold_labels(500, 501, num_labeled=3, test_fraction=0.25))
    folder = withhold_labels(500, 502, labeled_fraction=1, test_fraction=0.25)
    everything = record_of(folder)
    assert everything["test"] == few["test"]
    assert everything["labeled"] == sorted(few["labeled"] + few["unlabeled"])
    assert everything["unlabeled"] == []
    assert not (folder / "imagesUn").exists()
    assert len(list((folder / "labelsTr").iterdir())) == len(everything["labeled"])


def test_a_full_disk_is_one_sentence_and_leaves_nothing(raw: Path):
    """A limit on the size of files stands for it, and a folder without hard links for one on another drive."""
    code = (
        "import os, resource, sys, nnunetv2_semicml.planning.withhold_labels\n"
        "from nnunetv2_semicml.command_line import run_withhold_labels\n"
        "os.link = lambda *_: os.stat('/nowhere')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\nrun_withhold_labels()"
    )
    before = snapshot(raw)
    options = ["-d", "500", "--output_id", "501", "--num_labeled", "3"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {raw}/.Dataset501_Toy.unfinished/Dataset501_Toy/imagesTr/")
    assert done.stderr.endswith(
        ": found that it cannot be written (File too large); expected enough space and the right to write there. "
        "Make room, and repeat the command: nothing is left of what it has written.\n"
    )
    assert snapshot(raw) == before

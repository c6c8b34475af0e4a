"""What users do to a planned group: it works, or gets one sentence."""

import json
import os
import shutil

import numpy as np
import pytest
from toy import copy_planned, plan, preprocessed, refusal, require_ready, rewrite

from nnunetv2_semicml.data.modality_group import Modality, ModalityGroup

GROUP, T1, T2 = "Dataset500_Toy", "Dataset501_Toy_T1", "Dataset502_Toy_T2"
PREPROCESS = "Run nnUNetv2_semicml_plan_and_preprocess for this dataset, plans and configuration."


@pytest.fixture
def raw(tmp_path, tmp_path_factory, monkeypatch):
    return copy_planned(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "planned_toy")


def edit(name, change, file="nnUNetPlans.json"):
    path = preprocessed(name) / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_2d(key, value):
    return lambda plans: plans["configurations"]["2d"].update({key: value})


def test_every_dataset_of_a_group_is_ready(raw):
    for name in (GROUP, T1, T2):
        require_ready(name)
    group = ModalityGroup.load(GROUP)
    assert not group.is_single
    for modality in group.modalities:
        alone = ModalityGroup.load(modality.dataset_name)
        assert alone.is_single
        assert alone.part_of == GROUP
        assert [(m.name, m.channels) for m in alone.modalities] == [(modality.name, [0])]
        assert (alone.labeled, alone.unlabeled) == (group.labeled, group.unlabeled)


@pytest.mark.parametrize("value", [None, "/nowhere"])
def test_trained_where_there_is_no_raw_dataset(raw, monkeypatch, value):
    shutil.rmtree(raw)
    if value is None:
        monkeypatch.delenv("nnUNet_raw")
    else:
        monkeypatch.setenv("nnUNet_raw", value)
    require_ready()


def test_copied_without_times(raw):
    for file in raw.rglob("*.nii.gz"):
        os.utime(file, ns=(0, 0))
    require_ready()


def test_a_raw_file_that_changes_is_noticed_by_its_content(raw):
    rewrite(raw, "imagesUn/P07_0001.*", lambda voxels, affine: (voxels + 1, affine))
    assert refusal(require_ready).startswith(
        f"{raw}/imagesUn/P07_0001.nii.gz: found that it has changed since it was preprocessed; expected the images"
    )


def test_test_images_may_change(raw):
    (raw / "imagesTs").mkdir()
    for channel in range(2):
        shutil.copy(raw / f"imagesUn/P06_000{channel}.nii.gz", raw / f"imagesTs/Q_000{channel}.nii.gz")
    rewrite(raw, "imagesTs/*", lambda voxels, affine: (voxels + 1, affine))
    plan(500, keep_plans=True)
    rewrite(raw, "imagesTs/*", lambda voxels, affine: (voxels + 1, affine))
    require_ready()


def test_modality_datasets_outlive_the_others(raw):
    shutil.rmtree(preprocessed(GROUP))
    shutil.rmtree(preprocessed(T2))
    require_ready(T1)


def test_a_modality_that_is_gone_is_missed(raw):
    shutil.rmtree(preprocessed(T2))
    require_ready(T1)
    assert refusal(require_ready) == (
        f"{preprocessed(T2)}/nnUNetPlans.json: found no such file; expected the plans of modality T2. {PREPROCESS}"
    )


def test_batch_size_may_change_everywhere_alike(raw):
    edit(T1, set_2d("batch_size", 3))
    shared = preprocessed(GROUP) / "nnUNetPlans.json"
    planned = json.loads(shared.read_text())["configurations"]["2d"]["batch_size"]
    assert refusal(require_ready) == (
        f"{preprocessed(T1)}/nnUNetPlans.json: found batch_size = 3 in configuration 2d; expected {planned}, as in "
        f"{shared}, since the networks of a group share one voxel frame. Make the same change in the plans of all "
        "datasets of the group, or plan again."
    )
    for name in (GROUP, T2):
        edit(name, set_2d("batch_size", 3))
    require_ready()


@pytest.mark.parametrize("change", [set_2d("spacing", [2.0, 2.0]), set_2d("data_identifier", "other")])
def test_what_voxels_depend_on_may_not_change(raw, change):
    for name in (GROUP, T1, T2):
        edit(name, change)
    assert refusal(require_ready).endswith(PREPROCESS)


def test_labels_may_not_change(raw):
    edit(T1, lambda content: content["labels"].update(rare=2), "dataset.json")
    assert "found plans, labels or cases that have changed since nnUNetPlans_2d was preproc" in refusal(require_ready)


def test_a_configuration_that_is_not_there(raw):
    assert "nnUNetPlans.json: found configurations 2d, 3d_fullres; expected 3d_lowres" in refusal(
        require_ready, configuration="3d_lowres"
    )
    assert refusal(require_ready, configuration="3d_fullres") == (
        f"{preprocessed(GROUP)}/modalities.json: found nnUNetPlans_2d preprocessed; expected nnUNetPlans_3d_fullres. "
        f"{PREPROCESS}"
    )


@pytest.mark.parametrize("kept", [None, 0, -1])
@pytest.mark.parametrize("file", ["nnUNetPlans_2d/P03.b2nd", "nnUNetPlans_2d_unlabeled/P08.pkl"])
def test_a_preprocessed_file_that_is_gone_or_cut_off_is_made_again(raw, file, kept):
    lost = preprocessed(T2) / file
    content = lost.read_bytes()
    lost.unlink()
    if kept is not None:
        lost.write_bytes(content[:kept])
    assert refusal(require_ready) == (
        f"{lost.parent}: found no complete preprocessed case {lost.stem}; expected 6 preprocessed cases. {PREPROCESS}"
    )
    plan(500, keep_plans=True)
    assert lost.is_file()
    require_ready()


def test_a_group_of_version_0_1(raw):
    """There a modality had one channel."""
    old = {
        "dataset_name": GROUP,
        "modalities": [{"name": "T1", "channel": 0, "dataset_name": T1}],
        "labeled": ["P00"],
        "unlabeled": ["P06"],
        "preprocessed": {},
    }
    (preprocessed(GROUP) / "modalities.json").write_text(json.dumps(old))
    sentence = (
        f"{preprocessed(GROUP)}/modalities.json: found the modality group of another version (Modality.__init__() got "
        f"an unexpected keyword argument 'channel'); expected one of this version. {PREPROCESS}"
    )
    assert refusal(require_ready) == sentence
    assert refusal(plan, 500, keep_plans=True) == sentence
    assert [m.dataset_name for m in plan(500, ["2d"]).modalities] == [T1, T2]
    require_ready()


def test_a_damaged_group(raw):
    (preprocessed(GROUP) / "modalities.json").write_text('{"dataset_name"')
    assert "modalities.json: found damaged JSON (" in refusal(require_ready)


def first_modality(**changes):
    return lambda group: group["modalities"][0].update(changes)


WRONG_GROUPS = {
    "a list in the place of the cases": (
        first_modality(labeled=["P00"]),
        "of another version (['P00'] in the place of",
    ),
    "a text in the place of the cases": (first_modality(labeled="P00"), "version (P00 in the place of dict"),
    "no digest": (first_modality(labeled={"P00": None}), "of another version (None in the place of str)"),
    "a channel in words": (first_modality(channels=["0"]), "of another version (0 in the place of int)"),
    "no files": (lambda group: group.pop("files"), "of another version ('files')"),
    "a file without digest": (lambda group: group["files"].update(a=[1, 2]), "of another version (FileState"),
    "modalities in words": (lambda group: group.update(modalities="T1"), "of another version ("),
    "no modality": (lambda group: group.update(modalities=[]), "0 modalities of Dataset500_Toy; expected some of"),
    "another dataset": (
        lambda group: group.update(dataset_name="Dataset600_Toy"),
        "2 modalities of Dataset600_Toy; expected some of Dataset500_Toy",
    ),
    "a dataset elsewhere": (first_modality(dataset_name="../x"), "the names '../x'; expected names for files: "),
    "a case elsewhere": (first_modality(labeled={"/P00": "0"}), "the names '/P00'; expected names for files: "),
    "files elsewhere": (lambda group: group["preprocessed"].update({"..": {}}), "the names '..'; expected names for"),
    "settings missing": (
        lambda group: group["preprocessed"]["nnUNetPlans_2d"][T1].pop("settings"),
        "of another version (",
    ),
}


@pytest.mark.parametrize(("change", "found"), WRONG_GROUPS.values(), ids=WRONG_GROUPS)
def test_a_group_that_was_edited(raw, change, found):
    """Planning again is a remedy."""
    edit(GROUP, change, "modalities.json")
    sentence = refusal(require_ready)
    assert sentence.startswith(f"{preprocessed(GROUP)}/modalities.json: found ")
    assert found in sentence
    assert refusal(plan, 500, keep_plans=True) == sentence


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda plans: plans.pop("transpose_forward"), "damaged plans (KeyError: 'transpose_forward')"),
        (lambda plans: plans["configurations"]["2d"].pop("spacing"), "damaged plans (KeyError: 'spacing')"),
        (set_2d("inherits_from", "nothing"), "damaged plans ("),
        (lambda plans: plans.update(configurations=[]), "damaged plans (AttributeError: 'list' object has no attri"),
        (lambda plans: plans.pop("configurations"), "damaged plans (KeyError: 'configurations')"),
    ],
)
def test_plans_that_were_damaged(raw, change, found):
    edit(T1, change)
    assert refusal(require_ready).startswith(f"{preprocessed(T1)}/nnUNetPlans.json: found {found}")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": "\udce4"}'.encode("utf-8", "surrogatepass"), None])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        (T1, "nnUNetPlans.json"),
        (T2, "dataset.json"),
        (GROUP, "modalities.json"),
        (GROUP, "splits_final.json"),
        (T1, "splits_final.json"),
    ],
)
def test_a_damaged_file_is_named(raw, name, file, content):
    path = preprocessed(name) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(require_ready).startswith(f"{path}: found ")


def test_folds_of_other_cases(raw):
    edit(GROUP, lambda folds: folds[0]["val"].append("stranger"), "splits_final.json")
    assert "Dataset500_Toy/splits_final.json: found folds that name stranger; expected the 6" in refusal(require_ready)


def test_digests_of_what_weights_belong_to(raw):
    """Each part changes with what it is made of, and with nothing else."""

    def provenance(fold=0):
        plans = json.loads((preprocessed(GROUP) / "nnUNetPlans.json").read_text())
        return ModalityGroup.load(GROUP).provenance(plans, "2d", fold)

    def changed(other):
        return [name.removeprefix("digest of ") for name in before if before[name] != other[name]]

    before = provenance()
    assert changed(provenance()) == []
    assert changed(provenance(fold=1)) == ["fold"]
    rewrite(raw, "labelsTr/P02.*", lambda voxels, affine: (np.roll(voxels, 1, 0), affine))
    plan(500, keep_plans=True)
    assert changed(provenance()) == ["cases"]


def test_patterns_are_described():
    group = ModalityGroup(
        "Dataset500_Toy",
        [
            Modality("CT", [0], [0], "Dataset501_Toy_CT", {"a": "", "b": "", "c": ""}, {"u": ""}),
            Modality("PET", [1], [1], "Dataset502_Toy_PET", {"a": "", "d": ""}, {}),
        ],
    )
    assert group.patterns(labeled=True) == {("CT", "PET"): ["a"], ("CT",): ["b", "c"], ("PET",): ["d"]}
    assert group.describe() == [
        "4 labeled cases: 1 with CT + PET, 2 with CT, 1 with PET",
        "1 unlabeled case: 1 with CT",
    ]
    assert group.common_cases(["CT", "PET"], labeled=True) == ["a"]
    assert "found no unlabeled case with CT and PET; expected at least 2" in refusal(group.require_common_cases)

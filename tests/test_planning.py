import json
import os
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from conftest import LABELS, REGIONS, draw_batches, load_plans, make_trainer, shrink_networks
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.demo.phantom import write_phantom_dataset
from nnunetv2_semicml.planning import plan_and_preprocess as planning
from nnunetv2_semicml.planning.plan_and_preprocess import plan_and_preprocess
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher

FLAIR, T1 = "Dataset501_Labels_FLAIR", "Dataset502_Labels_T1"


def preprocessed(name):
    return Path(os.environ["nnUNet_preprocessed"]) / name


def test_each_modality_is_an_ordinary_dataset(labels_group):
    assert [m.dataset_name for m in labels_group.modalities] == ["Dataset501_Labels_FLAIR", "Dataset502_Labels_T1"]
    raw = Path(os.environ["nnUNet_raw"])
    for modality in labels_group.modalities:
        assert [f.name for f in (raw / modality.dataset_name).iterdir()] == ["dataset.json"]  # no image is copied
        own = json.loads((raw / modality.dataset_name / "dataset.json").read_text())
        assert own["channel_names"] == {"0": modality.name}
        assert sorted(own["dataset"]) == labels_group.labeled
        for files in own["dataset"].values():
            for file in (*files["images"], files["label"]):
                assert not Path(file).is_absolute()
                assert (raw / modality.dataset_name / file).is_file()
        truth = {f.name for f in (preprocessed(modality.dataset_name) / "gt_segmentations").iterdir()}
        assert truth == {f"{case}.nii.gz" for case in labels_group.labeled}


def test_geometry_is_shared_and_normalization_is_not(labels_group):
    group_plans, _ = load_plans(LABELS)
    own = [load_plans(m.dataset_name)[0] for m in labels_group.modalities]
    for plans in own:
        for key in ("transpose_forward", "transpose_backward", "image_reader_writer", "plans_name"):
            assert plans[key] == group_plans[key]
        for name, configuration in plans["configurations"].items():
            for key in ("spacing", "patch_size", "batch_size", "architecture", "batch_dice", "data_identifier"):
                assert configuration[key] == group_plans["configurations"][name][key]
            assert len(configuration["normalization_schemes"]) == len(configuration["use_mask_for_norm"]) == 1
        assert list(plans["foreground_intensity_properties_per_channel"]) == ["0"]
    # FLAIR is skull-stripped, T1 is not: the mask flag is that of the modality's own fingerprint
    assert [p["configurations"]["2d"]["use_mask_for_norm"] for p in own] == [[True], [False]]
    intensities = [p["foreground_intensity_properties_per_channel"]["0"]["mean"] for p in own]
    assert intensities[0] != intensities[1]


def test_folds_are_the_same_everywhere_and_hold_labeled_cases_only(labels_group):
    names = [LABELS, *(m.dataset_name for m in labels_group.modalities)]
    splits = [json.loads((preprocessed(name) / "splits_final.json").read_text()) for name in names]
    assert splits[0] == splits[1] == splits[2]
    assert len(splits[0]) == 5
    assert sorted(case for fold in splits[0] for case in fold["val"]) == labels_group.labeled
    # nnU-Net makes its splits of what it finds in this folder
    folder = preprocessed(names[1]) / "nnUNetPlans_2d"
    assert {f.name[:-4] for f in folder.glob("*.pkl")} == set(labels_group.labeled)
    folder = preprocessed(names[1]) / "nnUNetPlans_2d_unlabeled"
    assert {f.name[:-4] for f in folder.glob("*.pkl")} == set(labels_group.unlabeled)


def test_planning_again_adds_and_replaces_but_never_mixes(copy_of_labels, monkeypatch):
    """ResEnc plans beside the default ones; then a change of the unlabeled cases makes all that was done invalid."""
    group = plan_and_preprocess(500, ["2d"], "nnUNetPlannerResEncM", num_processes=[1], num_processes_fingerprint=1)
    # nnU-Net's ResEnc planners use the preprocessed data of the default plans
    assert set(group.preprocessed) == {"nnUNetPlans_2d", "nnUNetPlans_3d_fullres"}
    plans, dataset_json = (
        json.loads((preprocessed(LABELS) / name).read_text())
        for name in ("nnUNetResEncUNetMPlans.json", "dataset.json")
    )
    assert "ResidualEncoder" in plans["configurations"]["2d"]["architecture"]["network_class_name"]
    group.require_ready(plans, "2d")
    group.require_ready(load_plans(LABELS)[0], "2d")
    group.require_ready(load_plans(LABELS)[0], "3d_fullres")
    assert dataset_json["numTraining"] == 5

    (copy_of_labels / "nnUNet_raw" / LABELS / "imagesUn").rename(copy_of_labels / "kept")
    unlabeled = copy_of_labels / "nnUNet_raw" / LABELS / "imagesUn"
    unlabeled.mkdir()
    for file in sorted((copy_of_labels / "kept").iterdir())[:4]:
        shutil.copy(file, unlabeled)
    monkeypatch.setattr(planning, "_preprocess_labeled", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan_and_preprocess(500, ["2d"], num_processes=[1], num_processes_fingerprint=1)
    group = ModalityGroup.load(LABELS)
    with pytest.raises(RuntimeError, match=r"found .* preprocessed; expected nnUNetPlans_2d"):
        group.require_ready(load_plans(LABELS)[0], "2d")
    with pytest.raises(RuntimeError, match="that have changed since nnUNetPlans_3d_fullres was preprocessed"):
        group.require_ready(load_plans(LABELS)[0], "3d_fullres")


def test_3d_lowres_is_planned_preprocessed_and_trained(copy_of_labels, monkeypatch):
    """The phantom is too small for nnU-Net to plan it; nnU-Net keeps configurations that users add to the plans."""
    file = preprocessed(LABELS) / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    lowres = json.loads(json.dumps(plans["configurations"]["3d_fullres"]))
    lowres.update(data_identifier="nnUNetPlans_3d_lowres", next_stage="3d_cascade_fullres")
    lowres["spacing"] = [1.3 * mm for mm in lowres["spacing"]]
    plans["configurations"]["3d_lowres"] = lowres
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans))

    group = plan_and_preprocess(500, ["3d_lowres"], num_processes=[1], num_processes_fingerprint=1)
    own = load_plans(group.modalities[0].dataset_name)[0]["configurations"]
    assert set(own) == {"2d", "3d_fullres", "3d_lowres"}  # the networks of a group have no cascade
    assert "next_stage" not in own["3d_lowres"]
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(LABELS, "3d_lowres")
    trainer.initialize()
    (batch,) = draw_batches(trainer, 1)
    assert torch.isfinite(torch.tensor(trainer.train_step(batch)["loss"]))
    with pytest.raises(NotImplementedError, match="does not support the cascade"):
        make_trainer(LABELS, "3d_cascade_fullres")


def interrupt(*_):
    raise KeyboardInterrupt


def test_residual_encoder_networks_train(copy_of_labels, monkeypatch):
    """The network of nnU-Net's recommended presets, put into the plans of all datasets."""
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "blocks": ("n_blocks_per_stage", "n_conv_per_stage"),
    }
    for file in (copy_of_labels / "nnUNet_preprocessed").glob("*/nnUNetPlans.json"):
        plans = json.loads(file.read_text())
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        architecture["network_class_name"] = network["network_class_name"]
        new, old = network["blocks"]
        architecture["arch_kwargs"][new] = architecture["arch_kwargs"].pop(old)
        file.write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(LABELS, "3d_fullres")
    trainer.initialize()
    (batch,) = draw_batches(trainer, 1)
    assert torch.isfinite(torch.tensor(trainer.train_step(batch)["loss"]))


def test_stock_planner_normalization_is_used_for_ct(regions_group, monkeypatch):
    """A modality called CT gets nnU-Net's CT normalization, whatever its partner is."""
    modality = regions_group.modalities[1]
    planner = ExperimentPlanner(int(modality.dataset_name[7:10]))
    monkeypatch.setitem(planner.dataset_json, "channel_names", {"0": "CT"})
    plans, _ = load_plans(REGIONS)
    own = planning._modality_plans(plans, modality, lambda _: planner)
    assert own["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]
    assert len(plans["configurations"]["3d_fullres"]["normalization_schemes"]) == 3


# bad input


def rename_channel(name):
    def change(raw):
        file = raw / LABELS / "dataset.json"
        content = json.loads(file.read_text())
        content["channel_names"]["1"] = name
        file.write_text(json.dumps(content))

    return change


def keep_labeled(number):
    def change(raw):
        for file in sorted((raw / LABELS / "labelsTr").iterdir())[number:]:
            file.unlink()
            for image in (raw / LABELS / "imagesTr").glob(f"{file.name[:-7]}_*"):
                image.unlink()
        file = raw / LABELS / "dataset.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "numTraining": number}))

    return change


def write_splits(raw):
    (raw / LABELS / "splits_final.json").write_text(json.dumps([{"train": ["stranger"], "val": []}]))


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (rename_channel("T1/Gd"), {}, r"dataset.json: found the channel name 'T1/Gd'; expected .* Rename the channel"),
        (rename_channel(""), {}, r"dataset.json: found the channel name ''"),
        (rename_channel("flair"), {}, r"found the modalities FLAIR, flair; expected different names"),
        (None, {"modality_names": ["FLAIR", "PET"]}, r"--modalities: found PET; expected one of FLAIR, T1"),
        (None, {"modality_ids": [600]}, r"--modality_ids: found \[600\]; expected 2 different ids"),
        (None, {"modality_ids": [600, 600]}, r"expected 2 different ids, for FLAIR, T1"),
        (
            None,
            {"modality_ids": [500, 600]},
            r"dataset id 500: found that Dataset500_Labels has it; expected a free id",
        ),
        (None, {"modality_ids": [777, 600]}, r"dataset id 777: found that Dataset777_Taken has it"),
        (keep_labeled(4), {}, r"labelsTr: found 4 labeled cases; expected at least 5, .*splits_final.json"),
        (write_splits, {}, r"splits_final.json: found folds that lack labels_tr_000; expected the 5 labeled cases"),
        (None, {"num_processes": [1, 2, 3]}, r"option -np: found 3 numbers for 2 configurations"),
        (None, {"planner_name": "NoPlanner"}, r"option -pl: found NoPlanner; expected an experiment planner"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    labels_group, tmp_path, monkeypatch, change, options, sentence
):
    raw = tmp_path / "raw"
    shutil.copytree(Path(os.environ["nnUNet_raw"]) / LABELS, raw / LABELS)
    (raw / "Dataset777_Taken").mkdir()
    (tmp_path / "preprocessed").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    if change:
        change(raw)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match=sentence):
        plan_and_preprocess(500, ["2d", "3d_fullres"], **options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("nnUNet_raw", None, "environment variable nnUNet_raw: found"),
        ("nnUNet_preprocessed", None, "environment variable nnUNet_preprocessed: found nothing; expected a folder"),
        ("nnUNet_n_proc_DA", "0", "environment variable nnUNet_n_proc_DA: found 0; expected at least 1"),
    ],
)
def test_environment_is_checked(labels_group, monkeypatch, variable, value, sentence):
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=sentence):
        plan_and_preprocess(500)


def test_training_without_results_folder_is_refused(labels_group, monkeypatch):
    monkeypatch.delenv("nnUNet_results", raising=False)
    with pytest.raises(RuntimeError, match="environment variable nnUNet_results: found nothing; expected a folder"):
        make_trainer(LABELS, "2d")


def test_ids_of_an_interrupted_first_run_are_used_again(labels_group, copy_of_labels):
    """Without modalities.json, the raw modality datasets tell that this package made them for this dataset."""
    raw = planning.read_raw_dataset(500)
    (preprocessed(LABELS) / "modalities.json").unlink()
    assert planning._choose_modalities(raw, None, None) == labels_group.modalities


# single modalities


def test_every_modality_dataset_is_a_group_of_its_own(labels_group):
    for modality in labels_group.modalities:
        alone = ModalityGroup.load(modality.dataset_name)
        assert alone.is_single
        assert [(m.name, m.channel, m.dataset_name) for m in alone.modalities] == [
            (modality.name, 0, modality.dataset_name)
        ]
        assert (alone.labeled, alone.unlabeled) == (labels_group.labeled, labels_group.unlabeled)
        assert alone.preprocessed.keys() == labels_group.preprocessed.keys()
        plans, _ = load_plans(modality.dataset_name)
        ((own, _),) = alone.require_ready(plans, "2d")
        assert own["dataset_name"] == modality.dataset_name
    assert not labels_group.is_single


def test_dataset_with_one_channel_is_planned_where_it_is(nnunet_folders, results, monkeypatch):
    """And trained by a method that needs one modality."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    raw = write_phantom_dataset(
        Path(os.environ["nnUNet_raw"]), 530, "Single", 5, 2, 1, shape=(24, 24, 24), modalities=("T1",)
    )
    with pytest.raises(RuntimeError, match=r"--modality_ids: found \[531\]; expected none, since Dataset530_S"):
        plan_and_preprocess(530, ["2d"], modality_ids=[531])
    group = plan_and_preprocess(530, ["2d"], num_processes=[1], num_processes_fingerprint=1)
    assert group.is_single
    assert [m.dataset_name for m in group.modalities] == [raw.name]
    assert not list(raw.parent.glob("Dataset531*"))
    folder = preprocessed(raw.name)
    assert {f.stem for f in (folder / "nnUNetPlans_2d_unlabeled").glob("*.pkl")} == set(group.unlabeled)
    assert {f.stem for f in (folder / "nnUNetPlans_2d").glob("*.pkl")} == set(group.labeled)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    shrink_networks(group)
    trainer = make_trainer(raw.name, "2d", nnUNetTrainerMeanTeacher, num_epochs=1)
    trainer.run_training()
    assert (results / raw.name / "nnUNetTrainerMeanTeacher__nnUNetPlans__2d/fold_0/checkpoint_final.pth").is_file()


def test_one_modality_of_several_can_be_chosen(copy_of_labels):
    group = plan_and_preprocess(500, ["2d"], modality_names=["T1"], num_processes=[1], num_processes_fingerprint=1)
    (modality,) = group.modalities
    assert (modality.name, modality.channel, modality.dataset_name) == ("T1", 1, "Dataset502_Labels_T1")
    assert ModalityGroup.load("Dataset502_Labels_T1").is_single
    assert not group.is_single


# plans of another dataset


def test_more_labels_are_planned_like_few(copy_of_labels):
    """Geometry and normalization are the other dataset's, voxel for voxel; nothing is unlabeled."""
    raw = copy_of_labels / "nnUNet_raw"
    shutil.copytree(raw / LABELS, raw / "Dataset540_Full", ignore=shutil.ignore_patterns("imagesUn"))
    with pytest.raises(RuntimeError, match="imagesUn: found no image"):
        plan_and_preprocess(540, ["2d"])
    group = plan_and_preprocess(540, ["2d"], plans_of=500, num_processes=[1], num_processes_fingerprint=1)
    assert group.unlabeled == []
    pairs = [("Dataset540_Full", LABELS), ("Dataset541_Full_FLAIR", FLAIR), ("Dataset542_Full_T1", T1)]
    for full, few in pairs:
        assert {**load_plans(full)[0], "dataset_name": few} == load_plans(few)[0]
    case = group.labeled[0]
    for full, few in pairs[1:]:
        arrays = [blosc2.open(str(preprocessed(d) / "nnUNetPlans_2d" / f"{case}.b2nd"))[:] for d in (full, few)]
        assert np.array_equal(*arrays)
        assert (preprocessed(full) / "dataset_fingerprint.json").is_file()
    plans, dataset_json = load_plans("Dataset541_Full_FLAIR")
    stock = nnUNetTrainer(plans, "2d", 0, dataset_json, torch.device("cpu"))
    assert len(stock.do_split()[0]) == 4
    with pytest.raises(RuntimeError, match=r"found no unlabeled case; expected some\. Train stock nnU-Net"):
        make_trainer("Dataset541_Full_FLAIR", "2d", nnUNetTrainerMeanTeacher)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"plans_of": 999}, r"--plans_of: found no dataset with the id 999"),
        (
            {"plans_of": 500, "modality_names": ["T1"]},
            r"found Dataset500_Labels with the modalities FLAIR, T1",
        ),
        (
            {"plans_of": 500, "overwrite_plans_name": "other"},
            r"Labels/other.json: found no such file",
        ),
    ],
)
def test_plans_of_another_kind_of_dataset_are_refused(copy_of_labels, options, sentence):
    before = sorted(copy_of_labels.rglob("*"))
    with pytest.raises(RuntimeError, match=sentence):
        plan_and_preprocess(500, ["2d"], **options)
    assert sorted(copy_of_labels.rglob("*")) == before

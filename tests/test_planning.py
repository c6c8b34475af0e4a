"""Planning and preprocessing of a group, beside stock nnU-Net, once and again."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blosc2
import numpy as np
import pytest
import tifffile
import torch
from conftest import LABELS, draw_batches, load_plans, make_trainer, shrink_networks
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io
from toy import (
    Planned,
    contents,
    copy_planned,
    held_elsewhere,
    lock_elsewhere,
    plan,
    preprocessed,
    refusal,
    require_ready,
    rewrite,
    set_folders,
    stop_before_planning,
    use_threads,
    write_toy,
)
from toy import write_json as change_json

from nnunetv2_semicml.command_line import run_plan_and_preprocess
from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.data.phantom import write_phantom_dataset
from nnunetv2_semicml.ext_trainers import semicml_trainers
from nnunetv2_semicml.planning import plan_and_preprocess as planning
from nnunetv2_semicml.planning import preprocess
from nnunetv2_semicml.planning.shared_plans import next_command
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSupervisedEMA import nnUNetTrainerSupervisedEMA

FLAIR, T1 = "Dataset501_Labels_FLAIR", "Dataset502_Labels_T1"
GROUP, TOY_T1, TOY_T2 = "Dataset500_Toy", "Dataset501_Toy_T1", "Dataset502_Toy_T2"


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """In the place of processes; regions_group is planned with them."""
    use_threads(monkeypatch)


def read(file):
    return json.loads(Path(file).read_text())


def test_each_modality_is_an_ordinary_dataset(labels_group):
    assert [m.dataset_name for m in labels_group.modalities] == ["Dataset501_Labels_FLAIR", "Dataset502_Labels_T1"]
    assert not list(Path(os.environ["nnUNet_raw"]).glob("Dataset50[12]*"))  # nothing is written there
    for modality in labels_group.modalities:
        own = read(preprocessed(modality.dataset_name) / "dataset.json")
        assert own["channel_names"] == {"0": modality.name}
        assert own["numTraining"] == 5
        assert "dataset" not in own  # a list of files would travel with the model
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
    group = plan(500, ["2d"], "nnUNetPlannerResEncM")
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
    monkeypatch.setattr(planning, "preprocess_configuration", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan(500, ["2d"])
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

    group = plan(500, ["3d_lowres"])
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


# bad input


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
        (None, {"modalities": ["PET"]}, r"--modalities: found PET; expected one of FLAIR, T1"),
        (None, {"modality_ids": [600]}, r"--modality_ids: found \[600\]; expected 2 different ids, for FLAIR, T1"),
        (
            None,
            {"modality_ids": [500, 600]},
            r"dataset id 500: found that Dataset500_Labels has it; expected a free id",
        ),
        (None, {"modality_ids": [777, 600]}, r"dataset id 777: found that Dataset777_Taken has it"),
        (keep_labeled(4), {}, r"labelsTr: found 4 labeled cases with FLAIR; expected at least 5, .*splits_final.json"),
        (write_splits, {}, r"splits_final.json: found no case under 'val' in fold 0; expected a JSON list"),
        (None, {"num_processes": [1, 2, 3]}, r"option -np: found 3 numbers for 2 configurations"),
        (None, {"planner_name": "NoPlanner"}, r"option -pl: found NoPlanner; expected an experiment planner"),
        (None, {"fingerprint_extractor_name": "Own"}, r"option -fpe: found Own; expected a fingerprint extractor"),
        (None, {"keep_plans": True}, r"Dataset500_Labels: found no finished preprocessing; expected one"),
        (None, {"keep_plans": True, "one_modality": True}, r"--keep_plans: found options about modalities"),
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
        plan(500, ["2d", "3d_fullres"], **options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("nnUNet_raw", None, "environment variable nnUNet_raw: found nothing; expected a folder"),
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
        plan(500)


def test_training_without_results_folder_is_refused(labels_group, monkeypatch):
    monkeypatch.delenv("nnUNet_results", raising=False)
    with pytest.raises(RuntimeError, match="environment variable nnUNet_results: found nothing; expected a folder"):
        make_trainer(LABELS, "2d")


# single modalities


def test_dataset_with_one_channel_is_planned_where_it_is(nnunet_folders, results, monkeypatch):
    """And trained by a method that needs one modality."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    raw = write_phantom_dataset(
        Path(os.environ["nnUNet_raw"]), 530, "Single", 5, 2, 1, shape=(24, 24, 24), modalities=("T1",)
    )
    with pytest.raises(RuntimeError, match=r"--modality_ids: found \[531\]; expected none, since Dataset530_S"):
        plan(530, ["2d"], modality_ids=[531])
    group = plan(530, ["2d"])
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
    group = plan(500, ["2d"], modalities=["T1"])
    (modality,) = group.modalities
    assert (modality.name, modality.channels, modality.dataset_name) == ("T1", [1], "Dataset502_Labels_T1")
    assert ModalityGroup.load("Dataset502_Labels_T1").is_single
    assert not group.is_single


@pytest.mark.parametrize(
    ("dataset", "trainer"), [(LABELS, "nnUNetTrainerSemiCMLPlus"), (FLAIR, "nnUNetTrainerBCPPlus")]
)
def test_next_command_names_what_is_recommended(groups, dataset, trainer):
    """And what is there."""
    command = next_command(ModalityGroup.load(dataset), "nnUNetPlans", "2d")
    assert command == f"nnUNetv2_train {dataset[7:10]} 2d 0 -tr {trainer}"
    assert trainer in semicml_trainers.__all__


# plans of another dataset


def test_more_labels_are_planned_like_few(copy_of_labels, monkeypatch, capsys):
    """Geometry and normalization are the other dataset's, voxel for voxel; nothing is unlabeled."""
    raw = copy_of_labels / "nnUNet_raw"
    shutil.copytree(raw / LABELS, raw / "Dataset540_Full", ignore=shutil.ignore_patterns("imagesUn"))
    with pytest.raises(RuntimeError, match="imagesUn: found no image"):
        plan(540, ["2d"])
    group = plan(540, ["2d"], plans_of=500)
    assert group.unlabeled == []
    assert "Next, e.g.: nnUNetv2_train 540 2d 0 -tr nnUNetTrainerSupervisedEMA\n" in capsys.readouterr().out
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
    with pytest.raises(
        RuntimeError, match=r"found 0 unlabeled cases with FLAIR; .* nnUNetTrainerSupervisedEMA or stock nnU"
    ):
        make_trainer("Dataset541_Full_FLAIR", "2d", nnUNetTrainerMeanTeacher)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)
    for dataset in ("Dataset541_Full_FLAIR", "Dataset540_Full"):  # the upper bound of a method that deploys an average
        trainer = make_trainer(dataset, "2d", nnUNetTrainerSupervisedEMA)
        trainer.run_training()
        assert all((Path(t.output_folder) / "checkpoint_final.pth").is_file() for t in trainer.trainers)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"plans_of": 999}, r"--plans_of: found no dataset with the id 999"),
        (
            {"plans_of": 500, "modalities": ["T1"]},
            r"found Dataset500_Labels with the modalities FLAIR \(channels 0\), T1 \(channels 1\); expected a",
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
        plan(500, ["2d"], **options)
    assert sorted(copy_of_labels.rglob("*")) == before


# modalities of several channels, beside stock nnU-Net


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """An empty nnUNet_raw."""
    return set_folders(monkeypatch, tmp_path)


def test_a_modality_of_two_channels_is_planned_and_preprocessed_as_stock_nnunet_does(raw):
    """Beside an ordinary dataset that is made of these channels by hand."""
    folder = write_toy(raw, channels=("T1", "PET", "CT"))
    # without a margin that is zero, nnU-Net would use no mask; PET has none, so that the crops differ
    rewrite(folder, "images*/*_000[02].*", lambda voxels, affine: (with_margin(voxels), affine))
    group = plan(500, ["2d"], modalities=["MR=CT,T1", "PET"])
    hand = raw / "Dataset700_Hand"
    shutil.copytree(folder / "labelsTr", hand / "labelsTr")
    (hand / "imagesTr").mkdir()
    for case in group.labeled:
        for own, channel in enumerate([2, 0]):
            name = f"imagesTr/{case}_000{{}}.nii.gz"
            shutil.copy(folder / name.format(channel), hand / name.format(own))
    shutil.copy(folder / "dataset.json", hand)
    change_json(hand, channel_names={"0": "CT", "1": "T1"})
    DatasetFingerprintExtractor(700, 1).run()
    expected = ExperimentPlanner(700).plan_experiment()
    (own, dataset_json), _ = group.load_plans("nnUNetPlans")
    key = "foreground_intensity_properties_per_channel"
    assert own[key] == read(preprocessed(hand.name) / "nnUNetPlans.json")[key]
    for key, value in {
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
        "use_mask_for_norm": [False, True],
    }.items():
        assert own["configurations"]["2d"][key] == expected["configurations"]["2d"][key] == value
    assert dataset_json["channel_names"] == {"0": "CT", "1": "T1"}

    case = group.labeled[0]
    manager = PlansManager(own)
    images = [str(file) for file in sorted((hand / "imagesTr").glob(f"{case}_*"))]
    data, seg, _ = DefaultPreprocessor(verbose=False).run_case(
        images, str(hand / f"labelsTr/{case}.nii.gz"), manager, manager.get_configuration("2d"), dataset_json
    )
    stored = preprocessed(group.modalities[0].dataset_name) / "nnUNetPlans_2d" / case
    assert np.array_equal(blosc2.open(f"{stored}.b2nd")[:], data)
    assert np.array_equal(blosc2.open(f"{stored}_seg.b2nd")[:], seg)


def with_margin(voxels):
    inside = np.zeros_like(voxels)
    inside[3:-3, 3:-3] = voxels[3:-3, 3:-3]
    return inside


def test_color_beside_depth_is_planned_on_color_and_trained(raw, monkeypatch, capsys):
    """nnU-Net reads no file of three channels together with one of one."""
    folder = raw / "Dataset600_Pictures"
    random = np.random.default_rng(0)
    for i in range(8):
        kind = "Tr" if i < 5 else "Un"
        mask = np.zeros((32, 40), np.uint8)
        mask[8:20, 10:30] = 1
        pictures = {f"images{kind}/P{i}_0000": random.integers(1, 255, (32, 40, 3), np.uint8)}
        pictures[f"images{kind}/P{i}_0001"] = random.integers(1, 255, (32, 40), np.uint8)
        for name, picture in {**pictures, **({f"labelsTr/P{i}": mask} if kind == "Tr" else {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            io.imsave(folder / f"{name}.png", picture, check_contrast=False)
    change_json(
        folder,
        channel_names={"0": "R", "1": "G", "2": "B", "3": "depth"},
        labels={"background": 0, "lesion": 1},
        numTraining=5,
        file_ending=".png",
    )
    group = plan(600, ["2d"])
    output = capsys.readouterr().out
    assert "INFO: nnU-Net does not read images of P0 at once (3 and 1 channels in a file)" in output
    assert [m.dataset_name for m in group.modalities] == ["Dataset601_Pictures_R+G+B", "Dataset602_Pictures_depth"]
    numbers = [
        len(plans["configurations"]["2d"]["normalization_schemes"]) for plans, _ in group.load_plans("nnUNetPlans")
    ]
    assert numbers == [3, 1]
    rows = [" ".join(line.split()) for line in output.splitlines()]
    assert "R+G+B Dataset601_Pictures_R+G+B _0000 R + G + B 5 3" in rows
    assert "depth Dataset602_Pictures_depth _0000 depth 5 3" in rows
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    shrink_networks(group)
    trainer = make_trainer(folder.name, "2d")
    trainer.initialize()
    (batch,) = draw_batches(trainer, 1)
    assert torch.isfinite(torch.tensor(trainer.train_step(batch)["loss"]))


def test_tiff_with_spacing_beside_it(raw):
    folder = raw / GROUP
    random = np.random.default_rng(0)
    for i in range(8):
        kind = "Tr" if i < 5 else "Un"
        (folder / f"images{kind}").mkdir(parents=True, exist_ok=True)
        (folder / "labelsTr").mkdir(exist_ok=True)
        (folder / f"images{kind}/P{i}.json").write_text('{"spacing": [3, 0.7, 0.7]}')
        for channel in range(2):
            voxels = random.normal(100, 10, (12, 24, 28)).astype(np.float32)
            tifffile.imwrite(folder / f"images{kind}/P{i}_000{channel}.tif", voxels, photometric="minisblack")
        if kind == "Tr":
            mask = np.zeros((12, 24, 28), np.uint8)
            mask[4:8, 8:16, 8:20] = 1
            tifffile.imwrite(folder / f"labelsTr/P{i}.tif", mask, photometric="minisblack")
    change_json(
        folder,
        channel_names={"0": "T1", "1": "T2"},
        labels={"background": 0, "cell": 1},
        numTraining=5,
        file_ending=".tif",
    )
    plan(500, ["2d"])
    assert read(preprocessed(GROUP) / "dataset_fingerprint.json")["spacings"] == [[3, 0.7, 0.7]] * 5
    require_ready()
    (folder / "imagesUn/P7.json").write_text('{"spacing": [3, 0.8, 0.8]}')
    assert refusal(require_ready).startswith(f"{folder}/imagesUn/P7.json: found that it has changed")


# cases that lack modalities


def test_incomplete_cases(raw, capsys):
    """Geometry from complete cases alone, each modality's intensities from all of its own."""
    folder = write_toy(raw, labeled=9, unlabeled=5)
    for name in ("imagesTr/P00_0000", "imagesTr/P01_0001", "imagesUn/P09_0001"):
        (folder / f"{name}.nii.gz").unlink()
    rewrite(folder, "*/P00*", lambda voxels, affine: (voxels, np.diag([0.5, 0.5, 3, 1])))
    group = plan(500, ["2d"])
    output = capsys.readouterr().out
    assert "9 labeled cases: 7 with T1 + T2, 1 with T1, 1 with T2\n" in output
    assert "5 unlabeled cases: 4 with T1 + T2, 1 with T1\n" in output
    assert "on its 7 labeled cases with all modalities" in output
    assert len(read(preprocessed(GROUP) / "dataset_fingerprint.json")["spacings"]) == 7
    of_t2 = read(preprocessed(TOY_T2) / "dataset_fingerprint.json")["spacings"]
    assert sorted(of_t2) == [[3, 0.5, 0.5]] + [[3, 1, 1]] * 7
    assert [read(preprocessed(name) / "dataset.json")["numTraining"] for name in (GROUP, TOY_T1, TOY_T2)] == [9, 8, 8]
    assert set(group.modalities[0].labeled) == {f"P{i:02d}" for i in range(9)} - {"P00"}
    whole, of_t1, of_t2 = (read(preprocessed(name) / "splits_final.json") for name in (GROUP, TOY_T1, TOY_T2))
    for fold, first, second in zip(whole, of_t1, of_t2, strict=True):
        for part in ("train", "val"):
            assert first[part] == [case for case in fold[part] if case != "P00"]
            assert second[part] == [case for case in fold[part] if case != "P01"]
    for name, missing in ((TOY_T1, "P00"), (TOY_T2, "P01")):
        for suffix in ("nnUNetPlans_2d", "gt_segmentations"):
            assert missing not in {file.name.split(".")[0] for file in (preprocessed(name) / suffix).iterdir()}
        require_ready(name)
    require_ready()


def test_cases_that_are_left_out_are_named(raw, monkeypatch, capsys):
    folder = write_toy(raw, channels=("T1", "T1ce", "T2"), shape=(9, 10, 8), labeled=7)
    for name in (
        "imagesTr/P00_0000",
        "imagesTr/P00_0002",
        "imagesTr/P01_0001",
        "imagesUn/P07_0000",
        "imagesUn/P07_0002",
    ):
        (folder / f"{name}.nii.gz").unlink()
    stop_before_planning(monkeypatch)
    with pytest.raises(Planned):
        plan(500, ["2d"], modalities=["MR=T1,T1ce", "T2"])
    output = capsys.readouterr().out
    assert "imagesTr: 1 cases have none of these modalities and are left out: P00\n" in output
    assert "imagesTr: 2 cases have some files of MR and count as without it." in output
    assert "imagesUn: 1 cases have none of these modalities and are left out: P07\n" in output


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        ({"imagesUn/P0[6-9]_0000", "imagesUn/P10_0001"}, "found 1 unlabeled case with T1 and T2; expected at least 2"),
        ({"imagesTr/P0[12]_0001"}, "labelsTr: found 4 labeled cases with T2; expected at least 5"),
        ({"imagesTr/*_0001"}, "imagesTr: found no labeled case with T1 and T2; expected at least one that has all"),
        ({"imagesTr/P03_*"}, "imagesTr/P03_0000.nii.gz: found no such file; expected a label and images of every"),
    ],
)
def test_too_little_in_common(raw, lacking, sentence):
    folder = write_toy(raw, shape=(9, 10, 8))
    for pattern in lacking:
        for file in folder.glob(f"{pattern}.nii.gz"):
            file.unlink()
    before = contents(raw.parent)
    assert sentence in refusal(plan, 500, ["2d"])
    assert contents(raw.parent) == before


# names and places


def test_names_that_contain_others(raw):
    """Prefixes, blanks, dots, umlauts, and names that end like a channel."""
    folder = write_toy(raw)
    old = sorted(file.name[:3] for file in folder.glob("images*/*_0000.nii.gz"))
    new = ["a", "a_0000", "a b", "a.b", "Müller", "ab", "u", "u_0001", "u v", "u.b2nd", "ü", "uv"]
    for before, after in zip(old, new, strict=True):
        for file in folder.glob(f"*/{before}[_.]*"):
            file.rename(file.with_name(after + file.name[3:]))
    group = plan(500, ["2d"])
    assert (group.labeled, group.unlabeled) == (sorted(new[:6]), sorted(new[6:]))
    for name in (TOY_T1, TOY_T2):
        for suffix, cases in (("nnUNetPlans_2d", new[:6]), ("nnUNetPlans_2d_unlabeled", new[6:])):
            assert {f.name for f in (preprocessed(name) / suffix).glob("*.pkl")} == {f"{case}.pkl" for case in cases}
    require_ready()


def test_labeled_files_elsewhere(raw):
    """dataset.json lists them, in nnU-Net's own way."""
    folder = write_toy(raw)
    elsewhere = raw.parent / "archive"
    elsewhere.mkdir()
    for name in ("imagesTr", "labelsTr"):
        (folder / name).rename(elsewhere / name)
    change_json(
        folder,
        dataset={
            f"P{i:02d}": {
                "images": [f"../../archive/imagesTr/P{i:02d}_000{channel}.nii.gz" for channel in range(2)],
                "label": f"{elsewhere}/labelsTr/P{i:02d}.nii.gz",
            }
            for i in range(6)
        },
    )
    plan(500, ["2d"])
    require_ready()
    for name in (TOY_T1, TOY_T2):
        assert "dataset" not in read(preprocessed(name) / "dataset.json")
    rewrite(elsewhere, "labelsTr/P01.*", lambda voxels, affine: (np.roll(voxels, 2, 0), affine))
    assert "labelsTr/P01.nii.gz: found that it has changed since" in refusal(require_ready)


# again: --keep_plans, --no_pp and other options


@pytest.fixture
def toy(tmp_path, tmp_path_factory, monkeypatch):
    """The raw folder of a dataset that is planned and preprocessed for 2d, with P00–P05 labeled, P06–P11 not."""
    return copy_planned(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "planned_toy")


KEPT = [f"{n}/{f}" for n in (GROUP, TOY_T1, TOY_T2) for f in ("nnUNetPlans.json", "dataset_fingerprint.json")]


def changes_of(command):
    """Preprocessed files that a command wrote or removed, as dataset number, folder and case; plans must stay."""
    root = preprocessed("")

    def state():
        files = {str(file.relative_to(root)): value for file, value in contents(root).items() if file.is_file()}
        return {name: value for name, value in files.items() if "nnUNetPlans_" in name or name in KEPT}

    before = state()
    command()
    after = state()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {re.sub(r"Dataset(\d+).*nnUNetPlans_(\w+)/([^_.]+).*", r"\1 \2 \3", name) for name in changed}


def keep():
    plan(500, keep_plans=True)


def of_both(*cases):
    return {f"{number} {case}" for number in (501, 502) for case in cases}


def add_case(folder, name, labeled):
    kind = "Tr" if labeled else "Un"
    for channel in range(2):
        shutil.copy(folder / f"imagesTr/P00_000{channel}.nii.gz", folder / f"images{kind}/{name}_000{channel}.nii.gz")
    rewrite(folder, f"images{kind}/{name}_*", lambda voxels, affine: (voxels[::-1], affine))
    if labeled:
        shutil.copy(folder / "labelsTr/P00.nii.gz", folder / f"labelsTr/{name}.nii.gz")
        change_json(folder, numTraining=7)


def test_nothing_is_done_again_for_nothing(toy, capsys):
    assert changes_of(keep) == set()
    assert "2d: 24 preprocessed images stay, 0 are new or have changed." in capsys.readouterr().out


def test_a_new_unlabeled_case(toy):
    add_case(toy, "P20", labeled=False)
    assert changes_of(keep) == of_both("2d_unlabeled P20")
    require_ready()


def test_a_new_labeled_case_joins_a_fold(toy):
    before = read(preprocessed(GROUP) / "splits_final.json")
    add_case(toy, "P20", labeled=True)
    assert changes_of(keep) == of_both("2d P20")
    after = read(preprocessed(GROUP) / "splits_final.json")
    assert sum("P20" in fold["val"] for fold in after) == 1
    assert [[c for c in fold["val"] if c != "P20"] for fold in after] == [fold["val"] for fold in before]
    assert (preprocessed(TOY_T1) / "gt_segmentations/P20.nii.gz").is_file()
    require_ready()


def test_a_corrected_label(toy):
    rewrite(toy, "labelsTr/P02.*", lambda voxels, affine: (np.roll(voxels, 2, 0), affine))
    file = preprocessed(TOY_T1) / "nnUNetPlans_2d/P02_seg.b2nd"
    before = blosc2.open(str(file))[:].copy()
    assert changes_of(keep) == of_both("2d P02")
    after = blosc2.open(str(file))[:]
    assert not np.array_equal(before, after)
    assert np.array_equal(np.roll(before, 2, 3), after)  # the last axis of an array is the first of a NIfTI
    copied = (preprocessed(TOY_T2) / "gt_segmentations/P02.nii.gz").read_bytes()
    assert copied == (toy / "labelsTr/P02.nii.gz").read_bytes()
    require_ready()


def test_a_replaced_image_of_one_modality(toy):
    rewrite(toy, "imagesTr/P02_0001.*", lambda voxels, affine: (voxels + 1, affine))
    assert changes_of(keep) == {"502 2d P02"}
    require_ready()


def test_cases_that_are_gone(toy):
    for file in [*toy.glob("*/P05*"), *toy.glob("*/P11*"), *toy.glob("*/P10_0001*")]:
        file.unlink()
    change_json(toy, numTraining=5)
    assert changes_of(keep) == of_both("2d P05", "2d_unlabeled P11") | {"502 2d_unlabeled P10"}
    assert not list(preprocessed("").glob("*/gt_segmentations/P05*"))
    assert "P05" not in (preprocessed(GROUP) / "splits_final.json").read_text()
    require_ready()


def test_an_interrupted_run_goes_on(toy, monkeypatch):
    """Killed at the second of three cases: refused by training until it is repeated, and nothing else is done again."""
    for name in ("P20", "P21"):
        add_case(toy, name, labeled=False)
        rewrite(toy, f"imagesUn/{name}_*", lambda voxels, affine, name=name: (voxels + int(name[1:]), affine))
    rewrite(toy, "labelsTr/P02.*", lambda voxels, affine: (np.roll(voxels, 2, 0), affine))

    class Interrupted(ThreadPoolExecutor):
        done = 0

        def __init__(self, number, context):
            super().__init__(number)

        def submit(self, *args):
            if self.done == 2:
                raise KeyboardInterrupt
            self.done += 1
            return super().submit(*args)

    executor = preprocess.ProcessPoolExecutor
    monkeypatch.setattr(preprocess, "ProcessPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        keep()
    assert "found plans, labels or cases that have changed since nnUNetPlans_2d was preprocessed" in refusal(
        require_ready
    )
    monkeypatch.setattr(preprocess, "ProcessPoolExecutor", executor)
    assert changes_of(keep) <= of_both("2d P02", "2d_unlabeled P20", "2d_unlabeled P21")
    require_ready()


def test_another_configuration_is_added(toy):
    plan(500, ["3d_fullres"], keep_plans=True)
    for configuration in ("2d", "3d_fullres"):
        require_ready(configuration=configuration)


def test_plans_to_keep_are_those_that_there_are(toy):
    (preprocessed(GROUP) / "nnUNetPlans.json").rename(preprocessed(GROUP) / "myPlans.json")
    assert refusal(plan, 500, keep_plans=True) == (
        f"{preprocessed(GROUP)}/nnUNetPlans.json: found no such file; expected the plans to keep; there are myPlans. "
        "Name them with -overwrite_plans_name, or their planner with -pl."
    )


def test_channels_are_those_that_were_planned(toy):
    change_json(toy, channel_names={"0": "T1"})
    for file in toy.glob("images*/*_0001*"):
        file.unlink()
    assert refusal(plan, 500, keep_plans=True) == (
        f"{toy}/dataset.json: found the channels T1; expected those that were planned: T1 (channels 0), T2 (channels "
        "1). Correct channel_names, or leave --keep_plans out to plan anew."
    )


def test_plan_without_preprocessing(raw):
    write_toy(raw)
    group = plan(500, ["2d"], preprocess=False)
    assert group.preprocessed == {}
    assert not list(preprocessed("").glob("*/nnUNetPlans_*"))
    plans = read(preprocessed(GROUP) / "nnUNetPlans.json")
    assert "found nothing preprocessed; expected nnUNetPlans_2d" in refusal(require_ready)
    plan(500, ["2d"])
    assert read(preprocessed(GROUP) / "nnUNetPlans.json") == plans
    require_ready()
    plan(500, ["2d"], preprocess=False)  # the same plans once more: what was done stays valid
    require_ready()


def test_own_fingerprint_extractor(raw, monkeypatch):
    seen = []

    class OwnExtractor(DatasetFingerprintExtractor):
        def run(self, overwrite_existing=False):
            seen.append(self.dataset_name)
            return super().run(overwrite_existing)

    find = planning.recursive_find_python_class
    monkeypatch.setattr(
        planning, "recursive_find_python_class", lambda *a, **k: OwnExtractor if "OwnExtractor" in a else find(*a, **k)
    )
    write_toy(raw)
    plan(500, ["2d"], fingerprint_extractor_name="OwnExtractor", preprocess=False)
    assert seen == [GROUP, TOY_T1, TOY_T2]


def test_several_datasets_by_ids_and_names(raw, monkeypatch, capsys):
    write_toy(raw)
    write_toy(raw, 600, "Other")
    command = ["nnUNetv2_semicml_plan_and_preprocess", "-d", "500", "Dataset600_Other", "-c", "2d", "-np", "1"]
    monkeypatch.setattr("sys.argv", [*command, "-npfp", "1", "--no_pp", "--one_modality"])
    run_plan_and_preprocess()
    lines = capsys.readouterr().out.splitlines()
    for name in (GROUP, "Dataset600_Other"):
        assert f"{name} is planned: 6 labeled cases: 6 with all; 6 unlabeled cases: 6 with all" in lines
        assert f"all {name} _0000 T1, _0001 T2 6 6" in [" ".join(line.split()) for line in lines]
    assert not [line for line in lines if line.startswith("Next")]  # nothing is preprocessed
    monkeypatch.setattr("sys.argv", [*command, "--modality_ids", "501", "502"])
    with pytest.raises(SystemExit):
        run_plan_and_preprocess()
    assert capsys.readouterr().err == (
        "Error: option --modality_ids: found it beside 2 datasets; expected one dataset. Plan each by itself.\n"
    )


# beside other processes


@pytest.mark.parametrize("name", [GROUP, TOY_T1, TOY_T2])
def test_nothing_is_planned_during_a_training(toy, name):
    before = contents(preprocessed(""))
    with held_elsewhere(preprocessed(name), "shared") as (process, _):
        for options in ({"keep_plans": True}, {"configurations": ["2d"]}, {"modalities": ["T2", "T1"]}):
            assert refusal(plan, 500, **options).startswith(
                f"{preprocessed(name)}: found another process at work there (holding, process {process.pid} on "
            )
    assert contents(preprocessed("")) == before
    keep()


def test_no_plans_are_taken_of_what_is_being_planned(copy_of_labels):
    """It may have plans of one modality from before and of the other from now."""
    shutil.copytree(copy_of_labels / "nnUNet_raw" / LABELS, copy_of_labels / "nnUNet_raw" / "Dataset540_Full")
    with held_elsewhere(preprocessed(LABELS), "exclusive") as (process, _):
        assert refusal(plan, 540, ["2d"], plans_of=500).startswith(
            f"{preprocessed(LABELS)}: found another process at work there (holding, process {process.pid} on "
        )
    assert not [*preprocessed("").glob("Dataset54*")]
    with held_elsewhere(preprocessed(LABELS), "shared"):  # a training, which changes nothing there
        plan(540, ["2d"], plans_of=500, preprocess=False)


def test_all_datasets_are_locked_while_they_are_written(raw, monkeypatch):
    write_toy(raw)
    refused = []

    def preprocess_configuration(*_):
        for name in (GROUP, TOY_T1, TOY_T2):
            with lock_elsewhere(preprocessed(name), "shared") as process:
                refused.append(process.wait(60))

    monkeypatch.setattr(planning, "preprocess_configuration", preprocess_configuration)
    plan(500, ["2d"])
    assert refused == [1, 1, 1]
    for name in (GROUP, TOY_T1, TOY_T2):
        with held_elsewhere(preprocessed(name), "exclusive"):
            pass


def test_two_plannings_do_not_take_one_id(raw, monkeypatch):
    """The other one, of Dataset400, begins between the choice of an id and its first file."""
    write_toy(raw, shape=(9, 10, 8))
    choose = planning.choose_modalities

    def choose_and_be_late(*args):
        chosen = choose(*args)
        preprocessed("Dataset501_Other_T1").mkdir(exist_ok=True)
        return chosen

    monkeypatch.setattr(planning, "choose_modalities", choose_and_be_late)
    assert "Dataset501_Toy_T1, Dataset502_Toy_T2: found that another planning has just taken their ids" in refusal(
        plan, 500, ["2d"]
    )
    assert [f.name for f in preprocessed("").iterdir()] == ["Dataset501_Other_T1"]


def test_ids_of_a_planning_that_was_killed_are_used_again(raw):
    write_toy(raw)
    for name in (GROUP, TOY_T1, TOY_T2):
        preprocessed(name).mkdir()
        (preprocessed(name) / ".lock").touch()
    assert [m.dataset_name for m in plan(500, ["2d"], preprocess=False).modalities] == [TOY_T1, TOY_T2]


def test_fingerprints_are_extracted_again_if_they_may_be_of_other_cases(toy, capsys):
    def extracted():
        before = {name: (preprocessed(name) / "dataset_fingerprint.json").stat().st_mtime_ns for name in names}
        plan(500, ["2d"], preprocess=False)
        return [n for n in names if (preprocessed(n) / "dataset_fingerprint.json").stat().st_mtime_ns != before[n]]

    names = (GROUP, TOY_T1, TOY_T2)
    assert extracted() == []
    (preprocessed(TOY_T1) / "dataset_fingerprint.json").write_text("{")
    assert extracted() == [TOY_T1]
    (preprocessed(TOY_T2) / "dataset_fingerprint.json").touch()  # as by a run that was killed before it was planned
    assert extracted() == [TOY_T2]
    assert extracted() == []


@pytest.mark.parametrize("name", ["../../evil", "/evil", ".evil", "a/b", "a\0"])
def test_plans_are_called_by_sound_names(toy, name):
    before = contents(preprocessed("").parent)
    sentence = f"found the names {name!r}; expected names for files: up to 200 bytes that can be printed, no / or "
    assert f"option -overwrite_plans_name: {sentence}" in refusal(plan, 500, overwrite_plans_name=name)
    plans = read(preprocessed(GROUP) / "nnUNetPlans.json")
    plans["configurations"]["2d"]["data_identifier"] = name
    (preprocessed(GROUP) / "nnUNetPlans.json").write_text(json.dumps(plans))
    before = contents(preprocessed("").parent)
    assert f"nnUNetPlans.json: {sentence}" in refusal(plan, 500, keep_plans=True)
    assert contents(preprocessed("").parent) == before


def test_links_are_replaced_and_what_they_lead_to_stays(toy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True)
    links = ("gt_segmentations/P00.nii.gz", "nnUNetPlans_2d/P00.b2nd", "nnUNetPlans_2d/folder", "dataset.json")
    for link in links:
        path = preprocessed(TOY_T1) / link
        path.unlink(missing_ok=True)
        target = elsewhere / path.name
        if path.name != "folder":
            target.write_text("precious")
        path.symlink_to(target)
    before = contents(elsewhere)
    plan(500, ["2d"])
    require_ready()
    assert contents(elsewhere) == before
    assert not any(path.is_symlink() for path in preprocessed(TOY_T1).rglob("*"))


def test_a_full_disk_is_one_sentence_and_the_command_can_be_repeated(raw):
    """A limit on the size of files stands for it: below that of preprocessed images, in processes of their own."""
    write_toy(raw)
    size = 30_000
    code = (
        f"import resource, sys, pytest; sys.path.append({str(Path(__file__).parent)!r}); import toy\n"
        "import nnunetv2_semicml.planning.plan_and_preprocess\n"
        "from nnunetv2_semicml.command_line import run_plan_and_preprocess\n"
        "toy.draw_few_intensities(pytest.MonkeyPatch())\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); run_plan_and_preprocess()"
    )
    options = ["-d", "500", "-c", "2d", "-np", "1", "-npfp", "1"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"Error: {preprocessed(TOY_T1)}/nnUNetPlans_2d")
    assert last.endswith(
        ".b2nd: found that it cannot be written (blosc2 does not say why; probably the disk is full); expected enough "
        "space and the right to write there. Make room, and repeat the command."
    )
    assert "modalities.json: found no such file" in refusal(require_ready)
    plan(500, ["2d"])
    require_ready()

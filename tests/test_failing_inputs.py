"""Datasets as users have had them, and what each is told: one sentence, or that it works."""

import gzip
import json
import os
import re

import nibabel as nib
import numpy as np
import pytest
from toy import (
    AFFINE,
    Planned,
    contents,
    copy_planned,
    plan,
    preprocessed,
    refusal,
    require_ready,
    rewrite,
    save,
    set_folders,
    stop_before_planning,
    use_threads,
    write_json,
    write_toy,
)

from nnunetv2_semicml.command_line import run_plan_and_preprocess
from nnunetv2_semicml.errors import UserError

SMALL = (9, 10, 8)
CASES = [f"P{i:02d}" for i in range(6)]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """An empty nnUNet_raw; processes are threads."""
    use_threads(monkeypatch)
    return set_folders(monkeypatch, tmp_path)


# faults


def toy(**options):
    return lambda raw: write_toy(raw, **{"shape": SMALL, **options})


def changed(change, **options):
    """A sound dataset with a change of its folder."""

    def write(raw):
        folder = toy(**options)(raw)
        change(folder)
        return folder

    return write


def with_images(pattern, change, **options):
    """A sound dataset with other voxels or affines in some files."""
    return changed(lambda folder: rewrite(folder, pattern, change), **options)


def with_scaled_labels(slope):
    """Labels stored as 0 and 255 with a factor in the header, which nibabel would not write like that."""

    def change(folder):
        for file in folder.glob("labelsTr/*.nii.gz"):
            voxels = (np.asanyarray(nib.load(file).dataobj) * 255).astype(np.uint8)
            header = nib.Nifti1Image(voxels, AFFINE).header.copy()
            for key, value in {"scl_slope": slope, "scl_inter": 0, "vox_offset": 352, "magic": b"n+1"}.items():
                header[key] = value
            with gzip.open(file, "wb") as stream:
                stream.write(header.binaryblock + bytes(4) + voxels.tobytes(order="F"))

    return changed(change)


def with_case_renamed(old, new):
    return changed(lambda folder: [f.rename(f.with_name(f.name.replace(old, new))) for f in folder.glob(f"*/{old}*")])


ONE_OUT = [{"train": [c for c in CASES if c != v], "val": [v]} for v in CASES]


def with_folds(folds):
    return changed(lambda folder: (folder / "splits_final.json").write_text(json.dumps(folds)))


def with_empty_labels(number):
    def change(folder):
        for case in CASES[:number]:
            rewrite(folder, f"labelsTr/{case}.*", lambda voxels, affine: (np.zeros_like(voxels), affine))
        with_first_case_validating(folder)

    return changed(change)


def with_first_case_validating(folder):
    (folder / "splits_final.json").write_text(json.dumps([{"train": CASES[1:], "val": CASES[:1]}]))


def with_hidden_files(folder):
    for file in list(folder.glob("*/*.nii.gz")):
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7Mac OS X")


def color(voxels, affine):
    values = np.clip(voxels, 0, 255).astype(np.uint8)
    return np.stack([values] * 3, -1).copy().view([(name, "u1") for name in "RGB"])[..., 0], affine


def with_affine(change):
    def changed_affine(voxels, affine):
        change(affine)
        return voxels, affine

    return changed_affine


def set_at(*places_and_values):
    """A change of some entries of an affine."""

    def change(affine):
        for row, column, value in places_and_values:
            affine[row, column] = value

    return with_affine(change)


def with_quaternions(folder):
    """A qform alone, a rotation by 180 degrees; that of P03 is longer than 1 by rounding."""
    for file in folder.glob("*/*.nii.gz"):
        image = nib.load(file)
        voxels, header = np.asanyarray(image.dataobj), image.header.copy()
        values = {"sform_code": 0, "qform_code": 1, "quatern_b": 0, "quatern_c": 0, "vox_offset": 352, "magic": b"n+1"}
        values["quatern_d"] = np.float32(1.000002) if "P03" in file.name else 1
        for key, value in values.items():
            header[key] = value
        with gzip.open(file, "wb") as stream:
            stream.write(header.binaryblock + bytes(4) + voxels.tobytes(order="F"))


def with_another_qform(folder):
    """A qform that contradicts the sform by a flip; ITK goes by the sform."""
    for file in folder.glob("images*/*_0001.nii.gz"):
        image = nib.load(file)
        other = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
        other.set_qform(image.affine * [-1, 1, 1, 1], code=1)
        other.set_sform(image.affine, code=1)
        nib.save(other, file)


def with_upper_case(cut_off):
    def change(folder):
        for file in list(folder.glob("*/*.nii.gz")):
            file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
        write_json(folder, file_ending=".NII.GZ")
        if cut_off:
            file = folder / "imagesUn/P08_0001.NII.GZ"
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return changed(change)


FOLDS = (
    ' expected a JSON list with {"train": [cases], "val": [other cases]} for every fold. Correct the file (nnU-Net\'s '
    "documentation/manual_data_splits.md), or delete it to have new folds made."
)
NAMES = " expected names that do not end in _seg, by which nnU-Net tells segmentations from images. "
ALL_OTHERS = " (and 5 more: P01, P02, P03, P04, P05)"
RESAMPLE = "Register and resample all images and the label of a case to one grid."

# what the user has -> how to write it, options, and the sentence without the path of the dataset
REFUSED = {
    "label with a factor in the header": (
        with_scaled_labels(0.003921568),
        {},
        "labelsTr/P00.nii.gz: found the label values 0.999999821; expected only the values of dataset.json: 0, 1. "
        "Store whole numbers, without a scale factor in the header." + ALL_OTHERS,
    ),
    "labeled case called _seg": (
        with_case_renamed("P01", "P00_seg"),
        {},
        f"imagesTr: found the case names P00_seg;{NAMES}Rename all files of these cases.",
    ),
    "unlabeled case called _seg": (
        with_case_renamed("P07", "P06_seg"),
        {},
        f"imagesUn: found the case names P06_seg;{NAMES}Rename all files of these cases.",
    ),
    "folds in an object": (
        with_folds({str(i): fold for i, fold in enumerate(ONE_OUT)}),
        {},
        f"splits_final.json: found an object;{FOLDS}",
    ),
    "folds that overlap": (
        with_folds([{"train": CASES, "val": CASES[:2]}]),
        {},
        f"splits_final.json: found training cases among the validation cases of fold 0: P00, P01;{FOLDS}",
    ),
    "fold without validation": (
        with_folds([{"train": CASES, "val": []}]),
        {},
        f"splits_final.json: found no case under 'val' in fold 0;{FOLDS}",
    ),
    "folds of file names": (
        with_folds([{part: [f"{c}.nii.gz" for c in cases] for part, cases in fold.items()} for fold in ONE_OUT]),
        {},
        "splits_final.json: found folds that lack P00 and name P00.nii.gz; expected the 6 labeled cases, by their "
        "names without channel and file ending. Correct the file, or delete it to have new folds made.",
    ),
    "no foreground": (
        with_empty_labels(6),
        {},
        "labelsTr: found no foreground in any of the 6 labels of cases with all modalities; expected some voxels of "
        "ball. Add a case that shows it, or correct the labels.",
    ),
    "two frames in a file": (
        with_images("imagesTr/P02_0001.*", lambda voxels, affine: (np.stack([voxels, voxels + 1], -1), affine)),
        {},
        "imagesTr/P02_0001.nii.gz: found 2 channels; expected one channel per file. Store every channel in its own "
        "file, or name all channels of such files in dataset.json.",
    ),
    "color in a file": (
        with_images("imagesTr/P02_0001.*", color),
        {},
        "imagesTr/P02_0001.nii.gz: found 3 values in every voxel (a color or vector image), which nnU-Net takes for "
        "slices; expected one value. Store every channel in its own file.",
    ),
    "five axes": (
        with_images("imagesTr/P02_0001.*", lambda voxels, affine: (np.stack([voxels[..., None]] * 3, -1), affine)),
        {},
        "imagesTr/P02_0001.nii.gz: found an unreadable file (RuntimeError: Unexpected number of dimensions: 5 in file "
        "imagesTr/P02_0001.nii.gz); expected an image. Replace the file.",
    ),
    "one unlabeled case": (
        toy(unlabeled=1),
        {},
        "imagesUn of Dataset500_Toy: found 1 unlabeled case with T1 and T2; expected at least 2, since methods compare "
        "the modalities of a case, and cases with each other. Add such cases, or plan one of these modalities alone "
        "(--modalities), or both as one.",
    ),
    "spacing rounded otherwise within a modality": (
        with_images("images*/*_0001.*", set_at((2, 2, 3.0003))),
        {"modalities": ["both=T1,T2"]},
        "imagesTr/P00_0001.nii.gz: found spacing [3.0003, 1.0, 1.0]; expected [3.0, 1.0, 1.0] as in P00_0000.nii.gz. "
        "No voxel lies elsewhere by that, but nnU-Net does not read such files of one modality together: copy the "
        "header of one file to the others, e.g. with SimpleITK's CopyInformation. "
        "(and 11 more: P01, P02, P03, P04, P05, P06, P07, P08, P09, P10, …)",
    ),
    "cut off": (
        with_upper_case(cut_off=True),
        {},
        "imagesUn/P08_0001.NII.GZ: found an unreadable file (a gzip stream without its end); expected an image. "
        "Replace the file.",
    ),
}


@pytest.mark.parametrize(("write", "options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_is_refused_before_anything_is_written(raw, monkeypatch, write, options, sentence):
    folder = write(raw)
    before = contents(raw.parent)
    with pytest.raises(UserError) as error:
        plan(500, ["2d"], **options)
    assert str(error.value).replace(f"{folder}/", "") == sentence
    where, found, expected, _ = error.value.parts
    assert "" not in (where, found, expected)
    assert found != expected
    assert contents(raw.parent) == before


ACCEPTED = {
    "sound": (toy(test=2), {}, "6 labeled cases: 6 with T1 + T2"),
    "label with a factor that nnU-Net's reader rounds to 1": (with_scaled_labels(0.0039215689), {}, ""),
    "class that no case shows": (
        changed(lambda folder: write_json(folder, labels={"background": 0, "ball": 1, "rare": 2})),
        {},
        "INFO: no labeled case shows rare: no network can learn it.",
    ),
    "validation case without foreground": (
        with_empty_labels(1),
        {},
        "WARNING: no validation case of fold 0 with all modalities shows foreground: its validation Dice says nothing, "
        "and methods that choose by it refuse this fold.",
    ),
    "one unlabeled case of one modality": (toy(unlabeled=1), {"one_modality": True}, "1 unlabeled case: 1 with all"),
    "directions differ by 1e-6": (with_images("images*/*_0001.*", set_at((0, 1, 1e-6), (1, 0, -1e-6))), {}, ""),
    "spacing differs by 1e-6": (with_images("images*/*_0001.*", set_at((2, 2, 3 + 1e-6))), {}, ""),
    "origin differs by 5e-3": (with_images("images*/*_0001.*", set_at((0, 3, 5e-3))), {}, ""),
    "qform against sform": (changed(with_another_qform), {}, ""),
    "hidden files": (
        changed(with_hidden_files),
        {},
        "imagesUn: 12 hidden files such as ._P06_0000.nii.gz are passed over; stock nnU-Net takes them for images of "
        "this dataset, so delete them if you train it on all channels at once.",
    ),
}


@pytest.mark.parametrize(("write", "options", "printed"), ACCEPTED.values(), ids=ACCEPTED)
def test_passes_all_checks(raw, monkeypatch, capsys, write, options, printed):
    write(raw)
    stop_before_planning(monkeypatch)
    with pytest.raises(Planned):
        plan(500, ["2d"], **options)
    output = capsys.readouterr().out
    assert printed in output
    if not printed:
        assert not re.search("INFO|WARNING", output)


# through planning and preprocessing

PLAN_SHAPE = (24, 28, 16)
SLICE = (24, 28, 1)
PLANNED = {
    "quaternion longer than 1": (changed(with_quaternions, shape=PLAN_SHAPE, affine=np.diag([-1.0, -1, 3, 1])), ["2d"]),
    "hidden files": (changed(with_hidden_files, shape=PLAN_SHAPE), ["2d"]),
    "id of four digits": (toy(shape=PLAN_SHAPE, number=1234), ["2d"]),
    "single slices": (toy(shape=SLICE), ["2d", "3d_fullres"]),
    "2D images": (
        with_images("*/*", lambda voxels, affine: (voxels[..., 0], affine), shape=SLICE),
        ["2d", "3d_fullres"],
    ),
    "images of one frame": (
        with_images("*/*", lambda voxels, affine: (voxels[..., None], affine), shape=PLAN_SHAPE),
        ["2d", "3d_fullres"],
    ),
    "images of one frame with plain labels": (
        with_images("images*/*", lambda voxels, affine: (voxels[..., None], affine), shape=PLAN_SHAPE),
        ["2d"],
    ),
    "spacing rounded otherwise": (
        with_images(
            "images*/*_0001.*",
            set_at((0, 0, 0.42969), (1, 1, 0.42969)),
            shape=PLAN_SHAPE,
            affine=np.diag([0.4297, 0.4297, 3, 1]),
        ),
        ["2d"],
    ),
    "spacing of another precision": (
        with_images("images*/*_0001.*", set_at((2, 2, 3.0003)), shape=PLAN_SHAPE),
        ["2d", "3d_fullres"],
    ),
    "upper case": (with_upper_case(cut_off=False), ["2d"]),
}


@pytest.mark.parametrize(("write", "configurations"), PLANNED.values(), ids=PLANNED)
def test_is_planned_and_preprocessed(raw, write, configurations):
    folder = write(raw)
    os.chmod(folder, 0o555)  # holds everybody but root back from writing there
    before = contents(raw)
    group = plan(folder.name, configurations)
    os.chmod(folder, 0o755)
    assert contents(raw) == before
    assert group.labeled == CASES
    assert len(group.unlabeled) == 6
    plans = json.loads((preprocessed(folder.name) / "nnUNetPlans.json").read_text())
    available = [c for c in configurations if c in plans["configurations"]]
    assert "2d" in available
    for configuration in available:
        require_ready(folder.name, configuration)


def test_channels_with_one_name_are_numbered_and_keep_its_normalization(raw):
    write_toy(raw, channels=("CT", "CT"))
    group = plan(500, ["2d"])
    assert [m.dataset_name for m in group.modalities] == ["Dataset501_Toy_CT_0", "Dataset502_Toy_CT_1"]
    for plans, dataset_json in group.load_plans("nnUNetPlans"):
        assert plans["configurations"]["2d"]["normalization_schemes"] == ["CTNormalization"]
        assert dataset_json["channel_names"] == {"0": "CT"}


def test_ids_that_nnunet_takes_for_another_are_left_out(raw, capsys):
    """nnU-Net looks at the beginnings of names: Dataset1235 would be one of the datasets with the id 123."""
    write_toy(raw, 1234)
    (raw / "Dataset123_Other").mkdir()
    group = plan(1234, ["2d"])
    assert [m.dataset_name for m in group.modalities] == ["Dataset1240_Toy_T1", "Dataset1241_Toy_T2"]
    assert "takes one of Dataset1234_Toy and Dataset123_Other for the other" in capsys.readouterr().out


@pytest.fixture
def planned(tmp_path, tmp_path_factory, monkeypatch):
    return copy_planned(monkeypatch, tmp_path, tmp_path_factory.getbasetemp() / "planned_toy")


def test_data_that_change_after_planning(planned):
    """Half the spacing in every header, and labels redrawn: refused, and planned anew with what there is now."""
    require_ready()
    rewrite(planned, "images*/*", lambda voxels, affine: (voxels, np.diag([0.5, 0.5, 3, 1])))
    rewrite(planned, "labels*/*", lambda voxels, affine: (np.roll(voxels, 4, 0), np.diag([0.5, 0.5, 3, 1])))
    assert refusal(require_ready) == (
        f"{planned}/imagesTr/P00_0000.nii.gz: found that it has changed since it was preprocessed; expected the images "
        "and labels that are trained on. Run nnUNetv2_semicml_plan_and_preprocess again; with --keep_plans it does "
        "only what changed."
    )
    group = plan(500, ["2d"])
    require_ready()
    for name in ("Dataset500_Toy", *(m.dataset_name for m in group.modalities)):
        fingerprint = json.loads((preprocessed(name) / "dataset_fingerprint.json").read_text())
        assert fingerprint["spacings"] == [[3, 0.5, 0.5]] * 6
    for modality in group.modalities:
        copies = preprocessed(modality.dataset_name) / "gt_segmentations"
        assert {f.name: f.read_bytes() for f in copies.iterdir()} == {
            f.name: f.read_bytes() for f in (planned / "labelsTr").iterdir()
        }


@pytest.mark.parametrize("edited", ["Dataset500_Toy", "Dataset501_Toy_T1"])
def test_folds_that_are_edited_in_one_dataset(planned, edited):
    """As nnU-Net's manual_data_splits.md describes; --keep_plans takes those of the group for all."""
    file = preprocessed(edited) / "splits_final.json"
    original = json.loads(file.read_text())
    file.write_text(json.dumps(original[1:]))
    assert refusal(require_ready) == (
        f"{preprocessed('Dataset501_Toy_T1')}/splits_final.json: found other folds; expected those of "
        f"{preprocessed('Dataset500_Toy')}/splits_final.json, without the cases that lack T1. Edit the latter, and let "
        "them be copied to the datasets of all modalities: nnUNetv2_semicml_plan_and_preprocess -d Dataset500_Toy "
        "--keep_plans"
    )
    if edited == "Dataset501_Toy_T1":
        assert refusal(require_ready, edited) == refusal(require_ready)  # nor is it trained alone
    plan(500, keep_plans=True)
    wanted = original[1:] if edited == "Dataset500_Toy" else original
    for name in ("Dataset500_Toy", "Dataset501_Toy_T1", "Dataset502_Toy_T2"):
        assert json.loads((preprocessed(name) / "splits_final.json").read_text()) == wanted
        require_ready(name)


def test_command_line_prints_the_sentence_alone(raw, monkeypatch, capsys):
    folder = write_toy(raw, shape=SMALL)
    save(folder / "imagesUn" / "P06_0001.nii.gz", np.zeros(SMALL, np.float32))
    monkeypatch.setattr("sys.argv", ["nnUNetv2_semicml_plan_and_preprocess", "-d", "500", "-npfp", "1"])
    with pytest.raises(SystemExit) as exit_:
        run_plan_and_preprocess()
    assert exit_.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"Error: {folder}/imagesUn/P06_0001.nii.gz: found the value 0 in every voxel; expected an image. Export it "
        "again, or remove the file: a case may lack a modality."
    )

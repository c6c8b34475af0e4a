"""Options, default names and ids of modalities, without any image."""

import json
from pathlib import Path

import pytest
from toy import set_folders

from nnunetv2_semicml.data.raw_dataset import RawDataset
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.planning.choose_modalities import choose_modalities

BRATS = ["T1", "T1ce", "T2", "FLAIR"]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    return set_folders(monkeypatch, tmp_path)


def raw_dataset(channel_names, files=None, name="Dataset500_Toy"):
    files = files or [(i,) for i in range(len(channel_names))]
    return RawDataset(name, Path(name), {}, list(channel_names), files, {}, {}, {})


def choose(raw, texts=None, ids=None, one_modality=False):
    return choose_modalities(raw, texts, ids, one_modality)


def described(modalities):
    return [(m.name, m.channels, m.files, m.dataset_name) for m in modalities]


COLOR_AND_DEPTH = raw_dataset(["R", "G", "B", "depth"], [(0, 1, 2), (3,)])
COLOR = raw_dataset(["R", "G", "B"], [(0, 1, 2)])


@pytest.mark.parametrize(
    ("raw", "texts", "expected"),
    [
        (raw_dataset(["CT", "PET"]), None, {"CT": [0], "PET": [1]}),
        (raw_dataset(BRATS), ["T2"], {"T2": [2]}),
        (raw_dataset(BRATS), ["2", "T1"], {"T2": [2], "T1": [0]}),
        (raw_dataset(BRATS), ["MR=T1,T1ce", "T2"], {"MR": [0, 1], "T2": [2]}),
        (raw_dataset(BRATS), ["a=3,T1", "b=1"], {"a": [3, 0], "b": [1]}),
        (raw_dataset(BRATS), ["all=T1,T1ce,T2,FLAIR"], {"all": [0, 1, 2, 3]}),
        (raw_dataset(["1", "0"]), ["1", "0"], {"1": [0], "0": [1]}),  # names come before numbers
        (raw_dataset(["TE=30", "TE=60"]), ["TE=30", "late=TE=60"], {"TE_30": [0], "late": [1]}),
        (raw_dataset(["CT", "CT"]), ["early=0", "late=1"], {"early": [0], "late": [1]}),
        (COLOR_AND_DEPTH, ["depth", "color=R,G,B"], {"depth": [3], "color": [0, 1, 2]}),
        (COLOR_AND_DEPTH, None, {"R+G+B": [0, 1, 2], "depth": [3]}),
    ],
)
def test_options(raw, texts, expected):
    modalities = choose(raw, texts)
    assert {m.name: m.channels for m in modalities} == expected
    assert [m.dataset_name for m in modalities] == [f"Dataset{501 + i}_Toy_{name}" for i, name in enumerate(expected)]
    for modality in modalities:
        assert [c for file in modality.files for c in raw.channels_of_files[file]] == modality.channels


@pytest.mark.parametrize(
    ("raw", "one_modality", "expected"),
    [
        (raw_dataset(["T1"]), False, ("T1", [0], [0])),
        (raw_dataset(BRATS), True, ("all", [0, 1, 2, 3], [0, 1, 2, 3])),
        (COLOR, False, ("R+G+B", [0, 1, 2], [0])),
        (COLOR, True, ("R+G+B", [0, 1, 2], [0])),
    ],
)
def test_one_modality_stays_in_its_place(raw, one_modality, expected):
    assert described(choose(raw, one_modality=one_modality)) == [(*expected, raw.name)]


@pytest.mark.parametrize(
    ("channel_names", "names"),
    [
        (["T1/Gd", "T2 (fat-sat)"], ["T1_Gd", "T2_fat-sat"]),
        (["", "__", "T1"], ["channel_0", "channel_1", "T1"]),
        (["CT", "CT"], ["CT_0", "CT_1"]),
        (["flair", "FLAIR", "T1"], ["flair_0", "FLAIR_1", "T1"]),
        (["CT", "CT", "CT_0"], ["CT_0", "CT_1", "CT_0_2"]),
        (["ρ", "τ"], ["channel_0", "channel_1"]),
        (["a__b", "..c.."], ["a_b", "c"]),
    ],
)
def test_default_names_fit_folders_and_differ(channel_names, names):
    modalities = choose(raw_dataset(channel_names))
    assert [m.name for m in modalities] == names
    # what a default names can be given as an option
    again = choose(raw_dataset(channel_names), [f"{m.name}={m.channels[0]}" for m in modalities])
    assert again == modalities


@pytest.mark.parametrize(
    ("raw", "options", "sentence"),
    [
        (BRATS, {"texts": ["PET"]}, "--modalities: found PET; expected one of T1, T1ce, T2, FLAIR"),
        (BRATS, {"texts": ["4"]}, "--modalities: found 4; expected one of T1"),
        (BRATS, {"texts": ["MR="]}, "found no channel after =; expected one of"),
        (BRATS, {"texts": ["MR=T1,"]}, "found no channel after =; expected one of"),
        (BRATS, {"texts": ["=T1"]}, "found the name ''; expected a name that can be part of a folder name"),
        (BRATS, {"texts": ["a/b=T1"]}, "found the name 'a/b'; expected a name"),
        (BRATS, {"texts": ["a__b=T1"]}, "found the name 'a__b'; expected a name"),
        (BRATS, {"texts": ["T1", "t1=T2"]}, "found two modalities called t1; expected different names"),
        (BRATS, {"texts": ["MR=T1,T2", "T2"]}, "found T2 twice; expected every channel at most once"),
        (BRATS, {"texts": ["MR=T1,0"]}, "found T1 twice; expected every channel at most once"),
        (["CT", "CT"], {"texts": ["CT"]}, "found CT, the name of channels 0, 1; expected one of .* Give the number"),
        (BRATS, {"texts": ["T1"], "one_modality": True}, "options --modalities, --one_modality: found both; expected"),
        (["T1"], {"ids": [501]}, r"--modality_ids: found \[501\]; expected none, since Dataset500_Toy is one modality"),
        (BRATS, {"texts": ["T1"], "ids": [501, 502]}, r"found \[501, 502\]; expected 1 different ids, for T1"),
        (BRATS, {"texts": ["T1", "T2"], "ids": [501, 501]}, "expected 2 different ids, for T1, T2"),
        (BRATS, {"texts": ["T1"], "ids": [-1]}, r"found \[-1\]; expected 1 different ids"),
        (BRATS, {"texts": ["T1"], "ids": [777]}, "dataset id 777: found that Dataset777_Taken has it; expected a free"),
        (
            BRATS,
            {"texts": ["T1"], "ids": [7771]},
            "id 7771: found that nnU-Net, .* confuses it with that of Dataset777_",
        ),
        (BRATS, {"texts": ["T1"], "ids": [500]}, "dataset id 500: found that Dataset500_Toy has it"),
    ],
)
def test_refusals(folders, raw, options, sentence):
    for name in ("Dataset777_Taken", "Dataset500_Toy"):
        (folders / name).mkdir()
    with pytest.raises(UserError, match=sentence):
        choose(raw_dataset(raw), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"texts": ["R"]}, "found R with the channels R; expected all channels of a file, .* hold R, G, B; depth"),
        ({"texts": ["BGR=B,G,R"]}, "found BGR with the channels B, G, R; expected all channels of a file, in their"),
        ({"texts": ["all=R,G,B,depth"]}, "--modalities: found all with files of 3, 1 channels; expected files with as"),
        ({"one_modality": True}, "--one_modality: found all with files of 3, 1 channels; expected files with as many"),
    ],
)
def test_refusals_of_parts_of_files(options, sentence):
    with pytest.raises(UserError, match=sentence):
        choose(COLOR_AND_DEPTH, **options)


def test_ids_are_the_next_that_are_free_and_can_be_told_apart(folders, tmp_path):
    for folder in ("nnUNet_raw/Dataset501_Other", "nnUNet_results/Dataset503_Old", "nnUNet_preprocessed/Dataset5020_X"):
        (tmp_path / folder).mkdir()
    names = [m.dataset_name for m in choose(raw_dataset(["CT", "PET"]))]
    assert names == ["Dataset504_Toy_CT", "Dataset505_Toy_PET"]  # for nnU-Net, Dataset5020_X has the id 502 as well


def test_ids_beyond_999(folders):
    names = [m.dataset_name for m in choose(raw_dataset(["CT", "PET"], name="Dataset999_Toy"))]
    assert names == ["Dataset1000_Toy_CT", "Dataset1001_Toy_PET"]


def test_what_an_interrupted_run_has_made_is_used_again(tmp_path):
    """There is no modalities.json yet; dataset.json tells what the folder was made of."""
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset501_Toy_CT"
    folder.mkdir()
    raw = raw_dataset(["CT", "PET"])
    (folder / "dataset.json").write_text(json.dumps({"semicml_source": "Dataset400_Other"}))
    assert choose(raw)[0].dataset_name == "Dataset502_Toy_CT"
    (folder / "dataset.json").write_text(json.dumps({"semicml_source": "Dataset500_Toy"}))
    assert choose(raw)[0].dataset_name == "Dataset501_Toy_CT"
    (folder / "dataset.json").write_text("{")
    assert choose(raw)[0].dataset_name == "Dataset502_Toy_CT"

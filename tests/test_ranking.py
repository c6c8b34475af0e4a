"""What networks know of a case: by formula, against nnU-Net's own predictions, and as a command line."""

import json
import threading
from functools import partial
from math import log
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LABELS, PATTERNS, make_trainer
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_semicml.command_line import run_rank
from nnunetv2_semicml.data.raw_dataset import read_raw_dataset
from nnunetv2_semicml.data.result_folders import model_folder
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.evaluation.ranking import choose, score_cases
from nnunetv2_semicml.evaluation.uncertainty import (
    FoldPredictions,
    FoldPredictor,
    Measured,
    Networks,
    compare_segmentations,
    foreground_entropy,
    measure,
    measure_cases,
    staggered,
)
from nnunetv2_semicml.trainers.nnUNetTrainerSupervisedEMA import nnUNetTrainerSupervisedEMA

NAN = float("nan")
CLASSES = SimpleNamespace(has_regions=False)
REGIONS = SimpleNamespace(has_regions=True)


def test_entropy_of_classes_is_that_of_the_softmax_where_foreground_is_predicted():
    # two heads: 0.2 / 0.8 is foreground, 0.9 / 0.1 is not
    p = torch.tensor([[0.2, 0.9], [0.8, 0.1]])
    expected = -(0.2 * log(0.2) + 0.8 * log(0.8)) / log(2)
    assert foreground_entropy(p.log(), CLASSES) == pytest.approx(expected)
    # the largest possible one, of three heads: the first of equal ones is the background, so a hair is added
    almost = torch.tensor([[1 / 3], [1 / 3 + 1e-5], [1 / 3]])
    assert foreground_entropy(almost.log(), CLASSES) == pytest.approx(1)
    assert np.isnan(foreground_entropy(torch.tensor([[2.0], [1.0]]), CLASSES))


def test_entropy_of_regions_is_the_mean_of_their_sigmoids():
    p = torch.tensor([[0.6, 0.1], [0.3, 0.2]])  # two regions; the second voxel is in none
    expected = np.mean([-(q * log(q) + (1 - q) * log(1 - q)) / log(2) for q in (0.6, 0.3)])
    assert foreground_entropy(p.logit(), REGIONS) == pytest.approx(expected)


def test_segmentations_differ_as_counted_by_hand():
    first, second = np.zeros((2, 1, 6, 6), int)
    first[0, 0, :4], second[0, 0, 2:4], second[0, 0, 5] = 1, 1, 2
    found = compare_segmentations(first, second, {"a": 1, "b": 2, "c": 3}, (1, 1, 1))
    # a: 4 and 2 voxels, 2 of both: Dice 4 / 6; b: only one shows it: Dice 0; c: neither: agreed on
    assert found["disagreement"] == pytest.approx((1 - 4 / 6 + 1 + 0) / 3)
    assert found["volume_difference"] == pytest.approx((2 / 6 + 1 + 0) / 3)
    assert found["hd95"] > 0
    whole = compare_segmentations(first, second, {"whole": (1, 2)}, (1, 1, 1))
    assert whole["disagreement"] == pytest.approx(1 - 2 * 2 / (4 + 3))
    assert compare_segmentations(first, first, {"a": 1}, (1, 1, 1)) == {
        "disagreement": 0,
        "hd95": 0,
        "volume_difference": 0,
    }


def predictions(*of_folds, entropies):
    segmentations = [np.reshape(row, (1, 2, 2)) for row in of_folds]
    folds = [str(i) for i in range(len(of_folds))]
    of = dict(zip(folds, segmentations, strict=True)), dict(zip(folds, entropies, strict=True))
    return FoldPredictions(segmentations[0], *of, [], {})


def test_measures_are_means_over_folds_and_pairs_of_folds():
    a = predictions([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], entropies=[0.2, NAN, 0.4])
    b = predictions([1, 1, 0, 0], [0, 0, 0, 1], entropies=[0.5, 0.7])
    found = measure({"A": a, "B": b}, {"x": 1}, (10, 10, 10))
    assert found["A"]["volume"] == pytest.approx(5 / 3)  # ml
    assert found["A"]["entropy"] == pytest.approx(0.3)
    # folds 0 and 1, 1 and 2: Dice 2 / 3; 0 and 2: 1
    assert found["A"]["fold_disagreement"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    assert found["B"]["fold_disagreement"] == pytest.approx(1)
    assert found["A | B"]["disagreement"] == pytest.approx((0 + 1) / 2)  # of the two folds that both have
    alone = measure({"B": predictions([0, 0, 0, 0], entropies=[NAN])}, {"x": 1}, (1, 1, 1))
    assert alone.keys() == {"B"}
    assert alone["B"].keys() == {"volume", "entropy"}
    assert np.isnan(alone["B"]["entropy"])


def measured(entropy=None, disagreement=None, features=(), modality="A"):
    measures = {} if entropy is None else {modality: {"volume": 1.0, "entropy": entropy}}
    measures |= {} if disagreement is None else {"A | B": {"disagreement": disagreement, "hd95": 3.0}}
    return Measured(measures, {modality: features})


def test_a_score_is_the_mean_of_the_ranks_that_a_case_has():
    cases = {
        "p": measured(0.1, 0.9),
        "q": measured(0.2, 0.1),
        "r": measured(0.3),  # lacks the other modality
        "s": measured(NAN, 0.5),  # predicts nothing
        "t": measured(),
    }
    scores = score_cases(cases, "mean")
    # of three entropies and three disagreements each
    assert scores.to_dict() == pytest.approx(
        {"r": 1, "p": (1 / 3 + 1) / 2, "s": 2 / 3, "q": (2 / 3 + 1 / 3) / 2, "t": 0}
    )
    assert list(scores.index) == ["r", "p", "s", "q", "t"]
    assert score_cases(cases, "modalities").idxmax() == "p"
    assert score_cases(cases, "entropy").idxmax() == "r"


def test_chosen_cases_are_not_alike_unless_the_score_alone_counts():
    features = {"p": [0, 0], "q": [0, 0.1], "r": [5, 5], "s": [0.1, 0], "t": [9, -9]}
    cases = {case: measured(features=of) for case, of in features.items()}
    scores = pd.Series({"p": 0.9, "q": 0.8, "r": 0.7, "s": 0.6, "t": 0.1})
    assert choose(scores, cases, 2, pool=1) == ["p", "q"]
    assert choose(scores, cases, 2, pool=2) == ["p", "r"]  # t is not among the four highest scores
    assert choose(scores, cases, 3, pool=2) == ["p", "r", "t"]
    assert choose(scores, cases, 9, pool=1) == list("pqrst")
    without = {case: Measured({}, {}) for case in cases}
    assert choose(scores, without, 2, pool=2) == ["p", "q"]


def test_a_case_without_a_modality_is_like_the_mean_of_all():
    cases = {
        "p": Measured({}, {"A": [0.0], "B": [1.0]}),
        "q": Measured({}, {"A": [0.0]}),
        "r": Measured({}, {"A": [0.0], "B": [-9.0]}),
    }
    assert choose(pd.Series({"p": 3.0, "q": 2.0, "r": 1.0}), cases, 2, pool=3) == ["p", "r"]


@pytest.fixture
def trained(groups):
    """Networks of folds 0 and 1, hardly trained."""

    def train(dataset):
        for fold in (0, 1):
            torch.manual_seed(fold)
            trainer = make_trainer(dataset, "2d", nnUNetTrainerSupervisedEMA, fold, num_epochs=1, initial_lr=0.1)
            trainer.run_training()
        return groups[dataset]

    return train


def test_cases_are_prepared_and_finished_while_one_is_predicted():
    waited, here = {}, threading.get_ident()
    events = {name: threading.Event() for name in ("prepared b", "predicted b")}
    prepared, finished = [], []

    def prepare(case):
        assert threading.get_ident() != here
        prepared.append(case)
        if case == "b":
            events["prepared b"].set()
        return [case]

    def predict(case, scans):
        assert threading.get_ident() == here
        assert scans == [case]
        assert len(prepared) <= "abcdef".index(case) + 2  # no more than two ahead are held
        assert len(finished) >= "abcdef".index(case) - 2  # nor more than two behind
        if case == "a":
            waited["prepared b"] = events["prepared b"].wait(60)
        if case == "b":
            events["predicted b"].set()
        return case.upper()

    def finish(case, logits):
        assert threading.get_ident() != here
        if case == "a":
            waited["predicted b"] = events["predicted b"].wait(60)
        finished.append(case)
        return {case: logits}

    found = list(staggered("abcdef", prepare, predict, finish, beside=2))
    assert found == [{case: case.upper()} for case in "abcdef"]
    assert waited == {"prepared b": True, "predicted b": True}
    assert sorted(finished) == list("abcdef")


@pytest.mark.parametrize("beside", [1, 3, 10])
@pytest.mark.parametrize("where", ["prepare", "predict", "finish"])
def test_what_is_predicted_before_a_failure_is_finished(where, beside):
    done = []

    def step(name, case):
        if (name, case) == (where, "c"):
            raise UserError(case, "a torn file", "a scan", "Mend it.")
        if name == "finish":
            done.append(case)
        return {}

    results = staggered(
        "abcd",
        partial(step, "prepare"),
        lambda case, _: step("predict", case),
        lambda case, _: step("finish", case),
        beside,
    )
    with pytest.raises(UserError, match="torn file"):
        list(results)
    assert set("ab") <= set(done) <= set("abd")


def predicted_by_nnunet(model, folds, scan, out):
    stock = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), folds)
    stock.predict_from_files_sequential([scan], [str(out)], overwrite=True)
    return SimpleITKIO().read_seg(f"{out}.nii.gz")[0][0]


def predicted(predictor, files):
    return predictor.segment(predictor.predict(predictor.preprocess(files)))


def test_folds_and_their_ensemble_are_those_of_nnunet(trained, results, tmp_path):
    modality = trained(LABELS).modalities[0]
    raw = read_raw_dataset(LABELS)
    case, files = next(iter(raw.unlabeled.items()))
    scan = [files["images"][0]]
    model = model_folder(results, modality.dataset_name, "nnUNetTrainerSupervisedEMA", "nnUNetPlans", "2d")
    found = predicted(FoldPredictor(model, ["0", "1"], torch.device("cpu")), scan)
    for folds, own in (((0,), found.of_folds["0"]), ((1,), found.of_folds["1"]), ((0, 1), found.segmentation)):
        np.testing.assert_array_equal(own, predicted_by_nnunet(model, folds, scan, tmp_path / case))
    assert found.of_folds["0"].any()
    assert not np.array_equal(found.of_folds["0"], found.of_folds["1"])
    alone = FoldPredictor(model, ["0"], torch.device("cpu"))
    assert predicted(alone, scan).features == found.features  # those of the first network
    assert len(found.features) == alone.predictor.network.encoder.output_channels[-1]
    other = predicted(FoldPredictor(model, ["1", "0"], torch.device("cpu")), scan)
    assert other.features != found.features
    assert other.entropies == found.entropies


def rank(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["nnUNetv2_semicml_rank", *words, "-device", "cpu"])
    run_rank()


def test_cases_are_ranked_with_the_modalities_that_they_have(trained, results, monkeypatch, capsys):
    group = trained(PATTERNS)
    words = ["-d", PATTERNS, "-c", "2d", "-tr", "nnUNetTrainerSupervisedEMA", "-f", "0", "1", "--number", "2"]
    rank(monkeypatch, *words)
    (out,) = (results / "rankings" / PATTERNS).iterdir()
    table = pd.read_csv(out / "ranking.csv")
    assert sorted(table["case"]) == group.unlabeled
    assert table["score"].is_monotonic_decreasing
    record = json.loads((out / "ranking.json").read_text())
    assert record["label_next"] == table.loc[table["chosen"], "case"].tolist()
    assert len(record["label_next"]) == 2
    for modality in group.modalities:
        predicted = {file.name.removesuffix(".nii.gz") for file in (out / "predictions" / modality.name).iterdir()}
        assert predicted == set(modality.unlabeled)
        known = table.set_index("case")[f"{modality.name} volume"].dropna()
        assert set(known.index) == set(modality.unlabeled)
    # of every modality's own scan, by its own networks
    complete = group.common_cases([modality.name for modality in group.modalities], labeled=False)[0]
    for modality in group.modalities:
        scan = [read_raw_dataset(PATTERNS).unlabeled[complete]["images"][i] for i in modality.files]
        model = model_folder(results, modality.dataset_name, "nnUNetTrainerSupervisedEMA", "nnUNetPlans", "2d")
        written, _ = SimpleITKIO().read_seg(str(out / "predictions" / modality.name / f"{complete}.nii.gz"))
        np.testing.assert_array_equal(written[0], predicted_by_nnunet(model, (0, 1), scan, results / "stock"))
    page = (out / "ranking.html").read_text()
    assert all(case in page for case in group.unlabeled)
    assert page.count("data:image/png;base64,") == sum(
        case in modality.unlabeled for modality in group.modalities for case in record["label_next"]
    )

    # what is done is not done again, unless a network or a scan is another one
    monkeypatch.setattr(FoldPredictor, "predict", lambda self, scan: pytest.fail("predicted again"))
    rank(monkeypatch, *words, "--score", "entropy")
    monkeypatch.undo()
    assert json.loads((out / "ranking.json").read_text())["score"] == "entropy"


def test_what_is_not_trained_or_damaged_is_named(trained, results, monkeypatch, capsys):
    group = trained(LABELS)
    words = ["-d", LABELS, "-c", "2d", "-tr", "nnUNetTrainerSupervisedEMA"]
    with pytest.raises(SystemExit):
        rank(monkeypatch, *words)  # all five folds
    assert "fold_2/checkpoint_final.pth: found no such file" in capsys.readouterr().err
    dataset = group.modalities[1].dataset_name
    model = model_folder(results, dataset, "nnUNetTrainerSupervisedEMA", "nnUNetPlans", "2d")
    checkpoint = model / "fold_1" / "checkpoint_final.pth"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        rank(monkeypatch, *words, "-f", "0", "1")
    assert str(checkpoint) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rank(monkeypatch, *words, "-f", "0", "--number", "0")
    assert "--number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rank(monkeypatch, *words, "-f", "0", "-np", "0")
    assert "-np: found 0; expected 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rank(monkeypatch, *words, "-f", "0", "--score", "folds")
    assert "--score folds: found one of these" in capsys.readouterr().err


def test_a_case_of_which_no_modality_is_whole_is_named(tmp_path):
    modalities = [SimpleNamespace(name="MR", files=[0, 1]), SimpleNamespace(name="PET", files=[2])]
    networks = Networks({}, [], torch.device("cpu"), True)
    cases = {"half": {"images": ["half_0000.nii.gz", None, None]}}
    with pytest.raises(UserError, match="half: found no modality as a whole; expected all files of MR or PET"):
        measure_cases(cases, modalities, networks, tmp_path, ".nii.gz")

"""benchmarks/study: who is held out, what is written of unlabeled cases, and what its trainers deploy."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import LABELS, draw_batches, initialized, load_script, make_trainer
from test_terms import area_contrast

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def protocols(monkeypatch):
    return load_script(BENCHMARKS / "study" / "protocols.py", monkeypatch)


@pytest.fixture
def run(protocols, monkeypatch):
    return load_script(BENCHMARKS / "study" / "run.py", monkeypatch)


@pytest.fixture
def trainers(monkeypatch):
    monkeypatch.setenv("PROTOCOL_STEPS", "300")
    return load_script(BENCHMARKS / "trainers" / "study_trainers.py", monkeypatch)


def write_source(folder, tests=()):
    """Twenty volumes of six slices in two modalities, of two hospitals; the slices of case i with foreground: 1 … 3."""
    for part, cases in (("Tr", [f"case{i:02d}" for i in range(20)]), ("Ts", tests)):
        for case in cases:
            label = np.zeros((6, 4, 4), np.uint8)
            label[1:4, 1, 1] = 1
            arrays = {f"images{part}/{case}_{m:04d}.nii.gz": np.arange(96.0).reshape(6, 4, 4) + m for m in range(2)}
            for name, array in {**arrays, f"labels{part}/{case}.nii.gz": label}.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                image = sitk.GetImageFromArray(array)
                image.SetSpacing((2, 2, 5))
                sitk.WriteImage(image, str(folder / name))
    with (folder / "subjects.csv").open("w") as file:
        csv.writer(file).writerows([("case", "institution"), *((f"case{i:02d}", "AB"[i % 2]) for i in range(20))])
    described = {"channel_names": {"0": "FLAIR", "1": "T1post"}, "labels": {"background": 0, "tumour": 1}}
    (folder / "dataset.json").write_text(json.dumps({**described, "numTraining": 20, "file_ending": ".nii.gz"}))
    return folder


def test_every_task_has_its_trainers_and_a_dataset_and_a_file_of_its_own(protocols, run, trainers):
    for name, protocol in protocols.PROTOCOLS.items():
        for purpose in protocols.PURPOSES:
            tasks = protocols.tasks_of(name, purpose)
            files = {run.result_file(Path("work"), task) for task in tasks}
            assert len(files) == len(tasks)  # no two write the same file
            names = {(task.draw, task.labeled): run.dataset_of(protocol, task) for task in tasks}
            numbers = {dataset[7:10] for dataset in names.values()}
            assert len(numbers) == len(set(names.values()))
            for task in tasks:
                *first, last = (getattr(trainers, f"Protocol_{trainer}") for trainer in task.trainers)
                assert last.min_modalities <= len(protocol.modalities)
                # test cases are for methods as they are but for what depends on the data, validation cases for variants
                changed = {option for trainer in task.trainers for option in trainers.TRAINERS[trainer][3]}
                assert purpose == "validation" or changed <= {"taught_both_ways"}
                assert [getattr(last, "first_stage", None)] == (first or [None])
                assert sum(t.num_epochs * t.num_iterations_per_epoch for t in (*first, last)) == 300
            assert {task.method for task in tasks} >= {protocols.LOWER, protocols.UPPER}
            assert set(protocols.BEST.get(name, ())) <= set(protocols.METHODS[name])
            all_of, on_all_draws = protocols.METHODS[name], {*protocols.ON_ALL_DRAWS}
            screened = purpose == "test" or name == "lgg"
            if purpose == "validation":
                all_of, on_all_draws = protocols.VARIANTS, {*protocols.FINALISTS}
                assert on_all_draws <= {*all_of}
                all_of = all_of if len(protocol.modalities) > 1 else {}
            own = {*protocols.OF_ITS_OWN.get(name, ())} if purpose == "validation" else set()
            for draw in protocol.draws:
                methods = {task.method for task in tasks if task.draw == draw} - {protocols.LOWER, protocols.UPPER}
                expected = {*all_of} if screened and draw == 0 else on_all_draws & {*all_of}
                assert methods == (expected | own if draw == 0 else expected)
                with_more = {task.labeled for task in tasks if task.draw == draw} - {0, protocol.labeled[0]}
                assert with_more == ({*protocol.labeled[1:]} if purpose == "test" and draw == 0 else set())
    assert any(task.method == "Semi-CML Plus, radar teaches" for task in protocols.tasks_of("ombria", "validation"))


@pytest.mark.parametrize("own_tests", [False, True])
def test_validation_never_sees_a_test_case_and_fewer_labels_are_part_of_more(tmp_path, protocols, run, own_tests):
    source = write_source(tmp_path / "source", ["other1", "other2"] if own_tests else [])
    protocol = protocols.PROTOCOLS["lgg"]._replace(labeled=(2, 4), num_validation=5)
    of_test, test = run.cases_of(protocol, source, "test", 0)
    assert test == ({"other1": "Ts", "other2": "Ts"} if own_tests else dict.fromkeys(test, "Tr"))
    assert len(test) == (2 if own_tests else 6)
    assert run.cases_of(protocol, source, "test", 1)[1] == test
    assert len(of_test) == (20 if own_tests else 14)
    for draw in range(3):
        training, held_out = run.cases_of(protocol, source, "validation", draw)
        assert len(held_out) == 5
        assert not set(training) & set(held_out)
        assert sorted([*training, *held_out]) == sorted(of_test)
    assert run.cases_of(protocol, source, "validation", 1)[0] != run.cases_of(protocol, source, "validation", 0)[0]
    ordered, _ = run.cases_of(protocol._replace(alphabetical=True), source, "test", 2)
    assert ordered == sorted(ordered)
    first, held_out = run.cases_of(protocol._replace(first=[ordered[5], ordered[2]]), source, "test", 0)
    assert held_out == test
    assert first == [ordered[5], ordered[2], *(case for case in of_test if case not in (ordered[5], ordered[2]))]


def test_unlabeled_cases_have_no_labels_and_slices_without_foreground_can_be_left_out(tmp_path, protocols, run):
    source = write_source(tmp_path / "source")
    protocol = protocols.PROTOCOLS["lgg"]._replace(labeled=(2, 4), num_validation=5)
    task = protocols.Task("lgg", "test", 0, 2, "any", ("any",), 10)
    training, test = run.cases_of(protocol, source, "test", 0)
    for only_slices, slices in ((False, 6), (True, 3)):
        folder = tmp_path / f"raw_{only_slices}"
        run.write_raw(protocol._replace(only_slices=only_slices), task, source, folder)
        found = {part.name: sorted(file.name for file in part.iterdir()) for part in folder.glob("*/")}
        cases = {"Tr": sorted(training[:2]), "Un": sorted(training[2:]), "Ts": sorted(test)}
        for share, of_share in cases.items():
            assert found[f"images{share}"] == [f"{case}_{m:04d}.nii.gz" for case in of_share for m in range(2)]
        assert {k: v for k, v in found.items() if k.startswith("labels")} == {
            f"labels{share}": [f"{case}.nii.gz" for case in cases[share]] for share in ("Tr", "Ts")
        }
        assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
        for share in cases:
            image = sitk.ReadImage(str(folder / f"images{share}" / found[f"images{share}"][1]))
            assert image.GetSpacing() == (2, 2, 5)
            array = sitk.GetArrayFromImage(image)
            expected = (np.arange(96.0).reshape(6, 4, 4) + 1)[1:4] if only_slices else array
            assert array.shape[0] == slices
            np.testing.assert_array_equal(array, expected)


@pytest.mark.usefixtures("groups")
def test_variants_change_what_they_say(trainers):
    for name, (base, _, first_stage, changes) in trainers.TRAINERS.items():
        variant = getattr(trainers, f"Protocol_{name}")
        assert issubclass(variant, base)
        assert (first_stage is not None) == hasattr(base, "first_stage")
        assert not variant.deploy_average
        for attribute, value in changes.items():
            assert getattr(variant, attribute) == value != getattr(base, attribute)


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("name", ["Supervised", "MeanTeacher", "SemiCML"])
def test_the_last_step_and_the_average_of_all_are_deployed(trainers, name):
    """Whatever teachers a method has. The average is the mean of the start and of all steps, while these are few."""
    seen = {}

    class Recording(getattr(trainers, f"Protocol_{name}")):
        def train_step(self, batch):
            if not seen:
                seen.update({t.name: [_weights(t.network)] for t in self.trainers})
            losses = super().train_step(batch)
            for t in self.trainers:
                seen[t.name].append(_weights(t.network))
            return losses

    trainer = make_trainer(LABELS, "2d", Recording, num_epochs=1, num_iterations_per_epoch=3)
    trainer.run_training()
    for t in trainer.trainers:
        last, average = (
            torch.load(Path(t.output_folder) / f"checkpoint_{kind}.pth", weights_only=True)["network_weights"]
            for kind in ("final", "ema")
        )
        for key in seen[t.name][0]:
            assert torch.equal(last[key], seen[t.name][-1][key])
            torch.testing.assert_close(average[key], torch.stack([weights[key] for weights in seen[t.name]]).mean(0))


def _weights(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.usefixtures("groups")
def test_second_stages_learn_from_the_first_ones_teacher(trainers):
    """By copy-paste as by itself; the better modality's network rests for 0.8 of the stage."""
    first = make_trainer(LABELS, "2d", trainers.Protocol_First_SemiCML_ema, num_epochs=1)
    first.run_training()
    for name in ("PReL_ema", "PReL_copy_paste"):
        trainer = make_trainer(LABELS, "2d", getattr(trainers, f"Protocol_{name}"), num_epochs=5)
        trainer.on_train_start()
        before = {t.name: _weights(t.network) for t in trainer.trainers}
        labeler = _weights(trainer.labeler.network)
        (batch,) = draw_batches(trainer, 1)
        losses = trainer.train_step(batch)
        assert np.isfinite(list(losses["unsupervised"].values())).all()
        for t in trainer.trainers:
            moved = any(not torch.equal(before[t.name][key], value) for key, value in _weights(t.network).items())
            assert moved == (t.name != trainer.better_modality)
        assert all(torch.equal(labeler[key], value) for key, value in _weights(trainer.labeler.network).items())


@pytest.mark.usefixtures("groups")
def test_the_better_modality_is_not_taught_one_way(trainers):
    for better, dice in (("FLAIR", (0.9, 0.2)), ("T1", (0.1, 0.3))):
        trainer = make_trainer(LABELS, "2d", trainers.Protocol_SemiCML_OneWay)
        trainer.initialize()
        for t, value in zip(trainer.trainers, dice, strict=True):
            t.logger.log("mean_fg_dice", value, 0)
        outputs = {t.name: torch.randn(4, 3, 8, 8, requires_grad=True) for t in trainer.trainers}
        sum(trainer.unsupervised_terms([outputs], None).values()).backward()
        assert {name for name, output in outputs.items() if output.grad is None} == {better}


@pytest.mark.usefixtures("groups")
def test_variants_of_plus_have_the_terms_of_the_methods_that_they_are_named_after(trainers):
    """On unmixed patches. Those of the methods are tested by formula in test_terms."""
    consistency, semicml, both_ways, cps, hard = (
        initialized(LABELS, "2d", getattr(trainers, f"Protocol_{name}"))
        for name in ("Plus_consistency", "SemiCML", "Plus_both_ways", "CrossModalCPS", "HardSemiCML")
    )
    both_ways.best_dice = lambda: {"FLAIR": 0.5, "T1": 0.4}
    torch.manual_seed(0)
    outputs = {t.name: torch.randn(4, 3, 8, 8) for t in semicml.trainers}
    region = torch.ones(4, 1, 8, 8)
    target = dict.fromkeys(outputs, trainers.MixedLabels(torch.ones(4, 3, 8, 8), region, region))
    views, targets = [{name: torch.zeros(4, 3, 8, 8) for name in outputs}, outputs], [target]
    expected, found = semicml.unsupervised_terms([outputs], None), consistency.unsupervised_terms(views, targets)
    torch.testing.assert_close({term: found[term] for term in expected}, expected)
    expected = cps.unsupervised_terms([outputs], None) | {"asc": expected["asc"]}
    torch.testing.assert_close(hard.unsupervised_terms([outputs], None), expected)
    found = both_ways.unsupervised_terms(views, targets)
    torch.testing.assert_close(  # shared by the two networks
        {"ce": 2 * found["unmixed ce"], "dice": 2 * found["unmixed dice"], "asc": found["asc"]}, expected
    )


@pytest.mark.usefixtures("groups")
def test_mixtures_are_contrasted(trainers):
    trainer = initialized(LABELS, "2d", trainers.Protocol_XBCP_asc, asc_temperature=0.5)
    torch.manual_seed(0)
    outputs = [{t.name: torch.randn(2, 3, 8, 8) for t in trainer.trainers} for _ in range(2)]
    region = torch.ones(2, 1, 8, 8)
    targets = [dict.fromkeys(view, trainers.MixedLabels(torch.ones(2, 3, 8, 8), region, region)) for view in outputs]
    p = [torch.cat([view[name].softmax(1)[:, 1:] for view in outputs]) for name in outputs[0]]
    torch.testing.assert_close(trainer.unsupervised_terms(outputs, targets)["asc"], area_contrast(p, 0.5))


def test_results_go_to_the_tables_once_and_those_of_second_runs_to_their_own(tmp_path, protocols, run, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    task, other = protocols.tasks_of("lgg", "test")[:2]

    def finish(work, dice, device):
        row = {"modality": "FLAIR", "weights": "EMA", "case": "a", "dice": dice}
        row |= dict.fromkeys(("ppv", "sensitivity", "asd", "hd95", "n_ref", "n_pred", "diagonal"), 1)
        file = run.result_file(work, task)
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"rows": [row], "cpu_seconds": 60, "device": device}))

    finish(tmp_path / "first", 0.25, "CPU")
    finish(tmp_path / "second", 0.5, "A GPU")
    for _ in range(2):
        run.add_to_tables(tmp_path / "first", task)
        run.add_to_tables(tmp_path / "first", other)  # has no result
    assert not run.is_done(task, run.AGAIN)
    run.add_to_tables(tmp_path / "second", task, run.AGAIN)
    assert run.is_done(task)
    assert run.is_done(task, run.AGAIN)
    assert not run.is_done(other)
    for prefix, dice, device in (("", "0.25", "CPU"), ("again_", "0.5", "A GPU")):
        with (tmp_path / f"{prefix}lgg_test.csv").open() as rows, (tmp_path / f"{prefix}runs.csv").open() as runs:
            (row,), (of_run,) = csv.DictReader(rows), csv.DictReader(runs)
        assert (row["method"], row["seed"], row["labeled"], row["dice"]) == (task.method, "0", "0", dice)
        assert (of_run["method"], of_run["cpu_seconds"], of_run["device"]) == (task.method, "60", device)


def test_a_task_runs_on_the_device_that_is_named(tmp_path, protocols, run, monkeypatch):
    """Where there is no GPU, this would otherwise show nowhere."""
    monkeypatch.setattr(run, "set_environment", lambda work, task: None)
    row = {"modality": "FLAIR", "weights": "EMA", "dice": 0.5}
    monkeypatch.setattr(run, "run_task", lambda data, task, device: {"rows": [row], "device": device})
    for device, task in zip(("cpu", "cuda"), protocols.tasks_of("lgg", "test"), strict=False):
        assert "FAILED" not in run.run(tmp_path, tmp_path, task, device)
        assert json.loads(run.result_file(tmp_path, task).read_text())["device"] == device

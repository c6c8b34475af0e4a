"""Tiny phantom datasets, planned and preprocessed once per test session, and trainers on them."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise import gaussian_blur
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from toy import copy_processes, use_threads

from nnunetv2_semicml.data.locks import locked
from nnunetv2_semicml.data.modality_group import ModalityGroup
from nnunetv2_semicml.data.phantom import write_phantom_dataset
from nnunetv2_semicml.planning.plan_and_preprocess import plan_and_preprocess
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.training import conductor
from nnunetv2_semicml.training.conductor import LabeledPatches

torch.set_num_threads(1)  # the networks here are so small that threads would only wait for each other

LABELS, REGIONS = "Dataset500_Labels", "Dataset510_Regions"
CHANNELS, PATTERNS = "Dataset550_Channels", "Dataset560_Patterns"
# case -> the channels that it lacks
LACKING_CHANNELS = {"tr_000": [1], "tr_001": [0, 2], "un_000": [1], "un_001": [0, 2]}
LACKING_PATTERNS = {
    "tr_000": [2],
    "tr_001": [0, 1],
    **{"un_000": [2], "un_001": [2], "un_002": [1], "un_003": [0], "un_004": [0, 2]},
}


@pytest.fixture(autouse=True)
def nothing_is_chosen_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock nnU-Net blurs by convolution, as if Fourier transforms, which round differently, were never faster."""
    monkeypatch.setattr(gaussian_blur, "time", lambda: 0.0)


# without fixtures of their own that take long: they need not stay on one process of pytest-xdist
SPREAD = (
    "test_class_volumes",
    "test_copy_paste",
    "test_earlier_training",
    "test_empty_patches",
    "test_failing_inputs",
    "test_filter_match",
    "test_methods",
    "test_terms",
    "test_modality_group",
    "test_planning",
    "test_raw_dataset",
    "test_second_stage",
    "test_step",
    "test_strong_views",
    "test_withhold_labels",
)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """Keep the tests of the other files together, for --dist loadgroup."""
    for item in items:
        if item.path.stem not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def once(root, name, make):
    """Let one of the processes of pytest-xdist make what the session shares, without processes of its own."""
    with locked(root / f"{name}.locked", f"making {name}", wait=True), pytest.MonkeyPatch.context() as patch:
        if not (done := root / f"{name}.done").is_file():
            use_threads(patch)
            make()
            done.touch()


@pytest.fixture(scope="session")
def nnunet_folders(tmp_path_factory):
    """nnU-Net's three folders, and no more processes than this small data deserves."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "nnunet"
    root.mkdir(exist_ok=True)
    values = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    values |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    values["OMP_WAIT_POLICY"] = "PASSIVE"  # in subprocesses; spinning threads are 30 times slower on a busy machine
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
            if name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
                Path(value).mkdir(exist_ok=True)
        patch.delenv("nnUNet_extTrainer", raising=False)
        yield root


@pytest.fixture(scope="session")
def labels_group(nnunet_folders):
    """Two modalities, background and two classes, 2d and 3d_fullres."""

    def make():
        write_phantom_dataset(
            nnunet_folders / "nnUNet_raw",
            500,
            "Labels",
            num_labeled=5,
            num_unlabeled=4,
            num_test=2,
            shape=(24, 24, 24),
            num_classes=2,
        )
        group = plan_and_preprocess(500, ["2d", "3d_fullres"], num_processes=[1], num_processes_fingerprint=1)
        shrink_networks(group)

    once(nnunet_folders, LABELS, make)
    return ModalityGroup.load(LABELS)


@pytest.fixture(scope="session")
def regions_group(nnunet_folders):
    """Three modalities and region-based labels, 3d_fullres."""

    def make():
        write_phantom_dataset(
            nnunet_folders / "nnUNet_raw",
            510,
            "Regions",
            num_labeled=5,
            num_unlabeled=3,
            num_test=1,
            shape=(24, 24, 24),
            modalities=("FLAIR", "T1", "T2"),
            num_classes=2,
            regions=True,
        )
        options = {"modality_ids": [521, 522, 523], "num_processes": [1], "num_processes_fingerprint": 1}
        shrink_networks(plan_and_preprocess(510, ["3d_fullres"], **options))

    once(nnunet_folders, REGIONS, make)
    return ModalityGroup.load(REGIONS)


def write_incomplete(raw, dataset_id, name, lacking, **numbers):
    """A phantom with FLAIR, T1 and T2, of which some cases lack files."""
    folder = write_phantom_dataset(
        raw, dataset_id, name, **numbers, shape=(24, 24, 24), modalities=("FLAIR", "T1", "T2"), num_classes=2
    )
    for case, channels in lacking.items():
        for channel in channels:
            (file,) = folder.glob(f"images*/{name.lower()}_{case}_{channel:04d}.nii.gz")
            file.unlink()


@pytest.fixture(scope="session")
def channels_group(nnunet_folders):
    """A modality of two channels beside one of one, which some cases lack; 2d and 3d_fullres."""

    def make():
        raw = nnunet_folders / "nnUNet_raw"
        write_incomplete(raw, 550, "Channels", LACKING_CHANNELS, num_labeled=7, num_unlabeled=5, num_test=1)
        options = {"modalities": ["MR=FLAIR,T2", "T1"], "num_processes": [1], "num_processes_fingerprint": 1}
        shrink_networks(plan_and_preprocess(550, ["2d", "3d_fullres"], **options))

    once(nnunet_folders, CHANNELS, make)
    return ModalityGroup.load(CHANNELS)


@pytest.fixture(scope="session")
def patterns_group(nnunet_folders):
    """Three modalities, each of which some cases lack, so that pairs have different cases in common; 2d."""

    def make():
        raw = nnunet_folders / "nnUNet_raw"
        write_incomplete(raw, 560, "Patterns", LACKING_PATTERNS, num_labeled=7, num_unlabeled=6, num_test=1)
        shrink_networks(plan_and_preprocess(560, ["2d"], num_processes=[1], num_processes_fingerprint=1))

    once(nnunet_folders, PATTERNS, make)
    return ModalityGroup.load(PATTERNS)


def shrink_networks(group: ModalityGroup) -> None:
    """Give all networks of a group a few features and small batches, alike in all plans: accuracy is not tested."""
    preprocessed = Path(os.environ["nnUNet_preprocessed"])
    for name in [group.dataset_name, *(m.dataset_name for m in group.modalities)]:
        file = preprocessed / name / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        for configuration in plans["configurations"].values():
            if "architecture" in configuration:
                arch = configuration["architecture"]["arch_kwargs"]
                arch["features_per_stage"] = [4] * arch["n_stages"]
                arch["n_conv_per_stage"] = [1] * arch["n_stages"]
                arch["n_conv_per_stage_decoder"] = [1] * (arch["n_stages"] - 1)
                configuration["batch_size"] = min(configuration["batch_size"], 4)
        file.write_text(json.dumps(plans))


def load_script(file: Path, monkeypatch: pytest.MonkeyPatch, name: str = "") -> ModuleType:
    """Import a file that belongs to no package, for one test, by its own name or another one."""
    spec = importlib.util.spec_from_file_location(name or file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name or file.stem, module)
    spec.loader.exec_module(module)
    return module


def load_plans(dataset_name: str) -> tuple[dict, dict]:
    """Plans as nnUNetv2_train passes them, and dataset.json."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset_name
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    return {**plans, "continue_training": False}, json.loads((folder / "dataset.json").read_text())


def make_trainer(
    dataset_name: str,
    configuration: str,
    trainer_class: type[nnUNetTrainer] = nnUNetTrainerSemiCML,
    fold: int | str = 0,
    device: str = "cpu",
    **attributes: object,
) -> nnUNetTrainer:
    """A trainer whose epochs are short."""
    plans, dataset_json = load_plans(dataset_name)
    trainer = trainer_class(plans, configuration, fold, dataset_json, torch.device(device))
    short = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    for name, value in {**short, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def draw_batches(trainer: nnUNetTrainer, number: int, seed: int = 0) -> list[dict]:
    """Training batches of an initialized trainer."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    loader, _ = trainer.get_dataloaders()
    return [next(loader) for _ in range(number)]


def touch_if_there_are_terms(logging, filename):
    """In the place of the picture, which takes longer to draw than such an epoch to train."""
    if any(key.startswith(("unsupervised/", "pseudo_volume/")) for key in logging):
        Path(filename).touch()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty nnUNet_results, data loading in this process, so that seeds hold, and no pictures (seconds each)."""
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)
    monkeypatch.setattr(conductor, "plot_terms", touch_if_there_are_terms)
    copy_processes(monkeypatch)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def copy_of_labels(labels_group, tmp_path, monkeypatch):
    """Raw and preprocessed copies that a test may change; others read the originals at the same time."""
    modalities = [m.dataset_name for m in labels_group.modalities]
    for variable, names in (("nnUNet_raw", [LABELS]), ("nnUNet_preprocessed", [LABELS, *modalities])):
        for name in names:
            shutil.copytree(Path(os.environ[variable]) / name, tmp_path / variable / name)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return tmp_path


INCOMPLETE = [(CHANNELS, "3d_fullres"), (PATTERNS, "2d")]
SETTINGS = [(LABELS, "2d"), (LABELS, "3d_fullres"), (REGIONS, "3d_fullres"), *INCOMPLETE]


@pytest.fixture
def groups(labels_group, regions_group, channels_group, patterns_group, results):
    return {LABELS: labels_group, REGIONS: regions_group, CHANNELS: channels_group, PATTERNS: patterns_group}


def initialized(dataset, configuration, *args, **attributes):
    torch.manual_seed(0)
    trainer = make_trainer(dataset, configuration, *args, **attributes)
    trainer.initialize()
    return trainer


def with_something_seen(trainer):
    """Let the networks of a trainer segment something, so that there are classes to contrast and to agree on."""
    torch.manual_seed(7)
    for t in trainer.trainers:
        with torch.no_grad():
            t.network.decoder.seg_layers[-1].weight.mul_(20)
    for name, teacher in trainer.teachers.items():
        (t,) = (t for t in trainer.trainers if t.name == name)
        teacher.average(trainer.student(t), 0.0)
    return trainer


def gradients(trainer):
    # nnU-Net gives the lowest deep-supervision head the weight 0, and it no gradient
    return [
        [torch.zeros(()) if p.grad is None else p.grad.clone() for p in t.trained_parameters()]
        for t in trainer.trainers
    ]


def weights(trainer):
    return [{k: v.clone() for k, v in t.network.state_dict().items()} for t in trainer.trainers]


def assert_same_weights(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def assert_identical(a, b):
    """Compare nested checkpoints to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b or (a != a and b != b)  # NaN is a Dice without foreground


def labeled_of(batch):
    """Modality -> (image, target or targets), as the loader has drawn them."""
    return {m: (p["images"][m], p["targets"][m]) for p in batch["labeled"] for m in p["images"]}


def unlabeled_of(batch, modality):
    """The unlabeled patches of a modality, of all draws that show it."""
    return torch.cat([p["images"][modality] for p in batch["unlabeled"] if modality in p["images"]])


def change_tensors(batch, change):
    """The batch with another tensor in the place of each."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: change_tensors(value, change) for key, value in batch.items()}
    return [change_tensors(value, change) for value in batch] if isinstance(batch, list) else batch


def unsupervised_terms(trainer, batch):
    """The terms of a step, with a graph: each is the mean over the draws that have it."""
    found = {}
    for draw, labeled in zip(trainer.unlabeled_draws(batch), trainer.mixing_partners(batch), strict=True):
        views, targets = trainer.views_and_targets(draw, labeled)
        for name, term in trainer.unsupervised_terms(unlabeled_outputs(trainer, views), targets).items():
            found.setdefault(name, []).append(term)
    return {name: sum(values) / len(values) for name, values in found.items()}


def unlabeled_outputs(trainer, views):
    """What the unsupervised terms see of every learner, view by view, with a graph; of several outputs the first."""
    outputs = []
    for number, view in enumerate(views):
        of_view = {}
        for t in (t for t in trainer.learners() if t.name in view):
            with trainer._autocast():
                output = trainer.unlabeled_output(t, view[t.name], number)
            of_view[t.name] = (output[0] if isinstance(output, list) else output).float()
        outputs.append(of_view)
    return outputs


def reference_gradients(trainer, batch):
    """Losses and gradients by the formula: one sum of all losses, one backward pass, everything held until then."""
    for t in trainer.trainers:
        t.optimizer.zero_grad()
    terms = unsupervised_terms(trainer, batch)
    total = sum(trainer.unsupervised_weights()[name] * term for name, term in terms.items())
    supervised = {}
    later = trainer.supervised_weight_after_warmup
    weight = trainer.supervised_weight if trainer.warming_up or later is None else later
    if weight:
        labeled = {t.name: LabeledPatches(*labeled_of(batch)[t.modality.name]) for t in trainer.trainers}
        taught = trainer.labeled_views(labeled, trainer.unlabeled_draws(batch))
        with trainer._autocast():
            for t in trainer.learners():
                image, target = taught[t.name]
                supervised[t.name] = t.loss(t.network(image), target)
    (total + weight * sum(supervised.values())).backward()
    return {**terms, **supervised}, gradients(trainer)


def step_gradients(trainer, batch):
    """The same of a step of the trainer, before clipping."""
    for t in trainer.trainers:
        t.optimizer.zero_grad()
    draws = trainer.unlabeled_draws(batch)
    losses, _ = trainer._unsupervised_step(trainer.learners(), draws, trainer.mixing_partners(batch))
    if trainer.labeled_weight:
        taught = trainer.labeled_views(trainer.labeled_patches(batch), draws)
        for t in trainer.learners():
            losses[t.name] = trainer._supervised_step(t, taught[t.name])
    return losses, gradients(trainer)


def assert_close_gradients(expected, found, tolerance=1e-5):
    """Equal relative to the largest gradient of each network, which is not zero."""
    for a, b in zip(expected, found, strict=True):
        scale = max(g.abs().max() for g in a)
        assert scale > 0
        for x, y in zip(a, b, strict=True):
            assert (x - y).abs().max() <= tolerance * scale


def assert_step_equals_reference(trainer, batch, tolerance=1e-5):
    """Proof 8, with activations held and recomputed."""
    torch.manual_seed(1)
    expected_losses, expected = reference_gradients(trainer, batch)
    for trainer.recompute in (False, True):
        torch.manual_seed(1)
        losses, found = step_gradients(trainer, batch)
        torch.testing.assert_close(losses, {name: loss.detach() for name, loss in expected_losses.items()})
        assert_close_gradients(expected, found, tolerance)


def assert_labels_of_unlabeled_cases_change_nothing(make):
    """Proof 6: with files of their names wherever labels are kept, or without, a step is the same."""
    group = ModalityGroup.load(LABELS)
    folders = [Path(os.environ["nnUNet_raw"]) / LABELS / "labelsTr"] + [
        Path(os.environ["nnUNet_preprocessed"]) / m.dataset_name / "gt_segmentations" for m in group.modalities
    ]
    files = [folder / f"{case}.nii.gz" for folder in folders for case in group.unlabeled]
    outputs = []
    for present in (False, True):
        for file in files:
            assert not file.exists()
            if present:
                file.write_bytes(b"a label")
        trainer = make()
        (batch,) = draw_batches(trainer, 1)
        outputs.append((trainer.train_step(batch), weights(trainer)))
    assert_identical(*outputs)


class ArchitectureMixin:
    """Changes arguments of the architecture that stands in the plans."""

    @staticmethod
    def changes(kwargs, dimensions):
        raise NotImplementedError

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        kwargs = configuration_manager.network_arch_init_kwargs
        return get_network_from_plans(
            configuration_manager.network_arch_class_name,
            {**kwargs, **cls.changes(kwargs, len(configuration_manager.patch_size))},
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )


class nnUNetTrainerWithDropout(ArchitectureMixin, nnUNetTrainer):
    """Stands for a trainer whose plans have dropout."""

    @staticmethod
    def changes(kwargs, dimensions):
        return {"dropout_op": f"torch.nn.Dropout{dimensions}d", "dropout_op_kwargs": {"p": 0.5}}


class nnUNetTrainerCompiled(nnUNetTrainer):
    """nnU-Net does not compile on the CPU."""

    def _do_i_compile(self):
        return True


class nnUNetTrainerWide(ArchitectureMixin, nnUNetTrainer):
    """Stands for real plans: features enough for activations to outweigh predictions."""

    @staticmethod
    def changes(kwargs, dimensions):
        return {"features_per_stage": [32] * kwargs["n_stages"]}


def slow_contrast(anchors, keys, positive, negative, temperature):
    """The contrast of feature vectors, written from the formula, one pair at a time."""
    losses = []
    for i in range(len(anchors)):

        def s(k, anchor=anchors[i]):
            return anchor @ keys[k] / (anchor.norm() * keys[k].norm() * temperature)

        of_anchor = []
        negatives = [torch.exp(s(k)) for k in range(len(keys)) if negative[i, k]]
        for p in (k for k in range(len(keys)) if positive[i, k]):
            if negatives:
                of_anchor.append(-torch.log(torch.exp(s(p)) / (torch.exp(s(p)) + sum(negatives))))
        if of_anchor:
            losses.append(sum(of_anchor) / len(of_anchor))
    return sum(losses) / len(losses)


class Killed(Exception):
    """In the place of a power failure."""


class KilledMixin:
    """Dies at the beginning of an epoch."""

    kill_at = 2

    def on_epoch_start(self):
        if self.current_epoch == self.kill_at:
            raise Killed
        super().on_epoch_start()


def final_checkpoint(trainer):
    """The joint checkpoint_final without times of day, read without running code."""
    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=True)
    for logging in (checkpoint["logging"], *(m["logging"] for m in checkpoint["modalities"].values())):
        for key in ("epoch_start_timestamps", "epoch_end_timestamps"):
            del logging[key]
    return checkpoint


def validation_outputs(dice):
    """What nnU-Net's validation_step returns where both classes have this Dice."""
    tp, fp, fn = np.array([[dice / 2] * 2, [1 - dice] * 2, [0, 0]])
    return {"tp_hard": tp, "fp_hard": fp, "fn_hard": fn, "loss": 0.0}

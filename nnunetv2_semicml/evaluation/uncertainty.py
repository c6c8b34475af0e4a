"""How sure networks are of their own predictions: entropy, and disagreement between folds and between modalities.

Every measure is of the networks of one fold, averaged over the folds, so that what a fold says of its validation cases
can be compared with what all folds say of new ones; only how folds differ from each other has no such counterpart.
May import nnU-Net, `errors` and data/.
"""

import argparse
import json
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import log
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from nnunetv2_semicml.data.checkpoint_file import find_damage
from nnunetv2_semicml.data.environment import environment_folder
from nnunetv2_semicml.data.files import Json, write_json
from nnunetv2_semicml.data.modality_group import Modality, ModalityGroup
from nnunetv2_semicml.data.raw_dataset import CaseFiles, Cases
from nnunetv2_semicml.data.reading import require_whole
from nnunetv2_semicml.data.result_folders import fold_folder, model_folder
from nnunetv2_semicml.errors import UserError, some_of
from nnunetv2_semicml.evaluation.jobs import stamp, try_read_json
from nnunetv2_semicml.evaluation.metrics import classes_of, compute_metrics, fill_undefined
from nnunetv2_semicml.evaluation.progress import Progress

CHECKPOINT = "checkpoint_final.pth"
S = TypeVar("S")
T = TypeVar("T")


class Preprocessed(NamedTuple):
    """A scan as networks take it.

    Attributes:
        data: (C, *spatial).
        properties: nnU-Net's, of the scan.
    """

    data: Tensor
    properties: dict[str, Any]


class FoldLogits(NamedTuple):
    """What networks say of a scan.

    Attributes:
        of_folds: fold -> (heads, *spatial) on the grid of the preprocessed scan, on the CPU.
        features: see `FoldPredictions`.
        properties: nnU-Net's, of the scan.
    """

    of_folds: dict[str, Tensor]
    features: list[float]
    properties: dict[str, Any]


@dataclass(frozen=True)
class FoldPredictions:
    """What the networks of one modality make of a case.

    Attributes:
        segmentation: of the mean of their logits, as nnU-Net's ensemble makes it: (Z, Y, X) on the grid of the scan.
        of_folds: fold -> segmentation by its network alone, on the same grid.
        entropies: fold -> mean entropy of its probabilities where it predicts foreground, of their largest possible one
            (0 … 1); NaN where it predicts none.
        features: mean activations of the last stage of the first network's encoder over the scan; none if it has none.
        properties: nnU-Net's, of the scan.
    """

    segmentation: np.ndarray
    of_folds: dict[str, np.ndarray]
    entropies: dict[str, float]
    features: list[float]
    properties: dict[str, Any]


class FoldPredictor:
    """The networks of one modality, each fold by itself.

    Args:
        model: nnU-Net's model folder.
        folds: 0, 1, … or all.
        device: to predict on.
        mirroring: whether to average over mirrored copies, as nnU-Net does.

    Raises:
        UserError: a checkpoint is missing or damaged.
    """

    def __init__(self, model: Path, folds: Sequence[str], device: torch.device, mirroring: bool = True):
        for file in (fold_folder(model, fold) / CHECKPOINT for fold in folds):
            if not file.is_file():
                raise UserError(file, "no such file", "a finished training", "Train this fold, or leave it out of -f.")
            if damage := find_damage(file):
                raise UserError(file, damage, "a whole checkpoint", "Restore it from a backup, or train again.")
        on_device = device.type == "cuda"
        options = {"use_mirroring": mirroring, "perform_everything_on_device": on_device, "allow_tqdm": False}
        self.folds = list(folds)
        self.predictor = nnUNetPredictor(device=device, **options)
        self.predictor.initialize_from_trained_model_folder(str(model), tuple(folds), CHECKPOINT)
        self._parameters = dict(zip(folds, self.predictor.list_of_parameters, strict=True))

    @property
    def labels(self) -> dict[str, int | tuple[int, ...]]:
        """Classes or regions, name -> value or values."""
        return classes_of(self.predictor.dataset_json["labels"])

    def preprocess(self, files: Sequence[str]) -> Preprocessed:
        """Read a scan, and make of it what networks take.

        Args:
            files: its images, as nnU-Net's reader takes them.
        """
        plans, configuration = self.predictor.plans_manager, self.predictor.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case(
            list(files), None, plans, configuration, self.predictor.dataset_json
        )
        return Preprocessed(torch.from_numpy(data), properties)

    def predict(self, scan: Preprocessed) -> FoldLogits:
        """Ask every network; the part that needs the device."""
        of_folds = {}
        features = _EncoderFeatures(self.predictor.network)
        for fold, parameters in self._parameters.items():
            self.predictor.list_of_parameters = [parameters]
            with features if fold == self.folds[0] else nullcontext():
                of_folds[fold] = self.predictor.predict_logits_from_preprocessed_data(scan.data)
        return FoldLogits(of_folds, features.mean(), scan.properties)

    def segment(self, logits: FoldLogits) -> FoldPredictions:
        """Take what networks say back to the grid of the scan."""
        plans, configuration = self.predictor.plans_manager, self.predictor.configuration_manager
        label_manager = plans.get_label_manager(self.predictor.dataset_json)

        def on_scan(of: Tensor) -> np.ndarray:
            segmentation: np.ndarray = convert_predicted_logits_to_segmentation_with_correct_shape(
                of, plans, configuration, label_manager, logits.properties, num_threads_torch=torch.get_num_threads()
            )
            return segmentation

        of_folds, entropies, total = {}, {}, None
        for fold, of in logits.of_folds.items():
            entropies[fold] = foreground_entropy(of.float(), label_manager)
            of_folds[fold] = on_scan(of)
            total = of.clone() if total is None else total.add_(of)  # in the precision in which nnU-Net does
        assert total is not None  # there is a fold
        whole = of_folds[self.folds[0]] if len(of_folds) == 1 else on_scan(total.div_(len(of_folds)))
        return FoldPredictions(whole, of_folds, entropies, logits.features, logits.properties)

    def write(self, predictions: FoldPredictions, file: Path) -> None:
        """Write the segmentation as nnU-Net does, whole or not at all."""
        writer = self.predictor.plans_manager.image_reader_writer_class()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as folder:
            writer.write_seg(predictions.segmentation, str(Path(folder, file.name)), predictions.properties)
            for written in Path(folder).iterdir():  # a TIFF has its spacing in a file beside it
                written.replace(file.with_name(written.name))


class _EncoderFeatures(AbstractContextManager[None]):
    """Within it, collects the mean activations of the last stage of a network's encoder, over all patches."""

    def __init__(self, network: nn.Module):
        self._encoder = getattr(network, "encoder", None)
        self._sum: Tensor | None = None
        self._number = 0

    def __enter__(self) -> None:
        self._hook = self._encoder and self._encoder.register_forward_hook(self._add)

    def __exit__(self, *error: object) -> None:
        if self._hook:
            self._hook.remove()

    def _add(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        last = outputs[-1] if isinstance(outputs, list | tuple) else outputs
        of_patches = last.float().flatten(2).mean(2).sum(0).cpu()
        self._sum = of_patches if self._sum is None else self._sum + of_patches
        self._number += len(last)

    def mean(self) -> list[float]:
        """Of all patches; nothing if there was no encoder."""
        return [] if self._sum is None else (self._sum / self._number).tolist()


def foreground_entropy(logits: Tensor, label_manager: LabelManager) -> float:
    """Mean entropy of the probabilities where foreground is predicted, as a share of the largest possible one.

    Of classes it is that of the softmax, of regions the mean of those of their sigmoids.

    Args:
        logits: (heads, *spatial).
        label_manager: nnU-Net's.

    Returns:
        0 … 1; NaN where no foreground is predicted.
    """
    if label_manager.has_regions:
        p = logits.sigmoid()
        of_voxels = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean(0) / log(2)
        foreground = (p > 0.5).any(0)
    else:
        p = logits.softmax(0)
        of_voxels = -torch.xlogy(p, p).sum(0) / log(len(p))
        foreground = p.argmax(0) > 0
    return float(of_voxels[foreground].mean()) if bool(foreground.any()) else float("nan")


def compare_segmentations(
    first: np.ndarray, second: np.ndarray, labels: Mapping[str, int | Sequence[int]], spacing: Sequence[float]
) -> dict[str, float]:
    """How two segmentations of a case differ, as the mean over the classes or regions.

    Args:
        first: (Z, Y, X).
        second: the same.
        labels: name -> value or values.
        spacing: of these axes, in mm.

    Returns:
        "disagreement", 1 − Dice, and "hd95" in mm, where a class that neither shows counts as agreed on and one that
        only one shows as `fill_undefined` has it; "volume_difference", of the volumes by their sum, 0 … 1.
    """
    rows = []
    for masks in _masks(first, second, labels):
        metrics = fill_undefined(compute_metrics(*masks, spacing))
        a, b = metrics["n_ref"], metrics["n_pred"]
        rows.append((1 - metrics["dice"], metrics["hd95"], abs(a - b) / (a + b) if a + b else 0.0))
    disagreement, hd95, volume = np.mean(rows, axis=0).tolist()
    return {"disagreement": disagreement, "hd95": hd95, "volume_difference": volume}


def measure(
    predictions: Mapping[str, FoldPredictions],
    labels: Mapping[str, int | Sequence[int]],
    spacing: Sequence[float],
) -> dict[str, dict[str, float]]:
    """All measures of a case.

    Args:
        predictions: modality -> what its networks make of the case, for the modalities that it has.
        labels: of the classes or regions, name -> value or values.
        spacing: of the segmentations, in mm.

    Returns:
        modality -> "volume" in ml and "entropy" and, if there are several folds, "fold_disagreement", the mean of 1 −
        Dice over their pairs; and "A | B" of every pair of modalities -> what `compare_segmentations` returns, in the
        mean over the folds that both have.
    """
    found: dict[str, dict[str, float]] = {}
    voxel = float(np.prod(spacing)) / 1000
    for modality, own in predictions.items():
        volumes = [float((segmentation > 0).sum()) * voxel for segmentation in own.of_folds.values()]
        known = [value for value in own.entropies.values() if not np.isnan(value)]
        entropy = float(np.mean(known)) if known else float("nan")
        found[modality] = {"volume": float(np.mean(volumes)), "entropy": entropy}
        pairs = list(combinations(own.of_folds.values(), 2))
        if pairs:
            differences = [_disagreement(a, b, labels) for a, b in pairs]
            found[modality]["fold_disagreement"] = float(np.mean(differences))
    for (a, of_a), (b, of_b) in combinations(predictions.items(), 2):
        folds = [fold for fold in of_a.of_folds if fold in of_b.of_folds]
        rows = [compare_segmentations(of_a.of_folds[f], of_b.of_folds[f], labels, spacing) for f in folds]
        found[f"{a} | {b}"] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return found


def _disagreement(first: np.ndarray, second: np.ndarray, labels: Mapping[str, int | Sequence[int]]) -> float:
    """1 − Dice, as the mean over the classes or regions; one that neither shows is agreed on."""
    found = []
    for a, b in _masks(first, second, labels):
        tp, fp, fn, _ = map(int, compute_tp_fp_fn_tn(a, b))
        found.append((fp + fn) / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    return float(np.mean(found))


def _masks(
    first: np.ndarray, second: np.ndarray, labels: Mapping[str, int | Sequence[int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for value in labels.values():
        yield region_or_label_to_mask(first, value), region_or_label_to_mask(second, value)


@dataclass(frozen=True)
class Measured:
    """What is known of a case.

    Attributes:
        measures: what `measure` returns.
        features: modality -> those of `FoldPredictions`.
    """

    measures: Mapping[str, Mapping[str, float]]
    features: Mapping[str, Sequence[float]]

    def flat(self, names: Collection[str] | None = None) -> dict[str, float]:
        """A row of a table: "FLAIR entropy", "FLAIR | T1 disagreement", …; of these measures, or of all."""
        return {
            f"{where} {name}": value
            for where, of in self.measures.items()
            for name, value in of.items()
            if names is None or name in names
        }


@dataclass(frozen=True)
class Networks:
    """The trained networks of a group.

    Attributes:
        models: modality -> nnU-Net's model folder.
        folds: 0, 1, … or all.
        device: to predict on.
        mirroring: as nnU-Net's.
        beside: cases that are preprocessed, and others that are measured, while one is predicted.
    """

    models: Mapping[str, Path]
    folds: Sequence[str]
    device: torch.device
    mirroring: bool
    beside: int = 3

    @classmethod
    def of_command_line(cls, group: ModalityGroup, args: argparse.Namespace) -> "Networks":
        """Those of a group that the options -tr, -p, -c, -f, -device, --disable_tta and -np name."""
        if args.np < 1:
            raise UserError("-np", str(args.np), "1 or more", "Correct it.")
        results = environment_folder("nnUNet_results")
        models = {m.name: model_folder(results, m.dataset_name, args.tr, args.p, args.c) for m in group.modalities}
        return cls(models, args.f, torch.device(args.device), not args.disable_tta, args.np)

    def predictors(self) -> dict[str, FoldPredictor]:
        """Those of every modality."""
        options = (self.folds, self.device, self.mirroring)
        return {modality: FoldPredictor(model, *options) for modality, model in self.models.items()}

    def of_fold(self, fold: str) -> "Networks":
        """Those of one fold."""
        return replace(self, folds=[fold])

    def stamps(self) -> Json:
        """What changes when a network changes."""
        files = [fold_folder(model, fold) / CHECKPOINT for model in self.models.values() for fold in self.folds]
        return {"checkpoints": [stamp(file) for file in files], "mirroring": self.mirroring}


def measure_cases(
    cases: Cases, modalities: Sequence[Modality], networks: Networks, out: Path, file_ending: str
) -> dict[str, Measured]:
    """Predict and measure cases, or what is left to do of that.

    Args:
        cases: name -> files.
        modalities: of the group, in the order of its tables.
        networks: theirs.
        out: for predictions/MODALITY/CASE and measures/CASE.json, which are written case by case.
        file_ending: of the predictions.

    Raises:
        UserError: a checkpoint or a scan is missing or damaged, or a case has no modality.
    """
    present_in = {case: present_modalities(files, modalities) for case, files in cases.items()}
    if lacking := [case for case, present in present_in.items() if not present]:
        known = " or ".join(modality.name for modality in modalities)
        raise UserError(
            some_of(lacking), "no modality as a whole", f"all files of {known}", "Add them, or leave it out."
        )
    stamps = networks.stamps()
    inputs = {
        case: {**stamps, "scans": [stamp(file) for of in present.values() for file in of]}
        for case, present in present_in.items()
    }
    inputs = json.loads(json.dumps(inputs))  # as JSON gives it back
    predictions = {
        case: {modality: out / "predictions" / modality / f"{case}{file_ending}" for modality in present}
        for case, present in present_in.items()
    }

    def read(case: str) -> Json | None:
        content = try_read_json(out / "measures" / f"{case}.json") or {}
        there = all(file.is_file() for file in predictions[case].values())
        return content if there and content.get("inputs") == inputs[case] else None

    contents = {case: read(case) for case in cases}
    progress = Progress(dict.fromkeys(cases, ("case", 1)), 1)
    left = []
    for case, content in contents.items():
        if content is None:
            left.append(case)
        else:
            progress.end(case, well=False)
    predictors = networks.predictors() if left else {}

    def prepare(case: str) -> dict[str, Preprocessed]:
        for scan in (scan for of in present_in[case].values() for scan in of):
            require_whole(scan)
        return {modality: predictors[modality].preprocess(scans) for modality, scans in present_in[case].items()}

    def predict(case: str, scans: Mapping[str, Preprocessed]) -> dict[str, FoldLogits]:
        return {modality: predictors[modality].predict(scan) for modality, scan in scans.items()}

    def finish(case: str, logits: Mapping[str, FoldLogits]) -> Json:
        made = {modality: predictors[modality].segment(of) for modality, of in logits.items()}
        for modality, file in predictions[case].items():
            predictors[modality].write(made[modality], file)
        first = next(iter(made))
        measures = measure(made, predictors[first].labels, made[first].properties["spacing"])
        features = {modality: of.features for modality, of in made.items()}
        content: Json = {"inputs": inputs[case], "measures": measures, "features": features}
        write_json(out / "measures" / f"{case}.json", content)
        return content

    measured = staggered(left, prepare, predict, finish, networks.beside)
    for case in left:
        progress.start(case)
        contents[case] = next(measured)
        progress.end(case)
        progress.say(f"{case}; {progress}")
    return {case: Measured(of["measures"], of["features"]) for case, of in contents.items() if of}


def staggered(
    cases: Iterable[str],
    prepare: Callable[[str], S],
    predict: Callable[[str, S], T],
    finish: Callable[[str, T], Json],
    beside: int,
) -> Iterator[Json]:
    """`finish(case, predict(case, prepare(case)))` of every case, in their order.

    Cases are predicted here, one after the other. Up to `beside` of those to come are prepared meanwhile, and as many
    that are predicted are finished, in threads: what they do, in numpy, scipy and torch, mostly lets others run. What
    fails is raised when its turn has come, and what is predicted until then is finished.
    """
    to_come = iter(cases)
    with ThreadPoolExecutor(2 * beside) as pool:
        prepared = deque((case, pool.submit(prepare, case)) for case in islice(to_come, beside))
        finished: deque[Future[Json]] = deque()
        while prepared:
            case, scans = prepared.popleft()
            predicted = predict(case, scans.result())
            prepared.extend((following, pool.submit(prepare, following)) for following in islice(to_come, 1))
            finished.append(pool.submit(finish, case, predicted))
            if len(finished) > beside:
                yield finished.popleft().result()
        yield from (content.result() for content in finished)


def present_modalities(files: CaseFiles, modalities: Sequence[Modality]) -> dict[str, list[str]]:
    """The modalities that a case has -> its images of them."""
    images = {m.name: [files["images"][i] for i in m.files] for m in modalities}
    return {name: [image for image in of if image] for name, of in images.items() if None not in of}

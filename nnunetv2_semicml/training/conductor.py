"""The conductor: nnU-Net's training loop for several networks at once, coupled by their predictions of unlabeled cases.

nnU-Net's command line instantiates a trainer for the multi-modal dataset, or for that of a single modality, and runs
nnU-Net's own loop on it. The trainer is a conductor of stock trainers, one for every network. It draws a labeled batch
of every modality and unlabeled batches of modalities that are compared, computes

    labeled_weight(epoch) * sum_m L_sup(m, labeled) + sum_terms weight_term(epoch) * mean_draws L_term(unlabeled draw)

and passes every other hook on to the stock trainers, which write complete stock model folders of their own.
"""

import os
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from inspect import isclass, isroutine
from itertools import combinations
from math import ceil
from os.path import basename, isfile, join
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.file_path_utilities import convert_identifier_to_trainer_plans_config
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, autocast
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from nnunetv2_semicml.data.checkpoint_file import content_digest
from nnunetv2_semicml.data.environment import environment_folder
from nnunetv2_semicml.data.files import explains_failed_writes, remove_unfinished
from nnunetv2_semicml.data.folds import SPLITS_FILE, read_folds
from nnunetv2_semicml.data.locks import hold_lock, release_lock
from nnunetv2_semicml.data.modality_group import Modality, ModalityGroup, preprocessed_folder
from nnunetv2_semicml.data.result_folders import TRAINING_STATE, fold_folder, model_folder
from nnunetv2_semicml.data.streams import PairedDataLoader, Patches, SemiSupervisedDataLoader
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.training.checkpoint import (
    CHECKPOINT_FORMAT,
    get_random_state,
    load_checkpoint,
    save_atomically,
    set_random_state,
    use_builtin_numbers,
)
from nnunetv2_semicml.training.earlier_training import EARLIER, EarlierTraining
from nnunetv2_semicml.training.loaders import make_loader, start_loading
from nnunetv2_semicml.training.loggers import LoggerOfNetwork, without_external_loggers
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer, make_modality_trainer_class
from nnunetv2_semicml.training.plot_terms import plot_terms
from nnunetv2_semicml.training.pretrained_weights import (
    VARIABLE,
    files_of_modalities,
    load_pretrained_weights,
    named_on_command_line,
)
from nnunetv2_semicml.training.schedules import sigmoid_rampup

# hyper-parameters of nnU-Net, which a subclass may set as class attributes and every modality trainer then has
HYPER_PARAMETERS = (
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
    "probabilistic_oversampling",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "num_epochs",
    "enable_deep_supervision",
    "save_every",
    "disable_checkpointing",
)
# class attributes that change how a training is done, and not what comes of it, or that are noted by their content
NO_SETTINGS = frozenset({"recompute", "micro_batch_size", "save_every", "disable_checkpointing", "pretrained_weights"})
# hooks of nnU-Net that the trainers of the networks are asked for, and a conductor never is
HOOKS_OF_NETWORKS = frozenset(
    {
        "_build_loss",
        "_do_i_compile",
        "_get_deep_supervision_scales",
        "_save_debug_information",
        "_set_batch_size_and_oversample",
        "build_network_architecture",
        "configure_optimizers",
        "configure_rotation_dummyDA_mirroring_and_inital_patch_size",
        "do_split",
        "get_tr_and_val_datasets",
        "get_training_transforms",
        "get_validation_transforms",
        "plot_network_architecture",
        "print_plans",
        "set_deep_supervision_enabled",
    }
)
# hooks of nnU-Net that the conductor is asked for, and a trainer of a network never is
HOOKS_OF_CONDUCTOR = frozenset(
    {
        "get_dataloaders",
        "get_tr_and_val_datasets",
        "load_checkpoint",
        "run_training",
        "save_checkpoint",
        "train_step",
    }
)


class LabeledPatches(NamedTuple):
    """What a network is taught by labels: nnU-Net's batch.

    Attributes:
        image: (B, C, *patch).
        target: (B, 1 or regions, *patch) or, for deep supervision, a list with one for each scale.
    """

    image: Tensor
    target: Tensor | list[Tensor]

    @property
    def full_target(self) -> Tensor:
        """The target at full resolution."""
        return self.target[0] if isinstance(self.target, list) else self.target


@dataclass(frozen=True)
class UnlabeledDraw:
    """Patches of unlabeled cases, the same places of the same cases for every network.

    Attributes:
        images: network -> (B, C, *patch), augmented.
        positions: (B, axes, *patch), see `PairedDataset`; only with `needs_positions`.
    """

    images: dict[str, Tensor]
    positions: Tensor | None = None


T = TypeVar("T")
View = Mapping[str, Tensor]
"""What networks see or make in one look at a draw: network -> images (B, C, *patch), or -> outputs (B, ...)."""


class Conductor(nnUNetTrainer):
    """Trains one network per modality, or several, by nnU-Net's loss on labeled cases and by what a method adds to it.

    A method does not derive from this class but from `nnUNetTrainerSemiSupervised`. Hyper-parameters, nnU-Net's
    included, are class attributes. Hooks of networks, losses, optimizers and augmentation are those of
    `network_trainer`, nnU-Net's own class; a conductor that overrides one of them is refused.

    Attributes:
        network_trainer: the nnU-Net trainer that every network is trained and deployed with.
        min_modalities: fewer are refused.
        compares_modalities: whether the unsupervised terms compare the modalities of a case. A step then draws
            unlabeled cases that have all modalities or, if cases lack some, a batch for every pair from those that have
            both. Otherwise it draws a batch of every modality from all of its cases.
        min_unlabeled: unlabeled cases to draw from, fewer of which are refused.
        networks_per_modality: differently initialized networks of every modality, of which the first is deployed.
        needs_positions: whether draws tell where in its case a patch lies.
        mixes_labeled: whether `views_and_targets` looks at labeled patches, which are drawn then even if
            `supervised_weight` is 0.
        pairs_labeled: whether these show the same places of the same cases for all networks of a draw; otherwise every
            network has labeled patches of its own.
        term_weights: every term that `unsupervised_terms` may return -> the attribute that is its weight, which the
            base ramps and logs.
        unlabeled_batch_size: unlabeled cases per draw; None takes the plans' batch size, but at least the two cases
            that a contrast needs.
        supervised_weight: weight of nnU-Net's loss on labeled cases; 0 leaves these out.
        supervised_weight_after_warmup: the same from the end of the warm-up on; None: it stays as it is.
        warmup_fraction: share of the schedule in which networks learn from labeled cases alone.
        rampup_fraction: share of the schedule after that over which `ramp` rises.
        recompute: whether activations are recomputed in the backward pass instead of held, see `train_step`; None
            chooses, and says why in the log.
        micro_batch_size: when recomputing, the cases that go through a network at a time; None takes the batch size,
            for which the plans were made. Fewer need less memory and more time.
        pretrained_weights: files with weights that networks begin with, modality -> file, or one for all; the
            environment variable nnUNet_semicml_pretrained_weights, and nnU-Net's -pretrained_weights before that, go
            before it. A training that is continued or validated has its own weights.
        trainers: the trainers of the networks, in the order of the modalities, from `initialize` on.

    With several processes (-num_gpus), the unlabeled cases of a step are shared out among them, as the batch is.
    """

    # of nnU-Net's trainer, which has no types
    output_folder: str
    log_file: str
    was_initialized: bool
    current_epoch: int
    num_epochs: int = 1000
    dataloader_train: Any

    schedules: ClassVar[dict[int, type["Conductor"]]] = {}  # of a method, see `with_schedules`
    network_trainer: type[nnUNetTrainer] = nnUNetTrainer
    min_modalities = 1
    compares_modalities = False
    min_unlabeled = 1
    networks_per_modality = 1
    needs_positions = False
    mixes_labeled = False
    pairs_labeled = False
    term_weights: ClassVar[Mapping[str, str]] = {}
    unlabeled_batch_size: int | None = None
    supervised_weight = 1.0
    supervised_weight_after_warmup: float | None = None
    warmup_fraction = 0.0
    rampup_fraction = 0.4
    recompute: bool | None = None
    micro_batch_size: int | None = None
    pretrained_weights: str | Mapping[str, str] | None = None

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),
    ):
        name = type(self).__name__
        self._require_that_nothing_is_ignored()
        environment_folder("nnUNet_results")
        self.group = ModalityGroup.load(plans["dataset_name"])
        if len(self.group.modalities) < self.min_modalities:
            raise NotImplementedError(
                f"{name} needs at least {self.min_modalities} modalities, but {self.group.file} has "
                f"{len(self.group.modalities)}. Train it on the multi-modal dataset."
            )
        if "previous_stage" in plans["configurations"].get(configuration, {}):
            raise NotImplementedError(f"{name} does not support the cascade: train 3d_fullres or 3d_lowres instead.")
        self.datasets = dict.fromkeys([self.group.dataset_name, *(m.dataset_name for m in self.group.modalities)])
        for dataset in self.datasets:  # nobody plans again what is being trained on
            self._hold(preprocessed_folder(dataset), fold, shared=True)
        self.modality_plans = self.group.require_ready(plans, configuration)
        self._require_cases(fold)
        batch_size = PlansManager(plans).get_configuration(configuration).batch_size
        if dist.is_available() and dist.is_initialized() and batch_size % dist.get_world_size():
            raise NotImplementedError(
                f"{name} shares a batch out equally, which nnU-Net's batch Dice needs: {batch_size} cases do not fit "
                f"-num_gpus {dist.get_world_size()}. Choose a divisor, or another batch_size in the plans of all "
                f"datasets of {self.group.file}."
            )
        self.require_prerequisites(plans, configuration, fold)
        self.continue_training = plans["continue_training"]
        self._take_folders(plans, configuration, fold)
        self._seed_everything()

        first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
        with nullcontext() if first else without_external_loggers():
            super().__init__(plans, configuration, fold, _without_cases(dataset_json), device)
        for attribute in HYPER_PARAMETERS:  # nnU-Net has just set its own on the instance
            if hasattr(type(self), attribute):
                setattr(self, attribute, getattr(type(self), attribute))
        if self.group.is_single:  # the model folder is the modality trainer's
            self.output_folder = join(self.output_folder, TRAINING_STATE)
            Path(self.output_folder).mkdir(exist_ok=True)
            self._move_log_file()
        self.trainers: list[ModalityTrainer] = []
        self.distinct_cases = 0  # that every unlabeled draw can have, in all processes together
        self.first_stage_digest: str | None = None
        self.pretrained_digests: dict[str, str] = {}  # of the files, by modality
        self._random_state: dict[str, Any] | None = None
        self._validate_best = False
        self._continued = False

    def _move_log_file(self) -> None:
        """Take the log, which nnU-Net's trainer has begun, to where this one's results are."""
        begun, self.log_file = self.log_file, join(self.output_folder, basename(self.log_file))
        if self.local_rank == 0 and isfile(begun):  # whose log it is; the other processes would take it from it
            Path(begun).replace(self.log_file)

    def _hold(self, folder: Path, fold: int | str, shared: bool = False) -> None:
        """Lock a folder until this object is gone, or the process, however it ends."""
        hold_lock(folder, f"training {type(self).__name__}, fold {fold}", shared)
        weakref.finalize(self, release_lock, folder)

    def _take_folders(self, plans: dict[str, Any], configuration: str, fold: int | str) -> None:
        """Let no other process write where this one does, and find whole what --c goes on from."""
        results, trainer, plans_name = environment_folder("nnUNet_results"), type(self).__name__, plans["plans_name"]
        models = [model_folder(results, dataset, trainer, plans_name, configuration) for dataset in self.datasets]
        folders = [fold_folder(model, fold) for model in models]
        distributed = dist.is_available() and dist.is_initialized()
        self.earlier = EarlierTraining([folders[0] / TRAINING_STATE, *folders] if self.group.is_single else folders)
        if not distributed or dist.get_rank() == 0:
            for folder in folders:
                self._hold(folder, fold)
            for folder in self.earlier.folders:
                remove_unfinished(folder)
            self.earlier.restore_interrupted()
            if self.continue_training and self.earlier.bring_back():
                print(f"The training that was to replace the one in {folders[0]} left no checkpoint to go on from.")
        if distributed:
            dist.barrier()  # the others look for checkpoints, too

    def _require_that_nothing_is_ignored(self) -> None:
        """Refuse overrides that nobody would call, and hyper-parameters that nobody would read."""
        name = type(self).__name__
        derived = type(self).__mro__[: type(self).__mro__.index(nnUNetTrainer)]
        for c in derived:
            if any(isroutine(v) or isinstance(v, property | staticmethod | classmethod) for v in vars(c).values()):
                continue  # code of its own, which may read what it sets
            known = {*HYPER_PARAMETERS}.union(*(vars(other) for other in type(self).__mro__ if other is not c))
            if unknown := sorted(name for name in vars(c).keys() - known if not name.startswith("_")):
                raise AttributeError(
                    f"{c.__name__} sets {', '.join(unknown)}, which no trainer that it is made of has."
                )
        own = {hook for c in derived for hook in vars(c)}
        if misplaced := sorted(own & HOOKS_OF_NETWORKS):
            raise NotImplementedError(
                f"{name} overrides {', '.join(misplaced)}, of which its networks' trainers are asked. Define it in a "
                f"subclass of {self.network_trainer.__name__}, and name that as network_trainer of {name}."
            )
        classes = self.network_trainer.__mro__
        of_network = {hook for c in classes[: classes.index(nnUNetTrainer)] for hook in vars(c)}
        if misplaced := sorted(of_network & HOOKS_OF_CONDUCTOR):
            raise NotImplementedError(
                f"{self.network_trainer.__name__}, the network_trainer of {name}, overrides {', '.join(misplaced)}, of "
                f"which {name} is asked. Define it there, or name another network_trainer."
            )

    # what a method defines

    def require_prerequisites(self, plans: dict[str, Any], configuration: str, fold: int | str) -> None:
        """Refuse what cannot be trained, before nnU-Net makes any folder."""

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], Any]:
        """Say what the learners see of a draw, and what their outputs are compared with, if not with each other.

        The draw itself, unless a method says otherwise: strong or several views of it, mixtures with labeled patches of
        the same network. A view may have any number of cases, and leave networks out.

        Args:
            unlabeled: the draw.
            labeled: network -> the labeled patches of the step, or those that belong to the draw (`pairs_labeled`);
                nothing without `mixes_labeled`.

        Returns:
            The views, and anything without gradient that `unsupervised_terms` needs.
        """
        return [unlabeled.images], None

    def unlabeled_output(self, trainer: ModalityTrainer, images: Tensor, view: int) -> Tensor:
        """What the unsupervised terms see of a network: its logits (B, heads, *patch) of images (B, C, *patch).

        Args:
            trainer: that of the network.
            images: some cases of a view.
            view: its number.
        """
        logits: Tensor = trainer.local_network()(images)
        return logits

    def unsupervised_terms(self, outputs: Sequence[View], targets: Any) -> dict[str, Tensor]:
        """Compute the unsupervised loss terms on a draw of unlabeled cases.

        Args:
            outputs: for every view, `unlabeled_output` of every network that it shows and that is one of `learners`, in
                float32.
            targets: what `views_and_targets` returned beside the views.

        Returns:
            Scalar terms by name, unweighted; a term is averaged over the draws of the step that have it (see
            `over_networks`). With several processes, a mean over this one's cases, or a quantity of all
            cases with the gradient that `losses` documents; the gradients are averaged over the processes.
        """
        raise NotImplementedError

    def unsupervised_weights(self) -> dict[str, float]:
        """Weight in the current epoch of every term that `unsupervised_terms` may return; the names never change."""
        ramp = self.ramp()
        return {term: ramp * getattr(self, attribute) for term, attribute in self.term_weights.items()}

    def labeled_views(
        self, labeled: Mapping[str, LabeledPatches], draws: Sequence[UnlabeledDraw]
    ) -> Mapping[str, LabeledPatches]:
        """Say what nnU-Net's loss sees: the labeled patches, unless a method mixes them or adds pseudo-labeled ones.

        Asked in every step, also while `warming_up`.

        Args:
            labeled: network -> its labeled patches.
            draws: the unlabeled patches of the step.
        """
        return labeled

    def learners(self) -> list[ModalityTrainer]:
        """The trainers whose networks learn in the current epoch; the others rest."""
        return self.trainers

    def get_method_state(self) -> dict[str, Any]:
        """What the method adds to the joint checkpoint; readable with weights_only."""
        return {}

    def set_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_method_state` returned."""

    # the course of a training

    @property
    def warmup_epochs(self) -> int:
        """How many epochs the networks learn from labeled cases alone."""
        return round(self.warmup_fraction * self.num_epochs)

    @property
    def warming_up(self) -> bool:
        """Whether the current epoch is one of these."""
        return self.current_epoch < self.warmup_epochs

    def ramp(self) -> float:
        """Share of the full unsupervised weight in this epoch: 0 while warming up, 1 after `rampup_fraction` more."""
        if self.warming_up:
            return 0.0
        return sigmoid_rampup(self.current_epoch - self.warmup_epochs, self.rampup_fraction * self.num_epochs)

    @property
    def labeled_weight(self) -> float:
        """Weight of nnU-Net's loss on labeled cases in this epoch."""
        later = self.supervised_weight_after_warmup
        return self.supervised_weight if self.warming_up or later is None else later

    # the draws of unlabeled cases, and of labeled ones

    def draws(self) -> list[tuple[str, ...]]:
        """Which modalities the unlabeled patches of a step show together; the same in every step and process."""
        names = [modality.name for modality in self.group.modalities]
        if not self.compares_modalities:
            return [(name,) for name in names]
        pairs: list[tuple[str, ...]] = list(combinations(names, 2))
        common = [self.group.common_cases(pair, labeled=False) for pair in pairs]
        return [tuple(names)] if all(cases == common[0] for cases in common) else pairs

    def labeled_draws(self) -> list[tuple[str, ...]]:
        """Which modalities the labeled patches of a step show together; with `pairs_labeled` first as `draws` does."""
        own: list[tuple[str, ...]] = [(modality.name,) for modality in self.group.modalities]
        if not self.pairs_labeled:
            return own
        draws = self.draws()
        complete = len(draws) == 1 and len(self.group.patterns(labeled=True)) == 1
        return draws if complete else [*draws, *own]  # no case is left out of the supervised loss

    def unlabeled_cases(self, draw: Sequence[str]) -> list[str]:
        """The unlabeled cases that patches of these modalities are drawn from."""
        return self.group.common_cases(draw, labeled=False)

    @property
    def cases_per_draw(self) -> int:
        """Unlabeled cases of a draw, in all processes together."""
        planned: int = self.configuration_manager.batch_size
        return self.unlabeled_batch_size or max(2, planned)

    def cases_here(self, cases: int) -> int:
        """How many of a draw's cases fall to this process: to all equally many, rounded up."""
        return ceil(cases / self._world_size)

    def different_cases(self, unlabeled: Tensor) -> Tensor:
        """The patches of a draw that are surely of different cases, since none is to be contrasted with itself."""
        return unlabeled[: self.cases_here(min(self.cases_per_draw, self.distinct_cases))]

    def over_networks(self, terms: Iterable[Tensor]) -> Tensor:
        """Sum over all networks, of which a draw may show some: the mean of theirs, times the number of all."""
        return len(self.trainers) * torch.stack(list(terms)).mean()

    def _require_cases(self, fold: int | str) -> None:
        """Refuse too few unlabeled cases, and nnU-Net's random split where it would differ between modalities."""
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        for draw in self.draws():
            number, needed = len(self.group.common_cases(draw, labeled=False)), max(self.min_unlabeled, world_size)
            if number < needed:
                raise UserError(
                    self.group.file,
                    f"{number} unlabeled cases with {' and '.join(draw)}",
                    f"at least {needed}, which {type(self).__name__} contrasts or deals out to processes",
                    "Add some, or train another method: nnUNetTrainerSupervisedEMA or stock nnU-Net needs none.",
                )
        folds = read_folds(self.group.file.with_name(SPLITS_FILE))
        incomplete = len(self.group.patterns(labeled=True)) > 1
        if isinstance(fold, int) and fold >= len(folds) and incomplete:
            raise UserError(
                self.group.file.with_name(SPLITS_FILE),
                f"{len(folds)} folds",
                f"fold {fold}, since nnU-Net's random split would differ between modalities that some cases lack",
                "Train one of the folds in this file.",
            )

    # setting up

    def initialize(self) -> None:
        """Build the trainers of the networks and let them build these."""
        if self.was_initialized:
            raise RuntimeError("initialize was called twice.")
        if self.warmup_epochs and not self.supervised_weight:
            raise ValueError("Networks warm up on labeled cases: warmup_fraction needs a supervised_weight.")
        for line in self.group.describe():
            self.print_to_log_file(line)
        self.logger.update_config({"settings": self.settings()})
        for modality, modality_plans in zip(self.group.modalities, self.modality_plans, strict=True):
            for number in range(1, self.networks_per_modality + 1):
                self.trainers.append(self._make_trainer(modality, modality_plans, number))
        self._choose_micro_batches()
        for key in self.log_keys():
            self.logger.local_logger.my_fantastic_logging.setdefault(key, [])
        self.was_initialized = True

    def _make_trainer(
        self, modality: Modality, modality_plans: tuple[dict[str, Any], dict[str, Any]], number: int
    ) -> ModalityTrainer:
        """The trainer of a modality's network number 1, which is deployed, or 2, …"""
        plans, dataset_json = modality_plans
        channels = [dataset_json["channel_names"][str(i)] for i in range(len(modality.channels))]
        trainer_class = make_modality_trainer_class(
            self.network_trainer,
            type(self).__name__,
            modality.name if number == 1 else f"{modality.name} network {number}",
            modality,
            number == 1,
            channels,
        )
        plans = {**plans, "continue_training": self.continue_training}
        with without_external_loggers():
            trainer = trainer_class(
                plans, self.configuration_name, self.fold, _without_cases(dataset_json), self.device
            )
        trainer.logger.loggers = [LoggerOfNetwork(logger, trainer.name) for logger in self.logger.loggers]
        if not trainer.deployed:  # its log and curves are nothing for a model folder
            trainer.output_folder = join(self.output_folder, trainer.name.replace(" ", "_"))
            Path(trainer.output_folder).mkdir(exist_ok=True)
            trainer.log_file = join(trainer.output_folder, basename(trainer.log_file))
        for attribute in (*HYPER_PARAMETERS, "current_epoch"):
            setattr(trainer, attribute, getattr(self, attribute))
        trainer.initialize()
        return trainer

    def _choose_micro_batches(self) -> None:
        cases = [len(self.group.common_cases(draw, labeled=False)) for draw in self.draws()]
        self.distinct_cases = min(cases, default=0) // self._world_size * self._world_size
        if cases and self.cases_per_draw > self.distinct_cases:
            self.print_to_log_file(
                f"A draw of {self.cases_per_draw} unlabeled patches has several of a case, since there may be only "
                f"{self.distinct_cases} cases to draw from; only patches of different cases are contrasted."
            )
        batch_norm = any(isinstance(m, _BatchNorm) for t in self.trainers for m in t.network.modules())
        if self.recompute and batch_norm:
            raise NotImplementedError("Batch normalization does not work with recompute: set it to False.")
        if self.recompute is not None:
            reason = "as set"
        elif batch_norm:
            self.recompute, reason = False, "batch normalization would count the cases twice"
        elif self.device.type == "cuda":
            self.recompute, reason = True, "the plans fit the GPU with one network at a time"
        else:
            self.recompute = self.cases_here(self.cases_per_draw) > self.cases_at_a_time
            reason = f"{self.cases_here(self.cases_per_draw)} unlabeled cases, {self.cases_at_a_time} at a time"
        how = "recomputed in the backward pass" if self.recompute else "held until the backward pass"
        self.print_to_log_file(f"Activations are {how}: {reason}.")

    @property
    def network(self) -> "_NoSingleNetwork":
        """What nnU-Net takes for its one network; it asks for it where -pretrained_weights is to be loaded.

        All networks have the weights then, and nnU-Net, which would run what is in the file, gets one that was read
        without running code.
        """
        file = named_on_command_line()
        if file is not None:
            self.load_pretrained_weights(dict.fromkeys((m.name for m in self.group.modalities), file))
        return _NoSingleNetwork(type(self).__name__, file)

    @network.setter
    def network(self, network: None) -> None:
        """Every trainer has its own; nnU-Net sets None here."""

    def load_pretrained_weights(self, files: Mapping[str, str]) -> None:
        """Let networks begin with weights from files, all layers but those that make the segmentation.

        Args:
            files: modality -> file, of nnU-Net or of a modality's model; modalities that are left out stay as they are.

        Raises:
            UserError: a file is damaged, could run code or does not fit, or this is a second stage.
        """
        if hasattr(self, "first_stage"):
            raise UserError(
                next(iter(files.values()), VARIABLE),
                f"pretrained weights for {type(self).__name__}",
                f"none, since it begins with the networks of {self.first_stage.__name__}",
                "Train that one with them.",
            )
        if not self.was_initialized:
            self.initialize()
        for sentence in load_pretrained_weights(self.trainers, files):
            self.print_to_log_file(sentence)
        self.pretrained_digests = {modality: content_digest(file) for modality, file in files.items()}

    def _begin_with_pretrained_weights(self) -> None:
        """Load what the environment or the class names, where a training begins and its command line named none."""
        if self._continued or self.pretrained_digests:
            return
        for where, named in (
            (f"environment variable {VARIABLE}", os.environ.get(VARIABLE)),
            (f"pretrained_weights of {type(self).__name__}", self.pretrained_weights),
        ):
            if named:
                self.load_pretrained_weights(files_of_modalities(named, [m.name for m in self.group.modalities], where))
                return

    @property
    def cases_at_a_time(self) -> int:
        """The micro-batch size, as set or as the plans were made for."""
        return self.micro_batch_size or int(self.trainers[0].batch_size)

    @cached_property  # what the training began with, whatever is written to the folds' file meanwhile
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must belong to, to be of use for this trainer."""
        return {
            "dataset": self.plans_manager.dataset_name,
            "modalities": [m.name for m in self.group.modalities],
            "plans": self.plans_manager.plans_name,
            "configuration": self.configuration_name,
            "fold": self.fold,
            **self.group.provenance(self.plans_manager.plans, self.configuration_name, self.fold),
            "trainer": type(self).__name__,
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """What a checkpoint was made of: `identity`, `settings`, and what it began with, if that was not chance."""
        return {
            **self.identity,
            "settings": self.settings(),
            "first stage": self.first_stage_digest,
            "pretrained weights": self.pretrained_digests,
        }

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The hyper-parameters that are class attributes, name -> value, of which trained weights are made."""
        classes = cls.__mro__[: cls.__mro__.index(nnUNetTrainer)]
        names = {name for c in classes for name in vars(c) if not name.startswith("_")} - NO_SETTINGS
        values = {name: getattr(cls, name) for name in sorted(names)}
        found = {name: value.__name__ if isclass(value) else value for name, value in values.items()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if isinstance(value, bool | int | float | str | tuple | list | None)
        }

    def _seed_everything(self) -> None:
        # nnU-Net offers no seed; with nnUNet_n_proc_DA=0 this one makes whole runs repeatable
        seed = os.environ.get("nnUNet_semicml_seed")
        if seed is not None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            for seed_generator in (torch.manual_seed, np.random.seed, random.seed):
                seed_generator(int(seed) + rank)

    def log_keys(self) -> list[str]:
        """What is logged in every epoch beside nnU-Net's own: the terms and their weights."""
        weights = self.unsupervised_weights()
        return [f"unsupervised/{term}" for term in weights] + [f"weight/{term}" for term in weights]

    # data

    def get_dataloaders(self) -> tuple[SingleThreadedAugmenter | NonDetMultiThreadedAugmenter, ...]:
        """Streams of patches: labeled and unlabeled ones for training, labeled ones for validation.

        Every modality has labeled patches of its own, of all of its cases. It is validated on patches that all
        modalities show together, so that their Dice can be compared, unless no validation case has all modalities.
        """
        return self._training_stream(), self._validation_stream()

    def _training_stream(self) -> SingleThreadedAugmenter | NonDetMultiThreadedAugmenter:
        deployed = self._deployed_trainers()
        batch_size, unlabeled = deployed[0].batch_size, self.cases_here(self.cases_per_draw)
        cases = {t.name: t.do_split()[0] for t in deployed}

        def labeled_loader(draw: tuple[str, ...]) -> PairedDataLoader:
            together = set.intersection(*(set(cases[name]) for name in draw))
            if not together:
                raise UserError(
                    self.group.file.with_name(SPLITS_FILE),
                    f"no training case of fold {self.fold} with {' and '.join(draw)}",
                    f"one at least, whose patches {type(self).__name__} mixes with unlabeled ones in all of these",
                    "Train another fold or another method.",
                )
            own = [case for case in cases[draw[0]] if case in together]
            return make_loader([t for t in deployed if t.name in draw], own, batch_size, labeled=True, augment=True)

        def unlabeled_loader(draw: tuple[str, ...]) -> PairedDataLoader:
            return make_loader(
                [t for t in deployed if t.name in draw],
                # each process draws from cases of its own, so that no two contrast a case with itself
                self.unlabeled_cases(draw)[self.local_rank :: self._world_size],
                unlabeled,
                labeled=False,
                augment=True,
                positions=self.needs_positions,
            )

        loader = SemiSupervisedDataLoader(
            [labeled_loader(draw) for draw in self.labeled_draws()] if self._draws_labeled else [],
            [unlabeled_loader(draw) for draw in self.draws()],
        )
        return self._start_loading(loader, get_allowed_n_proc_DA())

    def _validation_stream(self) -> SingleThreadedAugmenter | NonDetMultiThreadedAugmenter:
        deployed = self._deployed_trainers()
        cases = {t: t.do_split()[1] for t in deployed}
        together = set.intersection(*map(set, cases.values()))
        if not together:
            self.print_to_log_file(
                "WARNING: no validation case has all modalities: each is validated on its own cases, and the Dice of "
                "different modalities cannot be compared."
            )
        of_draws = [(deployed, sorted(together))] if together else [([t], own) for t, own in cases.items()]
        loader = SemiSupervisedDataLoader(
            [make_loader(who, own, deployed[0].batch_size, labeled=True, augment=False) for who, own in of_draws]
        )
        workers = get_allowed_n_proc_DA()
        return self._start_loading(loader, workers // 2 if workers > 1 else workers)

    def _start_loading(
        self, loader: SemiSupervisedDataLoader, workers: int
    ) -> SingleThreadedAugmenter | NonDetMultiThreadedAugmenter:
        augmenter = start_loading(loader, workers, pin_memory=self.device.type == "cuda")
        next(augmenter)  # as nnU-Net does: the workers start here, and what is wrong with the data shows now
        return augmenter

    def restart_training_stream(self) -> None:
        """Draw from the cases that `unlabeled_cases` names now."""
        if isinstance(self.dataloader_train, NonDetMultiThreadedAugmenter):
            self.dataloader_train._finish()
        self.dataloader_train = self._training_stream()

    @property
    def _draws_labeled(self) -> bool:
        return bool(self.supervised_weight) or self.mixes_labeled

    def labeled_patches(self, batch: Mapping[str, Sequence[Patches]]) -> dict[str, LabeledPatches]:
        """The labeled part of a batch, on the device, by network."""
        of_modality = {name: patches for patches in batch["labeled"] for name in patches["images"]}
        return self._labeled_on_device(of_modality)

    def mixing_partners(self, batch: Mapping[str, Sequence[Patches]]) -> list[dict[str, LabeledPatches]]:
        """For every unlabeled draw of a batch the labeled patches that `views_and_targets` is given, on the device."""
        draws = len(batch["unlabeled"])
        if not self.mixes_labeled:
            return [{} for _ in range(draws)]
        if not self.pairs_labeled:
            return [self.labeled_patches(batch)] * draws
        return [self._labeled_on_device(dict.fromkeys(p["images"], p)) for p in batch["labeled"][:draws]]

    def _labeled_on_device(self, of_modality: Mapping[str, Patches]) -> dict[str, LabeledPatches]:
        """Network -> labeled patches, of the draw that each modality is taken from."""
        moved = {}
        for modality, patches in of_modality.items():
            target = patches["targets"][modality]
            scales = [self._on_device(scale) for scale in (target if isinstance(target, list) else [target])]
            image = self._on_device(patches["images"][modality])
            moved[modality] = LabeledPatches(image, scales if isinstance(target, list) else scales[0])
        return {t.name: moved[t.modality.name] for t in self.trainers if t.modality.name in moved}

    def unlabeled_draws(self, batch: Mapping[str, Sequence[Patches]]) -> list[UnlabeledDraw]:
        """The unlabeled part of a batch, on the device."""
        draws = []
        for patches in batch["unlabeled"]:
            own = {name: self._on_device(image) for name, image in patches["images"].items()}
            images = {t.name: own[t.modality.name] for t in self.trainers if t.modality.name in own}
            positions = patches["positions"]
            draws.append(UnlabeledDraw(images, None if positions is None else self._on_device(positions)))
        return draws

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _deployed_trainers(self) -> list[ModalityTrainer]:
        """One of each modality."""
        return [trainer for trainer in self.trainers if trainer.deployed]

    # training

    def run_training(self) -> None:
        """Train as nnU-Net does."""
        with explains_failed_writes(self.output_folder, "Make room, and continue with --c."):
            super().run_training()

    def on_train_start(self) -> None:
        """Let every trainer of a network write its model folder, and open the streams."""
        if not self.was_initialized:
            self.initialize()
        self._validate_best = False
        self._begin_with_pretrained_weights()
        if self.local_rank == 0 and not self._continued and not self.disable_checkpointing and self.earlier.set_aside():
            self.print_to_log_file(f"What an earlier training left stands in {EARLIER} until this one is finished.")
        for trainer in self.trainers:
            trainer.provenance = {**self.provenance, "modality": trainer.modality.name, "channels": trainer.channels}
            trainer.on_train_start()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        if self._random_state is not None:  # only now: opening the streams draws random numbers
            set_random_state(self._random_state, self.device)
            self._random_state = None

    def on_epoch_start(self) -> None:
        """Start the epoch everywhere."""
        super().on_epoch_start()
        for trainer in self.trainers:
            trainer.on_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Set learning rates and training mode everywhere."""
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")
        for trainer in self.trainers:
            trainer.on_train_epoch_start()
        self.logger.log("lrs", self.trainers[0].optimizer.param_groups[0]["lr"], self.current_epoch)

    @property
    def _world_size(self) -> int:
        return dist.get_world_size() if self.is_ddp else 1

    def train_step(self, batch: Mapping[str, Sequence[Patches]]) -> dict[str, Any]:
        """Make one coupled step of all networks.

        The networks are coupled by their predictions of unlabeled cases alone. The activations behind all of these are
        either held until the gradient of the unsupervised loss has gone through, or recomputed when that gradient
        arrives, one network and `micro_batch_size` cases at a time: the same result for the activation memory of one
        network at the planned batch size. The labeled cases follow, network by network.
        """
        draws = self.unlabeled_draws(batch)
        learners = self.learners()
        for trainer in learners:
            trainer.optimizer.zero_grad(set_to_none=True)
        terms, total = self._unsupervised_step(learners, draws, [] if self.warming_up else self.mixing_partners(batch))
        taught = self.labeled_views(self.labeled_patches(batch), draws) if self.labeled_weight else {}
        supervised = {}
        exchanges = []
        for trainer in learners:
            if self.labeled_weight:
                loss = self._supervised_step(trainer, taught[trainer.name])
                supervised[trainer.name] = loss
                total = total + self.labeled_weight * loss
            if self.is_ddp:
                exchanges += self._average_gradients(trainer)  # while the next network computes
        for exchange in exchanges:
            exchange.wait()
        for trainer in learners:
            if self.grad_scaler is not None:
                self.grad_scaler.unscale_(trainer.optimizer)
            torch.nn.utils.clip_grad_norm_(trainer.trained_parameters(), 12)
            if self.grad_scaler is not None:
                self.grad_scaler.step(trainer.optimizer)
            else:
                trainer.optimizer.step()
        if self.grad_scaler is not None:
            self.grad_scaler.update()
        values = torch.stack([total, *supervised.values(), *terms.values()]).cpu().numpy()  # the one synchronization
        n = len(supervised) + 1
        return {
            "loss": values[0],
            "supervised": dict(zip(supervised, values[1:n], strict=True)),
            "unsupervised": dict(zip(terms, values[n:], strict=True)),
        }

    def _unsupervised_step(
        self,
        learners: Sequence[ModalityTrainer],
        draws: Sequence[UnlabeledDraw],
        partners: Sequence[Mapping[str, LabeledPatches]],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradient of the unsupervised loss; return its terms and their weighted sum, detached."""
        terms = {} if self.warming_up else self._unsupervised_loss(learners, draws, partners)
        weights = self.unsupervised_weights()
        self._require_live(terms, weights)
        total = sum((weights[name] * term for name, term in terms.items()), start=torch.zeros((), device=self.device))
        if terms:
            self._scale(total).backward()
        return {name: term.detach() for name, term in terms.items()}, total.detach()

    def _unsupervised_loss(
        self,
        learners: Sequence[ModalityTrainer],
        draws: Sequence[UnlabeledDraw],
        partners: Sequence[Mapping[str, LabeledPatches]],
    ) -> dict[str, Tensor]:
        """The terms of a step, with their graph."""
        of_draws: dict[str, list[Tensor]] = {}
        for draw, labeled in zip(draws, partners, strict=True):
            views, targets = self.views_and_targets(draw, labeled)
            outputs = []
            for number, view in enumerate(views):
                present = [t for t in learners if t.name in view]
                # the last network of all may hold its activations, since the gradient reaches it first
                last = present[-1] if present and draw is draws[-1] and number == len(views) - 1 else None
                outputs.append({t.name: self._unlabeled_forward(t, view[t.name], number, t is last) for t in present})
            for name, term in self.unsupervised_terms(outputs, targets).items():
                of_draws.setdefault(name, []).append(term)
        return {name: torch.stack(values).mean() for name, values in of_draws.items()}

    def _require_live(self, terms: Mapping[str, Tensor], declared: Mapping[str, float]) -> None:
        """Refuse what would be left out of the loss, or would teach nothing, without a word."""
        name = type(self).__name__
        if undeclared := sorted(terms.keys() - declared.keys()):
            raise ValueError(f"{name} computes {', '.join(undeclared)}, but term_weights has {', '.join(declared)}.")
        if dead := [term for term, value in terms.items() if not value.requires_grad]:
            raise ValueError(f"{name} computes {', '.join(dead)} without a gradient: no network would learn from it.")

    def _unlabeled_forward(self, trainer: ModalityTrainer, images: Tensor, view: int, hold: bool) -> Tensor:
        """What the unsupervised terms see of a network, in float32."""

        def compute(cases: Tensor) -> list[Tensor]:
            with self._full_resolution(trainer), self._autocast():
                return [self.unlabeled_output(trainer, cases, view)]

        (output,) = self._in_micro_batches(compute, images, hold)
        return output.float()

    @contextmanager
    def _full_resolution(self, trainer: ModalityTrainer) -> Iterator[None]:
        """A network makes one output, that of full resolution."""
        trainer.set_deep_supervision_enabled(False)
        try:
            yield
        finally:
            trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)

    def _supervised_step(self, trainer: ModalityTrainer, patches: LabeledPatches) -> Tensor:
        """Add the gradient of nnU-Net's loss on labeled cases; return it, detached."""

        def compute(cases: Tensor) -> list[Tensor]:
            with self._autocast():
                outputs = trainer.local_network()(cases)
            return outputs if isinstance(outputs, list) else [outputs]

        outputs = self._in_micro_batches(compute, patches.image, hold=True)
        with self._autocast():
            loss: Tensor = trainer.loss(outputs if isinstance(patches.target, list) else outputs[0], patches.target)
        self._scale(self.labeled_weight * loss).backward()
        return loss.detach()

    def _in_micro_batches(self, compute: Callable[[Tensor], list[Tensor]], images: Tensor, hold: bool) -> list[Tensor]:
        """Send cases through a network; activations that fit into one micro-batch are held if they may be."""
        if not self.recompute or (hold and len(images) <= self.cases_at_a_time):
            return compute(images)
        parts = [checkpoint(compute, cases, use_reentrant=False) for cases in images.split(self.cases_at_a_time)]
        return [of_parts[0] if len(parts) == 1 else torch.cat(of_parts) for of_parts in zip(*parts, strict=True)]

    def _average_gradients(self, trainer: ModalityTrainer) -> list[dist.Work]:
        """Start to average a network's gradients over the processes; return what to wait for.

        Not by the wrapper of nnU-Net's DDP, whose forward pass is not used in training: it wants one forward and one
        backward pass of all weights per step.
        """
        gradients = [p.grad for p in trainer.trained_parameters() if p.grad is not None]
        torch._foreach_div_(gradients, self._world_size)
        return [dist.all_reduce(gradient, async_op=True) for gradient in gradients]

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _scale(self, loss: Tensor) -> Tensor:
        scaled: Tensor = loss if self.grad_scaler is None else self.grad_scaler.scale(loss)
        return scaled

    def on_train_epoch_end(self, train_outputs: Sequence[dict[str, Any]]) -> None:
        """Log the total here, each supervised loss with its modality, and the mean of every unsupervised term.

        What was not computed in this epoch, e.g. of a network that rests, is NaN.
        """

        def mean(part: str, name: str) -> float:
            return float(np.mean([outputs[part].get(name, np.nan) for outputs in train_outputs]))

        weights = self.unsupervised_weights()
        terms = np.mean(self._everywhere([mean("unsupervised", name) for name in weights]), axis=0)
        super().on_train_epoch_end([{"loss": outputs["loss"]} for outputs in train_outputs])
        for trainer in self.trainers:
            trainer.on_train_epoch_end([{"loss": mean("supervised", trainer.name)}])
        for (name, weight), term in zip(weights.items(), terms.tolist(), strict=True):
            self.logger.log(f"unsupervised/{name}", term, self.current_epoch)
            self.logger.log(f"weight/{name}", weight, self.current_epoch)

    # validation during training

    def on_validation_epoch_start(self) -> None:
        """Set evaluation mode everywhere."""
        for trainer in self.trainers:
            trainer.on_validation_epoch_start()

    def validation_step(self, batch: Mapping[str, Sequence[Patches]]) -> list[dict[str, Any]]:
        """Validate every network on its modality's part of the batch."""
        patches = self.labeled_patches(batch)
        return [
            trainer.validation_step(dict(zip(("data", "target"), patches[trainer.name], strict=True)))
            for trainer in self.trainers
        ]

    def on_validation_epoch_end(self, val_outputs: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Log each network's pseudo Dice with its trainer, and the mean over the modalities here."""
        for m, trainer in enumerate(self.trainers):
            trainer.on_validation_epoch_end([outputs[m] for outputs in val_outputs])
        for key in ("mean_fg_dice", "dice_per_class_or_region", "val_losses"):
            mean = np.mean([t.logger.get_value(key, step=-1) for t in self._deployed_trainers()], axis=0)
            self.logger.log(key, mean.tolist(), self.current_epoch)
        use_builtin_numbers(self.logger)

    def on_epoch_end(self) -> None:
        """Report and save: each modality its best epoch for deployment, the conductor all that continues training."""
        for trainer in self.trainers:
            trainer.on_epoch_end()
            latest = {key: trainer.logger.get_value(key, step=-1) for key in ("train_losses", "val_losses")}
            dice = np.round(trainer.logger.get_value("dice_per_class_or_region", step=-1), 4).tolist()
            losses = ", ".join(f"{key[:-2]} {v:.4f}" for key, v in latest.items() if not np.isnan(v))  # NaN: it rests
            self.print_to_log_file(f"{trainer.name}: {losses}, pseudo Dice {dice}")
        means = {name: self.logger.get_value(f"unsupervised/{name}", step=-1) for name in self.unsupervised_weights()}
        terms = [
            f"{name} {means[name]:.4f} (weight {weight:.4f})"
            for name, weight in self.unsupervised_weights().items()
            if weight or not np.isnan(means[name])  # not those of a network that rests
        ]
        if means:
            self.print_to_log_file("unsupervised:", ", ".join(terms))
        super().on_epoch_end()
        if self.local_rank == 0:
            self.plot_unsupervised_terms()

    def plot_unsupervised_terms(self) -> None:
        """Draw the picture of the unsupervised terms anew, as nnU-Net does with progress.png."""
        plot_terms(self.logger.get_checkpoint(), join(self.output_folder, "unsupervised_terms.png"))

    def on_train_end(self) -> None:
        """Save the final model of every modality, then the joint one, and close the streams."""
        for trainer in self.trainers:
            trainer.on_train_end()
        super().on_train_end()
        if self.local_rank == 0 and not self.disable_checkpointing:
            self.earlier.forget()
        if self.is_ddp:
            dist.barrier()  # the first process has written what the others may read now

    # checkpoints

    def _everywhere(self, value: T) -> list[T]:
        """The value that every process has, by rank."""
        if not self.is_ddp:
            return [value]
        values = [value] * self._world_size
        dist.all_gather_object(values, value)
        return values

    def save_checkpoint(self, filename: str) -> None:
        """Write the joint state of all modalities, from which --c continues."""
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        random_states = self._everywhere(get_random_state(self.device))
        if self.local_rank != 0:
            return
        # nnU-Net saves checkpoint_latest before it compares the epoch with the best one so far
        ema = self.logger.get_value("ema_fg_dice", step=-1)
        best_ema = ema if self._best_ema is None or ema > self._best_ema else self._best_ema
        state = {
            "format": CHECKPOINT_FORMAT,
            "provenance": self.provenance,
            "trainer_name": type(self).__name__,
            "modalities": {trainer.name: trainer.get_state() for trainer in self.trainers},
            "method": self.get_method_state(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": best_ema,
            "current_epoch": self.current_epoch + 1,
            "random_states": random_states,
        }
        save_atomically(state, filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue from a joint checkpoint, or validate with it.

        Cases or settings that have changed since keep a training from being continued, which would make a run of
        neither, and not from being validated on a fold that is the same.

        Raises:
            UserError: if it is damaged or belongs to another dataset, other modalities, plans, configuration, fold or,
                to continue, other cases or settings; if pretrained weights were named on the command line, too.
        """
        if file := named_on_command_line():
            raise UserError(
                "-pretrained_weights",
                f"{file}, where a finished training is validated",
                "that with the weights of the training",
                "Leave it out.",
            )
        if not self.was_initialized:
            self.initialize()
        required = {**self.identity, "settings": self.settings()}
        if not self.continue_training:
            required = {k: v for k, v in required.items() if k not in ("digest of cases", "settings")}
        state = load_checkpoint(filename_or_checkpoint, self.device, required)
        self._continued = True
        self.first_stage_digest = state["provenance"]["first stage"]
        self.pretrained_digests = state["provenance"].get("pretrained weights", {})  # older trainings had none
        self.current_epoch = state["current_epoch"]
        self._best_ema = state["_best_ema"]
        self.logger.load_checkpoint(state["logging"])
        for trainer in self.trainers:
            trainer.set_state(state["modalities"][trainer.name], self.current_epoch)
        self.set_method_state(state["method"])
        if self.grad_scaler is not None and state["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler_state"])
        states = state["random_states"]
        self._random_state = states[self.local_rank] if len(states) == self._world_size else None
        self._validate_best = basename(filename_or_checkpoint) == "checkpoint_best.pth"

    # validation after training

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate every modality alone, as it will be deployed.

        After --val_best each modality has the weights of its own best epoch; the joint checkpoint_best is of the epoch
        with the best mean over the modalities.
        """
        with explains_failed_writes(self.output_folder, "Make room, and validate with --val."):
            for trainer in self._deployed_trainers():
                best = join(trainer.output_folder, "checkpoint_best.pth")
                if self._validate_best and isfile(best):
                    trainer.load_network_weights(best)
                trainer.perform_actual_validation(save_probabilities)
        for trainer in self._deployed_trainers():
            model = Path(trainer.output_folder).parent
            name, plans, configuration = convert_identifier_to_trainer_plans_config(str(model))
            self.print_to_log_file(
                f"{trainer.name}: the model is {model}, fold {self.fold}. To predict with it: nnUNetv2_predict -d "
                f"{model.parent.name} -i INPUT -o OUTPUT -c {configuration} -f {self.fold} -tr {name} -p {plans}"
            )


def _without_cases(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """Without the list of cases, with the paths of this machine, which travels neither with a model nor with a log."""
    return {key: value for key, value in dataset_json.items() if key != "dataset"}


class _NoSingleNetwork:
    """Stands where nnU-Net expects the trainer's network, for `load_pretrained_weights`, the one who asks for it.

    Args:
        trainer_name: of the trainer of several networks.
        pretrained: the file whose weights all networks have already.
    """

    def __init__(self, trainer_name: str, pretrained: str | None):
        self.trainer_name = trainer_name
        self.pretrained = pretrained

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing that nnU-Net would have to load."""
        if self.pretrained is None:
            raise NotImplementedError(
                f"{self.trainer_name} trains one network per modality: give load_pretrained_weights of the trainer a "
                "file for each."
            )
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` had to offer."""

"""The base of all trainers here: stock trainers, one per modality, and a conductor that adds an unsupervised loss.

nnU-Net's command line instantiates the conductor for the multi-modal dataset, or for that of a single modality, and
runs nnU-Net's own training loop on it. The conductor draws a labeled batch of every modality and unlabeled batches of
modalities that are compared, computes

    supervised_weight * sum_m L_sup(m, labeled) + sum_terms weight_term(epoch) * mean_draws L_term(draw of unlabeled)

and passes every other hook on to the modality trainers, which write complete stock model folders of their own.
"""

import os
from collections.abc import Sequence
from itertools import combinations
from math import ceil
from os.path import basename, isfile, join
from pathlib import Path

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, autocast
from torch import distributed as dist
from torch.nn.functional import one_hot
from torch.nn.modules.batchnorm import _BatchNorm

from nnunetv2_semicml.data.folds import SPLITS_FILE, read_folds
from nnunetv2_semicml.data.modality_group import (
    Modality,
    ModalityGroup,
    environment_folder,
    preprocessed_folder,
    unlabeled_identifier,
)
from nnunetv2_semicml.data.paired_dataset import PairedDataset
from nnunetv2_semicml.data.streams import PairedDataLoader, PairedTransform, SemiSupervisedDataLoader
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.losses.consistency import sigmoid_rampup
from nnunetv2_semicml.trainers.checkpoint import (
    get_random_state,
    load_checkpoint,
    save_atomically,
    set_random_state,
    use_builtin_numbers,
)
from nnunetv2_semicml.trainers.modality_trainer import make_modality_trainer_class
from nnunetv2_semicml.trainers.passes import Passes
from nnunetv2_semicml.trainers.plot_terms import plot_terms
from nnunetv2_semicml.trainers.teacher import Teacher, add_noise

# hyper-parameters of nnU-Net that a subclass sets on the conductor and every modality trainer then has
_PASSED_ON = (
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
    "probabilistic_oversampling",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "num_epochs",
    "current_epoch",
    "enable_deep_supervision",
    "save_every",
    "disable_checkpointing",
)


class nnUNetTrainerSemiSupervised(nnUNetTrainer):
    """Conductor of one stock trainer per modality. A method derives from it and defines its unsupervised terms.

    Hooks of networks, losses, optimizers and augmentation are those of `network_trainer`, nnU-Net's own class, and not
    of the conductor.

    Attributes:
        network_trainer: the nnU-Net trainer that every modality is trained and deployed with.
        epochs: length of the schedule; nnU-Net's, unless a subclass says otherwise.
        min_modalities: fewer are refused.
        compares_modalities: whether the unsupervised terms compare the modalities of a case. A step then draws
            unlabeled cases that have all modalities or, if cases lack some, a batch for every pair from those that have
            both. Otherwise it draws a batch of every modality from all of its cases.
        min_unlabeled: unlabeled cases to draw from, fewer of which are refused.
        networks_per_modality: differently initialized networks of every modality, of which the first is deployed.
        needs_positions: whether `unsupervised_targets` asks where in its case a patch lies.
        trainers: the modality trainers in channel order, from `initialize` on.
        unlabeled_batch_size: unlabeled cases per draw; None takes the plans' batch size, but at least the two cases
            that a contrast needs.
        asc_cases: unlabeled cases per draw that an ASC loss contrasts; None takes those of the unlabeled batch, as far
            as they are different cases. If there are more, the step draws as many, and the other terms see the batch
            alone.
        supervised_weight: weight of nnU-Net's loss on labeled cases; 0 leaves these out.
        rampup_fraction: share of the schedule over which `ramp` rises, for methods that call it.
        two_pass: how a step is computed, see `train_step`; None chooses, and says why in the log.
        cases_per_pass: in two passes, the cases that a network sees at a time; None takes the batch size, for which the
            plans were made. Fewer need less memory and more time.

    With several processes (-num_gpus), the unlabeled cases of a step are shared out among them, as the batch is.
    """

    network_trainer: type[nnUNetTrainer] = nnUNetTrainer
    epochs = 1000
    min_modalities = 1
    compares_modalities = False
    min_unlabeled = 1
    networks_per_modality = 1
    needs_positions = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        name = type(self).__name__
        if os.environ.get("nnUNet_wandb_enabled", "0") not in ("0", "False", "false"):
            raise NotImplementedError(f"{name} does not log to Weights & Biases: unset nnUNet_wandb_enabled.")
        environment_folder("nnUNet_results")
        self.group = ModalityGroup.load(plans["dataset_name"])
        if len(self.group.modalities) < self.min_modalities:
            raise NotImplementedError(
                f"{name} needs at least {self.min_modalities} modalities, but {self.group.file} has "
                f"{len(self.group.modalities)}. Train it on the multi-modal dataset."
            )
        if "previous_stage" in plans["configurations"].get(configuration, {}):
            raise NotImplementedError(f"{name} does not support the cascade: train 3d_fullres or 3d_lowres instead.")
        self.modality_plans = self.group.require_ready(plans, configuration)
        self._require_cases(fold)
        batch_size = PlansManager(plans).get_configuration(configuration).batch_size
        if dist.is_available() and dist.is_initialized() and batch_size % dist.get_world_size():
            raise NotImplementedError(
                f"{name} shares a batch out equally, which nnU-Net's batch Dice needs: {batch_size} cases do not fit "
                f"-num_gpus {dist.get_world_size()}. Choose a divisor, or another batch_size in the plans of all "
                f"datasets of {self.group.file}."
            )
        self.continue_training = plans["continue_training"]
        self._seed_everything()

        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.group.is_single:  # the model folder is the modality trainer's
            self.output_folder = join(self.output_folder, "training_state")
            Path(self.output_folder).mkdir(exist_ok=True)
            self.log_file = join(self.output_folder, basename(self.log_file))
        self.network = _NoSingleNetwork(name)
        self.num_epochs = self.epochs
        self.trainers: list = []
        self.unlabeled_batch_size: int | None = None
        self.asc_cases: int | None = None
        self.supervised_weight = 1.0
        self.rampup_fraction = 0.4
        self.two_pass: bool | None = None
        self.cases_per_pass: int | None = None
        self._distinct_cases = 0  # that every unlabeled draw can have, in all processes together
        self._random_state: dict | None = None
        self._validate_best = False

    # what a method defines

    def unsupervised_targets(self, images: dict[str, Tensor]) -> object:
        """What the learners' predictions are compared with, if not with each other, e.g. a teacher's predictions.

        Args:
            images: for every network of a draw by name, the augmented patches (B, C, *patch) of unlabeled cases that it
                sees afterwards if it is a learner; with `needs_positions` also "positions", see `PairedDataset`.

        Returns:
            Anything without gradient, passed on to `unsupervised_terms`.
        """

    def unlabeled_output(self, trainer: nnUNetTrainer, images: Tensor) -> Tensor:
        """What the unsupervised terms see of a network: its logits (B, heads, *patch) of images (B, C, *patch)."""
        return trainer.local_network()(images)

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: object) -> dict[str, Tensor]:
        """Compute the unsupervised loss terms on a draw of unlabeled cases.

        Args:
            outputs: `unlabeled_output` of every network of the draw that is one of `learners`, by name, in float32. For
                logits see
                `probabilities`, `foreground` and `segment`; for the cases see `in_batch` and `contrasted`.
            targets: what `unsupervised_targets` returned.

        Returns:
            Scalar terms by name, unweighted; a term is averaged over the draws of the step that have it (see
            `over_networks`). With several processes, a mean over this one's cases, or a quantity of all
            cases with the gradient that `losses` documents; the gradients are averaged over the processes.
        """
        raise NotImplementedError

    def unsupervised_weights(self) -> dict[str, float]:
        """Weight in the current epoch of every term that `unsupervised_terms` may return; the names never change."""
        raise NotImplementedError

    def learners(self) -> list[nnUNetTrainer]:
        """The modality trainers whose networks learn in the current epoch; the others rest."""
        return self.trainers

    def ramp(self) -> float:
        """Share of the full unsupervised weight in this epoch: 1 from `rampup_fraction` of the schedule on."""
        return sigmoid_rampup(self.current_epoch, self.rampup_fraction * self.num_epochs)

    def get_method_state(self) -> dict:
        """What the method adds to the joint checkpoint, e.g. teachers; readable with weights_only."""
        return {}

    def set_method_state(self, state: dict) -> None:
        """Restore what `get_method_state` returned."""

    # the draws of unlabeled cases

    def draws(self) -> list[tuple[str, ...]]:
        """Which modalities the unlabeled patches of a step show together; the same in every step and process."""
        names = [modality.name for modality in self.group.modalities]
        if not self.compares_modalities:
            return [(name,) for name in names]
        pairs = list(combinations(names, 2))
        common = [self.group.common_cases(pair, labeled=False) for pair in pairs]
        return [tuple(names)] if all(cases == common[0] for cases in common) else pairs

    def over_networks(self, terms: Sequence[Tensor]) -> Tensor:
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
                    "Add unlabeled cases, or train another method.",
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
        """Build the modality trainers and let them build their networks."""
        if self.was_initialized:
            raise RuntimeError("initialize was called twice.")
        for line in self.group.describe():
            self.print_to_log_file(line)
        for modality, modality_plans in zip(self.group.modalities, self.modality_plans, strict=True):
            for number in range(1, self.networks_per_modality + 1):
                self.trainers.append(self._make_trainer(modality, modality_plans, number))
        self._set_batch_size_and_oversample()
        self._choose_passes()
        for key in self._term_keys():
            self.logger.local_logger.my_fantastic_logging.setdefault(key, [])
        self.was_initialized = True

    def _make_trainer(self, modality: Modality, modality_plans: tuple[dict, dict], number: int) -> nnUNetTrainer:
        """The trainer of a modality's network number 1, which is deployed, or 2, …"""
        plans, dataset_json = modality_plans
        channels = [dataset_json["channel_names"][str(i)] for i in range(len(modality.channels))]
        trainer_class = make_modality_trainer_class(
            self.network_trainer,
            type(self).__name__,
            modality.name if number == 1 else f"{modality.name} network {number}",
            modality,
            number == 1,
            {**self.provenance, "modality": modality.name, "channels": channels},
        )
        plans = {**plans, "continue_training": self.continue_training}
        # the list of cases, with the paths of this machine, must not travel with a deployed model
        dataset_json = {key: value for key, value in dataset_json.items() if key != "dataset"}
        trainer = trainer_class(plans, self.configuration_name, self.fold, dataset_json, self.device)
        if not trainer.deployed:  # its log and curves are nothing for a model folder
            trainer.output_folder = join(self.output_folder, trainer.name.replace(" ", "_"))
            Path(trainer.output_folder).mkdir(exist_ok=True)
            trainer.log_file = join(trainer.output_folder, basename(trainer.log_file))
        for attribute in _PASSED_ON:
            setattr(trainer, attribute, getattr(self, attribute))
        trainer.initialize()
        return trainer

    def _choose_passes(self) -> None:
        fewest = min(len(self.group.common_cases(draw, labeled=False)) for draw in self.draws())
        self._distinct_cases = distinct = fewest // self._world_size * self._world_size
        if self.asc_cases is not None and not 2 <= self.asc_cases <= distinct:
            raise ValueError(
                f"asc_cases must lie between 2 and {distinct}, since there are no more unlabeled cases and none is to "
                f"be contrasted with itself; got {self.asc_cases}."
            )
        if self.unlabeled_cases > distinct:
            self.print_to_log_file(
                f"A draw of {self.unlabeled_cases} unlabeled patches has several of a case, since there may be only "
                f"{distinct} cases to draw from; only patches of different cases are contrasted."
            )
        self.cases_per_pass = self.cases_per_pass or self.batch_size
        batch_norm = any(isinstance(m, _BatchNorm) for t in self.trainers for m in t.network.modules())
        if self.two_pass and batch_norm:
            raise NotImplementedError("Batch normalization does not work with two_pass: set it to False.")
        if self.two_pass is not None:
            reason = "as set"
        elif batch_norm:
            self.two_pass, reason = False, "batch normalization would count the cases twice"
        elif self.device.type == "cuda":
            self.two_pass, reason = True, "the plans fit the GPU with one network at a time"
        else:
            self.two_pass = self.cases_here(self.unlabeled_cases) > self.cases_per_pass
            reason = f"{self.cases_here(self.unlabeled_cases)} unlabeled cases, {self.cases_per_pass} cases per pass"
        self.print_to_log_file(f"Steps take {'two passes' if self.two_pass else 'one pass'}: {reason}.")

    @property
    def provenance(self) -> dict:
        """What a checkpoint belongs to."""
        return {
            "dataset": self.plans_manager.dataset_name,
            "modalities": [m.name for m in self.group.modalities],
            "plans": self.plans_manager.plans_name,
            "configuration": self.configuration_name,
            "fold": self.fold,
            **self.group.provenance(self.plans_manager.plans, self.configuration_name, self.fold),
            "trainer": type(self).__name__,
        }

    def _seed_everything(self) -> None:
        # nnU-Net offers no seed; with nnUNet_n_proc_DA=0 this one makes whole runs repeatable
        seed = os.environ.get("nnUNet_semicml_seed")
        if seed is not None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            torch.manual_seed(int(seed) + rank)
            np.random.seed(int(seed) + rank)

    def _term_keys(self) -> list[str]:
        weights = self.unsupervised_weights()
        return [f"unsupervised/{term}" for term in weights] + [f"weight/{term}" for term in weights]

    # data

    def get_dataloaders(self) -> tuple:
        """Streams of patches: labeled and unlabeled ones for training, labeled ones for validation.

        Every modality has labeled patches of its own, of all of its cases. It is validated on patches that all
        modalities show together, so that their Dice can be compared, unless no validation case has all modalities.
        """
        deployed = self._deployed_trainers()
        split = {trainer: trainer.do_split() for trainer in deployed}
        together = set.intersection(*(set(validation) for _, validation in split.values()))
        if not together:
            self.print_to_log_file(
                "WARNING: no validation case has all modalities: each is validated on its own cases, and the Dice of "
                "different modalities cannot be compared."
            )
        train = SemiSupervisedDataLoader(
            [self._loader([t], cases, True, True) for t, (cases, _) in split.items() if self.supervised_weight],
            [
                # each process draws from cases of its own, so that no two contrast a case with itself
                self._loader(
                    [t for t in deployed if t.name in draw],
                    self.group.common_cases(draw, labeled=False)[self.local_rank :: self._world_size],
                    False,
                    True,
                )
                for draw in self.draws()
            ],
        )
        validation = SemiSupervisedDataLoader(
            [self._loader(deployed, sorted(together), True, False)]
            if together
            else [self._loader([t], cases, True, False) for t, (_, cases) in split.items()]
        )
        workers = get_allowed_n_proc_DA()
        augmenters = (
            self._augmenter(train, workers),
            self._augmenter(validation, workers // 2 if workers > 1 else workers),
        )
        for augmenter in augmenters:
            next(augmenter)  # as nnU-Net does: the workers start here, and what is wrong with the data shows now
        return augmenters

    def _loader(
        self, trainers: Sequence[nnUNetTrainer], cases: Sequence[str], labeled: bool, augment: bool
    ) -> PairedDataLoader:
        """Patches that the modalities of some trainers show together."""
        first = trainers[0]
        rotation, dummy_2d, patch_size, mirror_axes = first.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        final_patch_size = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales() if labeled else None
        labels = {
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            "ignore_label": self.label_manager.ignore_label,
        }
        pipelines = [
            t.get_training_transforms(
                final_patch_size,
                rotation,
                scales,
                mirror_axes,
                dummy_2d,
                use_mask_for_norm=t.configuration_manager.use_mask_for_norm,
                **(labels if labeled else {}),
            )
            if augment
            else t.get_validation_transforms(scales, **labels)
            for t in trainers
        ]
        channels = {t.name: t.num_input_channels for t in trainers}
        identifier = self.configuration_manager.data_identifier
        folders = {
            t.name: str(
                preprocessed_folder(t.modality.dataset_name)
                / (identifier if labeled else unlabeled_identifier(identifier))
            )
            for t in trainers
        }
        dataset = PairedDataset(
            {name: infer_dataset_class(folder)(folder, list(cases)) for name, folder in folders.items()},
            cases,
            self.plans_manager.transpose_forward,
            self.configuration_manager.spacing,
            labeled,
            positions=self.needs_positions and not labeled,
        )
        return PairedDataLoader(
            dataset,
            self.batch_size if labeled else self.cases_here(self.unlabeled_cases),
            patch_size if augment else final_patch_size,
            final_patch_size,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent if labeled else 0.0,
            probabilistic_oversampling=self.probabilistic_oversampling and labeled,
            transforms=PairedTransform(pipelines, list(channels.values())),
            channels=channels,
        )

    def _augmenter(self, loader: SemiSupervisedDataLoader, workers: int) -> object:
        if workers == 0:
            return SingleThreadedAugmenter(loader, None)
        return NonDetMultiThreadedAugmenter(
            loader,
            None,
            num_processes=workers,
            num_cached=max(3, workers // 2),
            pin_memory=self.device.type == "cuda",
            wait_time=0.002,
        )

    def labeled_batches(self, batch: dict) -> dict[str, tuple[Tensor, Tensor | list[Tensor]]]:
        """The labeled part of a batch on the device: (image (B, C, *patch), target or targets) of each network."""
        images, targets = {}, {}
        for patches in batch["labeled"]:
            for modality, image in patches["images"].items():
                images[modality] = image.to(self.device, non_blocking=True)
                target = patches["targets"][modality]
                targets[modality] = (
                    [scale.to(self.device, non_blocking=True) for scale in target]
                    if isinstance(target, list)
                    else target.to(self.device, non_blocking=True)
                )
        return {t.name: (images[t.modality.name], targets[t.modality.name]) for t in self.trainers}

    def unlabeled_images(self, batch: dict) -> list[dict[str, Tensor]]:
        """The unlabeled part of a batch on the device: of each draw what `unsupervised_targets` takes."""
        draws = []
        for patches in batch["unlabeled"]:
            own = {name: image.to(self.device, non_blocking=True) for name, image in patches["images"].items()}
            images = {t.name: own[t.modality.name] for t in self.trainers if t.modality.name in own}
            if self.needs_positions:
                images["positions"] = patches["positions"].to(self.device, non_blocking=True)
            draws.append(images)
        return draws

    def _deployed_trainers(self) -> list[nnUNetTrainer]:
        """One of each modality."""
        return [trainer for trainer in self.trainers if trainer.deployed]

    # training

    def on_train_start(self) -> None:
        """Let every modality trainer write its model folder, and open the streams."""
        if not self.was_initialized:
            self.initialize()
        self._validate_best = False
        for trainer in self.trainers:
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
    def unlabeled_cases(self) -> int:
        """Unlabeled cases of a draw."""
        return max(self._unlabeled_batch, self.asc_cases or 0)

    @property
    def _unlabeled_batch(self) -> int:
        return self.unlabeled_batch_size or max(2, self.configuration_manager.batch_size)

    @property
    def _world_size(self) -> int:
        return dist.get_world_size() if self.is_ddp else 1

    def cases_here(self, cases: int) -> int:
        """How many of a draw's cases fall to this process: to all equally many, rounded up."""
        return ceil(cases / self._world_size)

    def in_batch(self, unlabeled: Tensor) -> Tensor:
        """The cases of the unlabeled batch among those of the draw; (B, ...)."""
        return unlabeled[: self.cases_here(self._unlabeled_batch)]

    def contrasted(self, unlabeled: Tensor) -> Tensor:
        """The cases that a loss contrasts among those of the draw, all different; (B, ...)."""
        return unlabeled[: self.contrasted_cases]

    @property
    def contrasted_cases(self) -> int:
        """How many these are in this process."""
        return self.cases_here(min(self.asc_cases or self._unlabeled_batch, self._distinct_cases))

    def train_step(self, batch: dict) -> dict:
        """Make one coupled step of all networks.

        The networks are coupled by their predictions of unlabeled cases alone. In one pass, the activations behind all
        of these are held until the gradient of the unsupervised loss has gone through. In two passes they are not: when
        that gradient arrives, each network computes them once more, one network and `cases_per_pass` cases at a time.
        The result is the same, for the activation memory of one network at the planned batch size. The labeled cases
        follow, network by network.
        """
        draws = self.unlabeled_images(batch)
        learners = self.learners()
        for trainer in learners:
            trainer.optimizer.zero_grad(set_to_none=True)
        terms, total = self._unsupervised_step(learners, draws)
        supervised = {}
        labeled = self.labeled_batches(batch) if self.supervised_weight else {}
        exchanges = []
        for trainer in learners:
            if self.supervised_weight:
                loss = self._supervised_step(trainer, *labeled[trainer.name])
                supervised[trainer.name] = loss
                total = total + self.supervised_weight * loss
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
        self, learners: Sequence[nnUNetTrainer], draws: Sequence[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradient of the unsupervised loss; return its terms and their weighted sum, detached."""
        passes: list[Passes] = []
        of_draws: dict[str, list[Tensor]] = {}
        for draw in draws:
            targets = self.unsupervised_targets(draw)
            present = [t for t in learners if t.name in draw]
            # the last network of all may hold its activations, since its gradient is sent back first
            own = [self._passes(t, draw[t.name], False, hold=draw is draws[-1] and t is present[-1]) for t in present]
            outputs = {t.name: p.outputs[0].float() for t, p in zip(present, own, strict=True)}
            for name, term in self.unsupervised_terms(outputs, targets).items():
                of_draws.setdefault(name, []).append(term)
            passes += own
            del outputs, targets
        terms = {name: torch.stack(values).mean() for name, values in of_draws.items()}
        weights = self.unsupervised_weights()
        total = sum(weights[name] * term for name, term in terms.items())
        del of_draws
        self._scale(total).backward()
        while passes:
            passes.pop().backward()
        return {name: term.detach() for name, term in terms.items()}, total.detach()

    def _supervised_step(self, trainer: nnUNetTrainer, image: Tensor, target: Tensor | list[Tensor]) -> Tensor:
        """Add the gradient of nnU-Net's loss on labeled cases; return it, detached."""
        passes = self._passes(trainer, image, True, hold=True)
        with self._autocast():
            loss = trainer.loss(passes.outputs if isinstance(target, list) else passes.outputs[0], target)
        self._scale(self.supervised_weight * loss).backward()
        passes.backward()
        return loss.detach()

    def _passes(self, trainer: nnUNetTrainer, image: Tensor, labeled: bool, hold: bool) -> Passes:
        """Send cases through a network; activations that fit into one pass are held if they may."""

        def forward(cases: Tensor) -> Tensor | list[Tensor]:
            trainer.set_deep_supervision_enabled(labeled and trainer.enable_deep_supervision)
            try:
                with self._autocast():
                    return trainer.local_network()(cases) if labeled else self.unlabeled_output(trainer, cases)
            finally:
                trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)

        size = self.cases_per_pass if self.two_pass else len(image)
        return Passes(forward, image, size, replay=self.two_pass and not (hold and len(image) <= size))

    def _average_gradients(self, trainer: nnUNetTrainer) -> list:
        """Start to average a network's gradients over the processes; return what to wait for.

        Not by the wrapper of nnU-Net's DDP, whose forward pass is not used in training: it wants one forward and one
        backward pass of all weights per step.
        """
        gradients = [p.grad for p in trainer.trained_parameters() if p.grad is not None]
        torch._foreach_div_(gradients, self._world_size)
        return [dist.all_reduce(gradient, async_op=True) for gradient in gradients]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid of every region, or softmax with the background as class 0; (B, heads, *patch) as the logits."""
        return logits.sigmoid() if self.label_manager.has_regions else logits.softmax(1)

    def foreground(self, probabilities: Tensor) -> Tensor:
        """Probabilities (B, C, *patch) of the C foreground classes or regions."""
        return probabilities if self.label_manager.has_regions else probabilities[:, 1:]

    def segment(self, logits: Tensor) -> Tensor:
        """Label map (B, *patch) of logits (B, heads, *patch), as nnU-Net makes it of classes or regions."""
        if not self.label_manager.has_regions:
            return logits.argmax(1)
        labels = torch.zeros_like(logits[:, 0], dtype=torch.long)
        for region, label in enumerate(self.label_manager.regions_class_order):
            labels[logits[:, region] > 0] = label
        return labels

    def hard_pseudo_labels(self, probabilities: Tensor) -> Tensor:
        """The most probable class, or all regions above one half, as zeros and ones (B, heads, *patch)."""
        if self.label_manager.has_regions:
            return (probabilities > 0.5).float()
        return one_hot(probabilities.argmax(1), probabilities.shape[1]).movedim(-1, 1).float()

    def mean_prediction(
        self,
        teacher: Teacher,
        image: Tensor,
        passes: int,
        noise_std: float,
        noise_bounds: tuple[float, float],
    ) -> Tensor:
        """Mean probabilities of several passes of a teacher over noisy copies of an image.

        Args:
            teacher: predicts logits.
            image: augmented patches (B, C, *patch).
            passes: number of passes, each with noise, and dropout where there is any, of its own.
            noise_std: see `add_noise`.
            noise_bounds: see `add_noise`.

        Returns:
            Probabilities (B, heads, *patch) without gradient: softmax with the background, or sigmoid for regions.
        """
        # made outside of inference mode, so that the losses can save it for their gradients
        mean = image.new_zeros(len(image), self.label_manager.num_segmentation_heads, *image.shape[2:])
        parts = mean.split(self.cases_per_pass)
        with torch.inference_mode():
            for _ in range(passes):
                noisy = add_noise(image, noise_std, noise_bounds).split(self.cases_per_pass)
                for cases, of_cases in zip(noisy, parts, strict=True):
                    with self._autocast():
                        logits = teacher.predict(cases)
                    of_cases.add_(self.probabilities(logits.float()), alpha=1 / passes)
        return mean

    def _autocast(self) -> object:
        return autocast("cuda") if self.device.type == "cuda" else dummy_context()

    def _scale(self, loss: Tensor) -> Tensor:
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
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

    def validation_step(self, batch: dict) -> list[dict]:
        """Validate every network on its modality's part of the batch."""
        batches = self.labeled_batches(batch)
        return [
            trainer.validation_step(dict(zip(("data", "target"), batches[trainer.name], strict=True)))
            for trainer in self.trainers
        ]

    def on_validation_epoch_end(self, val_outputs: list[list[dict]]) -> None:
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
        self.print_to_log_file("unsupervised:", ", ".join(terms))
        super().on_epoch_end()
        if self.local_rank == 0:
            plot_terms(self.logger.get_checkpoint(), join(self.output_folder, "unsupervised_terms.png"))

    def on_train_end(self) -> None:
        """Save the final model of every modality, then the joint one, and close the streams."""
        for trainer in self.trainers:
            trainer.on_train_end()
        super().on_train_end()
        if self.is_ddp:
            dist.barrier()  # the first process has written what the others may read now

    # checkpoints

    def _everywhere(self, value: object) -> list:
        """The value that every process has, by rank."""
        if not self.is_ddp:
            return [value]
        values = [None] * self._world_size
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
        checkpoint = {
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
        save_atomically(checkpoint, filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue from a joint checkpoint, or validate with it.

        Cases that came after the training keep it from being continued, which would make a run of neither set of
        cases, and not from being validated on a fold that is the same.

        Raises:
            UserError: if it is damaged or belongs to another dataset, other modalities, plans, configuration, fold or,
                to continue, other cases.
        """
        if not self.was_initialized:
            self.initialize()
        required = {k: v for k, v in self.provenance.items() if self.continue_training or k != "digest of cases"}
        checkpoint = load_checkpoint(filename_or_checkpoint, self.device, required)
        self.current_epoch = checkpoint["current_epoch"]
        self._best_ema = checkpoint["_best_ema"]
        self.logger.load_checkpoint(checkpoint["logging"])
        for trainer in self.trainers:
            trainer.set_state(checkpoint["modalities"][trainer.name], self.current_epoch)
        self.set_method_state(checkpoint["method"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        states = checkpoint["random_states"]
        self._random_state = states[self.local_rank] if len(states) == self._world_size else None
        self._validate_best = basename(filename_or_checkpoint) == "checkpoint_best.pth"

    # validation after training

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate every modality alone, as it will be deployed.

        After --val_best each modality has the weights of its own best epoch; the joint checkpoint_best is of the epoch
        with the best mean over the modalities.
        """
        for trainer in self._deployed_trainers():
            best = join(trainer.output_folder, "checkpoint_best.pth")
            if self._validate_best and isfile(best):
                trainer.load_network_weights(best)
            trainer.perform_actual_validation(save_probabilities)


class _NoSingleNetwork:
    """Stands where nnU-Net expects the trainer's network, and says what cannot be done with several."""

    def __init__(self, trainer_name: str):
        self.trainer_name = trainer_name

    def state_dict(self) -> dict:
        """Refuse nnU-Net's -pretrained_weights, the one caller."""
        raise NotImplementedError(
            f"{self.trainer_name} trains one network per modality: leave out -pretrained_weights."
        )

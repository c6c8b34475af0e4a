"""The base of all trainers here: stock trainers, one per modality, and a conductor that adds an unsupervised loss.

nnU-Net's command line instantiates the conductor for the multi-modal dataset, or for that of a single modality, and
runs nnU-Net's own training loop on it. The conductor draws labeled and unlabeled batches of paired modalities, computes

    supervised_weight * sum_m L_sup(m, labeled) + sum_terms weight_term(epoch) * L_term(all modalities, unlabeled)

and passes every other hook on to the modality trainers, which write complete stock model folders of their own.
"""

import os
from math import ceil
from os.path import basename, isfile, join
from pathlib import Path

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, autocast
from torch import distributed as dist
from torch.nn.functional import one_hot
from torch.nn.modules.batchnorm import _BatchNorm

from nnunetv2_semicml.data.modality_group import (
    ModalityGroup,
    environment_folder,
    preprocessed_folder,
    unlabeled_identifier,
)
from nnunetv2_semicml.data.paired_dataset import PairedDataset
from nnunetv2_semicml.data.streams import PairedTransform, SemiSupervisedDataLoader, UnlabeledDataLoader
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
        networks_per_modality: differently initialized networks of every modality, of which the first is deployed.
        needs_positions: whether `unsupervised_targets` asks where in its case a patch lies.
        trainers: the modality trainers in channel order, from `initialize` on.
        unlabeled_batch_size: unlabeled cases per step; None takes the plans' batch size, but at least the two cases
            that a contrast needs.
        asc_cases: unlabeled cases per step that an ASC loss contrasts; None takes those of the unlabeled batch. If
            there are more, the step draws as many, and the other terms see the batch alone.
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
        self._random_state: dict | None = None
        self._validate_best = False

    # what a method defines

    def unsupervised_targets(self, images: dict[str, Tensor]) -> object:
        """What the learners' predictions are compared with, if not with each other, e.g. a teacher's predictions.

        Args:
            images: for every network by name, the augmented patches (B, 1, *patch) of unlabeled cases that it sees
                afterwards if it is a learner; with `needs_positions` also "positions", see `PairedDataset`.

        Returns:
            Anything without gradient, passed on to `unsupervised_terms`.
        """

    def unlabeled_output(self, trainer: nnUNetTrainer, images: Tensor) -> Tensor:
        """What the unsupervised terms see of a network: its logits (B, heads, *patch) of images (B, 1, *patch)."""
        return trainer.local_network()(images)

    def unsupervised_terms(self, outputs: dict[str, Tensor], targets: object) -> dict[str, Tensor]:
        """Compute the unsupervised loss terms on unlabeled cases.

        Args:
            outputs: `unlabeled_output` of every network of `learners` by name, in float32. For logits see
                `probabilities`, `foreground` and `segment`; for the cases see `in_batch` and `contrasted`.
            targets: what `unsupervised_targets` returned.

        Returns:
            Scalar terms by name, unweighted. With several processes, a mean over this one's cases, or a quantity of all
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

    # setting up

    def initialize(self) -> None:
        """Build the modality trainers and let them build their networks."""
        if self.was_initialized:
            raise RuntimeError("initialize was called twice.")
        for channel in range(len(self.group.modalities)):
            for number in range(1, self.networks_per_modality + 1):
                self.trainers.append(self._make_trainer(channel, number))
        self._set_batch_size_and_oversample()
        self._choose_passes()
        for key in self._term_keys():
            self.logger.local_logger.my_fantastic_logging.setdefault(key, [])
        self.was_initialized = True

    def _make_trainer(self, channel: int, number: int) -> nnUNetTrainer:
        """The trainer of a modality's network number 1, which is deployed, or 2, …"""
        modality, (plans, dataset_json) = self.group.modalities[channel], self.modality_plans[channel]
        trainer_class = make_modality_trainer_class(
            self.network_trainer,
            type(self).__name__,
            modality.name if number == 1 else f"{modality.name} network {number}",
            channel,
            number == 1,
            {**self.provenance, "modality": modality.name},
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
        distinct = len(self.group.unlabeled) // self._world_size * self._world_size
        if self.asc_cases is not None and not 2 <= self.asc_cases <= distinct:
            raise ValueError(
                f"asc_cases must lie between 2 and {distinct}, since there are {len(self.group.unlabeled)} unlabeled "
                f"cases and none is to be contrasted with itself; got {self.asc_cases}."
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
            "digest of cases and architecture": self.group.training_digest(
                self.plans_manager.plans, self.configuration_name
            ),
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
        """Streams of paired modalities: labeled and unlabeled patches for training, labeled ones for validation."""
        first, *_ = of_modality = self._deployed_trainers()
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            first.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        patch_size = self.configuration_manager.patch_size
        labels = {
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            "ignore_label": self.label_manager.ignore_label,
        }

        def training_transforms(deep_supervision_scales: list | None, **targets: object) -> PairedTransform:
            return PairedTransform(
                [
                    t.get_training_transforms(
                        patch_size,
                        rotation,
                        deep_supervision_scales,
                        mirror_axes,
                        dummy_2d,
                        use_mask_for_norm=t.configuration_manager.use_mask_for_norm,
                        **targets,
                    )
                    for t in of_modality
                ]
            )

        validation_transforms = PairedTransform([t.get_validation_transforms(scales, **labels) for t in of_modality])
        train_cases, validation_cases = first.do_split()
        # each process draws from cases of its own, so that no two contrast a case with itself
        unlabeled_cases = self.group.unlabeled[self.local_rank :: self._world_size] or self.group.unlabeled
        oversampling = {
            "oversample_foreground_percent": self.oversample_foreground_percent,
            "probabilistic_oversampling": self.probabilistic_oversampling,
        }
        train = SemiSupervisedDataLoader(
            self._paired_dataset(train_cases, labeled=True),
            self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            transforms=training_transforms(scales, **labels),
            **oversampling,
            labeled=self.supervised_weight != 0,
            unlabeled=UnlabeledDataLoader(
                self._paired_dataset(unlabeled_cases, labeled=False),
                self.cases_here(self.unlabeled_cases),
                initial_patch_size,
                patch_size,
                self.label_manager,
                transforms=training_transforms(None),
            ),
        )
        validation = nnUNetDataLoader(
            self._paired_dataset(validation_cases, labeled=True),
            self.batch_size,
            patch_size,
            patch_size,
            self.label_manager,
            transforms=validation_transforms,
            **oversampling,
        )
        workers = get_allowed_n_proc_DA()
        augmenters = (
            self._augmenter(train, workers),
            self._augmenter(validation, workers // 2 if workers > 1 else workers),
        )
        for augmenter in augmenters:
            next(augmenter)  # as nnU-Net does: the workers start here, and what is wrong with the data shows now
        return augmenters

    def _paired_dataset(self, cases: list[str], labeled: bool) -> PairedDataset:
        identifier = self.configuration_manager.data_identifier
        folders = [
            str(preprocessed_folder(m.dataset_name) / (identifier if labeled else unlabeled_identifier(identifier)))
            for m in self.group.modalities
        ]
        return PairedDataset(
            [infer_dataset_class(folder)(folder, list(cases)) for folder in folders],
            cases,
            self.plans_manager.transpose_forward,
            self.configuration_manager.spacing,
            labeled,
            positions=self.needs_positions and not labeled,
        )

    def _augmenter(self, loader: nnUNetDataLoader, workers: int) -> object:
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

    def _modality_batches(self, batch: dict) -> list[tuple[Tensor, Tensor | list[Tensor]]]:
        """Split a paired batch on the device: (image (B, 1, *patch), target or list of targets) of each network."""
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        scales = [t.to(self.device, non_blocking=True) for t in (target if isinstance(target, list) else [target])]
        batches = []
        for trainer in self.trainers:
            own = [scale.chunk(len(self.group.modalities), dim=1)[trainer.channel] for scale in scales]
            image = data[:, trainer.channel : trainer.channel + 1]
            batches.append((image, own if isinstance(target, list) else own[0]))
        return batches

    def unlabeled_images(self, batch: dict) -> dict[str, Tensor]:
        """The unlabeled part of a paired batch on the device, as `unsupervised_targets` takes it."""
        data = batch["unlabeled"].to(self.device, non_blocking=True)
        images = {t.name: data[:, t.channel : t.channel + 1] for t in self.trainers}
        if self.needs_positions:
            images["positions"] = data[:, len(self.group.modalities) :]
        return images

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
        """Unlabeled cases of a step."""
        return max(self._unlabeled_batch, self.asc_cases or 0)

    @property
    def _unlabeled_batch(self) -> int:
        return self.unlabeled_batch_size or max(2, self.configuration_manager.batch_size)

    @property
    def _world_size(self) -> int:
        return dist.get_world_size() if self.is_ddp else 1

    def cases_here(self, cases: int) -> int:
        """How many of a number of cases fall to this process: to all equally many, rounded up."""
        return ceil(cases / self._world_size)

    def in_batch(self, unlabeled: Tensor) -> Tensor:
        """The cases of the unlabeled batch among those of the step; (B, ...)."""
        return unlabeled[: self.cases_here(self._unlabeled_batch)]

    def contrasted(self, unlabeled: Tensor) -> Tensor:
        """The cases that an ASC loss contrasts among those of the step; (B, ...)."""
        return unlabeled[: self.cases_here(self.asc_cases or self._unlabeled_batch)]

    def train_step(self, batch: dict) -> dict:
        """Make one coupled step of all networks.

        The networks are coupled by their predictions of unlabeled cases alone. In one pass, the activations behind all
        of these are held until the gradient of the unsupervised loss has gone through. In two passes they are not: when
        that gradient arrives, each network computes them once more, one network and `cases_per_pass` cases at a time.
        The result is the same, for the activation memory of one network at the planned batch size. The labeled cases
        follow, network by network.
        """
        images = self.unlabeled_images(batch)
        learners = self.learners()
        for trainer in learners:
            trainer.optimizer.zero_grad(set_to_none=True)
        terms, total = self._unsupervised_step(learners, images)
        supervised = {}
        if self.supervised_weight:
            names = [trainer.name for trainer in self.trainers]
            labeled = dict(zip(names, self._modality_batches(batch), strict=True))
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

    def _unsupervised_step(self, learners: list, images: dict) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradient of the unsupervised loss; return its terms and their weighted sum, detached."""
        targets = self.unsupervised_targets(images)
        # the last learner may hold its activations, since its gradient is sent back first
        passes = [self._passes(t, images[t.name], False, hold=t is learners[-1]) for t in learners]
        outputs = {t.name: p.outputs[0].float() for t, p in zip(learners, passes, strict=True)}
        terms = self.unsupervised_terms(outputs, targets)
        weights = self.unsupervised_weights()
        total = sum(weights[name] * term for name, term in terms.items())
        del outputs, targets
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
            image: augmented patches (B, 1, *patch).
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
        """Validate every network on its own channel of the batch."""
        return [
            trainer.validation_step({"data": data, "target": target})
            for trainer, (data, target) in zip(self.trainers, self._modality_batches(batch), strict=True)
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
            losses = ", ".join(f"{key[:-2]} {value:.4f}" for key, value in latest.items())
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
        """Continue from a joint checkpoint.

        Raises:
            UserError: if it is damaged or belongs to another dataset, other modalities, plans, configuration or fold.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint = load_checkpoint(filename_or_checkpoint, self.device, self.provenance)
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

"""The base of all methods: the conductor, and teachers that follow its networks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunetv2_semicml.losses.soft_pseudo_label import soft_cross_entropy, soft_dice_loss
from nnunetv2_semicml.training.class_volumes import LABELED, PSEUDO, ClassVolumes
from nnunetv2_semicml.training.conductor import Conductor, LabeledPatches
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.teacher import BestModelPool, Teacher, add_noise


class TeacherState(TypedDict):
    """What a joint checkpoint keeps of a teacher, in every method.

    Attributes:
        weights: of its network, named as nnU-Net names those of the student.
        steps: how often it followed the student.
        best_dice: the highest validation Dice values of the student, see `BestModelPool`.
    """

    weights: dict[str, Tensor]
    steps: int
    best_dice: list[float]


class nnUNetTrainerSemiSupervised(Conductor):
    """A method derives from this class and says what it adds to the loss; docs/extending.md shows how.

    It declares its terms in `term_weights` and computes them in `unsupervised_terms`. If its networks see something
    else than the patches that were drawn, or are compared with something else than each other, it overrides
    `views_and_targets`. Teachers follow the networks if `teacher_averaging` says so.

    Attributes:
        teacher_averaging: "ema" for exponential moving averages over the steps, "bma" for best-model averages over the
            epochs, None for no teachers.
        deploy_average: whether the averaged networks are validated and deployed instead of those that are trained; if
            there are no teachers, EMA ones are made for it.
        ema_decay: of EMA teachers, see `Teacher.follow`.
        bma_pool_size: see `BestModelPool`; published.
        bma_start_epoch: first epoch after the warm-up that the pool takes part in. Published: 10 of 50; a shorter
            schedule starts after the same fifth of its epochs.
        noise_std: of the images of a teacher, in their standard deviations, see `add_noise`.
        noise_bounds: likewise.
        makes_pseudo_labels: whether networks learn from pseudo-labels, of which `count_pseudo_labels` is told then, so
            that the log can say what they show.
        dice_smooth: of the Dice loss of pseudo-labels, in voxels, see `soft_dice_loss`. nnU-Net's own loss has 1e-5,
            BCP's 1e-10; with 1, pseudo-labels without any foreground teach that there is none, and BCP was better by
            0.05 and 0.10, others by 0.02 at most (one draw of validation patients, benchmarks/study/lgg.md).
        vanishing_share: of the labeled volume of a class, below which the log says that the class has all but vanished
            from the pseudo-labels.
        teachers: of every network, by name, from `initialize` on; empty if there are none.
        pools: of every network that has a teacher, its best validation Dice values.
    """

    teacher_averaging: Literal["ema", "bma"] | None = None
    deploy_average = False
    ema_decay = 0.99
    bma_pool_size = 6
    bma_start_epoch = 10
    noise_std = 0.1
    noise_bounds = (-0.2, 0.2)
    makes_pseudo_labels = False
    dice_smooth = 1.0
    vanishing_share = 0.1

    def initialize(self) -> None:
        """Build the networks and a teacher of each."""
        averaging = self.averaging
        if averaging not in ("ema", "bma", None):
            raise ValueError(f'teacher_averaging must be "bma" or "ema", got {averaging!r}.')
        if averaging == "bma" and self.deploy_average:
            raise ValueError(
                "Best-model averages follow the validation Dice of the network itself: for deploy_average set "
                'teacher_averaging to "ema".'
            )
        super().initialize()
        self.volumes = ClassVolumes()
        self.teachers: dict[str, Teacher] = {}
        self.pools: dict[str, BestModelPool] = {}
        for trainer in self.trainers if averaging else ():
            self.teachers[trainer.name] = Teacher(self.student(trainer), trainer._do_i_compile())
            self.pools[trainer.name] = BestModelPool(self.bma_pool_size)
            if self.deploy_average:
                trainer.averaged_network = self.averaged_network(trainer.name)

    # teachers

    @property
    def averaging(self) -> Literal["ema", "bma"] | None:
        """How teachers follow the networks, if there are any."""
        return self.teacher_averaging or ("ema" if self.deploy_average else None)

    def student(self, trainer: ModalityTrainer) -> nn.Module:
        """What the teacher of a network follows."""
        return trainer.unwrapped_network()

    def averaged_network(self, name: str) -> nn.Module:
        """What corresponds to the network in its teacher."""
        return self.teachers[name].network

    def start_teachers(self) -> None:
        """Let every teacher start from its network as it is now."""
        for trainer in self.trainers if self.teachers else ():
            self.teachers[trainer.name].average(self.student(trainer), 0.0)

    def load_pretrained_weights(self, files: Mapping[str, str]) -> None:
        """Let networks begin with weights from files, and the teachers with the networks."""
        super().load_pretrained_weights(files)
        self.start_teachers()

    def train_step(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Make a step; EMA teachers follow, unless the networks are warming up."""
        losses = super().train_step(batch)
        if self.makes_pseudo_labels:
            self._count_labels(batch)
        if self.averaging == "ema" and not self.warming_up:
            for trainer in self.trainers:
                self.teachers[trainer.name].follow(self.student(trainer), self.ema_decay)
        return losses

    def on_train_epoch_end(self, train_outputs: Sequence[dict[str, Any]]) -> None:
        """Log; teachers start from the networks that have warmed up."""
        super().on_train_epoch_end(train_outputs)
        if self.makes_pseudo_labels:
            self._log_volumes()
        if self.warming_up:
            self.start_teachers()

    def on_validation_epoch_end(self, val_outputs: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Log, and offer every network with its validation Dice to its pool of best models."""
        super().on_validation_epoch_end(val_outputs)
        epoch = self.current_epoch - self.warmup_epochs
        started = epoch >= min(self.bma_start_epoch, (self.num_epochs - self.warmup_epochs) // 5)
        for trainer in self.trainers if self.teachers else ():
            dice = trainer.logger.get_value("mean_fg_dice", step=-1)
            keep = self.pools[trainer.name].update(dice) if started else 0.0
            if self.averaging == "bma":
                self.teachers[trainer.name].average(self.student(trainer), keep)

    def get_method_state(self) -> dict[str, Any]:
        """The teachers."""
        teachers: dict[str, TeacherState] = {
            name: {
                "weights": self.averaged_network(name).state_dict(),
                "steps": teacher.steps,
                "best_dice": self.pools[name].values,
            }
            for name, teacher in self.teachers.items()
        }
        return {"teachers": teachers}

    def set_method_state(self, state: dict[str, Any]) -> None:
        """Restore the teachers."""
        for name, teacher in self.teachers.items():
            of_teacher: TeacherState = state["teachers"][name]
            self.averaged_network(name).load_state_dict(of_teacher["weights"])
            teacher.steps = of_teacher["steps"]
            self.pools[name] = BestModelPool(self.bma_pool_size, of_teacher["best_dice"])

    def mean_prediction(self, teacher: Teacher, image: Tensor, passes: int = 1) -> Tensor:
        """Mean probabilities of several forward passes of a teacher over noisy copies of an image.

        Args:
            teacher: predicts logits.
            image: augmented patches (B, C, *patch).
            passes: number of forward passes, each with noise, and dropout where there is any, of its own.

        Returns:
            Probabilities (B, heads, *patch) without gradient: softmax with the background, or sigmoid for regions.
        """
        # made outside of inference mode, so that the losses can save it for their gradients
        mean = image.new_zeros(len(image), self.label_manager.num_segmentation_heads, *image.shape[2:])
        parts = mean.split(self.cases_at_a_time)
        with torch.inference_mode():
            for _ in range(passes):
                noisy = add_noise(image, self.noise_std, self.noise_bounds).split(self.cases_at_a_time)
                for cases, of_cases in zip(noisy, parts, strict=True):
                    with self._autocast():
                        logits = teacher.predict(cases)
                    of_cases.add_(self.probabilities(logits.float()), alpha=1 / passes)
        return mean

    # what pseudo-labels show

    def log_keys(self) -> list[str]:
        """Also, for every network, the volumes of classes in what it learns from."""
        of_networks = [t.name for t in self.trainers] if self.makes_pseudo_labels else []
        return [*super().log_keys(), *(kind + name for name in of_networks for kind in (PSEUDO, LABELED))]

    def count_pseudo_labels(self, name: str, labels: Tensor) -> None:
        """Take note of pseudo-labels.

        Args:
            name: of the network that learns from them.
            labels: (B, heads, *patch), as zeros and ones or probabilities; zero where they do not count.
        """
        self.volumes.add(PSEUDO + name, self.foreground(labels))

    def _count_labels(self, batch: Mapping[str, Sequence[Any]]) -> None:
        """Of the labeled patches, as unlabeled ones are drawn: not those that are drawn for their foreground."""
        of_modality = {name: patches["targets"][name] for patches in batch["labeled"] for name in patches["images"]}
        for trainer in (t for t in self.trainers if t.modality.name in of_modality):
            scales = of_modality[trainer.modality.name]
            target = scales[0] if isinstance(scales, list) else scales
            anywhere = len(target)
            if not trainer.probabilistic_oversampling:  # nnU-Net's loader draws the last ones for their foreground
                anywhere = round(anywhere * (1 - trainer.oversample_foreground_percent))
            if anywhere:
                labels = self.one_hot_labels(self._on_device(target[:anywhere]))
                self.volumes.add(LABELED + trainer.name, self.foreground(labels))

    def _log_volumes(self) -> None:
        """Log the volumes of an epoch, and say so when a class has all but vanished from what a network learns from."""
        names = [name for name, label in self.dataset_json["labels"].items() if name not in ("background", "ignore")]
        if not self.label_manager.has_regions:
            names.sort(key=lambda name: int(self.dataset_json["labels"][name]))
        for trainer in self.trainers:
            shares = {}
            for kind in (PSEUDO, LABELED):
                everywhere = np.array(self._everywhere(self.volumes.take(kind + trainer.name, len(names))))
                measured = everywhere[~np.isnan(everywhere[:, 0])]
                shares[kind] = (measured.mean(0) if len(measured) else everywhere[0]).tolist()
            before = self.logger.get_value(PSEUDO + trainer.name, step=None)[-1:]
            for kind, of_kind in shares.items():
                self.logger.log(kind + trainer.name, of_kind, self.current_epoch)
            if np.isnan(shares[PSEUDO][0]):
                continue
            both = list(zip(names, shares[PSEUDO], shares[LABELED], strict=True))
            self.print_to_log_file(
                f"{trainer.name} learns from pseudo-labels with these shares of voxels (labels):",
                ", ".join(f"{name} {pseudo:.5f} ({labeled:.5f})" for name, pseudo, labeled in both),
            )
            for number, (name, pseudo, labeled) in enumerate(both):
                threshold = self.vanishing_share * labeled
                if pseudo < threshold and not (before and before[0][number] < threshold):
                    self.print_to_log_file(
                        f"WARNING: {name} has all but vanished from the pseudo-labels that {trainer.name} learns from: "
                        f"{pseudo:.2g} of the voxels, {labeled:.2g} of those of labeled patches."
                    )

    # predictions

    @torch.no_grad()
    def own_prediction(self, trainer: ModalityTrainer, images: Tensor) -> Tensor:
        """Probabilities of a network by itself, as it is being trained, without gradient.

        Args:
            trainer: that of the network.
            images: (B, C, *patch).

        Returns:
            (B, heads, *patch): softmax with the background, or sigmoid for regions.
        """
        network = trainer.local_network()
        with self._full_resolution(trainer), self._autocast():
            logits = torch.cat([network(cases) for cases in images.split(self.cases_at_a_time)])
        return self.probabilities(logits.float())

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

    def one_hot_labels(self, target: Tensor) -> Tensor:
        """Labels as zeros and ones (B, heads, *patch), as pseudo-labels are; ignored voxels are zero everywhere.

        Args:
            target: nnU-Net's at full resolution, (B, 1, *patch) or one channel for each region.
        """
        heads = self.label_manager.num_segmentation_heads
        if self.label_manager.has_regions:  # nnU-Net appends where to ignore
            return target[:, :heads].float()
        classes = torch.arange(heads, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
        return (target == classes).float()

    def annotated(self, target: Tensor) -> Tensor:
        """Where a target, as `one_hot_labels` takes it, is not to be ignored: (B, 1, *patch), boolean."""
        if not self.label_manager.has_ignore_label:
            return torch.ones_like(target[:, :1], dtype=torch.bool)
        if self.label_manager.has_regions:
            return ~target[:, -1:].bool()
        known: Tensor = target != self.label_manager.ignore_label
        return known

    def joined(self, labeled: LabeledPatches, images: Tensor, labels: Tensor) -> LabeledPatches:
        """Labeled and pseudo-labeled patches as one batch for nnU-Net's own loss.

        Args:
            labeled: B patches.
            images: (U, C, *patch).
            labels: of these, as zeros and ones (U, heads, *patch).

        Returns:
            B + U patches, in the resolutions of the labeled ones and by nnU-Net's rule of making these.
        """
        full = labels.argmax(1, keepdim=True).float()
        if self.label_manager.has_regions:
            nowhere = torch.zeros_like(labels[:, : labeled.full_target.shape[1] - labels.shape[1]])
            full = torch.cat([labels, nowhere], 1)  # nnU-Net appends where to ignore
        own = labeled.target if isinstance(labeled.target, list) else [labeled.target]
        scales = [
            torch.cat([target, interpolate(full, target.shape[2:], mode="nearest-exact").to(target.dtype)])
            for target in own
        ]
        image = torch.cat([labeled.image, images])
        return LabeledPatches(image, scales if isinstance(labeled.target, list) else scales[0])

    def hard_pseudo_labels(self, probabilities: Tensor) -> Tensor:
        """The most probable class, or all regions above one half, as zeros and ones (B, heads, *patch)."""
        if self.label_manager.has_regions:
            return (probabilities > 0.5).float()
        return torch.zeros_like(probabilities).scatter_(1, probabilities.argmax(1, keepdim=True), 1.0)

    def ce_and_dice(
        self, logits: Tensor, prediction: Tensor, labels: Tensor, where: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the Dice loss of the foreground, of predictions and pseudo-labels.

        Args:
            logits: (B, heads, *patch).
            prediction: their foreground probabilities (B, C, *patch), which callers have.
            labels: (B, heads, *patch), probabilities or zeros and ones.
            where: weight of every voxel, (B, 1, *patch); None weights all alike.
        """
        batch_dice, smooth = self.configuration_manager.batch_dice, self.dice_smooth
        return (
            soft_cross_entropy(logits, labels, self.label_manager.has_regions, where, self.is_ddp),
            soft_dice_loss(prediction, self.foreground(labels), batch_dice, where, smooth, distributed=self.is_ddp),
        )

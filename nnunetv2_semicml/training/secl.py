"""A part of methods: self-ensembling contrastive learning (SECL), the contrast of features of unlabeled images.

Source: Xiang et al., Self-ensembling contrastive learning for semi-supervised medical image segmentation, arXiv
2105.12924, 2021. What the abstract leaves open was chosen here; what was tried: benchmarks/study/validation.md at
commit cb2e976.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from nnunetv2_semicml.losses.contrastive import ContrastiveLoss, pool_features
from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.teacher import Teacher, add_noise


class ProjectedEncoder(nn.Module):
    """Features of a U-Net's encoder, projected for the contrast.

    Args:
        network: nnU-Net's PlainConvUNet, ResidualEncoderUNet or any other with such an encoder; it is shared.
        stage: of the encoder, 0 at full resolution; its last one if it has fewer.
        dimension: of the projection.
    """

    network: Any  # nnU-Net's networks have no types
    head: nn.Sequential

    def __init__(self, network: nn.Module, stage: int, dimension: int):
        super().__init__()
        self.network = network
        convolution = self.network.encoder.conv_op
        self.stage = min(stage, len(self.network.encoder.stages) - 1)
        channels = self.network.encoder.output_channels[self.stage]
        self.head = nn.Sequential(
            convolution(channels, channels, 1), nn.LeakyReLU(), convolution(channels, dimension, 1)
        )

    def forward(self, images: Tensor, with_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Project the features of images.

        Args:
            images: (B, C, *patch).
            with_logits: whether to go on to the network's output, as a teacher does.

        Returns:
            (B, dimension, *spatial of the stage), and the logits (B, heads, *patch) if asked for.
        """
        encoder = self.network.encoder
        if with_logits:
            skips = encoder(images)
            return self.head(skips[self.stage]), self.network.decoder(skips)
        stem = getattr(encoder, "stem", None)
        features = images if stem is None else stem(images)
        for stage in encoder.stages[: self.stage + 1]:
            features = stage(features)
        projected: Tensor = self.head(features)
        return projected


class WithSelfEnsemblingContrast(nnUNetTrainerSemiSupervised):
    """Features of the student encoder are contrasted with those of its teacher, part by part of the images.

    A part's features are averaged over the part (`pool_features`), in the student for the anchors and in the teacher,
    which sees a noisy image, for the keys. The same part is positive, other parts, in all images, are negative. A
    method says which parts there are. The student is deployed, without its projection head, which lives in the
    training state alone.

    Attributes:
        own_image: whether the teacher's key of the same part of the same image is positive, too.
        contrast_weight: of the term.
        contrast_temperature: see `ContrastiveLoss`.
        feature_stage: of the encoder, see `ProjectedEncoder`: a quarter of the resolution, where small structures still
            have features. On validation patients the last stage was no better.
        projection_dimension: length of the features; not varied, nor were `ema_decay` and the noise.
        min_part: weight, in positions of the feature map, below which a part is neither anchor nor key.
        teacher_averaging: of the keys' encoder; the self-ensembling of the title.
        students: of every network, by name, with the projection head.
    """

    teacher_averaging = "ema"
    term_weights = {"contrast": "contrast_weight"}
    own_image = True
    contrast_weight = 0.1
    contrast_temperature = 0.1
    feature_stage = 2
    projection_dimension = 64
    min_part = 1.0

    def initialize(self) -> None:
        """Build the networks, their projection heads and teachers."""
        self.students: dict[str, ProjectedEncoder] = {}
        super().initialize()
        self._projected: dict[str, Callable[[Tensor], Tensor]] = {
            t.name: torch.compile(self.student(t)) if t._do_i_compile() else self.student(t) for t in self.trainers
        }

    def student(self, trainer: ModalityTrainer) -> ProjectedEncoder:
        """The network with its projection head, which the network's optimizer updates as well."""
        if trainer.name not in self.students:
            network = trainer.unwrapped_network()
            student = ProjectedEncoder(network, self.feature_stage, self.projection_dimension).to(self.device)
            if self.is_ddp:
                for parameter in student.head.parameters():
                    dist.broadcast(parameter.data, 0)
            trainer.optimizer.add_param_group({"params": student.head.parameters()})
            self.students[trainer.name] = student
        return self.students[trainer.name]

    def averaged_network(self, name: str) -> nn.Module:
        """The teacher's network without its projection head."""
        network: nn.Module = self._of_teacher(name).network
        return network

    def _of_teacher(self, name: str) -> ProjectedEncoder:
        averaged = self.teachers[name].network
        assert isinstance(averaged, ProjectedEncoder)  # of `student`
        return averaged

    # the method

    def features_and_parts(self, teacher: Teacher, image: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the keys are made of.

        Args:
            teacher: predicts projected features.
            image: of some of the unlabeled cases, (B, C, *patch), with noise.
            positions: of these cases, (B, axes, *patch), if the method needs them.

        Returns:
            Features (B, D, *size), and how much of each of their positions belongs to each of R parts, (B, R, *size),
            in [0, 1].
        """
        raise NotImplementedError

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], dict[str, tuple[Tensor, Tensor]]]:
        """Compare with the keys (B, R, D) of every network's teacher; with them, the parts (B, R, *size)."""
        targets = {}
        for name, image in unlabeled.images.items():
            noisy = add_noise(image, self.noise_std, self.noise_bounds).split(self.cases_at_a_time)
            where_all = unlabeled.positions
            positions = [None] * len(noisy) if where_all is None else where_all.split(self.cases_at_a_time)
            keys, parts = [], []
            with torch.inference_mode():
                for cases, where in zip(noisy, positions, strict=True):
                    with self._autocast():
                        features, of_cases = self.features_and_parts(self.teachers[name], cases, where)
                    keys.append(pool_features(features, of_cases)[0])
                    parts.append(of_cases)
            # joined outside of inference mode, so that the loss can save them for its gradient
            targets[name] = torch.cat(keys), torch.cat(parts)
        return [unlabeled.images], targets

    def unlabeled_output(self, trainer: ModalityTrainer, images: Tensor, view: int) -> Tensor:
        """Projected features (B, D, *size)."""
        return self._projected[trainer.name](images)

    def unsupervised_terms(self, outputs: Sequence[View], targets: Any) -> dict[str, Tensor]:
        """The contrast of anchors and keys, summed over the networks, which learn independently of each other."""
        loss, terms = ContrastiveLoss(self.contrast_temperature), []
        (features_of,) = outputs
        for name, features in features_of.items():
            keys, parts = map(self.different_cases, targets[name])
            anchors, weight = pool_features(self.different_cases(features), parts)
            present = (weight >= self.min_part).flatten()
            image, part = torch.meshgrid(*(torch.arange(n, device=keys.device) for n in weight.shape), indexing="ij")
            same_image, same_part = (_pairs(i) for i in (image, part))
            both = present[:, None] & present[None, :]
            positive = both & same_part if self.own_image else both & same_part & ~same_image
            terms.append(loss(anchors.flatten(0, 1), keys.flatten(0, 1), positive, both & ~same_part))
        return {"contrast": self.over_networks(terms)}

    # checkpoints

    def get_method_state(self) -> dict[str, Any]:
        """The teachers, and the projection heads of students and teachers."""
        heads = {
            name: {"student": student.head.state_dict(), "teacher": self._of_teacher(name).head.state_dict()}
            for name, student in self.students.items()
        }
        return {**super().get_method_state(), "projection_heads": heads}

    def set_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_method_state` returned."""
        super().set_method_state(state)
        for name, heads in state["projection_heads"].items():
            self.students[name].head.load_state_dict(heads["student"])
            self._of_teacher(name).head.load_state_dict(heads["teacher"])


def shrink(voxels: Tensor, size: Sequence[int]) -> Tensor:
    """Mean of the voxels (B, C, *patch) behind every position of a feature map, (B, C, *size)."""
    pool: Any = adaptive_avg_pool3d if len(size) == 3 else adaptive_avg_pool2d  # each wants a tuple of its length
    means: Tensor = pool(voxels, size)
    return means


def _pairs(index: Tensor) -> Tensor:
    """Which of all indices are equal, pair by pair."""
    flat = index.flatten()
    return flat[:, None] == flat[None, :]

"""Teachers: networks that follow a student by averaging its weights and are never trained by gradients."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Teacher:
    """An averaged copy of a network, or of a module that contains one.

    It predicts at full resolution only, in evaluation mode; dropout, where it exists, stays on, since the teacher's
    passes are meant to differ (Monte-Carlo dropout).

    Args:
        network: the student, without the wrapper of torch.compile.
        compiled: whether to predict through torch.compile.

    Attributes:
        network: the averaged weights.
        predict: what the network makes, e.g. logits (B, heads, *patch), of images (B, C, *patch).
        steps: how often `follow` was called.
    """

    def __init__(self, network: nn.Module, compiled: bool = False):
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        for module in self.network.modules():
            if hasattr(module, "deep_supervision"):
                setattr(module, "deep_supervision", False)  # noqa: B010  (a module's attributes have types of their own)
            if isinstance(module, _DropoutNd):
                module.train()
        self.predict = torch.compile(self.network) if compiled else self.network
        self.steps = 0

    def follow(self, network: nn.Module, decay: float) -> None:
        """Make a step t = 1, 2, … of an exponential moving average: keep min(1 - 1 / (t + 1), decay) of the teacher.

        So it forgets the random weights of the beginning (Tarvainen and Valpola, NeurIPS 2017).

        Args:
            network: the student after its step.
            decay: in [0, 1].
        """
        self.steps += 1
        self.average(network, min(1 - 1 / (self.steps + 1), decay))

    @torch.no_grad()
    def average(self, network: nn.Module, keep: float) -> None:
        """Set the weights to keep · teacher + (1 - keep) · network; buffers are averaged likewise, counters copied.

        Args:
            network: the student.
            keep: share of the old teacher, in [0, 1]. 0 copies the network, 1 leaves the teacher as it is.
        """
        # not the entries of state_dict: nnU-Net's networks list a shared weight under several names
        average = get_ema_multi_avg_fn(keep)
        average(list(self.network.parameters()), list(network.parameters()), None)
        for own, new in zip(self.network.buffers(), network.buffers(), strict=True):
            if own.is_floating_point():
                average([own], [new], None)
            else:
                own.copy_(new)


class BestModelPool:
    """The rule of best-model averaging (BMA): how much of the teacher a network with a given validation Dice replaces.

    The pool keeps the highest validation Dice values. Until it is full, the teacher is the network itself. Then only a
    network whose Dice d exceeds the pool's minimum d_min enters, in the place of the minimum, and the teacher becomes
    a · teacher + (1 - a) · network with a = min(1 - (d - d_min) / d, 0.99): the larger the gain, the larger the step.

    Source: Zhang et al., Med. Image Anal. 83:102656, 2023.

    Args:
        size: number of values kept.
        values: the values with which an earlier pool ended.
    """

    def __init__(self, size: int, values: Sequence[float] = ()):
        if size < 1 or len(values) > size:
            raise ValueError(f"a pool needs room for its {len(values)} values and for at least one, got {size=}.")
        self.size = size
        self.values = list(values)

    def update(self, dice: float) -> float:
        """Offer a network to the pool.

        Args:
            dice: its validation Dice in [0, 1]. NaN, nnU-Net's Dice of an epoch whose validation patches show no
                foreground, is no measurement and changes nothing once there are others.

        Returns:
            The share of the teacher to keep, for `Teacher.average`: 0 is the network alone, 1 the teacher alone.
        """
        if dice != dice:
            return 1.0 if self.values else 0.0
        if len(self.values) < self.size:
            self.values.append(dice)
            return 0.0
        lowest = min(self.values)
        if dice <= lowest:
            return 1.0
        self.values[self.values.index(lowest)] = dice
        return min(1 - (dice - lowest) / dice, 0.99)


def add_noise(image: Tensor, std: float, bounds: tuple[float, float]) -> Tensor:
    """Add Gaussian noise in units of the image's own standard deviation, whatever normalization the modality has.

    Args:
        image: (B, C, *spatial), normalized.
        std: standard deviation of the noise before clamping.
        bounds: lowest and highest value of the noise.

    Returns:
        image + s · clamp(n, *bounds) with n ~ N(0, std^2) and s the standard deviation of each case; same shape.
    """
    scale = image.std(dim=tuple(range(1, image.ndim)), keepdim=True)
    return image + scale * (std * torch.randn_like(image)).clamp(*bounds)

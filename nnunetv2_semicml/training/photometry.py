"""Strong photometry for a second view of patches: drawn once, applied to whatever shall look the same. Pure PyTorch.

The loader draws geometry and nnU-Net's own, weak intensity transforms; views of one patch share these. What makes a
view strong is drawn and applied here, on the device of the patches, without waiting for it.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv3d, pad


@dataclass(frozen=True)
class Photometry:
    """What happens to the intensities of B cases, whatever their number of channels and size.

    Attributes:
        brightness: (B,), factor on an intensity scale on which a case's patch lies between 0 and 1, channel by channel.
        contrast: (B,), factor on the distance from the mean of the patch.
        blur: (B,), standard deviation of a Gaussian, in voxels; 0 for none.
        widest_blur: no less than any of these.
    """

    brightness: Tensor
    contrast: Tensor
    blur: Tensor
    widest_blur: float

    def apply(self, images: Tensor) -> Tensor:
        """Change images (B, C, *patch) of 2 or 3 dimensions; brightness, contrast, then blur, within their range."""
        axes = tuple(range(2, images.ndim))
        shape = (-1, *[1] * (images.ndim - 1))
        lowest, highest = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
        changed = lowest + self.brightness.view(shape) * (images - lowest)
        changed = torch.minimum(changed, highest)
        mean = changed.mean(axes, keepdim=True)
        changed = mean + self.contrast.view(shape) * (changed - mean)
        return self._blurred(torch.minimum(torch.maximum(changed, lowest), highest))

    def _blurred(self, images: Tensor) -> Tensor:
        radius = ceil(3 * self.widest_blur)
        offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
        kernels = torch.exp(-(offsets.square() / (2 * self.blur[:, None].clamp(min=1e-3).square())))
        kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)  # (B * C, taps)
        convolve = conv3d if images.ndim == 5 else conv2d
        planes = images.reshape(1, -1, *images.shape[2:])
        for axis in range(2, images.ndim):
            own = [1] * images.ndim
            own[0], own[axis] = len(kernels), -1
            beyond = [0, 0] * (images.ndim - 2)
            beyond[2 * (images.ndim - 1 - axis)] = beyond[2 * (images.ndim - 1 - axis) + 1] = radius
            planes = convolve(pad(planes, beyond, mode="replicate"), kernels.view(own), groups=len(kernels))
        return planes.view_as(images)


def draw_photometry(
    cases: int,
    device: torch.device,
    jitter: float = 0.5,
    jitter_probability: float = 0.8,
    blur_probability: float = 0.5,
    blur_range: tuple[float, float] = (0.1, 2.0),
) -> Photometry:
    """Draw for every case whether and how it is changed.

    The defaults are those of FixMatch and UniMatch in their published code for segmentation (Yang et al., Revisiting
    weak-to-strong consistency in semi-supervised semantic segmentation, CVPR 2023), on images of one channel; there,
    brightness and contrast come in random order.

    Args:
        cases: B.
        device: where the images are.
        jitter: brightness and contrast are multiplied by 1 ± this at the most.
        jitter_probability: of a change of both.
        blur_probability: of a blur.
        blur_range: of its standard deviation, in voxels.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(cases, device=device)

    jittered = torch.rand(cases, device=device) < jitter_probability
    brightness, contrast = (torch.where(jittered, uniform(1 - jitter, 1 + jitter), 1.0) for _ in range(2))
    blurred = torch.rand(cases, device=device) < blur_probability
    return Photometry(brightness, contrast, torch.where(blurred, uniform(*blur_range), 0.0), blur_range[1])

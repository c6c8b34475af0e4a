"""A network's outputs for any number of cases, in the memory of the activations of a few. Pure PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor


class Passes:
    """The outputs of a network for a batch, cut off from its graph, and the way back for the gradient they collect.

    Cases go through the network `size` at a time, and so does the gradient on the way back. With `replay`, no
    activations are held in between: on the way back every pass is computed again, with the random state that it had, so
    that dropout drops the same.

    Args:
        forward: from images (B, C, *spatial) to an output (B, ...) or a list of outputs, e.g. one for each scale; cases
            must not depend on each other.
        images: (B, C, *spatial).
        size: cases per pass.
        replay: whether activations are computed again instead of held.

    Attributes:
        outputs: one tensor (B, ...) for each output of the network; leaves that require a gradient.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor | list[Tensor]], images: Tensor, size: int, replay: bool):
        self._forward = forward
        self._replay = replay
        self._random = torch if images.device.type == "cpu" else getattr(torch, images.device.type)
        self._passes = []  # of each pass its outputs or, to replay it, its cases and its random state
        parts = []
        for cases in images.split(size):
            state = self._random.get_rng_state() if replay else None
            with torch.set_grad_enabled(not replay):
                outputs = _as_list(forward(cases))
            self._passes.append((cases, state) if replay else outputs)
            parts.append([output.detach() for output in outputs])
        joined = [of_passes[0] if len(parts) == 1 else torch.cat(of_passes) for of_passes in zip(*parts, strict=True)]
        self.outputs = [output.requires_grad_() for output in joined]

    def backward(self) -> None:
        """Send the gradient of the outputs back, once; what got none, such as a scale with weight 0, sends none."""
        gradients = [output.grad for output in self.outputs]
        end = len(self.outputs[0])
        self.outputs = []
        while self._passes:  # the graph of one is gone before the next is computed
            kept = self._passes.pop()
            outputs = self._computed_again(*kept) if self._replay else kept
            start = end - len(outputs[0])
            pairs = [(o, g[start:end]) for o, g in zip(outputs, gradients, strict=True) if g is not None]
            torch.autograd.backward(*zip(*pairs, strict=True))
            end = start

    def _computed_again(self, cases: Tensor, state: Tensor) -> list[Tensor]:
        now = self._random.get_rng_state()
        self._random.set_rng_state(state)
        try:
            return _as_list(self._forward(cases))
        finally:
            self._random.set_rng_state(now)


def _as_list(output: Tensor | list[Tensor]) -> list[Tensor]:
    return list(output) if isinstance(output, (list, tuple)) else [output]

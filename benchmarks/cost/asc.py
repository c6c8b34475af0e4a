"""What the ASC loss costs: the Gram matrix against the published broadcast formulation, forward and backward.

OMP_WAIT_POLICY=PASSIVE python benchmarks/cost/asc.py --work SCRATCH
"""

from collections.abc import Callable
from functools import partial

import torch
from common import HERE, alternate, arguments, operations, ratio, table, write_results
from memory import peak_memory
from torch import Tensor

from nnunetv2_semicml.losses.asc import AreaSimilarityContrastiveLoss

# cases, classes, volume; two modalities, so twice as many predictions
DEFAULT = (8, 3, (64, 64, 64))
SWEEP = (
    DEFAULT,
    (2, 3, (64, 64, 64)),
    (4, 3, (64, 64, 64)),
    (8, 1, (64, 64, 64)),
    (8, 3, (32, 32, 32)),
    (2, 1, (128, 128, 128)),
    (8, 1, (128, 128)),
    (28, 1, (128, 128)),
    (28, 3, (128, 128)),
)


def broadcast_loss(first: Tensor, second: Tensor, temperature: float = 1.0, eps: float = 1e-6) -> Tensor:
    """The same loss with every pair of predictions multiplied voxel by voxel, N x N x V products, as published."""
    flat = torch.cat([first, second]).flatten(1)
    overlap = (flat[:, None] * flat[None]).sum(2)
    area = (flat * flat).sum(1)
    similarity = torch.exp((2 * overlap + eps) / (area[:, None] + area[None] + eps) / temperature)
    cases = len(first)
    positives = torch.cat([similarity.diagonal(cases), similarity.diagonal(-cases)])
    return -torch.log(positives / (similarity.sum(1) - similarity.diagonal())).mean()


def gram_loss(first: Tensor, second: Tensor) -> Tensor:
    """The loss of this package."""
    return AreaSimilarityContrastiveLoss()([first, second])


def forward_and_backward(loss: Callable[..., Tensor], predictions: list[Tensor]) -> None:
    """One call of a loss and its gradient on the predictions."""
    torch.autograd.grad(loss(*predictions), predictions)


def main() -> None:
    """Measure and write asc.md."""
    options = arguments(__doc__)
    rows = []
    for cases, classes, volume in SWEEP:
        torch.manual_seed(0)
        logits = [torch.randn(cases, classes + 1, *volume, device=options.device) for _ in range(2)]
        predictions = [z.softmax(1)[:, 1:].requires_grad_() for z in logits]
        torch.testing.assert_close(gram_loss(*predictions), broadcast_loss(*predictions), rtol=1e-4, atol=1e-5)
        gram, broadcast = (partial(forward_and_backward, f, predictions) for f in (gram_loss, broadcast_loss))
        inputs = sum(p.numel() * p.element_size() for p in predictions)
        peaks = {name: peak_memory(function) / inputs for name, function in (("g", gram), ("b", broadcast))}
        seconds = alternate({"broadcast": broadcast, "gram": gram}, options.rounds)
        shape = f"{2 * cases} × {classes} × {'×'.join(map(str, volume))}"
        rows.append((shape, ratio(seconds, "broadcast", "gram"), f"{peaks['g']:.1f}", f"{peaks['b']:.1f}"))
        print(rows[-1], flush=True)
        if (cases, classes, volume) == DEFAULT:
            profiles = [operations(gram, 6), operations(broadcast, 6)]
    header = ("predictions", "broadcast / Gram, time", "Gram: memory / inputs", "broadcast: memory / inputs")
    parts = [
        "Forward and backward pass in float32, two modalities. Memory is the peak beyond the predictions themselves, "
        "their gradient included, divided by the predictions.\n",
        table(header, rows),
        "\n## Profiles, 16 predictions of 3 × 64³\n\nGram:\n",
        profiles[0],
        "Broadcast:\n",
        profiles[1],
    ]
    write_results(HERE / "asc.md", "What the ASC loss costs", parts)


if __name__ == "__main__":
    main()

"""What a step costs: time against its bare passes and against stock nnU-Net, memory against one stock step.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cost/step.py --work SCRATCH [--only time|memory|growth|layout]

Measured with two modalities unless the table says otherwise, on the phantom with nnU-Net's own plans (3D:
patches of 24 × 48 × 48 in batches of 2; 2D: 64 × 64 in batches of 8).

- bare: forward and backward pass of the same networks on the same labeled and unlabeled tensors, with a given gradient
  at the outputs; for PReL also the teacher's forward passes. No loss, no optimizer.
- stock: nnUNetTrainer.train_step on the labeled tensors, once per modality.
- parts: the bare passes of unlabeled cases, and stock steps. What a coupled step costs above that is the coupling.
"""

import copy
import statistics
from functools import partial

import torch
from common import (
    HERE,
    alternate,
    arguments,
    make_trainer,
    operations,
    prepare,
    quiet,
    ratio,
    table,
    write_results,
)
from memory import peak_memory
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL

CONFIGURATIONS = {"3d_fullres": "3D", "2d": "2D"}
METHODS = {"Semi-CML": nnUNetTrainerSemiCML, "PReL": nnUNetTrainerSemiCMLPReL}


class Steps:
    """Steps of one trainer on one batch, and what they are compared with."""

    def __init__(self, trainer_class: type[nnUNetTrainer], configuration: str, **attributes: object):
        # the attribute is switched between measurements
        self.trainer = make_trainer(trainer_class, configuration, recompute=True, **attributes)
        self.trainer.current_epoch = self.trainer.num_epochs // 2  # ramps are over, PReL's better network rests
        with quiet():
            loader, _ = self.trainer.get_dataloaders()
        self.batch = next(loader)
        self.labeled = self.trainer.labeled_patches(self.batch)
        (draw,) = self.trainer.unlabeled_draws(self.batch)
        self.images = draw.images
        for t in self.trainer.learners():
            t.network.train()

    def coupled(self, recompute: bool) -> None:
        """One step of the trainer."""
        self.trainer.recompute = recompute
        self.trainer.train_step(self.batch)

    def held(self) -> None:
        """One step that holds all activations."""
        self.coupled(False)

    def recomputed(self) -> None:
        """One step that computes them again."""
        self.coupled(True)

    def bare(self) -> None:
        """The passes that a step contains."""
        self.bare_unlabeled()
        for t in self.trainer.learners():
            _pass(t, self.labeled[t.name][0], deep_supervision=True)

    def bare_unlabeled(self) -> None:
        """Those on unlabeled cases."""
        if isinstance(self.trainer, nnUNetTrainerSemiCMLPReL):
            image = self.images[self.trainer.better_modality]
            with torch.inference_mode():
                for _ in range(self.trainer.teacher_passes):
                    self.trainer.labeler.predict(image)
        for t in self.trainer.learners():
            _pass(t, self.images[t.name], deep_supervision=False)

    def stock(self) -> None:
        """nnU-Net's steps of the learners, without the unlabeled cases."""
        for t in self.trainer.learners():
            data, target = self.labeled[t.name]
            t.train_step({"data": data, "target": target})

    def one_stock(self) -> None:
        """One of them."""
        data, target = next(iter(self.labeled.values()))
        self.trainer.learners()[0].train_step({"data": data, "target": target})

    def peak(self, name: str) -> int:
        """Peak memory of one of the methods beside what every network has anyway: weights, gradients and momentum."""
        for trainer in self.trainer.trainers:  # their gradients are set to zero and stay where they are
            sgd = trainer.optimizer
            sgd.zero_grad = lambda set_to_none, own=sgd: type(own).zero_grad(own, set_to_none=False)
        self.recomputed()
        return peak_memory(getattr(self, name))

    def parts(self) -> None:
        """Stock steps and bare passes of unlabeled cases."""
        self.stock()
        self.bare_unlabeled()


def _pass(trainer: nnUNetTrainer, image: torch.Tensor, deep_supervision: bool) -> None:
    trainer.set_deep_supervision_enabled(deep_supervision)
    _backward(trainer.network, image)
    trainer.set_deep_supervision_enabled(True)


def _backward(network: torch.nn.Module, image: torch.Tensor) -> None:
    output = network(image)
    outputs = output if isinstance(output, (list, tuple)) else [output]
    torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])


def times(rounds: int) -> str:
    """(b) Steps against the passes they contain and against stock steps."""
    rows = []
    for configuration, dimensions in CONFIGURATIONS.items():
        for method, trainer_class in METHODS.items():
            steps = Steps(trainer_class, configuration)
            names = ("held", "recomputed", "bare", "parts", "stock")
            seconds = alternate({name: getattr(steps, name) for name in names}, rounds)
            for name in ("held", "recomputed"):
                against = [ratio(seconds, name, reference) for reference in ("bare", "parts", "stock")]
                rows.append((method, dimensions, name, *against))
            print(rows[-2:], flush=True)
    return table(("method", "", "activations", "/ bare", "/ parts", "/ stock"), rows)


def memory() -> str:
    """(c) Peak memory beside weights, gradients and momentum, against that of one stock step."""
    rows = []
    for configuration, dimensions in CONFIGURATIONS.items():
        for method, trainer_class in METHODS.items():
            # with more modalities in 3D: see growth
            for modalities in (2, 4, 6) if (method, dimensions) == ("Semi-CML", "2D") else (2,):
                steps = Steps(trainer_class, configuration, modalities=modalities)
                held = {name: steps.peak(name) for name in ("one_stock", "held", "recomputed")}
                row = [f"{held[name] / held['one_stock']:.2f}" for name in ("held", "recomputed")]
                rows.append((method, dimensions, modalities, f"{held['one_stock'] / 2**20:.0f} MiB", *row))
                print(rows[-1], flush=True)
    return table(("method", "", "modalities", "one stock step", "held / it", "recomputed / it"), rows)


def growth(rounds: int) -> list[str]:
    """(e) Over the number of modalities, of unlabeled cases, and of cases in a batch."""
    modalities = {n: Steps(nnUNetTrainerSemiCML, "3d_fullres", modalities=n) for n in (2, 4, 6)}
    unlabeled = {n: Steps(nnUNetTrainerSemiCML, "3d_fullres", asc_cases=n) for n in (2, 4, 8)}
    batch = {n: Steps(nnUNetTrainerSemiCML, "2d", unlabeled_batch_size=n, micro_batch_size=n) for n in (2, 4, 8)}
    for n, steps in batch.items():
        for patches in steps.batch["labeled"]:
            patches["images"] = {name: image[:n] for name, image in patches["images"].items()}
            patches["targets"] = {name: [t[:n] for t in scales] for name, scales in patches["targets"].items()}
    return [
        "3D, with the number of modalities:\n",
        _growth_table("modalities", modalities, rounds),
        "3D, two modalities, with the number of contrasted unlabeled cases, two at a time:\n",
        _growth_table("contrasted cases", unlabeled, rounds),
        "2D, two modalities, with the batch:\n",
        _growth_table("labeled and unlabeled cases each", batch, rounds),
    ]


def _growth_table(name: str, steps: dict[int, Steps], rounds: int) -> str:
    """Time and memory of a step that recomputes activations over some size, and the time if it grew as at first."""
    peaks = {n: s.peak("recomputed") for n, s in steps.items()}
    seconds = alternate({n: s.recomputed for n, s in steps.items()}, rounds)
    median = {n: statistics.median(values) for n, values in seconds.items()}
    first, second, *_ = steps
    slope = (median[second] - median[first]) / (second - first)
    rows = []
    for n in steps:
        linear = (median[first] + slope * (n - first)) / median[first]
        rows.append((n, ratio(seconds, n, first), f"{linear:.2f}", f"{peaks[n] / peaks[first]:.2f}"))
        print(rows[-1], flush=True)
    return table((name, "time", f"time if linear from {first} to {second}", "memory"), rows)


def layout(rounds: int) -> str:
    """Networks and images in channels-last layout against the usual one."""
    rows = []
    for configuration, memory_format in (("3d_fullres", torch.channels_last_3d), ("2d", torch.channels_last)):
        steps = Steps(nnUNetTrainerSemiCML, configuration)
        plain = steps.trainer.trainers[0]
        last = copy.deepcopy(plain.network).to(memory_format=memory_format)
        image = steps.images[plain.name].contiguous()
        image_last = image.contiguous(memory_format=memory_format)
        functions = {
            "plain": partial(_backward, plain.network, image),
            "channels last": partial(_backward, last, image_last),
        }
        seconds = alternate(functions, rounds)
        rows.append((CONFIGURATIONS[configuration], ratio(seconds, "channels last", "plain")))
        print(rows[-1], flush=True)
    return table(("", "channels last / usual layout, time"), rows)


def profiles() -> list[str]:
    """Where the time of a step goes."""
    parts = []
    for configuration, dimensions in CONFIGURATIONS.items():
        for name in ("held", "recomputed"):
            steps = Steps(nnUNetTrainerSemiCML, configuration)
            steps.recomputed()
            parts += [f"\n### Semi-CML, {dimensions}, activations {name}\n", operations(getattr(steps, name))]
    return parts


def main() -> None:
    """Measure and write a page for each part."""
    options = arguments(__doc__)
    prepare(options.work)
    pages = {
        "time": ("The time of a step", lambda: [times(options.rounds), *profiles()]),
        "memory": ("The peak memory of a step, beside weights, gradients and momentum", lambda: [memory()]),
        "growth": ("Growth of a step that recomputes activations, Semi-CML", lambda: growth(options.rounds)),
        "layout": ("Memory layout: one network, forward and backward", lambda: [layout(options.rounds)]),
    }
    for name, (title, measure) in pages.items():
        if options.only in (None, name):
            write_results(HERE / f"step_{name}.md", title, ["\n\n".join(__doc__.split("\n\n")[2:]), *measure()])


if __name__ == "__main__":
    main()

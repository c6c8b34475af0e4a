"""The base of methods in which every network learns from an exponential moving average (EMA) of itself."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.trainers.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.trainers.teacher import Teacher


class nnUNetTrainerSelfEnsembling(nnUNetTrainerSemiSupervised):
    """Every network has a teacher that follows it step by step and sees noisy images.

    After step t = 1, 2, … the teacher is a · teacher + (1 - a) · network with a = min(1 - 1 / (t + 1), ema_decay), so
    that it forgets the random weights of the beginning.

    Attributes:
        teachers: of every network, by name.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.ema_decay = 0.99
        # of the teacher's images, in their standard deviations
        self.noise_std = 0.1
        self.noise_bounds = (-0.2, 0.2)
        self.teachers: dict[str, Teacher] = {}
        self._steps = 0

    def initialize(self) -> None:
        """Build the networks and a teacher of each."""
        super().initialize()
        for trainer in self.trainers:
            self.teachers[trainer.name] = Teacher(self.student(trainer), self._do_i_compile())

    def student(self, trainer: nnUNetTrainer) -> torch.nn.Module:
        """What the teacher follows."""
        return trainer.unwrapped_network()

    def train_step(self, batch: dict) -> dict:
        """Make a step; the teachers follow."""
        losses = super().train_step(batch)
        self._steps += 1
        keep = min(1 - 1 / (self._steps + 1), self.ema_decay)
        for trainer in self.trainers:
            self.teachers[trainer.name].average(self.student(trainer), keep)
        return losses

    def get_method_state(self) -> dict:
        """The teachers, and the number of steps that they have followed."""
        weights = {name: teacher.network.state_dict() for name, teacher in self.teachers.items()}
        return {"teacher_weights": weights, "steps": self._steps}

    def set_method_state(self, state: dict) -> None:
        """Restore what `get_method_state` returned."""
        self._steps = state["steps"]
        for name, weights in state["teacher_weights"].items():
            self.teachers[name].network.load_state_dict(weights)

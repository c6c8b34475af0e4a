"""The base of methods in which every network learns from an exponential moving average (EMA) of itself."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.trainers.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.trainers.teacher import Teacher


class nnUNetTrainerSelfEnsembling(nnUNetTrainerSemiSupervised):
    """Every network has a teacher that follows it step by step, see `Teacher.follow`, and sees noisy images.

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
        for trainer in self.trainers:
            self.teachers[trainer.name].follow(self.student(trainer), self.ema_decay)
        return losses

    def get_method_state(self) -> dict:
        """The teachers, and the number of steps that they have followed."""
        weights = {name: teacher.network.state_dict() for name, teacher in self.teachers.items()}
        return {"teacher_weights": weights, "teacher_steps": {n: t.steps for n, t in self.teachers.items()}}

    def set_method_state(self, state: dict) -> None:
        """Restore what `get_method_state` returned."""
        for name, weights in state["teacher_weights"].items():
            self.teachers[name].network.load_state_dict(weights)
            self.teachers[name].steps = state["teacher_steps"][name]

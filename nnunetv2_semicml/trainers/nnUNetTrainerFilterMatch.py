"""nnFilterMatch of one modality: pseudo-labeled patches in the labeled batch, and fewer unlabeled cases by and by.

Source: the published trainer nnFilterMatch (https://github.com/Ordi117/nnFilterMatch), which is one of nnU-Net 2.6.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import Tensor

from nnunetv2_semicml.data.modality_group import preprocessed_folder, unlabeled_identifier
from nnunetv2_semicml.training.conductor import LabeledPatches, UnlabeledDraw, View
from nnunetv2_semicml.training.modality_trainer import ModalityTrainer
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised
from nnunetv2_semicml.training.schedules import with_schedules


@with_schedules
class nnUNetTrainerFilterMatch(nnUNetTrainerSemiSupervised):
    """Every network learns from its own segmentations as from labels, under nnU-Net's own loss and at full weight.

    The unlabeled patches with these are rotated, later mirrored, too, and join the labeled batch. After every third of
    the schedule the unlabeled cases of which the networks are surest are left out, modality by modality.

    Attributes:
        warmup_fraction: share of the schedule on labels alone. Published: 20 of 300 epochs.
        mirror_from: share of the schedule after which patches are mirrored, too. Published: 100 of 300 epochs.
        filter_interval: share of the schedule after which, again and again, cases are left out. Published: at epochs
            100, 200 and 300.
        filtered_share: of the cases, that is left out each time; published.
        kept: modality -> the unlabeled cases that are still drawn from.
    """

    makes_pseudo_labels = True
    warmup_fraction = 1 / 15
    mirror_from = 1 / 3
    filter_interval = 1 / 3
    filtered_share = 0.15

    def initialize(self) -> None:
        """Build the networks; all cases are drawn from."""
        super().initialize()
        self.kept = {m.name: self.group.common_cases([m.name], labeled=False) for m in self.group.modalities}

    # pseudo-labeled patches

    def labeled_views(
        self, labeled: Mapping[str, LabeledPatches], draws: Sequence[UnlabeledDraw]
    ) -> Mapping[str, LabeledPatches]:
        """The labeled patches and, after the warm-up, the rotated unlabeled ones."""
        if self.warming_up:
            return labeled
        views = dict(labeled)
        for name, image in ((name, image) for draw in draws for name, image in draw.images.items()):
            (trainer,) = (t for t in self.trainers if t.name == name)
            labels = self.hard_pseudo_labels(self.own_prediction(trainer, image))
            self.count_pseudo_labels(name, labels)
            turn = self.draw_turn(image.shape[2:])
            views[name] = self.joined(
                labeled[name], *(part.rot90(turn[0], (-2, -1)).flip(turn[1]) for part in (image, labels))
            )
        return views

    def draw_turn(self, patch_size: Sequence[int]) -> tuple[int, list[int]]:
        """Draw how often a batch is rotated by 90° in the plane of the last two axes, and which of these are mirrored.

        Only by 180° where these axes differ in length, since a batch has one size.
        """
        turns = [1, 2, 3] if patch_size[-1] == patch_size[-2] else [2]
        mirrored = self.current_epoch >= self.mirror_from * self.num_epochs
        axes = [axis for axis in (-1, -2) if mirrored and float(torch.rand(())) > 0.5]
        return turns[int(torch.randint(len(turns), ()))], axes

    def views_and_targets(
        self, unlabeled: UnlabeledDraw, labeled: Mapping[str, LabeledPatches]
    ) -> tuple[Sequence[View], None]:
        """Nothing else is looked at."""
        return [], None

    def unsupervised_terms(self, outputs: Sequence[View], targets: None) -> dict[str, Tensor]:
        """None: it is nnU-Net's loss that learns."""
        return {}

    # fewer cases

    def unlabeled_cases(self, draw: Sequence[str]) -> list[str]:
        """Those that are kept."""
        (modality,) = draw
        return self.kept[modality]

    def on_epoch_start(self) -> None:
        """Leave out cases, if it is time."""
        interval = max(1, round(self.filter_interval * self.num_epochs))
        if self.current_epoch and not self.warming_up and self.current_epoch % interval == 0:
            for trainer in self.trainers:
                self._filter_cases(trainer)
            self.restart_training_stream()
        super().on_epoch_start()

    def _filter_cases(self, trainer: ModalityTrainer) -> None:
        cases = self.kept[trainer.modality.name]
        own = cases[self.local_rank :: self._world_size]
        parts = self._everywhere(dict(zip(own, self.entropies(trainer, own), strict=True)))
        entropy = {case: value for part in parts for case, value in part.items()}
        threshold = np.percentile(list(entropy.values()), 100 * self.filtered_share)
        kept = [case for case in cases if entropy[case] >= threshold]
        if len(kept) < self._world_size:
            return
        self.kept[trainer.modality.name] = kept
        self.print_to_log_file(
            f"{trainer.name}: patches of {len(kept)} of {len(cases)} unlabeled cases are drawn from now on, of those "
            "whose prediction has the highest entropy."
        )

    @torch.no_grad()
    def entropies(self, trainer: ModalityTrainer, cases: Sequence[str]) -> list[float]:
        """Entropy of the network's prediction of whole unlabeled cases, summed over the voxels of each, in nats."""
        configuration = trainer.configuration_manager
        folder = str(
            preprocessed_folder(trainer.modality.dataset_name) / unlabeled_identifier(configuration.data_identifier)
        )
        dataset = infer_dataset_class(folder)(folder, list(cases))
        predictor = nnUNetPredictor(
            perform_everything_on_device=self.device.type == "cuda", device=self.device, allow_tqdm=False
        )
        network = trainer.unwrapped_network()
        predictor.manual_initialization(
            network,
            trainer.plans_manager,
            configuration,
            None,
            trainer.dataset_json,
            type(self).__name__,
            trainer.inference_allowed_mirroring_axes,
        )
        network.eval()
        found = []
        with self._full_resolution(trainer):
            for case in cases:
                image = torch.from_numpy(np.asarray(dataset.load_case(case)[0][:]))
                p = self.probabilities(predictor.predict_sliding_window_return_logits(image)[None].float())
                entropy = -torch.xlogy(p, p)
                if self.label_manager.has_regions:
                    entropy = entropy - torch.xlogy(1 - p, 1 - p)
                found.append(float(entropy.sum()))
        network.train()
        return found

    # checkpoints

    def get_method_state(self) -> dict[str, Any]:
        """Also the cases that are kept."""
        return {**super().get_method_state(), "kept": self.kept}

    def set_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_method_state` returned."""
        super().set_method_state(state)
        self.kept = state["kept"]

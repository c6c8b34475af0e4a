"""The loaders of a training: patches that some networks see together, and the workers that load them."""

from collections.abc import Sequence

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semicml.data.modality_group import preprocessed_folder, unlabeled_identifier
from nnunetv2_semicml.data.paired_dataset import PairedDataset
from nnunetv2_semicml.data.streams import PairedDataLoader, PairedTransform, SemiSupervisedDataLoader


def make_loader(
    trainers: Sequence[nnUNetTrainer],
    cases: Sequence[str],
    batch_size: int,
    labeled: bool,
    augment: bool,
    positions: bool = False,
) -> PairedDataLoader:
    """Make the loader of patches that the modalities of some trainers show together, as these trainers augment them.

    Args:
        trainers: of different modalities, initialized.
        cases: that all of these modalities have.
        batch_size: patches per batch.
        labeled: whether the cases have labels; otherwise they are those of the unlabeled folder.
        augment: as in training, or else as in validation.
        positions: whether patches tell where in their case they lie, see `PairedDataset`.
    """
    first = trainers[0]
    labels = first.label_manager
    configuration = first.configuration_manager
    rotation, dummy_2d, patch_size, mirror_axes = first.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    scales = first._get_deep_supervision_scales() if labeled else None
    of_labels = {
        "foreground_labels": labels.foreground_labels,
        "regions": labels.foreground_regions if labels.has_regions else None,
        "ignore_label": labels.ignore_label,
    }
    pipelines = [
        t.get_training_transforms(
            configuration.patch_size,
            rotation,
            scales,
            mirror_axes,
            dummy_2d,
            use_mask_for_norm=t.configuration_manager.use_mask_for_norm,
            **(of_labels if labeled else {}),
        )
        if augment
        else t.get_validation_transforms(scales, **of_labels)
        for t in trainers
    ]
    identifier = configuration.data_identifier if labeled else unlabeled_identifier(configuration.data_identifier)
    folders = {t.name: str(preprocessed_folder(t.modality.dataset_name) / identifier) for t in trainers}
    dataset = PairedDataset(
        {name: infer_dataset_class(folder)(folder, list(cases)) for name, folder in folders.items()},
        cases,
        first.plans_manager.transpose_forward,
        configuration.spacing,
        labeled,
        positions,
    )
    channels = {t.name: t.num_input_channels for t in trainers}
    return PairedDataLoader(
        dataset,
        batch_size,
        patch_size if augment else configuration.patch_size,
        configuration.patch_size,
        labels,
        oversample_foreground_percent=first.oversample_foreground_percent if labeled else 0.0,
        probabilistic_oversampling=first.probabilistic_oversampling and labeled,
        transforms=PairedTransform(pipelines, list(channels.values())),
        channels=channels,
    )


def start_loading(
    loader: SemiSupervisedDataLoader, workers: int, pin_memory: bool
) -> SingleThreadedAugmenter | NonDetMultiThreadedAugmenter:
    """Load in some processes, or in this one if there are to be none, as nnU-Net does."""
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        loader,
        None,
        num_processes=workers,
        num_cached=max(3, workers // 2),
        pin_memory=pin_memory,
        wait_time=0.002,
    )

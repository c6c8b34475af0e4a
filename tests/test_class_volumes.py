"""What the log says of pseudo-labels: shares of voxels, beside those of labels, and classes that vanish."""

import numpy as np
import pytest
import torch
from conftest import LABELS, REGIONS, draw_batches, final_checkpoint, initialized, labeled_of, with_something_seen

from nnunetv2_semicml.trainers.nnUNetTrainerBCP import nnUNetTrainerBCP
from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerCrossModalCPS import nnUNetTrainerCrossModalCPS
from nnunetv2_semicml.trainers.nnUNetTrainerFixMatch import nnUNetTrainerFixMatch
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.training.class_volumes import ClassVolumes
from nnunetv2_semicml.training.plot_terms import plot_terms

FLAIR = "Dataset501_Labels_FLAIR"
pytestmark = pytest.mark.usefixtures("groups")


def test_shares_are_means_over_batches():
    volumes = ClassVolumes()
    a, b = torch.zeros(2, 2, 4, 5), torch.zeros(2, 2, 4, 5)
    a[0, 0, 1, :3] = 1  # 3 of 40 voxels
    b[:, 0] = 0.5
    b[1, 1, 0, 0] = 1
    for batch in (a, b):
        volumes.add("x", batch)
    assert volumes.take("x", 2) == pytest.approx([(3 / 40 + 0.5) / 2, (0 + 1 / 40) / 2])
    assert np.isnan(volumes.take("x", 2)).tolist() == [True, True]  # they are of one epoch


@pytest.mark.parametrize(
    ("method", "dataset", "configuration"),
    [(nnUNetTrainerCPS, FLAIR, "2d"), (nnUNetTrainerCrossModalCPS, REGIONS, "3d_fullres")],
)
def test_shares_of_an_epoch_are_those_of_its_patches(method, dataset, configuration):
    """Labeled: of patches that are drawn anywhere, as unlabeled ones are. Pseudo: what the others segment."""
    trainer = with_something_seen(initialized(dataset, configuration, method, num_iterations_per_epoch=1))
    (batch,) = draw_batches(trainer, 1)
    names = [t.name for t in trainer.trainers]
    regions = trainer.label_manager.has_regions
    anywhere = {"2d": 3, "3d_fullres": 1}[configuration]  # a third of nnU-Net's batch is drawn for its foreground
    assert len(labeled_of(batch)[names[0]][0]) == {"2d": 4, "3d_fullres": 2}[configuration]
    labeled, segmented = {}, {}
    for t in trainer.trainers:
        target = labeled_of(batch)[t.modality.name][1][0][:anywhere]
        of_classes = target[:, :2] if regions else torch.cat([target == 1, target == 2], 1)
        labeled[t.name] = [float(of_classes[:, c].float().mean()) for c in range(2)]
        with torch.no_grad():
            images = [p["images"][t.modality.name] for p in batch["unlabeled"] if t.modality.name in p["images"]]
            z = t.network(images[0])[0]
        found = z > 0 if regions else torch.stack([z.argmax(1) == 1, z.argmax(1) == 2], 1)
        segmented[t.name] = [float(found[:, c].float().mean()) for c in range(2)]
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(batch)]
    trainer.on_train_epoch_end(outputs)
    for name in names:
        others = [segmented[other] for other in names if other != name]
        found = {kind: trainer.logger.get_value(f"{kind}_volume/{name}", step=-1) for kind in ("pseudo", "labeled")}
        assert found["pseudo"] == pytest.approx(np.mean(others, axis=0).tolist(), rel=1e-4)
        assert found["labeled"] == pytest.approx(labeled[name], rel=1e-4)
        assert any(found["pseudo"])
        assert any(found["labeled"])


def test_shares_of_sure_voxels_are_of_all_voxels():
    trainer = with_something_seen(initialized(FLAIR, "2d", nnUNetTrainerFixMatch, sure_from=0.6))
    (batch,) = draw_batches(trainer, 1)
    (draw,) = trainer.unlabeled_draws(batch)
    with torch.no_grad():
        p = trainer.trainers[0].network(draw.images["FLAIR"])[0].softmax(1)
    sure = [(p[:, c] >= 0.6).float().mean().item() for c in (1, 2)]
    assert 0 < sum(sure) < (p.argmax(1) > 0).float().mean()
    trainer.views_and_targets(draw, {})
    assert trainer.volumes.take("pseudo_volume/FLAIR", 2) == pytest.approx(sure)


def test_vanishing_class_is_named_once(monkeypatch, capsys):
    """And again after it had come back; by name, whatever the order in dataset.json."""
    trainer = initialized(FLAIR, "2d", nnUNetTrainerBCP, num_epochs=5, warmup_fraction=0.0, num_iterations_per_epoch=1)
    trainer.dataset_json["labels"] = {"background": 0, "b": 2, "a": 1}
    shares = iter([0.5, 0.001, 0.0011, 0.02, 0.0])

    def segmented(name, probabilities):
        labels = torch.zeros_like(probabilities)
        labels[:, 1] = 0.1
        labels[:, 2] = next(shares)
        trainer.count_pseudo_labels(name, labels)
        return labels

    monkeypatch.setattr(trainer, "segmented", segmented)
    of_labels = torch.tensor([0.1, 0.05]).view(1, 2, 1, 1)
    monkeypatch.setattr(trainer, "_count_labels", lambda batch: trainer.volumes.add("labeled_volume/FLAIR", of_labels))
    trainer.run_training()
    out = capsys.readouterr().out
    warnings = [line for line in out.splitlines() if "has all but vanished" in line]
    assert len(warnings) == 2
    assert "b has all but vanished from the pseudo-labels that FLAIR learns from: 0.0" in warnings[0]
    assert "0.05 of those of labeled patches" in warnings[0]
    assert "a 0.10000 (0.10000), b 0.02" in out


def test_nothing_is_said_where_there_are_none():
    trainer = initialized(LABELS, "2d", nnUNetTrainerMeanTeacher)
    assert not [key for key in trainer.log_keys() if "volume" in key]
    trainer = initialized(LABELS, "2d", nnUNetTrainerBCP, num_epochs=2, warmup_fraction=0.5)
    trainer.run_training()
    log = final_checkpoint(trainer)["logging"]
    for name in ("FLAIR", "T1"):
        before, after = log[f"pseudo_volume/{name}"]
        assert np.isnan(before).all()  # warming up
        assert not np.isnan(after).any()
        assert not np.isnan(log[f"labeled_volume/{name}"]).any()


def test_shares_are_plotted(tmp_path):
    """With and without terms; without both there is no picture."""
    log = {
        "pseudo_volume/FLAIR": [[np.nan, np.nan], [0.1, 0.0]],
        "labeled_volume/FLAIR": [[0.2, 0.1], [0.2, 0.1]],
    }
    terms = {"unsupervised/ce": [1.0, 0.5], "weight/ce": [0.1, 0.2]}
    sizes = []
    for number, logging in enumerate(({}, log, terms, terms | log)):
        plot_terms(logging, str(tmp_path / f"{number}.png"))
        sizes.append((tmp_path / f"{number}.png").stat().st_size if number else 0)
    assert not (tmp_path / "0.png").exists()
    assert sizes[3] > max(sizes[1:3])

"""Pretrained weights: real files through nnU-Net's own command, compared with what nnU-Net gives to a stock network."""

import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from conftest import (
    CHANNELS,
    LABELS,
    Killed,
    KilledMixin,
    assert_same_weights,
    draw_batches,
    initialized,
    load_plans,
    make_trainer,
    nnUNetTrainerCompiled,
    weights,
)
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_semicml.data.checkpoint_file import content_digest
from nnunetv2_semicml.errors import UserError
from nnunetv2_semicml.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunetv2_semicml.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCML import nnUNetTrainerSemiCML
from nnunetv2_semicml.trainers.nnUNetTrainerSemiCMLPReL import nnUNetTrainerSemiCMLPReL
from nnunetv2_semicml.training.checkpoint import read_checkpoint
from nnunetv2_semicml.training.pretrained_weights import VARIABLE, files_of_modalities, fit_weights, repeat_channels

FLAIR, T1 = "Dataset501_Labels_FLAIR", "Dataset502_Labels_T1"
CPU = torch.device("cpu")


def begin(trainer, file):
    """What nnUNetv2_train does with -pretrained_weights."""
    maybe_load_checkpoint(trainer, False, False, None if file is None else str(file))
    return trainer


@pytest.fixture
def stock(groups, results):
    """A checkpoint as stock nnU-Net writes it, with NumPy's numbers in its log."""
    trainer = make_trainer(FLAIR, "2d", nnUNetTrainer)
    torch.manual_seed(3)
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([{"loss": np.float32(0.5)}])
    trainer.logger.log("mean_fg_dice", np.float64(0.25), 0)
    trainer.save_checkpoint(str(results / "stock.pth"))
    with pytest.raises(Exception, match="numpy"):
        torch.load(results / "stock.pth", weights_only=True)
    return results / "stock.pth"


def test_log_of_nnunet_with_an_older_numpy(stock):
    """Whose numbers were made by a function of another name."""
    with zipfile.ZipFile(stock) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in content if name.endswith("data.pkl"))
    content[pickled] = content[pickled].replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    with zipfile.ZipFile(stock, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(UnpicklingError, match=re.escape("numpy.core.multiarray.scalar")):
        torch.load(stock, weights_only=True)
    assert read_checkpoint(stock, CPU, "", "")["logging"]["train_losses"] == [0.5]


def network_of(dataset, seed, channels=1):
    """One of the dataset's architecture."""
    plans, _ = load_plans(dataset)
    architecture = plans["configurations"]["2d"]["architecture"]
    torch.manual_seed(seed)
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        3,
    )


def sees_one_channel(kernels):
    return kernels.ndim == 4 and kernels.shape[1] == 1


def without_heads(state):
    return {key: value for key, value in state.items() if ".seg_layers." not in key}


def heads(state):
    return {key: value for key, value in state.items() if ".seg_layers." in key}


# what the networks begin with


def test_networks_begin_as_nnunets_own_function_would_let_them(stock, capsys):
    trainer = initialized(LABELS, "2d")
    expected = []
    for before in weights(trainer):
        network = network_of(FLAIR, seed=9)
        network.load_state_dict(before)
        load_pretrained_weights(network, str(stock))
        expected.append(network.state_dict())
    before = weights(trainer)
    begin(trainer, stock)
    assert_same_weights(weights(trainer), expected)
    for old, new in zip(before, weights(trainer), strict=True):
        assert_same_weights([heads(old)], [heads(new)])
        assert not any(torch.equal(old[k], v) for k, v in without_heads(new).items() if k.endswith("conv.weight"))
    for t in trainer.trainers:
        tensors = {*t.network.parameters()}
        seg_layers = {*t.network.decoder.seg_layers.parameters()}
        sentence = (
            f"The network of {t.name} begins with {len(tensors - seg_layers)} pretrained tensors of {stock}; "
            f"{len(seg_layers)} of its segmentation layers begin at random."
        )
        assert sentence in Path(trainer.log_file).read_text()
    (batch,) = draw_batches(trainer, 1)
    trainer.train_step(batch)  # the optimizers have the same tensors as before


@pytest.mark.parametrize(
    ("trainer_class", "members"),
    [(nnUNetTrainerCPS, {}), (nnUNetTrainerSemiCML, {"network_trainer": nnUNetTrainerCompiled})],
    ids=["two networks", "compiled"],
)
def test_every_network_of_a_modality_begins_with_the_file(stock, trainer_class, members):
    file = read_checkpoint(stock, CPU, "", "")["network_weights"]
    trainer = begin(initialized(LABELS, "2d", type(trainer_class.__name__, (trainer_class,), members)), stock)
    states = [t.unwrapped_network().state_dict() for t in trainer.trainers]
    assert len(states) == 2 * trainer.networks_per_modality
    for state in states:
        assert_same_weights([without_heads(state)], [without_heads(file)])
    seg_layers = [state["decoder.seg_layers.0.weight"] for state in states]
    assert not any(torch.equal(a, b) for i, a in enumerate(seg_layers) for b in seg_layers[:i])


def test_teachers_begin_with_the_networks(stock):
    trainer = initialized(LABELS, "2d", nnUNetTrainerMeanTeacher)
    before = weights(trainer)
    begin(trainer, stock)
    averaged = [trainer.averaged_network(t.name).state_dict() for t in trainer.trainers]
    assert_same_weights(averaged, weights(trainer))
    assert not torch.equal(*(state[0]["encoder.stages.0.0.convs.0.conv.weight"] for state in (before, averaged)))


def test_nothing_begins_with_weights_that_were_not_named(groups):
    trainer = initialized(LABELS, "2d")
    before = weights(trainer)
    begin(trainer, None)
    trainer.on_train_start()
    assert_same_weights(weights(trainer), before)
    assert trainer.provenance["pretrained weights"] == {}
    with pytest.raises(NotImplementedError, match="give load_pretrained_weights of the trainer a file for each"):
        trainer.network.state_dict()


# which files there are


def test_model_of_a_modality_and_not_the_state_of_all(groups, results):
    trainer = initialized(LABELS, "2d", num_epochs=1)
    trainer.run_training()
    joint = Path(trainer.output_folder) / "checkpoint_final.pth"
    models = [Path(t.output_folder) / "checkpoint_final.pth" for t in trainer.trainers]
    torch.manual_seed(7)
    other = make_trainer(LABELS, "2d", nnUNetTrainerMeanTeacher)
    other.initialize()
    begin(other, models[1])
    for state in weights(other):
        assert_same_weights([without_heads(state)], [without_heads(weights(trainer)[1])])
    assert other.provenance["pretrained weights"] == dict.fromkeys(("FLAIR", "T1"), content_digest(models[1]))
    sentence = (
        rf"{joint}: found the state of a training of several networks.*Name the model of .*: {models[0]}, {models[1]}"
    )
    with pytest.raises(UserError, match=sentence):
        begin(other, joint)


def test_state_of_one_modality_names_its_model(groups):
    trainer = initialized(FLAIR, "2d", nnUNetTrainerMeanTeacher, num_epochs=1)
    trainer.run_training()
    model = Path(trainer.trainers[0].output_folder) / "checkpoint_final.pth"
    assert model.is_file()
    with pytest.raises(UserError, match=f"Name the model of a modality: {model}\\."):
        begin(initialized(LABELS, "2d"), Path(trainer.output_folder) / "checkpoint_final.pth")


def test_checkpoint_of_nnssl(groups, results):
    """Its network reconstructs one channel; the file says how it was pretrained, and has each tensor under one name."""
    plans, _ = load_plans(FLAIR)
    architecture = plans["configurations"]["2d"]["architecture"]
    names = architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"]
    network = get_network_from_plans(*names, 1, 1, deep_supervision=False)
    state = {k: v for k, v in network.state_dict().items() if "all_modules" not in k and "decoder.encoder." not in k}
    plan = {"architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None}, "pretrain_num_input_channels": 1}
    plan |= {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem", "keys_to_in_proj": ("encoder.stem",)}
    content = {"network_weights": state, "nnssl_adaptation_plan": plan, "trainer_name": "BaseMAETrainer"}
    torch.save({**content, "citations": ["…"]}, results / "nnssl.pth")
    trainer = begin(initialized(LABELS, "2d"), results / "nnssl.pth")
    for own in weights(trainer):
        assert_same_weights([without_heads(own)], [without_heads(network.state_dict())])
    without_decoder = {k: v for k, v in state.items() if k.startswith("encoder.")}  # of SimCLR or VoCo
    torch.save({**content, "network_weights": without_decoder}, results / "encoder.pth")
    with pytest.raises(UserError, match=r"encoder.pth: found no decoder.stages.0.convs.0.conv.weight; expected one of"):
        begin(initialized(LABELS, "2d"), results / "encoder.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(groups, results, prefix):
    state = network_of(FLAIR, seed=4).state_dict()
    torch.save({"network_weights": {prefix + k: v for k, v in state.items()}}, results / "a.pth")
    for own in weights(begin(initialized(LABELS, "2d"), results / "a.pth")):
        assert_same_weights([without_heads(own)], [without_heads(state)])


# fewer channels


@pytest.mark.parametrize(("channels", "more"), [(1, 2), (1, 3), (2, 4), (2, 3)])
def test_answer_to_equal_channels_is_kept(channels, more):
    kernels = torch.randn(5, channels, 3, 3)
    images = torch.randn(2, channels, 8, 8)
    repeated = images[:, [i % channels for i in range(more)]]
    found = nn.functional.conv2d(repeated, repeat_channels(kernels, more))
    torch.testing.assert_close(found, nn.functional.conv2d(images, kernels))


def test_first_convolution_of_a_modality_of_two_channels(groups, results):
    """One file for MR = FLAIR + T2, whose kernels are halved, and T1."""
    network = network_of(CHANNELS, seed=4)
    torch.save({"network_weights": network.state_dict()}, results / "a.pth")
    trainer = begin(initialized(CHANNELS, "2d"), results / "a.pth")
    both, single = weights(trainer)
    state = without_heads(network.state_dict())
    assert_same_weights([without_heads(single)], [state])
    stem = [key for key, value in state.items() if sees_one_channel(value)]
    assert len(stem) == 4  # names of one tensor
    for key in stem:
        assert torch.equal(both[key], state[key].repeat(1, 2, 1, 1) / 2)
    without_stem = [{k: v for k, v in s.items() if k not in stem} for s in (without_heads(both), state)]
    assert_same_weights(*([other] for other in without_stem))
    log = Path(trainer.log_file).read_text()
    assert log.count("Its first convolution sees 2 channels, that of the file 1: the kernels are repeated.") == 1
    assert re.search("network of MR begins with .*are repeated", log)


# what is refused


class Bomb:
    """Leaves a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_file_does_not_run(groups, results):
    state = network_of(FLAIR, seed=4).state_dict()
    torch.save({"network_weights": state, "logging": Bomb(results / "ran")}, results / "a.pth")
    trainer = initialized(LABELS, "2d")
    before = weights(trainer)
    with pytest.raises(UserError, match=r"a.pth: found more than tensors, numbers and text \(\w+.mkdir\), which could"):
        begin(trainer, results / "a.pth")
    assert not (results / "ran").exists()
    assert_same_weights(weights(trainer), before)
    load_pretrained_weights(network_of(FLAIR, seed=5), str(results / "a.pth"))
    assert (results / "ran").is_dir()  # it would have


def save_other(file, change):
    state = dict(network_of(FLAIR, seed=4).state_dict())
    torch.save(change(state), file)


STEM = "encoder.stages.0.0.convs.0.conv.weight"
OTHERS = {
    "missing": (
        lambda s: {"network_weights": {k: v for k, v in s.items() if ".stages.1.0.convs.0" not in k}},
        r"found no encoder.stages.1.0.convs.0.conv.weight; expected one of shape \(4, 4, 3, 3\), which the network of "
        r"FLAIR has. Pretrain with these plans",
    ),
    "another shape": (
        lambda s: {"network_weights": {k: torch.ones(9) if v.ndim == 1 else v for k, v in s.items()}},
        r"found encoder.stages.0.0.convs.0.conv.bias of shape \(9,\); expected shape \(4,\)",
    ),
    "more channels": (
        lambda s: {
            "network_weights": {
                k: v.repeat(1, 2, 1, 1) if v.shape[1:2] == (1,) and v.ndim == 4 else v for k, v in s.items()
            }
        },
        rf"found {STEM} of shape \(4, 2, 3, 3\); expected shape \(4, 1, 3, 3\)",
    ),
    "no network": (lambda s: {"state_dict": s, "epoch": 3}, r"found epoch, state_dict; expected a checkpoint of nnU"),
    "no tensors": (lambda s: {"network_weights": {"a": 1.0}}, "found network_weights that are no tensors"),
    "a list": (lambda s: [s], "found no keys; expected a checkpoint of nnU-Net"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_file_that_does_not_fit_is_refused(groups, results, other):
    change, sentence = OTHERS[other]
    save_other(results / "a.pth", change)
    trainer = initialized(LABELS, "2d")
    before = weights(trainer)
    with pytest.raises(UserError, match=rf"{results}/a.pth: {sentence}"):
        begin(trainer, results / "a.pth")
    assert_same_weights(weights(trainer), before)


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_damaged_file_is_refused(stock, damage):
    stock.write_bytes(stock.read_bytes()[:-100]) if damage == "cut off" else stock.unlink()
    with pytest.raises(UserError, match=r"stock.pth: found a (damaged )?file"):
        begin(initialized(LABELS, "2d"), stock)


def test_values_of_shared_tensors_are_found_under_any_name():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 2, 3)
            self.again = self.first

    network = Shared()
    found = {"again.weight": torch.ones(2, 1, 3, 3), "first.weight": torch.ones(3), "first.bias": torch.zeros(2)}
    fitting = fit_weights(network, found, "a.pth", "FLAIR")
    assert [id(tensor) for tensor, _ in fitting.values] == [id(network.first.weight), id(network.first.bias)]
    assert fitting.values[0][1] is found["again.weight"]


# a file for each modality, and when


def two_files(folder):
    files = {}
    for seed, name in enumerate(("FLAIR", "T1")):
        files[name] = str(folder / f"{name}.pth")
        torch.save({"network_weights": network_of(FLAIR, seed).state_dict()}, files[name])
    return files


def assert_begins_with(trainer, files):
    for t in trainer.trainers:
        if t.name in files:
            expected = torch.load(files[t.name], weights_only=True)["network_weights"]
            assert_same_weights([without_heads(t.network.state_dict())], [without_heads(expected)])
    assert trainer.provenance["pretrained weights"] == {name: content_digest(file) for name, file in files.items()}


@pytest.mark.parametrize("where", ["class", "class, one for all", "environment", "environment, one for all", "both"])
def test_file_for_each_modality(groups, results, monkeypatch, where):
    files = two_files(results)
    named, one = (files, files["T1"]), where.endswith("for all")
    expected = dict.fromkeys(files, files["T1"]) if one else files
    members = {"pretrained_weights": named[one]} if where.startswith("class") else {}
    if where.startswith("environment"):
        monkeypatch.setenv(VARIABLE, files["T1"] if one else ",".join(f"{k}={v}" for k, v in files.items()))
    elif where == "both":  # the environment goes before
        members, expected = {"pretrained_weights": files["FLAIR"]}, {"T1": files["T1"]}
        monkeypatch.setenv(VARIABLE, f"T1={files['T1']}")
    trainer = make_trainer(LABELS, "2d", type("nnUNetTrainerSemiCML", (nnUNetTrainerSemiCML,), members))
    trainer.initialize()
    before = weights(trainer)
    begin(trainer, None)
    trainer.on_train_start()
    assert_begins_with(trainer, expected)
    if where == "both":
        assert_same_weights(weights(trainer)[:1], before[:1])
        assert "The network of FLAIR begins at random: no pretrained" in Path(trainer.log_file).read_text()
    assert "pretrained_weights" not in trainer.settings()  # a path of this machine
    assert str(results) not in str(trainer.provenance)


def test_command_line_goes_before_the_environment(stock, results, monkeypatch):
    monkeypatch.setenv(VARIABLE, two_files(results)["T1"])
    trainer = begin(initialized(LABELS, "2d"), stock)
    trainer.on_train_start()
    assert trainer.provenance["pretrained weights"] == dict.fromkeys(("FLAIR", "T1"), content_digest(stock))


def test_unknown_modality_is_refused(groups, results, monkeypatch):
    monkeypatch.setenv(VARIABLE, "FLAIR=/a.pth, FLARE=/b.pth")
    trainer = initialized(LABELS, "2d")
    sentence = f"environment variable {VARIABLE}: found weights of FLARE; expected one file .* of FLAIR, T1. Correct"
    with pytest.raises(UserError, match=sentence):
        trainer.on_train_start()


def test_path_may_have_an_equals_sign(tmp_path):
    file = tmp_path / "lr=0.1.pth"
    file.touch()
    assert files_of_modalities(str(file), ["FLAIR", "T1"], "") == dict.fromkeys(["FLAIR", "T1"], str(file))
    assert files_of_modalities("T1=/b.pth", ["FLAIR", "T1"], "") == {"T1": "/b.pth"}


class nnUNetTrainerSemiCMLKilled(KilledMixin, nnUNetTrainerSemiCML):
    save_every = 1


def again(trainer_class):
    plans, dataset_json = load_plans(LABELS)
    trainer = trainer_class({**plans, "continue_training": True}, "2d", 0, dataset_json, CPU)
    for name, value in {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}.items():
        setattr(trainer, name, value)
    return trainer


def test_continued_and_validated_training_has_its_own_weights(stock, results, monkeypatch):
    trainer = begin(make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled, kill_at=1), stock)
    with pytest.raises(Killed):
        trainer.run_training()
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    noted = dict.fromkeys(("FLAIR", "T1"), content_digest(stock))
    assert torch.load(latest, weights_only=True)["provenance"]["pretrained weights"] == noted
    killed = weights(trainer)
    del trainer
    monkeypatch.setenv(VARIABLE, two_files(results)["T1"])
    continued = again(nnUNetTrainerSemiCMLKilled)
    with pytest.raises(RuntimeError, match="Cannot both continue a training AND load pretrained weights"):
        maybe_load_checkpoint(continued, True, False, str(stock))
    maybe_load_checkpoint(continued, True, False, None)
    continued.on_train_start()
    assert_same_weights(weights(continued), killed)
    continued.on_train_end()
    for t in continued.trainers:
        model = torch.load(Path(t.output_folder) / "checkpoint_final.pth", weights_only=True)
        assert model["provenance"]["pretrained weights"] == noted
    with pytest.raises(UserError, match=r"-pretrained_weights: found .*stock.pth, where a finished training is valid"):
        maybe_load_checkpoint(continued, False, True, str(stock))
    maybe_load_checkpoint(continued, False, True, None)


def test_checkpoint_without_the_note_goes_on(groups):
    """Of the same format, written before there were pretrained weights."""
    trainer = make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLKilled, kill_at=1)
    with pytest.raises(Killed):
        trainer.run_training()
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    checkpoint = torch.load(latest, weights_only=True)
    del checkpoint["provenance"]["pretrained weights"], trainer
    torch.save(checkpoint, latest)
    continued = again(nnUNetTrainerSemiCMLKilled)
    maybe_load_checkpoint(continued, True, False, None)
    assert continued.provenance["pretrained weights"] == {}


def test_second_stage_begins_with_its_first_one(stock, monkeypatch):
    initialized(LABELS, "2d", num_epochs=1).run_training()
    sentence = "found pretrained weights for nnUNetTrainerSemiCMLPReL; expected none, since .* nnUNetTrainerSemiCML. Tr"
    with pytest.raises(UserError, match=sentence):
        begin(make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL), stock)
    monkeypatch.setenv(VARIABLE, str(stock))
    with pytest.raises(UserError, match=sentence):
        make_trainer(LABELS, "2d", nnUNetTrainerSemiCMLPReL).on_train_start()

"""The launcher with OpenCLIP's trainer, and with a stand-in for the trainers of other versions."""

import inspect
import json
import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from types import ModuleType
from unittest.mock import Mock, patch

import pytest
import torch

pytest.importorskip("open_clip_train.main")
pytest.importorskip("pandas")  # which OpenCLIP's data module needs

from inputs import TERMS
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from open_clip_train import scheduler as open_clip_schedules
from open_clip_train.main import main as open_clip_main
from pages import blocks
from pool import Ranks
from recipe_cases import TEXT, VISION, captions
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import to_pil_image

import cyclip_loss
from benchmarks.compare.competitors import dense_clip
from cyclip_loss import (
    CyCLIPLoss,
    CySigLIPLoss,
    WithCyclicPenalty,
    caption_ids,
    open_clip_train,
)
from cyclip_loss.options import PRESETS
from reference_train.data.emoji import EMOJI_FOLDER


class WithoutDevices(DistributedDataParallel):
    """OpenCLIP passes device_ids, which DistributedDataParallel refuses on a CPU."""

    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)


def train_on_rank(rank, world_size, arguments, train=open_clip_train.main):
    """Trains in the group that the ranks have already. train: the launcher, or OpenCLIP's own."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    with (
        patch.dict(os.environ, {name: str(value) for name, value in variables.items()}),
        patch.object(torch.distributed, "init_process_group"),
        patch.object(torch.nn.parallel, "DistributedDataParallel", WithoutDevices),
    ):
        train(arguments)


def without_launcher(arguments):
    """OpenCLIP's own trainer. It knows no --model-config."""
    _, theirs = open_clip_train.parse(arguments)
    open_clip_main(theirs)


def logged(folder):
    """The losses in the log of a run: {name in small letters: value} for each step."""
    lines = (folder / "out.log").read_text().splitlines()
    steps = [re.findall(r"(\w*[Ll]oss): (\S+) \(", x) for x in lines if "Train Epoch" in x]
    return [{name.lower(): float(value) for name, value in step} for step in steps]


def dense(image_features, text_features, logit_scale):
    """CLIP's loss of this rank's pairs, without those of other ranks."""
    return dense_clip(image_features, text_features, logit_scale)


class Halves(nn.Module):
    """The dense loss in two terms. A buffer has the weight of each."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, **outputs):
        half = self.weight * dense(**outputs)
        return {"one_loss": half, "another_loss": half}


HALVES = ("--loss", f"{__name__}:Halves", "--loss-arguments", '{"weight": 0.5}')
DENSE = ("--loss", f"{__name__}:dense")
RING = ("--dist-impl", "ring")
INMODAL = ("--lambda-inmodal", "2", "--lambda-crossmodal", "0")
RECOMMENDED, STRONG, PAPER = [("--penalties", name) for name in ("recommended", "strong", "paper")]


@pytest.fixture(scope="module")
def own_ranks():
    """Their own, because OpenCLIP changes how a process logs."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("flags", "parameters", "terms"),
    [
        (
            ("--same-captions", "positives", *STRONG, "--lambda-warmup", "0.5", *RING),
            ("same_captions: positives", "penalties: strong", "reference_batch_size: 128"),
            TERMS,
        ),
        (
            HALVES,
            (f"loss: {__name__}:Halves", "loss_arguments: {'weight': 0.5}", "penalties: none"),
            ("one_loss", "another_loss", *TERMS[1:]),
        ),
        ((*DENSE, *INMODAL), (f"loss: {__name__}:dense", "lambda_inmodal: 2.0"), TERMS),
    ],
)
def test_open_clip_trains_two_ranks_with_the_loss_and_logs_its_terms(
    flags, parameters, terms, own_ranks, tmp_path
):
    """The recipes' command line, but with a tiny model and the emoji. The terms sum to the loss."""
    (command,) = blocks("OpenCLIP's command line", "sh")
    _, _, module, *from_page = shlex.split(command.replace("\\\n", ""))
    assert module == open_clip_train.__name__
    small_run = f"""
        {tiny_run(tmp_path)} --name run --dataset-type webdataset --batch-size 32 --epochs 1
        --train-data {EMOJI_FOLDER}/{{noto,twemoji}}.tar.xz --train-num-samples 128
    """
    own_ranks.run(2, train_on_rank, [*from_page, *small_run.split(), *flags])
    steps = logged(tmp_path / "run")
    assert len(steps) == 2
    for found in steps:
        loss = found.pop("loss")
        assert tuple(found) == terms
        assert sum(found.values()) == pytest.approx(loss, rel=1e-3)
        assert (found["inmodal_cyclic_loss"] > 0) == (flags != HALVES)
    written = {*(tmp_path / "run" / "params.txt").read_text().splitlines()}
    assert {*parameters} <= written
    # params.txt has the values that the preset sets.
    assert {*open_clip_train.PENALTIES} <= {line.partition(":")[0] for line in written}
    assert (tmp_path / "run" / "checkpoints" / "epoch_1.pt").exists()


def tiny_run(folder):
    """The flags of all runs here. They are on the CPU: no rank has a GPU of its own."""
    model = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "tiny.json").write_text(json.dumps(model))
    return f"""
        --model tiny --model-config {folder}/tiny.json --device cpu --workers 0 --warmup 1
        --log-every-n-steps 1 --logs {folder}
    """


@pytest.mark.parametrize(
    ("world_size", "flags"), [(1, ()), (1, ("--siglip",)), (2, ("--gather-with-grad",))]
)
def test_without_our_flags_every_step_has_the_loss_of_open_clip(
    world_size, flags, own_ranks, tmp_path
):
    """On the same seed, by the log: so the gradients are the same, too.

    In float32, because under autocast OpenCLIP rounds the logits to bfloat16.
    """
    rows = ["filepath\ttitle\n"]
    for number, (picture, caption, _) in enumerate(captions()):
        to_pil_image(picture).save(tmp_path / f"{number}.png")
        rows.append(f"{tmp_path}/{number}.png\t{caption}\n")
    (tmp_path / "pairs.csv").write_text("".join(rows))
    steps = {}
    for name, train in (("theirs", without_launcher), ("ours", open_clip_train.main)):
        small_run = f"""
            {tiny_run(tmp_path)} --name {name} --dataset-type csv --train-data {tmp_path}/pairs.csv
            --batch-size {32 // world_size} --epochs 6 --lr 1e-2 --precision fp32
        """
        own_ranks.run(world_size, train_on_rank, [*small_run.split(), *flags], train)
        steps[name] = logged(tmp_path / name)
    assert len(steps["theirs"]) == 6
    assert steps["theirs"][-1]["loss"] < 0.9 * steps["theirs"][0]["loss"]
    for theirs, ours in zip(*steps.values(), strict=True):
        # The log has five digits.
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)


class Model(nn.Module):
    """A model of six pairs, in which each text occurs twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6))

    def forward(self, image, text=None):
        features = nn.functional.normalize((self.weight + image).cos(), dim=1)
        return {"image_features": features, "text_features": features.flip(0), "logit_scale": 10.0}


IMAGES, TEXTS = torch.arange(6.0), torch.arange(6)[:, None] % 3


# OpenCLIP's schedules, and their arguments after the optimizer: rate, warm-up, total steps ...
SCHEDULES = {
    "cosine_lr": (0.1, 2, 10),
    "const_lr": (0.1, 2, 10),
    "const_lr_cooldown": (0.1, 2, 10, 5, 1.0, 0.0),
}


class Trainer(ModuleType):
    """A stand-in for OpenCLIP's trainer, with epochs of five steps of three batches.

    theirs: its loss. version: how it creates the loss, as these versions of OpenCLIP.
    settings: OpenCLIP's flags. calls: whether it calls the loss. epoch: the first epoch of two.
    schedule: its learning rate schedule.
    """

    def __init__(self, theirs, version="3", **settings):
        super().__init__("open_clip_train.main")
        flags = {"skip_scheduler": False, "calls": True}
        flags |= {"epoch": 1, "schedule": "cosine_lr", "device": "cpu", "pad_id": None} | settings
        parser = ArgumentParser()  # as OpenCLIP's, it takes abbreviations
        parser.add_argument("--siglip", action="store_true")
        self.parse_args = lambda argv: parser.parse_known_args(argv, Namespace(**flags))[0]
        self.create_model_and_transforms = lambda *args, **kwargs: (Model(), None, None)
        self.get_tokenizer = lambda *args, **kwargs: Namespace(pad_token_id=flags["pad_id"])
        self.version, self.device = version, torch.device("cpu")
        self.rates, self.lambdas, self.terms = [], [], []
        for name in SCHEDULES:
            setattr(self, name, getattr(open_clip_schedules, name))
        if version == "4":
            self.create_task = lambda args, model: Namespace(loss=theirs)
        else:
            self.create_loss = lambda args: theirs

    def make_loss(self):
        if self.version == "unknown":  # it creates its loss elsewhere
            return CyCLIPLoss()
        if self.version == "4":
            return self.create_task(None, model=None).loss
        return self.create_loss(None)

    def main(self, argv):
        self.argv, args = argv, self.parse_args(argv)
        model, *_ = self.create_model_and_transforms("tiny", device=self.device, output_dict=True)
        loss = self.loss = self.make_loss()
        self.get_tokenizer("tiny")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule, values = getattr(self, args.schedule), SCHEDULES[args.schedule]
        if self.version == "4":  # a later version may name the arguments
            names = inspect.signature(getattr(open_clip_schedules, args.schedule)).parameters
            set_rate = schedule(**dict(zip(names, (optimizer, *values), strict=False)))
        else:
            set_rate = schedule(optimizer, *values)
        for step in range(5 * args.epoch, 10):
            for _ in range(3):
                self.rates.append(set_rate(step))
                inputs = {"image": IMAGES, "text": TEXTS}
                out = model(**inputs) if self.version == "4" else model(*inputs.values())
                if args.calls:
                    self.terms.append(loss(**out, output_dict=True))
                    self.lambdas.append((loss.lambda_inmodal, loss.lambda_crossmodal))
            optimizer.step()


def launch(trainer, monkeypatch, *argv):
    monkeypatch.setitem(sys.modules, "open_clip_train.main", trainer)
    open_clip_train.main(argv)
    return trainer


class Other(ClipLoss):
    """A subclass, which CyCLIPLoss must not replace."""


ONE = ("--lambda-inmodal", "1")
OF_128 = {"reference_batch_size": 128, "centered": True}
SHIFT = ("--loss-dist-impl", "shift")  # OpenCLIP's flag


@pytest.mark.parametrize("version", ["3", "4"])
@pytest.mark.parametrize(
    ("theirs", "given", "ours"),
    [
        (ClipLoss(), (), cyclip_loss.ClipLoss()),
        # torchrun allows a "--" before the script's flags.
        (ClipLoss(), ("--", "--penalties", "none", *RING), cyclip_loss.ClipLoss(dist_impl="ring")),
        (ClipLoss(), RECOMMENDED, CyCLIPLoss(**PRESETS["recommended"])),
        (ClipLoss(), (*STRONG, "--lambda-crossmodal", "0"), CyCLIPLoss(0.25, 0.0, **OF_128)),
        (ClipLoss(), PAPER, CyCLIPLoss()),
        (ClipLoss(), (*RING, *ONE), CyCLIPLoss(1.0, 0.0, dist_impl="ring")),
        (SigLipLoss(), (*SHIFT, "--sigl"), cyclip_loss.SigLipLoss(dist_impl="ring")),
        (SigLipLoss(), ("--siglip", *ONE, "--centered"), CySigLIPLoss(1.0, centered=True)),
        (Other(), (), Other()),
        (CoCaLoss(2.0, 1.0), STRONG, WithCyclicPenalty(CoCaLoss(2.0, 1.0), **OF_128)),
        (
            DistillClipLoss(),
            (*STRONG, "--reference-batch-size", "0"),
            WithCyclicPenalty(DistillClipLoss(), centered=True),
        ),
    ],
)
def test_a_loss_is_replaced_or_gets_the_penalties(version, theirs, given, ours, monkeypatch):
    trainer = Trainer(theirs, version, epoch=2)
    for _ in range(2):  # a process may train twice
        loss = launch(trainer, monkeypatch, *given, "--epochs", "3").loss
        assert repr(loss) == repr(ours)
        assert getattr(loss, "loss", theirs) is theirs
        assert (loss is theirs) == (type(loss) is type(theirs))
    # OpenCLIP gets its own flags only.
    assert trainer.argv == [x for x in given if x.startswith("--sig")] + ["--epochs", "3"]


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--penalties recommended --lambda-warmup 512", {"lambda_warmup": 512}),
        ("--penalties recommended --no-lambda-progress --no-centered", {"centered": False}),
        ("--penalties strong --lambda-progress", {"lambda_progress": True, "lambda_warmup": 0}),
        ("--penalties strong --lambda-warmup 0 --lambda-inmodal 1", {"lambda_inmodal": 1.0}),
    ],
)
def test_a_single_flag_changes_a_preset(flags, changes):
    _, preset, *_ = flags.split()
    growth = {"lambda_progress": False, "lambda_warmup": 0}
    expected = open_clip_train.PENALTIES | PRESETS[preset] | growth | changes
    ours, _ = open_clip_train.parse(flags.split())
    assert {name: getattr(ours, name) for name in expected} == expected


@pytest.mark.parametrize("version", ["3", "4"])
@pytest.mark.parametrize(("given", "inmodal"), [(DENSE, 0), ((*HALVES, *INMODAL), 2)])
def test_the_chosen_loss_is_trained_with_the_penalties_that_are_asked_for(
    given, inmodal, version, monkeypatch
):
    trainer = launch(Trainer(SigLipLoss(), version), monkeypatch, *given)
    terms = dict(trainer.terms[0])
    expected = CyCLIPLoss(inmodal, 0)(**Model()(IMAGES), output_dict=True)
    penalties = {name: terms.pop(name) for name in TERMS[1:]}
    torch.testing.assert_close(sum(terms.values()), expected.pop("contrastive_loss"))
    torch.testing.assert_close(penalties, expected)


def total(image_features, text_features, logit_scale):
    return {"total": image_features.sum()}


def two_terms(image_features, text_features, logit_scale):
    return image_features.sum(), text_features.sum()


CAPTIONS = "--same-captions"


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"calls": False}, (), "did not call this loss"),
        ({"version": "unknown"}, STRONG, "did not call this loss"),
        ({"theirs": nn.CrossEntropyLoss()}, PAPER, "Loss.forward takes ['input', 'target']"),
        ({"skip_scheduler": True}, STRONG, "--skip-scheduler"),
        ({"theirs": CoCaLoss(2.0, 1.0)}, RECOMMENDED, "--lambda-progress, which"),
        ({"theirs": SigLipLoss()}, ("--sigl", *STRONG), "with --siglip, give lambdas"),
        ({"theirs": DistillClipLoss()}, RING, "--dist-impl need CLIP's or SigLIP's loss"),
        ({}, ("--loss", "test_open_clip_train:total"), "returned: {'total': tensor("),
        (
            {},
            ("--loss", "test_open_clip_train:two_terms"),
            "{'contrastive_loss': (tensor",
        ),
        ({}, ("--loss", "test_open_clip_train:Model"), "has parameters"),
        ({}, (*DENSE, *RING), "--dist-impl need CLIP's or SigLIP's loss"),
    ],
)
def test_unsupported_runs_stop_with_one_line(settings, given, message, monkeypatch):
    trainer = Trainer(**{"theirs": ClipLoss(), **settings})
    with pytest.raises(SystemExit) as stopped:
        launch(trainer, monkeypatch, *given)
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert len(trainer.rates) <= 3  # the batches of one step
    torch.optim.SGD([nn.Parameter(IMAGES)], lr=0.1).step()  # the hook does not outlive the run


@pytest.mark.parametrize(
    ("flag", "wrong", "message"),
    [
        (
            "--loss",
            "math:nothing",
            "--loss: must be MODULE:NAME, not math:nothing: module 'math' has",
        ),
        ("--loss", "no.such:loss", "--loss: must be MODULE:NAME, not no.such:loss: No module"),
        ("--loss-arguments", "{1", "--loss-arguments: invalid"),
        ("--lambda-inmodal", "-1", "lambda_inmodal must be finite and >= 0"),
        (CAPTIONS, "same", f"argument {CAPTIONS}: invalid choice: 'same'"),
        ("--lambda-warmup", "half", "--lambda-warmup: invalid"),
        ("--reference-batch-size", "128", "['reference_batch_size'] need --penalties, --lambda-in"),
    ],
)
def test_bad_flags_are_refused(flag, wrong, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        open_clip_train.main([flag, *wrong.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("theirs", "version"), [(ClipLoss, "3"), (Other, "4")])
@pytest.mark.parametrize(
    ("schedule", "warmup", "length", "epoch"),
    [
        ("cosine_lr", "4", 4, 0),
        ("const_lr", "8", 8, 1),
        ("const_lr_cooldown", "0.8", 8, 1),
        ("cosine_lr", "1.0", 10, 0),
    ],
)
def test_the_lambdas_warm_up_with_each_learning_rate_schedule(
    theirs, version, schedule, warmup, length, epoch, monkeypatch
):
    """The warm-up is a number of steps or a fraction of all ten steps. Some runs are resumed."""
    argv = (*PAPER, "--lambda-warmup", warmup, "--lambda-crossmodal", "1")
    trainer = Trainer(theirs(), version, epoch=epoch, schedule=schedule)
    launch(trainer, monkeypatch, *argv)
    steps = [step for step in range(5 * epoch, 10) for _ in range(3)]
    shares = [min(1.0, (step + 1) / length) for step in steps]
    assert trainer.lambdas == [(0.25 * share, share) for share in shares]
    assert trainer.rates[0] == pytest.approx(0.1 if epoch else 0.05)  # OpenCLIP's own warm-up


@pytest.mark.parametrize(("version", "pad_id"), [("3", None), ("4", 1)])
@pytest.mark.parametrize("same", ["ignored", "positives"])
@pytest.mark.parametrize(
    ("theirs", "ours", "flags"),
    [(ClipLoss, CyCLIPLoss, PAPER), (SigLipLoss, cyclip_loss.SigLipLoss, ["--sig"])],
)
def test_the_loss_gets_ids_of_the_captions(theirs, ours, flags, same, version, pad_id, monkeypatch):
    """OpenCLIP itself passes no captions. Its version 4 pads each rank's to the rank's longest."""
    spy = Mock(wraps=caption_ids)
    monkeypatch.setattr(open_clip_train, "caption_ids", spy)
    trainer = Trainer(theirs(), version, pad_id=pad_id)
    launch(trainer, monkeypatch, CAPTIONS, same, *flags)
    expected = ours(same_ids=same)(**Model()(IMAGES), output_dict=True, ids=caption_ids(TEXTS))
    torch.testing.assert_close(trainer.terms[0], expected, rtol=0, atol=0)
    assert {call.args[1] for call in spy.call_args_list} == {pad_id or 0}


def test_the_command_fails_if_the_trainer_fails(monkeypatch):
    trainer = Trainer(ClipLoss())
    trainer.main = lambda argv: -1
    with pytest.raises(SystemExit, match=r"^1$"):
        launch(trainer, monkeypatch)

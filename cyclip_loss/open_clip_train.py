"""OpenCLIP's trainer with this loss: `python -m cyclip_loss.open_clip_train`.

Takes all of `open_clip_train`'s flags and a few of its own, and trains with whichever version of
OpenCLIP is installed. Without a flag of its own it trains with OpenCLIP's loss: CLIP's and SigLIP's
are computed in less memory by `ClipLoss` and `SigLipLoss`, and other models keep their own.
`--penalties` or a lambda adds the cyclic penalties, and `--loss` names any other loss. OpenCLIP's
versions create their loss in different places. A rank stops after its first optimizer step if the
loss was not called.

A new flag is added in `parse`, and used in `_Swap`. If it sets the penalties, it belongs to
`PENALTIES`, too. If a resumed pretraining may have another value,
`reference_train/pretrain/resume.py` lists it.
"""

import argparse
import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cyclip_loss.inputs import caption_ids
from cyclip_loss.loss import ClipLoss, CyCLIPLoss, UnsuitableLoss, WithCyclicPenalty
from cyclip_loss.options import (
    DIST_IMPLS,
    PRESETS,
    SAME_IDS,
    SIGLIP_DIST_IMPLS,
    PenaltyOptions,
    as_keywords,
)
from cyclip_loss.siglip import CySigLIPLoss, SigLipLoss

Function = Callable[..., Any]
# What the trainer's main module calls: its own functions, replaced by methods of `_Swap`, and the
# learning rate schedules, replaced by `_Swap.schedule`.
REPLACED = (
    "parse_args",
    "create_model_and_transforms",
    "get_tokenizer",
    "create_loss",
    "create_task",
    "cosine_lr",
    "const_lr",
    "const_lr_cooldown",
)
# What the flags of penalties set, and its values in the paper's formula.
LAMBDAS = ("lambda_inmodal", "lambda_crossmodal")
PENALTIES = {
    name: getattr(CyCLIPLoss, name)
    for name in (*LAMBDAS, "reference_batch_size", "centered", "lambda_progress")
} | {"lambda_warmup": 0}
# OpenCLIP's losses -> what takes their place without penalties, and with them.
OURS: dict[str, tuple[Any, Any]] = {
    "ClipLoss": (ClipLoss, CyCLIPLoss),
    "SigLipLoss": (SigLipLoss, CySigLIPLoss),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train with these arguments, by default this process's. Usage errors raise SystemExit."""
    argv = sys.argv[1:] if argv is None else argv
    # torchrun allows a "--" before the script's flags; some versions of Python pass it on.
    ours, theirs = parse([flag for flag in argv if flag != "--"])
    trainer = import_module("open_clip_train.main")
    swap = _Swap(ours)
    replaced: dict[str, Any] = {
        name: partial(getattr(swap, name, swap.schedule), getattr(trainer, name))
        for name in REPLACED
        if hasattr(trainer, name)
    }
    with patch.multiple(trainer, **replaced), register_optimizer_step_post_hook(swap.check):
        try:
            if trainer.main(theirs):  # -1 after an error, which it has logged
                raise SystemExit(1)
        except UnsuitableLoss as error:
            raise SystemExit(f"cyclip_loss: {error}") from error


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The values of this launcher's flags, checked, and the rest of the command line."""
    parser = argparse.ArgumentParser(
        prog="cyclip_loss.open_clip_train",
        usage="python -m cyclip_loss.open_clip_train [flags below] [open_clip_train's flags]",
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--loss",
        type=loss_path,
        metavar="MODULE:NAME",
        help="train with this class or function: it takes image_features, text_features, "
        "logit_scale and what else the model returns, and returns a number, or a dict of terms "
        "whose keys end in _loss",
    )
    add(
        "--loss-arguments",
        type=json.loads,
        default={},
        metavar="JSON",
        help="keyword arguments of --loss, such as '{\"margin\": 0.1}'",
    )
    add(
        "--dist-impl",
        "--loss-dist-impl",  # OpenCLIP's
        type=lambda name: SIGLIP_DIST_IMPLS.get(name, name),
        choices=DIST_IMPLS,
        default="gather",
        help="across ranks (CLIP and SigLIP); bidir and shift are taken as ring, reduce as gather",
    )
    add(
        "--same-captions",
        choices=SAME_IDS,
        help="what pairs with one caption are, instead of negatives (CLIP and SigLIP)",
    )
    add(
        "--model-config",
        type=model_config,
        metavar="FILE.json",
        help="a model configuration of OpenCLIP's, FILE.json, for --model FILE",
    )
    paper = {"paper": PENALTIES}
    # Unset flags are missing, so that a preset can have another value.
    penalties = parser.add_argument_group("penalties", argument_default=argparse.SUPPRESS)
    add = penalties.add_argument
    add(
        "--penalties",
        choices=PRESETS,
        help="sets the flags below, which then change single values; default: none. "
        + "; ".join(f"{name}: {as_keywords(x)}" for name, x in (PRESETS | paper).items())
        + ". If a lambda is given without --penalties, the other one is 0. Values that are not "
        "named are the paper's",
    )
    for penalty in ("inmodal", "crossmodal"):
        add(
            f"--lambda-{penalty}",
            type=float,
            metavar="X",
            help=f"weight of the {penalty} penalty",
        )
    add(
        "--lambda-warmup",
        type=lambda text: float(text) if "." in text else int(text),
        metavar="STEPS",
        help="raise both weights from 0 over this many steps (0.5: over half of all steps), "
        "instead of --lambda-progress",
    )
    add(
        "--lambda-progress",
        action=argparse.BooleanOptionalAction,
        help="multiply the penalties by the progress of CLIP's loss (not of other losses), instead "
        "of --lambda-warmup",
    )
    add(
        "--reference-batch-size",
        type=int,
        metavar="N",
        help="multiply the penalties by this / global batch size; 128: as strong as the paper's; "
        "0: the paper's formula",
    )
    add(
        "--centered",
        action=argparse.BooleanOptionalAction,
        help="compute the penalties on features less each tower's mean over the global batch",
    )
    ours, theirs = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(theirs):
        parser.print_help()
        print("\nopen_clip_train's flags:\n", flush=True)
    try:
        set_penalties(ours)
    except ValueError as error:
        parser.error(str(error))
    return ours, theirs


def set_penalties(ours: argparse.Namespace) -> None:
    """Set all of `PENALTIES`: the paper's values, changed by the preset, changed by the flags.

    Raises ValueError if a value is bad, or if a flag needs another one.
    """
    given = {name: value for name, value in vars(ours).items() if name in PENALTIES}
    preset = getattr(ours, "penalties", None)
    if given and not preset and not given.keys() & {*LAMBDAS}:
        raise ValueError(f"{[*given]} need --penalties, --lambda-inmodal or --lambda-crossmodal")
    values = PENALTIES | PRESETS[preset or "none"] | given
    if given.get("lambda_warmup") or given.get("lambda_progress"):
        # It takes the place of the preset's.
        values |= {"lambda_warmup": 0, "lambda_progress": False} | given
    values["reference_batch_size"] = values["reference_batch_size"] or None
    vars(ours).update(values, penalties=preset or ("custom" if given else "none"))
    PenaltyOptions(**penalty_options(ours))


def penalty_options(ours: argparse.Namespace) -> dict[str, Any]:
    """The options of all losses with penalties, from the launcher's flags."""
    names = (*LAMBDAS, "reference_batch_size", "centered")
    return {name: getattr(ours, name) for name in names}


def loss_path(text: str) -> str:
    """An argument's type: MODULE:NAME of what can be imported."""
    try:
        resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be MODULE:NAME, not {text}: {error}") from error
    return text


def model_config(file: str) -> str:
    """An argument's type: a model configuration, which OpenCLIP then knows by the file's stem."""
    import_module("open_clip").add_model_config(file)
    return file


class ChosenLoss(nn.Module):
    """The loss of `--loss`, with the arguments and the result of OpenCLIP's losses.

    path: MODULE:NAME of a class or a function. arguments: its keyword arguments, which a function
    gets in each call. Raises UnsuitableLoss if it has parameters.
    """

    def __init__(self, path: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        chosen = resolve_name(path)
        is_class = isinstance(chosen, type)
        self.loss = chosen(**arguments) if is_class else partial(chosen, **arguments)
        if list(self.parameters()):
            raise UnsuitableLoss("--loss has parameters, which OpenCLIP would not train")

    def forward(
        self, image_features: Any, text_features: Any, output_dict: bool = False, **others: Any
    ) -> Any:
        """The terms of the loss. others: what else the model returns."""
        loss = self.loss(image_features=image_features, text_features=text_features, **others)
        return loss if isinstance(loss, dict) else {"contrastive_loss": loss}


class _Swap:
    """Replaces the loss in a trainer; methods replace the trainer's functions of the same name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.penalty_options = penalty_options(options)
        self.has_penalties = any(self.penalty_options[name] for name in LAMBDAS)
        self.args: Any = None  # OpenCLIP's, which adds the number of ranks
        self.loss: Any = None
        self.texts: Any = None  # the captions that the model saw last
        self.pad_id = 0  # with which they are padded
        self.called = False

    def parse_args(self, parse: Function, *args: Any) -> Any:
        """OpenCLIP's parsed flags with ours added, so that params.txt lists all of them."""
        parsed = parse(*args)
        if parsed.skip_scheduler and self.options.lambda_warmup:
            raise SystemExit("cyclip_loss: --skip-scheduler excludes a warm-up of the lambdas")
        preset = self.options.penalties
        if parsed.siglip and preset in PRESETS and self.has_penalties:
            raise SystemExit(
                f"cyclip_loss: --penalties {preset} is of CLIP's loss: with --siglip, give lambdas"
            )
        self.args = argparse.Namespace(**vars(parsed) | vars(self.options))
        return self.args

    def create_model_and_transforms(self, make: Function, *args: Any, **kw: Any) -> Any:
        """OpenCLIP's model, with a hook that keeps the captions for the loss."""
        made = make(*args, **kw)

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.texts = kwargs.get("text", args[1] if len(args) > 1 else None)

        if self.options.same_captions:
            made[0].register_forward_pre_hook(keep, with_kwargs=True)
        return made

    def get_tokenizer(self, make: Function, *args: Any, **kwargs: Any) -> Any:
        """OpenCLIP's tokenizer. OpenCLIP 4 pads texts of variable length with its `pad_token_id`.

        Without one, texts have a fixed length.
        """
        tokenizer = make(*args, **kwargs)
        self.pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        return tokenizer

    def create_task(self, make: Function, *args: Any, **kwargs: Any) -> Any:
        """OpenCLIP 4.x's task with its loss replaced. (Other versions create the loss directly.)"""
        task = make(*args, **kwargs)
        if hasattr(task, "loss"):  # not in an evaluation
            task.loss = self.create_loss(lambda: task.loss)
        return task

    def create_loss(self, make: Function, *args: Any, **kwargs: Any) -> Any:
        """The loss to use instead of OpenCLIP's."""
        theirs = make(*args, **kwargs)
        if self.options.loss:
            theirs = ChosenLoss(self.options.loss, self.options.loss_arguments)
            theirs.to(self.args.device)
        # The exact type, as CoCa's and distillation's losses are subclasses.
        name = type(theirs).__name__
        if self.options.lambda_progress and name != "ClipLoss":
            raise SystemExit(
                "cyclip_loss: --lambda-progress, which --penalties recommended has, needs CLIP's "
                "loss: take --no-lambda-progress or a warm-up"
            )
        if name in OURS:
            ours, options = OURS[name][self.has_penalties], {"dist_impl": self.options.dist_impl}
            self.loss = ours(**options, **(self.penalty_options if self.has_penalties else {}))
            if self.options.lambda_progress:
                self.loss.lambda_progress = True
            if self.options.same_captions:
                self.loss.same_ids = self.options.same_captions
                self.loss.register_forward_pre_hook(self.add_ids, with_kwargs=True)
        elif self.options.same_captions or self.options.dist_impl == "ring":
            raise SystemExit(
                "cyclip_loss: --same-captions and --dist-impl need CLIP's or SigLIP's loss"
            )
        elif self.has_penalties or self.options.loss:  # whose result WithCyclicPenalty checks
            self.loss = WithCyclicPenalty(theirs, **self.penalty_options)
        else:
            self.loss = theirs
        self.loss.register_forward_hook(lambda *_: setattr(self, "called", True))
        logging.info("Loss: %s", self.loss)
        return self.loss

    def add_ids(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """The loss's arguments, plus the ids of the batch that the model saw last."""
        return args, {**kwargs, "ids": caption_ids(self.texts, self.pad_id)}

    def schedule(self, make: Function, *args: Any, **kwargs: Any) -> Callable[[int], Any]:
        """OpenCLIP's schedule, which also sets the lambdas.

        OpenCLIP calls it before each step with the step's number, which a resumed run continues.
        """
        set_rate, length = make(*args, **kwargs), self.options.lambda_warmup
        if isinstance(length, float):
            length *= inspect.signature(make).bind(*args, **kwargs).arguments["steps"]

        def set_rate_and_lambdas(step: int) -> Any:
            share = min(1.0, (step + 1) / length)
            for name in LAMBDAS if self.loss else ():  # without a loss, `check` stops the run
                setattr(self.loss, name, share * self.penalty_options[name])
            return set_rate(step)

        return set_rate_and_lambdas if length and self.has_penalties else set_rate

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(self, *_: Any) -> None:
        """After an optimizer step: stop if the loss was not called."""
        if not self.called:
            raise SystemExit(
                "cyclip_loss: stopped after an optimizer step: this version of OpenCLIP did not "
                "call this loss"
            )


if __name__ == "__main__":
    main()

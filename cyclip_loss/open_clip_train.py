"""OpenCLIP's trainer with the CyCLIP loss: `python -m cyclip_loss.open_clip_train`.

Takes all of `open_clip_train`'s flags and a few of its own, and trains with whichever version of
OpenCLIP is installed. CLIP trains with `CyCLIPLoss`, SigLIP with `CySigLIPLoss`, and other models
with their own loss plus the penalties. `--loss` names any other loss. OpenCLIP's versions create
their loss in different places. A rank stops after its first optimizer step if our loss was not
called: it would train without the penalties.

A new flag is added in `parse` or, for the penalties, in `penalty_options`, and used in `_Swap`. If
a resumed pretraining may have another value, `reference_train/pretrain/resume.py` lists it.
"""

import argparse
import inspect
import json
import logging
import re
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

from cyclip_loss import engines
from cyclip_loss.inputs import caption_ids
from cyclip_loss.loss import CyCLIPLoss, UnsuitableLoss, WithCyclicPenalty
from cyclip_loss.options import DIST_IMPLS, IMPLS, SAME_IDS, SIGLIP_DIST_IMPLS, PenaltyOptions
from cyclip_loss.siglip import CySigLIPLoss
from cyclip_loss.usage_warnings import ADVISED_BATCH_SIZE, LARGEST_CONSTANT, PAPER_LAMBDA

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


def main(argv: Sequence[str] | None = None) -> None:
    """Train with these arguments, by default this process's. Usage errors raise SystemExit."""
    argv = sys.argv[1:] if argv is None else argv
    # torchrun allows a "--" before the script's flags; some versions of Python pass it on.
    ours, theirs = parse([flag for flag in argv if flag != "--"])
    try:
        trainer = import_module("open_clip_train.main")
    except ImportError as why:
        raise SystemExit(f"cyclip_loss: {why}: pip install open_clip_torch[training]") from why
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
    for penalty in ("inmodal", "crossmodal"):
        add(
            f"--lambda-{penalty}",
            type=float,
            default=argparse.SUPPRESS,  # `_Swap.parse_args` sets it: OpenCLIP parses --siglip
            metavar="X",
            help=f"weight of the {penalty} penalty "
            f"(default: {PAPER_LAMBDA}; with --siglip or --loss: 0)",
        )
    add(
        "--lambda-warmup",
        type=steps_or_share,
        default=0,
        metavar="STEPS",
        help="raise both weights from 0 over this many steps (0.5: over half of all steps), "
        "instead of --lambda-progress",
    )
    add(
        "--lambda-progress",
        action=argparse.BooleanOptionalAction,
        default="unless --lambda-warmup",  # for --help; a bool takes its place below
        help="multiply the penalties by the progress of CLIP's loss (not of other losses)",
    )
    add(
        "--reference-batch-size",
        type=int,
        default=ADVISED_BATCH_SIZE,
        metavar="N",
        help="multiply the penalties by this / global batch size; 128: as strong as the paper's; "
        "0: the paper's formula",
    )
    add(
        "--centered",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute the penalties on features less each tower's mean over the global batch",
    )
    add("--impl", choices=IMPLS, default="auto", help="Triton kernels or PyTorch")
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
    ours, theirs = parser.parse_known_args(argv)
    if ours.lambda_progress is True and (ours.lambda_warmup or ours.loss or "--siglip" in theirs):
        parser.error("--lambda-progress excludes --lambda-warmup, --loss and --siglip")
    ours.lambda_progress = ours.lambda_progress and not ours.lambda_warmup
    if {"-h", "--help"} & set(theirs):
        parser.print_help()
        print("\nopen_clip_train's flags:\n", flush=True)
    try:
        PenaltyOptions(**penalty_options(ours))
    except ValueError as error:
        parser.error(str(error))
    return ours, theirs


def penalty_options(ours: argparse.Namespace, weight: float = PAPER_LAMBDA) -> dict[str, Any]:
    """The options of the penalties, from the launcher's flags. weight: of those not given."""
    return {
        "lambda_inmodal": getattr(ours, "lambda_inmodal", weight),
        "lambda_crossmodal": getattr(ours, "lambda_crossmodal", weight),
        "reference_batch_size": ours.reference_batch_size or None,
        "centered": ours.centered,
        "impl": ours.impl,
    }


def steps_or_share(text: str) -> int | float:
    """An argument's type: a number of steps or, with a decimal point, a fraction of all steps."""
    if not re.fullmatch(r"\d+|0?\.\d+|1\.0*", text):
        raise argparse.ArgumentTypeError(
            f"must be a number of steps >= 0, or a fraction of all steps up to 1.0, not {text}"
        )
    return float(text) if "." in text else int(text)


def loss_path(text: str) -> str:
    """An argument's type: MODULE:NAME of something callable, which can be imported."""
    try:
        partial(resolve_name(text))  # TypeError: not callable
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"must be MODULE:NAME, not {text}: {error}") from error
    return text


def model_config(file: str) -> str:
    """An argument's type: a model configuration, which OpenCLIP then knows by the file's stem."""
    import_module("open_clip").add_model_config(file)
    return file


class ChosenLoss(nn.Module):
    """The loss of `--loss`, with the arguments and the result of OpenCLIP's losses.

    path: MODULE:NAME of a class or a function. arguments: its keyword arguments, which a function
    gets in each call. Raises UnsuitableLoss, also when it is called.
    """

    def __init__(self, path: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        chosen = resolve_name(path)
        is_class = isinstance(chosen, type)
        try:
            self.loss = chosen(**arguments) if is_class else partial(chosen, **arguments)
        except TypeError as error:
            raise UnsuitableLoss(f"--loss-arguments: {error}") from error
        if list(self.parameters()):
            raise UnsuitableLoss("--loss has parameters, which OpenCLIP would not train")

    def forward(
        self, image_features: Any, text_features: Any, output_dict: bool = False, **others: Any
    ) -> Any:
        """The terms of the loss. others: what else the model returns."""
        others |= {"image_features": image_features, "text_features": text_features}
        try:
            # A module's __call__ takes anything.
            inspect.signature(getattr(self.loss, "forward", self.loss)).bind(**others)
        except (TypeError, ValueError) as error:  # ValueError: a function lacks an argument
            raise UnsuitableLoss(f"--loss is called with {list(others)}: {error}") from error
        loss = self.loss(**others)
        if isinstance(loss, tuple):
            raise UnsuitableLoss("--loss returned a tuple: return a number, or a dict of terms")
        return loss if isinstance(loss, dict) else {"contrastive_loss": loss}


class _Swap:
    """Replaces the loss in a trainer; methods replace the trainer's functions of the same name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.penalty_options: dict[str, Any] = {}
        self.args: Any = None  # OpenCLIP's, which adds the number of ranks
        self.loss: Any = None
        self.texts: Any = None  # the captions that the model saw last
        self.pad_id = 0  # with which they are padded
        self.called = False

    def parse_args(self, parse: Function, *args: Any) -> Any:
        """OpenCLIP's parsed flags with ours added, so that params.txt lists all of them."""
        parsed = parse(*args)
        captions, warmup = self.options.same_captions, self.options.lambda_warmup
        problems = {
            "--horovod is not supported: use torchrun": getattr(parsed, "horovod", False),
            "--same-captions excludes --accum-freq above 1 and --torchscript": captions
            and (parsed.accum_freq > 1 or getattr(parsed, "torchscript", False)),
            "--lambda-warmup excludes --skip-scheduler": warmup and parsed.skip_scheduler,
            "--loss-arguments needs --loss": self.options.loss_arguments and not self.options.loss,
        }
        for problem, found in problems.items():
            if found:
                raise SystemExit(f"cyclip_loss: {problem}")
        weight = 0.0 if parsed.siglip or self.options.loss else PAPER_LAMBDA
        self.penalty_options = penalty_options(self.options, weight)
        merged = vars(parsed) | self.penalty_options | vars(self.options)
        self.args = argparse.Namespace(**merged)
        return self.args

    def create_model_and_transforms(self, make: Function, *args: Any, **kw: Any) -> Any:
        """OpenCLIP's model, with a hook that keeps the captions for the loss."""
        if self.options.impl == "triton":
            try:
                engines.choose("triton", torch.empty(1, 1, device=kw["device"]))
            except (ImportError, ValueError) as error:  # ImportError: Triton is broken
                raise SystemExit(f"cyclip_loss: --impl triton: {error}") from error
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
        ours: Any = {"ClipLoss": CyCLIPLoss, "SigLipLoss": CySigLIPLoss}.get(type(theirs).__name__)
        if ours:
            self.loss = ours(**self.penalty_options, dist_impl=self.options.dist_impl)
            if ours is CyCLIPLoss:
                self.loss.lambda_progress = self.options.lambda_progress
            if self.options.same_captions:
                self.loss.same_ids = self.options.same_captions
                self.loss.register_forward_pre_hook(self.add_ids, with_kwargs=True)
        elif self.options.same_captions or self.options.dist_impl == "ring":
            raise SystemExit(
                "cyclip_loss: --same-captions and --dist-impl need CLIP's or SigLIP's loss"
            )
        else:
            self.loss = WithCyclicPenalty(theirs, **self.penalty_options)
        self.loss.register_forward_hook(lambda *_: setattr(self, "called", True))
        logging.info("Loss: %s", self.loss)
        # The pairs of one call.
        total = self.args.batch_size * self.args.accum_freq * self.args.world_size
        grows = self.options.lambda_warmup or getattr(self.loss, "lambda_progress", False)
        is_constant = self.loss.has_penalties() and not grows
        if total > LARGEST_CONSTANT and is_constant and ours is not CySigLIPLoss:
            logging.warning(
                "The lambdas are constant in batches of %s pairs. Above %s, that lowered the "
                "accuracy in our experiments: take --lambda-progress or, with other losses than "
                "CLIP's, --lambda-warmup 512 (docs/choosing.md)",
                f"{total:,}",
                f"{LARGEST_CONSTANT:,}",
            )
        return self.loss

    def add_ids(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """The loss's arguments, plus the ids of the batch that the model saw last."""
        return args, {**kwargs, "ids": caption_ids(self.texts, self.pad_id)}

    def schedule(self, make: Function, *args: Any) -> Callable[[int], Any]:
        """OpenCLIP's schedule (optimizer, rate, warm-up, steps, ...), which also sets the lambdas.

        OpenCLIP calls it before each step with the step's number, which a resumed run continues.
        """
        set_rate, length = make(*args), self.options.lambda_warmup
        length *= args[3] if isinstance(length, float) else 1

        def set_rate_and_lambdas(step: int) -> Any:
            for name in ("lambda_inmodal", "lambda_crossmodal"):
                share = min(1.0, (step + 1) / length)
                setattr(self.loss, name, share * self.penalty_options[name])
            return set_rate(step)

        return set_rate_and_lambdas if length else set_rate

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(self, *_: Any) -> None:
        """After an optimizer step: stop if the loss was not called."""
        if not self.called:
            raise SystemExit(
                "cyclip_loss: stopped after an optimizer step: this version of OpenCLIP did not "
                "call the CyCLIP loss"
            )


if __name__ == "__main__":
    main()

"""OpenCLIP's trainer with the CyCLIP loss: `python -m cyclip_loss.open_clip_train`.

Takes all of `open_clip_train`'s flags and a few of its own, and trains with whichever version of
OpenCLIP is installed. CLIP trains with `CyCLIPLoss`, SigLIP with `CySigLIPLoss`, and other models
with their own loss plus the penalties. OpenCLIP's versions create their loss in different places. A
rank stops after its first optimizer step if our loss was not called: it would train without the
penalties.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, cuda, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cyclip_loss import engines
from cyclip_loss.inputs import caption_ids
from cyclip_loss.loss import CyCLIPLoss, CySigLIPLoss, WithCyclicPenalty
from cyclip_loss.options import DIST_IMPLS, IMPLS, SAME_IDS, PenaltyOptions
from cyclip_loss.usage_warnings import PAPER_BATCH_SIZE, PAPER_LAMBDA


def main(argv: Sequence[str] | None = None) -> None:
    """Train with these arguments, by default this process's. Usage errors raise SystemExit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # torchrun allows a "--" before the script's flags; some versions of Python pass it on.
    ours, theirs = parse(argv[1:] if argv[:1] == ["--"] else argv)
    swap = _Swap(ours)
    try:
        trainer = import_module("open_clip_train.main")
    except ImportError as why:
        try:  # the name in OpenCLIP 2.x and its forks
            trainer = import_module("training.main")
        except ImportError:
            raise SystemExit(f"cyclip_loss: {why}: pip install open_clip_torch[training]") from why
    swap.into(trainer)
    handle = register_optimizer_step_post_hook(swap.check)
    try:
        if trainer.main(theirs):  # -1 after an error, which it has logged
            raise SystemExit(1)
    finally:
        handle.remove()
        swap.undo()


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
    add("-h", "--help", action="store_true", default=argparse.SUPPRESS, help="show all flags")
    for penalty in ("inmodal", "crossmodal"):
        text = f"weight of the {penalty} penalty (default: {PAPER_LAMBDA}; 0 with --siglip)"
        add(
            f"--lambda-{penalty}",
            type=float,
            default=argparse.SUPPRESS,
            metavar="X",
            help=text,
        )
    text = "raise both weights from 0 over this many steps (0.5: over half of all steps)"
    add("--lambda-warmup", type=steps_or_share, default=0, metavar="STEPS", help=text)
    text = "multiply the penalties by this / global batch size; 0: the paper's formula"
    add("--reference-batch-size", type=int, default=PAPER_BATCH_SIZE, metavar="N", help=text)
    add("--impl", choices=IMPLS, default="auto", help="Triton kernels or PyTorch")
    add("--dist-impl", choices=DIST_IMPLS, default="gather", help="across ranks (CLIP and SigLIP)")
    text = "what pairs with one caption are, instead of negatives (CLIP and SigLIP)"
    add("--same-captions", choices=SAME_IDS, help=text)
    text = "a model configuration of OpenCLIP's, FILE.json, for --model FILE"
    add("--model-config", type=model_config, metavar="FILE.json", help=text)
    ours, theirs = parser.parse_known_args(argv)
    default = 0.0 if "--siglip" in theirs else PAPER_LAMBDA
    for name in ("lambda_inmodal", "lambda_crossmodal"):
        vars(ours).setdefault(name, default)
    if "help" in ours:
        print(parser.format_help(), "\nopen_clip_train's flags:\n", sep="\n", flush=True)
        return ours, ["--help"]
    try:
        if ours.reference_batch_size < 0:
            raise ValueError(f"reference_batch_size must be >= 0, got {ours.reference_batch_size}")
        PenaltyOptions(**penalty_options(ours))
        if ours.impl == "triton":
            device = "cpu"
            if cuda.is_available():  # the GPU that OpenCLIP gives this rank
                device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % cuda.device_count()}"
            engines.choose("triton", torch.empty(1, 1, device=device))
    except ImportError as error:  # a broken Triton
        parser.error(f"--impl triton: the kernels cannot be imported: {error}")
    except ValueError as error:
        option, _, problem = str(error).replace("='triton'", " triton").partition(" ")
        parser.error(f"--{option.replace('_', '-')} {problem}")
    return ours, theirs


def penalty_options(ours: argparse.Namespace) -> dict[str, Any]:
    """The options of the penalties, from the launcher's flags."""
    return {
        "lambda_inmodal": ours.lambda_inmodal,
        "lambda_crossmodal": ours.lambda_crossmodal,
        "reference_batch_size": ours.reference_batch_size or None,
        "impl": ours.impl,
    }


def steps_or_share(text: str) -> int | float:
    """An argument's type: a number of steps or, with a decimal point, a fraction of all steps."""
    try:
        steps = float(text) if "." in text else int(text)
        if 0 <= steps <= (1 if isinstance(steps, float) else steps):
            return steps
    except ValueError:
        pass
    words = "must be a number of steps >= 0, or a fraction of all steps from 0.0 to 1.0"
    raise argparse.ArgumentTypeError(f"{words}, not {text}")


def model_config(file: str) -> str:
    """An argument's type: a model configuration, which OpenCLIP then knows by the file's stem."""
    open_clip = import_module("open_clip")
    open_clip.add_model_config(file)
    if Path(file).stem not in open_clip.list_models():
        raise argparse.ArgumentTypeError(f"must be the JSON file of a model, not {file}")
    return file


class _Swap:
    """Replaces the loss in a trainer; methods replace the trainer's functions of the same name."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.penalty_options = penalty_options(options)
        self.loss: nn.Module | None = None
        self.ids: Tensor | None = None
        self.called = self.warming_up = False
        self.replaced: list[tuple[Any, str, Any]] = []  # trainer, name, its own function

    def into(self, trainer: Any) -> None:
        """Replace the functions with which the trainer's main module creates its loss."""
        if not (hasattr(trainer, "create_loss") or hasattr(trainer, "create_task")):
            raise SystemExit(
                f"cyclip_loss: {trainer.__name__} creates its loss in a way that this launcher "
                "does not support; use cyclip_loss.CyCLIPLoss in its code instead"
            )
        schedules = ("cosine_lr", "const_lr", "const_lr_cooldown")
        made = ("create_model_and_transforms", "create_loss", "create_task", "parse_args")
        for name in (*made, *schedules):
            if theirs := getattr(trainer, name, None):
                self.replaced.append((trainer, name, theirs))
                setattr(trainer, name, partial(getattr(self, name, self.schedule), theirs))

    def undo(self) -> None:
        """Give the trainer its own functions back."""
        for trainer, name, theirs in self.replaced:
            setattr(trainer, name, theirs)

    def parse_args(self, parse: Callable[..., Any], *args: Any) -> Any:
        """OpenCLIP's parsed flags with ours added, so that params.txt lists all of them."""
        parsed = parse(*args)
        if getattr(parsed, "horovod", False):
            raise SystemExit("cyclip_loss: --horovod is not supported: use torchrun")
        if self.options.same_captions and getattr(parsed, "accum_freq", 1) > 1:
            raise SystemExit("cyclip_loss: --same-captions excludes --accum-freq above 1")
        if self.options.same_captions and getattr(parsed, "torchscript", False):
            raise SystemExit("cyclip_loss: --same-captions excludes --torchscript")
        vars(parsed).update(vars(self.options))
        return parsed

    def create_model_and_transforms(self, make: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """OpenCLIP's model, with a hook that keeps a hash of each caption for the loss."""
        made = make(*args, **kw)

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            text = kwargs.get("text", args[1] if len(args) > 1 else None)
            self.ids = None if text is None else caption_ids(text)

        if self.options.same_captions:
            made[0].register_forward_pre_hook(keep, with_kwargs=True)
        return made

    def create_task(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """OpenCLIP 4.x's task with its loss replaced. (Other versions create the loss directly.)"""
        task = make(*args, **kwargs)
        task.loss = self.create_loss(lambda: getattr(task, "loss", None))
        return task

    def create_loss(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
        """The loss to use instead of OpenCLIP's."""
        theirs = make(*args, **kwargs)
        # The exact type, as CoCa's and distillation's losses are subclasses.
        ours: Any = {"ClipLoss": CyCLIPLoss, "SigLipLoss": CySigLIPLoss}.get(type(theirs).__name__)
        if ours is not None:
            names = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size")
            kept = {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
            self.loss = ours(**self.penalty_options, **kept, dist_impl=self.options.dist_impl)
            if self.options.same_captions:
                self.loss.same_ids = self.options.same_captions
                self.loss.register_forward_pre_hook(self.add_ids, with_kwargs=True)
        elif self.options.same_captions:
            raise SystemExit("cyclip_loss: --same-captions needs CLIP's or SigLIP's loss")
        else:
            try:
                self.loss = WithCyclicPenalty(theirs, **self.penalty_options)
            except TypeError as error:
                raise SystemExit(f"cyclip_loss: cannot add the penalties: {error}") from error
        self.loss.register_forward_hook(lambda *_: setattr(self, "called", True))
        if getattr(theirs, "rank", 0) == 0:
            logging.info("Loss: %s instead of %s", self.loss, type(theirs).__name__)
        return self.loss

    def add_ids(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """The loss's arguments, plus the ids of the batch that the model saw last."""
        if self.ids is None:
            raise SystemExit("cyclip_loss: --same-captions: the model got no captions")
        return args, {**kwargs, "ids": self.ids}

    def schedule(self, make: Callable[..., Any], *args: Any) -> Callable[[int], Any]:
        """OpenCLIP's schedule (optimizer, rate, warm-up, steps, ...), which also sets the lambdas.

        OpenCLIP calls it before each step with the step's number, which a resumed run continues.
        """
        set_rate, length = make(*args), self.options.lambda_warmup
        length *= args[3] if isinstance(length, float) else 1

        def set_rate_and_lambdas(step: int) -> Any:
            self.warming_up = True
            if self.loss is not None:
                for name in ("lambda_inmodal", "lambda_crossmodal"):
                    share = min(1.0, (step + 1) / length)
                    setattr(self.loss, name, share * self.penalty_options[name])
            return set_rate(step)

        return set_rate_and_lambdas if length else set_rate

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(self, *_: Any) -> None:
        """After an optimizer step: stop if the loss was not called, or a warm-up did not start."""
        problem = "--lambda-warmup needs OpenCLIP's learning rate schedule, which was not called"
        if not self.called:
            made = "created but not called" if self.loss is not None else "not created"
            problem = f"the CyCLIP loss was {made}; this version trains with a different one"
        elif self.warming_up or not self.options.lambda_warmup:
            return
        raise SystemExit(f"cyclip_loss: stopped after an optimizer step: {problem}")


if __name__ == "__main__":
    main()

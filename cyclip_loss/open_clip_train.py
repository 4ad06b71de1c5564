"""OpenCLIP's trainer with the CyCLIP loss: `python -m cyclip_loss.open_clip_train`.

Takes all of `open_clip_train`'s flags and a few of its own, and trains with whichever version of
OpenCLIP is installed; `torchrun -m cyclip_loss.open_clip_train` over ranks. Plain CLIP trains with
`CyCLIPLoss`; SigLIP, CoCa and distillation with their own loss and the penalties besides it.

The versions build their loss in different places, so that replacing it in the place that is right
for one would leave the other at plain CLIP. Every rank therefore looks, after its first optimizer
step, whether the loss it made has been called, and stops if not.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cyclip_loss.checks import PAPER_BATCH_SIZE
from cyclip_loss.loss import CyCLIPLoss
from cyclip_loss.options import DIST_IMPLS, PenaltyOptions
from cyclip_loss.with_penalty import WithCyclicPenalty

# What OpenCLIP passes to its own loss, and `CyCLIPLoss` keeps.
OPEN_CLIP_KEYWORDS = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size")


def main(argv: Sequence[str] | None = None) -> None:
    """Train. argv: the command line without the program's name; None: this process's.

    Raises SystemExit, with one line that says why, where it can't train with the CyCLIP loss.
    """
    parser = flags()
    argv = list(sys.argv[1:] if argv is None else argv)
    # torchrun takes a "--" between its own flags and these; some versions of Python hand it on.
    ours, theirs = parser.parse_known_args(argv[1:] if argv[:1] == ["--"] else argv)
    if "help" in ours:
        print(parser.format_help(), "\nand open_clip_train's own:\n", sep="\n", flush=True)
        theirs = ["--help"]
    try:
        PenaltyOptions(
            ours.lambda_inmodal,
            ours.lambda_crossmodal,
            reference_batch_size=ours.reference_batch_size or None,
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        trainer: Any = importlib.import_module("open_clip_train.main")
    except ImportError as error:
        raise SystemExit(
            f"{parser.prog}: open_clip_train can't be imported ({error}): "
            'pip install "open_clip_torch[training]"'
        ) from error
    swap = _Swap(ours)
    swap.into(trainer)
    handle = register_optimizer_step_post_hook(swap.check)
    try:
        if trainer.main(theirs):  # it has said why, and returns -1
            raise SystemExit(1)
    finally:
        handle.remove()


def flags() -> argparse.ArgumentParser:
    """The flags that this launcher adds to open_clip_train's."""
    parser = argparse.ArgumentParser(
        prog="cyclip_loss.open_clip_train",
        usage="python -m cyclip_loss.open_clip_train [these] [any of open_clip_train's]",
        description="Trains with OpenCLIP and the CyCLIP loss.",
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", default=argparse.SUPPRESS, help="show theirs too")
    add("--lambda-inmodal", type=float, default=0.25, help="weight of the in-modal penalty")
    add("--lambda-crossmodal", type=float, default=0.25, help="weight of the cross-modal penalty")
    add(
        "--reference-batch-size",
        type=int,
        default=PAPER_BATCH_SIZE,
        metavar="N",
        help="multiply the penalties by this / the global batch size, so that a weight means the "
        "same at every batch size; 0: the paper's formula",
    )
    add(
        "--dist-impl",
        choices=DIST_IMPLS,
        default="gather",
        help="how text features reach the other ranks, for plain CLIP",
    )
    return parser


class _Swap:
    """Puts the loss into a trainer, and finds out whether it is used.

    options: the parsed `flags`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loss: nn.Module | None = None
        self.called = False

    def into(self, trainer: Any) -> None:
        """Replace what the module `open_clip_train.main` makes its loss with."""
        # 4.x makes a task, which holds the loss; 3.x makes the loss itself.
        factories = {"create_task": self.task, "create_loss": self.of}
        known = [name for name in factories if hasattr(trainer, name)]
        if not known:
            raise SystemExit(
                f"cyclip_loss: {trainer.__name__} makes its loss in a way that this launcher does "
                "not know; use cyclip_loss.CyCLIPLoss in its code instead"
            )
        for name in known:
            setattr(trainer, name, _then(getattr(trainer, name), factories[name]))
        trainer.parse_args = _then(trainer.parse_args, self.parsed)

    def parsed(self, parsed: argparse.Namespace) -> argparse.Namespace:
        """Their flags, and ours with them: they write them to params.txt and report them."""
        if getattr(parsed, "horovod", False):
            raise SystemExit("cyclip_loss: --horovod is not supported: use torchrun")
        vars(parsed).update(vars(self.options))
        return parsed

    def task(self, task: Any) -> Any:
        """Their task, with the loss in it replaced."""
        if not isinstance(getattr(task, "loss", None), nn.Module):
            raise SystemExit(f"cyclip_loss: {type(task).__name__} has no loss of two features")
        task.loss = self.of(task.loss)
        return task

    def of(self, theirs: nn.Module) -> nn.Module:
        """The loss to take instead of `theirs`."""
        options = self.options
        lambdas = (options.lambda_inmodal, options.lambda_crossmodal)
        reference: int | None = options.reference_batch_size or None
        # By its exact type: CoCa's loss and distillation's are subclasses.
        if type(theirs).__name__ == "ClipLoss":
            kept = {name: getattr(theirs, name) for name in OPEN_CLIP_KEYWORDS}
            self.loss = CyCLIPLoss(
                *lambdas, reference_batch_size=reference, dist_impl=options.dist_impl, **kept
            )
        else:
            self.loss = WithCyclicPenalty(theirs, *lambdas, reference_batch_size=reference)
        self.loss.register_forward_hook(self._note)
        if getattr(theirs, "rank", 0) == 0:
            logging.info("Loss: %s instead of %s", self.loss, type(theirs).__name__)
        return self.loss

    def _note(self, *_: Any) -> None:
        self.called = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(self, *_: Any) -> None:
        """After an optimizer step: stop unless the loss was called."""
        if not self.called:
            made = "made but not called" if self.loss is not None else "not asked for"
            raise SystemExit(
                f"cyclip_loss: a training step was taken in which the CyCLIP loss was {made}: this "
                "version of open_clip_train trains with another one. Stopped."
            )


def _then(first: Callable[..., Any], second: Callable[[Any], Any]) -> Callable[..., Any]:
    """What calls `first`, and `second` with what it returns."""
    return lambda *args, **kwargs: second(first(*args, **kwargs))


if __name__ == "__main__":
    main()

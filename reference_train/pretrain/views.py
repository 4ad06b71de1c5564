"""`--views`: two views of each training pair, and the in-modal contrastive term of these views.

This is the option `--inmodal` of the CyCLIP authors' code (Goel et al. 2022). Each image has to
find its own second view among the second views of the batch, and so does each caption. Second views
are random, and differ between epochs. Held-out pairs have one view. A batch has `--batch-size`
pairs, as (N, 2, ...) tensors.

`python -m reference_train.pretrain.views --views -- FLAGS` runs `cyclip_loss.open_clip_train` with
this option. `pretrain --views` adds presets and checks.

Another way to draw second views is a choice in `add_flag`, used in `TwoViewsTransform` or
`TwoViewsTokenizer`. The first views' augmentation is the preset's `--aug-cfg` (`presets.py`). The
demonstration has its own in `demo/batches.py`.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import AutoAugment

from cyclip_loss import open_clip_train

from ..command_line import Parser, run

CHANGED_SHARE = 0.1  # of the words, which are left out or swapped (EDA's default)
NO_HELD_OUT_DATA = {"val_data": None, "imagenet_val": None, "imagenet_v2": None}
FEATURES = ("image_features", "text_features")
Function = Callable[..., Any]


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--views`."""
    choices = ("autoaugment", "own")
    text = (
        "train on two views of each pair, with the in-modal contrastive term. autoaugment (the "
        "default): torchvision's AutoAugment changes the second picture before the training's own "
        "augmentation does; own: the training's own augmentation alone"
    )
    parser.add_argument("--views", nargs="?", choices=choices, const="autoaugment", help=text)


class TwoViewsTransform:
    """Makes two views of a picture: the training's transform, applied twice.

    transform: a `Compose` of torchvision, from a PIL image to (3, H, W). how: "autoaugment":
    AutoAugment changes the second picture before the transform. "own": both are transforms of the
    same picture.
    """

    def __init__(self, transform: Any, how: str) -> None:
        self.transform = transform
        self.augment = AutoAugment() if how == "autoaugment" else None

    def __call__(self, picture: Image.Image) -> Tensor:
        """(2, 3, H, W)."""
        picture = picture.convert("RGB")  # AutoAugment takes no palettes and no transparency
        second = self.augment(picture) if self.augment else picture
        return torch.stack((self.transform(picture), self.transform(second)))


class TwoViewsTokenizer:
    """A tokenizer that makes two views of one caption.

    If the caption has several lines, the views are two of the lines. If it has one line, this line
    is the first view, and `drop_or_swap_words` makes the second view of it.
    """

    def __init__(self, tokenizer: Function) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str | list[str]) -> Tensor:
        """(1, 2, L). text: one caption, or a list of it (OpenCLIP does so for a CSV file)."""
        text = text if isinstance(text, str) else text[0]
        captions = [line.strip() for line in text.splitlines() if line.strip()] or [""]
        if len(captions) > 1:
            views = [captions[i] for i in torch.randperm(len(captions))[:2].tolist()]
        else:
            views = [captions[0], drop_or_swap_words(captions[0])]
        tokens: Tensor = self.tokenizer(views)
        return tokens[None]


def drop_or_swap_words(caption: str) -> str:
    """A caption with words swapped or, half of the time, with some words left out.

    These are two of the four operations of EDA (Wei & Zou 2019, arXiv 1901.11196). The other two,
    replacing words and adding words, need a dictionary of synonyms.
    """
    words = caption.split()
    if len(words) < 2:
        return caption
    if torch.rand(()) < 0.5:
        kept = [word for word in words if torch.rand(()) >= CHANGED_SHARE]
        return " ".join(kept or [words[int(torch.randint(len(words), ()))]])
    for _ in range(max(1, int(CHANGED_SHARE * len(words)))):
        i, j = torch.randperm(len(words))[:2].tolist()
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


def forward_both_views(
    model: nn.Module,
    forward: Function,
    image: Tensor,
    text: Tensor,
    **options: Any,
) -> Any:
    """A model's forward pass. In training it encodes both views at once.

    image: (N, 2, 3, H, W). text: (N, 2, L). Returns the model's output for the first views, with
    `augmented_image_features` and `augmented_text_features`, (N, D) each, from the second views.
    """
    if not model.training:
        return forward(image, text, **options)
    output = forward(image.flatten(0, 1), text.flatten(0, 1), **options)
    second = {f"augmented_{name}": output[name][1::2] for name in FEATURES}
    # Other outputs may also have a row for each picture or caption, such as CoCa's logits.
    first = {
        name: value[0::2] if isinstance(value, Tensor) and value.ndim else value
        for name, value in output.items()
    }
    return first | second


class ViewPatches:
    """The patches for `--views`. how: "autoaugment" or "own", as in `TwoViewsTransform`."""

    def __init__(self, how: str) -> None:
        self.how = how

    def install(self, main: Any) -> None:
        """Replaces functions in `open_clip_train.main`."""
        for name in ("create_model_and_transforms", "get_data"):
            setattr(main, name, partial(getattr(self, name), getattr(main, name)))

    def create_model_and_transforms(self, original: Function, *args: Any, **options: Any) -> Any:
        """OpenCLIP's model, which takes both views in one forward pass."""
        created = original(*args, **options)
        model = created[0]
        model.forward = partial(forward_both_views, model, model.forward)
        return created

    def get_data(
        self,
        original: Function,
        args: Namespace,
        transforms: Any,
        *,
        tokenizer: Any,
        **options: Any,
    ) -> Any:
        """OpenCLIP's data: training pairs have two views, and held-out pairs have one."""
        train_transform, val_transform = transforms
        training_only = Namespace(**{**vars(args), **NO_HELD_OUT_DATA})
        held_out_only = Namespace(**{**vars(args), "train_data": None})
        two_views = (TwoViewsTransform(train_transform, self.how), val_transform)
        two_captions = TwoViewsTokenizer(tokenizer)
        training = original(training_only, two_views, tokenizer=two_captions, **options)
        held_out = original(held_out_only, transforms, tokenizer=tokenizer, **options)
        # Made-up pairs need no path, so `held_out_only` also gives some to train on.
        return held_out | training


def main(argv: Sequence[str]) -> None:
    """Runs `cyclip_loss.open_clip_train`, with two views of each pair if `--views` is given."""
    parser = Parser("python -m reference_train.pretrain.views", add_help=False)
    add_flag(parser)
    arguments, flags = parser.parse_known_args(argv)
    if arguments.views:
        from open_clip_train import main as trainer

        ViewPatches(arguments.views).install(trainer)
    open_clip_train.main(flags)


if __name__ == "__main__":
    run(main)

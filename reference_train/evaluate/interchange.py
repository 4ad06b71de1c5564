"""Whether image and text features can take each other's place: heads, mixed galleries, clusters.

Features are (n, D), float32, on the CPU, and their rows have unit length. `docs/evaluation.md` says
what each number is for.
"""

import hashlib
from collections.abc import Sequence

import torch
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import v_measure_score  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 10
STRIP = 1024  # queries that are compared with the gallery in one product
IMAGES_PER_CLASS = 20  # with fewer there are no heads and no clusters
Numbers = dict[str, float]


def numbers(
    image_features: Tensor,
    text_features: Tensor,
    is_right: Tensor,
    means: tuple[Tensor, Tensor] | None,
    captions: Sequence[str] | None,
    labels: Tensor | None,
) -> Numbers:
    """All numbers that apply.

    text_features: (m, D), of distinct texts. is_right: (n, m), whether a text belongs to an image.
    means: of the image and the text features of training pairs, (D,) each. captions: one for each
    image; None: the texts are names of classes. labels: (n,).
    """
    own_texts = text_features[is_right.byte().argmax(dim=1)]  # one for each image
    gap = image_features.mean(dim=0) - own_texts.mean(dim=0)
    found = {"modality_gap": gap.norm().item()}
    found |= gallery_numbers(image_features, text_features, is_right, means, captions is not None)
    if captions is not None:
        found["shared_neighbours"] = shared_neighbours(image_features, own_texts)
    if labels is not None and 2 <= len(labels.unique()) <= len(labels) // IMAGES_PER_CLASS:
        found |= label_numbers(image_features, own_texts, labels, captions)
    return found


def gallery_numbers(
    image_features: Tensor,
    text_features: Tensor,
    is_right: Tensor,
    means: tuple[Tensor, Tensor] | None,
    thin: bool,
) -> Numbers:
    """Numbers of galleries of images and texts, as they are and without the means.

    thin: also take galleries with a tenth of the texts, or of the images.
    """
    texts, images = is_right.any(dim=0).nonzero()[:, 0], torch.arange(len(image_features))
    galleries = {"": (images, texts)}
    if thin:
        galleries["_tenth_of_texts"] = (images, texts[::10])
        galleries["_tenth_of_images"] = (images[::10], texts)
    zero = torch.zeros(image_features.shape[1])
    gallery_means = image_features.mean(dim=0), text_features[texts].mean(dim=0)
    subtracted = {"": (zero, zero), "_without_gallery_means": gallery_means}
    if means is not None:
        subtracted["_without_means"] = means
    found = {}
    for suffix, (image_mean, text_mean) in subtracted.items():
        features = without(image_features, image_mean), without(text_features, text_mean)
        for gallery, rows in galleries.items():
            recall, share = mixed_gallery(*features, is_right, *rows)
            found[f"mixed_r10{gallery}{suffix}"] = recall
            if not gallery:
                found[f"mixed_text_share{suffix}"] = share
    return found


def without(features: Tensor, mean: Tensor) -> Tensor:
    """The features less a mean, with rows of unit length again."""
    return F.normalize(features - mean, dim=-1)


def mixed_gallery(
    image_features: Tensor, text_features: Tensor, is_right: Tensor, images: Tensor, texts: Tensor
) -> tuple[float, float]:
    """Image queries in one gallery of the other images and of texts.

    The queries are the images that have a text in the gallery. Returns the share of queries that
    have a text of their own among the 10 nearest, and the share of texts among these 10.

    images, texts: the rows that are in the gallery.
    """
    gallery = torch.cat([image_features[images], text_features[texts]])
    right = is_right[:, texts]
    queries = right.any(dim=1).nonzero()[:, 0]
    hits, shares = [], []
    for strip in queries.split(STRIP):
        scores = image_features[strip] @ gallery.T
        scores[:, : len(images)].masked_fill_(strip[:, None] == images, -torch.inf)
        nearest = scores.topk(min(NEIGHBOURS, len(gallery) - 1)).indices - len(images)
        is_text = nearest >= 0
        is_own = right[strip].gather(1, nearest.clamp(min=0)) & is_text
        hits.append(is_own.any(dim=1))
        shares.append(is_text.float().mean(dim=1))
    return torch.cat(hits).float().mean().item(), torch.cat(shares).mean().item()


def shared_neighbours(image_features: Tensor, text_features: Tensor) -> float:
    """The share of the 10 nearest images of an image whose texts are the 10 nearest of its text.

    text_features: (n, D), of the text of each image.
    """
    shares = []
    for strip in torch.arange(len(image_features)).split(STRIP):
        neighbours = []
        for features in (image_features, text_features):
            scores = features[strip] @ features.T
            scores[torch.arange(len(strip)), strip] = -torch.inf  # not its own neighbour
            nearest = scores.topk(min(NEIGHBOURS, len(features) - 1)).indices
            neighbours.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, nearest, True))
        both = neighbours[0] & neighbours[1]
        shares.append(both.sum(dim=1) / nearest.shape[1])
    return torch.cat(shares).mean().item()


def label_numbers(
    image_features: Tensor, text_features: Tensor, labels: Tensor, captions: Sequence[str] | None
) -> Numbers:
    """Heads within and across modalities, and clusters.

    text_features: (n, D), of the text of each image. captions: these texts, if they are not the
    names of classes; else there are no numbers of texts alone. Images with one caption are in one
    half.
    """
    names = captions or [str(i) for i in range(len(labels))]
    half = torch.tensor([hashlib.sha256(name.encode()).digest()[0] % 2 for name in names]) == 0
    features = {"image": image_features, "text": text_features}
    found = {}
    for suffix in ("", "_without_means"):
        if suffix:
            features = {name: without(x, x[half].mean(dim=0)) for name, x in features.items()}
        for fitted, x in features.items():
            head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            head.fit(x[half], labels[half])
            for applied, y in features.items():
                if captions or "image" in (fitted, applied):
                    accuracy = head.score(y[~half], labels[~half])
                    found[f"head_{fitted}_{applied}{suffix}"] = accuracy
    sets = {"images": image_features}
    if captions:
        sets["texts"] = text_features
        sets["mixed"] = torch.cat([image_features, text_features])
    for name, x in sets.items():
        clusters = KMeans(len(labels.unique()), n_init=10, random_state=0).fit_predict(x)
        truth = labels.repeat(len(x) // len(labels))
        found[f"v_measure_{name}"] = float(v_measure_score(truth, clusters))
    return found

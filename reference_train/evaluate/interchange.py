"""Whether image and text features can take each other's place: heads, mixed galleries, clusters.

Features are float32, on the CPU, and their rows have unit length. docs/evaluation.md says what each
number is for.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import torch
from scipy.sparse import csr_array
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

NEIGHBOURS = 10
STRIP = 1024  # queries that are compared with the gallery in one product
IMAGES_PER_CLASS = 20  # with fewer there are no heads and no clusters
# (n, m) bool, sparse: whether text j belongs to image i. Each image has a text.
Matches: TypeAlias = csr_array
Means = tuple[Tensor, Tensor] | None  # of image features and of text features, (D,) each
Numbers = dict[str, float]


def numbers(
    images: Tensor,
    texts: Tensor,
    is_right: Matches,
    means: Means,
    captions: Sequence[str] | None,
    labels: Tensor | None,
) -> Numbers:
    """All numbers that apply.

    images: (n, D). texts: (m, D), distinct. is_right: (n, m), whether a text belongs to an image.
    means: those of training pairs. captions: one of each image; None: the texts are class names.
    labels: (n,).
    """
    texts_of_images = texts[own_texts(is_right)]
    found = one_index_numbers(images, texts, is_right, means)
    if captions is not None:
        x, y = (neighbours(z) for z in (images, texts_of_images))
        is_shared = (x[:, :, None] == y[:, None, :]).any(dim=2)
        found["shared_neighbours"] = is_shared.float().mean().item()
    if labels is not None and 2 <= len(labels.unique()) <= len(labels) // IMAGES_PER_CLASS:
        found |= label_numbers(images, texts_of_images, labels, captions)
    return found


def own_texts(is_right: Matches) -> Tensor:
    """The index of one text of each image, its first in the order of the texts: (n,)."""
    ordered = is_right.sorted_indices()
    return torch.from_numpy(ordered.indices[ordered.indptr[:-1]]).long()


def nearest(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """The indices of the k gallery rows with the highest cosine, best first: (Q, min(k, G))."""
    k = min(k, len(gallery))
    return torch.cat([(strip @ gallery.T).topk(k).indices for strip in queries.split(STRIP)])


def neighbours(features: Tensor) -> Tensor:
    """The 10 nearest other rows of each row of features, (n, 10)."""
    found = nearest(features, features, NEIGHBOURS + 1)
    is_itself = found == torch.arange(len(features))[:, None]
    others_first = is_itself.byte().argsort(dim=1, stable=True)
    return found.gather(1, others_first[:, :-1])


def one_index_numbers(images: Tensor, texts: Tensor, is_right: Matches, means: Means) -> Numbers:
    """Image and text queries in one index of both, as they are and without the means.

    R@10 is the share of queries with a row of their own, of the other modality, among the 10
    nearest; the share of texts is that among these 10. Texts that belong to no image are left out.
    Queries have a row of their own in the index.
    """
    count, shown = len(images), is_right.sum(axis=0).nonzero()[0]
    texts, is_right = texts[torch.from_numpy(shown)], is_right[:, shown]
    numbers = torch.cat([torch.arange(count), count + torch.from_numpy(shown)])
    is_image, is_tenth = torch.arange(len(numbers)) < count, numbers % 10 == 0
    everything = is_image | ~is_image
    subtracted = {
        "": (torch.zeros(1), torch.zeros(1)),
        "_without_gallery_means": (images.mean(dim=0), texts.mean(dim=0)),
        "_without_means": means,
    }
    found = {}
    for ending, pair in subtracted.items():
        if pair is None:
            continue
        x, y = normalize(images - pair[0], dim=-1), normalize(texts - pair[1], dim=-1)
        image_queries, text_queries = (x, y, is_right), (y, x, is_right.T.tocsr())
        for name, queries, is_shown, is_standardized in (
            ("mixed{}", image_queries, everything, False),
            ("mixed{}_tenth_of_texts", image_queries, is_image | is_tenth, False),
            ("mixed{}_tenth_of_images", image_queries, ~is_image | is_tenth, False),
            ("mixed{}_standardized", image_queries, everything, True),
            ("mixed_text_query{}", text_queries, everything, False),
            ("mixed_text_query{}_standardized", text_queries, everything, True),
        ):
            hits, shares = one_index_answers(*queries, is_shown, is_standardized)
            if len(hits):
                found[f"{name.format('_r10')}{ending}"] = hits.float().mean().item()
                if queries is image_queries and not is_standardized:
                    found[f"{name.format('_text_share')}{ending}"] = shares.mean().item()
    return found


def one_index_answers(
    queries: Tensor, others: Tensor, is_right: Matches, is_shown: Tensor, is_standardized: bool
) -> tuple[Tensor, Tensor]:
    """What the 10 nearest of both modalities are, for the q queries with a right row in the index.

    queries: (n, D). others: (m, D), of the other modality. is_right: (n, m). is_shown: (n + m,),
    which rows are in the index. A query is not its own answer. is_standardized: scores are less
    their mean, and over their deviation, in each modality; else they are cosines.

    Returns whether one is right, (q,) bool, and the share of the other modality, (q,).
    """
    found = []
    k = min(NEIGHBOURS, int(is_shown.sum()) - 1)
    for rows in torch.arange(len(queries)).split(STRIP):
        scores = [queries[rows] @ gallery.T for gallery in (queries, others)]
        scores[0][torch.arange(len(rows)), rows] = torch.nan
        joined = torch.cat([standardize(x) for x in scores] if is_standardized else scores, dim=1)
        joined.nan_to_num_(nan=-torch.inf).masked_fill_(~is_shown, -torch.inf)
        found.append(joined.topk(k).indices - len(queries))
    asked = is_right[:, is_shown[len(queries) :].numpy()].sum(axis=1).nonzero()[0]
    answers = torch.cat(found)[asked]
    # SciPy makes the columns writeable.
    own = is_right[asked[:, None], answers.clamp(min=0).numpy().copy()].toarray()
    is_other = answers >= 0
    return (torch.from_numpy(own) & is_other).any(dim=1), is_other.float().mean(dim=1)


def standardize(scores: Tensor) -> Tensor:
    """The scores of each query less their mean, over their deviation. NaN is left out."""
    centred = scores - scores.nanmean(dim=1, keepdim=True)
    return centred / centred.square().nanmean(dim=1, keepdim=True).sqrt()


def label_numbers(
    images: Tensor, texts: Tensor, labels: Tensor, captions: Sequence[str] | None
) -> Numbers:
    """Heads within and across modalities, and clusters. texts: (n, D), of the text of each image.

    A head is fitted on one half, and applied to the other, of the labels that it has seen. Images
    with one caption are in one half. There are no heads if the first half has a single label.
    """
    keys = captions or map(str, range(len(labels)))
    half = torch.tensor([hashlib.sha256(key.encode()).digest()[0] % 2 for key in keys]).bool()
    judged = ~half & torch.isin(labels, labels[half])
    has_heads = len(labels[half].unique()) > 1 and judged.any()
    towers, found = {"image": images, "text": texts}, {}
    for ending in ("", "_without_means") if has_heads else ():
        if ending:
            towers = {name: normalize(x - x[half].mean(dim=0)) for name, x in towers.items()}
        for fitted, x in towers.items():
            head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            head.fit(x[half], labels[half])
            for applied, y in towers.items():
                accuracy = head.score(y[judged], labels[judged])
                found[f"head_{fitted}_{applied}{ending}"] = accuracy
    for name, x in {"images": images, "texts": texts, "mixed": torch.cat([images, texts])}.items():
        clusters = KMeans(len(labels.unique()), n_init=10, random_state=0).fit_predict(x)
        truth = labels.repeat(len(x) // len(labels))
        found[f"v_measure_{name}"] = float(v_measure_score(truth, clusters))
    return found

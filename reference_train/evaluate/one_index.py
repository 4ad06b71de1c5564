"""One index of images and texts: is an image's text, or a text's image, among the ten nearest?

Features are float32, on the CPU, and their rows have unit length. docs/evaluation.md says what each
number is for.
"""

from typing import TypeAlias

import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import normalize

NEIGHBOURS = 10
STRIP = 1024  # queries that are compared with the gallery in one product
# (n, m) bool, sparse: whether text j belongs to image i. Each image has a text.
Matches: TypeAlias = csr_array
Means = tuple[Tensor, Tensor] | None  # of image features and of text features, (D,) each


def one_index_numbers(
    images: Tensor, texts: Tensor, is_right: Matches, means: Means
) -> dict[str, float]:
    """R@10 of image and text queries in one index of both, as they are and without the means.

    It is the share of queries with a row of their own, of the other modality, among the 10 nearest.
    Texts that belong to no image are left out.

    images: (n, D). texts: (m, D), distinct. is_right: (n, m), whether a text belongs to an image.
    means: those of training pairs.
    """
    shown = is_right.sum(axis=0).nonzero()[0]
    texts, is_right = texts[torch.from_numpy(shown)], is_right[:, shown]
    features = {"": (images, texts)}
    if means is not None:
        x, y = (normalize(z - less) for z, less in zip((images, texts), means, strict=True))
        features["_without_means"] = x, y
    found = {}
    for ending, (x, y) in features.items():
        for name, queries in (
            ("mixed_r10", (x, y, is_right)),
            ("mixed_text_query_r10", (y, x, is_right.T.tocsr())),
        ):
            for how, is_standardized in (("", False), ("_standardized", True)):
                hits = one_index_hits(*queries, is_standardized)
                found[f"{name}{how}{ending}"] = hits.float().mean().item()
    return found


def one_index_hits(
    queries: Tensor, others: Tensor, is_right: Matches, is_standardized: bool
) -> Tensor:
    """Whether a right row is among the 10 nearest of both modalities, for each query, (n,) bool.

    queries: (n, D). others: (m, D), of the other modality. is_right: (n, m). A query is not its own
    answer. is_standardized: scores are less their mean, and over their deviation, in each modality;
    else they are cosines.
    """
    found = []
    k = min(NEIGHBOURS, len(queries) + len(others) - 1)
    for rows in torch.arange(len(queries)).split(STRIP):
        scores = [queries[rows] @ gallery.T for gallery in (queries, others)]
        scores[0][torch.arange(len(rows)), rows] = torch.nan
        joined = torch.cat([standardize(x) for x in scores] if is_standardized else scores, dim=1)
        answers = joined.nan_to_num_(nan=-torch.inf).topk(k).indices - len(queries)
        # SciPy makes the columns writeable.
        own = is_right[rows.numpy()[:, None], answers.clamp(min=0).numpy().copy()].toarray()
        found.append((torch.from_numpy(own) & (answers >= 0)).any(dim=1))
    return torch.cat(found)


def standardize(scores: Tensor) -> Tensor:
    """The scores of each query less their mean, over their deviation. NaN is left out."""
    centred = scores - scores.nanmean(dim=1, keepdim=True)
    return centred / centred.square().nanmean(dim=1, keepdim=True).sqrt()

"""The ids of rows and columns, with extra negatives among them."""

import torch
from torch import Tensor

from cyclip_loss.batch import Batch, Ranks


def ranks_of_extra_texts(batch: Batch) -> Ranks:
    """The ranks, with the number of extra negative texts on each."""
    pairs, columns = batch.ranks, batch.column_ranks[0]
    if pairs.counts is None and columns.counts is None:
        return pairs
    n, m = batch.image_features.shape[0], batch.column_features[0].shape[0]
    extra = [columns.rows_on(rank, m) - pairs.rows_on(rank, n) for rank in range(pairs.size)]
    return pairs._replace(counts=extra)


def ids_with_negatives(
    batch: Batch, pair_ids: Tensor, extra_text_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ids of the first term's rows on this rank, and of its columns on all ranks.

    Pairs with the same id get the same number from 1 to N. Extra negatives get the number of the
    pairs with their id, with a minus sign; -(N + 1) if there are none, or without an id.

    pair_ids: (N,), of all ranks; extra_text_ids: (M,), of all ranks' extra negative texts; None if
    these have no ids.
    """
    n, ranks = batch.image_features.shape[0], batch.ranks
    ordered, last = pair_ids.sort()[0], pair_ids.shape[0] - 1

    def numbers(ids: Tensor) -> Tensor:
        place = torch.searchsorted(ordered, ids).clamp_(max=last)
        return torch.where(ordered[place] == ids, place + 1, last + 2)

    def numbers_of_extra(ids: Tensor | None, count: int) -> Tensor:
        return -(pair_ids.new_full((count,), last + 2) if ids is None else numbers(ids))

    counts = [ranks.rows_on(rank, n) for rank in range(ranks.size)]
    extra_ranks = ranks_of_extra_texts(batch)
    own_extra = batch.column_features[0].shape[0] - n
    extra_counts = [extra_ranks.rows_on(rank, own_extra) for rank in range(ranks.size)]
    extra_numbers = numbers_of_extra(extra_text_ids, sum(extra_counts))
    pairs = torch.split(numbers(pair_ids), counts)
    extra_texts = torch.split(extra_numbers, extra_counts)
    columns = [block for both in zip(pairs, extra_texts) for block in both]  # noqa: B905
    num_images = batch.row_features[0].shape[0] - n
    extra_images = numbers_of_extra(batch.optional.get("negative_image_ids"), num_images)
    return torch.cat((pairs[ranks.rank], extra_images)), torch.cat(columns)

"""The contrastive term and its autograd: a rank's image rows against the texts of all ranks.

With l_ij = s * I_i . T_j, r_i and c_j the log-sum-exps of the rows and columns of l, and N pairs:

    symmetric   L = 1/(2N) * (sum_i r_i + sum_j c_j - 2 * sum_i l_ii)     (Goel et al. 2022, eq. 1)
    one way     L = 1/N * (sum_i r_i - sum_i l_ii)

For a confidently matched pair, r_i - l_ii and exp(l_ii - r_i) - 1 would lose all digits. So the
sums run over *negatives*: a_i, b_j are the log-sum-exps of row i and column j without the pair.

    r_i - l_ii            = log(1 + exp(a_i - l_ii))
    exp(l_ii - r_i) - 1   = -1 / (1 + exp(l_ii - a_i))

Forward saves the features and vectors of N elements, no N x N matrix. Backward computes the logits
again: 8 N^2 D flops in all, where dense autograd takes 6 N^2 D.

With the N pairs spread over W ranks, the columns reach the rows by one of two strategies, a file
each: `gather.py` (also for one process, "local") and `ring.py`.

Extra negatives are rows and columns without a pair, after the pairs. Their own log-sum-exps are
not part of the loss, so backward gets inf for them. That makes their part of G, the gradient of the
logits, zero (`eager.contrastive_grads`).

Gradients are summed across ranks in the accumulation dtype. Except for the gather, communication is
inside the operators, where `torch.compile` does not see it. If it were traced, a ring would keep
every block for backward, and a rank without rows would drop collectives whose results it does not
use.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import distributed, engines, gather, ring
from cyclip_loss.batch import Batch, Plan, without_autocast
from cyclip_loss.distributed import Ranks
from cyclip_loss.logits import ALL_ROWS, Logits, SavedStatistics
from cyclip_loss.operators import call_backward, empty_grad_like, register, takes_fields
from cyclip_loss.options import LossOptions
from cyclip_loss.positives import WithPositives

STRATEGIES: Any = {"local": gather, "gather": gather, "ring": ring}


# All-gathers that run while other terms are computed: of the column features of each contrastive
# term, and of the ids. None where nothing is sent.
Gathers = tuple[list[Tensor | None], Tensor | None]


def start_gathers(batch: Batch, plan: Plan) -> Gathers:
    """Start to gather the columns of every contrastive term and the ids, for `terms`."""
    column_features: list[Tensor | None] = []
    for index, features in enumerate(batch.column_features):
        ranks = batch.column_ranks if index == 0 else batch.ranks
        gathers = plan.strategy == "gather"
        column_features.append(distributed.start_gather(features, ranks) if gathers else None)
    ids = None if batch.ids is None else distributed.start_gather(batch.ids, batch.ranks)
    return column_features, ids


def terms(batch: Batch, plan: Plan, options: LossOptions, gathers: Gathers) -> dict[str, Tensor]:
    """The contrastive terms by name, weighted: scalars of the accumulation dtype."""
    losses = [
        _Contrastive.apply(*inputs)  # type: ignore[no-untyped-call]
        for inputs in term_inputs(batch, plan, gathers)
    ]
    if len(losses) == 1:
        return {"contrastive_loss": losses[0]}
    inmodal, weight = (losses[1] + losses[2]) / 2, options.inmodal_contrastive_weight
    if weight is None:  # the authors' mean
        return {"contrastive_loss": losses[0] / 2, "inmodal_contrastive_loss": inmodal * 0.5}
    return {"contrastive_loss": losses[0], "inmodal_contrastive_loss": inmodal * weight}


def term_inputs(batch: Batch, plan: Plan, gathers: Gathers) -> list[tuple[Any, ...]]:
    """The inputs of the autograd function for each contrastive term: see `_Contrastive`."""
    assert batch.logit_scale is not None
    gathered_columns, gathered_ids = gathers
    batch_ids = None
    if gathered_ids is not None:
        batch_ids = distributed.finish_gather(gathered_ids, batch.ranks)
    elif batch.ids is not None:
        batch_ids = batch.ids.view_as(batch.ids)  # torch.compile refuses the same tensor twice
    all_inputs: list[tuple[Any, ...]] = []
    for index, row_features in enumerate(batch.row_features):
        ranks = batch.column_ranks if index == 0 else batch.ranks
        column_features = batch.column_features[index]
        row_ids, column_ids, num_pairs = batch.ids, batch_ids, ALL_ROWS
        if batch.has_negatives and index == 0:
            num_pairs = batch.image_features.shape[0]
            row_ids, column_ids = _ids_with_negatives(batch, batch_ids)
        first_column = 0
        if plan.strategy == "gather":
            first_column = ranks.first_row(ranks.rank, column_features.shape[0])
        symmetric = index == 0 and not batch.one_way
        settings = Settings(
            batch.total_pairs,
            plan.positives,
            plan.engine,
            plan.strategy,
            *ranks.operator_arguments(),
        )
        inputs = (
            row_features,
            column_features,
            batch.logit_scale,
            row_ids,
            column_ids,
            first_column,
            symmetric,
            num_pairs,
            gathered_columns[index],
            ranks,
            settings,
            plan.traced,
        )
        all_inputs.append(inputs)
    return all_inputs


def _ids_with_negatives(
    batch: Batch, batch_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Row and column ids of the first term. Extra negatives get ids that match no other.

    batch_ids: of the pairs of all ranks. They are numbered from 0 on, so -2 (extra images) and -1
    (extra texts) are free.
    """
    if batch.ids is None or batch_ids is None:
        return None, None
    ordered = batch_ids.sort()[0]
    row_ids, column_ids = (
        torch.searchsorted(ordered, batch.ids),
        torch.searchsorted(ordered, batch_ids),
    )
    num_pairs, num_columns = batch.image_features.shape[0], batch.column_features[0].shape[0]
    row_ids = F.pad(row_ids, (0, batch.row_features[0].shape[0] - num_pairs), value=-2)
    pairs_per_rank = [batch.ranks.count(rank, num_pairs) for rank in range(batch.ranks.size)]
    blocks = []
    for rank, block in enumerate(torch.split(column_ids, pairs_per_rank)):
        extra = batch.column_ranks.count(rank, num_columns) - pairs_per_rank[rank]
        blocks.append(F.pad(block, (0, extra), value=-1))
    return row_ids, torch.cat(blocks)


class Settings(NamedTuple):
    """How a contrastive term is computed, in types that an operator can take."""

    total_pairs: int  # N
    positives: bool  # whether rows with the same id are positives, not ignored
    engine: str  # as in `Plan`
    strategy: str
    group_name: str  # this and the next: `Ranks.operator_arguments`, with the numbers of columns
    rows_per_rank: list[int] | None


class _Contrastive(torch.autograd.Function):
    """A contrastive term of the global batch: a scalar of the accumulation dtype.

    Inputs, in this order:

    - the eight fields of `Logits`, one by one, because autograd sees only tensors that are inputs
      themselves: this rank's features, but the ids of all columns;
    - the result of `start_gather` for the columns, or None;
    - the ranks, with their numbers of columns;
    - the `Settings`;
    - whether the call is traced.

    Without `symmetric` the loss is one way, rows to columns.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *fields, gathered, ranks, settings, traced = inputs
        own_columns = fields[1].shape[0]
        fields = with_gathered_columns(fields, gathered, ranks)
        compute = _forward_operator if traced else contrastive_forward
        loss: Tensor
        loss, *saved = compute(*fields, *settings)
        ctx.save_for_backward(*fields[:5], *saved)
        ctx.rest = fields[5:], own_columns, settings, traced
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        fields, own_columns, settings, traced = ctx.rest
        tensors = (*ctx.saved_tensors, grad)
        return input_gradients(tensors, fields, own_columns, settings, traced, ctx.needs_input_grad)


def with_gathered_columns(fields: Any, gathered: Tensor | None, ranks: Ranks) -> Any:
    """The fields of `Logits`, with the columns of all ranks if they were gathered."""
    if gathered is None:
        return fields
    # A new list: torch.compile of PyTorch 2.8 makes `fields` a tuple.
    return [fields[0], distributed.finish_gather(gathered, ranks), *fields[2:]]


def input_gradients(
    tensors: tuple[Tensor, ...],
    fields: Any,
    own_columns: int,
    settings: Settings,
    traced: bool,
    needs_input_grad: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """What the backward of a contrastive term returns: a gradient or None for each input.

    tensors: the tensors of `Logits`, those of `SavedStatistics`, and the upstream gradient.
    fields: the other fields of `Logits`.
    """
    needs = list(needs_input_grad[:3])
    arguments = (*tensors[:5], *fields, *tensors[5:], needs, own_columns, *settings)
    if traced:
        grads = _backward_operator(*arguments)
    else:
        grads = call_backward(contrastive_backward, *arguments)
    needed = [grad if need else None for grad, need in zip(grads, needs)]  # noqa: B905
    return (*needed, *[None] * (len(needs_input_grad) - len(needed)))


def _engine(settings: Settings, features: Tensor, column_ids: Tensor | None) -> Any:
    """The engine that was planned; in compiled code it is chosen here, when the code runs."""
    compute = engines.module(settings.engine, features)
    if settings.positives:
        assert column_ids is not None
        compute = WithPositives(compute, column_ids)
    return compute


def zero_or_nan(logits: Logits, dtype: torch.dtype) -> Tensor:
    """0, or NaN if a feature is not finite.

    To be added to results with extra negatives: an infinite negative may have the logit -inf, and
    the result would stay finite.
    """
    return ((logits.row_features * 0).sum() + (logits.column_features * 0).sum()).to(dtype)


@takes_fields
def contrastive_forward(
    logits: Logits, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A contrastive term of the global batch, and the fields of `SavedStatistics`.

    logits: of this rank's rows with its own columns or, with "gather", those of all ranks.
    """
    row_features, num_pairs, symmetric = logits.row_features, logits.num_pairs, logits.symmetric
    total_pairs, positives = settings.total_pairs, settings.positives
    ranks = Ranks.from_operator_arguments(settings.group_name, settings.rows_per_rank)
    compute = _engine(settings, row_features, logits.column_ids)
    directions = 2 if symmetric else 1
    with without_autocast(row_features):
        lse = STRATEGIES[settings.strategy].log_sum_exps(compute, logits, ranks)
        num_rows = row_features.shape[0]
        own_pairs = min(num_rows, num_pairs)
        pair_logits, column_pair_logits = lse.pair_logits[:own_pairs], lse.column_pair_logits
        if column_pair_logits is None:
            column_pair_logits = pair_logits
            extra = lse.column_negatives_lse.shape[0] - own_pairs
            if extra > 0:
                column_pair_logits = F.pad(pair_logits, (0, extra), value=-torch.inf)
        loss, row_lse, column_lse, pair_gradient = compute.pair_terms(
            lse.row_negatives_lse[:own_pairs],
            lse.column_negatives_lse,
            pair_logits,
            column_pair_logits,
            logits.first_column,
            1 / (total_pairs * directions),
        )
        if positives:
            shares = 1 - 1 / compute.counts(logits.row_ids)[:own_pairs].to(loss.dtype)
            pairs_part = (shares * pair_logits).sum()
            loss += (pairs_part - logits.logit_scale * lse.other_positives) / total_pairs
            pair_gradient += directions * shares
        if logits.has_extra_negatives:
            loss = loss + zero_or_nan(logits, loss.dtype)
        if ranks.group is not None:
            loss = distributed.wait(distributed.start_all_reduce(loss, "sum", ranks))
        if logits.has_extra_negatives:
            row_lse = F.pad(row_lse, (0, num_rows - own_pairs), value=torch.inf)
            pair_gradient = F.pad(pair_gradient, (0, num_rows - own_pairs))
            column_lse.masked_fill_(column_pair_logits == -torch.inf, torch.inf)
    return loss, row_lse, column_lse, pair_gradient


def _forward_fake(arguments: Any) -> tuple[Tensor, ...]:
    # shape[0], not len: len would make a symbolic size static, and every N would be compiled.
    n = arguments.row_features.shape[0]
    m = arguments.column_features.shape[0] if arguments.symmetric else 0
    new = arguments.logit_scale.new_empty
    return new(()), new((n,)), new((m,)), new((n,))


_forward_operator = register(contrastive_forward, _forward_fake)


@takes_fields
def contrastive_backward(
    logits: Logits,
    saved: SavedStatistics,
    grad: Tensor,
    needs: list[bool],
    own_columns: int,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's rows and its own columns, and its part of the scale's.

    Across W ranks they are W times the gradients of the global loss, as DDP averages.

    logits: as in forward. grad: scalar, the upstream gradient. needs: which of the three to compute
    (other features get an empty one). own_columns: how many columns are this rank's.
    """
    row_features, column_features = logits.row_features, logits.column_features
    ranks = Ranks.from_operator_arguments(settings.group_name, settings.rows_per_rank)
    compute = _engine(settings, row_features, logits.column_ids)
    weight = ranks.size / (settings.total_pairs * (2 if logits.symmetric else 1))
    # Gradients to which more is added, by other ranks or for positives, stay in float32.
    wide = ranks.group is not None or settings.positives
    with without_autocast(row_features):
        row_grad, column_grad, scale_grad = STRATEGIES[settings.strategy].gradients(
            compute, logits, saved, grad, weight, needs, wide, ranks
        )
    return row_grad.to(row_features.dtype), column_grad.to(column_features.dtype), scale_grad


def _backward_fake(arguments: Any) -> tuple[Tensor, ...]:
    column_features, needs = arguments.column_features, arguments.needs
    own_columns = column_features.new_empty(arguments.own_columns, column_features.shape[1])
    row_grad = empty_grad_like(arguments.row_features, needs[0])
    column_grad = empty_grad_like(own_columns, needs[1])
    return row_grad, column_grad, arguments.logit_scale.new_empty(())


_backward_operator = register(contrastive_backward, _backward_fake)

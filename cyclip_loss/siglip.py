"""SigLIP's loss, from the module to the operator, in O(N D) memory (Zhai et al. 2023).

With l_ij = s * I_i . T_j + b, and y_ij = 1 for a pair, else -1:

    L = 1/N * sum_ij log(1 + exp(-y_ij l_ij))

No row or column has to be complete before a gradient is known. So one sweep in forward computes the
loss and all gradients, 6 N^2 D flops, and backward multiplies them by the upstream gradient. If the
loss is not differentiated after all, nothing but time is lost. If no input requires a gradient,
forward computes the value only. Small batches are dense: N x N matrices, in plain PyTorch.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import engines, options
from cyclip_loss.batch import Batch, Plan, Ranks
from cyclip_loss.engines import eager
from cyclip_loss.inputs import prepare, warn_of_mistakes
from cyclip_loss.logits import Gradients, Logits, empty_grad_like
from cyclip_loss.numerics import tensors_of, without_autocast
from cyclip_loss.options import ContrastiveModule, option
from cyclip_loss.plan import make_plan
from cyclip_loss.ranks import collectives
from cyclip_loss.ranks.exchange import STRATEGIES
from cyclip_loss.ranks.groups import uncompiled_if_uneven
from cyclip_loss.terms import cyclic, streamed, sum_of_terms
from cyclip_loss.terms.operators import Operator, first_derivatives


@dataclass(eq=False, repr=False)
class CySigLIPLoss(ContrastiveModule):
    """SigLIP's sigmoid loss (Zhai et al. 2023) with the cyclic penalties, in O(N D) memory.

        loss = 1/N * sum_ij log(1 + exp(-y_ij l_ij))
               + lambda_inmodal * P_in + lambda_crossmodal * P_cross

    with l_ij = logit_scale * I_i . T_j + logit_bias, and y_ij = 1 for a pair, else -1. Called with
    the arguments of `open_clip.SigLipLoss`. With both weights 0, the default, it is SigLIP's loss.
    Beyond N = D no N x N matrix is built: forward computes the loss and all gradients in one sweep
    (6 N^2 D flops), and backward multiplies them by the upstream gradient. If the loss is not
    differentiated after all, nothing but time is lost.

    Args:
        lambda_inmodal, lambda_crossmodal: the weights of the penalties; 0 by default, because a
            weight, 1/64, was shown to help on one small dataset only
            (reference_train/results/siglip). CLIP's 0.25 is too strong.
        dist_impl: "gather" (default, also for None) or "ring". Of OpenCLIP's names, "bidir" and
            "shift" are the ring, and "reduce" is the gather.
        same_ids: what rows with the same id in `ids` are to each other: "ignored" (left out), or
            "positives" (y = 1).
        cache_labels, rank, world_size, chunk_size: OpenCLIP's arguments, kept as attributes
            without effect. A call raises if rank or world_size differ from the process group's,
            except from 0 and 1.
        reference_batch_size, centered, process_group, distributed, uneven, impl: as in
            `CyCLIPLoss`, also across ranks.

    Raises:
        TypeError, ValueError: as `CyCLIPLoss`.

    >>> loss_fn = CySigLIPLoss()
    >>> features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_()
    >>> loss_fn(features, features.detach(), logit_scale=10.0, logit_bias=-10.0).backward()
    """

    # The loss is the sum of f(-y_ij l_ij), with this f of `eager.ELEMENTWISE`. Another elementwise
    # loss is a subclass with another f.
    elementwise = "sigmoid"
    lambda_inmodal: float = option(0.0, options.weight)
    lambda_crossmodal: float = option(0.0, options.weight)
    _: KW_ONLY
    dist_impl: str = option("gather", options.siglip_dist_impl)
    chunk_size: int = 0

    @uncompiled_if_uneven
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,
        negative_image_features: Tensor | None = None,
        negative_text_features: Tensor | None = None,
        negative_image_ids: Tensor | None = None,
        negative_text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss or, with `output_dict`, its weighted terms, which sum to the loss.

        The terms are `contrastive_loss`, `inmodal_cyclic_loss` and `crossmodal_cyclic_loss`. The
        arguments are those of `CyCLIPLoss`, except that `logit_bias` counts: a scalar, whose tensor
        gets its gradient; None is 0. There are no augmented views, which SigLIP's paper does not
        have.

        ids: rows with the same id are left out or, with `same_ids="positives"`, have y = 1.
        negative_image_features, negative_text_features: have y = -1 with all texts, or all images.
        negative_image_ids, negative_text_ids: (M,); logits of rows with the same id are left out.
        """
        batch = prepare(
            self,
            image_features,
            text_features,
            logit_scale,
            output_dict,
            symmetric=False,
            logit_bias=0.0 if logit_bias is None else logit_bias,
            ids=ids,
            negative_image_features=negative_image_features,
            negative_text_features=negative_text_features,
            negative_image_ids=negative_image_ids,
            negative_text_ids=negative_text_ids,
        )
        plan = make_plan(batch, self, output_dict)
        started = streamed.start(batch, plan)
        penalties = cyclic.start(batch, plan)
        loss = elementwise_loss(self.elementwise, batch, plan, started, penalties.grams)
        terms = {"contrastive_loss": loss, **cyclic.terms(batch, penalties, plan, self)}
        warn_of_mistakes(self, batch)
        return terms if output_dict else sum_of_terms(terms.values())


class SigLipLoss(CySigLIPLoss):
    """SigLIP's loss, in place of `open_clip.loss.SigLipLoss`: `CySigLIPLoss` without penalties.

    The same constructor, also by position, the same call and gradients. Across ranks the value is
    that of the global batch. `output_dict=True` gives `contrastive_loss` alone. The methods
    `get_logits` and `get_ground_truth` are not there.

    Args:
        cache_labels, rank, world_size, dist_impl, chunk_size: OpenCLIP's, as in `CySigLIPLoss`.
            `dist_impl=None` is "gather", as in all losses here; OpenCLIP's default is "bidir".
        keywords: options of `CySigLIPLoss`: `same_ids`, `uneven`, `impl` and others.
    """

    returns_zero_terms = False

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        **keywords: Any,
    ) -> None:
        super().__init__(
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
            dist_impl=dist_impl or "gather",
            chunk_size=chunk_size,
            **keywords,
        )


def elementwise_loss(
    function: str,
    batch: Batch,
    plan: Plan,
    started: list[streamed.PendingGather],
    grams: Tensor | None,
) -> Tensor:
    """The loss without penalties, a scalar of the accumulation dtype.

    function: a name in `eager.ELEMENTWISE`; started, grams: as in `streamed.log_sum_exps`.
    """
    bias: Any = batch.logit_bias
    after = tensors_of((started, grams))
    losses: list[Tensor] = []
    for (_, logits, ranks), gathered in zip(batch.comparisons, started):  # noqa: B905
        if plan.contrastive == "dense":
            losses.append(_dense(function, logits, bias))
            continue
        given = (logits.row_features, logits.column_features, logits.logit_scale, bias)
        rows, columns, *scalars = [torch.is_grad_enabled() and x.requires_grad for x in given]
        needs = [rows, columns, any(scalars)]
        inputs = streamed.distinct([*logits, *gathered, ranks, *after])
        loss = _Elementwise.apply(  # type: ignore[no-untyped-call]
            bias, needs, function, plan, *inputs
        )
        losses.append(loss)
        after = [loss.detach()]
    return sum_of_terms(losses) / batch.total_pairs()


def _dense(function: str, logits: Logits, logit_bias: Tensor) -> Tensor:
    """The sum over all elements, without other positives: a scalar."""
    dtype = logits.logit_scale.dtype
    with without_autocast(logits.row_features):
        row_features, column_features = logits.row_features.to(dtype), logits.column_features
        products = row_features @ column_features.to(dtype).T
        x = products.mul(logits.logit_scale).add_(logit_bias)  # l_ij; pairs are negated below
        if logits.has_pairs():
            pairs = x.diagonal()
            detached = pairs.detach()
            # NaN for an infinite pair logit, which would look perfectly matched.
            pairs.neg_().add_(detached - detached)
        same = eager.same_ids_but_pairs(logits, 0, x.shape[0])
        if same is not None:
            x.masked_fill_(same, -torch.inf)
        total: Tensor = eager.ELEMENTWISE[function][0](x).sum()
    return total


class _Elementwise(torch.autograd.Function):
    """The sum over all elements of the global batch: a scalar of the accumulation dtype.

    The inputs are the bias, whether gradients of the rows, the columns and the two scalars are
    needed, the name of the function, the plan, those of `streamed.with_gathered_columns`, and
    what was sent before.
    """

    @staticmethod
    def forward(
        ctx: Any, logit_bias: Tensor, needs: list[bool], function: str, plan: Plan, *inputs: Any
    ) -> Tensor:
        comparison = inputs[: streamed.INPUTS_PER_COMPARISON]
        total: Tensor
        total, *grads = elementwise_step(
            streamed.with_gathered_columns(*comparison),
            function,
            logit_bias,
            needs,
            comparison[1].shape[0],
            plan.impl,
            plan.strategy,
            comparison[-1],
            list(inputs[streamed.INPUTS_PER_COMPARISON :]),
        )
        # The inputs only tell dtypes, and that the gradients depend on them.
        ctx.save_for_backward(*inputs[:3], logit_bias, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        *grads, bias = first_derivatives(_times)(grad, saved[:4], saved[4:])
        return (bias, None, None, None, *grads, *[None] * (len(ctx.needs_input_grad) - 7))


def _times(grad: Tensor, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor]:
    return [(x * grad).to(y.dtype) for x, y in zip(grads, inputs)]  # noqa: B905 (PyTorch 2.8)


def _step(
    logits: Logits,
    function: str,
    logit_bias: Tensor,
    needs: list[bool],
    own_columns: int,
    impl: str,
    strategy: str,
    ranks: Ranks,
    after: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum, and gradients of this rank's rows, its own columns, the scale and the bias.

    The gradients are in the accumulation dtype. Across W ranks they are W times those of the global
    sum, as DDP averages. The first three are empty where not needed; the bias's is not computed if
    nothing is. after: as in `streamed.logsumexp_forward`.
    """
    elementwise_terms = engines.load(impl, logits.row_features).elementwise_terms
    sums = logits.logit_scale.expand(2) * 0.0  # NaN if it is infinite: logits may have no loss

    def block_grads(block: Logits, _: None) -> Gradients:
        grads: Gradients
        part, grads = elementwise_terms(block, logit_bias, function, float(ranks.size), needs)
        sums.add_(part)
        return grads

    grads = STRATEGIES[strategy].gradients(block_grads, logits, None, needs, ranks)
    total = collectives.all_reduce(sums[0].clone(), "sum", ranks)
    return total, *grads, sums[1] * ranks.size


def _step_fake(given: Any) -> tuple[Tensor, ...]:
    logits, bias = given.logits, given.logit_bias
    rows, d = logits.row_features.shape
    shapes = (bias.new_empty(rows, d), bias.new_empty(given.own_columns, d), bias)
    new = bias.new_empty
    return new(()), *map(empty_grad_like, shapes, given.needs), new(())


elementwise_step = Operator("elementwise_step", _step, _step_fake)

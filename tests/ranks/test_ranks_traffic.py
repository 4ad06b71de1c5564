"""Which collectives run, in which order, and how many bytes each: not one more, not one byte."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from inputs import loss_dtype
from pool import Ranks, own_device
from rank_cases import RankCase, evaluate
from test_ranks import DIST_IMPLS, WORLD_SIZES
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import allocations, peak_of
from cyclip_loss import CyCLIPLoss, eager
from cyclip_loss.distributed import Hop

N_PER_RANK, D = 4, 6
WEIGHTS = [(0.25, 0.25), (0.5, 0.125), (0.0, 0.5), (0.0, 0.0)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
Traffic = list[tuple[str, int]]


class Recorder(TorchDispatchMode):
    """Name and bytes of each collective: of its result, of a reduce-scatter and a send its input.

    `CommDebugMode` counts collectives, but neither bytes nor sends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Traffic = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if "c10d" in function.namespace and name != "wait_tensor":
            tensor = result
            if name == "reduce_scatter_tensor":
                tensor = args[0]
            elif name in ("send", "recv_"):
                (tensor,) = args[0]
            if name == "all_reduce":
                name = f"all_reduce {args[1]}"
            elif name == "allgather_":  # twice by `all_gather_object`: of the sizes, of the objects
                self.found.append(("comparison", 0))
                return result
            self.found.append((name, tensor.numel() * tensor.element_size()))
        return result


def traffic(rank: int, world_size: int, case: RankCase, frozen: str = "") -> tuple:
    """Of the second of two steps: forward, backward, and what CommDebugMode counts."""
    for _ in range(2):
        image, text = (features.detach().clone() for features in case.features(rank))
        leaves = [image.requires_grad_(frozen != "image"), text.requires_grad_(frozen != "text")]
        with CommDebugMode() as debug_mode, Recorder() as recorder:
            value = evaluate(case, *leaves, case.scale().requires_grad_())
            forward, recorder.found = recorder.found, []
            if value.requires_grad:
                value.backward()
    counts = {str(op).rpartition(".")[2]: n for op, n in debug_mode.get_comm_counts().items()}
    return forward, recorder.found, counts


def penalties(case: RankCase) -> Traffic:
    """The Gram matrices and the number of rows, if a weight is not 0."""
    if not any(case.lambdas):
        return []
    return [("all_reduce sum", loss_dtype(case.dtype).itemsize * (3 * D * D + 1))]


def check(case: RankCase, forward: Traffic, backward: Traffic, ranks: Ranks, frozen="") -> None:
    counts = Counter(name.split()[0] for name, _ in (*forward, *backward))
    for name in ("send", "recv_"):
        counts.pop(name, None)
    for actual in ranks.run(len(case.rows), traffic, case, frozen):
        if case.dist_impl == "ring":  # in which blocks pass each other
            assert Counter(actual[0]) == Counter(forward)
            assert Counter(actual[1]) == Counter(backward)
        else:
            assert actual[:2] == (forward, backward)
        assert actual[2] == counts


@WORLD_SIZES
@DTYPES
@pytest.mark.parametrize("lambdas", WEIGHTS)
def test_gather(world_size: int, dtype: torch.dtype, lambdas, ranks: Ranks) -> None:
    """As in the table of `CyCLIPLoss`'s docstring."""
    wide, rows = loss_dtype(dtype).itemsize, world_size * N_PER_RANK
    for term in ("loss", "sum"):
        case = RankCase((N_PER_RANK,) * world_size, D, dtype, lambdas=lambdas, term=term)
        forward = [
            ("all_gather_into_tensor", rows * D * dtype.itemsize),
            *penalties(case),
            ("all_reduce max", wide * 2 * rows),  # and the logits of the pairs
            ("all_reduce sum", wide * rows),
            ("all_reduce sum", wide),
        ]
        check(case, forward, [("reduce_scatter_tensor", wide * rows * D)], ranks)


@WORLD_SIZES
@DTYPES
@pytest.mark.parametrize("lambdas", WEIGHTS)
def test_ring(world_size: int, dtype: torch.dtype, lambdas, ranks: Ranks) -> None:
    """As in the table: 2 W - 1 sends forward and 3 W - 2 backward, each with its receive."""
    wide = loss_dtype(dtype).itemsize
    block = N_PER_RANK * D
    for term in ("loss", "sum"):
        case = RankCase((N_PER_RANK,) * world_size, D, dtype, "eager", "ring", term, lambdas)
        forward = sends(world_size - 1, block * dtype.itemsize)
        forward += sends(world_size, 8 * N_PER_RANK)  # log-sum-exps, always float64
        forward += [*penalties(case), ("all_reduce sum", wide)]
        backward = sends(world_size - 1, block * dtype.itemsize)
        backward += sends(world_size - 1, wide * N_PER_RANK)
        backward += sends(world_size, wide * block)
        assert len(backward) == 2 * (3 * world_size - 2)
        check(case, forward, backward, ranks)


def sends(times: int, size: int) -> Traffic:
    return [("send", size), ("recv_", size)] * times


@WORLD_SIZES
@pytest.mark.parametrize("rows", ["even", "uneven"])
def test_penalties_alone(world_size: int, rows: str, ranks: Ranks) -> None:
    """One all-reduce, nothing in backward; also where ranks hold different numbers of rows."""
    counts = (3,) * world_size if rows == "even" else (*range(world_size),)
    for lambdas in [(0.5, 0.125), (0.25, 0.25), (0.0, 0.0)]:
        case = RankCase(counts, D, torch.float32, term="penalty", lambdas=lambdas)
        check(case, penalties(case), [], ranks)


def test_frozen_tower(ranks: Ranks) -> None:
    """No gradient, no journey: without a text gradient backward has nothing to scatter."""
    case = RankCase((N_PER_RANK,) * 3, D, torch.float32)
    found = ranks.run(3, traffic, case, "text")[0]
    assert found[1] == []
    assert len(ranks.run(3, traffic, case, "image")[0][1]) == 1
    case.dist_impl = "ring"
    found = ranks.run(3, traffic, case, "text")[0]
    assert Counter(found[1]) == Counter(sends(2, 4 * N_PER_RANK * D) + sends(2, 4 * N_PER_RANK))


@DIST_IMPLS
def test_uneven_rows_are_exchanged_in_every_step(dist_impl: str, ranks: Ranks) -> None:
    case = RankCase((3, 1, 2), D, torch.float32, dist_impl=dist_impl, uneven=True)
    for forward, backward, _ in ranks.run(3, traffic, case):
        assert forward[:2] == [("comparison", 0)] * 2
        even = ranks.run(3, traffic, RankCase((3,) * 3, D, torch.float32, dist_impl=dist_impl))[0]
        # Shorter blocks are padded to the longest.
        padded = [entry for entry in forward[2:] if not entry[0].startswith("all_reduce")]
        assert padded == [entry for entry in even[0] if not entry[0].startswith("all_reduce")]
        assert backward == even[1]


def exchanges(rank: int, world_size: int, steps: list[tuple[int, dict]]) -> list[int]:
    """How often ranks compare what has to agree in each step, of n rows and some options."""
    found = []
    for n, options in steps:
        weights = options.get("weights", (0.25, 0.25))
        loss = CyCLIPLoss(*weights, dist_impl=options.get("dist_impl", "gather"))
        image, text = (
            torch.eye(n, D, dtype=options.get("dtype"), device=own_device()) for _ in range(2)
        )
        text.requires_grad_(options.get("text_grad", True))
        with Recorder() as recorder, torch.set_grad_enabled(options.get("training", True)):
            loss(image, text, 10.0)
        found.append(recorder.found.count(("comparison", 0)) // 2)
    return found


def test_ranks_compare_once(ranks: Ranks) -> None:
    """Not again when the number of rows or a weight changes, which a schedule may do every step."""
    ranks.leave()
    steps = [(n, {"weights": weights}) for n in (5, 6, 2) for weights in ((0.25, 0.25), (0.1, 0))]
    for found in ranks.run(3, exchanges, steps):
        assert found == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "other",
    [
        {"dist_impl": "ring"},
        {"dtype": torch.float64},
        {"training": False},
        {"text_grad": False},
        {"weights": (0.0, 0.0)},
    ],
    ids=str,
)
def test_each_kind_of_call_is_known_by_itself(other: dict, ranks: Ranks) -> None:
    """An evaluation with other batches between the steps of a training costs it nothing."""
    ranks.leave()
    steps = [(5, {}), (4, other), (5, {}), (4, other), (2, other), (5, {})]
    for found in ranks.run(2, exchanges, steps):
        assert found == [1, 1, 0, 0, 0, 0]


def with_views(rank: int, world_size: int, dist_impl: str) -> tuple[Traffic, Traffic]:
    for _ in range(2):
        features = [
            torch.eye(N_PER_RANK, D, device=own_device()).requires_grad_() for _ in range(4)
        ]
        with Recorder() as recorder:
            loss = CyCLIPLoss(0, 0, dist_impl=dist_impl)(
                *features[:2],
                10.0,
                augmented_image_features=features[2],
                augmented_text_features=features[3],
            )
            forward, recorder.found = recorder.found, []
            loss.backward()
    return forward, recorder.found


def test_augmented_views_travel_once_each(ranks: Ranks) -> None:
    """Their columns have no log-sum-exps, which do not travel."""
    size = 2 * N_PER_RANK * D * 4
    forward, backward = ranks.run(2, with_views, "gather")[0]
    assert [entry for entry in forward if "reduce" not in entry[0]] == [
        ("all_gather_into_tensor", size)
    ] * 3
    assert len(forward) == 3 + 2 + 3
    assert backward == [("reduce_scatter_tensor", size)] * 3
    forward, backward = ranks.run(2, with_views, "ring")[0]
    block = N_PER_RANK * D * 4
    assert Counter(forward)["send", block] == 3
    assert Counter(forward)["send", 8 * N_PER_RANK] == 2
    assert len(forward) == 2 * (3 + 2) + 3
    assert len(backward) == 2 * ((3 - 2) * 1 + 3 * 1 + 3 * 2)


def waits(rank: int, world_size: int, case: RankCase) -> list[tuple[str, tuple[int, ...]]]:
    """What is started and waited for in forward: names and shapes of the results."""
    events = []

    class Events(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.namespace == "_c10d_functional":
                events.append((function.overloadpacket.__name__, tuple(result.shape)))
            return result

    evaluate(case, *case.features(rank), case.scale())
    with Events():
        evaluate(case, *case.features(rank), case.scale())
    return events


def test_travel_and_computation_overlap(ranks: Ranks) -> None:
    """The Gram matrices are under way when the columns are waited for, and the last to be."""
    case = RankCase((N_PER_RANK,) * 2, D, torch.float32, lambdas=(0.5, 0.125))
    for events in ranks.run(2, waits, case):
        columns, grams = (2 * N_PER_RANK, D), (3 * D * D + 1,)
        assert events[:3] == [
            ("all_gather_into_tensor", columns),
            ("all_reduce", grams),
            ("wait_tensor", columns),
        ]
        assert events[-1] == ("wait_tensor", grams)


def events_of_a_ring(rank: int, world_size: int, case: RankCase) -> list[str]:
    """When blocks set out, are multiplied, and are waited for, forward and backward."""
    events = []

    def noted(owner: object, name: str, what: str) -> None:
        original = getattr(owner, name)

        def note(*arguments: object, **options: object) -> object:
            events.append(what)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, note)

    inputs = [*(features.clone().requires_grad_() for features in case.features(rank))]
    with pytest.MonkeyPatch.context() as monkeypatch:
        noted(dist, "batch_isend_irecv", "go")
        noted(Hop, "finish", "wait")
        noted(eager, "contrastive_lse", "multiply")
        noted(eager, "contrastive_grads", "multiply")
        evaluate(case, *inputs, case.scale()).backward()
    return events


def test_blocks_travel_while_others_are_multiplied(ranks: Ranks) -> None:
    case = RankCase((N_PER_RANK,) * 3, D, dist_impl="ring", lambdas=(0, 0))
    for events in ranks.run(3, events_of_a_ring, case):
        assert events == [*["go", "multiply", "wait"] * 3, "go", "wait"] * 2


def largest_result(rank: int, world_size: int, case: RankCase) -> int:
    """Elements of the largest tensor that any operation of a step gives."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            tensors = result if isinstance(result, (tuple, list)) else [result]
            sizes = [one.numel() for one in tensors if isinstance(one, torch.Tensor)]
            largest = max([largest, *sizes])
            return result

    inputs = [*(features.clone().requires_grad_() for features in case.features(rank))]
    evaluate(case, *inputs, case.scale())  # in the first call ranks compare what has to agree
    with Sizes():
        evaluate(case, *inputs, case.scale()).backward()
    return largest


def test_a_ring_holds_no_more_than_a_block(ranks: Ranks) -> None:
    """O(n D) memory: nothing grows with the number of ranks, not even with N."""
    n, d = 8, 16
    for world_size in (2, 4):
        case = RankCase((n,) * world_size, d, dist_impl="ring", lambdas=(0, 0))
        assert set(ranks.run(world_size, largest_result, case)) == {n * d}
    case.dist_impl = "gather"
    assert set(ranks.run(4, largest_result, case)) == {4 * n * d}


def peak_bytes(rank: int, world_size: int, case: RankCase) -> int:
    """The most that a step holds at a time, beyond its inputs."""
    inputs = [*(features.clone().requires_grad_() for features in case.features(rank))]
    evaluate(case, *inputs, case.scale()).backward()
    return peak_of(allocations(lambda: evaluate(case, *inputs, case.scale()).backward()))


def test_a_ring_holds_as_much_whatever_the_ranks(ranks: Ranks) -> None:
    """All blocks together, too: what is done with is freed before the next step."""
    n, d = 8, 64
    case = RankCase((n,) * 3, d, torch.float32, dist_impl="ring", lambdas=(0, 0))
    # From three on, there are steps in which blocks leave and come of both kinds.
    three = max(ranks.run(3, peak_bytes, case))
    four = max(ranks.run(4, peak_bytes, replace(case, rows=(n,) * 4)))
    assert four <= 1.02 * three
    of_gather = [
        max(ranks.run(w, peak_bytes, replace(case, rows=(n,) * w, dist_impl="gather")))
        for w in (3, 4)
    ]
    assert of_gather[1] > 1.15 * of_gather[0]


def alone(rank: int, world_size: int) -> list:
    """The traffic of a group of this process only."""
    groups = [dist.new_group([member]) for member in range(world_size)]
    image, text = (
        torch.eye(3, device=own_device()).roll(rank, 0).requires_grad_() for _ in range(2)
    )
    with CommDebugMode() as debug_mode, Recorder() as recorder:
        for dist_impl in ("gather", "ring"):
            loss = CyCLIPLoss(process_group=groups[rank], dist_impl=dist_impl)
            loss(image, text, 10.0).backward()
    return [*recorder.found, *debug_mode.get_comm_counts()]


def test_a_group_of_one_does_not_communicate(ranks: Ranks) -> None:
    assert ranks.run(2, alone) == [[], []]

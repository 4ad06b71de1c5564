"""Compiled code whose collectives have one order on all ranks."""

from itertools import combinations

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

# Our operators with collectives. (Those of one process have none, but are the same operators.)
OPERATORS = ("logsumexp_forward", "contrastive_backward", "elementwise_step")


def _is_operator(node):
    return any(str(node.target).startswith(f"cyclip_loss.{name}") for name in OPERATORS)


def _communicates(node):
    is_collective = str(node.target).startswith("_c10d_functional.")
    return _is_operator(node) or (is_collective and "wait" not in str(node.target))


def unordered(graph):
    """The pairs of nodes that communicate, and of which neither depends on the other.

    Inductor keeps PyTorch's own collectives in order, so such pairs are left out.
    """
    needs = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        needs[node] = {*inputs, *(earlier for x in inputs for earlier in needs[x])}
    communicating = [node for node in graph.nodes if _communicates(node)]
    return [
        (str(first.target), str(second.target))
        for first, second in combinations(communicating, 2)
        if (_is_operator(first) or _is_operator(second)) and first not in needs[second]
    ]


def in_order(module, inputs):
    """The backend "aot_eager", which raises unless data alone give all collectives one order.

    Inductor moves operators by the sizes of tensors, which may differ between ranks.
    """

    def check(traced, _):
        assert not unordered(traced.graph), unordered(traced.graph)
        return make_boxed_func(traced.forward)

    return aot_autograd(fw_compiler=check, bw_compiler=check)(module, inputs)

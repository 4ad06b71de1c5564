"""How many kernels a step launches, and that no batch makes Triton compile again."""

import pytest
from processes import run_python

LAUNCHES = """
import sys, torch
sys.path.append("tests")
from inputs import Case
from launches import launched_kernels, no_device
from cyclip_loss import CyCLIPLoss, reference
"""


def without_interpreter(code: str) -> list[str]:
    """The lines printed in a new process in which kernels are compiled, not interpreted."""
    run = run_python("-W", "ignore", "-c", LAUNCHES + code, interpreted=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


def test_no_batch_makes_triton_compile_again() -> None:
    """Batches of any size, stride and alignment use the binaries that two aligned batches made."""
    code = """
loss = CyCLIPLoss(0.5, 0.25, impl="triton")

def step(*inputs, ids=None):
    loss(*(x.requires_grad_() for x in inputs), ids=ids).backward()

def shifted(x, offset):
    # A copy that starts `offset` elements after an aligned address.
    moved = x.detach().new_empty(x.numel() + offset)[offset:].view(x.shape)
    return moved.copy_(x.detach())

def wide(x, columns):
    # A copy whose rows are `columns` elements further apart.
    return x.detach().new_empty(len(x), x.shape[1] + columns)[:, : x.shape[1]].copy_(x.detach())

for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for d in (64, 70):
        with no_device() as (_, binaries):
            for n in (64, 4096):
                step(*Case(n, d, dtype).inputs("cpu"))
                step(*Case(n, d, dtype).inputs("cpu"), ids=torch.arange(n))
            known = set(binaries)
            for n in (1, 2, 16, 63, 255, 257, 1000, 2049, 4099):
                image, text, scale = Case(n, d, dtype).inputs("cpu")
                step(image, text, scale)
                step(shifted(image, 1), shifted(text, 3), shifted(scale, 1))
                step(wide(image, 1), wide(text, 16), shifted(scale, 2))
                step(image, text, scale, ids=shifted(torch.arange(n), 1))
                step(image.T.contiguous().T, text[:1].expand(n, d), scale)
        print(dtype, d, len(known), sorted(set(binaries) - known))
"""
    lines = without_interpreter(code)
    assert len(lines) == 6
    for line in lines:
        assert line.endswith(" []"), line
        assert int(line.split()[2]) >= 9, line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_launches_at_most_16_kernels(dtype: str) -> None:
    """Without penalties a step launches at most 10. The dense formula launches more than 60."""
    code = f"""
lambda_pairs = ((0.25, 0.25), (0.5, 0.25), (0, 0))
losses = {{lambdas: CyCLIPLoss(*lambdas, impl="triton") for lambdas in lambda_pairs}}
losses["dense"] = lambda *inputs: sum(reference.cyclip_loss(*inputs).values())
for n, d in ((64, 128), (1000, 256), (3000, 512), (8192, 128)):
    for name, loss in losses.items():
        if name != "dense" or n < 2000:
            print(n, d, len(launched_kernels(loss, n, d, torch.{dtype})), name, sep="|")
"""
    lines = [line.split("|") for line in without_interpreter(code)]
    assert len(lines) == 14
    for n, d, launches, name in lines:
        if name == "dense":
            assert int(launches) > 60
        else:
            assert 0 < int(launches) <= (10 if name == "(0, 0)" else 16), (n, d, launches, name)


def test_a_loss_from_log_sum_exps_launches_at_most_17_kernels_or_26_if_symmetric() -> None:
    """7 and 13 of them belong to the PyTorch code of the two losses below."""
    code = """
from cyclip_loss import contrastive_logsumexp
from torch.nn.functional import softplus

def one_way(*inputs):
    row, _, pair = contrastive_logsumexp(*inputs, one_way=True, impl="triton")
    return softplus(row - pair).mean()

def both_ways(*inputs):
    row, column, pair = contrastive_logsumexp(*inputs, impl="triton")
    return (softplus(row - pair) + softplus(column - pair)).mean() / 2

for loss in (one_way, both_ways):
    print(len(launched_kernels(loss, 1000, 256, torch.bfloat16)))
"""
    one_way, both_ways = map(int, without_interpreter(code))
    assert one_way <= 17
    assert both_ways <= 26

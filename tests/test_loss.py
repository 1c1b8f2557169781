"""The chunked loss: its number formats, its extremes, and that it is not paid for twice."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_causal_lm import operands
from trainkit.tasks import loss
from trainkit.tasks.loss import summed_loss


@pytest.fixture(autouse=True)
def three_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gone over in blocks of seven rows."""
    monkeypatch.setattr(loss, "WHOLE", 0)
    monkeypatch.setattr(loss, "CHUNK", 20 * 7000)
    monkeypatch.setattr(loss, "BLOCK", 7 * 7000)


def exact(hidden: Tensor, unembed: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and its gradients in float64, by torch."""
    wide = [t.detach().double().requires_grad_() for t in (hidden, unembed)]
    total = F.cross_entropy(F.linear(*wide).flatten(0, 1), labels.flatten(), reduction="sum")
    return total.detach(), torch.autograd.grad(total, wide)


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_gradcheck() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    unembed = torch.randn(6, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, -100, 2, 2])
    loss.CHUNK = 12
    assert torch.autograd.gradcheck(lambda h, w: summed_loss(h, w, labels), (hidden, unembed))


@pytest.mark.parametrize("size", [50.0, 1000.0])
def test_large_logits_do_not_overflow(size: float) -> None:
    hidden, unembed, labels = operands(torch.float32)
    hidden = (hidden * size).detach().requires_grad_()
    found = summed_loss(hidden, unembed, labels)
    grads = torch.autograd.grad(found, [hidden, unembed])
    total, wanted = exact(hidden, unembed, labels)
    assert far(found.detach(), total) < 1e-5
    assert all(far(g, w) < 1e-4 for g, w in zip(grads, wanted, strict=True))


def test_a_bfloat16_model_gets_bfloat16_gradients_of_a_float32_loss() -> None:
    hidden, unembed, labels = operands(torch.bfloat16)
    found = summed_loss(hidden, unembed, labels)
    grads = torch.autograd.grad(found, [hidden, unembed])
    total, wanted = exact(hidden, unembed, labels)
    assert found.dtype == torch.float32
    assert far(found.detach(), total) < 1e-3
    assert all(far(g, w) < 2e-2 and g.dtype == torch.bfloat16 for g, w in zip(grads, wanted, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
def test_autocast_multiplies_narrow_and_adds_wide(dtype: torch.dtype, tolerance: float) -> None:
    """Also what a float16 scaler asks for: gradients times 65536."""
    hidden, unembed, labels = operands(torch.float32)
    formats = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                formats.add(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    with Products(), torch.autocast("cpu", dtype=dtype):
        found = summed_loss(hidden, unembed, labels)
    assert formats == {dtype}
    assert found.dtype == torch.float32
    grads = torch.autograd.grad(found * 65536, [hidden, unembed])
    total, wanted = exact(hidden, unembed, labels)
    assert far(found.detach(), total) < tolerance / 4
    for grad, wide in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert far(grad / 65536, wide) < tolerance


def test_many_chunks_add_up_wide() -> None:
    """In bfloat16 a sum of a thousand parts would stand still long before its end."""
    hidden = torch.ones(1024, 2, requires_grad=True)
    unembed = torch.zeros(8, 2, requires_grad=True)
    labels = torch.zeros(1024, dtype=torch.int64)
    loss.CHUNK = 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = summed_loss(hidden, unembed, labels)
    (grad,) = torch.autograd.grad(found, [unembed])
    torch.testing.assert_close(grad[0], torch.full((2,), -1024 * 7 / 8), rtol=1e-6, atol=0)
    assert float(found.detach()) == pytest.approx(1024 * float(torch.tensor(8.0).log()), rel=1e-4)


def test_float64_is_not_autocast() -> None:
    hidden, unembed, labels = operands(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = summed_loss(hidden, unembed, labels)
    assert far(found.detach(), exact(hidden, unembed, labels)[0]) < 1e-13


def test_a_small_vocabulary_has_a_wide_loss_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "WHOLE", 1 << 22)
    hidden, unembed, labels = operands(torch.float32, vocab=300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = summed_loss(hidden, unembed, labels)
    assert found.dtype == torch.float32
    assert far(found.detach(), exact(hidden, unembed, labels)[0]) < 1e-3


class Calls(TorchDispatchMode):
    """Counts matrix products and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.products += func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_three_products_a_chunk_and_never_all_logits() -> None:
    hidden, unembed, labels = operands(torch.float32)
    with Calls() as calls:
        summed_loss(hidden, unembed, labels).backward()
    assert calls.products == 3 * 3  # 60 tokens in chunks of 20: logits and two gradients each
    assert calls.largest == 20 * 7000


def test_what_is_frozen_costs_nothing() -> None:
    hidden, unembed, labels = operands(torch.float32)
    _, wanted = exact(hidden, unembed, labels)
    with Calls() as calls:
        (grad,) = torch.autograd.grad(summed_loss(hidden, unembed.detach(), labels), [hidden])
    assert calls.products == 2 * 3
    assert far(grad, wanted[0]) < 1e-5
    with Calls() as calls:
        (grad,) = torch.autograd.grad(summed_loss(hidden.detach(), unembed, labels), [unembed])
    assert calls.products == 2 * 3
    assert far(grad, wanted[1]) < 1e-5
    with Calls() as calls, torch.no_grad():
        summed_loss(hidden, unembed, labels)
    assert calls.products == 3


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_a_compiler_gets_the_same_loss(dtype: torch.dtype, near: float, wanted: tuple[bool, bool]) -> None:
    """What it is given to compile is written another way, without buffers."""
    hidden, unembed, labels = operands(dtype)
    hidden, unembed = (t.detach().requires_grad_(w) for t, w in zip((hidden, unembed), wanted, strict=True))
    total, grads = exact(hidden, unembed, labels)
    torch._dynamo.reset()
    found = torch.compile(summed_loss, backend="aot_eager", fullgraph=True)(hidden, unembed, labels)
    assert far(found.detach(), total) < near
    (found * 3).backward()
    for tensor, grad, want in zip((hidden, unembed), grads, wanted, strict=True):
        assert (tensor.grad is not None) == want
        assert not want or (tensor.grad.dtype == dtype and far(tensor.grad, 3 * grad) < near)  # type: ignore[union-attr]


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_compiled_gradient_is_wide_wherever_it_is_added_or_scaled(chunks: int) -> None:
    hidden, unembed, labels = operands(torch.float32)
    loss.CHUNK *= 3 if chunks == 1 else 1

    def grads(factor: float) -> list[Tensor]:
        torch._dynamo.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.compile(summed_loss, backend="aot_eager", fullgraph=True)(hidden, unembed, labels)
        return list(torch.autograd.grad(found * factor, [hidden, unembed]))

    whole, part = grads(1.0), grads(1 / 3)
    assert all(torch.equal(w * (1 / 3), p) for w, p in zip(whole, part, strict=True))
    narrow = float((whole[1] == whole[1].bfloat16()).float().mean())
    assert narrow == 1 if chunks == 1 else narrow < 0.5


def test_a_compiled_loss_never_holds_all_logits() -> None:
    hidden, unembed, labels = operands(torch.float32)
    most = 0

    def largest(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal most
        for node in graph.graph.nodes:
            if isinstance(value := node.meta.get("example_value"), Tensor):
                most = max(most, value.numel())
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(summed_loss, backend=largest, fullgraph=True)(hidden, unembed, labels)
    assert far(found, exact(hidden, unembed, labels)[0]) < 1e-5
    assert unembed.numel() <= most <= max(unembed.numel(), 21 * 7000)

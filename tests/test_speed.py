"""How the machine is used changes nothing that is learned beyond the order of sums."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from trainkit import build
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.learner import Learner
from trainkit.models import kernels
from trainkit.models.attention import Attention
from trainkit.models.decoder import Decoder
from trainkit.models.kernels import additive, attend, attention_mask
from trainkit.models.mlp import MLP
from trainkit.speed import ALLOCATOR, Speed, stay

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROWS, LENGTH = 2, 40
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 27, [0] * 1 + [1] * 30 + [2] * 9], dtype=torch.int32)


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def flex_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would take seconds a shape."""
    monkeypatch.setattr(kernels, "_flex", lambda: flex_attention)


def heads(groups: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    q, k, v = (torch.randn(ROWS, n, LENGTH, 8, dtype=torch.float64) for n in (4, groups, groups))
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None) -> Tensor:
    """Position by position."""
    out = torch.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for row in range(ROWS):
        for head in range(q.shape[1]):
            for t in range(LENGTH):
                seen = [
                    s
                    for s in range(t + 1)
                    if (window is None or s > t - window)
                    and (documents is None or documents[row, s] == documents[row, t])
                ]
                scores = q[row, head, t] @ k[row, head // share, seen].T / q.shape[-1] ** 0.5
                out[row, head, t] = scores.softmax(-1) @ v[row, head // share, seen]
    return out


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("groups", [4, 2])
def test_a_kernel_sees_what_it_may(kernel: Any, window: int | None, documents: Tensor | None, groups: int) -> None:
    q, k, v = heads(groups)
    mask = attention_mask(documents, LENGTH, LENGTH, window, CPU, kernel)
    masked = documents is not None or window == 7
    assert (mask is None) == (not masked)
    assert (kernel == "flex" and masked) == (mask is not None and not isinstance(mask, Tensor))
    with torch.no_grad():
        found = attend(q, k, v, additive(mask, q), kernel, window=window, dropout=0.0)
    torch.testing.assert_close(found, by_hand(q, k, v, documents, window), rtol=1e-9, atol=1e-9)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package of flash-attn's signature that computes by hand, and what it was asked."""
    asked: list[dict[str, Any]] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        asked.append(how)
        left, right = how["window_size"]
        assert how["causal"]
        assert right in (-1, 0)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return by_hand(q, k, v, None, None if left == -1 else left + 1).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    return asked


@pytest.mark.parametrize("window", [None, 7])
def test_flash_gets_heads_last_and_the_window(flash: list[dict[str, Any]], window: int | None) -> None:
    q, k, v = heads(2)
    mask = attention_mask(None, LENGTH, LENGTH, window, CPU, "flash")
    found = attend(q, k, v, mask, "flash", window=window, dropout=0.25)
    torch.testing.assert_close(found, by_hand(q, k, v, None, window), rtol=1e-9, atol=1e-9)
    assert [how["dropout_p"] for how in flash] == [0.25]


def test_flash_leaves_documents_and_generation_to_torch(flash: list[dict[str, Any]]) -> None:
    q, k, v = heads()
    mask = attention_mask(DOCUMENTS, LENGTH, LENGTH, 7, CPU, "flash")
    found = attend(q, k, v, additive(mask, q), "flash", window=7, dropout=0.0)
    torch.testing.assert_close(found, by_hand(q, k, v, DOCUMENTS, 7), rtol=1e-9, atol=1e-9)
    last = attention_mask(None, 1, LENGTH, 7, CPU, "flash")
    found = attend(q[:, :, -1:], k, v, additive(last, q), "flash", window=7, dropout=0.0)
    torch.testing.assert_close(found[:, :, 0], by_hand(q, k, v, None, 7)[:, :, -1], rtol=1e-9, atol=1e-9)
    assert not flash


def test_a_model_uses_the_kernel_that_it_is_told(flash: list[dict[str, Any]]) -> None:
    cfg = Decoder(
        vocab=50, width=32, depth=3, context=LENGTH, attention=Attention(heads=4, window=9), mlp=MLP(activation="gelu")
    )
    torch.manual_seed(0)
    backbone = cfg.build().double()
    tokens = torch.randint(0, 50, (ROWS, LENGTH))
    with torch.no_grad():
        plain = backbone(tokens)
        backbone.use_attention("flash")
        torch.testing.assert_close(backbone(tokens), plain, rtol=1e-9, atol=1e-9)
        assert len(flash) == 3
        backbone.use_attention("flex")
        torch.testing.assert_close(backbone(tokens, DOCUMENTS[:, :LENGTH]), _plain(backbone, tokens), rtol=1e-9, atol=0)
    assert len(flash) == 3


def _plain(backbone: Any, tokens: Tensor) -> Tensor:
    backbone.use_attention("sdpa")
    found: Tensor = backbone(tokens, DOCUMENTS[:, :LENGTH])
    return found


def test_layers_share_one_mask() -> None:
    cfg = Decoder(vocab=50, width=32, depth=4, context=LENGTH, attention=Attention(heads=4), mlp=MLP(activation="gelu"))
    backbone = cfg.build()
    held: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (LENGTH, LENGTH):
            held.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = backbone(torch.randint(0, 50, (ROWS, LENGTH)), DOCUMENTS)
    assert len(held) == 1
    del out


def test_an_additive_mask_is_the_bool_one_to_the_bit() -> None:
    q, k, v = (x.float() for x in heads())
    mask = attention_mask(DOCUMENTS, LENGTH, LENGTH, None, CPU)
    plain = attend(q, k, v, mask, "sdpa", window=None, dropout=0.0)
    assert torch.equal(attend(q, k, v, additive(mask, q), "sdpa", window=None, dropout=0.0), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert additive(mask, q).dtype == torch.bfloat16
    assert additive(None, q) is None


def test_threads_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        Speed(threads=1).begin(CPU, torch.float32)
        assert torch.get_num_threads() == 1
        parts = []
        for rank in range(2):
            os.sched_setaffinity(0, before)
            stay(rank, 2)
            parts.append(os.sched_getaffinity(0))
        assert parts[0] | parts[1] == before
        assert len(before) == 1 or not parts[0] & parts[1]
        os.sched_setaffinity(0, before)
        monkeypatch.setenv("LOCAL_RANK", "1000")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1001")
        Speed(affinity=True).begin(CPU, torch.float32)
        assert len(os.sched_getaffinity(0)) == 1
        assert "on cores" in Speed(affinity=True).describe(CPU)["speed"]
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def test_the_allocator_is_set_for_a_gpu_unless_a_person_did(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    Speed().begin(CPU, torch.float32)
    assert not any(name in os.environ for name in ALLOCATOR)
    assert Speed().describe(CPU) == {}
    Speed().begin(GPU, torch.float32)
    assert os.environ[ALLOCATOR[0]] == "expandable_segments:True"
    assert Speed().describe(GPU) == {"speed": "PYTORCH_ALLOC_CONF=expandable_segments:True"}
    monkeypatch.delenv(ALLOCATOR[0])
    monkeypatch.setenv(ALLOCATOR[1], "max_split_size_mb:64")
    Speed().begin(GPU, torch.float32)
    assert ALLOCATOR[0] not in os.environ
    assert Speed().describe(GPU) == {"speed": "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["speed.attention=flash"], "speed.attention=flash trains on an NVIDIA GPU only"),
        (["speed.attention=flex"], "speed.attention=flex trains on an NVIDIA GPU only"),
        (["speed.cuda_graphs=true", "compile=full"], "speed.cuda_graphs needs an NVIDIA GPU"),
        (["speed.cuda_graphs=true"], "add compile=blocks or compile=full"),
        (["speed.cuda_graphs=true", "compile=full", "memory.microbatch=2"], "takes a step's rows at once"),
        (["speed.attention=flex", "model.dropout=0.1"], "speed.attention=flex has no dropout"),
        (["speed.threads=4096"], "is more than the"),
        (["speed.attention=flsh"], "flash"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build.check(runs.composed([*overrides, "parallel.device=cpu"]))


def test_flash_needs_16_bits_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="16 bits"):
        Speed(attention="flash").check(GPU, torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install flash-attn"):
        Speed(attention="flash").check(GPU, torch.bfloat16)


@pytest.mark.parametrize("how", ["blocks", "full"])
def test_graphs_are_recorded_by_the_compiler(
    how: str, learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: modes.append(mode))
    learner(f"compile={how}", "speed.cuda_graphs=true")
    learner(f"compile={how}")
    half = len(modes) // 2
    assert modes == ["reduce-overhead"] * half + [None] * half
    assert half == (2 if how == "blocks" else 1)


FAULTS = """
import resource, torch
from trainkit.speed import Speed
Speed(keep_freed={keep}).begin(torch.device("cpu"), {dtype})
for _ in range(20):
    torch.ones(16 << 20)  # 64 MiB
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
@pytest.mark.parametrize(
    ("keep", "dtype", "kept"),
    [
        (True, torch.float32, True),
        (None, torch.bfloat16, True),
        (None, torch.float32, False),
        (False, "torch.half", False),
    ],
)
def test_memory_that_tensors_leave_is_not_cleared_again(keep: bool | None, dtype: Any, kept: bool) -> None:
    program = [sys.executable, "-c", FAULTS.format(keep=keep, dtype=dtype)]
    faults = int(subprocess.run(program, capture_output=True, check=True).stdout)
    pages = 10 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert (faults < pages / 100) if kept else (faults > pages / 600)  # pages may be huge ones

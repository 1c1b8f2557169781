"""States of few bits in a run: the arithmetic, how near the loss stays, resuming, changing the format on the way."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import SMALL, weights
from trainkit import build, launch, optimizers
from trainkit import run as runs
from trainkit.checkpoint import find, load, store
from trainkit.errors import UserError
from trainkit.learner import Learner
from trainkit.optimizers import SGD, AdamW, Muon, low_bit
from trainkit.optimizers.coding import Coded
from trainkit.optimizers.formats import CODES, SIGNED, dequantize, quantize
from trainkit.optimizers.low_bit import Keeping
from trainkit.optimizers.sharded import state_in
from trainkit.optimizers.state import load_named_state, named_state, places

ALL = {
    "adamw": AdamW(lr=0.01, weight_decay=0.1),
    "sgd": SGD(lr=0.01, momentum=0.9, weight_decay=0.1),
    "nesterov": SGD(lr=0.01, momentum=0.9, nesterov=True),
    "plain": SGD(lr=0.01, momentum=0.0),
    "muon": Muon(lr=0.01, adamw_lr=0.003),
}
MOMENTS = {"adamw": "mvmvmv", "sgd": "bbb", "nesterov": "bbb", "muon": "mvbb"}  # moments of the three matrices
FORMATS = {"8bit": "int8", "4bit": "int4", "fp8": "fp8"}
WIDE = ["model.width=72", "memory.microbatch=2"]  # rows that are no whole blocks


class Small(nn.Module):
    """Rows of whole blocks, of less than one, of one and a bit; and what is too small."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 128)
        self.blocks = nn.ModuleList([nn.Linear(200, 33), nn.Linear(100, 64)])
        self.norm = nn.LayerNorm(8)
        self.to(dtype)


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, begin: int = 0, skip: float = 0.0) -> None:
    for step in range(begin, begin + steps):
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.grad = drawn.to(parameter.grad_dtype or parameter.dtype)
        optimizers.step(optimizer, torch.tensor(skip))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_without_a_format_it_is_torchs_arithmetic(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit, "CPU_CHUNK", 1000)
    plain, ours = Small(dtype), Small(dtype)
    take(plain, ALL[name].build(plain), 8)
    take(ours, ALL[name].build(ours, Keeping()), 8)
    close = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(flat(ours), flat(plain), rtol=close, atol=close)


@pytest.mark.parametrize("format_", CODES)
@pytest.mark.parametrize("name", ["adamw", "sgd", "nesterov", "muon"])
def test_a_step_is_that_of_the_decoded_states(name: str, format_: str) -> None:
    """Against torch's optimizer in float64, whose states are replaced by the decoded ones before every step."""
    model, reference = Small(torch.float64), Small(torch.float64)
    optimizer, theirs = ALL[name].build(model, Keeping(format_)), ALL[name].build(reference)
    for step in range(4):
        if step:
            load_named_state(reference, theirs, {k: v.clone() for k, v in named_state(model, optimizer).items()})
            assert not any(format_ in key for key in named_state(reference, theirs))
        take(model, optimizer, 1, begin=step)
        assert sum(key.endswith(f"_{format_}_scale") for key in named_state(model, optimizer)) == len(MOMENTS[name])
        take(reference, theirs, 1, begin=step)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            numbers = state_in(None, p, optimizer.state[p])
            for moment in numbers.keys() - {"step"}:  # what is kept is what the step made
                made = theirs.state[q][moment]
                assert float((numbers[moment] - made).norm()) < (0.4 if format_ == "int4" else 0.06) * float(
                    made.norm()
                )
        torch.testing.assert_close(flat(model), flat(reference), rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                q.copy_(p)


@pytest.mark.parametrize("format_", CODES)
def test_what_is_held(format_: str) -> None:
    model = Small()
    optimizer = ALL["adamw"].build(model, Keeping(format_))
    take(model, optimizer, 1)
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in named_state(model, optimizer).items()}
    half = 2 if format_ == "int4" else 1
    for name, rows, width in (("embed.weight", 40, 128), ("blocks.0.weight", 33, 200), ("blocks.1.weight", 64, 100)):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert shapes[f"{name}.{moment}_{format_}"] == ((rows, math.ceil(width / half)), torch.uint8)
            assert shapes[f"{name}.{moment}_{format_}_scale"] == ((rows, math.ceil(width / 128)), torch.float32)
        assert f"{name}.exp_avg" not in shapes
    for name in ("blocks.0.bias", "norm.weight"):
        assert shapes[f"{name}.exp_avg"][1] == shapes[f"{name}.exp_avg_sq"][1] == torch.float32
    big = nn.Linear(1024, 512, bias=False)
    optimizer = ALL["adamw"].build(big, Keeping(format_))
    take(big, optimizer, 1)
    held = sum(t.nbytes for t in optimizer.state[big.weight].values()) / big.weight.numel()
    assert held <= {"int8": 2.1, "fp8": 2.1, "int4": 1.1}[format_]


@pytest.mark.parametrize("format_", [None, *CODES])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("before", [0, 2])
def test_an_update_that_must_not_be_made_changes_nothing(name: str, format_: str | None, before: int) -> None:
    """Asked on the host, as on a CPU, and on the device, where nobody waits."""
    made = []
    for on_device in (False, True):
        model = Small()
        optimizer = ALL[name].build(model, Keeping(format_))
        take(model, optimizer, before)
        kept, named = flat(model).clone(), {k: v.clone() for k, v in named_state(model, optimizer).items()}

        def step(skip: float, optimizer: torch.optim.Optimizer = optimizer, on_device: bool = on_device) -> None:
            if on_device:
                for group in optimizer.param_groups:
                    optimizer._step_group(group, group["params"], torch.tensor(skip))  # type: ignore[operator]
            else:
                optimizers.step(optimizer, torch.tensor(skip))

        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        with torch.no_grad():
            step(1.0)
            assert torch.equal(flat(model), kept)
            after = named_state(model, optimizer)
            assert all(torch.equal(after[k], v) for k, v in named.items())
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            step(0.0)
        assert not torch.equal(flat(model), kept)
        made.append(flat(model).clone())
    assert torch.equal(*made)


@pytest.mark.parametrize("format_", ["int8", "int4"])
def test_chunks_do_not_matter(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Small(), Small()
    take(whole, ALL["adamw"].build(whole, Keeping(format_)), 3)
    monkeypatch.setattr(low_bit, "CPU_CHUNK", 300)
    take(parts, ALL["adamw"].build(parts, Keeping(format_)), 3)
    assert torch.equal(flat(parts), flat(whole))


def test_what_lies_in_between_is_a_chunk() -> None:
    """No float32 copy of a parameter's states, or of anything else of its size, is ever made."""
    model = nn.Linear(4096, 1024, bias=False)
    optimizer = ALL["adamw"].build(model, Keeping("int8"))
    take(model, optimizer, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        optimizer.step()
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0 < most < 20 * 4 * low_bit.CPU_CHUNK
    assert most < 0.5 * 4 * model.weight.numel() * 3  # p, m and v: far less than one of these


@pytest.mark.parametrize(("memory", "optimizer"), [("8bit", "adamw"), ("4bit", "muon"), ("fp8", "sgd")])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(
    trained: Callable[..., build.Trainer], memory: str, optimizer: str
) -> None:
    how = [*WIDE, f"memory={memory}", f"optimizer={optimizer}"]
    whole = trained(*how, name="whole")
    trained(*how, "stop_at=3", name="parts")
    parts = trained(*how, name="parts")
    ours, theirs = (t.learner.tensors() for t in (parts, whole))
    assert any(f"_{FORMATS[memory]}_scale" in key for key in ours)
    assert all(torch.equal(ours[k], v) for k, v in theirs.items() if not k.startswith("random."))


STATES = {"baseline": None, **FORMATS}


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [("baseline", "8bit", 0.02), ("8bit", "baseline", 0.0), ("8bit", "4bit", 0.3), ("4bit", "fp8", 0.06)],
)
def test_the_format_may_change_on_resume(
    trained: Callable[..., build.Trainer], one: str, other: str, near: float
) -> None:
    trained(*WIDE, f"memory={one}", "stop_at=3", name="t")
    before = load(find.resolve("t", Path("runs"), launch.policy)).tensors
    run = runs.composed([*SMALL, *WIDE, f"memory={other}", "name=t"])
    with build.trainer(run, Path("runs/t")) as trainer:
        found = trainer.learner.tensors()
        for name in ("backbone.blocks.0.attention.qkv.weight", "backbone.embed.weight"):
            for moment in ("exp_avg", "exp_avg_sq"):
                key = f"optimizer.{name}.{moment}"
                was, now = numbers_of(before, key, STATES[one]), numbers_of(found, key, STATES[other])
                assert float((was - now).norm()) <= near * float(was.norm()), key
            assert torch.equal(found[f"optimizer.{name}.step"].cpu(), before[f"optimizer.{name}.step"])
        trainer.fit()
    assert trainer.learner.step == 6
    assert torch.isfinite(weights(trainer.learner)).all()


def test_numbers_that_become_codes_are_never_all_there(
    trained: Callable[..., build.Trainer], learner: Callable[..., Learner]
) -> None:
    before = trained(*WIDE, "stop_at=3", name="t").learner
    it = learner(*WIDE, "memory=8bit")
    described = store.inspect(find.resolve("t", Path("runs"), launch.policy)).tensors
    made = {k: v for k, v in it.places(described).items() if k.startswith("optimizer.")}
    held = sum(t.nbytes for v in made.values() for t in (v.state.values() if isinstance(v, Coded) else [v]))
    matrices = sum(p.numel() for p in it.parameters if p.numel() >= 4096)
    assert held < 2.3 * matrices + 12 * sum(p.numel() for p in it.parameters if p.numel() < 4096)  # rows of 72: 2.11
    found = load_places(it, "t")
    for name, parameter in it.model.named_parameters():
        if parameter.numel() >= 4096:
            state = before.optimizer.state[before.model.get_parameter(name)]
            for moment in ("exp_avg", "exp_avg_sq"):
                codes = quantize(state[moment], CODES["int8"][SIGNED[moment]])
                for end, expected in zip(("", "_scale"), codes):
                    assert torch.equal(found[f"optimizer.{name}.{moment}_int8{end}"], expected)


def load_places(it: Learner, name: str) -> dict[str, torch.Tensor]:
    loaded = store.read(find.resolve(name, Path("runs"), launch.policy), it.places)
    it.load(loaded.tensors, loaded.state["learner"])
    return it.tensors()


def numbers_of(tensors: dict[str, torch.Tensor], key: str, format_: str | None) -> torch.Tensor:
    if format_ is None:
        return tensors[key]
    code = CODES[format_][SIGNED[key.rpartition(".")[2]]]
    return dequantize(tensors[f"{key}_{format_}"], tensors[f"{key}_{format_}_scale"], code, 72, torch.float32)


def test_compiled_is_nearly_eager() -> None:
    eager, compiled = Small(), Small()
    take(eager, ALL["adamw"].build(eager, Keeping("int8")), 3)
    optimizer = ALL["adamw"].build(compiled, Keeping("int8", compiled=True))
    take(compiled, optimizer, 3)
    torch.testing.assert_close(flat(compiled), flat(eager), rtol=0, atol=2e-3)
    assert float((flat(compiled) - flat(eager)).abs().mean()) < 2e-5


def test_rows_that_ranks_cut_within_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(256, 64, bias=False)
    optimizer = ALL["adamw"].build(model, Keeping("int8"))
    from trainkit.optimizers import sharded

    monkeypatch.setattr(sharded, "local", lambda t: t[:, :64])
    with pytest.raises(UserError, match="a row of 256 numbers over ranks of 64 cuts blocks of 128"):
        take(model, optimizer, 1)


def test_the_loss_stays_near(learner: Callable[..., Learner]) -> None:
    ends = {}
    for memory in ("baseline", *FORMATS):
        it = learner("model.width=64", f"memory={memory}", "steps=30", "optimizer.lr=0.01", "clip=1")
        ends[memory] = sum([float(it.train_step()["loss"]) for _ in range(30)][-5:]) / 5
    for memory in FORMATS:
        assert ends[memory] < 1.1 * ends["baseline"], ends


def test_codes_that_are_none_are_refused() -> None:
    model = Small()
    optimizer = ALL["adamw"].build(model, Keeping("int8"))
    take(model, optimizer, 1)
    named, key = named_state(model, optimizer), "embed.weight.exp_avg_int8"
    with pytest.raises(UserError, match=r"optimizer has embed.weight.exp_avg_int8 without its scales"):
        load_named_state(model, optimizer, {k: v for k, v in named.items() if k != f"{key}_scale"})
    with pytest.raises(UserError, match=r"embed.weight.exp_avg_int8_scale is \(40, 2\) there"):
        load_named_state(model, optimizer, {**named, f"{key}_scale": torch.zeros(40, 2)})
    with pytest.raises(UserError, match=r"embed.weight.exp_avg_int8 is torch.float32 there"):
        places(model, optimizer, {key: ((40, 128), torch.float32, True)})

"""Codes of few bits: how near they come, what they never do, and that slices of them are codes of slices."""

import pytest
import torch

from trainkit.optimizers.formats import BLOCK, CODES, columns, converted, dequantize, empty, fits, pieces, quantize

WIDTHS = [BLOCK, 3 * BLOCK, 16, 33, 129, 2 * BLOCK + 77]


def numbers(*shape: int, signed: bool, seed: int = 0) -> torch.Tensor:
    """Over five decades, as states are."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=draw) * 10 ** (-5 * torch.rand(shape, generator=draw))
    return found if signed else found.square()


# the table that a code stands for, written down without it: every number that it can give, of a block whose largest is 1
TABLES = {
    ("int8", True): [(c / 127) ** 2 for c in range(128)],
    ("int8", False): [(c / 255) ** 4 for c in range(256)],
    ("int4", True): [(c / 7) ** 2 for c in range(8)],
    ("int4", False): [(c / 16) ** 4 for c in range(1, 17)],
    ("fp8", True): (torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).double() / 448).tolist(),
    ("fp8", False): (torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).double() / 448).square().tolist(),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "signed"), TABLES)
def test_a_number_becomes_a_neighbour_in_its_blocks_table(name: str, signed: bool, width: int) -> None:
    code, x = CODES[name][signed], numbers(5, width, signed=signed)
    codes, scales = quantize(x, code)
    assert (codes.shape[1], scales.shape[1]) == columns(code, width)
    found = dequantize(codes, scales, code, width, torch.float32)
    table = torch.tensor(TABLES[name, signed], dtype=torch.float64)
    for begin in range(0, width, BLOCK):
        block, got = x[:, begin : begin + BLOCK].double(), found[:, begin : begin + BLOCK].double()
        largest = block.abs().amax(1, keepdim=True)
        assert torch.equal(scales[:, begin // BLOCK, None].double(), largest)
        part = block.abs() / largest
        above = torch.searchsorted(table, part * (1 - 1e-6)).clamp(max=len(table) - 1)
        below = (torch.searchsorted(table, part * (1 + 1e-6), right=True) - 1).clamp(min=0)
        low, high = table[below], table[above]
        size = got.abs() / largest
        assert (((size - low).abs() < 1e-6 * low + 1e-12) | ((size - high).abs() < 1e-6 * high + 1e-12)).all()
        assert (got.sign() == block.sign())[size > 0].all()
        if signed:
            nearest = 0.5 * (high.sqrt() + low.sqrt()) if code.roots else 0.5 * (high + low)
            root = part.sqrt() if code.roots else part
            clear = (root - nearest).abs() > 1e-6
            assert ((size > (low + high) / 2) == (root > nearest))[clear & (high > low)].all()


@pytest.mark.parametrize("name", CODES)
def test_a_second_moment_is_never_zero_and_nothing_becomes_nothing(name: str) -> None:
    code = CODES[name][False]
    x = numbers(4, 200, signed=False)
    x[0] = 0
    x[1] = 0
    x[1, 3] = 1e-30
    found = dequantize(*quantize(x, code), code, 200, torch.float32)
    assert (found[2:] > 0).all()
    assert (found[0] == 0).all()
    assert found[1, 3] == pytest.approx(1e-30, rel=0.01)
    for signed in (True, False):
        zeros = empty(CODES[name][signed], x)
        assert (dequantize(*zeros, CODES[name][signed], 200, torch.float32) == 0).all()


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("signed", [True, False])
def test_slices_of_codes_are_codes_of_slices(name: str, signed: bool) -> None:
    code, x = CODES[name][signed], numbers(7, 3 * BLOCK + 5, signed=signed)
    codes, scales = quantize(x, code)
    for rows in (slice(0, 3), slice(3, 7)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(quantize(x[rows], code), (codes, scales)))
    some = quantize(x[:, BLOCK : 2 * BLOCK], code)
    per_block = columns(code, BLOCK)[0]
    assert torch.equal(some[0], codes[:, per_block : 2 * per_block])
    assert torch.equal(some[1], scales[:, 1:2])
    assert [p[3] for p in pieces(code, 3 * BLOCK + 5)] == [BLOCK, 5]


@pytest.mark.parametrize("name", CODES)
def test_codes_of_what_codes_gave_are_the_same(name: str) -> None:
    for signed in (True, False):
        code, x = CODES[name][signed], numbers(6, 200, signed=signed)
        once = quantize(x, code)
        again = quantize(dequantize(*once, code, 200, torch.float32), code)
        assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_the_errors_of_the_docs_hold() -> None:
    """Of the update, on AdamW's states: within those of docs/benchmarks/memory.md, and below the dynamic tree's."""
    from benchmarks.low_bit import dynamic_tree, nearest, trained_states

    m, v = trained_states(256)
    update = m / (v.sqrt() + 1e-8)

    def error(of_m: torch.Tensor, of_v: torch.Tensor) -> float:
        return float(((of_m / (of_v.sqrt() + 1e-8) - update).square().mean() / update.square().mean()).sqrt())

    by = {
        name: error(*(c[s].decode(*c[s].encode(x), BLOCK) for s, x in ((True, m), (False, v))))
        for name, c in CODES.items()
    }
    tree = error(nearest(m, dynamic_tree(True)), nearest(v, dynamic_tree(False)))
    assert by["int8"] < 0.027 < tree < by["fp8"] < 0.045 < by["int4"] < 0.6


def test_one_format_becomes_another() -> None:
    state = {
        "step": torch.tensor(3.0),
        "exp_avg": numbers(6, 200, signed=True),
        "exp_avg_sq": numbers(6, 200, signed=False),
    }
    eight = converted(state, "int8", 200, torch.float32)
    assert sorted(eight) == ["exp_avg_int8", "exp_avg_int8_scale", "exp_avg_sq_int8", "exp_avg_sq_int8_scale", "step"]
    assert converted(eight, "int8", 200, torch.float32).keys() == eight.keys()
    assert all(v is eight[k] for k, v in converted(eight, "int8", 200, torch.float32).items())
    back = converted(eight, None, 200, torch.float64)
    assert {v.dtype for k, v in back.items() if k != "step"} == {torch.float64}
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(back[key], dequantize(eight[f"{key}_int8"], eight[f"{key}_int8_scale"],
                                                 CODES["int8"][key == "exp_avg"], 200, torch.float64))  # fmt: skip
    four = converted(eight, "int4", 200, torch.float32)
    direct = converted(back, "int4", 200, torch.float32)
    assert all(torch.equal(four[k], direct[k]) for k in direct)


def test_small_tensors_and_vectors_keep_numbers() -> None:
    assert not fits(torch.empty(8192))
    assert not fits(torch.empty(63, 65))
    assert fits(torch.empty(64, 64))

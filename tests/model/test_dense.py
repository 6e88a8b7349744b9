"""The product of few rows with a weight: every form it takes is x @ weight^T."""

import pytest
import torch

from nemo_lite.precision.linear import FEW_ROWS, dense

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
# Small and large for the rules that choose the form, odd sizes among them; [out, in].
SHAPES = [(1, 1), (5, 7), (48, 32), (640, 520), (300, 1024)]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_product(y, x, weight, dtype):
    """y within rounding of the exact product: of what is summed for float32, of the result for bfloat16."""
    exact = x.double() @ weight.double().T
    allowed = x.double().abs() @ weight.double().abs().T * EPS[torch.float32] * x.shape[-1] ** 0.5
    if dtype == torch.bfloat16:  # torch's product of a bfloat16 matrix and vector rounds partial sums too
        allowed = allowed + exact.abs() * EPS[dtype] + x.double().abs() @ weight.double().abs().T * EPS[dtype] / 8
    assert y.dtype == dtype and y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= allowed + 1e-30).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_any_number_of_rows(shape, dtype):
    out, inner = shape
    weight = numbers(out, inner).to(dtype)
    for rows in (*range(1, 18), FEW_ROWS - 1, FEW_ROWS, FEW_ROWS + 1):
        x = numbers(rows, inner, seed=rows).to(dtype)
        y = dense(x, weight)
        assert_product(y, x, weight, dtype)
        assert y.is_contiguous(), "what comes next splits and views it"


@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_the_form_for_several_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = numbers(96, 600)
        for rows in (15, 16, 32):
            x = numbers(rows, 600, seed=rows)
            y = dense(x, weight)
            assert_product(y, x, weight, torch.float32)
            assert y.is_contiguous()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 32, 33])
@torch.inference_mode()
def test_inputs_and_weights_that_are_views(rows, dtype):
    for out, inner in ((24, 40), (640, 520)):
        weight = numbers(out, inner).to(dtype)
        x = numbers(rows, inner, seed=1).to(dtype)
        wide = numbers(rows, 2 * inner + 3, seed=2).to(dtype)
        views = {
            "columns": wide[:, 3 : 3 + inner],
            "every other column": wide[:, ::2][:, :inner],
            "every other row": numbers(2 * rows, inner, seed=3).to(dtype)[::2],
            "transposed": numbers(inner, rows, seed=4).to(dtype).T,
            "one row repeated": x[:1].expand(rows, -1),
        }
        for name, view in views.items():
            y = dense(view, weight)
            assert_product(y, view, weight, dtype)
            assert y.is_contiguous(), name
        for transposed in (weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :inner]):
            y = dense(x, transposed)
            assert_product(y, x, transposed, dtype)
            assert y.is_contiguous()


@torch.inference_mode()
def test_weights_kept_in_another_dtype_are_cast():
    x, weight = numbers(3, 520).bfloat16(), numbers(640, 520)
    assert torch.equal(dense(x, weight), dense(x, weight.bfloat16()))
    assert dense(x.double(), weight).dtype == torch.float64


@torch.inference_mode()
def test_no_rows_and_more_dimensions():
    weight = numbers(6, 4)
    for dtype in (torch.float32, torch.bfloat16):
        assert dense(torch.zeros(0, 4, dtype=dtype), weight).shape == (0, 6)
        x = numbers(2, 3, 4).to(dtype)
        assert_product(dense(x, weight).flatten(0, 1), x.flatten(0, 1), weight.to(dtype), dtype)
        assert dense(x[0, 0], weight).shape == (6,)


@torch.inference_mode()
def test_a_row_does_not_depend_on_values_of_its_neighbours():
    """What is not a number stays in its row. (Where rows are multiples of 32 long: oneDNN's AMX product of bfloat16
    reads the end of other lengths together with the next row's start, and 0 times not-a-number is none.)"""
    for dtype in (torch.float32, torch.bfloat16):
        for out, inner in ((24, 64), (640, 512)):
            weight = numbers(out, inner).to(dtype)
            for rows in (2, 8, 20):
                x = numbers(rows, inner, seed=rows).to(dtype)
                y = dense(x, weight)
                x[1] = float("nan")
                z = dense(x, weight)
                assert torch.equal(z[0], y[0]) and torch.equal(z[2:], y[2:]) and bool(z[1].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gradients(dtype):
    for rows in (1, 4, 20):
        x, weight = numbers(rows, 40).to(dtype).requires_grad_(), numbers(24, 40).requires_grad_()
        y = dense(x, weight)
        y.float().square().sum().backward()
        assert_product(y.detach(), x.detach(), weight.detach().to(dtype), dtype)
        assert x.grad.dtype == dtype and weight.grad.dtype == torch.float32

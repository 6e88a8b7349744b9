"""Triton's scan on a CUDA device at the models' sizes against float64, in bfloat16 and float32."""

import pytest
import torch
from nemo_lite_kernels.ssd import ssd_chunked, ssd_recurrent
from nemo_lite_kernels.triton import reason
from tiny import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason() is not None, reason=str(reason()))]

NAMES = ("x", "dt", "A", "B", "C", "D", "state")
# batch, length, heads, head size, groups, state size
SUPER, NANO, ODD = (1, 1000, 128, 64, 8, 128), (2, 515, 64, 64, 8, 128), (2, 333, 6, 80, 2, 96)
# Outputs and gradients relative to the largest; sums over all tokens in bfloat16 lose a little more.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1.5e-2}


def inputs(shape, dtype):
    """x, B and C are slices of one tensor, as in the model; dt, A, D and the state are float32."""
    B, L, H, P, G, N = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    x, b, c = normal(B, L, H * P + 2 * G * N).to(dtype).split([H * P, G * N, G * N], dim=-1)
    return {
        "x": x.unflatten(-1, (H, P)),
        "dt": torch.nn.functional.softplus(normal(B, L, H) - 3.0),
        "A": -torch.rand(H, generator=generator, device="cuda") * 15 - 1,
        "B": b.unflatten(-1, (G, N)),
        "C": c.unflatten(-1, (G, N)),
        "D": normal(H),
        "state": normal(B, H, P, N),
    }


def resets(B, L):
    reset = torch.zeros(B, L, dtype=torch.bool, device="cuda")
    reset[0, [5, 6, 127, 128, 200, L - 1]] = True
    return reset


def run(function, tensors, reset, dtype=None):
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in tensors.items()}
    y, final = function(*(leaves[n] for n in NAMES[:6]), reset, leaves["state"])
    generator = torch.Generator("cuda").manual_seed(9)
    weights = [torch.randn(t.shape, generator=generator, device="cuda").bfloat16() for t in (y, final)]
    sum((t * w.to(t.dtype)).sum(dtype=torch.float64) for t, w in zip((y, final), weights)).backward()
    return {"y": y, "final": final} | {f"gradient of {n}": t.grad for n, t in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("shape", [SUPER, NANO, ODD], ids=["super", "nano", "odd"])
def test_scan(shape, packed, dtype):
    from nemo_lite_kernels.triton.ssd import ssd

    tensors, reset = inputs(shape, dtype), resets(*shape[:2]) if packed else None
    exact = run(ssd_chunked, tensors, reset, torch.float64)
    ours = run(ssd, tensors, reset)
    assert ours["y"].dtype == dtype and ours["final"].dtype == torch.float32
    for name, wanted in exact.items():
        assert_close(ours[name], wanted, TOLERANCE[dtype], name)


def test_the_same_twice_bit_for_bit():
    from nemo_lite_kernels.triton.ssd import ssd

    tensors, reset = inputs(NANO, torch.bfloat16), resets(*NANO[:2])
    first, second = run(ssd, tensors, reset), run(ssd, tensors, reset)
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


def test_offsets_beyond_32_bits():
    """The last tokens of a long row: values lie more than 2^31 elements from the start."""
    from nemo_lite_kernels.triton.ssd import ssd

    L, H, P, G, N = 270_000, 128, 64, 8, 128
    tail = 256
    x = torch.zeros(1, L, H, P, dtype=torch.bfloat16, device="cuda")
    b, c = (torch.zeros(1, L, G, N, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    dt = torch.zeros(1, L, H, device="cuda")
    t = inputs((1, tail, H, P, G, N), torch.bfloat16)
    x[:, -tail:], b[:, -tail:], c[:, -tail:], dt[:, -tail:] = t["x"], t["B"], t["C"], t["dt"]
    with torch.no_grad():
        y, final = ssd(x, dt, t["A"], b, c, t["D"])
        y_ref, final_ref = ssd_chunked(*(t[n].double() for n in NAMES[:6]))
    assert_close(y[:, -tail:], y_ref, TOLERANCE[torch.bfloat16])
    assert_close(final, final_ref, TOLERANCE[torch.bfloat16])
    assert not y[:, :-tail].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 4, 9])
def test_a_few_tokens(length, dtype):
    from nemo_lite_kernels.triton.ssd import ssd_advance, ssd_verify, state_update

    tensors = inputs((5, length, *SUPER[2:]), dtype)
    args, state = [tensors[n] for n in NAMES[:6]], tensors["state"]
    y_ref, states = ssd_recurrent(*(t.double() for t in args), None, state.double(), all_states=True)
    states = torch.cat([state.double()[:, None], states], dim=1)
    limit = 5e-3 if dtype == torch.bfloat16 else 1e-5
    assert_close(ssd_verify(*args, state), y_ref, limit)
    rows = torch.arange(5, device="cuda")
    counts = rows % (length + 1)
    assert_close(ssd_advance(*args[:4], state, counts), states[rows, counts], 1e-5)
    y, after = state_update(*args, state)
    assert_close(y, y_ref, limit)
    assert_close(after, states[:, -1], 1e-5)

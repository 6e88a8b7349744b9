"""The C++ kernels of the scan, the convolution, the norms and the squared ReLU against the float64 references, at every
instruction-set level that this machine has."""

import pytest
import torch
from kernels.levels import compiled_for
from nemo_lite_kernels import conv as conv_reference
from nemo_lite_kernels import cpu
from nemo_lite_kernels import norm as norm_reference
from nemo_lite_kernels.cpu import conv, norm, ssd
from nemo_lite_kernels.ssd import ssd_recurrent
from tiny import TOLERANCE, assert_close

EPS = 1e-5


@pytest.fixture(scope="module", params=list(cpu.LEVELS), autouse=True)
def level(request):
    with compiled_for(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel is given to write into holds NaN: what it leaves out shows."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def run(function, tensors, dtype=None):
    """Outputs, and the gradients of a random weighting of them; in `dtype` where given, else in the tensors' own."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Weights that bfloat16 has: the reference is given the same.
    loss = sum((y * normal(*y.shape, seed=9).to(torch.bfloat16).to(y.dtype)).sum() for y in outputs)
    loss.backward()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None]
    return [y.detach() for y in outputs], grads


def check(function, reference, tensors, dtype, scale=1.0):
    """Outputs and gradients against the reference in float64, and the outputs again without gradients."""
    outputs, grads = run(function, tensors)
    exact, exact_grads = run(reference, tensors, torch.float64)
    for i, (y, want) in enumerate(zip(outputs, exact)):
        assert_close(y, want, TOLERANCE[dtype], f"output {i}")
    for i, (grad, want) in enumerate(zip(grads, exact_grads)):
        assert_close(grad, want, scale * max(TOLERANCE[dtype], TOLERANCE[grad.dtype]), f"gradient {i}")
    assert [g.dtype for g in grads] == [t.dtype for t in tensors if t is not None]
    with torch.no_grad():
        again = function(*tensors)
    for y, want in zip(again if isinstance(again, tuple) else (again,), outputs):
        assert torch.equal(y, want) and y.dtype == want.dtype


def documents(kind, B, L):
    """Where documents start: nowhere, in the first token, in every one, or here and there with one of one token."""
    if kind == "none":
        return None
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[:, 0] = kind == "first"
    reset |= kind == "every"
    if kind == "ragged":
        reset[0, [L // 3, L // 2, min(L // 2 + 1, L - 1)]] = True
        reset[-1, L - 1] = True
    return reset


def scan_inputs(B, L, H, P, G, N, dtype, state=True):
    x, b, c = (normal(B, L, *s, seed=i).to(dtype) for i, s in enumerate(((H, P), (G, N), (G, N))))
    dt, A = torch.rand(B, L, H, generator=torch.Generator().manual_seed(L)) * 0.5, -normal(H).abs().float() * 2 - 0.1
    return [x, dt, A, b, c, normal(H, seed=1).float(), normal(B, H, P, N).float() if state else None]


def scan_with(function, reset, **options):
    return lambda x, dt, A, B, C, D, state=None: function(x, dt, A, B, C, D, reset, state, **options)


# batch, length, heads, head size, groups, state size
SCANS = [(2, 1, 4, 3, 2, 5), (1, 17, 4, 4, 4, 6), (2, 33, 6, 5, 2, 20), (1, 130, 2, 18, 1, 33), (2, 80, 2, 64, 1, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "first", "every", "ragged"])
@pytest.mark.parametrize("shape", SCANS, ids=str)
def test_scan(shape, kind, dtype):
    reset = documents(kind, *shape[:2])
    tensors = scan_inputs(*shape, dtype, state=kind != "every")
    for chunk in (3, 128) if shape[1] < 40 else (128,):
        # Sums over all tokens that cancel: five times the outputs' tolerance.
        check(scan_with(ssd.ssd, reset, chunk_size=chunk), scan_with(ssd_recurrent, reset), tensors, dtype, scale=5)


def test_scan_of_slices_of_one_projection():
    shape = _, _, H, P, G, N = (2, 19, 4, 5, 2, 7)
    x, dt, A, b, c, D, state = scan_inputs(*shape, torch.float32)
    wide = torch.cat([t.flatten(2) for t in (x, b, c)], dim=-1)

    def sliced(function):
        def scan(wide, dt, A, D, state):
            x, b, c = wide.split([H * P, G * N, G * N], dim=-1)
            b, c = b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
            return function(x.unflatten(-1, (H, P)), dt.transpose(0, 1), A, b, c, D, None, state.transpose(2, 3))

        return scan

    tensors = [wide, dt.transpose(0, 1).contiguous(), A, D, state.transpose(2, 3).contiguous()]
    check(sliced(ssd.ssd), sliced(ssd_recurrent), tensors, torch.float32, scale=5)


def test_scan_where_only_one_output_is_used():
    tensors = scan_inputs(2, 20, 4, 5, 2, 7, torch.float32)
    for i in range(2):
        one, exact = (scan_with(f, None) for f in (ssd.ssd, ssd_recurrent))
        _, grads = run(lambda *t, i=i, one=one: one(*t)[i], tensors)
        _, want = run(lambda *t, i=i, exact=exact: exact(*t)[i], tensors, torch.float64)
        for a, b in zip(grads, want):
            assert_close(a, b, 1e-4)


def test_scan_that_forgets_everything_stays_finite():
    tensors = scan_inputs(1, 40, 2, 3, 1, 4, torch.float32)
    tensors[1][:, ::3], tensors[1][:, 1::3] = 300.0, 0.0
    # A's gradient is 300 times sums that all but cancel.
    check(scan_with(ssd.ssd, None), scan_with(ssd_recurrent, None), tensors, torch.float32, scale=100)


def test_scan_keeps_nothing_where_nothing_is_differentiated(monkeypatch):
    kept = []
    forward = ssd._forward
    monkeypatch.setattr(
        ssd, "_forward", {torch.float32: lambda *args: (kept.append(args[9]), forward[torch.float32](*args))}
    )
    tensors = scan_inputs(1, 20, 2, 3, 1, 4, torch.float32)
    scan_with(ssd.ssd, None)(*tensors)
    with torch.no_grad():
        scan_with(ssd.ssd, None)(*(t.requires_grad_() for t in tensors))
    assert kept == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("carried", [False, True], ids=["start", "carried"])
@pytest.mark.parametrize("kind", ["none", "first", "every", "ragged"])
def test_conv(kind, carried, dtype):
    for L, W, C in [(1, 4, 3), (2, 4, 16), (3, 4, 21), (4, 4, 5), (11, 4, 37), (29, 4, 64), (5, 2, 9), (19, 6, 18)]:
        reset = documents(kind, 2, L)
        tensors = [normal(2, L, C).to(dtype), normal(C, W).float(), normal(C).float()]
        tensors.append(normal(2, W - 1, C).to(dtype) if carried else None)

        def conv_with(function, reset=reset):
            return lambda x, weight, bias, window=None: function(x, weight, bias, reset, window)

        check(conv_with(conv.causal_conv), conv_with(conv_reference.causal_conv), tensors, dtype, scale=2)


def test_conv_of_a_slice_with_bfloat16_weights():
    tensors = [normal(2, 13, 30).bfloat16(), normal(21, 4).bfloat16(), normal(21).bfloat16()]
    check(
        lambda x, weight, bias: conv.causal_conv(x[..., 4:25], weight, bias),
        lambda x, weight, bias: conv_reference.causal_conv(x[..., 4:25], weight, bias),
        tensors,
        torch.bfloat16,
    )


NORMS = [((1, 1), 1), ((0, 8), 2), ((7, 12), 3), ((2, 3, 24), 2), ((5, 70), 2), ((70, 64), 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape,groups", NORMS, ids=str)
def test_norms(shape, groups, dtype):
    x, z = normal(*shape).to(dtype), normal(*shape[:-1], shape[-1] + 5, seed=1).to(dtype)

    def gated(function):  # the gate comes as a slice of a projection
        return lambda x, z, weight: function(x, z[..., 5:], weight, EPS, groups)

    def plain(function):
        return lambda z, weight: function(z[..., 5:], weight, EPS)

    for weight in (normal(shape[-1]).float(), normal(shape[-1]).bfloat16()):
        check(gated(norm.gated_norm), gated(norm_reference.gated_norm), [x, z, weight], dtype)
        check(plain(norm.rms_norm), plain(norm_reference.rms_norm), [z, weight], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squared_relu(dtype):
    for shape in ((1,), (3, 5), (2, 7, 31)):
        check(norm.squared_relu, lambda h: h.relu().square(), [normal(*shape).to(dtype)], dtype)
    h = torch.tensor([torch.nan, -1.0, -0.0, 2.0])
    assert norm.squared_relu(h).isnan().tolist() == [True, False, False, False]


def test_threads_do_not_change_results():
    scan = [t.requires_grad_() for t in scan_inputs(1, 70, 8, 5, 1, 7, torch.float32)]
    x, z, weight, taps = normal(3, 50, 70).float(), normal(3, 50, 70, seed=1).float(), normal(70).float(), normal(70, 4)
    cases = [
        (scan_with(ssd.ssd, documents("ragged", 1, 70)), scan),
        (conv.causal_conv, [x[:1], taps.float(), weight]),
        (lambda x, w: norm.rms_norm(x, w, EPS), [x, weight]),
        (lambda x, z, w: norm.gated_norm(x, z, w, EPS, 2), [x, z, weight]),
        (norm.squared_relu, [x]),
    ]
    threads = torch.get_num_threads()
    try:
        for function, tensors in cases:
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                outputs, grads = run(function, tensors)
                results.append([*outputs, *grads])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(threads)

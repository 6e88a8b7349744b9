"""Every backend of the table that this machine has, against the op's reference in float64: one table of awkward cases
(odd lengths, documents of one token, empty experts, views, memory that nobody has written), outputs, all gradients and
carried state, in every number format it says it takes. And the calls it does not take reach a backend that does."""

import functools
import sys
import types

import nemo_lite_kernels
import pytest
import torch
from nemo_lite_kernels import OPS, Backend, load, select
from tiny import TOLERANCE, assert_close

TOLERANCE = TOLERANCE | {torch.float16: 4e-3}
REFERENCES = {
    "ssd": "ssd:ssd_recurrent", "causal_conv": "conv:causal_conv", "attention": "attention:attention_masked",
    "experts": "moe:experts_reference", "route": "route:route", "rms_norm": "norm:rms_norm",
    "gated_norm": "norm:gated_norm", "squared_relu": "moe:squared_relu", "linear": "linear:linear",
}  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def documents(kind, B, L):
    if kind == "none":
        return None
    reset = torch.zeros(B, L, dtype=torch.bool)
    if kind == "every":
        reset[:] = True
    else:  # rows cut in different places; one document has one token
        reset[0, [L // 3, L // 2, min(L // 2 + 1, L - 1)]] = True
        reset[-1, [0, L - 1]] = True
    return reset


class Case:
    """Arguments of a call. What is `wide` stays in float32 or better, whatever the activations are."""

    def __init__(self, *args, wide=(), packed=False, state=False, **options):
        self.args, self.wide, self.packed, self.state, self.options = args, wide, packed, state, options

    def tensors(self, dtype, views=False):
        made = []
        for i, value in enumerate(self.args):
            if isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    value = value.to(torch.promote_types(dtype, torch.float32) if i in self.wide else dtype)
                if views and value.dim() > 1:
                    value = torch.stack([value, value], dim=-1)[..., 1]
            made.append(value)
        return made


def scan(shape, kind, state):
    B, L, H, P, G, N = shape
    args = [
        normal(B, L, H, P),
        uniform(B, L, H) * 0.5,
        -uniform(H) * 4 - 0.1,
        normal(B, L, G, N),
        normal(B, L, G, N, seed=1),
    ]
    carried = normal(B, H, P, N) if state else None
    args += [normal(H), documents(kind, B, L), carried]
    return Case(*args, wide=(1, 2, 5, 7), packed=kind != "none", state=state, chunk_size=8)


def conv(L, C, W, kind, state):
    window = normal(2, W - 1, C) if state else None
    args = (normal(2, L, C), normal(C, W), normal(C), documents(kind, 2, L), window)
    return Case(*args, wide=(1, 2), packed=kind != "none", state=state)


def routed(T, k, E, last):
    """Experts from `last` on are chosen by nobody, and some copies are not computed."""
    chosen = torch.stack([torch.randperm(last, generator=torch.Generator().manual_seed(t))[:k] for t in range(T)] or
                         [torch.empty(0, k).long()]).view(T, k)  # fmt: skip
    if T > 4:
        chosen[::4, 0] = -1
        chosen[3] = -1
    return Case(normal(T, 8) * 0.5, chosen, uniform(T, k), normal(E, 24, 8) * 0.5, normal(E, 8, 24) * 0.5, wide=(2,))


def router(T, E, k, groups, rows, padded):
    counted = torch.arange(T // rows).expand(rows, -1) < T // rows - 2 if padded else None
    bias = normal(E) * 0.1
    args = (normal(T, E), bias, k, 2.5, True, groups, max(1, groups // 2), rows, counted)
    return Case(*args, wide=(0, 1))


CASES = {
    "ssd": [scan((2, 1, 4, 3, 2, 5), "every", True), scan((1, 17, 4, 4, 4, 6), "none", True),
            scan((2, 33, 6, 5, 2, 4), "ragged", True), scan((2, 9, 2, 7, 1, 3), "ragged", False)],
    "causal_conv": [conv(1, 3, 4, "none", True), conv(2, 8, 4, "every", False), conv(11, 5, 4, "ragged", True),
                    conv(37, 16, 2, "ragged", False), conv(7, 3, 6, "none", False)],
    "attention": [Case(*(normal(sum(n), h, 6, seed=i) for i, h in enumerate((4, 2, 2))), n)
                  for n in ([1], [1, 1], [3, 1, 1, 9], [4, 4])],
    "experts": [routed(0, 2, 4, 4), routed(1, 1, 1, 1), routed(1, 3, 16, 5), routed(23, 2, 8, 3), routed(70, 3, 8, 8)],
    "route": [router(5, 8, 2, 1, 1, False), router(12, 16, 4, 4, 3, True), router(1, 3, 3, 1, 1, False)],
    "rms_norm": [Case(normal(*s), uniform(s[-1]) + 0.5, 1e-5, wide=(1,))
                 for s in ((1, 1), (7, 13), (2, 3, 24), (0, 8))],
    "gated_norm": [Case(normal(*s), normal(*s, seed=1), uniform(s[-1]) + 0.5, 1e-5, g, wide=(2,))
                   for s, g in (((1, 4), 1), ((7, 15), 5), ((2, 3, 24), 2), ((0, 8), 2))],
    "squared_relu": [Case(normal(*s)) for s in ((1,), (7, 13), (0, 4))],
    "linear": [Case(normal(*s), normal(n, s[-1])) for s, n in (((1, 13), 7), ((5, 64), 33), ((2, 9, 32), 16))],
}  # fmt: skip

AVAILABLE = [
    pytest.param(op, name, function, id=f"{function}-{name}")
    for op, row in OPS.items() if op != "step"  # a whole model's: tests/model
    for name, backend in row.items() if backend.refusal("cpu") is None
    for function in backend.functions if function in CASES
]  # fmt: skip


def comparable(function):
    """The router's choice has no order: its weights by expert instead."""

    @functools.wraps(function)
    def call(*args, **options):
        expert_Tk, weight_Tk, counts_E, aux = function(*args, **options)
        return torch.zeros_like(args[0]).scatter(1, expert_Tk, weight_Tk), counts_E, aux

    return call


def run(function, args, options):
    """Outputs, and the gradients of a random weighting of them."""
    leaves = [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]  # fmt: skip
    found = function(*leaves, **options)
    outputs = list(found) if isinstance(found, tuple) else [found]
    tensors = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    weighted = [(y.double() * normal(*y.shape, seed=9)).sum() for y in outputs if y.is_floating_point()]
    # The second sum is zero; it gives every input a gradient where no expert was hit.
    grads = torch.autograd.grad(sum(weighted) + sum(0 * t.double().sum() for t in tensors), tensors)
    return outputs, grads, tensors


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody has written is NaN, so that reading it shows."""

    def filled(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def exact(function, case, dtype):
    """The reference in float64, on the numbers that the backend is given."""
    args = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.tensors(dtype)]
    reference = load(REFERENCES[function])
    return run(comparable(reference) if function == "route" else reference, args, case.options)


def check(function, call, case, dtype, views=False):
    wanted, wanted_grads, _ = exact(function, case, dtype)
    args = case.tensors(dtype, views)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    outputs, grads, leaves = run(call, args, case.options)
    for i, (y, want) in enumerate(zip(outputs, wanted, strict=True)):
        assert_close(y, want, TOLERANCE[dtype], f"output {i} in {dtype}")
    for i, (grad, want, leaf) in enumerate(zip(grads, wanted_grads, leaves, strict=True)):
        assert grad.dtype == leaf.dtype
        # Sums over all tokens that cancel: five times the outputs' tolerance.
        assert_close(grad, want, 5 * TOLERANCE[dtype], f"gradient {i} in {dtype}")
    with torch.no_grad():
        again = call(*args, **case.options)
        for i, (y, want) in enumerate(zip(again if isinstance(again, tuple) else [again], outputs, strict=True)):
            assert y.dtype == want.dtype
            assert_close(y, want, TOLERANCE[dtype], f"output {i} without gradients, in {dtype}")
    for a, b in zip(args, before):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b), "the inputs are not the op's to change"


@pytest.mark.parametrize("views", [False, True], ids=["whole", "views"])
@pytest.mark.parametrize("op,name,function", AVAILABLE)
def test_backend_equals_the_reference(op, name, function, views, poison):
    backend, ran = OPS[op][name], 0
    call = load(backend.functions[function])
    if views and name == "grouped_mm":
        pytest.skip("the grouped GEMM reads weights row by row")
    for case in CASES[function]:
        for dtype in backend.dtypes:
            if function == "route" and dtype not in (torch.float32, torch.float64):
                continue  # the router's logits never are; scores that round to the same value would decide
            if backend.takes(dtype, True, case.packed, case.state):
                check(function, comparable(call) if function == "route" else call, case, dtype, views)
                ran += 1
    assert ran


@pytest.mark.parametrize("op,name,function", AVAILABLE)
def test_what_a_chosen_backend_does_not_take_is_computed_by_another(op, name, function):
    call = getattr(select("cpu", {op: name}), function)
    for dtype in (torch.float64, torch.float32):
        for case in CASES[function]:
            check(function, comparable(call) if function == "route" else call, case, dtype)


@pytest.fixture
def row(monkeypatch):
    """Backends of an imaginary scan that say who was called."""
    module = types.ModuleType("nemo_lite_kernels.imaginary")

    def make(name, **support):
        def ssd(x, reset_BL=None, state_BHPN=None, *, chunk_size=1):
            return name

        setattr(module, name, ssd)
        return Backend({"ssd": f"imaginary:{name}"}, **support)

    monkeypatch.setitem(sys.modules, module.__name__, module)
    load.cache_clear()
    yield make
    load.cache_clear()


@pytest.mark.parametrize(
    "support,args,options",
    [
        ({"dtypes": (torch.float32,)}, (torch.zeros(1, dtype=torch.float64),), {}),
        ({"gradient": False}, (torch.zeros(1),), {}),
        ({"packed": False}, (torch.zeros(1), torch.ones(1)), {}),
        ({"packed": False}, (torch.zeros(1),), {"reset_BL": torch.ones(1)}),
        ({"state": False}, (torch.zeros(1), None, torch.ones(1)), {"chunk_size": 4}),
        ({"state": False}, (torch.zeros(1),), {"state_BHPN": torch.ones(1)}),
    ],
)
def test_each_limit_sends_a_call_on(row, support, args, options):
    chain = [row("narrow", **support), row("narrow_too", **support), row("whole")]
    call = nemo_lite_kernels._routed("ssd", chain)
    assert call(*args, **options) == "whole"
    with torch.no_grad():
        assert call(torch.zeros(1), None, None) == "narrow"
        assert call(torch.zeros(1), reset_BL=None, state_BHPN=None) == "narrow"
    assert chain[0].limits and not chain[2].limits


def test_a_backend_without_limits_is_called_directly(row):
    whole = row("whole")
    assert nemo_lite_kernels._routed("ssd", [whole, row("other")]) is load(whole.functions["ssd"])


def test_a_call_that_nobody_takes_is_an_error(row):
    call = nemo_lite_kernels._routed("ssd", [row("a", dtypes=(torch.float32,)), row("b", dtypes=(torch.bfloat16,))])
    with pytest.raises(TypeError, match=r"no backend of ssd takes torch\.float64"):
        call(torch.zeros(1, dtype=torch.float64))

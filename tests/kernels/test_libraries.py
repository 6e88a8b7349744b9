"""What other libraries' kernels are given: stand-ins that insist on what the real ones take, record how they are
called and compute with our references. The real ones need a GPU."""

import sys
import types

import pytest
import torch
from nemo_lite_kernels import OPS, libraries, select, triton
from nemo_lite_kernels.attention import attention_masked
from nemo_lite_kernels.conv import causal_conv
from nemo_lite_kernels.ssd import ssd_recurrent
from tiny import TOLERANCE, assert_close

HALVES = (torch.bfloat16, torch.float16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def library(monkeypatch):
    """Installs a stand-in; returns the list of its calls."""

    def install(module, name, function):
        calls = []

        def call(*args, **options):
            calls.append((args, options))
            return function(*args, **options)

        stand_in = types.ModuleType(module)
        setattr(stand_in, name, call)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return install


def run(function, tensors):
    """Outputs, and the gradients of a random weighting of them."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    found = function(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    loss = sum((y.double() * normal(*y.shape, seed=9)).sum() for y in outputs)
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return outputs, grads


def same(function, reference, tensors, dtype=torch.float32):
    for got, want in zip(run(function, tensors), run(reference, tensors)):
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert_close(a, b, 5 * TOLERANCE[dtype])


def documents(kind, B, L):
    if kind == "none":
        return None
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, [0, L // 2, L // 2 + 1]] = True
    reset[-1, L - 1] = True
    return reset


def starts_of(seq_idx, first=0):
    """Where a document's number differs from the one before; the state or window carried in is number 0's."""
    assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
    return torch.diff(seq_idx, dim=1, prepend=torch.full_like(seq_idx[:, :1], first)) != 0


# ------------------------------------------------------------------------------------------------------------ mamba-ssm


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    batch, length, heads, width = x.shape
    assert dt.shape == (batch, length, heads) and A.shape == D.shape == (heads,) and heads % B.shape[2] == 0
    assert B.shape == C.shape and x.dtype == B.dtype == C.dtype
    assert dt.dtype == A.dtype == D.dtype == torch.float32
    assert z is dt_bias is cu_seqlens is None and not dt_softplus and not return_varlen_states
    if initial_states is not None:
        assert initial_states.shape == (batch, heads, width, B.shape[3]) and initial_states.dtype == torch.float32
    reset = None if seq_idx is None else starts_of(seq_idx)
    y, final = ssd_recurrent(x, dt, A, B, C, D, reset, initial_states)
    return (y, final) if return_final_states else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("kind", ["none", "ragged"])
def test_mamba_ssm(library, kind, state, dtype):
    calls = library("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", mamba_chunk_scan_combined)
    B, L, H, P, G, N = 2, 9, 4, 8, 2, 16
    reset = documents(kind, B, L)
    wide = normal(B, L, H * P + 2 * G * N).to(dtype)  # x, B and C are slices of one projection
    dt, A, D = normal(B, L, H).abs() * 0.5, -normal(H).abs() - 0.1, normal(H)
    carried = normal(B, H, P, N) if state else None

    def scan(function, **options):
        def call(wide, dt, A, D, carried):
            x, b, c = wide.split([H * P, G * N, G * N], dim=-1)
            b, c = b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
            return function(x.unflatten(-1, (H, P)), dt, A, b, c, D, reset, carried, **options)

        return call

    same(scan(libraries.ssd_mamba_ssm, chunk_size=64), scan(ssd_recurrent), [wide, dt, A, D, carried], dtype)
    ((args, options),) = calls
    assert args[5] == 64 and options["return_final_states"]
    assert not args[0].is_contiguous(), "slices are read where they lie"
    assert (options["seq_idx"] is None) == (kind == "none") and (options["initial_states"] is None) == (not state)


# -------------------------------------------------------------------------------------------------------- causal-conv1d


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    assert weight.shape[0] == bias.shape[0] == x.shape[1] and 2 <= weight.shape[1] <= 4 and activation == "silu"
    assert bias.dtype == weight.dtype
    assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0, "channels last, rows of 8"
    assert initial_states is None and not return_final_states
    reset = None
    if seq_idx is not None:
        assert seq_idx.shape == (x.shape[0], x.shape[2])
        reset = starts_of(seq_idx)
    return causal_conv(x.transpose(1, 2), weight, bias, reset).transpose(1, 2)


def conv_tensors(B, L, C, W, window, dtype=torch.float32):
    tensors = [normal(B, L, C).to(dtype), normal(C, W), normal(C)]
    return [*tensors, normal(B, W - 1, C) if window else None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("kind", ["none", "ragged"])
@pytest.mark.parametrize("L,C,W", [(3, 8, 4), (9, 16, 2)])
def test_causal_conv1d(library, L, C, W, kind, window, dtype):
    calls, reset = library("causal_conv1d", "causal_conv1d_fn", causal_conv1d_fn), documents(kind, 2, L)

    def conv(function):
        return lambda x, weight, bias, window: function(x, weight, bias, reset, window)

    tensors = conv_tensors(2, L, C, W, window, dtype)
    if window:
        tensors[3] = tensors[3].to(dtype)
    same(conv(libraries.conv_causal_conv1d), conv(causal_conv), tensors, dtype)
    ((args, options),) = calls
    assert args[0].shape == (2, C, L + window * (W - 1)) and args[0].dtype == dtype
    assert args[1].dtype == torch.float32, "the weight stays as it is"
    assert (options["seq_idx"] is None) == (kind == "none")


def test_causal_conv1d_of_slices(library):
    """A slice whose rows are 8 numbers apart is read where it lies; another is copied."""
    calls = library("causal_conv1d", "causal_conv1d_fn", causal_conv1d_fn)
    x, weight, bias, _ = conv_tensors(2, 5, 8, 4, False)
    for width in (24, 21):
        wide = torch.cat([x, normal(2, 5, width - 8)], dim=-1)
        y = libraries.conv_causal_conv1d(wide[..., :8], weight, bias)
        assert_close(y, causal_conv(x, weight, bias), 1e-6)
        assert (calls[-1][0][0].data_ptr() == wide.data_ptr()) == (width == 24)


@pytest.mark.parametrize("L,C,W", [(5, 6, 4), (5, 8, 6), (0, 8, 4)])
def test_shapes_that_causal_conv1d_refuses_are_computed_without_it(library, L, C, W):
    calls = library("causal_conv1d", "causal_conv1d_fn", causal_conv1d_fn)
    x, weight, bias, window = conv_tensors(2, L, C, W, True)
    assert_close(
        libraries.conv_causal_conv1d(x, weight, bias, None, window), causal_conv(x, weight, bias, None, window), 1e-6
    )
    assert not calls


# ------------------------------------------------------------------------------------------------------------ attention


def lengths_of(cu_seqlens, longest):
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0
    lengths = cu_seqlens.diff().tolist()
    assert longest == max(lengths)
    return lengths


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    assert q.dtype == k.dtype == v.dtype and q.dtype in HALVES and q.shape[2] % 8 == 0 and causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    return attention_masked(q, k, v, lengths_of(cu_seqlens_q, max_seqlen_q))


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0) and enable_gqa, "causal, and fewer key heads than query heads"
    return flash_attn_varlen_func(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, causal=True)


LENGTHS = [[1], [4, 4], [3, 1, 1, 9]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
def test_flash_attention(library, name, lengths):
    module, function = {
        "flash_attn": ("flash_attn", flash_attn_varlen_func), "varlen": ("torch.nn.attention.varlen", varlen_attn),
    }[name]  # fmt: skip
    calls = library(module, function.__name__, function)
    call = getattr(libraries, f"attention_{name}")
    tensors = [normal(sum(lengths), heads, 16, seed=i).bfloat16() for i, heads in enumerate((4, 2, 2))]
    same(lambda *t: call(*t, lengths), lambda *t: attention_masked(*t, lengths), tensors, torch.bfloat16)
    assert len(calls) == 1, "one call for all documents"
    odd = [t[..., :6] for t in tensors]
    assert_close(call(*odd, lengths), attention_masked(*odd, lengths), 2e-2)
    assert len(calls) == 1, "heads of another size are computed without it"


def test_starts_made_without_gradients_serve_with_them(library):
    library("flash_attn", "flash_attn_varlen_func", flash_attn_varlen_func)
    libraries._starts.cache_clear()
    q, k, v = (normal(5, 2, 8, seed=i).bfloat16() for i in range(3))
    with torch.inference_mode():
        libraries.attention_flash_attn(q, k, v, [2, 3])
    assert not libraries._starts((2, 3), q.device).is_inference()
    run(lambda *t: libraries.attention_flash_attn(*t, [2, 3]), [q, k, v])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_flex_attention(monkeypatch, lengths):
    """Not compiled, and so forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(libraries, "_flex", lambda: flex_attention)
    q, k, v = (normal(sum(lengths), heads, 16, seed=i) for i, heads in enumerate((4, 2, 2)))
    y = libraries.attention_flex(q, k, v, lengths)
    assert y.shape == q.shape
    assert_close(y, attention_masked(q, k, v, lengths), 2e-5)


# ----------------------------------------------------------------------------------------------- whether they are there


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "reason", lambda: "not asked for in this test")


def install(tmp_path, monkeypatch, package, text):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    "text,sentence",
    [
        (
            "raise RuntimeError('undefined symbol\\nand more')",
            "cannot be imported: RuntimeError: undefined symbol",
        ),
        ("import flash_attn_2_cuda", "cannot be imported: ModuleNotFoundError: No module named 'flash_attn_2_cuda'"),
        ("raise SystemError", "cannot be imported: SystemError: no message"),
        ("", None),
    ],
)
def test_a_broken_library_is_told_in_its_own_words(tmp_path, monkeypatch, cuda, text, sentence):
    install(tmp_path, monkeypatch, "flash_attn", text)
    assert libraries.reason("flash_attn") == sentence


def test_what_is_not_installed_and_where_there_is_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(libraries.MODULES, "mamba_ssm", "surely_not_installed.ops")
    assert libraries.reason("mamba_ssm") == "is not installed"
    assert libraries.reason("varlen") == "needs a CUDA device, and torch sees none"


def test_an_older_torch_has_another_varlen(library, cuda):
    library("torch.nn.attention.varlen", "varlen_attn", varlen_attn)
    sys.modules["torch.nn.attention.varlen"].varlen_attn = lambda query, is_causal: None
    assert "needs a newer torch" in libraries.reason("varlen")


def test_by_name_and_what_it_does_not_take(library, cuda):
    calls = library("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", mamba_chunk_scan_combined)
    ops = select("cuda", {"ssd": "mamba_ssm"})
    choice = next(c for c in ops.choices if c["op"] == "ssd")
    assert choice["except"] == "float64: chunked" and choice["others"]["triton"] == "not asked for in this test"
    args = [
        normal(1, 3, 2, 8),
        normal(1, 3, 2).abs(),
        -normal(2).abs(),
        normal(1, 3, 1, 4),
        normal(1, 3, 1, 4),
        normal(2),
    ]
    y, _ = ops.ssd(*args, None, None, chunk_size=64)
    exact, _ = ops.ssd(*(t.double() for t in args), None, None, chunk_size=64)
    assert len(calls) == 1 and exact.dtype == torch.float64
    assert_close(y, exact, 2e-5)


def test_every_library_of_the_table_is_known():
    of_libraries = {
        name for row in OPS.values() for name, backend in row.items()
        if any(path.startswith("libraries:") for path in backend.functions.values())
    }  # fmt: skip
    assert of_libraries | {"transformer_engine"} == set(libraries.MODULES)

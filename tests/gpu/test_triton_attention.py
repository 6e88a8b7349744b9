"""Triton attention over paged keys and values on a GPU, at the published models' heads, against float64."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
attention = pytest.importorskip("nemo_lite_kernels.triton.attention")

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
A, K, D = 32, 2, 128


def pages(lengths, L, dtype, size=16):
    """Rows of these many places in all; what nobody has written is NaN."""
    B, N = len(lengths), max(-(-n // size) for n in lengths)
    q = torch.randn(B, L, A, D, device="cuda", dtype=dtype)
    k, v = (torch.randn(B * N, size, K, D, device="cuda", dtype=dtype) for _ in range(2))
    table = torch.randperm(B * N, device="cuda").view(B, N)
    place = torch.arange(N * size, device="cuda")
    for b, n in enumerate(lengths):
        behind = place[n:]
        k[table[b, behind // size], behind % size] = v[table[b, behind // size], behind % size] = float("nan")
    return q, k, v, table


def expected(q, k, v, table, starts, first):
    y = torch.empty(q.shape, dtype=torch.float64, device="cuda")
    L = q.shape[1]
    for b, start in enumerate(starts):
        end = start + first + L
        keys, values = (t[table[b]].flatten(0, 1)[first:end].double() for t in (k, v))
        visible = torch.arange(first, end, device="cuda") <= torch.arange(end - L, end, device="cuda")[:, None]
        for head in range(K):
            mine = slice(head * A // K, (head + 1) * A // K)
            scores = torch.einsum("lad,pd->alp", q[b, :, mine].double(), keys[:, head]) * D**-0.5
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            y[b, :, mine] = torch.einsum("alp,pd->lad", weights, values[:, head])
    return y


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("L", [1, 2, 5, 9])
@pytest.mark.parametrize(
    "starts,first",
    [([131072], 0), ([0], 0), ([1000], 1), ([0, 1, 15, 16, 17, 700, 4000, 9000], 0), ([300] * 64, 1)],
    ids=["long", "empty", "mtp", "ragged", "batch"],
)
@pytest.mark.parametrize("size", [16, 64])
def test_equals_the_softmax(starts, first, L, dtype, size):
    torch.manual_seed(L)
    q, k, v, table = pages([start + first + L for start in starts], L, dtype, size)
    y = attention.attention_paged(q, k, v, table, torch.tensor(starts, device="cuda"), first)
    want = expected(q, k, v, table, starts, first)
    assert y.dtype == dtype
    # Values average out over long rows, so that each query is compared with its own size.
    error = (y.double() - want).abs().amax(-1) / want.abs().amax(-1)
    assert float(error.max()) <= TOLERANCE[dtype]


def test_in_a_graph_lengths_are_read_on_the_device():
    starts = torch.tensor([5, 100, 900, 30], device="cuda")
    q, k, v, table = pages([1024] * 4, 1, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attention.attention_paged(q, k, v, table, starts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attention.attention_paged(q, k, v, table, starts)
    for _ in range(3):
        starts += 37
        graph.replay()
        want = expected(q, k, v, table, starts.tolist(), 0)
        assert float(((y.double() - want).abs().amax(-1) / want.abs().amax(-1)).max()) <= 1e-2

"""What is measured: sizes of models, calls of every op, what each call must compute and move, and its inputs.

Work and traffic of one call, by op. Every formula counts what an op cannot do without, whatever the backend:

- *products* are multiplications and additions that a matrix unit can do, at the GEMM rate of the call's dtype;
- *others* are elementwise operations, which run at the float32 rate; +, x, /, max, exp and sqrt are one each, and so
  silu(v) = v / (1 + exp(-v)) is 4 and its slope 6;
- *bytes* are those of all inputs, read once, and of all outputs, written once: what lies between them stays in cache.
  With a backward pass come the inputs once more, the gradient of the output, and the gradients of the inputs.

A backward pass makes two products for each one of the forward pass; what a backend computes again does not count.

T = B L tokens (B rows of length L), s bytes of a number in the call's dtype; other letters as in the references.

| op                  | products, forward                | others, forward     | backward | bytes, forward             |
|---------------------|----------------------------------|---------------------|----------|----------------------------|
| ssd                 | T (2 G N j + 2 H P j + 4 H P N)  | T H (2 j + 3 P)     | twice    | s T (2 H P + 2 G N) + 4 T H|
|                     |                                  |                     |          | + 8 H + 4 B H P N          |
| ... from a state    | the same                         | the same            |          | + 4 B H P N                |
| ssd_verify          | the same                         | the same            |          | as ssd: reads its state    |
| conv                |                                  | T C (2 W + 4)       | T C (4 W | 2 s T C + 4 C (W + 1)      |
|                     |                                  |                     | + 7)     |                            |
| ... with a window   |                                  | the same            |          | + s B (W - 1) C            |
| attention           | 4 A D B L (L + 1) / 2            | 4 A B L (L + 1) / 2 | the same | s T D (2 A + 2 K)          |
| attention_cached    | 4 A D B S                        | 4 A B S             |          | s D (2 A T + 2 K B S)      |
| experts             | 4 T k F M                        | T k (2 F + 2 M)     | T k (3 F | 2 s T M + 2 w F M E'       |
|                     |                                  |                     | + 4 M)   | + 12 T k                   |
| route               |                                  | T (6 E + 3 k)       |          | 4 T E + 4 E + 12 T k       |
| ... with statistics |                                  | T (10 E + 3 k)      | 8 T E    | + 8 E + 4                  |
| rms_norm            |                                  | 4 T C               | 9 T C    | 2 s T C + 4 C              |
| gated_norm          |                                  | 9 T C               | 17 T C   | 3 s T C + 4 C              |
| squared_relu        |                                  | 2 T F               | 2 T F    | 2 s T F                    |
| linear              | 2 T K N                          |                     |          | s T (K + N) + W            |
| unpack              |                                  | 2 K N               |          | W + 4 K N                  |
| weight_gradient     | 2 T K N                          |                     |          | s T (K + N) + 4 K N        |
| nll_and_gradient    |                                  | 4 T V               |          | s T V + 16 T               |
| ... with a gradient |                                  | 6 T V               |          | + s T V                    |
| operand             |                                  | 8 T K               |          | s T K + 4 T K + 4          |
| quantize            |                                  | 8 T K               |          | s T K + 9/16 T K + 4       |
| quantized_values    |                                  | T K                 |          | 9/16 T K + 4 T K + 4       |

The scan is counted in its chunked form: scores C B^T once a group and their product with x once a head over the lower
triangle of a chunk of l = min(L, 64) tokens (j = (l + 1) / 2 columns on average), what a chunk adds to the state, and
the outputs from the carried state. S are slots of the cache. M is the width that experts read, E' are the experts that
the tokens hit, and w is s, or 4 where float32 weights are trained in bfloat16; in a backward pass of experts the
gradients are those of all E. A window is the W - 1 inputs before the call. W of `linear` is s K N, or what the packed
weight takes: for every 32 inputs of a row 34 bytes (int8) or 18 (int4); 4 K N where the linear is trained. Weights of
conv and norm, the scan's dt, A and D, and all of route are float32; chosen experts and labels are int64. The loss
makes the gradient of its V logits a token in the forward pass. Number formats are measured on NVFP4:
an operand along its rows, to the nearest; values are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from nemo_lite_kernels.linear import PANEL, PackedWeight
from nemo_lite_kernels.quant import Spec, quantize_matrix
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What a model's layers measure."""

    hidden: int
    A: int  # query heads
    K: int  # key/value heads
    D: int  # of an attention head
    H: int  # Mamba heads
    P: int  # of a Mamba head
    N: int  # state
    G: int  # groups
    E: int  # experts
    k: int  # experts of a token
    expert_width: int
    expert_inner: int
    shared_inner: int
    V: int  # vocabulary
    W: int = 4  # taps of the convolution

    @property
    def inner(self) -> int:
        return self.H * self.P

    @property
    def conv_channels(self) -> int:
        return self.inner + 2 * self.G * self.N

    @property
    def projected(self) -> int:
        """Outputs of a Mamba layer's first linear, the one that `linear` stands for."""
        return self.inner + self.conv_channels + self.H


SIZES = {
    "bench_small": Sizes(512, 8, 2, 64, 16, 64, 64, 2, 32, 4, 128, 512, 1024, 8192),
    "bench_medium": Sizes(1024, 16, 4, 64, 32, 64, 128, 4, 32, 4, 256, 1024, 2048, 16384),
    "nemotron3_nano": Sizes(2688, 32, 2, 128, 64, 64, 128, 8, 128, 6, 2688, 1856, 3712, 131072),
    "nemotron3_super": Sizes(4096, 32, 2, 128, 128, 64, 128, 8, 512, 22, 1024, 2688, 5376, 131072),
    "tiny": Sizes(32, 4, 2, 8, 4, 8, 8, 2, 8, 3, 16, 24, 40, 64),  # for tests
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKED = {"int8": 8, "int4": 4}
CHUNK = 64
FEW = (1, 4, 8, 16)  # rows of linear and experts when tokens are decoded
VERIFIED = 4
# What stands before a shape where an op has several functions.
NAMES = {"rms_norm": "rms ", "gated_norm": "gated ", "weight_gradient": "dW ", "nll_and_gradient": "nll ",
         "operand": "operand ", "quantize": "codes ", "quantized_values": "values "}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call. mode: decode (something is carried in), verify, forward, or train (forward and backward)."""

    op: str
    function: str
    config: str
    mode: str
    dtype: str
    B: int
    L: int
    slots: int = 0  # of the cache, for attention_cached

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.config]

    @property
    def train(self) -> bool:
        return self.mode == "train"

    @property
    def shape(self) -> str:
        """Rows x length, in words that fit below a point."""
        rows = f"{self.B}" if self.L == 1 else f"{self.B}×{self.L}"
        if self.function == "unpack":
            return self.function
        grad = " grad" if self.train and self.function != "weight_gradient" else ""
        return NAMES.get(self.function, "") + rows + grad

    @functools.cached_property
    def experts(self) -> Tensor:
        """Chosen experts [T, k]: as many for each as random choice gives."""
        generator = torch.Generator().manual_seed(self.B * self.L)
        return torch.rand(self.B * self.L, self.sizes.E, generator=generator).topk(self.sizes.k).indices


@dataclass(frozen=True)
class Plan:
    """Shapes of a run: (rows, length) of each mode, rows of linear and experts, and slots of the cache."""

    decode: tuple[int, ...]
    forward: tuple[tuple[int, int], ...]
    train: tuple[int, int]
    few: tuple[int, ...]
    slots: int


def plan(config: str, device: str, quick: bool) -> Plan:
    if config == "tiny":
        return Plan((1,), ((1, 16),), (2, 16), (1, 4), 16)
    if device == "cuda":
        lengths = (2048,) if quick else (2048, 8192)
        return Plan((1, 64), tuple((1, n) for n in lengths), (1, lengths[-1]), (1, 8) if quick else FEW, 8192)
    train = (4 if config == "bench_small" else 1, 512)
    if quick:
        return Plan((1,), ((1, 512),), train, (1, 8), 2048)
    return Plan((1, 8), ((1, 512), (1, 2048)), train, FEW, 2048)


FUNCTIONS = {
    "ssd": ("ssd",), "conv": ("causal_conv",), "attention": ("attention",), "experts": ("experts",),
    "router": ("route",), "norm": ("rms_norm", "gated_norm"), "activation": ("squared_relu",),
    "linear": ("linear", "unpack"), "loss": ("nll_and_gradient", "weight_gradient"),
    "quant": ("operand", "quantize", "quantized_values"),
}  # fmt: skip


def cases(config: str, device: str = "cpu", quick: bool = False, ops: tuple[str, ...] = ()) -> Iterator[Case]:
    """All calls of a model's layers, small ones first."""
    p = plan(config, device, quick)
    for op, names in FUNCTIONS.items():
        if ops and op not in ops:
            continue
        for function in names:
            for dtype in _dtypes(op, function):
                case = functools.partial(Case, op, function, config)
                if function == "unpack":
                    yield case("forward", dtype, 1, 1)
                    continue
                if op == "quant":
                    yield from (case("forward", dtype, *shape) for shape in p.forward)
                    continue
                if op == "loss":
                    if function == "nll_and_gradient":
                        yield case("forward", dtype, *p.forward[0])
                    yield case("train", dtype, *p.train)
                    continue
                for rows in p.few if op in ("linear", "experts") else p.decode:
                    if op == "attention":
                        yield Case(op, "attention_cached", config, "decode", dtype, rows, 1, p.slots)
                    else:
                        yield case("decode", dtype, rows, 1)
                if op == "ssd":
                    yield Case(op, "ssd_verify", config, "verify", dtype, 1, VERIFIED)
                if dtype not in PACKED:
                    for rows, length in p.forward:
                        yield case("forward", dtype, rows, length)
                    yield case("train", dtype, *p.train)


def _dtypes(op: str, function: str) -> tuple[str, ...]:
    if function == "unpack":
        return tuple(PACKED)
    return ("float32",) if op == "router" else (*DTYPES, *(PACKED if op == "linear" else ()))


# ---------------------------------------------------------------------------------------------------- what a call costs


@dataclass(frozen=True)
class Cost:
    products: float
    others: float
    bytes: float


def cost(case: Case) -> Cost:
    """Operations and bytes of a call: the table at the top of this file."""
    s = 2 if case.dtype == "bfloat16" else 4
    return _COSTS[case.op](case, case.sizes, case.B * case.L, s)


def _pass(case: Case, products: float, others: tuple[float, float], inputs: float, outputs: float, **sizes) -> Cost:
    """The forward pass, or both. `dy` and `gradients` are bytes of the output's and the inputs' gradients."""
    if not case.train:
        return Cost(products, others[0], inputs + outputs)
    moved = inputs + outputs + inputs + sizes["dy"] + sizes["gradients"]
    return Cost(3 * products, sum(others), moved)


def _ssd(case: Case, z: Sizes, T: int, s: int) -> Cost:
    columns = (min(case.L, CHUNK) + 1) / 2
    products = T * (2 * z.G * z.N * columns + 2 * z.H * z.P * columns + 4 * z.H * z.P * z.N)
    others = T * z.H * (2 * columns + 3 * z.P)
    x, state = s * T * z.inner, 4 * case.B * z.inner * z.N
    inputs = x + 2 * s * T * z.G * z.N + 4 * T * z.H + 8 * z.H
    return _pass(
        case, products, (others, 2 * others), inputs + (state if case.mode in ("decode", "verify") else 0),
        x + (0 if case.mode == "verify" else state), dy=x, gradients=inputs,
    )  # fmt: skip


def _conv(case: Case, z: Sizes, T: int, s: int) -> Cost:
    C = z.conv_channels
    x, weights = s * T * C, 4 * C * (z.W + 1)
    window = s * case.B * (z.W - 1) * C if case.mode == "decode" else 0
    others = T * C * (2 * z.W + 4), T * C * (4 * z.W + 7)
    return _pass(case, 0, others, x + weights + window, x, dy=x, gradients=x + weights)


def _attention(case: Case, z: Sizes, T: int, s: int) -> Cost:
    pairs = case.B * (case.slots or case.L * (case.L + 1) / 2)  # of a query head
    q, keys = s * T * z.A * z.D, 2 * s * z.K * z.D * (case.B * case.slots or T)
    softmax = 4 * z.A * pairs
    return _pass(case, 4 * z.A * z.D * pairs, (softmax, softmax), q + keys, q, dy=q, gradients=q + keys)


def _experts(case: Case, z: Sizes, T: int, s: int) -> Cost:
    copies, hit = T * z.k, len(case.experts.unique())
    x, each = s * T * z.expert_width, (4 if case.train else s) * 2 * z.expert_inner * z.expert_width
    inputs = x + hit * each + 12 * copies
    return _pass(
        case, 4 * copies * z.expert_inner * z.expert_width,
        (copies * (2 * z.expert_inner + 2 * z.expert_width), copies * (3 * z.expert_inner + 4 * z.expert_width)),
        inputs, x, dy=x, gradients=x + z.E * each + 4 * copies,
    )  # fmt: skip


def _router(case: Case, z: Sizes, T: int, s: int) -> Cost:
    logits = 4 * T * z.E
    others = T * ((10 if case.train else 6) * z.E + 3 * z.k)
    outputs = 12 * T * z.k + (8 * z.E + 4 if case.train else 0)
    return _pass(
        case, 0, (others, 8 * T * z.E), logits + 4 * z.E, outputs, dy=4 * T * z.k + 4, gradients=logits
    )  # fmt: skip


def _norm(case: Case, z: Sizes, T: int, s: int) -> Cost:
    gated = case.function == "gated_norm"
    C = z.inner if gated else z.hidden
    x, weight = s * T * C, 4 * C
    others = (9 * T * C, 17 * T * C) if gated else (4 * T * C, 9 * T * C)
    inputs = (2 if gated else 1) * x + weight
    return _pass(case, 0, others, inputs, x, dy=x, gradients=inputs)


def _activation(case: Case, z: Sizes, T: int, s: int) -> Cost:
    n = T * z.shared_inner
    return _pass(case, 0, (2 * n, 2 * n), s * n, s * n, dy=s * n, gradients=s * n)


def _linear(case: Case, z: Sizes, T: int, s: int) -> Cost:
    K, N = z.hidden, z.projected
    if case.dtype in PACKED:
        weight = -(-N // PANEL) * PANEL * (K * PACKED[case.dtype] // 8 + 2 * (-(-K // 32)))
    else:
        weight = (4 if case.train else s) * K * N
    if case.function == "unpack":
        return Cost(0, 2 * K * N, weight + 4 * K * N)
    x, y = s * T * K, s * T * N
    return _pass(case, 2 * T * K * N, (0, 0), x + weight, y, dy=y, gradients=x + weight)


def _loss(case: Case, z: Sizes, T: int, s: int) -> Cost:
    if case.function == "weight_gradient":
        K, N = z.hidden, z.projected
        return Cost(2 * T * K * N, 0, s * T * (K + N) + 4 * K * N)
    logits = s * T * z.V
    return Cost(0, (6 if case.train else 4) * T * z.V, (2 if case.train else 1) * logits + 16 * T)


def _quant(case: Case, z: Sizes, T: int, s: int) -> Cost:
    n, packed = T * z.hidden, 9 / 16
    read = packed if case.function == "quantized_values" else s
    written = packed if case.function == "quantize" else 4
    return Cost(0, (1 if case.function == "quantized_values" else 8) * n, (read + written) * n + 4)


_COSTS: dict[str, Callable[[Case, Sizes, int, int], Cost]] = {
    "ssd": _ssd, "conv": _conv, "attention": _attention, "experts": _experts, "router": _router, "norm": _norm,
    "activation": _activation, "linear": _linear, "loss": _loss, "quant": _quant,
}  # fmt: skip


def memory(case: Case, backend: str) -> float:
    """Bytes that a call is expected to take, with its inputs: no model of an allocator, but enough to stay out of
    trouble."""
    z, T = case.sizes, case.B * case.L
    total = 2.0 * cost(case).bytes
    if case.op == "ssd":
        states = T if backend == "recurrent" else -(-T // CHUNK)
        total += 4.0 * states * z.inner * z.N * (5 if case.train else 2)
    elif case.op == "attention" and backend == "reference":
        total += z.A * T * T * (28.0 if case.train else 16.0)
    elif case.op == "experts":  # weights, and in training their gradients and the casts of both
        stacks = 2.0 * z.E * z.expert_inner * z.expert_width
        width = 14 if case.train else 2 if case.dtype == "bfloat16" else 4
        total = width * stacks + 12.0 * T * z.k * (z.expert_inner + z.expert_width)
    elif case.op == "loss":
        total += 12.0 * T * z.V
    elif case.dtype in PACKED:
        total += 10.0 * z.hidden * z.projected
    return total


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass
class Inputs:
    """Arguments of a call; what is differentiated; and which of its results have a gradient."""

    arguments: tuple
    leaves: tuple[Tensor, ...] = ()
    differentiated: tuple[int, ...] = (0,)

    def call(self, function: Callable) -> Callable[[], object]:
        """The call as it is timed: forward without gradients, or forward and backward."""
        if not self.leaves:

            def forward():
                with torch.no_grad():
                    return function(*self.arguments)

            return forward
        gradients: list[Tensor] = []

        def both():
            results = function(*self.arguments)
            results = results if isinstance(results, tuple) else (results,)
            ys = [results[i] for i in self.differentiated]
            if not gradients:
                gradients.extend(torch.randn_like(y) for y in ys)
            return torch.autograd.grad(ys, self.leaves, gradients)

        return both


def inputs(case: Case, device: str) -> Inputs:
    """Random arguments of a call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        dtype = dtype or DTYPES.get(case.dtype, torch.float32)
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(scale)

    arguments, leaves, differentiated = _INPUTS[case.op](case, case.sizes, normal)
    if not case.train:
        return Inputs(arguments)
    return Inputs(arguments, tuple(arguments[i].requires_grad_() for i in leaves), differentiated)


def _ssd_inputs(case: Case, z: Sizes, normal):
    f32, (B, L) = torch.float32, (case.B, case.L)
    dt = torch.nn.functional.softplus(normal(B, L, z.H, dtype=f32) - 3)
    A = -1 - 15 * normal(z.H, dtype=f32).sigmoid()
    scan = (normal(B, L, z.H, z.P), dt, A, normal(B, L, z.G, z.N), normal(B, L, z.G, z.N), normal(z.H, dtype=f32))
    if case.mode in ("decode", "verify"):
        state = normal(B, z.H, z.P, z.N, dtype=f32)
        return (*scan, state) if case.mode == "verify" else (*scan, None, state), (), ()
    return scan, range(6), (0,)


def _conv_inputs(case: Case, z: Sizes, normal):
    C, f32 = z.conv_channels, torch.float32
    arguments = normal(case.B, case.L, C), normal(C, z.W, dtype=f32), normal(C, dtype=f32)
    if case.mode == "decode":
        return (*arguments, None, normal(case.B, z.W - 1, C)), (), ()
    return arguments, range(3), (0,)


def _attention_inputs(case: Case, z: Sizes, normal):
    B, L = case.B, case.L
    if case.slots:
        keys, values = (normal(B, case.slots, z.K, z.D) for _ in range(2))
        return (normal(B, L, z.A, z.D), keys, values, [case.slots - L] * B), (), ()
    T = B * L
    return (normal(T, z.A, z.D), normal(T, z.K, z.D), normal(T, z.K, z.D), [L] * B), range(3), (0,)


def _experts_inputs(case: Case, z: Sizes, normal):
    T, F, W = case.B * case.L, z.expert_inner, z.expert_width
    dtype = torch.float32 if case.train else DTYPES[case.dtype]

    def stack(rows: int, columns: int) -> Tensor:  # one matrix again and again: drawing them all takes minutes
        one = normal(rows, columns, dtype=dtype, scale=columns**-0.5)
        return one.expand(z.E, rows, columns).contiguous()

    x = normal(T, W)
    weight = normal(T, z.k, dtype=torch.float32).sigmoid()
    return (x, case.experts.to(x.device), weight, stack(F, W), stack(W, F)), (0, 2, 3, 4), (0,)


def _router_inputs(case: Case, z: Sizes, normal):
    settings = (z.k, 2.5, True, 1, 1)
    arguments = (normal(case.B * case.L, z.E), normal(z.E, scale=0.01), *settings)
    return (*arguments, case.B) if case.train else arguments, (0,), (1, 3)


def _norm_inputs(case: Case, z: Sizes, normal):
    if case.function == "rms_norm":
        return (normal(case.B, case.L, z.hidden), normal(z.hidden, dtype=torch.float32), 1e-5), (0, 1), (0,)
    x, gate = (normal(case.B, case.L, z.inner) for _ in range(2))
    return (x, gate, normal(z.inner, dtype=torch.float32), 1e-5, z.G), (0, 1, 2), (0,)


def _activation_inputs(case: Case, z: Sizes, normal):
    return (normal(case.B, case.L, z.shared_inner),), (0,), (0,)


def _linear_inputs(case: Case, z: Sizes, normal):
    x, K, N = normal(case.B * case.L, z.hidden), z.hidden, z.projected
    if case.dtype not in PACKED:
        return (x, normal(N, K, dtype=torch.float32 if case.train else None, scale=K**-0.5)), range(2), (0,)
    # Some panels again and again, as of experts.
    some = PackedWeight.pack(normal(8 * PANEL, K, scale=K**-0.5), PACKED[case.dtype])
    panels = -(-N // PANEL)
    codes, scales = (
        t.repeat(-(-panels // 8), *(1,) * (t.dim() - 1))[:panels].contiguous() for t in (some.codes, some.scales)
    )
    weight = PackedWeight(codes, scales, torch.Size((N, K)), some.bits, some.group)
    return ((weight, torch.float32) if case.function == "unpack" else (x, weight)), (), ()


def _loss_inputs(case: Case, z: Sizes, normal):
    T = case.B * case.L
    if case.function == "weight_gradient":
        return (normal(T, z.projected), normal(T, z.hidden), torch.float32), (), ()
    logits = normal(T, z.V)
    labels = torch.arange(T, device=logits.device) % z.V
    return (logits, labels, torch.ones(T, device=logits.device), case.train), (), ()


def _quant_inputs(case: Case, z: Sizes, normal):
    x, spec = normal(case.B * case.L, z.hidden), Spec.of("nvfp4")
    if case.function == "quantized_values":
        return (quantize_matrix(x, spec), torch.float32), (), ()
    return (x, spec), (), ()


_INPUTS: dict[str, Callable] = {
    "ssd": _ssd_inputs, "conv": _conv_inputs, "attention": _attention_inputs, "experts": _experts_inputs,
    "router": _router_inputs, "norm": _norm_inputs, "activation": _activation_inputs, "linear": _linear_inputs,
    "loss": _loss_inputs, "quant": _quant_inputs,
}  # fmt: skip

"""`Layers`: what a model part is built from.

A part of the model never knows where its weights live. It asks a `Layers` for linears, norms and parameters by full
name, and this object answers with modules that hold this rank's share. Two choices meet here: *placement* (this class
keeps everything whole; an engine may split columns, rows, heads and experts and own the collectives), and *number
format* (`matmul_for(name, ...)` and `experts_for(name)` say what a linear and a layer's experts multiply with).

Outputs and channels that may be split are given as segments (units, size): so many heads or groups of so many rows
each. Every rank has its share of the units of each segment.

Activations are token-major, [T, width], with T = rows x length; collectives of a sequence-parallel placement therefore
work on dim 0. Such a placement scatters tokens in `embedding` and in the norm named mtp.hnorm; gathers them in
`column_linear` and the last norms (norm_f, mtp.final_layernorm); and sums and scatters them in `row_linear`. Routers
and experts see a rank's own tokens, `mine`. tests/fake_layers.py is one.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from nemo_lite_kernels import Ops, select
from torch import Tensor, nn

from nemo_lite.precision import te
from nemo_lite.precision.linear import Emulated, Gemms, Matmul, Numerics
from nemo_lite.train.loss import cross_entropy_chunked

Segment = tuple[int, int]  # so many units (heads, groups, channels) of so many rows each


class Linear(nn.Module):
    """y [T, out] = x [T, in] W^T, W [out, in]."""

    def __init__(self, n_in: int, n_out: int, matmul: Matmul):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight)


class Embedding(nn.Module):
    """Rows of W [V, H]."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class Head(nn.Module):
    """The output projection W [V, H]: logits, or the loss over them in chunks of tokens."""

    def __init__(self, hidden_size: int, vocab_size: int, matmul: Matmul, ops: Ops, chunk: int = 512):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.matmul, self.chunk = matmul, chunk
        self.loss_ops = ops.nll_and_gradient, ops.weight_gradient

    def forward(self, h_TH: Tensor, labels_T: Tensor | None = None, weights_T: Tensor | None = None):
        """Logits [T, V]; or, with labels (-100: none) and a weight per token, (sum of weight x nll, nll [T] detached).

        Both go through forward, so that a sharded weight is gathered once.
        """
        if labels_T is None:
            return self.matmul(h_TH, self.weight)
        return cross_entropy_chunked(h_TH, self.weight, labels_T, weights_T, self.chunk, *self.loss_ops)

    def logits(self, h_TH: Tensor) -> Tensor:
        """Logits [T, V]."""
        return self(h_TH)

    def loss(self, h_TH: Tensor, labels_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over tokens of weight x cross-entropy, and the cross-entropies [T], detached."""
        return self(h_TH, labels_T, weights_T)


class Norm(nn.Module):
    """RMSNorm over [T, size]."""

    def __init__(self, size: int, eps: float, op: Callable):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.op = eps, op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.eps)


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(z) over [T, size], per group of channels."""

    def __init__(self, size: int, groups: int, eps: float, op: Callable):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.groups, self.eps, self.op = groups, eps, op

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return self.op(y, z, self.weight, self.eps, self.groups)


class Experts(nn.Module):
    """Routed experts: up [E, F, L], down [E, L, F], squared ReLU between."""

    def __init__(self, n_experts: int, size: int, inner: int, op: Callable, unpack: Callable):
        super().__init__()
        self.up = nn.Parameter(torch.empty(n_experts, inner, size))
        self.down = nn.Parameter(torch.empty(n_experts, size, inner))
        self.op, self.unpack = op, unpack

    def forward(self, x_TL: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        return self.op(x_TL, expert_Tk, weight_Tk, self.unpack(self.up, x_TL.dtype), self.unpack(self.down, x_TL.dtype))


class Layers:
    """The whole placement: every weight is complete on this rank."""

    def __init__(
        self,
        device: str | torch.device = "cpu",
        kernels: Mapping[str, str] | None = None,
        formats: Mapping[str, Gemms] | None = None,
        numerics: Numerics | None = None,
    ):
        """formats: those of the linears and experts that are not computed in the activations' dtype, by full name;
        numerics: what their products share."""
        self.ops: Ops = select(device, kernels)
        self.numerics = numerics or Numerics()
        self.emulated = {
            name: Emulated(name, gemms, self.numerics, self.ops)
            for name, gemms in (formats or {}).items()
            if not gemms.plain
        }
        self.native = any(c["op"] == "quant" and c["backend"] == "transformer_engine" for c in self.ops.choices)

    def matmul_for(self, name: str, n_in: int, n_out: int) -> Matmul:
        """What the linear of this name multiplies with."""
        emulated = self.emulated.get(name)
        if emulated is None:
            return self.ops.linear
        if not self.native:
            return emulated
        if (why := te.refusal(emulated.gemms, n_in, n_out)) is None:
            return te.Native(emulated)
        self.numerics.refused[name] = why
        return emulated

    def experts_for(self, name: str) -> Callable:
        """What the routed experts of this name are computed with."""
        if name not in self.emulated:
            return self.ops.experts
        if self.native:
            self.numerics.refused[name] = "experts are always emulated"
        return self.emulated[name].experts

    def linear(self, name: str, n_in: int, n_out: int) -> nn.Module:
        """A linear that is whole on every rank."""
        return Linear(n_in, n_out, self.matmul_for(name, n_in, n_out))

    def column_linear(self, name: str, n_in: int, *segments: Segment) -> nn.Module:
        """A linear whose outputs are split over ranks, the units of each segment for themselves."""
        return self.linear(name, n_in, self.rows(segments))

    def row_linear(self, name: str, n_in: int, n_out: int) -> nn.Module:
        """A linear whose inputs are split over ranks; its output is summed over them."""
        return self.linear(name, n_in, n_out)

    def together(self, x: Tensor, *columns: nn.Module) -> list[Tensor]:
        """What several column linears make of the same x."""
        return [column(x) for column in columns]

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> nn.Module:
        return Embedding(vocab_size, hidden_size)

    def head(self, name: str, hidden_size: int, vocab_size: int) -> Head:
        return Head(hidden_size, vocab_size, self.matmul_for(name, hidden_size, vocab_size), self.ops)

    def norm(self, name: str, size: int, eps: float) -> nn.Module:
        return Norm(size, eps, self.ops.rms_norm)

    def gated_norm(self, name: str, size: int, groups: int, eps: float) -> nn.Module:
        """Over this rank's share of `size` channels and `groups` groups."""
        return GatedNorm(self.local(size), self.local(groups), eps, self.ops.gated_norm)

    def experts(self, name: str, n_experts: int, size: int, inner: int) -> nn.Module:
        return Experts(n_experts, size, inner, self.experts_for(name), self.ops.unpack)

    def channels(self, name: str, *segments: Segment, width: int | None = None) -> nn.Parameter:
        """A parameter [n] or [n, width] per head or channel, n = the rows of this rank's units of all segments."""
        n = self.rows(segments)
        return nn.Parameter(torch.empty(n) if width is None else torch.empty(n, width))

    def route(self, *args):
        """The op `route` over this rank's tokens: [T, E] logits and what follows them in its signature.

        `rows` and the counted positions are those of all ranks' tokens."""
        return self.ops.route(*args)

    def mine(self, x: Tensor) -> Tensor:
        """The rows of this rank's tokens, where a placement scatters them over ranks between blocks."""
        return x

    def rows(self, segments: Iterable[Segment]) -> int:
        """The rows of this rank's units of all segments."""
        return sum(self.local(units) * size for units, size in segments)

    def local(self, n: int) -> int:
        """This rank's share of n heads, groups or channels: 1 where there are fewer of them than ranks."""
        return n

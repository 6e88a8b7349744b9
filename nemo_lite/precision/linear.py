"""What linears and experts multiply with.

A matmul takes x [..., in] in the computing dtype and the weight [out, in] as it is stored (float32 master weights in
training, packed codes after `quantize_weights`), and returns [..., out] in x's dtype. A linear is given its matmul by
name when it is built; the plain one is the kernels' op `linear`.

A quantised linear rounds both operands of each of its three products to codes of a number format first:

    product              operand 1                                operand 2
    fprop  Y = X W^T     X, blocks along in                       W
    dgrad dX = dY W      dY, blocks along out, stochastic         W, the same codes where its blocks are square
    wgrad dW = dY^T X    dY^T, blocks along tokens, stochastic    X^T, blocks along tokens

In NVFP4 blocks are 1x16, those of W 16x16, and both operands of wgrad go through the Hadamard transform; "stochastic"
is NVFP4's alone (arXiv 2509.25149, section 4). Values without tensor scales are exact in bfloat16, so that products are
those of the hardware up to the order of their float32 sums; the two tensor scales are multiplied in afterwards. A CPU
multiplies them in float32, whose sums are float32 on every CPU. X^T and W are kept as codes for the backward pass: 4.5
bits a number in NVFP4.

Experts do the same for each expert by itself: its own largest magnitudes, and its tokens padded with zeros to whole
blocks in wgrad's copies. Weights are rounded to x's dtype before they are quantised, as a gather in that dtype does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from nemo_lite_kernels import Ops
from nemo_lite_kernels.common import accumulate_dtype
from nemo_lite_kernels.moe import sort_by_expert
from nemo_lite_kernels.quant import Quantized, Spec
from torch import Tensor

from nemo_lite.precision.recipe import Gemms

Matmul = Callable[[Tensor, Tensor], Tensor]


def spec_of(gemms: Gemms, gemm: str, operand: str) -> Spec | None:
    """How operand "x", "w" or "dy" of a product is quantised; None: not at all."""
    format = getattr(gemms, gemm)
    if format == "bf16":
        return None
    if format == "nvfp4":
        rounding = "stochastic" if operand == "dy" and gemms.stochastic else "nearest"
        block = (16, 16) if operand == "w" and gemms.square else (1, 16)
        return Spec.of("nvfp4", block, rounding, hadamard=gemm == "wgrad" and gemms.hadamard)
    if format == "fp8_block" and operand == "w":
        return Spec.of(format, (128, 128))
    return Spec.of("fp8_e5m2" if format == "fp8" and operand == "dy" else format)


@dataclass
class Numerics:
    """What all quantised products of a model share: where in the run they are, and what is measured.

    on       False: everything is multiplied in the computing dtype (a run's tail)
    step     of the run; with the micro batch, the rank, a linear's name and its calls so far, it seeds what is random
    after    the experts' routing weights are multiplied in after the down projection, as servers do: to measure ranges
    refused  linears that a native engine could have multiplied, and why it does not
    watch    called with (name, operand, x, spec, offsets, transpose) for everything that is quantised, if set
    """

    seed: int = 0
    on: bool = True
    step: int = 0
    after: bool = False
    watch: Callable[..., None] | None = None
    place: tuple[int, int] = (0, 0)
    calls: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def begin(self, micro: int, rank: int) -> None:
        """The forward and backward of this rank's micro batch `micro` follow."""
        self.place = (micro, rank)
        self.calls.clear()

    def seed_for(self, name: str) -> int:
        """A new seed for a backward pass of the linear `name`: the same in a run that was resumed, and whether the
        forward was run once or again."""
        call = self.calls[name] = self.calls.get(name, -1) + 1
        state = 0
        for word in (self.seed, zlib.crc32(name.encode()), self.step, *self.place, call):
            state = _mix(state ^ word)
        return state


def _mix(x: int) -> int:
    """SplitMix64's step (Steele, Lea and Flood 2014): a bijection of 64 bits in which every bit moves half of them."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


Kept = Quantized | Tensor
Operand = tuple[Tensor, Tensor | None]  # values [rows, contraction], padded or not, and their tensor scales


@dataclass
class Emulated:
    """The emulated products of one linear, or of one stack of experts: its formats, and the kernels that quantise.

    An operand is a matrix [rows, contraction]: X, W and dY as they are, or the transpose of one. Codes of square blocks
    and of whole tensors serve both ways.
    """

    name: str
    gemms: Gemms
    numerics: Numerics
    ops: Ops

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """y [.., out] of x [.., in]."""
        if not self.numerics.on:
            return self.ops.linear(x, weight)
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, self, torch.is_grad_enabled())
        return y.view(*x.shape[:-1], weight.shape[0])

    def experts(self, x_TL: Tensor, expert_Tk: Tensor, weight_Tk: Tensor, up_EFL: Tensor, down_ELF: Tensor) -> Tensor:
        """The experts' op (nemo_lite_kernels.moe) with quantised products. The routing weight is multiplied in before
        the down projection, as Megatron-core does: nothing of the output is kept."""
        if not self.numerics.on:
            return self.ops.experts(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF)
        return _Experts.apply(x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF, self, torch.is_grad_enabled())

    def now(self, gemm: str, which: str, x: Tensor, seed=0, offsets=None, transpose=False, part="") -> Operand:
        """x, or its transpose, as an operand. `part` tells an expert's two projections apart in what is measured."""
        spec = self._watched(gemm, which, x, offsets, transpose, part)
        if spec is None:
            return (x.T if transpose else x).to(_product_dtype(x)), None
        across = transpose and not _both_ways(spec)
        v, scale = self.ops.operand(x, spec, seed, offsets=offsets, transpose=across, dtype=_product_dtype(x))
        return v[:, : x.shape[1]].T if transpose and not across else v, scale

    def keep(self, gemm: str, which: str, x: Tensor, offsets=None, transpose=False, part="") -> Kept:
        """The same, rounded to the nearest, as what is kept for later."""
        spec = self._watched(gemm, which, x, offsets, transpose, part)
        if spec is None:
            return x
        return self.ops.quantize(x, spec, offsets=offsets, transpose=transpose and not _both_ways(spec))

    def read(self, kept: Kept, dtype: torch.dtype, transpose: bool = False) -> Operand:
        """What `now` gives, from what `keep` kept."""
        if not isinstance(kept, Quantized):
            return (kept.T if transpose else kept).to(dtype), None
        v = self.ops.quantized_values(kept, dtype)
        if kept.across:
            return v, kept.tensor_scale
        v = v[:, : kept.shape[-1]]
        return v.T if transpose else v, kept.tensor_scale

    def weight(self, w: Tensor, offsets=None, part="") -> tuple[Kept, Kept | None]:
        """W for fprop, and W^T for dgrad where the codes of the first do not serve."""
        kept = self.keep("fprop", "w", w, offsets=offsets, part=part)
        spec = spec_of(self.gemms, "dgrad", "w")
        if spec == spec_of(self.gemms, "fprop", "w") and _both_ways(spec):
            return kept, None
        return kept, self.keep("dgrad", "w", w, offsets=offsets, transpose=True, part=part)

    def _watched(self, gemm, which, x, offsets, transpose, part) -> Spec | None:
        spec = spec_of(self.gemms, gemm, which)
        if spec is not None and self.numerics.watch is not None:
            self.numerics.watch(f"{self.name}{part}", f"{gemm} {which}", x, spec, offsets, transpose)
        return spec


def _both_ways(spec: Spec | None) -> bool:
    """Whether the codes of a matrix are those of its transpose."""
    return spec is None or spec.block is None or spec.block[0] == spec.block[1]


def _product_dtype(x: Tensor) -> torch.dtype:
    """Of operands: bfloat16 where its products have float32 sums and results (CUDA), else float32."""
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else torch.float32


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def _product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T times the tensor scales, in `dtype`; sums are float32."""
    (a_MK, a_scale), (b_NK, b_scale) = a, b
    K = min(a_MK.shape[1], b_NK.shape[1])  # one of them may be padded
    y = _mm(a_MK[:, :K], b_NK[:, :K].T)
    if (scale := _times(a_scale, b_scale)) is not None:
        y = y.mul_(scale)
    return y.to(dtype)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _save(ctx, *kept: Kept | None) -> None:
    """Through `save_for_backward`, so that recomputation and offloading see the tensors."""
    tensors: list[Tensor | None] = []
    ctx.kept = []
    for item in kept:
        if isinstance(item, Quantized):
            tensors += [item.codes, item.scales, item.tensor_scale]
            ctx.kept.append(replace(item, codes=None, scales=None, tensor_scale=None, amax=None))  # type: ignore
        else:
            tensors.append(item)
            ctx.kept.append(None)
    ctx.save_for_backward(*tensors)


def _saved(ctx) -> Iterator[Any]:
    tensors = iter(ctx.saved_tensors)
    for empty in ctx.kept:
        if empty is None:
            yield next(tensors)
        else:
            yield replace(empty, codes=next(tensors), scales=next(tensors), tensor_scale=next(tensors))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, plan: Emulated, training: bool):
        w, kind = weight.to(x.dtype), _product_dtype(x)
        kept, turned = plan.weight(w)
        y = _product(plan.now("fprop", "x", x), plan.read(kept, kind), x.dtype)
        need_x, need_w = (training and need for need in ctx.needs_input_grad[:2])
        if need_x or need_w:
            _save(
                ctx, (turned if turned is not None else kept) if need_x else None,
                plan.keep("wgrad", "x", x, transpose=True) if need_w else None,
            )  # fmt: skip
            ctx.plan, ctx.dtype = plan, weight.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        plan, dx, dw = ctx.plan, None, None
        seed = plan.numerics.seed_for(plan.name)
        w, x = _saved(ctx)
        kind, dy = _product_dtype(dy), dy if dy.stride(-1) == 1 else dy.contiguous()
        if w is not None:
            dx = _product(plan.now("dgrad", "dy", dy, _mix(seed)), plan.read(w, kind, True), dy.dtype)
        if x is not None:
            a = plan.now("wgrad", "dy", dy, _mix(seed + 1), transpose=True)
            dw = _product(a, plan.read(x, kind, True), ctx.dtype)
        return dx, dw, None, None


@dataclass
class _Groups:
    """Tokens sorted by expert: expert e's are rows bounds[e] to bounds[e+1]."""

    offsets: Tensor  # int64 [E+1]
    bounds: list[int]

    def of_rows(self, scale: Tensor) -> Tensor:
        """A number for each expert, [S, 1] for each of its rows."""
        return scale.repeat_interleave(self.offsets.diff().to(scale.device))[:, None]

    def products(self, a: Operand, b_ENK: Tensor, b_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[S, N]: each expert's rows of a times its own b^T."""
        a_SK, a_scale = a
        K = min(a_SK.shape[1], b_ENK.shape[2])
        y = a_SK.new_empty(a_SK.shape[0], b_ENK.shape[1], dtype=torch.float32)
        for e, (first, last) in enumerate(zip(self.bounds, self.bounds[1:])):
            if last > first:
                y[first:last] = _mm(a_SK[first:last, :K], b_ENK[e, :, :K].T)
        if (scale := _times(a_scale, b_scale)) is not None:
            y = y.mul_(self.of_rows(scale))
        return y.to(dtype)

    def sums(self, a: Operand, b: Operand, width: int, dtype: torch.dtype) -> Tensor:
        """[E, M, N]: a b^T over each expert's own tokens, padded to multiples of `width` in a [M, P] and b [N, P]."""
        (a_MP, a_scale), (b_NP, b_scale) = a, b
        y = a_MP.new_zeros(len(self.bounds) - 1, a_MP.shape[0], b_NP.shape[0], dtype=dtype)
        at = 0
        for e, (first, last) in enumerate(zip(self.bounds, self.bounds[1:])):
            end = at + -(-(last - first) // width) * width
            if end > at:
                y[e] = _mm(a_MP[:, at:end], b_NP[:, at:end].T)
            at = end
        if (scale := _times(a_scale, b_scale)) is not None:
            y = y.mul_(scale[:, None, None])
        return y


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TL, expert_Tk, weight_Tk, up_EFL, down_ELF, plan: Emulated, training: bool):
        dtype, kind = x_TL.dtype, _product_dtype(x_TL)
        order, counts_E = sort_by_expert(expert_Tk, up_EFL.shape[0])
        offsets = torch.nn.functional.pad(counts_E.cumsum(0), (1, 0)).cpu()
        groups = _Groups(offsets, offsets.tolist())
        token_S = order // weight_Tk.shape[1]
        weight_S1 = weight_Tk.flatten()[order, None].to(dtype)
        x_SL = x_TL[token_S]
        up, up_turned, up_b, up_scale = _stack(plan, up_EFL, dtype, kind, ".up_proj")
        u_SF = groups.products(plan.now("fprop", "x", x_SL, offsets=offsets, part=".up_proj"), up_b, up_scale, dtype)
        u_SF = u_SF.relu_()
        a_SF = u_SF.square()
        if not plan.numerics.after:
            a_SF = a_SF.mul_(weight_S1)
        down, down_turned, down_b, down_scale = _stack(plan, down_ELF, dtype, kind, ".down_proj")
        a = plan.now("fprop", "x", a_SF, offsets=offsets, part=".down_proj")
        y_SL = groups.products(a, down_b, down_scale, accumulate_dtype(x_TL))
        if plan.numerics.after:
            y_SL = y_SL * weight_S1
        y_TL = torch.zeros_like(x_TL, dtype=y_SL.dtype).index_add_(0, token_S, y_SL).to(dtype)
        if training and any(ctx.needs_input_grad):
            _save(
                ctx, order, weight_S1, u_SF, up if up_turned is None else up_turned,
                down if down_turned is None else down_turned,
                plan.keep("wgrad", "x", x_SL, offsets=offsets, transpose=True, part=".up_proj"),
                plan.keep("wgrad", "x", a_SF, offsets=offsets, transpose=True, part=".down_proj"),
            )  # fmt: skip
            ctx.plan, ctx.groups = plan, groups
            ctx.like = x_TL.shape, weight_Tk.shape, weight_Tk.dtype, up_EFL.dtype
        return y_TL

    @staticmethod
    def backward(ctx, dy_TL):
        plan, groups, offsets = ctx.plan, ctx.groups, ctx.groups.offsets
        seed = plan.numerics.seed_for(plan.name)
        x_shape, weight_shape, weight_dtype, master = ctx.like
        order, weight_S1, u_SF, up, down, x, a = _saved(ctx)
        dtype, kind, E = u_SF.dtype, _product_dtype(u_SF), len(groups.bounds) - 1
        token_S = order // weight_shape[1]
        spec = spec_of(plan.gemms, "wgrad", "x")
        width = 1 if spec is None or _both_ways(spec) else spec.width

        def product(d, w, number, part):
            b, scale = plan.read(w, kind, True)
            d = plan.now("dgrad", "dy", d, _mix(seed + number), offsets=offsets, part=part)
            return groups.products(d, _by_expert(b, E, w), scale, dtype)

        def sums(d, x, number, part):
            d = plan.now("wgrad", "dy", d, _mix(seed + number), offsets=offsets, transpose=True, part=part)
            return groups.sums(d, plan.read(x, kind, True), width, master)

        dy_SL = dy_TL[token_S]
        da_SF = product(dy_SL, down, 0, ".down_proj")
        ddown = sums(dy_SL, a, 1, ".down_proj")
        dweight = dy_TL.new_zeros(weight_shape, dtype=weight_dtype).flatten()
        dweight[order] = (da_SF * u_SF.square()).sum(-1, dtype=accumulate_dtype(u_SF)).to(weight_dtype)
        dh_SF = da_SF.mul_(weight_S1).mul_(u_SF).mul_(2)
        dx_SL = product(dh_SF, up, 2, ".up_proj")
        dup = sums(dh_SF, x, 3, ".up_proj")
        dx = torch.zeros(x_shape, dtype=accumulate_dtype(u_SF), device=dy_TL.device)
        dx = dx.index_add_(0, token_S, dx_SL.to(dx.dtype)).to(dtype)
        return dx, None, dweight.view(weight_shape), dup, ddown, None, None


def _stack(plan: Emulated, w_EMN: Tensor, dtype: torch.dtype, kind: torch.dtype, part: str):
    """The experts' W as kept for fprop and, where it differs, for dgrad; its values [E, M, N]; their tensor scales."""
    E, M, N = w_EMN.shape
    kept, turned = plan.weight(w_EMN.reshape(E * M, N).to(dtype), offsets=torch.arange(E + 1) * M, part=part)
    v, scale = plan.read(kept, kind)
    return kept, turned, v.view(E, M, N) if v.is_contiguous() else v.unflatten(0, (E, M)), scale


def _by_expert(v: Tensor, E: int, kept: Kept) -> Tensor:
    """[E, rows, contraction] of W^T, which the codes hold either side by side or, turned round, below one another."""
    if isinstance(kept, Quantized) and kept.across:
        return v.unflatten(1, (E, -1)).transpose(0, 1)
    return v.T.unflatten(0, (E, -1)).transpose(1, 2)

"""HybridLM: embedding, a stack of layers spelled by the pattern string, final norm, head, and the MTP block.

    x = embed(ids);  x = x + mixer(norm(x)) for every letter of the pattern;  h = norm_f(x);  logits = head(h)

Shape letters: B batch, L length, T = B*L tokens, H hidden, V vocabulary, K MTP depth, E experts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from nemo_lite_kernels.linear import PackedWeight
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo_lite import pattern as patterns
from nemo_lite.config import ModelConfig
from nemo_lite.model import step as fused
from nemo_lite.model.attention import Attention
from nemo_lite.model.cache import HybridCache, Pending
from nemo_lite.model.context import Context, Tokens
from nemo_lite.model.mamba2 import Mamba2
from nemo_lite.model.moe import MLP, LatentMoE
from nemo_lite.model.mtp import MTP
from nemo_lite.parallel.layers import Experts, Head, Layers, Linear
from nemo_lite.parallel.native import copy_whole

FORMATS = ("int8", "int4")  # of packed weights


@dataclass
class Normalizers:
    """What sums are divided by: the global batch's label counts of the main head and each depth, and its rows."""

    labels: list[float]
    rows: float


@dataclass
class HybridOutput:
    """What a forward returns. Logits are formed when they are read, [B, L, V] in the computing dtype."""

    hidden: Tensor  # trunk output after norm_f, [B, L, H]
    cache: HybridCache | None = None
    loss: Tensor | None = None
    mtp_hidden: list[Tensor] = field(default_factory=list)  # by depth, [B, L, H]
    losses: Tensor | None = None  # [1 + K] cross-entropy of the main head and each depth, detached
    aux_loss: Tensor | None = None  # times its coefficient, detached
    expert_counts: dict[str, Tensor] = field(default_factory=dict)  # MoE layer -> tokens per expert [E]
    _head: nn.Module | None = None
    _grad: bool = False

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self._head is not None
        with torch.set_grad_enabled(self._grad):
            return self._head(hidden)

    @property
    def logits(self) -> Tensor:
        """Next-token logits [B, L, V]."""
        return self._logits(self.hidden)

    @property
    def mtp_logits(self) -> list[Tensor]:
        """Logits of each MTP depth k (position t: token t+k+1), [B, L, V]; empty unless labels or `mtp` were given."""
        return [self._logits(hidden) for hidden in self.mtp_hidden]


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, letter: str, name: str, config: ModelConfig, layers: Layers):
        super().__init__()
        self.kind, self.name = letter, name
        self.norm = layers.norm(f"{name}.norm", config.hidden_size, config.layer_norm_epsilon)
        mixer = f"{name}.mixer"
        self.mixer: nn.Module
        if letter == patterns.MAMBA:
            self.mixer = Mamba2(config, layers, mixer)
        elif letter == patterns.ATTENTION:
            self.mixer = Attention(config, layers, mixer)
        elif letter == patterns.MOE:
            self.mixer = LatentMoE(config, layers, mixer)
        else:
            self.mixer = MLP(layers, mixer, config.hidden_size, config.intermediate_size)

    def forward(self, x_TH: Tensor, ctx: Context, index: int):
        y_TH, stats = self.mixer(self.norm(x_TH), ctx, index)
        return x_TH + y_TH, stats


class HybridLM(nn.Module):
    """A hybrid Mamba-Transformer MoE language model with multi-token prediction.

    Initial weights (the published ones; transformers' own differ):

    | tensor                                             | distribution                                             |
    |----------------------------------------------------|----------------------------------------------------------|
    | embedding, head, every linear and router           | normal, std = initializer_range                          |
    | o_proj, out_proj, every down, fc2_latent           | normal, std = initializer_range / sqrt(layers)           |
    | conv1d weight and bias                             | uniform in +-1/sqrt(W), torch's Conv1d default           |
    | A_log                                              | log of uniform(1, 16)                                    |
    | dt_bias                                            | inverse softplus of log-uniform(dt min, dt max), floored |
    | D, every norm                                      | 1                                                        |
    | router bias                                        | 0                                                        |
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        layers: Layers | None = None,
        kernels: Mapping[str, str] | None = None,
    ):
        """Build with fresh weights from `seed`; on the meta device nothing is allocated.

        dtype is what activations and matrix products are computed in (default: that of the weights, float32).
        """
        super().__init__()
        self.config = config.validate()
        layers = layers or Layers(device, kernels)
        self.ops, self.numerics = layers.ops, layers.numerics
        self.kernel_choices = layers.ops.choices
        self._whole = type(layers) is Layers
        self._steps: dict = {}  # the fused steps of the trunk and of the MTP block
        self.dtype = dtype
        self.recompute = ""  # letters of the layers whose inside is computed again for the backward
        with torch.device(device):
            self.embedding = layers.embedding("embeddings", config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(
                Layer(letter, f"layers.{i}", config, layers) for i, letter in enumerate(config.layers)
            )
            self.norm_f = layers.norm("norm_f", config.hidden_size, config.layer_norm_epsilon)
            self.head = layers.head("lm_head", config.hidden_size, config.vocab_size)
            self.mtp = (
                MTP(config, layers, lambda letter, name: Layer(letter, name, config, layers))
                if config.mtp_layers
                else None
            )
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        if torch.device(device).type != "meta":
            self.init_weights(seed)

    # ------------------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter as the class docstring's table says.

        Each tensor has a generator of its own, seeded by `seed` and its name: the values depend neither on the order of
        creation nor on how many ranks hold them.
        """
        for name, parameter in self.named_parameters():
            whole = parameter.part.shape if hasattr(parameter, "part") else parameter.shape
            copy_whole(parameter, self.initial(name, whole, seed))
        for buffer in self.buffers():
            buffer.zero_()

    def initial(self, name: str, shape: torch.Size, seed: int = 0) -> Tensor:
        """The initial values of the parameter of this name and (whole) shape."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))
        config, leaf = self.config, name.rsplit(".", 2)
        value = torch.empty(shape)
        if leaf[-1] == "A_log":
            return value.uniform_(1, 16, generator=generator).log_()
        if leaf[-1] == "dt_bias":
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            dt = value.uniform_(low, high, generator=generator).exp_().clamp_(min=config.time_step_floor)
            return dt + torch.log(-torch.expm1(-dt))
        if leaf[-1] == "D" or leaf[-2] in ("norm", "norm_f", "enorm", "hnorm", "final_layernorm"):
            return value.fill_(1.0)
        if leaf[-2] == "conv1d":
            bound = config.conv_kernel**-0.5
            return value.uniform_(-bound, bound, generator=generator)
        std = config.initializer_range
        if leaf[-1] == "down" or leaf[-2] in ("o_proj", "out_proj", "down", "fc2_latent"):
            std /= math.sqrt(len(config.layers))
        return value.normal_(0.0, std, generator=generator)

    @torch.no_grad()
    def quantize_weights(self, format: str, group: int = 32) -> HybridLM:
        """Pack the weights of linears, experts and head to ``int8`` or ``int4``, for inference; returns the model.

        One scale for every `group` (32, 64 or 128) inputs of a row. With int4 the head is packed to int8. Norms,
        routers, embeddings, the convolution and what belongs to the scan stay as they are, and so does a weight whose
        inputs are no multiple of 32.
        """
        if format not in FORMATS:
            raise ValueError(f"weights can be packed to {' or '.join(FORMATS)}, not to {format!r}")
        for name in self.packable():
            self.pack_weight(name, self.get_parameter(name), format, group)
        return self

    def packable(self) -> list[str]:
        """Names of the weights that `quantize_weights` packs."""
        modules = {name: m for name, m in self.named_modules() if isinstance(m, Linear | Head | Experts)}
        weights = ((name, leaf, w) for name, m in modules.items() for leaf, w in m.named_parameters(recurse=False))
        return [f"{name}.{leaf}" for name, leaf, weight in weights if weight.shape[-1] % 32 == 0]

    def pack_weight(self, name: str, weight: Tensor, format: str, group: int = 32) -> None:
        """Put `weight`, packed, where the parameter of this name is."""
        module_name, leaf = name.rsplit(".", 1)
        module = self.get_submodule(module_name)
        bits = 8 if format == "int8" or isinstance(module, Head) else 4
        packed = PackedWeight.pack(weight, bits, group)
        delattr(module, leaf)
        setattr(module, leaf, packed)
        self._steps.clear()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def depth(self) -> int:
        """MTP depths in training; 0 without an MTP block."""
        return self.config.mtp.depth if self.mtp is not None else 0

    def computing_dtype(self) -> torch.dtype:
        """An autocast region's dtype where there is one, else the one this model was built for."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.dtype or self.embedding.weight.dtype

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: HybridCache | None = None,
        *,
        mtp: bool = False,
        tentative: bool = False,
        normalizers: Normalizers | None = None,
    ) -> HybridOutput:
        """Run the model on input_ids [B, L].

        doc_ids     [B, L] documents of a packed row; nothing crosses a change of id. -1 is padding, left or right.
        labels      [B, L] as Hugging Face has them: the tokens themselves, -100 where they are no target. Gives .loss:
                    next-token cross-entropy + mtp.loss_weight x mean over depths + auxiliary loss.
        cache       continue the rows of this cache (doc_ids then only marks padding) and append to it.
        mtp         also run the MTP block at the training depth (given labels, it always runs).
        tentative   keep what is needed to commit only a part of this forward to the cache.
        normalizers divide the loss's sums by these instead of by this batch's own counts.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, length], not {list(input_ids.shape)}")
        dtype = self.computing_dtype()
        # Layers decide their dtypes themselves (routers, norms and scans stay in float32), so autocast ends here.
        with torch.autocast(self.device.type, enabled=False):
            if cache is not None:
                if labels is not None or mtp:
                    raise ValueError("labels and mtp need a forward without cache")
                return self._cached(input_ids, doc_ids, cache, dtype, tentative)
            depth = self.depth if mtp or labels is not None else 0
            tokens = Tokens.of(input_ids, doc_ids, input_ids if labels is None else labels, depth)
            hidden_TH, stats = self._trunk(input_ids.flatten(), tokens.contexts[0], dtype)
            if labels is not None and normalizers is None:
                normalizers = Normalizers(tokens.label_counts().double().tolist(), float(input_ids.shape[0]))
            return self.finish(hidden_TH, tokens, stats, normalizers)

    def finish(self, hidden_TH: Tensor, tokens: Tokens, stats: list, normalizers: Normalizers | None) -> HybridOutput:
        """From the trunk's hidden states and its routers' statistics: MTP, and with normalizers the loss."""
        out = self._output(hidden_TH, tokens.contexts[0])
        out.mtp_hidden, mtp_stats = self._depths(tokens, hidden_TH)
        for name, stat in [*stats, *mtp_stats]:
            out.expert_counts[name] = out.expert_counts.get(name, 0) + stat.counts_E
        if normalizers is not None:
            loss = self._loss(out, tokens.labels, normalizers)
            aux = loss.new_zeros(()) + self.auxiliary_loss(stats, normalizers)
            if mtp_stats:  # the mean over depths, as for the MTP loss
                aux = aux + self.auxiliary_loss(mtp_stats, normalizers) / tokens.depth
            out.loss, out.aux_loss = loss + aux, aux.detach()
        return out

    def _output(self, hidden_TH: Tensor, ctx: Context, cache: HybridCache | None = None) -> HybridOutput:
        hidden = hidden_TH.unflatten(0, (ctx.batch, ctx.length))
        return HybridOutput(hidden, cache, _head=self.head, _grad=torch.is_grad_enabled())

    def trunk(self, ids_T: Tensor, ctx: Context) -> Tensor:
        """Hidden states after the final norm, [T, H]: for engines that keep their own cache behind ctx."""
        return self._trunk(ids_T, ctx, self.computing_dtype())[0]

    def mtp_block(self, hidden_TH: Tensor, ids_T: Tensor, ctx: Context) -> Tensor:
        """One depth of the MTP block, [T, H]: from the hidden states of the depth before and the tokens ahead."""
        assert self.mtp is not None
        return self.mtp(hidden_TH, self.embedding(ids_T).to(hidden_TH.dtype), ctx, self.run_layers)[0]

    def _trunk(self, ids_T: Tensor, ctx: Context, dtype: torch.dtype):
        x_TH = self.embedding(ids_T).to(dtype)
        x_TH, stats = self.run_layers(self.layers, x_TH, ctx)
        return self.norm_f(x_TH), stats

    def run_layers(self, layers, x_TH: Tensor, ctx: Context):
        """x through `layers`; the hidden states and, for each MoE layer in training, (its name, RouterStats)."""
        stats = []
        if (step := self._step(layers, x_TH, ctx)) is not None and (out := fused.run(step, x_TH, ctx)) is not None:
            return out, stats
        for index, layer in enumerate(layers):
            if layer.kind in self.recompute and torch.is_grad_enabled():
                x_TH, stat = checkpoint(layer, x_TH, ctx, index, use_reentrant=False)
            else:
                x_TH, stat = layer(x_TH, ctx, index)
            if stat is not None:
                stats.append((layer.name, stat))
        return x_TH, stats

    def _step(self, layers, x_TH: Tensor, ctx: Context):
        """The fused step of these layers, where it can take these tokens."""
        step = self.ops.step
        few = step is not None and x_TH.shape[0] <= step.few_tokens and x_TH.dtype in step.dtypes
        if not few or self.training or torch.is_grad_enabled() or not self._whole:
            return None
        if (key := id(layers)) not in self._steps:
            self._steps[key] = fused.plan(layers, self.config, self.ops)
        return self._steps[key]

    def _apply(self, *args, **options):
        self._steps.clear()  # the weights move
        return super()._apply(*args, **options)

    def _depths(self, tokens: Tokens, hidden_TH: Tensor):
        """Hidden states of MTP depth 1..K, [B, L, H] each, and the routers' statistics of all depths."""
        hiddens, stats, h_TH = [], [], hidden_TH
        for ids, ctx in zip(tokens.ids[1:], tokens.contexts[1:]):
            assert self.mtp is not None
            e_TH = self.embedding(ids.flatten()).to(h_TH.dtype)
            h_TH, depth_stats = self.mtp(h_TH, e_TH, ctx, self.run_layers)
            hiddens.append(h_TH.unflatten(0, (ctx.batch, ctx.length)))
            stats += depth_stats
        return hiddens, stats

    def _loss(self, out: HybridOutput, labels: list[Tensor], normalizers: Normalizers) -> Tensor:
        """Cross-entropies, weighted and summed; those of each head into `out`."""
        depth, labels_T = len(out.mtp_hidden), torch.stack(labels).flatten()
        scales = [1.0] + [self.config.mtp.loss_weight / max(depth, 1)] * depth
        hiddens = [out.hidden, *out.mtp_hidden]
        counts = [max(count, 1.0) for count in normalizers.labels]
        dtype = torch.promote_types(out.hidden.dtype, torch.float32)
        per_token = torch.tensor([s / n for s, n in zip(scales, counts)], dtype=dtype, device=labels_T.device)
        weights_T = per_token.repeat_interleave(labels[0].numel())
        loss, nll_T = self.head.loss(torch.cat([h.flatten(0, 1) for h in hiddens]), labels_T, weights_T)
        sums = nll_T.view(depth + 1, -1).sum(-1)
        out.losses = sums / sums.new_tensor(counts)
        return loss

    def auxiliary_loss(self, stats: list, normalizers: Normalizers):
        """That of the routers of (name, RouterStats), summed, times its coefficient; 0 without routers."""
        return sum(stat.aux for _, stat in stats) * (self.config.router_aux_loss_coef / max(normalizers.rows, 1.0))

    # ------------------------------------------------------------------------------------------- with a cache; drafting

    def new_cache(self, batch: int, speculative: bool = False) -> HybridCache:
        """An empty cache for `batch` rows; `speculative` keeps what MTP drafting needs."""
        self._steps.clear()  # since the last cache a parameter may have been given other memory
        return HybridCache(self.config, batch, speculative)

    def _cached(self, input_ids, doc_ids, cache: HybridCache, dtype, tentative: bool) -> HybridOutput:
        B, L = input_ids.shape
        if cache.batch != B:
            raise ValueError(f"this cache holds {cache.batch} rows, not {B}")
        counts = valid_BL = order = None
        if doc_ids is not None and bool((doc_ids < 0).any()):
            valid_BL = doc_ids >= 0
            order = (~valid_BL).to(torch.int8).argsort(dim=1, stable=True)  # tokens first, padding to the right
            input_ids, valid_BL = input_ids.gather(1, order), valid_BL.gather(1, order)
            counts = valid_BL.sum(1).tolist()
        if doc_ids is not None and bool(((doc_ids != doc_ids.amax(1, keepdim=True)) & (doc_ids >= 0)).any()):
            raise ValueError("with a cache a row is one document; start another cache for another document")
        if cache.mtp is not None:
            firsts = [int(ids[0]) if counts is None or counts[b] else None for b, ids in enumerate(input_ids)]
            cache.expect(firsts)
            if not tentative:  # else the block waits, so that nothing it reads can be taken back
                self._catch_up(cache, firsts, dtype)
        ctx = cache.trunk.context(L, counts, valid_BL, tentative)
        hidden_TH, _ = self._trunk(input_ids.flatten(), ctx, dtype)
        cache.trunk.took(ctx)
        out = self._output(hidden_TH, ctx, cache)
        cache.remember(out.hidden, input_ids, ctx)
        if order is not None:
            out.hidden = out.hidden.gather(1, order.argsort(dim=1)[..., None].expand_as(out.hidden))
        return out

    def _catch_up(self, cache: HybridCache, next_tokens: list[int | None], dtype) -> None:
        """Run the MTP block over every pending position whose next token is known."""
        assert cache.mtp is not None and self.mtp is not None
        rows = []
        for b, pending in enumerate(cache.settled()):
            known = next_tokens[b]
            if pending is None or (known is None and len(pending.tokens) < 2):
                rows.append(None)
                continue
            last = pending.tokens.new_tensor([known] if known is not None else [])
            tokens = torch.cat([pending.tokens[1:], last])
            rows.append((pending.hidden[: len(tokens)], tokens))
            left = slice(len(tokens), None)
            cache.pending[b] = Pending(pending.hidden[left], pending.tokens[left]) if known is None else None
        if not any(row is not None for row in rows):
            return
        counts = [0 if row is None else len(row[1]) for row in rows]
        L, device = max(counts), self.device
        hidden = torch.zeros(len(rows), L, self.config.hidden_size, dtype=dtype, device=device)
        tokens = torch.zeros(len(rows), L, dtype=torch.int64, device=device)
        for b, row in enumerate(rows):
            if row is not None:
                hidden[b, : counts[b]], tokens[b, : counts[b]] = row
        valid = None
        if len(set(counts)) > 1:
            valid = torch.arange(L, device=device) < torch.tensor(counts, device=device)[:, None]
        out_BLH = self._mtp_step(cache, hidden, tokens, counts, valid)
        for b, (count, known) in enumerate(zip(counts, next_tokens)):
            if count and known is not None:
                cache.ahead[b] = (known, out_BLH[b, count - 1])

    def _mtp_step(self, cache: HybridCache, hidden_BLH: Tensor, tokens_BL: Tensor, counts, valid_BL) -> Tensor:
        assert cache.mtp is not None and self.mtp is not None
        ctx = cache.mtp.context(tokens_BL.shape[1], counts, valid_BL, False)
        h_TH = self.mtp_block(hidden_BLH.flatten(0, 1), tokens_BL.flatten(), ctx)
        cache.mtp.took(ctx)
        return h_TH.unflatten(0, (ctx.batch, ctx.length))

    @torch.no_grad()
    def draft(self, cache: HybridCache, next_tokens: Tensor, count: int, pick) -> Tensor:
        """Draft `count` tokens a row after next_tokens [B], the sampled tokens the trunk has not read yet; [B, count].

        pick(logits [B, V]) -> tokens [B] chooses each draft. The block first reads every position that was committed
        since the last draft, with its true trunk output; what it adds beyond that is forgotten again.
        """
        dtype = self.computing_dtype()
        assert cache.mtp is not None
        cache.expect(next_tokens.tolist())
        self._catch_up(cache, next_tokens.tolist(), dtype)
        if not all(cache.ahead):
            raise ValueError("drafting starts after a prompt")
        h_BH = torch.stack([ahead[1] for ahead in cache.ahead if ahead is not None])
        saved = cache.mtp.snapshot()
        drafts = []
        for i in range(count):
            if i:
                h_BH = self._mtp_step(cache, h_BH[:, None], drafts[-1][:, None], None, None)[:, 0]
            drafts.append(pick(self.head(h_BH)))
        cache.mtp.restore(saved)
        return torch.stack(drafts, dim=1)

    # ------------------------------------------------------------------------------------------------ for users' hands

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
        kernels: Mapping[str, str] | None = None,
        quantization: str | None = None,
    ) -> HybridLM:
        """Open a MODEL_DIR (Hugging Face NemotronH, MTP tensors included). dtype None keeps the stored one;
        `quantization` packs the weights as they are read (see :meth:`quantize_weights`)."""
        from nemo_lite.model.hf import load_model

        return load_model(cls, Path(model_dir), dtype=dtype, device=device, kernels=kernels, quantization=quantization)

    def save_pretrained(self, model_dir: str | Path, **options) -> None:
        """Write a MODEL_DIR that transformers, vLLM and from_pretrained open."""
        from nemo_lite.model.hf import save_model

        save_model(self, Path(model_dir), **options)

    def generate(self, input_ids: Tensor, **options) -> Tensor:
        """Prompts [B, L] with their continuations; the options are those of :func:`nemo_lite.generate.generate`."""
        from nemo_lite.generate import generate

        return generate(self, input_ids, **options).sequences

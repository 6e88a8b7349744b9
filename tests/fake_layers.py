"""A 2-way `Layers` in one process: every rank is a thread with its own HybridLM, collectives meet at a barrier.

It splits every weight that can be split, plainly or with tokens scattered over the ranks between blocks (sequence
parallelism, on dim 0), and so proves that a model part never has to know where its weights live.
"""

import threading

import torch
import torch.nn.functional as F
from torch import nn

from nemo_lite.parallel import layers as whole
from nemo_lite.train.loss import IGNORE


class FakeGroup:
    """Collectives between threads."""

    def __init__(self, size: int = 2):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list = [None] * size
        self.ranks = threading.local()

    def exchange(self, x):
        self.slots[self.ranks.rank] = x
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()  # nobody writes before all have read
        return parts

    def all_reduce(self, x):
        return torch.stack(self.exchange(x)).sum(0)

    def all_gather(self, x, dim=0):
        return torch.cat(self.exchange(x), dim)

    def scatter(self, x):
        assert len(x) % self.size == 0, "the tokens do not divide over the ranks"
        return x.chunk(self.size)[self.ranks.rank]

    def reduce_scatter(self, x):
        return self.scatter(self.all_reduce(x))

    def run(self, work):
        """[work(rank) for every rank], at the same time."""
        results: list = [None] * self.size
        errors = []

        def one(rank):
            self.ranks.rank = rank
            try:
                results[rank] = work(rank)
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return results


class _Part:
    """Which part of a whole parameter a rank holds, kept on the parameter as `.share`."""

    def __init__(self, rank, size, dim, segments=()):
        self.rank, self.size, self.dim = rank, size, dim
        self.segments = [units * rows for units, rows in segments]

    def __call__(self, tensor):
        pieces = tensor.split(self.segments, self.dim) if self.segments else [tensor]
        return torch.cat([piece.chunk(self.size, self.dim)[self.rank] for piece in pieces], self.dim)


class SplitLayers(whole.Layers):
    def __init__(self, group: FakeGroup, rank: int, sequence_parallel=False, split_experts=False):
        super().__init__()
        self.group, self.rank, self.sequence_parallel, self.split_experts = (
            group,
            rank,
            sequence_parallel,
            split_experts,
        )

    # Where tokens are scattered between blocks, these three change hands; otherwise two of them do nothing.
    def gather(self, x):
        return self.group.all_gather(x) if self.sequence_parallel else x

    def scatter(self, x):
        return self.group.scatter(x) if self.sequence_parallel else x

    def sum(self, x):
        return self.group.reduce_scatter(x) if self.sequence_parallel else self.group.all_reduce(x)

    def mark(self, parameter, dim, segments=()):
        parameter.share = _Part(self.rank, self.group.size, dim, segments)

    def local(self, n):
        assert n % self.group.size == 0, f"{n} does not divide over {self.group.size} ranks"
        return n // self.group.size

    def mine(self, x):
        return self.scatter(x)

    def route(self, logits_TE, *args):
        expert_Tk, weight_Tk, *balance = self.ops.route(self.gather(logits_TE), *args)
        return self.mine(expert_Tk), self.mine(weight_Tk), *balance  # the balance of all tokens, on every rank

    def column_linear(self, name, n_in, *segments):
        module = super().linear(name, n_in, self.rows(segments))
        self.mark(module.weight, 0, segments)
        return Around(module, before=self.gather)

    def row_linear(self, name, n_in, n_out):
        module = super().linear(name, self.local(n_in), n_out)
        self.mark(module.weight, 1)
        return Around(module, after=self.sum)

    def embedding(self, name, vocab_size, hidden_size):
        module = VocabEmbedding(self.local(vocab_size), hidden_size, self.rank, self.sum)
        self.mark(module.weight, 0)
        return module

    def head(self, name, hidden_size, vocab_size):
        module = VocabHead(hidden_size, self.local(vocab_size), self.group)
        self.mark(module.weight, 0)
        return module

    def norm(self, name, size, eps):
        module = super().norm(name, size, eps)
        if name in ("norm_f", "mtp.final_layernorm"):
            return Around(module, after=self.gather)
        return Around(module, before=self.scatter) if name == "mtp.hnorm" else module

    def gated_norm(self, name, size, groups, eps):
        module = super().gated_norm(name, size, groups, eps)
        self.mark(module.weight, 0)
        return module

    def channels(self, name, *segments, width=None):
        parameter = super().channels(name, *segments, width=width)
        self.mark(parameter, 0, segments)
        return parameter

    def experts(self, name, n_experts, size, inner):
        if self.split_experts:
            module = super().experts(name, self.local(n_experts), size, inner)
            dims = (0, 0)
        else:
            module = super().experts(name, n_experts, size, self.local(inner))
            dims = (1, 2)
        self.mark(module.up, dims[0])
        self.mark(module.down, dims[1])
        return SplitExperts(module, self)


class Around(nn.Module):
    """A module with a collective before or after it; parameters keep their names."""

    def __init__(self, module, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.weight = module.weight
        self._call, self.before, self.after = [module], before, after

    def forward(self, x):
        return self.after(self._call[0](self.before(x)))


class SplitExperts(nn.Module):
    """Every rank adds what its share of the experts yields for the tokens of all ranks."""

    def __init__(self, module, layers):
        super().__init__()
        self.up, self.down, self.op, self.layers = module.up, module.down, module.op, layers

    def forward(self, x_TL, expert_Tk, weight_Tk):
        x_TL, expert_Tk, weight_Tk = (self.layers.gather(x) for x in (x_TL, expert_Tk, weight_Tk))
        if self.layers.split_experts:
            mine = len(self.up)
            expert_Tk = expert_Tk - self.layers.rank * mine
            expert_Tk = expert_Tk.masked_fill((expert_Tk < 0) | (expert_Tk >= mine), -1)
        return self.layers.sum(self.op(x_TL, expert_Tk, weight_Tk, self.up, self.down))


class VocabEmbedding(nn.Module):
    def __init__(self, rows, hidden_size, rank, total):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        self.first, self.total = rank * rows, total

    def forward(self, ids):
        mine = (ids >= self.first) & (ids < self.first + len(self.weight))
        found = F.embedding((ids - self.first).masked_fill(~mine, 0), self.weight)
        return self.total(found * mine[..., None])


class VocabHead(nn.Module):
    def __init__(self, hidden_size, rows, group):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        self.group = group

    def forward(self, h):
        return self.group.all_gather(F.linear(h, self.weight), dim=-1)

    def loss(self, h_TH, labels_T, weights_T):
        nll_T = F.cross_entropy(self(h_TH), labels_T, ignore_index=IGNORE, reduction="none")
        return (nll_T * weights_T).sum(), nll_T.detach()


@torch.no_grad()
def split_model(model, group: FakeGroup, rank: int, **options):
    """This rank's part of a whole model."""
    from nemo_lite import HybridLM

    part = HybridLM(model.config, layers=SplitLayers(group, rank, **options)).to(model.embedding.weight.dtype)
    wholes = dict(model.named_parameters()) | dict(model.named_buffers())
    mine = dict(part.named_parameters()) | dict(part.named_buffers())
    assert set(wholes) == set(mine)
    for name, tensor in mine.items():
        take = getattr(tensor, "share", lambda x: x)
        tensor.copy_(take(wholes[name]))
    return part.train(model.training)

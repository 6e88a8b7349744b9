"""One optimizer step: normalisation over the global batch, router statistics, clipping, weight decay, precision."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from runs import ALONE, recipe_of

from nemo_lite.config import UserError
from nemo_lite.data.packing import Batch
from nemo_lite.model.moe import Router
from nemo_lite.train.loop import build_model, evaluate, train_step
from nemo_lite.train.loss import IGNORE, shifted_labels
from nemo_lite.train.optim import build_optimizer, decays

ROWS, LENGTH = 8, 24


def uneven_batch(vocab: int = 260) -> Batch:
    """Rows whose label counts have nothing in common: all, none, one, packed documents, masked runs, padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (ROWS, LENGTH), generator=generator)
    docs = torch.zeros_like(ids)
    labels = ids.clone()
    labels[1] = IGNORE
    labels[2, :-1] = IGNORE  # its only label is the last token
    docs[3] = torch.tensor([0] * 5 + [1] + [2] * 2 + [3] * 16)  # a document of one token, one of two
    labels[4, 3:20] = IGNORE
    docs[5, 10:] = -1  # padding on the right
    docs[6, :7] = -1  # and on the left
    docs[7] = -1  # and nothing else
    labels[docs < 0] = IGNORE
    return Batch(ids, docs, labels, torch.zeros(ROWS, dtype=torch.bool), list(range(ROWS)), [[]] * ROWS)


@dataclass
class Stepped:
    result: object
    gradients: dict
    model: torch.nn.Module
    bias_before: dict


def biases(model) -> dict:
    return {name: module.bias.clone() for name, module in model.named_modules() if isinstance(module, Router)}


def build(*overrides: str, dtype: str = "float64"):
    recipe = recipe_of(
        "golden_mem", f"train.dtype={dtype}", "model.initializer_range=0.2", "model.router_aux_loss_coef=0.1",
        "optim.clip_grad=0", *overrides,
    )  # fmt: skip
    model = build_model(recipe, ALONE)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, Router):
            module.bias.normal_(0.0, 0.1, generator=generator)
    return recipe, model.train()


def step(*overrides: str, micro: int = ROWS, batch: Batch | None = None, dtype: str = "float64") -> Stepped:
    recipe, model = build(*overrides, dtype=dtype)
    optimizer = build_optimizer(model, recipe.optim)
    gradients = {}

    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    before = biases(model)
    micros = list((batch or uneven_batch()).split(micro))
    return Stepped(train_step(model, optimizer, micros, 1e-3, recipe, ALONE), gradients, model, before)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


MODELS = {
    "latent": (),
    "plain": ("model.moe_latent_size=null", "model.n_group=2", "model.mtp.depth=1", "model.mtp.pattern=E"),
    "dense": ("model.pattern=M*-", "model.mtp.pattern=*", "model.intermediate_size=48"),
}


@pytest.mark.parametrize("model", MODELS)
def test_microbatches_do_not_change_the_step(model):
    """8 rows at once, 4 x 2, 8 x 1, and rows in another order: the same losses, gradients and counts."""
    whole = step(*MODELS[model])
    batch, order = uneven_batch(), torch.tensor([7, 2, 0, 5, 1, 6, 3, 4])
    shuffled = Batch(batch.input_ids[order], batch.doc_ids[order], batch.labels[order], batch.continued,
                     batch.rows, batch.sources)  # fmt: skip
    for micro, rows in ((2, batch), (1, batch), (3, shuffled)):
        parts = step(*MODELS[model], micro=micro, batch=rows)
        assert parts.result.losses == pytest.approx(whole.result.losses, rel=1e-12)
        assert parts.result.aux_loss == pytest.approx(whole.result.aux_loss, rel=1e-12)
        assert parts.result.grad_norm == pytest.approx(whole.result.grad_norm, rel=1e-12)
        for name, gradient in whole.gradients.items():
            assert relative(parts.gradients[name], gradient) <= 1e-12, name
        for name, counts in whole.result.expert_counts.items():
            assert torch.equal(parts.result.expert_counts[name], counts)
        for name, bias in biases(whole.model).items():
            assert torch.equal(biases(parts.model)[name], bias)


def plain_loss(recipe, model, batch: Batch):
    """The whole loss, written from its definition, from logits and from what the routers saw."""
    seen: dict[str, list] = {}
    handles = [
        module.register_forward_hook(lambda m, inputs, out, name=name: seen.setdefault(name, []).append(inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, Router)
    ]
    out = model(batch.input_ids, doc_ids=batch.doc_ids, mtp=True)
    logits = [out.logits, *out.mtp_logits]
    for handle in handles:
        handle.remove()
    losses = []
    for k, logits_BLV in enumerate(logits):
        total, count = 0.0, 0
        for b in range(ROWS):
            for t in range(LENGTH):
                ahead = t + k + 1
                if ahead >= LENGTH or batch.labels[b, ahead] == IGNORE or batch.doc_ids[b, t] < 0:
                    continue
                if batch.doc_ids[b, ahead] == batch.doc_ids[b, t]:
                    total = total + F.cross_entropy(logits_BLV[b, t], batch.labels[b, ahead])
                    count += 1
        losses.append(total / count)
    config, aux, counts = recipe.model, torch.zeros((), dtype=torch.float64), {}
    E, top, depth = config.n_routed_experts, config.num_experts_per_tok, len(out.mtp_hidden)
    for name, inputs in seen.items():
        router = model.get_submodule(name)
        for k, x in enumerate(inputs, start=1):
            mtp = name.startswith("mtp.")
            score = (x @ router.weight.T).sigmoid().view(ROWS, LENGTH, E)
            here = shifted_labels(batch.labels, batch.doc_ids, k + 1) != IGNORE if mtp else batch.doc_ids >= 0
            for b in range(ROWS):
                tokens = score[b][here[b]]
                if len(tokens) == 0:
                    continue
                p = tokens / tokens.sum(-1, keepdim=True)
                n = torch.zeros(E, dtype=torch.float64)
                for row in p:
                    n[row.topk(top).indices] += 1
                row_loss = config.router_aux_loss_coef * E / (top * len(tokens) ** 2) * (n * p.sum(0)).sum()
                aux = aux + row_loss / ROWS / (depth if mtp else 1)
                for row in tokens:
                    chosen = (row + router.bias).topk(top).indices
                    layer = name.removesuffix(".mixer.router")
                    counts.setdefault(layer, torch.zeros(E, dtype=torch.float64))[chosen] += 1
    total = losses[0] + config.mtp.loss_weight * sum(losses[1:]) / depth + aux
    return total, losses, aux, counts


def test_the_step_is_the_written_out_definition():
    """Losses, auxiliary loss, every gradient, the routers' counts and the new router biases."""
    recipe, model = build()
    total, losses, aux, counts = plain_loss(recipe, model, uneven_batch())
    total.backward()
    got = step(micro=2)
    assert got.result.losses == pytest.approx([x.item() for x in losses], rel=1e-12)
    assert got.result.aux_loss == pytest.approx(aux.item(), rel=1e-12)
    for name, p in model.named_parameters():
        assert relative(got.gradients[name], p.grad) <= 1e-11, name
    assert set(counts) == set(got.result.expert_counts) == {"layers.1", "layers.4", "mtp.layers.1"}
    after = biases(got.model)
    for name, n in counts.items():
        assert torch.equal(got.result.expert_counts[name], n), name
        key = f"{name}.mixer.router"
        moved = recipe.model.router_bias_update_rate * torch.sign(n.mean() - n)
        assert torch.allclose(after[key] - got.bias_before[key], moved, atol=1e-15, rtol=0) and bool(moved.any())


@pytest.mark.parametrize("kinds", ["full", "M*", "E"])
def test_recomputation_changes_nothing_and_counts_once(kinds):
    plain, again = step(micro=2), step(f"train.recompute={kinds}", micro=2)
    assert again.model.recompute
    for name, gradient in plain.gradients.items():
        assert torch.equal(again.gradients[name], gradient), name
    for name, counts in plain.result.expert_counts.items():
        assert torch.equal(again.result.expert_counts[name], counts)
    assert again.result.losses == plain.result.losses


def test_evaluation_moves_no_router_bias_and_no_weight():
    recipe, model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batch = uneven_batch()
    whole = evaluate(model, [batch], torch.ones(recipe.model.vocab_size), ALONE)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    # A mean over tokens, not over batches, however the rows are spread.
    apart = evaluate(model, list(batch.split(3)), torch.ones(recipe.model.vocab_size), ALONE)
    assert apart["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-12)
    assert apart["val_mtp_loss"] == pytest.approx(whole["val_mtp_loss"], rel=1e-12)
    out = model.eval()(batch.input_ids, doc_ids=batch.doc_ids, labels=batch.labels)
    assert whole["val_loss"] == pytest.approx(float(out.losses[0]), rel=1e-12)
    # One byte a token: bits per byte is nats per token over ln 2.
    assert whole["val_bits_per_byte"] == pytest.approx(whole["val_loss"] / 0.6931471805599453, rel=1e-9)


def test_weight_decay_groups():
    recipe, model = build("optim.weight_decay=0.25")
    optimizer = build_optimizer(model, recipe.optim)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if decay[id(p)] == 0}
    assert {decay[id(p)] for name, p in model.named_parameters() if name not in names} == {0.25}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        free = "norm" in name or leaf in ("A_log", "D", "dt_bias", "bias")
        assert (name in names) == free == (not decays(name, p)), name
    group = optimizer.param_groups[0]
    assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["fused"]


def test_clipping():
    free = step(micro=4)
    limit = free.result.grad_norm / 3
    clipped = step(f"optim.clip_grad={limit}", micro=4)
    assert clipped.result.grad_norm == pytest.approx(free.result.grad_norm, rel=1e-12)  # reported before clipping
    norm = torch.stack([g.norm() for g in clipped.gradients.values()]).norm()
    assert float(norm) == pytest.approx(limit, rel=1e-5)
    for name, gradient in free.gradients.items():
        assert relative(clipped.gradients[name] * 3, gradient) <= 1e-5, name
    loose = step(f"optim.clip_grad={free.result.grad_norm * 2}", micro=4)
    assert all(torch.equal(loose.gradients[name], g) for name, g in free.gradients.items())


def overfit(steps: int, lr: float, *overrides: str, dtype: str):
    """Losses over `steps` steps on the same few lines of text."""
    recipe = recipe_of("golden_mem", f"train.dtype={dtype}", *overrides)
    model = build_model(recipe, ALONE).train()
    optimizer = build_optimizer(model, recipe.optim)
    text = b"The model is the pattern string: M is Mamba-2, E is a mixture of experts, * is attention. "
    ids = torch.tensor(list(text[:64] + text[26:90])).view(2, 64)
    batch = Batch(ids, torch.zeros_like(ids), ids.clone(), torch.zeros(2, dtype=torch.bool), [0, 1], [[], []])
    results = [train_step(model, optimizer, [batch], lr, recipe, ALONE) for _ in range(steps)]
    return model, optimizer, [r.loss for r in results]


def test_float32_overfits_a_tiny_text():
    _, _, losses = overfit(80, 1e-2, dtype="float32")
    assert losses[-1] < 0.1, losses[-1]


def test_bfloat16_trains_with_float32_master_weights():
    model, optimizer, losses = overfit(40, 1e-2, dtype="bfloat16")
    assert losses[-1] < losses[0] / 3, losses
    assert {p.dtype for p in model.parameters()} == {b.dtype for b in model.buffers()} == {torch.float32}
    moments = [t for state in optimizer.state.values() for t in state.values()]
    assert {t.dtype for t in moments} == {torch.float32}
    exact = step(micro=4, dtype="float32")
    rounded = step(micro=4, dtype="bfloat16")
    assert rounded.result.losses == pytest.approx(exact.result.losses, rel=2e-2)
    assert rounded.result.losses != exact.result.losses  # it does compute in bfloat16


def test_optimizer_rules_scale_rate_and_decay():
    """The first rule that matches a name decides; a rule that matches none is an error."""
    rules = "optim.rules=[{match: '*.router.weight', lr_scale: 0.0}, {match: 'embedding.*', lr_scale: 2.0}]"
    before, plain, ruled = (dict(model.named_parameters()) for model in (build()[1], step().model, step(rules).model))
    for name in before:
        as_ever, other = ((weights[name] - before[name]).detach() for weights in (plain, ruled))
        if name.endswith("router.weight"):
            assert not other.any() and as_ever.any()
        elif name == "embedding.weight":
            assert torch.allclose(other, 2 * as_ever, rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(other, as_ever), name
    with pytest.raises(UserError, match=r"optim.rules\[0\].match: 'nothing' matches no parameter"):
        step("optim.rules=[{match: nothing}]")

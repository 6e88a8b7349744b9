"""Split equivalence, the law of hybrids: however a sequence is cut, the numbers are the same.

Prefill = chunks = token by token = draft, verify and roll back; packed documents = the documents apart; padding is
nothing. In float64, over random patterns, lengths and cuts; outputs, gradients, losses, router counts, carried states.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_close, random_ids, tiny_config, tiny_model

from nemo_lite.model.cache import KVState, MambaState
from nemo_lite.model.context import Context
from nemo_lite.model.hybrid import Normalizers
from nemo_lite.train.loss import IGNORE, label_counts, shifted_labels

TIGHT = 1e-10
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 4,
    "ssm_state_size": 4,
    "n_groups": 2,
    "chunk_size": 4,
    "intermediate_size": 12,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "moe_latent_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "initializer_range": 0.2,
}

trunks = st.text("ME*-", min_size=1, max_size=4)
blocks = st.sampled_from(["*E", "*", "M", "E", "-*", "ME*-", "*M"])
seeds = st.integers(0, 2**16)
FEW = settings(max_examples=40)


def build(pattern, mtp="", seed=0, **sizes):
    return tiny_model(tiny_config(pattern, mtp, **(SIZES | sizes)), seed=seed, dtype=torch.float64)


def assert_same_stream(a, b):
    assert a.lengths == b.lengths
    for mine, other in zip(a.states, b.states):
        if isinstance(mine, MambaState):
            assert_close(mine.window, other.window, TIGHT, "convolution window")
            assert_close(mine.state, other.state, TIGHT, "SSM state")
        elif isinstance(mine, KVState):
            for row, length in enumerate(a.lengths):
                assert_close(mine.k[row, :length], other.k[row, :length], TIGHT, "keys")
                assert_close(mine.v[row, :length], other.v[row, :length], TIGHT, "values")


def assert_same_cache(model, a, b, next_tokens):
    """The same carried state, and with an MTP block the same draft distributions and the same state after drafting."""
    assert_same_stream(a.trunk, b.trunk)
    if a.mtp is None:
        return
    seen = []
    for cache in (a, b):
        logits = []

        def pick(x, logits=logits):
            logits.append(x)
            return x.argmax(-1)

        model.draft(cache, next_tokens, 3, pick)
        seen.append(torch.stack(logits))
    assert_close(seen[0], seen[1], TIGHT, "draft logits")
    assert_same_stream(a.mtp, b.mtp)


def chunked(model, ids, sizes, speculative=False, **options):
    cache = model.new_cache(len(ids), speculative)
    logits, start = [], 0
    for size in sizes:
        logits.append(model(ids[:, start : start + size], cache=cache, **options).logits)
        start += size
    return torch.cat(logits, dim=1), cache


# --------------------------------------------------------------------------------------- one sequence in several parts


@FEW
@given(trunks, blocks | st.just(""), seeds, st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=5))
@torch.no_grad()
def test_prefill_is_chunked_prefill_is_token_by_token(pattern, mtp, seed, batch, sizes):
    model = build(pattern, mtp, seed)
    L = sum(sizes)
    ids = random_ids(model.config, batch, L + 1, seed=seed)
    ids, following = ids[:, :L], ids[:, L]
    full = model(ids).logits
    prefill, whole = chunked(model, ids, [L], bool(mtp))
    assert_close(prefill, full, TIGHT, "prefill with a cache")
    for cuts in (sizes, [1] * L):
        logits, cache = chunked(model, ids, cuts, bool(mtp))
        assert_close(logits, full, TIGHT, f"cut as {cuts}")
        assert_same_cache(model, cache, whole, following)
        if mtp:  # drafting must leave no trace; `whole` has drafted too by now
            whole = chunked(model, ids, [L], True)[1]


@FEW
@given(trunks, blocks | st.just(""), seeds, st.integers(1, 3), st.data())
@torch.no_grad()
def test_draft_verify_and_roll_back(pattern, mtp, seed, batch, data):
    """Rows advance unevenly: each keeps as many of the tentative tokens as it happens to like, none included."""
    model = build(pattern, mtp, seed)
    L, width = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 4))
    ids = random_ids(model.config, batch, L + 1, seed=seed)
    full = model(ids).logits
    cache = model.new_cache(batch, bool(mtp))
    prompt = data.draw(st.integers(1, L - 1))
    model(ids[:, :prompt], cache=cache)
    at, drafted = [prompt] * batch, False
    for _ in range(40):
        if min(at) == L:
            break
        good = [data.draw(st.integers(0, min(width, L - n))) for n in at]
        columns = random_ids(model.config, batch, width, seed=seed + sum(at))  # what is refused is random
        for b, n in enumerate(good):
            columns[b, :n] = ids[b, at[b] : at[b] + n]
            if drafted:  # then the first column is the token that was drafted after
                columns[b, 0] = ids[b, at[b]]
        logits = model(columns, cache=cache, tentative=True).logits
        for b, n in enumerate(good):
            assert_close(logits[b, :n], full[b, at[b] : at[b] + n], TIGHT)
        if data.draw(st.integers(0, 4)) == 0:
            cache.rollback()
            continue
        cache.commit(good)
        drafted = drafted and not all(good)
        at = [n + g for n, g in zip(at, good)]
        if mtp and data.draw(st.booleans()):
            drafted = True
            model.draft(cache, torch.stack([ids[b, n] for b, n in enumerate(at)]), 2, lambda x: x.argmax(-1))
    rest = max(L - n for n in at)
    if rest:  # what the draws left over, as one padded forward
        docs = torch.tensor([[0] * (L - n) + [-1] * (rest - L + n) for n in at])
        columns = torch.stack([torch.cat([ids[b, n:L], ids.new_zeros(rest - L + n)]) for b, n in enumerate(at)])
        logits = model(columns, doc_ids=docs, cache=cache).logits
        for b, n in enumerate(at):
            assert_close(logits[b, : L - n], full[b, n:L], TIGHT)
    _, whole = chunked(model, ids[:, :L], [L], bool(mtp))
    assert_same_cache(model, cache, whole, ids[:, L])


@FEW
@given(trunks, blocks, seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4))
@torch.no_grad()
def test_drafts_equal_an_oracle_without_any_cache(pattern, mtp, seed, sizes, count):
    """Slot t of the block holds (h_t, token t+1); provisional steps read the block's own output."""
    model = build(pattern, mtp, seed)
    L = sum(sizes)
    ids = random_ids(model.config, 1, L + 1, seed=seed)
    h_TH = model(ids[:, :L]).hidden[0]
    tokens, expected = ids[0, 1:].tolist(), []
    for _ in range(count):
        block, ctx = model.mtp, Context(1, len(tokens), lengths=[len(tokens)])
        e_TH = model.embedding(torch.tensor(tokens))
        x = block.eh_proj(torch.cat([block.enorm(e_TH), block.hnorm(h_TH)], dim=-1))
        for layer in block.layers:
            x = x + layer.mixer(layer.norm(x), ctx)[0]
        h = block.final_layernorm(x)[-1:]
        expected.append(model.head(h)[0])
        tokens.append(int(expected[-1].argmax()))
        h_TH = torch.cat([h_TH, h])
    _, cache = chunked(model, ids[:, :L], sizes, True)
    for again in range(3):  # drafting once more, with and without going back, gives the same
        got = []

        def pick(x, got=got):
            got.append(x[0])
            return x.argmax(-1)

        saved = cache.snapshot()
        drafts = model.draft(cache, ids[:, L], count, pick)
        assert drafts[0].tolist() == tokens[L:]
        assert_close(torch.stack(got), torch.stack(expected), TIGHT)
        if not again:
            cache.restore(saved)
    with pytest.raises(ValueError, match="restore a snapshot"):
        model.draft(cache, (ids[:, L] + 1) % model.config.vocab_size, count, pick)


@torch.no_grad()
def test_the_first_draft_is_depth_one_of_training():
    model = build("M*E", "*E")
    ids = random_ids(model.config, 2, 8)
    logits = model(ids, mtp=True).mtp_logits[0]  # depth 1 at position t reads token t+1
    for n in range(1, 8):
        cache = model.new_cache(2, speculative=True)
        model(ids[:, :n], cache=cache)
        seen = []
        model.draft(cache, ids[:, n], 1, lambda x, seen=seen: seen.append(x) or x.argmax(-1))
        assert_close(seen[0], logits[:, n - 1], TIGHT)


@FEW
@given(trunks, blocks | st.just(""), seeds, st.data())
@torch.no_grad()
def test_snapshot_and_restore(pattern, mtp, seed, data):
    model = build(pattern, mtp, seed)
    ids = random_ids(model.config, 2, 12, seed=seed)
    n, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    _, cache = chunked(model, ids[:, :n], [n], bool(mtp))
    saved = cache.snapshot()
    for tentative in (False, True):
        model(random_ids(model.config, 2, m, seed=seed + 1), cache=cache, tentative=tentative)
        cache.restore(saved)
    assert cache.lengths == [n, n]
    logits = model(ids[:, n : n + m], cache=cache).logits
    assert_close(logits, model(ids[:, : n + m]).logits[:, n:], TIGHT)
    _, whole = chunked(model, ids[:, : n + m], [n + m], bool(mtp))
    assert_same_cache(model, cache, whole, ids[:, n + m])


@pytest.mark.parametrize("pattern", ["M-ME", "MM"])
def test_gradients_flow_through_the_carried_state(pattern):
    model = build(pattern)
    ids = random_ids(model.config, 2, 11)
    grads = []
    for sizes in ([11], [1, 2, 5, 3]):
        model.zero_grad()
        logits, _ = chunked(model, ids, sizes)
        logits.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, 1e-9, name)


# ------------------------------------------------------------------------------------------------------------- padding


@FEW
@given(trunks, seeds, st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(0, 3), st.data())
@torch.no_grad()
def test_padding_is_nothing(pattern, seed, lengths, extra, data):
    model = build(pattern, seed=seed)
    L = max(lengths) + extra
    ids, docs = random_ids(model.config, len(lengths), L, seed=seed), torch.full((len(lengths), L), -1)
    for b, n in enumerate(lengths):
        left = data.draw(st.integers(0, L - n))
        docs[b, left : left + n] = 0
    alone = [model(ids[b : b + 1, docs[b] == 0]).logits[0] for b in range(len(lengths))]
    plain = model(ids, doc_ids=docs).logits
    cut = data.draw(st.integers(0, L))
    cache = model.new_cache(len(lengths))
    parts = [
        model(ids[:, part], doc_ids=docs[:, part], cache=cache).logits
        for part in (slice(0, cut), slice(cut, L))
        if len(range(*part.indices(L)))
    ]
    for logits in (plain, torch.cat(parts, dim=1)):
        assert bool(logits.isfinite().all())
        for b, expected in enumerate(alone):
            assert_close(logits[b, docs[b] == 0], expected, TIGHT)
    assert cache.lengths == lengths
    for b, n in enumerate(lengths):  # and the carried states are those of the row alone
        _, single = chunked(model, ids[b : b + 1, docs[b] == 0], [n])
        for mine, other in zip(cache.trunk.states, single.trunk.states):
            if isinstance(mine, MambaState):
                assert_close(mine.state[b], other.state[0], TIGHT)
                assert_close(mine.window[b], other.window[0], TIGHT)
            elif isinstance(mine, KVState):
                assert_close(mine.k[b, :n], other.k[0, :n], TIGHT)


# ---------------------------------------------------------------------------------------------------- packed documents


@st.composite
def packed_rows(draw):
    """Rows of documents; one-token documents are common; a row may end in padding or begin with it."""
    L = draw(st.integers(2, 14))
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        row, left = [], L
        if draw(st.booleans()):
            row, left = [-1], L - 1
        document = 0
        while left:
            n = min(left, draw(st.sampled_from([1, 1, 2, 3, 5, 8])))
            row += [document] * n
            document, left = document + 1, left - n
        if draw(st.booleans()) and row[0] != -1:
            row[-1] = -1
        rows.append(row)
    return torch.tensor(rows)


def documents(docs):
    """(row, start, end) of every document."""
    for b, row in enumerate(docs.tolist()):
        start = 0
        for end in range(1, len(row) + 1):
            if end == len(row) or row[end] != row[start]:
                if row[start] >= 0:
                    yield b, start, end
                start = end


@FEW
@given(trunks, blocks, seeds, packed_rows(), st.integers(1, 3), st.booleans())
def test_packed_is_separate(pattern, mtp, seed, docs, depth, masked):
    """Logits, MTP hidden states, every loss, the gradient of every parameter, and what the routers count."""
    model = build(pattern, mtp, seed, depth=depth).train()
    ids = random_ids(model.config, *docs.shape, seed=seed)
    labels = ids.masked_fill(random_ids(model.config, *docs.shape, seed=seed + 1) < 6, IGNORE) if masked else ids
    assert_packed_is_separate(model, ids, docs, labels, depth)


def test_a_long_packed_row_is_separate():
    """8,192 tokens: documents that end inside a chunk of the scan, at its end, and after many of them."""
    lengths = [1, 700, 64, 3001, 2, 4096, 327, 1]
    docs = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    model = build("ME*M", "*E", chunk_size=64).train()
    ids = random_ids(model.config, *docs.shape)
    assert docs.shape == (1, 8192)
    assert_packed_is_separate(model, ids, docs, ids, model.depth)


def assert_packed_is_separate(model, ids, docs, labels, depth):
    normalizers = Normalizers([float(n) for n in label_counts(labels, docs, depth)], 1.0)

    def grads():
        out = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        return out

    packed = model(ids, doc_ids=docs, labels=labels, normalizers=normalizers)
    packed.loss.backward()
    packed_grads = grads()
    loss, losses, counts = 0.0, 0.0, {}
    for b, start, end in documents(docs):
        part = slice(start, end)
        out = model(ids[b : b + 1, part], labels=labels[b : b + 1, part], normalizers=normalizers)
        loss, losses = loss + out.loss, losses + out.losses
        for name, count in out.expert_counts.items():
            counts[name] = counts.get(name, 0) + count
        assert_close(packed.logits[b, part], out.logits[0], TIGHT, "logits")
        for k, (mine, alone) in enumerate(zip(packed.mtp_hidden, out.mtp_hidden), 1):
            known = end - start - k  # depth k reads k tokens ahead; beyond the end there is nothing to agree on
            if known > 0:
                assert_close(mine[b, start : start + known], alone[0, :known], TIGHT, f"depth {k}")
    if not isinstance(loss, float):
        loss.backward()
        assert_close(packed.loss, loss, TIGHT, "loss")
        assert_close(packed.losses, losses, TIGHT, "losses")
        for name, grad in grads().items():
            mine = packed_grads[name]
            if grad is None or mine is None:
                assert grad is None or float(grad.abs().max()) == 0
                assert mine is None or float(mine.abs().max()) == 0
            else:
                assert_close(mine, grad, TIGHT, f"gradient of {name}")
        assert set(counts) == set(packed.expert_counts)
        for name, count in counts.items():
            assert torch.equal(packed.expert_counts[name], count), name


def test_what_the_routers_count():
    """Trunk: every token that is not padding, once. MTP: both depths, positions whose label is valid."""
    model = build("E", "*E").train()
    ids = random_ids(model.config, 2, 9)
    docs = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0] * 9])
    out = model(ids, doc_ids=docs, labels=ids)
    k = model.config.num_experts_per_tok
    assert int(out.expert_counts["layers.0"].sum()) == 16 * k
    valid = sum(int((shifted_labels(ids, docs, depth + 1) != IGNORE).sum()) for depth in (1, 2))
    assert int(out.expert_counts["mtp.layers.1"].sum()) == valid * k
    assert model.eval()(ids, doc_ids=docs, labels=ids).expert_counts == {}


def test_auxiliary_loss_is_the_equation():
    """alpha E / (k T^2) sum_e n_e sum_t p_te per row; n from the top-k of p, without the bias."""
    coefficient = 0.3
    model = build("E", router_aux_loss_coef=coefficient).train()
    config, router = model.config, model.layers[0].mixer.router
    ids = random_ids(config, 3, 7)
    docs = torch.tensor([[0] * 7, [0] * 4 + [-1] * 3, [-1, -1, 0, 0, 1, 1, 1]])
    out = model(ids, doc_ids=docs, labels=ids)
    expected = 0.0
    for row, doc in zip(ids, docs):
        x = model.layers[0].norm(model.embedding(row[doc >= 0]))
        scores = torch.sigmoid(x @ router.weight.T)
        p = scores / scores.sum(-1, keepdim=True)
        n = torch.zeros(config.n_routed_experts, dtype=torch.float64)
        for t in range(len(p)):
            n[p[t].topk(config.num_experts_per_tok).indices] += 1
        expected += config.n_routed_experts / (config.num_experts_per_tok * len(p) ** 2) * (n * p.sum(0)).sum()
    assert_close(out.aux_loss, coefficient * expected / 3, TIGHT)
    without = dataclasses.replace(config, router_aux_loss_coef=0.0)
    model.config = without
    assert_close(out.loss - model(ids, doc_ids=docs, labels=ids).loss, out.aux_loss, TIGHT)


@pytest.mark.parametrize("pattern", ["M", "*", "M*-M", "ME*E"])
@torch.no_grad()
def test_the_last_token_of_a_document_does_not_reach_the_next(pattern):
    """Bit for bit where the work is the same; with experts, other slices are multiplied together."""
    model = build(pattern)
    ids = random_ids(model.config, 2, 13)
    docs = torch.tensor([[0] * 5 + [1] * 8, [0] * 1 + [1] * 12])
    before = model(ids, doc_ids=docs).logits
    for b, last in ((0, 4), (1, 0)):
        ids[b, last] = (ids[b, last] + 1) % model.config.vocab_size
    after = model(ids, doc_ids=docs).logits
    for b, last in ((0, 4), (1, 0)):
        assert not torch.equal(before[b, last], after[b, last])
        if "E" in pattern:
            assert_close(after[b, last + 1 :], before[b, last + 1 :], 1e-13)
        else:
            assert torch.equal(after[b, last + 1 :], before[b, last + 1 :])


# ------------------------------------------------------------------------------------------------------------ refusals


@torch.no_grad()
def test_what_a_cache_refuses():
    model = build("M*", "*")
    ids = random_ids(model.config, 2, 5)
    cache = model.new_cache(2)
    with pytest.raises(ValueError, match="no tentative forward"):
        cache.commit(0)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="no tentative forward"):
        cache.commit(1)
    model(ids, cache=cache, tentative=True)
    for keep in (6, -1, [1, 6]):
        with pytest.raises(ValueError, match="tentative tokens"):
            cache.commit(keep)
    cache.commit([5, 0])
    assert cache.lengths == [10, 5]
    with pytest.raises(ValueError, match="no tentative forward"):
        cache.rollback()
    with pytest.raises(ValueError, match="holds 2 rows, not 1"):
        model(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="one document"):
        model(ids, doc_ids=torch.tensor([[0, 0, 1, 1, 1]] * 2), cache=cache)
    with pytest.raises(ValueError, match="without cache"):
        model(ids, labels=ids, cache=cache)
    with pytest.raises(ValueError, match="without cache"):
        model(ids, mtp=True, cache=cache)
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        model(ids[0])
    with pytest.raises(ValueError, match="no MTP block"):
        build("M").new_cache(1, speculative=True)
    with pytest.raises(ValueError, match="drafting starts after a prompt"):
        model.draft(model.new_cache(2, speculative=True), ids[:, 0], 1, lambda x: x.argmax(-1))

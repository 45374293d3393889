"""Blockwise decoding is what a slow loop gives that recomputes everything beside stale keys."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import randomise

import decoding
from decoding import Block, Strategy, generate, plan, respond
from model import Cache, DiT, DiTConfig, Dream, DreamConfig
from softmask import SoftMask

V = 23


def network(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "dit":
        model = DiT(DiTConfig(V, block_size=40, n_layers=3, n_heads=2, width=16, cond_dim=8))
    else:
        sizes = dict(n_layers=3, n_heads=4, n_kv_heads=2, width=32, mlp_width=48, block_size=40)
        model = Dream(DreamConfig(vocab_size=V, mask_id=V - 2, **sizes))
    randomise(model)
    return model.double().eval()  # so that no choice hangs on a rounding


def soft(k):
    softmask = SoftMask(k)
    softmask.set_omegas(0.7, 1.5, -2.0)
    return softmask.double()


def prompts_of(model, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    words = [i for i in range(V) if i != model.mask_id]
    return [[words[j] for j in torch.randint(V - 1, (n,), generator=g).tolist()] for n in lengths]


# The slow loop: one sequence, all rows and the whole vocabulary in every pass


def slow(model, prompt, new, nfe, block, cache, order, softmask=None, threshold=None):
    """The answer to one prompt at temperature 0, and its number of passes."""
    m, at = model.mask_id, len(prompt)
    x = torch.tensor([prompt + [m] * new])
    edges = [*range(at, at + new, block), at + new]
    feedback, store, passes = {}, {}, 0
    for first, last in pairwise(edges):
        steps = last - first if threshold else nfe * (last - first) // new
        times = torch.linspace(1, 1e-3, steps + 1).tolist()
        for i, (t, s) in enumerate(pairwise(times)):
            inside = [p for p in range(first, last) if x[0, p] == m]
            if not inside:
                break
            before = first - 1 if isinstance(model, Dream) else first
            behind = {"none": at + new, "prefix": at + new, "dual": last}[cache]
            renewed = range(max(0, before), behind)
            everything = cache == "none" or i == 0
            passes += 1

            def keep(layer, part, k, v, everything=everything, renewed=renewed):
                if not everything:
                    fresh = torch.zeros(k.shape[2], dtype=torch.bool)
                    fresh[list(renewed)] = True
                    fresh = fresh[None, None, :, None]
                    k = torch.where(fresh, k, store[layer][0])
                    v = torch.where(fresh, v, store[layer][1])
                store[layer] = (k, v)
                return k, v

            e = model.embed(x).clone()
            for p, (ids, pi, neg_entropy) in feedback.items():
                if x[0, p] == m:
                    lam = 0.7 / (1 + math.exp(-1.5 * (neg_entropy + 2.0)))
                    mean = sum(w * model.embedding[v] for v, w in zip(ids, pi))
                    e[0, p] = (1 - lam) * model.embedding[m] + lam * mean
            z = model.logits(model.hidden(e, torch.zeros(1), keep=keep)[0])  # (L, V)
            q = z.softmax(-1)
            p_ = z.index_fill(1, torch.tensor([m]), -math.inf).softmax(-1)
            sure, prob, token = {}, {}, {}
            for p in inside:
                top = p_[p].sort(descending=True, stable=True)
                token[p], prob[p] = int(top.indices[0]), float(top.values[0])
                sure[p] = {
                    "maskgit_plus": prob[p],
                    "topk_margin": prob[p] - float(top.values[1]),
                    "entropy": float((p_[p] * p_[p].clamp(min=1e-300).log()).sum()),
                }[order]
            if threshold:
                best = max(inside, key=lambda p: (prob[p], -p))
                opens = [p for p in inside if prob[p] >= threshold or p == best]
            else:
                n = int(torch.tensor(float(len(inside))) * (1 - torch.tensor(s) / torch.tensor(t)))
                n = len(inside) if i == steps - 1 else n
                opens = sorted(inside, key=lambda p: (-sure[p], p))[:n]
            for p in opens:
                x[0, p] = token[p]
            for p in range(at, at + new) if everything else range(first, last):
                if softmask is not None and x[0, p] == m:
                    top = q[p].topk(softmask.k)
                    pi = (top.values / top.values.sum()).tolist()
                    neg = float((q[p] * q[p].clamp(min=1e-300).log()).sum())
                    feedback[p] = (top.indices.tolist(), pi, neg)
    return x[0, at:].tolist(), passes


CASES = [
    (kind, cache, order, threshold)
    for kind in ("dit", "dream")
    for cache in ("none", "prefix", "dual")
    for order, threshold in (
        ("entropy", None), ("maskgit_plus", None), ("topk_margin", None), ("entropy", 0.4),
    )
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize(("kind", "cache", "order", "threshold"), CASES)
def test_mixed_prompts_decode_as_each_in_the_slow_loop(kind, cache, order, threshold, k):
    how = Strategy(order, temperature=0.0, threshold=threshold)
    for seed in range(4):
        model, softmask = network(kind, seed), None if k is None else soft(k)
        prompts = prompts_of(model, (5, 9, 1, 12, 5), seed)
        answers, done = respond(
            model, prompts, 16, 8, 0, softmask, how, block_length=4, cache=cache
        )
        alone = [slow(model, p, 16, 8, 4, cache, order, softmask, threshold) for p in prompts]
        assert answers == [answer for answer, _ in alone]
        if threshold is None and softmask is not None:
            assert done.passes == 8 and {passes for _, passes in alone} == {8}


@torch.no_grad()
@pytest.mark.parametrize("cache", decoding.CACHES)
def test_a_response_that_is_no_multiple_of_the_block_ends_with_a_shorter_one(cache):
    model, how = network("dream"), Strategy("entropy", 0.0, threshold=0.4)
    prompts = prompts_of(model, (3, 6))
    answers, _ = respond(model, prompts, 14, 1, 0, soft(2), how, block_length=4, cache=cache)
    for prompt, answer in zip(prompts, answers):
        assert answer == slow(model, prompt, 14, 1, 4, cache, "entropy", soft(2), 0.4)[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dit", "dream"])
def test_stale_keys_matter(kind):
    """Were the caches refreshed in each pass, this would compare nothing."""
    model, how = network(kind), Strategy("entropy", temperature=0.0)
    x = torch.tensor([prompts_of(model, (6,))[0] + [model.mask_id] * 24])
    hidden = {}
    for cache in decoding.CACHES:
        trace = []
        generate(model, x, 24, soft(3), how, cache=cache, block_length=12, trace=trace.append)
        hidden[cache] = [entry["soft"] for entry in trace]
    assert hidden["none"][0] == hidden["prefix"][0] == hidden["dual"][0]
    assert hidden["none"] != hidden["prefix"] != hidden["dual"] != hidden["none"]


# What is the same without caches


@pytest.mark.parametrize("order", decoding.ORDERS)
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("kind", ["dit", "dream"])
def test_one_block_without_a_cache_is_the_plain_decoder(kind, k, order):
    model, softmask = network(kind), None if k is None else soft(k)
    prompts = prompts_of(model, (4, 7, 2))
    for how in (Strategy(order, 0.0), Strategy(order, 0.8, 0.9), Strategy(order, alg_temp=0.5)):
        plain, a = respond(model, prompts, 12, 7, 0, softmask, how, trace=True)
        blocks, b = respond(model, prompts, 12, 7, 0, softmask, how, trace=True, block_length=12)
        assert plain == blocks and a.trace == b.trace and a.passes == b.passes


@pytest.mark.parametrize("cache", decoding.CACHES)
@pytest.mark.parametrize("kind", ["dit", "dream"])
def test_a_pass_a_block_needs_no_cache(kind, cache):
    """A cache that is refreshed in every pass is no cache: one step a block."""
    model, how = network(kind), Strategy("entropy", 0.0)
    prompts = prompts_of(model, (3, 8))
    want, _ = respond(model, prompts, 12, 4, 0, soft(3), how, block_length=3)
    found, done = respond(model, prompts, 12, 4, 0, soft(3), how, block_length=3, cache=cache)
    assert found == want and done.passes == 4


@pytest.mark.parametrize("cache", decoding.CACHES)
def test_a_row_does_not_depend_on_its_batch_at_any_temperature(cache):
    model = network("dream")
    prompts = prompts_of(model, (5, 9, 1))
    for how in (
        Strategy("maskgit_plus", 1.0, 0.95), Strategy("entropy", alg_temp=0.7),
        Strategy("entropy", 1.0, threshold=0.3),
    ):  # fmt: skip
        options = dict(block_length=5, cache=cache, stop=tuple(range(14)))
        together, _ = respond(model, prompts, 13, 9, 0, soft(2), how, seeds=[7, 8, 9], **options)
        for i, prompt in enumerate(prompts):
            alone, _ = respond(model, [prompt], 13, 9, 0, soft(2), how, seeds=[7 + i], **options)
            assert alone[0] == together[i]


@pytest.mark.parametrize("cache", decoding.CACHES)
def test_rows_with_given_tokens_finish_their_blocks_apart_and_as_alone(cache):
    model = network("dit")
    x = torch.full((3, 24), model.mask_id)
    x[0, 1:6], x[1, 8:14], x[2, 20:23] = 2, 3, 4
    for how in (Strategy("entropy", alg_temp=0.7), Strategy("maskgit_plus", threshold=0.3)):
        options = dict(block_length=8, cache=cache)
        together, _ = generate(model, x, 15, soft(2), how, seeds=[4, 5, 6], **options)
        for i in range(3):
            alone, _ = generate(model, x[i : i + 1], 15, soft(2), how, seeds=[4 + i], **options)
            assert torch.equal(alone[0], together[i])


def test_a_cache_of_one_refresh_gives_the_states_of_a_whole_pass():
    """Keys and values that are not stale: a part of the rows comes out as in the whole."""
    for kind in ("dit", "dream"):
        model = network(kind)
        tokens = torch.randint(V - 2, (2, 20))
        attend = torch.ones(2, 20, dtype=torch.bool)
        attend[0, :6] = False
        with torch.no_grad():
            cache = Cache(model.config.n_layers)
            whole = model.hidden(model.embed(tokens), torch.zeros(2), attend, cache)
            for first, last in ((8, 12), (7, 20), (10, 11)):
                part = model.part_for(first, last)
                e = model.embed(tokens[:, part])
                found = model.hidden(e, torch.zeros(2), attend, cache, part)
                torch.testing.assert_close(found[:, first - part.start :], whole[:, first:last])
        heads = 2
        size = 3 * 2 * 2 * heads * 20 * 8 * 8  # layers, k and v, B, heads, L, head_dim, bytes
        assert cache.nbytes == size and cache.kv.dtype == torch.float64


def test_a_block_that_is_done_takes_no_more_passes():
    """Under a low threshold a block opens at once, and the next begins."""
    model = network("dream")
    x = torch.full((2, 20), model.mask_id)
    _, done = generate(model, x, 1, None, Strategy("entropy", threshold=1e-9), block_length=5)
    assert done.passes == 4
    _, done = generate(model, x, 1, None, Strategy("entropy", threshold=1.0), block_length=5)
    assert done.passes == 20, "never sure: one at a time"


def test_given_tokens_inside_the_response_stay():
    model = network("dit")
    x = torch.full((2, 24), model.mask_id)
    x[0, 5:9], x[1, 20:] = 3, 4
    for cache in decoding.CACHES:
        y, _ = generate(model, x, 12, soft(1), Strategy("entropy"), block_length=6, cache=cache)
        assert (y[x != model.mask_id] == x[x != model.mask_id]).all() and (y != V - 1).all()


# The plan


def masks(length, first=0):
    start = torch.zeros(1, first + length, dtype=torch.bool)
    start[:, first:] = True
    return start


@pytest.mark.parametrize("length", [1, 7, 32, 33, 64, 100])
@pytest.mark.parametrize("block", [1, 5, 32, 200])
def test_blocks_cover_the_response_and_share_the_steps(length, block):
    how, least = Strategy("entropy"), -(-length // block)
    for nfe in {least, length, (least + length) // 2}:
        blocks = plan(masks(length, 3), nfe, how, block, "none")
        assert [b.first for b in blocks] == list(range(3, 3 + length, block))
        assert [b.last for b in blocks[:-1]] == [b.first for b in blocks[1:]]
        assert blocks[-1].last == 3 + length
        steps = [len(b.times) - 1 for b in blocks]
        assert sum(steps) == nfe and min(steps) >= 1
        for b, n in zip(blocks, steps):
            assert b.times == torch.linspace(1, 1e-3, n + 1).tolist()
        full = [n for b, n in zip(blocks, steps) if b.last - b.first == block]
        assert not full or max(full) - min(full) <= 1


def test_blocks_without_a_mask_take_no_step():
    start = torch.zeros(1, 64, dtype=torch.bool)
    start[0, [2, 50]] = True
    blocks = plan(start, 2, Strategy("entropy"), 8, "dual")
    assert [(b.first, b.last, len(b.times) - 1) for b in blocks] == [(2, 10, 1), (50, 51, 1)]
    model = network("dit")
    x = torch.full((2, 40), 3)
    x[0, 3], x[1, 35] = model.mask_id, model.mask_id  # one mask a row, each in a block of its own
    y, done = generate(model, x, 2, soft(1), Strategy("entropy"), block_length=8, cache="prefix")
    assert done.passes == 2 and (y != model.mask_id).all()


def test_a_threshold_gives_a_block_as_many_steps_as_it_may_take():
    how = Strategy("entropy", threshold=0.9)
    steps = [len(b.times) - 1 for b in plan(masks(10), 1, how, 4, "dual")]
    assert steps == [4, 4, 2]
    assert plan(masks(10), 3, Strategy("mdlm"), None, "none") == [
        Block(0, 10, Strategy("mdlm").times(3))
    ]


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ({"name": "remdm-cap"}, {"cache": "dual"}, "not for remdm-cap: it may mask a token again"),
        ({"name": "mdlm"}, {"block_length": 4}, "not for mdlm"),
        ({"name": "origin"}, {"cache": "prefix"}, "not for origin"),
        ({"name": "entropy"}, {"block_length": 0}, "--block-length 0"),
        ({"name": "entropy"}, {"cache": "both"}, "--cache both: choose none, prefix, dual"),
        ({"name": "entropy"}, {"block_length": 2}, "--nfe 3: 8 to 16 steps for 8 blocks"),
    ],
)
def test_what_cannot_be_is_refused(strategy, options, message):
    model, how = network("dit"), Strategy(**strategy)
    with pytest.raises(ValueError, match=message):
        generate(model, torch.full((1, 16), V - 1), 3, None, how, **options)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, math.nan])
def test_a_threshold_is_a_probability_above_0(threshold):
    with pytest.raises(ValueError, match="--threshold .*above 0, at most 1"):
        Strategy("entropy", threshold=threshold)
    with pytest.raises(ValueError, match="--alg-temp"):
        Strategy("entropy", threshold=0.5, alg_temp=1.0)

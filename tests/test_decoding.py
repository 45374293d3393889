"""Every strategy follows its law, leaves given positions alone and repeats with its seed."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomise

import decoding
from model import DREAM_SIZES, SIZES, DiT, DiTConfig, Dream, DreamConfig
from softmask import SoftMask

NAMES = decoding.ANCESTRAL + decoding.ORDERS
OMEGAS = (0.9, 3.0, -1.5)  # omega_s, omega_a, omega_b


class Table(torch.nn.Module):
    """A denoiser that looks its logits up: `rule(tokens (L,))` gives (L, V) log-probabilities."""

    mask_eps = 0.0

    def __init__(self, vocab_size, rule):
        super().__init__()
        self.vocab_size, self.mask_id = vocab_size, vocab_size - 1
        self.embedding = torch.nn.Parameter(torch.eye(vocab_size))
        self.head = torch.nn.Identity()
        self.config = SimpleNamespace(time_conditioning=False)
        self.rule, self.calls = rule, 0

    def embed(self, tokens):
        self.tokens = tokens
        return self.embedding[tokens]

    def hidden(self, embeddings, sigma):
        self.calls += 1
        known = {}
        for row in self.tokens.tolist():
            if tuple(row) not in known:
                known[tuple(row)] = self.rule(row)
        return torch.stack([known[tuple(row)] for row in self.tokens.tolist()])

    def logits(self, rows):
        return rows


class Fixed(Table):
    """A denoiser whose log-probabilities (L, V) depend on nothing."""

    def __init__(self, p):
        super().__init__(p.shape[1] + 1, None)
        self.table = with_mask(p)

    def hidden(self, embeddings, sigma):
        self.calls += 1
        return self.table.expand(len(embeddings), -1, -1)


class Spy(SoftMask):
    """A soft mask that remembers what it was given, a tuple a soft-masked pass."""

    def __init__(self, *args):
        super().__init__(*args)
        self.set_omegas(*OMEGAS)
        self.seen = []

    def forward(self, embeddings, rows, feedback, table, scale=1.0):
        self.seen.append((rows, feedback, scale))
        return super().forward(embeddings, rows, feedback, table, scale)


def lively(k):
    """A float64 soft mask that changes predictions a lot."""
    softmask = SoftMask(k)
    softmask.set_omegas(*OMEGAS, **({"tau": 0.7} if k is None else {}))
    return softmask.double()


def with_mask(p):
    """Probabilities (L, V - 1) to log-probabilities (L, V) under SUBS."""
    return torch.cat([p.log(), torch.full((len(p), 1), -1e6)], dim=1)


def chi_square(counts, expected):
    """The statistic, and the value it stays below with probability 0.9999 (Wilson-Hilferty)."""
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected))
    df = len(counts) - 1
    limit = df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3
    return statistic, limit


def draw(model, length, n, nfe, first_seed=0, **options):
    x = torch.full((n, length), model.mask_id)
    seeds = list(range(first_seed, first_seed + n))
    softmask, on_step = options.pop("softmask", None), options.pop("on_step", None)
    how = decoding.Strategy(**options)
    return decoding.generate(model, x, nfe, softmask, how, seeds=seeds, on_step=on_step)[0]


@pytest.mark.parametrize("softmask", [None, SoftMask(2)])
def test_tokens_of_a_fixed_predictor_follow_its_probabilities(softmask):
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    x = draw(Table(5, lambda row: with_mask(p)), 2, 6000, nfe=3, softmask=softmask)
    for position in range(2):
        counts = torch.bincount(x[:, position], minlength=4).tolist()
        statistic, limit = chi_square(counts, [6000 * q for q in p[position].tolist()])
        assert statistic < limit


def test_joint_law_of_a_predictor_that_looks_at_its_context():
    """Two positions, two steps: the chain enumerated by hand, Eq. 1 with alpha = 1 - t."""

    def rule(row):  # a token likes to be followed and preceded by itself
        p = torch.tensor([0.7, 0.3])
        rows = []
        for position in range(2):
            other = row[1 - position]
            rows.append(p if other == 2 else torch.tensor([0.9, 0.1] if other == 0 else [0.2, 0.8]))
        return with_mask(torch.stack(rows))

    s = (1 + 1e-5) / 2  # the share still masked after the first of two steps
    alone = [0.7, 0.3]
    given = [[0.9, 0.1], [0.2, 0.8]]
    expected = []
    for a, b in itertools.product(range(2), repeat=2):
        together = alone[a] * alone[b]  # both open in the same step
        one_first = alone[a] * given[a][b] + alone[b] * given[b][a]
        expected.append(((1 - s) ** 2 + s**2) * together + s * (1 - s) * one_first)
    n = 8000
    x = draw(Table(3, rule), 2, n, nfe=2)
    counts = torch.bincount(2 * x[:, 0] + x[:, 1], minlength=4).tolist()
    statistic, limit = chi_square(counts, [n * e for e in expected])
    assert sum(expected) == pytest.approx(1, abs=1e-3) and statistic < limit


def test_masked_share_after_each_step_is_one_minus_alpha():
    n, length, nfe = 400, 32, 8
    model = Table(3, lambda row: with_mask(torch.full((length, 2), 0.5)))
    shares = []
    draw(model, length, n, nfe, on_step=lambda i, x: shares.append((x == 2).float().mean().item()))
    times = torch.linspace(1, 1e-5, nfe + 1)[1:]
    for share, t in zip(shares, times.tolist()):
        assert abs(share - t) < 5 * math.sqrt(t * (1 - t) / (n * length)) + 1e-9


def test_binary_sampler_reuses_a_pass_when_nothing_changed():
    model = Table(3, lambda row: with_mask(torch.full((4, 2), 0.5)))
    x = torch.full((1, 4), 2)
    _, done = decoding.generate(model, x, 200, seeds=[1])
    assert done.passes <= 5 and model.calls - done.passes in (0, 1)
    model.calls = 0
    _, done = decoding.generate(model, x, 20, SoftMask(1), seeds=[1])
    assert done.passes > 5


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = DiT(DiTConfig(60, **SIZES["nano"])).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("softmask", [None, SoftMask(3, omega_s=0.9), SoftMask(None, omega_s=0.9)])
@pytest.mark.parametrize("nfe", [1, 5, 50])
def test_given_positions_stay_and_masks_are_filled(network, softmask, nfe):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(59, (4, 20), generator=g)
    hidden = torch.rand(x.shape, generator=g) < torch.tensor([0.0, 0.2, 0.7, 1.0])[:, None]
    start = torch.where(hidden, network.mask_id, x)
    out, _ = decoding.generate(network, start, nfe, softmask, decoding.Strategy(top_p=0.9))
    assert torch.equal(out[~hidden], x[~hidden]) and not (out == network.mask_id).any()
    assert torch.equal(start[hidden], torch.full_like(start[hidden], network.mask_id))


@pytest.mark.parametrize("softmask", [None, SoftMask(3, omega_s=0.9)])
def test_a_row_does_not_depend_on_its_batch(network, softmask):
    network, rows = network.double(), torch.full((5, 16), network.mask_id)
    together, _ = decoding.generate(network, rows, 8, softmask, seeds=[3, 1, 4, 5, 9])
    alone = [
        decoding.generate(network, rows[:1], 8, softmask, seeds=[s])[0] for s in (3, 1, 4, 5, 9)
    ]
    network.float()
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row) for row in together.tolist()}) == 5


def test_soft_masking_with_lambda_zero_is_the_binary_sampler(network):
    softmask = SoftMask(3)
    softmask.set_omegas(0.9, 1.0, -20.0)  # omega_b far below every -H: lambda = omega_s
    softmask.raw_s.data.fill_(-math.inf)
    x = torch.full((3, 16), network.mask_id)
    options = {"nfe": 8, "seeds": [1, 2, 3], "how": decoding.Strategy(top_p=0.9)}
    plain, _ = decoding.generate(network, x, **options)
    assert torch.equal(plain, decoding.generate(network, x, softmask=softmask, **options)[0])
    softmask.raw_s.data.fill_(5.0)
    assert not torch.equal(plain, decoding.generate(network, x, softmask=softmask, **options)[0])


def test_temperature_zero_draws_the_most_likely_token(network):
    x = torch.full((1, 16), network.mask_id)
    greedy = decoding.Strategy(temperature=0)
    a, b = (decoding.generate(network, x, 1, how=greedy, seeds=[s])[0] for s in (1, 2))
    z = network.logits(network.hidden(network.embed(x))[0])
    assert torch.equal(a, b) and torch.equal(a[0], z.argmax(-1))


def kept(p, top_p, crossing):
    """The nucleus as a set of ids a row."""
    ids, q = decoding.nucleus(p, top_p, crossing)
    assert torch.allclose(q.sum(-1), torch.ones(len(p), dtype=p.dtype))
    mass = torch.where(q > 0, p.gather(1, ids), 0.0)
    assert torch.allclose(q, mass / mass.sum(-1, keepdim=True))
    return [set(row[w > 0].tolist()) for row, w in zip(ids, q)]


def test_mdlm_nucleus_keeps_tokens_while_the_cumulative_probability_is_at_most_p():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    assert kept(p, 0.4, False) == [{1}]  # the first always stays
    assert kept(p, 0.75, False) == [{1, 3}]
    assert kept(p, 0.8, False) == [{1, 3}]  # the crossing token is out
    assert kept(p, 0.95, False) == [{1, 2, 3}]


def test_dream_nucleus_is_the_smallest_set_that_reaches_p():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    assert kept(p, 0.4, True) == [{1}]
    assert kept(p, 0.75, True) == [{1, 3}]
    assert kept(p, 0.8, True) == [{1, 2, 3}]  # the crossing token is in
    assert kept(p, 0.95, True) == [{0, 1, 2, 3}]


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
def test_nucleus_of_large_vocabularies_is_that_of_a_full_sort(crossing, sharpness):
    p = (torch.randn(20, 9000, dtype=torch.float64) * sharpness).softmax(-1)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        for row, found in zip(p, kept(p, top_p, crossing)):
            total, want = 0.0, set()
            for i in row.argsort(descending=True).tolist():
                if want and (total >= top_p if crossing else total + row[i] > top_p):
                    break
                want.add(i)
                total += row[i].item()
            assert found == want


def test_gumbel_draws_follow_the_nucleus_law():
    z = torch.tensor([[2.0, 1.0, 0.5, -1.0, 3.0]], dtype=torch.float64).expand(20000, 5)
    p = (z[0, :4] / 0.7).softmax(0)  # the last is the mask
    for name, top_p in (("mdlm", 0.95), ("origin", 0.95), ("mdlm", 1.0)):
        how = decoding.Strategy(name, temperature=0.7, top_p=top_p)
        g = [torch.Generator().manual_seed(i) for i in range(20000)]
        tokens, prob = decoding.draw(*decoding.candidates(z, 4, how), 0.7, g)
        before = p.cumsum(0) - p  # p is in descending order
        inside = before < top_p if name == "origin" else p.cumsum(0) <= top_p + 1e-9
        law = torch.where(inside, p, 0.0) / p[inside].sum()
        assert torch.allclose(prob, law[tokens])
        counts = torch.bincount(tokens, minlength=4)
        assert len(counts) == 4 and counts[~inside].sum() == 0
        statistic, limit = chi_square(counts[inside].tolist(), (20000 * law[inside]).tolist())
        assert statistic < limit


# Laws of the ancestral family


def law_of_share(how, nfe, length):
    """The expected masked share after each step, from the rules of each strategy."""
    m, shares = 1.0, []
    times = [1 + (1e-5 - 1) * i / nfe for i in range(nfe + 1)]
    for t, s in itertools.pairwise(times):
        sigma = 0.0
        if how.name == "remdm-loop":
            if t > how.t_on:
                a, b = ((1 - v) * how.alpha_on / (1 - how.t_on) for v in (t, s))
            elif t > how.t_off:
                a, b, sigma = how.alpha_on, how.alpha_on, how.eta
            else:
                a, b = (1 - v * (1 - how.alpha_on) / how.t_off for v in (t, s))
        else:
            a, b = 1 - t, 1 - s
        most = 1.0 if a == 0 else min(1.0, (1 - b) / a)
        if how.name == "remdm-conf":
            m = m * (1 - b) / (1 - a) + (most / length if m < 1 else 0)
        else:
            sigma = {"remdm-cap": min(how.eta, most), "remdm-rescale": how.eta * most}.get(
                how.name, sigma
            )
            m = m * (1 - min(1.0, (b - (1 - sigma) * a) / (1 - a))) + (1 - m) * sigma
            if how.name != "remdm-loop":
                assert m == pytest.approx(1 - b, abs=1e-9)  # the law that remasking keeps
        shares.append(m)
    return shares


@pytest.mark.parametrize(
    "name, nfe, options",
    [
        ("mdlm", 7, {}),
        ("remdm-cap", 8, {}),
        ("remdm-cap", 8, {"eta": 0.9}),
        ("remdm-rescale", 8, {}),
        ("remdm-rescale", 8, {"eta": 1.0}),
        ("remdm-conf", 6, {}),
        ("remdm-loop", 12, {}),
        ("remdm-loop", 50, {"eta": 0.1, "t_on": 0.6, "t_off": 0.25}),
        ("remdm-loop", 3, {"alpha_on": 0.5, "eta": 1.0}),
    ],
)
def test_masked_share_follows_its_law_and_given_positions_stay(name, nfe, options):
    n, length, given = 250, 40, 8
    how = decoding.Strategy(name, **options)
    x = torch.full((n, length), 3)
    places = torch.rand(n, length).argsort(-1)[:, :given]
    x.scatter_(1, places, torch.randint(3, (n, given)))
    open_to = x == 3
    shares = []

    def on_step(i, now):
        assert torch.equal(now[~open_to], x[~open_to])
        shares.append((now[open_to] == 3).float().mean().item())

    model = Fixed(torch.tensor([[0.5, 0.3, 0.2]]).repeat(length, 1))
    out, _ = decoding.generate(model, x, nfe, None, how, on_step=on_step)
    assert torch.equal(out[~open_to], x[~open_to]) and not (out == 3).any()
    count = n * (length - given)
    law = law_of_share(how, nfe, length - given)
    assert len(shares) == nfe
    for share, m in zip(shares, law):
        assert abs(share - m) < 5 * math.sqrt(m * (1 - m) / count) + 2e-3 * (m < 1e-3) + 1e-9


@pytest.mark.parametrize("k", ["binary", 2])
@pytest.mark.parametrize("name", ["remdm-cap", "remdm-rescale"])
def test_remasking_with_eta_zero_is_mdlm(tiny, name, k):
    model = tiny(block_size=16).double()
    softmask = None if k == "binary" else lively(k)
    x = torch.full((20, 16), 10)
    plain, remdm = (
        decoding.generate(model, x, 9, softmask, how)[0]
        for how in (decoding.Strategy(top_p=0.9), decoding.Strategy(name, top_p=0.9, eta=0.0))
    )
    assert torch.equal(plain, remdm)


def test_conf_remasks_by_the_probability_tokens_had_within_the_nucleus():
    """Raw probabilities 0.30 and 0.02; in the nucleus 0.9375 and 0.0625."""
    n, length, nfe = 5000, 6, 5
    p = torch.tensor([0.30, 0.02] + [0.017] * 40)
    states = [torch.full((n, length), 42)]
    draw(
        Fixed(p.repeat(length, 1)), length, n, nfe, name="remdm-conf", top_p=0.325,
        on_step=lambda i, x: states.append(x.clone()),
    )  # fmt: skip
    times = [1 + (1e-5 - 1) * i / nfe for i in range(nfe + 1)]
    found, law, spread = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for i in range(1, nfe):
        before, after = states[i], states[i + 1]
        t, s = times[i], times[i + 1]
        drawn = before != 42
        own = torch.tensor([0.9375, 0.0625])[before.clamp(max=1)]
        weight = torch.where(drawn, torch.exp(-own), 0.0)
        q = min(1, s / (1 - t)) * weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
        for token in range(2):
            at = before == token
            found[token] += (after[at] == 42).sum()
            law[token] += q[at].sum()
            spread[token] += (q * (1 - q))[at].sum()
    assert spread.min() > 30
    assert ((found - law).abs() < 4.5 * spread.sqrt()).all()


# Dream's orders


def slow_dream(model, row, nfe, order, top_p, k):
    """One sequence, greedily, a position at a time; `k` "binary" for no soft-masking."""
    row, mask, table = list(row), model.mask_id, model.embedding.detach()
    omega_s, omega_a, omega_b = OMEGAS
    times = torch.linspace(1, 1e-3, nfe + 1).numpy()
    feedback = {}
    for i in range(nfe):
        masks = [at for at, token in enumerate(row) if token == mask]
        if not masks:
            break
        e = [table[token] for token in row]
        for at, z in feedback.items():
            if k is None:
                p = torch.softmax(z / 0.7, 0)
                mixed = sum(p[v] * table[v] for v in range(len(p)))
            else:
                p = torch.softmax(z, 0)
                best = sorted(range(len(p)), key=lambda v: -p[v])[:k]
                mixed = sum(p[v] * table[v] for v in best) / sum(p[v] for v in best)
            minus_h = sum(q * math.log(q) for q in p.tolist() if q > 0)
            lam = omega_s / (1 + math.exp(-omega_a * (minus_h - omega_b)))
            e[at] = (1 - lam) * table[mask] + lam * mixed
        with torch.no_grad():
            z = model.logits(model.hidden(torch.stack(e)[None])[0])
        sure, likeliest = {}, {}
        for at in masks:
            p = torch.softmax(z[at], 0).tolist()
            p[mask] = 0.0
            ids = sorted(range(len(p)), key=lambda v: -p[v])
            nucleus = []
            for v in ids:
                nucleus.append(v)
                if top_p < 1 and sum(p[w] for w in nucleus) >= top_p:
                    break
            q = [p[v] / sum(p[w] for w in nucleus) for v in nucleus] + [0.0]
            likeliest[at] = ids[0]
            sure[at] = {
                "maskgit_plus": q[0],
                "topk_margin": q[0] - q[1],
                "entropy": sum(v * math.log(v) for v in q if v > 0),
            }[order]
        n = int(np.float32(len(masks)) * (np.float32(1) - times[i + 1] / times[i]))
        n = len(masks) if i == nfe - 1 else n
        chosen = sorted(masks, key=lambda at: (-sure[at], at))[:n]
        for at in chosen:
            row[at] = likeliest[at]
        if k != "binary":
            feedback = {at: z[at] for at in masks if at not in chosen}
    return row


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("order", decoding.ORDERS)
@pytest.mark.parametrize("k", ["binary", 2, None])
def test_confidence_orders_are_those_of_a_slow_decoder(tiny, k, order, top_p):
    how = decoding.Strategy(order, temperature=0, top_p=top_p)
    softmask = None if k == "binary" else lively(k)
    prompts = torch.tensor([1, 2, 4, 7])  # all masks would tie but for rounding
    for nfe in (1, 3, 4, 7, 11):
        model = tiny(block_size=12).double()
        with torch.no_grad():
            model.head.weight.mul_(2)
        x = torch.randint(10, (4, 12))
        x[torch.arange(12) >= prompts[:, None]] = 10
        out, done = decoding.generate(model, x, nfe, softmask, how)
        want = [slow_dream(model, row, nfe, order, top_p, k) for row in x.tolist()]
        assert out.tolist() == want and not done.filled


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("order", decoding.ORDERS)
def test_equal_confidence_opens_the_lowest_position_first(order, top_p):
    def opened(p, nfe):
        masks = []
        x = torch.full((3, len(p)), 3)
        how = decoding.Strategy(order, temperature=0, top_p=top_p)
        on_step = lambda i, x: masks.append((x == 3).tolist())  # noqa: E731
        decoding.generate(Fixed(torch.tensor(p)), x, nfe, None, how, on_step=on_step)
        assert all(row == rows[0] for rows in masks for row in rows)
        return ["".join("m" if m else "." for m in rows[0]) for rows in masks]

    a, b = [0.6, 0.3, 0.1], [0.95, 0.03, 0.02]
    # 8 masks open by int(8 * 0.24975), int(7 * 0.333), int(5 * 0.499), and the rest
    assert opened([a] * 8, 4) == [".mmmmmmm", "...mmmmm", ".....mmm", "........"]
    some = opened([a, b, a, b, a, a, b, a], 4)
    # 1001 * 0.4995 = 499.9995; an end at 1e-5 in place of 1e-3 would open 500
    assert opened([a] * 1001, 2) == ["." * 499 + "m" * 502, "." * 1001]
    assert some == ["m.mmmmmm", "m.m.mm.m", "....mm.m", "........"]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("order", decoding.ORDERS)
def test_alg_temp_draws_positions_without_replacement_from_the_softmax(order, top_p):
    p = torch.tensor([[0.4, 0.35, 0.25], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.95, 0.04, 0.01],
                      [0.45, 0.45, 0.10]])  # fmt: skip
    sure = []
    for q in p.tolist():
        if top_p < 1:
            q = q[: next(i for i in (1, 2, 3) if sum(q[:i]) >= top_p - 1e-6)]
            q = [v / sum(q) for v in q]
        margin = q[0] - (q[1] if len(q) > 1 else 0)
        sure.append({"maskgit_plus": q[0], "topk_margin": margin}.get(
            order, sum(v * math.log(v) for v in q)))  # fmt: skip
    law = torch.softmax(torch.tensor(sure) / 0.4, 0).tolist()
    n = 5000

    def first(nfe):
        """The positions that the first step opened."""
        states, options = [], {"temperature": 0, "top_p": top_p, "alg_temp": 0.4}
        on_step = lambda i, x: states.append(x.clone())  # noqa: E731
        draw(Fixed(p), 5, n, nfe, name=order, on_step=on_step, **options)
        return states[0] != 3

    opened = first(3)
    assert (opened.sum(1) == 1).all()
    statistic, limit = chi_square(opened.sum(0).tolist(), [n * q for q in law])
    assert statistic < limit
    opened = first(2)
    assert (opened.sum(1) == 2).all()
    pairs = list(itertools.combinations(range(5), 2))
    counts = [(opened[:, a] & opened[:, b]).sum().item() for a, b in pairs]
    both = [n * law[a] * law[b] * (1 / (1 - law[a]) + 1 / (1 - law[b])) for a, b in pairs]
    statistic, limit = chi_square(counts, both)
    assert statistic < limit


@pytest.mark.parametrize("nfe", [1, 4])
def test_origin_opens_each_mask_alone_and_all_at_the_last_step(nfe):
    n, length = 1500, 16
    counts, shares = [], []

    def on_step(i, x):
        counts.append(torch.bincount((x == 2).sum(1), minlength=length + 1).tolist())
        shares.append((x == 2).float().mean(0).tolist())

    x = torch.full((n, length), 2)
    model = Fixed(torch.full((length, 2), 0.5))
    _, done = decoding.generate(model, x, nfe, None, decoding.Strategy("origin"), on_step=on_step)
    times = [1 + (1e-3 - 1) * i / nfe for i in range(nfe + 1)]
    assert decoding.Strategy("origin").times(nfe) == pytest.approx(times, rel=1e-4)
    assert counts[-1] == [n] + [0] * length and not done.filled and len(counts) == nfe
    for i in range(nfe - 1):
        m = times[i + 1]
        assert all(abs(v - m) < 4.5 * math.sqrt(m * (1 - m) / n) for v in shares[i])
        law = [math.comb(length, c) * m**c * (1 - m) ** (length - c) for c in range(length + 1)]
        big = [c for c in range(length + 1) if n * law[c] >= 5]
        rest = n - sum(counts[i][c] for c in big), n * (1 - sum(law[c] for c in big))
        statistic, limit = chi_square(
            [counts[i][c] for c in big] + [rest[0]], [n * law[c] for c in big] + [rest[1]]
        )
        assert statistic < limit


# What soft-masking is told


def watched(model, monkeypatch):
    """The final states of every pass of the model, in order, as a list that grows."""
    passes, hidden = [], model.hidden

    def spy(embeddings, sigma=None):
        passes.append((embeddings.clone(), hidden(embeddings, sigma)))
        return passes[-1][1]

    monkeypatch.setattr(model, "hidden", spy)
    return passes


def assert_feedback(model, given, x, before, states, k):
    """The feedback `given` to a pass over x is that of the pass with `states`, over `before`."""
    rows, feedback = given[:2]
    mask = model.mask_id
    assert rows.sort().values.tolist() == (x == mask).flatten().nonzero()[:, 0].tolist()
    p = torch.softmax(model.logits(states.flatten(0, 1)), -1)
    for j, place in enumerate(rows.tolist()):
        former = before.flatten()[place].item()
        if former == mask:
            top = p[place].topk(k)
            assert feedback.ids[j].tolist() == top.indices.tolist()
            torch.testing.assert_close(feedback.weights[j], top.values / top.values.sum())
            minus_h = torch.xlogy(p[place], p[place]).sum()
            torch.testing.assert_close(feedback.neg_entropy[j], minus_h, check_dtype=False)
        else:
            mixed = dict.fromkeys(feedback.ids[j].tolist(), 0.0)
            for v, w in zip(feedback.ids[j].tolist(), feedback.weights[j].tolist()):
                mixed[v] += w
            assert {v for v, w in mixed.items() if w} == {former} and mixed[former] == 1
            assert feedback.neg_entropy[j] == 0


@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize("name, eta", [("remdm-cap", 0.5), ("remdm-conf", None), ("mdlm", None)])
def test_feedback_is_the_last_prediction_and_of_a_remasked_position_its_token(
    tiny, monkeypatch, name, eta, k
):
    model, spy = tiny(block_size=12).double(), Spy(k).double()
    x = torch.full((6, 12), 10)
    x[:, :2] = torch.tensor([3, 4])
    passes, states = watched(model, monkeypatch), [x]
    how = decoding.Strategy(name, top_p=0.9, eta=eta)
    decoding.generate(model, x, 6, spy, how, on_step=lambda i, x: states.append(x.clone()))
    assert len(spy.seen) == len(passes) - 1 == 5
    assert torch.equal(passes[0][0], model.embed(x))  # the first pass sees plain masks
    omega_s, omega_a, omega_b = OMEGAS
    sure = omega_s / (1 + math.exp(omega_a * omega_b))
    again = 0
    for i, given in enumerate(spy.seen, 1):
        if k is not None:
            assert_feedback(model, given, states[i], states[i - 1], passes[i - 1][1], k)
        returned = (states[i] == 10) & (states[i - 1] != 10)
        again += int(returned.sum())
        e, table = passes[i][0], model.embedding
        want = (1 - sure) * table[10] + sure * table[states[i - 1][returned]]
        torch.testing.assert_close(e[returned], want)
        seen = states[i] != 10
        assert torch.equal(e[seen], table[states[i][seen]])
    assert again > 5 or name == "mdlm"


def test_a_token_drawn_and_masked_again_while_nothing_was_masked_returns_as_feedback(tiny):
    model, spy = tiny(block_size=4), Spy(1)
    x = torch.full((1, 4), 10)
    found, states = 0, []
    how = decoding.Strategy("remdm-cap", eta=0.3)
    for seed in range(40):
        spy.seen.clear(), states.clear()
        on_step = lambda i, x: states.append(x.clone())  # noqa: E731
        decoding.generate(model, x, 12, spy, how, seeds=[seed], on_step=on_step)
        full = [i for i in range(11) if not (states[i] == 10).any() and (states[i + 1] == 10).any()]
        for i in full:
            before, after = states[i], states[i + 1]
            given = [g for g in spy.seen if torch.equal(g[0], (after[0] == 10).nonzero()[:, 0])
                     and torch.equal(g[1].ids[:, 0], before[after == 10])]  # fmt: skip
            assert i == 10 or any((g[1].neg_entropy == 0).all() for g in given)
            found += i < 10
    assert found > 5


@pytest.mark.parametrize("name", ["mdlm", "entropy", "origin"])
@pytest.mark.parametrize("order", ["sm-binary", "binary-sm"])
@pytest.mark.parametrize("kind", ["none", "linear", "step"])
def test_lambda_is_scaled_by_the_time_left(kind, order, name):
    nfe, spy = 8, Spy(2)
    x = torch.full((6, 32), 3)
    model = Fixed(torch.tensor([[0.5, 0.3, 0.2]]).repeat(32, 1))
    schedule = (kind, order, 0.375)
    _, done = decoding.generate(
        model, x, nfe, spy, decoding.Strategy(name), schedule=schedule, trace=True
    )

    def factor(i):
        left = 1 - i / nfe
        if kind == "none":
            return 1.0
        if kind == "linear":
            return left if order == "sm-binary" else 1 - left
        return float(left >= 0.375) if order == "sm-binary" else float(left <= 0.375)

    assert [scale for *_, scale in spy.seen] == [factor(i) for i in range(1, nfe)]
    omega_s, omega_a, omega_b = OMEGAS
    for entry in done.trace:
        for _, lam, minus_h, *_ in entry["soft"]:
            full = omega_s / (1 + math.exp(-omega_a * (minus_h - omega_b)))
            assert lam == pytest.approx(factor(entry["step"] + 1) * full, abs=3e-4)


@pytest.mark.parametrize("reuse", [False, True])
def test_passes_run_after_every_step_or_after_a_change(tiny, monkeypatch, reuse):
    model, spy = tiny(block_size=6).double(), Spy(2).double()
    x = torch.full((1, 6), 10)
    passes, states = watched(model, monkeypatch), [x]
    _, done = decoding.generate(
        model, x, 40, spy, seeds=[5], reuse_unchanged=reuse,
        on_step=lambda i, x: states.append(x.clone()),
    )  # fmt: skip
    run, last = [], None  # the steps that begin with a pass
    for i, state in enumerate(states[:-1]):
        changed = i == 0 or not torch.equal(state, states[i - 1])
        if (state == 10).any() and (changed or not reuse):
            run.append(i)
    assert done.passes == len(passes) == len(run) and (len(run) < 10) == reuse
    for i, given in zip(run[1:], spy.seen, strict=True):
        last = max(j for j in run if j < i)
        assert_feedback(model, given, states[i], states[last], passes[run.index(last)][1], 2)


@pytest.mark.parametrize("k", ["binary", 2])
def test_a_time_conditioned_network_runs_at_every_step(tiny, k):
    model = tiny(block_size=4, time_conditioning=True)
    x, told, hidden = torch.full((2, 4), 10), [], model.hidden
    model.hidden = lambda e, sigma: (told.append(sigma.tolist()), hidden(e, sigma))[1]
    masked = [True]
    _, done = decoding.generate(
        model, x, 30, None if k == "binary" else Spy(2), reuse_unchanged=k != "binary",
        on_step=lambda i, x: masked.append((x == 10).any().item()),
    )  # fmt: skip
    assert done.passes == sum(masked[:30]) > 8
    for i, sigma in enumerate(told):
        t = 1 + (1e-5 - 1) * i / 30
        assert sigma == pytest.approx([-math.log(1 - 0.999 * t)] * 2, rel=1e-4)


@pytest.mark.parametrize("k", ["binary", 2])
def test_leftover_masks_are_filled_by_argmax_in_one_more_soft_masked_pass(tiny, monkeypatch, k):
    model = tiny(block_size=12).double()
    softmask = None if k == "binary" else Spy(k).double()
    times = torch.linspace(1, 0.5, 4).tolist()
    monkeypatch.setattr(decoding.Strategy, "times", lambda self, nfe: times)
    passes, states = watched(model, monkeypatch), []
    x = torch.full((3, 12), 10)
    out, done = decoding.generate(
        model, x, 3, softmask, on_step=lambda i, x: states.append(x.clone()), trace=True
    )
    assert done.filled and done.passes == 3 and len(passes) == 4
    left = states[-1] == 10
    assert torch.equal(out[~left], states[-1][~left])
    assert torch.equal(out[left], model.logits(passes[-1][1][left])[:, :10].argmax(-1))
    if softmask is not None:
        assert_feedback(model, softmask.seen[-1], states[-1], states[-2], passes[-2][1], k)
    replayed = x.clone()
    for entry in done.trace:
        for at, token in entry["drawn"]:
            replayed[entry["row"], at] = token
    assert torch.equal(replayed, out)


# The whole loop


def plain_mdlm(model, x, nfe, seeds, temperature):
    """Masked diffusion as it was before soft-masking."""
    x, mask = x.clone(), model.mask_id
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    times = np.linspace(1, 1e-5, nfe + 1)
    for t, s in itertools.pairwise(times):
        z = model.logits(model.hidden(model.embed(x)).flatten(0, 1)).double()
        p = torch.softmax(z[:, :mask] / temperature, -1).unflatten(0, x.shape)
        for b, g in enumerate(generators):
            u = torch.rand(x.shape[1], generator=g, dtype=torch.float64)
            for at in range(x.shape[1]):
                if x[b, at] == mask and u[at] < (t - s) / t:
                    noise = torch.rand(mask + 1, generator=g, dtype=torch.float64)[:mask]
                    x[b, at] = (p[b, at].log() - (-noise.log()).log()).argmax()
    return x


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_without_soft_masking_it_is_a_sampler_that_never_heard_of_it(tiny, temperature):
    for seed in range(4):
        model, x = tiny(block_size=16), torch.full((3, 16), 10)
        x[1, :5], x[2, 10] = 2, 7
        seeds = [seed, seed + 10, seed + 20]
        how = decoding.Strategy(temperature=temperature)
        out, done = decoding.generate(model, x, 9, None, how, seeds=seeds)
        with torch.no_grad():
            assert torch.equal(out, plain_mdlm(model, x, 9, seeds, temperature))
        assert not done.filled


@pytest.mark.parametrize("k", ["binary", 3, None])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_strategy_do_not_depend_on_their_batch(tiny, name, k):
    model = tiny(block_size=12).double()
    softmask = None if k == "binary" else lively(k)
    how = decoding.Strategy(name, temperature=0.8, top_p=0.9)
    x = torch.randint(10, (8, 12))
    for row, masks in zip(x, (4, 12, 7, 12, 5, 9, 12, 6)):
        row[torch.randperm(12)[:masks]] = 10
    seeds = [3, 1, 4, 1, 5, 9, 2, 6]
    out, _ = decoding.generate(model, x, 4, softmask, how, seeds=seeds)
    alone = [
        decoding.generate(model, x[i : i + 1], 4, softmask, how, seeds=seeds[i : i + 1])[0]
        for i in range(8)
    ]
    assert torch.equal(out, torch.cat(alone))
    assert not (out == 10).any() and torch.equal(out[x != 10], x[x != 10])
    assert not torch.equal(out[1], out[6])


@pytest.mark.parametrize("k", ["binary", 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_without_masks_comes_back_without_a_pass(tiny, name, k):
    x = torch.randint(10, (2, 6))
    softmask = None if k == "binary" else SoftMask(k)
    out, done = decoding.generate(tiny(), x, 3, softmask, decoding.Strategy(name, top_p=0.9))
    assert torch.equal(out, x) and done.passes == 0 and not done.filled


@pytest.mark.parametrize("k", ["binary", 2, None])
@pytest.mark.parametrize("name", NAMES)
def test_the_trace_replays_to_the_samples(tiny, name, k):
    model = tiny(block_size=12)
    softmask = None if k == "binary" else lively(k).float()
    eta = {"remdm-cap": 0.5, "remdm-rescale": 0.8, "remdm-loop": 0.1}.get(name)
    x = torch.full((3, 12), 10)
    x[1, 3:6], x[2, :5] = 4, 1
    states = [x]
    out, done = decoding.generate(
        model, x, 7, softmask, decoding.Strategy(name, eta=eta, top_p=0.9), trace=True,
        on_step=lambda i, x: states.append(x.clone()),
    )  # fmt: skip
    replayed, remasked = x.clone(), 0
    omega_s, omega_a, omega_b = OMEGAS
    for entry in done.trace:
        row = replayed[entry["row"]]
        for at, token in entry["drawn"]:
            assert row[at] == 10 and token != 10
            row[at] = token
        for at in entry["remasked"]:
            assert row[at] != 10 and x[entry["row"], at] == 10
            row[at] = 10
        remasked += len(entry["remasked"])
        if entry["step"] == 7:
            continue
        assert torch.equal(row, states[entry["step"] + 1][entry["row"]])
        soft = sorted(at for at, *_ in entry["soft"])
        assert soft == ([] if k == "binary" else (row == 10).nonzero()[:, 0].tolist())
        for at, lam, minus_h, ids, weights in entry["soft"]:
            full = omega_s / (1 + math.exp(-omega_a * (minus_h - omega_b)))
            assert lam == pytest.approx(full, abs=3e-4)
            assert len(ids) == len(weights) == (k or 0)
            assert k is None or sum(weights) == pytest.approx(1, abs=1e-3)
            assert at not in entry["remasked"] or minus_h == 0
    assert torch.equal(replayed, out)
    assert (remasked > 0) == name.startswith("remdm")
    seen = [(e["step"], e["row"]) for e in done.trace]
    assert seen == sorted(set(seen)) and {row for _, row in seen} == {0, 1, 2}


def test_rows_that_reuse_their_last_pass_do_not_depend_on_their_batch(network):
    softmask = SoftMask(3)
    softmask.set_omegas(0.95, 5.0, -3.0)
    model = network.double()
    x = torch.full((6, 16), model.mask_id)
    options = {"how": decoding.Strategy(top_p=0.9), "reuse_unchanged": True}
    together, done = decoding.generate(model, x, 40, softmask, seeds=list(range(6)), **options)
    alone = [decoding.generate(model, x[:1], 40, softmask, seeds=[i], **options) for i in range(6)]
    network.float()
    assert torch.equal(together, torch.cat([tokens for tokens, _ in alone]))
    assert min(d.passes for _, d in alone) < done.passes <= 40


# Answers of a Dream model


@pytest.fixture(scope="module")
def dream():
    torch.manual_seed(0)
    model = Dream(DreamConfig(**DREAM_SIZES["dream-tiny"])).eval()
    randomise(model)
    return model.double()


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 3, 8], [4, 6, 2]]


@pytest.mark.parametrize("name", decoding.DREAM)
@pytest.mark.parametrize("softmask", [None, SoftMask(3, omega_s=0.9), SoftMask(None, omega_s=0.9)])
def test_answers_to_prompts_of_mixed_lengths_are_those_of_each_alone(dream, name, softmask):
    softmask = softmask and softmask.double()
    how = decoding.Strategy(name, temperature=0.5, top_p=0.9)
    seeds = list(range(5))
    together, _ = decoding.respond(dream, PROMPTS, 12, 5, 0, softmask, how, seeds=seeds)
    for answer, prompt, seed in zip(together, PROMPTS, seeds):
        alone, _ = decoding.respond(dream, [prompt], 12, 5, 0, softmask, how, seeds=[seed])
        assert answer == alone[0] and len(answer) == 12 and dream.mask_id not in answer


@pytest.mark.parametrize("order", decoding.ORDERS)
@pytest.mark.parametrize("nfe", [3, 6, 7, 12])  # budgets 1/4, 1/2, 1/1, and one that leaves a rest
@pytest.mark.parametrize("network_seed", range(8))
def test_greedy_answers_are_those_of_a_plain_loop(order, nfe, network_seed):
    """Dream's decoding written out: one sequence, the published schedule, a loop over positions."""
    torch.manual_seed(network_seed)
    heads = [(4, 2), (4, 4), (4, 1)][network_seed % 3]
    sizes = {"vocab_size": 40, "mask_id": 39, "n_heads": heads[0], "n_kv_heads": heads[1]}
    dream = Dream(DreamConfig(**{**DREAM_SIZES["dream-tiny"], **sizes})).eval()
    randomise(dream)
    dream.double()
    m, prompt, n = dream.mask_id, PROMPTS[network_seed % 5], 12
    x = torch.tensor([prompt + [m] * n])
    times = torch.linspace(1, 1e-3, nfe + 1)
    with torch.no_grad():
        for i in range(nfe):
            z = dream.logits(dream.hidden(dream.embed(x))[0])
            z[:, m] = -math.inf
            p = z.softmax(-1)
            places = (x[0] == m).nonzero()[:, 0].tolist()
            count = int(torch.tensor(float(len(places))) * (1 - times[i + 1] / times[i]))
            count = len(places) if i == nfe - 1 else count
            score = {}
            for place in places:
                top = p[place].sort(descending=True).values
                score[place] = {
                    "maskgit_plus": top[0], "topk_margin": top[0] - top[1],
                    "entropy": (p[place] * p[place].clamp(min=1e-300).log()).sum(),
                }[order].item()  # fmt: skip
            for place in sorted(places, key=lambda place: (-score[place], place))[:count]:
                x[0, place] = p[place].argmax()
    how = decoding.Strategy(order, temperature=0)
    answers, _ = decoding.respond(dream, [prompt, PROMPTS[2]], n, nfe, 0, None, how)
    assert answers[0] == x[0, len(prompt) :].tolist()


def test_an_answer_that_ended_is_filled_at_once_when_asked():
    p = torch.full((8, 5), 0.01)
    p[:, 2] = 0.9
    p[3] = torch.tensor([0.01, 0.01, 0.01, 0.96, 0.01])  # the surest position draws the stop token
    model = Table(6, lambda row: with_mask(p / p.sum(-1, keepdim=True)))
    how, x = decoding.Strategy("entropy", temperature=0), torch.full((1, 8), 5)
    x[0, :3] = 2
    tokens, done = decoding.generate(model, x, 5, None, how, stop=(4, 3), trace=True)
    assert tokens[0].tolist() == [2, 2, 2, 3, 4, 4, 4, 4] and done.passes == 1
    drawn = {place: token for entry in done.trace for place, token in entry["drawn"]}
    assert drawn == {3: 3, 4: 4, 5: 4, 6: 4, 7: 4}
    x[0, 2] = 5  # a mask before it: not yet
    tokens, _ = decoding.generate(model, x, 6, None, how, stop=(4, 3))
    assert tokens[0, 2] == 2 and (tokens[0, 4:] == 4).any()
    tokens, _ = decoding.generate(model, x, 6, None, how)
    assert tokens[0].tolist() == [2, 2, 2, 3, 2, 2, 2, 2]


def test_an_answer_beyond_the_context_is_refused(dream):
    with pytest.raises(ValueError, match="takes 512"):
        decoding.respond(dream, [[1] * 500], 20, 5, 0)

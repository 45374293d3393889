"""softmask.py against the textbook version (reference.py) and the properties of the maths."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import randomise

import softmask
from softmask import Feedback, SoftMask, diffusion_loss

V, L = 11, 6  # of the `tiny` network
WHOLE = None  # k = |V| with a temperature


def lively_softmask(k) -> SoftMask:
    """Omegas at which every gradient is far from zero."""
    sm = SoftMask(k)
    sm.set_omegas(0.7, 2.0, -1.5, tau=0.8)
    return sm


def textbook_omegas(sm: SoftMask | None) -> reference.Omegas | None:
    """The paper's scalars from the raw parameters of `sm`, so that gradients reach the latter."""
    if sm is None:
        return None
    return reference.reparameterise(sm.raw_s, sm.raw_a, sm.raw_b, getattr(sm, "raw_tau", None))


def example(b=4, vocab_size=V, length=L):
    """x0 without masks, times over all of (0, 1], noise."""
    x0 = torch.randint(0, vocab_size - 1, (b, length))
    t = torch.linspace(0.3, 1.0, b)
    return x0, t, torch.rand(b, length)


def gradients(loss: torch.Tensor, *modules) -> dict[str, torch.Tensor | None]:
    """Backward; name -> gradient of every parameter of the modules, which are left clean."""
    loss.backward()
    found = {}
    for i, module in enumerate(m for m in modules if m is not None):
        for name, p in module.named_parameters():
            found[f"{i}.{name}"] = p.grad
            p.grad = None
    return found


def both_losses(model, sm, x0, t, noise, soft=None, maskable=None):
    """(value, gradients) of the fast loss and of the textbook's."""
    k = sm.k if sm is not None else 1
    fast = diffusion_loss(model, x0, t, noise, sm, soft, maskable)
    fast_gradients = gradients(fast, model, sm)
    omegas = textbook_omegas(sm)
    slow = reference.full_vocabulary_loss(model, x0, t, noise, omegas, soft, k, maskable)
    if not slow.requires_grad:  # nothing is masked, SUBS leaves a constant
        slow = slow + 0 * sum(p.sum() for p in model.parameters())
    return (fast.detach(), fast_gradients), (slow.detach(), gradients(slow, model, sm))


def assert_close(name, actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, msg=lambda m: f"{name}: {m}", **tolerances)


def assert_same(fast, slow, tolerance=2e-5):
    (value, grads), (true_value, true_grads) = fast, slow
    torch.testing.assert_close(value, true_value, rtol=tolerance, atol=1e-5)
    assert value.dtype == torch.float32
    for name, true in true_grads.items():
        if true is None:  # the textbook's graph leaves the omegas out where nothing is soft-masked
            true = torch.zeros_like(grads[name])
        assert grads[name] is not None, name
        atol = tolerance * max(true.abs().max().item(), 1e-2)
        assert_close(name, grads[name], true, rtol=1e-4, atol=atol)


@pytest.fixture(params=[None, 3, 1], ids=["one chunk", "3 rows a chunk", "1 row a chunk"])
def chunks(request, monkeypatch):
    """Rows that meet the vocabulary at a time; the default is far above what a test has."""
    if request.param is not None:
        monkeypatch.setattr(softmask, "CHUNK_ELEMENTS", request.param * V)


# The loss and its gradients


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_binary_loss_and_gradients_equal_the_textbook(tiny, chunks, time_conditioning):
    model = tiny(time_conditioning=time_conditioning)
    assert_same(*both_losses(model, None, *example()))


@pytest.mark.parametrize("time_conditioning", [False, True], ids=["untimed", "timed"])
@pytest.mark.parametrize(
    "soft", [[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], ids=["all", "some", "none"]
)
@pytest.mark.parametrize("k", [1, 3, V, WHOLE])
def test_soft_masked_loss_and_gradients_equal_the_textbook(
    tiny, chunks, k, soft, time_conditioning
):
    model = tiny(time_conditioning=time_conditioning)
    fast, slow = both_losses(model, lively_softmask(k), *example(), torch.tensor(soft).bool())
    assert_same(fast, slow)
    names = ["raw_s", "raw_a", "raw_b"] + (["raw_tau"] if k is WHOLE else [])
    moves = [fast[1][f"1.{name}"].abs().item() > 1e-4 for name in names]
    assert all(moves) if any(soft) else not any(moves)


@pytest.mark.parametrize("k", [1, 3])
def test_loss_equals_the_textbook_beyond_the_sizes_where_top_k_changes_its_method(tiny, k):
    model = tiny(vocab_size=4300)
    x0, t, noise = example(vocab_size=4300)
    soft = torch.tensor([True, True, False, True])
    assert_same(*both_losses(model, lively_softmask(k), x0, t, noise, soft), tolerance=1e-4)


@pytest.mark.parametrize("k", ["binary", 1, 3, WHOLE])
def test_loss_equals_the_textbook_where_one_sequence_has_no_mask(tiny, chunks, k):
    sm = None if k == "binary" else lively_softmask(k)
    x0, t, noise = example()
    noise[1] = 1.0
    assert_same(*both_losses(tiny(), sm, x0, t, noise, torch.tensor([0, 1, 1, 0]).bool()))


@pytest.mark.parametrize("k", ["binary", 1, 3, WHOLE])
def test_loss_equals_the_textbook_where_no_soft_masked_sequence_has_a_mask(tiny, chunks, k):
    sm = None if k == "binary" else lively_softmask(k)
    x0, t, noise = example()
    noise[1] = 1.0
    assert_same(*both_losses(tiny(), sm, x0, t, noise, torch.tensor([0, 1, 0, 0]).bool()))


@pytest.mark.parametrize("vocab_size", [V, 4300])
@pytest.mark.parametrize("k", ["binary", 1, 3, WHOLE])
def test_without_any_mask_the_loss_and_every_gradient_are_zero(tiny, k, vocab_size):
    sm = None if k == "binary" else lively_softmask(k)
    x0, t, _ = example()
    model, soft = tiny(vocab_size=vocab_size), torch.ones(4).bool()
    loss = diffusion_loss(model, x0, t, torch.ones(4, L), sm, soft)
    assert loss.item() == 0
    for name, g in gradients(loss, model, sm).items():
        assert g is not None, name
        assert not g.any(), name


@pytest.mark.parametrize("k", ["binary", 1, WHOLE])
def test_loss_equals_the_textbook_where_only_a_part_may_be_masked(tiny, chunks, k):
    sm = None if k == "binary" else lively_softmask(k)
    maskable = torch.ones(4, L).bool()
    maskable[:, :2] = False
    maskable[2, 4:] = False
    x0, t, noise = example()
    soft = torch.tensor([1, 0, 1, 1]).bool()
    assert_same(*both_losses(tiny(), sm, x0, t, noise, soft, maskable))
    xt, masked = softmask.corrupt(x0, torch.ones(4), 0 * noise, V - 1, 1e-3, maskable)
    assert torch.equal(masked, maskable)
    assert torch.equal(xt[~maskable], x0[~maskable])


@pytest.mark.parametrize("k", [1, 3, V, WHOLE])
def test_saturated_predictions_give_the_textbook_loss_and_no_nan(tiny, k):
    """Logits so far apart that most probabilities are exactly 0: 0 log 0 is 0, and so its slope."""
    model = tiny()
    with torch.no_grad():
        model.head.weight.mul_(150)
    x0, t, noise = example()
    sm, soft = lively_softmask(k), torch.ones(4).bool()
    with torch.no_grad():  # targets the network can reach, for log p would be -inf elsewhere
        xt, masked = softmask.corrupt(x0, t, noise, V - 1, model.mask_eps)
        sigma = reference.noise_level(t, model.mask_eps)
        p = reference.predict(model, xt, sigma, textbook_omegas(sm), soft, k)
    assert (p[masked] == 0).sum() > masked.sum()  # besides the mask itself
    x0 = torch.where(masked, p.argmax(-1), x0)
    assert_same(*both_losses(model, sm, x0, t, noise, soft), tolerance=1e-3)


@pytest.mark.parametrize("k", ["binary", 1, 3, WHOLE])
def test_bfloat16_autocast_stays_close_to_the_textbook_and_reaches_all_parameters(tiny, chunks, k):
    model = tiny(width=32, cond_dim=16, time_conditioning=True)
    sm = None if k == "binary" else lively_softmask(k)
    x0, t, noise = example(b=16)
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = both_losses(model, sm, x0, t, noise, torch.arange(16) % 4 != 0)
    torch.testing.assert_close(fast[0], slow[0], rtol=2e-2, atol=0)
    for name, true in slow[1].items():
        g = fast[1][name]
        assert g is not None, name
        assert g.dtype == torch.float32, name
        if g.dim() == 0:  # a cosine says nothing of a scalar
            assert_close(name, g, true, rtol=0.15, atol=0)
        else:
            assert F.cosine_similarity(g.flatten(), true.flatten(), dim=0) > 0.99, name


def test_omegas_get_zero_gradients_when_no_sequence_is_soft_masked(tiny):
    sm = lively_softmask(WHOLE)
    loss = diffusion_loss(tiny(), *example(), sm, torch.zeros(4).bool())
    for name, g in gradients(loss, sm).items():
        assert g is not None, name
        assert g.item() == 0, name


def test_backbone_gradients_come_from_the_second_pass_alone(tiny):
    """Line 5: the first pass is a constant; with lambda at 0, SM is exactly binary masking."""
    model, (x0, t, noise) = tiny(), example()
    sm = lively_softmask(3)
    sm.raw_s.data.fill_(-200.0)  # omega_s = 0 in float32
    soft = diffusion_loss(model, x0, t, noise, sm, torch.ones(4).bool())
    g_soft = gradients(soft, model)
    binary = diffusion_loss(model, x0, t, noise)
    torch.testing.assert_close(soft, binary)
    for name, g in gradients(binary, model).items():
        torch.testing.assert_close(g_soft[name], g, rtol=1e-4, atol=1e-5)


def test_loss_is_a_sum_over_sequences(tiny):
    model, sm, (x0, t, noise) = tiny(time_conditioning=True), lively_softmask(3), example()
    soft = torch.tensor([1, 0, 1, 0]).bool()
    whole = diffusion_loss(model, x0, t, noise, sm, soft)
    parts = [diffusion_loss(model, x0[[i]], t[[i]], noise[[i]], sm, soft[[i]]) for i in range(4)]
    torch.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_loss_and_computes_no_gradient(tiny, monkeypatch, mode):
    model, sm, data = tiny(), lively_softmask(3), example()
    soft = torch.ones(4).bool()
    value = diffusion_loss(model, *data, sm, soft)

    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was computed in evaluation")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with mode():
        torch.testing.assert_close(diffusion_loss(model, *data, sm, soft), value.detach())


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_weighted_nll_equals_cross_entropy_in_value_and_gradient(tiny, chunks, scale):
    model = tiny()
    rows = torch.randn(8, 16, requires_grad=True)
    targets, weights = torch.randint(0, V - 1, (8,)), 5 * torch.rand(8)

    def run(loss):
        (scale * loss).backward()
        found = [loss.detach(), rows.grad, model.head.weight.grad, model.head.bias.grad]
        rows.grad = model.head.weight.grad = model.head.bias.grad = None
        return found

    fast = run(softmask.weighted_nll(model, rows, targets, weights))
    z = model.head(rows).index_fill(1, torch.tensor([V - 1]), -math.inf)
    slow = run((weights * F.cross_entropy(z, targets, reduction="none")).sum())
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_weighted_nll_leaves_a_frozen_head_alone_and_still_reaches_the_rows(tiny):
    model = tiny()
    rows = torch.randn(5, 16, requires_grad=True)
    targets, weights = torch.randint(0, V - 1, (5,)), torch.rand(5)
    model.head.requires_grad_(False)
    softmask.weighted_nll(model, rows, targets, weights).backward()
    z = model.head(rows.detach().requires_grad_()).index_fill(1, torch.tensor([V - 1]), -math.inf)
    slope = (z.softmax(-1) - F.one_hot(targets, V)) * weights[:, None]
    torch.testing.assert_close(rows.grad, slope @ model.head.weight, rtol=1e-4, atol=1e-5)
    assert model.head.weight.grad is None


# The loss is the NELBO


def nll_of_patterns(model, x0, omegas, k):
    """[(number of masks, sum of -log p(x0_l) over them)] by the textbook, for one x0 (L,)."""
    patterns = torch.cartesian_prod(*[torch.tensor([False, True])] * len(x0))  # (2^L, L)
    n = len(patterns)
    xt = torch.where(patterns, model.mask_id, x0)
    with torch.no_grad():
        p = reference.predict(model, xt, torch.zeros(n), omegas, torch.ones(n).bool(), k)
    nll = -torch.log(p.gather(-1, x0.expand(n, -1)[..., None])[..., 0]).sum(-1).double()
    return list(zip(patterns.sum(1).tolist(), nll.tolist(), strict=True))


def exact_nelbo(model, x0, omegas, k):
    """Integral over t in (0, 1) of 1/t sum_S q^|S| (1 - q)^(L - |S|) nll(S), q = (1 - eps) t.

    The integrand is a polynomial of degree L - 1 in t, which a Gauss rule integrates exactly.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)
    total = 0.0
    for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        q = (1 - model.mask_eps) * t
        for masks, nll in nll_of_patterns(model, x0, omegas, k):
            total += w / t * q**masks * (1 - q) ** (len(x0) - masks) * nll
    return total


@pytest.fixture
def countable(tiny):
    """A network for 3 tokens of 3 kinds."""
    return tiny(vocab_size=4, block_size=3, n_layers=1, width=8, cond_dim=4)


@pytest.mark.parametrize("k", ["binary", 1, 2, WHOLE])
@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_mean_loss_over_times_and_masks_is_the_exact_nelbo(countable, k, eps):
    countable.mask_eps = eps
    sm = None if k == "binary" else lively_softmask(k)
    x0, n, draws = torch.tensor([2, 0, 1]), 256, 160
    exact = exact_nelbo(countable, x0, textbook_omegas(sm), k)
    samples = []
    with torch.no_grad():
        for _ in range(draws):
            t = softmask.antithetic_times(torch.rand(n))
            noise, soft = torch.rand(n, 3), torch.ones(n).bool()
            loss = diffusion_loss(countable, x0.expand(n, -1), t, noise, sm, soft)
            samples.append(loss.item() / n)
    error = np.std(samples, ddof=1) / math.sqrt(draws)
    assert error < 0.02 * exact
    assert abs(np.mean(samples) - exact) < 4.5 * error


def test_exact_nelbo_is_the_mean_over_decoding_orders(countable):
    """With eps = 0 the weight 1/t makes the NELBO that of an any-order autoregressive model."""
    countable.mask_eps = 0.0
    x0 = torch.tensor([2, 0, 1])
    patterns = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
    xt = torch.where(patterns, countable.mask_id, x0)
    with torch.no_grad():
        p = reference.predict(countable, xt, torch.zeros(8), None, None, 1)
    log_p = {tuple(m.tolist()): torch.log(q) for m, q in zip(patterns, p, strict=True)}
    orders = list(itertools.permutations(range(3)))
    chain = 0.0
    for order in orders:
        for step, i in enumerate(order):
            masked = tuple(position in order[step:] for position in range(3))
            chain -= log_p[masked][i, x0[i]].item() / len(orders)
    assert exact_nelbo(countable, x0, None, 1) == pytest.approx(chain, rel=1e-5)


# Corruption and times


@pytest.mark.parametrize("eps", [1e-3, 0.0])
@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.3, 0.9, 1.0])
def test_share_of_masks_is_one_minus_alpha(t, eps):
    n, p = 200 * 1000, (1 - eps) * t
    x0 = torch.randint(0, 10, (200, 1000))
    noise = torch.rand(200, 1000)
    xt, masked = softmask.corrupt(x0, torch.full((200,), t), noise, 10, eps)
    error = math.sqrt(n * p * (1 - p))
    assert abs(masked.sum().item() - n * p) <= max(5 * error, 5)
    assert torch.equal(xt == 10, masked)
    assert torch.equal(xt[~masked], x0[~masked])


def test_corruption_equals_the_textbook():
    x0, t, noise = example(b=64, length=40)
    maskable = torch.rand(64, 40) < 0.7
    xt, masked = softmask.corrupt(x0, t, noise, V - 1, 1e-3, maskable)
    assert torch.equal(xt, reference.corrupt(x0, t, noise, V - 1, 1e-3, maskable))
    assert torch.equal(masked, xt == V - 1)


def test_noise_level_equals_the_textbook_up_to_both_ends():
    t = torch.tensor([1e-6, 1e-3, 0.5, 0.999, 1.0])
    sigma = softmask.noise_level(t, 1e-3)
    torch.testing.assert_close(sigma, reference.noise_level(t, 1e-3), rtol=1e-4, atol=0)
    assert sigma[-1].item() == pytest.approx(math.log(1000), rel=1e-4)


@pytest.mark.parametrize(("b_l", "b_h"), [(0.0, 1.0), (1e-3, 1.0), (0.2, 0.8)])
@pytest.mark.parametrize("n", [1, 7, 512])
def test_antithetic_times_lie_one_in_each_stratum(n, b_l, b_h):
    u = torch.rand(n)
    t = softmask.antithetic_times(u, b_l, b_h)
    torch.testing.assert_close(t, torch.tensor(reference.antithetic_times(u.tolist(), b_l, b_h)))
    edges = torch.linspace(b_l, b_h, n + 1, dtype=torch.float64)
    assert (t >= edges[:-1] - 1e-6).all()
    assert (t <= edges[1:] + 1e-6).all()
    ends = torch.stack(
        [softmask.antithetic_times(torch.full((n,), e), b_l, b_h) for e in (0.0, 1.0)]
    )
    assert ends.min() >= b_l - 1e-7
    assert ends.max() <= b_h + 1e-7


# p_sm


@pytest.mark.parametrize("n", [1, 3, 8, 37])
@pytest.mark.parametrize("p_sm", [0.0, 0.1, 0.5, 1 / 3, 0.8, 1.0])
def test_soft_sequences_number_n_p_sm_rounded_and_each_is_chosen_with_p_sm(n, p_sm):
    grid = [(i + 0.5) / 997 for i in range(997)]
    chosen = torch.stack([softmask.soft_sequences(u, n, p_sm) for u in grid])  # (997, n)
    assert chosen.dtype == torch.bool
    assert chosen.shape == (997, n)
    assert chosen.tolist() == [reference.soft_sequences(u, n, p_sm) for u in grid]
    counts, expected = chosen.sum(1), round(n * p_sm, 9)
    assert counts.min() >= math.floor(expected)
    assert counts.max() <= math.ceil(expected)
    assert (chosen.double().mean(0) - p_sm).abs().max() <= 2 / 997


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24, math.nextafter(1, 0)])
def test_soft_sequences_at_the_ends_of_p_sm_are_none_and_all(u):
    assert not softmask.soft_sequences(u, 100, 0.0).any()
    assert softmask.soft_sequences(u, 100, 1.0).all()


# Top-k and the feedback


@pytest.mark.parametrize("k", [1, 3, 10, 40])
@pytest.mark.parametrize("v", [40, 100, 4096, 4097, 5000, 8192, 10007])
def test_top_k_equals_torch(v, k):
    values = torch.randn(5, v)
    top, ids = softmask.top_k(values, k)
    assert torch.equal(top, values.topk(k, dim=-1).values)
    assert torch.equal(ids, values.topk(k, dim=-1).indices)


@pytest.mark.parametrize("v", [5000, 8192])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_with_ties_gives_the_right_values_at_distinct_ids(v, k):
    for values in (
        torch.zeros(4, v),
        torch.randint(0, 3, (4, v)).float(),
        torch.randn(4, v).round(),
    ):
        top, ids = softmask.top_k(values, k)
        assert torch.equal(top, values.topk(k, dim=-1).values)
        assert torch.equal(values.gather(1, ids), top)
        assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("where", [0, 63, 64, 4991, 4992, 4999])
def test_top_k_finds_neighbours_wherever_they_stand(where):
    values = torch.randn(2, 5000)
    spikes = [min(where + i, 4999 - 2 + i) for i in range(3)]
    values[:, spikes] = torch.tensor([30.0, 10.0, 20.0])
    top, ids = softmask.top_k(values, 3)
    assert top.tolist() == [[30.0, 20.0, 10.0]] * 2
    assert ids.tolist() == [[spikes[0], spikes[2], spikes[1]]] * 2


def test_top_k_of_no_rows_is_empty():
    for v in (11, 5000):
        top, ids = softmask.top_k(torch.empty(0, v), 3)
        assert top.shape == ids.shape == (0, 3)


def textbook_p(model, rows):
    """p (N, V) in float64 from hidden rows: softmax without the mask token."""
    z = (rows.double() @ model.head.weight.double().T + model.head.bias.double()).detach()
    z[:, model.mask_id] = -math.inf
    return z.softmax(-1)


@pytest.mark.parametrize("vocab_size", [V, 4300])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_feedback_is_the_top_k_renormalised_and_the_whole_entropy(tiny, chunks, k, vocab_size):
    model, rows = tiny(vocab_size=vocab_size), torch.randn(7, 16)
    feedback = SoftMask(k).feedback(model, rows)
    p = textbook_p(model, rows)
    top, ids = p.topk(k, dim=-1)
    assert torch.equal(feedback.ids, ids)
    assert feedback.mixed is None
    pi = (top / top.sum(-1, keepdim=True)).float()
    torch.testing.assert_close(feedback.weights, pi, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(feedback.weights.sum(-1), torch.ones(7))
    h = reference.negative_entropy(p).float()
    torch.testing.assert_close(feedback.neg_entropy, h, rtol=1e-4, atol=1e-5)
    assert not any(x.requires_grad for x in feedback[:3])


def test_feedback_of_the_whole_vocabulary_is_the_tempered_mean_embedding(tiny, chunks):
    model, rows = tiny(), torch.randn(7, 16)
    sm = lively_softmask(WHOLE)  # tau = 0.8
    feedback = sm.feedback(model, rows)
    p = textbook_p(model, rows).pow(1 / 0.8)
    p = p / p.sum(-1, keepdim=True)
    assert feedback.ids is None
    assert feedback.weights is None
    mixed, h = (p @ model.embedding.double()).float(), reference.negative_entropy(p).float()
    torch.testing.assert_close(feedback.mixed, mixed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feedback.neg_entropy, h, rtol=1e-4, atol=1e-5)


def test_all_k_at_temperature_one_is_k_equal_to_the_vocabulary(tiny):
    model, rows = tiny(), torch.randn(7, 16)
    sm = SoftMask(WHOLE)
    assert sm.tau.item() == pytest.approx(1)
    whole, listed = sm.feedback(model, rows), SoftMask(V).feedback(model, rows)
    mixed = torch.einsum("nk,nkd->nd", listed.weights, model.embedding[listed.ids])
    torch.testing.assert_close(whole.mixed, mixed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.neg_entropy, listed.neg_entropy, rtol=1e-4, atol=1e-5)


def test_feedback_never_holds_the_mask_token(tiny):
    model, rows = tiny(), torch.randn(7, 16)
    with torch.no_grad():
        model.head.bias[model.mask_id] = 100.0
    feedback = SoftMask(V).feedback(model, rows)
    assert not feedback.weights[feedback.ids == model.mask_id].any()
    assert not (SoftMask(V - 1).feedback(model, rows).ids == model.mask_id).any()


def test_a_certain_prediction_has_entropy_zero_and_a_flat_one_that_of_the_vocabulary(tiny):
    model, rows = tiny(), torch.zeros(2, 16)
    with torch.no_grad():
        model.head.bias.zero_()
    flat = SoftMask(3).feedback(model, rows)
    torch.testing.assert_close(flat.neg_entropy, torch.full((2,), -math.log(V - 1)))
    torch.testing.assert_close(flat.weights, torch.full((2, 3), 1 / 3))
    with torch.no_grad():
        model.head.bias[4] = 1e4
    certain = SoftMask(3).feedback(model, rows)
    assert certain.neg_entropy.tolist() == [0, 0]
    assert certain.ids[:, 0].tolist() == [4, 4]
    assert certain.weights[:, 0].tolist() == [1, 1]


def test_k_beyond_the_vocabulary_or_below_one_is_refused(tiny):
    with pytest.raises(ValueError, match="12"):
        SoftMask(V + 1).feedback(tiny(), torch.randn(2, 16))
    for k in (0, -1):
        with pytest.raises(ValueError, match=str(k)):
            SoftMask(k)


def test_negative_entropies_are_those_of_the_masked_positions(tiny):
    model, (x0, t, noise) = tiny(time_conditioning=True), example(b=16)
    found = softmask.negative_entropies(model, x0, t, noise)
    xt = reference.corrupt(x0, t, noise, V - 1, model.mask_eps)
    with torch.no_grad():
        p = reference.predict(model, xt, reference.noise_level(t, model.mask_eps), None, None, 1)
    neg_entropy = reference.negative_entropy(p)[xt == V - 1]
    torch.testing.assert_close(found, neg_entropy, rtol=1e-4, atol=1e-6)


# Eq. 2 and the blend


def test_lambda_is_equation_2():
    sm = SoftMask(1)
    sm.set_omegas(0.6, 3.0, -2.0)
    for h in (-10.0, -2.0, -0.5, 0.0):
        true = 0.6 / (1 + math.exp(-3.0 * (h + 2.0)))
        assert sm.lam(torch.tensor(h)).item() == pytest.approx(true, rel=1e-5)
    assert sm.lam(torch.tensor(-2.0)).item() == pytest.approx(0.3)  # at omega_b, half the scale
    lam = sm.lam(torch.linspace(-12, 0, 50)).detach()
    assert (lam.diff() >= 0).all()
    assert lam.min() >= 0
    assert lam.max() <= 0.6


def masked_example(model, k):
    """Embeddings of a corrupted batch, its masked rows, and feedback for them."""
    x0, t, noise = example()
    xt, masked = softmask.corrupt(x0, t, noise, model.mask_id, model.mask_eps)
    rows = masked.flatten().nonzero()[:, 0]
    return xt, masked, rows, SoftMask(k).feedback(model, torch.randn(len(rows), 16))


@pytest.mark.parametrize("k", [1, 3, WHOLE])
def test_at_lambda_zero_the_embeddings_are_those_of_plain_masks(tiny, k):
    model = tiny()
    xt, _, rows, feedback = masked_example(model, k)
    plain = model.embed(xt)
    soft = lively_softmask(k)(plain, rows, feedback, model.embedding, scale=0.0)
    assert torch.equal(soft, plain)


def test_at_lambda_one_with_k_one_the_argmax_token_takes_the_place_of_the_mask(tiny):
    model, sm = tiny(), SoftMask(1)
    sm.set_omegas(1 - 1e-12, 10.0, -30.0)
    xt, masked, rows, feedback = masked_example(model, 1)
    soft = sm(model.embed(xt), rows, feedback, model.embedding)
    filled = xt.masked_scatter(masked, feedback.ids[:, 0])
    torch.testing.assert_close(soft, model.embed(filled), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, WHOLE])
def test_rows_without_feedback_keep_their_embeddings_bit_for_bit(tiny, k):
    model = tiny()
    xt, masked, rows, feedback = masked_example(model, k)
    plain = model.embed(xt)
    before = plain.clone()
    soft = lively_softmask(k)(plain, rows, feedback, model.embedding)
    assert torch.equal(soft[~masked], before[~masked])
    assert torch.equal(plain, before)
    assert (soft[masked] != before[masked]).any(-1).all()


def test_blend_equals_the_textbook_for_given_feedback(tiny):
    model, sm = tiny(), lively_softmask(2)
    xt = torch.tensor([[3, V - 1, V - 1]])
    p = torch.zeros(1, 3, V)
    p[0, 1, [0, 4, 7]] = torch.tensor([0.5, 0.3, 0.2])
    p[0, 2, 9] = 1.0
    h = [0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2), 0.0]
    feedback = Feedback(
        torch.tensor([[0, 4], [9, 1]]), torch.tensor([[0.625, 0.375], [1.0, 0.0]]), torch.tensor(h)
    )
    soft = sm(model.embed(xt), torch.tensor([1, 2]), feedback, model.embedding)
    simplex = reference.soft_mask(xt, p, textbook_omegas(sm), 2, V - 1)
    torch.testing.assert_close(simplex.sum(-1), torch.ones(1, 3))
    torch.testing.assert_close(soft, simplex @ model.embedding)


@pytest.mark.parametrize("k", [1, 3, V, WHOLE])
def test_weights_of_mask_and_feedback_sum_to_one(tiny, k):
    """A table whose columns are all the same constant is a fixed point of every convex blend."""
    model = tiny()
    with torch.no_grad():
        model.embedding.fill_(2.5)
    xt, _, rows, feedback = masked_example(model, k)
    soft = lively_softmask(k)(model.embed(xt), rows, feedback, model.embedding)
    torch.testing.assert_close(soft, torch.full_like(soft, 2.5), rtol=1e-6, atol=0)


def test_scale_multiplies_lambda_for_all_rows_or_row_by_row(tiny):
    model, sm = tiny(), lively_softmask(3)
    xt, _, rows, feedback = masked_example(model, 3)
    plain, table = model.embed(xt), model.embedding
    full = sm(plain, rows, feedback, table) - plain
    half = sm(plain, rows, feedback, table, scale=0.5) - plain
    torch.testing.assert_close(half, 0.5 * full, rtol=1e-4, atol=1e-6)
    scale = torch.rand(len(rows))
    each = sm(plain, rows, feedback, table, scale=scale) - plain
    expected = scale[:, None] * full.flatten(0, 1)[rows]
    torch.testing.assert_close(each.flatten(0, 1)[rows], expected, rtol=1e-4, atol=1e-6)


def test_first_pass_covers_masked_positions_of_soft_sequences_only(tiny):
    model, (x0, t, noise) = tiny(time_conditioning=True), example()
    soft = torch.tensor([0, 1, 0, 1]).bool()
    xt, masked = softmask.corrupt(x0, t, noise, V - 1, model.mask_eps)
    sigma = softmask.noise_level(t, model.mask_eps)
    rows, feedback = softmask.first_pass(model, SoftMask(2), xt, sigma, masked, soft)
    expected = [i * L + j for i in (1, 3) for j in range(L) if masked[i, j]]
    assert rows.tolist() == expected
    assert len(feedback.ids) == len(expected)
    with torch.no_grad():
        p = reference.predict(model, xt, sigma, None, None, 1).flatten(0, 1)[rows]
    assert torch.equal(feedback.ids, p.topk(2).indices)


def test_first_pass_runs_with_dropout_as_in_training(tiny):
    model, (x0, t, noise) = tiny(dropout=0.5), example()
    xt, masked = softmask.corrupt(x0, t, noise, V - 1, model.mask_eps)

    def neg_entropy():
        soft = torch.ones(4).bool()
        return softmask.first_pass(model, SoftMask(2), xt, t, masked, soft)[1].neg_entropy

    assert torch.equal(neg_entropy(), neg_entropy())
    model.train()
    assert not torch.equal(neg_entropy(), neg_entropy())


@pytest.mark.parametrize("k", ["binary", 1, WHOLE])
def test_only_masked_rows_meet_the_vocabulary_and_a_chunk_at_a_time(tiny, monkeypatch, k):
    monkeypatch.setattr(softmask, "CHUNK_ELEMENTS", 3 * V)
    model, (x0, t, noise) = tiny(), example()
    logits, rows = model.logits, []
    monkeypatch.setattr(model, "logits", lambda h: rows.append(len(h)) or logits(h))
    sm, soft = None if k == "binary" else SoftMask(k), torch.tensor([1, 0, 1, 1]).bool()
    diffusion_loss(model, x0, t, noise, sm, soft)
    _, masked = softmask.corrupt(x0, t, noise, V - 1, model.mask_eps)
    second, first = masked.sum().item(), masked[soft].sum().item()
    assert sum(rows) == (second if k == "binary" else first + second)
    assert max(rows) == 3


# The scalars


@pytest.mark.parametrize("k", [3, WHOLE])
@pytest.mark.parametrize(
    "values",
    [
        (1e-6, 6.7, -0.75, 1.0),
        (0.5, 1.0, -1.0, 2.0),
        (0.999, 50.0, -20.0, 0.1),
        (0.3, 1e-3, -1e-3, 30.0),
    ],
)
def test_omegas_survive_reparameterisation(k, values):
    sm = SoftMask(k)
    sm.set_omegas(*values)
    names = ["omega_s", "omega_a", "omega_b"] + (["tau"] if k is WHOLE else [])
    assert sm.omegas() == pytest.approx(dict(zip(names, values, strict=False)), rel=1e-4)
    textbook = textbook_omegas(sm)
    for name in names:
        torch.testing.assert_close(getattr(sm, name), getattr(textbook, name), rtol=1e-4, atol=1e-7)


def test_omegas_start_at_the_values_of_appendix_a2():
    sm = SoftMask()
    assert sm.k == 3
    start = dict(omega_s=1e-2, omega_a=10 / 1.5, omega_b=-0.75)
    assert sm.omegas() == pytest.approx(start, rel=1e-5)
    sm = SoftMask(WHOLE, omega_s=1e-6, lower_bound=-4.0)
    start = dict(omega_s=1e-6, omega_a=2.5, omega_b=-2.0, tau=1.0)
    assert sm.omegas() == pytest.approx(start, rel=1e-4)
    share = sm.lam(torch.tensor([-4.0, -2.0, 0.0])) / sm.omega_s
    true = torch.sigmoid(torch.tensor([-5.0, 0.0, 5.0]))
    torch.testing.assert_close(share, true, rtol=1e-3, atol=0)


@pytest.mark.parametrize("lower_bound", [0.0, -0.0, -1e-9])
def test_omegas_start_is_finite_for_a_network_that_is_always_sure(lower_bound):
    assert all(math.isfinite(x) for x in SoftMask(1, lower_bound=lower_bound).omegas().values())


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1.0, -1.0),
        (1.0, 1.0, -1.0),
        (-0.1, 1.0, -1.0),
        (0.5, 0.0, -1.0),
        (0.5, -1.0, -1.0),
        (0.5, 1.0, 0.0),
        (0.5, 1.0, 1.0),
        (0.5, 1.0, -1.0, 0.0),
        (math.nan, 1.0, -1.0),
    ],
)
def test_omegas_outside_their_domain_are_refused(values):
    sm = SoftMask(WHOLE)
    before = sm.omegas()
    with pytest.raises(ValueError, match="omega_s"):
        sm.set_omegas(*values)
    assert sm.omegas() == before


def test_three_scalars_are_trained_and_a_temperature_where_k_is_the_whole_vocabulary():
    names = {name for name, p in SoftMask(3).named_parameters() if p.dim() == 0}
    assert names == {"raw_s", "raw_a", "raw_b"}
    assert dict(SoftMask(WHOLE).named_parameters()).keys() == names | {"raw_tau"}


# Appendix B.4


@pytest.mark.parametrize(
    ("kind", "order", "expected"),  # at t/T = 1, 0.8, 0.5, 0.2, 0, with t' = 0.5
    [
        ("none", "sm-binary", [1, 1, 1, 1, 1]),
        ("none", "binary-sm", [1, 1, 1, 1, 1]),
        ("linear", "sm-binary", [1, 0.8, 0.5, 0.2, 0]),
        ("linear", "binary-sm", [0, 0.2, 0.5, 0.8, 1]),
        ("step", "sm-binary", [1, 1, 1, 0, 0]),
        ("step", "binary-sm", [0, 0, 1, 1, 1]),
    ],
)
def test_schedule_scale_follows_appendix_b4(kind, order, expected):
    times = [1, 0.8, 0.5, 0.2, 0]
    assert [softmask.schedule_scale(t, kind, order, 0.5) for t in times] == pytest.approx(expected)


def test_schedule_scale_switches_at_the_given_time():
    """B.4.1: binary to SM at 0.8 and SM to binary at 0.2 use SM in the last and first 80 %."""
    times = [i / 100 for i in range(101)]
    late = [softmask.schedule_scale(t, "step", "binary-sm", 0.8) for t in times]
    early = [softmask.schedule_scale(t, "step", "sm-binary", 0.2) for t in times]
    assert late == [1.0] * 81 + [0.0] * 20
    assert early == [0.0] * 20 + [1.0] * 81


@pytest.mark.parametrize(
    ("kind", "order"), [("cosine", "sm-binary"), ("linear", "sm"), ("step", "")]
)
def test_unknown_schedules_are_refused(kind, order):
    with pytest.raises(ValueError, match=kind):
        softmask.schedule_scale(0.5, kind, order)


# The textbook itself


def test_textbook_entropy_of_a_one_hot_is_zero_with_a_finite_slope():
    p = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    h = reference.negative_entropy(p)
    torch.testing.assert_close(h, torch.tensor([0.0, -math.log(2)]))
    h.sum().backward()
    assert p.grad.isfinite().all()


def test_textbook_feedback_lies_on_the_simplex_and_changes_masks_only(tiny):
    model, (x0, t, noise) = tiny(), example()
    xt = reference.corrupt(x0, t, noise, V - 1, model.mask_eps)
    for k in (1, 3, V, WHOLE):
        with torch.no_grad():
            z = reference.logits(model, F.one_hot(xt, V).float(), torch.zeros(4))
            p = reference.probabilities(z, xt, V - 1)
            x = reference.soft_mask(xt, p, textbook_omegas(lively_softmask(k)), k, V - 1)
        torch.testing.assert_close(x.sum(-1), torch.ones(4, L))
        assert (x >= 0).all()
        assert torch.equal(x[xt != V - 1], F.one_hot(xt, V).float()[xt != V - 1])


def test_randomise_leaves_no_parameter_at_zero(tiny):
    model = tiny()
    randomise(model)
    assert all(p.any() for p in model.parameters())


@pytest.mark.parametrize("k", [1, 3, WHOLE])
def test_entropies_stay_in_float32_under_autocast(tiny, k):
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        feedback = SoftMask(None if k == WHOLE else k).feedback(model, torch.randn(4, 16))
    assert feedback.neg_entropy.dtype == torch.float32

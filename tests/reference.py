"""The textbook version of soft-masked diffusion (Hersche et al., ICLR 2026, sections 2 and 3).

Slow and plain: a token is a one-hot vector, a batch is a (B, L, V) float32 tensor on the simplex,
and every position meets the whole vocabulary. The fast version in softmask.py must agree with it
in value and gradient, and bench.py measures what the fast version saves.

It takes from the denoiser its parts `embedding` (V, D), `hidden(embeddings, sigma)` and `head`, and
the numbers `vocab_size`, `mask_id`, `mask_eps`. B batch, L length, D width, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Omegas(NamedTuple):
    """The trained scalars in the paper's domain; tau, a softmax temperature, only where k = |V|."""

    omega_s: Tensor
    omega_a: Tensor
    omega_b: Tensor
    tau: Tensor | None = None


def reparameterise(
    raw_s: Tensor, raw_a: Tensor, raw_b: Tensor, raw_tau: Tensor | None = None
) -> Omegas:
    """Appendix A.1: a sigmoid keeps omega_s in [0, 1]; softplus gives the others their signs."""

    def softplus(x: Tensor) -> Tensor:
        return torch.logaddexp(x, torch.zeros_like(x))  # log(e^x + 1)

    tau = None if raw_tau is None else softplus(raw_tau)
    return Omegas(torch.sigmoid(raw_s), softplus(raw_a), -softplus(raw_b), tau)


# Section 2.1: the forward process


def antithetic_times(u: list[float], b_l: float, b_h: float) -> list[float]:
    """Algorithm 1, line 3: t ~ U(b_l, b_h), one draw in each of n equal parts of the interval."""
    n = len(u)
    return [b_l + (b_h - b_l) * (u[i] + i) / n for i in range(n)]


def alpha(t: Tensor, eps: float) -> Tensor:
    """alpha_t, the probability that a token is still there at time t: 1 - (1 - eps) t, float64."""
    return 1 - (1 - eps) * t.double()


def noise_level(t: Tensor, eps: float) -> Tensor:
    """sigma(t) = -log alpha_t, which conditions the network."""
    return -torch.log(alpha(t, eps)).to(t.dtype)


def corrupt(
    x0: Tensor, t: Tensor, noise: Tensor, mask_id: int, eps: float, maskable: Tensor | None = None
) -> Tensor:
    """Algorithm 1, line 4: x_t ~ Cat(alpha_t x_0 + (1 - alpha_t) m), token by token, (B, L).

    A token becomes m where its noise ~ U(0, 1) falls below 1 - alpha_t; a prompt, never; but of a
    response, which is all that is not prompt, the token of the smallest noise in any case.
    """
    xt = x0.clone()
    for b in range(x0.shape[0]):
        becomes_mask = noise[b] < 1 - alpha(t[b], eps)
        if maskable is not None:
            becomes_mask = becomes_mask & maskable[b]
            response = [i for i in range(x0.shape[1]) if maskable[b, i]]
            if response:
                becomes_mask[min(response, key=lambda i: noise[b, i].item())] = True
        xt[b, becomes_mask] = mask_id
    return xt


# Section 3.1: the soft mask


def logits(model, simplex: Tensor, sigma: Tensor) -> Tensor:
    """g_theta on points of the simplex (B, L, V): logits at all positions, float32 (B, L, V)."""
    embeddings = simplex @ model.embedding  # (B, L, D): sum_v x_v E[v]
    return model.head(model.hidden(embeddings, sigma)).float()


def probabilities(z: Tensor, xt: Tensor, mask_id: int, tau: Tensor | float = 1.0) -> Tensor:
    """SUBS: p = softmax(z / tau) without the mask token where x_t = m; elsewhere p = v_{x_t}."""
    is_mask_token = torch.arange(z.shape[-1], device=z.device) == mask_id
    p = torch.softmax((z / tau).masked_fill(is_mask_token, -math.inf), dim=-1)  # (B, L, V)
    return torch.where((xt == mask_id)[..., None], p, F.one_hot(xt, z.shape[-1]).float())


def negative_entropy(p: Tensor) -> Tensor:
    """-H(p) = sum_v p_v log p_v in nats over the whole vocabulary, (B, L); 0 log 0 = 0.

    Where p_v = 0 the logarithm is taken of 1 instead, so that the gradient is 0 too and not NaN.
    """
    safe = torch.where(p > 0, p, 1.0)
    return (p * torch.log(safe)).sum(-1)


def confidence(neg_entropy: Tensor, omegas: Omegas) -> Tensor:
    """Eq. 2: lambda(p) = omega_s * sigmoid(omega_a * (-H(p) - omega_b))."""
    return omegas.omega_s * torch.sigmoid(omegas.omega_a * (neg_entropy - omegas.omega_b))


def renormalised_top_k(p: Tensor, k: int | None) -> Tensor:
    """pi_i = p_i / sum_{j in top-k} p_j for i in top-k, 0 elsewhere, (B, L, V); p for k = |V|."""
    if k is None:
        return p
    in_top_k = torch.zeros_like(p).scatter(-1, p.topk(k, dim=-1).indices, 1.0)
    return in_top_k * p / (in_top_k * p).sum(-1, keepdim=True)


def soft_mask(xt: Tensor, p: Tensor, omegas: Omegas, k: int | None, mask_id: int) -> Tensor:
    """Section 3.1, sm(x_t, p): points of the simplex (B, L, V).

    (1 - lambda) m + lambda * sum_{i in top-k} pi_i v_i where x_t = m, and x_t where it is not.
    """
    hard = F.one_hot(xt, p.shape[-1]).float()  # (B, L, V): v_{x_t}, which is m where x_t = m
    lam = confidence(negative_entropy(p), omegas)[..., None]  # (B, L, 1)
    blend = (1 - lam) * hard + lam * renormalised_top_k(p, k)
    return torch.where((xt == mask_id)[..., None], blend, hard)


# Section 3.2: the two passes and the loss


def soft_sequences(u: float, n: int, p_sm: float) -> list[bool]:
    """Which of n sequences are soft-masked: i iff an integer lies in (u + i p, u + (i+1) p].

    One u ~ U(0, 1) serves the batch, so that each sequence is chosen with probability p_sm.
    """
    return [math.floor(u + (i + 1) * p_sm) > math.floor(u + i * p_sm) for i in range(n)]


def predict(
    model, xt: Tensor, sigma: Tensor, omegas: Omegas | None, soft: Tensor | None, k: int | None
) -> Tensor:
    """Algorithm 1, lines 5 to 7: p (B, L, V) of the second pass for the sequences in `soft` (B,),
    of the only pass for the others (all, without omegas)."""
    m = model.mask_id
    simplex = F.one_hot(xt, model.vocab_size).float()  # (B, L, V)
    if omegas is not None and soft.any():
        with torch.no_grad():  # line 5: theta~ <- detach(theta)
            z = logits(model, simplex[soft], sigma[soft])  # line 6
        tau = 1.0 if k is not None else omegas.tau
        p = probabilities(z, xt[soft], m, tau)  # line 6: p~; only tau is not a constant
        softened = soft_mask(xt[soft], p, omegas, k, m)  # line 7: sm(x_t, p~)
        simplex = simplex.index_copy(0, soft.nonzero()[:, 0], softened)
    return probabilities(logits(model, simplex, sigma), xt, m)  # line 7: g_theta


def full_vocabulary_loss(
    model,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    omegas: Omegas | None = None,
    soft: Tensor | None = None,
    k: int | None = 3,
    maskable: Tensor | None = None,
) -> Tensor:
    """Algorithm 1, lines 4 to 8: sum over b, l of 1[x_t = m] * -log(x_0 . p) / t, in nats.

    x0 (B, L) tokens, t (B,) times, noise (B, L) in U(0, 1), soft bool (B,); no omegas: binary
    masking; k None: the whole vocabulary, with temperature omegas.tau; maskable bool (B, L).
    """
    xt = corrupt(x0, t, noise, model.mask_id, model.mask_eps, maskable)  # line 4
    p = predict(model, xt, noise_level(t, model.mask_eps), omegas, soft, k)  # lines 5 to 7
    return nelbo_sum(p, x0, xt, t, model.mask_id)


def nelbo_sum(p: Tensor, x0: Tensor, xt: Tensor, t: Tensor, mask_id: int) -> Tensor:
    """Algorithm 1, line 8, of predictions p (B, L, V)."""
    likelihood = (F.one_hot(x0, p.shape[-1]) * p).sum(-1)  # x_0^T p (B, L)
    is_mask = (xt == mask_id).float()  # 1[x_t = m]
    return (is_mask * -torch.log(likelihood) / t[:, None]).sum()  # line 8


# Section 2.1 and Eq. 1: decoding


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """p (B, L, V) kept while the cumulative probability is at most top_p, always the first; by a
    full sort, renormalised."""
    ordered, ids = p.sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1) <= top_p
    kept[..., 0] = True
    p = torch.zeros_like(p).scatter(-1, ids, ordered * kept)
    return p / p.sum(-1, keepdim=True)


def ancestral_step(
    model,
    xt: Tensor,
    t: float,
    s: float,
    top_p: float,
    previous: Tensor | None = None,
    omegas: Omegas | None = None,
    k: int = 3,
) -> tuple[Tensor, Tensor]:
    """x_s ~ p(x_s | x_t) (Eq. 1) of all positions at once, soft-masked by the `previous` p.

    The posterior is written out over the vocabulary, (B, L, V): a mask stays with probability
    (1 - alpha_s)/(1 - alpha_t), alpha = 1 - t, and becomes v with the rest times p_v; a token
    stays. Gumbel noise in float64 on every entry. Returns x_s and p (B, L, V).
    """
    m = model.mask_id
    embeddings = F.embedding(xt, model.embedding)
    if omegas is not None and previous is not None:
        embeddings = soft_mask(xt, previous, omegas, k, m).to(embeddings) @ model.embedding
    z = model.head(model.hidden(embeddings, torch.zeros(len(xt), device=xt.device))).float()
    p = probabilities(z, xt, m)
    posterior = nucleus(p, top_p).double() * (t - s) / t
    posterior[..., m] = s / t
    gumbel = -torch.log(-torch.log(torch.rand_like(posterior)))
    drawn = (posterior.log() + gumbel).argmax(-1)
    return torch.where(xt == m, drawn, xt), p

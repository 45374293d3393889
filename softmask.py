"""Soft-masked diffusion language models, the method (Hersche et al., ICLR 2026, sections 2 and 3).

A masked diffusion language model sees a text with some tokens replaced by [MASK] and predicts them
all at once. Soft-masking (SM) feeds back what it predicted: the embedding of a mask is blended with
those of the k likeliest tokens ("binary": without). Training (Algorithm 1) looks at the same x_t
twice; in decoding the first look is the step before, soft-masked itself from the second step on.

    x_t = corrupt(x_0, t)                       each token a mask with probability about t
    p = g(x_t), without gradient                first pass, of a share p_sm of the sequences
    feedback = top-k of p, and -H(p)            at the masked positions
    e = blend(embed(x_t), feedback)             sm(), by Eq. 2's lambda; other sequences: plain
    loss = sum over masks of -log g(e)[x_0] / t second pass; gradients to g, omegas and tau

A denoiser has `embed(tokens)`, `embedding` (the (V, D) table), `hidden(embeddings, sigma)`,
`logits(hidden)` and `head` (with all parameters of `logits`), `mask_id`, `vocab_size`, `mask_eps`.
Shapes: B batch, L length, D width, V vocabulary, k top-k, N gathered positions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25  # elements of the largest (rows, V) float32 tensor: 128 MiB


# Section 2.1: the forward process q(x_t | x_0)


def antithetic_times(u: Tensor, b_l: float = 0.0, b_h: float = 1.0) -> Tensor:
    """Times t_i = (u_i + i)/n scaled to [b_l, b_h]: every batch covers all of them evenly.

    u (n,) holds independent U(0, 1) numbers, n the sequences of the whole optimiser step.
    """
    n = len(u)
    t = (u + torch.arange(n, dtype=u.dtype, device=u.device)) / n  # (n,)
    return b_l + (b_h - b_l) * t


def mask_probability(t: Tensor, eps: float) -> Tensor:
    """(1 - eps) t, the probability 1 - alpha_t that a token is masked at time t (B,).

    eps is the denoiser's `mask_eps`: 1e-3 for MDLM's log-linear schedule, whose sigma stays finite
    at t = 1, and 0 for Dream, which has no use for sigma.
    """
    return (1 - eps) * t


def noise_level(t: Tensor, eps: float) -> Tensor:
    """sigma(t) = -log alpha_t = -log(1 - (1 - eps) t), what a time-conditioned network is told."""
    return -torch.log1p(-mask_probability(t, eps))


def corrupt(
    x0: Tensor, t: Tensor, noise: Tensor, mask_id: int, eps: float, maskable: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw x_t ~ q(x_t | x_0): each token becomes the mask m with probability 1 - alpha_t.

    x0 (B, L) tokens, t (B,) times, noise (B, L) independent U(0, 1) numbers. `maskable` (B, L) is
    False where nothing is ever masked (a prompt, padding); of the others, if any, one always is,
    that of the smallest number, so that no example of fine-tuning is without a loss (its times must
    stay away from 0). Returns x_t (B, L) and the positions masked, bool (B, L).
    """
    masked = noise < mask_probability(t, eps)[:, None]
    if maskable is not None:
        noise = noise.masked_fill(~maskable, math.inf)
        masked = (masked | (noise == noise.amin(1, keepdim=True))) & maskable
    return torch.where(masked, mask_id, x0), masked


# Section 3.1: from a prediction to feedback, from feedback to a soft mask


class Feedback(NamedTuple):
    """What soft-masking keeps of the predictions p at N positions.

    ids (N, k) and weights (N, k): the top-k tokens v_i and pi_i, their renormalised probabilities.
    neg_entropy (N,): -H(p) in nats over the whole vocabulary, from -ln V to 0, which is certainty.
    mixed (N, D): for k = |V| the mean embedding sum_i p_i E[v_i] replaces ids and weights; there p
    is softmax(logits / tau).
    """

    ids: Tensor | None
    weights: Tensor | None
    neg_entropy: Tensor
    mixed: Tensor | None = None


def join(parts: list[Feedback]) -> Feedback:
    """The feedback of all the parts' positions, in their order."""
    return Feedback(*(None if p[0] is None else torch.cat(p) for p in zip(*parts)))


def put(whole: Feedback | None, part: Feedback, at: int, n: int) -> Feedback:
    """Write the feedback of some rows, from row `at` on, into that of all n; None starts it.

    What chunks leave behind must not lie between their large tensors, whose memory the allocator
    could then not use again: on a CPU a decoding of Dream's vocabulary took ten times as much.
    """
    if whole is None:
        whole = Feedback(*(f if f is None else f.new_empty(n, *f.shape[1:]) for f in part))
    for of_all, of_some in zip(whole, part):
        if of_all is not None:
            of_all[at : at + len(of_some)] = of_some
    return whole


def pick(feedback: Feedback, which: Tensor) -> Feedback:
    """The feedback of some of its N positions: `which` is indices, or bool (N,)."""
    return Feedback(*(None if v is None else v[which] for v in feedback))


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def chunk_rows(vocab_size: int) -> int:
    """Rows that may meet the vocabulary at a time, so that (rows, V) stays within the chunk."""
    return max(1, CHUNK_ELEMENTS // vocab_size)


def top_k(values: Tensor, k: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` of (N, V), sooner: the k largest lie in the k blocks of largest maximum."""
    n, v = values.shape
    whole = v - v % block
    if n == 0 or whole // block <= 4 * k or v <= 4096:
        return values.topk(k, dim=-1)
    blocks = values[:, :whole].view(n, -1, block).amax(-1).topk(k).indices  # (N, k)
    ids = (blocks[..., None] * block + torch.arange(block, device=values.device)).flatten(1)
    rest = torch.arange(whole, v, device=values.device).expand(n, -1)
    ids = torch.cat([ids, rest], dim=1)  # (N, k * block + rest)
    top, where = values.gather(1, ids).topk(k, dim=-1)
    return top, ids.gather(1, where)


class SoftMask(nn.Module):
    """The soft mask: three scalars (omega_s, omega_a, omega_b), and tau where k = |V|.

    Eq. 2: lambda = omega_s * sigmoid(omega_a * (-H(p) - omega_b)): omega_s bounds what is fed
    back, omega_b the -H at which it is half of that, omega_a the steepness; and the blend is
    (1 - lambda) E[m] + lambda * sum_i pi_i E[v_i], with E[m] the mask's embedding.

    k is the number of fed-back tokens; None stands for the whole vocabulary with a trainable
    softmax temperature tau (appendix B.3). What is trained are raw numbers without bounds:
    omega_s = sigmoid(raw_s), omega_a = softplus(raw_a), omega_b = -softplus(raw_b), tau =
    softplus(raw_tau). Start (appendix A.2): tau 1; omega_s near 0, so near the binary model; with
    LB = `lower_bound`, the 5 % quantile of -H, omega_b = LB/2 and omega_a = -10/LB. For LB = -1.5
    these are -0.75 and 6.7: lambda / omega_s is 0.993 at H = 0 and 0.007 at H = 1.5.
    """

    def __init__(self, k: int | None = 3, omega_s: float = 1e-2, lower_bound: float = -1.5):
        super().__init__()
        if k is not None and k < 1:
            raise ValueError(f"k = {k}: at least one token is fed back")
        self.k = k
        self.raw_s = nn.Parameter(torch.zeros(()))
        self.raw_a = nn.Parameter(torch.zeros(()))
        self.raw_b = nn.Parameter(torch.zeros(()))
        if k is None:
            self.raw_tau = nn.Parameter(torch.zeros(()))
        self.start(omega_s, lower_bound)

    def start(self, omega_s: float, lower_bound: float) -> None:
        """Appendix A.2's start from LB, the 5 % quantile of -H in nats."""
        lb = min(lower_bound, -1e-3)  # a network that is sure of all would make omega_a infinite
        self.set_omegas(omega_s, omega_a=-10 / lb, omega_b=lb / 2)

    @torch.no_grad()
    def set_omegas(self, omega_s: float, omega_a: float, omega_b: float, tau: float = 1.0) -> None:
        """Set the scalars to values in the paper's domain; ValueError outside it."""
        if not (0 < omega_s < 1 and omega_a > 0 and omega_b < 0 and tau > 0):
            raise ValueError(
                f"omega_s {omega_s}, omega_a {omega_a}, omega_b {omega_b}, tau {tau}: "
                "need 0 < omega_s < 1, omega_a > 0, omega_b < 0, tau > 0"
            )
        self.raw_s.fill_(math.log(omega_s) - math.log1p(-omega_s))
        self.raw_a.fill_(_inverse_softplus(omega_a))
        self.raw_b.fill_(_inverse_softplus(-omega_b))
        if self.k is None:
            self.raw_tau.fill_(_inverse_softplus(tau))

    @property
    def omega_s(self) -> Tensor:
        return torch.sigmoid(self.raw_s)

    @property
    def omega_a(self) -> Tensor:
        return F.softplus(self.raw_a)

    @property
    def omega_b(self) -> Tensor:
        return -F.softplus(self.raw_b)

    @property
    def tau(self) -> Tensor:
        return F.softplus(self.raw_tau)

    def omegas(self) -> dict[str, float]:
        """The scalars as plain numbers in the paper's domain."""
        names = ["omega_s", "omega_a", "omega_b"] + (["tau"] if self.k is None else [])
        return {name: getattr(self, name).item() for name in names}

    def lam(self, neg_entropy: Tensor) -> Tensor:
        """Eq. 2: lambda = omega_s * sigmoid(omega_a * (-H(p) - omega_b)), in [0, omega_s]."""
        return self.omega_s * torch.sigmoid(self.omega_a * (neg_entropy - self.omega_b))

    def reduce(self, z: Tensor, table: Tensor) -> Feedback:
        """Logits (N, V) in at least float32 to the feedback of their predictions. ValueError where
        k > V."""
        if self.k is None:
            return Feedback(None, None, *_mix_vocabulary(z, self.tau, table))
        if self.k > z.shape[1]:
            raise ValueError(f"k = {self.k} is larger than the vocabulary of {z.shape[1]}")
        return Feedback(*_top_k_feedback(z, self.k))

    def feedback(self, model, hidden: Tensor) -> Feedback:
        """Reduce the predictions of hidden states (N, D) to what soft-masking needs of them.

        The logits are constants; only for k = |V| do gradients flow, to tau and the table, for
        which each chunk is computed again in the backward pass. ValueError where k > V.
        """

        def reduced(h: Tensor) -> Feedback:
            with torch.no_grad():
                z = at_least_float32(model.logits(h))  # (C, V)
            return self.reduce(z, model.embedding)

        chunks = hidden.detach().split(chunk_rows(model.vocab_size))
        if self.k is None:
            return join([checkpoint(reduced, h, use_reentrant=False) for h in chunks])
        found, at = None, 0
        with torch.no_grad():
            for h in chunks:
                found = put(found, reduced(h), at, len(hidden))
                at += len(h)
        return found

    def certain(self, tokens: Tensor, table: Tensor) -> Feedback:
        """The feedback of positions that held `tokens` (N,) when the network ran.

        By MDLM's SUBS rule a token that is there predicts itself, with weight 1 and entropy 0; so a
        position that a decoder masks again is reminded of its former token, as strongly as can be.
        """
        zero = torch.zeros(len(tokens), device=table.device)
        if self.k is None:
            return Feedback(None, None, zero, F.embedding(tokens, table))
        weights = zero[:, None].repeat(1, self.k)
        weights[:, 0] = 1
        return Feedback(tokens[:, None].repeat(1, self.k), weights, zero)

    def forward(
        self,
        embeddings: Tensor,
        rows: Tensor,
        feedback: Feedback,
        table: Tensor,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Section 3.1's sm(): blend the feedback into the embeddings at `rows`, leave the others.

        embeddings (B, L, D); rows (N,) index the B * L positions, all of them masked; table (V, D);
        `scale` multiplies lambda (appendix B.4). Gradients reach the table and the omegas.
        """
        candidates = feedback.mixed
        if candidates is None:
            vectors = at_least_float32(F.embedding(feedback.ids, table))  # (N, k, D)
            candidates = (feedback.weights[..., None] * vectors).sum(1)  # sum_i pi_i E[v_i]
        flat = embeddings.flatten(0, 1)  # (B * L, D)
        mask = at_least_float32(flat.index_select(0, rows))  # (N, D), each row E[m]
        lam = (scale * self.lam(feedback.neg_entropy))[:, None]  # (N, 1)
        blend = (1 - lam) * mask + lam * candidates  # (N, D), in float32
        return flat.index_copy(0, rows, blend.to(flat.dtype)).view_as(embeddings)


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))


def _top_k_feedback(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    p = z.softmax(-1)
    top, ids = top_k(z, k)
    pi = top.softmax(-1)  # p_i / sum of p over the top k
    log_sum = top[:, 0] - p.gather(1, ids[:, :1])[:, 0].log()  # of exp(z), since z - log p is it
    with torch.autocast(z.device.type, enabled=False):
        neg_entropy = torch.linalg.vecdot(p, z) - log_sum  # sum_v p_v log p_v
    return ids, pi, neg_entropy


def _mix_vocabulary(z: Tensor, tau: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (z / tau).log_softmax(-1)
    p = log_p.exp()
    return (p * log_p).sum(-1), p.to(table.dtype) @ table


def schedule_scale(
    t: float, kind: str = "none", order: str = "sm-binary", switch: float = 0.5
) -> float:
    """Appendix B.4: the factor of lambda when the share t of a decoding's steps is left, 1 to 0.

    `order`: soft masks first, then plain ones ("sm-binary"), or the other way ("binary-sm").
    `linear` fades: t, or 1 - t. `step` switches at the paper's t' = `switch`: 1 while t >= t', or
    from t <= t' on.
    """
    if kind == "none":
        return 1.0
    if kind not in ("linear", "step") or order not in ("sm-binary", "binary-sm"):
        raise ValueError(
            f"schedule {kind!r}, {order!r}: none, linear or step; sm-binary or binary-sm"
        )
    if kind == "linear":
        return t if order == "sm-binary" else 1 - t
    return float(t >= switch) if order == "sm-binary" else float(t <= switch)


# Section 3.2: the two passes and the loss


def denoise(
    model,
    xt: Tensor,
    sigma: Tensor,
    softmask: SoftMask | None = None,
    rows: Tensor | None = None,
    feedback: Feedback | None = None,
    scale: Tensor | float = 1.0,
    **options,
) -> Tensor:
    """One pass g_theta over x_t (B, L), soft-masked at `rows` if there is feedback: (B, L, D).

    `options` that are not None go to `model.hidden`: `attend` for padded batches, `keep` and `part`
    for kept keys and values.
    """
    options = {name: value for name, value in options.items() if value is not None}
    embeddings = model.embed(xt)  # (B, L, D)
    if feedback is not None:
        embeddings = softmask(embeddings, rows, feedback, model.embedding, scale)
    return model.hidden(embeddings, sigma, **options)


def first_pass(
    model,
    softmask: SoftMask,
    xt: Tensor,
    sigma: Tensor,
    masked: Tensor,
    soft: Tensor,
    attend: Tensor | None = None,
) -> tuple[Tensor, Feedback]:
    """Algorithm 1, lines 5 and 6: predict without gradient; for the sequences in `soft` (B,) only.

    Returns the N masked rows of those sequences (N,), indices into B * L, and their feedback.
    """
    rows = (masked & soft[:, None]).flatten().nonzero().squeeze(1)  # (N,), in the order of hidden
    attend = None if attend is None else attend[soft]
    with torch.no_grad():
        hidden = denoise(model, xt[soft], sigma[soft], attend=attend)[masked[soft]]  # (N, D)
    return rows, softmask.feedback(model, hidden)


@torch.no_grad()
def negative_entropies(
    model,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    maskable: Tensor | None = None,
    attend: Tensor | None = None,
) -> Tensor:
    """-H(p) in nats (N,) at the masked positions of x_t, which `corrupt` draws from x0 (B, L).

    Their 5 % quantile is LB of appendix A.2.
    """
    xt, masked = corrupt(x0, t, noise, model.mask_id, model.mask_eps, maskable)
    hidden = denoise(model, xt, noise_level(t, model.mask_eps), attend=attend)[masked]  # (N, D)
    return SoftMask(1).feedback(model, hidden).neg_entropy


def soft_sequences(u: float, n: int, p_sm: float) -> Tensor:
    """Which of n sequences get the first pass, bool (n,): each with probability p_sm; the others
    keep the network able to read plain masks, which every decoding starts from.

    Sequence i does iff floor(u + (i+1) p_sm) > floor(u + i p_sm), for one u ~ U(0, 1) a step: the
    count is always p_sm n, rounded up or down, so that all steps do the same work.
    """
    edges = torch.floor(u + torch.arange(n + 1, dtype=torch.float64) * p_sm)
    return edges[1:] > edges[:-1]


def diffusion_loss(
    model,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    softmask: SoftMask | None = None,
    soft: Tensor | None = None,
    maskable: Tensor | None = None,
    attend: Tensor | None = None,
    average: str = "tokens",
) -> Tensor:
    """Algorithm 1, lines 4 to 8: sum over masked positions of -log p(x0_l) / t, in nats. The weight
    makes up for the few masks at small t: the mean of the loss over t bounds the text's negative
    log-likelihood from above (NELBO, the negative evidence lower bound).

    x0 (B, L), t (B,), noise (B, L) in U(0, 1), soft bool (B,): the sequences that get two passes,
    by default all (without `softmask` none: the binary baseline); `maskable` as in `corrupt`;
    `attend` bool (B, L), False at padding. The caller divides by the number of tokens, masked or
    not (with `maskable`: of those). Without `maskable`, whose forced mask weighs 1/t too, the
    expectation over t ~ U(0, 1) is the NELBO of the batch. With the `average` "masked", as in the
    released fine-tuning, a sequence's sum, still over t, is also divided by its number of masked
    positions, and the caller divides by the number of sequences.
    """
    xt, masked = corrupt(x0, t, noise, model.mask_id, model.mask_eps, maskable)
    sigma = noise_level(t, model.mask_eps)  # (B,)
    rows, feedback = None, None
    soft = torch.ones_like(t, dtype=torch.bool) if soft is None else soft
    if softmask is not None and bool(soft.any()):
        rows, feedback = first_pass(model, softmask, xt, sigma, masked, soft, attend)
    hidden = denoise(model, xt, sigma, softmask, rows, feedback, attend=attend)  # (B, L, D), line 7
    share = masked.sum(1).clamp(min=1) if average == "masked" else 1
    weights = (1 / (t * share))[:, None].expand_as(x0)[masked]  # (N,)
    loss = weighted_nll(model, hidden[masked], x0[masked], weights)  # line 8
    if softmask is not None and feedback is None:
        loss = loss + 0 * sum(p.sum() for p in softmask.parameters())  # as several processes need
    return loss


def weighted_nll(model, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n * -log p(targets_n) of hidden states (N, D), a scalar in at least float32.

    Chunk by chunk: a chunk's gradient (p - onehot, in closed form) is taken while its logits are
    at hand, so that no (N, V) tensor is kept or computed twice.
    """
    head = tuple(p for p in model.head.parameters() if p.requires_grad)
    grad = torch.is_grad_enabled()  # within forward it is always off
    return _WeightedNLL.apply(model, grad, targets, at_least_float32(weights), hidden, *head)


class _WeightedNLL(torch.autograd.Function):
    """The gradients are taken in `forward`; `backward` only scales them, in place, and so once."""

    @staticmethod
    def forward(ctx, model, grad, targets, weights, hidden, *head):
        total = torch.zeros((), dtype=weights.dtype, device=hidden.device)
        d_hidden, d_head = torch.empty_like(hidden), [None] * len(head)
        differentiate = grad and any(ctx.needs_input_grad)
        y = targets[:, None]
        size = chunk_rows(model.vocab_size)
        for start in range(0, len(hidden), size):
            c = slice(start, start + size)
            with torch.set_grad_enabled(differentiate):
                h = hidden[c].detach().requires_grad_(differentiate)
                z = model.logits(h)  # (C, V)
            wide = at_least_float32(z.detach())
            p = wide.softmax(-1)
            likeliest, at = p.max(-1, keepdim=True)
            log_sum = wide.gather(1, at) - likeliest.log()  # logsumexp(z), as z - log p is for any
            total += torch.dot(weights[c], (log_sum - wide.gather(1, y[c]))[:, 0])
            if not differentiate:
                continue
            p.scatter_add_(1, y[c], -torch.ones_like(log_sum))  # d(-log p(y))/dz = p - onehot(y)
            dz = torch.mul(p, weights[c, None], out=torch.empty_like(z))
            d_hidden[c], *d_chunk = torch.autograd.grad(z, (h, *head), dz)
            for i, d in enumerate(d_chunk):
                d_head[i] = d if d_head[i] is None else d_head[i].add_(d)
        d_head = [
            torch.zeros_like(p) if d is None else d for d, p in zip(d_head, head, strict=True)
        ]
        ctx.gradients = (d_hidden, *d_head) if differentiate else ()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("weighted_nll: one backward pass for each forward pass")
        return None, None, None, None, *(d.mul_(g) for d in gradients)

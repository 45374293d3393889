"""Decoding: from masks to text in a chosen number of network passes, with and without soft-masking.

    x = torch.full((4, model.config.block_size), model.mask_id)
    tokens, done = generate(model, x, 64, softmask, Strategy("remdm-cap", top_p=0.9))

One step: look (a pass over x_t, soft-masked by the feedback of the step before), let the strategy
say which masked positions open, which tokens they get and which drawn ones are masked again, keep
feedback for the masks that stay. Strategies (MDLM, ReMDM, Dream's orders of confidence, Fast-dLLM's
blocks and thresholds) differ in the middle part alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from model import Cache
from runtime import autocast, generator, give_back_memory
from softmask import (
    Feedback,
    SoftMask,
    at_least_float32,
    chunk_rows,
    denoise,
    join,
    noise_level,
    pick,
    put,
    schedule_scale,
    top_k,
)
from tracing import trace_entries

ANCESTRAL = ("mdlm", "remdm-cap", "remdm-rescale", "remdm-conf", "remdm-loop", "origin")
ORDERS = ("maskgit_plus", "topk_margin", "entropy")  # Dream's, by confidence
DREAM = ("origin", *ORDERS)
CACHES = ("none", "prefix", "dual")
NO_NUMBERS = "the network's predictions are not numbers: damaged weights, or try --dtype float32"
MOST_STEPS = 10**6  # of a strategy that may take more steps than there are masks
ETA = {"remdm-cap": 0.04, "remdm-rescale": 0.015, "remdm-loop": 0.02}  # ReMDM's own numbers


@dataclass(frozen=True)
class Strategy:
    """How positions are chosen (`name`: one of ANCESTRAL or ORDERS) and tokens drawn.

    `eta`, `t_on`, `t_off`, `alpha_on` are ReMDM's (None: the eta of ETA); `alg_temp` above 0 draws
    Dream's order at random; with a `threshold` (Fast-dLLM's parallel decoding) every mask opens
    whose drawn token is that probable. Temperature 0 takes the most likely token. ValueError for a
    value that would make a probability negative or above 1.
    """

    name: str = "mdlm"
    temperature: float = 1.0
    top_p: float = 1.0
    eta: float | None = None
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9
    alg_temp: float = 0.0
    threshold: float | None = None

    def __post_init__(self):
        if self.name not in ANCESTRAL + ORDERS:
            raise ValueError(f"--strategy {self.name}: choose {', '.join(ANCESTRAL + ORDERS)}")
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature}: 0, or a finite number from 1e-6")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: above 0, at most 1")
        if not (math.isfinite(self.alg_temp) and self.alg_temp >= 0):
            raise ValueError(f"--alg-temp {self.alg_temp}: a finite number from 0")
        if self.alg_temp > 0 and self.name not in ORDERS:
            raise ValueError(f"--alg-temp {self.alg_temp}: for {', '.join(ORDERS)}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: above 0, at most 1")
        if self.threshold is not None and self.alg_temp > 0:
            raise ValueError("--alg-temp: not with --threshold, which leaves no order to draw")
        if self.eta is None:
            object.__setattr__(self, "eta", ETA.get(self.name, 0.0))
        elif self.name not in ETA:
            raise ValueError(f"--eta {self.eta}: for {', '.join(ETA)}")
        if not 0 <= self.t_off < self.t_on < 1 or not 0 < self.alpha_on < 1:
            raise ValueError(
                f"--t-on {self.t_on}, --t-off {self.t_off}, --alpha-on {self.alpha_on}: need "
                "0 <= t_off < t_on < 1 and 0 < alpha_on < 1"
            )
        most = 1.0
        if self.name == "remdm-loop":
            most = min(1.0, (1 - self.alpha_on) / self.alpha_on)
        if not 0 <= self.eta <= most:
            raise ValueError(
                f"--eta {self.eta}: from 0 to {most:.4g}; beyond, a probability would be negative "
                "or above 1"
            )

    @property
    def remasks(self) -> bool:
        return self.name.startswith("remdm")

    def times(self, nfe: int) -> list[float]:
        """t_0 = 1 > ... > t_nfe, which MDLM ends at 1e-5 and Dream (in float32) at 1e-3."""
        if self.name in DREAM:
            return torch.linspace(1, 1e-3, nfe + 1).tolist()
        return torch.linspace(1, 1e-5, nfe + 1, dtype=torch.float64).tolist()

    def rates(self, t: float, s: float) -> tuple[float, float]:
        """From time t to s: the probability that a mask opens, and sigma, that a drawn token is
        masked again (for remdm-conf: the expected number of them in a sequence)."""
        alpha_t, alpha_s, sigma = 1 - t, 1 - s, 0.0
        if self.name == "remdm-loop":
            if t > self.t_on:
                alpha_t, alpha_s = (self.alpha_on * a / (1 - self.t_on) for a in (alpha_t, alpha_s))
            elif t > self.t_off:
                alpha_t, alpha_s, sigma = self.alpha_on, self.alpha_on, self.eta
            else:
                alpha_t, alpha_s = (1 - v * (1 - self.alpha_on) / self.t_off for v in (t, s))
        elif self.remasks:
            sigma = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0  # sigma_max
            if self.name == "remdm-cap":
                sigma = min(self.eta, sigma)
            elif self.name == "remdm-rescale":
                sigma = self.eta * sigma
        common = 0.0 if self.name == "remdm-conf" else sigma
        return (alpha_s - (1 - common) * alpha_t) / (1 - alpha_t), sigma


# From predictions to tokens


def nucleus(p: Tensor, top_p: float, crossing: bool) -> tuple[Tensor, Tensor]:
    """The nucleus of probabilities p (N, V): ids and renormalised probabilities (N, K), the largest
    first, 0 behind the end of a row.

    MDLM's and ReMDM's keeps tokens while their cumulative probability is at most top_p, always the
    first; Dream's (`crossing`) keeps the smallest set whose probability reaches top_p. Only as many
    as it may hold are looked for, not all sorted.
    """
    for k in (64, 1024, p.shape[1]):
        top, ids = top_k(p, min(k, p.shape[1]))
        total = top.cumsum(-1)
        inside = total - top < top_p if crossing else total <= top_p
        inside[:, :1] = True
        if k >= p.shape[1] or not inside[:, -1].any():
            break
    width = int(inside.sum(-1).max()) if len(p) else 1
    kept = (top * inside)[:, :width]
    return ids[:, :width], kept / kept.sum(-1, keepdim=True)


def candidates(z: Tensor, mask_id: int, how: Strategy) -> tuple[Tensor | None, Tensor]:
    """Logits (N, V) to the tokens that may be drawn and their probabilities, after temperature and
    nucleus; ids None stands for the whole vocabulary. The mask is never among them."""
    z = z.index_fill(1, torch.tensor([mask_id], device=z.device), -math.inf)
    p = (z / how.temperature if how.temperature > 0 else z).softmax(-1)
    if how.top_p >= 1:
        return None, p
    return nucleus(p, how.top_p, crossing=how.name in DREAM)


def draw(
    ids: Tensor | None, p: Tensor, temperature: float, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """One of the `candidates` a row and its probability, each (N,); row n draws from generators[n].

    By Gumbel-max in float64: float32 noise would silently sharpen the law.
    """
    if temperature == 0:
        best = p.argmax(-1, keepdim=True)
    else:
        u = torch.zeros(p.shape, dtype=torch.float64)
        for row, g, n in zip(u, generators, (p > 0).sum(-1).tolist() if ids is not None else []):
            row[:n] = uniform(g, n)  # a row's noise does not depend on the width of others
        if ids is None:
            u = torch.stack([uniform(g, p.shape[1]) for g in generators])
        where = "cpu" if p.device.type == "mps" else p.device  # it has no float64
        score = p.to(where).double().log() - torch.log(-torch.log(u.to(where)))
        best = score.argmax(-1, keepdim=True).to(p.device)
    tokens = best if ids is None else ids.gather(1, best)
    return tokens[:, 0], p.gather(1, best)[:, 0]


def uniform(g: torch.Generator, n: int) -> Tensor:
    return torch.rand(n, generator=g, dtype=torch.float64)


def confidence(order: str, p: Tensor, drawn: Tensor) -> Tensor:
    """Dream's confidence (N,) in predictions: p (N, K) of the candidates, `drawn` of the token."""
    if order == "maskgit_plus":
        return drawn
    if order == "topk_margin":
        first, second = p.topk(2).values.unbind(-1) if p.shape[1] > 1 else (p[:, 0], 0.0)
        return first - second
    return torch.special.xlogy(p, p).sum(-1)  # negative entropy


# The loop


class Schedule(NamedTuple):
    """How lambda fades while decoding (appendix B.4; see `schedule_scale`), with the time left, or
    (`by_masks`, as the released adapters do) with the share of a sequence's masks that are left."""

    kind: str = "none"
    order: str = "sm-binary"
    switch: float = 0.5
    by_masks: bool = False

    def scale(self, left: float, masks_left: Tensor, rows: Tensor | None) -> Tensor | float:
        """The factor of lambda at `rows` (N,) of B * L: `left` is t/T; masks_left (B, L) is 1 where
        a position to fill is a mask, 0 where it is filled, NaN at those that were given."""
        if not self.by_masks or rows is None:
            return schedule_scale(left, *self[:3])
        shares = masks_left.nanmean(1).tolist()  # (B,)
        factors = torch.tensor([schedule_scale(share, *self[:3]) for share in shares])
        return factors.to(rows.device)[rows // masks_left.shape[1]]


class Block(NamedTuple):
    """Columns first to last (excluded), which are decoded before those behind them, and the times
    of the steps. Without Fast-dLLM all columns are one block."""

    first: int
    last: int
    times: list[float]


def plan(start: Tensor, nfe: int, how: Strategy, length: int | None, cache: str) -> list[Block]:
    """The blocks of `length` columns, the last maybe shorter, in which the masks `start` (B, L) are
    filled in `nfe` steps, of which each block gets its share.

    Under a threshold a block may take as many steps as it has columns, whatever nfe is. ValueError
    for what the strategy cannot do.
    """
    if cache not in CACHES:
        raise ValueError(f"--cache {cache}: choose {', '.join(CACHES)}")
    blockwise = length is not None or cache != "none" or how.threshold is not None
    if blockwise and how.name not in ORDERS:
        why = ": it may mask a token again in a block that is done and kept" if how.remasks else ""
        raise ValueError(
            f"--block-length, --cache and --threshold: for {', '.join(ORDERS)}, not for "
            f"{how.name}{why}"
        )
    if length is not None and length < 1:
        raise ValueError(f"--block-length {length}: at least 1")
    most = int(start.sum(1).max()) if how.name in ORDERS else MOST_STEPS
    if not blockwise:
        if not 1 <= nfe <= most:
            raise ValueError(f"--nfe {nfe}: 1 to {most} steps for {how.name}")
        return [Block(0, start.shape[1], how.times(nfe))]
    columns = start.any(0)
    first, last = (int(columns.nonzero()[i, 0]) for i in (0, -1))
    edges = [*range(first, last + 1, length or len(columns)), last + 1]
    parts = [(a, b) for a, b in pairwise(edges) if columns[a:b].any()]  # not where all is given
    if how.threshold is not None:
        return [Block(a, b, how.times(b - a)) for a, b in parts]
    free = nfe - len(parts)  # steps beyond the one that each block takes at least
    if free < 0 or nfe > max(most, len(parts)):
        raise ValueError(
            f"--nfe {nfe}: {len(parts)} to {max(most, len(parts))} steps for {len(parts)} blocks"
        )
    widths = list(accumulate((b - a for a, b in parts), initial=0))
    ends = [free * width // widths[-1] for width in widths]
    shares = [1 + b - a for a, b in pairwise(ends)]
    return [Block(a, b, how.times(n)) for (a, b), n in zip(parts, shares)]


@dataclass
class Decoding:
    """What a decoding did: passes of the network; whether a last one filled left-over masks; bytes
    of its cache; and, where asked for, the trace, a dictionary a sequence and step (see
    `generate`)."""

    passes: int = 0
    filled: bool = False
    cache_bytes: int = 0
    trace: list[dict] = field(default_factory=list)


@torch.no_grad()
def generate(
    model,
    x: Tensor,
    nfe: int,
    softmask: SoftMask | None = None,
    how: Strategy | None = None,
    *,
    seeds: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    schedule: Schedule | tuple = (),
    reuse_unchanged: bool = False,
    attend: Tensor | None = None,
    stop: tuple[int, ...] = (),
    block_length: int | None = None,
    cache: str = "none",
    trace: bool | Callable[[dict], None] = False,
    on_step=None,
) -> tuple[Tensor, Decoding]:
    """Fill the masks of x (B, L) in `nfe` steps; positions that are not the mask never change.

        x = torch.full((4, model.config.block_size), model.mask_id)
        tokens, done = generate(model, x, 64, softmask, Strategy("remdm-cap", top_p=0.9))

    `model` is any denoiser, in evaluation mode and on x's device; without `softmask` masks stay
    plain. Feedback starts at the second step, is taken before temperature and nucleus, and for a
    remasked position is its former token. `seeds` holds one seed a row (default 0, 1, ...): a row
    does not depend on its batch. `schedule` is a `Schedule` or its entries. A binary step
    in which nothing changed reuses the last pass; with `reuse_unchanged` a soft-masked one does
    too. If masks remain after the last step, one more pass fills them by argmax; it is not counted
    as NFE. `attend`, bool (B, L), is False at a batch's padding. Once a token of `stop` was drawn
    and no mask stands before it, the masks behind it become stop[0].

    Fast-dLLM: `block_length` cuts what is to be filled in blocks, one after the other (see `plan`).
    With a `cache` only a block's first pass is over everything: later ones compute the block
    ("dual"), or it and all behind it ("prefix"), attend to the kept keys and values of the rest,
    and renew the feedback of the block's rows alone.

    `on_step(i, x)` is called after every step. Returns the tokens (B, L) and a `Decoding`. Its
    trace, which a callable `trace` is given instead as it happens, has for every step and row:
    step, t (the time it ended at), row, `drawn` [[position, id], ...], `remasked` [positions], and
    `soft`, for the masks that stay: [position, lambda, -H in nats, [ids], [weights]]. ValueError
    for what the strategy cannot do.
    """
    how, schedule = how or Strategy(), Schedule(*schedule)
    start = x == model.mask_id
    if not start.any():
        return x.clone(), Decoding()
    blocks = plan(start, nfe, how, block_length, cache)
    total, before = sum(len(block.times) - 1 for block in blocks), 0  # steps; of earlier blocks
    x, done = x.clone(), Decoding()
    tell = trace if callable(trace) else done.trace.append
    flat, length = x.view(-1), x.shape[1]
    generators = [generator(s) for s in (range(len(x)) if seeds is None else seeds)]
    kept = Cache(model.config.n_layers) if cache != "none" else None
    options = {"attend": attend, "keep": kept}
    reuse = not model.config.time_conditioning and (softmask is None or reuse_unchanged)
    hidden = feedback = rows = None
    prob = torch.zeros(x.shape, device=x.device)  # of each token when it was drawn

    def scale_at(step: int) -> Tensor | float:
        masks_left = torch.where(start, (x == model.mask_id).float(), math.nan)
        return schedule.scale(1 - step / total, masks_left, rows)

    with autocast(x.device, dtype):
        for first, behind, times in blocks:
            within = torch.zeros(length, dtype=torch.bool, device=x.device)
            within[first:behind] = True
            changed = torch.ones(len(x), dtype=torch.bool, device=x.device)  # the rows that did
            for i, (t, s) in enumerate(pairwise(times)):
                masked = (x == model.mask_id) & within
                if not (masked.any() or how.remasks):
                    break
                looks = bool(masked.any()) and (not reuse or bool(changed.any()))
                part = slice(0, length)
                if kept is not None and i > 0:
                    part = model.part_for(first, behind if cache == "dual" else length)
                if looks:
                    scale = scale_at(before + i)
                    new = _look(model, x, t, softmask, rows, feedback, scale, part, options)
                    if softmask is not None and reuse and i > 0:
                        new[~changed] = hidden[~changed][:, part]  # of a row that did not change
                    if new.shape[1] == length:
                        hidden = new  # (B, L, D)
                    else:
                        hidden[:, part] = new
                    done.passes += 1
                predicted, last = hidden.flatten(0, 1), i == len(times) - 2
                seen = tokens = None
                if how.name in ORDERS:
                    opens, tokens, seen = _by_confidence(
                        model, predicted, masked, how, softmask, generators, attend, t, s, last
                    )
                    closes = torch.zeros_like(opens)
                else:
                    drawn = start & ~masked
                    opens, closes = _by_chance(
                        masked, drawn, prob, how, generators, attend, t, s, last
                    )
                chosen = opens.flatten().nonzero()[:, 0]
                former, remasked = x[closes], closes.flatten().nonzero()[:, 0]
                if tokens is None:
                    tokens, p = _draw_at(model, predicted, chosen, how, generators, length)
                    prob.view(-1)[chosen] = p.to(prob)
                flat[chosen], flat[remasked] = tokens, model.mask_id
                if stop:
                    ended = _behind_stop(x, start, model.mask_id, stop)
                    x[ended] = stop[0]
                    opens |= ended
                    chosen = opens.flatten().nonzero()[:, 0]
                changed = (opens | closes).any(1)  # (B,)
                if softmask is not None and (looks or changed.any()):
                    elsewhere = (x == model.mask_id) & ~within  # masks of other blocks
                    renewed = elsewhere & masked.any(1)[:, None]  # not of a row that is done here
                    renewed &= part.stop - part.start == length
                    stays = masked & ~opens
                    found = None if seen is None else pick(seen, stays[masked])
                    rows, feedback = _joined(
                        _predicted(model, softmask, predicted, stays, found),
                        _predicted(model, softmask, predicted, renewed),
                        _unchanged(rows, feedback, elsewhere & ~renewed),
                        (remasked, softmask.certain(former, model.embedding)),
                    )
                if trace:
                    scale = scale_at(before + i + 1)
                    lam = None if feedback is None else scale * softmask.lam(feedback.neg_entropy)
                    happened = (before + i, s, x, chosen, remasked, rows, feedback, lam)
                    for entry in trace_entries(*happened):
                        tell(entry)
                if on_step is not None:
                    on_step(before + i, x)
                if x.device.type == "cpu":
                    give_back_memory()
            before += len(times) - 1
        rest = (x == model.mask_id).flatten().nonzero()[:, 0]
        if len(rest):
            done.filled = True
            everything = slice(0, length)
            scale = scale_at(total)
            hidden = _look(
                model, x, blocks[-1].times[-1], softmask, rows, feedback, scale, everything, options
            )
            flat[rest], _ = _draw_at(
                model, hidden.flatten(0, 1), rest, Strategy(how.name, temperature=0), generators,
                length,
            )  # fmt: skip
            if trace:
                for entry in trace_entries(total, 0.0, x, rest, rest[:0], None, None, None):
                    tell(entry)
    done.cache_bytes = 0 if kept is None else kept.nbytes
    return x, done


def _look(
    model, x: Tensor, t: float, softmask, rows, feedback, scale, part: slice, options: dict
) -> Tensor:
    """A pass at time t over the columns `part` of x (B, L), with the feedback at `rows`, indices
    into B * L, of the passes before, if any: (B, columns, D)."""
    if feedback is not None and part.stop - part.start < x.shape[1]:
        column = rows % x.shape[1]
        here = (column >= part.start) & (column < part.stop)
        feedback, scale = pick(feedback, here), scale[here] if torch.is_tensor(scale) else scale
        rows = (rows // x.shape[1] * (part.stop - part.start) + column - part.start)[here]
    sigma = noise_level(torch.full((len(x),), t, device=x.device), model.mask_eps)
    whole = options["keep"] is None
    options = options | {"part": None if whole else part}
    return denoise(model, x[:, part], sigma, softmask, rows, feedback, scale, **options)


# Feedback after a step: of which rows, indices into B * L, and what; None where there is none.


def _predicted(model, softmask, hidden: Tensor, where: Tensor, known: Feedback | None = None):
    """That of a pass, hidden (B * L, D), at `where` (B, L), if it is not `known` already."""
    rows = where.flatten().nonzero()[:, 0]
    if len(rows) and known is None:
        known = softmask.feedback(model, hidden[rows])
    return rows, known


def _unchanged(rows: Tensor | None, feedback: Feedback | None, where: Tensor):
    """That of earlier passes at `where` (B, L)."""
    if feedback is None:
        return rows, None
    which = where.flatten()[rows]
    return rows[which], pick(feedback, which)


def _joined(*parts) -> tuple[Tensor | None, Feedback | None]:
    parts = [(rows, feedback) for rows, feedback in parts if feedback is not None and len(rows)]
    if not parts:
        return None, None
    rows, feedback = zip(*parts)
    return torch.cat(rows), join(list(feedback))


def _behind_stop(x: Tensor, start: Tensor, mask_id: int, stop: tuple[int, ...]) -> Tensor:
    """The masks of x (B, L) behind a drawn stop token that has no mask before it, bool (B, L)."""
    masked = x == mask_id
    ends = torch.isin(x, torch.tensor(stop, device=x.device)) & start & (masked.cumsum(1) == 0)
    return masked & (ends.cumsum(1) > 0)


def _noise(generators: list[torch.Generator], like: Tensor, attend: Tensor | None) -> Tensor:
    """U(0, 1) noise (B, L) from each row's own generator; padding takes none of it."""
    u = torch.zeros(like.shape, dtype=torch.float64)
    real = torch.ones(like.shape, dtype=torch.bool) if attend is None else attend.cpu()
    for row, g, where in zip(u, generators, real, strict=True):
        row[where] = uniform(g, int(where.sum()))
    return u


def _draw_at(model, hidden, rows, how, generators, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and their probabilities at `rows` (N,): only they meet the vocabulary."""
    if not len(rows):
        return rows, torch.zeros(0, device=rows.device)
    exact = torch.float32 if rows.device.type == "mps" else torch.float64
    tokens, p = torch.empty_like(rows), rows.new_empty(len(rows), dtype=exact)
    size = chunk_rows(model.vocab_size)
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        z = at_least_float32(model.logits(hidden[part])).to(exact)
        own = [generators[i] for i in (part // length).tolist()]
        drawn = draw(*candidates(z, model.mask_id, how), how.temperature, own)
        tokens[at : at + size], p[at : at + size] = drawn
    if p.isnan().any():
        raise ValueError(NO_NUMBERS)
    return tokens, p


def _by_chance(masked, drawn, prob, how, generators, attend, t, s, last) -> tuple[Tensor, Tensor]:
    """Ancestral strategies: of the masks `masked` (B, L) which open, and of the tokens `drawn`,
    which had probability `prob`, which are masked again."""
    u = _noise(generators, masked, attend).to(prob)  # (B, L)
    opening, sigma = how.rates(t, s)
    opens = masked & ((u < opening) | (last and how.name == "origin"))
    if how.name == "remdm-conf":  # spread over what may be remasked
        share = torch.where(drawn, -prob, -math.inf).softmax(-1).nan_to_num(0)
        sigma = sigma * share
    return opens, drawn & (u < sigma)


def _by_confidence(model, hidden, masked, how, softmask, generators, attend, t, s, last):
    """Dream's orders: the n positions of largest confidence open, n = masks (1 - s/t) a row. Under
    a threshold those whose drawn token has that probability or more, and the most probable one.

    Returns the positions (B, L); their tokens where the confidence needed them drawn, else None;
    and the feedback of all masked positions, for which one meeting with the vocabulary serves.
    """
    rows = masked.flatten().nonzero()[:, 0]
    draws = how.name == "maskgit_plus" or how.threshold is not None
    tokens, sure, seen = torch.empty_like(rows) if draws else None, None, None
    size = chunk_rows(model.vocab_size)
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        z = at_least_float32(model.logits(hidden[part]))
        if softmask is not None:
            seen = put(seen, softmask.reduce(z, model.embedding), at, len(rows))
        ids, p = candidates(z, model.mask_id, how)
        drawn = None
        if draws:
            own = [generators[i] for i in (part // masked.shape[1]).tolist()]
            tokens[at : at + size], drawn = draw(ids, p, how.temperature, own)
        found = drawn if how.threshold is not None else confidence(how.name, p, drawn)
        sure = found.new_empty(len(rows)) if sure is None else sure
        sure[at : at + size] = found
    if sure.isnan().any():
        raise ValueError(NO_NUMBERS)
    score = torch.full(masked.shape, -math.inf, dtype=sure.dtype, device=masked.device)
    score[masked] = sure
    if how.threshold is not None:
        best = torch.zeros_like(masked).scatter_(1, score.argmax(1, keepdim=True), True)
        opens = masked & (best | (score >= how.threshold))
        return opens, tokens[opens[masked]], seen
    if how.alg_temp > 0:  # Gumbel's top n: n draws without replacement from the softmax
        u = _noise(generators, masked, attend).to(score.device)
        score = score.double() / how.alg_temp - torch.log(-torch.log(u))
        score = score.masked_fill(~masked, -math.inf)
    share = 1 - torch.tensor(s) / torch.tensor(t)  # in float32, as published
    count = masked.sum(1)
    n = count if last else (count.float() * share.to(count.device)).long()  # (B,)
    order = score.argsort(dim=-1, descending=True, stable=True)  # ties: the lowest position first
    ranks = torch.arange(masked.shape[1], device=masked.device).expand_as(order)
    opens = masked & (torch.empty_like(order).scatter_(1, order, ranks) < n[:, None])
    return opens, tokens[opens[masked]] if draws else None, seen


# Answers to prompts


def respond(
    model,
    prompts: list[list[int]],
    new_tokens: int,
    nfe: int,
    pad_id: int,
    softmask: SoftMask | None = None,
    how: Strategy | None = None,
    **options,
) -> tuple[list[list[int]], Decoding]:
    """The answers, `new_tokens` ids each, to prompts of any lengths: one batch, padded on the left.

    `options` are those of `generate`. ValueError where a prompt and its answer do not fit.
    """
    length = max(map(len, prompts)) + new_tokens
    if length > model.config.block_size:
        raise ValueError(
            f"a prompt of {length - new_tokens} tokens and an answer of {new_tokens}: the network "
            f"takes {model.config.block_size}"
        )
    x = torch.full((len(prompts), length), pad_id)
    attend = torch.zeros(x.shape, dtype=torch.bool)
    for row, real, prompt in zip(x, attend, prompts, strict=True):
        begin = length - new_tokens - len(prompt)
        row[begin:] = torch.tensor(prompt + [model.mask_id] * new_tokens)
        real[begin:] = True
    device = model.embedding.device
    attend = None if attend.all() else attend.to(device)
    x, done = generate(model, x.to(device), nfe, softmask, how, attend=attend, **options)
    return x[:, length - new_tokens :].tolist(), done


def seed_of(seed: int, i: int) -> int:
    """The seed of sample i of a run, whatever its batch."""
    return (seed * 1_000_003 + i) % 2**63

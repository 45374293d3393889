"""Decoding: from masks to text in a chosen number of network passes, with and without soft-masking.

    python sample.py --ckpt out/ckpt.pt --num 4
    python sample.py --prompt "def fibonacci(n):" --nfe 32 --top-p 0.9
    python sample.py --infill "for [MASK] in range([MASK]):"

One step: look (a pass over x_t, soft-masked by the feedback of the step before), choose which
masked positions to open, draw their tokens, keep feedback for the masks that stay.
"""

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from data import MASK_TEXT, decode, encode, load_tokenizer
from runtime import (
    Parser,
    atomic_write,
    autocast,
    generator,
    pick_device,
    pick_dtype,
    progress,
    run,
    writable_folder,
)
from softmask import SoftMask, chunk_rows, denoise, noise_level
from weights import build_model, build_softmask, load_checkpoint


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """MDLM's nucleus of probabilities p (N, V): the most likely tokens while their cumulative
    probability is at most top_p, always the first; zero elsewhere, not renormalised."""
    if top_p >= 1:
        return p
    order = p.argsort(dim=-1, descending=True, stable=True)
    kept = p.gather(1, order).cumsum(-1) <= top_p
    kept[:, 0] = True
    return p * torch.zeros_like(kept).scatter_(1, order, kept)


def draw_tokens(z: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """One token a row of logits z (N, V) by Gumbel-max in float64, uniform (N, V) in U(0, 1).

    Temperature 0 takes the most likely token. float32 noise would silently sharpen the law.
    """
    if temperature == 0:
        return z.argmax(-1)
    p = nucleus((z.to(uniform) / temperature).softmax(-1), top_p)
    return (p.log() - torch.log(-torch.log(uniform))).argmax(-1)


class Decoding:
    """What a decoding did: passes of the network, and whether a last one filled left-over masks."""

    def __init__(self):
        self.passes = 0
        self.filled = False


@torch.no_grad()
def generate(
    model,
    x: Tensor,
    nfe: int,
    softmask: SoftMask | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    on_step=None,
) -> tuple[Tensor, Decoding]:
    """MDLM's ancestral sampling (section 2.1, Eq. 1): fill the masks of x (B, L) in `nfe` steps.

    Times run over linspace(1, 1e-5, nfe + 1), alpha = 1 - t: from t to s a masked position opens
    with probability (alpha_s - alpha_t)/(1 - alpha_t) and then draws its token; positions that are
    not the mask never change. Feedback starts at the second step and is taken before temperature
    and nucleus. If masks remain, one more pass fills them by argmax; it is not counted as NFE.
    `seeds` holds one seed a row, so that a row does not depend on its batch. A binary step in which
    nothing changed reuses the last pass. Returns the tokens (B, L) and a `Decoding`;
    `on_step(i, x)` is called after every step.
    """
    if nfe < 1:
        raise ValueError(f"nfe = {nfe}: decoding takes at least one step")
    x, done = x.clone(), Decoding()
    generators = [generator(s) for s in (range(len(x)) if seeds is None else seeds)]
    times = torch.linspace(1, 1e-5, nfe + 1, dtype=torch.float64).tolist()
    reuse = softmask is None and not model.config.time_conditioning
    changed, feedback, rows = True, None, None
    length = x.shape[1]
    exact = "cpu" if x.device.type == "mps" else x.device  # where there is float64
    with autocast(x.device, dtype):
        for i, (t, s) in enumerate(pairwise(times)):
            masked = x == model.mask_id
            if not masked.any():
                break
            if changed or not reuse:
                hidden = _look(model, x, t, softmask, rows, feedback)  # (B * L, D)
                done.passes += 1
            u = torch.stack([_uniform(g, length) for g in generators])  # (B, L)
            opens = masked & (u < (t - s) / t).to(x.device)
            chosen = opens.flatten().nonzero().squeeze(1)
            changed = len(chosen) > 0
            for part in chosen.split(chunk_rows(model.vocab_size)) if changed else ():
                own = [generators[i] for i in (part // length).tolist()]
                u = torch.stack([_uniform(g, model.vocab_size) for g in own]).to(exact)  # (N, V)
                z = model.logits(hidden[part]).to(exact)
                x.view(-1)[part] = draw_tokens(z, temperature, top_p, u).to(x.device)
            rows = (masked & ~opens).flatten().nonzero().squeeze(1)
            if softmask is not None and len(rows):
                feedback = softmask.feedback(model, hidden[rows])
            if on_step is not None:
                on_step(i, x)
        rest = (x == model.mask_id).flatten().nonzero().squeeze(1)
        if len(rest):
            done.filled = True
            hidden = _look(model, x, times[-1], softmask, rows, feedback)
            x.view(-1)[rest] = model.logits(hidden[rest]).argmax(-1)
    return x, done


def _look(model, x: Tensor, t: float, softmask, rows, feedback) -> Tensor:
    """A pass at time t over x (B, L) with the feedback of the last one, if any: (B * L, D)."""
    sigma = noise_level(torch.full((len(x),), t, device=x.device), model.mask_eps)
    return denoise(model, x, sigma, softmask, rows, feedback).flatten(0, 1)


def _uniform(g: torch.Generator, n: int) -> Tensor:
    return torch.rand(n, generator=g, dtype=torch.float64)


def template(tokenizer, length: int, prompt: str = "", infill: str = "") -> list[int]:
    """The ids to start from: a prompt and masks up to `length`, or a text with its [MASK] runs.

    ValueError where the prompt leaves nothing to fill, or the text has no [MASK] or is too long.
    """
    mask = tokenizer.n_vocab
    if infill:
        if MASK_TEXT not in infill:
            raise ValueError(f"--infill: the text has no {MASK_TEXT} to fill")
        pieces = [encode(tokenizer, piece) for piece in infill.split(MASK_TEXT)]
        ids = [i for piece in pieces for i in [*piece, mask]][:-1]
        if len(ids) > length:
            raise ValueError(f"--infill: {len(ids)} tokens; there is room for {length}")
        return ids
    ids = encode(tokenizer, prompt)
    if len(ids) >= length:
        raise ValueError(f"--prompt: {len(ids)} tokens leave nothing to fill of --length {length}")
    return ids + [mask] * (length - len(ids))


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.prompt and args.infill:
        raise ValueError(
            "--prompt and --infill: one of them; a text to infill may begin as you like"
        )
    if args.out:
        writable_folder(Path(args.out).parent, "--out")
    if not math.isfinite(args.temperature):
        raise ValueError(f"--temperature {args.temperature}: a finite number from 0")
    if args.num < 1 or args.batch_size < 1 or not 0 < args.top_p <= 1 or args.temperature < 0:
        raise ValueError("--num and --batch-size from 1, --top-p in (0, 1], --temperature from 0")
    state = load_checkpoint(args.ckpt, "--ckpt")
    model = build_model(state, ema=True).to(device).eval()
    softmask = None if args.no_sm else build_softmask(state)
    softmask = softmask.to(device) if softmask is not None else None
    tokenizer = load_tokenizer(state["tokenizer"])
    limit = model.config.block_size
    length = limit if args.length is None else args.length
    if not 1 <= length <= limit:
        raise ValueError(f"--length {length}: the network takes 1 to {limit} tokens")
    start = torch.tensor(template(tokenizer, length, args.prompt, args.infill), device=device)
    nfe = len(start) if args.nfe is None else args.nfe
    if nfe < 1:
        raise ValueError(f"--nfe {nfe}: at least one step")
    samples, passes, begin = [], 0, time.perf_counter()
    with progress(total=args.num * nfe, desc="decoding", unit=" steps") as bar:
        for first in range(0, args.num, args.batch_size):
            seeds = [
                (args.seed * 1_000_003 + i) % 2**63
                for i in range(first, min(first + args.batch_size, args.num))
            ]
            x, done = generate(
                model,
                start.repeat(len(seeds), 1),
                nfe,
                softmask,
                args.temperature,
                args.top_p,
                seeds,
                dtype,
                on_step=lambda i, x: bar.update(len(x)),
            )
            passes += done.passes
            samples += x.tolist()
    seconds = time.perf_counter() - begin
    texts = [decode(tokenizer, ids) for ids in samples]
    if args.out:
        with atomic_write(args.out, "w") as f:
            f.writelines(
                json.dumps({"text": t, "ids": i}) + "\n"
                for t, i in zip(texts, samples, strict=True)
            )
    for i, text in enumerate(texts):
        print(f"--- sample {i}\n{text}")
    filled = int((start == model.mask_id).sum()) * args.num
    batches = -(-args.num // args.batch_size)
    print(
        f"--- {filled / seconds:.1f} tokens per second; {nfe} steps, {passes / batches:.1f} "
        f"network passes a batch; {'soft-masked' if softmask is not None else 'binary'}"
    )


def parser() -> Parser:
    p = Parser(description="Decode text.")
    g = p.add_argument_group("what")
    g.add_argument("--ckpt", default="out/ckpt.pt", help="a checkpoint, or its folder")
    g.add_argument("--num", type=int, default=1, help="samples")
    g.add_argument("--length", type=int, help="tokens of a sample; default: the network's length")
    g.add_argument("--prompt", default="", help="a prefix that stays")
    g.add_argument("--infill", default="", help=f"a text: each {MASK_TEXT} is filled")
    g.add_argument("--out", help="write the samples to this JSONL file too")
    g = p.add_argument_group("how")
    g.add_argument("--nfe", type=int, help="decoding steps; default: one a token")
    g.add_argument("--temperature", type=float, default=1.0)
    g.add_argument("--top-p", type=float, default=1.0, help="nucleus")
    g.add_argument("--no-sm", action="store_true", help="plain masks even with an SM checkpoint")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("machine")
    g.add_argument("--batch-size", type=int, default=16)
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    g.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    return p


if __name__ == "__main__":
    run(main, parser().parse_args())

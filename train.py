"""Pretraining, from scratch or continued (Algorithm 1); without --sm the binary baseline.

    python train.py --sm                                  # from scratch, on the standard library
    python train.py --sm --init base/ckpt.pt --out sm     # a trained model learns soft-masking
    python train.py --resume --out sm                     # go on with a stopped run

OUT receives `ckpt.pt`, `softmask.json` (the omegas) and `metrics.jsonl`.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import Corpus, decode, default_tokenizer, open_corpus, token_bytes, vocab_size
from model import SIZES, DiT, DiTConfig
from runtime import (
    ALONE,
    Metrics,
    Parser,
    StopSignal,
    World,
    autocast,
    generator,
    get_rng,
    join_world,
    pick_device,
    pick_dtype,
    progress,
    run,
    set_rng,
    writable_folder,
)
from sample import Strategy, generate
from softmask import (
    SoftMask,
    antithetic_times,
    diffusion_loss,
    entropy_quantile,
    soft_sequences,
)
from weights import build_model, build_softmask, load_checkpoint, save_checkpoint, save_omegas

EVAL_BATCH = 32  # sequences of a validation batch: its times are stratified
EVAL_SEED = 1234  # the same masks in every validation of every run
B_L, B_H = 1e-3, 1.0  # the times of pretraining and validation


# The run: what is trained, and what a checkpoint keeps of it


class EMA:
    """Moving average: shadow -= (1 - d)(shadow - p), d = min(decay, (1 + n)/(10 + n))."""

    def __init__(self, parameters: Iterator[nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.decay, self.updates = decay, 0
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - d)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters are their averages."""
        own = [p.data for p in self.parameters]
        try:
            for p, shadow in zip(self.parameters, self.shadow, strict=True):
                p.data = shadow
            yield
        finally:
            for p, data in zip(self.parameters, own, strict=True):
                p.data = data


class Objective(nn.Module):
    """`diffusion_loss` as a module, which DistributedDataParallel can wrap."""

    def __init__(self, model: nn.Module, softmask: SoftMask | None):
        super().__init__()
        self.model, self.softmask = model, softmask

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, soft: Tensor) -> Tensor:
        return diffusion_loss(self.model, x0, t, noise, self.softmask, soft)


@dataclass
class Run:
    """Everything a training run changes or is made of.

    `g`, a CPU generator with the same state in all processes, draws data, times, masks and
    soft-masked sequences of the whole global batch, so that none of them depends on the number of
    processes; dropout draws from PyTorch's own generators, which differ between processes.
    """

    args: argparse.Namespace
    world: World
    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    model: nn.Module
    softmask: SoftMask | None
    objective: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    g: torch.Generator
    step: int = 0
    scores: dict[str, float] | None = None  # of the last validation

    def save(self, out: Path) -> None:
        rng = self.world.gather(get_rng(self.device))
        if self.world.rank > 0:
            return
        state = {
            "config": self.model.config.to_dict(),
            "model": self.model.state_dict(),
            "ema": self.ema.shadow,
            "updates": self.ema.updates,
            "softmask": None,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "generator": self.g.get_state(),
            "rng": rng,
            "tokenizer": self.corpus.meta["tokenizer"],
            "args": saved_args(self.args),
            "text": self.corpus.meta["fingerprint"],
        }
        if self.softmask is not None:
            state["softmask"] = {"k": self.softmask.k, "state": self.softmask.state_dict()}
        save_checkpoint(out, state, self.softmask)

    def restore(self, state: dict) -> None:
        """Continue where `state` was saved; the weights are in place already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.updates = state["updates"]
        for shadow, saved in zip(self.ema.shadow, state["ema"], strict=True):
            shadow.copy_(saved)
        self.g.set_state(state["generator"])
        self.step = state["step"]
        if len(state["rng"]) == self.world.size:
            set_rng(state["rng"][self.world.rank], self.device)
        elif self.world.rank == 0:
            was, now = len(state["rng"]), self.world.size
            print(f"saved by {was} processes, resumed by {now}: same batches, new dropout draws")


def share_batch(args: argparse.Namespace, size: int) -> None:
    """Cut the global batch into equal shares for `size` processes, and a share into the fewest
    equal micro-batches of at most --batch-size. ValueError where it does not divide."""
    if args.global_batch is None:
        args.global_batch = args.batch_size * args.grad_accum * size
    share, rest = divmod(args.global_batch, size)
    if rest:
        raise ValueError(f"--global-batch {args.global_batch}: no multiple of {size} processes")
    fewest = -(-share // args.batch_size)
    args.grad_accum = next(n for n in range(fewest, share + 1) if share % n == 0)


def set_up(args: argparse.Namespace) -> Run:
    """Corpus, network, soft mask and optimiser: new, from --init's weights, or of a stopped run."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    world = join_world(device)
    share_batch(args, world.size)
    init = load_checkpoint(args.init, "--init") if args.init and not args.state else None
    source = args.state or init
    if init:
        inherit(args, init)
    with world.first():
        tokenizer = source["tokenizer"] if source else args.tokenizer
        corpus = open_corpus(args.data, tokenizer, args.cache)
    k = parse_k(args.k, vocab_size(corpus.tokenizer))

    torch.manual_seed(args.seed)
    if source:
        use_ema = init is not None and args.init_weights == "ema"
        conditioning = args.time_conditioning or source["config"]["time_conditioning"]
        model = build_model(
            source, ema=use_ema, dropout=args.dropout, time_conditioning=conditioning
        )
    else:
        sizes = dict(SIZES[args.config])
        sizes["block_size"] = args.block_size or sizes["block_size"]
        model = DiT(
            DiTConfig(
                vocab_size(corpus.tokenizer),
                dropout=args.dropout,
                time_conditioning=args.time_conditioning,
                **sizes,
            )
        )
    model.checkpoint_activations = args.checkpoint_activations
    args.block_size = args.block_size or model.config.block_size
    if args.block_size > model.config.block_size:
        limit = model.config.block_size
        raise ValueError(f"--block-size {args.block_size}: the network takes {limit}")
    for split in ("train", "val"):
        corpus.need(split, args.block_size)
    model.to(device).train()

    softmask = build_softmask(source) if source and args.sm else None
    inherited = softmask is not None
    if args.sm and not inherited:
        softmask = SoftMask(k, args.omega_s)
    groups = [{"params": list(model.parameters()), "peak": args.lr}]
    if softmask is not None:
        softmask.to(device)
        groups.append({"params": list(softmask.parameters()), "peak": args.lr_sm})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    ema = EMA(model.parameters(), args.ema)
    objective = Objective(model, softmask)
    if world.size > 1:
        objective = DistributedDataParallel(objective)
    torch.manual_seed(args.seed + 1_000_003 * world.rank)  # dropout; the weights are drawn
    whole = Run(
        args,
        world,
        device,
        dtype,
        corpus,
        model,
        softmask,
        objective,
        ema,
        optimizer,
        generator(args.seed),
    )
    if args.state:
        if args.state["text"] != corpus.meta["fingerprint"] and world.rank == 0:
            print(f"{corpus.meta['source']} has changed since the run was stopped", file=sys.stderr)
        whole.restore(args.state)
        for group, peak in zip(optimizer.param_groups, (args.lr, args.lr_sm)):
            group["peak"] = peak
        args.state = None
    elif init and args.sm and not inherited:
        start_omegas(whole)
    if args.compile:
        model.hidden = torch.compile(model.hidden)
    return whole


def inherit(args: argparse.Namespace, init: dict) -> None:
    """Fill what --init's checkpoint decides; ValueError where a flag says otherwise."""
    made_with = init["tokenizer"]["name"]
    if args.tokenizer not in (None, made_with):
        raise ValueError(f"--tokenizer {args.tokenizer}: --init was made with {made_with}")
    if args.data is None:
        args.data = init["args"]["data"]
    if args.sm and init["softmask"] is not None:
        k = str(init["softmask"]["k"] or "V")
        if args.k not in (None, k):
            raise ValueError(f"--k {args.k}: --init was soft-masked with k {k}; drop the flag")
        args.k = k


def parse_k(text: str | None, size: int) -> int | None:
    text = "3" if text is None else text
    if text == "V":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= size:
        raise ValueError(f"--k {text}: from 1 to the vocabulary's {size}, or V for all of it")
    return int(text)


def start_omegas(r: Run) -> None:
    """Start the omegas where the network stands (appendix A.2): LB is measured on 64 held-out
    sequences at training times."""
    blocks = r.corpus.blocks("val", r.args.block_size, 64)
    drawn = draw_masks(blocks, generator(EVAL_SEED), r.args.b_l, r.args.b_h)
    blocks, t, noise = (v.to(r.device) for v in (blocks, *drawn))
    r.model.eval()
    with autocast(r.device, r.dtype):
        r.softmask.start(r.args.omega_s, entropy_quantile(r.model, blocks, t, noise, 0.05))
    r.model.train()
    for p in r.softmask.parameters():
        r.optimizer.state.pop(p, None)  # the averages of steps that had no feedback


# Algorithm 1


def draw_masks(x0: Tensor, g: torch.Generator, b_l: float, b_h: float) -> tuple[Tensor, Tensor]:
    """Times t (B,) in [b_l, b_h] and noise (B, L) in U(0, 1), from which `corrupt` masks x0."""
    t = antithetic_times(torch.rand(len(x0), generator=g), b_l, b_h)
    return t, torch.rand(x0.shape, generator=g)


def learning_rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """The factor of both learning rates at `step` (from 0): linear warm-up, then constant, and over
    the last `decay` share of all steps a linear fall towards 0."""
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (steps - step) / (decay * steps) if decay > 0 else 1.0
    return min(rise, fall, 1.0)


def training_step(r: Run) -> tuple[float, float]:
    """One step of Algorithm 1 over a global batch: the loss (nats a token) and the gradient norm.

    A FloatingPointError, before any weight is changed, where either is not finite.
    """
    a, g = r.args, r.g
    if r.softmask is not None and r.step == a.sm_start > 0:
        start_omegas(r)
    n = a.global_batch
    x0 = r.corpus.batch(n, a.block_size, g)  # (n, L), line 2
    t, noise = draw_masks(x0, g, a.b_l, a.b_h)  # (n,) and (n, L), line 3
    u = torch.rand((), generator=g, dtype=torch.float64).item()
    soft = soft_sequences(u, n, a.p_sm if r.step >= a.sm_start else 0.0)  # (n,)
    loss = torch.zeros((), device=r.device)
    for i in range(a.grad_accum):
        mine = slice(r.world.rank + i * r.world.size, None, a.grad_accum * r.world.size)
        share = [v[mine].to(r.device) for v in (x0, t, noise, soft)]
        last = r.world.size == 1 or i == a.grad_accum - 1
        with nullcontext() if last else r.objective.no_sync():
            with autocast(r.device, r.dtype):
                part = r.objective(*share) / x0.numel()  # line 8
            (part * r.world.size).backward()  # processes average their gradients
        loss += part.detach()
    loss = r.world.reduce(loss.item())
    parameters = [p for group in r.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, a.clip).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm} at step {r.step + 1}")
    factor = learning_rate(r.step, a.steps, a.warmup, a.decay)
    for group in r.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    r.optimizer.step()  # line 9
    r.optimizer.zero_grad(set_to_none=True)
    r.ema.update()
    r.step += 1
    return loss, norm


# Validation


@torch.no_grad()
def nelbo(
    model, blocks: Tensor, softmask: SoftMask | None, device, dtype, world: World = ALONE
) -> tuple[float, float]:
    """NELBO in nats a token over blocks (n, L), and its standard error over batches.

    With a soft mask every sequence takes two passes, without one. Times and masks depend on the
    number and shape of the blocks alone, so that models can be compared. Processes take batches in
    turns.
    """
    training = model.training
    model.eval()
    g = generator(EVAL_SEED)
    sums, counts = [], []
    for i, x0 in enumerate(progress(blocks.split(EVAL_BATCH), desc="validating", leave=False)):
        drawn = draw_masks(x0, g, B_L, B_H)
        counts.append(x0.numel())
        sums.append(0.0)
        if i % world.size == world.rank:
            x0, t, noise = (v.to(device) for v in (x0, *drawn))
            with autocast(device, dtype):
                sums[-1] = diffusion_loss(model, x0, t, noise, softmask).item()
    sums = [sum(parts) for parts in zip(*world.gather(sums))]
    model.train(training)
    mean, n = sum(sums) / sum(counts), len(sums)
    spread = sum((s / c - mean) ** 2 for s, c in zip(sums, counts))
    return mean, math.sqrt(spread / (n * (n - 1))) if n > 1 else math.nan


def perplexity(nats: float) -> float:
    """exp of a NELBO in nats a token."""
    return math.exp(nats) if nats < 700 else math.inf


def bits_per_byte(nats: float, blocks: Tensor, sizes: Tensor) -> float:
    """From nats a token of blocks (n, L) to bits a UTF-8 byte; sizes (V,) from `token_bytes`."""
    return nats * blocks.numel() / (int(sizes[blocks].sum()) * math.log(2))


def validate(r: Run, blocks: Tensor) -> dict[str, float]:
    """Validation NELBO with EMA weights: in one pass, and soft-masked in two."""
    with r.ema.applied():
        where = (r.device, r.dtype, r.world)
        scores = {"val_nelbo_1pass": nelbo(r.model, blocks, None, *where)[0]}
        if r.softmask is not None:
            scores["val_nelbo_2pass"] = nelbo(r.model, blocks, r.softmask, *where)[0]
    return scores


def table(scores: dict[str, float], blocks: Tensor, sizes: Tensor) -> str:
    lines = [f"{'validation':12}{'nats a token':>14}{'perplexity':>12}{'bits per byte':>15}"]
    for key, name in (("val_nelbo_1pass", "one pass"), ("val_nelbo_2pass", "two passes")):
        if key in scores:
            nats = scores[key]
            bpb = bits_per_byte(nats, blocks, sizes)
            lines.append(f"{name:12}{nats:14.4f}{perplexity(nats):12.2f}{bpb:15.4f}")
    return "\n".join(lines)


# The loop


def main(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if (out / "ckpt.pt").exists() and not (args.resume or args.overwrite):
        raise ValueError(
            f"--out {args.out}: holds a run; go on with it by --resume, start it over by "
            "--overwrite, or choose another folder"
        )
    r = set_up(args)
    writable_folder(args.out, "--out")
    if args.overwrite and r.world.rank == 0:
        for name in ("ckpt.pt", "softmask.json"):
            (out / name).unlink(missing_ok=True)
    say = print if r.world.rank == 0 else _silent
    blocks = r.corpus.blocks("val", args.block_size, args.eval_batches * EVAL_BATCH)
    metrics = Metrics(out / "metrics.jsonl", r.step, r.world)
    if args.resume and r.world.rank == 0:
        save_omegas(out, r.step, r.softmask)  # a run may die between its two files
    mode = f"soft-masked, k {r.softmask.k or 'V'}" if r.softmask is not None else "binary"
    say(
        f"{sum(p.numel() for p in r.model.parameters()):,} parameters, {mode}, vocabulary "
        f"{r.model.vocab_size}, {r.corpus.meta['tokens']['train']:,} training tokens, "
        f"{r.world.size} x {r.device.type} {str(r.dtype).removeprefix('torch.')}",
        flush=True,
    )
    with StopSignal() as stop, progress(total=args.steps, initial=r.step, desc="training") as bar:
        try:
            signum = loop(r, out, blocks, metrics, stop, bar)
        except FloatingPointError as error:
            kept = f"{out / 'ckpt.pt'} holds the last save"
            kept = kept if (out / "ckpt.pt").exists() else "nothing was saved yet"
            raise ValueError(
                f"{error}: stopped; {kept}; try a lower --lr or --clip, or --dtype float32"
            )
    if signum:
        if r.world.rank == 0:
            name, again = signal.Signals(signum).name, f"train.py --resume --out {args.out}"
            print(f"train.py: {name}: saved step {r.step}; go on with: {again}", file=sys.stderr)
        r.world.leave()
        return 128 + signum
    scores = r.scores or validate(r, blocks)
    say(table(scores, blocks, token_bytes(r.corpus.tokenizer)))
    if r.softmask is not None:
        say("  ".join(f"{name} {value:.4f}" for name, value in r.softmask.omegas().items()))
    if r.world.rank == 0:
        print_samples(r)
    r.world.leave()
    return 0


def _silent(*args, **kwargs) -> None:
    pass


def loop(r: Run, out: Path, blocks: Tensor, metrics: Metrics, stop: StopSignal, bar) -> int:
    """Train to the end, or until a signal, whose number is returned: the step is done and saved."""
    args = r.args
    if args.init and not args.resume:
        report(r, blocks, metrics, bar)
    clock, at = time.perf_counter(), r.step
    while r.step < args.steps:
        loss, norm = training_step(r)
        bar.update()
        signum = int(r.world.reduce(stop.signum or 0, "MAX"))
        last = r.step == args.steps or signum > 0
        if r.step % args.log_every == 0 or last:
            tokens = (r.step - at) * args.global_batch * args.block_size
            rate = tokens / (time.perf_counter() - clock)
            omegas = r.softmask.omegas() if r.softmask is not None else {}
            metrics.log(
                step=r.step,
                loss=loss,
                lr=r.optimizer.param_groups[0]["lr"],
                grad_norm=norm,
                tokens_per_second=round(rate, 1),
                **omegas,
            )
            bar.set_postfix(loss=f"{loss:.3f}", **{n: f"{v:.3g}" for n, v in omegas.items()})
        if r.step % args.save_every == 0 or last:
            r.save(out)
        if not signum and (r.step % args.eval_every == 0 or r.step == args.steps):
            report(r, blocks, metrics, bar)
        if r.step % args.log_every == 0:
            clock, at = time.perf_counter(), r.step
        if signum and r.step < args.steps:
            return signum
    return 0


def print_samples(r: Run) -> None:
    """Two short samples of the averaged weights."""
    length, seeds = r.args.block_size, [r.args.seed, r.args.seed + 1]
    x = torch.full((2, length), r.model.mask_id, device=r.device)
    with r.ema.applied():
        how = Strategy(top_p=0.9)
        nfe = min(length, 128)
        x, _ = generate(r.model.eval(), x, nfe, r.softmask, how, seeds=seeds, dtype=r.dtype)
    for i, ids in enumerate(x.tolist()):
        print(f"--- sample {i}\n{decode(r.corpus.tokenizer, ids)}")


def report(r: Run, blocks: Tensor, metrics: Metrics, bar) -> None:
    """Validate, log and print one line."""
    r.scores = scores = validate(r, blocks)
    if r.world.rank > 0:
        return
    metrics.log(step=r.step, **scores)
    sizes = token_bytes(r.corpus.tokenizer)
    nats = scores.get("val_nelbo_2pass", scores["val_nelbo_1pass"])
    line = (
        f"step {r.step}: validation {nats:.4f} nats a token, perplexity {perplexity(nats):.2f}, "
        f"{bits_per_byte(nats, blocks, sizes):.4f} bits per byte"
    )
    if r.softmask is not None:
        line += f" in two passes, {scores['val_nelbo_1pass']:.4f} nats in one"
    bar.write(line, file=sys.stdout)
    sys.stdout.flush()


# The command line

# What a run keeps when it is resumed.
FIXED = (
    "sm k sm_start config block_size tokenizer time_conditioning seed global_batch data init"
).split()

PRESETS = {  # section 4.1 and appendix A.1
    "paper": dict(
        config="small", tokenizer="gpt2", steps=100_000, batch_size=32, global_batch=512, lr=3e-4,
        lr_sm=1e-2, warmup=2500, decay=0.0, clip=1.0, ema=0.9999, dropout=0.1, b_l=1e-3, b_h=1.0,
        k="3", p_sm=0.8, sm_start=0, omega_s=1e-6, eval_every=1000, save_every=1000, log_every=50,
        data="openwebtext",
    )
}  # fmt: skip


def parser() -> Parser:
    p = Parser(description="Train a masked diffusion language model, soft-masked or binary.")
    p.add_argument("--preset", choices=list(PRESETS), help="the paper's numbers as defaults")
    # fmt: off
    add = p.add_argument_group("method").add_argument
    add("--sm", action="store_true", help="soft-masking, in two passes; else binary")
    add("--k", help="tokens fed back, default 3; V: all, with a trained temperature")
    add("--p-sm", type=float, default=0.8, help="share of sequences with a first pass")
    add("--sm-start", type=int,
        help="steps before the first passes begin; default: half of --steps, 0 with --init")
    add("--omega-s", type=float, default=1e-2, help="start of omega_s")
    add("--b-l", type=float, default=0.1, help="times are drawn from [b_l, b_h]")
    add("--b-h", type=float, default=B_H)
    add = p.add_argument_group("run").add_argument
    add("--out", default="out", help="folder of the run")
    add("--init", help="start a new run from the weights of this checkpoint")
    add("--init-weights", choices=("raw", "ema"), default="raw", help="which of its weights")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="start over where --out holds a run")
    add("--seed", type=int, default=1)
    add = p.add_argument_group("text").add_argument
    add("--data", help="openwebtext, or a text, JSONL or parquet file, or a folder of these; "
        "default: the standard library's source")
    add("--tokenizer", help="stdlib, gpt2 or bytes; default stdlib, for openwebtext gpt2, with "
        "--init the checkpoint's")
    add("--cache", default="corpora", help="folder of tokenized corpora")
    add("--block-size", type=int, help="tokens of a sequence; default: the network's")
    add = p.add_argument_group("network").add_argument
    add("--config", choices=list(SIZES), help="size; default cpu; with --init the checkpoint's")
    add("--dropout", type=float, default=0.0)
    add("--time-conditioning", action="store_true", help="tell the network sigma")
    add = p.add_argument_group("optimiser").add_argument
    add("--steps", type=int, default=1800)
    add("--batch-size", type=int, default=16, help="sequences of a process's backward pass")
    add("--grad-accum", type=int, default=1, help="backward passes of a step")
    add("--global-batch", type=int,
        help="sequences of a step; sets --grad-accum; default: those of all processes")
    add("--lr", type=float, default=1e-3, help="learning rate of the backbone")
    add("--lr-sm", type=float, default=1e-2, help="learning rate of the omegas")
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--decay", type=float, default=0.5, help="last share of the steps, linear to 0")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add("--ema", type=float, default=0.9999, help="decay of the weights' average")
    add = p.add_argument_group("reports").add_argument
    add("--eval-every", type=int, default=600, help="steps between validations")
    add("--eval-batches", type=int, default=20, help=f"of {EVAL_BATCH} held-out sequences")
    add("--log-every", type=int, default=10, help="steps between lines of metrics")
    add("--save-every", type=int, default=300, help="steps between checkpoints")
    add = p.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    add("--compile", action="store_true", help="torch.compile the network")
    # fmt: on
    return p


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; with --resume those of the run, changed where a flag says so."""
    p = parser()
    args = p.parse_args(argv)
    if args.preset:
        numbers = dict(PRESETS[args.preset])
        if args.init:
            numbers = {n: v for n, v in numbers.items() if n not in ("config", "tokenizer")}
        p.set_defaults(**numbers)
        args = p.parse_args(argv)
    args.state = None
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and (Path(args.out) / "ckpt.pt").is_file():
        argv = [a for a in argv if a != "--overwrite"]  # torchrun started the same command again
        args.resume = True
    if args.resume:
        if not (Path(args.out) / "ckpt.pt").is_file():
            raise ValueError(f"--resume: no run in --out {args.out}; start one without --resume")
        state = load_checkpoint(args.out, "--resume --out")
        p.set_defaults(**state["args"])
        args = p.parse_args([*argv, "--resume"])
        args.state = state
        for name in FIXED:
            value = state["args"].get(name)
            if getattr(args, name) != value:
                raise ValueError(
                    f"{given(args, name)}: the run has {value}; drop it, or start a new "
                    "run from its weights with --init"
                )
    elif args.init:
        if args.config or args.sm_start:
            flag = given(args, "config" if args.config else "sm_start")
            raise ValueError(f"{flag}: for a network from scratch; drop it or --init")
        args.sm_start = 0
    else:
        args.config, args.tokenizer = (
            args.config or "cpu",
            args.tokenizer or default_tokenizer(args.data),
        )
        args.sm_start = args.steps // 2 if args.sm_start is None else args.sm_start
    check(args)
    return args


def given(args: argparse.Namespace, name: str) -> str:
    """A flag and its value, as a person would write them."""
    return f"--{name.replace('_', '-')} {getattr(args, name)}"


def saved_args(args: argparse.Namespace) -> dict:
    """What a checkpoint keeps of the arguments: all but those of this one call."""
    of_the_call = ("state", "resume", "overwrite", "out")
    return {name: value for name, value in vars(args).items() if name not in of_the_call}


def check(args: argparse.Namespace) -> None:
    """ValueError that names the flag whose value cannot be."""
    counts = "steps batch_size grad_accum eval_every eval_batches log_every save_every block_size"
    rules = [(counts, "at least 1", lambda v: v >= 1)]
    rules += [("p_sm dropout decay ema", "between 0 and 1", lambda v: 0 <= v <= 1)]
    rules += [("omega_s", "between 0 and 1, both excluded", lambda v: 0 < v < 1)]
    rules += [("lr lr_sm clip", "above 0", lambda v: v > 0)]
    rules += [("seed", "from 0 to 2^62", lambda v: 0 <= v < 2**62)]
    for names, wanted, holds in rules:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ValueError(f"{given(args, name)}: {wanted}")
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite: one of them")
    if not 0 < args.b_l < args.b_h <= 1:
        raise ValueError(f"--b-l {args.b_l} --b-h {args.b_h}: need 0 < b_l < b_h <= 1")


if __name__ == "__main__":
    run(lambda argv: main(parse(argv)), sys.argv[1:])

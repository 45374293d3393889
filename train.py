"""Pretraining, from scratch or continued (Algorithm 1); without --sm the binary baseline.

    python train.py --sm                                  # from scratch, on the standard library
    python train.py --sm --init base/ckpt.pt --out sm     # a trained model learns soft-masking
    python train.py --resume --out sm                     # go on with a stopped run

OUT receives `ckpt.pt`, `softmask.json` (the omegas) and `metrics.jsonl`.
"""

import argparse
import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Corpus, decode, open_corpus, token_bytes, vocab_size
from model import SIZES, DiT, DiTConfig
from runtime import (
    StopSignal, atomic_write, autocast, generator, pick_device, pick_dtype, progress, run,
    writable_folder,
)
from sample import generate
from softmask import SoftMask, antithetic_times, diffusion_loss, entropy_quantile, soft_sequences
from weights import build_model, build_softmask, load_checkpoint, save_checkpoint

EVAL_BATCH = 32  # sequences of a validation batch: times are stratified within it
EVAL_SEED = 1234  # the masks of validation are the same in every run
B_L, B_H = 1e-3, 1.0  # times of pretraining and validation


class EMA:
    """Moving average of the parameters: shadow -= (1 - d)(shadow - p), d = min(decay, (1+n)/(10+n))."""

    def __init__(self, parameters, decay: float):
        self.parameters = list(parameters)
        self.decay, self.updates = decay, 0
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - d)

    @contextmanager
    def applied(self):
        """Within this context the parameters are the averages."""
        own = [p.data for p in self.parameters]
        try:
            for p, shadow in zip(self.parameters, self.shadow, strict=True):
                p.data = shadow
            yield
        finally:
            for p, data in zip(self.parameters, own, strict=True):
                p.data = data


def learning_rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """The factor of both learning rates at `step` (from 0): linear warm-up, constant, and over the
    last `decay` share of the steps a linear fall towards 0."""
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (steps - step) / (decay * steps) if decay > 0 else 1.0
    return min(rise, fall, 1.0)


def training_step(
    model, softmask: SoftMask | None, corpus: Corpus, g: torch.Generator, args, device, dtype
) -> Tensor:
    """Gradients of one global batch: draws everything from g, accumulates, returns the loss (nats a
    token). g alone decides data, times, masks and soft-masked sequences."""
    n = args.batch_size * args.grad_accum
    x0 = corpus.batch(n, args.block_size, g)  # (n, L)
    t = antithetic_times(torch.rand(n, generator=g), args.b_l, args.b_h)  # (n,)
    noise = torch.rand(n, args.block_size, generator=g)
    u = torch.rand((), generator=g, dtype=torch.float64).item()
    soft = soft_sequences(u, n, args.p_sm)  # (n,)
    loss = torch.zeros((), device=device)
    for part in range(args.grad_accum):
        x, time_, noise_, soft_ = (v[part :: args.grad_accum].to(device) for v in (x0, t, noise, soft))
        with autocast(device, dtype):
            part_loss = diffusion_loss(model, x, time_, noise_, softmask, soft_) / x0.numel()
        part_loss.backward()
        loss += part_loss.detach()
    return loss


@torch.no_grad()
def nelbo(
    model, blocks: Tensor, softmask: SoftMask | None, passes: int, device, dtype, desc: str = ""
) -> tuple[float, float]:
    """NELBO in nats a token over blocks (n, L), and its standard error over batches.

    Two passes soft-mask every sequence, one pass none. Times and masks depend on the blocks' number
    and shape alone, so that models can be compared.
    """
    model.eval()
    g = generator(EVAL_SEED)
    sums, counts = [], []
    for x0 in progress(blocks.split(EVAL_BATCH), desc=desc or "validating", leave=False):
        n = len(x0)
        t = antithetic_times(torch.rand(n, generator=g), B_L, B_H).to(device)
        noise = torch.rand(x0.shape, generator=g).to(device)
        soft = torch.ones(n, dtype=torch.bool, device=device)
        with autocast(device, dtype):
            head = softmask if passes == 2 else None
            loss = diffusion_loss(model, x0.to(device), t, noise, head, soft)
        sums.append(loss.item())
        counts.append(x0.numel())
    model.train()
    mean = sum(sums) / sum(counts)
    n = len(sums)
    spread = sum((s / c - mean) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(spread / (n * (n - 1))) if n > 1 else math.nan


def bits_per_byte(nats_per_token: float, blocks: Tensor, sizes: Tensor) -> float:
    """From nats a token of blocks (n, L) to bits per UTF-8 byte of their text."""
    return nats_per_token * blocks.numel() / (int(sizes[blocks].sum()) * math.log(2))


def validate(model, softmask, ema, blocks, device, dtype) -> dict[str, float]:
    """Validation NELBO with EMA weights: one pass, and for a soft-masked model two."""
    with ema.applied():
        scores = {"val_nelbo_1pass": nelbo(model, blocks, None, 1, device, dtype)[0]}
        if softmask is not None:
            scores["val_nelbo_2pass"] = nelbo(model, blocks, softmask, 2, device, dtype)[0]
    return scores


def start_omegas(model, k: int | None, corpus: Corpus, args, device, dtype) -> SoftMask:
    """A new soft mask. Over a trained model LB is measured on 64 held-out sequences at training
    times; from scratch it is the paper's -1.5."""
    if not args.init:
        return SoftMask(k, args.omega_s)
    blocks = corpus.blocks("val", args.block_size, 64).to(device)
    g = generator(EVAL_SEED)
    t = antithetic_times(torch.rand(len(blocks), generator=g), args.b_l, args.b_h).to(device)
    noise = torch.rand(blocks.shape, generator=g).to(device)
    model.eval()
    with autocast(device, dtype):
        bound = entropy_quantile(model, blocks, t, noise, 0.05)
    model.train()
    return SoftMask(k, args.omega_s, bound)


def metrics_up_to(path: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl that a checkpoint at `step` knows of; half a line is dropped."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            pass
    return kept


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    check(args)
    k = None if args.k in ("V", "all") else int(args.k)
    state = args.state
    init = load_checkpoint(args.init, "--init") if args.init and not state else None
    source = state or init
    if (Path(args.out) / "ckpt.pt").exists() and not (state or args.overwrite):
        raise ValueError(
            f"--out {args.out}: holds a run; go on with it by --resume, start it over by --overwrite, "
            "or choose another folder"
        )
    out = writable_folder(args.out, "--out")

    corpus = open_corpus(args.data, source["tokenizer"] if source else args.tokenizer, args.cache)
    if init and args.tokenizer not in (None, source["tokenizer"]["name"]):
        raise ValueError(
            f"--tokenizer {args.tokenizer}: the checkpoint was made with {source['tokenizer']['name']}"
        )
    size = vocab_size(corpus.tokenizer)
    if k is not None and not 1 <= k <= size:
        raise ValueError(f"--k {args.k}: from 1 to the vocabulary's {size}, or V for all of it")

    torch.manual_seed(args.seed)
    if source:
        changes = {"dropout": args.dropout}
        if args.time_conditioning:
            changes["time_conditioning"] = True
        model = build_model(source, ema=False, **changes)
        args.block_size = args.block_size or model.config.block_size
    else:
        sizes = dict(SIZES[args.config or "cpu"])
        args.block_size = sizes["block_size"] = args.block_size or sizes["block_size"]
        model = DiT(DiTConfig(size, dropout=args.dropout, time_conditioning=args.time_conditioning, **sizes))
    if args.block_size > model.config.block_size:
        raise ValueError(f"--block-size {args.block_size}: the network takes {model.config.block_size}")
    for split in ("train", "val"):
        corpus.need(split, args.block_size)
    model.to(device).train()

    softmask = None
    if state:
        softmask = build_softmask(state)
    elif args.sm:
        softmask = build_softmask(init) if init else None
        softmask = softmask or start_omegas(model, k, corpus, args, device, dtype)
    if softmask is not None:
        softmask.to(device)
    ema = EMA(model.parameters(), args.ema)
    groups = [{"params": list(model.parameters()), "peak": args.lr}]
    if softmask is not None:
        groups.append({"params": list(softmask.parameters()), "peak": args.lr_sm})
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    g, step = generator(args.seed), 0
    if state:
        step = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(optimizer.param_groups, (args.lr, args.lr_sm), strict=False):
            group["peak"] = peak
        ema.updates = state["updates"]
        for shadow, saved in zip(ema.shadow, state["ema"], strict=True):
            shadow.copy_(saved)
        g.set_state(state["generator"])
        set_rng(state["rng"][0], device)
    if args.compile:
        model.hidden = torch.compile(model.hidden)

    blocks = corpus.blocks("val", args.block_size, args.eval_batches * EVAL_BATCH)
    sizes = token_bytes(corpus.tokenizer)
    metrics_path = out / "metrics.jsonl"
    with atomic_write(metrics_path, "w") as f:
        f.writelines(metrics_up_to(metrics_path, step) if state else [])
    metrics = open(metrics_path, "a", buffering=1)

    def log(**entry) -> None:
        metrics.write(json.dumps(entry) + "\n")

    def save() -> None:
        save_checkpoint(out, {
            "config": model.config.to_dict(), "model": model.state_dict(), "ema": ema.shadow,
            "updates": ema.updates, "step": step, "optimizer": optimizer.state_dict(),
            "softmask": softmask and {"k": softmask.k, "state": softmask.state_dict()},
            "generator": g.get_state(), "rng": [get_rng(device)],
            "tokenizer": corpus.meta["tokenizer"], "args": saved_args(args),
        }, softmask)

    def evaluate() -> dict[str, float]:
        scores = validate(model, softmask, ema, blocks, device, dtype)
        log(step=step, **scores)
        best = scores.get("val_nelbo_2pass", scores["val_nelbo_1pass"])
        bar.write(
            f"step {step}: validation NELBO {best:.4f} nats a token, perplexity {math.exp(best):.2f}, "
            f"{bits_per_byte(best, blocks, sizes):.4f} bits per byte"
            + (f"; in one pass {scores['val_nelbo_1pass']:.4f}" if softmask is not None else ""),
            file=sys.stdout,
        )
        sys.stdout.flush()
        return scores

    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count:,} parameters, {corpus.meta['tokens']['train']:,} training tokens, vocabulary {size}, "
        f"{'soft-masked, k ' + str(args.k) if softmask is not None else 'binary'}, {device.type} {dtype}".replace("torch.", "")
    )
    tokens = args.batch_size * args.grad_accum * args.block_size
    scores, since, since_step = None, time.perf_counter(), step
    with StopSignal() as stop, progress(total=args.steps, initial=step, desc="training") as bar:
        if init:
            evaluate()
        while step < args.steps:
            factor = learning_rate(step, args.steps, args.warmup, args.decay)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            loss = training_step(model, softmask, corpus, g, args, device, dtype)
            norm = nn.utils.clip_grad_norm_(parameters, args.clip)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                kept = f"{out / 'ckpt.pt'} still holds the last save" if (out / "ckpt.pt").exists() else "nothing was saved yet"
                raise ValueError(
                    f"--out {out}: loss {loss.item()}, gradient norm {norm.item()} at step {step + 1}; "
                    f"{kept}; try a lower --lr, a lower --clip or --dtype float32"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update()
            step += 1
            bar.update()
            if step % args.log_every == 0 or step == args.steps:
                now = time.perf_counter()
                rate = (step - since_step) * tokens / (now - since)
                since, since_step = now, step
                omegas = softmask.omegas() if softmask is not None else {}
                log(
                    step=step, loss=loss.item(), lr=optimizer.param_groups[0]["lr"],
                    grad_norm=norm.item(), tokens_per_second=round(rate, 1), **omegas,
                )
                bar.set_postfix({"loss": f"{loss.item():.3f}"} | {n: f"{v:.3g}" for n, v in omegas.items()})
            if step % args.eval_every == 0 or step == args.steps:
                scores = evaluate()
                since, since_step = time.perf_counter(), step
            if stop.signum is not None or step % args.save_every == 0 or step == args.steps:
                save()
                since, since_step = time.perf_counter(), step
            if stop.signum is not None:
                bar.close()
                again = " ".join(["python train.py --resume", *(["--out", args.out] if args.out != "out" else [])])
                name = signal.Signals(stop.signum).name
                print(f"train.py: {name}: saved step {step} in {out}; go on with: {again}", file=sys.stderr)
                return 128 + stop.signum
    metrics.close()
    if scores is None:
        scores = validate(model, softmask, ema, blocks, device, dtype)
    print(final_table(scores, blocks, sizes, softmask))
    with ema.applied():
        print_samples(model.eval(), softmask, corpus.tokenizer, args, device, dtype)
    return 0


def final_table(scores: dict, blocks: Tensor, sizes: Tensor, softmask: SoftMask | None) -> str:
    rows = [f"{'validation':12}{'nats a token':>14}{'perplexity':>12}{'bits per byte':>15}"]
    for key, name in (("val_nelbo_1pass", "one pass"), ("val_nelbo_2pass", "two passes")):
        if key in scores:
            nats = scores[key]
            bpb = bits_per_byte(nats, blocks, sizes)
            rows.append(f"{name:12}{nats:14.4f}{math.exp(nats):12.2f}{bpb:15.4f}")
    if softmask is not None:
        rows.append("  ".join(f"{n} {v:.4f}" for n, v in softmask.omegas().items()))
    return "\n".join(rows)


def print_samples(model, softmask, tokenizer, args, device, dtype) -> None:
    x = torch.full((2, args.block_size), model.mask_id, device=device)
    x, _ = generate(model, x, args.block_size, softmask, top_p=0.9, seeds=[args.seed, args.seed + 1], dtype=dtype)
    for i, ids in enumerate(x.tolist()):
        print(f"--- sample {i}\n{decode(tokenizer, ids)}")


def get_rng(device) -> dict:
    """The state of the generators that dropout draws from."""
    return {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )


def set_rng(rng: dict, device) -> None:
    torch.set_rng_state(rng["cpu"])
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)


FIXED = ("sm", "k", "config", "block_size", "tokenizer", "time_conditioning", "seed")  # a run's own


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Train a masked diffusion language model, soft-masked or binary.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    g = p.add_argument_group("method")
    g.add_argument("--sm", action="store_true", help="soft-masking, in two passes; else binary")
    g.add_argument("--k", default="3", help="tokens fed back; V: all, with a trained temperature")
    g.add_argument("--p-sm", type=float, default=0.8, help="share of sequences with a first pass")
    g.add_argument("--omega-s", type=float, default=1e-2, help="start of omega_s")
    g.add_argument("--b-l", type=float, default=B_L, help="times are drawn from [b_l, b_h]")
    g.add_argument("--b-h", type=float, default=B_H)
    g = p.add_argument_group("run")
    g.add_argument("--out", default="out", help="folder of the run")
    g.add_argument("--init", help="start a new run from the weights of this checkpoint")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out")
    g.add_argument("--overwrite", action="store_true", help="start over where --out holds a run")
    g.add_argument("--seed", type=int, default=1)
    g = p.add_argument_group("text")
    g.add_argument("--data", help="text, JSONL or folder; default: the standard library's source")
    g.add_argument("--tokenizer", help="stdlib (default), gpt2 or bytes; with --init the checkpoint's")
    g.add_argument("--cache", default="corpora", help="folder of tokenized corpora")
    g.add_argument("--block-size", type=int, help="tokens of a sequence; default: the network's")
    g = p.add_argument_group("network")
    g.add_argument("--config", choices=list(SIZES), help="size; default cpu; with --init the checkpoint's")
    g.add_argument("--dropout", type=float, default=0.0)
    g.add_argument("--time-conditioning", action="store_true", help="tell the network sigma")
    g = p.add_argument_group("optimiser")
    g.add_argument("--steps", type=int, default=2000)
    g.add_argument("--batch-size", type=int, default=32, help="sequences of a backward pass")
    g.add_argument("--grad-accum", type=int, default=1, help="backward passes of a step")
    g.add_argument("--lr", type=float, default=2e-3, help="learning rate of the backbone")
    g.add_argument("--lr-sm", type=float, default=1e-2, help="learning rate of the omegas")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    g.add_argument("--decay", type=float, default=0.0, help="last share of the steps, linear to 0")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    g.add_argument("--ema", type=float, default=0.9999, help="decay of the weights' average")
    g = p.add_argument_group("reports")
    g.add_argument("--eval-every", type=int, default=500)
    g.add_argument("--eval-batches", type=int, default=10, help=f"of {EVAL_BATCH} held-out sequences")
    g.add_argument("--log-every", type=int, default=10)
    g.add_argument("--save-every", type=int, default=500)
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    g.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    g.add_argument("--compile", action="store_true", help="torch.compile the network")
    return p


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; with --resume those of the run, changed where a flag says so."""
    p = parser()
    args = p.parse_args(argv)
    args.state = None
    if args.resume:
        if not (Path(args.out) / "ckpt.pt").is_file():
            raise ValueError(f"--resume: no run in --out {args.out}; start one without --resume")
        state = load_checkpoint(args.out, "--resume --out")
        p.set_defaults(**state["args"])
        args = p.parse_args(argv)
        args.state = state
        for name in FIXED:
            if getattr(args, name) != state["args"][name]:
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{flag} {getattr(args, name)}: the run has {state['args'][name]}; drop the flag, or "
                    "start a new run from its weights with --init"
                )
    return args


def saved_args(args: argparse.Namespace) -> dict:
    keep_out = ("state", "resume", "overwrite", "out")
    return {name: value for name, value in vars(args).items() if name not in keep_out}


def check(args: argparse.Namespace) -> None:
    """ValueError that names the flag whose value cannot be."""
    at_least_1 = ("steps", "batch_size", "grad_accum", "eval_every", "eval_batches", "log_every", "save_every")
    for name in (*at_least_1, "block_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
    for name in ("p_sm", "dropout", "decay", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: between 0 and 1")
    if not 0 < args.omega_s < 1:
        raise ValueError(f"--omega-s {args.omega_s}: between 0 and 1, both excluded")
    if not 0 < args.b_l < args.b_h <= 1:
        raise ValueError(f"--b-l {args.b_l} --b-h {args.b_h}: need 0 < b_l < b_h <= 1")
    for name in ("lr", "lr_sm", "clip"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: above 0")


if __name__ == "__main__":
    run(lambda argv: main(parse(argv)), sys.argv[1:])

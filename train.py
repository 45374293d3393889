"""Pretraining, from scratch or continued (Algorithm 1); without --sm the binary baseline.

    python train.py --sm                                  # from scratch, on the standard library
    python train.py --sm --init base/ckpt.pt --out sm     # a trained model learns soft-masking
    python train.py --resume --out sm                     # go on with a stopped run

OUT receives `ckpt.pt`, `softmask.json` (the omegas) and `metrics.jsonl`.
"""

import argparse
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import Corpus, decode, default_tokenizer, open_corpus, token_bytes, vocab_size
from decoding import Strategy, generate
from model import SIZES, DiT, DiTConfig
from runtime import (
    Parser,
    generator,
    join_world,
    pick_device,
    pick_dtype,
    run,
)
from softmask import SoftMask
from training import (
    EMA,
    Batch,
    Objective,
    Run,
    check,
    draw_masks,
    draw_soft,
    drive,
    given,
    mode,
    parse_k,
    perplexity,
    recall,
    refuse_to_overwrite,
    score_of,
    share_batch,
    shared_flags,
    start_omegas,
)
from weights import build_model, build_softmask, load_checkpoint

EVAL_BATCH = 32  # sequences of a validation batch: its times are stratified


# The run


@dataclass(kw_only=True)
class Pretraining(Run):
    """A run over blocks of a corpus, all of whose tokens are masked and predicted."""

    corpus: Corpus

    def draw(self) -> tuple[float, list[Batch]]:
        a, g, n = self.args, self.g, self.args.global_batch
        x0 = self.corpus.batch(n, a.block_size, g)  # (n, L), line 2
        t, noise = draw_masks(x0, g, a.b_l, a.b_h)  # (n,) and (n, L), line 3
        soft = draw_soft(self, n)  # (n,)
        parts = a.grad_accum * self.world.size
        mine = range(self.world.rank, parts, self.world.size)
        self.tokens += x0.numel()
        return x0.numel(), [tuple(v[i::parts] for v in (x0, t, noise, soft)) for i in mine]

    def factor(self) -> float:
        return learning_rate(self.step, self.args.steps, self.args.warmup, self.args.decay)

    def blocks(self, n: int | None = None) -> Tensor:
        n = self.args.eval_batches * EVAL_BATCH if n is None else n
        return self.corpus.blocks("val", self.args.block_size, n)

    def held_out(self, n: int | None = None) -> list[Batch]:
        return in_batches(self.blocks(n))

    def described(self) -> str:
        return (
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {mode(self)}, "
            f"vocabulary {self.model.vocab_size}, {self.corpus.meta['tokens']['train']:,} training "
            f"tokens"
        )

    def own_state(self) -> dict:
        meta = self.corpus.meta
        weights = self.model.state_dict()
        return {"model": weights, "tokenizer": meta["tokenizer"], "text": meta["fingerprint"]}

    def bits_per_byte(self, nats: float) -> float:
        return bits_per_byte(nats, self.blocks(), token_bytes(self.corpus.tokenizer))

    def table(self) -> str:
        lines = [f"{'validation':12}{'nats a token':>14}{'perplexity':>12}{'bits per byte':>15}"]
        for key, name in (("val_nelbo_1pass", "one pass"), ("val_nelbo_2pass", "two passes")):
            if key in self.scores:
                nats = self.scores[key]
                bpb = self.bits_per_byte(nats)
                lines.append(f"{name:12}{nats:14.4f}{perplexity(nats):12.2f}{bpb:15.4f}")
        return "\n".join(lines)

    def line(self) -> str:
        nats = score_of(self.scores)
        line = (
            f"step {self.step}: validation {nats:.4f} nats a token, perplexity "
            f"{perplexity(nats):.2f}, {self.bits_per_byte(nats):.4f} bits per byte"
        )
        if self.softmask is not None:
            line += f" in two passes, {self.scores['val_nelbo_1pass']:.4f} nats in one"
        return line

    def finish(self) -> None:
        """Two short samples of the averaged weights."""
        length, seeds = self.args.block_size, [self.args.seed, self.args.seed + 1]
        x = torch.full((2, length), self.model.mask_id, device=self.device)
        nfe, how = min(length, 128), Strategy(top_p=0.9)
        with self.ema.applied():
            model = self.model.eval()
            x, _ = generate(model, x, nfe, self.softmask, how, seeds=seeds, dtype=self.dtype)
        for i, ids in enumerate(x.tolist()):
            print(f"--- sample {i}\n{decode(self.corpus.tokenizer, ids)}")


def in_batches(blocks: Tensor) -> list[Batch]:
    return [(x0,) for x0 in blocks.split(EVAL_BATCH)]


def bits_per_byte(nats: float, blocks: Tensor, sizes: Tensor) -> float:
    """From nats a token of blocks (n, L) to bits a UTF-8 byte; sizes (V,) from `token_bytes`."""
    return nats * blocks.numel() / (int(sizes[blocks].sum()) * math.log(2))


def learning_rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """The factor of both learning rates at `step` (from 0): linear warm-up, then constant, and over
    the last `decay` share of all steps a linear fall towards 0."""
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (steps - step) / (decay * steps) if decay > 0 else 1.0
    return min(rise, fall, 1.0)


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
    whole = Pretraining(
        args=args, world=world, device=device, dtype=dtype, model=model, softmask=softmask,
        objective=objective, optimizer=optimizer, g=generator(args.seed), ema=ema, corpus=corpus,
        warm=init is not None,
    )  # fmt: skip
    if args.state:
        if args.state["text"] != corpus.meta["fingerprint"] and world.rank == 0:
            print(f"{corpus.meta['source']} has changed since the run was stopped", file=sys.stderr)
        whole.restore(args.state)
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
    group = shared_flags(p)
    # fmt: off
    add = group["method"]
    add("--sm", action="store_true", help="soft-masking, in two passes; else binary")
    add("--sm-start", type=int,
        help="steps before the first passes begin; default: half of --steps, 0 with --init")
    add = group["run"]
    add("--init", help="start a new run from the weights of this checkpoint")
    add("--init-weights", choices=("raw", "ema"), default="raw", help="which of its weights")
    add = group["text"]
    add("--data", help="openwebtext, or a text, JSONL or parquet file, or a folder of these; "
        "default: the standard library's source")
    add("--tokenizer", help="stdlib, gpt2 or bytes; default stdlib, for openwebtext gpt2, with "
        "--init the checkpoint's")
    add("--block-size", type=int, help="tokens of a sequence; default: the network's")
    add = group["network"]
    add("--config", choices=list(SIZES), help="size; default cpu; with --init the checkpoint's")
    add("--dropout", type=float, default=0.0)
    add("--time-conditioning", action="store_true", help="tell the network sigma")
    add = group["optimiser"]
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--decay", type=float, default=0.5, help="last share of the steps, linear to 0")
    add("--ema", type=float, default=0.9999, help="decay of the weights' average")
    group["reports"]("--eval-batches", type=int, default=20,
        help=f"of {EVAL_BATCH} held-out sequences")
    group["machine"]("--compile", action="store_true", help="torch.compile the network")
    p.set_defaults(omega_s=0.3)  # a short run has no time to climb from near 0
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
    args = recall(p, argv, FIXED, tuning=False)
    if args.init and not args.resume:
        if args.config or args.sm_start:
            flag = given(args, "config" if args.config else "sm_start")
            raise ValueError(f"{flag}: for a network from scratch; drop it or --init")
        args.sm_start = 0
    elif not args.resume:
        args.config, args.tokenizer = (
            args.config or "cpu",
            args.tokenizer or default_tokenizer(args.data),
        )
        args.sm_start = args.steps // 2 if args.sm_start is None else args.sm_start
    check(args)
    return args


def main(args: argparse.Namespace) -> int:
    refuse_to_overwrite(args, Pretraining.files)
    return drive(set_up(args), "train.py")


if __name__ == "__main__":
    run(lambda argv: main(parse(argv)), sys.argv[1:])

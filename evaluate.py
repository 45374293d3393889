"""Evaluation.

    python evaluate.py ppl --ckpt out/ckpt.pt                   # the held-out part of its corpus
    python evaluate.py ppl --ckpt out/ckpt.pt --data book.txt --passes 1

`ppl`: the NELBO, an upper bound on the negative log-likelihood (section 2.1), in nats a token, as
perplexity and as bits per byte, with EMA weights. A soft-masked model takes two passes.
"""

import argparse

import torch

from data import open_corpus, token_bytes
from runtime import Parser, pick_device, pick_dtype, run
from train import EVAL_BATCH, bits_per_byte, nelbo, perplexity
from weights import build_model, build_softmask, load_checkpoint


def ppl(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.batches is not None and args.batches < 1:
        raise ValueError(f"--batches {args.batches}: at least 1")
    state = load_checkpoint(args.ckpt, "--ckpt")
    softmask = build_softmask(state)
    passes = args.passes or (1 if softmask is None else 2)
    if passes == 2 and softmask is None:
        raise ValueError("--passes 2: a binary checkpoint has one pass; it holds no soft mask")
    model = build_model(state, ema=not args.raw_weights).to(device)
    corpus = open_corpus(args.data or state["args"]["data"], state["tokenizer"], args.cache)
    length = args.block_size
    if length is None:
        length = state["args"]["block_size"] or model.config.block_size
    if not 1 <= length <= model.config.block_size:
        raise ValueError(f"--block-size {length}: the network takes 1 to {model.config.block_size}")
    splits = {"all": ("train", "val")}.get(args.split, (args.split,))
    if args.split is None:
        splits = ("train", "val") if args.data else ("val",)
    limit = args.batches and args.batches * EVAL_BATCH
    blocks = torch.cat([corpus.blocks(split, length, limit) for split in splits])
    if not len(blocks):
        corpus.need(splits[-1], length)
    if limit and limit < len(blocks):
        blocks = blocks[torch.arange(limit) * len(blocks) // limit]
    if softmask is not None:
        softmask.to(device)
    nats, error = nelbo(model, blocks, softmask if passes == 2 else None, device, dtype)
    bpb = bits_per_byte(nats, blocks, token_bytes(corpus.tokenizer))
    ratio = bpb / nats
    where = f"{corpus.meta['source']} ({'+'.join(splits)})"
    print(f"{where}: {blocks.numel():,} tokens in blocks of {length}")
    print(f"{'passes':>6}{'NELBO, nats a token':>28}{'perplexity':>22}{'bits per byte':>22}")
    cells = (
        (nats, error, 4),
        (perplexity(nats), perplexity(nats) * error, 2),
        (bpb, ratio * error, 4),
    )
    widths = (28, 22, 22)
    shown = [f"{v:.{d}f} +- {e:.{d}f}".rjust(w) for (v, e, d), w in zip(cells, widths, strict=True)]
    print(f"{passes:>6}{''.join(shown)}")


def parser() -> Parser:
    p = Parser(description="Evaluate a model.")
    commands = p.add_subparsers(required=True, metavar="what")
    c = commands.add_parser(
        "ppl",
        help="NELBO, perplexity and bits per byte",
    )
    c.set_defaults(main=ppl)
    c.add_argument("--ckpt", default="out/ckpt.pt", help="a checkpoint, or its folder")
    c.add_argument("--data", help="text, JSONL or folder; default: the corpus of the checkpoint")
    c.add_argument("--split", choices=("train", "val", "all"), help="default: val; all with --data")
    c.add_argument("--passes", type=int, choices=(1, 2), help="default: 2 for a soft-masked model")
    c.add_argument(
        "--batches", type=int, help=f"of {EVAL_BATCH} blocks, evenly spread; default: all"
    )
    c.add_argument("--block-size", type=int, help="tokens of a block; default: as in training")
    c.add_argument("--raw-weights", action="store_true", help="the raw weights, not their average")
    c.add_argument("--cache", default="corpora", help="folder of tokenized corpora")
    c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    c.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    run(args.main, args)

"""The quality of samples: how far they are from held-out text, and what it costs to write them.

The Jensen-Shannon divergence of n-grams, which neither repetition nor dull text makes small, and
unigram entropy; `tradeoff` sets them beside the tokens a second of blockwise decoding (figure 4).
"""

import argparse
import ast
import json
import statistics
import textwrap
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import torch

from data import decode, open_corpus, vocab_size
from decoding import Strategy, generate, seed_of
from runtime import pick_device, pick_dtype, writable_folder
from viz import plot_tradeoff
from weights import build_model, build_softmask, load_checkpoint


def ngrams(ids: np.ndarray, n: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct n-grams within the rows of ids (N, L), each as one number, and their shares."""
    if vocab_size**n >= 2**63:
        raise ValueError(f"{n}-grams of {vocab_size} ids do not fit in a number")
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), n, axis=1)
    numbers = windows @ vocab_size ** np.arange(n)
    values, counts = np.unique(numbers, return_counts=True)
    return values, counts / counts.sum()


def divergence(a: np.ndarray, b: np.ndarray, n: int, vocab_size: int) -> float:
    """Jensen-Shannon divergence, in bits from 0 to 1, of the n-grams of two sets of ids (N, L).

    Few samples alone make it large: compare sets of one size only.
    """
    (va, pa), (vb, pb) = (ngrams(ids, n, vocab_size) for ids in (a, b))
    both = np.union1d(va, vb)
    p, q = np.zeros(len(both)), np.zeros(len(both))
    p[np.searchsorted(both, va)], q[np.searchsorted(both, vb)] = pa, pb
    mean = (p + q) / 2

    def kl(x: np.ndarray) -> float:
        there = x > 0
        return float((x[there] * np.log2(x[there] / mean[there])).sum())

    return (kl(p) + kl(q)) / 2


def unigram_entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the tokens within a sample (N, L), the mean over samples."""
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in ids]
    return float(np.mean([-(p * np.log(p)).sum() for p in shares]))


def code_that_parses(text: str) -> bool:
    """Whether the whole lines of a piece of a file, shifted left together, are Python."""
    lines = text.split("\n")[1:-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(textwrap.dedent("\n".join(lines)))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return any(line.strip() for line in lines)


def read_samples(path: str, size: int) -> np.ndarray:
    """The ids (N, L) of a JSONL file of sample.py's; ValueError that names a line that is none."""
    rows = []
    with open(path, "rb") as f:
        for i, line in enumerate(f, start=1):
            try:
                ids = json.loads(line)["ids"]
                good = all(type(v) is int and 0 <= v < size for v in ids)
            except (ValueError, KeyError, TypeError, RecursionError):
                good = False
            if not good or (rows and len(ids) != len(rows[0])) or len(ids) < 3:
                what = f"3 or more ids below {size}, as many as in the first line"
                raise ValueError(f'{path}:{i}: no sample of sample.py\'s: "ids" with {what}')
            rows.append(ids)
    if not rows:
        raise ValueError(f"{path}: no samples in it")
    return np.array(rows)


def gen(args: argparse.Namespace) -> None:
    state = load_checkpoint(args.ckpt, "--ckpt")
    corpus = open_corpus(args.data or state["args"]["data"], state["tokenizer"], args.cache)
    size = vocab_size(corpus.tokenizer)
    sets = {path: read_samples(path, size) for path in args.samples}
    n, length = next(iter(sets.values())).shape
    for path, ids in sets.items():
        if ids.shape[1] != length:
            raise ValueError(f"{path}: samples of {ids.shape[1]} tokens beside those of {length}")
    real = corpus.blocks("val", length).numpy()
    if not len(real):
        corpus.need("val", length)
    few = corpus.blocks("train", length, n).numpy()
    head = f"{'2-grams':>8}{'3-grams':>9}{'entropy':>9}{'parse':>8}{'samples':>9}"
    print(f"{head}  of {length} tokens; divergences in bits, entropy in nats")
    for path, ids in {**sets, "(training text)": few, "(held-out text)": real}.items():
        pair = [divergence(ids, real, k, size) for k in (2, 3)]
        parse = np.mean([code_that_parses(decode(corpus.tokenizer, row)) for row in ids[:1000]])
        cells = f"{pair[0]:8.4f}{pair[1]:9.4f}{unigram_entropy(ids):9.3f}{parse:8.3f}"
        print(f"{cells}{len(ids):9}  {path}")


def tradeoff(args: argparse.Namespace) -> None:
    """Quality against speed of blockwise decoding (figure 4's shape): networks complete the second
    half of held-out blocks, with the dual cache; quality is the divergence of the halves' 3-grams
    from the text's. A table and a picture."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    for name in ("num", "seeds", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if min(args.blocks) < 1:
        raise ValueError(f"--blocks {min(args.blocks)}: at least 1")
    for share in (*args.budgets, *args.thresholds):
        if not 0 < share <= 1:
            raise ValueError(f"--budgets and --thresholds: {share:g} is not above 0, at most 1")
    if args.picture:
        writable_folder(Path(args.picture).parent, "--picture")
    ways = [("budget", share) for share in args.budgets]
    ways += [("threshold", share) for share in args.thresholds]
    points = []
    for place in args.ckpt:
        state = load_checkpoint(place, "CKPT")
        model = build_model(state, ema=True).to(device).eval()
        softmask = build_softmask(state)
        softmask = softmask.to(device) if softmask is not None else None
        corpus = open_corpus(state["args"]["data"], state["tokenizer"], args.cache)
        corpus.need("val", model.config.block_size)
        text = corpus.blocks("val", model.config.block_size, args.num)
        path = Path(place)
        name = path.parent.name if path.suffix == ".pt" and path.parent.name else path.name
        if not points:
            head = f"{'network':12}{'block':>6}{'steps':>15}{'passes':>8}{'tokens/s':>10}"
            print(f"{head}{'3-grams, bits':>19}{'entropy':>9}", flush=True)
        for way, block in product(ways, args.blocks):
            label, found = f"{way[0]} {way[1]:g}", []
            for seed in range(args.seeds):
                found.append(complete(model, softmask, text, block, way, seed, args, dtype))
            speed, passes, scores, entropy = zip(*found)
            mean, spread = statistics.mean(scores), statistics.pstdev(scores)
            print(
                f"{name:12}{block:6}{label:>15}{statistics.mean(passes):8.1f}"
                f"{statistics.mean(speed):10.0f}{mean:9.4f} +- {spread:.4f}"
                f"{statistics.mean(entropy):9.3f}",
                flush=True,
            )
            point = dict(speed=statistics.mean(speed), quality=mean, error=spread, label=str(block))
            points.append({"network": name, "decoding": label, **point})
    if args.picture:
        plot_tradeoff(points, "3-gram divergence, bits (lower is better)", args.picture)


def complete(model, softmask, text, block: int, way, seed: int, args, dtype) -> tuple:
    """The second halves of blocks (n, L), decoded in blocks by a ("budget" | "threshold", share):
    tokens a second, passes a batch, divergence from the text's halves, and entropy."""
    device, length = model.embedding.device, text.shape[1]
    given = length // 2
    start = text.index_fill(1, torch.arange(given, length), model.mask_id).to(device)
    how = Strategy("entropy", 1.0, 0.9, threshold=way[1] if way[0] == "threshold" else None)
    nfe = round((length - given) * way[1])
    nfe = max(nfe, -(-(length - given) // block))  # a step a block at least
    parts, passes, begin = [], [], time.perf_counter()
    for i, x in enumerate(start.split(args.batch_size)):
        seeds = [seed_of(seed, i * args.batch_size + n) for n in range(len(x))]
        options = dict(seeds=seeds, dtype=dtype, block_length=block, cache="dual")
        x, done = generate(model, x, nfe, softmask, how, **options)
        parts.append(x[:, given:])
        passes.append(done.passes)
    speed = len(text) * (length - given) / (time.perf_counter() - begin)
    ids = torch.cat(parts).cpu().numpy()
    score = divergence(ids, text[:, given:].numpy(), 3, model.vocab_size)
    return speed, statistics.mean(passes), score, unigram_entropy(ids)


def add_commands(commands) -> None:
    """The commands of evaluate.py that are here, and their flags."""
    c = commands.add_parser("gen", help="samples beside held-out text")
    c.set_defaults(main=gen)
    c.add_argument("samples", nargs="+", help="files of sample.py --out")
    c.add_argument("--ckpt", default="out/ckpt.pt", help="whose tokenizer and corpus to take")
    c.add_argument("--data", help="text, JSONL or folder; default: the corpus of the checkpoint")
    c.add_argument("--cache", default="corpora", help="folder of tokenized corpora")
    c = commands.add_parser("tradeoff", help="quality against speed of blockwise decoding")
    c.set_defaults(main=tradeoff)
    c.add_argument("ckpt", nargs="+", help="trained networks of train.py")
    c.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32, 64])
    c.add_argument("--budgets", type=float, nargs="*", default=[0.25, 0.5], help="steps / tokens")
    c.add_argument("--thresholds", type=float, nargs="*", default=[0.9, 0.3])
    c.add_argument("--num", type=int, default=150, help="held-out blocks")
    c.add_argument("--seeds", type=int, default=3)
    c.add_argument("--batch-size", type=int, default=50)
    c.add_argument("--picture", help="draw it to this SVG or PNG file")
    c.add_argument("--cache", default="corpora", help="folder of tokenized corpora")
    c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    c.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")

"""The quality of samples: how far they are from held-out text, and what it costs to write them.

The Jensen-Shannon divergence of n-grams, which neither repetition nor dull text makes small, and
unigram entropy; MAUVE (table 1) and generative perplexity, by another network (`judge.py`).
`tradeoff` sets divergence beside the tokens a second of blockwise decoding (figure 4).
"""

import argparse
import ast
import contextlib
import json
import math
import os
import statistics
import sys
import textwrap
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import torch

import sample
from data import decode, open_corpus, vocab_size
from decoding import Strategy, generate, seed_of
from judge import FIRST_SEED, Judge, judge_texts, load_judge, mauve, optional, read_features
from runs import by_seed, cell, mean_and_spread
from runtime import (
    atomic_write,
    layout,
    pick_device,
    pick_dtype,
    progress,
    writable_files,
    writable_folder,
)
from viz import plot_tradeoff
from weights import build_model, build_softmask, load_checkpoint

PAPER_SAMPLES = 5008  # appendix A.1
HOW = {"strategy": str, "nfe": int, "feedback": str}  # what a sample says of its decoding
TRAINING, HELD_OUT = "(training text)", "(held-out text)"


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


def read_samples(path: str, size: int) -> tuple[np.ndarray, dict]:
    """The ids (N, L) of a JSONL file of sample.py's, and how the first was decoded: "strategy",
    "nfe" and "feedback", where it says. ValueError that names a line that is none."""
    rows, about = [], {}
    with open(path, "rb") as f:
        for i, line in enumerate(f, start=1):
            try:
                entry = json.loads(line)
                ids = entry["ids"]
                good = all(type(v) is int and 0 <= v < size for v in ids)
            except (ValueError, KeyError, TypeError, RecursionError):
                good = False
            if not good or (rows and len(ids) != len(rows[0])) or len(ids) < 3:
                what = f"3 or more ids below {size}, as many as in the first line"
                raise ValueError(f'{path}:{i}: no sample of sample.py\'s: "ids" with {what}')
            about = about or {k: v for k, v in entry.items() if type(v) is HOW.get(k)}
            rows.append(ids)
    if not rows:
        raise ValueError(f"{path}: no samples in it")
    return np.array(rows), about


# The commands


def write_samples(args: argparse.Namespace) -> None:
    """The samples of the checkpoint to --out, or those of them that are not there yet."""
    flags = sample.parser().parse_args([])
    shared = vars(flags).keys() & vars(args).keys() - {"cache"}  # here the folder of corpora
    vars(flags).update({name: getattr(args, name) for name in shared})
    flags.num = args.num or PAPER_SAMPLES
    with contextlib.redirect_stdout(sys.stderr):  # its summary is no result of this command
        sample.main(flags)


def check_gen(args: argparse.Namespace) -> None:
    """ValueError or OSError for flags that do not go together, before anything is loaded."""
    if not args.samples and not args.out:
        raise ValueError(
            "no samples: name files of sample.py --out, or an --out FILE to write samples of "
            f"{args.ckpt} to"
        )
    plain = vars(sample.parser().parse_args([]))
    ours = {"ckpt", "num", "batch_size", "device", "dtype", "cache"}
    for name in sorted(plain.keys() & vars(args).keys() - ours) if args.samples else ():
        if getattr(args, name) != plain[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: for samples that are written here; drop it, or the files")
    numbers = {"num": args.num, "batch-size": args.batch_size, "mauve-seeds": args.mauve_seeds}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    if not 0 < args.mauve_scaling < math.inf:
        raise ValueError(f"--mauve-scaling {args.mauve_scaling:g}: a number above 0")
    if args.features and len(args.features) != len(args.samples):
        count = f"{len(args.features)} files for {len(args.samples)} samples files"
        raise ValueError(f"--features: {count}; one for each, in their order")
    if args.save_features:
        writable_folder(args.save_features, "--save-features")
        names = [feature_file(path) for path in (*args.samples, TRAINING, HELD_OUT)]
        if len(set(names)) < len(names):
            raise ValueError("--save-features: two samples files would write one .npy; rename one")
        if args.features and args.reference_features:
            raise ValueError("--save-features: all features are given; there are none to write")
    given = [*args.samples, *(args.features or []), args.reference_features, args.data]
    writable_files({"--out": args.out, "--json": args.json}, given)
    if len({Path(path).resolve() for path in args.samples}) < len(args.samples):
        raise ValueError("a file of samples is named twice")


def feature_file(name: str) -> str:
    """The name of the file that --save-features writes for a row of the table."""
    return {TRAINING: "training.npy", HELD_OUT: "held-out.npy"}.get(name, f"{Path(name).stem}.npy")


def read_sets(args: argparse.Namespace, size: int, features: dict) -> tuple[dict, dict]:
    """The first --num samples (N, L) of each file, all of one length, and how they were decoded.
    Their features must be as many."""
    sets, about = {}, {}
    wanted = args.num or (None if args.samples else PAPER_SAMPLES)
    for path in args.samples or [args.out]:
        ids, about[path] = read_samples(path, size)
        length = next(iter(sets.values()), ids).shape[1]
        if ids.shape[1] != length:
            raise ValueError(f"{path}: samples of {ids.shape[1]} tokens beside those of {length}")
        if wanted and len(ids) < wanted:
            raise ValueError(f"{path}: {len(ids)} samples, fewer than --num {wanted}")
        sets[path] = ids[:wanted]
        if path in features:
            if not len(sets[path]) <= len(features[path]) <= len(ids):
                rows = f"{len(features[path])} rows for {len(sets[path])} samples of {path}"
                raise ValueError(f"--features: {rows}; have them written anew (--save-features)")
            features[path] = features[path][: len(sets[path])]
    return sets, about


def judge_all(judge: Judge, texts: dict, args: argparse.Namespace) -> tuple[dict, dict]:
    """Features and perplexities of the texts of each name."""
    device = pick_device(args.device)
    dtype = torch.float32 if args.dtype == "auto" else pick_dtype(args.dtype, device)
    judge.model.to(device, dtype)
    features, perplexity = {}, {}
    for name, those in texts.items():
        found = judge_texts(judge, those, args.batch_size, args.gen_ppl, Path(name).name)
        features[name], perplexity[name] = found
    return features, perplexity


def mauve_all(features: dict, args: argparse.Namespace) -> dict[str, dict]:
    """MAUVE of each name's features beside those of held-out text."""
    reference, scores = features[HELD_OUT], {}
    others = {name: p for name, p in features.items() if name != HELD_OUT}
    for name, p in others.items():
        if p.shape[1] != reference.shape[1]:
            widths = f"{p.shape[1]} wide, those of the reference {reference.shape[1]}"
            raise ValueError(f"features of {name} are {widths}: not of one model")
    fewest = min(map(len, features.values()))
    if fewest < PAPER_SAMPLES:
        print(
            f"evaluate.py: MAUVE of {fewest} texts; the paper's is of {PAPER_SAMPLES}, and numbers "
            "of fewer compare only with those of as many",
            file=sys.stderr,
        )
    with progress(total=len(others) * args.mauve_seeds, desc="MAUVE", unit=" runs") as bar:
        for name, p in others.items():
            found, k = mauve(p, reference, args.mauve_seeds, args.mauve_scaling, bar)
            mean, std = statistics.mean(found), statistics.pstdev(found)
            scores[name] = dict(mauve=mean, mauve_std=std, mauve_runs=found, clusters=k)
    return scores


def gen(args: argparse.Namespace) -> None:
    """Samples beside held-out text: a table, and the settings that its figures depend on."""
    check_gen(args)
    given = dict(zip(args.samples, map(read_features, args.features or [])))
    if args.reference_features:
        given[HELD_OUT] = read_features(args.reference_features)
    wants_mauve = bool(args.mauve or given or args.save_features)
    lacking = wants_mauve and not (args.features and args.reference_features)
    if wants_mauve:
        optional("mauve", "mauve-text")
    state = load_checkpoint(args.ckpt, "--ckpt")
    corpus = open_corpus(args.data or state["args"]["data"], state["tokenizer"], args.cache)
    del state  # sample.py loads its own
    first, judge = os.environ.get("RANK", "0") == "0", None
    if first and (args.gen_ppl or lacking):  # before hours of sampling: it may not be there
        judge = load_judge(args.features_model)
    if not args.samples:
        write_samples(args)
        if not first:
            return
    size = vocab_size(corpus.tokenizer)
    sets, about = read_sets(args, size, given)
    n, length = max(map(len, sets.values())), next(iter(sets.values())).shape[1]
    real = corpus.blocks("val", length).numpy()
    if not len(real):
        corpus.need("val", length)
    few = corpus.blocks("train", length, n).numpy()
    reference = corpus.blocks("val", length, n).numpy()  # as many as samples, evenly spread
    features, perplexity = given, {}
    if judge is not None:
        texts = {
            name: [decode(corpus.tokenizer, row) for row in ids]
            for name, ids in {**sets, TRAINING: few, HELD_OUT: reference}.items()
            if args.gen_ppl or name not in given
        }
        found, perplexity = judge_all(judge, texts, args)
        # Where all features are of files, the training text's may be of another model.
        features = found | given if lacking else given
    if args.save_features:
        for name in features.keys() - given.keys():
            with atomic_write(Path(args.save_features) / feature_file(name)) as f:
                np.save(f, features[name], allow_pickle=False)
    scores = mauve_all(features, args) if wants_mauve else {}
    rows = []
    for name, ids in {**sets, TRAINING: few, HELD_OUT: real}.items():
        parses = [code_that_parses(decode(corpus.tokenizer, row)) for row in ids[:1000]]
        shares = {f"{k}-grams": divergence(ids, real, k, size) for k in (2, 3)}
        shares |= {"entropy": unigram_entropy(ids), "parse": float(np.mean(parses))}
        judged = {"gen_ppl": perplexity.get(name)} | scores.get(name, {"mauve": None})
        rows.append({"text": name, "samples": len(ids)} | about.get(name, {}) | shares | judged)
    settings = {"ckpt": args.ckpt, "tokens": length, "held_out_blocks": len(reference)}
    if judge is not None:
        settings |= {"features_model": args.features_model, "max_tokens": judge.limit}
        settings["dtype"] = str(judge.model.dtype).removeprefix("torch.")
    if scores:
        files = [*(args.features or []), *filter(None, [args.reference_features])]
        settings |= {"features": [args.features_model] * lacking + files}
        settings |= {"reference": len(features[HELD_OUT]), "scaling": args.mauve_scaling}
        settings["kmeans_seeds"] = list(range(FIRST_SEED, FIRST_SEED + args.mauve_seeds))
    if args.json:
        with atomic_write(args.json, "w") as f:
            json.dump({"settings": settings, "rows": rows}, f, indent=1)
    show(rows, settings)


def show(rows: list[dict], settings: dict) -> None:
    """The table of `gen`, and the settings of what another network judged."""
    scored = any(row["gen_ppl"] is not None for row in rows)
    clusters = sorted({row["clusters"] for row in rows if row["mauve"] is not None})
    head = f"{'2-grams':>8}{'3-grams':>9}{'entropy':>9}{'parse':>8}{'samples':>9}"
    head += f"{'gen. ppl':>10}" * scored + f"{'MAUVE':>18}" * bool(clusters)
    units = "divergences in bits, entropy in nats"
    print(f"{head}  of {settings['tokens']} tokens; {units}")
    for row in rows:
        cells = f"{row['2-grams']:8.4f}{row['3-grams']:9.4f}{row['entropy']:9.3f}"
        cells += f"{row['parse']:8.3f}{row['samples']:9}"
        if scored:
            cells += f"{row['gen_ppl']:10.2f}"
        if clusters:
            none = row["mauve"] is None
            cells += f"{'-' if none else '{mauve:.4f} +- {mauve_std:.4f}'.format(**row):>18}"
        print(f"{cells}  {row['text']}")
    lines = over_seeds_table(rows)
    if len(lines) > 1:
        print("\nmean and deviation over files of one decoding that differ in a last -number")
        print(layout(lines, left=1), end="")
    if "features_model" in settings:
        print("{features_model} in {dtype}: a text's first {max_tokens} tokens".format(**settings))
    if scored:
        print(
            "gen. ppl: exp of the mean nats a token, but for a text's first token and repeated "
            f"end-of-text; that of {HELD_OUT} is of {settings['held_out_blocks']} blocks"
        )
    if clusters:
        seeds = settings["kmeans_seeds"]
        print(
            f"MAUVE: beside {settings['reference']} held-out texts, scaling "
            f"{settings['scaling']:g}, {' or '.join(map(str, clusters))} clusters, mean and "
            f"deviation of {len(seeds)} k-means seeds from {seeds[0]}; features of "
            + ", ".join(settings["features"])
        )


def over_seeds_table(rows: list[dict]) -> list[list[str]]:
    """The cells of a table with a line for each name that has several seeds, its head first."""
    columns = [("2-grams", 4), ("3-grams", 4), ("entropy", 3), ("parse", 3), ("gen_ppl", 2)]
    columns = [c for c in [*columns, ("mauve", 4)] if rows[0][c[0]] is not None]
    lines = [["", "files", *(key for key, _ in columns)]]
    samples = {row["text"]: row for row in rows if row["text"] not in (TRAINING, HELD_OUT)}
    for name, seeds in by_seed(samples).items():
        group = [samples[place] for place in seeds.values()]
        if len(group) > 1 and len({tuple(row.get(key) for key in HOW) for row in group}) == 1:
            values = np.array([[row[key] for key, _ in columns] for row in group], dtype=float)
            pairs = zip(zip(*mean_and_spread(values)), columns)
            lines.append([name, str(len(group)), *(cell(pair, d) for pair, (_, d) in pairs)])
    return lines


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
    writable_files({"--picture": args.picture})
    if args.picture and not args.picture.endswith((".svg", ".png")):
        raise ValueError(f"--picture {args.picture}: an .svg or .png file")
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
    # --cache is the folder of corpora here: whoever decodes with kept keys does so by sample.py.
    c = commands.add_parser("gen", help="samples beside held-out text", conflict_handler="resolve")
    c.set_defaults(main=gen)
    # fmt: off
    add = c.add_argument_group("what").add_argument
    add("samples", nargs="*", help="files of sample.py --out; none: write samples to --out first")
    add("--ckpt", default="out/ckpt.pt", help="whose tokenizer and corpus to take, or samples")
    add("--data", help="text, JSONL or folder; default: the corpus of the checkpoint")
    add("--num", type=int,
        help=f"the first so many samples of a file; default: all; to write: {PAPER_SAMPLES}")
    add("--json", help="write the figures and their settings to this file")
    add = c.add_argument_group("judged by another network").add_argument
    add("--mauve", action="store_true", help="MAUVE beside as many blocks of held-out text")
    add("--gen-ppl", action="store_true", help="generative perplexity")
    add("--features-model", default="gpt2-large",
        help="a causal language model: a folder or hub id; float32 unless --dtype is given")
    add("--features", nargs="+", help="MAUVE of .npy features, a file for each of samples")
    add("--reference-features", help="and those of held-out text")
    add("--save-features", help="write the features to .npy files in this folder")
    add("--mauve-scaling", type=float, default=5.0, help="mauve-text's mauve_scaling_factor")
    add("--mauve-seeds", type=int, default=3, help="runs of k-means")
    add = c.add_argument_group("samples of the checkpoint").add_argument
    add("--out", help="write them to this JSONL file; what it holds is kept, and it goes on")
    add("--length", type=int, help="tokens of a sample; default: the network's length")
    add("--seed", type=int, default=0)
    # fmt: on
    sample.decoding_flags(c)
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

"""Perplexity: how well a network predicts a text, one or several side by side.

The NELBO, an upper bound on the negative log-likelihood (section 2.1), in nats a token, as
perplexity and as bits per byte, with EMA weights. A soft-masked network takes two passes. Windows
may have clean context before the tokens that count (--stride), and may end where documents end.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import Corpus, open_corpus, token_bytes
from runtime import atomic_write, finite, generator, layout, pick_device, pick_dtype, writable_files
from softmask import SoftMask
from train import EVAL_BATCH, bits_per_byte, in_batches
from training import EVAL_SEED, Batch, batch_sums, mean_and_error, perplexity
from weights import build_model, build_softmask, checkpoint_file, load_checkpoint


class Candidate(NamedTuple):
    """A checkpoint to be scored, by its name on the command line."""

    name: str
    model: torch.nn.Module
    softmask: SoftMask | None
    state: dict  # "tokenizer" and "args" of its training


def ppl(args: argparse.Namespace) -> None:
    """All checkpoints on the same windows, times and masks."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.batches is not None and args.batches < 1:
        raise ValueError(f"--batches {args.batches}: at least 1")
    writable_files({"--json": args.json}, [args.data, *args.ckpt])
    candidates = read_candidates(args)
    corpus, batches, text = read_text(args, candidates)
    tokens = torch.cat([x0[rest[0]] if rest else x0.flatten() for x0, *rest in batches])
    ratio = bits_per_byte(1.0, tokens, token_bytes(corpus.tokenizer))
    text["tokens"], rows, first = tokens.numel(), [], None
    for name, model, softmask, _ in candidates:
        model.to(device)
        for passes in passes_of(args, softmask):
            sm = softmask.to(device) if passes == 2 else None
            # One mask a window at least would loosen the bound, of one token by ln 1000 times.
            sums, counts = batch_sums(model, batches, sm, device, dtype, at_least_one=False)
            if not all(map(math.isfinite, sums)):
                raise ValueError(
                    f"--ckpt {name}: its loss is not a number; damaged weights, or --dtype float32"
                )
            rows.append({"checkpoint": name, "passes": passes} | likelihood(sums, counts, ratio))
            if first is not None:
                rows[-1] |= named("difference", *paired(sums, first, counts))
            first = first or sums
        model.cpu()
    print(
        "{text}: {tokens:,} tokens counted, {left_out:,} left out; documents: {documents:,}, "
        "boundaries {boundaries}; windows of {block_size}, context {context}".format(**text)
    )
    print(layout(ppl_table(rows), args.markdown), end="")
    if args.json:
        text["rows"] = [{k: finite(v) for k, v in row.items()} for row in rows]
        with atomic_write(args.json, "w") as f:
            json.dump(text, f)


def read_candidates(args: argparse.Namespace) -> list[Candidate]:
    """The checkpoints of --ckpt; ValueError where they cannot be put side by side."""
    places = [checkpoint_file(name).resolve() for name in args.ckpt]
    for i, name in enumerate(args.ckpt):
        if places[i] in places[:i]:
            raise ValueError(f"--ckpt {name}: named twice")
    candidates = []
    for name in args.ckpt:
        state = load_checkpoint(name, "--ckpt")
        model, softmask = build_model(state, ema=not args.raw_weights), build_softmask(state)
        state = {"tokenizer": state["tokenizer"], "args": state["args"]}
        candidates.append(Candidate(name, model, softmask, state))
        if state["tokenizer"] != candidates[0].state["tokenizer"]:
            raise ValueError(
                f"--ckpt {name}: another tokenizer than that of {args.ckpt[0]}, and so other "
                "windows; score them one by one, and compare bits per byte"
            )
        if softmask is None and args.passes == "2":
            raise ValueError("--passes 2: a binary checkpoint has one pass; it holds no soft mask")
    if args.passes == "both" and all(c.softmask is None for c in candidates):
        raise ValueError("--passes both: a binary checkpoint has one pass; it holds no soft mask")
    return candidates


def passes_of(args: argparse.Namespace, softmask: SoftMask | None) -> list[int]:
    if softmask is None:
        return [1]
    return [1, 2] if args.passes == "both" else [int(args.passes or 2)]


def read_text(args, candidates: list[Candidate]) -> tuple[Corpus, Sequence[Batch], dict]:
    """The corpus, its windows in batches, and what the reader is to know of them.

    Without --stride and kept boundaries they are training's blocks, and what is left of a split is
    left out; else all is counted.
    """
    limit = min(c.model.config.block_size for c in candidates)
    length, state = args.block_size, candidates[0].state
    if length is None:
        length = min([limit, *filter(None, (c.state["args"]["block_size"] for c in candidates))])
    if not 1 <= length <= limit:
        raise ValueError(f"--block-size {length}: the network takes 1 to {limit}")
    stride, kept = length if args.stride is None else args.stride, args.boundaries == "kept"
    if not 1 <= stride <= length:
        raise ValueError(f"--stride {stride}: from 1 to the {length} tokens of a window")
    plain = stride == length and not kept
    corpus = open_corpus(args.data or state["args"]["data"], state["tokenizer"], args.cache)
    if corpus.wrapping and not plain:
        raise ValueError(
            f"{'--boundaries kept' if kept else f'--stride {stride}'}: {corpus.meta['source']} was "
            "prepared in blocks wrapped in end-of-text, and is scored in these; drop the flag, or "
            "prepare it anew by data.py --blocks windows"
        )
    splits = {"all": ("train", "val"), None: ("train", "val") if args.data else ("val",)}
    splits = splits.get(args.split, (args.split,))
    where = "+".join(splits)
    if args.data and args.split is None and not plain and corpus.meta["split"] == "ends":
        # The end of each document was held out as one of its own: here it is put back.
        cache = str(Path(args.cache) / "whole")
        corpus = open_corpus(args.data, state["tokenizer"], cache, split=0)
        splits, where = ("train",), "whole"
    have, least = sum(len(corpus.streams[split]) for split in splits), 1 if kept else length
    splits = [split for split in splits if corpus.holds(split, least)] or splits[-1:]
    corpus.need(splits[-1], least)
    documents = [corpus.documents(split) for split in splits]
    limit = args.batches and args.batches * EVAL_BATCH
    if plain:
        blocks = torch.cat([corpus.blocks(split, length, limit) for split in splits])
        if limit and limit < len(blocks):
            blocks = blocks[torch.arange(limit) * len(blocks) // limit]
        batches, used = in_batches(blocks), len(blocks) * (length - 2 * corpus.wrapping)
    else:
        cuts = [windows(d if kept else d[[0, -1]], length, stride) for d in documents]
        which = np.repeat(np.arange(len(splits)), [len(c) for c in cuts])
        plan = np.column_stack([which, np.concatenate(cuts)])  # (n, 4)
        if limit and limit < len(plan):
            plan = plan[np.arange(limit) * len(plan) // limit]
        batches, used = Windows(corpus, splits, plan), int((plan[:, 3] - plan[:, 2]).sum())
    about = {
        "text": f"{corpus.meta['source']} ({where})",
        "left_out": have - used,
        "documents": sum(len(d) - 1 for d in documents),
        "boundaries": args.boundaries,
        "block_size": length,
        "context": length - stride,
    }
    return corpus, batches, about


def windows(edges: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Windows over stretches of text, int64 (n, 3): start, first token that counts, stop.

    edges (m + 1,) bound the m stretches, and no window crosses one. The first window of a stretch
    counts all its tokens; each later one starts `stride` further, and what it has in common with
    the one before, `length - stride` tokens, is its context. The last may be shorter.
    """
    sizes = np.diff(edges)
    n = 1 + np.maximum(0, -((length - sizes) // stride))  # of each stretch
    which = np.repeat(np.arange(len(sizes)), n)
    i = np.arange(len(which)) - np.repeat(np.cumsum(n) - n, n)  # 0, 1, ... in each stretch
    starts = edges[which] + i * stride
    firsts = starts + np.where(i > 0, length - stride, 0)
    return np.column_stack([starts, firsts, np.minimum(starts + length, edges[which + 1])])


class Windows(Sequence):
    """The windows of a plan in batches (x0, response, attend) of similar lengths, cut when asked.

    plan (n, 4): a window's split, and the three of `windows`. Within a batch the order is random:
    its rows get times in rising order, which must not go with the length or the place in the text.
    """

    def __init__(self, corpus: Corpus, splits: Sequence[str], plan: np.ndarray):
        self.corpus, self.splits, g = corpus, splits, generator(EVAL_SEED)
        plan = plan[np.argsort(plan[:, 3] - plan[:, 1], kind="stable")]
        parts = [plan[i : i + EVAL_BATCH] for i in range(0, len(plan), EVAL_BATCH)]
        self.plans = [part[torch.randperm(len(part), generator=g).numpy()] for part in parts]

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, i: int) -> Batch:
        which, starts, firsts, stops = torch.from_numpy(self.plans[i]).T
        at = torch.arange(int((stops - starts).max()))  # (L,)
        x0 = torch.full((len(which), len(at)), self.corpus.tokenizer.eot_token)
        for s, split in enumerate(self.splits):
            mine = which == s
            if mine.any():
                found = self.corpus.spans(split, starts[mine].numpy(), stops[mine].numpy())
                x0[mine, : found.shape[1]] = found
        attend = at < (stops - starts)[:, None]  # (B, L)
        return x0, attend & (at >= (firsts - starts)[:, None]), attend


def likelihood(sums: list[float], counts: list[int], ratio: float) -> dict[str, float]:
    """A model's scores by its batches' nats and tokens; `ratio`: bits a byte of one nat a token."""
    nats, error = mean_and_error(sums, counts)
    p = perplexity(nats)
    scores = named("nats", nats, error) | named("perplexity", p, p * error)
    return scores | named("bits_per_byte", ratio * nats, ratio * error)


def paired(sums: list[float], first: list[float], counts: list[int]) -> tuple[float, float]:
    """Nats a token more than the first model's, and their standard error: texts, times and masks
    are the same, and what they add to both cancels."""
    return mean_and_error([a - b for a, b in zip(sums, first, strict=True)], counts)


def named(name: str, value: float, error: float) -> dict[str, float]:
    return {name: value, f"{name}_error": error}


def ppl_table(rows: list[dict]) -> list[list[str]]:
    """The cells of the table, its head first; a single row has neither a name nor a difference."""
    names = ["checkpoint", "passes"][len(rows) == 1 :]
    columns = [("nats", "NELBO, nats a token", 4), ("perplexity", "perplexity", 2)]
    columns += [("bits_per_byte", "bits per byte", 4), ("difference", "minus the first, nats", 4)]
    columns = columns[: 3 + (len(rows) > 1)]
    lines = [[*names, *(title for _, title, _ in columns)]]
    for row in rows:
        cells = [
            f"{row[key]:.{d}f} +- {row[f'{key}_error']:.{d}f}" if key in row else ""
            for key, _, d in columns
        ]
        lines.append([*(str(row[name]) for name in names), *cells])
    return lines


def add_commands(commands) -> None:
    """`ppl` among the commands of evaluate.py, and its flags."""
    c = commands.add_parser(
        "ppl",
        help="NELBO, perplexity and bits per byte",
    )
    c.set_defaults(main=ppl)
    c.add_argument(
        "--ckpt", nargs="+", default=["out/ckpt.pt"], help="checkpoints, or their folders"
    )
    c.add_argument("--data", help="text, JSONL or folder; default: the first checkpoint's corpus")
    c.add_argument("--split", choices=("train", "val", "all"), help="default: val; all with --data")
    c.add_argument(
        "--passes", choices=("1", "2", "both"), help="default: 2 for a soft-masked model"
    )
    c.add_argument(
        "--batches", type=int, help=f"of {EVAL_BATCH} blocks, evenly spread; default: all"
    )
    c.add_argument("--block-size", type=int, help="tokens of a window; default: as in training")
    c.add_argument(
        "--stride", type=int, help="a window counts its last so many tokens; default: all of them"
    )
    c.add_argument(
        "--boundaries",
        choices=("joined", "kept"),
        default="joined",
        help="windows run across the ends of documents, or end there; an end-of-text counts as its "
        "document's last token",
    )
    c.add_argument("--json", help="write the rows to this file")
    c.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    c.add_argument("--raw-weights", action="store_true", help="the raw weights, not their average")
    c.add_argument("--cache", default="corpora", help="folder of tokenized corpora")
    c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    c.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")

"""Evaluation; for the benchmarks see `tasks.py`.

    python evaluate.py ppl --ckpt out/ckpt.pt --data book.txt   # without --data its held-out text
    python evaluate.py gen --ckpt out/ckpt.pt samples.jsonl     # what sample.py --out wrote
    python evaluate.py tradeoff binary sm --picture figure.svg  # quality against speed
    python evaluate.py gsm8k --data gsm8k_test.jsonl --completions completions.jsonl

`ppl`: the NELBO, an upper bound on the negative log-likelihood (section 2.1), in nats a token, as
perplexity and as bits per byte, with EMA weights. A soft-masked model takes two passes.

`gen`: how far samples are from held-out text, as the Jensen-Shannon divergence of their n-grams,
which neither repetition nor dull text makes small, and their unigram entropy; `tradeoff`: that
beside the tokens a second of blockwise decoding.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

import quality
import sandbox
import tasks
from data import open_corpus, token_bytes
from runtime import (
    Parser,
    atomic_write,
    pick_device,
    pick_dtype,
    progress,
    run,
    writable_folder,
)
from train import EVAL_BATCH, bits_per_byte, in_batches
from training import nelbo, perplexity
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
    splits = [split for split in splits if corpus.holds(split, length)] or splits[-1:]
    corpus.need(splits[-1], length)
    blocks = torch.cat([corpus.blocks(split, length, limit) for split in splits])
    if limit and limit < len(blocks):
        blocks = blocks[torch.arange(limit) * len(blocks) // limit]
    if softmask is not None:
        softmask.to(device)
    nats, error = nelbo(model, in_batches(blocks), softmask if passes == 2 else None, device, dtype)
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


def score(args: argparse.Namespace) -> None:
    """pass@1 and pass@k of a file of completions: programs are run, other answers compared."""
    problems = tasks.read_problems(args.task, args.data, args.full_tests)
    found = tasks.read_completions(args.completions, problems)
    without = [problem.task_id for problem in problems if problem.task_id not in found]
    if without and not args.partial:
        raise ValueError(
            f"{args.completions}: {len(without)} of {len(problems)} problems have no completion, "
            f"the first {without[0]!r}; add them, or score the others with --partial"
        )
    fewest = min(map(len, found.values()))
    if not 1 <= args.k <= fewest:
        raise ValueError(f"--k {args.k}: 1 to the {fewest} completions that each problem has")
    for name in ("json", "save"):
        if getattr(args, name):
            writable_folder(Path(getattr(args, name)).parent, f"--{name}")
    rows = [(p, text) for p in problems for text in found.get(p.task_id, [])]
    if problems[0].tests:
        results = run_code(rows, args)
    else:
        results = []
        for problem, text in progress(rows, desc="answers"):
            answer = tasks.extracted(args.task, text)
            results.append({"passed": tasks.is_right(args.task, problem, text), "answer": answer})
    right = {task_id: [] for task_id in found}
    for (problem, _), result in zip(rows, results, strict=True):
        right[problem.task_id].append(result["passed"])
    scores = {
        f"pass@{k}": statistics.mean(tasks.pass_at_k(len(r), sum(r), k) for r in right.values())
        for k in sorted({1, args.k})
    }
    if args.save:
        with atomic_write(args.save, "w") as f:
            for (problem, text), result in zip(rows, results, strict=True):
                asked = {"prompt": problem.user, "begins": problem.begins, "completion": text}
                f.write(json.dumps({"task_id": problem.task_id, **asked, **result}) + "\n")
    if args.json:
        with atomic_write(args.json, "w") as f:
            json.dump({"task": args.task, "problems": len(right), **scores}, f)
    title = tasks.TASKS[args.task].title
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    print(f"{title}: {shown} of {len(right)} problems, {len(rows)} completions")


def run_code(rows: list, args: argparse.Namespace) -> list[dict]:
    """Run the programs of (problem, completion) pairs: a dictionary of what came of each."""
    if not args.allow_code_execution:
        raise ValueError(
            f"{args.task} runs generated programs (python sandbox.py tells what guards this "
            "machine from them); to have them run, give --allow-code-execution"
        )
    missing = [name for name, held in sandbox.protections().items() if not held]
    if missing:
        print(f"sandbox: not to be had here: {', '.join(missing)}", file=sys.stderr)
    programs = [tasks.program(problem, text) for problem, text in rows]
    verdicts = sandbox.run_programs(programs, timeout=args.timeout)
    return [
        {"program": program, **verdict._asdict()}
        for (program, _), verdict in zip(programs, verdicts, strict=True)
    ]


def ppl_command(commands) -> None:
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


def parser() -> Parser:
    p = Parser(description="Evaluate a model.")
    commands = p.add_subparsers(required=True, metavar="what")
    ppl_command(commands)
    quality.add_commands(commands)
    for task, about in tasks.TASKS.items():
        c = commands.add_parser(task, help=f"score completions of {about.title}")
        c.set_defaults(main=score, task=task)
        c.add_argument("--data", required=True, help="its problems, JSONL or JSONL.gz")
        c.add_argument("--completions", required=True, help='JSONL of "task_id" and "completion"')
        c.add_argument("--k", type=int, default=1, help="pass@k, beside pass@1")
        c.add_argument("--partial", action="store_true", help="leave out problems without any")
        c.add_argument(
            "--full-tests", action="store_true", help="of MBPP+: its `test`, not the list"
        )
        c.add_argument("--allow-code-execution", action="store_true", help="run the programs")
        c.add_argument("--timeout", type=float, default=3.0, help="seconds of a program")
        c.add_argument("--json", help="write the scores to this file")
        c.add_argument("--save", help="write every answer and its verdict to this JSONL file")
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    run(args.main, args)

"""Evaluation; for the benchmarks see `tasks.py`.

    python evaluate.py ppl --ckpt out/ckpt.pt --data book.txt   # without --data its held-out text
    python evaluate.py ppl --ckpt binary sm --passes both       # side by side, on the same masks
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
import re
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import quality
import sample
import tasks
from chat import answer, chat_ids
from data import Corpus, open_corpus, token_bytes
from decoding import Strategy, seed_of
from runtime import (
    Parser,
    Samples,
    World,
    atomic_write,
    generator,
    join_world,
    pick_device,
    pick_dtype,
    progress,
    run,
    writable_folder,
)
from softmask import SoftMask
from train import EVAL_BATCH, bits_per_byte, in_batches
from training import EVAL_SEED, Batch, batch_sums, mean_and_error, perplexity
from weights import build_model, build_softmask, load_checkpoint

PAPER_BUDGETS = ("1/4", "1/2", "1/1")  # steps / tokens, of table 2


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
    if args.json:
        writable_folder(str(Path(args.json).parent), "--json")
    candidates = read_candidates(args)
    corpus, batches, text = read_text(args, candidates)
    tokens = torch.cat([x0[rest[0]] if rest else x0.flatten() for x0, *rest in batches])
    ratio = bits_per_byte(1.0, tokens, token_bytes(corpus.tokenizer))
    text["tokens"], rows, first = tokens.numel(), [], None
    for name, model, softmask, _ in candidates:
        model.to(device)
        for passes in passes_of(args, softmask):
            sm = softmask.to(device) if passes == 2 else None
            sums, counts = batch_sums(model, batches, sm, device, dtype, at_least_one=False)
            rows.append({"checkpoint": name, "passes": passes} | likelihood(sums, counts, ratio))
            if first is not None:
                rows[-1] |= named("difference", *paired(sums, first, counts))
            first = first or sums
        model.cpu()
    print(
        "{text}: {tokens:,} tokens counted, {left_out:,} left out; documents: {documents:,}, "
        "boundaries {boundaries}; windows of {block_size}, context {context}".format(**text)
    )
    print("\n".join(ppl_table(rows, args.markdown)))
    if args.json:
        text["rows"] = [{k: None if v != v else v for k, v in row.items()} for row in rows]  # NaN
        with atomic_write(args.json, "w") as f:
            json.dump(text, f)


def read_candidates(args: argparse.Namespace) -> list[Candidate]:
    """The checkpoints of --ckpt; ValueError where they cannot be put side by side."""
    places = [Path(name).resolve() for name in args.ckpt]
    places = [p / "ckpt.pt" if (p / "ckpt.pt").is_file() else p for p in places]
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
    """The corpus, its windows in batches, and what the reader is to know of them."""
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


def ppl_table(rows: list[dict], markdown: bool) -> list[str]:
    """The lines of the table; a single row has neither a name nor a difference."""
    names = ["checkpoint", "passes"][len(rows) == 1 :]
    columns = [("nats", "NELBO, nats a token", 4), ("perplexity", "perplexity", 2)]
    columns += [("bits_per_byte", "bits per byte", 4), ("difference", "less the first, nats", 4)]
    columns = columns[: 3 + (len(rows) > 1)]
    lines = [[*names, *(title for _, title, _ in columns)]]
    for row in rows:
        cells = [
            f"{row[key]:.{d}f} +- {row[f'{key}_error']:.{d}f}" if key in row else ""
            for key, _, d in columns
        ]
        lines.append([*(str(row[name]) for name in names), *cells])
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        return [f"| {' | '.join(line)} |" for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["   ".join(map(str.rjust, line, widths)) for line in lines]


def benchmark(args: argparse.Namespace) -> int:
    """Have a benchmark's problems answered, or read the answers, and score them."""
    generates = args.completions is None
    check(args, generates)
    problems = tasks.read_problems(args.task, args.data, args.full_tests)[: args.limit]
    if generates:
        answered, world = respond_all(args, problems)
        world.leave()
        if world.rank > 0 or args.generate_only:
            return 0
    else:
        answered = [({"task": args.task, "file": args.completions}, args.completions)]
    scores, verdicts = [], []
    for about, file in answered:
        found = completions(args, problems, file)
        scores.append(about | score(args, problems, found, verdicts, about))
        print(described(scores[-1]), flush=True)
    if args.save:
        with atomic_write(args.save, "w") as f:
            f.writelines(json.dumps(verdict) + "\n" for verdict in verdicts)
    if args.json:
        with atomic_write(args.json, "w") as f:
            json.dump(scores, f, indent=1)
    if generates and len(scores) > 1:
        print(tasks.table(tasks.summary(scores), args.markdown), end="")
    return 0


def check(args: argparse.Namespace, generates: bool) -> None:
    """ValueError for what cannot be done with these flags, before anything is generated."""
    if args.task in tasks.PROGRAMS and not (args.allow_code_execution or args.generate_only):
        raise ValueError(
            f"{args.task} runs generated programs (python sandbox.py tells what guards this "
            "machine from them); to have them run, give --allow-code-execution; --generate-only "
            "leaves them for later"
        )
    for name in ("samples", "pass_at", "limit", "batch_size", "new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if generates and args.pass_at > args.samples:
        raise ValueError(
            f"--pass-at {args.pass_at}: 1 to the --samples {args.samples} of each problem"
        )
    if not generates and args.generate_only:
        raise ValueError("--generate-only: not with --completions, which are there")
    for name in ("model", "adapters", "seeds"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            raise ValueError(f"--{name.removesuffix('s')}: one of them is given twice")
    for name in ("json", "save"):
        if getattr(args, name):
            writable_folder(Path(getattr(args, name)).parent, f"--{name}")


def respond_all(args: argparse.Namespace, problems: list) -> tuple[list, World]:
    """Every network's answers, at every budget and seed: [(what it is, its file), ...].

    A file holds a line an answer, in the order of the prompts' lengths, so that a batch has little
    padding; a run that was stopped goes on with its files.
    """
    folder = writable_folder(args.out, "--out")
    tokens = args.new_tokens or tasks.TASKS[args.task].max_tokens
    ways = decodings(args, tokens)
    answered, world = [], None
    for ckpt, adapter in product(args.model, args.adapters or [None]):
        writer = sample.load(argparse.Namespace(**vars(args) | {"ckpt": ckpt, "adapter": adapter}))
        world = world or join_world(writer.model.embedding.device)
        prompts, settings = prompts_of(writer, problems, tokens), writer.settings
        writers = [("binary" if writer.softmask is None else "sm", writer)]
        if args.both and writer.softmask is not None:
            writers.append(("binary", writer._replace(softmask=None)))
        for (feedback, one), (name, nfe, how), seed in product(writers, ways, args.seeds):
            model = adapter or ckpt
            about = {"task": args.task, "model": model, "feedback": feedback, "budget": name}
            words = [args.task, model.strip("./"), feedback, name, str(seed)]
            file = folder / (re.sub(r"[^\w.+]+", "_", "-".join(words)) + ".jsonl")
            run = [*settings, feedback, repr(how), tokens, nfe, seed, list(prompts.items())]
            samples = Samples(file, run, world)
            write_answers(args, one, samples, prompts, tokens, nfe, how, seed)
            answered.append((about | {"seed": f"{model} {seed}"}, file))
    return answered, world


def decodings(args: argparse.Namespace, tokens: int) -> list[tuple[str, int, Strategy]]:
    """The decodings of the flags: the budget's name, its steps, the strategy."""
    alone = args.nfe is not None or args.threshold is not None
    shares = args.budget.split(",") if args.budget else [None] if alone else PAPER_BUDGETS
    ways = {}
    for share in shares:
        nfe = sample.steps_of(argparse.Namespace(**vars(args) | {"budget": share}), tokens)
        if nfe in ways:
            raise ValueError(f"--budget {args.budget}: {share} is the {nfe} steps of another")
        name = f"threshold {args.threshold:g}" if args.threshold else share or f"{nfe}/{tokens}"
        ways[nfe] = name, nfe, sample.strategy_of(args, tokens, nfe, answers=True)
    return list(ways.values())


def prompts_of(writer: sample.Writer, problems: list, tokens: int) -> dict:
    """The ids of each problem's prompt, the shortest first; ValueError where one leaves no room for
    an answer of `tokens`."""
    system = () if writer.system is None else (writer.system,)
    prompts = {
        p.task_id: chat_ids(writer.tokenizer, tasks.messages(p), *system, begin=p.begins)
        for p in problems
    }
    prompts = dict(sorted(prompts.items(), key=lambda item: len(item[1])))
    longest, limit = len(list(prompts.values())[-1]), writer.model.config.block_size
    if longest + tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of {tokens}: the network takes {limit}; "
            "--new-tokens sets those of an answer"
        )
    return prompts


def write_answers(args, writer, samples: Samples, prompts: dict, tokens, nfe, how, seed) -> None:
    """--samples answers to each prompt: sample i is of problem i modulo their number."""
    ids, total = list(prompts), args.samples * len(prompts)
    left = max(0, total - samples.done) * nfe
    with progress(total=left, desc=samples.path.stem, unit=" steps") as bar:

        def make(numbers: range) -> list[dict]:
            whose = [ids[i % len(ids)] for i in numbers]
            answers, _ = writer.respond(
                [prompts[task_id] for task_id in whose], tokens, nfe, how,
                seeds=[seed_of(seed, i) for i in numbers],
                on_step=lambda i, x: bar.update(len(x) * samples.world.size),
            )  # fmt: skip
            texts = [answer(writer.tokenizer, a) for a in answers]
            return [{"task_id": i, "completion": text} for i, text in zip(whose, texts)]

        samples.fill(total, args.batch_size, make)


def completions(args: argparse.Namespace, problems: list, file: str | Path) -> dict:
    """The completions in a file, of which each problem must have --pass-at."""
    found = tasks.read_completions(file, problems)
    without = [problem.task_id for problem in problems if problem.task_id not in found]
    if without and not args.partial:
        raise ValueError(
            f"{file}: {len(without)} of {len(problems)} problems have no completion, "
            f"the first {without[0]!r}; add them, or score the others with --partial"
        )
    fewest = min(map(len, found.values()))
    if args.pass_at > fewest:
        raise ValueError(
            f"--pass-at {args.pass_at}: 1 to the {fewest} completions that each problem has"
        )
    return found


def score(args: argparse.Namespace, problems: list, found: dict, verdicts: list, about) -> dict:
    """pass@1 and pass@k: programs are run, other answers compared. `verdicts` gets every answer."""
    rows = [(p, text) for p in problems for text in found.get(p.task_id, [])]
    if args.task in tasks.PROGRAMS:
        results = run_code(rows, args.timeout)
    else:
        results = []
        for problem, text in progress(rows, desc="answers"):
            said = tasks.extracted(args.task, text)
            results.append({"passed": tasks.is_right(args.task, problem, text), "answer": said})
    right = {task_id: [] for task_id in found}
    for (problem, text), result in zip(rows, results, strict=True):
        right[problem.task_id].append(result["passed"])
        asked = {"prompt": problem.user, "begins": problem.begins, "completion": text}
        verdicts.append(about | {"task_id": problem.task_id} | asked | result)
    scores = {
        f"pass@{k}": statistics.mean(tasks.pass_at_k(len(r), sum(r), k) for r in right.values())
        for k in sorted({1, args.pass_at})
    }
    return {"problems": len(right), "completions": len(rows), "score": scores["pass@1"], **scores}


def described(score: dict) -> str:
    """A line about a score."""
    names = [score[n] for n in ("model", "feedback") if n in score]
    names += [f"budget {score['budget']}"] if "budget" in score else []
    passes = ", ".join(f"{n} {v:.4f}" for n, v in score.items() if n.startswith("pass@"))
    counts = f"{score['problems']} problems, {score['completions']} completions"
    return f"{', '.join([tasks.TASKS[score['task']].title, *names])}: {passes} of {counts}"


def run_code(rows: list, timeout: float) -> list[dict]:
    """Run the programs of (problem, completion) pairs: a dictionary of what came of each."""
    import sandbox  # it needs POSIX, the rest here does not

    missing = [name for name, held in sandbox.protections().items() if not held]
    if missing:
        print(f"sandbox: not to be had here: {', '.join(missing)}", file=sys.stderr)
    programs = [tasks.program(problem, text) for problem, text in rows]
    verdicts = sandbox.run_programs(programs, timeout=timeout)
    return [
        {"program": program, **verdict._asdict()}
        for (program, _), verdict in zip(programs, verdicts, strict=True)
    ]


def tabulate(args: argparse.Namespace) -> None:
    """The paper's table of the scores in files of --json."""
    scores = []
    for file in args.scores:
        try:
            found = json.loads(Path(file).read_text())
            if not (isinstance(found, list) and found):
                raise ValueError
            scores += [
                {name: s[name] for name in ("task", "budget", "feedback", "seed", "score")}
                for s in found
            ]
        except (ValueError, KeyError, TypeError, RecursionError):
            what = "scores that --json of a benchmark wrote, of answers it had generated"
            raise ValueError(f"{file}: not {what}") from None
    rows = tasks.summary(scores)
    if args.json:
        writable_folder(Path(args.json).parent, "--json")
        with atomic_write(args.json, "w") as f:
            json.dump(rows, f, indent=1)
    print(tasks.table(rows, args.markdown), end="")


def ppl_command(commands) -> None:
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
        help="windows run across the ends of documents, or end there",
    )
    c.add_argument("--json", help="write the rows to this file")
    c.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    c.add_argument("--raw-weights", action="store_true", help="the raw weights, not their average")
    c.add_argument("--cache", default="corpora", help="folder of tokenized corpora")
    c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    c.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")


def numbers(text: str) -> list[int]:
    """Whole numbers from 0, apart by commas."""
    if not all(word.isdecimal() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: whole numbers like 0,1,2")
    return [int(word) for word in text.split(",")]


def benchmark_command(commands, task: str) -> None:
    """The flags of one benchmark."""
    about = tasks.TASKS[task]
    c = commands.add_parser(task, help=f"{about.title}: answers, and their scores")
    c.set_defaults(main=benchmark, task=task, full_tests=False, allow_code_execution=False)
    # fmt: off
    add = c.add_argument_group("problems").add_argument
    add("--data", help=f"JSONL or JSONL.gz; default: {tasks.HUB[task][0]} of the hub")
    add("--limit", type=int, help="the first so many problems; default: all")
    add("--completions", help='score this JSONL of "task_id" and "completion"; generates nothing')
    add("--partial", action="store_true", help="with --completions: leave out problems without any")
    add = c.add_argument_group("answers").add_argument
    add("--model", "--ckpt", nargs="+", default=["out/ckpt.pt"],
        help="checkpoints, folders, hub ids, dream or dream-coder")
    add("--adapter", nargs="+", dest="adapters", help="PEFT folders, each merged into the weights")
    add("--both", action="store_true", help="soft-masked networks with plain masks too")
    add("--samples", type=int, default=1, help="answers to a problem")
    add("--seeds", type=numbers, default=[0], help="of decoding, like 0,1,2")
    add("--new-tokens", type=int, help=f"of an answer; default: {about.max_tokens}")
    add("--system", help="the system line of the conversation; default: the model's own")
    add("--out", default="answers", help="folder of the answers, which a stopped run goes on with")
    add("--generate-only", action="store_true", help="answers without scores")
    sample.decoding_flags(c, budget="of steps / tokens, like 1/4; default: 1/4,1/2,1/1")
    add = c.add_argument_group("scores").add_argument
    add("--pass-at", type=int, default=1, help="the k of pass@k, beside pass@1")
    if task == "mbpp+":
        add("--full-tests", action="store_true", help="its `test`, not the list of asserts")
    if task in tasks.PROGRAMS:
        add("--allow-code-execution", action="store_true", help="run the programs")
        add("--timeout", type=float, default=3.0, help="seconds of a program")
    add("--json", help="write the scores to this file")
    add("--save", help="write every prompt, answer and verdict to this JSONL file")
    add("--markdown", action="store_true", help="the table in Markdown")
    # fmt: on


def parser() -> Parser:
    p = Parser(description="Evaluate a model.")
    commands = p.add_subparsers(required=True, metavar="what")
    ppl_command(commands)
    quality.add_commands(commands)
    for task in tasks.TASKS:
        benchmark_command(commands, task)
    c = commands.add_parser("table", help="the paper's table 2, of scores that --json wrote")
    c.set_defaults(main=tabulate)
    c.add_argument("scores", nargs="+", help="files of --json, of any benchmarks")
    c.add_argument("--markdown", action="store_true", help="the table in Markdown")
    c.add_argument("--json", help="write the table's means and spreads to this file")
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    run(args.main, args)

"""Evaluation: one command for every number of the paper's tables.

    python evaluate.py ppl --ckpt binary sm                     # perplexity: likelihood.py
    python evaluate.py runs binary-1 binary-2 sm-1 sm-2         # over seeds: runs.py
    python evaluate.py gen samples.jsonl                        # samples: quality.py
    python evaluate.py tradeoff binary sm --picture figure.svg
    python evaluate.py humaneval --model dream-coder --adapter sm --allow-code-execution
    python evaluate.py gsm8k --data gsm8k_test.jsonl --completions completions.jsonl
    python evaluate.py table humaneval.json gsm8k.json          # of scores that --json wrote
    python evaluate.py lm-eval --model dream --tasks gsm8k      # harness.py

Here are the benchmarks: networks answer their problems at several NFE budgets, the answers are
scored by `tasks.py` and `sandbox.py`, and set in the paper's table 2.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
from itertools import product
from pathlib import Path

import harness
import likelihood
import quality
import runs
import sample
import tasks
from chat import answer, chat_ids
from decoding import Strategy, seed_of
from runtime import (
    Parser,
    Samples,
    World,
    atomic_write,
    join_world,
    layout,
    progress,
    run,
    writable_files,
    writable_folder,
)
from weights import checkpoint_file, read_adapter

PAPER_BUDGETS = ("1/4", "1/2", "1/1")  # steps / tokens, of table 2


def benchmark(args: argparse.Namespace) -> int:
    """Have a benchmark's problems answered, or read the answers, and score them."""
    generates = args.completions is None
    check(args, generates)
    all_problems = tasks.read_problems(args.task, args.data, args.full_tests)
    problems = all_problems[: args.limit]
    if generates:
        answered, world = respond_all(args, problems)
        world.leave()
        if world.rank > 0 or args.generate_only:
            return 0
    else:
        answered = [({"task": args.task, "file": args.completions}, args.completions)]
    scores, verdicts = [], []
    for about, file in answered:
        found = tasks.read_completions(file, all_problems)
        found = {p.task_id: found[p.task_id] for p in problems if p.task_id in found}
        if generates:  # a file may hold more, of an earlier run that asked for them
            found = {task_id: texts[: args.samples] for task_id, texts in found.items()}
        check_completions(args, problems, found, file)
        scores.append(about | score(args, problems, found, verdicts, about))
        print(described(scores[-1]), flush=True)
    if args.save:
        with atomic_write(args.save, "w") as f:
            f.writelines(json.dumps(verdict) + "\n" for verdict in verdicts)
    if args.json:
        with atomic_write(args.json, "w") as f:
            json.dump(scores, f, indent=1)
    if generates and len(scores) > 1:
        print(layout(tasks.table(tasks.summary(scores)), args.markdown, left=2), end="")
    return 0


def check(args: argparse.Namespace, generates: bool) -> None:
    """ValueError for what cannot be done with these flags, before anything is generated."""
    if args.task in tasks.PROGRAMS and not (args.allow_code_execution or args.generate_only):
        raise ValueError(
            f"{args.task} runs generated programs (python sandbox.py tells what guards this "
            "machine from them); to have them run, give --allow-code-execution; --generate-only "
            "leaves them for later"
        )
    sample.check_decoding(args)
    for name in ("samples", "pass_at", "limit", "new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if generates and args.pass_at > args.samples:
        raise ValueError(
            f"--pass-at {args.pass_at}: 1 to the --samples {args.samples} of each problem"
        )
    if args.generate_only and (args.completions or args.json or args.save):
        raise ValueError("--generate-only: without --completions, --json and --save")
    if not generates and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("--completions: scored in one process; start it without torchrun")
    if args.both and args.no_sm:
        raise ValueError("--both: without --no-sm")
    if args.task in tasks.PROGRAMS and not 0 < args.timeout < math.inf:
        raise ValueError(f"--timeout {args.timeout:g}: seconds above 0")
    places = {
        "--model": [checkpoint_file(name).resolve() for name in args.model],
        "--adapter": [Path(name).resolve() for name in args.adapters or []],
        "--seeds": args.seeds,
    }
    for flag, values in places.items():
        if len(set(values)) < len(values):
            raise ValueError(f"{flag}: one of them is given twice")
    for name in args.adapters or []:
        read_adapter(name, "--adapter")
    for name in args.model:  # before hours of the first one's answers
        if name.startswith((".", "/", "~")) and not Path(name).exists():
            raise FileNotFoundError(f"--model {name}: no such file or folder")
    outputs = {"--json": args.json, "--save": args.save}
    writable_files(outputs, [args.data, args.completions])


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
            model = ckpt if adapter is None else f"{ckpt} {adapter}"
            about = {"task": args.task, "model": model, "feedback": feedback, "budget": name}
            # Readable, and of each network its own: many are called adapter or ckpt.pt.
            digest = hashlib.sha256(model.encode()).hexdigest()[:8]
            words = [args.task, Path(adapter or ckpt).name[:40], digest, feedback, name, str(seed)]
            file = folder / (re.sub(r"[^\w.+]+", "_", "-".join(words)) + ".jsonl")
            decided = [*settings, feedback, repr(how), tokens, nfe, seed, list(prompts.items())]
            samples = Samples(file, decided, world)
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
    """Each problem's place in the benchmark and the ids of its prompt, the shortest first;
    ValueError where one leaves no room for an answer of `tokens`."""
    system = () if writer.system is None else (writer.system,)
    prompts = {
        p.task_id: (i, chat_ids(writer.tokenizer, tasks.messages(p), *system, begin=p.begins))
        for i, p in enumerate(problems)
    }
    prompts = dict(sorted(prompts.items(), key=lambda item: len(item[1][1])))
    longest, limit = len(list(prompts.values())[-1][1]), writer.model.config.block_size
    if longest + tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of {tokens}: the network takes {limit}; "
            "--new-tokens sets those of an answer"
        )
    return prompts


def write_answers(args, writer, samples: Samples, prompts: dict, tokens, nfe, how, seed) -> None:
    """--samples answers to each prompt: sample i is of problem i modulo their number, and depends
    on the problem's place in the benchmark, not on which others are asked."""
    ids, total = list(prompts), args.samples * len(prompts)
    left = max(0, total - samples.done) * nfe
    with progress(total=left, desc=samples.path.stem, unit=" steps") as bar:

        def make(numbers: range) -> list[dict]:
            whose = [ids[i % len(ids)] for i in numbers]
            answers, _ = writer.respond(
                [prompts[task_id][1] for task_id in whose], tokens, nfe, how,
                seeds=[
                    seed_of(seed_of(seed, prompts[task_id][0]), i // len(ids))
                    for task_id, i in zip(whose, numbers)
                ],
                on_step=lambda i, x: bar.update(len(x) * samples.world.size),
            )  # fmt: skip
            texts = [answer(writer.tokenizer, a) for a in answers]
            return [{"task_id": i, "completion": text} for i, text in zip(whose, texts)]

        samples.fill(total, args.batch_size, make)


def check_completions(args: argparse.Namespace, problems: list, found: dict, file) -> None:
    """ValueError where a problem has none of the completions found, or fewer than --pass-at."""
    without = [problem.task_id for problem in problems if problem.task_id not in found]
    if without and not args.partial:
        raise ValueError(
            f"{file}: {len(without)} of {len(problems)} problems have no completion, "
            f"the first {without[0]!r}; add them, or score the others with --partial"
        )
    fewest = min(map(len, found.values()), default=0)
    if args.pass_at > fewest:
        raise ValueError(
            f"--pass-at {args.pass_at}: 1 to the {fewest} completions that each problem has"
        )


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
    late = {"timed out": sum(result.get("status") == "timed out" for result in results)}
    counts = {"problems": len(right), "completions": len(rows)} | (late if rows[0][0].tests else {})
    return counts | {"score": scores["pass@1"], **scores}


def described(score: dict) -> str:
    """A line about a score."""
    names = [score[n] for n in ("model", "feedback") if n in score]
    if "seed" in score:  # that of decoding stands last in it
        names += [f"budget {score['budget']}", f"seed {score['seed'].split()[-1]}"]
    passes = ", ".join(f"{n} {v:.4f}" for n, v in score.items() if n.startswith("pass@"))
    counts = f"{score['problems']} problems, {score['completions']} completions"
    counts += f", {score['timed out']} timed out" if score.get("timed out") else ""
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
            scores += [{name: s[name] for name in tasks.SCORE} for s in found]
        except (ValueError, KeyError, TypeError, RecursionError):
            what = "scores that --json of a benchmark wrote, of answers it had generated"
            raise ValueError(f"{file}: not {what}") from None
    rows = tasks.summary(scores)
    writable_files({"--json": args.json}, args.scores)
    if args.json:
        with atomic_write(args.json, "w") as f:
            json.dump(rows, f, indent=1)
    print(layout(tasks.table(rows), args.markdown, left=2), end="")


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
    likelihood.add_commands(commands)
    runs.add_commands(commands)
    quality.add_commands(commands)
    for task in tasks.TASKS:
        benchmark_command(commands, task)
    harness.add_commands(commands)
    c = commands.add_parser("table", help="the paper's table 2, of scores that --json wrote")
    c.set_defaults(main=tabulate)
    c.add_argument("scores", nargs="+", help="files of --json, of any benchmarks")
    c.add_argument("--markdown", action="store_true", help="the table in Markdown")
    c.add_argument("--json", help="write the table's means and spreads to this file")
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    run(args.main, args)

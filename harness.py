"""lm-evaluation-harness with our generator as its model: its tasks, its prompts, its scores.

    python evaluate.py lm-eval --model dream-coder --tasks humaneval_instruct --new-tokens 768 \\
        --budget 1/4 --out answers.jsonl --allow-code-execution
    python evaluate.py lm-eval --model dream --tasks gsm8k --num-fewshot 0 --json scores.json

Needs `pip install lm-eval`. The task says what is asked and what ends an answer; the flags how it
is decoded, else the paper's appendix A.2 (entropy, temperature 0.1, top-p 0.9), whatever do_sample,
temperature and top_p the task has. An answer has --new-tokens tokens, else the task's max_gen_toks,
else 256, and depends on --seed, its document and its repeat. Likelihoods, of which a masked
diffusion network has but a bound, are refused. Programs are run by the harness, with its own means:
not in our sandbox.
"""

import argparse
import contextlib
import difflib
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from chat import answer, chat_ids
from data import encode
from decoding import Strategy, seed_of
from model import Dream
from runtime import Samples, atomic_write, progress, writable_files
from sample import Writer, check_decoding, decoding_flags, load, steps_of, strategy_of

NEW_TOKENS = 256  # of a task that does not say, as in the harness
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


# Prompts: the harness has them as strings, which it hashes and logs, but never looks into


def as_string(messages: list[dict]) -> str:
    """A chat as a string. JSON and not the template: a text that spells control tokens could not be
    told from them again."""
    return json.dumps(messages, ensure_ascii=False)


def prompt_ids(writer: Writer, context: str, chat: bool) -> list[int]:
    """The ids of a plain prompt, or of a chat `as_string`.

    A chat that ends with the assistant's words (a task's gen_prefix) is left open after them.
    """
    if not chat:
        return encode(writer.tokenizer, context)
    messages, begin = json.loads(context), ""
    if messages[-1]["role"] == "assistant":
        begin = messages.pop()["content"]
    return chat_ids(writer.tokenizer, messages, writer.system, begin)


# Answers


class Request(NamedTuple):
    """An answer that a task asks for; `repeat` counts those to the same document."""

    task: str
    doc_id: int
    repeat: int
    prompt: list[int]
    new_tokens: int
    until: list[str]  # the texts that end it

    def seed(self, seed: int) -> int:
        return seed_of(seed_of(seed, self.doc_id), self.repeat)


def read_requests(instances: list, writer: Writer, args: argparse.Namespace) -> list[Request]:
    """The harness's instances, of which a repeated one is there several times.

    ValueError for one that the network has no room for.
    """
    found, times, room = [], Counter(), writer.model.config.block_size
    for instance in instances:
        context, wishes = instance.args
        prompt = prompt_ids(writer, context, args.apply_chat_template)
        asked = [args.new_tokens, *(wishes.get(name) for name in LIMITS), NEW_TOKENS]
        new_tokens = next(int(n) for n in asked if n is not None)
        until = wishes.get("until") or []
        until = [until] if isinstance(until, str) else list(filter(None, until))
        if not (new_tokens >= 1 and len(prompt) + new_tokens <= room):
            raise ValueError(
                f"{instance.task_name}, document {instance.doc_id}: a prompt of {len(prompt)} "
                f"tokens and an answer of {new_tokens}: the network takes {room}; see --new-tokens "
                "and --num-fewshot"
            )
        repeat, times[id(instance)] = times[id(instance)], times[id(instance)] + 1
        key = (instance.task_name, instance.doc_id, repeat)
        found.append(Request(*key, prompt, new_tokens, until))
    return found


def plan(args: argparse.Namespace, new_tokens: int) -> tuple[int, Strategy]:
    """Steps and strategy of answers of so many tokens."""
    nfe = steps_of(args, new_tokens)
    return nfe, strategy_of(args, new_tokens, nfe, answers=True)


def write_answers(requests: list[Request], writer: Writer, args: argparse.Namespace) -> list[str]:
    """The answers, in the requests' order; those that --out holds are not written again."""
    # A batch has one number of tokens. The longest go first: what does not fit in memory shows.
    order = sorted(
        range(len(requests)), key=lambda i: (-requests[i].new_tokens, -len(requests[i].prompt))
    )
    planned = [requests[i] for i in order]
    plans = {request.new_tokens: plan(args, request.new_tokens) for request in planned}
    settings = [args.seed, repr(plans), planned]
    samples = Samples(args.out, [*writer.settings, *settings] if args.out else [])
    steps = sum(plans[request.new_tokens][0] for request in planned[samples.done :])
    with progress(total=steps, desc="decoding", unit=" steps") as bar:

        def make(numbers: range) -> list[dict]:
            batch = [planned[k] for k in numbers]
            new_tokens = batch[0].new_tokens
            answers, _ = writer.respond(
                [request.prompt for request in batch], new_tokens, *plans[new_tokens],
                seeds=[request.seed(args.seed) for request in batch],
                on_step=lambda i, x: bar.update(len(x)),
            )  # fmt: skip
            return [entry(*pair) for pair in zip(batch, answers, strict=True)]

        def entry(request: Request, ids: list[int]) -> dict:
            text = answer(writer.tokenizer, ids)
            for end in request.until:
                text = text.partition(end)[0]
            named = {"task": request.task, "doc_id": request.doc_id, "repeat": request.repeat}
            return {**named, "text": text}

        end = 0
        for _, alike in groupby(planned, key=lambda request: request.new_tokens):
            end += len(list(alike))
            samples.fill(end, args.batch_size, make)
    entries = samples.kept
    if args.out:
        with open(args.out) as f:
            entries = [json.loads(line) for line in f]
    texts = {i: entry["text"] for i, entry in zip(order, entries, strict=True)}
    return [texts[i] for i in range(len(requests))]


# The harness


def harness_model(writer: Writer, args: argparse.Namespace):
    """The harness's view of a writer, an `lm_eval.api.model.LM`."""
    from lm_eval.api.model import LM

    class SoftMasked(LM):
        tokenizer_name = writer.tokenizer.name

        def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
            return as_string(chat_history)

        def generate_until(self, instances) -> list[str]:
            requests = read_requests(instances, writer, args)
            self.lengths = sorted({request.new_tokens for request in requests})
            return write_answers(requests, writer, args)

        def loglikelihood(self, requests):
            raise ValueError("likelihoods are not to be had")

        loglikelihood_rolling = loglikelihood

        def get_model_info(self) -> dict:
            """What the results' "config" has beside the harness's own."""
            flags = {k: v for k, v in vars(args).items() if k != "main"}
            plans = [(n, *plan(args, n)) for n in self.lengths]
            decoding = [{"new_tokens": n, "nfe": nfe, **asdict(how)} for n, nfe, how in plans]
            soft = writer.softmask and {"k": writer.softmask.k, **writer.softmask.omegas()}
            return {"flags": flags, "decoding": decoding, "soft_masking": soft}

    return SoftMasked()


def read_tasks(manager, names: list[str], args: argparse.Namespace) -> list:
    """The harness's tasks of these names; ValueError for one that we cannot or may not run."""
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; there is {', '.join(close)}" if close else "; see --include-path"
            raise ValueError(f"--tasks {name}: lm-evaluation-harness has no such task{hint}")
        # Before loading, which runs a task's own code and fetches its data, where the name is a
        # task's; after it, of those in tags and groups.
        config = manager.task_index[name].cfg or {}
        refuse(name, config.get("output_type"), config.get("unsafe_code"), args)
    if args.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    found = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of the task's own code, of datasets, of the network
            while error.__cause__ is not None:
                error = error.__cause__
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--tasks {name}: cannot be loaded: {reason}") from None
        for task in loaded["tasks"].values():
            unsafe = getattr(task, "UNSAFE_CODE", False)
            refuse(task.task_name, task.OUTPUT_TYPE, unsafe, args)
        found += list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())
    return found


def refuse(task: str, output_type: str | None, unsafe: bool, args: argparse.Namespace) -> None:
    if output_type not in (None, "generate_until"):
        raise ValueError(
            f"{task} compares likelihoods ({output_type}), of which a masked diffusion network has "
            "but a bound; give --tasks that generate"
        )
    if unsafe and not args.allow_code_execution:
        raise ValueError(
            f"{task} runs generated programs, with lm-evaluation-harness's means and outside our "
            "sandbox; to have them run, give --allow-code-execution"
        )


def check(args: argparse.Namespace) -> None:
    """ValueError for flags that cannot be, before anything is loaded."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("lm-eval: runs in one process; start it without torchrun")
    check_decoding(args)
    if args.limit is not None and not 0 < args.limit < math.inf:
        raise ValueError(f"--limit {args.limit}: documents, or a share of them below 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num-fewshot {args.num_fewshot}: from 0")
    if args.include_path and not Path(args.include_path).is_dir():
        raise ValueError(f"--include-path {args.include_path}: no such folder")
    writable_files({"--out": args.out, "--json": args.json, "--log-samples": args.log_samples})
    plan(args, args.new_tokens or NEW_TOKENS)


@contextlib.contextmanager
def beside_the_harness() -> Iterator[None]:
    """Within, `import evaluate` is the package that the harness uses, which our script of that name
    would hide, and what is printed goes to stderr."""
    here, path, ours = Path(__file__).resolve().parent, sys.path[:], sys.modules.get("evaluate")
    if ours is not None and Path(ours.__file__).resolve().parent == here:
        del sys.modules["evaluate"]
    sys.path[:] = [place for place in path if Path(place).resolve() != here]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path[:] = path
        if ours is not None:
            sys.modules["evaluate"] = ours


def main(args: argparse.Namespace) -> None:
    check(args)
    with beside_the_harness():
        try:
            from lm_eval import evaluator, tasks, utils
        except ImportError as error:
            raise ValueError(f"lm-eval: {error}; pip install lm-eval") from None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries without network
        manager = tasks.TaskManager(include_path=args.include_path)
        names = list(dict.fromkeys(filter(None, args.tasks.split(","))))
        found = read_tasks(manager, names, args)
        writer = load(args)
        if args.apply_chat_template is None:
            args.apply_chat_template = isinstance(writer.model, Dream)
        results = evaluator.simple_evaluate(
            harness_model(writer, args),
            tasks=found,
            task_manager=manager,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            limit=args.limit,
            system_instruction=args.system,  # the harness puts a task's description after it
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=args.fewshot_as_multiturn,
            log_samples=bool(args.log_samples),
            confirm_run_unsafe_code=args.allow_code_execution,
        )
    plain = dict(default=utils.handle_non_serializable, ensure_ascii=False)
    if args.log_samples:
        with atomic_write(args.log_samples, "w") as f:
            for task, rows in results.pop("samples").items():
                f.writelines(json.dumps({"task": task, **row}, **plain) + "\n" for row in rows)
    if args.json:
        with atomic_write(args.json, "w") as f:
            json.dump(results, f, indent=2, **plain)
    print(utils.make_table(results))
    if results.get("groups"):
        print(utils.make_table(results, "groups"))


def add_commands(commands) -> None:
    c = commands.add_parser("lm-eval", help="tasks of lm-evaluation-harness")
    c.set_defaults(main=main)
    # fmt: off
    add = c.add_argument_group("what").add_argument
    switch = argparse.BooleanOptionalAction
    add("--tasks", required=True, help="tasks, tags or groups, with commas between them")
    add("--ckpt", "--model", default="out/ckpt.pt",
        help="a checkpoint, a folder, a hub id, dream or dream-coder")
    add("--adapter", help="a PEFT folder of a LoRA or DoRA, merged into the weights")
    add("--include-path", help="a folder with task files of your own")
    add("--num-fewshot", type=int, help="examples before a question; default: the task's")
    add("--limit", type=float, help="documents of a task, or below 1 a share of them")
    add("--new-tokens", type=int,
        help=f"tokens of an answer; default: the task's max_gen_toks, else {NEW_TOKENS}")
    add("--apply-chat-template", action=switch, help="ask in a chat; default: a Dream model is")
    add("--fewshot-as-multiturn", action=switch, default=True, help="examples as turns of the chat")
    add("--system", "--system-instruction", help="the system line; default: the model's own")
    add("--allow-code-execution", action="store_true",
        help="let the harness run generated programs; not in our sandbox")
    add("--seed", type=int, default=0)
    add("--out", help="append the answers to this JSONL file as they come; what it holds is kept")
    add("--json", help="write the results to this file")
    add("--log-samples", help="write documents, prompts, answers and scores to this JSONL file")
    # fmt: on
    decoding_flags(c)

"""Text from a trained network: samples, prompts, infilling, bulk generation, chat.

    python sample.py --ckpt out/ckpt.pt --num 4
    python sample.py --prompt "def fibonacci(n):" --nfe 32 --strategy remdm-cap --top-p 0.9
    python sample.py --infill "for [MASK] in range([MASK]):" --strategy entropy
    torchrun --nproc_per_node 8 -- sample.py --num 5008 --preset remdm-paper --out samples.jsonl
    python sample.py --model dream-coder --chat --omegas 0.4,0.8,-3.5

The decoding itself is in `decoding.py`.
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch

from chat import answer, chat_ids, system_line
from data import MASK_TEXT, TURN_ENDS, decode, encode, load_tokenizer, mask_id
from decoding import (
    ANCESTRAL,
    CACHES,
    ETA,
    ORDERS,
    Schedule,
    Strategy,
    generate,
    respond,
    seed_of,
)
from model import DiT, Dream
from runtime import (
    Parser,
    Samples,
    join_world,
    pick_device,
    pick_dtype,
    progress,
    run,
    writable_files,
)
from softmask import SoftMask
from tracing import TerminalView, TraceFile
from weights import build_model, build_softmask, load_checkpoint, merge_adapter, read_adapter

SHOWN_SECONDS = 0.05  # a step of --watch: small networks are faster than the eye


def template(tokenizer, length: int, prompt: str = "", infill: str = "") -> list[int]:
    """The ids to start from: a prompt and masks up to `length`, or a text with its [MASK] runs.

    ValueError where the prompt leaves nothing to fill, or the text has no [MASK] or is too long.
    """
    mask = mask_id(tokenizer)
    if infill:
        if MASK_TEXT not in infill:
            raise ValueError(f"--infill: the text has no {MASK_TEXT} to fill")
        pieces = [encode(tokenizer, piece) for piece in infill.split(MASK_TEXT)]
        ids = [i for piece in pieces for i in [*piece, mask]][:-1]
        if len(ids) > length:
            raise ValueError(f"--infill: {len(ids)} tokens; there is room for {length}")
        return ids
    ids = encode(tokenizer, prompt)
    if len(ids) >= length:
        raise ValueError(f"--prompt: {len(ids)} tokens leave nothing to fill of --length {length}")
    return ids + [mask] * (length - len(ids))


def strategy_of(args: argparse.Namespace, length: int, nfe: int, answers: bool) -> Strategy:
    """The strategy that the flags name; a flag that is None takes its default."""
    values = {"temperature": 0.1, "top_p": 0.9} if answers else {}  # appendix A.2
    names = ("temperature", "top_p", "eta", "t_on", "t_off", "alpha_on", "alg_temp", "threshold")
    for name in names:
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    if args.preset == "remdm-paper":  # the ReMDM rows of the paper's table 1
        if args.strategy or args.eta is not None:
            raise ValueError("--preset remdm-paper: it chooses --strategy and --eta itself")
        name = "remdm-cap" if nfe < length else "remdm-loop"
        return Strategy(name, **({"top_p": 0.9} | values))
    return Strategy(args.strategy or ("entropy" if answers else "mdlm"), **values)


def softmask_of(args: argparse.Namespace, state: dict) -> SoftMask | None:
    """The soft mask of the flags, else of the checkpoint; None for plain masks."""
    softmask = None if args.no_sm else build_softmask(state)
    if args.omegas and not args.no_sm:
        try:
            omegas, k = read_omegas(args.omegas, args.k)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"--omegas {args.omegas} --k {args.k}: omega_s,omega_a,omega_b (and tau) and a "
                "whole number or V; or a softmask.json, which has its own k"
            ) from None
        if len(omegas) not in (3, 4) or (len(omegas) == 4 and k is not None):
            raise ValueError(f"--omegas {args.omegas}: three numbers, for --k V a fourth, tau")
        softmask = SoftMask(k)
        softmask.set_omegas(*omegas)
    elif args.k is not None:
        raise ValueError(f"--k {args.k}: with --omegas; a checkpoint has its own")
    return softmask


def read_omegas(text: str, k: str | None) -> tuple[list[float], int | None]:
    """The omegas and k of a softmask.json of train.py's, or of the flags."""
    if Path(text).is_file():
        found = json.loads(Path(text).read_text())
        if k is not None or not (found["k"] is None or type(found["k"]) is int):
            raise ValueError
        names = ["omega_s", "omega_a", "omega_b"] + (["tau"] if found["k"] is None else [])
        return [float(found[name]) for name in names], found["k"]
    return [float(v) for v in text.split(",")], None if k == "V" else int(k or 3)


def steps_of(args: argparse.Namespace, masks: int) -> int:
    """--nfe, or --budget (steps / tokens), or one step a mask."""
    if args.threshold is not None and (args.nfe or args.budget):
        raise ValueError("--threshold: it decides the steps; drop --nfe and --budget")
    if args.budget is None:
        return masks if args.nfe is None else args.nfe
    short = re.fullmatch(r"\d{1,9}/0*[1-9]\d{0,8}|\d{0,9}\.?\d{1,9}", args.budget)
    budget = Fraction(args.budget if short else 0)
    if not 0 < budget <= 1 or args.nfe is not None:
        raise ValueError(f"--budget {args.budget}: a share of the tokens like 1/4; without --nfe")
    return max(1, round(budget * masks))


def check(args: argparse.Namespace) -> None:
    """ValueError for flags that do not go together, before anything is loaded."""
    if args.chat and (args.prompt or args.num > 1):
        raise ValueError("--chat: without --prompt and --num")
    if args.prompt and args.infill:
        raise ValueError(
            "--prompt and --infill: one of them; a text to infill may begin as you like"
        )
    if args.num < 1:
        raise ValueError(f"--num {args.num}: from 1")
    check_decoding(args)
    writable_files({"--out": args.out, "--trace": args.trace})
    if args.trace and Path(args.trace).exists():
        raise ValueError(f"--trace {args.trace}: it exists; name another file, or delete it")


def check_decoding(args: argparse.Namespace) -> None:
    """ValueError for values of `decoding_flags` that cannot be."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: from 1")
    if not 0 <= args.sm_switch <= 1:
        raise ValueError(f"--sm-switch {args.sm_switch}: between 0 and 1")
    if args.block_length is not None and args.block_length < 1:
        raise ValueError(f"--block-length {args.block_length}: at least 1")


class Writer(NamedTuple):
    """A network that writes, with all that the flags say of it."""

    model: DiT | Dream
    tokenizer: tiktoken.Encoding
    softmask: SoftMask | None
    system: str | None  # the system line of its conversations
    options: dict  # of `generate`

    @property
    def settings(self) -> list:
        """What decides its samples, beside the strategy, the seeds and the text to start from."""
        digest = hashlib.blake2b()
        for p in self.model.parameters():
            digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        soft = self.softmask and [self.softmask.k, self.softmask.omegas()]
        return [digest.hexdigest(), soft, repr(self.options)]

    def respond(self, prompts: list[list[int]], new_tokens: int, nfe: int, how: Strategy, **more):
        """See `decoding.respond`."""
        eos = self.tokenizer.eot_token
        options = self.options | more
        return respond(self.model, prompts, new_tokens, nfe, eos, self.softmask, how, **options)


def load(args: argparse.Namespace) -> Writer:
    """The network of the flags: --ckpt, --adapter, soft-masking, machine."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    stored = torch.bfloat16 if args.dtype == "auto" else dtype  # Dream's weights
    state = load_checkpoint(args.ckpt, "--ckpt", device, stored)
    tokenizer = load_tokenizer(state["tokenizer"])
    model = build_model(state, ema=True).to(device).eval()
    if args.adapter:
        adapter = read_adapter(args.adapter, "--adapter")
        merge_adapter(model, adapter)
        state |= {"softmask": adapter["softmask"], "schedule": adapter["schedule"]}
    kind, by_masks = args.sm_schedule or "none", args.sm_by_masks
    if args.sm_schedule is None and state.get("schedule", "none") != "none":
        kind, by_masks = state["schedule"], True
    schedule = Schedule(kind, args.sm_order, args.sm_switch, by_masks)
    softmask = softmask_of(args, state)
    if softmask is None and (kind != "none" or args.reuse_unchanged):
        why = "--no-sm is given" if args.no_sm else f"{args.ckpt} is a binary model"
        raise ValueError(f"--sm-schedule, --reuse-unchanged: for soft-masking, but {why}")
    system = args.system
    if isinstance(model, Dream) and system is None:
        system = system_line(state["tokenizer"]["folder"])
    eos = tokenizer.eot_token
    ends = (eos, tokenizer._special_tokens.get(TURN_ENDS, eos))
    options = dict(
        dtype=dtype, schedule=schedule, reuse_unchanged=args.reuse_unchanged,
        block_length=args.block_length, cache=args.cache, stop=ends if args.stop_early else (),
    )  # fmt: skip
    softmask = softmask.to(device) if softmask is not None else None
    return Writer(model, tokenizer, softmask, system, options)


def main(args: argparse.Namespace) -> int:
    check(args)
    writer = load(args)
    if isinstance(writer.model, Dream) or args.chat:
        return converse(args, writer)
    if args.new_tokens or args.system or args.stop_early:
        raise ValueError("--new-tokens, --system, --stop-early: for a Dream model, or with --chat")
    return write_samples(args, writer)


def converse(args: argparse.Namespace, writer: Writer) -> int:
    """Answers to --prompt or in a --chat."""
    if args.infill or args.out or args.trace or args.length:
        raise ValueError("--infill, --out, --trace, --length: not for a Dream model or a --chat")
    model, tokenizer, limit = writer.model, writer.tokenizer, writer.model.config.block_size
    new_tokens = min(256, limit // 2) if args.new_tokens is None else args.new_tokens
    if not 1 <= new_tokens < limit:
        raise ValueError(f"--new-tokens {new_tokens}: 1 to {limit - 1} for this network")
    nfe = steps_of(args, new_tokens)
    how = strategy_of(args, new_tokens, nfe, answers=True)
    kept = 0

    def answer_to(messages: list[dict], seed: int) -> str:
        prompt = chat_ids(tokenizer, messages, writer.system)
        start = prompt + [model.mask_id] * new_tokens
        with TerminalView(
            lambda ids: answer(tokenizer, ids), start, model.mask_id, len(prompt)
        ) as view:
            watch = view.update if view.live and (args.chat or args.watch) else False
            answers, done = writer.respond(
                [prompt], new_tokens, nfe, how, seeds=[seed], trace=watch
            )
        nonlocal kept
        if done.cache_bytes > kept:
            kept = done.cache_bytes
            print(f"cache: {kept / 1e6:.1f} MB of keys and values", file=sys.stderr)
        return answer(tokenizer, answers[0])

    if args.chat:
        return chat(answer_to, args.seed)
    if not args.prompt:
        raise ValueError("--prompt or --chat: a Dream model answers a message")
    for i in range(args.num):
        text = answer_to([{"role": "user", "content": args.prompt}], seed_of(args.seed, i))
        print(text if args.num == 1 else f"--- sample {i}\n{text}")
    return 0


def chat(answer_to: Callable[[list[dict], int], str], seed: int) -> int:
    """Talk until the input ends. Ctrl-C stops an answer; at the prompt, or once more, it leaves."""
    messages: list[dict] = []
    if sys.stdin.isatty():
        print("Ctrl-C stops an answer, twice leaves; an empty line starts over.")
    while True:
        try:
            content = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            return 130
        if not content.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": content})
        try:
            text = answer_to(messages, seed_of(seed, len(messages)))
        except KeyboardInterrupt:
            messages.pop()
            print("(stopped; Ctrl-C once more leaves)")
            continue
        except ValueError as error:  # a message that does not fit: the next may
            messages.pop()
            hint = "an empty line starts the conversation over"
            print(f"sample.py: {error}; {hint}", file=sys.stderr)
            continue
        print(text, flush=True)
        messages.append({"role": "assistant", "content": text})


def write_samples(args: argparse.Namespace, writer: Writer) -> int:
    """Samples of a DiT, printed or appended to --out; under torchrun each process takes a share."""
    model, tokenizer, softmask, _, options = writer
    device, limit = model.embedding.device, model.config.block_size
    length = limit if args.length is None else args.length
    if not 1 <= length <= limit:
        raise ValueError(f"--length {length}: the network takes 1 to {limit} tokens")
    start = torch.tensor(template(tokenizer, length, args.prompt, args.infill), device=device)
    masks = int((start == model.mask_id).sum())
    nfe = steps_of(args, masks)
    how = strategy_of(args, length, nfe, answers=False)
    world = join_world(device)
    settings = [*writer.settings, repr(how), start.tolist(), nfe, args.seed]
    samples = Samples(args.out, settings, world)
    k = "V" if softmask is not None and softmask.k is None else softmask and softmask.k
    omegas = softmask and softmask.omegas()
    head = {"strategy": how.name, "nfe": nfe, "k": k, "omegas": omegas, "mask": model.mask_id}
    head["start"] = start.tolist()
    tracing = args.trace and world.rank == 0
    trace = TraceFile(args.trace, head, partial(decode, tokenizer)) if tracing else None
    feedback = "binary" if softmask is None else "sm"
    about = {"strategy": how.name, "nfe": nfe, "feedback": feedback}
    already, made, begin = samples.done, [], time.perf_counter()
    watched = args.watch and world.size == 1 and sys.stdout.isatty()  # one at a time
    total = max(0, args.num - already) * nfe
    shown = {"disable": True} if watched else {}
    with progress(total=total, desc="decoding", unit=" steps", **shown) as bar:

        def make(numbers: range) -> list[dict]:
            happened = []
            view = TerminalView(partial(decode, tokenizer), start.tolist(), model.mask_id)
            with view if watched else contextlib.nullcontext():

                def tell(entry: dict) -> None:
                    happened.append(entry)
                    if watched:
                        view.update(entry)
                        time.sleep(SHOWN_SECONDS)

                x, done = generate(
                    model, start.repeat(len(numbers), 1), nfe, softmask, how,
                    trace=tell if watched or trace is not None else False,
                    seeds=[seed_of(args.seed, i) for i in numbers], **options,
                    on_step=lambda i, x: bar.update(len(x) * world.size),
                )  # fmt: skip
            made.append(done)
            if trace is not None:
                trace.add(happened, numbers)
            return [about | {"text": decode(tokenizer, ids), "ids": ids} for ids in x.tolist()]

        samples.fill(args.num, 1 if watched else args.batch_size, make)
    seconds = time.perf_counter() - begin
    if world.rank == 0:
        for i, entry in enumerate(samples.kept):
            print(f"--- sample {i}\n{entry['text']}")
        new, passes = samples.done - already, sum(done.passes for done in made)
        where = f" in {args.out}, which holds {samples.done}" if args.out else ""
        steps = f"{nfe} steps" if how.threshold is None else f"threshold {how.threshold:g}"
        kept = max((done.cache_bytes for done in made), default=0)
        print(
            f"--- {new} samples{where}, {masks * new / seconds:.1f} tokens per second; "
            f"{how.name}, {steps}, {passes / max(1, len(made)):.1f} network passes a batch; "
            f"{'soft-masked' if softmask is not None else 'binary'}"
            + (f"; cache {kept / 1e6:.1f} MB" if kept else "")
        )
    world.leave()
    return 0


def decoding_flags(
    p: argparse.ArgumentParser, budget: str = "steps as a share of the masked tokens, like 1/4"
) -> None:
    """The flags of `load`, `steps_of` and `strategy_of` but for the network's own."""
    # fmt: off
    add = p.add_argument_group("how").add_argument
    add("--nfe", type=int, help="decoding steps; default: one a masked token")
    add("--budget", help=budget)
    add("--strategy", choices=ANCESTRAL + ORDERS, help="default: mdlm; for answers entropy")
    add("--preset", choices=("remdm-paper",),
        help="nucleus 0.9; remdm-cap for fewer steps than tokens, else remdm-loop")
    add("--temperature", type=float, help="default: 1, answers 0.1; 0: the most likely token")
    add("--top-p", type=float, help="nucleus; default: 1, all of the vocabulary; answers 0.9")
    add("--stop-early", action="store_true", help="an answer that ended is filled at once")
    add("--alg-temp", type=float, help="of maskgit_plus, topk_margin, entropy: order at random")
    defaults = ", ".join(f"{name} {eta}" for name, eta in ETA.items())
    add("--block-length", type=int, help="decode blocks of so many tokens, one after the other")
    add("--cache", choices=CACHES, default="none",
        help="keep keys and values: of what is before a block (prefix), or on both sides (dual)")
    add("--threshold", type=float, help="open every mask whose token is that probable, like 0.9")
    add("--eta", type=float, help=f"of remasking; default: {defaults}")
    add("--t-on", type=float, help="remdm-loop: its loop starts at this time; default: 0.55")
    add("--t-off", type=float, help="and ends at this; default: 0.05")
    add("--alpha-on", type=float, help="with this share of tokens drawn; default: 0.9")
    add = p.add_argument_group("soft-masking").add_argument
    add("--no-sm", action="store_true", help="plain masks even with a soft-masked checkpoint")
    add("--omegas", help="omega_s,omega_a,omega_b (with --k V a fourth, tau) in place of its own")
    add("--k", help="tokens fed back with --omegas; default: 3; V: all")
    add("--sm-schedule", choices=("none", "linear", "step"),
        help="soft-masking fades (appendix B.4); default: the adapter's, else none")
    add("--sm-by-masks", action="store_true", help="with the masks left instead of the time left")
    add("--sm-order", choices=("sm-binary", "binary-sm"), default="sm-binary", help="out, or in")
    add("--sm-switch", type=float, default=0.5, help="the time t' of step")
    add("--reuse-unchanged", action="store_true",
        help="no new pass after a step in which no position changed, as the released sampler")
    add = p.add_argument_group("machine").add_argument
    add("--batch-size", type=int, default=16, help="texts that are decoded at once")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    # fmt: on


def parser() -> Parser:
    p = Parser(description="Decode text.")
    # fmt: off
    add = p.add_argument_group("what").add_argument
    add("--ckpt", "--model", default="out/ckpt.pt",
        help="a checkpoint, a folder, a hub id, dream or dream-coder")
    add("--adapter", help="a PEFT folder of a LoRA or DoRA, merged into the weights")
    add("--num", type=int, default=1, help="samples")
    add("--length", type=int, help="tokens of a sample; default: the network's length")
    add("--prompt", default="", help="a prefix that stays; for a Dream model a user's message")
    add("--chat", action="store_true", help="talk with a Dream model, or a fine-tuned network")
    add("--system", help="the system line of the conversation; default: the model's own")
    add("--new-tokens", type=int,
        help="tokens of an answer; default: 256, or half of what the network takes")
    add("--infill", default="", help=f"a text: each {MASK_TEXT} is filled")
    add("--out", help="append the samples to this JSONL file as they come; what it holds is kept")
    add("--trace", help="write what happened at every step and position to this JSONL file")
    add("--seed", type=int, default=0)
    add("--watch", action="store_true", help="show in the terminal how a text or an answer forms")
    # fmt: on
    decoding_flags(p)
    return p


if __name__ == "__main__":
    run(main, parser().parse_args())

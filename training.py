"""A training run, whatever is trained: `train.py` and `finetune_lora.py` are kinds of it.

A step is Algorithm 1 over a global batch, shared by the processes of a job; validations, saves and
reports come in between. A run can be stopped or killed anywhere and goes on, to the bit on a CPU,
from its last save. What differs, a `Run` leaves to its kinds: how a batch is drawn, which weights a
checkpoint holds, how the learning rate goes.
"""

import argparse
import math
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime import (
    ALONE,
    Metrics,
    Parser,
    StopSignal,
    World,
    autocast,
    generator,
    get_rng,
    memory,
    progress,
    set_rng,
    writable_folder,
)
from softmask import (
    SoftMask,
    antithetic_times,
    diffusion_loss,
    negative_entropies,
    soft_sequences,
)
from viz import plot_curves
from weights import load_checkpoint, save_checkpoint, save_omegas

EVAL_SEED = 1234  # the same masks in every validation of every run
B_L, B_H = 1e-3, 1.0  # the times of pretraining and validation

Batch = tuple[Tensor, ...]  # x0 (B, L), and where not all of it counts: response, attend (B, L)


# What is trained, and what a checkpoint keeps of it


class EMA:
    """Moving average: shadow -= (1 - d)(shadow - p), d = min(decay, (1 + n)/(10 + n))."""

    def __init__(self, parameters: Iterator[nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.decay, self.updates = decay, 0
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - d)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters are their averages."""
        own = [p.data for p in self.parameters]
        try:
            for p, shadow in zip(self.parameters, self.shadow, strict=True):
                p.data = shadow
            yield
        finally:
            for p, data in zip(self.parameters, own, strict=True):
                p.data = data


class Objective(nn.Module):
    """`diffusion_loss` as a module, which DistributedDataParallel can wrap.

    Where the weights are sharded (`in_step`), a pass is an affair of all processes: one without a
    soft-masked sequence takes part in the others' first pass with a token.
    """

    def __init__(
        self,
        model: nn.Module,
        softmask: SoftMask | None,
        average: str = "tokens",
        in_step: bool = False,
    ):
        super().__init__()
        self.model, self.softmask = model, softmask
        self.average, self.in_step = average, in_step

    def forward(
        self, x0: Tensor, t: Tensor, noise: Tensor, soft: Tensor, response=None, attend=None
    ) -> Tensor:
        if self.in_step and self.softmask is not None and not soft.any():
            with torch.no_grad():
                self.model.hidden(self.model.embed(x0[:1, :1]), t[:1])
        return diffusion_loss(
            self.model, x0, t, noise, self.softmask, soft, response, attend, self.average
        )


@dataclass(kw_only=True)
class Run(ABC):
    """Everything a training run changes or is made of; what differs between pretraining and
    fine-tuning is left to methods.

    `g`, a CPU generator with the same state in all processes, draws data, times, masks and
    soft-masked sequences of the whole global batch, so that none of them depends on the number of
    processes; dropout draws from PyTorch's own generators, which differ between processes.
    """

    args: argparse.Namespace
    world: World
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    softmask: SoftMask | None
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    g: torch.Generator
    ema: EMA | None = None
    interval: tuple[float, float] = (B_L, B_H)  # the times of a validation
    step: int = 0
    tokens: int = 0  # that this process has seen trained on
    scores: dict[str, float] | None = None  # of the last validation
    warm: bool = False  # starts from trained weights, which are validated before the first step

    files = ("ckpt.pt", "softmask.json", "curves.svg")  # of the run, in --out

    @abstractmethod
    def draw(self) -> tuple[float, list[Batch]]:
        """Algorithm 1, lines 2 and 3, of a global batch: what its loss is divided by, and this
        process's micro-batches (x0, t, noise, soft, and maybe response, attend)."""

    @abstractmethod
    def factor(self) -> float:
        """The share of both peak learning rates at this step."""

    @abstractmethod
    def held_out(self, n: int | None = None) -> list[Batch]:
        """The held-out sequences in batches, as many as the run validates on, or n of them."""

    @abstractmethod
    def described(self) -> str:
        """The run in a line."""

    @abstractmethod
    def table(self) -> str:
        """The last validation's `scores` in a table."""

    @abstractmethod
    def line(self) -> str:
        """The last validation's `scores` in a line."""

    @abstractmethod
    def own_state(self) -> dict:
        """The entries of a checkpoint that name the weights, text and tokenizer."""

    def validate(self) -> dict[str, float]:
        """NELBO of the held-out text (with averaged weights): in one pass, soft-masked in two."""
        with nullcontext() if self.ema is None else self.ema.applied():
            where = (self.device, self.dtype, self.world, *self.interval)
            held_out = self.held_out()
            scores = {"val_nelbo_1pass": nelbo(self.model, held_out, None, *where)[0]}
            if self.softmask is not None:
                found = nelbo(self.model, held_out, self.softmask, *where)
                scores["val_nelbo_2pass"] = found[0]
        return scores

    @abstractmethod
    def finish(self) -> None:
        """What rank 0 prints at the end."""

    def save(self, out: Path) -> None:
        rng = self.world.gather(get_rng(self.device))
        if self.world.rank > 0:
            return
        state = {
            "config": self.model.config.to_dict(),
            "ema": None,
            "updates": 0,
            "softmask": None,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "generator": self.g.get_state(),
            "rng": rng,
            "args": saved_args(self.args),
            **self.own_state(),
        }
        if self.ema is not None:
            state |= {"ema": self.ema.shadow, "updates": self.ema.updates}
        if self.softmask is not None:
            state["softmask"] = {"k": self.softmask.k, "state": self.softmask.state_dict()}
        save_checkpoint(out, state, self.softmask)

    def restore(self, state: dict) -> None:
        """Continue where `state` was saved; the weights are in place already."""
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, (self.args.lr, self.args.lr_sm)):
            group["peak"] = peak
        if self.ema is not None:
            self.ema.updates = state["updates"]
            for shadow, saved in zip(self.ema.shadow, state["ema"], strict=True):
                shadow.copy_(saved)
        self.g.set_state(state["generator"])
        self.step = state["step"]
        if len(state["rng"]) == self.world.size:
            set_rng(state["rng"][self.world.rank], self.device)
        elif self.world.rank == 0:
            was, now = len(state["rng"]), self.world.size
            print(f"saved by {was} processes, resumed by {now}: same batches, new dropout draws")


def mode(r: Run) -> str:
    return f"soft-masked, k {r.softmask.k or 'V'}" if r.softmask is not None else "binary"


def share_batch(args: argparse.Namespace, size: int) -> None:
    """Cut the global batch into equal shares for `size` processes, and a share into the fewest
    equal micro-batches of at most --batch-size. ValueError where it does not divide."""
    if args.global_batch is None:
        args.global_batch = args.batch_size * args.grad_accum * size
    share, rest = divmod(args.global_batch, size)
    if rest:
        raise ValueError(f"--global-batch {args.global_batch}: no multiple of {size} processes")
    fewest = -(-share // args.batch_size)
    args.grad_accum = next(n for n in range(fewest, share + 1) if share % n == 0)


# Algorithm 1


def draw_masks(x0: Tensor, g: torch.Generator, b_l: float, b_h: float) -> tuple[Tensor, Tensor]:
    """Times t (B,) in [b_l, b_h] and noise (B, L) in U(0, 1), from which `corrupt` masks x0."""
    t = antithetic_times(torch.rand(len(x0), generator=g), b_l, b_h)
    return t, torch.rand(x0.shape, generator=g)


def draw_soft(r: Run, n: int) -> Tensor:
    """Which of n sequences are soft-masked, bool (n,); one number is drawn, whatever they are."""
    u = torch.rand((), generator=r.g, dtype=torch.float64).item()
    return soft_sequences(u, n, r.args.p_sm if r.step >= r.args.sm_start else 0.0)


def training_step(r: Run) -> tuple[float, float]:
    """One step of Algorithm 1 over a global batch: the loss (nats a token) and the gradient norm.

    A FloatingPointError, before any weight is changed, where either is not finite.
    """
    if r.softmask is not None and r.step == r.args.sm_start > 0:
        start_omegas(r)
    total, shares = r.draw()  # lines 2 and 3
    loss = torch.zeros((), device=r.device)
    for i, share in enumerate(shares, start=1):
        last = r.world.size == 1 or i == len(shares)
        with nullcontext() if last else r.objective.no_sync():
            with autocast(r.device, r.dtype):
                part = r.objective(*(v.to(r.device) for v in share)) / total  # lines 4 to 8
            (part * r.world.size).backward()  # processes average their gradients
        loss += part.detach()
    loss = r.world.reduce(loss.item())
    parameters = [p for group in r.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, r.args.clip).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm} at step {r.step + 1}")
    factor = r.factor()
    for group in r.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    r.optimizer.step()  # line 9
    r.optimizer.zero_grad(set_to_none=True)
    if r.ema is not None:
        r.ema.update()
    r.step += 1
    return loss, norm


@torch.no_grad()
def start_omegas(r: Run) -> None:
    """Start the omegas where the network stands (appendix A.2): LB, the 5 % quantile of -H, is
    measured on 64 held-out sequences at training times. ValueError where none is masked."""
    g, found = generator(EVAL_SEED), []
    r.model.eval()
    for x0, *rest in r.held_out(64):
        drawn = draw_masks(x0, g, r.args.b_l, r.args.b_h)
        with autocast(r.device, r.dtype):
            found.append(
                negative_entropies(r.model, *(v.to(r.device) for v in (x0, *drawn, *rest)))
            )
    r.model.train()
    found = torch.cat(found).float()
    if not len(found):
        raise ValueError("no position is masked at these times: raise --b-h")
    r.softmask.start(r.args.omega_s, found.quantile(0.05).item())
    for p in r.softmask.parameters():
        r.optimizer.state.pop(p, None)  # the averages of steps that had no feedback


# Validation


@torch.no_grad()
def nelbo(
    model, batches: list[Batch], softmask: SoftMask | None, device, dtype,
    world: World = ALONE, b_l: float = B_L, b_h: float = B_H,
) -> tuple[float, float]:  # fmt: skip
    """NELBO in nats a token (a response token, where there are such), and its standard error over
    batches; the rest as in `batch_sums`."""
    return mean_and_error(*batch_sums(model, batches, softmask, device, dtype, world, b_l, b_h))


@torch.no_grad()
def batch_sums(
    model, batches: Sequence[Batch], softmask: SoftMask | None, device, dtype,
    world: World = ALONE, b_l: float = B_L, b_h: float = B_H, at_least_one: bool = True,
) -> tuple[list[float], list[int]]:  # fmt: skip
    """The loss of each batch in nats, and the number of its tokens (of its response).

    With a soft mask every sequence takes two passes, without one. Times and masks depend on the
    number and shape of the batches alone, so that models can be compared. Processes take batches in
    turns; all make the same number of passes, for those whose weights are sharded. A response has
    always a masked token, as in fine-tuning; the expectation is the NELBO where that need not be
    (not `at_least_one`).
    """
    training = model.training
    model.eval()
    g = generator(EVAL_SEED)
    sums, counts, last = [], [], len(batches) - 1
    for i, (x0, *rest) in enumerate(progress(batches, desc="validating", leave=False)):
        drawn = draw_masks(x0, g, b_l, b_h)
        counts.append(int(rest[0].sum()) if rest else x0.numel())
        sums.append(0.0)
        turn = i % world.size
        if turn == world.rank or (i == last and turn < world.rank):
            x0, t, noise, *rest = (v.to(device) for v in (x0, *drawn, *rest))
            if rest and not at_least_one:
                noise, rest[0] = noise.masked_fill(~rest[0], 1.0), None  # 1: never masked
            with autocast(device, dtype):
                loss = diffusion_loss(model, x0, t, noise, softmask, None, *rest).item()
            sums[-1] = loss if turn == world.rank else 0.0
    sums = [sum(parts) for parts in zip(*world.gather(sums))]
    model.train(training)
    return sums, counts


def mean_and_error(sums: list[float], counts: list[int]) -> tuple[float, float]:
    """sum / count over all batches, and its standard error: a batch weighs what it counts."""
    mean, n = sum(sums) / sum(counts), len(sums)
    weights = [c * n / sum(counts) for c in counts]
    spread = sum((w * (s / c - mean)) ** 2 for w, s, c in zip(weights, sums, counts))
    return mean, math.sqrt(spread / (n * (n - 1))) if n > 1 else math.nan


def score_of(scores: dict) -> float:
    """The score that counts: soft-masked in two passes, else in one."""
    return scores.get("val_nelbo_2pass", scores["val_nelbo_1pass"])


def perplexity(nats: float) -> float:
    """exp of a NELBO in nats a token."""
    return math.exp(nats) if nats < 700 else math.inf


# The loop


def refuse_to_overwrite(args: argparse.Namespace, files: tuple[str, ...]) -> None:
    """ValueError where --out holds one of a run's files, and nothing says what is to become of it;
    but torchrun may start a job again that died before its first save."""
    if args.resume or args.overwrite or _restarts():
        return
    for name in files:
        if (Path(args.out) / name).exists():
            raise ValueError(
                f"--out {args.out}: holds a run ({name}); go on with it by --resume, start it over "
                "by --overwrite, or choose another folder"
            )


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def drive(r: Run, program: str) -> int:
    """Train to the end, or until a signal or a loss that is not finite; returns the exit status."""
    args, out = r.args, writable_folder(r.args.out, "--out")
    if not args.resume and r.world.rank == 0:
        for name in r.files:  # of a run that is started over, or died before its first save
            (out / name).unlink(missing_ok=True)
    metrics = Metrics(out / "metrics.jsonl", r.step, r.world)
    if args.resume and r.world.rank == 0:
        save_omegas(out, r.step, r.softmask)  # a run may die between its two files
    say = print if r.world.rank == 0 else _silent
    kind = str(r.dtype).removeprefix("torch.")
    say(f"{r.described()}, {r.world.size} x {r.device.type} {kind}", flush=True)
    with StopSignal() as stop, progress(total=args.steps, initial=r.step, desc="training") as bar:
        try:
            signum = loop(r, out, metrics, stop, bar)
        except FloatingPointError as error:
            kept = f"{out / 'ckpt.pt'} holds the last save"
            kept = kept if (out / "ckpt.pt").exists() else "nothing was saved yet"
            raise ValueError(
                f"{error}: stopped; {kept}; try a lower --lr or --clip, or --dtype float32"
            )
    if signum:
        if r.world.rank == 0:
            name, again = signal.Signals(signum).name, f"{program} --resume --out {args.out}"
            print(f"{program}: {name}: saved step {r.step}; go on with: {again}", file=sys.stderr)
        r.world.leave()
        return 128 + signum
    r.scores = r.scores or r.validate()
    say(r.table())
    if r.softmask is not None:
        say("  ".join(f"{name} {value:.4f}" for name, value in r.softmask.omegas().items()))
    if r.world.rank == 0:
        plot_curves([str(out)], str(out / "curves.svg"))
        r.finish()
    r.world.leave()
    return 0


def _silent(*args, **kwargs) -> None:
    pass


def loop(r: Run, out: Path, metrics: Metrics, stop: StopSignal, bar) -> int:
    """Train to the end, or until a signal, whose number is returned: the step is done and saved."""
    args = r.args
    due = r.warm if r.step == 0 else r.step % args.eval_every == 0 or r.step == args.steps
    if due and not r.world.reduce(metrics.validated, "MAX"):  # it was stopped before it could
        report(r, metrics, bar)
    clock, at = time.perf_counter(), r.tokens
    while r.step < args.steps:
        loss, norm = training_step(r)
        bar.update()
        signum = int(r.world.reduce(stop.signum or 0, "MAX"))
        last = r.step == args.steps or signum > 0
        if r.step % args.log_every == 0 or last:
            rate = (r.tokens - at) / (time.perf_counter() - clock)
            omegas = r.softmask.omegas() if r.softmask is not None else {}
            held = memory(r.device)
            lr, *lr_sm = (group["lr"] for group in r.optimizer.param_groups)
            rates = {"lr": lr} | ({"lr_sm": lr_sm[0]} if lr_sm else {})
            metrics.log(
                step=r.step,
                loss=loss,
                grad_norm=norm,
                tokens_per_second=round(rate, 1),
                memory=held,
                **rates,
                **omegas,
            )
            shown = {name: f"{value:.3g}" for name, value in (rates | omegas).items()}
            speed = {"tok/s": f"{rate:.0f}", "GB": f"{held / 1e9:.2f}"}
            bar.set_postfix(loss=f"{loss:.3f}", **shown, **speed)
        if r.step % args.save_every == 0 or last:
            r.save(out)
        if signum and r.step < args.steps:
            return signum
        if r.step % args.eval_every == 0 or r.step == args.steps:
            report(r, metrics, bar)
        if r.step % args.log_every == 0:
            clock, at = time.perf_counter(), r.tokens
    return 0


def report(r: Run, metrics: Metrics, bar) -> None:
    """Validate, log and print one line."""
    r.scores = r.validate()
    if r.world.rank == 0:
        metrics.log(step=r.step, **r.scores)
        bar.write(r.line(), file=sys.stdout)
        sys.stdout.flush()


# The command line


def shared_flags(p: Parser) -> dict[str, Callable]:
    """The flags of every training; returns each group's add_argument, by its title."""
    group = {
        title: p.add_argument_group(title).add_argument
        for title in ("method", "run", "text", "network", "optimiser", "reports", "machine")
    }
    # fmt: off
    add = group["method"]
    add("--k", help="tokens fed back, default 3, dream-coder 1; V: all, with a temperature")
    add("--p-sm", type=float, default=0.8, help="share of sequences with a first pass")
    add("--omega-s", type=float, default=1e-2, help="start of omega_s")
    add("--b-l", type=float, default=0.1, help="times are drawn from [b_l, b_h]")
    add("--b-h", type=float, default=B_H, help="1 is all masked")
    add = group["run"]
    add("--out", default="out", help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="start over where --out holds a run")
    add("--seed", type=int, default=1)
    group["text"]("--cache", default="corpora", help="folder of tokenized texts")
    add = group["optimiser"]
    add("--steps", type=int, default=1800, help="updates of the weights")
    add("--batch-size", type=int, default=16, help="sequences of a process's backward pass")
    add("--grad-accum", type=int, default=1, help="backward passes of a step")
    add("--global-batch", type=int,
        help="sequences of a step; sets --grad-accum; default: those of all processes")
    add("--lr", type=float, default=1e-3, help="learning rate of the backbone")
    add("--lr-sm", type=float, default=1e-2, help="learning rate of the omegas")
    add("--clip", type=float, default=1.0, help="gradient norm")
    add = group["reports"]
    add("--eval-every", type=int, default=600, help="steps between validations")
    add("--log-every", type=int, default=10, help="steps between lines of metrics")
    add("--save-every", type=int, default=300, help="steps between checkpoints")
    add = group["machine"]
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
        help="less memory, a third more time")
    # fmt: on
    return group


def recall(p: Parser, argv: list[str], fixed: list[str], tuning: bool) -> argparse.Namespace:
    """The arguments, and in `state` the checkpoint of the run that --resume goes on with: its
    arguments are the defaults, and ValueError where a flag would change one of the `fixed`, or
    where it is no fine-tuning (`tuning`), or one."""
    args = p.parse_args(argv)
    args.state = None
    if _restarts() and (Path(args.out) / "ckpt.pt").is_file():
        argv = [a for a in argv if a != "--overwrite"]  # torchrun started the same command again
        args.resume = True
    if not args.resume:
        return args
    if not (Path(args.out) / "ckpt.pt").is_file():
        raise ValueError(f"--resume: no run in --out {args.out}; start one without --resume")
    state = load_checkpoint(args.out, "--resume --out", tuning=True)
    if ("adapter" in state) != tuning:
        other = "train.py" if tuning else "finetune_lora.py"
        raise ValueError(f"--resume: --out {args.out} holds a run of {other}; go on with that")
    p.set_defaults(**state["args"])
    args = p.parse_args([*argv, "--resume"])
    args.state = state
    for name in fixed:
        value = state["args"].get(name)
        if getattr(args, name) != value:
            raise ValueError(f"{given(args, name)}: the run has {value}; drop it, or start anew")
    return args


def given(args: argparse.Namespace, name: str) -> str:
    """A flag and its value, as a person would write them."""
    flag, value = name.replace("_", "-"), getattr(args, name)
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(value) if isinstance(value, list) else value}"


def saved_args(args: argparse.Namespace) -> dict:
    """What a checkpoint keeps of the arguments: all but those of this one call."""
    of_the_call = ("state", "resume", "overwrite", "out", "merge_to")
    return {name: value for name, value in vars(args).items() if name not in of_the_call}


def parse_k(text: str | None, size: int) -> int | None:
    text = "3" if text is None else text
    if text == "V":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= size:
        raise ValueError(f"--k {text}: from 1 to the vocabulary's {size}, or V for all of it")
    return int(text)


def check(args: argparse.Namespace, more: list = ()) -> None:
    """ValueError that names the flag whose value cannot be: of the flags of every training, and of
    those that `more` (names, what is wanted, whether a value is it) lists."""
    counts = "steps batch_size grad_accum global_batch block_size"
    counts += " eval_every eval_batches log_every save_every"
    rules = [(counts, "at least 1", lambda v: v >= 1)]
    rules += [("p_sm dropout decay ema", "between 0 and 1", lambda v: 0 <= v <= 1)]
    rules += [("omega_s", "between 0 and 1, both excluded", lambda v: 0 < v < 1)]
    rules += [("lr lr_sm clip", "above 0", lambda v: v > 0)]
    rules += [("seed", "from 0 to 2^62", lambda v: 0 <= v < 2**62), *more]
    for names, wanted, holds in rules:
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not holds(value):
                raise ValueError(f"{given(args, name)}: {wanted}")
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite: one of them")
    if not 0 < args.b_l < args.b_h <= 1:
        raise ValueError(f"--b-l {args.b_l} --b-h {args.b_h}: need 0 < b_l < b_h <= 1")

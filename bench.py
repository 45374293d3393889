"""Speed and memory, each beside the textbook version (tests/reference.py), in one run.

    python bench.py step          # a training step of the 169M network: SM, binary, textbook

Ratios and medians: the sides of a ratio take turns, so that a noisy machine is noisy for both.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from model import SIZES, DiT, DiTConfig
from runtime import Parser, autocast, generator, pick_device, pick_dtype, progress, run
from softmask import SoftMask, antithetic_times, diffusion_loss, soft_sequences
from tests import reference

GPT2_VOCABULARY = 50_258


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 4096) -> float:
    """FLOP/s of an n x n matrix product, the best of ten: the machine's own rate."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(device, lambda: a @ b) for _ in range(10))


def timed(device: torch.device, f) -> float:
    """Seconds that f() takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Step:
    """A whole training step of a network with random weights: loss, backward, clip, AdamW, EMA."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.model = DiT(DiTConfig(args.vocab, **SIZES[args.config])).to(device).train()
        self.model.checkpoint_activations = args.checkpoint_activations
        for p in self.model.parameters():  # adaLN and the head start at zero: give them values
            if p.dim() == 2 and not p.any():
                nn.init.normal_(p, std=0.02)
        self.softmask = SoftMask(3, omega_s=0.5).to(device)
        self.parameters = [*self.model.parameters(), *self.softmask.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.shadow = [p.detach().clone() for p in self.parameters]

    def batch(self, n: int, length: int, p_sm: float = 0.8):
        g, size = generator(0), self.model.vocab_size
        x0 = torch.randint(size - 1, (n, length), generator=g)
        t = antithetic_times(torch.rand(n, generator=g), 1e-3, 1.0)
        noise = torch.rand(n, length, generator=g)
        return [v.to(self.device) for v in (x0, t, noise, soft_sequences(0.0, n, p_sm))]

    def __call__(self, kind: str, x0, t, noise, soft) -> None:
        """One step; kind is "sm", "binary" or "textbook" (binary, the whole head everywhere)."""
        with autocast(self.device, self.dtype):
            if kind == "textbook":
                loss = textbook_loss(self.model, x0, t, noise)
            else:
                softmask = self.softmask if kind == "sm" else None
                loss = diffusion_loss(self.model, x0, t, noise, softmask, soft)
        (loss / x0.numel()).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, self.parameters, 1e-4)


def textbook_loss(model: DiT, x0, t, noise):
    """The binary loss with the vocabulary at all positions: logits, softmax and one-hot targets
    (B, L, V) in float32. The table is looked up, not multiplied by one-hot vectors."""
    xt = reference.corrupt(x0, t, noise, model.mask_id, model.mask_eps)
    z = model.head(model.hidden(model.embed(xt), None)).float()
    p = reference.probabilities(z, xt, model.mask_id)
    return reference.nelbo_sum(p, x0, xt, t, model.mask_id)


def flops(model: DiT, n: int, length: int, masked: int) -> float:
    """Arithmetic of a binary step: three times the forward pass's matrix products."""
    c = model.config
    block = 12 * c.width**2 * 2 + 4 * length * c.width
    return 3.0 * (n * length * c.n_layers * block + masked * 2 * c.width * c.vocab_size)


def bench_step(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    step = Step(args, device, dtype)
    length = args.length or step.model.config.block_size
    batch = step.batch(args.batch_size, length)
    kinds = ("sm", "binary", "textbook")
    times = {kind: [] for kind in kinds}
    rates = []
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: at least 1")
    for i in progress(range(args.repeats + 1), desc="steps"):
        rates.append(matmul_rate(device, dtype))
        for kind in kinds:
            seconds = timed(device, lambda kind=kind: step(kind, *batch))
            if i > 0:  # the first round warms up
                times[kind].append(seconds)
    median = {kind: statistics.median(times[kind]) for kind in kinds}
    rate = statistics.median(rates)
    soft = int(batch[3].sum())
    masked = int((batch[2] < 0.999 * batch[1][:, None]).sum())
    done = flops(step.model, args.batch_size, length, masked) / median["binary"]
    print(
        f"{args.config}: {args.batch_size} sequences of {length}, {soft} soft-masked, {masked} "
        f"masked positions, {device.type} {str(dtype).removeprefix('torch.')}, "
        f"medians of {args.repeats}"
    )
    for kind in kinds:
        print(
            f"{kind:10}{median[kind]:9.3f} s a step{median[kind] / median['binary']:9.2f} x binary"
        )
    print(
        f"binary step {median['textbook'] / median['binary']:.2f} times as fast as the textbook's"
    )
    print(
        f"binary step {done / 1e9:.0f} GFLOP/s, {done / rate:.0%} of the machine's "
        f"{rate / 1e9:.0f} in a matrix product"
    )


def bench_memory(args: argparse.Namespace) -> None:
    """Peak memory of a step above weights, gradients, optimiser and EMA; a process each."""
    peaks = {}
    for kind in ("sm", "binary", "textbook"):
        flags = [
            "--config",
            args.config,
            "--batch-size",
            str(args.batch_size),
            "--dtype",
            args.dtype,
        ]
        flags += ["--device", args.device, "--vocab", str(args.vocab)]
        flags += ["--length", str(args.length)] if args.length else []
        flags += ["--checkpoint-activations"] * args.checkpoint_activations
        command = [sys.executable, __file__, "peak", *flags, "--kind", kind]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"{kind}: {result.stderr.strip() or 'killed'}")
        peaks[kind] = float(result.stdout)
    for kind, peak in peaks.items():
        print(f"{kind:10}{peak:9.2f} GiB{peak / peaks['textbook']:9.2f} x textbook")


def print_peak(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    step = Step(args, device, pick_dtype(args.dtype, device))
    length = args.length or step.model.config.block_size
    step(args.kind, *step.batch(1, 8))  # the optimiser's state comes to be
    for p in step.parameters:
        p.grad = torch.zeros_like(p)
    before = memory(device, reset=True)
    step(args.kind, *step.batch(args.batch_size, length))
    print((memory(device) - before) / 2**30)


def memory(device: torch.device, reset: bool = False) -> int:
    """Bytes: the memory held now, starting a new peak (`reset`), or the peak since then."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if reset:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    key = "VmRSS" if reset else "VmHWM"
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def parser() -> Parser:
    p = Parser(description="Measure speed and memory.")
    commands = p.add_subparsers(required=True, metavar="what")
    for name, main, about in (
        ("step", bench_step, "seconds of a training step"),
        ("memory", bench_memory, "peak memory of a training step"),
        ("peak", print_peak, "peak memory of one kind of step, a number"),
    ):
        c = commands.add_parser(name, help=about)
        c.set_defaults(main=main)
        c.add_argument("--config", choices=list(SIZES), default="small")
        c.add_argument("--vocab", type=int, default=GPT2_VOCABULARY, help="the mask included")
        default = 5 if name == "step" else 4
        c.add_argument("--batch-size", type=int, default=default, help="sequences")
        c.add_argument("--length", type=int, help="tokens a sequence; default: the network's")
        c.add_argument("--checkpoint-activations", action="store_true", help="as in train.py")
        c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        c.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
        if name == "step":
            c.add_argument("--repeats", type=int, default=5)
        if name == "peak":
            c.add_argument("--kind", choices=("sm", "binary", "textbook"), default="sm")
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    run(args.main, args)

"""Speed and memory, each beside the textbook version (tests/reference.py), in one run.

    python bench.py step          # a training step of the 169M network: SM, binary, textbook
    python bench.py decode        # a decoding step of it, half of the positions masked
    python bench.py memory        # the peak memory of both
    python bench.py dream         # Dream-7B's shape with random weights, from disk (15.2 GB)

Ratios and medians: the sides of a ratio take turns, so that a noisy machine is noisy for both.
"""

import argparse
import contextlib
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from model import DREAM_SIZES, SIZES, DiT, DiTConfig, Dream, DreamConfig
from runtime import Parser, autocast, generator, memory, pick_device, pick_dtype, progress, run
from sample import Strategy, generate
from softmask import SoftMask, antithetic_times, diffusion_loss, soft_sequences
from tests import reference
from weights import build_model, load_checkpoint, published_name

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


class Decode:
    """A step in the middle of a decoding: half of the positions masked, nucleus 0.9."""

    nfe = 64  # from the first step's times on as many positions open as half-way through 128

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        self.step = Step(args, device, dtype)
        self.model = self.step.model.eval()
        self.dtype, self.device = dtype, device
        s = self.step.softmask
        self.omegas = reference.Omegas(s.omega_s, s.omega_a, s.omega_b)

    def half_masked(self, n: int, length: int) -> torch.Tensor:
        g, m = generator(0), self.model.mask_id
        x = torch.randint(m, (n, length), generator=g)
        return torch.where(torch.rand(n, length, generator=g) < 0.5, m, x).to(self.device)

    @torch.no_grad()
    def backbone(self, x: torch.Tensor) -> None:
        with autocast(self.device, self.dtype):
            self.model.hidden(self.model.embed(x), None)

    @torch.no_grad()
    def __call__(self, kind: str, x: torch.Tensor, steps: int) -> list[float]:
        """Seconds of each of so many steps after a first one; kind is "sm", "binary", "textbook"
        (binary) or "textbook-sm"."""
        marks = []

        def mark(*_) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            if len(marks) > steps:
                raise StopIteration

        with contextlib.suppress(StopIteration):
            if not kind.startswith("textbook"):
                softmask = self.step.softmask if kind == "sm" else None
                how = Strategy("mdlm", top_p=0.9)
                generate(self.model, x, self.nfe, softmask, how, dtype=self.dtype, on_step=mark)
            times, p = Strategy("mdlm").times(self.nfe), None
            omegas = self.omegas if kind == "textbook-sm" else None
            for t, s in pairwise(times):
                with autocast(self.device, self.dtype):
                    x, p = reference.ancestral_step(self.model, x, t, s, 0.9, p, omegas)
                mark()
        return [b - a for a, b in pairwise(marks)]


DECODERS = ("sm", "binary", "textbook-sm", "textbook")


def bench_decode(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    decode = Decode(args, device, pick_dtype(args.dtype, device))
    x = decode.half_masked(args.batch_size, args.length or decode.model.config.block_size)
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: at least 1")
    times = {kind: [] for kind in ("backbone", *DECODERS)}
    timed(device, lambda: decode.backbone(x))
    for _ in progress(range(args.repeats), desc="rounds"):
        times["backbone"].append(timed(device, lambda: decode.backbone(x)))
        for kind in DECODERS:
            times[kind] += decode(kind, x, 2 if kind.startswith("textbook") else 4)
    median = {kind: statistics.median(values) for kind, values in times.items()}
    counts = ", ".join(f"{len(times[kind])} {kind}" for kind in times)
    print(
        f"{args.config}: batch {args.batch_size}, {int((x == decode.model.mask_id).sum())} masked "
        f"of {x.numel()}, {device.type} {str(decode.dtype).removeprefix('torch.')}, medians of "
        f"{counts}"
    )
    base = median["backbone"]
    print(f"{'backbone':12}{base:9.3f} s")
    for kind in DECODERS:
        other = "textbook-sm" if kind in ("sm", "textbook-sm") else "textbook"
        total, outside = median[kind], median[kind] - base
        print(
            f"{kind:12}{total:9.3f} s a step, {median['textbook'] / total:5.1f} times as fast as "
            f"the plain textbook step, {median[other] / total:5.1f} as {other}; outside the "
            f"backbone {outside:.3f} s, 1/{(median['textbook'] - base) / max(outside, 1e-9):.1f}"
        )


def bench_memory(args: argparse.Namespace) -> None:
    """Peak memory of a training and a decoding step above what is held before; a process each."""
    for what, kinds in (("step", ("sm", "binary", "textbook")), ("decode", DECODERS)):
        peaks = {}
        for kind in kinds:
            flags = ["--config", args.config, "--batch-size", str(args.batch_size)]
            flags += ["--device", args.device, "--dtype", args.dtype, "--vocab", str(args.vocab)]
            flags += ["--length", str(args.length)] if args.length else []
            flags += ["--checkpoint-activations"] * args.checkpoint_activations
            command = [sys.executable, __file__, "peak", *flags, "--what", what, "--kind", kind]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise ValueError(f"{kind}: {result.stderr.strip() or 'killed'}")
            peaks[kind] = float(result.stdout)
        for kind, peak in peaks.items():
            print(f"{what:7}{kind:12}{peak:9.2f} GiB{peak / peaks['textbook']:9.2f} x textbook")


def print_peak(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.what == "decode":
        decode = Decode(args, device, dtype)
        length = args.length or decode.model.config.block_size
        decode(args.kind, decode.half_masked(1, 8), 1)
        before = memory(device, reset=True)
        decode(args.kind, decode.half_masked(args.batch_size, length), 1)
    else:
        step = Step(args, device, dtype)
        length = args.length or step.model.config.block_size
        step(args.kind, *step.batch(1, 8))  # the optimiser's state comes to be
        for p in step.parameters:
            p.grad = torch.zeros_like(p)
        before = memory(device, reset=True)
        step(args.kind, *step.batch(args.batch_size, length))
    print((memory(device) - before) / 2**30)


spawn = multiprocessing.get_context("spawn")


def write_dream(folder: Path, size: str, shards: int = 4) -> None:
    """Random bfloat16 weights of a Dream size as the hub's folder."""
    config = DreamConfig(**DREAM_SIZES[size])
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Dream(config).named_parameters()}
    noise = torch.randn(2**24, generator=generator(0)).mul_(0.02).bfloat16()

    def weight(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)

    total = sum(shape.numel() * 2 for shape in shapes.values())
    groups, where, size_so_far = [{} for _ in range(shards)], {}, 0
    for name, shape in shapes.items():
        i = min(shards - 1, size_so_far * shards // total)
        size_so_far += shape.numel() * 2
        groups[i][published_name(name)] = shape
        where[published_name(name)] = f"model-{i + 1:05}-of-{shards:05}.safetensors"
    for i, group in enumerate(progress(groups, desc="writing", unit=" shards")):
        file = folder / f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weight(shape) for name, shape in group.items()}, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    described = {
        "vocab_size": config.vocab_size, "hidden_size": config.width,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "intermediate_size": config.mlp_width,
        "mask_token_id": config.mask_id, "max_position_embeddings": config.block_size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))


def bench_dream(args: argparse.Namespace) -> None:
    """Write, load and run Dream's shape; the folder is removed at the end."""
    device = pick_device(args.device)
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: at least 1")
    with torch.device("meta"):
        size = 2 * sum(p.numel() for p in Dream(DreamConfig(**DREAM_SIZES[args.size])).parameters())
    free = shutil.disk_usage(args.folder).free
    if free < size * 1.02:
        raise ValueError(
            f"--folder {args.folder}: {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free"
        )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        writer = spawn.Process(target=write_dream, args=(Path(name), args.size))
        writer.start()  # a process of its own, whose memory goes with it
        writer.join()
        before = memory(device, reset=True)
        start = time.perf_counter()
        model = build_model(load_checkpoint(name, "--folder", device), ema=False).eval()
        opened = time.perf_counter() - start
        softmask = SoftMask(args.k, omega_s=0.5, lower_bound=-6.0).to(device)
        g, m = generator(0), model.mask_id
        x = torch.randint(m, (1, args.length), generator=g)
        x[:, args.length // 2 :] = m
        x = x.to(device)

        def backbone() -> None:
            with torch.no_grad():
                model.hidden(model.embed(x))

        first = timed(device, backbone)  # reads the weights from disk, where they are mapped
        times = {"backbone": [], "binary": [], "sm": []}
        rates = []
        for _ in progress(range(args.repeats), desc="rounds"):
            rates.append(matmul_rate(device, torch.bfloat16))
            times["backbone"].append(timed(device, backbone))
            for kind in ("binary", "sm"):
                times[kind] += dream_steps(model, x, softmask if kind == "sm" else None, device)
        median = {kind: statistics.median(values) for kind, values in times.items()}
        peak, rate = memory(device), statistics.median(rates)
        c = model.config
        matrices = sum(
            p.numel() for layer in model.layers for p in layer.parameters() if p.dim() == 2
        )
        work = 2.0 * args.length * (matrices + 2 * args.length * c.width * c.n_layers)
        print(
            f"{args.size}: {size / 1e9:.1f} GB in four shards; {args.length} tokens, "
            f"{int((x == m).sum())} of them masked; k {args.k}; medians of {args.repeats} passes "
            f"and {len(times['sm'])} steps"
        )
        print(f"opened in {opened:.1f} s, first pass (weights read from disk) {first:.1f} s")
        print(
            f"backbone {median['backbone']:.2f} s a pass, {work / median['backbone'] / 1e9:.0f} "
            f"GFLOP/s, {work / median['backbone'] / rate:.0%} of the machine's {rate / 1e9:.0f}"
        )
        for kind in ("binary", "sm"):
            ratio = median[kind] / median["binary"]
            print(f"{kind:8} {median[kind]:.2f} s a decoding step, {ratio:.3f} x binary")
        print(f"peak memory {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB of it before loading")


def dream_steps(model, x: torch.Tensor, softmask: SoftMask | None, device) -> list[float]:
    """Seconds of two decoding steps (entropy, nucleus 0.9) with feedback, after a first without."""
    marks = []

    def mark(*_) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        if len(marks) == 3:
            raise StopIteration

    how = Strategy("entropy", temperature=0.1, top_p=0.9)
    with contextlib.suppress(StopIteration):
        generate(model, x, int((x == model.mask_id).sum()) // 4, softmask, how, on_step=mark)
    return [b - a for a, b in pairwise(marks)]


def parser() -> Parser:
    p = Parser(description="Measure speed and memory.")
    commands = p.add_subparsers(required=True, metavar="what")
    for name, main, about in (
        ("step", bench_step, "seconds of a training step"),
        ("decode", bench_decode, "seconds of a decoding step"),
        ("memory", bench_memory, "peak memory of both"),
        ("peak", print_peak, "peak memory of one kind of step, a number"),
    ):
        c = commands.add_parser(name, help=about)
        c.set_defaults(main=main)
        c.add_argument("--config", choices=list(SIZES), default="small")
        c.add_argument("--vocab", type=int, default=GPT2_VOCABULARY, help="the mask included")
        default = {"step": 5, "decode": 1}.get(name, 4)
        c.add_argument("--batch-size", type=int, default=default, help="sequences")
        c.add_argument("--length", type=int, help="tokens a sequence; default: the network's")
        c.add_argument("--checkpoint-activations", action="store_true", help="as in train.py")
        c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        c.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
        if name in ("step", "decode"):
            c.add_argument("--repeats", type=int, default=5)
        if name == "peak":
            c.add_argument("--what", choices=("step", "decode"), default="step")
            c.add_argument("--kind", choices=DECODERS, default="sm")
    c = commands.add_parser("dream", help="Dream's shape: loading, passes, decoding steps, memory")
    c.set_defaults(main=bench_dream)
    c.add_argument("--size", choices=list(DREAM_SIZES), default="dream-7b")
    c.add_argument("--folder", default=".", help="where the weights are for a while (15.2 GB)")
    c.add_argument("--length", type=int, default=512, help="tokens, half of them masked")
    c.add_argument("--k", type=int, default=1)
    c.add_argument("--repeats", type=int, default=3)
    c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    run(args.main, args)

"""Speed and memory, each beside the textbook version (tests/reference.py), in one run.

    python bench.py step          # a training step of the 169M network: SM, binary, textbook
    python bench.py decode        # a decoding step of it, half of the positions masked
    python bench.py memory        # the peak memory of both
    python bench.py dream         # Dream-7B's shape with random weights, from disk (15.2 GB)
    python bench.py cache         # Fast-dLLM's caches at a 0.5B Dream shape
    python bench.py finetune      # a fine-tuning step of that shape: DoRA, SM and binary
    python bench.py dora          # a layer with DoRA: ours and peft's

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
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import finetune_lora
from decoding import CACHES, Strategy, generate
from model import DREAM_SIZES, SIZES, DiT, DiTConfig, Dream, DreamConfig
from runtime import (
    DTYPES,
    Parser,
    autocast,
    generator,
    memory,
    pick_device,
    pick_dtype,
    progress,
    run,
)
from softmask import SoftMask, antithetic_times, diffusion_loss, soft_sequences
from tests import reference
from weights import build_model, hub_config, load_checkpoint, published_name

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
    (folder / "config.json").write_text(json.dumps(hub_config(config)))


@contextlib.contextmanager
def random_dream(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """A folder with random weights of Dream's shape, and their bytes; it is removed at the end."""
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
        yield name, size


def bench_finetune(args: argparse.Namespace) -> None:
    """Fine-tuning steps of Dream's shape: rank 16 on q, k, v, o, the second half of each sequence
    the response, and masked as in training; SM and binary in turns."""
    device = pick_device(args.device)
    with random_dream(args) as (name, size):
        model = build_model(load_checkpoint(name, "--folder", device), ema=False).train()
        model.checkpoint_activations = args.checkpoint_activations
        targets = finetune_lora.DREAM["targets"].split(",")
        layers = finetune_lora.wrap(model, targets, 16, 16.0, 0.0, dora=True)
        softmask = SoftMask(args.k, omega_s=0.5, lower_bound=-6.0).to(device)
        adapter = [p for layer in layers.values() for p in layer.parts().values()]
        parameters = [*adapter, *softmask.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        n, length, g = args.batch_size, args.length, generator(0)
        x0 = torch.randint(model.mask_id, (n, length), generator=g)
        t = antithetic_times(torch.rand(n, generator=g), 0.2, 0.8)
        noise = torch.rand(n, length, generator=g)
        response = torch.zeros(n, length, dtype=torch.bool)
        response[:, length // 2 :] = True
        soft = soft_sequences(0.0, n, args.p_sm)
        x0, t, noise, soft, response = (v.to(device) for v in (x0, t, noise, soft, response))

        def step(kind: str) -> None:
            given = softmask if kind == "sm" else None
            loss = diffusion_loss(model, x0, t, noise, given, soft, response)
            (loss / response.sum()).backward()
            nn.utils.clip_grad_norm_(parameters, 7.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        times, peaks = {"binary": [], "sm": []}, dict.fromkeys(("binary", "sm"), 0)
        for i in progress(range(args.repeats + args.warm_up), desc="rounds"):
            for kind in times:
                memory(device, reset=True)
                seconds = timed(device, lambda kind=kind: step(kind))
                if i >= args.warm_up:
                    times[kind].append(seconds)
                    peaks[kind] = max(peaks[kind], memory(device))
    median = {kind: statistics.median(values) for kind, values in times.items()}
    print(
        f"{args.size}, {size / 1e9:.1f} GB: {n} sequences of {length} tokens, {int(soft.sum())} "
        f"soft-masked, k {args.k}, {sum(p.numel() for p in adapter):,} trained parameters, "
        f"activations {'checkpointed' if args.checkpoint_activations else 'kept'}, medians of "
        f"{args.repeats}"
    )
    for kind in times:
        print(
            f"{kind:8}{median[kind]:9.2f} s a step, {median[kind] / median['binary']:.3f} x binary,"
            f" peak memory {peaks[kind] / 1e9:.2f} GB"
        )


class Layer(nn.Module):
    """A linear layer with DoRA of rank 16 and trained values, ours or peft's."""

    def __init__(self, kind: str, out: int, dtype: torch.dtype, width: int = 3584):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, out).to(dtype)
        if kind == "ours":
            finetune_lora.wrap(self, ["linear"], 16, 16.0, 0.0, dora=True)
        else:
            import peft  # the other side of this comparison alone

            peft.get_peft_model(  # as every user of it: the adapter is in float32
                self, peft.LoraConfig(r=16, lora_alpha=16, target_modules=["linear"], use_dora=True)
            )
        for name, p in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)

    def step(self, tokens: int) -> torch.Tensor:
        """Forward and backward of so many tokens; the gradient of the input."""
        x = torch.randn(1, tokens, self.linear.weight.shape[1], generator=generator(0))
        x = x.to(self.linear.weight).requires_grad_()
        y = self.linear(x)
        y.backward(torch.ones_like(y))
        return x.grad


def bench_dora(args: argparse.Namespace) -> None:
    """Dream-7B's attention layers with DoRA, ours and peft's in turns; their peak memory above the
    layer's own in a process each."""
    if args.what:
        kind, out, dtype, tokens = args.what.split(",")
        device = torch.device(args.device)  # without `pick_device`: freed memory is given back
        layer = Layer(kind, int(out), DTYPES[dtype]).to(device)
        layer.step(8)
        before = memory(device, reset=True)
        layer.step(int(tokens))
        print((memory(device) - before) / 2**20)
        return
    device = pick_device(args.device)
    print(f"{'layer':14}{'weight':10}{'tokens':>7}{'ours':>10}{'peft':>10}{'ratio':>7}  peak MiB")
    for out in (3584, 512):
        for dtype in ("float32", "bfloat16"):
            layers = {kind: Layer(kind, out, DTYPES[dtype]).to(device) for kind in ("ours", "peft")}
            for tokens in (256, 2048):
                times, peaks = {"ours": [], "peft": []}, {}
                for i in range(args.repeats + 2):
                    for kind, layer in layers.items():
                        seconds = timed(device, lambda f=layer.step, n=tokens: f(n))
                        if i >= 2:
                            times[kind].append(1e3 * seconds)
                for kind in layers:
                    what = f"{kind},{out},{dtype},{tokens}"
                    command = [sys.executable, __file__, "dora", "--what", what]
                    command += ["--device", device.type]
                    result = subprocess.run(command, capture_output=True, text=True, check=True)
                    peaks[kind] = float(result.stdout)
                a, b = (statistics.median(times[kind]) for kind in ("ours", "peft"))
                print(
                    f"3584 to {out:<6}{dtype:10}{tokens:7}{a:7.1f} ms{b:7.1f} ms{b / a:7.2f}  "
                    f"{peaks['ours']:.0f} and {peaks['peft']:.0f}"
                )


def bench_dream(args: argparse.Namespace) -> None:
    """Load and run Dream's shape from random weights."""
    device = pick_device(args.device)
    with random_dream(args) as (name, size):
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


def bench_cache(args: argparse.Namespace) -> None:
    """Blockwise decoding of Dream's shape with each cache, binary and SM in turns: the first pass
    of a block, which is over everything, and the others."""
    device = pick_device(args.device)
    with random_dream(args) as (name, _):
        model = build_model(load_checkpoint(name, "--folder", device), ema=False).eval()
        softmask = SoftMask(args.k, omega_s=0.5, lower_bound=-6.0).to(device)
        g = generator(0)
        x = torch.randint(model.mask_id, (1, args.length + args.new_tokens), generator=g)
        x[:, args.length :] = model.mask_id
        x = x.to(device)
        blocks = -(-args.new_tokens // args.block_length)
        nfe = args.new_tokens // 4
        how = Strategy("entropy", temperature=0.1, top_p=0.9)
        kinds = [(kind, cache) for cache in CACHES for kind in ("binary", "sm")]
        first, later = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
        sizes = {}
        with torch.no_grad():
            model.hidden(model.embed(x))  # reads the weights from disk
        for kind, cache in progress(kinds * args.repeats, desc="decodings"):
            marks = []

            def mark(*_, marks=marks) -> None:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

            mark()
            given = softmask if kind == "sm" else None
            options = dict(block_length=args.block_length, cache=cache, on_step=mark)
            _, done = generate(model, x, nfe, given, how, **options)
            sizes[cache] = done.cache_bytes
            seconds = [b - a for a, b in pairwise(marks)]
            starts = range(0, nfe, nfe // blocks)
            first[kind, cache] += [seconds[i] for i in starts]
            later[kind, cache] += [v for i, v in enumerate(seconds) if i not in starts]
    print(
        f"{args.size}: prompt {args.length}, response {args.new_tokens}, blocks of "
        f"{args.block_length}, {nfe} steps (budget 1/4), k {args.k}; medians of "
        f"{len(later['sm', 'dual'])} passes, {args.repeats} decodings of each kind"
    )
    base = statistics.median(later["binary", "none"])
    for kind, cache in kinds:
        a, b = (statistics.median(times[kind, cache]) for times in (first, later))
        binary = statistics.median(later["binary", cache])
        whole = (sum(first[kind, cache]) + sum(later[kind, cache])) / args.repeats
        print(
            f"{cache:7}{kind:7} {b:.3f} s a pass (a block's first {a:.3f}), {base / b:5.2f} times "
            f"as fast as none, {b / binary:.3f} x binary; {whole:.1f} s in all, cache "
            f"{sizes[cache] / 1e6:.1f} MB"
        )


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
    for name, main, length, repeats, about in (
        ("dream", bench_dream, 512, 3, "Dream's shape: loading, passes, decoding steps, memory"),
        ("cache", bench_cache, 512, 1, "Dream's shape: blockwise decoding with each cache"),
        ("finetune", bench_finetune, 2048, 1, "Dream's shape: a fine-tuning step with DoRA"),
    ):
        c = commands.add_parser(name, help=about)
        c.set_defaults(main=main)
        size = "dream-0.5b" if name == "cache" else "dream-7b"
        c.add_argument("--size", choices=list(DREAM_SIZES), default=size)
        c.add_argument("--folder", default=".", help="where the weights are for a while (15.2 GB)")
        what = {"dream": ", half of them masked", "cache": " of the prompt"}
        what = what.get(name, ", half of them the response")
        c.add_argument("--length", type=int, default=length, help=f"tokens{what}")
        c.add_argument("--k", type=int, default=1)
        c.add_argument("--repeats", type=int, default=repeats)
        c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
        if name == "cache":
            c.add_argument("--new-tokens", type=int, default=256, help="tokens of the response")
            c.add_argument("--block-length", type=int, default=32)
    c.add_argument("--batch-size", type=int, default=1, help="sequences")
    c.add_argument("--p-sm", type=float, default=1.0, help="share with a first pass")
    c.add_argument("--warm-up", type=int, default=0, help="rounds that are not counted")
    c.add_argument("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=True)
    c = commands.add_parser("dora", help="a layer with DoRA beside peft's")
    c.set_defaults(main=bench_dora)
    c.add_argument("--repeats", type=int, default=7)
    c.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    c.add_argument("--what", help=argparse.SUPPRESS)  # a peak of one of them, a number
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    run(args.main, args)

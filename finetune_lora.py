"""Supervised fine-tuning with a hand-written DoRA (Algorithm 1 on an adapter; appendix A.2).

    python finetune_lora.py --model out/ckpt.pt                     # the network of train.py
    torchrun --nproc_per_node 8 finetune_lora.py --model dream-coder --preset paper
    python finetune_lora.py --model dream --adapter tuned --steps 0 --merge-to merged

A conversation's last answer is masked and predicted, its prompt is given. The network stays as it
is: each chosen layer learns a low-rank change and a length for each row of its weight (Liu et al.,
2024, DoRA), and soft-masking its three scalars (`--no-sm`: none, plain masks). OUT receives the
adapter of the best validation in PEFT's format, and `ckpt.pt`, from which --resume goes on.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chat import (
    CHATS,
    Chats,
    batches_by_length,
    collate,
    draw_eos,
    open_chats,
    system_line,
)
from data import Unreachable
from model import Dream
from runtime import (
    Parser,
    atomic_write,
    generator,
    join_world,
    pick_device,
    pick_dtype,
    run,
    writable_folder,
)
from softmask import SoftMask
from training import (
    EVAL_SEED,
    Batch,
    Objective,
    Run,
    check,
    draw_masks,
    draw_soft,
    drive,
    given,
    mode,
    parse_k,
    perplexity,
    recall,
    refuse_to_overwrite,
    score_of,
    share_batch,
    shared_flags,
    start_omegas,
)
from weights import (
    adapted,
    build_model,
    build_softmask,
    check_adapter,
    load_checkpoint,
    merge_adapter,
    read_adapter,
    write_adapter,
    write_model,
)

EVAL_BATCH = 8  # sequences of a validation batch
MOST_EOS = 50  # end-of-text tokens after a response, from none up to these
WEIGHT_CHUNK = 2**20  # elements of a weight in float32 at a time

# DoRA


class DoRALinear(nn.Module):
    """y = W' x + bias with W' = magnitude * (W0 + s B A)/||W0 + s B A||, s = alpha / r.

    W0 (out, in) and bias are `base`'s, frozen, in their own format; A (r, in), B (out, r) and the
    magnitude (out,) are trained in float32. The norm is that of each row, taken in float32 and a
    constant in the backward pass (Liu et al., section 4.3). At the start B = 0 and magnitude =
    ||W0||, so that W' = W0. With `dora` False, plain LoRA: W' = W0 + s B A. Dropout falls on what
    the adapter adds to W0 x, as in PEFT. ValueError for a rank below 1 or above the width.
    """

    def __init__(
        self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, dora: bool = True
    ):
        super().__init__()
        out, width = base.weight.shape
        if not 1 <= r <= min(out, width):
            raise ValueError(
                f"--rank {r}: from 1 to {min(out, width)} for a layer {width} to {out}"
            )
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scaling, self.dropout, self.merged = alpha / r, dropout, False
        where = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, width, **where))
        self.lora_B = nn.Parameter(torch.zeros(out, r, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        squares = torch.cat([w.float().square().sum(1) for w in self._chunks()]) if dora else None
        self.register_buffer("w0_squares", squares, persistent=False)  # ||W0||^2 (out,)
        self.magnitude = nn.Parameter(squares.sqrt()) if dora else None

    def _chunks(self) -> tuple[Tensor, ...]:
        """W0 some rows at a time, so that it is never whole in float32."""
        return self.weight.detach().split(max(1, WEIGHT_CHUNK // self.weight.shape[1]))

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """||W0 + s B A|| (out,) without B A: its square is ||W0||^2 + 2 s rowsum((W0 A^T) . B) +
        s^2 rowsum((B A A^T) . B)."""
        a, b, s = self.lora_A, self.lora_B, self.scaling
        w0_a = torch.cat([w.to(a.dtype) @ a.T for w in self._chunks()])  # (out, r)
        rest = ((2 * s * w0_a + s * s * (b @ (a @ a.T))) * b).sum(1)
        return (self.w0_squares + rest).clamp(min=1e-24).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in the format of W0 x."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        base = F.linear(x, self.weight)  # W0 x
        again = base if dropped is x or self.magnitude is None else F.linear(dropped, self.weight)
        with torch.autocast(x.device.type, enabled=False):
            low = F.linear(dropped.to(self.lora_A.dtype), self.lora_A)  # (..., r)
            bias = None if self.bias is None else self.bias.to(low.dtype)
            if self.magnitude is None:
                return (base + F.linear(low, self.scaling * self.lora_B, bias)).to(base.dtype)
            gain = self.magnitude / self.row_norms()  # (out,)
            y = F.linear(low, (self.scaling * gain)[:, None] * self.lora_B, bias)
            y = y + gain * base if again is base else y + base + (gain - 1) * again
        return y.to(base.dtype)

    def parts(self) -> dict[str, Tensor]:
        """What an adapter's file holds of this layer (see `weights.read_adapter`)."""
        parts = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        return (
            parts if self.magnitude is None else parts | {"lora_magnitude_vector": self.magnitude}
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W' itself from here on; W0 is kept for `unmerge`."""
        if not self.merged:
            self.merged, self.w0 = True, self.weight.data
            self.weight.data = adapted(self.w0, self.parts(), self.scaling)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take W0 back, to the bit."""
        if self.merged:
            self.merged, self.weight.data, self.w0 = False, self.w0, None


def wrap(
    model: nn.Module, targets: list[str], r: int, alpha: float, dropout: float, dora: bool
) -> dict[str, DoRALinear]:
    """Freeze a network and put a DoRALinear in place of each linear layer whose name is, or ends
    with, one of the targets; returns them by the name of their weight. ValueError names a target
    that matches none and what there is."""
    model.requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers.pop("head", None)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            there = {name.rsplit(".", 1)[-1] for name in layers if not name[-1].isdigit()}
            there |= {".".join(name.rsplit(".", 2)[-2:]) for name in layers if name[-1].isdigit()}
            raise ValueError(
                f"--targets {target}: no such layer; there are {', '.join(sorted(there))}"
            )
    wrapped = {}
    for name, layer in layers.items():
        if any(f".{name}".endswith(f".{target}") for target in targets):
            parent, _, child = name.rpartition(".")
            wrapped[f"{name}.weight"] = DoRALinear(layer, r, alpha, dropout, dora)
            setattr(model.get_submodule(parent), child, wrapped[f"{name}.weight"])
    return wrapped


# The run


@dataclass(kw_only=True)
class FineTuning(Run):
    """A run over conversations, of whose responses alone tokens are masked and predicted."""

    chats: Chats
    layers: dict[str, DoRALinear]
    tokenizer: dict
    schedule: str = "none"  # of decoding, that of the adapter it started from
    order: tuple[int, np.ndarray] | None = None  # an epoch and its batches

    files = (
        *Run.files, "adapter_config.json", "adapter_model.safetensors", "transparency_config.json",
        "best.json",
    )  # fmt: skip

    def draw(self) -> tuple[float, list[Batch]]:
        a, g, n = self.args, self.g, self.args.global_batch
        epoch, at = divmod(self.step, max(1, self.chats.count("train") // n))
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, batches_by_length(self.chats.lengths("train"), n, a.seed, epoch)
        examples = [self.chats.example("train", int(i)) for i in self.order[1][at]]  # line 2
        eos = draw_eos(n, g, MOST_EOS)
        whole = self.padded(examples, eos)
        t, noise = draw_masks(whole.x0, g, a.b_l, a.b_h)  # line 3
        t = t[torch.randperm(n, generator=g)]  # the sequences are in the order of their lengths
        soft = draw_soft(self, n)
        parts = a.grad_accum * self.world.size
        size, shares = n // parts, []
        for i in range(self.world.rank, parts, self.world.size):
            mine = slice(i * size, (i + 1) * size)
            x0, response, attend = self.padded(examples[mine], eos[mine])  # to its own longest
            shares.append((x0, t[mine], noise[mine, : x0.shape[1]], soft[mine], response, attend))
        self.tokens += int(whole.attend.sum())
        return (n if a.loss_average == "masked" else int(whole.response.sum())), shares

    def padded(self, examples: list, eos: list[int]):
        limit = self.model.config.block_size
        return collate(examples, eos, self.chats.tokenizer.eot_token, limit)

    def factor(self) -> float:
        return cosine(self.step, self.args.steps, self.args.warmup_ratio)

    def held_out(self, n: int | None = None) -> list[Batch]:
        """Batches of similar lengths; rows of a batch in an order of chance, as are its times."""
        lengths, g = self.chats.lengths("val"), generator(EVAL_SEED)
        order = np.argsort(-lengths[:n], kind="stable")
        eos = draw_eos(len(order), g, MOST_EOS)
        batches = []
        for start in range(0, len(order), EVAL_BATCH):
            rows = order[start : start + EVAL_BATCH]
            rows = rows[torch.randperm(len(rows), generator=g).numpy()]
            examples = [self.chats.example("val", int(i)) for i in rows]
            batches.append(tuple(self.padded(examples, [eos[i] for i in rows])))
        return batches

    def validate(self) -> dict[str, float]:
        """As every run; an adapter that is better than all before is written to --out."""
        scores = super().validate()
        best, nats = Path(self.args.out) / "best.json", score_of(scores)
        if self.world.rank == 0 and nats < read_best(best):
            write_adapter(Path(self.args.out), self.adapter(), self.args.model, self.softmask)
            with atomic_write(best, "w") as f:
                json.dump({"step": self.step, **scores}, f)
        return scores

    def adapter(self) -> dict:
        a = self.args
        return {
            "r": a.rank, "alpha": a.alpha, "dropout": a.lora_dropout, "schedule": self.schedule,
            "targets": a.targets.split(","),
            "modules": {
                name: {part: tensor.detach() for part, tensor in layer.parts().items()}
                for name, layer in self.layers.items()
            },
        }  # fmt: skip

    def own_state(self) -> dict:
        return {
            "model": {}, "adapter": self.adapter(), "tokenizer": self.tokenizer,
            "text": self.chats.meta["fingerprint"],
        }  # fmt: skip

    def described(self) -> str:
        trained = sum(p.numel() for layer in self.layers.values() for p in layer.parts().values())
        total = sum(p.numel() for p in self.model.parameters()) - trained
        kind = "DoRA" if self.args.dora else "LoRA"
        return (
            f"{self.chats.report()}\n{kind} of rank {self.args.rank} on {len(self.layers)} layers, "
            f"{trained:,} trained parameters beside {total:,} frozen ones, {mode(self)}"
        )

    def line(self) -> str:
        nats = score_of(self.scores)
        line = f"step {self.step}: validation {nats:.4f} nats a response token"
        if self.softmask is not None:
            line += f" in two passes, {self.scores['val_nelbo_1pass']:.4f} in one"
        return line

    def table(self) -> str:
        lines = [f"{'validation':12}{'nats a response token':>23}{'perplexity':>12}"]
        for key, name in (("val_nelbo_1pass", "one pass"), ("val_nelbo_2pass", "two passes")):
            if key in self.scores:
                nats = self.scores[key]
                lines.append(f"{name:12}{nats:23.4f}{perplexity(nats):12.2f}")
        return "\n".join(lines)

    def finish(self) -> None:
        a, file = self.args, Path(self.args.out) / "best.json"
        if not file.exists():
            raise ValueError(f"--out {a.out}: no adapter in it: no validation was finite")
        best = json.loads(file.read_text())
        print(f"the best adapter, of step {best['step']} ({score_of(best):.4f}), is in {a.out}:")
        print(f"python sample.py --model {a.model} --adapter {a.out} --chat")
        if a.merge_to:
            merge(a.model, a.out, a.merge_to)


def read_best(file: Path) -> float:
    try:
        return score_of(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError):
        return math.inf


def cosine(step: int, steps: int, warmup_ratio: float) -> float:
    """The factor of both learning rates at `step` (from 0): linear warm-up over the first
    `warmup_ratio` of all steps, then half a cosine wave down to 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_up(args: argparse.Namespace) -> FineTuning:
    """Network, adapter, conversations, soft mask and optimiser: new, from --adapter, or of a
    stopped run."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    world = join_world(device)
    if args.fsdp and world.size == 1:
        raise ValueError("--fsdp: shards over processes; start it by torchrun")
    stored = torch.bfloat16 if args.dtype == "auto" else dtype  # Dream's weights
    base = load_checkpoint(args.model, "--model", "cpu" if args.fsdp else device, stored)
    model = build_model(base, ema=True)
    source = args.state and args.state["adapter"]
    if args.adapter and not source:
        source = read_adapter(args.adapter, "--adapter")
        inherit(args, source)
    fill(args, model)
    share_batch(args, world.size)
    with world.first():
        chats = open_data(args, base["tokenizer"], isinstance(model, Dream), world.rank == 0)

    torch.manual_seed(args.seed)
    layers = adapt(args, model, source)
    trained = [p for layer in layers.values() for p in layer.parts().values()]
    if args.fsdp:
        shard(model, device, trained)
    model.to(device).train()

    origins = [args.state] if args.state else [source, base]
    known = next((build_softmask(one) for one in origins if one and one["softmask"]), None)
    softmask = soft_mask(args, known, model.vocab_size)
    groups = [{"params": trained, "peak": args.lr}]
    if softmask is not None:
        softmask.to(device)
        groups.append({"params": list(softmask.parameters()), "peak": args.lr_sm})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    objective = Objective(model, softmask, args.loss_average, in_step=args.fsdp)
    if world.size > 1:
        objective = distributed(objective)
    torch.manual_seed(args.seed + 1_000_003 * world.rank)  # dropout; the weights are drawn
    whole = FineTuning(
        args=args, world=world, device=device, dtype=dtype, model=model, softmask=softmask,
        objective=objective, optimizer=optimizer, g=generator(args.seed), warm=True,
        interval=(args.b_l, args.b_h), chats=chats, layers=layers, tokenizer=base["tokenizer"],
        schedule=source["schedule"] if source else "none",
    )  # fmt: skip
    if args.state:
        if args.state["text"] != chats.meta["fingerprint"]:  # and what was best with them
            raise ValueError(
                "--resume: the conversations, or what is drawn of them, have changed since; put "
                f"them back, or start a new run with --adapter {args.out}"
            )
        whole.restore(args.state)
        args.state = None
    elif args.sm and known is None:
        start_omegas(whole)
    return whole


def adapt(args: argparse.Namespace, model: nn.Module, source: dict | None) -> dict[str, DoRALinear]:
    """Wrap the targets and take over an adapter's values; ValueError where it does not fit."""
    if source:
        check_adapter(dict(model.named_parameters()), source, f"--adapter {args.adapter}")
    targets = args.targets.split(",")
    layers = wrap(model, targets, args.rank, args.alpha, args.lora_dropout, args.dora)
    if source:
        if source["modules"].keys() != layers.keys():
            raise ValueError(f"--adapter {args.adapter}: adapts other layers than {args.targets}")
        for name, parts in source["modules"].items():
            for part, tensor in layers[name].parts().items():
                tensor.data.copy_(parts[part])
    model.checkpoint_activations = args.checkpoint_activations
    return layers


def soft_mask(args: argparse.Namespace, known: SoftMask | None, size: int) -> SoftMask | None:
    """The soft mask of the run: one that is `known`, or a new one; ValueError for another k."""
    if not args.sm:
        return None
    if known is None:
        k = args.k or ("1" if args.model == "dream-coder" else "3")
        return SoftMask(parse_k(k, size), args.omega_s)
    if args.k not in (None, str(known.k or "V")):
        raise ValueError(f"--k {args.k}: the network has soft masks of k {known.k or 'V'}")
    return known


def inherit(args: argparse.Namespace, adapter: dict) -> None:
    """Fill what --adapter decides; ValueError where a flag says otherwise."""
    found = {
        "rank": adapter["r"],
        "alpha": adapter["alpha"],
        "targets": ",".join(adapter["targets"]),
        "dora": any("lora_magnitude_vector" in parts for parts in adapter["modules"].values()),
    }
    for name, value in found.items():
        if getattr(args, name) not in (None, value):
            raise ValueError(f"{given(args, name)}: the adapter has {value}; drop the flag")
        setattr(args, name, value)


def distributed(objective: Objective) -> DistributedDataParallel:
    """Average the adapter's gradients; what is frozen is the same in all processes, or sharded."""
    frozen = [name for name, p in objective.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in objective.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen)
    return DistributedDataParallel(objective)


def shard(model: nn.Module, device: torch.device, trained: list[nn.Parameter]) -> None:
    """Keep a share of each block's frozen weights in each process (`fully_shard`); the adapters,
    the embeddings and the head stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in model.layers if isinstance(model, Dream) else model.blocks:
        # Each block is a root of its own, which would else stay whole after a forward pass.
        fully_shard(block, mesh=mesh, ignored_params=set(trained), reshard_after_forward=True)


def open_data(args: argparse.Namespace, tokenizer: dict, dream: bool, speaks: bool) -> Chats:
    """The conversations of --data; where the model's own cannot be had without the network, those
    of the standard library, and a line says so."""
    system = system_line(tokenizer["folder"]) if dream else ""
    preset = CHATS.get(args.model) if args.data is None else None
    settings = dict(
        system=system, max_tokens=args.max_length, train_examples=args.train_examples,
        val_examples=args.val_examples, max_bad=args.max_bad, seed=args.seed,
    )  # fmt: skip
    try:
        return open_chats(preset or args.data, tokenizer, args.cache, **settings)
    except Unreachable as error:
        if preset is None or args.preset:
            raise
        if speaks:
            print(f"{error}; meanwhile: functions of the standard library", file=sys.stderr)
        return open_chats(None, tokenizer, args.cache, **settings)


def free_folder(folder: str) -> Path:
    """The folder of --merge-to; ValueError where it holds a model, OSError where it cannot be."""
    place = writable_folder(folder, "--merge-to")
    if any(file.name == "config.json" or file.suffix == ".safetensors" for file in place.iterdir()):
        raise ValueError(f"--merge-to {folder}: holds a model; name another folder")
    return place


def merge(model: str, adapter: str, folder: str) -> None:
    """Write the network with the adapter's W' in place of its weights, as a hub's folder."""
    place = free_folder(folder)
    state = load_checkpoint(model, "--model")
    found = read_adapter(adapter, "--adapter")
    whole = build_model(state, ema=True)
    merge_adapter(whole, found)
    state |= {"softmask": found["softmask"], "schedule": found["schedule"]}
    write_model(place, whole, state)
    print(f"{folder}: the merged model; python sample.py --model {folder}")


# The command line

FIXED = (
    "sm k model adapter data rank alpha targets dora seed global_batch max_length b_l b_h"
).split()

# Appendix A.2, and what a small network takes.
ADAPTER = dict(rank=16, alpha=16.0, dora=True)
DREAM = dict(
    steps=33_500, batch_size=1, global_batch=8, lr=1e-5, targets="q_proj,k_proj,v_proj,o_proj",
    eval_every=1000, save_every=500, checkpoint_activations=True, **ADAPTER,
)  # fmt: skip
SMALL = dict(
    steps=600, batch_size=16, lr=2e-3, targets="attn_qkv,attn_out", eval_every=100, save_every=100,
    checkpoint_activations=False, **ADAPTER,
)  # fmt: skip
PRESETS = {
    "paper": dict(
        lr_sm=1e-2, omega_s=1e-6, p_sm=0.5, b_l=0.2, b_h=0.8, clip=7.0, warmup_ratio=0.03,
        max_length=2048, train_examples=300_000, val_examples=500, **DREAM,
    )
}  # fmt: skip


def parser() -> Parser:
    p = Parser(
        description="Fine-tune on conversations: DoRA and soft-masking.",
        epilog="Defaults of steps, batch, learning rate, targets, lengths and intervals are those "
        "of the paper for a Dream network, and fit a laptop for one of train.py's.",
    )
    p.add_argument("--preset", choices=list(PRESETS), help="the paper's numbers as defaults")
    group = shared_flags(p)
    on_off = argparse.BooleanOptionalAction
    # fmt: off
    add = group["method"]
    add("--sm", action=on_off, default=True, help="soft-masking, in two passes; else binary")
    add("--loss-average", choices=("tokens", "masked"), default="tokens",
        help="over response tokens (Algorithm 1), or a sequence's masked ones (released code)")
    add = group["run"]
    add("--model", default="out/ckpt.pt",
        help="the network: a checkpoint, a folder, a hub id, dream or dream-coder")
    add("--adapter", help="start from this PEFT folder's adapter and omegas")
    add("--merge-to", help="at the end write the merged model to this folder; with --steps 0 and "
        "--adapter only that")
    add = group["text"]
    add("--data", nargs="+", help="JSONL or parquet files of messages, folders, data sets of the "
        "hub, or stdlib; default: the Dream model's own, else the standard library's functions")
    add("--max-length", type=int, help="longer prompts with their responses are left out; default: "
        "2048, or what the network takes")
    add("--train-examples", type=int, default=300_000, help="drawn before they are filtered")
    add("--val-examples", type=int, default=500, help="held out, drawn before they are filtered")
    add("--max-bad", type=int, help="bad rows that are passed over; default: one in a hundred")
    add = group["network"]
    add("--targets", help="names of the layers that are adapted, with commas between")
    add("--rank", type=int, help="r of the adapter; default: 16")
    add("--alpha", type=float, help="its scale is alpha / r; default: 16")
    add("--lora-dropout", type=float, default=0.0)
    add("--dora", action=on_off, default=None, help="with magnitudes (default); else plain LoRA")
    add("--warmup-ratio", type=float, default=0.03, help="share of the steps; then a cosine")
    group["machine"]("--fsdp", action="store_true",
        help="shard the frozen weights over the processes, for GPUs that cannot hold them")
    # fmt: on
    unknown = dict.fromkeys(DREAM)  # until the network is
    p.set_defaults(out="tuned", p_sm=0.5, b_l=0.2, b_h=0.8, clip=7.0, sm_start=0, **unknown)
    return p


def fill(args: argparse.Namespace, model: nn.Module) -> None:
    """Set what no flag has set to what fits the network. ValueError for a length beyond it."""
    for name, value in (DREAM if isinstance(model, Dream) else SMALL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    limit = model.config.block_size
    args.max_length = min(2048, limit) if args.max_length is None else args.max_length
    if args.max_length > limit:
        raise ValueError(f"--max-length {args.max_length}: the network takes {limit}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; with --resume those of the run, changed where a flag says so."""
    p = parser()
    preset = p.parse_args(argv).preset
    if preset:
        p.set_defaults(**PRESETS[preset])
    args = recall(p, argv, FIXED, tuning=True)
    rules = [("rank max_length train_examples val_examples", "at least 1", lambda v: v >= 1)]
    rules += [("lora_dropout", "from 0 to below 1", lambda v: 0 <= v < 1)]
    rules += [("warmup_ratio", "between 0 and 1", lambda v: 0 <= v <= 1)]
    rules += [("alpha", "above 0", lambda v: 0 < v < 1e9), ("max_bad", "from 0", lambda v: v >= 0)]
    if args.steps == 0:
        if not (args.adapter and args.merge_to):
            raise ValueError("--steps 0: merges; give --adapter and --merge-to")
        return args
    check(args, rules)
    if args.merge_to and Path(args.merge_to).resolve() == Path(args.out).resolve():
        raise ValueError(f"--merge-to {args.merge_to}: the same folder as --out")
    return args


def main(args: argparse.Namespace) -> int:
    first = os.environ.get("RANK", "0") == "0"
    if args.steps == 0:
        return merge(args.model, args.adapter, args.merge_to) if first else None
    refuse_to_overwrite(args, FineTuning.files)
    if args.merge_to and first:
        free_folder(args.merge_to)
    return drive(set_up(args), "finetune_lora.py")


if __name__ == "__main__":
    run(lambda argv: main(parse(argv)), sys.argv[1:])

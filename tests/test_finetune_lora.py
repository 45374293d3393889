"""DoRA is PEFT's; the loss is a plain loop's; runs stop, resume, merge and share their work."""

import copy
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Stopped, die_before, randomise, same
from published import write_dream, write_tokenizer
from test_weights import qwen2_of
from torch import nn

import chat
import finetune_lora
import runtime
import sample
import softmask
import train
import training
import weights
from finetune_lora import DoRALinear, wrap
from model import DREAM_SIZES, DiT, DiTConfig, Dream, DreamConfig

ROOT = Path(finetune_lora.__file__).parent
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip


# The layer, beside PEFT's


def draw_adapter(layer):
    """Random A, B and magnitude, far from the start."""
    with torch.no_grad():
        layer.lora_A.normal_(std=0.3)
        layer.lora_B.normal_(std=0.3)
        if layer.magnitude is not None:
            layer.magnitude.uniform_(0.5, 2)


def pair(wide, tall, r, alpha, bias=True, dora=True, dropout=0.0, dtype=torch.float32):
    """The same random layer, ours and PEFT's, and PEFT's parameters under our names."""
    peft = pytest.importorskip("peft")
    base = nn.Linear(wide, tall, bias=bias).to(dtype)
    ours = DoRALinear(copy.deepcopy(base), r, alpha, dropout, dora)
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora, target_modules=["0"]
    )
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    draw_adapter(ours)
    named = {"lora_A": theirs.lora_A["default"].weight, "lora_B": theirs.lora_B["default"].weight}
    if dora:
        named["lora_magnitude_vector"] = theirs.lora_magnitude_vector["default"].weight
    assert named.keys() == ours.parts().keys()
    for name, p in named.items():
        assert p.dtype == ours.parts()[name].dtype == torch.float32
        p.data.copy_(ours.parts()[name].data)
    return ours.train(), theirs.train(), named


def through(layer, x, g):
    """Output and gradient of x of one pass, into fresh gradients of the parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g.to(y.dtype))
    return y.detach(), x.grad


SHAPES = [
    (24, 10, 4, 8.0),  # wide
    (10, 24, 3, 16.0),  # tall
    (12, 12, 12, 12.0),  # rank = width
    (7, 9, 1, 0.5),
    (8, 30, 8, 40.0),
]


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("wide", "tall", "r", "alpha"), SHAPES)
def test_outputs_and_gradients_are_pefts(wide, tall, r, alpha, bias, dora):
    ours, theirs, named = pair(wide, tall, r, alpha, bias, dora)
    for shape in ((5,), (2, 3)):  # two and three dimensions
        x, g = torch.randn(*shape, wide), torch.randn(*shape, tall)
        (y, dx), (want, want_dx) = through(ours, x, g), through(theirs, x, g)
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dx, want_dx, atol=1e-5, rtol=1e-5)
        for name, p in ours.parts().items():
            torch.testing.assert_close(p.grad, named[name].grad, atol=1e-5, rtol=1e-5, msg=name)
    frozen = [p for p in (ours.weight, ours.bias) if p is not None]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@pytest.mark.parametrize("dora", [True, False])
def test_three_steps_of_adamw_end_where_pefts_do(dora):
    ours, theirs, named = pair(9, 11, 3, 6.0, dora=dora)
    optimizers = [
        torch.optim.AdamW(those, lr=0.05, weight_decay=0.0)
        for those in (ours.parts().values(), named.values())
    ]
    for _ in range(3):
        x, g = torch.randn(6, 9), torch.randn(6, 11)
        for layer, optimizer in zip((ours, theirs), optimizers):
            through(layer, x, g)
            optimizer.step()
    for name, p in ours.parts().items():
        torch.testing.assert_close(p, named[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_dropout_falls_where_pefts_does(bias, dora):
    ours, theirs, named = pair(20, 14, 4, 8.0, bias, dora, dropout=0.4)
    x, g, found = torch.randn(3, 2, 20), torch.randn(3, 2, 14), []
    for layer in (ours, theirs):
        torch.manual_seed(7)
        found.append(through(layer, x, g))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for name, p in ours.parts().items():
        torch.testing.assert_close(p.grad, named[name].grad, atol=1e-5, rtol=1e-5, msg=name)
    assert not torch.allclose(ours(x), found[0][0]), "other masks, other outputs"
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


def exact(layer, x, g):
    """Output and gradients in float64, the norm a constant, written out by hand."""
    w0, a, b, x, g = (v.detach().double() for v in (layer.weight, layer.lora_A, layer.lora_B, x, g))
    s = layer.scaling
    v = w0 + s * b @ a  # (out, in)
    gain = torch.ones(len(v), dtype=v.dtype)
    if layer.magnitude is not None:
        gain = layer.magnitude.detach().double() / v.norm(dim=1)
    y = x @ (gain[:, None] * v).T + (0 if layer.bias is None else layer.bias.double())
    d_w = g.T @ x
    d_v = gain[:, None] * d_w
    gradients = {"lora_A": s * b.T @ d_v, "lora_B": s * d_v @ a.T}
    if layer.magnitude is not None:
        gradients["lora_magnitude_vector"] = (d_w * v).sum(1) / v.norm(dim=1)
    return y.detach(), g @ (gain[:, None] * v), gradients


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_in_double_are_the_formulas_with_a_constant_norm(bias, dora):
    base = nn.Linear(7, 5, bias=bias)
    base.weight.data = torch.randint(-8, 9, (5, 7)) / 8  # whose squares are exact in float32
    layer = DoRALinear(base, 3, 4.5, dora=dora)
    draw_adapter(layer)
    layer.double()
    x, g = torch.randn(6, 7).double(), torch.randn(6, 5).double()
    y, d_x = through(layer, x, g)
    want, want_x, gradients = exact(layer, x, g)
    torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(d_x, want_x, atol=1e-12, rtol=1e-12)
    for name, p in layer.parts().items():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_in_bfloat16_ours_is_at_least_as_exact_as_pefts(bias, dora, mixed):
    dtype = torch.float32 if mixed else torch.bfloat16
    ours, theirs, named = pair(96, 64, 8, 8.0, bias, dora, dtype=dtype)
    x = torch.randn(200, 96).bfloat16().to(dtype)
    g = torch.randn(200, 64).bfloat16()
    y64, dx64, gradients = exact(ours, x, g)
    errors, kinds = [], []
    for layer, parts in ((ours, ours.parts()), (theirs, named)):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y, d_x = through(layer, x, g)
        kinds.append((y.dtype, d_x.dtype))
        pairs = [(y, y64), (d_x, dx64)] + [(parts[n].grad, gradients[n]) for n in gradients]
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in pairs])
    assert kinds[0] == kinds[1] and kinds[0] == (torch.bfloat16, dtype)
    for mine, other in zip(*errors):
        assert mine < 0.01 and mine <= 1.05 * other + 1e-6, errors


def test_rows_of_zeros_stay_finite_in_training_and_when_merged():
    base = nn.Linear(6, 4)
    base.weight.data[1] = 0
    layer = DoRALinear(base, 2, 4.0)
    optimizer = torch.optim.AdamW(layer.parts().values(), lr=0.1)
    for step in range(3):
        y, d_x = through(layer, torch.randn(5, 6), torch.randn(5, 4))
        assert y.isfinite().all() and d_x.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parts().values())
        if step == 0:  # before the first update B is zero
            layer.merge()
            assert layer.weight.isfinite().all()
            layer.unmerge()
        optimizer.step()
    layer.merge()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("dora", [True, False])
def test_at_the_start_nothing_is_changed(dora):
    for dtype, close in (
        (torch.float32, dict(atol=1e-6, rtol=1e-6)),
        (torch.bfloat16, dict(atol=2**-8, rtol=2**-8)),  # a rounding of W0 x, before the bias
    ):
        base = nn.Linear(300, 40).to(dtype)
        x, layer = (
            torch.randn(8, 300, dtype=dtype),
            DoRALinear(copy.deepcopy(base), 4, 8.0, 0, dora),
        )
        torch.testing.assert_close(layer(x), base(x), **close)
        assert layer.lora_B.abs().max() == 0
        bound = 1 / math.sqrt(300)  # Kaiming-uniform with a = sqrt 5, as PEFT has it
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound
        layer.merge()
        torch.testing.assert_close(layer.weight, base.weight, rtol=2**-7, atol=0)


@pytest.mark.parametrize("rows", [2**20, 50])
def test_row_norms_are_those_of_the_explicit_product(monkeypatch, rows):
    monkeypatch.setattr(finetune_lora, "WEIGHT_CHUNK", rows)
    for wide, tall, r, alpha in SHAPES:
        layer = DoRALinear(nn.Linear(wide, tall), r, alpha)
        draw_adapter(layer)
        w = layer.weight.double() + alpha / r * layer.lora_B.double() @ layer.lora_A.double()
        torch.testing.assert_close(layer.row_norms().double(), w.norm(dim=1), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_layer_is_the_layer_and_unmerging_restores_it_to_the_bit(dtype, dora):
    layer = DoRALinear(nn.Linear(30, 20).to(dtype), 4, 8.0, 0.3, dora).eval()
    draw_adapter(layer)
    before, x = layer.weight.detach().clone(), torch.randn(9, 30, dtype=dtype)
    want, before_output = exact(layer, torch.eye(30), torch.zeros(30, 20))[0].T, layer(x)
    want = want - layer.bias.double()[:, None]  # W' in float64
    for _ in range(2):
        layer.merge()  # a second time does nothing
    assert layer.weight.dtype == dtype
    assert ((layer.weight.double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()
    if dtype == torch.float32:
        torch.testing.assert_close(layer.weight.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer(x), before_output, rtol=1e-5, atol=1e-5)
    layer.train()
    assert torch.equal(layer(x), layer(x)), "no dropout in what is merged"
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.eval()(x), before_output)


@pytest.mark.parametrize("r", [0, 5])
def test_rank_must_lie_within_the_layer(r):
    with pytest.raises(ValueError, match=f"rank {r}: from 1 to 4"):
        DoRALinear(nn.Linear(9, 4), r, 1.0)


# Which layers


DREAM_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def dream():
    torch.manual_seed(3)
    model = Dream(DreamConfig(**DREAM_SIZES["dream-tiny"])).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("kind", ["dit", "dream"])
def test_layers_with_the_targets_names_are_adapted_and_all_else_is_frozen(tiny, dream, kind):
    peft = pytest.importorskip("peft")
    model = tiny() if kind == "dit" else copy.deepcopy(dream)
    targets = ["attn_qkv", "attn_out", "mlp.0"] if kind == "dit" else DREAM_TARGETS
    config = peft.LoraConfig(r=2, target_modules=targets, use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    want = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in theirs.named_parameters()
        if ".lora_A." in name
    }
    names = {name: p.shape for name, p in model.named_parameters()}
    wrapped = wrap(model, targets, 2, 4.0, 0.0, True)
    assert wrapped.keys() == {f"{name}.weight" for name in want}
    count = sum(2 * sum(names[name]) + names[name][0] for name in wrapped)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    assert count == theirs.get_nb_trainable_parameters()[0]
    assert all(n.rsplit(".", 1)[1] in ("lora_A", "lora_B", "magnitude") for n in trained)
    kept = {n: p.shape for n, p in model.named_parameters() if not p.requires_grad}
    assert kept == names, "what was there has its name"
    for name, layer in wrapped.items():
        assert model.get_submodule(name.removesuffix(".weight")) is layer


def test_a_whole_name_is_one_layer_and_part_of_a_name_none(dream):
    only = wrap(copy.deepcopy(dream), ["layers.1.q_proj"], 2, 4.0, 0.0, False)
    assert list(only) == ["layers.1.q_proj.weight"]
    names = nn.ModuleDict({"q": nn.Linear(4, 4), "rq": nn.Linear(4, 4)})
    assert list(wrap(names, ["q"], 2, 4.0, 0.0, True)) == ["q.weight"]
    with pytest.raises(ValueError, match="--targets proj"):
        wrap(copy.deepcopy(dream), ["q_proj", "proj"], 2, 4.0, 0.0, True)


def test_unknown_target_is_refused_with_the_names_that_there_are(tiny, dream):
    with pytest.raises(ValueError, match=r"--targets q_proj.*attn_out, attn_qkv, mlp\.0, mlp\.2"):
        wrap(tiny(), ["attn_qkv", "q_proj"], 2, 4.0, 0.0, True)
    everything = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ValueError, match=f"--targets attn_qkv.*{everything}"):
        wrap(copy.deepcopy(dream), ["attn_qkv"], 2, 4.0, 0.0, True)
    with pytest.raises(ValueError, match="--targets head"):
        wrap(copy.deepcopy(dream), ["head"], 2, 4.0, 0.0, True)


# What the runs start from


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def base(place):
    """A nano network of bytes, trained for a moment on numbers."""
    text = place / "text.txt"
    text.write_text("".join(f"the number {i} is followed by {i + 1}.\n" for i in range(400)))
    flags = (
        f"--config nano --tokenizer bytes --block-size 128 --batch-size 8 --steps 30 --warmup 5 "
        f"--lr 3e-3 --eval-every 30 --eval-batches 1 --dtype float32 --device cpu --data {text} "
        f"--cache {place}/cache --out {place}/base"
    )
    torch.manual_seed(0)
    assert train.main(train.parse(flags.split())) == 0
    return place / "base"


@pytest.fixture(scope="module")
def soft_base(place, base):
    """The same network with the omegas of a soft mask."""
    state = torch.load(base / "ckpt.pt", weights_only=True)
    soft = softmask.SoftMask(2, omega_s=0.3, lower_bound=-2.5)
    state["softmask"] = {"k": 2, "state": soft.state_dict()}
    (place / "soft").mkdir()
    torch.save(state, place / "soft" / "ckpt.pt")
    return place / "soft"


@pytest.fixture(scope="module")
def wild_base(place, base):
    """A network of the same sizes whose every weight is drawn: its predictions hang on all that it
    sees, where those of the one trained for a moment hardly do."""
    state = torch.load(base / "ckpt.pt", weights_only=True)
    network = DiT(DiTConfig(**state["config"]))
    torch.manual_seed(6)
    randomise(network)
    state["model"] = network.state_dict()
    state["ema"] = [p.detach().clone() for p in network.parameters()]
    (place / "wild").mkdir()
    torch.save(state, place / "wild" / "ckpt.pt")
    return place / "wild"


def said(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def talk(place):
    """1,700 conversations, 17 of which are held out: three batches, the last of one."""
    file = place / "talk.jsonl"
    rows = [
        [said("user", f"{i % 50} + {i % 9}"), said("assistant", "so " * (i % 7) + f"{i % 10}" * 5)]
        for i in range(1700)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def dream_folder(place):
    """A Dream folder with a tokenizer of 600 entries."""
    folder = place / "dream"
    folder.mkdir()
    write_tokenizer(folder, n := 600)
    sizes = DREAM_SIZES["dream-tiny"] | {"vocab_size": n + 30, "mask_id": n + 23}
    torch.manual_seed(4)
    model = Dream(DreamConfig(**sizes))
    randomise(model)
    write_dream(folder, model, shards=2)
    return folder


TINY = (
    "--steps 8 --batch-size 4 --eval-every 4 --log-every 1 --save-every 3 --rank 4 --k 2 "
    "--dtype float32 --device cpu"
).split()


@pytest.fixture
def arguments(place, base, talk, tmp_path):
    """arguments("--flag", out="a") -> the command line of a run."""

    def build(*flags, out="tuned", model=base, given=TINY):
        common = [
            "--data",
            str(talk),
            "--cache",
            str(place / "cache"),
            "--out",
            str(tmp_path / out),
        ]
        if "--resume" in flags:
            return [*common[4:], *flags]
        if "--adapter" in flags:  # whose rank it is
            at = given.index("--rank")
            given = given[:at] + given[at + 2 :]
        return [*given, "--model", str(model), *common, *flags]

    return build


@pytest.fixture
def go(arguments, tmp_path):
    """Run finetune_lora.py in this process: go("--no-sm", out="a") -> folder of the run."""

    def call(*flags, out="tuned", status=0, **options):
        argv = arguments(*flags, out=out, **options)
        assert (finetune_lora.main(finetune_lora.parse(argv)) or 0) == status
        return tmp_path / out

    return call


@pytest.fixture
def run_of(arguments):
    """run_of("--flag") -> the FineTuning that the flags set up, far from its start."""

    def build(*flags, **options):
        r = finetune_lora.set_up(finetune_lora.parse(arguments(*flags, **options)))
        for layer in r.layers.values():
            layer.lora_B.data.normal_(std=0.2)
        if r.softmask is not None:
            r.softmask.set_omegas(0.8, 1.0, -4.0)  # lambda is about a half, not about zero
        return r

    return build


# Masks, ends of text and times


@pytest.mark.parametrize("eps", [1e-3, 0.0])
def test_responses_alone_are_masked_at_the_drawn_share_and_never_not_at_all(eps):
    g, rng, mask = runtime.generator(5), np.random.default_rng(5), 257
    masked_sum, want, variance, n = 0.0, 0.0, 0.0, 8
    halves, counted = np.zeros(2), 0
    for _ in range(1250):
        lengths = [(int(rng.integers(1, 30)), int(rng.choice([1, 2, 40]))) for _ in range(n)]
        examples = [(rng.integers(0, 256, a + b), a) for a, b in lengths]
        eos = [int(rng.integers(0, 3)) * int(b > 1) for _, b in lengths]
        x0, response, attend = chat.collate(examples, eos, 256, 128)
        t, noise = training.draw_masks(x0, g, 0.01, 0.8)
        xt, masked = softmask.corrupt(x0, t, noise, mask, eps, response)
        assert not (masked & ~response).any() and not (masked & ~attend).any()
        assert torch.equal(xt, torch.where(masked, mask, x0))
        for row, ((a, b), more) in enumerate(zip(lengths, eos)):
            here = masked[row, a : a + b + more]
            assert here.any() and here.sum() == masked[row].sum()
            p, size = float((1 - eps) * t[row]), b + more
            masked_sum += int(here.sum())
            want += size * p + (1 - p) ** size  # where none is drawn, one is
            variance += size * p * (1 - p)
            if size > 40:
                halves += [int(here[:20].sum()), int(here[-20:].sum())]
                counted += 20
    assert abs(masked_sum - want) < 4 * math.sqrt(variance)
    assert abs(halves[0] - halves[1]) < 4 * math.sqrt(2 * counted * 0.25), "everywhere alike"


def test_drawn_batches_have_uniform_ends_and_times_that_know_nothing_of_lengths(run_of):
    r = run_of("--batch-size", "8", "--p-sm", "0.25", "--max-length", "60")
    eos, times, lengths, soft, strata = [], [], [], [], []
    for step in range(800):
        r.step = step
        total, ((x0, t, noise, s, response, attend),) = r.draw()
        rows = r.order[1][step % (r.chats.count("train") // 8)]
        own = r.chats.lengths("train")[rows]
        assert (noise.min(), noise.max()) > (0, 0) and noise.max() < 1
        assert total == int(response.sum()) and noise.shape == x0.shape
        strata.append(np.floor((t.double().numpy() - 0.2) / 0.6 * 8))
        assert sorted(strata[-1]) == list(range(8))
        eos += (attend.sum(1).numpy() - own).tolist()
        times += t.tolist()
        lengths += own.tolist()
        soft += s.tolist()
        assert s.sum() == 2
    counts = Counter(eos)
    assert set(counts) == set(range(51))
    chi2 = sum((c - len(eos) / 51) ** 2 / (len(eos) / 51) for c in counts.values())
    assert chi2 < 50 + 5 * math.sqrt(2 * 50)
    assert max(lengths) <= 60 < max(np.add(lengths, eos)), "eos come on top of the limit"
    spread = math.sqrt((64 - 1) / 12 / len(strata))
    assert np.abs(np.mean(strata, 0) - 3.5).max() < 5 * spread, "any place may have any time"
    assert np.abs(np.mean(np.reshape(soft, (-1, 8)), 0) - 0.25).max() < 5 * math.sqrt(0.19 / 800)
    together = np.corrcoef([times, lengths, eos, soft])
    assert np.abs(together - np.eye(4)).max() < 5 / math.sqrt(len(times)), together


def test_an_epoch_shows_every_example_with_its_own_tokens(run_of):
    r = run_of("--batch-size", "4", "--grad-accum", "3", "--no-sm")
    steps, seen = r.chats.count("train") // 12, Counter()
    spoken = [r.chats.example("train", i) for i in range(r.chats.count("train"))]
    eot = r.chats.tokenizer.eot_token
    for r.step in range(steps):
        _, shares = r.draw()
        rows = r.order[1][r.step].tolist()
        seen.update(rows)
        assert len(shares) == 3
        flat = [one for share in shares for one in zip(*(share[i] for i in (0, 4, 5)))]
        for i, (x0, response, attend) in zip(rows, flat, strict=True):
            ids, prompt = spoken[i]
            end = int(attend.sum())
            assert x0[: len(ids)].tolist() == ids.tolist() and (x0[len(ids) :] == eot).all()
            assert attend[:end].all() and response[prompt:end].all()
            assert int(response.sum()) == end - prompt
    assert set(seen.values()) == {1} and len(seen) == steps * 12
    first, r.step = r.order[1], steps
    r.draw()
    assert not np.array_equal(r.order[1], first), "another order in the next epoch"


def test_processes_share_the_batch_of_one(run_of):
    one = run_of("--batch-size", "8")
    (total, whole), state = one.draw(), runtime.generator(1).get_state()
    pieces = []
    for rank in range(2):
        r = run_of("--batch-size", "2", "--global-batch", "8")
        r.world, r.args.grad_accum = runtime.World(rank, 2), 2
        r.g.set_state(state)
        again, shares = one.g.set_state(state) and r.draw()
        assert again == total
        pieces.append(shares)
    joined = [pieces[0][0], pieces[1][0], pieces[0][1], pieces[1][1]]
    for at, field in enumerate(whole[0]):
        rows = [row for piece in joined for row in piece[at]]
        for mine, want in zip(rows, field, strict=True):
            size = len(mine) if field.dim() > 1 else None
            assert torch.equal(mine, want[:size] if size else want)
            if size and at == 5:
                assert not want[size:].any(), "cut at padding alone"


# The loss


def slow_sums(r, shares, every=False, average="tokens"):
    """Algorithm 1, lines 4 to 8, one sequence after another, without padding or batches: each
    one's sum. `every`: all take two passes."""
    model, soft_mask, sums = r.model, r.softmask, []
    table = model.embedding
    for x0s, ts, noises, softs, responses, attends in shares:
        for x0, t, noise, soft, response, attend in zip(x0s, ts, noises, softs, responses, attends):
            end = int(attend.sum())
            x0, noise, response = x0[:end], noise[:end], response[:end]
            p = (1 - model.mask_eps) * float(t)
            places = [i for i in range(end) if response[i] and noise[i] < p]
            if not places:
                places = [min((i for i in range(end) if response[i]), key=lambda i: noise[i])]
            xt = x0.clone()
            xt[places] = model.mask_id
            sigma = torch.tensor([-math.log(1 - p)])
            rows = [table[i] for i in xt.tolist()]
            if soft_mask is not None and (every or soft):
                with torch.no_grad():
                    z = model.logits(model.hidden(torch.stack(rows)[None], sigma)[0])
                for i in places:
                    prob = z[i].double().softmax(0)
                    neg_entropy = float((prob * prob.clamp(min=1e-300).log()).sum())
                    top, ids = prob.topk(soft_mask.k)
                    pi = (top / top.sum()).float()
                    inside = soft_mask.omega_a * (neg_entropy - soft_mask.omega_b)
                    lam = soft_mask.omega_s * torch.sigmoid(inside)
                    mixed = sum(w * table[j] for w, j in zip(pi, ids.tolist()))
                    rows[i] = (1 - lam) * table[model.mask_id] + lam * mixed
            z = model.logits(model.hidden(torch.stack(rows)[None], sigma)[0])
            nll = sum(-z[i].log_softmax(0)[x0[i]] for i in places) / t
            sums.append(nll / len(places) if average == "masked" else nll)
    return sums


@pytest.mark.parametrize("batch_size", ["8", "2"])
@pytest.mark.parametrize("average", ["tokens", "masked"])
@pytest.mark.parametrize("flags", [(), ("--no-sm",), ("dream",)], ids=["sm", "binary", "dream"])
def test_loss_and_gradient_of_a_step_are_the_plain_loops(
    run_of, wild_base, dream_folder, flags, average, batch_size
):
    options = {"model": wild_base}
    if flags == ("dream",):
        flags, options = (
            ("--targets", "q_proj,o_proj", "--max-length", "256"),
            {"model": dream_folder},
        )
    flags = (*flags, "--loss-average", average, "--global-batch", "8")
    r = run_of(*flags, "--batch-size", batch_size, "--lr", "1e-3", "--clip", "1e9", **options)
    state = r.g.get_state()
    _, shares = r.draw()
    if batch_size == "2":
        assert len(shares) == 4 and len({share[0].shape[1] for share in shares}) > 1
    sums = slow_sums(r, shares, average=average)
    count = 8 if average == "masked" else sum(int(share[4].sum()) for share in shares)
    want = sum(sums) / count
    parameters = [p for group in r.optimizer.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(want, parameters)
    want_norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    before = [p.detach().clone() for p in parameters]
    r.g.set_state(state)
    loss, norm = training.training_step(r)
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert norm == pytest.approx(want_norm, rel=1e-3)
    moved = [bool((p != q).any()) for p, q in zip(parameters, before)]
    assert all(moved), "all that is trained has moved"
    frozen = [p for p in r.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen) and len(frozen) > 10


def test_validation_is_the_plain_loops_over_all_held_out_responses(run_of, wild_base):
    r = run_of(model=wild_base)
    g, sums, binary, count = runtime.generator(training.EVAL_SEED), [], [], 0
    r.model.eval()
    batches = r.held_out()
    assert [len(b[0]) for b in batches] == [8, 8, 1]
    soft, state = r.softmask, r.g.get_state()
    for x0, response, attend in batches:
        t, noise = training.draw_masks(x0, g, 0.2, 0.8)
        share = [(x0, t, noise, torch.ones(len(t)), response, attend)]
        with torch.no_grad():
            sums += slow_sums(r, share, every=True)
            r.softmask = None
            binary += slow_sums(r, share)
            r.softmask = soft
        count += int(response.sum())
    r.model.train()
    scores = training.Run.validate(r)
    assert scores["val_nelbo_2pass"] == pytest.approx(float(sum(sums)) / count, rel=1e-5)
    assert scores["val_nelbo_1pass"] == pytest.approx(float(sum(binary)) / count, rel=1e-5)
    assert torch.equal(r.g.get_state(), state) and r.model.training
    own = sorted(r.chats.lengths("val"))
    least = sorted(int(a.sum()) for b in batches for a in b[2])
    assert all(0 <= b - a <= 50 for a, b in zip(own, least))


def test_rows_of_a_validation_batch_are_alike_in_length_and_in_no_order(run_of, monkeypatch):
    monkeypatch.setattr(finetune_lora, "draw_eos", lambda n, *rest: [0] * n)
    lengths = [attend.sum(1).tolist() for _, _, attend in run_of().held_out()]
    for one, after in itertools.pairwise(lengths):
        assert min(one) >= max(after)
        assert one not in (sorted(one), sorted(one, reverse=True)), "times rise along the rows"


def test_dropout_of_the_adapter_is_in_training_alone(run_of, wild_base):
    plain, dropped = (run_of("--lora-dropout", p, model=wild_base) for p in ("0", "0.3"))
    for r in (plain, dropped):
        for a, b in zip(r.layers.values(), plain.layers.values()):
            a.load_state_dict(b.state_dict())
    one, two = (training.Run.validate(r) for r in (plain, dropped))
    assert one == two and {layer.dropout for layer in dropped.layers.values()} == {0.3}
    (loss, _), (other, _) = (training.training_step(r) for r in (plain, dropped))
    assert loss != other and loss == pytest.approx(other, rel=0.5)


def test_rates_rise_and_fall_by_half_a_cosine():
    rates = [finetune_lora.cosine(s, 100, 0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert finetune_lora.cosine(0, 5, 0.0) == 1


def test_paper_preset_has_the_papers_numbers():
    args = vars(finetune_lora.parse(["--preset", "paper", "--model", "dream-coder"]))
    want = dict(
        steps=33_500, global_batch=8, lr=1e-5, lr_sm=1e-2, omega_s=1e-6, p_sm=0.5, b_l=0.2,
        b_h=0.8, clip=7.0, warmup_ratio=0.03, rank=16, alpha=16.0, max_length=2048, dora=True,
        targets="q_proj,k_proj,v_proj,o_proj", train_examples=300_000, val_examples=500,
        loss_average="tokens", checkpoint_activations=True, lora_dropout=0.0, sm=True,
    )  # fmt: skip
    assert {name: args[name] for name in want} == want


# Runs


def state_of(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def lines(folder):
    """metrics.jsonl without what depends on the machine."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in e.items() if k not in ("tokens_per_second", "memory")} for e in entries
    ]


def validations(folder):
    return [e for e in lines(folder) if "val_nelbo_1pass" in e]


WRITTEN = (
    "adapter_config.json", "adapter_model.safetensors", "transparency_config.json", "best.json",
)  # fmt: skip


def assert_same_run(a, b):
    one, two = state_of(a), state_of(b)
    for key in ("adapter", "softmask", "optimizer", "generator", "rng", "step"):
        assert same(one[key], two[key]), key
    assert lines(a) == lines(b)
    for name in WRITTEN:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def kept_network(model, folder):
    """Base and adapter as DoRA layers, not merged: an independent reading of the files."""
    from safetensors.torch import load_file

    network = weights.build_model(weights.load_checkpoint(str(model), "--model"), ema=True).eval()
    config = json.loads((folder / "adapter_config.json").read_text())
    layers = wrap(
        network, config["target_modules"], config["r"], config["lora_alpha"], 0.0,
        config["use_dora"],
    )  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == sum(len(layer.parts()) for layer in layers.values())
    for name, layer in layers.items():
        stem = "base_model.model." + weights.published_name(name).removesuffix("weight")
        if isinstance(network, DiT):
            stem = "base_model.model." + name.removesuffix("weight")
        for part, tensor in layer.parts().items():
            tail = "" if part == "lora_magnitude_vector" else ".weight"
            tensor.data.copy_(tensors[f"{stem}{part}{tail}"])
    return network


def logits(network):
    tokens = torch.arange(40)[None] % 250
    with torch.no_grad():
        return network.logits(network.hidden(network.embed(tokens), torch.tensor([0.5]))[0])


def test_a_run_leaves_an_adapter_a_checkpoint_and_metrics(go, capsys):
    folder = go()
    assert sorted(os.listdir(folder)) == sorted(
        [*WRITTEN, "ckpt.pt", "curves.svg", "metrics.jsonl", "softmask.json"]
    )
    assert [e["step"] for e in validations(folder)] == [0, 4, 8]
    assert all(e["val_nelbo_2pass"] > 0 for e in validations(folder))
    assert [e["step"] for e in lines(folder) if "loss" in e] == list(range(1, 9))
    state = state_of(folder)
    assert state["model"] == {} and state["step"] == 8 and state["softmask"]["k"] == 2
    groups = state["optimizer"]["param_groups"]
    assert [len(g["params"]) for g in groups] == [3 * 4, 3], "of four layers, and the omegas"
    assert all(g["weight_decay"] == 0 and tuple(g["betas"]) == (0.9, 0.999) for g in groups)
    printed = capsys.readouterr().out
    assert "response token" in printed and "best adapter" in printed
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 16.0, True)
    assert config["target_modules"] == ["attn_qkv", "attn_out"]


@pytest.mark.parametrize("flags", [(), ("--no-sm", "--loss-average", "masked"), ("--no-dora",)])
def test_validation_falls_and_the_base_stays(go, base, flags):
    before = (base / "ckpt.pt").read_bytes()
    folder = go(*flags, "--steps", "40", "--eval-every", "40", "--lr", "1e-2")
    first, last = validations(folder)
    key = "val_nelbo_1pass" if "--no-sm" in flags else "val_nelbo_2pass"
    assert last[key] < 0.97 * first[key] and ("val_nelbo_2pass" in last) == (len(flags) < 2)
    config = json.loads((folder / "adapter_config.json").read_text())
    soft = json.loads((folder / "transparency_config.json").read_text())
    assert config["use_dora"] == ("--no-dora" not in flags)
    assert (soft["transparency_alg"] == "none") == ("--no-sm" in flags)
    if "--no-sm" in flags:
        assert soft == {"transparency_alg": "none"} and state_of(folder)["softmask"] is None
    assert (base / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flags", [("--lora-dropout", "0.2"), ("--no-sm",), ("--k", "V", "--grad-accum", "2")]
)
def test_resume_at_an_odd_step_is_exact_to_the_bit(go, monkeypatch, tmp_path, flags):
    whole = go(*flags, out="whole")
    with monkeypatch.context() as m:
        die_before(m, 5)  # the last save was at step 3
        with pytest.raises(Stopped):
            go(*flags, out="parts")
    assert state_of(tmp_path / "parts")["step"] == 3
    assert_same_run(go("--resume", out="parts"), whole)


@pytest.mark.parametrize("step", [3, 4, 8])  # 4 and 8 are validated
def test_a_signal_saves_and_the_resumed_run_is_the_undisturbed_one(
    go, monkeypatch, capsys, step, tmp_path
):
    whole, real = go(out="whole"), training.training_step

    def training_step(r):
        if r.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(r)

    with monkeypatch.context() as m:
        m.setattr(training, "training_step", training_step)
        go(out="parts", status=130 if step < 8 else 0)
    if step < 8:
        said_last = capsys.readouterr().err.splitlines()[-1]
        assert f"saved step {step}" in said_last and "finetune_lora.py --resume" in said_last
    assert state_of(tmp_path / "parts")["step"] == step
    assert_same_run(go("--resume", out="parts"), whole)


def test_death_between_a_save_and_its_validation_costs_no_validation(go, monkeypatch, tmp_path):
    whole, real = go("--save-every", "4", out="whole"), training.report

    def report(r, *rest):
        if r.step == 4:
            raise Stopped
        return real(r, *rest)

    with monkeypatch.context() as m:
        m.setattr(training, "report", report)
        with pytest.raises(Stopped):
            go("--save-every", "4", out="parts")
    assert state_of(tmp_path / "parts")["step"] == 4
    assert_same_run(go("--resume", out="parts"), whole)


def worse_from(monkeypatch, step):
    """Let the run climb its loss from `step` on."""
    monkeypatch.setattr(
        finetune_lora, "cosine", lambda at, steps, ratio: 1.0 if at < step else -1.0
    )


def score_of(network, folder, batches):
    """The validation of an adapter's folder, from its files."""
    soft = weights.build_softmask(weights.read_adapter(str(folder), "--adapter"))
    where = torch.device("cpu"), torch.float32, runtime.ALONE, 0.2, 0.8
    return training.nelbo(network, batches, soft, *where)[0]


def test_the_adapter_of_the_best_validation_is_kept(go, run_of, base, monkeypatch):
    worse_from(monkeypatch, 4)
    folder = go("--lr", "1e-2", "--steps", "8")
    scores = {e["step"]: e["val_nelbo_2pass"] for e in validations(folder)}
    assert scores[4] < scores[0] and scores[4] < scores[8]
    best = json.loads((folder / "best.json").read_text())
    assert best["step"] == 4 and best["val_nelbo_2pass"] == scores[4]
    network = kept_network(base, folder)
    batches = run_of(out="other").held_out()
    assert score_of(network, folder, batches) == pytest.approx(scores[4], rel=1e-5)
    worse_from(monkeypatch, 99)
    go("--resume", "--steps", "9")
    assert json.loads((folder / "best.json").read_text()) == best


def test_a_run_does_not_take_over_the_best_of_another_that_died(go, tmp_path, talk):
    (tmp_path / "tuned").mkdir()
    dead = {"step": 0, "val_nelbo_1pass": 0.001, "val_nelbo_2pass": 0.001}
    (tmp_path / "tuned" / "best.json").write_text(json.dumps(dead))
    with pytest.raises(ValueError, match=r"holds a run \(best\.json\).*--overwrite"):
        go()
    folder = go("--overwrite")
    best = json.loads((folder / "best.json").read_text())
    assert best["val_nelbo_2pass"] == min(e["val_nelbo_2pass"] for e in validations(folder))
    assert (folder / "adapter_config.json").exists()


def test_a_run_that_starts_over_forgets_the_best_of_the_former(go):
    folder = go("--steps", "20", "--eval-every", "20", "--lr", "1e-2")
    before = json.loads((folder / "best.json").read_text())
    go("--overwrite", "--steps", "1", "--lr", "1e-9")
    best = json.loads((folder / "best.json").read_text())
    assert best["val_nelbo_2pass"] > before["val_nelbo_2pass"] and best["step"] < 2


def sampled(tmp_path, name, *flags):
    argv = ["--num", "1", "--nfe", "4", "--length", "24", "--dtype", "float32", "--device", "cpu"]
    file = tmp_path / f"{name}.jsonl"
    sample.main(sample.parser().parse_args([*argv, "--out", str(file), *flags]))
    return json.loads(file.read_text())["ids"]


@pytest.mark.parametrize("flags", [(), ("--no-sm", "--no-dora"), ("--k", "V")])
def test_merged_network_is_base_and_adapter_with_the_same_omegas(
    go, base, monkeypatch, tmp_path, flags
):
    folder = go(*flags, "--lr", "1e-2", "--merge-to", str(tmp_path / "merged"))
    merged = weights.load_checkpoint(str(tmp_path / "merged"), "--model")
    network = weights.build_model(merged, ema=True).eval()
    torch.testing.assert_close(logits(network), logits(kept_network(base, folder)))
    plain = weights.build_model(weights.load_checkpoint(str(base), "--model"), ema=True).eval()
    assert not torch.allclose(logits(network), logits(plain), atol=1e-2)
    soft = weights.read_adapter(str(folder), "--adapter")["softmask"]
    assert (merged["softmask"] is None) == (soft is None) == ("--no-sm" in flags)
    if soft is not None:
        got, want = (weights.build_softmask(s) for s in (merged, {"softmask": soft}))
        assert got.k == want.k and got.omegas() == pytest.approx(want.omegas(), rel=1e-6)
    one = sampled(tmp_path, "merged", "--model", str(tmp_path / "merged"))
    two = sampled(tmp_path, "adapter", "--model", str(base), "--adapter", str(folder))
    assert one == two
    monkeypatch.chdir(tmp_path)  # merging alone writes nothing but the merged network
    before = set(os.listdir())
    argv = ["--steps", "0", "--model", str(base), "--adapter", str(folder), "--merge-to", "again"]
    assert not finetune_lora.main(finetune_lora.parse(argv))
    assert set(os.listdir()) - before == {"again"}
    files = [f for f in sorted(os.listdir("again")) if f.endswith((".json", ".safetensors"))]
    assert len(files) >= 4 or "config.json" in files
    for name in files:
        assert Path("again", name).read_bytes() == Path("merged", name).read_bytes(), name


def test_the_command_that_is_printed_at_the_end_opens_the_adapter(go, capsys, monkeypatch):
    go()
    command = next(c for c in capsys.readouterr().out.splitlines() if "sample.py" in c)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    words = shlex.split(command.partition("sample.py")[2])
    assert (sample.main(sample.parser().parse_args(words)) or 0) == 0


def test_an_adapter_is_where_a_run_starts(go, tmp_path):
    first = go("--lr", "1e-2", "--alpha", "9", "--targets", "attn_out,mlp.2", out="first")
    again = go(
        "--adapter", str(first), "--lr", "1e-12", "--lr-sm", "1e-12", "--steps", "1", out="again"
    )
    best = json.loads((first / "best.json").read_text())
    assert best["step"] > 0
    assert validations(again)[0]["val_nelbo_2pass"] == pytest.approx(
        best["val_nelbo_2pass"], rel=1e-5
    )
    old, new = (weights.read_adapter(str(f), "--adapter") for f in (first, again))
    for key in ("r", "alpha", "targets"):
        assert old[key] == new[key]
    for name, parts in old["modules"].items():
        for part, tensor in parts.items():
            torch.testing.assert_close(new["modules"][name][part], tensor)
    assert_close_omegas(old, new)


def assert_close_omegas(a, b):
    a, b = (weights.build_softmask(state) for state in (a, b))
    assert a.k == b.k and a.omegas() == pytest.approx(b.omegas(), rel=1e-4)


def test_a_soft_masked_networks_omegas_are_where_a_run_starts(go, soft_base):
    folder = go("--steps", "1", "--lr-sm", "1e-12", model=soft_base)
    assert_close_omegas(state_of(soft_base), weights.read_adapter(str(folder), "--adapter"))
    binary = go("--steps", "1", "--no-sm", model=soft_base, out="binary")
    assert weights.read_adapter(str(binary), "--adapter")["softmask"] is None


def test_a_binary_networks_omegas_start_from_its_entropies(go, monkeypatch):
    monkeypatch.setattr(training, "negative_entropies", lambda *a: torch.tensor([-3.0]))
    folder = go("--steps", "1", "--lr-sm", "1e-12", "--omega-s", "0.02")
    soft = json.loads((folder / "transparency_config.json").read_text())
    got = [soft[f"transparency_{name}"] for name in ("scale", "centre", "steepness")]
    assert got == pytest.approx([0.02, -1.5, 10 / 3], rel=1e-4)


def test_what_peft_wrote_is_continued_on_a_dream_network(go, dream_folder, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    state = weights.load_checkpoint(str(dream_folder), "--model")
    network = weights.build_model(state, ema=True)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, use_dora=True, task_type="CAUSAL_LM", target_modules=DREAM_TARGETS
    )
    theirs = peft.get_peft_model(qwen2_of(network), config)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            (nn.init.uniform_(p, 0.5, 2) if "magnitude" in name else nn.init.normal_(p, std=0.2))
    theirs.save_pretrained(tmp_path / "peft")
    flags = ("--max-length", "256", "--steps", "2", "--eval-every", "2", "--checkpoint-activations")
    flags = (*flags, "--lr", "1e-9", "--lr-sm", "1e-9", "--adapter", str(tmp_path / "peft"))
    folder = go(*flags, model=dream_folder)
    assert validations(folder)[0]["step"] == 0
    old, new = (weights.read_adapter(str(f), "--adapter") for f in (tmp_path / "peft", folder))
    assert (new["r"], new["alpha"], set(new["targets"])) == (3, 6, set(DREAM_TARGETS))
    assert old["modules"].keys() == new["modules"].keys() and new["softmask"]["k"] == 2
    for name, parts in old["modules"].items():
        for part, tensor in parts.items():
            torch.testing.assert_close(new["modules"][name][part], tensor, atol=1e-6, rtol=0)
    again = peft.PeftModel.from_pretrained(qwen2_of(network), folder).eval()
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs.eval()(tokens).logits)


def test_the_longest_example_is_what_a_network_with_a_short_context_takes(arguments, dream_folder):
    args = finetune_lora.parse(arguments(model=dream_folder))
    network = weights.build_model(weights.load_checkpoint(str(dream_folder), "--model"), ema=True)
    finetune_lora.fill(args, network)
    assert args.max_length == 512 and args.targets == ",".join(DREAM_TARGETS)


# Processes


TINY_2 = (
    "--steps 4 --global-batch 8 --batch-size 2 --eval-every 2 --log-every 1 --k 2 --lr 5e-3 "
    "--dtype float32 --device cpu"
).split()
JOB = """
import json, os, sys
import torch
import finetune_lora, runtime
real = finetune_lora.FineTuning.validate

def validate(self):
    scores = real(self)
    frozen = [p for b in self.model.blocks for p in b.parameters() if not p.requires_grad]
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in frozen)
    with open(f"{sys.argv[-1]}/held-{self.world.rank}", "a") as f:
        f.write(f"{held} {sum(p.numel() for p in frozen)}\\n")
    return scores

finetune_lora.FineTuning.validate = validate
runtime.run(lambda argv: finetune_lora.main(finetune_lora.parse(argv)), sys.argv[1:-1])
"""


@pytest.fixture(scope="module")
def two_processes(place, base, talk):
    """two_processes("--fsdp") -> folder of a run of two processes, which it is asked for once."""
    done = {}

    def job(*flags):
        if flags not in done:
            folder = place / f"two{''.join(flags)}"
            (place / "job.py").write_text(JOB)
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            argv = [*TINY_2, "--model", str(base), "--data", str(talk), *flags]
            argv += ["--cache", str(place / "cache"), "--out", str(folder), str(place)]
            result = subprocess.run(
                [*launcher, "--nproc_per_node", "2", str(place / "job.py"), *argv],
                env=ENV, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
            assert result.stdout.count("the best adapter") == 1, "only rank 0 speaks"
            held = [(place / f"held-{rank}").read_text().split() for rank in (0, 1)]
            for rank in (0, 1):
                (place / f"held-{rank}").unlink()
            done[flags] = folder, [list(map(int, h)) for h in held]
        return done[flags]

    return job


@pytest.mark.parametrize("flags", [(), ("--fsdp",)], ids=["whole", "sharded"])
def test_two_processes_give_the_losses_the_validation_and_the_adapter_of_one(
    go, two_processes, flags
):
    one, (two, _) = go(given=TINY_2), two_processes(*flags)
    a, b = lines(one), lines(two)
    assert [e["step"] for e in a] == [e["step"] for e in b]
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in ("loss", "val_nelbo_1pass", "val_nelbo_2pass"):
            if key in x:
                assert x[key] == pytest.approx(y[key], rel=1e-5), (x["step"], key)
    one_adapter, two_adapter = state_of(one)["adapter"], state_of(two)["adapter"]
    for name, parts in one_adapter["modules"].items():
        for part, tensor in parts.items():
            torch.testing.assert_close(
                two_adapter["modules"][name][part], tensor, atol=1e-4, rtol=1e-3
            )
    assert torch.equal(state_of(one)["generator"], state_of(two)["generator"])
    first, second = (rng["cpu"] for rng in state_of(two)["rng"])
    assert not torch.equal(first, second), "each process has dropout of its own"


def test_sharded_weights_are_held_by_halves_also_after_a_validation(two_processes):
    _, held = two_processes("--fsdp")
    for numbers in held:
        for own, all_of_it in zip(numbers[::2], numbers[1::2]):
            assert own <= 0.6 * all_of_it, numbers


def test_every_flag_can_be_given_under_torchrun(capsys):
    from torch.distributed.run import get_args_parser

    def taken(*rest):
        start = ["--standalone", "--nproc_per_node", "2", "finetune_lora.py"]
        try:
            return get_args_parser().parse_args([*start, *rest]).training_script_args == [*rest]
        except SystemExit:  # torchrun takes it for an abbreviation of its own
            return False

    flags = [a.option_strings for a in finetune_lora.parser()._actions]
    assert [names for names in flags if not any(taken(name, "1") for name in names)] == []


# Bad input


def refused(capsys, argv):
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        runtime.run(lambda argv: finetune_lora.main(finetune_lora.parse(argv)), argv)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "--rank 0: at least 1"),
        (["--rank", "33"], "33.*from 1 to 32"),
        (["--targets", "attn_qkv,q_proj"], "--targets q_proj.*attn_qkv"),
        (["--max-length", "129"], "--max-length 129: the network takes 128"),
        (["--max-length", "0"], "--max-length 0"),
        (["--model", "absent.pt"], r"--model absent\.pt: no such file"),
        (["--adapter", "absent"], r"--adapter absent: no adapter_config\.json"),
        (["--data", "absent.jsonl"], r"--data absent\.jsonl: no such file"),
        (["--k", "0"], "--k 0"),
        (["--k", "999"], "--k 999.*258"),
        (["--fsdp"], "--fsdp.*torchrun"),
        (["--steps", "0"], "--steps 0"),
        (["--lora-dropout", "1"], "--lora-dropout 1"),
        (["--alpha", "0"], "--alpha 0"),
        (["--alpha", "nan"], "--alpha nan"),
        (["--warmup-ratio", "1.5"], "--warmup-ratio 1.5"),
        (["--b-l", "0.9"], "b_l"),
        (["--loss-average", "median"], "--loss-average"),
        (["--resume"], "--resume: no run in --out"),
        (["--global-batch", "0"], "--global-batch 0"),
    ],
)
def test_bad_flag_is_named_in_one_line_and_nothing_is_written(
    arguments, capsys, tmp_path, flags, message
):
    assert re.search(message, refused(capsys, arguments(*flags)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"bad\.jsonl:3: not JSON"),
        ([{"messages": [said("user", "hello")]}], r"bad\.jsonl:3: .*not the assistant's"),
        (None, "no example left to train on"),
    ],
)
def test_bad_conversations_are_named_in_one_line(arguments, capsys, place, tmp_path, rows, message):
    file = tmp_path / "bad.jsonl"
    good = {"messages": [said("user", "hello"), said("assistant", "a fine day")]}
    if rows is None:
        call = said("assistant", "<tool_call>x</tool_call>")
        lines = [{"messages": [said("user", "hello"), call]}] * 9
    else:
        lines = [good, good, *rows, *[good] * 9]
    file.write_text("".join((x if x == "{" else json.dumps(x)) + "\n" for x in lines))
    argv = [v if not v.endswith("talk.jsonl") else str(file) for v in arguments()]
    assert re.search(message, refused(capsys, argv))
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_an_adapter_of_another_base_is_named_by_its_first_misfit(arguments, capsys, tmp_path):
    modules = {
        f"blocks.{i}.attn_out.weight": {
            "lora_A": torch.zeros(2, width), "lora_B": torch.zeros(32, 2),
            "lora_magnitude_vector": torch.ones(32),
        }
        for i, width in ((0, 32), (1, 64))
    }  # fmt: skip
    adapter = {"r": 2, "alpha": 2.0, "dropout": 0.0, "targets": ["attn_out"], "modules": modules}
    folder = tmp_path / "other"
    folder.mkdir()
    weights.write_adapter(folder, adapter, "x", None)
    argv = arguments("--adapter", str(folder))
    assert "blocks.1.attn_out.weight is (32, 32), its A (2, 64)" in refused(capsys, argv)
    del modules["blocks.1.attn_out.weight"]
    weights.write_adapter(folder, adapter, "x", None)
    assert "adapts other layers" in refused(capsys, argv)
    assert os.listdir(tmp_path) == ["other"]


def test_an_adapter_whose_rank_is_not_its_tensors_is_refused(arguments, go, capsys, tmp_path):
    folder = go("--steps", "1", out="first")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 3}))
    assert "--adapter" in refused(capsys, arguments("--adapter", str(folder), out="second"))
    assert os.listdir(tmp_path) == ["first"]


def test_other_k_than_the_networks_omegas_have_is_refused(arguments, capsys, soft_base, tmp_path):
    message = refused(capsys, arguments("--k", "5", model=soft_base))
    assert "--k 5: the network has soft masks of k 2" in message and os.listdir(tmp_path) == []


def test_a_folder_that_holds_a_model_is_not_merged_into(arguments, go, capsys, base, tmp_path):
    first = go("--steps", "1", out="first")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.json").write_text("{}")
    for given in ([], ["--steps", "0", "--adapter", str(first)]):
        argv = arguments(*given, "--merge-to", str(tmp_path / "held"))
        assert "holds a model" in refused(capsys, argv)
    assert os.listdir(tmp_path / "held") == ["config.json"]
    assert sorted(os.listdir(tmp_path)) == ["first", "held"]


def test_a_fine_tunings_checkpoint_is_no_model(arguments, go, capsys, tmp_path):
    folder = go("--steps", "1", out="first")
    for model in (folder, folder / "ckpt.pt"):
        message = refused(capsys, arguments(out="second", model=model))
        assert "the state of a fine-tuning" in message and "--adapter" in message
    with pytest.raises(ValueError, match="the state of a fine-tuning"):
        sample.main(sample.parser().parse_args(["--model", str(folder)]))
    assert os.listdir(tmp_path) == ["first"]


def test_a_run_is_not_overwritten_and_keeps_what_it_cannot_change(arguments, go, capsys):
    folder = go("--steps", "1")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    assert "holds a run" in refused(capsys, arguments())
    for flags in (["--rank", "5"], ["--k", "3"], ["--no-dora"], ["--targets", "mlp.2"]):
        assert "the run has" in refused(capsys, arguments("--resume", *flags))
    assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    go("--overwrite", "--steps", "1", "--seed", "2")
    assert (folder / "adapter_model.safetensors").read_bytes() != before[
        "adapter_model.safetensors"
    ]


# What is somebody's stays


def test_an_adapter_is_not_overwritten_unless_asked(go, tmp_path):
    folder = go("--steps", "2")
    (folder / "ckpt.pt").unlink()  # to save room
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a run"):
        go("--steps", "2", "--lr", "0.1")
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        go("--steps", "2", out="foreign")
    assert os.listdir(tmp_path / "foreign") == ["adapter_model.safetensors"]


def test_a_resumed_run_refuses_other_conversations(go, talk, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(talk.read_bytes())
    folder = go("--steps", "4", "--data", str(mine))
    with pytest.raises(ValueError, match="conversations, or what is drawn of them, have changed"):
        go("--resume", "--steps", "6", "--val-examples", "3")
    mine.write_bytes(talk.read_bytes() + talk.read_bytes())
    with pytest.raises(ValueError, match=r"have changed.*--adapter"):
        go("--resume", "--steps", "6")
    assert state_of(folder)["step"] == 4


def test_runs_of_the_two_programs_are_told_apart(go, base, tmp_path):
    folder = go("--steps", "1")
    with pytest.raises(ValueError, match="holds a run of finetune_lora.py"):
        train.parse(["--resume", "--out", str(folder)])
    with pytest.raises(ValueError, match="holds a run of train.py"):
        finetune_lora.parse(["--resume", "--out", str(base)])
    with pytest.raises(ValueError, match=r"--init .*the state of a fine-tuning.*--merge-to"):
        train.main(train.parse(["--init", str(folder), "--out", str(tmp_path / "new")]))


def test_an_empty_or_endless_adapter_is_refused(go, base):
    from safetensors.torch import load_file, save_file

    folder = go("--steps", "1")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for broken, message in (
        ({}, "holds no tensors"),
        ({k: v * math.nan for k, v in tensors.items()}, "holds NaN or infinity"),
    ):
        save_file(broken, file)
        with pytest.raises(ValueError, match=message):
            weights.read_adapter(str(folder), "--adapter")


def test_what_cannot_be_merged_is_told_before_the_training(go, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"mine")
    for place, message in (("model", "holds a model"), ("tuned", "the same folder as --out")):
        with pytest.raises(ValueError, match=message):
            go("--merge-to", str(tmp_path / place))
    with pytest.raises(ValueError, match="--steps 0: merges; give --adapter and --merge-to"):
        finetune_lora.parse(["--steps", "0", "--merge-to", str(tmp_path / "x")])
    assert sorted(os.listdir(tmp_path)) == ["model"]

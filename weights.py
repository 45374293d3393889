"""How files become networks and back. What a file is, is told from its content, not its name:

    ours          a zip pickle that `torch.load(weights_only=True)` reads; see `save_checkpoint`
    MDLM          Lightning's zip pickle: `state_dict` ("backbone." keys) and an EMA list
    soft-masked   the same with `tran_head.*`, the omegas (the paper's released checkpoints)
    hub           a folder or a hub id: config.json and safetensors with "backbone." keys (MDLM)
    Dream         the same with Qwen2's keys, in shards; its tokenizer's files beside them

`load_checkpoint` turns each into the same dictionary; `write_model` writes the last two. An adapter
is a folder in PEFT's format (`read_adapter`, `write_adapter`). No file makes code of its maker's
run: pickles pass through an unpickler that knows tensors and plain containers, and for which every
other class is an inert placeholder.
"""

import collections
import json
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model import DiT, DiTConfig, Dream, DreamConfig
from runtime import atomic_write, progress
from softmask import SoftMask

FORMAT = "soft-masked-diffusion 1"
KEYS = {
    *("config", "model", "ema", "updates", "softmask", "optimizer", "step", "generator", "rng"),
    *("tokenizer", "args", "text"),
}
HUB = {
    "mdlm-owt": "kuleshov-group/mdlm-owt",
    "dream": "Dream-org/Dream-v0-Instruct-7B",
    "dream-coder": "Dream-org/Dream-Coder-v0-Instruct-7B",
}
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json")
SOFT_MASK = "transparency_config.json"  # the released adapters' name for the omegas' file
FETCHED = ["*.safetensors*", "config.json", SOFT_MASK, *TOKENIZER]
GPT2_IDS = 50_258  # GPT-2's vocabulary and the mask
SHARD = 2**30  # bytes of a file that `write_model` writes, or one tensor


# Our checkpoints


def save_checkpoint(folder: Path, state: dict, softmask: SoftMask | None) -> None:
    """Write `ckpt.pt`, and the omegas beside it as `softmask.json`; each appears whole.

    state has the KEYS: `ema` in the order of the parameters, `updates` its count, `softmask` k and
    raw scalars or None, `generator` and `rng` (one a process) the random states, `tokenizer` its
    spec, `text` the fingerprint of the corpus.
    """
    with atomic_write(Path(folder) / "ckpt.pt") as f:
        torch.save({"format": FORMAT, **state}, f)
    save_omegas(folder, state["step"], softmask)


def save_omegas(folder: Path, step: int, softmask: SoftMask | None) -> None:
    """Write `softmask.json`: the scalars in the paper's domain; nothing for a binary model."""
    if softmask is not None:
        with atomic_write(Path(folder) / "softmask.json", "w") as f:
            json.dump({"step": step, "k": softmask.k, **softmask.omegas()}, f)


def checkpoint_file(name: str) -> Path:
    """The path that a checkpoint's name stands for; of a run's folder its ckpt.pt."""
    path = Path(name)
    return path / "ckpt.pt" if (path / "ckpt.pt").is_file() else path


def load_checkpoint(
    path: str,
    flag: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tuning: bool = False,
) -> dict:
    """Read any form above into the dictionary of `save_checkpoint`; published forms fill `config`,
    `model`, `ema` (None on the hub), `softmask`, `tokenizer` and `args`.

    Dream's weights are mapped, not read, or go straight to `device`, in `dtype` (None: as they
    are, float16 in bfloat16); `device` and `dtype` do not matter to the others. With `tuning` the
    state of a fine-tuning will do, which has an adapter in place of the weights.
    FileNotFoundError, or ValueError where a file is damaged or another's; both name `flag`.
    """
    place = Path(path)
    if path in HUB or (not place.exists() and path.count("/") == 1 and not place.suffix):
        place = _download(HUB.get(path, path), flag)
    if place.is_dir():
        kinds = (place / "ckpt.pt", place / "config.json")
        found = next((file for file in kinds if file.exists()), None)
        if found is None:
            raise FileNotFoundError(f"{flag} {place}: neither ckpt.pt nor config.json in it")
        place = found
    if not place.is_file():
        raise FileNotFoundError(f"{flag} {place}: no such file or folder")
    try:
        if place.name == "config.json":
            return _from_hub(place.parent, None, device, dtype)
        with open(place, "rb") as f:
            start = f.read(9)
        if start[8:] == b"{":  # safetensors: the length of a JSON header in eight bytes, then it
            return _from_hub(place.parent, [place], device, dtype)
        state = read_zip(place)
        if isinstance(state, dict) and state.get("format") == FORMAT:
            missing = KEYS - state.keys()
            if missing:
                raise ValueError(f"it lacks {sorted(missing)[0]}")
            if "adapter" in state and not tuning:
                raise ValueError(
                    "the state of a fine-tuning; name its base, and this folder by --adapter, or "
                    "merge them: finetune_lora.py --steps 0 --adapter --merge-to"
                )
            return torch.load(place, map_location="cpu", weights_only=True)
        return _from_lightning(state)
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{flag} {place}: no checkpoint that can be read: {reason}") from None


DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile),
)


def _download(repository: str, flag: str) -> Path:
    """The folder of a hub repository, from huggingface_hub's cache or the network."""
    from huggingface_hub import snapshot_download  # slow to import, and most runs do without

    try:
        return Path(snapshot_download(repository, allow_patterns=FETCHED))
    except Exception as error:  # the client's own errors, and those of the network under it
        raise FileNotFoundError(
            f"{flag} {repository}: not in the cache and not downloaded ({type(error).__name__}); "
            "fetch its config.json and model.safetensors (all shards and their index; for Dream "
            "vocab.json and merges.txt) from the hub into a folder and name that"
        ) from None


# Zip pickles, read without running them


class Inert:
    """Stands for an object of a class that is not admitted: takes anything, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def _ignore(self, *args, **kwargs) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class _Kind:
    """A storage class of PyTorch's, of which only the number format matters."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


def _rebuild_tensor(flat: Tensor, offset: int, size: tuple, stride: tuple, *rest) -> Tensor:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(flat)):
        raise ValueError("a tensor reaches beyond its storage")
    return flat.as_strided(size, stride, offset)


ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
    **{("torch", name): _Kind(dtype) for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storage):
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module: str, name: str):
        return ADMITTED.get((module, name), Inert)

    def persistent_load(self, pid: tuple) -> Tensor:
        kind, key, numel = pid[1], pid[2], pid[4]
        return self.storage(key, kind.dtype, numel)


def read_zip(file: Path):
    """The object in a zip that torch.save wrote; its tensors are mapped, not read.

    Every class but tensors and plain containers is `Inert`, so nothing in the file is executed.
    Checksums are verified. ValueError, or what the standard library raises, where it is damaged.
    """
    with zipfile.ZipFile(file) as z:
        damaged = z.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} is damaged")
        pickles = [n for n in z.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip without PyTorch's data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if z.getinfo(pickles[0]).file_size > 2**28:
            raise ValueError("its data.pkl is larger than any network's")

        def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
            part = z.getinfo(f"{root}data/{key}")
            size = numel * dtype.itemsize
            if part.compress_type != zipfile.ZIP_STORED or not 0 <= size <= part.file_size:
                raise ValueError(f"its part {part.filename} is not a tensor's storage")
            if not size:
                return torch.empty(0, dtype=dtype)
            z.fp.seek(part.header_offset + 26)  # the local header ends with a name and extras
            lengths = int.from_bytes(z.fp.read(2), "little"), int.from_bytes(z.fp.read(2), "little")
            start = part.header_offset + 30 + sum(lengths)
            return torch.from_numpy(np.memmap(file, np.uint8, "c", start, size)).view(dtype)

        with z.open(pickles[0]) as f:
            return _Unpickler(f, storage).load()


# Published forms of the MDLM network


def mdlm_names(n_layers: int) -> list[tuple[str, str]]:
    """(published, ours) names of all parameters, in the order of the published EMA list."""
    block = [
        *("norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight"),
        *("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"),
        *("adaLN_modulation.weight", "adaLN_modulation.bias"),
    ]
    names = ["vocab_embed.embedding"]
    names += [f"sigma_map.mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    names += [f"blocks.{i}.{name}" for i in range(n_layers) for name in block]
    names += [
        *("output_layer.norm_final.weight", "output_layer.linear.weight"),
        *("output_layer.linear.bias", "output_layer.adaLN_modulation.weight"),
        "output_layer.adaLN_modulation.bias",
    ]

    def ours(name: str) -> str:
        for old, new in (
            ("vocab_embed.", ""), ("output_layer.linear", "head"), ("output_layer.", ""),
            ("adaLN_modulation", "adaLN"),
        ):  # fmt: skip
            name = name.replace(old, new)
        return name

    return [(name, ours(name)) for name in names]


def _from_lightning(state) -> dict:
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        looked = 'a "state_dict" (MDLM) or "format" (ours)'
        found = list(state)[:5] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"looked for {looked}, found {found}")
    config, model = _published(state["state_dict"])
    ema = state.get("ema")
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if shadow is not None:
        names = mdlm_names(config.n_layers)
        if len(shadow) != len(names):
            raise ValueError(f"its EMA list has {len(shadow)} tensors, the network {len(names)}")
        _, averaged = _published({f"backbone.{n}": w for (n, _), w in zip(names, shadow)})
        shadow = [averaged[name] for name in _shapes(config)]
    return _state(config, model, shadow, _released_omegas(state["state_dict"]))


def _released_omegas(weights: dict) -> dict | None:
    """The omegas of `tran_head.raw_*`; the released head adds 1e-6 to each softplus."""
    if "tran_head.raw_scale" not in weights:
        return None
    names = ("raw_scale", "raw_steep", "raw_centre_neg", "raw_temperature")
    scale, *others = (weights[f"tran_head.{name}"].float().reshape(()) for name in names)
    steep, centre, _ = (F.softplus(v).item() + 1e-6 for v in others)
    softmask = SoftMask(3)
    softmask.set_omegas(torch.sigmoid(scale).item(), steep, -centre)
    return {"k": softmask.k, "state": softmask.state_dict()}


def _from_hub(folder: Path, files: list[Path] | None, device, dtype) -> dict:
    index = folder / "model.safetensors.index.json"
    where = None
    if files is None and index.exists():
        where = json.loads(index.read_text())["weight_map"]
        files = [folder / name for name in sorted(set(where.values()))]
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError("no .safetensors beside its config.json")
    hub, softmask, schedule = {}, None, "none"
    if (folder / "config.json").exists():
        hub = json.loads((folder / "config.json").read_text())
    if (folder / SOFT_MASK).exists():
        softmask, schedule = _read_softmask(folder / SOFT_MASK)
    weights, formats = {}, set()
    for file in progress(files, desc="loading", unit=" files", delay=1):
        if not file.exists():
            raise ValueError(f"its shard {file.name} is missing; fetch it again")
        with safe_open(file, framework="pt") as f:
            for key in f.keys():
                weight = f.get_tensor(key)  # mapped: no memory is taken until it is used
                formats.add(weight.dtype)
                if key.startswith(("model.", "lm_head.")):
                    wanted = dtype or (None if weight.dtype != torch.float16 else torch.bfloat16)
                    weight = weight.to(device, wanted)
                weights[key] = weight
    absent = sorted(set(where or ()) - weights.keys())
    if absent:
        raise ValueError(f"its index names {absent[0]}, which no shard holds")
    if "model.embed_tokens.weight" in weights:
        if torch.float16 in formats:
            print(f"{folder}: float16 weights, taken as bfloat16", file=sys.stderr)
        state = _dream(weights, hub, folder)
    else:
        config, model = _published(weights, hub)
        state = _state(config, model, None, None, hub.get("tokenizer"))
    return state | {"softmask": softmask, "schedule": schedule}


def dream_name(name: str) -> str:
    """Our name of a parameter of Dream's (Qwen2's) files; another network's stays."""
    if not name.startswith(("model.", "lm_head.")):
        return name
    for old, new in (
        ("model.embed_tokens.weight", "embedding"), ("lm_head.", "head."), ("model.", ""),
        ("self_attn.", ""), ("mlp.", ""),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def published_name(ours: str) -> str:
    """The inverse of `dream_name`."""
    if ours == "embedding":
        return "model.embed_tokens.weight"
    if ours.startswith("head."):
        return f"lm_head.{ours.removeprefix('head.')}"
    ours = re.sub(r"\.([qkvo]_proj)", r".self_attn.\1", ours)
    return "model." + re.sub(r"\.((gate|up|down)_proj)", r".mlp.\1", ours)


def _dream(weights: dict[str, Tensor], hub: dict, folder: Path) -> dict:
    """The state of a Dream network; ValueError where config.json asks for what it does not do."""
    if not hub:
        raise ValueError("no config.json beside it, which a Dream network needs")
    rope = hub.get("rope_parameters") or {}
    scaling = hub.get("rope_scaling") or (
        rope if rope.get("rope_type", "default") != "default" else None
    )
    heads, width = hub.get("num_attention_heads"), hub.get("hidden_size")
    unsupported = {
        "rope_scaling": scaling,
        "hidden_act": hub.get("hidden_act", "silu") != "silu" and hub["hidden_act"],
        "use_sliding_window": hub.get("use_sliding_window"),
        "tie_word_embeddings": hub.get("tie_word_embeddings"),
        "layer_types": set(hub.get("layer_types") or ()) - {"full_attention"},
        "head_dim": hub.get("head_dim") not in (None, width // heads) and hub["head_dim"],
    }
    for name, value in unsupported.items():
        if value:
            raise ValueError(f"config.json's {name} {value}: not supported")
    config = DreamConfig(
        vocab_size=hub["vocab_size"],
        block_size=hub.get("max_position_embeddings", DreamConfig.block_size),
        n_layers=hub["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=hub.get("num_key_value_heads", heads),
        width=width,
        mlp_width=hub["intermediate_size"],
        mask_id=hub.get("mask_token_id", DreamConfig.mask_id),
        rope_base=float(hub.get("rope_theta") or rope.get("rope_theta") or DreamConfig.rope_base),
        rms_eps=hub.get("rms_norm_eps", DreamConfig.rms_eps),
    )
    with torch.device("meta"):
        want = {name: p.shape for name, p in Dream(config).named_parameters()}
    found = {name: w for name, w in weights.items() if "inv_freq" not in name}
    wanted = {published_name(ours): shape for ours, shape in want.items()}
    _must_fit(found, wanted, f"a Dream network of {config.n_layers} layers")
    return {
        "format": FORMAT, "config": config.to_dict(), "ema": None, "softmask": None, "step": 0,
        "model": {dream_name(name): weight for name, weight in found.items()},
        "tokenizer": {"name": "dream", "folder": str(folder)},
        "args": {"data": None, "block_size": None},
    }  # fmt: skip


def _must_fit(found: dict, want: dict[str, torch.Size], what: str) -> None:
    """ValueError that names the first missing, unexpected, misshapen and non-float tensors."""
    tensors = {name for name, value in found.items() if isinstance(value, Tensor)}
    misshapen = [n for n in want if n in tensors and found[n].shape != want[n]]
    problems = [f"missing {name}" for name in [n for n in want if n not in tensors][:1]]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - want.keys())[:1]]
    problems += [
        f"{name} of shape {tuple(found[name].shape)}, where {tuple(want[name])} fits"
        for name in misshapen[:1]
    ]
    if problems:
        raise ValueError(f"not {what}: {', '.join(problems)}")
    integer = [name for name in want if not found[name].is_floating_point()]
    if integer:
        raise ValueError(f"{integer[0]} holds {found[integer[0]].dtype}, not weights")


def _published(weights: dict, hub: dict | None = None) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Config and weights, under our names and in float32, of "backbone." keys.

    Sizes are read off the shapes and must agree with config.json (`hub`) where there is one.
    ValueError that names the first missing, unexpected and misshapen keys.
    """
    found = {
        key.removeprefix("backbone."): value
        for key, value in weights.items()
        if isinstance(key, str) and key.startswith("backbone.") and "inv_freq" not in key
    }
    table, sigma = found.get("vocab_embed.embedding"), found.get("sigma_map.mlp.2.weight")
    for name, value in (("vocab_embed.embedding", table), ("sigma_map.mlp.2.weight", sigma)):
        if not isinstance(value, Tensor) or value.dim() != 2:
            shown = [str(key) for key in list(weights)[:3]]
            raise ValueError(f"looked for backbone.{name} of an MDLM network, found {shown}")
    n_layers = len({key.split(".")[1] for key in found if key.startswith("blocks.")})
    hub = hub or {}
    config = DiTConfig(
        vocab_size=table.shape[0],
        block_size=hub.get("model_length", 1024),
        n_layers=n_layers,
        n_heads=hub.get("n_heads", max(1, table.shape[1] // 64)),
        width=table.shape[1],
        cond_dim=sigma.shape[0],
        dropout=hub.get("dropout", 0.1),
        time_conditioning=bool(hub.get("time_conditioning", False)),
    )
    stated = {"vocab_size": config.vocab_size, "hidden_dim": config.width, "n_blocks": n_layers}
    for key, value in (stated | {"cond_dim": config.cond_dim}).items():
        if hub.get(key, value) != value:
            raise ValueError(f"config.json says {key} {hub[key]}, the weights {value}")
    names, shapes = mdlm_names(n_layers), _shapes(config)
    want = {theirs: shapes[ours] for theirs, ours in names}
    _must_fit(found, want, f"an MDLM network of {n_layers} blocks")
    return config, {ours: found[p].float() for p, ours in names}


def _shapes(config: DiTConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in DiT(config).named_parameters()}


def _state(
    config: DiTConfig, model: dict, ema: list | None, softmask: dict | None, tokenizer=None
) -> dict:
    if tokenizer is None and config.vocab_size != GPT2_IDS:
        raise ValueError(f"a vocabulary of {config.vocab_size}; published ones have {GPT2_IDS}")
    if tokenizer is not None and tokenizer["name"] not in ("stdlib", "gpt2", "bytes"):
        raise ValueError(f"its tokenizer {tokenizer['name']!r} is none of stdlib, gpt2, bytes")
    return {
        "format": FORMAT, "config": config.to_dict(), "model": model, "ema": ema,
        "softmask": softmask, "step": 0, "tokenizer": tokenizer or {"name": "gpt2"},
        "args": {"data": None, "block_size": config.block_size},
    }  # fmt: skip


# Networks


def build_model(state: dict, ema: bool, **changes) -> DiT | Dream:
    """The network of a checkpoint with its EMA weights where asked for and there, or its raw ones;
    `changes` replace config entries. ValueError where the parts do not belong together."""
    try:
        config = state["config"] | changes
        if "n_kv_heads" in config:
            with torch.device("meta"):  # its weights are taken as they are, without a copy
                model = Dream(DreamConfig(**config))
            model.load_state_dict(state["model"], assign=True)
            return model
        model = DiT(DiTConfig(**config))
        model.load_state_dict(state["model"])
        if ema and state["ema"] is not None:
            for p, shadow in zip(model.parameters(), state["ema"], strict=True):
                p.data.copy_(shadow)
    except (TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ValueError(f"a checkpoint whose parts do not fit: {str(error)[:200]}") from None
    return model


def build_softmask(state: dict) -> SoftMask | None:
    """The soft mask of a checkpoint; None where the model is binary."""
    if state["softmask"] is None:
        return None
    softmask = SoftMask(state["softmask"]["k"])
    softmask.load_state_dict(state["softmask"]["state"])
    return softmask


def hub_config(config: DiTConfig | DreamConfig) -> dict:
    """The entries of a published config.json for these sizes."""
    c = config
    if isinstance(c, DreamConfig):
        return {
            "vocab_size": c.vocab_size, "max_position_embeddings": c.block_size,
            "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.n_kv_heads, "hidden_size": c.width,
            "intermediate_size": c.mlp_width, "mask_token_id": c.mask_id,
            "rope_theta": c.rope_base, "rms_norm_eps": c.rms_eps,
        }  # fmt: skip
    return {
        "vocab_size": c.vocab_size, "model_length": c.block_size, "n_blocks": c.n_layers,
        "n_heads": c.n_heads, "hidden_dim": c.width, "cond_dim": c.cond_dim,
        "dropout": c.dropout, "time_conditioning": c.time_conditioning,
    }  # fmt: skip


def write_model(place: Path, model: DiT | Dream, state: dict) -> None:
    """Write a network as a hub's folder that `load_checkpoint` opens: safetensors of at most SHARD
    bytes, Dream's tokenizer (a DiT's is in config.json) and the soft mask of `state`, config.json
    last, without which a folder is none. OSError where it cannot be written."""
    if isinstance(model, Dream):
        tensors = {published_name(n): p.data for n, p in model.named_parameters()}
        source = Path(state["tokenizer"]["folder"])
        config = json.loads((source / "config.json").read_text()) | hub_config(model.config)
        for name in TOKENIZER:
            if (source / name).exists():
                shutil.copyfile(source / name, place / name)
    else:
        ours = dict(model.named_parameters())
        names = mdlm_names(model.config.n_layers)
        tensors = {f"backbone.{theirs}": ours[name].data for theirs, name in names}
        config = {**hub_config(model.config), "tokenizer": state["tokenizer"]}
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    where = {}
    for i, shard in enumerate(progress(shards, desc="writing", unit=" files", delay=1)):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        with atomic_write(place / name) as f:
            f.write(save(shard, {"format": "pt"}))
        where |= dict.fromkeys(shard, name)
    files = {
        "model.safetensors.index.json": {"metadata": {}, "weight_map": where},
        SOFT_MASK: _described_softmask(build_softmask(state), state.get("schedule", "none")),
        "config.json": config,
    }
    for name, content in files.items():
        with atomic_write(place / name, "w") as f:
            json.dump(content, f, indent=2)


# Adapters


SUPPORTED = {  # adapter_config.json: what each option may be
    "peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False, None),
    "use_rslora": (False, None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
    "modules_to_save": ([], None), "layers_to_transform": ([], None),
}  # fmt: skip


def read_adapter(folder: str, flag: str) -> dict:
    """A PEFT folder of a LoRA or DoRA, and the soft mask that the released ones carry: {"r",
    "alpha", "dropout", "targets": names, "modules": {our weight's name: {"lora_A" (r, in), "lora_B"
    (out, r), with DoRA "lora_magnitude_vector" (out,)}}, "softmask", "schedule"}.

    Paths in its config are never followed. FileNotFoundError, or ValueError that names `flag` and
    the option that is not supported or the file that is damaged.
    """
    place = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (place / name).is_file():
            raise FileNotFoundError(f"{flag} {folder}: no {name} in it")
    try:
        config = json.loads((place / "adapter_config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("its adapter_config.json holds no settings")
        for option, allowed in SUPPORTED.items():
            value = config.get(option, allowed[0])
            if not any(value == one for one in allowed):
                raise ValueError(f"its {option} {value} is not supported")
        modules: dict[str, dict] = {}
        with safe_open(place / "adapter_model.safetensors", framework="pt") as f:
            for key in f.keys():
                module, kind = key.removesuffix(".weight").rsplit(".", 1)
                if kind not in ("lora_A", "lora_B", "lora_magnitude_vector"):
                    raise ValueError(f"its {key} is no part of a LoRA or DoRA")
                ours = dream_name(module.removeprefix("base_model.model.") + ".weight")
                tensor = f.get_tensor(key).float()
                if not tensor.isfinite().all():
                    raise ValueError(f"its {key} holds NaN or infinity")
                if tensor.dim() != (1 if kind == "lora_magnitude_vector" else 2):
                    raise ValueError(f"its {key} has the shape {tuple(tensor.shape)}")
                modules.setdefault(ours, {})[kind] = tensor
        if not modules:
            raise ValueError("its adapter_model.safetensors holds no tensors")
        for ours, parts in modules.items():
            needed = {"lora_A", "lora_B"}
            needed |= {"lora_magnitude_vector"} if config.get("use_dora") else set()
            if parts.keys() != needed:
                raise ValueError(f"{ours} has {sorted(parts)}, where {sorted(needed)} are needed")
        softmask, schedule = None, "none"
        if (place / SOFT_MASK).is_file():
            softmask, schedule = _read_softmask(place / SOFT_MASK)
        r, alpha = _rank_and_alpha(config)
        for ours, parts in modules.items():
            if not parts["lora_A"].shape[0] == parts["lora_B"].shape[1] == r:
                shapes = tuple(parts["lora_A"].shape), tuple(parts["lora_B"].shape)
                raise ValueError(f"its r is {r}, A and B of {ours} are {shapes[0]} and {shapes[1]}")
        targets = config.get("target_modules") or []
        return {
            "r": r, "alpha": alpha, "dropout": config.get("lora_dropout") or 0.0,
            "targets": [targets] if isinstance(targets, str) else targets,
            "modules": modules, "softmask": softmask, "schedule": schedule,
        }  # fmt: skip
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{flag} {folder}: no adapter that can be read: {reason}") from None


def _rank_and_alpha(config: dict) -> tuple[int, float]:
    alpha, r = config.get("lora_alpha"), config.get("r")
    if type(r) is not int or r < 1 or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise ValueError(f"its r {r}, lora_alpha {alpha}: a rank from 1 and a finite number")
    return r, alpha


SCHEDULES = {"none": "none", "linear": "linear", "stepwise": "step"}  # theirs to ours
TOP_K, TEMPERATURE = "mixinputs_with_topk", "mixinputs_with_temp"


def _read_softmask(file: Path) -> tuple[dict | None, str]:
    """The released adapters' file of the omegas: the soft mask, as in a checkpoint, and the kind of
    its schedule."""
    sm = json.loads(file.read_text())
    alg = sm["transparency_alg"]
    if alg == "none":
        return None, "none"
    kinds = {TOP_K: sm.get("mixinputs_k"), TEMPERATURE: None}
    scheduling = sm.get("transparency_scheduling") or "none"
    if alg not in kinds or scheduling not in SCHEDULES:
        raise ValueError(f"its transparency_alg {alg}, transparency_scheduling {scheduling}")
    softmask = SoftMask(kinds[alg])
    softmask.set_omegas(
        sm["transparency_scale"], sm["transparency_steepness"], sm["transparency_centre"],
        sm.get("mixture_temp") or 1.0,
    )  # fmt: skip
    return {"k": softmask.k, "state": softmask.state_dict()}, SCHEDULES[scheduling]


def _described_softmask(softmask: SoftMask | None, schedule: str) -> dict:
    """The inverse of `_read_softmask`."""
    if softmask is None:
        return {"transparency_alg": "none"}
    omegas = softmask.omegas()
    return {
        "transparency_alg": TEMPERATURE if softmask.k is None else TOP_K,
        "transparency_scale": omegas["omega_s"],
        "transparency_centre": omegas["omega_b"],
        "transparency_steepness": omegas["omega_a"],
        "mixinputs_k": softmask.k,
        "mixture_temp": omegas.get("tau", 1.0),
        "transparency_scheduling": next(n for n, ours in SCHEDULES.items() if ours == schedule),
    }


def write_adapter(folder: Path, adapter: dict, base: str, softmask: SoftMask | None) -> None:
    """Write what `read_adapter` reads, and `peft` loads: `adapter` in its form, in float32; `base`
    is the network's name. Each file appears whole, the settings last."""
    tensors, dream = {}, False
    for name, parts in adapter["modules"].items():
        dream = dream or name.startswith("layers.")
        name = published_name(name) if dream else name
        for part, tensor in parts.items():
            suffix = "" if part == "lora_magnitude_vector" else ".weight"
            key = f"base_model.model.{name.removesuffix('weight')}{part}{suffix}"
            tensors[key] = tensor.detach().float().cpu().contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if dream else None,
        "base_model_name_or_path": base, "r": adapter["r"], "lora_alpha": adapter["alpha"],
        "lora_dropout": adapter["dropout"], "target_modules": adapter["targets"],
        "use_dora": any(key.endswith("vector") for key in tensors), "bias": "none",
        "fan_in_fan_out": False, "use_rslora": False, "modules_to_save": None,
        "inference_mode": True,
    }  # fmt: skip
    with atomic_write(folder / "adapter_model.safetensors") as f:
        f.write(save(tensors, {"format": "pt"}))
    files = {
        SOFT_MASK: _described_softmask(softmask, adapter.get("schedule", "none")),
        "adapter_config.json": config,
    }
    for name, content in files.items():
        with atomic_write(folder / name, "w") as f:
            json.dump(content, f, indent=2)


def check_adapter(weights: dict[str, Tensor], adapter: dict, flag: str) -> None:
    """ValueError that names an adapter's first module that does not fit the base's weights."""
    for name, parts in adapter["modules"].items():
        if name not in weights:
            raise ValueError(f"{flag}: for another base: no {name} in this network")
        w0, a, b = weights[name], parts["lora_A"], parts["lora_B"]
        magnitude = parts.get("lora_magnitude_vector", b[:, 0])
        fits = (b.shape[0], a.shape[1]) == w0.shape and a.shape[0] == b.shape[1]
        if not fits or magnitude.shape != w0.shape[:1]:
            raise ValueError(
                f"{flag}: for another base: {name} is {tuple(w0.shape)}, its A "
                f"{tuple(a.shape)}, B {tuple(b.shape)}, magnitude {tuple(magnitude.shape)}"
            )


def adapted(w0: Tensor, parts: dict[str, Tensor], scaling: float) -> Tensor:
    """W' = magnitude * (W0 + s B A)/||W0 + s B A||, the norm of each row (DoRA; without a magnitude
    W0 + s B A), in float32 and then in the format of W0 (out, in)."""
    a, b = (parts[name].to(w0.device) for name in ("lora_A", "lora_B"))
    w = w0.float() + scaling * (b @ a)
    if "lora_magnitude_vector" in parts:
        norm = w.norm(dim=1).clamp(min=1e-12)  # a row of zeros stays one
        w *= (parts["lora_magnitude_vector"].to(w0.device) / norm)[:, None]
    return w.to(w0.dtype)


@torch.no_grad()
def merge_adapter(model: DiT | Dream, adapter: dict) -> None:
    """Replace each adapted weight by its W'. ValueError for an adapter that does not fit."""
    weights = dict(model.named_parameters())
    check_adapter(weights, adapter, "--adapter")
    for name, parts in adapter["modules"].items():
        w0 = weights[name]  # one that is mapped from a file stays as it is there
        w0.data = adapted(w0.data, parts, adapter["alpha"] / adapter["r"])

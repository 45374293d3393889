"""Writes the published forms of the MDLM network, for tests and trials.

PYTHONPATH=. python tests/published.py mdlm.ckpt    # full size: 169M, EMA, Adam
"""

import json
import pathlib
import sys
import types

import tokenizers
import torch
from safetensors.torch import save_file

import data
from model import SIZES, DiT, DiTConfig
from weights import GPT2_IDS, mdlm_names, published_name


def published_keys(model: DiT) -> dict[str, torch.Tensor]:
    own = dict(model.named_parameters())
    names = mdlm_names(model.config.n_layers)
    return {f"backbone.{theirs}": own[ours].detach().clone() for theirs, ours in names}


class foreign:
    """Within this context objects of a library that is not installed can be made and pickled."""

    def __enter__(self):
        package, module = types.ModuleType("omegaconf"), types.ModuleType("omegaconf.dictconfig")
        names = {"__module__": "omegaconf.dictconfig", "__init__": self._init}
        module.DictConfig = type("DictConfig", (), names)
        self.modules = {"omegaconf": package, "omegaconf.dictconfig": module}
        sys.modules.update(self.modules)
        return module.DictConfig

    @staticmethod
    def _init(this, content):
        this.content = content

    def __exit__(self, *exc):
        for name in self.modules:
            del sys.modules[name]


def write_lightning(path, model: DiT, ema: DiT | None, omegas: dict | None = None, adam=False):
    """Lightning's zip pickle as MDLM's and the soft-masking training write it."""
    weights = published_keys(model)
    weights["backbone.rotary_emb.inv_freq"] = torch.rand(32)
    weights |= {f"tran_head.{name}": torch.tensor(value) for name, value in (omegas or {}).items()}
    state = {
        "epoch": 1,
        "global_step": 1_000_000,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": weights,
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [],
    }
    if adam:
        moments = {
            i: {"exp_avg": p, "exp_avg_sq": p.square()} for i, p in enumerate(model.parameters())
        }
        state["optimizer_states"] = [{"state": moments, "param_groups": []}]
    if ema is not None:
        shadow = list(published_keys(ema).values())
        state["ema"] = {"decay": 0.9999, "num_updates": 1_000_000, "shadow_params": shadow}
    with foreign() as DictConfig:
        state["hyper_parameters"] = {"config": DictConfig({"model": [1, 2, {"length": 1024}]})}
        torch.save(state, path)


def write_hub(folder, model: DiT, shards: int = 1):
    """The hub's folder: config.json and safetensors, in shards with an index or in one file."""
    c = model.config
    config = {
        "vocab_size": c.vocab_size, "model_length": c.block_size, "hidden_dim": c.width,
        "cond_dim": c.cond_dim, "n_blocks": c.n_layers, "n_heads": c.n_heads,
        "dropout": c.dropout, "time_conditioning": c.time_conditioning,
    }  # fmt: skip
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = published_keys(model)
    if shards == 1:
        return save_file(weights, folder / "model.safetensors")
    where = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(weights)}
    for name in set(where.values()):
        save_file({k: w for k, w in weights.items() if where[k] == name}, folder / name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_dream(folder, model, shards: int = 1, **changes):
    """The hub's folder of a Dream network: config.json, safetensors in shards and their index."""
    c = model.config
    config = {
        "model_type": "Dream", "vocab_size": c.vocab_size, "hidden_size": c.width,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads, "intermediate_size": c.mlp_width,
        "mask_token_id": c.mask_id, "max_position_embeddings": c.block_size,
        "rope_theta": c.rope_base, "rms_norm_eps": c.rms_eps, "hidden_act": "silu",
        "rope_scaling": None, "use_sliding_window": False, "tie_word_embeddings": False,
    }  # fmt: skip
    folder = pathlib.Path(folder)
    (folder / "config.json").write_text(json.dumps(config | changes))
    weights = {published_name(n): p.detach().clone() for n, p in model.named_parameters()}
    where = {name: f"model-{i % shards + 1:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({n: w for n, w in weights.items() if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder, entries: int = 600) -> None:
    """vocab.json and merges.txt, learned from our own source, as the library writes them."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=entries, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator([pathlib.Path(data.__file__).read_text()], trainer)
    learner.model.save(str(folder))


if __name__ == "__main__":
    torch.manual_seed(0)
    networks = [DiT(DiTConfig(GPT2_IDS, **SIZES["small"])) for _ in range(2)]
    write_lightning(sys.argv[1], *networks, adam=True)

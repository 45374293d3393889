"""Writes the published forms of the MDLM network, for tests and trials.

PYTHONPATH=. python tests/published.py mdlm.ckpt    # full size: 169M, EMA, Adam
"""

import json
import pathlib
import sys
import types

import torch
from safetensors.torch import save_file

from model import SIZES, DiT, DiTConfig
from weights import GPT2_IDS, mdlm_names


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


if __name__ == "__main__":
    torch.manual_seed(0)
    networks = [DiT(DiTConfig(GPT2_IDS, **SIZES["small"])) for _ in range(2)]
    write_lightning(sys.argv[1], *networks, adam=True)

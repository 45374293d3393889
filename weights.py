"""How files become networks and back.

A checkpoint of ours is one file that `torch.load(weights_only=True)` reads, so that opening a
stranger's file runs no code of theirs. It holds `config`, `model`, `ema`, `softmask`, `optimizer`,
`step`, `generator`, `rng`, `tokenizer` and `args`; beside it stands `softmask.json`, the omegas.
"""

import json
import pickle
import zipfile
from pathlib import Path

import torch

from model import DiT, DiTConfig
from runtime import atomic_write
from softmask import SoftMask

FORMAT = "soft-masked-diffusion 1"


def save_checkpoint(folder: Path, state: dict, softmask: SoftMask | None) -> None:
    """Write `ckpt.pt`, and the omegas beside it as `softmask.json`; each appears whole."""
    with atomic_write(Path(folder) / "ckpt.pt") as f:
        torch.save({"format": FORMAT, **state}, f)
    save_omegas(folder, state["step"], softmask)


def save_omegas(folder: Path, step: int, softmask: SoftMask | None) -> None:
    """Write `softmask.json`: the scalars in the paper's domain."""
    if softmask is not None:
        with atomic_write(Path(folder) / "softmask.json", "w") as f:
            json.dump({"step": step, "k": softmask.k, **softmask.omegas()}, f)


def load_checkpoint(path: str, flag: str) -> dict:
    """Read a checkpoint of ours. FileNotFoundError; ValueError where it is damaged or foreign."""
    file = Path(path)
    if file.is_dir():
        file = file / "ckpt.pt"
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {file}: no such file; train.py writes one as OUT/ckpt.pt")
    try:
        with zipfile.ZipFile(file) as z:
            broken = z.testzip()
        if broken is not None:
            raise ValueError(f"its part {broken} is damaged")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as e:
        reason = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
        raise ValueError(f"{flag} {file}: not a whole checkpoint ({reason}); use another") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{flag} {file}: not a checkpoint of train.py ({FORMAT})")
    return state


def build_model(state: dict, ema: bool, **changes) -> DiT:
    """The network of a checkpoint with its EMA or raw weights; `changes` replace config entries."""
    model = DiT(DiTConfig(**state["config"] | changes))
    model.load_state_dict(state["model"])
    if ema:
        for p, shadow in zip(model.parameters(), state["ema"], strict=True):
            p.data.copy_(shadow)
    return model


def build_softmask(state: dict) -> SoftMask | None:
    """The soft mask of a checkpoint; None where the model is binary."""
    if state["softmask"] is None:
        return None
    softmask = SoftMask(state["softmask"]["k"])
    softmask.load_state_dict(state["softmask"]["state"])
    return softmask

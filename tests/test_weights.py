"""A damaged or foreign checkpoint is one line; opening one runs no code of its maker's."""

import os
import pickle
import random
import zipfile

import pytest
import torch

import weights
from model import SIZES, DiT, DiTConfig
from softmask import SoftMask


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = DiT(DiTConfig(40, **SIZES["nano"]))
    softmask = SoftMask(3, omega_s=0.25, lower_bound=-2.0)
    state = {
        "config": model.config.to_dict(),
        "model": model.state_dict(),
        "ema": [p.detach() + 1 for p in model.parameters()],
        "softmask": {"k": 3, "state": softmask.state_dict()},
        "step": 7,
    }
    weights.save_checkpoint(tmp_path, state, softmask)
    return tmp_path


def test_raw_and_averaged_weights_come_back_to_the_bit(folder):
    state = weights.load_checkpoint(str(folder), "--ckpt")
    raw, ema = (weights.build_model(state, ema=ema) for ema in (False, True))
    for (name, p), q in zip(raw.named_parameters(), ema.parameters()):
        assert torch.equal(p, state["model"][name]) and torch.equal(p + 1, q)


def test_omegas_come_back(folder):
    softmask = weights.build_softmask(weights.load_checkpoint(str(folder), "--ckpt"))
    want = {"omega_s": 0.25, "omega_a": 5.0, "omega_b": -1.0}
    assert softmask.k == 3 and softmask.omegas() == pytest.approx(want)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--init .*nowhere\.pt: no such file"):
        weights.load_checkpoint(str(tmp_path / "nowhere.pt"), "--init")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_refused(folder, share):
    file = folder / "ckpt.pt"
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(ValueError, match=r"--ckpt .*not a whole checkpoint"):
        weights.load_checkpoint(str(folder), "--ckpt")


def test_mutated_files_load_or_are_refused(folder):
    file = folder / "ckpt.pt"
    whole = file.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(100):
        broken = bytearray(whole)
        for _ in range(rng.choice([1, 20])):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            weights.build_model(weights.load_checkpoint(str(folder), "--ckpt"), ema=True)
        except ValueError as error:
            assert "--ckpt" in str(error)
            refused += 1
    assert refused > 50


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_that_runs_code_runs_nothing(tmp_path):
    trap = str(tmp_path / "sprung")
    torch.save({"format": weights.FORMAT, "model": Payload(trap)}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="--ckpt"):
        weights.load_checkpoint(str(tmp_path), "--ckpt")
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(ValueError, match="--ckpt"):
        weights.load_checkpoint(str(tmp_path), "--ckpt")
    assert not os.path.exists(trap)


def test_foreign_files_are_refused(tmp_path):
    file = tmp_path / "ckpt.pt"
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ValueError, match="not a checkpoint of train"):
        weights.load_checkpoint(str(file), "--ckpt")
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="not a checkpoint of train"):
        weights.load_checkpoint(str(file), "--ckpt")
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("hello", "world")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        weights.load_checkpoint(str(file), "--ckpt")

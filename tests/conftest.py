"""What every test shares: a fixed seed, and a network too small to wait for."""

import math
from pathlib import Path

import pytest
import tokenizers
import torch
from published import write_tokenizer

import data
import train
import training
from model import DiT, DiTConfig

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data"

torch.set_num_threads(1)  # tensors this small only wait for a second thread


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(module: torch.nn.Module) -> None:
    """Overwrite all parameters, so that nothing hides behind a zero (adaLN, head) or a one."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=1 / math.sqrt(p.shape[1]) if p.dim() > 1 else 0.5)


@pytest.fixture
def tiny():
    """tiny(**sizes) -> a randomised DiT in evaluation mode, 11 tokens with the mask, length 6."""

    def build(**sizes) -> DiT:
        defaults = dict(vocab_size=11, block_size=6, n_layers=2, n_heads=2, width=16, cond_dim=8)
        model = DiT(DiTConfig(**(defaults | sizes)))
        randomise(model)
        return model.eval()

    return build


# Runs that die, and what they leave


def same(a, b):
    """Equal to the bit: nested dicts and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


class Stopped(Exception):
    pass


def die_before(monkeypatch, step):
    """Let the process "die" when `step` steps are complete and all is saved that they save."""
    real = training.training_step

    def training_step(r):
        if r.step == step:
            raise Stopped
        return real(r)

    monkeypatch.setattr(training, "training_step", training_step)


# Dream's tokenizer


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """vocab.json and merges.txt of 600 entries."""
    folder = tmp_path_factory.mktemp("small")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=["small", "published"])
def dream_folder(request, small_folder):
    folder = small_folder if request.param == "small" else PUBLISHED / "qwen"
    if not folder.exists():
        pytest.skip(f"{folder} is absent: Qwen's vocabulary is no part of the project")
    return folder


@pytest.fixture(scope="module")
def dream(dream_folder):
    return data.dream_tokenizer(dream_folder)


@pytest.fixture(scope="module")
def small_dream(small_folder):
    return data.dream_tokenizer(small_folder)


@pytest.fixture(scope="module")
def theirs(dream_folder):
    """transformers' tokenizer, which finds special tokens in the text."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(dream_folder)
    special = [tokenizers.AddedToken(t, normalized=False, special=True) for t in data.DREAM_SPECIAL]
    tokenizer.add_tokens(special)
    return tokenizer


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a soft-masked training run of four steps on bytes."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"item {i}: some words. " for i in range(2000)))
    flags = (
        "--sm --config nano --tokenizer bytes --steps 4 --batch-size 2 --eval-batches 99".split()
    )
    places = ["--data", str(folder / "text.txt"), "--cache", str(folder), "--out", str(folder)]
    train.main(train.parse([*flags, *places, "--dtype", "float32", "--sm-start", "1"]))
    return folder

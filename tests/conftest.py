"""What every test shares: a fixed seed, and a network too small to wait for."""

import math

import pytest
import torch

from model import DiT, DiTConfig

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

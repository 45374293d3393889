"""The networks: `DiT`, the bidirectional diffusion transformer of MDLM (Sahoo et al., 2024).

Notable: no causal mask; rotary positions; adaLN-zero modulation by the noise level sigma (given 0
unless time conditioning is on, as in the public checkpoint); untied head; SUBS output, under which
the mask token has no probability. `SIZES["small"]` with 50,258 tokens is the public 169M network.

The denoiser interface, all that other files use:
    embed(tokens) -> (B, L, D)         hidden(embeddings, sigma) -> (B, L, D)
    logits(rows) -> (N, V)             embedding, head, mask_id, vocab_size, mask_eps, config
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softmask import at_least_float32

NEVER = -1e6  # the mask's logit: probability exactly 0, yet finite, so that 0 * log 0 is 0

SIZES = {  # name: layers, heads, width, length
    "nano": dict(n_layers=2, n_heads=2, width=32, block_size=32, cond_dim=16),
    "cpu": dict(n_layers=4, n_heads=3, width=192, block_size=128),
    "small": dict(n_layers=12, n_heads=12, width=768, block_size=1024),
}


@dataclass
class DiTConfig:
    """Sizes of a DiT. vocab_size counts the mask, the last id; block_size is the length L."""

    vocab_size: int
    block_size: int
    n_layers: int
    n_heads: int
    width: int
    cond_dim: int = 128
    dropout: float = 0.0
    time_conditioning: bool = False

    def __post_init__(self):
        if self.width % self.n_heads or (self.width // self.n_heads) % 2:
            raise ValueError(f"width {self.width} does not split into {self.n_heads} even heads")

    def to_dict(self) -> dict:
        return asdict(self)


def rotary_table(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (L, head_dim / 2) of position * base^(-2i/head_dim), in float32."""
    freq = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(length).float(), freq)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: pairs (x_i, x_{i + head_dim/2}) of x (..., L, heads, head_dim)."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (L, 1, head_dim / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class TimestepEmbedding(nn.Module):
    """sigma (B,) to the conditioning vector c (B, cond_dim): sinusoids, then a two-layer MLP."""

    def __init__(self, cond_dim: int, n_freq: int = 128):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * n_freq, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )
        self.n_freq = n_freq

    def forward(self, sigma: Tensor) -> Tensor:
        i = torch.arange(self.n_freq, device=sigma.device).float()
        angle = sigma[:, None].float() * torch.exp(-math.log(10000) * i / self.n_freq)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return F.silu(self.mlp(waves.to(self.mlp[0].weight.dtype)))


class ModulatedNorm(nn.Module):
    """norm(x) (1 + scale) + shift, LayerNorm in float32 with a weight and no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x (B, L, D), shift and scale (B or 1, D); one modulation for all sequences folds into
        the norm's own weight and bias."""
        size = x.shape[-1:]
        x, shift, scale = (at_least_float32(v) for v in (x, shift, scale))
        if len(shift) == 1:
            return F.layer_norm(x, size, self.weight * (1 + scale[0]), shift[0], 1e-5)
        normed = F.layer_norm(x, size, self.weight, None, 1e-5)
        return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


class Block(nn.Module):
    """x += gate * attention(modulate(norm1(x))), then the same with the MLP (adaLN-zero)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        d, self.n_heads, self.dropout = config.width, config.n_heads, config.dropout
        self.norm1 = ModulatedNorm(d)
        self.attn_qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = ModulatedNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU("tanh"), nn.Linear(4 * d, d))
        self.adaLN = nn.Linear(config.cond_dim, 6 * d)
        nn.init.zeros_(self.adaLN.weight)
        nn.init.zeros_(self.adaLN.bias)

    def attention(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, length, d = h.shape
        qkv = self.attn_qkv(h).view(b, length, 3, self.n_heads, d // self.n_heads)
        q, k, v = qkv.unbind(2)  # (B, L, heads, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.attn_out(a.transpose(1, 2).reshape(b, length, d))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c).chunk(6, dim=-1)
        h = self.attention(self.norm1(x, shift1, scale1), cos, sin)
        x = x + gate1[:, None] * F.dropout(h, self.dropout, self.training)
        h = self.mlp(self.norm2(x, shift2, scale2))
        return x + gate2[:, None] * F.dropout(h, self.dropout, self.training)


class DiT(nn.Module):
    """MDLM's diffusion transformer behind the denoiser interface (see the top of the file)."""

    mask_eps = 1e-3  # MDLM's log-linear schedule masks with probability (1 - 1e-3) t

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.vocab_size, self.mask_id = config.vocab_size, config.vocab_size - 1
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))
        self.sigma_map = TimestepEmbedding(config.cond_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_final = ModulatedNorm(config.width)
        self.adaLN = nn.Linear(config.cond_dim, 2 * config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        for layer in (self.adaLN, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        cos, sin = rotary_table(config.block_size, config.width // config.n_heads, 10000.0)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        subs = torch.zeros(config.vocab_size)
        subs[self.mask_id] = NEVER
        self.register_buffer("subs", subs, persistent=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, D), a table lookup."""
        return F.embedding(tokens, self.embedding)

    def hidden(self, embeddings: Tensor, sigma: Tensor | None = None) -> Tensor:
        """(B, L, D) embeddings and noise levels sigma (B,) -> (B, L, D), row l predicts token l.

        sigma is ignored (taken as 0 for all) without time conditioning. ValueError beyond length L.
        """
        length = embeddings.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens; the network takes {self.config.block_size}")
        if not self.config.time_conditioning:
            sigma = torch.zeros(1, device=embeddings.device)  # one row serves the whole batch
        elif sigma is None:
            raise ValueError("a time-conditioned network needs sigma, one for each sequence")
        c = self.sigma_map(sigma)  # (B or 1, cond_dim)
        x, cos, sin = embeddings, self.cos[:length], self.sin[:length]
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, c, cos, sin, use_reentrant=False)
            else:
                x = block(x, c, cos, sin)
        return self.norm_final(x, *self.adaLN(c).chunk(2, dim=-1))

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows (N, D) -> (N, V); the mask's logit is NEVER (SUBS)."""
        return F.linear(rows, self.head.weight, self.head.bias + self.subs)

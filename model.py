"""The networks: `DiT`, MDLM's diffusion transformer (Sahoo et al., 2024), and `Dream` (2025).

DiT: no causal mask; rotary positions; adaLN-zero modulation by the noise level sigma (given 0
unless time conditioning is on, as in the public checkpoint); untied head; SUBS output, under which
the mask token has no probability. `SIZES["small"]` with 50,258 tokens is the public 169M network.
Dream: Qwen2.5's network without the causal mask; its shift by one is undone inside `hidden`.

The denoiser interface, all that other files use:
    embed(tokens) -> (B, L, D)     hidden(embeddings, sigma, attend, keep, part) -> (B, L, D)
    logits(rows) -> (N, V)         part_for(first, last) -> what to compute for those
    embedding, head, mask_id, vocab_size, mask_eps, config
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

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

DREAM_SIZES = {  # name: sizes of Qwen2's shape
    "dream-tiny": dict(
        vocab_size=512, n_layers=2, n_heads=4, n_kv_heads=2, width=64, mlp_width=128, mask_id=511,
        block_size=512,
    ),
    "dream-0.5b": dict(n_layers=24, n_heads=14, n_kv_heads=2, width=896, mlp_width=4864),
    "dream-7b": dict(n_layers=28, n_heads=28, n_kv_heads=4, width=3584, mlp_width=18944),
}  # fmt: skip

Keep = Callable[[int, slice, Tensor, Tensor], tuple[Tensor, Tensor]]


def even_heads(width: int, n_heads: int) -> None:
    """ValueError where rotary positions cannot pair the entries of a head."""
    if width % n_heads or (width // n_heads) % 2:
        raise ValueError(f"width {width} does not split into {n_heads} even heads")


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
        even_heads(self.width, self.n_heads)

    def to_dict(self) -> dict:
        return asdict(self)


def rotary(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (..., head_dim / 2) of position * base^(-2i/head_dim), in float32."""
    i = torch.arange(0, head_dim, 2, device=positions.device).float()
    angle = positions.float()[..., None] * base ** (-i / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: pairs (x_i, x_{i + head_dim/2}) of x (..., L, heads, head_dim)."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Cache:
    """A `keep` that holds the keys and values of all L positions in all layers, so that a pass may
    compute a part of them and attend to all (Fast-dLLM, Wu et al., 2025).

    What a pass computes replaces what was there. One tensor (layers, 2, B, heads, L, head_dim),
    allocated at the first pass, which has all positions, in the format of its keys.
    """

    def __init__(self, n_layers: int):
        self.n_layers, self.kv = n_layers, None

    def __call__(self, layer: int, part: slice, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kv is None:
            self.kv = k.new_empty(self.n_layers, 2, *k.shape)
        keys, values = self.kv[layer]  # each (B, heads, L, head_dim)
        keys[:, :, part], values[:, :, part] = k, v
        return keys, values

    @property
    def nbytes(self) -> int:
        return 0 if self.kv is None else self.kv.nbytes


def padding(
    attend: Tensor | None, part: slice, limit: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Positions (1 or B, R) of a part, R of the L, counted from a sequence's first real token, and
    their attention mask (B, 1, R, L) of `attend`, bool (B, L), False at padding; None where nothing
    is padded.

    Nobody attends to padding but the padding itself, so that no row of a softmax is empty.
    ValueError where the part ends beyond the network's `limit`.
    """
    if part.stop > limit:
        raise ValueError(f"{part.stop} tokens; the network takes {limit}")
    if attend is None:
        return torch.arange(part.start, part.stop, device=device)[None], None
    positions = (attend.cumsum(1) - 1).clamp(min=0)[:, part]
    itself = torch.eye(attend.shape[1], dtype=torch.bool, device=device)[part]
    return positions, None if attend.all() else attend[:, None, None] | itself


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of (B, L, heads, head_dim), all rows to all; k and v may
    have fewer heads, each for as many of q's. `keep(k, v)` may keep them and return others."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, L, head_dim)
    if keep is not None:
        k, v = keep(k, v)
    grouped = k.shape[1] != q.shape[1]
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return a.transpose(1, 2).flatten(2)  # (B, L, D)


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

    def attention(self, h: Tensor, cos: Tensor, sin: Tensor, mask, keep) -> Tensor:
        b, length, d = h.shape
        qkv = self.attn_qkv(h).view(b, length, 3, self.n_heads, d // self.n_heads)
        q, k, v = qkv.unbind(2)  # (B, L, heads, head_dim)
        return self.attn_out(attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask, keep))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor, mask, keep) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c).chunk(6, dim=-1)
        h = self.attention(self.norm1(x, shift1, scale1), cos, sin, mask, keep)
        x = x + gate1[:, None] * F.dropout(h, self.dropout, self.training)
        h = self.mlp(self.norm2(x, shift2, scale2))
        return x + gate2[:, None] * F.dropout(h, self.dropout, self.training)


def run_blocks(
    blocks, x: Tensor, common: tuple, keep: Keep | None, part: slice, checkpointed: bool
) -> Tensor:
    """x through all blocks; `checkpointed` ones are computed again in the backward pass."""
    for i, block in enumerate(blocks):
        kept = None if keep is None else partial(keep, i, part)
        if checkpointed and torch.is_grad_enabled():
            x = checkpoint(block, x, *common, kept, use_reentrant=False)
        else:
            x = block(x, *common, kept)
    return x


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
        places = torch.arange(config.block_size)
        cos, sin = rotary(places, config.width // config.n_heads, 10000.0)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        subs = torch.zeros(config.vocab_size)
        subs[self.mask_id] = NEVER
        self.register_buffer("subs", subs, persistent=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, D), a table lookup."""
        return F.embedding(tokens, self.embedding)

    def hidden(
        self,
        embeddings: Tensor,
        sigma: Tensor | None = None,
        attend: Tensor | None = None,
        keep: Keep | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """(B, L, D) embeddings and noise levels sigma (B,) -> (B, L, D), row l predicts token l.

        sigma is ignored (taken as 0 for all) without time conditioning; `attend` as in `padding`;
        `keep(layer, part, k, v)` as in `attention`: with it the embeddings may be those of a
        `part` of the positions (start and stop), the others being kept. ValueError beyond length L.
        """
        part = part or slice(0, embeddings.shape[1])
        positions, mask = padding(attend, part, self.config.block_size, embeddings.device)
        if not self.config.time_conditioning:
            sigma = torch.zeros(1, device=embeddings.device)  # one row serves the whole batch
        elif sigma is None:
            raise ValueError("a time-conditioned network needs sigma, one for each sequence")
        c = self.sigma_map(sigma)  # (B or 1, cond_dim)
        common = (c, self.cos[positions], self.sin[positions], mask)
        x = run_blocks(self.blocks, embeddings, common, keep, part, self.checkpoint_activations)
        return self.norm_final(x, *self.adaLN(c).chunk(2, dim=-1))

    def part_for(self, first: int, last: int) -> slice:
        """What part `hidden` is to compute so that first to last (excluded) are predicted."""
        return slice(first, last)

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows (N, D) -> (N, V); the mask's logit is NEVER (SUBS)."""
        return F.linear(rows, self.head.weight, self.head.bias + self.subs)


# Dream


@dataclass
class DreamConfig:
    """Sizes of a Dream network, Qwen2's. mask_id lies inside the vocabulary; block_size is the
    longest context."""

    vocab_size: int = 152_064
    block_size: int = 131_072
    n_layers: int = 28
    n_heads: int = 28
    n_kv_heads: int = 4
    width: int = 3584
    mlp_width: int = 18_944
    mask_id: int = 151_666
    rope_base: float = 1e6
    rms_eps: float = 1e-6
    time_conditioning: bool = False

    def __post_init__(self):
        even_heads(self.width, self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads do not share {self.n_kv_heads} of k and v")
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f"mask {self.mask_id} outside the vocabulary of {self.vocab_size}")

    def to_dict(self) -> dict:
        return asdict(self)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) in float32, times a weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class DreamBlock(nn.Module):
    """x += attention(norm(x)), then x += MLP(norm(x)), a SwiGLU."""

    def __init__(self, config: DreamConfig):
        super().__init__()
        d, self.head_dim = config.width, config.width // config.n_heads
        kv = config.n_kv_heads * self.head_dim
        self.input_layernorm = RMSNorm(d, config.rms_eps)
        self.q_proj = nn.Linear(d, d)
        self.k_proj, self.v_proj = nn.Linear(d, kv), nn.Linear(d, kv)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.post_attention_layernorm = RMSNorm(d, config.rms_eps)
        self.gate_proj = nn.Linear(d, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(d, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, keep) -> Tensor:
        h = self.input_layernorm(x)
        projected = (self.q_proj(h), self.k_proj(h), self.v_proj(h))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        q, k = (rotate(at_least_float32(y), cos, sin).to(v.dtype) for y in (q, k))
        x = x + self.o_proj(attention(q, k, v, mask, keep))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Dream(nn.Module):
    """Dream-7B's network behind the denoiser interface (see the top of the file)."""

    mask_eps = 0.0  # masks with probability t

    def __init__(self, config: DreamConfig):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.vocab_size, self.mask_id = config.vocab_size, config.mask_id
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        nn.init.normal_(self.embedding, std=0.02)
        self.layers = nn.ModuleList(DreamBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.rms_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, D), a table lookup."""
        return F.embedding(tokens, self.embedding)

    def hidden(
        self,
        embeddings: Tensor,
        sigma: Tensor | None = None,
        attend: Tensor | None = None,
        keep: Keep | None = None,
        part: slice | None = None,
    ) -> Tensor:
        """(B, L, D) embeddings -> (B, L, D), row l predicts token l; sigma is not used.

        The network's row l predicts token l + 1: its rows are shifted, and the first real one
        keeps its own. `attend` as in `padding`; `keep(layer, part, k, v)` as in `attention`: with
        it the embeddings may be those of a `part` (see `part_for`), the others being kept.
        ValueError beyond the longest context.
        """
        part = part or slice(0, embeddings.shape[1])
        positions, mask = padding(attend, part, self.config.block_size, embeddings.device)
        head_dim = self.config.width // self.config.n_heads
        common = (*rotary(positions, head_dim, self.config.rope_base), mask)
        x = run_blocks(self.layers, embeddings, common, keep, part, self.checkpoint_activations)
        h = self.norm(x)
        shifted = torch.cat([h[:, :1], h[:, :-1]], dim=1)
        return torch.where((positions == 0)[..., None], h, shifted)

    def part_for(self, first: int, last: int) -> slice:
        """What part `hidden` is to compute so that first to last (excluded) are predicted: the
        one before as well, which predicts the first."""
        return slice(max(0, first - 1), last)

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows (N, D) -> (N, V), as published: the mask has a logit like any other."""
        return self.head(rows)

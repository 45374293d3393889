"""The DiT against a plain re-implementation, and the properties of the denoiser interface."""

import math

import pytest
import torch
from conftest import randomise
from torch import Tensor

from model import DREAM_SIZES, SIZES, DiT, DiTConfig, Dream, DreamConfig, rotary, rotate
from weights import dream_name

V, L, D = 11, 6, 16  # of the `tiny` network

# A DiT written out from its description, one sequence and one head at a time


def plain_norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm with weight and no bias, then modulate(h) = h (1 + scale) + shift; x (L, D)."""
    centred = x - x.mean(-1, keepdim=True)
    h = weight * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return h * (1 + scale) + shift


def plain_rotate(x: Tensor) -> Tensor:
    """x (L, head_dim): the pair (x_i, x_{i + n}) as a complex number, times exp(1j angle)."""
    n = x.shape[1] // 2
    z = torch.complex(x[:, :n], x[:, n:])
    angle = torch.tensor([[m / 10000 ** (i / n) for i in range(n)] for m in range(len(x))])
    z = z * torch.polar(torch.ones_like(angle), angle).to(z.dtype)
    return torch.cat([z.real, z.imag], dim=1)


def plain_attention(h: Tensor, qkv: Tensor, out: Tensor, n_heads: int) -> Tensor:
    """Bidirectional softmax attention of h (L, D); rows of qkv are [q; k; v], each head by head."""
    d = h.shape[1]
    size, heads = d // n_heads, []
    for i in range(n_heads):
        q, k, v = (h @ qkv[j * d + i * size : j * d + (i + 1) * size].T for j in range(3))
        scores = plain_rotate(q) @ plain_rotate(k).T / math.sqrt(size)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v)
    return torch.cat(heads, dim=1) @ out.T


def plain_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def plain_conditioning(w: dict[str, Tensor], sigma: Tensor) -> Tensor:
    """c = SiLU(MLP([cosines, sines] of sigma exp(-ln(10000) i / 128))) for one sigma."""
    angle = sigma * torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)])
    wave = torch.cat([torch.cos(angle), torch.sin(angle)])
    first = silu(w["sigma_map.mlp.0.weight"] @ wave + w["sigma_map.mlp.0.bias"])
    return silu(w["sigma_map.mlp.2.weight"] @ first + w["sigma_map.mlp.2.bias"])


def plain_dit(model: DiT, tokens: Tensor, sigma: Tensor) -> Tensor:
    """(B, L) tokens and (B,) sigma -> logits (B, L, V), the mask token's minus infinity."""
    w, out = dict(model.named_parameters()), []
    for sequence, s in zip(tokens, sigma, strict=True):
        c = plain_conditioning(w, s)
        x = torch.stack([w["embedding"][token] for token in sequence])  # (L, D)
        for i in range(model.config.n_layers):
            prefix = f"blocks.{i}."
            b = {name[len(prefix) :]: p for name, p in w.items() if name.startswith(prefix)}
            shift1, scale1, gate1, shift2, scale2, gate2 = (
                (b["adaLN.weight"] @ c + b["adaLN.bias"]).view(6, -1).unbind()
            )
            h = plain_norm(x, b["norm1.weight"], shift1, scale1)
            h = plain_attention(h, b["attn_qkv.weight"], b["attn_out.weight"], model.config.n_heads)
            x = x + gate1 * h
            h = plain_norm(x, b["norm2.weight"], shift2, scale2)
            h = plain_gelu(h @ b["mlp.0.weight"].T + b["mlp.0.bias"])
            x = x + gate2 * (h @ b["mlp.2.weight"].T + b["mlp.2.bias"])
        shift, scale = (w["adaLN.weight"] @ c + w["adaLN.bias"]).view(2, -1).unbind()
        x = plain_norm(x, w["norm_final.weight"], shift, scale)
        z = x @ w["head.weight"].T + w["head.bias"]
        out.append(torch.cat([z[:, :-1], torch.full((len(z), 1), -math.inf)], dim=1))
    return torch.stack(out)


def forward(model: DiT, tokens: Tensor, sigma: Tensor | None = None) -> Tensor:
    """tokens (B, L) -> logits (B, L, V) through the denoiser interface."""
    rows = model.hidden(model.embed(tokens), sigma).flatten(0, 1)
    return model.logits(rows).view(*tokens.shape, -1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time_conditioning", [False, True])
def test_forward_and_gradients_equal_the_plain_network(tiny, time_conditioning, batch):
    model = tiny(time_conditioning=time_conditioning, n_heads=4)
    tokens, sigma = torch.randint(0, V, (batch, L)), torch.tensor([0.01, 0.7, 6.9])[:batch]
    true = plain_dit(model, tokens, sigma if time_conditioning else torch.zeros(batch))
    fast = forward(model, tokens, sigma)
    torch.testing.assert_close(fast[..., :-1], true[..., :-1], rtol=1e-5, atol=1e-5)
    direction = torch.randn(batch, L, V - 1)
    parameters = dict(model.named_parameters())
    pairs = [
        torch.autograd.grad((z[..., :-1] * direction).sum(), list(parameters.values()))
        for z in (fast, true)
    ]
    for name, g, h in zip(parameters, *pairs, strict=True):
        assert h.any(), name
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5 * h.abs().max().item())


def test_a_shorter_text_than_the_block_size_equals_the_plain_network(tiny):
    model, tokens = tiny(), torch.randint(0, V, (2, 3))
    true = plain_dit(model, tokens, torch.zeros(2))[..., :-1]
    torch.testing.assert_close(forward(model, tokens)[..., :-1], true, rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast_stays_close_to_float32(tiny):
    model, tokens = tiny(), torch.randint(0, V, (4, L))
    with torch.autocast("cpu", torch.bfloat16):
        rough = forward(model, tokens)
    true = forward(model, tokens)
    torch.testing.assert_close(rough[..., :-1].float(), true[..., :-1], rtol=0.1, atol=0.1)


# Sizes and the start


def untrained(vocab_size: int) -> DiT:
    sizes = dict(block_size=32, n_layers=2, n_heads=2, width=32, cond_dim=16)
    return DiT(DiTConfig(vocab_size=vocab_size, **sizes))


def test_small_has_the_169627218_parameters_of_the_public_network():
    with torch.device("meta"):
        model = DiT(DiTConfig(vocab_size=50258, **SIZES["small"]))
    assert sum(p.numel() for p in model.parameters()) == 169_627_218
    assert len(list(model.parameters())) == 130  # as many as the public checkpoint's EMA list
    assert model.mask_id == 50257
    assert model.embedding.shape == model.head.weight.shape == (50258, 768)


def test_embedding_and_head_are_not_tied(tiny):
    model = tiny()
    assert model.embedding.data_ptr() != model.head.weight.data_ptr()


def test_before_training_all_tokens_but_the_mask_are_equally_likely():
    model = untrained(V)
    p = forward(model, torch.randint(0, V, (2, 32))).softmax(-1)
    assert not p[..., -1].any()
    torch.testing.assert_close(p[..., :-1], torch.full((2, 32, V - 1), 1 / (V - 1)))


def test_before_training_every_block_is_the_identity():
    model = untrained(V)
    tokens = torch.randint(0, V, (2, 32))
    x = model.embed(tokens)
    normed = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, False, keepdim=True) + 1e-5)
    torch.testing.assert_close(model.hidden(x), normed, rtol=1e-4, atol=1e-5)


def test_the_start_has_zero_modulation_and_a_uniform_embedding_within_its_bound():
    model = untrained(500)
    for name, p in model.named_parameters():
        if "adaLN" in name or name.startswith("head"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert p.any(), name
    bound = 1 / math.sqrt(32)  # sqrt(6 / ((1 + a^2) fan_in)), a = sqrt(5)
    assert 0.98 * bound < model.embedding.abs().max() <= bound
    assert model.embedding.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_a_width_that_does_not_split_into_even_heads_is_refused():
    for width, heads in [(16, 3), (6, 2)]:
        with pytest.raises(ValueError, match=str(width)):
            DiTConfig(vocab_size=V, block_size=L, n_layers=1, n_heads=heads, width=width)


def test_config_survives_a_trip_through_a_dictionary():
    config = DiTConfig(vocab_size=V, **SIZES["cpu"], dropout=0.1, time_conditioning=True)
    assert DiTConfig(**config.to_dict()) == config


# The denoiser interface


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pull", [0.0, 1e4])
def test_the_mask_has_probability_exactly_zero_whatever_the_head_says(tiny, dtype, pull):
    model = tiny().to(dtype)
    with torch.no_grad():
        model.head.bias[model.mask_id] = pull
    log_p = model.logits(torch.randn(50, D, dtype=dtype)).float().log_softmax(-1)
    p = log_p.exp()
    assert not p[:, model.mask_id].any()
    assert torch.isfinite(p * log_p).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(50))


def test_logits_of_gathered_rows_equal_those_of_all_rows(tiny):
    model, tokens = tiny(), torch.randint(0, V, (3, L))
    hidden, some = model.hidden(model.embed(tokens)), torch.rand(3, L) < 0.4
    torch.testing.assert_close(model.logits(hidden[some]), forward(model, tokens)[some])
    assert model.logits(hidden[some][:0]).shape == (0, V)


def test_embed_looks_up_the_table(tiny):
    model, tokens = tiny(), torch.randint(0, V, (3, L))
    assert torch.equal(model.embed(tokens), model.embedding[tokens])
    assert model.embedding.shape == (V, D)
    assert model.mask_id == V - 1
    assert model.vocab_size == V


def test_every_position_sees_every_other(tiny):
    model = tiny()
    tokens = torch.randint(0, V, (1, L))
    for changed in (0, L - 1):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % V
        difference = (forward(model, tokens) - forward(model, other))[..., :-1].abs().amax(-1)
        assert (difference > 1e-4).all()


def test_sequences_of_a_batch_do_not_see_each_other(tiny):
    model, tokens = tiny(time_conditioning=True), torch.randint(0, V, (3, L))
    sigma = torch.tensor([0.1, 1.0, 3.0])
    together = forward(model, tokens, sigma)
    for i in range(3):
        alone = forward(model, tokens[[i]], sigma[[i]])
        torch.testing.assert_close(together[[i]], alone, rtol=1e-4, atol=1e-5)


def test_order_matters(tiny):
    model, tokens = tiny(), torch.tensor([[1, 2, 3, 4, 5, 6]])
    turned = forward(model, tokens.flip(1)).flip(1)
    assert (turned - forward(model, tokens))[..., :-1].abs().max() > 1e-3


def test_more_tokens_than_the_block_size_are_refused(tiny):
    model = tiny()
    assert forward(model, torch.zeros(1, L, dtype=torch.long)).shape == (1, L, V)
    with pytest.raises(ValueError, match=f"{L + 1}"):
        forward(model, torch.zeros(1, L + 1, dtype=torch.long))


def test_sigma_matters_with_time_conditioning_only(tiny):
    tokens, low, high = torch.randint(0, V, (2, L)), torch.full((2,), 0.1), torch.full((2,), 3.0)
    for time_conditioning in (False, True):
        model = tiny(time_conditioning=time_conditioning)
        same = torch.equal(forward(model, tokens, low), forward(model, tokens, high))
        assert same != time_conditioning


def test_without_time_conditioning_the_network_is_told_sigma_zero(tiny):
    timed = tiny(time_conditioning=True)
    untimed = tiny(time_conditioning=False)
    untimed.load_state_dict(timed.state_dict())
    tokens = torch.randint(0, V, (3, L))
    torch.testing.assert_close(
        forward(untimed, tokens), forward(timed, tokens, torch.zeros(3)), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(forward(untimed, tokens), forward(untimed, tokens, torch.rand(3)))


# Rotary positions


def test_rotation_equals_multiplication_by_complex_phases():
    cos, sin = rotary(torch.arange(9), 8, 10000.0)
    x = torch.randn(2, 9, 3, 8)
    turned = rotate(x, cos, sin)
    for b in range(2):
        for head in range(3):
            true = plain_rotate(x[b, :, head])
            torch.testing.assert_close(turned[b, :, head], true, rtol=1e-5, atol=1e-5)


def test_attention_scores_depend_on_relative_positions_only():
    cos, sin = rotary(torch.arange(40), 8, 10000.0)
    q, k = torch.randn(1, 1, 1, 8).expand(1, 40, 1, 8), torch.randn(1, 1, 1, 8).expand(1, 40, 1, 8)
    scores = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].T  # (40, 40)
    for offset in range(-39, 40):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert scores[0].std() > 0.1


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    cos, sin = rotary(torch.arange(9), 8, 10000.0)
    x = torch.randn(1, 9, 2, 8)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])


# Dropout


def test_dropout_acts_in_training_only(tiny):
    model, tokens = tiny(dropout=0.5), torch.randint(0, V, (2, L))
    assert torch.equal(forward(model, tokens), forward(model, tokens))
    still = tiny(dropout=0.0)
    still.load_state_dict(model.state_dict())
    torch.testing.assert_close(forward(model, tokens), forward(still, tokens))
    model.train()
    assert not torch.equal(forward(model, tokens), forward(model, tokens))
    assert torch.equal(forward(still, tokens), forward(still.train(), tokens))


def test_dropout_acts_on_the_branches_not_on_the_embeddings(tiny):
    """Dropping all of both branches leaves the embeddings, normalised, as the hidden states."""
    model, tokens = tiny(dropout=1.0).train(), torch.randint(0, V, (2, L))
    skipped = tiny()
    skipped.load_state_dict(model.state_dict())
    skipped.blocks = torch.nn.ModuleList()
    torch.testing.assert_close(forward(model, tokens), forward(skipped, tokens))


# Dream, beside transformers' Qwen2 with a full mask


def qwen2(**sizes):
    transformers = pytest.importorskip("transformers")
    c = DreamConfig(**{**DREAM_SIZES["dream-tiny"], **sizes})
    config = transformers.Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, rope_theta=c.rope_base, rms_norm_eps=c.rms_eps,
        max_position_embeddings=c.block_size, tie_word_embeddings=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    randomise(theirs)
    ours = Dream(c).eval()
    ours.load_state_dict({dream_name(name): p for name, p in theirs.state_dict().items()})
    return theirs, ours


@torch.no_grad()
def their_logits(theirs, tokens, attend):
    """Row l predicts token l + 1, every real row looks at every real row: (B, L, V)."""
    length = tokens.shape[1]
    allowed = attend[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(len(tokens), 1, length, length).masked_fill(~allowed, -1e30)
    places = (attend.long().cumsum(1) - 1).clamp(min=0)
    return theirs(input_ids=tokens, attention_mask=mask, position_ids=places).logits


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({}, 9),
        ({"n_kv_heads": 4}, 16),
        ({"n_heads": 14, "n_kv_heads": 2, "width": 112, "n_layers": 3}, 33),
        ({"n_heads": 2, "n_kv_heads": 1, "mlp_width": 24, "rms_eps": 1e-5}, 1),
        ({"rope_base": 1e4}, 300),
    ],
)
def test_dream_gives_the_logits_of_qwen2_shifted_by_one(sizes, length):
    theirs, ours = qwen2(**sizes)
    tokens = torch.randint(511, (3, length))
    want = their_logits(theirs, tokens, torch.ones_like(tokens, dtype=torch.bool))
    with torch.no_grad():
        got = ours.logits(ours.hidden(ours.embed(tokens)))
    torch.testing.assert_close(got[:, 1:], want[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[:, 0], want[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(side):
    theirs, ours = qwen2(n_heads=14, n_kv_heads=2, width=112)
    tokens, lengths = torch.randint(511, (4, 20)), [20, 13, 7, 1]
    attend = torch.stack([torch.arange(20) < n for n in lengths])
    attend = attend.flip(1) if side == "left" else attend
    want = their_logits(theirs, tokens, attend)
    with torch.no_grad():
        got = ours.logits(ours.hidden(ours.embed(tokens), attend=attend))
        for row, real, n, line, shifted in zip(got, attend, lengths, tokens, want):
            alone = ours.logits(ours.hidden(ours.embed(line[real][None])))[0]
            torch.testing.assert_close(row[real], alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(row[real][1:], shifted[real][:-1], atol=1e-4, rtol=1e-4)
            assert len(alone) == n
    assert got.isfinite().all()


def test_padding_changes_nothing_for_a_dit(tiny):
    model = tiny()
    tokens = torch.randint(10, (2, 6))
    attend = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    with torch.no_grad():
        got = model.hidden(model.embed(tokens), attend=attend)
        alone = model.hidden(model.embed(tokens[1:, 2:]))
    torch.testing.assert_close(got[1:, 2:], alone, atol=1e-5, rtol=1e-4)


def test_gradients_reach_dreams_inputs_with_and_without_checkpointing():
    model = Dream(DreamConfig(**DREAM_SIZES["dream-tiny"]))
    embeddings = model.embed(torch.randint(511, (2, 8))).detach()
    gradients = []
    for on in (False, True):
        model.checkpoint_activations = on
        x = embeddings.clone().requires_grad_()
        model.logits(model.hidden(x)).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and (gradients[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    "model",
    [Dream(DreamConfig(**DREAM_SIZES["dream-tiny"])), DiT(DiTConfig(512, **SIZES["nano"]))],
    ids=["dream", "dit"],
)
def test_keys_and_values_of_each_layer_can_be_kept_and_replaced(model):
    randomise(model)
    tokens, kept = torch.randint(500, (2, 8)), {}

    def keep(layer, rows, k, v):
        kept[layer] = k, v
        return k, v

    plain = model.hidden(model.embed(tokens))
    torch.testing.assert_close(model.hidden(model.embed(tokens), keep=keep), plain)
    assert list(kept) == list(range(model.config.n_layers))
    again = model.hidden(model.embed(tokens), keep=lambda layer, rows, k, v: kept[layer])
    torch.testing.assert_close(again, plain)
    without = model.hidden(model.embed(tokens), keep=lambda layer, rows, k, v: (k, 0 * v))
    assert not torch.allclose(without, plain)


def test_impossible_dream_shapes_are_refused():
    for sizes in ({"n_kv_heads": 3}, {"width": 66}, {"mask_id": 512}):
        with pytest.raises(ValueError):
            DreamConfig(**{**DREAM_SIZES["dream-tiny"], **sizes})


def test_dream_7b_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Dream(DreamConfig(**DREAM_SIZES["dream-7b"]))
    assert sum(p.numel() for p in model.parameters()) == 7_615_616_512

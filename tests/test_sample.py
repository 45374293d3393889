"""The ancestral sampler follows its law, leaves given positions alone, repeats with its seed."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import randomise

import data
import sample
import train
from model import SIZES, DiT, DiTConfig
from softmask import SoftMask


class Table(torch.nn.Module):
    """A denoiser that looks its logits up: `rule(tokens (L,))` gives (L, V) log-probabilities."""

    mask_eps = 0.0

    def __init__(self, vocab_size, rule):
        super().__init__()
        self.vocab_size, self.mask_id = vocab_size, vocab_size - 1
        self.embedding = torch.nn.Parameter(torch.eye(vocab_size))
        self.head = torch.nn.Identity()
        self.config = SimpleNamespace(time_conditioning=False)
        self.rule, self.calls = rule, 0

    def embed(self, tokens):
        self.tokens = tokens
        return self.embedding[tokens]

    def hidden(self, embeddings, sigma):
        self.calls += 1
        known = {}
        for row in self.tokens.tolist():
            if tuple(row) not in known:
                known[tuple(row)] = self.rule(row)
        return torch.stack([known[tuple(row)] for row in self.tokens.tolist()])

    def logits(self, rows):
        return rows


def with_mask(p):
    """Probabilities (L, V - 1) to log-probabilities (L, V) under SUBS."""
    return torch.cat([p.log(), torch.full((len(p), 1), -1e6)], dim=1)


def chi_square(counts, expected):
    """The statistic, and the value it stays below with probability 0.9999 (Wilson-Hilferty)."""
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected))
    df = len(counts) - 1
    limit = df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3
    return statistic, limit


def draw(model, length, n, nfe, first_seed=0, **options):
    x = torch.full((n, length), model.mask_id)
    seeds = list(range(first_seed, first_seed + n))
    softmask, on_step = options.pop("softmask", None), options.pop("on_step", None)
    how = sample.Strategy(**options)
    return sample.generate(model, x, nfe, softmask, how, seeds=seeds, on_step=on_step)[0]


@pytest.mark.parametrize("softmask", [None, SoftMask(2)])
def test_tokens_of_a_fixed_predictor_follow_its_probabilities(softmask):
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    x = draw(Table(5, lambda row: with_mask(p)), 2, 6000, nfe=3, softmask=softmask)
    for position in range(2):
        counts = torch.bincount(x[:, position], minlength=4).tolist()
        statistic, limit = chi_square(counts, [6000 * q for q in p[position].tolist()])
        assert statistic < limit


def test_joint_law_of_a_predictor_that_looks_at_its_context():
    """Two positions, two steps: the chain enumerated by hand, Eq. 1 with alpha = 1 - t."""

    def rule(row):  # a token likes to be followed and preceded by itself
        p = torch.tensor([0.7, 0.3])
        rows = []
        for position in range(2):
            other = row[1 - position]
            rows.append(p if other == 2 else torch.tensor([0.9, 0.1] if other == 0 else [0.2, 0.8]))
        return with_mask(torch.stack(rows))

    s = (1 + 1e-5) / 2  # the share still masked after the first of two steps
    alone = [0.7, 0.3]
    given = [[0.9, 0.1], [0.2, 0.8]]
    expected = []
    for a, b in itertools.product(range(2), repeat=2):
        together = alone[a] * alone[b]  # both open in the same step
        one_first = alone[a] * given[a][b] + alone[b] * given[b][a]
        expected.append(((1 - s) ** 2 + s**2) * together + s * (1 - s) * one_first)
    n = 8000
    x = draw(Table(3, rule), 2, n, nfe=2)
    counts = torch.bincount(2 * x[:, 0] + x[:, 1], minlength=4).tolist()
    statistic, limit = chi_square(counts, [n * e for e in expected])
    assert sum(expected) == pytest.approx(1, abs=1e-3) and statistic < limit


def test_masked_share_after_each_step_is_one_minus_alpha():
    n, length, nfe = 400, 32, 8
    model = Table(3, lambda row: with_mask(torch.full((length, 2), 0.5)))
    shares = []
    draw(model, length, n, nfe, on_step=lambda i, x: shares.append((x == 2).float().mean().item()))
    times = torch.linspace(1, 1e-5, nfe + 1)[1:]
    for share, t in zip(shares, times.tolist()):
        assert abs(share - t) < 5 * math.sqrt(t * (1 - t) / (n * length)) + 1e-9


def test_binary_sampler_reuses_a_pass_when_nothing_changed():
    model = Table(3, lambda row: with_mask(torch.full((4, 2), 0.5)))
    x = torch.full((1, 4), 2)
    _, done = sample.generate(model, x, 200, seeds=[1])
    assert done.passes <= 5 and model.calls - done.passes in (0, 1)
    model.calls = 0
    _, done = sample.generate(model, x, 20, SoftMask(1), seeds=[1])
    assert done.passes > 5


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = DiT(DiTConfig(60, **SIZES["nano"])).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("softmask", [None, SoftMask(3, omega_s=0.9), SoftMask(None, omega_s=0.9)])
@pytest.mark.parametrize("nfe", [1, 5, 50])
def test_given_positions_stay_and_masks_are_filled(network, softmask, nfe):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(59, (4, 20), generator=g)
    hidden = torch.rand(x.shape, generator=g) < torch.tensor([0.0, 0.2, 0.7, 1.0])[:, None]
    start = torch.where(hidden, network.mask_id, x)
    out, _ = sample.generate(network, start, nfe, softmask, sample.Strategy(top_p=0.9))
    assert torch.equal(out[~hidden], x[~hidden]) and not (out == network.mask_id).any()
    assert torch.equal(start[hidden], torch.full_like(start[hidden], network.mask_id))


@pytest.mark.parametrize("softmask", [None, SoftMask(3, omega_s=0.9)])
def test_a_row_does_not_depend_on_its_batch(network, softmask):
    network, rows = network.double(), torch.full((5, 16), network.mask_id)
    together, _ = sample.generate(network, rows, 8, softmask, seeds=[3, 1, 4, 5, 9])
    alone = [sample.generate(network, rows[:1], 8, softmask, seeds=[s])[0] for s in (3, 1, 4, 5, 9)]
    network.float()
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row) for row in together.tolist()}) == 5


def test_soft_masking_with_lambda_zero_is_the_binary_sampler(network):
    softmask = SoftMask(3)
    softmask.set_omegas(0.9, 1.0, -20.0)  # omega_b far below every -H: lambda = omega_s
    softmask.raw_s.data.fill_(-math.inf)
    x = torch.full((3, 16), network.mask_id)
    options = {"nfe": 8, "seeds": [1, 2, 3], "how": sample.Strategy(top_p=0.9)}
    plain, _ = sample.generate(network, x, **options)
    assert torch.equal(plain, sample.generate(network, x, softmask=softmask, **options)[0])
    softmask.raw_s.data.fill_(5.0)
    assert not torch.equal(plain, sample.generate(network, x, softmask=softmask, **options)[0])


def test_temperature_zero_draws_the_most_likely_token(network):
    x = torch.full((1, 16), network.mask_id)
    greedy = sample.Strategy(temperature=0)
    a, b = (sample.generate(network, x, 1, how=greedy, seeds=[s])[0] for s in (1, 2))
    z = network.logits(network.hidden(network.embed(x))[0])
    assert torch.equal(a, b) and torch.equal(a[0], z.argmax(-1))


def kept(p, top_p, crossing):
    """The nucleus as a set of ids a row."""
    ids, q = sample.nucleus(p, top_p, crossing)
    assert torch.allclose(q.sum(-1), torch.ones(len(p), dtype=p.dtype))
    mass = torch.where(q > 0, p.gather(1, ids), 0.0)
    assert torch.allclose(q, mass / mass.sum(-1, keepdim=True))
    return [set(row[w > 0].tolist()) for row, w in zip(ids, q)]


def test_mdlm_nucleus_keeps_tokens_while_the_cumulative_probability_is_at_most_p():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    assert kept(p, 0.4, False) == [{1}]  # the first always stays
    assert kept(p, 0.75, False) == [{1, 3}]
    assert kept(p, 0.8, False) == [{1, 3}]  # the crossing token is out
    assert kept(p, 0.95, False) == [{1, 2, 3}]


def test_dream_nucleus_is_the_smallest_set_that_reaches_p():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    assert kept(p, 0.4, True) == [{1}]
    assert kept(p, 0.75, True) == [{1, 3}]
    assert kept(p, 0.8, True) == [{1, 2, 3}]  # the crossing token is in
    assert kept(p, 0.95, True) == [{0, 1, 2, 3}]


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
def test_nucleus_of_large_vocabularies_is_that_of_a_full_sort(crossing, sharpness):
    p = (torch.randn(20, 9000, dtype=torch.float64) * sharpness).softmax(-1)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        for row, found in zip(p, kept(p, top_p, crossing)):
            total, want = 0.0, set()
            for i in row.argsort(descending=True).tolist():
                if want and (total >= top_p if crossing else total + row[i] > top_p):
                    break
                want.add(i)
                total += row[i].item()
            assert found == want


def test_gumbel_draws_follow_the_nucleus_law():
    z = torch.tensor([[2.0, 1.0, 0.5, -1.0, 3.0]], dtype=torch.float64).expand(20000, 5)
    p = (z[0, :4] / 0.7).softmax(0)  # the last is the mask
    for name, top_p in (("mdlm", 0.95), ("origin", 0.95), ("mdlm", 1.0)):
        how = sample.Strategy(name, temperature=0.7, top_p=top_p)
        g = [torch.Generator().manual_seed(i) for i in range(20000)]
        tokens, prob = sample.draw(*sample.candidates(z, 4, how), 0.7, g)
        before = p.cumsum(0) - p  # p is in descending order
        inside = before < top_p if name == "origin" else p.cumsum(0) <= top_p + 1e-9
        law = torch.where(inside, p, 0.0) / p[inside].sum()
        assert torch.allclose(prob, law[tokens])
        counts = torch.bincount(tokens, minlength=4)
        assert len(counts) == 4 and counts[~inside].sum() == 0
        statistic, limit = chi_square(counts[inside].tolist(), (20000 * law[inside]).tolist())
        assert statistic < limit


def test_template_of_prompt_and_infill():
    tokenizer = data.bytes_tokenizer()
    assert sample.template(tokenizer, 5, prompt="ab") == [97, 98, 257, 257, 257]
    assert sample.template(tokenizer, 9, infill="a[MASK][MASK]b[MASK]") == [97, 257, 257, 98, 257]
    for bad in ({"infill": "nothing"}, {"prompt": "abcde"}, {"infill": "a[MASK]bcdefg"}):
        with pytest.raises(ValueError, match="--prompt|--infill"):
            sample.template(tokenizer, 5, **bad)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the quick brown fox. " * 200)
    flags = "--sm --config nano --tokenizer bytes --steps 2 --batch-size 2 --eval-batches 1".split()
    places = ["--data", str(folder / "text.txt"), "--cache", str(folder), "--out", str(folder)]
    train.main(train.parse([*flags, *places]))
    return folder / "ckpt.pt"


def run(checkpoint, *flags):
    return sample.main(sample.parser().parse_args(["--ckpt", str(checkpoint), *flags]))


def test_command_line_writes_samples_that_keep_the_prompt(checkpoint, tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    run(
        checkpoint,
        "--num",
        "3",
        "--batch-size",
        "2",
        "--prompt",
        "ab",
        "--nfe",
        "4",
        "--out",
        str(out),
    )
    printed = capsys.readouterr().out
    samples = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(samples) == 3 and all(s["text"].startswith("ab") for s in samples)
    assert all(len(s["ids"]) == 32 and 257 not in s["ids"] for s in samples)
    assert "tokens per second" in printed and "4 steps" in printed


def test_command_line_fills_in_place(checkpoint, capsys):
    run(checkpoint, "--infill", "x = [MASK][MASK] + 1", "--dtype", "float32")
    text = capsys.readouterr().out.split("\n")[1]
    assert "[MASK]" not in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--nfe", "0"],
        ["--nfe", "-3"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--num", "0"],
        ["--length", "33"],
        ["--length", "-1"],
        ["--temperature", "-1"],
        ["--prompt", "x" * 40],
        ["--infill", "no mask"],
        ["--ckpt", "absent"],
        ["--batch-size", "0"],
    ],
)
def test_bad_flag_is_named(checkpoint, flags):
    with pytest.raises((ValueError, OSError), match=flags[0]):
        run(checkpoint, *flags)

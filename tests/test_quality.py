"""Samples are measured as the definitions say, and told from noise."""

import json
import math

import numpy as np
import pytest
import torch

import evaluate
import quality
from data import open_corpus
from weights import load_checkpoint

# Samples beside held-out text


def test_divergence_is_the_textbooks_and_knows_its_bounds():
    a, b = (np.array([[1, 2, 3, 1, 2]]), np.array([[1, 2, 1, 2, 9]]))
    p = {(1, 2): 2 / 4, (2, 3): 1 / 4, (3, 1): 1 / 4}
    q = {(1, 2): 2 / 4, (2, 1): 1 / 4, (2, 9): 1 / 4}
    mean = {g: (p.get(g, 0) + q.get(g, 0)) / 2 for g in p | q}
    want = sum(v * math.log2(v / mean[g]) / 2 for x in (p, q) for g, v in x.items())
    assert quality.divergence(a, b, 2, 10) == pytest.approx(want)
    assert quality.divergence(a, a, 3, 10) == pytest.approx(0)
    far = np.array([[7, 8, 7, 8, 7]])
    assert quality.divergence(a, far, 2, 10) == pytest.approx(1)


def test_repetition_and_shuffling_are_far_from_the_text():
    g = np.random.default_rng(0)
    steps = g.choice([1, 2, 7], p=[0.6, 0.3, 0.1], size=(400, 40))
    text = np.cumsum(steps, axis=1) % 50  # what follows a token is one of three
    real, fresh = text[:200], text[200:]
    repeated = np.repeat(fresh[:1], 200, axis=0)
    shuffled = g.permuted(fresh, axis=1)
    scores = [quality.divergence(x, real, 2, 50) for x in (fresh, repeated, shuffled)]
    assert scores[0] < 0.1 < 0.3 < min(scores[1:])


def test_unigram_entropy_of_a_sample():
    ids = np.array([[1, 1, 1, 1], [1, 2, 3, 4]])
    assert quality.unigram_entropy(ids) == pytest.approx(math.log(4) / 2)


def test_code_parses_without_its_torn_first_and_last_line():
    assert quality.code_that_parses("rn x\n    a = 1\n    if a:\n        pass\n   foo(")
    assert not quality.code_that_parses("x\n  a = = 1\n y")
    assert not quality.code_that_parses("one line")


def test_gen_ranks_held_out_text_before_noise(run, tmp_path, capsys):
    state = load_checkpoint(str(run), "--ckpt")
    corpus = open_corpus(state["args"]["data"], state["tokenizer"], str(tmp_path))
    blocks = corpus.blocks("val", 16)
    noise = torch.randint(200, blocks.shape)
    for name, ids in (("real", blocks), ("noise", noise)):
        lines = [json.dumps({"ids": row}) + "\n" for row in ids.tolist()]
        (tmp_path / name).write_text("".join(lines))
    files = [str(tmp_path / name) for name in ("real", "noise")]
    flags = ["gen", *files, "--ckpt", str(run), "--cache", str(tmp_path)]
    quality.gen(evaluate.parser().parse_args(flags))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert float(rows[0][0]) == 0 and float(rows[1][0]) > 0.5


@pytest.mark.parametrize("line", ["{", '{"text": "x"}', '{"ids": [1]}', '{"ids": [1, 2, 999]}'])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    file = tmp_path / "s.jsonl"
    file.write_text('{"ids": [1, 2, 3]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"s\.jsonl:2"):
        quality.read_samples(str(file), 258)


def test_samples_of_different_lengths_are_not_compared(run, tmp_path):
    for n in (3, 4):
        (tmp_path / str(n)).write_text(json.dumps({"ids": [1] * n}) + "\n")
    flags = ["gen", str(tmp_path / "3"), str(tmp_path / "4"), "--ckpt", str(run)]
    with pytest.raises(ValueError, match="samples of 4 tokens beside those of 3"):
        quality.gen(evaluate.parser().parse_args([*flags, "--cache", str(run)]))


# Quality against speed


def test_tradeoff_tells_each_cell_and_draws_all_of_them(run, tmp_path, capsys):
    picture = tmp_path / "tradeoff.svg"
    flags = ["tradeoff", str(run), "--cache", str(run), "--num", "5", "--seeds", "2"]
    flags += ["--blocks", "4", "16", "--budgets", "0.5", "--thresholds", "0.9"]
    args = evaluate.parser().parse_args([*flags, "--picture", str(picture)])
    args.main(args)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[1], row[2]) for row in rows] == [
        ("4", "budget"), ("16", "budget"), ("4", "threshold"), ("16", "threshold"),
    ]  # fmt: skip
    assert [float(row[4]) for row in rows[:2]] == [8, 8], "passes: half of 16 tokens"
    assert 4 <= float(rows[2][4]) <= 16 and 1 <= float(rows[3][4]) <= 16
    assert all(0 <= float(row[6]) <= 1 for row in rows)
    assert picture.read_text().count("<use") >= 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing-here"], "nothing-here: no such file"),
        (["--thresholds", "1.5"], "1.5 is not above 0"),
        (["--budgets", "nan"], "nan is not above 0"),
        (["--blocks", "0"], "--blocks 0"),
        (["--num", "0"], "--num 0"),
    ],
)
def test_tradeoff_names_what_cannot_be(run, flags, message):
    place = [] if flags[0] == "nothing-here" else [str(run)]
    rest = ["--cache", str(run), "--num", "1", "--seeds", "1", "--budgets", "0.5"]
    place, flags = (place, flags) if place else (flags, [])
    args = evaluate.parser().parse_args(["tradeoff", *place, *rest, *flags])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        args.main(args)

"""Perplexity is what training reports, on any text, with its unit conversions and its error."""

import json
import math
import re

import numpy as np
import pytest
import torch

import data
import evaluate
import train
import training
from model import SIZES, DiT, DiTConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"item {i}: some words. " for i in range(2000)))
    flags = (
        "--sm --config nano --tokenizer bytes --steps 4 --batch-size 2 --eval-batches 99".split()
    )
    places = ["--data", str(folder / "text.txt"), "--cache", str(folder), "--out", str(folder)]
    train.main(train.parse([*flags, *places, "--dtype", "float32", "--sm-start", "1"]))
    return folder


def ppl(run, capsys, *flags):
    flags = ["ppl", "--ckpt", str(run), "--cache", str(run), "--dtype", "float32", *flags]
    args = evaluate.parser().parse_args(flags)
    args.main(args)
    last = capsys.readouterr().out.splitlines()[-1]
    return [float(n) for n in re.findall(r"[-+]?\d+\.\d+|nan", last.replace("+-", ""))]


def test_ppl_is_what_training_reported_for_both_passes(run, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [e for e in lines if "val_nelbo_2pass" in e][-1]
    for passes in ("1", "2"):
        nats, error, perplexity, _, bpb, _ = ppl(run, capsys, "--passes", passes)
        assert nats == pytest.approx(last[f"val_nelbo_{passes}pass"], abs=1e-4)
        assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
        assert bpb == pytest.approx(nats / math.log(2), abs=1e-3)  # a token is a byte here
        assert 0 < error < nats


def test_ppl_of_other_text_uses_all_of_it(run, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("completely different " * 20)
    assert len(ppl(run, capsys, "--data", str(tmp_path / "other.txt"), "--block-size", "16")) == 6


def test_bits_per_byte_counts_the_bytes_of_the_tokens_evaluated():
    blocks = torch.tensor([[0, 1, 2, 2]])
    sizes = torch.tensor([1, 3, 2])  # eight bytes in four tokens
    assert train.bits_per_byte(2 * math.log(2), blocks, sizes) == pytest.approx(1.0)


def test_validation_repeats_exactly_and_leaves_training_as_it_was():
    torch.manual_seed(0)
    model = DiT(DiTConfig(30, dropout=0.5, **SIZES["nano"])).train()
    blocks = torch.randint(29, (40, 32))
    state = torch.get_rng_state()
    a, b = (
        training.nelbo(model, train.in_batches(blocks), None, torch.device("cpu"), torch.float32)
        for _ in range(2)
    )
    assert a == b and model.training and torch.equal(state, torch.get_rng_state())


def test_untrained_network_scores_the_uniform_law():
    model = DiT(DiTConfig(30, **SIZES["nano"]))
    blocks = torch.randint(29, (320, 32))
    mean, error = training.nelbo(
        model, train.in_batches(blocks), None, torch.device("cpu"), torch.float32
    )
    assert abs(mean - math.log(29)) < 4 * error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt", "absent.pt"], "--ckpt absent"),
        (["--block-size", "33"], "--block-size 33"),
        (["--batches", "0"], "--batches 0"),
        (["--data", "absent.txt"], "--data absent"),
    ],
)
def test_bad_flag_is_named(run, capsys, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        ppl(run, capsys, *flags)


def test_text_shorter_than_a_block_is_named(run, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="a block takes 32"):
        ppl(run, capsys, "--data", str(tmp_path / "short.txt"))


def test_two_passes_need_a_soft_mask(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 100)
    flags = "--config nano --tokenizer bytes --steps 1 --batch-size 2 --eval-batches 1".split()
    places = [
        "--data",
        str(tmp_path / "text.txt"),
        "--cache",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    train.main(train.parse([*flags, *places]))
    with pytest.raises(ValueError, match="--passes 2: a binary checkpoint"):
        ppl(tmp_path, capsys, "--passes", "2")
    assert data.open_corpus(str(tmp_path / "text.txt"), "bytes", str(tmp_path)).meta["tokens"]


# Samples beside held-out text


def test_divergence_is_the_textbooks_and_knows_its_bounds():
    a, b = (np.array([[1, 2, 3, 1, 2]]), np.array([[1, 2, 1, 2, 9]]))
    p = {(1, 2): 2 / 4, (2, 3): 1 / 4, (3, 1): 1 / 4}
    q = {(1, 2): 2 / 4, (2, 1): 1 / 4, (2, 9): 1 / 4}
    mean = {g: (p.get(g, 0) + q.get(g, 0)) / 2 for g in p | q}
    want = sum(v * math.log2(v / mean[g]) / 2 for x in (p, q) for g, v in x.items())
    assert evaluate.divergence(a, b, 2, 10) == pytest.approx(want)
    assert evaluate.divergence(a, a, 3, 10) == pytest.approx(0)
    far = np.array([[7, 8, 7, 8, 7]])
    assert evaluate.divergence(a, far, 2, 10) == pytest.approx(1)


def test_repetition_and_shuffling_are_far_from_the_text():
    g = np.random.default_rng(0)
    steps = g.choice([1, 2, 7], p=[0.6, 0.3, 0.1], size=(400, 40))
    text = np.cumsum(steps, axis=1) % 50  # what follows a token is one of three
    real, fresh = text[:200], text[200:]
    repeated = np.repeat(fresh[:1], 200, axis=0)
    shuffled = g.permuted(fresh, axis=1)
    scores = [evaluate.divergence(x, real, 2, 50) for x in (fresh, repeated, shuffled)]
    assert scores[0] < 0.1 < 0.3 < min(scores[1:])


def test_unigram_entropy_of_a_sample():
    ids = np.array([[1, 1, 1, 1], [1, 2, 3, 4]])
    assert evaluate.unigram_entropy(ids) == pytest.approx(math.log(4) / 2)


def test_code_parses_without_its_torn_first_and_last_line():
    assert evaluate.code_that_parses("rn x\n    a = 1\n    if a:\n        pass\n   foo(")
    assert not evaluate.code_that_parses("x\n  a = = 1\n y")
    assert not evaluate.code_that_parses("one line")


def test_gen_ranks_held_out_text_before_noise(run, tmp_path, capsys):
    state = evaluate.load_checkpoint(str(run), "--ckpt")
    corpus = evaluate.open_corpus(state["args"]["data"], state["tokenizer"], str(tmp_path))
    blocks = corpus.blocks("val", 16)
    noise = torch.randint(200, blocks.shape)
    for name, ids in (("real", blocks), ("noise", noise)):
        lines = [json.dumps({"ids": row}) + "\n" for row in ids.tolist()]
        (tmp_path / name).write_text("".join(lines))
    files = [str(tmp_path / name) for name in ("real", "noise")]
    flags = ["gen", *files, "--ckpt", str(run), "--cache", str(tmp_path)]
    evaluate.gen(evaluate.parser().parse_args(flags))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert float(rows[0][0]) == 0 and float(rows[1][0]) > 0.5


@pytest.mark.parametrize("line", ["{", '{"text": "x"}', '{"ids": [1]}', '{"ids": [1, 2, 999]}'])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    file = tmp_path / "s.jsonl"
    file.write_text('{"ids": [1, 2, 3]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"s\.jsonl:2"):
        evaluate.read_samples(str(file), 258)


def test_samples_of_different_lengths_are_not_compared(run, tmp_path):
    for n in (3, 4):
        (tmp_path / str(n)).write_text(json.dumps({"ids": [1] * n}) + "\n")
    flags = ["gen", str(tmp_path / "3"), str(tmp_path / "4"), "--ckpt", str(run)]
    with pytest.raises(ValueError, match="samples of 4 tokens beside those of 3"):
        evaluate.gen(evaluate.parser().parse_args([*flags, "--cache", str(run)]))


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


# Benchmarks


@pytest.fixture
def problems(tmp_path):
    """Two problems in HumanEval's form, and right completions of both."""
    rows = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add{i}(a):\n    """Add {i}."""\n',
            "entry_point": f"add{i}",
            "canonical_solution": f"    return a + {i}\n",
            "test": f"def check(f):\n    assert f(3) == {3 + i}\n",
        }
        for i in (1, 2)
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, [(row["task_id"], row["canonical_solution"]) for row in rows]


def score(tmp_path, problems, completions, *flags):
    file = tmp_path / "completions.jsonl"
    lines = [json.dumps({"task_id": i, "completion": text}) + "\n" for i, text in completions]
    file.write_text("".join(lines))
    flags = ["humaneval", "--data", str(problems), "--completions", str(file), *flags]
    args = evaluate.parser().parse_args(flags)
    args.main(args)


def test_completions_are_run_and_their_verdicts_saved(tmp_path, problems, capsys):
    file, right = problems
    wrong = [(right[0][0], "    return a\n"), (right[1][0], "")]
    saved, scores = tmp_path / "verdicts.jsonl", tmp_path / "scores.json"
    flags = ["--allow-code-execution", "--k", "2", "--save", str(saved), "--json", str(scores)]
    score(tmp_path, file, right + wrong, *flags)
    assert "pass@1 0.5000, pass@2 1.0000 of 2 problems, 4" in capsys.readouterr().out
    assert json.loads(scores.read_text())["pass@2"] == 1
    verdicts = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [v["passed"] for v in verdicts] == [True, False, True, False]
    assert "AssertionError" in verdicts[1]["error"] and "return a" in verdicts[1]["program"]


@pytest.mark.parametrize(
    ("completions", "flags", "message"),
    [
        (slice(0, 2), [], "have them run, give --allow-code-execution"),
        (
            slice(0, 1),
            ["--allow-code-execution"],
            "1 of 2 problems have no completion.*HumanEval/2",
        ),
        (slice(0, 2), ["--k", "2"], "--k 2: 1 to the 1 completions"),
    ],
)
def test_what_cannot_be_scored_is_named(tmp_path, problems, completions, flags, message):
    file, right = problems
    with pytest.raises(ValueError, match=message):
        score(tmp_path, file, right[completions], *flags)


def test_a_part_of_the_problems_is_scored_when_asked(tmp_path, problems, capsys):
    file, right = problems
    score(tmp_path, file, right[:1], "--allow-code-execution", "--partial")
    assert "pass@1 1.0000 of 1 problems" in capsys.readouterr().out

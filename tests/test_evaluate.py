"""Perplexity is what training reports, on any text, with its unit conversions and its error."""

import json
import math
import re

import pytest
import torch

import data
import evaluate
import train
import training
from model import SIZES, DiT, DiTConfig


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

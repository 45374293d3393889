"""Perplexity is what training reports, on any text, with its unit conversions and its error."""

import itertools
import json
import math
import re
import shutil

import pytest
import torch
from conftest import randomise
from published import write_dream, write_tokenizer
from safetensors.torch import load_file, save_file

import evaluate
import sample
from chat import chat_ids
from data import decode, dream_tokenizer, encode
from model import Dream, DreamConfig

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
    flags = [
        "--allow-code-execution",
        "--pass-at",
        "2",
        "--save",
        str(saved),
        "--json",
        str(scores),
    ]
    score(tmp_path, file, right + wrong, *flags)
    assert "pass@1 0.5000, pass@2 1.0000 of 2 problems, 4" in capsys.readouterr().out
    assert json.loads(scores.read_text())[0]["pass@2"] == 1
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
        (
            slice(0, 2),
            ["--pass-at", "2", "--allow-code-execution"],
            "--pass-at 2: 1 to the 1 completions",
        ),
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


# Answers of a network


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """The folder of a random Dream network, whose tokens are learned from our own source."""
    folder = tmp_path_factory.mktemp("dream")
    sizes = dict(n_layers=2, n_heads=4, n_kv_heads=2, width=32, mlp_width=48, block_size=512)
    model = Dream(DreamConfig(vocab_size=640, mask_id=630, **sizes))
    randomise(model)
    write_dream(folder, model)
    write_tokenizer(folder)
    return folder


def answers(folder, file, *flags):
    """The scores of `evaluate.py humaneval` with these flags, and the lines of its files."""
    out, scores = folder / "answers", folder / "scores.json"
    flags = [*"--new-tokens 12 --batch-size 2 --device cpu --dtype float32".split(), *flags]
    places = ["--data", str(file), "--out", str(out), "--json", str(scores)]
    args = evaluate.parser().parse_args(["humaneval", *places, "--allow-code-execution", *flags])
    assert args.main(args) == 0
    lines = {f.name: f.read_text().splitlines() for f in sorted(out.iterdir())}
    return json.loads(scores.read_text()), lines


def heard(monkeypatch, reply=None, stop_at=None):
    """What the network is asked: (prompts, steps, seeds) a batch. `reply(task number)` answers in
    its place; the batch `stop_at` is interrupted."""
    asked, real = [], sample.Writer.respond

    def respond(self, prompts, new_tokens, nfe, how, seeds, **more):
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append((prompts, nfe, seeds))
        if reply is not None:
            return [reply(self.tokenizer, prompt) for prompt in prompts], None
        return real(self, prompts, new_tokens, nfe, how, seeds=seeds, **more)

    monkeypatch.setattr(sample.Writer, "respond", respond)
    return asked


def test_a_stopped_benchmark_goes_on_to_the_same_answers(
    tmp_path, problems, dream, monkeypatch, capsys
):
    file, _ = problems
    flags = ["--model", str(dream), "--omegas", "0.9,2,-3", "--both", "--budget", "1/4,1/2"]
    flags += ["--temperature", "1", "--samples", "3", "--pass-at", "2", "--seeds", "0,7"]
    (tmp_path / "whole").mkdir()
    scores, whole = answers(tmp_path / "whole", file, *flags)
    assert len(whole) == len(scores) == 2 * 2 * 2 and {len(v) for v in whole.values()} == {6}
    texts = [[json.loads(line)["completion"] for line in lines] for lines in whole.values()]
    assert len({tuple(t) for t in texts}) == 8, "feedback, budget and seed all matter"
    table = capsys.readouterr().out.splitlines()[-7:]
    assert [line.split()[-1:] for line in table[3::3]] == [["+0.0"], ["+0.0"]]
    with monkeypatch.context() as m:
        heard(m, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            answers(tmp_path, file, *flags)
    assert "has 2 of 6; the same command goes on" in capsys.readouterr().err
    asked = heard(monkeypatch)
    assert answers(tmp_path, file, *flags) == (scores, whole)
    assert len(asked) == 8 * 3 - 4


def test_the_network_is_asked_as_the_task_says_at_every_budget(
    tmp_path, problems, dream, monkeypatch
):
    file, _ = problems
    asked = heard(monkeypatch)
    answers(tmp_path, file, "--model", str(dream), "--budget", "1/4,1/1")
    assert [nfe for _, nfe, _ in asked] == [3, 12]
    tokenizer = dream_tokenizer(dream)
    row = json.loads(file.read_text().splitlines()[0])
    fence = "`" * 3
    request = "Write a solution to the following problem and make sure that it passes the tests:"
    said = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"{request}\n{fence}{row['prompt']}"},
    ]
    begin = f"Here is the completed function:\n{fence}python\n{row['prompt']}\n"
    assert chat_ids(tokenizer, said, begin=begin) in asked[0][0]
    assert sorted(asked[0][0], key=len) == asked[0][0] and len(asked[0][0]) == 2


def test_right_answers_score_100_and_the_table_has_each_budget(
    tmp_path, problems, dream, monkeypatch, capsys
):
    file, _ = problems
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def solve(tokenizer, prompt):
        text = decode(tokenizer, prompt)
        (row,) = (r for r in rows if r["entry_point"] in text)
        ids = encode(tokenizer, row["canonical_solution"] + fence + "\n\nThis adds.")
        return [*ids, tokenizer.eot_token, *encode(tokenizer, "def check(f): return 1")]

    fence = "`" * 3
    heard(monkeypatch, reply=solve)
    flags = ["--model", str(dream), "--budget", "1/4,1/2,1/1", "--omegas", "0.5,1,-2"]
    scores, lines = answers(tmp_path, file, *flags, "--both")
    assert [s["score"] for s in scores] == [1.0] * 6 and len(lines) == 6
    assert json.loads(lines.popitem()[1][0])["completion"].endswith("This adds.")
    shown = capsys.readouterr().out
    assert re.findall(r"^(1/\d|) +(\w+) +([+\d.]+)$", shown, re.MULTILINE) == [
        (budget if feedback == "Binary" else "", feedback, score)
        for budget in ("1/4", "1/2", "1/1")
        for feedback, score in (("Binary", "100.0"), ("SM", "100.0"), ("Gain", "+0.0"))
    ]
    file = tmp_path / "scores.json"
    args = evaluate.parser().parse_args(["table", str(file), "--markdown"])
    args.main(args)
    table = capsys.readouterr().out
    assert table.count("| 100.0 |") == 6 and table.startswith(
        "| NFE budget | Feedback | HumanEval |"
    )


def test_several_networks_are_the_seeds_of_one_row(tmp_path, problems, dream, monkeypatch, capsys):
    file, right = problems
    other = tmp_path / "other"
    shutil.copytree(dream, other)
    solved = encode(dream_tokenizer(dream), dict(right)["HumanEval/1"])
    replies = itertools.cycle([solved, [], [], []])  # a network solves one problem, the other none
    heard(monkeypatch, reply=lambda tokenizer, prompt: next(replies))
    answers(tmp_path, file, "--model", str(dream), str(other), "--nfe", "5", "--batch-size", "1")
    assert re.search(r"^5/12 +Binary +25.0 \(\+- 35.4\)$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pass-at", "2"], "--pass-at 2: 1 to the --samples 1"),
        (["--budget", "1/4,0.25"], "--budget 1/4,0.25: 0.25 is the 3 steps of another"),
        (["--budget", "1/4,2"], "--budget 2: a share"),
        (["--budget", "1/4", "--nfe", "3"], "--budget 1/4: a share .* without --nfe"),
        (["--threshold", "0.9", "--budget", "1/4"], "drop --nfe and --budget"),
        (["--new-tokens", "500"], r"an answer of 500: the network takes 512; --new-tokens"),
        (["--new-tokens", "0"], "--new-tokens 0: at least 1"),
        (["--samples", "0"], "--samples 0: at least 1"),
        (["--adapter", "absent"], "--adapter absent"),
        (["--model", "absent", "absent"], "--model: one of them is given twice"),
        (["--seeds", "3,3"], "--seeds: one of them is given twice"),
    ],
)
def test_what_cannot_be_answered_is_named_before_any_answer(
    tmp_path, problems, dream, monkeypatch, flags, message
):
    asked = heard(monkeypatch)
    with pytest.raises((ValueError, OSError), match=message):
        answers(tmp_path, problems[0], "--model", str(dream), *flags)
    assert not asked


def test_programs_are_not_generated_when_they_may_not_run(tmp_path, problems, dream, monkeypatch):
    asked = heard(monkeypatch)
    places = ["--data", str(problems[0]), "--out", str(tmp_path / "a"), "--model", str(dream)]
    args = evaluate.parser().parse_args(["humaneval", *places, "--new-tokens", "8"])
    with pytest.raises(ValueError, match="give --allow-code-execution; --generate-only leaves"):
        args.main(args)
    assert not asked
    args = evaluate.parser().parse_args(
        ["humaneval", *places, "--new-tokens", "8", "--budget", "1/4", "--generate-only"]
    )
    args.main(args)
    (file,) = (tmp_path / "a").iterdir()
    score_args = ["humaneval", "--data", str(problems[0]), "--completions", str(file)]
    args = evaluate.parser().parse_args([*score_args, "--allow-code-execution"])
    args.main(args)


def test_answers_of_other_settings_are_refused_and_kept(tmp_path, problems, dream):
    flags = ["--model", str(dream), "--budget", "1/4"]
    _, before = answers(tmp_path, problems[0], *flags)
    with pytest.raises(ValueError, match="line 1 is not sample 0 of this run"):
        answers(tmp_path, problems[0], *flags, "--top-p", "0.5")
    assert answers(tmp_path, problems[0], *flags)[1] == before


def test_files_that_hold_no_scores_make_no_table(tmp_path):
    for i, text in enumerate(["", "[", "{}", '[{"task": "gsm8k"}]', "[1]"]):
        file = tmp_path / f"{i}.json"
        file.write_text(text)
        args = evaluate.parser().parse_args(["table", str(file)])
        with pytest.raises(ValueError, match=f"{i}.json: not scores"):
            args.main(args)


def test_only_the_answers_asked_for_are_scored_and_more_may_be_added(tmp_path, problems, dream):
    flags = ["--model", str(dream), "--budget", "1/4", "--temperature", "1"]
    ((three,), lines) = answers(tmp_path, problems[0], *flags, "--samples", "3")
    (file,) = lines
    ((one,), kept) = answers(tmp_path, problems[0], *flags)
    assert (three["completions"], one["completions"]) == (6, 2) and kept == lines
    ((five,), more) = answers(tmp_path, problems[0], *flags, "--samples", "5")
    assert five["completions"] == 10 and more[file][:6] == lines[file]


def test_an_answer_does_not_depend_on_which_other_problems_are_asked(tmp_path, problems, dream):
    flags = ["--model", str(dream), "--nfe", "12", "--temperature", "1"]
    found = {}
    for limit in ("1", "2"):
        (tmp_path / limit).mkdir()
        _, lines = answers(tmp_path / limit, problems[0], *flags, "--limit", limit)
        entries = [json.loads(line) for line in next(iter(lines.values()))]
        found[limit] = {e["task_id"]: e["completion"] for e in entries}
    assert found["2"] == found["2"] | found["1"] and len(found["2"]) == 2


def test_networks_that_are_not_numbers_are_told(tmp_path, problems, dream):
    broken = tmp_path / "broken"
    shutil.copytree(dream, broken)
    file = next(broken.glob("*.safetensors"))
    weights = {name: torch.full_like(w, math.nan) for name, w in load_file(file).items()}
    save_file(weights, file)
    with pytest.raises(ValueError, match="predictions are not numbers"):
        answers(tmp_path, problems[0], "--model", str(broken), "--budget", "1/4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "{data}"], "--json .*the same file as another"),
        (["--save", "{data}"], "--save .*the same file as another"),
        (["--json", "x.json", "--save", "./x.json"], "--save .*the same file as another"),
        (["--json", "{folder}"], "--json .*a folder; name a file"),
        (["--model", "{dream}", "{dream}/"], "--model: one of them is given twice"),
        (["--model", "{dream}", "/nowhere"], "--model /nowhere: no such"),
        (["--timeout", "-1"], "--timeout -1"),
        (["--both", "--no-sm"], "--both: without --no-sm"),
        (["--sm-switch", "7"], "--sm-switch 7"),
        (["--block-length", "0"], "--block-length 0"),
    ],
)
def test_nothing_that_is_needed_is_overwritten_or_counted_twice(
    tmp_path, problems, dream, monkeypatch, flags, message
):
    asked, before = heard(monkeypatch), problems[0].read_bytes()
    monkeypatch.chdir(tmp_path)
    names = {"data": problems[0], "folder": tmp_path, "dream": dream}
    with pytest.raises((ValueError, OSError), match=message):
        answers(tmp_path, problems[0], "--model", str(dream), *(f.format(**names) for f in flags))
    assert not asked and problems[0].read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"score": "x"}, {"score": None}, {"score": 7}, {"score": math.nan}, {"score": True},
        {"budget": None}, {"budget": []}, {"seed": []}, {"task": {}}, {"feedback": 3},
    ],
)  # fmt: skip
def test_scores_that_cannot_be_are_one_line(tmp_path, change):
    score = dict(task="gsm8k", budget="1/4", feedback="sm", seed="a 0", score=0.5, problems=8)
    file = tmp_path / "scores.json"
    for scores in ([score | change], [score, score | {"seed": "b 0", "problems": 3}]):
        file.write_text(json.dumps(scores))
        args = evaluate.parser().parse_args(["table", str(file)])
        with pytest.raises(ValueError):
            args.main(args)
    file.write_text(json.dumps([score, score | {"seed": "b", "budget": "1/0"}]))
    args = evaluate.parser().parse_args(["table", str(file)])
    args.main(args)
    with pytest.raises(ValueError, match="the same file"):
        args = evaluate.parser().parse_args(["table", str(file), "--json", str(file)])
        args.main(args)

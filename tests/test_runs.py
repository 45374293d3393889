"""Runs are set side by side by their seeds, at equal steps and at equal cost."""

import json

import numpy as np
import pytest

import evaluate
import runs


def metrics_of(folder, one, two=None, speed=100.0, omega_s=None):
    """A run's folder, validated at steps 0, 100, 200, ...: in one pass, and maybe in two."""
    lines = [{"step": 100 * i, "val_nelbo_1pass": v} for i, v in enumerate(one)]
    for line, v in zip(lines, two or []):
        line["val_nelbo_2pass"] = v
    lines += [{"step": s, "tokens_per_second": speed} for s in (10, 20, 30)]
    lines += [{"step": 30, "omega_s": omega_s}] * (omega_s is not None)
    return write_lines(folder, *lines)


def write_lines(folder, *lines):
    folder.mkdir()
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def tables_of(tmp_path, *flags):
    file = tmp_path / "runs.json"
    args = evaluate.parser().parse_args(["runs", *map(str, flags), "--json", str(file)])
    args.main(args)
    return json.loads(file.read_text())


@pytest.fixture
def seeds(tmp_path):
    """Binary and soft-masked runs of two seeds, whose differences differ from those of means."""
    return [
        metrics_of(tmp_path / "binary-1", [4.0, 3.0, 2.0], speed=125.0),
        metrics_of(tmp_path / "binary-2", [4.0, 3.5, 2.5], speed=125.0),
        metrics_of(tmp_path / "sm-2", [4.0, 3.5, 2.6], [4.0, 3.0, 2.25], omega_s=0.5),
        metrics_of(tmp_path / "sm-1", [4.0, 3.0, 2.1], [4.0, 2.7, 1.6], omega_s=0.3),
    ]


def test_runs_are_means_over_seeds_and_gains_are_of_pairs(seeds, tmp_path):
    found = tables_of(tmp_path, *seeds, "--at", 100, 200)
    plain, one, two = found["rows"]
    assert [(r["run"], r["passes"]) for r in found["rows"]] == [("binary", 1), ("sm", 1), ("sm", 2)]
    assert np.allclose([m for m, _ in plain["nats"]], [3.25, 2.25])
    assert np.allclose([d for _, d in plain["nats"]], np.std([2.0, 2.5], ddof=1))
    gains = np.array([[1 - 1.6 / 2.0], [1 - 2.25 / 2.5]])  # 20 and 10 %
    assert np.allclose(two["below"][1], [15, 100 * gains.std(ddof=1)])
    assert "below" not in plain and np.allclose(one["below"][0], [0, 0])


def test_equal_cost_takes_the_dearer_run_at_fewer_steps(seeds, tmp_path):
    binary, sm = tables_of(tmp_path, *seeds, "--cost", 1.25)["ends"]
    assert "cost" not in binary
    assert (sm["equal_first_steps"], sm["equal_steps"]) == (200, 160), "the binary runs end there"
    at_160 = np.array([2.7 + 0.6 * (1.6 - 2.7), 3.0 + 0.6 * (2.25 - 3.0)])
    assert np.allclose(sm["equal_nats"], [at_160.mean(), at_160.std(ddof=1)])
    gains = 100 * (1 - at_160 / [2.0, 2.5])
    assert np.allclose(sm["equal_below"], [gains.mean(), gains.std(ddof=1)])
    assert np.allclose(sm["omega_s"], [0.4, np.std([0.3, 0.5], ddof=1)])
    cheap = tables_of(tmp_path, *seeds, "--cost", 0.5)["ends"][1]
    assert (cheap["equal_first_steps"], cheap["equal_steps"]) == (100, 200), "these end first"
    assert np.allclose(cheap["equal_below"][0], 100 * (1 - np.array([1.6 / 3, 2.25 / 3.5])).mean())


@pytest.mark.parametrize("cost", np.linspace(1.01, 1.6, 60).tolist())
def test_a_cost_that_rounds_badly_still_has_an_end(cost):
    long, short = (runs.Curve(1, ("",), np.array([0, n]), np.ones((1, 2))) for n in (9999, 1000))
    assert runs.at_equal_cost(short, long, cost)["equal_nats"] == (1.0, None)


def test_seeds_that_both_have_are_paired_and_others_not(seeds, tmp_path, capsys):
    _, _, two = tables_of(tmp_path, *seeds[:3])["rows"]
    assert two["below"][-1] == [pytest.approx(10), None], "2.25 against seed 2's 2.5"
    _, _, two = tables_of(tmp_path, seeds[0], seeds[2])["rows"]
    assert two["below"][-1] == [pytest.approx(-12.5), None], "2.25 against seed 1's 2.0"
    table = capsys.readouterr().out
    assert "2.2500 +- 0.3536" in table and "nan" not in table


def test_runs_of_one_name_in_two_folders_are_no_seeds_of_one(seeds, tmp_path):
    (tmp_path / "other").mkdir()
    more = metrics_of(tmp_path / "other" / "sm-1", [3.0, 2.0, 1.0])
    found = tables_of(tmp_path, *seeds, f"{more}/metrics.jsonl")
    names = [row["run"] for row in found["ends"]]
    assert names == ["binary", f"{tmp_path.name}/sm", "other/sm"]


@pytest.mark.parametrize(
    ("place", "name", "seed"),
    [("a/sm-12", "sm", "-12"), ("p0.5", "p0.5", ""), ("sm-16-3.jsonl", "sm-16", "-3"),
     ("s1e-6", "s1e-6", ""), ("sm-2/", "sm", "-2"), ("sm-2/metrics.jsonl", "sm", "-2")],
)  # fmt: skip
def test_the_last_number_of_a_name_is_its_seed(place, name, seed):
    assert runs.by_seed([place]) == {name: {seed: place}}


@pytest.mark.parametrize("lines", ["", '{"step": 10, "loss": 1.0}\n'])
def test_a_run_without_validation_is_named(seeds, tmp_path, lines):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="none.*: no "):
        tables_of(tmp_path, *seeds, tmp_path / "none")


def test_what_cannot_be_compared_is_named(seeds, tmp_path):
    with pytest.raises(ValueError, match="binary-1: named twice"):
        tables_of(tmp_path, seeds[0], seeds[0])
    with pytest.raises(ValueError, match="--cost 0: from 0.01"):
        tables_of(tmp_path, *seeds, "--cost", 0)
    with pytest.raises(ValueError, match=r"--json.*binary-1/metrics.jsonl"):
        runs.compare(evaluate.parser().parse_args(
            ["runs", *seeds, "--json", f"{seeds[0]}/metrics.jsonl"]))  # fmt: skip
    apart = metrics_of(tmp_path / "apart", [3.0])
    with pytest.raises(ValueError, match="no step at which all runs were validated"):
        tables_of(tmp_path, write_lines(tmp_path / "a", {"step": 7, "val_nelbo_1pass": 1.0}), apart)


@pytest.mark.parametrize(
    "line",
    ['{"step": 1e999}', '{"step": NaN}', '{"step": 1.7}', '{"step": -3}',
     '{"step": 1' + "0" * 30 + "}",
     "[1]", "\x00", '{"step": 3', "{}"],
)  # fmt: skip
def test_lines_that_are_no_metrics_are_counted(tmp_path, capsys, line):
    good = {"step": 5, "val_nelbo_1pass": 1.5, "loss": float("inf"), "tokens_per_second": 0}
    assert runs.read_metrics(write_lines(tmp_path / "a", good, line)) == [
        {"step": 5, "val_nelbo_1pass": 1.5, "tokens_per_second": 0}
    ]
    assert "1 of 2 lines left out" in capsys.readouterr().err


def test_steps_without_validation_are_left_empty(seeds, tmp_path, capsys):
    found = tables_of(tmp_path, *seeds, "--at", 100, 150, 900)
    assert found["rows"][0]["nats"][1:] == [[None, None]] * 2
    assert "nan" not in capsys.readouterr().out
    old = write_lines(tmp_path / "old", {"step": 100, "val_nelbo_1pass": 3.0})
    assert tables_of(tmp_path, seeds[0], old)["ends"][1]["tokens_per_second"] == [None, None]

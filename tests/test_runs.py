"""Runs are set side by side by their seeds, at equal steps and at equal cost."""

import json

import numpy as np
import pytest

import evaluate
import runs


def metrics_of(folder, one, two=None, speed=100.0, omega_s=None):
    """A run's folder, validated at steps 0, 100, 200, ...: in one pass, and maybe in two."""
    folder.mkdir()
    lines = [{"step": 100 * i, "val_nelbo_1pass": v} for i, v in enumerate(one)]
    for line, v in zip(lines, two or []):
        line["val_nelbo_2pass"] = v
    lines += [{"step": s, "tokens_per_second": speed} for s in (10, 20, 30)]
    lines += [{"step": 30, "omega_s": omega_s}] * (omega_s is not None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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
    found = tables_of(tmp_path, *seeds, "--at", 100, 150, 200)
    plain, one, two = found["rows"]
    assert [(r["run"], r["passes"]) for r in found["rows"]] == [("binary", 1), ("sm", 1), ("sm", 2)]
    assert np.allclose([m for m, _ in plain["nats"]], [3.25, 2.75, 2.25])
    assert np.allclose([d for _, d in plain["nats"]], np.std([2.0, 2.5], ddof=1)), "150: halfway"
    gains = np.array([[1 - 1.6 / 2.0], [1 - 2.25 / 2.5]])  # 20 and 10 %
    assert np.allclose(two["gain"][2], [15, 100 * gains.std(ddof=1)])
    assert "gain" not in plain and np.allclose(one["gain"][0], [0, 0])


def test_equal_cost_takes_the_dearer_run_at_fewer_steps(seeds, tmp_path):
    binary, sm = tables_of(tmp_path, *seeds)["ends"]
    assert "cost" not in binary and sm["cost"] == 1.25, "by the speeds, 125 and 100"
    assert sm["equal"] == 200, "the binary runs end there; soft-masked ones stand at 160 then"
    at_160 = np.array([2.7 + 0.6 * (1.6 - 2.7), 3.0 + 0.6 * (2.25 - 3.0)])
    assert np.allclose(sm["equal_nats"], [at_160.mean(), at_160.std(ddof=1)])
    gains = 100 * (1 - at_160 / [2.0, 2.5])
    assert np.allclose(sm["equal_gain"], [gains.mean(), gains.std(ddof=1)])
    assert np.allclose(sm["omega_s"], [0.4, np.std([0.3, 0.5], ddof=1)])
    cheap = tables_of(tmp_path, *seeds, "--cost", 0.5)["ends"][1]
    assert cheap["equal"] == 100, "and where the other ends first, as far as that goes"
    assert np.allclose(cheap["equal_gain"][0], 100 * (1 - np.array([1.6 / 3.0, 2.25 / 3.5])).mean())


def test_other_seeds_are_compared_by_their_means(seeds, tmp_path, capsys):
    (_, two), (_, sm) = (
        found["rows"][1:] if key == "rows" else found["ends"]
        for found in [tables_of(tmp_path, *seeds[:3])]
        for key in ("rows", "ends")
    )
    assert two["gain"][-1] == [pytest.approx(0), None], "2.25 both; one run has no deviation"
    assert sm["nats"] == [2.25, None]
    table = capsys.readouterr().out
    assert "2.2500 +- 0.3536" in table and "nan" not in table


@pytest.mark.parametrize("lines", ["", '{"step": 10, "loss": 1.0}\n'])
def test_a_run_without_validation_is_named(seeds, tmp_path, lines):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="none.*: no "):
        tables_of(tmp_path, *seeds, tmp_path / "none")


def test_what_cannot_be_compared_is_named(seeds, tmp_path):
    with pytest.raises(ValueError, match="binary-1: another run of that name"):
        tables_of(tmp_path, seeds[0], seeds[0])
    with pytest.raises(ValueError, match="--cost 0.0: above 0"):
        tables_of(tmp_path, *seeds, "--cost", 0)


def test_steps_without_validation_are_left_empty(seeds, tmp_path, capsys):
    found = tables_of(tmp_path, *seeds, "--at", 100, 900)
    assert found["rows"][0]["nats"][1] == [None, None]
    assert "nan" not in capsys.readouterr().out
    (tmp_path / "old").mkdir()  # of a run that logged no speed
    (tmp_path / "old" / "metrics.jsonl").write_text('{"step": 100, "val_nelbo_1pass": 3.0}\n')
    ends = tables_of(tmp_path, seeds[0], tmp_path / "old")["ends"]
    assert ends[1]["cost"] is None and "equal" not in ends[1]


@pytest.mark.parametrize(
    ("place", "name", "seed"),
    [("a/sm-12", "sm", "-12"), ("p0.5", "p0.5", ""), ("sm-16-3.jsonl", "sm-16", "-3")],
)
def test_the_last_number_of_a_name_is_its_seed(place, name, seed):
    assert runs.name_and_seed(place) == (name, seed)

"""Training runs side by side: their metrics over seeds, at equal steps and at equal cost.

Runs whose folders differ in a last "-number" are the seeds of one name.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime import atomic_write, layout, writable_files

OMEGAS = ("omega_s", "omega_a", "omega_b", "tau")


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that can be read; of others stderr has one line.

    FileNotFoundError, or ValueError where there is none.
    """
    file = Path(folder)
    file = file / "metrics.jsonl" if file.is_dir() else file
    found, bad = [], 0
    for line in file.read_text(errors="replace").splitlines():
        try:
            numbers = {k: v for k, v in json.loads(line).items() if type(v) in (int, float)}
            found.append(numbers | {"step": numbers["step"]})
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            bad += 1
    if not found:
        raise ValueError(f"{file}: no line of a run's metrics in it")
    if bad:
        print(f"{file}: {bad} of {bad + len(found)} lines left out: cut short", file=sys.stderr)
    return found


def name_and_seed(place: str) -> tuple[str, str]:
    """The name of a folder or of a .jsonl file, and the "-number" at its end ("" if none)."""
    name = Path(place).resolve().name.removesuffix(".jsonl")
    return re.fullmatch(r"(.*?)(-\d+)?", name, re.S).groups("")


def by_seed(folders: list[str]) -> dict[str, dict[str, list[dict]]]:
    """The metrics of runs by their names, and of one name by the "-number" in which their folders
    differ ("" where there is none). ValueError where a run is named twice."""
    groups: dict[str, dict] = {}
    for folder in folders:
        name, seed = name_and_seed(folder)
        if seed in groups.setdefault(name, {}):
            raise ValueError(f"{folder}: another run of that name is there already")
        groups[name][seed] = read_metrics(folder)
    return groups


def over_seeds(runs: Iterable[list[dict]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n,) at which all runs have a number, and what it is there (runs, n)."""
    series = [{e["step"]: e[key] for e in run if key in e} for run in runs]
    steps = np.array(sorted(set.intersection(*map(set, series))), dtype=int)
    return steps, np.array([[s[step] for step in steps] for s in series])


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis; of a single one no spread, nan."""
    alone = len(values) == 1
    return values.mean(0), np.nan * values[0] if alone else values.std(0, ddof=1)


class Curve(NamedTuple):
    """A validation of the runs of one name, which differ in their seeds."""

    seeds: tuple[str, ...]
    steps: np.ndarray  # (n,), at which all of them were validated
    nats: np.ndarray  # (seeds, n)

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Nats at `steps` (m,), (seeds, m): on straight lines between the validations, and nan
        where there are none."""
        nan = dict(left=math.nan, right=math.nan)
        return np.array([np.interp(steps, self.steps, own, **nan) for own in self.nats])

    def gain(self, steps: np.ndarray, other: "Curve", other_steps: np.ndarray) -> np.ndarray:
        """Per cent of the NELBO of `other`, at its own steps, by which this one is below it: of
        each seed (seeds, m), or of the means (1, m) where the seeds are not the same."""
        own, its = self.at(steps), other.at(other_steps)
        if sorted(self.seeds) == sorted(other.seeds):
            its = its[[other.seeds.index(seed) for seed in self.seeds]]
        else:
            own, its = own.mean(0, keepdims=True), its.mean(0, keepdims=True)
        return 100 * (1 - own / its)


def curves_of(seeds: dict[str, list[dict]]) -> dict[int, Curve]:
    """The validations in one pass and, where soft-masked, in two, that all runs of a name have."""
    found = {}
    for passes in (1, 2):
        steps, nats = over_seeds(seeds.values(), f"val_nelbo_{passes}pass")
        if len(steps):
            found[passes] = Curve(tuple(seeds), steps, nats)
    return found


def score(name: str, curves: dict[int, Curve]) -> Curve:
    """The validation that counts: in two passes, where there are two. ValueError where there is
    none."""
    if not curves:
        raise ValueError(f"{name}: no validation in its metrics, or none that all its seeds have")
    return curves[max(curves)]


# The tables


def compare(args: argparse.Namespace) -> None:
    """Tables of the metrics of runs: NELBO against steps, and what was reached for equal cost."""
    if args.cost is not None and not 0 < args.cost < math.inf:
        raise ValueError(f"--cost {args.cost}: above 0")
    writable_files({"--json": args.json}, args.runs)
    groups = by_seed(args.runs)
    curves = {name: curves_of(seeds) for name, seeds in groups.items()}
    scores = {name: score(name, found) for name, found in curves.items()}
    first = next(iter(groups))
    at = np.array(args.at or some_steps(list(scores.values())), dtype=float)
    rows, ends = [], []
    for name, found in curves.items():
        for passes, curve in found.items():
            row = {"run": name, "passes": passes, "seeds": len(curve.seeds)}
            row["nats"] = over(curve.at(at))
            if name != first:
                row["gain"] = over(curve.gain(at, scores[first], at))
            rows.append(row)
        ends.append({"run": name} | end_of(groups[name], scores[name]))
        if name != first:
            cost = args.cost or speed_of(groups[first]) / speed_of(groups[name])
            ends[-1] |= at_equal_cost(scores[name], scores[first], cost)
    print("validation NELBO, nats a token, after so many steps: mean and deviation over seeds")
    print(layout(step_table(rows, at), args.markdown, 1))
    print("at the end; and for equal cost")
    print(layout(end_table(ends), args.markdown, 1), end="")
    if args.json:
        with atomic_write(args.json, "w") as f:
            json.dump({"steps": at.tolist(), "rows": rows, "ends": ends}, f)


def some_steps(curves: list[Curve]) -> np.ndarray:
    """About seven of the steps at which all were validated, the last among them."""
    shared = reduce(np.intersect1d, [curve.steps[curve.steps > 0] for curve in curves])
    return shared[:: -max(1, len(shared) // 7)][::-1]


def over(values: np.ndarray) -> list[tuple[float | None, float | None]]:
    """Mean and deviation over seeds of values (seeds, m), as JSON has them."""
    mean, deviation = mean_and_spread(values)
    return [(finite(m), finite(d)) for m, d in zip(mean.tolist(), deviation.tolist())]


def speed_of(seeds: dict[str, list[dict]]) -> float:
    """Tokens a second, the median of all lines; nan where there are none."""
    key = "tokens_per_second"
    return float(np.median([e[key] for run in seeds.values() for e in run if key in e] or [np.nan]))


def end_of(seeds: dict[str, list[dict]], curve: Curve) -> dict:
    """What the runs of a name reached: (mean, deviation) over seeds, and their median speed."""
    end = curve.nats[:, -1:]
    found = {
        "steps": int(curve.steps[-1]),
        "nats": over(end)[0],
        "perplexity": over(np.exp(end))[0],
    }
    found["tokens_per_second"] = finite(speed_of(seeds))
    for omega in OMEGAS:
        values = over_seeds(seeds.values(), omega)[1]
        if values.size:
            found[omega] = over(values[:, -1:])[0]
    return found


def at_equal_cost(curve: Curve, first: Curve, cost: float) -> dict:
    """Both NELBOs, and the gain, where both cost as much as the cheaper ones at their end, in steps
    of the first's; `cost` is that of one of this curve's steps, of as many tokens.

    By default it is the ratio of the speeds, which holds for runs made side by side.
    """
    found = {"cost": finite(cost)}
    if math.isfinite(cost):
        steps = np.minimum(first.steps[-1:], cost * curve.steps[-1:])
        found |= {"equal": float(steps[0]), "equal_first": over(first.at(steps))[0]}
        found["equal_nats"] = over(curve.at(steps / cost))[0]
        found["equal_gain"] = over(curve.gain(steps / cost, first, steps))[0]
    return found


def step_table(rows: list[dict], at: np.ndarray) -> list[list[str]]:
    lines = [["run", "passes", "seeds", *(f"{s:g}" for s in at)]]
    for row in rows:
        lines.append([row["run"], str(row["passes"]), str(row["seeds"])])
        lines[-1] += [cell(value, 4) for value in row["nats"]]
        if "gain" in row:
            lines.append(["  below the first, %", "", ""])
            lines[-1] += [cell(value, 2) for value in row["gain"]]
    return lines


def end_table(ends: list[dict]) -> list[list[str]]:
    """A column a name."""
    facts = [("steps", "steps", 0), ("nats", "NELBO, nats a token", 4)]
    facts += [("perplexity", "perplexity", 2), ("tokens_per_second", "tokens a second", 0)]
    facts += [(name, name, 2) for name in OMEGAS]
    facts += [("cost", "cost of a step, the first's 1", 2), ("equal", "for so many of these", 0)]
    facts += [("equal_first", "the first's NELBO", 4), ("equal_nats", "NELBO", 4)]
    facts += [("equal_gain", "below the first, %", 2)]
    lines = [[title, *(cell(end.get(key), d) for end in ends)] for key, title, d in facts]
    return [["", *(end["run"] for end in ends)], *(line for line in lines if any(line[1:]))]


def cell(value, digits: int) -> str:
    """A number, or a mean with its deviation over seeds where there are several."""
    mean, deviation = value if isinstance(value, tuple) else (value, None)
    if mean is None:
        return ""
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" +- {deviation:.{digits}f}")


def finite(value: float) -> float | None:
    """A number that JSON has, else None."""
    return value if math.isfinite(value) else None


# The command line


def add_commands(commands) -> None:
    """`runs` among the commands of evaluate.py, and its flags."""
    c = commands.add_parser("runs", help="validations of training runs over seeds")
    c.set_defaults(main=compare)
    c.add_argument(
        "runs", nargs="+", help="folders; those that differ in a last -number are seeds of one name"
    )
    c.add_argument("--at", type=float, nargs="+", help="steps; default: some that all runs have")
    c.add_argument(
        "--cost", type=float, help="of a step in the first run's; default: by the runs' speeds"
    )
    c.add_argument("--json", help="write the numbers to this file")
    c.add_argument("--markdown", action="store_true", help="print the tables as Markdown")

"""Training runs side by side: their metrics over seeds, at equal steps and at equal cost.

Runs in one folder whose names differ in a last "-number" are the seeds of one name.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime import atomic_write, finite, layout, writable_files

OMEGAS = ("omega_s", "omega_a", "omega_b", "tau")


# What runs leave


def metrics_file(place: str | Path) -> Path:
    """The metrics of a run's folder; or the file itself."""
    return Path(place) / "metrics.jsonl" if Path(place).is_dir() else Path(place)


def read_metrics(place: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that can be read, their finite numbers; of others stderr
    has one line. FileNotFoundError, or ValueError where there is none."""
    file, found, bad = metrics_file(place), [], 0
    for line in file.read_text(errors="replace").splitlines():
        try:
            numbers = {k: v for k, v in json.loads(line).items() if type(v) in (int, float)}
            numbers = {k: v for k, v in numbers.items() if abs(v) < 2**53}  # not nan, either
            if type(numbers["step"]) is not int or numbers["step"] < 0:
                raise ValueError("no step")
            found.append(numbers)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            bad += 1
    if not found:
        raise ValueError(f"{file}: no line of a run's metrics in it; name a folder of train.py's")
    if bad:
        what = "left out: cut short, or no metrics"
        print(f"{file}: {bad} of {bad + len(found)} lines {what}", file=sys.stderr)
    return found


def by_seed(places: Iterable[str]) -> dict[str, dict[str, str]]:
    """Folders of runs, or files of samples, by their names, and of one name by the "-number" in
    which they differ ("" where there is none). What lies in several folders is told apart by the
    folder's name. ValueError where one is named twice."""
    found: dict[tuple[Path, str], dict[str, str]] = {}
    for place in places:
        path = Path(place).absolute()
        path = path.parent if path.name == "metrics.jsonl" else path
        name = path.name.removesuffix(".jsonl")
        name, seed = re.fullmatch(r"(.*?)((?<!\de)-\d+)?", name, re.S).groups("")
        if seed in found.setdefault((path.parent, name), {}):
            raise ValueError(f"{place}: named twice")
        found[path.parent, name][seed] = place
    often = Counter(name for _, name in found)
    return {
        name if often[name] == 1 else f"{parent.name}/{name}": seeds
        for (parent, name), seeds in found.items()
    }


def read_runs(places: Iterable[str]) -> dict[str, dict[str, list[dict]]]:
    """The metrics of runs, `by_seed`."""
    groups = by_seed(places).items()
    return {
        name: {seed: read_metrics(place) for seed, place in seeds.items()} for name, seeds in groups
    }


def over_seeds(runs: Iterable[list[dict]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps (n,) at which all runs have a number, and what it is there (runs, n)."""
    series = [{e["step"]: e[key] for e in run if key in e} for run in runs]
    steps = np.array(sorted(set.intersection(*map(set, series))), dtype=int)
    return steps, np.array([[s[step] for step in steps] for s in series], dtype=float)


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis; of a single one no spread, nan."""
    alone = len(values) == 1
    return values.mean(0), np.full_like(values[0], np.nan) if alone else values.std(0, ddof=1)


class Curve(NamedTuple):
    """The validations of the runs of one name, which differ in their seeds; in two passes where
    they are soft-masked."""

    passes: int
    seeds: tuple[str, ...]
    steps: np.ndarray  # (n,), at which all of them were validated
    nats: np.ndarray  # (seeds, n)

    def at(self, steps: np.ndarray, between: bool = False) -> np.ndarray:
        """Nats at `steps` (m,), (seeds, m); nan where there is no validation, or outside of the
        validations where straight lines are drawn `between` them."""
        found = np.array([np.interp(steps, self.steps, own, np.nan, np.nan) for own in self.nats])
        return found if between else np.where(np.isin(steps, self.steps), found, np.nan)

    def below(self, own: np.ndarray, other: "Curve", its: np.ndarray) -> np.ndarray:
        """By how many per cent nats `own` (seeds, m) are below those of another curve, `its`: of
        each seed that both have, or of the means (1, m) where they have none in common."""
        shared = [seed for seed in self.seeds if seed in other.seeds]
        if shared:
            own = own[[self.seeds.index(seed) for seed in shared]]
            its = its[[other.seeds.index(seed) for seed in shared]]
        else:
            own, its = own.mean(0, keepdims=True), its.mean(0, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return 100 * (1 - own / its)


def curves_of(seeds: dict[str, list[dict]]) -> list[Curve]:
    """The validations that all runs of a name have: in one pass and, where soft-masked, in two;
    the last is the one that counts."""
    found = []
    for passes in (1, 2):
        steps, nats = over_seeds(seeds.values(), f"val_nelbo_{passes}pass")
        if len(steps):
            found.append(Curve(passes, tuple(seeds), steps, nats))
    return found


# The tables


def compare(args: argparse.Namespace) -> None:
    """Tables of the metrics of runs: NELBO against steps, and what was reached for equal cost."""
    if args.cost is not None and not 0.01 <= args.cost <= 100:
        raise ValueError(f"--cost {args.cost:g}: from 0.01 to 100")
    writable_files({"--json": args.json}, map(metrics_file, args.runs))
    groups = read_runs(args.runs)
    curves = {name: curves_of(seeds) for name, seeds in groups.items()}
    for name, found in curves.items():
        if not found:
            raise ValueError(f"{name}: no validation that all its seeds have; train it further")
    (first, *_), (reference, *_) = groups, (found[-1] for found in curves.values())
    at = np.array(args.at or some_steps([found[-1] for found in curves.values()]))
    rows, ends = [], []
    for name, found in curves.items():
        for curve in found:
            nats = curve.at(at)
            rows.append({"run": name, "passes": curve.passes, "seeds": len(curve.seeds)})
            rows[-1]["nats"] = over(nats)
            if name != first:
                rows[-1]["below"] = over(curve.below(nats, reference, reference.at(at)))
        ends.append({"run": name} | end_of(groups[name], found[-1]))
        if name != first and args.cost is not None:
            ends[-1] |= at_equal_cost(found[-1], reference, args.cost)
    print("validation NELBO, nats a token, after so many steps: mean and deviation over seeds")
    passes = "one pass" if reference.passes == 1 else "two passes"
    print(layout(step_table(rows, at, f"  below {first} in {passes}, %"), args.markdown, 1))
    print("the last validation that all seeds have; equal cost is on lines between validations")
    print(layout(end_table(ends, first), args.markdown, 1), end="")
    if args.json:
        with atomic_write(args.json, "w") as f:
            json.dump({"steps": at.tolist(), "rows": rows, "ends": ends}, f)


def some_steps(curves: list[Curve]) -> np.ndarray:
    """At most seven of the steps at which all were validated, the last among them."""
    shared = reduce(np.intersect1d, [curve.steps for curve in curves])
    shared = shared[shared > 0] if len(shared) > 1 else shared
    if not len(shared):
        raise ValueError("no step at which all runs were validated; name some by --at")
    return shared[:: -max(1, -(-len(shared) // 7))][::-1]


def over(values: np.ndarray) -> list[tuple[float | None, float | None]]:
    """Mean and deviation over seeds of values (seeds, m), as JSON has them."""
    mean, deviation = mean_and_spread(values)
    return [(finite(m), finite(d)) for m, d in zip(mean.tolist(), deviation.tolist())]


def end_of(seeds: dict[str, list[dict]], curve: Curve) -> dict:
    """What the runs of a name reached, (mean, deviation) over seeds."""
    end = curve.nats[:, -1:]
    found = {"steps": int(curve.steps[-1]), "passes": curve.passes, "nats": over(end)[0]}
    found["perplexity"] = over(np.exp(np.minimum(end, 700)))[0]
    key = "tokens_per_second"
    speeds = [[e[key] for e in run if key in e] or [np.nan] for run in seeds.values()]
    found[key] = over(np.array([[np.median(own)] for own in speeds]))[0]
    for omega in OMEGAS:
        steps, values = over_seeds(seeds.values(), omega)
        values = values[:, steps <= curve.steps[-1]]
        if values.size:
            found[omega] = over(values[:, -1:])[0]
    return found


def at_equal_cost(curve: Curve, first: Curve, cost: float) -> dict:
    """Both NELBOs, and by how much this one is below, at as many steps as cost the same: those of
    the curve that is the cheaper at its end. A step of this one costs `cost` of the first's."""
    steps = np.minimum(first.steps[-1:], cost * curve.steps[-1:])
    own_steps = np.minimum(curve.steps[-1:], steps / cost)
    own, its = curve.at(own_steps, between=True), first.at(steps, between=True)
    found = {"equal_steps": float(own_steps[0]), "equal_first_steps": float(steps[0])}
    found |= {"equal_nats": over(own)[0], "equal_first": over(its)[0]}
    return found | {"cost": cost, "equal_below": over(curve.below(own, first, its))[0]}


def step_table(rows: list[dict], at: np.ndarray, below: str) -> list[list[str]]:
    lines = [["run", "passes", "seeds", *map(str, at)]]
    for row in rows:
        lines.append([row["run"], str(row["passes"]), str(row["seeds"])])
        lines[-1] += [cell(value, 4) for value in row["nats"]]
        if "below" in row:
            lines.append([below, "", "", *(cell(value, 2) for value in row["below"])])
    return lines


def end_table(ends: list[dict], first: str) -> list[list[str]]:
    """A column a name."""
    facts = [("steps", "steps", 0), ("passes", "passes of the validation", 0)]
    facts += [("nats", "NELBO, nats a token", 4), ("perplexity", "perplexity", 2)]
    facts += [("tokens_per_second", "tokens a second, medians", 0)]
    facts += [(name, name, 4) for name in OMEGAS]
    facts += [("cost", f"cost of a step, {first}'s 1", 2)]
    facts += [("equal_first_steps", f"equal cost: steps of {first}", 0)]
    facts += [("equal_steps", "  steps of this", 0), ("equal_first", f"  NELBO of {first}", 4)]
    facts += [("equal_nats", "  NELBO of this", 4), ("equal_below", "  below it, %", 2)]
    lines = [[title, *(cell(end.get(key), d) for end in ends)] for key, title, d in facts]
    return [["", *(end["run"] for end in ends)], *(line for line in lines if any(line[1:]))]


def cell(value, digits: int) -> str:
    """A number, or a mean with its deviation over seeds where there are several."""
    mean, deviation = value if isinstance(value, tuple) else (value, None)
    if mean is None:
        return ""
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" +- {deviation:.{digits}f}")


# The command line


def add_commands(commands) -> None:
    """`runs` among the commands of evaluate.py, and its flags."""
    c = commands.add_parser("runs", help="validations of training runs over seeds")
    c.set_defaults(main=compare)
    c.add_argument(
        "runs",
        nargs="+",
        help="folders, the first of them what the others are compared with; those of one folder "
        "that differ in a last -number are seeds of one name",
    )
    c.add_argument("--at", type=int, nargs="+", help="validated steps; default: some that all have")
    c.add_argument(
        "--cost",
        type=float,
        help="a step of the others costs so many of the first's: compare at equal cost, too",
    )
    c.add_argument(
        "--json",
        help='write the numbers to this file: "rows" are pairs of mean and deviation at "steps", '
        '"ends" those of the last validation',
    )
    c.add_argument("--markdown", action="store_true", help="print the tables as Markdown")

"""Pictures: training curves, Eq. 2, the quality of samples; and a decoding, step by step.

python viz.py curves binary sm --out curves.svg             # perplexity and omega_s (figure 3)
python viz.py lambda --ckpt out --out lambda.svg            # lambda against entropy
python viz.py quality scores.json --out quality.svg         # of evaluate.py gen --json
python viz.py page sm.jsonl binary.jsonl --out page.html    # traces of sample.py --trace
python viz.py position sm.jsonl 17                          # one mask, in numbers
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

from data import open_corpus
from runs import (
    OMEGAS,
    curves_of,
    mean_and_spread,
    metrics_file,
    over_seeds,
    read_runs,
)
from runtime import Parser, atomic_write, generator, run, writable_files
from softmask import antithetic_times, negative_entropies
from tracing import tell_position, write_page
from weights import build_model, build_softmask, load_checkpoint

# Okabe and Ito's, told apart by the colour-blind
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

MEASURES = {  # the columns of evaluate.py gen
    "2-grams": "2-gram divergence from held-out text, bits",
    "3-grams": "3-gram divergence from held-out text, bits",
    "entropy": "entropy of a sample's tokens, nats",
    "parse": "share that parses as Python",
    "gen_ppl": "generative perplexity",
    "mauve": "MAUVE",
}


def _figure(width: float, height: float, columns: int = 1, rows: int = 1):
    """A figure and its axes, alone or in an array."""
    import matplotlib  # slow to import, and most runs draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "same points, same file"
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")
    for one in np.atleast_1d(axes).flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, file: str) -> None:
    from matplotlib import pyplot

    kind = Path(file).suffix[1:] or "svg"
    writable_files({"--out": file})
    with atomic_write(file) as f:
        figure.savefig(f, format=kind, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)


def plot_curves(folders: list[str], file: str, omegas: bool = False, gain: bool = False) -> None:
    """Runs against their steps: validation perplexity and omega_s (figure 3), by how much the NELBO
    is below the first one's in place of the perplexity (`gain`), or all omegas and tau (figure 6).
    Runs of one folder that differ in a last "-number" are the seeds of one curve, their mean in a
    band of a standard deviation. SVG or PNG by the name."""
    writable_files({"--out": file}, map(metrics_file, folders))
    groups = read_runs(folders)
    validated = {name: found[-1] for name, seeds in groups.items() if (found := curves_of(seeds))}
    first = next(iter(groups))
    if gain and (omegas or len(groups) == 1 or first not in validated):
        raise ValueError("--gain: a validated run first, then those to compare; without --omegas")
    entries = [entry for runs in groups.values() for run in runs.values() for entry in run]
    names = [n for n in (OMEGAS if omegas else OMEGAS[:1]) if any(n in entry for entry in entries)]
    if omegas and not names:
        raise ValueError(f"--omegas: none in {', '.join(folders)}, which are binary")
    if not omegas:
        names.insert(0, f"NELBO below that of {first}, %" if gain else "validation perplexity")
    figure, axes = _figure(3.6 * max(2, len(names)), 3.4, len(names))
    for name, one in zip(names, np.atleast_1d(axes)):
        for (group, runs), colour in zip(groups.items(), itertools.cycle(COLOURS)):
            if name in OMEGAS:
                steps, values = over_seeds(runs.values(), name)
            elif group in validated:  # a run that was killed may not be
                steps, values = validated[group].steps, validated[group].nats
                if gain:
                    its = validated[first].at(steps)
                    values = validated[group].below(values, validated[first], its)
            else:
                continue
            if not len(steps):
                continue
            mean, spread = mean_and_spread(values)
            low, high = mean - spread, mean + spread
            if name == "validation perplexity":
                low, mean, high = (np.exp(np.minimum(v, 700)) for v in (low, mean, high))
            label = group + (f" ({len(values)} seeds)" if len(values) > 1 else "")
            alone = "o" if len(steps) == 1 else None  # a line of one point would not be seen
            one.plot(steps, mean, color=colour, lw=1.2, marker=alone, label=_plain(label))
            one.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        one.set(xlabel="steps", ylabel=_plain(name))
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=7)
    _save(figure, file)


def _plain(label: str) -> str:
    """A name in a picture: neither mathematics ($), nor left out of the legend (_)."""
    label = " ".join(label.split()).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def plot_lambda(omegas: dict[str, tuple], entropies: np.ndarray, most: float, file: str) -> None:
    """lambda (Eq. 2) against entropy in nats, from 0 to `most`, for named (omega_s, omega_a,
    omega_b); and the histogram of the entropies a network really had, if there are such."""
    figure, axes = _figure(5.4, 3.6)
    h = np.linspace(0, most, 400)
    if len(entropies):
        counts = axes.twinx()
        counts.hist(entropies, bins=60, range=(0, most), color="0.8", density=True, zorder=0)
        counts.set_ylabel("density of the network's entropies")
        counts.spines[["top"]].set_visible(False)
        axes.set_zorder(counts.get_zorder() + 1)
        axes.patch.set_visible(False)
    lines = itertools.cycle(["-", "--", ":", "-."])
    for (name, (s, a, b)), colour, line in zip(omegas.items(), itertools.cycle(COLOURS), lines):
        axes.plot(
            h,
            s / (1 + np.exp(np.clip(-a * (-h - b), None, 700))),
            color=colour,
            ls=line,
            label=name,
        )
    axes.set(xlabel="entropy of the prediction, nats", ylabel="lambda", ylim=(0, 1), xlim=(0, most))
    axes.legend(framealpha=0.8, edgecolor="none", fontsize=8)
    _save(figure, file)


def plot_quality(rows: list[dict], measure: str, file: str, text: float | None = None) -> None:
    """A measure of samples against NFE (table 1) of {"nfe", "strategy", "feedback", measure}: a
    line a strategy and feedback, means over rows in a band of a standard deviation; and a level,
    that of training `text`."""
    figure, axes = _figure(6.8, 3.6)
    groups: dict[tuple, dict] = {}
    for row in rows:
        group = groups.setdefault((row["strategy"], row["feedback"]), {})
        group.setdefault(row["nfe"], []).append(row[measure])
    strategies = list(dict.fromkeys(strategy for strategy, _ in groups))
    for (strategy, feedback), found in sorted(groups.items()):
        nfe = np.array(sorted(found))
        mean, spread = np.array([mean_and_spread(np.array(found[n])) for n in nfe]).T
        colour = COLOURS[feedback == "sm"]
        i = strategies.index(strategy)
        label = f"{strategy}, {feedback}"
        axes.plot(nfe, mean, color=colour, marker="os^Dvx"[i % 6], ls=["-", "--", ":"][i % 3],
            lw=1.2, ms=5, label=label)  # fmt: skip
        axes.fill_between(nfe, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    if text is not None:
        axes.axhline(text, color="0.4", lw=1, ls="-.", label="training text")
    axes.set(xlabel="NFE (steps)", ylabel=MEASURES.get(measure, measure))
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    _save(figure, file)


def plot_tradeoff(points: list[dict], quality: str, file: str) -> None:
    """Quality against speed (figure 4): a dot each of `points`, {"network", "decoding", "label",
    "speed" in tokens a second, "quality", "error"}; a colour a network, a sign a way of decoding,
    whose dots are joined; the first network's bear their labels. SVG or PNG by the name."""
    figure, axes = _figure(7.2, 4.6)
    from matplotlib import ticker

    networks, decodings = (
        list(dict.fromkeys(point[key] for point in points)) for key in ("network", "decoding")
    )
    for network, colour in zip(networks, itertools.cycle(COLOURS)):
        for i, (decoding, marker) in enumerate(zip(decodings, itertools.cycle("os^Dvx"))):
            own = [p for p in points if (p["network"], p["decoding"]) == (network, decoding)]
            own.sort(key=lambda p: p["speed"])
            x, y, error = ([p[key] for p in own] for key in ("speed", "quality", "error"))
            line = "-" if network == networks[0] else "--"
            axes.errorbar(
                x, y, error, color=colour, marker=marker, ms=5, ls=line, lw=1, capsize=2,
                label=f"{network}, {decoding}",
            )  # fmt: skip
            for point in own if network == networks[0] else []:
                axes.annotate(
                    point["label"], (point["speed"], point["quality"]), color=colour, fontsize=7,
                    textcoords="offset points", xytext=(0, -14 if i % 2 else 8), ha="center",
                )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("tokens a second")
    axes.set_ylabel(quality)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, file)


# The command line


def draw_curves(args: argparse.Namespace) -> None:
    plot_curves(args.runs, args.out, args.omegas, args.gain)


def draw_lambda(args: argparse.Namespace) -> None:
    """Of checkpoints, or of omegas; the entropies are those of the first checkpoint's network."""
    omegas, entropies, most = {}, np.zeros(0), math.log(50258)  # GPT-2's vocabulary
    for place in args.ckpt:
        state = load_checkpoint(place, "--ckpt")
        softmask = build_softmask(state)
        if softmask is None:
            raise ValueError(f"--ckpt {place}: a binary model has no lambda")
        omegas[place] = tuple(list(softmask.omegas().values())[:3])
        if not len(entropies):
            entropies, most = held_out_entropies(state, args.cache)
    for text in args.omegas:
        try:
            s, a, b = map(float, text.split(","))
            if not all(map(math.isfinite, (s, a, b))):
                raise ValueError
        except ValueError:
            raise ValueError(f"--omegas {text}: omega_s,omega_a,omega_b") from None
        omegas[text] = s, a, b
    if not omegas:
        raise ValueError("--ckpt or --omegas: of what?")
    plot_lambda(omegas, entropies, most, args.out)


@torch.no_grad()
def held_out_entropies(state: dict, cache: str) -> tuple[np.ndarray, float]:
    """H(p) in nats at the masked positions of 64 held-out blocks at all times, with plain masks;
    and the most it can be."""
    model = build_model(state, ema=True).eval()
    corpus = open_corpus(state["args"]["data"], state["tokenizer"], cache)
    x0 = corpus.blocks("val", state["args"]["block_size"] or model.config.block_size, 64)
    g = generator(0)
    t = antithetic_times(torch.rand(len(x0), generator=g), 1e-3, 1.0)
    found = negative_entropies(model, x0, t, torch.rand(x0.shape, generator=g))
    return -found.float().numpy(), math.log(model.vocab_size)


def draw_quality(args: argparse.Namespace) -> None:
    """From the files of `evaluate.py gen --json`."""
    rows, text = [], None
    for file in args.scores:
        try:
            found = json.loads(Path(file).read_text())["rows"]
            for row in found:
                value = row[args.measure] if "nfe" in row else row.get(args.measure)
                if value is not None and row.get("text") == "(training text)":
                    text = float(value)
                elif value is not None and "nfe" in row:
                    rows.append({key: row[key] for key in ("strategy", "feedback")})
                    rows[-1] |= {"nfe": int(row["nfe"]), args.measure: float(value)}
                    hash(tuple(rows[-1].values()))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{file}: no {args.measure!r} of evaluate.py gen --json") from None
    if not rows:
        raise ValueError("no samples that say their NFE, which sample.py --out writes")
    plot_quality(rows, args.measure, args.out, text)


def parser() -> Parser:
    p = Parser(description="Pictures of runs and decodings.")
    commands = p.add_subparsers(required=True, metavar="what")
    # fmt: off

    def command(name: str, main, about: str, out: str = "the picture, SVG or PNG"):
        c = commands.add_parser(name, help=about)
        c.set_defaults(main=main)
        if out:
            c.add_argument("--out", required=True, help=f"{out}; one that is there is replaced")
        return c.add_argument

    add = command("curves", draw_curves, "training curves (figures 3 and 6)")
    add("runs", nargs="+", help="folders of runs; those that differ in a last -number are seeds")
    add("--omegas", action="store_true", help="all omegas in place of the perplexity")
    add("--gain", action="store_true",
        help="by how many per cent NELBOs are below the first run's, in place of the perplexity")
    add = command("lambda", draw_lambda, "lambda against entropy (Eq. 2)")
    add("--ckpt", nargs="*", default=[], help="of these networks, with the first one's entropies")
    add("--omegas", nargs="*", default=[], help="of these omega_s,omega_a,omega_b")
    add("--cache", default="corpora", help="folder of tokenized corpora")
    add = command("quality", draw_quality, "the quality of samples against NFE (table 1)")
    add("scores", nargs="+", help="files of evaluate.py gen --json")
    add("--measure", default="3-grams", help="a column: 3-grams, entropy, mauve, gen_ppl, ...")
    add = command("page", write_page, "traces side by side, to step through", "the HTML file")
    add("traces", nargs="+", help="files of sample.py --trace", metavar="TRACE")
    add("--sample", type=int, default=0, help="the sample of every trace")
    add = command("position", tell_position, "how one mask softens, in numbers", "")
    add("trace", help="a file of sample.py --trace")
    add("position", type=int, help="of the text, from 0")
    add("--sample", type=int, default=0, help="of the trace")
    # fmt: on
    return p


if __name__ == "__main__":
    args = parser().parse_args()
    run(args.main, args)

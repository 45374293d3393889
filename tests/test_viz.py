"""Pictures show every point, with axes that are named."""

import json
import math

import numpy as np
import pytest

import viz

POINTS = [
    {"network": network, "decoding": decoding, "label": label, "speed": speed, "quality": quality,
     "error": 0.01}
    for network, shift in (("binary", 0.1), ("soft-masked", 0.0))
    for decoding, factor in (("budget 0.25", 2), ("threshold 0.9", 1))
    for label, speed, quality in (("8", 100 * factor, 0.8 + shift), ("32", 300 * factor, 0.9))
]  # fmt: skip


def test_tradeoff_names_axes_networks_and_ways_of_decoding(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters, not outlines
    viz.plot_tradeoff(POINTS, "divergence, bits", str(tmp_path / "a.svg"))
    picture = (tmp_path / "a.svg").read_text()
    for text in ("tokens a second", "divergence, bits", "binary, budget 0.25", ">32<"):
        assert text in picture
    assert picture.count(">8<") == 2 and "soft-masked, threshold 0.9" in picture


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_points_give_the_same_file(tmp_path, name):
    files = [tmp_path / f"{i}-{name}" for i in range(2)]
    for file in files:
        viz.plot_tradeoff(POINTS, "divergence, bits", str(file))
    assert files[0].read_bytes() == files[1].read_bytes()


def training_run(folder, values, **more):
    """A run's folder: validation NELBOs and omega_s at steps 0, 10, 20, ..."""
    folder.mkdir()
    lines = [
        {"step": 10 * i, "val_nelbo_1pass": v + 0.5} | ({"val_nelbo_2pass": v} if more else {})
        for i, v in enumerate(values)
    ]
    lines += [{"step": 10 * i, "loss": 1.0, **more} for i in range(1, len(values))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def drawn(monkeypatch, *flags):
    """The axes that a command of viz.py draws."""
    figures = []
    monkeypatch.setattr(viz, "_save", lambda figure, file: figures.append((figure, file)))
    args = viz.parser().parse_args([*map(str, flags), "--out", "picture.svg"])
    args.main(args)
    ((figure, file),) = figures
    assert file == "picture.svg"
    return figure.axes


def test_curves_are_means_over_seeds_in_a_band_of_one_deviation(tmp_path, monkeypatch):
    soft = [training_run(tmp_path / f"sm-{i}", [2.0, 1.0 + i / 5], omega_s=0.1 * i) for i in (1, 2)]
    plain = training_run(tmp_path / "binary", [2.0, 1.5])
    perplexity, omega = drawn(monkeypatch, "curves", plain, *soft)
    assert (perplexity.get_ylabel(), omega.get_ylabel()) == ("validation perplexity", "omega_s")
    binary, sm = perplexity.lines
    assert [line.get_label() for line in (binary, sm)] == ["binary", "sm (2 seeds)"]
    assert np.allclose(binary.get_ydata(), np.exp([2.5, 2.0])), "a binary model's one pass"
    assert np.allclose(sm.get_ydata(), np.exp([2.0, 1.3])), "a soft-masked model's two"
    band = perplexity.collections[1].get_paths()[0].vertices
    spread = 0.1 * math.sqrt(2)
    assert band[:, 1].max() == pytest.approx(math.exp(2.0))
    assert np.isclose(band[:, 1], math.exp(1.3 - spread)).any()
    (line,) = omega.lines
    assert np.allclose(line.get_xydata(), [[10, 0.15]])


def test_the_gain_is_against_the_first_run_seed_by_seed(tmp_path, monkeypatch):
    plain = [training_run(tmp_path / f"binary-{i}", [1.5, i - 0.5]) for i in (1, 2)]
    soft = [
        training_run(tmp_path / f"sm-{i}", [v + 0.5, v], omega_s=0.1)
        for i, v in [(2, 1.2), (1, 0.9)]
    ]
    gain, _ = drawn(monkeypatch, "curves", *plain, *soft, "--gain")
    assert gain.get_ylabel() == "NELBO below that of binary, %"
    binary, sm = gain.lines
    assert sm.get_label() == "sm (2 seeds)" and np.allclose(binary.get_ydata(), 0)
    below = [100 * ((2.0 - 1.4) + (2.0 - 1.7)) / 2 / 2.0, 100 * ((1 - 0.9) + (2 - 1.2) / 2) / 2]
    assert np.allclose(sm.get_xydata(), [[0, below[0]], [10, below[1]]])
    with pytest.raises(ValueError, match="--gain: a validated run first"):
        drawn(monkeypatch, "curves", *plain, "--gain")


def test_all_omegas_and_tau_are_drawn_when_asked(tmp_path, monkeypatch):
    one = training_run(
        tmp_path / "one", [2.0, 1.0], omega_s=0.1, omega_a=2.0, omega_b=-3.0, tau=0.9
    )
    axes = drawn(monkeypatch, "curves", one, "--omegas")
    assert [a.get_ylabel() for a in axes] == ["omega_s", "omega_a", "omega_b", "tau"]
    assert [a.lines[0].get_ydata()[0] for a in axes] == [0.1, 2.0, -3.0, 0.9]
    with pytest.raises(ValueError, match="--omegas: none in"):
        drawn(monkeypatch, "curves", training_run(tmp_path / "binary", [1.0]), "--omegas")


def test_a_run_that_was_killed_is_drawn_as_far_as_it_goes(tmp_path, monkeypatch, capsys):
    folder = training_run(tmp_path / "killed", [2.0, 1.0])
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as f:
        f.write('[1]\n{"loss": 3}\n{"step": 20, "val_nel')
    (axes,) = drawn(monkeypatch, "curves", folder)
    assert list(axes.lines[0].get_xdata()) == [0, 10]
    assert "3 of 6 lines left out" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff\n{", b'{"trace": 1}\n'])
def test_what_is_no_run_is_one_line(tmp_path, monkeypatch, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics.jsonl: no line of a run's metrics"):
        drawn(monkeypatch, "curves", tmp_path)


def test_lambda_is_eq_2_over_the_entropies_that_the_network_has(run, monkeypatch):
    counts, axes = drawn(monkeypatch, "lambda", "--omegas", "0.5,2,-3", "--ckpt", run,
                         "--cache", run)[::-1]  # fmt: skip
    _, given = axes.lines
    assert given.get_label() == "0.5,2,-3"
    h, lam = given.get_xydata().T
    assert np.allclose(lam, 0.5 / (1 + np.exp(-2 * (-h + 3))))
    assert np.isclose(lam[np.abs(h - 3).argmin()], 0.25, atol=0.01)
    assert h[-1] == pytest.approx(math.log(258))
    heights = [bar.get_height() for bar in counts.patches]
    assert len(heights) == 60 and np.isclose(sum(heights) * h[-1] / 60, 1)
    assert np.argmax(heights) > 50, "four steps of training leave it unsure of everything"


def test_quality_is_a_line_a_strategy_and_feedback(tmp_path, monkeypatch):
    rows = [
        {"strategy": "mdlm", "nfe": nfe, "feedback": feedback, "3-grams": value, "mauve": None}
        for feedback, nfe, value in [
            ("sm", 64, 0.5), ("sm", 16, 0.7), ("sm", 16, 0.9), ("binary", 16, 0.95),
        ]
    ]  # fmt: skip
    file = tmp_path / "scores.json"
    levels = [
        {"text": f"({name} text)", "3-grams": v} for name, v in (("held-out", 0), ("training", 0.4))
    ]
    file.write_text(json.dumps({"rows": [*rows, *levels]}))
    (axes,) = drawn(monkeypatch, "quality", file)
    assert axes.get_ylabel() == "3-gram divergence from held-out text, bits"
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert found == {
        "mdlm, binary": [[16, 0.95]],
        "mdlm, sm": [[16, pytest.approx(0.8)], [64, 0.5]],
        "training text": [[0, 0.4], [1, 0.4]],
    }
    with pytest.raises(ValueError, match="no samples that say"):
        drawn(monkeypatch, "quality", file, "--measure", "mauve")
    with pytest.raises(ValueError, match="scores.json: no 'gen_ppl'"):
        drawn(monkeypatch, "quality", file, "--measure", "gen_ppl")


def test_a_kind_of_picture_that_there_is_not_is_named(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        viz.plot_curves([training_run(tmp_path / "one", [1.0])], str(tmp_path / "a.xyz"))
    assert not list(tmp_path.glob("a.xyz*"))

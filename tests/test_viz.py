"""Pictures show every point, with axes that are named."""

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
    assert picture.count(">8<") == 4 and "soft-masked, threshold 0.9" in picture


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_points_give_the_same_file(tmp_path, name):
    files = [tmp_path / f"{i}-{name}" for i in range(2)]
    for file in files:
        viz.plot_tradeoff(POINTS, "divergence, bits", str(file))
    assert files[0].read_bytes() == files[1].read_bytes()

"""The page of a decoding shows what its trace says, in a real browser, and runs nothing of it."""

import json
import random
import shutil
import time
from functools import partial

import pytest
import torch

import decoding
import tracing
import viz
from softmask import SoftMask

MASK = 99
HEAD = {
    "mask": MASK,
    "strategy": "remdm-cap",
    "nfe": 9,
    "k": 2,
    "omegas": {"omega_s": 0.5, "omega_b": -4.0},
}
CELLS = """return [...document.querySelectorAll("section")].map((section) =>
  [...section.querySelectorAll("[role=gridcell]")].map((cell) =>
    [cell.lastChild.dataset.state, cell.lastChild.textContent]))"""
STATUS = "return [...document.querySelectorAll('.status')].map((line) => line.textContent)"


def spell(ids) -> str:
    return "".join("[MASK]" if i == MASK else f"t{i}" for i in ids)


def say(texts: dict[int, str], ids) -> str:
    return "".join(texts[i] for i in ids)


def write(path, start, entries, head=None, spell=spell):
    """The trace file of `entries`, one "sample" each, by the writer of `sample.py --trace`."""
    trace = tracing.TraceFile(str(path), {**HEAD, **(head or {}), "start": start}, spell)
    for entry in entries:
        sample = entry.pop("sample", 0)
        trace.add([{"row": 0, "t": 0.5, "drawn": [], "remasked": [], "soft": [], **entry}],
                  range(sample, sample + 1))  # fmt: skip
    trace.file.close()
    return path


def decoded(length: int, steps: int, k: int, seed: int, given: int = 0):
    """(start, entries) of a made-up decoding that masks some tokens again."""
    rng = random.Random(seed)
    start = [i if i < given else MASK for i in range(length)]
    ids, entries = list(start), []
    for step in range(steps):
        masks = [p for p in range(length) if ids[p] == MASK]
        old = [p for p in range(given, length) if ids[p] != MASK]
        drawn = [[p, rng.randrange(90)] for p in masks if rng.random() < 1.5 / (steps - step)]
        remasked = [p for p in old if rng.random() < 0.1 and step < steps - 1]
        for p, i in [*drawn, *((p, MASK) for p in remasked)]:
            ids[p] = i
        soft = []
        for p in (p for p in range(length) if ids[p] == MASK and k):
            w = sorted((rng.random() for _ in range(k)), reverse=True)
            weights = [round(x / sum(w), 4) for x in w]
            entropy, lam = round(-6 * rng.random(), 4), round(rng.random(), 4)
            soft.append([p, lam, entropy, rng.sample(range(90), k), weights])
        t = round(1 - (step + 1) / steps, 6)
        entries.append({"step": step, "t": t, "drawn": drawn, "remasked": remasked, "soft": soft})
    return start, entries


def replay(start, entries, step: int) -> list[list[str]]:
    """[state, text] of every cell after `step` entries, straight from the trace's definition."""
    ids = list(start)
    cells = [["mask", ""] if i == MASK else ["given", spell([i])] for i in start]
    for entry in entries[:step]:
        former = list(ids)
        for p, i in entry["drawn"]:
            ids[p] = i
        for p in entry["remasked"]:
            ids[p] = MASK
        for p, i in enumerate(ids):
            if start[p] != MASK:
                continue
            cells[p] = ["mask", ""] if i == MASK else ["token", spell([i])]
        for p, _, _, candidates, _ in entry["soft"]:
            cells[p] = ["soft", spell(candidates[:1])]
        for p, i in entry["drawn"]:
            cells[p] = ["drawn", spell([i])]
        for p in entry["remasked"]:
            cells[p] = ["remasked", spell([former[p]])]
    return cells


def command(*arguments):
    tracing.write_page(viz.parser().parse_args(["page", *map(str, arguments)]))


# In the browser


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    binary, driver = (
        next(filter(None, map(shutil.which, names)), None),
        shutil.which("chromedriver"),
    )
    if binary is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    flags += " disable-background-networking disable-component-update disable-dev-shm-usage"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = selenium.Chrome(options, selenium.ChromeService(driver))
    browser.set_script_timeout(20)
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium):
    """A browser of a wide light window; the test fails where its page complained or asked the
    network for anything."""
    chromium.get("about:blank")
    chromium.get_log("browser"), chromium.get_log("performance")
    emulate(chromium)
    yield chromium
    assert chromium.get_log("browser") == []
    messages = [json.loads(m["message"])["message"] for m in chromium.get_log("performance")]
    asked = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert all(m["params"]["request"]["url"].startswith("file:") for m in asked)


def emulate(browser, width=1200, height=900, **media):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    media = {"color_scheme": "light", "reduced_motion": "no-preference"} | media
    features = [{"name": f"prefers-{k.replace('_', '-')}", "value": v} for k, v in media.items()]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def opened(browser, folder, *files):
    command(*files, "--out", folder / "page.html")
    browser.get((folder / "page.html").as_uri())


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def at(browser) -> str:
    return browser.find_element("id", "slider").get_property("value")


def active(browser):
    return browser.switch_to.active_element


def hover(browser, position: int):
    from selenium.webdriver import ActionChains

    cell = browser.find_element("css selector", f"[role=gridcell][data-p='{position}']")
    ActionChains(browser).move_to_element(cell).perform()


def panel(browser) -> str:
    return browser.find_element("id", "panel").text


def to_step(browser, step: int):
    """What a person's drag of the slider does."""
    browser.execute_script(
        "const s = document.getElementById('slider'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))", step
    )  # fmt: skip


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_every_cell_of_every_step_is_what_a_replay_of_the_trace_says(browser, tmp_path, k):
    start, entries = decoded(40, 9, k, seed=k, given=5)
    opened(browser, tmp_path, write(tmp_path / "a.jsonl", start, map(dict, entries)))
    for step in [*range(10), 3, 8, 0, 9]:  # forwards, and in jumps
        to_step(browser, step)
        assert browser.execute_script(CELLS) == [replay(start, entries, step)]
        masks = sum(
            cell[0] in ("mask", "soft", "remasked") for cell in replay(start, entries, step)
        )
        (status,) = browser.execute_script(STATUS)
        assert f" {masks} masks" in status
        if step:
            lam = [one[1] for one in entries[step - 1]["soft"]]
            shown = f"mean λ\u00a0{sum(lam) / len(lam):.3f}" if lam else "masks"
            assert status.startswith(f"step {step} of 9") and status.endswith(shown)


@pytest.mark.parametrize("name, k", [("remdm-loop", 2), ("entropy", None), ("mdlm", "binary")])
def test_a_trace_of_the_decoder_shows_the_decoder_s_own_states(
    browser, tmp_path, tiny, name, k
):  # fmt: skip
    model, softmask, states = tiny(block_size=12), None, []
    if k != "binary":
        softmask = SoftMask(k)
        softmask.set_omegas(0.9, 1.0, -2.0, *([] if k else [0.5]))
    x = torch.full((1, 12), model.mask_id)
    x[0, :2] = 3
    _, done = decoding.generate(
        model, x, 7, softmask, decoding.Strategy(name), trace=True,
        on_step=lambda i, x: states.append(x[0].tolist()),
    )  # fmt: skip
    trace = tracing.TraceFile(
        str(tmp_path / "a.jsonl"),
        {
            "mask": model.mask_id,
            "strategy": name,
            "nfe": 7,
            "k": "V" if k is None else 2,
            "start": x[0].tolist(),
        },
        lambda ids: "".join(map(str, ids)),
    )
    trace.add(done.trace, range(1))
    trace.file.close()
    opened(browser, tmp_path, tmp_path / "a.jsonl")
    for step, ids in enumerate(states, 1):
        to_step(browser, step)
        (cells,) = browser.execute_script(CELLS)
        for i, (state, text) in zip(ids, cells, strict=True):
            assert (i == model.mask_id) == (state in ("mask", "soft", "remasked"))
            assert i == model.mask_id or text == str(i)
            assert i != model.mask_id or state != ("soft" if k == "binary" else "mask")


def test_hovering_or_focusing_a_cell_lists_what_it_blends(browser, tmp_path):
    from selenium.webdriver import Keys

    soft = [[1, 0.25, -1.5, [7, 8], [0.75, 0.25]], [2, 0.5, -2.0, [3, 4], [0.6, 0.4]]]
    entries = [{"step": 0, "drawn": [[0, 5]], "soft": soft}, {"step": 1, "drawn": [[1, 8]]}]
    opened(browser, tmp_path, write(tmp_path / "a.jsonl", [MASK] * 3, entries))
    to_step(browser, 1)
    hover(browser, 1)
    shown = panel(browser)
    for part in ("position 1, soft mask", "λ 0.2500", "entropy 1.500 nats", "t7", "0.7500"):
        assert part in shown
    assert shown.index("t7") < shown.index("t8") and "(id 8)" in shown
    bar = "const s = document.querySelector(arguments[0]).style;"
    bar += "return ['--a', '--b', '--c'].map((name) => s.getPropertyValue(name))"
    assert browser.execute_script(bar, "[data-p='1'] .face") == ["18.8%", "25.0%", "25.0%"]
    assert browser.execute_script(bar, "#blend") == ["18.8%", "25.0%", "25.0%"]
    press(browser, *[Keys.TAB] * 4, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "position 2, soft mask: λ 0.5000" in panel(browser)
    label = browser.switch_to.active_element.get_attribute("aria-label")
    assert label == "2: soft mask t3, lambda 0.500"
    press(browser, Keys.ARROW_LEFT, ".")  # the panel follows the step
    assert "“t8” (id 8)" in panel(browser) and "before that a soft mask: λ 0.2500" in panel(browser)


@pytest.mark.parametrize(
    ("fragment", "step", "shown"),
    [("#1,2", "1", "position 2, soft mask"), ("#2", "2", "Point at"), ("#9,9", "2", "Point at"),
     ("#-1,1", "0", "position 1, mask"), ("#x,<b>", "0", "Point at"), ("", "0", "Point at")],
)  # fmt: skip
def test_a_link_leads_to_a_step_and_a_position(browser, tmp_path, fragment, step, shown):
    entries = [{"step": 0, "drawn": [[0, 5]], "soft": [[2, 0.5, -2.0, [3, 4], [0.6, 0.4]]]},
               {"step": 1, "drawn": [[1, 8], [2, 3]]}]  # fmt: skip
    opened(browser, tmp_path, write(tmp_path / "a.jsonl", [MASK] * 3, entries))
    browser.get("about:blank")
    browser.get((tmp_path / "page.html").as_uri() + fragment)
    assert at(browser) == step and shown in panel(browser)
    browser.execute_script("location.hash = '#1,0'")
    wait = time.monotonic() + 5
    while at(browser) != "1" and time.monotonic() < wait:
        time.sleep(0.02)
    assert at(browser) == "1" and "position 0" in panel(browser)


def test_the_keyboard_steps_plays_and_walks_over_the_text(browser, tmp_path):
    from selenium.webdriver import Keys

    start, entries = decoded(30, 9, 2, seed=1)
    opened(browser, tmp_path, write(tmp_path / "a.jsonl", start, entries))
    for key, step in [(Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1),
                      (Keys.END, 9), (Keys.ARROW_RIGHT, 9), (Keys.HOME, 0)]:  # fmt: skip
        press(browser, key)
        assert at(browser) == str(step)
    press(browser, Keys.TAB, Keys.TAB)
    assert active(browser).get_attribute("id") == "slider"
    press(browser, Keys.ARROW_RIGHT)  # one step, not the slider's own and ours
    assert at(browser) == "1" and active(browser).get_attribute("aria-valuetext").startswith(
        "step 1 of 9"
    )
    press(browser, Keys.TAB, Keys.TAB)
    assert active(browser).get_attribute("data-p") == "0"
    style = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(style) == "solid"
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert active(browser).get_attribute("data-p") == "1" and at(browser) == "1"
    emulate(browser, width=400)
    press(browser, Keys.ARROW_DOWN)
    below = active(browser).rect
    press(browser, Keys.ARROW_UP)
    assert active(browser).get_attribute("data-p") == "1" and below["y"] > active(browser).rect["y"]
    roving = "return document.querySelectorAll('[role=gridcell][tabindex=\"0\"]').length"
    assert browser.execute_script(roving) == 1
    press(browser, ",", Keys.SPACE)
    deadline = time.time() + 10
    while at(browser) == "0" and time.time() < deadline:
        time.sleep(0.02)
    assert browser.find_element("id", "play").text == "pause"
    press(browser, Keys.SPACE)
    stopped = at(browser)
    time.sleep(0.3)
    assert at(browser) == stopped != "0" and browser.find_element("id", "play").text == "play"


def test_play_runs_to_the_end_and_stops(browser, tmp_path):
    start, entries = decoded(10, 5, 2, seed=1)
    opened(browser, tmp_path, write(tmp_path / "a.jsonl", start, map(dict, entries)))
    browser.execute_script("document.getElementById('speed').value = '32'")
    browser.find_element("id", "play").click()
    deadline = time.time() + 10
    while browser.find_element("id", "play").text == "pause" and time.time() < deadline:
        time.sleep(0.02)
    assert browser.execute_script(CELLS) == [replay(start, entries, 5)]


def test_traces_side_by_side_keep_in_step(browser, tmp_path):
    runs = [decoded(20, n, k, seed=n) for n, k in ((8, 2), (8, 0), (4, 1))]
    files = [
        write(tmp_path / f"{i}.jsonl", start, map(dict, entries), {"nfe": len(entries)})
        for i, (start, entries) in enumerate(runs)
    ]
    opened(browser, tmp_path, *files)
    for step, share in ((0, 0), (2, 1), (5, 3), (8, 4)):  # the third has half as many steps
        to_step(browser, step)
        places = (step, step, share)
        assert browser.execute_script(CELLS) == [replay(*r, p) for r, p in zip(runs, places)]
    boxes = [section.rect for section in browser.find_elements("css selector", "section")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    emulate(browser, width=360, height=740)
    boxes = [section.rect for section in browser.find_elements("css selector", "section")]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] < boxes[1]["y"]


HOSTILE = {
    "</script><img src=x onerror=alert(1)>": "</script><img src=x onerror=alert(1)>",
    "<!--<script>": "<!--<script>",
    "<svg onload=alert(1)>": "<svg onload=alert(1)>",
    "\"'`${alert(1)}&lt;&amp;": "\"'`${alert(1)}&lt;&amp;",
    "a\u2028b\u2029": "a⟨2028⟩b⟨2029⟩",
    "\ud800x": "⟨D800⟩x",
    "\x00\x1b[31m\x7f": "␀␛[31m⟨007F⟩",
    "\u202eabc\u2066": "⟨202E⟩abc⟨2066⟩",
    "DATA POLICY": "DATA POLICY",
    " two  words ": "·two  words·",
    "\t": "␉",
    "日本é👍": "日本é👍",
}


def test_hostile_tokens_are_text_and_nothing_else(browser, tmp_path):
    from selenium.common.exceptions import NoAlertPresentException

    n = len(HOSTILE)
    texts = dict(enumerate(HOSTILE)) | {MASK: "[MASK]"}
    soft = [[p, 0.5, -1.0, [p], [1.0]] for p in range(n)]
    entries = [
        {"step": 0, "soft": soft},
        {"step": 1, "drawn": [[p, p] for p in range(n)]},
        {"step": 2, "remasked": [*range(n)]},
    ]
    bad = "<img src=x onerror=alert(2)>"
    file = write(
        tmp_path / f"{bad}.jsonl", [MASK] * n, entries, {"strategy": bad}, partial(say, texts)
    )
    opened(browser, tmp_path, file)
    for step, state in enumerate(("mask", "soft", "drawn", "remasked")):
        to_step(browser, step)
        want = [[state, shown if step else ""] for shown in HOSTILE.values()]
        assert browser.execute_script(CELLS) == [want]
        hover(browser, 0)
        assert step != 1 or "</script><img src=x onerror=alert(1)>" in panel(browser)
    assert browser.find_element("css selector", "h2").text == bad
    foreign = "return document.querySelectorAll('img, svg, iframe, script').length"
    assert browser.execute_script(foreign) == 2  # the data and the page's own
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert


def test_the_page_forbids_the_network_and_scripts_that_are_not_its_own(chromium, tmp_path):
    opened(chromium, tmp_path, write(tmp_path / "a.jsonl", *decoded(4, 3, 1, seed=0)))
    told = """const done = arguments[0], seen = [];
      document.addEventListener("securitypolicyviolation", (event) => {
        seen.push(event.effectiveDirective);
        if (seen.length === 4) done(seen.sort());
      });
      new Image().src = "http://127.0.0.1:9/x.png";
      fetch("http://127.0.0.1:9/x").catch(() => 0);
      try { document.body.innerHTML = "<b>x</b>"; } catch (error) { }
      const script = document.createElement("style");
      script.textContent = "b { color: red }";
      document.head.append(script);"""
    directives = chromium.execute_async_script(told)
    assert [d.split("-elem")[0] for d in directives] == [
        "connect-src", "img-src", "require-trusted-types-for", "style-src",
    ]  # fmt: skip


def test_lines_break_after_newlines_and_keep_their_indentation(browser, tmp_path):
    texts = {1: "def", 2: " f", 3: "():\n    ", 4: "pass", 5: "\n\n", 6: "  x", MASK: "[MASK]"}
    ids = [1, 2, 3, 4, 5, 6]
    entries = [
        {"step": 0, "soft": [[2, 0.5, -1.0, [5], [1.0]]]},
        {"step": 1, "drawn": [*map(list, enumerate(ids))]},
    ]
    opened(
        browser,
        tmp_path,
        write(tmp_path / "a.jsonl", [MASK] * 6, entries, spell=partial(say, texts)),
    )
    place = """return [...document.querySelectorAll(".row")].map((row) =>
      [...row.querySelectorAll(".face")].filter((face) => face.checkVisibility(
        { visibilityProperty: true })).map((face) => face.textContent))"""
    to_step(browser, 1)
    assert browser.execute_script(CELLS)[0][2] == ["soft", "↵↵"]
    rects = """return [...document.querySelectorAll('.grid .cell')].map((cell) =>
      [cell.offsetLeft, cell.offsetTop])"""
    before = browser.execute_script(rects)
    to_step(browser, 2)
    assert browser.execute_script(place) == [
        ["def", "·f", "():↵"], ["····", "pass", "↵"], ["↵"], ["··x"],
    ]  # fmt: skip
    assert browser.execute_script(rects) == before  # nothing moves


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgb = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (colour) => {
  const [r, g, b] = rgb(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (one, other) => {
  const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const paper = (element) => {
  while (rgb(getComputedStyle(element).backgroundColor)[3] === 0) element = element.parentElement;
  return getComputedStyle(element).backgroundColor;
};
const all = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility(
  { visibilityProperty: true }) && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
  && e.tagName !== "SCRIPT" && e.tagName !== "OPTION");
const words = all.map((e) => [ratio(getComputedStyle(e).color, paper(e)), e.outerHTML]);
const edges = ["drawn", "soft", "remasked"].flatMap((state) =>
  [...document.querySelectorAll(`.grid [data-state=${state}]`)].map((e) =>
    [ratio(getComputedStyle(e).borderTopColor, paper(document.body)), e.outerHTML]));
const low = (list) => list.sort((a, b) => a[0] - b[0])[0];
return [low(words), words.length, low(edges), edges.length];"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_borders_stand_out_in_light_and_dark(browser, tmp_path, scheme):
    start, entries = decoded(40, 9, 3, seed=3, given=5)
    opened(browser, tmp_path, write(tmp_path / "a.jsonl", start, entries))
    emulate(browser, color_scheme=scheme)
    to_step(browser, 6)
    hover(browser, next(soft[0] for soft in entries[5]["soft"]))
    states = {state for state, _ in browser.execute_script(CELLS)[0]}
    assert states == {"given", "soft", "drawn", "token", "remasked"}
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    word, words, edge, edges = browser.execute_script(CONTRAST)
    assert words > 40 and word[0] >= 4.5, word
    assert edges > 5 and edge[0] >= 3, edge


def test_a_phone_shows_all_without_scrolling_sideways(browser, tmp_path):
    long = {1: "x" * 300, 2: " " * 90, 3: "\n" + " " * 90, MASK: "[MASK]"}
    start, entries = decoded(60, 9, 3, seed=2)
    texts = {i: f" word{i}" for i in range(100)} | long
    entries.append({"step": 9, "drawn": [[0, 1], [1, 2], [2, 3]]})
    emulate(browser, width=360, height=740)
    opened(
        browser, tmp_path, write(tmp_path / "a.jsonl", start, entries, spell=partial(say, texts))
    )
    for step in (0, 5, 10):
        to_step(browser, step)
        width = "return [document.documentElement.scrollWidth, innerWidth]"
        assert browser.execute_script(width) == [360, 360]


def test_who_wants_less_motion_gets_a_slow_pace_and_no_animation(browser, tmp_path):
    emulate(browser, reduced_motion="reduce")
    opened(browser, tmp_path, write(tmp_path / "a.jsonl", *decoded(10, 5, 2, seed=1)))
    assert browser.find_element("id", "speed").get_property("value") == "2"
    to_step(browser, 3)
    assert browser.execute_script("return document.getAnimations().length") == 0


def test_a_page_of_256_positions_and_256_steps_opens_and_steps(browser, tmp_path):
    start, entries = decoded(256, 256, 3, seed=4)
    file = write(tmp_path / "a.jsonl", start, map(dict, entries), {"nfe": 256, "k": 3})
    opened(browser, tmp_path, file)
    took = """const [nav] = performance.getEntriesByType("navigation"), times = [];
      for (let i = 0; i <= 256; i += 4) {
        const begin = performance.now(); go(i); document.body.offsetHeight;
        times.push(performance.now() - begin);
      }
      times.sort((a, b) => a - b);
      return [nav.loadEventEnd, times[32], times[64]]"""
    load, median, longest = browser.execute_script(took)
    size = (tmp_path / "page.html").stat().st_size
    print(f"loaded in {load:.0f} ms, a step {median:.1f} ms (longest {longest:.1f}), {size} bytes")
    assert browser.execute_script(CELLS) == [replay(start, entries, 256)]
    nodes = "return document.querySelectorAll('*').length"
    many = browser.execute_script(nodes)
    to_step(browser, 100)
    assert browser.execute_script(nodes) == many  # cells are filled again, not made again


# Reading


@pytest.fixture
def file(tmp_path):
    """Three samples, whose entries take turns."""
    start, entries = decoded(12, 6, 2, seed=5, given=2)
    runs = [entries, *(decoded(12, 6, 2, seed=s, given=2)[1] for s in (6, 7))]
    turns = [{**entry, "sample": i} for step in zip(*runs) for i, entry in enumerate(step)]
    return write(tmp_path / "a.jsonl", start, turns)


def test_a_sample_is_found_among_others_with_the_texts_that_others_brought(file):
    traces = [tracing.read_trace(file, i) for i in range(3)]
    assert len({json.dumps(trace["steps"]) for trace in traces}) == 3
    for trace in traces:
        assert [step[0] for step in trace["steps"]] == list(range(6))
        assert trace["mask"] == MASK and trace["left_out"] == []
        used = {i for step in trace["steps"] for i in step[2][1::2]}
        assert used <= trace["texts"].keys() and trace["texts"][MASK] == "[MASK]"
    with pytest.raises(ValueError, match="no step of sample 3; samples that have any: 0, 1, 2"):
        tracing.read_trace(file, 3)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"nothing", b"{}\n", b"[1]\nnull\n", b'{"trace": 2, "start": [1], "texts": {}}\n',
     b'{"trace": 1, "start": [], "texts": {}}\n', b"[" * 100_000, b"\xff\x00\x80", b"9" * 9999],
)  # fmt: skip
def test_a_file_that_is_no_trace_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"a: no trace of sample\.py --trace"):
        tracing.read_trace(tmp_path / "a")


def test_a_trace_without_steps_is_an_error_of_one_line(file):
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="no step of sample 0; samples that have any: none"):
        tracing.read_trace(file)


def test_what_a_killed_run_left_is_drawn_and_the_rest_told(file, tmp_path, capsys):
    whole = tracing.read_trace(file)
    file.write_bytes(file.read_bytes()[: -len(file.read_bytes().splitlines()[-3]) // 2 * 5])
    trace = tracing.read_trace(file)
    assert 0 < len(trace["steps"]) < 6 and trace["steps"] == whole["steps"][: len(trace["steps"])]
    (torn,) = trace["left_out"]
    command(file, "--out", tmp_path / "page.html")
    told = capsys.readouterr()
    assert told.err == f"{file}: left out, damaged or of another form: line {torn}\n"
    assert f"{len(trace['steps'])} steps" in told.out


DAMAGE = [
    ("step", "1"), ("step", None), ("step", -1), ("step", True), ("step", 0), ("t", float("nan")),
    ("t", 10**400), ("drawn", 5), ("drawn", [[0]]), ("drawn", [[12, 1]]), ("drawn", [[-1, 1]]),
    ("drawn", [[0, 2.5]]), ("remasked", [99]), ("remasked", "0"), ("soft", [[0, 0.5]]),
    ("soft", [[0, 0.5, -1, [1, 2], [0.5]]]), ("soft", [[0, float("inf"), -1, [1], [1]]]),
    ("soft", {"a": 1}), ("texts", []), ("texts", {"a": "x"}), ("texts", {"1": 2}),
    ("sample", [0]),
]  # fmt: skip


@pytest.mark.parametrize("key, value", DAMAGE)
def test_a_damaged_line_is_left_out_and_the_others_are_drawn(file, key, value):
    lines = file.read_text().splitlines()
    line = json.loads(lines[7])  # the third step of sample 0
    assert (line["sample"], line["step"]) == (0, 2)
    lines[7] = json.dumps(line | {key: value})
    file.write_text("\n".join(lines))
    trace = tracing.read_trace(file)
    assert trace["left_out"] == [8] and [s[0] for s in trace["steps"]] == [0, 1, 3, 4, 5]
    assert "left_out" in tracing.page([trace])


def test_a_second_run_in_the_same_file_is_left_out(file):
    once = tracing.read_trace(file)
    file.write_bytes(file.read_bytes() * 2)
    twice = tracing.read_trace(file)
    assert twice["steps"] == once["steps"] and len(twice["left_out"]) == 7


def test_noise_is_drawn_or_refused_but_never_a_crash(file):
    rng, good = random.Random(0), file.read_bytes()
    values = [None, True, -1, 0, 1e300, float("nan"), "x", "\ud800", [], {}, [[]], [[0, 0]], 2**70]

    def spoil(thing):
        if rng.random() < 0.02:
            return rng.choice(values)
        if isinstance(thing, dict):
            return {k: spoil(v) for k, v in thing.items() if rng.random() > 0.01}
        return [spoil(v) for v in thing] if isinstance(thing, list) else thing

    drawn = 0
    for i in range(300):
        noise = bytearray(good)
        if i % 2:
            for _ in range(rng.randrange(1, 30)):
                noise[rng.randrange(len(noise))] = rng.randrange(256)
        else:
            noise = "\n".join(
                json.dumps(spoil(json.loads(li))) for li in good.splitlines()
            ).encode()
        file.write_bytes(noise)
        try:
            tracing.page([tracing.read_trace(file)])
            drawn += 1
        except ValueError as error:
            assert "\n" not in str(error)
    assert drawn > 50


def test_the_page_replaces_what_was_there_and_is_never_one_of_its_traces(file, tmp_path):
    out = tmp_path / "new" / "page.html"
    command(file, "--out", out, "--sample", 1)
    first = out.read_bytes()
    command(file, "--out", out, "--sample", 2)
    assert out.read_bytes() != first and [p.name for p in out.parent.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match="the same file as another"):
        command(file, "--out", file)
    with pytest.raises(ValueError, match="no step of sample 9"):
        command(file, "--out", out, "--sample", 9)
    (tmp_path / "blocked").write_text("")
    with pytest.raises(OSError, match="--out"):
        command(file, "--out", tmp_path / "blocked" / "page.html")


def test_no_token_can_end_the_element_that_holds_the_data(tmp_path):
    texts = dict(enumerate(HOSTILE)) | {MASK: "[MASK]"}
    entries = [{"step": 0, "drawn": [[p, p] for p in range(len(HOSTILE))]}]
    file = write(tmp_path / "a.jsonl", [MASK] * len(HOSTILE), entries, spell=partial(say, texts))
    page = tracing.page([tracing.read_trace(file)])
    data = page.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data) and data.isascii()
    assert json.loads(data)[0]["texts"] == {str(i): text for i, text in texts.items()}


def test_the_same_traces_give_the_same_page(file):
    assert tracing.page([tracing.read_trace(file)]) == tracing.page([tracing.read_trace(file)])

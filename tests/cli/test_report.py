"""`qft-hf report` writes one self-contained page with the figures that runs have recorded."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from qft_hf.hf.page import PAGE
from qft_hf.hf.report import LEFT, N_COLORS, OTHERS, page, read_run, read_runs
from qft_hf_cli import main

HISTORY = [
    {"step": 0, "eval_loss": 4.0},
    *({"step": s, "loss": 4.0 - s / 4, "learning_rate": 1e-4 * s, "qft/codes_moved": s / 9}
      for s in range(1, 9)),
    {"step": 4, "eval_loss": 3.25},
    {"step": 9, "loss": float("nan")},
    {"step": 9, "eval_loss": None},
]  # fmt: skip


class Tags(HTMLParser):
    """Collect the tags of a page, and assert that they are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def leave(folder, history=HISTORY, options=None, **changes):
    """Write what a finished run of 1,000 parameters leaves."""
    folder.mkdir(parents=True)
    codes = [0] * 255
    codes[127], codes[254] = 90, 10
    summary = {
        "model": "org/base",
        "parameters": 1_000,
        "steps": 9,
        "trained_tokens": 4_096,
        "tokens_per_second": 512.0,
        "peak_memory": {"bytes": 2_500_000_000, "what": "CUDA memory allocated"},
        "state_bytes": {
            "INT8 weights": 1_000,
            "outliers": 60,
            "gradients": 1_016,
            "momentum": 1_020,
        },
        "before": {"loss": 4.0},
        "after": {"loss": 3.25},
        "sampled": {
            "codes_before": codes,
            "codes_after": codes[::-1],
            "changed": {
                "model.embed_tokens.weight": 0.04,
                "model.layers.0.mlp.up_proj.weight": 0.875,
                "model.layers.1.mlp.up_proj.weight": 0.75,
            },
        },
        **changes,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "run.yaml").write_text(
        yaml.safe_dump(options or {"learning_rate": 1e-4, "task": "chat"})
    )
    return folder


@pytest.fixture
def runs(tmp_path):
    other = {"learning_rate": 3e-4, "task": "chat", "packing": True}
    return [leave(tmp_path / "first"), leave(tmp_path / "<b>&", options=other)]


def test_the_page_needs_nothing_else_and_is_whole(runs, tmp_path):
    main(["report", *map(str, runs), "--output", str(tmp_path / "out" / "page.html")])
    text = (tmp_path / "out" / "page.html").read_text()

    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object"}
    assert not [attrs for _, attrs in tags.seen if {"src", "href"} & set(attrs)]
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in text.lower().replace("nano", "")
    assert "<b>" not in text  # the name of a folder


def test_curves_have_a_point_for_each_number_that_was_logged(runs):
    text = page([read_run(runs[0])])
    losses = text[text.index("<h2>Loss") : text.index("<h2>Learning rate")]
    (points,) = re.findall(r"<polyline class='run0' points='([^']*)'", losses)
    xs, ys = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
    assert len(xs) == 8  # without the one that is not a number
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # the loss falls, and down is up in SVG
    assert losses.count("<circle") == 2
    assert "evaluation: 3.25" in losses


def test_steps_on_an_axis_are_whole(runs):
    state = runs[0] / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"]
    state.write_text(json.dumps({"log_history": [h for h in history if h["step"] <= 2]}))
    text = page([read_run(runs[0])])
    losses = text[text.index("<h2>Loss") : text.index("<h2>Learning rate")]
    labels = re.findall(r"text-anchor='middle'>([^<]*)<", losses)
    assert labels == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("low", "high"), [(0.000846, 0.0008492), (1.0000012, 1.0000023), (2e-9, 3e-9), (-4e6, 8e6)]
)
def test_labels_of_values_that_are_small_or_close_differ_and_have_room(low, high, tmp_path):
    """`0.000846` was cut off at the left, and scales near 1 had the label 1 five times."""
    history = [{"step": 1, "qft/scale_growth": low}, {"step": 2, "qft/scale_growth": high}]
    text = page([read_run(leave(tmp_path / "run", history))])
    health = text[text.index("<h2>Health") : text.index("<h2>Codes")]
    values = re.findall(r"text-anchor='end'>([^<]*)<", health)
    assert 3 <= len(set(values)) == len(values)
    assert all(7 * len(value) <= LEFT - 6 for value in values)


@pytest.mark.parametrize("first", [0, 12_340, 123_450, 3_000_000])
def test_labels_of_an_axis_differ_and_have_room(first, tmp_path):
    """From step 10,000 on, several labels were 1.234e+04, and that of a loss of 1e6 was cut."""
    history = [{"step": first + n, "loss": first // 100 + n / 2} for n in range(11)]
    text = page([read_run(leave(tmp_path / "run", history))])
    losses = text[text.index("<h2>Loss") : text.index("<h2>Learning rate")]
    steps = re.findall(r"text-anchor='middle'>([^<]*)<", losses)
    assert [int(step.replace(",", "")) for step in steps] == list(range(first, first + 11, 2))
    values = re.findall(r"text-anchor='end'>([^<]*)<", losses)
    assert [float(value) for value in values] == [first // 100 + n for n in range(6)]
    assert all(7 * len(value) <= LEFT - 6 for value in values)  # a digit has 7 pixels or fewer
    spike = leave(tmp_path / "spike", [{"step": 1, "loss": 1e6}])
    assert "text-anchor='end'>1000000</text>" in page([read_run(spike)])


def test_more_runs_than_colors_are_told_apart(tmp_path):
    """The seventh run once looked like the first."""
    runs = [read_run(leave(tmp_path / f"run-{n}")) for n in range(18)]
    text = page(runs)
    losses = text[text.index("<h2>Loss") : text.index("<h2>Learning rate")]
    in_legend = re.findall(r"<i class='swatch ([^']*)'></i>run-", losses)
    assert len(set(in_legend)) == 18
    assert re.findall(r"<polyline class='([^']*)'", losses) == in_legend
    for look in ("dashed", "dotted"):
        assert all(f"{tag}.{look}" in text for tag in ("polyline", "circle", ".swatch"))
    assert "polyline.dotted, circle.dotted { stroke-dasharray" in text  # circles differ, too


def test_a_long_name_is_shortened_beside_its_bar_and_whole_elsewhere(tmp_path):
    """Its beginning was once cut off, and the page was wider than the window."""
    name = "smollm2-lion-lr1e-5-cosine-batch32-accumulate4-seed1-2026-11-30T20-33-11"
    text = page([read_run(leave(tmp_path / name))])
    memory = text[text.index("<h2>Memory") : text.index("<h2>Health")]
    assert f"<text x='222' y='17' text-anchor='end'>…{name[-29:]}<title>{name}</title>" in memory
    assert "<title>FP32 Adam</title>" in memory
    assert "h1, h3, figcaption, .name { overflow-wrap: anywhere; }" in text
    assert text.count(f"</i>{name}</span>") == 5  # runs, three legends, configuration


def test_values_that_are_no_numbers_are_counted(tmp_path):
    """A run whose losses were all NaN was once said to have logged nothing."""
    bad = [{"step": n, "loss": float("nan"), "grad_norm": float("inf")} for n in range(1, 4)]
    bad += [{"step": 3, "eval_loss": None}]
    folders = [leave(tmp_path / "bad", bad), leave(tmp_path / "good", HISTORY[:9])]
    for runs in (folders[:1], folders):
        text = page([read_run(folder) for folder in runs])
        losses = text[text.index("<h2>Loss") : text.index("<h2>Learning rate")]
        health = text[text.index("<h2>Health") : text.index("<h2>Codes")]
        for part, count in ((losses, 4), (health, 3)):
            assert f"infinite or not a number are not drawn: {count} of bad.</p>" in part
            assert "Nothing was logged" not in part
            assert ("<svg" in part) == (len(runs) == 2)


def test_the_only_value_of_training_is_no_point_of_an_evaluation(tmp_path):
    history = [{"step": 1, "loss": 4.0}, {"step": 1, "eval_loss": 3.0}]
    text = page([read_run(leave(tmp_path / "run", history))])
    losses = text[text.index("<h2>Loss") : text.index("<h2>Learning rate")]
    (points,) = re.findall(r"<polyline class='run0' points='([^']*)'", losses)
    (x, y), (end, same) = (map(float, point.split(",")) for point in points.split())
    assert (end - x, same) == (10, y)
    assert losses.count("<circle") == 1


def test_bars_are_as_long_as_the_bytes(runs):
    text = page([read_run(runs[0])])
    memory = text[text.index("<h2>Memory") : text.index("<h2>Health")]
    bars = re.findall(
        r"width='([\d.]+)' height='18' class='kind(\d)([^']*)'><title>[^:]*: (.*?)<", memory
    )
    widths = {(mark, value): float(width) for width, _, mark, value in bars}
    assert [value for _, _, mark, value in bars if not mark] == ["1.06", "1.02", "1.02"]
    assert len([mark for _, _, mark, _ in bars if mark == " arithmetic"]) == 3 * len(OTHERS)
    for (_, value), width in widths.items():
        # A label has two decimals, and a width has one.
        assert width / 460 * 16 == pytest.approx(float(value), abs=0.005 + 0.05 / 460 * 16)
    assert ">16.00<" in memory


def test_what_was_set_differently_is_shown_and_nothing_else(runs):
    text = page([read_run(run) for run in runs])
    differences = text[text.index("<h2>Differences") :]
    assert "<td>learning_rate</td><td>0.0001</td><td>0.0003</td>" in differences
    assert "<td>packing</td><td><i>default</i></td><td>True</td>" in differences
    assert "task" not in differences
    alone = page([read_run(runs[0])])
    assert "<td>task</td><td>chat</td>" in alone[alone.index("<h2>Configuration") :]
    assert "Differences" not in alone


def test_layers_are_rows_and_modules_are_columns(runs):
    text = page([read_run(runs[0])])
    heat = text[text.index("<h2>Movement") : text.index("<h2>Configuration")]
    assert "<th>layer</th><th>model.embed_tokens</th><th>mlp.up_proj</th>" in heat
    assert re.search(r"model\.layers\.1</td><td></td><td><span[^>]*>75\.0 %", heat)
    codes = text[text.index("<h2>Codes") : text.index("<h2>Movement")]
    assert codes.count("<circle") == 2  # two values, before


def contrast(one, other):
    """WCAG 2.2, "contrast ratio", of two colors with values from 0 to 255."""

    def luminance(color):
        parts = [value / 255 for value in color]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(scheme):
    """On the darkest cells of the dark scheme the ratio was 3.6; WCAG 2.2 wants 4.5."""
    block = re.findall(r"  :root {{(.*?)}}|^:root {{(.*?)}}", PAGE, flags=re.DOTALL | re.MULTILINE)
    block = "".join(block[scheme == "dark"])
    colors = {
        name: [int(value[place : place + 2], 16) for place in (0, 2, 4)]
        for name, value in re.findall(r"--(\w+): #(\w{6})", block)
    }
    share = int(re.search(r"var\(--k0\) calc\(var\(--share\) \* (\d+)%\), var\(--panel", PAGE)[1])
    parts = zip(colors["k0"], colors["panel"], strict=True)
    full = [(share * hue + (100 - share) * panel) / 100 for hue, panel in parts]
    for text, ground in (("ink", full), ("ink", colors["ground"]), ("faint", colors["ground"])):
        assert contrast(colors[text], ground) >= 4.5, text
    lines = [colors[name] for name in colors if re.fullmatch(r"[ck]\d", name)]
    assert len(lines) == N_COLORS + 3
    assert min(contrast(line, colors["ground"]) for line in lines) >= 3  # what is no text


def test_a_run_that_logged_nothing_has_a_page_too(tmp_path):
    folder = leave(tmp_path / "run", [], before=None, after=None, sampled={}, state_bytes={})
    text = page([read_run(folder)])
    assert text.count("Nothing was logged.") == 3
    assert text.count("Nothing was sampled.") == 2
    assert "all parameters" not in text  # a run may train a side network, or the text part alone


def test_a_folder_without_a_run_says_what_to_give(tmp_path, refused):
    assert "holds no finished run: it has no summary.json" in refused("report", tmp_path)


@pytest.mark.parametrize(
    "taken", ["folder of a run", "summary of a run", "page of another program", "page"]
)
def test_the_page_takes_the_place_of_an_earlier_one_alone(taken, runs, refused):
    """A run whose folder was named as the output was once lost."""
    first, second = runs
    (second / "index.html").write_text('<!doctype html>\n<html lang="en">\n<p>my notes')
    names = {"folder of a run": "", "summary of a run": "summary.json"}
    output = None if taken == "page" else second / names.get(taken, "index.html")
    words = ["report", str(first), "--output", str(output or first / "page.html")]
    if taken == "page":
        main(["report", str(second), "--output", words[-1]])
        main(words)
        assert "<title>first: " in (first / "page.html").read_text()
        return
    before = {path: path.read_bytes() for path in second.iterdir()}
    assert "exists already and is not a report. Give --output" in refused(*words)
    assert {path: path.read_bytes() for path in second.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("summary.json", "{", "summary.json cannot be read"),
        ("trainer_state.json", "", "trainer_state.json cannot be read"),
        ("run.yaml", "a: [", "run.yaml cannot be read"),
        ("run.yaml", "", "run.yaml does not hold keys with values"),
        ("summary.json", "[]", "summary.json is not a JSON object"),
        ("summary.json", "{}", "recorded less: summary.json has no model, "),
        ("trainer_state.json", "{}", "trainer_state.json has no log_history"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(name, text, said, runs, refused):
    """Such a run once ended the command in a traceback."""
    (runs[1] / name).write_text(text)
    error = refused("report", *runs)
    assert said in error
    assert "Leave this run out" in error


def test_runs_whose_folders_are_called_the_same_are_told_apart(tmp_path):
    folders = [leave(tmp_path / place / "run") for place in ("a", "b")]
    folders += [leave(tmp_path / "other")]
    names = [run.name for run in read_runs(folders)]
    assert names == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), "other"]


def test_a_loss_has_the_unit_of_its_task(tmp_path):
    """Squared errors were once shown in nats."""
    chats, scores = (leave(tmp_path / task, task=task) for task in ("chat", "regression"))
    runs = {"chat": [chats], "regression": [scores], "both": [chats, scores]}
    units = {
        name: re.search(r"Points: evaluation\. In ([^.]*)\.<", page(list(map(read_run, folders))))[
            1
        ]
        for name, folders in runs.items()
    }
    assert units == {
        "chat": "nats",
        "regression": "the squared unit of the labels",
        "both": "nats; regression: the squared unit of the labels",
    }


@pytest.mark.parametrize(
    ("key", "note"),
    [("loss", "Lines: training. In nats."), ("eval_loss", "Points: evaluation. In nats.")],
)
def test_the_note_of_the_loss_names_what_is_drawn(key, note, tmp_path):
    """The note once mentioned points of an evaluation if there was none."""
    run = leave(tmp_path / "run", history=[{"step": n, key: 4.0 - n} for n in (1, 2)])
    assert f"<p class='note'>{note}</p>" in page([read_run(run)])


def test_a_score_that_a_run_has_not_is_empty_and_one_that_is_no_number_is_called_so(tmp_path):
    """Both scores were once shown as "- → -"."""
    folders = [
        leave(tmp_path / "chat", before={"loss": 4.0}, after={"loss": 3.0}),
        leave(
            tmp_path / "regression",
            before={"loss": 2.0, "pearson": None},
            after={"loss": 1.5, "pearson": 0.25},
        ),
        leave(tmp_path / "unscored", before=None, after=None),
    ]
    text = page([read_run(folder) for folder in folders])
    rows = re.findall(r"<tr>(.*?)</tr>", text[: text.index("<h2>Loss")])[1:]
    assert [re.findall(r"<td>([^<]*)</td>", row)[-2:] for row in rows] == [
        ["4 → 3", ""],
        ["2 → 1.5", "undefined → 0.25"],
        ["", ""],
    ]


def test_a_run_that_trained_a_part_of_its_model_says_which_share(tmp_path):
    """A vision-language model was shown as if all of it had been trained."""
    sizes = {"parameters": 3_000_000}
    for name, n_trained in (("whole", 3_000_000), ("part", 2_120_000)):
        leave(tmp_path / name, trained_parameters=n_trained, **sizes)
    leave(tmp_path / "old", **sizes)
    text = page([read_run(tmp_path / name) for name in ("whole", "part", "old")])
    assert text.count(">3.0 M<") == 2
    assert text.count(">2.12 of 3.0 M<") == 1

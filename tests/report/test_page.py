"""Tests of report.html: it has every plot and table, loads nothing, and no text of a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimae.data.loading.batch import Spent
from mimae.data.loading.stalls import Feed, diagnose
from mimae.report import plots
from mimae.report.findings import findings
from mimae.report.page import page
from mimae.report.runs import read
from mimae.telemetry.accounts import Stragglers
from tests.report.conftest import MakeRun, epoch_record, lines, step_record

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></script><svg onload=alert(1)>",
    "&lt;b&gt;",
    "a\x1b[31mb\x00c",
    "\u202egnp.exe",
    "שלום",
)


class Elements(HTMLParser):
    """A parser that collects the elements of a page, with attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("img", "input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} ends where another element is open"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_part_of_a_run_is_on_its_page(make_run: MakeRun) -> None:
    scores = {"linear": 0.8, "few_labels": 0.7, "knn": 0.75}
    run = make_run()
    (run / "probe.json").write_text(json.dumps({"few_labels": 200, "features": {"this run": scores}}))
    (run / "bad_samples.jsonl").write_text(lines([{"id": 1, "path": "a.jpg", "reason": "truncated"}]))
    made = page(read(run))
    found = Elements(made)
    assert not found.open, "every element ends"
    titles = re.findall(r"<h2>(.*?)</h2>", made)
    assert titles == [
        *("Training", "Information plane", "Health and measures", "Reconstructions through training"),
        *("Speed and memory", "Probe", "Events", "Samples that could not be read", "Environment", "Recipe"),
    ]
    plotted = re.findall(r"<figcaption><strong>(.*?)</strong>", made)
    assert plotted[:6] == ["loss", "rec", "max_mi", "gate", "learning rate", "gradient norm"]
    assert {"throughput", "waiting for data", "where the time goes", "peak memory", "knn"} <= set(plotted)
    for told in ("finished after 300 steps", "0.800", "a.jpg", "truncated", "packages.torch", "objective.max_mi"):
        assert told in found.text
    assert found.tags["img"] == 2


def test_a_page_asks_nothing_from_outside_and_runs_its_own_script_only(make_run: MakeRun) -> None:
    made = page(read(make_run()))
    for name, value in Elements(made).attributes:
        assert name not in ("href", "srcset", "action") and not name.startswith("on")
        assert name != "src" or value.startswith("data:image/jpeg;base64,")
    assert "url(" not in made and "@import" not in made
    *_, script = re.findall(r"<script>(.*?)</script>", made, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#x27;sha256-{digest}&#x27;" in made


def test_no_text_of_a_run_becomes_markup(make_run: MakeRun) -> None:
    strange = dict.fromkeys(HOSTILE, 0.5)

    def made(name: str, columns: dict[str, float], names: tuple[str, ...]) -> str:
        run = make_run(
            name,
            steps=[step_record(step, **columns) for step in (1, 2)],
            epochs=[epoch_record(epoch, **{f"m{key}": value for key, value in columns.items()}) for epoch in (0, 1)],
        )
        kinds = [{"time": name, "step": name, "kind": "fault", "details": {name: name}} for name in names]
        last = {"time": "", "step": 2, "kind": "error", "details": {"error": names[0], "message": names[1]}}
        (run / "events.jsonl").write_text(lines([*kinds, last]))
        (run / "bad_samples.jsonl").write_text(lines({"id": 1, "path": name, "reason": name} for name in names))
        (run / "environment.json").write_text(json.dumps({name: {name: name} for name in names}))
        features = {name: {"knn": name} for name in names}
        (run / "probe.json").write_text(json.dumps({"few_labels": names[0], "features": features}))
        (run / "config.yaml").write_text(f"seed: {json.dumps(names[0])}\n")
        return page(read(run))

    plain = Elements(made("plain", {f"name{place}": 0.5 for place in range(len(strange))}, tuple("abcdefg")))
    found = Elements(made("strange", strange, HOSTILE))
    assert found.tags == plain.tags
    assert {name for name, _ in found.attributes} == {name for name, _ in plain.attributes}
    for name in HOSTILE[:4]:
        assert name in found.text
    assert "a\\x1b[31mb\\x00c" in found.text and "\\u202egnp.exe" in found.text and "שלום" in found.text


def test_pictures_that_are_none_are_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (run / "images/step-00000400.png").write_bytes(b"no picture")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    os.symlink(secret, run / "images/step-00000500.png")
    Image.new("L", (9_000, 9_000)).save(run / "images/step-00000600.png")
    (run / "images/step-00000700.png").mkdir()
    assert Elements(page(read(run))).tags["img"] == 2


def test_a_task_of_any_kind_has_a_page(make_run: MakeRun) -> None:
    """A classifier has other columns, no pictures, no information plane."""
    common = {"lr": 1e-3, "grad_norm": 1.0, "images_per_s": 100.0, "data_wait": 0.0}
    run = make_run(
        steps=[
            {"step": step, "epoch": 0.1, "loss": 2.0 / step, "accuracy": 0.1 * step, **common} for step in (1, 2, 3)
        ],
        epochs=[{"epoch": epoch, "step": 3, "seconds": 1.0, "val_accuracy": 0.5} for epoch in range(2)],
    )
    for picture in (run / "images").iterdir():
        picture.unlink()
    made = page(read(run))
    assert re.findall(r"<figcaption><strong>(.*?)</strong>", made) == [
        *("loss", "accuracy", "learning rate", "gradient norm", "val_accuracy", "throughput", "waiting for data"),
    ]
    assert "Information plane" not in made and "Reconstructions" not in made


def test_a_measure_of_every_other_epoch_is_a_line_and_a_lone_point_a_dot(make_run: MakeRun) -> None:
    epochs = [epoch_record(epoch, mfu=None, knn=None if epoch % 2 else 0.5 + epoch / 10) for epoch in range(5)]
    epochs[2]["mfu"] = 0.4
    made = page(read(make_run(epochs=epochs)))
    shapes = dict(re.findall(r'<strong>(knn|MFU)</strong>.*?(<path class="line.*?)</svg>', made, re.DOTALL))
    assert shapes["knn"].count("L") == 2 and "point" not in shapes["knn"]
    assert re.search(r'class="point tone0" d="M[\d. ]+h0"', shapes["MFU"])


def test_a_run_with_nothing_in_it_has_a_page(make_run: MakeRun) -> None:
    run = make_run()
    for name in ("metrics.jsonl", "epochs.jsonl", "events.jsonl"):
        (run / name).write_text("")
    assert "no step logged yet" in page(read(run))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seconds", [0.0, None])
def test_epochs_without_a_time_have_no_phases(make_run: MakeRun, seconds: float | None) -> None:
    run = make_run(epochs=[epoch_record(epoch, seconds=seconds) for epoch in range(3)])
    assert "where the time goes" not in page(read(run))


def test_an_event_may_lack_its_step(make_run: MakeRun) -> None:
    run = make_run(epochs=[epoch_record(epoch, seconds_data=90.0) for epoch in range(3)])
    (run / "events.jsonl").write_text(lines([{"kind": "warning", "details": {"what": "slow", "waited": 0.4}}]))
    assert "waiting for data. The run&#x27;s own diagnosis: slow." in page(read(run))


@pytest.mark.slow  # a hundred thousand lines are written and read
def test_a_page_of_a_long_run_is_small_and_soon_made(make_run: MakeRun) -> None:
    random = np.random.default_rng(0)
    losses = random.standard_normal(100_000).tolist()
    run = make_run(
        steps=(step_record(step, loss=loss) for step, loss in enumerate(losses, 1)),
        epochs=(epoch_record(epoch) for epoch in range(1_600)),
    )
    noise = Image.fromarray(random.integers(0, 256, (600, 1_000, 3), dtype=np.uint8))
    for epoch in range(40):  # a picture that no format makes small
        noise.save(run / f"images/step-{epoch:08d}.png")
    began = time.process_time()
    made = page(read(run))
    assert time.process_time() - began < 20
    assert len(made.encode()) < 5_000_000 and Elements(made).tags["img"] > 1


def test_findings_name_what_is_wrong_with_a_run(make_run: MakeRun) -> None:
    epochs = [epoch_record(0, seconds=200.0, seconds_data=60.0, seconds_checkpoint=20.0, effective_rank=1.1)]
    run = make_run(steps=[step_record(1), step_record(2, rec=None)], epochs=epochs)
    kinds = ("resume", "skipped", "skipped", "save failed", "fault")
    (run / "events.jsonl").write_text(lines({"kind": kind, "step": 1, "details": {}} for kind in kinds))
    told = [finding.text for finding in findings(read(run))]
    for words in (
        "2 steps were skipped",
        "Not finite at the last logged step: rec",
        "1 save of a checkpoint failed",
        "effective rank is 1.10",
        "30% of the time went into waiting for data",
        "10% of the time went into saving",
        "resumed 1 time.",
    ):
        assert any(words in text for text in told), (words, told)
    assert findings(read(make_run("good")))[0].text.startswith("Nothing stands out")


def test_each_cause_of_a_slow_run_is_named(make_run: MakeRun) -> None:
    """A slow rank, a slow disk and a small cache are known from the run's warnings, slow cores from its figures.

    Of several diagnoses of waiting, that of the longest waiting is repeated, beside strange ones.
    """
    feed = Feed(100.0, 60.0, 60.0, Spent(180.0, 10.0, 5.0), 2, 2, "torch", None)
    slow = [{"seconds": 100.0, "exposed_communication": 0.3}, {"seconds": 100.0, "exposed_communication": 0.1}]
    causes: dict[str, tuple[dict[str, object], str]] = {
        "slow disk": (
            diagnose(feed)._asdict(),
            "storage is slow (92% of the work of 2 workers is reading); set data.cache=",
        ),
        "slow rank": (
            {"what": Stragglers().verdict(slow)},
            "Rank 1 is a straggler, and the others wait for it 20% of a step",
        ),
        "small cache": (
            {"what": "the cache is too small: data.cache=encoded holds 1 of 4 samples"},
            "The cache is too small",
        ),
    }
    for name, (details, words) in causes.items():
        run = make_run(name, epochs=[epoch_record(epoch, seconds_data=40.0) for epoch in range(3)])
        event = {"kind": "warning", "step": 300, "details": details}
        (run / "events.jsonl").write_text(lines([event]))
        assert any(words in finding.text for finding in findings(read(run))), name
    run = make_run("later", epochs=[epoch_record(epoch, seconds_data=40.0) for epoch in range(3)])
    warned: list[dict[str, object]] = [{"what": "strange", "waited": value} for value in (None, math.nan, "0.9", [1])]
    warned[1:1] = [diagnose(feed._replace(stalled=stalled))._asdict() for stalled in (3.9, 60.0, 7.0)]
    (run / "events.jsonl").write_text(
        lines({"kind": "warning", "step": step, "details": details} for step, details in enumerate(warned))
    )
    told = [finding.text for finding in findings(read(run))]
    assert any("at step 2: the device waited for data 60.0%" in text for text in told) and len(told) == 1, told
    throttled = make_run("throttled", epochs=[epoch_record(0, cpu_limited=0.6, cpu_waiting=0.7, cpu_hot=None)])
    told = [finding.text for finding in findings(read(throttled))]
    assert any("in 60% of the time the limit of its control group held it back" in text for text in told)


STAGE_OF_EPOCH = (0, 0, 0, 1, 1, 2, 2, 2, 2)


def test_larger_images_are_no_fault_of_the_machine(make_run: MakeRun) -> None:
    """Epochs of the last size alone are compared: with each size a step is slower and takes more memory."""

    def record(epoch: int, slower: float = 1.0) -> dict[str, Any]:
        size = STAGE_OF_EPOCH[epoch]
        return epoch_record(epoch, images_per_s=(900, 400, 100)[size] / slower, mem_peak_bytes=2 ** (28 + 2 * size))

    def told(name: str, last: float) -> list[str]:
        steps = [
            step_record(step, image_size=(16, 24, 32)[STAGE_OF_EPOCH[(step - 1) // 100]]) for step in range(10, 910, 10)
        ]
        run = make_run(name, steps=steps, epochs=[*map(record, range(8)), record(8, last)])
        return [finding.text for finding in findings(read(run))]

    (nothing,) = told("grown", 1.0)
    assert nothing.startswith("Nothing stands out")
    assert any("last epoch ran at 50 images/s, 50% below" in text for text in told("slow", 2.0))


def test_the_recipe_tells_where_each_value_was_set(make_run: MakeRun) -> None:
    run = make_run(overrides=("seed=3",))
    assert "set by" not in page(read(run))
    origins = {
        "seed": "override",
        "model.width": "/mnt/sets/quickstart.yaml:13",
        "precision": "default",
        "data.loader": ["<b>"],
    }
    (run / "origins.json").write_text(json.dumps(origins))
    found = {value.key: value.origin for value in read(run).settings}
    assert (found["seed"], found["model.width"], found["precision"]) == ("override", "quickstart.yaml:13", "")
    made = page(read(run))
    assert "set by" in made and "/mnt/sets" not in made and "<b>" not in made


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-3.2, 17.0), (1e-9, 2e-9), (0.0, 5e-324), (7.0, 7.0), (0.0, 0.0), (-1e190, 1e190), (0.5, 1e6)],
)
@pytest.mark.parametrize("zero", [False, True])
def test_ticks_are_few_and_inside_of_the_axis(low: float, high: float, zero: bool) -> None:
    # Most values near the least one: a wide range is logarithmic then.
    axis = plots.scale(np.array([low, low, high]), zero)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 8
    places = axis.places(np.array(ticks))
    assert ((places > -0.01) & (places < 1.01)).all() and (np.diff(places) > 0).all()
    assert (axis.places(np.array([low, high])) <= 1).all()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, "0"),
        (0.003, "0.003"),
        (1000.0, "1k"),
        (1500.0, "1500"),
        (12_000.0, "12k"),
        (2.5e6, "2.5M"),
        (3e-7, "3e-7"),
    ],
)
def test_numbers_are_readable(value: float, told: str) -> None:
    assert plots.readable(value) == told

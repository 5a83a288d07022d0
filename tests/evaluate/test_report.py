import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from personae.artefact.save import save_state
from personae.core import State
from personae.errors import ArtefactError
from personae.evaluate.charts import COLOURS
from personae.evaluate.grids import save_grid
from personae.evaluate.report import count, duration, number, percent, size, write_report

NUM_CLASSES = 10
BACKBONE_BYTES = 1_069_956
EVIL = "<script>alert('$x_1$')</script>"

CLASSES = ("labels", "sampled_labels", "sampled_labels_before")
SAMPLES = ("kid", "kid_std", "kid_floor", "kid_features", "frechet", "precision", "recall", "copy_ratio")
OPTIONAL = (*CLASSES, *SAMPLES, "histogram_distance", "histogram_distance_before", "heldout_loss_before")


def fake_run(folder: Path, *, num_train: int = 10, num_new: int = 2, rounds: int = 300) -> Path:
    """A run folder as evaluation leaves it, with real digits in its grids and invented, plausible numbers."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    pixels, classes = (digits.images / 16 * 255).astype(np.uint8)[:, None], digits.target
    (folder / "samples").mkdir(parents=True)
    clients = {}
    for index in range(num_train + num_new):
        new = index >= num_train
        name = f"new-{index - num_train:02d}" if new else f"c{index:02d}"
        prefers = rng.dirichlet(np.full(NUM_CLASSES, 0.25))
        after = 0.85 * prefers + 0.15 * rng.dirichlet(np.full(NUM_CLASSES, 5.0))
        before = rng.dirichlet(np.full(NUM_CLASSES, 8.0))
        real_counts = rng.multinomial(120, prefers)
        after_counts, before_counts = rng.multinomial(200, after), rng.multinomial(200, before)
        grids = [("-real", prefers, 0), ("", after, 28), ("-before", before, 45)]
        for suffix, p, noise in grids if new else grids[:2]:
            drawn = [rng.choice(np.flatnonzero(classes == c)) for c in rng.choice(NUM_CLASSES, 48, p=p)]
            noisy = np.clip(pixels[drawn] + rng.normal(0, noise, (48, 1, 8, 8)), 0, 255).astype(np.uint8)
            save_grid(folder / "samples" / f"{name}{suffix}.png", torch.from_numpy(noisy), columns=8)
        loss = 0.118 + 0.02 * rng.random()
        clients[name] = {
            "role": "new" if new else "train",
            "num_images": 120,
            "num_heldout": 24,
            "labels": real_counts.tolist(),
            "sampled_labels": after_counts.tolist(),
            "sampled_labels_before": before_counts.tolist() if new else None,
            "heldout_loss": loss,
            "heldout_loss_before": loss + 0.03 if new else None,
            "histogram_distance": float(abs(real_counts / 120 - after_counts / 200).sum() / 2),
            "histogram_distance_before": float(abs(real_counts / 120 - before_counts / 200).sum() / 2) if new else None,
            "kid": 0.021 + 0.01 * rng.random(),
            "kid_std": 0.004,
            "kid_floor": -0.0003,
            "kid_features": "digits-cnn",
            "frechet": 11.2 + rng.random(),
            "precision": 0.81,
            "recall": 0.64,
            "trained_parameters": 64 if new else 267_553,
            "bytes_up": 0 if new else rounds * BACKBONE_BYTES // 2,
            "bytes_down": BACKBONE_BYTES * (1 if new else rounds // 2 + 1),
            "personal_file_bytes": 412 if new else 936,
            "nearest_train_distance": 0.19 + 0.03 * rng.random(),
            "copy_ratio": 0.97 + 0.1 * rng.random(),
        }
    train = [name for name in clients if name.startswith("c")]
    lines = []
    for number_ in range(1, rounds + 1):
        level = 0.13 + 0.75 * np.exp(-number_ / 25) + 0.08 * np.exp(-number_ / 150)
        cohort = sorted(rng.choice(train, max(1, len(train) // 2), replace=False))
        sent = {"num_examples": 120, "bytes_up": BACKBONE_BYTES, "bytes_down": BACKBONE_BYTES + 6}
        told = {name: {"loss": float(level * rng.normal(1, 0.06)), **sent} for name in cohort}
        lines.append({"round": number_, "seconds": 0.21, "clients": told})
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(
        folder / "summary.json",
        {
            "format_version": 1,
            "recipe": "quickstart",
            "method": "server_ema(server_adam(spire))",
            "engine": "in_process",
            "seed": 0,
            "rounds": rounds,
            "wall_seconds": 120.3,
            "bytes_up": sum(c["bytes_up"] for c in clients.values()),
            "bytes_down": sum(c["bytes_down"] for c in clients.values()),
            "heldout_loss": float(np.mean([c["heldout_loss"] for c in clients.values()])),
            "versions": {"personae": "0.1.0", "torch": "2.13.0", "python": "3.12.4"},
            "features": {"name": "digits-cnn", "accuracy": 0.983},
            "label_names": [str(i) for i in range(NUM_CLASSES)],
            "model_parameters": 267_553,
            "clients": clients,
            "stages": {"train_seconds": 71.2, "personalize_seconds": 9.8, "sample_seconds": 27.5},
        },
    )
    (folder / "config.toml").write_text('recipe = "quickstart"\nseed = 0\nrounds = 300\n\n[method]\nname = "spire"\n')
    device = {"kind": "cpu", "name": "two cores"}
    environment = {"platform": "Linux x86_64", "threads": 2, "commit": None, "device": device}
    write_json(folder / "environment.json", environment | {"packages": ["torch", "numpy"]})
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def changed(folder: Path, change) -> str:
    """The report after `change` was made to the summary."""
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    write_json(folder / "summary.json", summary)
    return write_report(folder).read_text("utf-8")


def without_classes(summary):
    for client in summary["clients"].values():
        client |= dict.fromkeys(CLASSES)


class Balanced(HTMLParser):
    """Notes tags that are closed by another than opened them, and ids that occur twice."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.wrong, self.ids, self.text = [], [], [], []
        self.feed(page)
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def words(page: str) -> str:
    return " ".join(" ".join(Balanced(page).text).split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run to read, with two clients of each role: drawing is what takes the time here."""
    return fake_run(tmp_path_factory.mktemp("run") / "run", num_train=2, num_new=2)


@pytest.fixture(scope="module")
def page(made):
    return write_report(made).read_text("utf-8")


@pytest.fixture(scope="module")
def text(page):
    return words(page)


@pytest.fixture
def folder(made, tmp_path):
    """The same run, to change."""
    return shutil.copytree(made, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))


@pytest.fixture
def without_rounds(folder):
    """The same, with no curves to draw."""
    (folder / "rounds.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def hostile_page(made, tmp_path_factory):
    """The report of a run whose every text is HTML, beside clients called after a path and in another script."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("hostile") / "run")

    def change(summary):
        clients = summary["clients"].values()
        summary["clients"] = dict(zip(["../secret", "客户", EVIL, f"{EVIL}2"], clients, strict=True))
        summary |= {"recipe": EVIL, "method": EVIL, "engine": EVIL, "label_names": [EVIL] * 10}
        summary |= {"features": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "stages": {f"{EVIL}_seconds": 1.0}}

    save_grid(folder / "secret.png", torch.zeros(1, 1, 5, 7, dtype=torch.uint8), columns=1, scale=1)
    (folder / "config.toml").write_text(f'recipe = "{EVIL}"')
    write_json(folder / "environment.json", {EVIL: {EVIL: [EVIL]}})
    return changed(folder, change)


def test_the_report_is_in_the_folder_and_the_same_bytes_every_time(folder, page):
    path = write_report(folder)
    assert path == folder / "report.html"
    assert path.read_text("utf-8") == page


def test_nothing_is_fetched_and_nothing_runs(page):
    assert "<script" not in page and "<link" not in page and "@import" not in page
    sources = re.findall(r'\b(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))


def test_tags_are_balanced_and_ids_are_unique(page):
    parsed = Balanced(page)
    assert parsed.wrong == []
    assert len(parsed.ids) == len(set(parsed.ids))
    references = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {one or other for one, other in references} <= set(parsed.ids)


def test_the_first_paragraph_says_what_happened(made, text):
    clients = json.loads((made / "summary.json").read_text())["clients"]
    new = [client for client in clients.values() if client["role"] == "new"]
    before, after = (
        100 * np.mean([client[key] for client in new]) for key in ("histogram_distance_before", "histogram_distance")
    )
    lead = (
        "2 clients trained one diffusion model together in 300 rounds, sending 321 MB of parameters and no images; "
        f"2 new clients then fitted 64 parameters each to their own images. Before that, on average {before:.0f} % of "
        "a new client's samples would have had to be of another class to match the mix of classes in its real images; "
        f"after it, {after:.0f} %."
    )
    assert lead in text


def test_every_client_is_shown_with_its_grids(made, page):
    assert page.count("data:image/png;base64,") == 2 * 3 + 2 * 2
    assert page.count("Class proportions of") == 4
    for name in json.loads((made / "summary.json").read_text())["clients"]:
        assert f"<h3>{name}</h3>" in page and f'<th scope="row">{name}</th>' in page


def test_kid_is_named_after_its_features(text):
    assert "KID (features: digits-cnn)" in text
    assert not re.search(r"\bFID\b", text)


def test_traffic_adds_the_rounds_up(text):
    assert "sent 321 MB up and 321 MB down" in text


def test_the_page_has_every_colour_of_its_charts_by_day_and_by_night(page):
    assert page.count('<svg class="chart"') == 4 + 4
    light, dark = (set(re.findall(r"--(\w+): #", rule)) for rule in re.findall(r":root {(.*?)}", page, re.DOTALL))
    assert light == dark >= set(COLOURS)


def test_config_and_environment_are_there(text):
    for part in ('name = "spire"', "device.name two cores", "packages torch, numpy", "commit –"):
        assert part in text


def test_text_from_a_run_is_escaped(hostile_page):
    assert "<script" not in hostile_page and "&lt;script&gt;" in hostile_page
    assert Balanced(hostile_page).wrong == []


def test_a_name_is_never_opened_as_a_path(hostile_page):
    assert "<h3>../secret</h3>" in hostile_page and 'width="7" height="5"' not in hostile_page


def test_letters_that_no_font_has_are_no_reason_to_fail(hostile_page):
    assert "<h3>客户</h3>" in hostile_page


def test_groups_and_newcomers_are_shown_where_a_method_has_them(folder):
    facts = {"cluster of anna": 0, "cluster of ben": 0, "cluster of cleo": 1, "clusters": 2, "share 0": 1.0}
    facts |= {"newcomer: round of cleo": 6, "newcomer: likeness of cleo": 0.25, "newcomer: redundancy of cleo": 0.98}
    seen = {f"seen.{name}": torch.eye(3)[at] for at, name in enumerate(("anna", "ben", "cleo"))}
    (folder / "checkpoint").mkdir()
    save_state(folder / "checkpoint" / "server.safetensors", State({}, seen, {**facts, "withheld 1": True}))
    write_json(folder / "checkpoint" / "checkpoint.json", {"server": "server.safetensors", "clients": {}})
    write_report(folder)
    text = words((folder / "report.html").read_text("utf-8"))
    assert "group 0 (anna, ben) by 100 %; group 1 (cleo), not yet." in text
    assert "cleo 1 6 0.250 98 %" in text


@pytest.mark.parametrize("missing", ["null", "absent", "nan"])
def test_what_could_not_be_measured_is_left_out(without_rounds, missing):
    def change(summary):
        summary |= {"features": None, "label_names": None}
        for client in summary["clients"].values():
            for key in OPTIONAL:
                no_number = missing == "nan" and not key.endswith(("labels", "before", "features"))
                client[key] = float("nan") if no_number else None
                if missing == "absent":
                    del client[key]

    page = changed(without_rounds, change)
    assert Balanced(page).wrong == []
    table = page[page.index('<table class="numbers">') : page.index("</table>")]
    assert "KID" not in table and "histogram distance" not in table and "held-out loss" in table
    assert page.count('<svg class="chart"') == 1  # the dots of the held-out loss
    assert not re.search(r"\b(nan|None|inf)\b", words(page))


def test_a_bare_summary_is_enough(tmp_path):
    write_json(tmp_path / "summary.json", {"format_version": 1})
    page = write_report(tmp_path).read_text("utf-8")
    assert Balanced(page).wrong == [] and "0 clients" in words(page) and "None" not in words(page)


def test_pictures_that_are_not_there_are_said_to_be_missing(without_rounds):
    shutil.rmtree(without_rounds / "samples")
    page = changed(without_rounds, without_classes)
    assert page.count("no picture") == 2 * 3 + 2 * 2 and "base64" not in page


def test_without_labels_real_images_and_samples_still_stand(without_rounds):
    page = changed(without_rounds, without_classes)
    assert page.count("data:image/png") == 2 * 3 + 2 * 2
    assert "Class proportions of" not in page and 'class="body bare"' in page


def test_many_clients_are_cut_and_counted(without_rounds):
    def change(summary):
        without_classes(summary)
        (train, *_, new) = summary["clients"].values()
        summary["clients"] = {f"c{i:02d}": train for i in range(25)} | {f"new-{i:02d}": new for i in range(14)}

    page = changed(without_rounds, change)
    text = words(page)
    assert page.count("<h3>") == 24 and "<h3>c11</h3>" in page and "<h3>c12</h3>" not in page
    assert "13 more training clients not shown" in text and "2 more new clients not shown" in text
    assert "median of 25" in text and "median of 14" in text and "15 clients are not listed" in text


def test_a_line_cut_short_by_a_kill_is_left_out(folder):
    whole = changed(folder, lambda summary: summary.update(clients={}))
    with open(folder / "rounds.jsonl", "a") as file:
        file.write('{"round": 301, "clients": {"c0')
    assert write_report(folder).read_text("utf-8") == whole


def test_whoever_was_left_out_of_rounds_is_named_with_the_reason(folder):
    assert "Left out of rounds" not in Balanced(write_report(folder).read_text("utf-8")).text
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records[3:6]:
        record["refused"] = {"c9": "RefusedUpdate: client 'c9' sent <nan> (round 4)", "c8": "ClientSilent: too late"}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Balanced(write_report(folder).read_text("utf-8"))
    text = " ".join(" ".join(page.text).split())
    assert "c9 RefusedUpdate 3 4 client 'c9' sent <nan> (round 4)" in text and "c8 ClientSilent 3 4 too late" in text
    assert page.wrong == []


def test_clients_that_train_alone_send_nothing(folder):
    def change(summary):
        without_classes(summary)
        summary |= {"bytes_up": 0, "bytes_down": 0}
        for client in summary["clients"].values():
            client |= {"bytes_up": 0, "bytes_down": 0}

    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        for client in line["clients"].values():
            client |= {"bytes_up": 0, "bytes_down": 0, "loss": None}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = changed(folder, change)
    assert "and sent nothing" in words(page) and "Training loss" not in page and "cumulative by round" not in page


def test_a_folder_without_a_summary_is_explained(tmp_path):
    with pytest.raises(ArtefactError, match="measure the run first"):
        write_report(tmp_path)


@pytest.mark.parametrize("summary", [{"format_version": 2}, {}, []])
def test_another_format_is_refused(tmp_path, summary):
    write_json(tmp_path / "summary.json", summary)
    with pytest.raises(ArtefactError, match="reads 1"):
        write_report(tmp_path)


def test_a_damaged_picture_is_named(folder):
    (folder / "samples" / "c00.png").write_bytes(b"no picture")
    with pytest.raises(ArtefactError, match=r"c00\.png is not a PNG"):
        write_report(folder)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(-0.0003, 3), "−3.0×10⁻⁴"),
        (number(0), "0.000"),
        (number(None), "–"),
        (number(float("inf")), "–"),
        (count(1_234_567), "1,234,567"),
        (size(412), "412 B"),
        (size(1_069_956), "1.07 MB"),
        (size(999_700), "1.00 MB"),
        (size(123_456_789), "123 MB"),
        (duration(0.21), "0.21 s"),
        (duration(71.2), "71 s"),
        (duration(120.3), "2 min 0 s"),
        (duration(5_400), "1 h 30 min"),
    ],
)
def test_numbers_are_written_for_people(written, expected):
    assert written == expected


if __name__ == "__main__":  # a page to look at: python tests/evaluate/test_report.py FOLDER
    print(write_report(fake_run(Path(sys.argv[1]))))


def test_a_whole_is_a_hundred_percent():
    assert [percent(part, 1000) for part in (1000, 996, 990, 0.48)] == ["100 %", "100 %", "99 %", "0.048 %"]

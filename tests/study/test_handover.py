"""Split drawings: calls are counted, packets weighed, and what a server could tell is held against chance."""

import dataclasses
import json

import pytest
import torch

from personae.backbone.schedule import schedule
from personae.core import Images, pick, stream
from personae.data.emoji import STYLES, named, pack, scene_names
from personae.errors import ConfigError, DataError
from personae.evaluate.text2image_features import renderings, statistics
from personae.infer.split import LATENT, SplitPlan, begin
from personae.personal.tokens import is_word
from personae.recipe.build import build_clients
from personae.recipe.config import load_recipe, read_table
from personae.serve.client import neutral
from personae.serve.edge import shared_model
from personae.study.by_style import held_names, style_of, styles_of
from personae.study.handover import (
    Handover,
    clean,
    counted,
    drawn_by_two,
    expected_pictures,
    opened,
    told_apart,
)
from personae.study.handover_report import MEASURES, handover_answer, values, verdict_of
from personae.study.study import where
from personae.study.workflow import run_study

FEDERATION = """
name = "two-styles"
rounds = 1

[data]
source = "emoji"
styles = ["noto", "twemoji"]
names = "held_out"
caption = "a <own> drawing of {{thing}}"

[data.partition]
kind = "by_attribute"
num_clients = 2

[backbone]
folder = "{model}"
frozen = true

[backbone.lora]
rank = 2

[backbone.words]
words = ["<own>"]
start = "drawing"

[method]
name = "cluster_lora"
smallest_cluster = 1

[method.words]
steps = 1
lr = 0.05
batch_size = 2

[method.training]
steps = 1
lr = 0.05
batch_size = 2

[method.adapt]
steps = 1
lr = 0.05
batch_size = 2

[sampling]
sampler = "dpmsolver++"
steps = 1

[evaluation]
num_images = 2
features = "none"
loss_grid = 1
loss_draws = 1

[machine]
threads = 1
"""

STUDY = """
name = "handover"
study = "handover"

[settings]
recipe = "{recipe}"
seeds = [0]
shares = [0.0, 0.2, 1.0]
num_names = 4
steps = 5
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory, untrained):
    folder = tmp_path_factory.mktemp("handover")
    (folder / "federation.toml").write_text(FEDERATION.format(model=untrained), "utf-8")
    (folder / "handover.toml").write_text(STUDY.format(recipe=folder / "federation.toml"), "utf-8")
    return run_study(folder / "handover.toml", folder / "out")


@pytest.fixture(scope="module")
def known(done):
    return opened(done.folder / "runs" / "0")


def at(done, share):
    (row,) = where(done.rows, stage="share", share=share)
    return row["clients"].values()


def test_a_client_is_spared_exactly_the_servers_share(done):
    for share, calls in ((0.0, 0), (0.2, 1), (1.0, 5)):
        assert {client["server_passes"] for client in at(done, share)} == {2 * calls}  # two each with guidance
        assert {client["client_passes"] for client in at(done, share)} == {2 * (5 - calls)}
    assert verdict_of(done.rows, 0.2).fewer == pytest.approx(0.2) and verdict_of(done.rows, 1.0).fewer == 1


def test_nothing_differs_at_home_and_something_where_the_server_draws(done):
    assert {found.mean for found in verdict_of(done.rows, 0.0).differences.values()} == {0.0}
    assert verdict_of(done.rows, 1.0).differences["frechet"].mean != 0


def test_a_packet_is_one_latent_its_history_and_little_besides(done):
    for client in at(done, 0.2):
        assert client["latent_bytes"] == 4 * 8 * 8 * 8 == client["history_bytes"]  # one call, one remembered
        assert 0 < client["rest_bytes"] <= 1024
    assert {client[key] for client in at(done, 0.0) for key in client if key.endswith("_bytes")} == {0}


def test_the_server_is_the_one_that_is_served_and_is_told_what_clients_send(known):
    served, said = shared_model(known.run).params(), "a <own> drawing of a dog"
    assert served.keys() == known.server.params().keys()
    assert all(torch.equal(value, served[name]) for name, value in known.server.params().items())
    split = drawn_by_two(known.server, known.run.model("c0"), [said], known.words, SplitPlan("ddim", 5, 1), 0)
    assert list(split.said) == [neutral(said, known.words)] == ["a drawing of a dog"]


def test_nothing_private_stands_in_a_packet(known):
    said = ["a <own> drawing of a dog"]
    data = drawn_by_two(known.server, known.run.model("c1"), said, known.words, SplitPlan("unipc", 5, 3), 0).data
    head = data[8 : 8 + int.from_bytes(data[:8], "little")]
    assert json.loads(head)[f"extras/{LATENT}"]
    (vector,) = pick(known.run.personal("c1"), is_word).values()
    for word in ("own", "dog", "a drawing of", *pack().words.values()):
        assert word.encode() not in head
    assert vector.flatten()[:4].numpy().tobytes() not in data


def test_a_group_is_drawn_with_its_own_adapter(known):
    cluster = {name: value.clone() for name, value in known.of_cluster("c1").params().items()}
    own, released = known.run.personal("c1"), known.run.released.params
    assert all(torch.equal(cluster[name], own[name]) == is_word(name) for name in own if not name.endswith("lora_A"))
    assert cluster.keys() == own.keys() and released.keys() == {name for name in own if not is_word(name)}
    number = known.state.facts["cluster of c1"]
    assert all(torch.equal(cluster[name], known.state.extras[f"cluster.{number}.{name}"]) for name in released)


def test_the_shipped_recipe_leaves_things_to_draw_to_every_client_of_every_seed(known):
    settings = read_table("collaborative/handover")[0]["settings"]
    for seed in settings["seeds"]:
        clients = build_clients(load_recipe(settings["recipe"], [f"seed={seed}"]))
        styles, held = styles_of(clients), {name: held_names(clients, name) for name in clients.train}
        drawn = dataclasses.replace(known, styles=styles, held=held).names(settings["num_names"])
        assert all(len(set(names)) == settings["num_names"] and not held[c] & set(names) for c, names in drawn.items())
        for style in styles.values():
            own = [names for client, names in drawn.items() if styles[client] == style]
            assert len(set(own)) == len(own), "clients of a style draw other things"


def test_nobody_draws_what_it_holds_or_what_the_probe_was_fitted_on(known):
    assert sorted(known.styles.values()) == ["noto", "twemoji"]
    first = known.names(4)
    assert set(first) == set(known.styles) and first["c0"] == first["c1"], "of held-out names they hold none of these"
    assert set(first["c0"]) <= set(known.probe.other_names) & set(scene_names()) < set(named("seen"))
    other = dataclasses.replace(known, held={"c0": set(first["c0"][:2]), "c1": set()})
    assert other.names(4)["c1"] == first["c1"] and other.names(4)["c0"][:2] == first["c0"][2:]
    with pytest.raises(DataError, match="lower num_names"):
        known.names(len(known.probe.other_names))


def test_a_finished_study_says_everything(done):
    answer = done.answer
    assert [row[0] for row in answer.tables[0].rows] == ["0%", "20%", "100%"]
    told = " ".join(answer.findings)
    assert "Server's share 20%" in told and "Accepted shares of those tried" in told and "bytes besides" in told
    assert {chart.name for chart in answer.charts} == {"style", "leak", "alike"}
    assert (done.folder / answer.pictures[0].path).is_file()
    assert done.summary["measured"] == 1 + 3 + 1


def test_the_same_cell_measured_again_gives_the_same(done):
    cell = {"stage": "share", "seed": 0, "share": 0.2}
    again, (before,) = done.study.measure(cell, 0, done.folder), where(done.rows, **cell)
    timeless = [
        {**row["styles"], **{n: {k: v for k, v in c.items() if "seconds" not in k} for n, c in row["clients"].items()}}
        for row in (again, before)
    ]
    assert timeless[0] == timeless[1]


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_clean_picture_comes_back_from_what_the_network_should_say(kind):
    noises, x_0, noise = schedule(prediction_type=kind), *torch.randn(2, 3, 2, 4, 4, generator=stream(0))
    t = torch.full((3,), 500)
    x_t = noises.add_noise(x_0, noise, t)
    assert torch.allclose(clean(noises, noises.target(x_0, noise, t), x_t, 500), x_0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["dpmsolver++", "ddim", "euler"])
def test_what_is_expected_at_the_last_call_is_what_is_drawn(known, sampler):
    """Their last step goes to the clean picture that was predicted."""
    said, model = ["a drawing of a dog", "a drawing of a cat"], known.server
    parts = []
    for calls in (4, 5):
        plan = SplitPlan(sampler, 5, calls)
        parts.append(expected_pictures(model, said, plan, begin(model, said, plan, stream(1)).extras[LATENT]).int())
    assert (parts[0] - parts[1]).abs().max() <= 1
    assert not torch.equal(parts[0][0], parts[0][1])


def test_passes_are_counted_only_inside(known):
    plan = SplitPlan("ddim", 5, 3)
    with counted(known.server) as cost:
        begin(known.server, ["a dog"], plan, stream(0))
    begin(known.server, ["a dog"], plan, stream(0))
    assert cost.passes == 6 and cost.seconds > 0


def test_a_probe_tells_styles_that_are_there_and_guesses_where_none_are():
    things = named("seen")[:60]
    styles = [style for style in STYLES[:3] for _ in things]
    real = statistics().extract(torch.cat([renderings(style, things) for style in STYLES[:3]]))
    assert sum(told_apart(real, styles, [*things] * 3)) > 0.6 * 180
    noise = torch.randn(real.shape, generator=stream(0))
    assert abs(sum(told_apart(noise, styles, [*things] * 3)) / 180 - 1 / 3) < 0.12


def test_a_style_is_known_by_its_pictures():
    labels = torch.tensor([3, 5])
    pixels = pack().pixels["twemoji"][labels]
    assert style_of("anna", Images(pixels, labels)) == "twemoji"
    mixed = Images(torch.cat([pixels[:1], pack().pixels["noto"][labels[1:]]]), labels)
    with pytest.raises(DataError, match="'anna' are not of one style"):
        style_of("anna", mixed)


# --- the verdict -----------------------------------------------------------------------------------------------------


def rows_of(change, **more):
    """Two seeds of ten clients at home, and at 30 % with what `change` makes of their figures."""
    rows = []
    for seed in (0, 1):
        for share in (0.0, 0.3):
            clients = {}
            for n in range(10):
                figures = {
                    "found": 0.6 + 0.01 * n,
                    "named": 0.4 + 0.01 * (n * seed),
                    "leak": 0.2,
                    "leak_cluster": 0.8,
                    "leak_finished": 0.8,
                }
                figures |= {"alike": 0.9, "alike_other": 0.1, "server_seconds": 0.1, "client_seconds": 0.2}
                figures |= {"server_passes": round(40 * share), "client_passes": round(40 * (1 - share))}
                figures |= {"latent_bytes": 2048, "history_bytes": 4096, "rest_bytes": 944 if share else 0}
                clients[f"c{n}"] = {**figures, **(change(n, figures) if share else {})}
            styles = {f"s{n}": {"frechet": 1.0 + n, "kid": 0.1 * n} for n in range(5)}
            rows.append({"stage": "share", "seed": seed, "share": share, "chance": 0.2, "real": 0.9, "clients": clients,
                         "styles": styles, **more})  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("change", "accepted", "told"),
    [
        (lambda n, f: {}, True, "30.0% fewer calls"),
        (lambda n, f: {"leak": 0.26}, False, "chance is 20.0% (fails:"),
        (lambda n, f: {"leak": 0.24}, True, "chance is 20.0% (passes:"),
        (lambda n, f: {"found": 0.97 * f["found"]}, False, "64.5% all at home (fails)"),
        (lambda n, f: {"named": f["named"] - 0.01 * (n + 1)}, False, "worse in thing found (fails)"),
        (lambda n, f: {"named": f["named"] + 0.02 * (-1) ** n}, True, "nothing is worse that can be told"),
        (lambda n, f: {"named": f["named"] + 0.01 * (n + 1)}, True, "better in thing found"),
        (lambda n, f: {"rest_bytes": 1025}, False, "1025 bytes beside latents and history (fails)"),
    ],
)
def test_a_share_is_judged_by_every_condition(change, accepted, told):
    rows = rows_of(change)
    assert verdict_of(rows, 0.3).accepted == accepted
    answer = handover_answer(rows, (0.0, 0.3))
    assert told in answer.findings[0]
    assert answer.findings[1] == f"Accepted shares of those tried: {'30%' if accepted else 'none'}."


def test_a_style_that_is_not_there_is_said():
    rows = rows_of(lambda n, f: {})
    assert not any("no style that a split could lose" in told for told in handover_answer(rows, (0.0, 0.3)).findings)
    for row in rows:
        for n, client in enumerate(row["clients"].values()):
            client["found"] = 0.2 + 0.02 * (-1) ** n
    answer = handover_answer(rows, (0.0, 0.3))
    assert any("no style that a split could lose" in told for told in answer.findings)
    assert "Accepted shares of those tried: none." in answer.findings


def test_differences_are_of_the_same_client_and_seed():
    rows = rows_of(lambda n, f: {"found": f["found"] - 0.1})
    found = verdict_of(rows, 0.3).differences["found"]
    assert (found.mean, found.low, found.high, found.num) == pytest.approx((-0.1, -0.1, -0.1, 20))
    assert verdict_of(rows[:3], 0.3).differences["found"].num == 10, "a seed that is not finished is left out"
    assert len(values(rows, "styles", MEASURES[2].key)) == 5 * 2


def test_an_unfinished_study_is_answered_too():
    rows = rows_of(lambda n, f: {})
    assert not handover_answer([], (0.0, 0.3)).findings
    assert not handover_answer(rows[:1], (0.0, 0.3)).findings and handover_answer(rows[:1], (0.0, 0.3)).tables
    assert not handover_answer(rows[1:2], (0.0, 0.3)).tables


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": (0.2,)}, "expected 0, which all are compared with"),
        ({"shares": (0.0, 1.2)}, "others up to 1"),
        ({"num_names": 3}, "num_names is 3"),
        ({"recipe": "text2image/projection"}, "expected cluster_lora"),
        ({"changes": ("data.caption=a <own> thing",)}, "a caption with {thing}"),
    ],
)
def test_problems_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        Handover(**changes)


def test_runs_come_before_shares_and_the_sheet_comes_last():
    study = dataclasses.replace(Handover(), seeds=(0, 1), shares=(0.0, 0.5))
    runs = study.cells([])
    assert [cell["stage"] for cell in runs] == ["run", "run"]
    cells = study.cells(runs)
    assert [(cell["seed"], cell["share"]) for cell in cells[2:]] == [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5)]
    assert study.cells(cells[:4])[-1] == {"stage": "pictures", "seed": 0}

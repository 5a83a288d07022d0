"""Claims are judged by numbers of their study, never by themselves."""

import inspect
import json
import re
from pathlib import Path

import pytest

from personae.recipe.config import find_recipe, read_table
from personae.study import STUDIES, papers

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_claim_names_a_recipe_that_is_a_study():
    for claim in papers.CLAIMS:
        assert find_recipe(claim.recipe).is_file() and read_table(claim.recipe)[0]["study"] in STUDIES


def test_every_result_belongs_to_a_claim_or_a_recipe():
    for path in papers.RESULTS.glob("*.json"):
        summary = json.loads(path.read_text("utf-8"))
        recipe = path.stem.split("-", 1)[0]
        assert read_table(f"{recipe}/{path.stem.removeprefix(recipe + '-')}")[0]["name"] == summary["name"]


def test_every_study_has_a_line_of_the_index():
    page = (DOCS / "studies" / "README.md").read_text("utf-8")
    assert page == papers.index() and page.count("\n| [") == len(list(papers.RESULTS.glob("*.json")))
    links = re.findall(r"\]\((.*?\.md)\)", page)
    assert links and all((DOCS / "studies" / link).is_file() for link in links)


def test_a_result_of_former_settings_says_so(tmp_path):
    recipe = "theory/two_components"
    summary = json.loads(papers.result_path(recipe).read_text("utf-8"))
    own = papers.result_path(recipe, tmp_path)
    for settings, told in ((papers.settings_digest(recipe), ""), ("0" * 16, ", with former settings")):
        own.write_text(json.dumps({**summary, "settings": settings}))
        assert {line.cells for line in papers.table(tmp_path) if line.recipe == recipe} == {told}
        assert ("with former settings" in papers.index(tmp_path)) == bool(told)
    assert papers.settings_digest(recipe) != papers.settings_digest("theory/k_components")


def test_the_mixture_federation_was_reproduced_within_its_limits():
    """Pre-training below 0.05 nats in every seed; new clients below half of fine-tuning wherever training converged."""
    numbers = json.loads(papers.result_path("theory/mixture_federation").read_text("utf-8"))["numbers"]
    assert numbers["spire_seeds_below_0.05"] == numbers["seeds"] == 5
    assert numbers["new_clients_half_of_fine_tuning"] == numbers["new_clients_points"] >= 18


def test_without_results_nothing_is_claimed(tmp_path):
    lines = papers.table(tmp_path)
    assert {line.verdict for line in lines} == {"not measured"} and {line.measured for line in lines} == {""}


NUMBERS = {
    "over_cramer_rao": {"mean": 1.02, "error": 0.02},
    "slope_of_dims": {"1": {"slope": 0.005, "error": 0.02}},
    "slope_of_images": {"a": {"slope": -1.02, "error": 0.02}},
    "apart": {"mean": 0.05, "highest": 0.1},
}


@pytest.mark.parametrize(
    ("judge", "change"),
    [
        (papers.recovers, {"over_cramer_rao": {"mean": 1.5, "error": 0.02}}),
        (papers.in_any_dimension, {"slope_of_dims": {"1": {"slope": 0.5, "error": 0.02}}}),
        (papers.like_one_over_n, {"slope_of_images": {"a": {"slope": -0.5, "error": 0.02}}}),
        (papers.is_maximum_likelihood, {"apart": {"mean": 0.3, "highest": 0.5}}),
    ],
)
def test_a_verdict_follows_the_numbers(judge, change):
    assert judge(NUMBERS).verdict == "agrees"
    assert judge({**NUMBERS, **change}).verdict in ("disagrees", "partly")


def pair(figure, mean):
    ends = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "num": 8}
    return {
        "ours": "spire",
        "rival": "fedavg_ft",
        "images": 8,
        "kind": "all",
        "figure": figure,
        **ends,
        "over_seeds": ends,
    }


@pytest.mark.parametrize(
    ("means", "verdict"),
    [((-0.5, -0.5), "agrees"), ((-0.5, 0.0), "partly"), ((-0.5, 0.5), "disagrees"), ((0.0, 0.0), "disagrees")],
)
def test_rivals_must_be_beaten_everywhere(means, verdict):
    numbers = {"paired": [pair("loss", mean) for mean in means] + [pair("kid", 0.9)]}
    assert papers.beats_rivals("loss")(numbers).verdict == verdict
    assert papers.beats_rivals("loss")({}).verdict == "not measured"


def test_claims_about_learners_name_those_of_their_recipe():
    named = 0
    for claim in papers.CLAIMS:
        inside = inspect.getclosurevars(inspect.unwrap(claim.judge)).nonlocals
        if claim.judge.__qualname__.startswith(papers.ends_above.__name__):
            learners = {learner["name"] for learner in read_table(claim.recipe)[0]["settings"]["learners"]}
            assert {*inside["ours"], *inside["rivals"]} <= learners, claim.claim
            named += 1
    assert named > 1


def test_several_of_ours_are_no_rivals_of_each_other():
    guided = [{**pair("kid", -0.5), "ours": "guided"}, {**pair("kid", 0.5), "ours": "guided", "rival": "spire"}]
    numbers = {"paired": [pair("kid", 0.5), *guided]}
    assert papers.beats_rivals("kid", ours="guided")(numbers).verdict == "agrees"
    assert papers.beats_rivals("kid")(numbers).verdict == "disagrees"


def test_kinds_of_new_clients_have_claims_of_their_own():
    numbers = {"paired": [pair("loss", 0.5), {**pair("loss", -0.5), "kind": "seen"}]}
    assert papers.beats_rivals("loss", "seen")(numbers).verdict == "agrees"
    assert papers.beats_rivals("loss")(numbers).verdict == "disagrees"


@pytest.mark.parametrize(("means", "verdict"), [((-0.5, 0.0), "agrees"), ((0.5, 0.0), "partly"), ((0.5,), "disagrees")])
def test_training_clients_may_not_be_worse_off_than_with_a_rival_that_pools_nothing(means, verdict):
    pooling = {**pair("loss", 9.0), "rival": papers.REFERENCE}
    numbers = {"trained": [*(pair("loss", mean) for mean in means), pooling, pair("copy", 9.0)]}
    assert papers.is_no_worse_trained(numbers).verdict == verdict
    assert papers.is_no_worse_trained({"paired": []}).verdict == "not measured"


@pytest.mark.parametrize(
    ("means", "verdict"), [((0.5, 0.0), "agrees"), ((-0.5, 0.0), "partly"), ((-0.5,), "disagrees")]
)
def test_a_lower_copy_ratio_is_more_copying(means, verdict):
    numbers = {"paired": [*(pair("copy", mean) for mean in means), {**pair("copy", -9.0), "rival": "local_only"}]}
    assert papers.copies_no_more(numbers).verdict == verdict
    assert papers.copies_no_more({"paired": [pair("loss", 0.1)]}).verdict == "not measured"


def test_a_share_of_the_weights_is_judged_by_the_number():
    few, many = ({"sizes": [{"variant": "a", "trained": n, "parameters": 10**7}]} for n in (1000, 1001))
    assert papers.few_numbers(few).verdict == "agrees" and papers.few_numbers(many).verdict == "partly"


@pytest.mark.parametrize(("lows", "verdict"), [((0.1, 0.2), "agrees"), ((0.1, -0.1), "partly"), ((-0.1,), "disagrees")])
def test_without_embeddings_in_training_new_clients_must_do_worse(lows, verdict):
    own = {"clients": "new", "figure": "heldout_loss", "variant": "without", "num": 8}
    found = [{**own, "mean": low + 0.1, "low": low, "high": low + 0.2} for low in lows]
    others = [{**found[0], "clients": "train", "low": -1.0}, {**found[0], "figure": "histogram_distance", "low": -1.0}]
    assert papers.has_to_be_trained_with({"differences": [*found, *others]}).verdict == verdict


@pytest.mark.parametrize(
    ("high", "over_seeds", "verdict"), [(-0.1, -0.05, "agrees"), (-0.1, 0.1, "partly"), (0.1, 0.2, "disagrees")]
)
def test_a_mix_is_read_where_that_beats_guessing(high, over_seeds, verdict):
    pooled, alone = ({"mean": -0.3, "low": -0.5, "high": end, "num": 8} for end in (high, over_seeds))
    reading = {"read": 0.2, "guessed": 0.5, "drawn": 0.1, "explained": 0.7, "gain": {**pooled, "over_seeds": alone}}
    judged = papers.mix_is_read({"reading": reading})
    assert judged.verdict == verdict and "70 % of the variance" in judged.measured
    assert papers.mix_is_read({}).verdict == "not measured"


def test_forgetting_is_nothing_or_something():
    assert papers.forgets_nothing({"largest_change_of_others": 0.0}).verdict == "agrees"
    assert papers.forgets_nothing({"largest_change_of_others": 1e-9}).verdict == "disagrees"


def runs(*averages):
    return [{"order": 0, "seed": seed, "average": average} for seed, average in enumerate(averages)]


@pytest.mark.parametrize(
    ("rivals", "verdict"),
    [
        (((0.1, 0.31), (0.05, 0.24)), "agrees"),
        (((0.1, 0.31), (0.0, 0.39)), "partly"),
        (((0.1, 0.31), (0.3, 0.5)), "partly"),
        (((0.3, 0.5),), "disagrees"),
    ],
)
def test_the_best_of_ours_must_end_above_every_rival_by_more_than_chance(rivals, verdict):
    figures = {"plain": runs(0.1), "ours": runs(0.2, 0.4)}
    figures |= {f"rival {n}": runs(*gains) for n, gains in enumerate(rivals)}
    judge = papers.ends_above(("plain", "ours"), tuple(name for name in figures if name.startswith("rival")))
    assert judge({"figures": figures}).verdict == verdict and "ours 0.300" in judge({"figures": figures}).measured
    assert judge({"figures": {**figures, "rival 0": []}}).verdict == "not measured"
    once = {name: own[:1] for name, own in figures.items()}
    assert judge({"figures": once}).verdict == ("partly" if verdict == "agrees" else verdict), "one run is no proof"


def test_the_page_shows_what_the_command_prints(command):
    told = re.search(r"<!-- claims -->\n(.*)<!-- end of claims -->", (DOCS / "papers.md").read_text("utf-8"), re.S)
    assert told is not None and told[1].strip() == papers.markdown(papers.table())
    code, out, _ = command("bench", "papers", "--json")
    assert code == 0 and [row["claim"] for row in json.loads(out)["claims"]] == [c.claim for c in papers.CLAIMS]
    code, out, _ = command("bench", "papers")
    assert code == 0 and all(claim.recipe in out for claim in papers.CLAIMS)

"""From a recipe's [data] to everybody's images: names, who comes later, captions."""

import dataclasses

import pytest
import torch

from personae.core import Images
from personae.errors import ConfigError, DataError
from personae.recipe.build import build_clients, build_job, said
from personae.recipe.config import load_recipe, parse, to_table
from personae.recipe.models import build_denoiser
from personae.recipe.schema import Data


def clients(**data):
    """The clients of the quickstart's recipe with another [data]."""
    table = to_table(load_recipe("quickstart", ["cohort="]))
    return build_clients(parse({**table, "data": data}, "the recipe"))


FIXED = {"kind": "fixed_new", "num_new": 3, "alpha": 0.3, "images_per_new": 20}


def test_new_clients_of_fixed_new_are_the_same_whoever_trains():
    few, many = (
        clients(source="digits", partition={**FIXED, "num_clients": num, "classes_per_client": classes})
        for num, classes in ((8, 2), (23, 1))
    )
    assert few.new == many.new == ("n0", "n1", "n2")
    assert few.train == tuple(f"c{k}" for k in range(5)) and len(many.train) == 20
    for name in few.new:
        assert torch.equal(few.data[name].train.pixels, many.data[name].train.pixels)
        assert torch.equal(few.data[name].heldout.pixels, many.data[name].heldout.pixels)


def test_more_updates_than_clients_that_are_there_are_refused():
    recipe = load_recipe("digits/spire", ['federation.late=["c0"]', "federation.late_from=3", "federation.minimum=6"])
    found = build_clients(recipe)
    recipe = dataclasses.replace(recipe, cohort=None)
    few = dataclasses.replace(found, train=found.train[:6])
    with pytest.raises(ConfigError, match="minimum is 6, and before round 3 there are 5 clients: 1 of 6 are late"):
        build_job(recipe, few, build_denoiser(recipe, found.sample_shape), None)


def test_a_caption_that_leaves_the_thing_open_is_no_caption_for_images_without():
    images = Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match=r'these images have no captions.*"text": "an <own> of a cat"}'):
        said(images, Data("folder", caption="an <own> of {thing}"))
    assert said(images, Data("folder", caption="a dog")).captions == ("a dog", "a dog")


def test_clients_of_one_style_each_and_captions_that_leave_it_open():
    found = clients(source="emoji", told=False, partition={"kind": "by_attribute", "num_clients": 3})
    assert len(found.train) == 3 and found.sample_shape == (3, 32, 32)
    said = [set(data.train.captions) | set(data.heldout.captions) for data in found.data.values()]
    assert said[0] == said[1] == said[2] and all(text.startswith("a drawing of ") for text in said[0])


def test_a_style_that_is_held_out_comes_when_it_is_asked_for():
    found = clients(source="emoji", styles=["twemoji"], names="held_out", partition={"kind": "iid", "num_clients": 2})
    assert sum(len(data.train) + len(data.heldout) for data in found.data.values()) == 212


def test_one_person_is_one_client():
    pytest.importorskip("dicebear")
    found = clients(source="identity", style="lorelei", person=2, num_images=6, size=16, name="rex")
    assert found.train == ("rex",) and found.new == () and found.sample_shape == (3, 16, 16)
    assert all("person" in text for text in found.data["rex"].train.captions), "captions of its own stay"


def test_a_folder_without_a_partition_is_one_client(photos):
    found = clients(source="folder", path=str(photos), size=8, caption="a dog")
    assert found.train == ("own",)
    assert set(found.data["own"].train.captions) == {"a dog"}
    assert clients(source="folder", path=str(photos), size=8).data["own"].train.captions == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "digits"}, "data.partition: missing"),
        ({"source": "identity", "style": "lorelei"}, "source 'identity' needs data.num_images and data.person"),
        (
            {"source": "digits", "told": False, "partition": {"kind": "iid", "num_clients": 2}},
            "source 'digits' does not take data.told; leave it out",
        ),
        (
            {"source": "emoji", "styles": ["cubism"], "partition": {"kind": "iid", "num_clients": 2}},
            "styles are .*'cubism'",
        ),
        (
            {"source": "folder", "path": "x", "size": 8, "name": "../x"},
            r"data.name is '../x', expected up to 64 letters",
        ),
    ],
)
def test_what_does_not_go_together_is_said(data, message):
    with pytest.raises(ConfigError, match=message):
        clients(**data)

"""Three clients whose concepts arrive over rounds, and one that comes when all is over."""

import torch

from personae.backbone.text2image import TextToImage
from personae.continual.contract import caption
from personae.core import ClientData, Given, Images, Task, nothing, stream
from personae.data.tasks import Period, TaskStream, word_at
from personae.engine.task_population import TaskPopulation
from personae.personal.tokens import Words
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

CONCEPTS = {
    "c0": (("rex", "dog", 1), ("tom", "cat", 2)),
    "c1": (("elm", "tree", 2), ("pip", "dog", 1)),
    "c2": (("zoe", "cat", 1), ("bob", "dog", 2)),
    "n0": (("kim", "cat", 1),),
}
"""Of each client, with their nouns and rounds."""

NAMES = ("rex", "tom", "elm", "pip", "zoe", "bob", "kim")


def images(name, said, seed=0):
    """Noise, named, in the place of a concept's latents, around a mean of its own."""
    rng = stream(seed, name)
    mean = torch.randn(4, 4, 4, generator=stream(1, "mean", name))
    return Images(mean + 0.5 * torch.randn(4, 4, 4, 4, generator=rng), captions=(said,) * 4)


def period(continual, name, noun, place, rounds):
    task = Task(name, word_at(place), noun)
    said = caption(task, continual.said(task))
    data = ClientData(images(name, said), images(name, said, seed=9))
    plain = caption(task, noun)
    return Period(task, data, rounds, Given(images(f"prior {noun}", plain), ("a tree", "a cat", "a drawing of a dog")))


def streams(continual, concepts=CONCEPTS):
    return {
        client: TaskStream(tuple(period(continual, *each[:2], at, each[2]) for at, each in enumerate(own, 1)))
        for client, own in concepts.items()
    }


def model(continual, folder, num_words=2):
    parts = continual.parts
    words = Words(tuple(map(word_at, range(1, num_words + 1))), "drawing")
    own = {"lora": parts.lora, "delta": parts.delta, "neurons": parts.neurons, "words": words}
    return TextToImage(tiny_networks(folder), SCHEDULE, nothing, **own)


def population(continual, folder, *, concepts=CONCEPTS, cohort_size=None):
    train = [name for name in concepts if name != "n0"]
    new = [name for name in concepts if name == "n0"]
    num_words = max(map(len, concepts.values()))
    return TaskPopulation(model(continual, folder, num_words), streams(continual, concepts), train, new, cohort_size)

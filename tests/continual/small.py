"""Five concepts for the tests of single methods, and their training, opened between `begin` and `end`."""

from dataclasses import replace

import torch

from personae.continual.contract import caption, load_kept
from personae.core import Batch, Client, ClientData, Given, Images, Noised, State, Task, Training, everything, stream
from personae.local.fit import fit

TASKS = (
    Task("rex", "<rex>", "dog"),
    Task("tom", "<tom>", "cat"),
    Task("pip", "<pip>", "dog"),
    Task("elm", "<elm>", "tree"),
    Task("ada", "<ada>", "cat"),
)
TRAINING = Training(steps=3, lr=0.02, batch_size=2, optimizer="adamw", weight_decay=0.1)
OPTIONS = {
    "textual_inversion": {},
    "cns": {"budget": 0.01, "draws": 4, "general_draws": 1, "drawing_steps": 2},
    "custom_diffusion": {},
    "mix_of_show": {"rank": 2, "sampling_steps": 2},
    "ewc": {"rank": 2, "draws": 2},
    "dsc": {"rank": 2, "consolidation": Training(2, 0.01, 2)},
}
"""Of methods by name, small enough for these; of all others rank 2."""

PROMPTS = ("a tree", "a cat", "a dog", "a drawing of a tree")


def images(model, name, said, count=4):
    """Noise, named, in the place of a concept's latents."""
    return Images(torch.randn(count, *model.sample_shape, generator=stream(1, name)), captions=(said,) * count)


def client_for(method, model, count):
    """In front of the concept of this number, from 1 on."""
    task = TASKS[count - 1]
    own = images(model, task.name, caption(task, method.said(task)))
    given = Given(images(model, f"prior {task.noun}", caption(task, task.noun)), PROMPTS)
    return Client("own", ClientData(own, own), model, stream(2, task.name), tasks=TASKS[:count], given=given)


def begun(method, build, count, kept):
    """A client with its plan, in front of a new model that holds what was kept."""
    model = build(method.parts, TASKS[:count])
    load_kept(model, kept, stream(3, TASKS[count - 1].name))
    client = client_for(method, model, count)
    return replace(client, plan=method.begin(client, kept))


def trained(method, build, count, kept, training=TRAINING):
    """The same after training, as `end` is given it."""
    client = begun(method, build, count, kept)
    fit(client, everything, training)
    return replace(client, plan=type(client.plan)())


def taught(method, build, count, training=TRAINING):
    """What was kept after each of so many concepts."""
    found = [State()]
    for number in range(1, count + 1):
        found.append(method.end(trained(method, build, number, found[-1], training), found[-1]))
    return found[1:]


def noised_with(model, captions, name="noises"):
    """One example for each caption, the same whatever the model, on its way through it."""
    x_0, noise = torch.randn(2, len(captions), *model.sample_shape, generator=stream(4, name)).unbind()
    t = torch.randint(model.schedule.num_timesteps, (len(captions),), generator=stream(5, name))
    x_t = model.schedule.add_noise(x_0, noise, t)
    cond = model.condition(Batch(x_t, torch.zeros(len(x_t), dtype=torch.bool), tuple(captions)))
    return Noised(x_0, t, noise, x_t, cond, model.forward(x_t, t, cond))


@torch.no_grad()
def predicted(model, captions):
    """What a model says under these captions, of the same noises every time."""
    model.train(False)
    return noised_with(model, captions).prediction


def scattered(model, spread=0.3):
    """Load other values into everything that may move, so that nothing is zero or as it starts."""
    values = {name: value + spread * torch.randn(value.shape, generator=stream(6, name))
              for name, value in model.params().items()}  # fmt: skip
    model.load(values)
    return values

import torch

from personae.core import Training, pick, stream
from personae.engine import InProcess
from personae.methods import FedAvgFT
from personae.testing import tiny_job, tiny_population

SGD = Training(3, 0.01, 4, optimizer="sgd", max_grad_norm=None)
NO_STEPS = Training(0, 0.01, 4)


def sgd_by_hand(model, images, rng, steps, lr):
    """Literal stochastic gradient descent on the denoising loss, with the draws in the library's order."""
    for _ in range(steps):
        index = torch.randint(len(images), (4,), generator=rng)
        t = torch.randint(20, (4,), generator=rng)
        torch.rand(4, generator=rng)
        noise = torch.randn(4, 2, generator=rng)
        alpha_bar = model.schedule.alpha_bar[t][:, None]
        x_t = alpha_bar.sqrt() * images.pixels[index] + (1 - alpha_bar).sqrt() * noise
        cond = model.part(torch.zeros(4, dtype=torch.bool))
        loss = (model.forward(x_t, t, cond) - noise).square().mean()
        live = {name: p for name, p in model.live().items() if name != "null_embedding.weight"}
        with torch.no_grad():
            for parameter, gradient in zip(live.values(), torch.autograd.grad(loss, list(live.values())), strict=True):
                parameter -= lr * gradient


def test_one_client_trains_as_if_alone():
    population = tiny_population(1)
    server = InProcess().run(tiny_job(FedAvgFT(SGD, NO_STEPS), population, rounds=3, seed=5)).server

    model, images = population.model, population.data["c0"].train
    model.load(population.initial(5))
    start = model.params()
    for parameter in model.live().values():
        parameter.requires_grad_(True)
    for number in (1, 2, 3):
        sgd_by_hand(model, images, stream(5, "c0", number), SGD.steps, SGD.lr)
    moved = max((start[name] - value).abs().max() for name, value in server.params.items())
    assert moved > 0.01
    for name, value in model.params().items():
        torch.testing.assert_close(server.params[name], value, rtol=1e-5, atol=1e-6)


def test_models_are_weighted_by_examples():
    population, method = tiny_population(2), FedAvgFT(SGD, NO_STEPS)
    sent = {}

    def rule(updates):
        sent.update({u.client: u.sent.params["output.bias"].clone() for u in updates})
        return {**population.initial(0), "output.bias": (8 * sent["c0"] + 12 * sent["c1"]) / 20}

    by_hand = InProcess().run(tiny_job(method, population, rounds=1, rule=rule)).server.params["output.bias"]
    averaged = InProcess().run(tiny_job(method, population, rounds=1)).server.params["output.bias"]
    torch.testing.assert_close(averaged, by_hand, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(averaged, (sent["c0"] + sent["c1"]) / 2)


def test_without_adaptation_everyone_samples_with_the_average():
    run = InProcess().run(tiny_job(FedAvgFT(SGD, NO_STEPS)))
    assert all(not state.params for state in run.personal.values())


def test_adaptation_trains_all_weights_from_the_average():
    run = InProcess().run(tiny_job(FedAvgFT(SGD, SGD)))
    own = run.personal["n0"].params
    assert own.keys() == run.server.params.keys()
    used = pick(own, lambda name: name != "null_embedding.weight")
    assert all(not torch.equal(value, run.server.params[name]) for name, value in used.items())

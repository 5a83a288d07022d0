import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.mlp import MLPDenoiser
from personae.backbone.schedule import schedule
from personae.backbone.unet import preset
from personae.core import Client, ClientData, Images, Plan, Training, everything, neither, nothing, stream, under
from personae.errors import ConfigError, Diverged, FederationError
from personae.local.fit import _optimizers, _restore, fit, fit_together, gradients
from personae.objective.proximal import proximal
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING

plain_fit = runpy.run_path(str(Path(__file__).parents[1] / "reference" / "plain_loop.py"))["plain_fit"]

PERSONAL = under("embedding.")
IMAGES = Images(torch.randn(12, 2, generator=stream(9)))
SGD = Training(steps=4, lr=0.1, batch_size=2, optimizer="sgd", max_grad_norm=None)


def made(plan=None, images=IMAGES, seed=1):
    """A client whose model has a vector of 4 numbers, all 1; the null vector is 0."""
    model = MLPDenoiser((2,), schedule(), width=8, num_blocks=1, embedding_width=4)
    model.load({**model.initial(stream(0)), EMBEDDING: torch.ones(1, 4)})
    return Client("c0", ClientData(images, images), model, stream(seed), plan or Plan())


def total(model, batch):
    """A loss whose gradient is 1 for every number of the client's vector and the null vector."""
    return model.live()[EMBEDDING].sum() + model.live()[NULL_EMBEDDING].sum()


def moved(how, plan=None, train=PERSONAL):
    """How far each number of the client's vector went downhill on `total`."""
    client = made(replace(plan or Plan(), loss=total))
    fit(client, train, how)
    return 1 - client.model.params()[EMBEDDING][0]


def differing(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- gradients without a step ------------------------------------------------------------------------------------


def test_gradients_are_where_a_step_of_descent_would_go_and_nothing_moves():
    before, client = made().model.params(), made()
    found = gradients(client, PERSONAL, batches=1, batch_size=2, levels=1)
    assert not differing(before, client.model.params())
    stepped = made()
    fit(stepped, PERSONAL, replace(SGD, steps=1))
    went = before[EMBEDDING] - stepped.model.params()[EMBEDDING]
    assert found.norm() > 0 and torch.allclose(found, went / SGD.lr, atol=1e-6)


def test_each_level_of_noise_has_its_own_timesteps(monkeypatch):
    client, seen = made(), []
    real = type(client.model.schedule).add_noise
    monkeypatch.setattr(
        type(client.model.schedule), "add_noise", lambda self, x, noise, t: seen.append(t) or real(self, x, noise, t)
    )
    found = gradients(client, PERSONAL, batches=30, batch_size=8, levels=4)
    steps = client.model.schedule.num_timesteps
    levels = [torch.cat(seen[30 * level : 30 * level + 30]) * 4 // steps for level in range(4)]
    assert found.shape == (4, 4) and [level.unique().tolist() for level in levels] == [[0], [1], [2], [3]]


def test_gradients_of_nothing_are_an_error():
    with pytest.raises(ConfigError, match="nothing to train"):
        gradients(made(), nothing, batches=1, batch_size=2, levels=1)


# --- the twin ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("train", [everything, PERSONAL, neither(PERSONAL)], ids=["all", "personal", "shared"])
def test_a_hundred_steps_beside_the_loop_written_out(optimizer, train):
    how = Training(
        steps=100,
        lr=3e-3,
        batch_size=3,
        optimizer=optimizer,
        weight_decay=0.01,
        warmup_steps=10,
        decay="cosine",
        max_grad_norm=0.5,
        accumulate=2,
        condition_dropout=0.3,
    )
    client, twin = made(), made()
    loss = fit(client, train, how).loss
    moving = {name: p for name, p in twin.model.live().items() if train(name)}
    assert plain_fit(twin.model, moving, IMAGES.pixels, twin.rng, how) == pytest.approx(loss, abs=1e-5)
    ours, theirs = client.model.params(), twin.model.params()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5
    assert (ours[EMBEDDING] - 1).abs().max() > 0.001 or not train(EMBEDDING)
    assert torch.equal(client.rng.get_state(), twin.rng.get_state())


# --- what moves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_what_is_not_selected_keeps_its_bits_under_weight_decay(optimizer):
    client = made()
    before = client.model.params()
    fit(client, PERSONAL, Training(steps=5, lr=0.1, batch_size=2, optimizer=optimizer, weight_decay=0.5))
    assert differing(before, client.model.params()) == {EMBEDDING}
    assert all(parameter.grad is None for parameter in client.model.live().values())  # none was computed in vain


def test_what_was_frozen_in_one_stretch_trains_in_the_next():
    client = made()
    fit(client, PERSONAL, SGD)
    before = client.model.params()
    fit(client, neither(PERSONAL), SGD)
    assert differing(before, client.model.params()) == before.keys() - {EMBEDDING, NULL_EMBEDDING}


def test_the_method_and_the_plan_must_both_allow_it():
    client = made(Plan(may_move=under("input.", "embedding.")))
    before = client.model.params()
    fit(client, neither(PERSONAL), SGD)
    assert differing(before, client.model.params()) == {"input.weight", "input.bias"}


@pytest.mark.parametrize(("train", "plan"), [(nothing, Plan()), (PERSONAL, Plan(may_move=neither(PERSONAL)))])
def test_nothing_to_train_is_an_error(train, plan):
    with pytest.raises(ConfigError, match="client 'c0' has nothing to train"):
        fit(made(plan), train, SGD)


def test_gradients_of_an_interrupted_stretch_do_not_count():
    clean, stale = made(), made()
    for parameter in stale.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    fit(clean, everything, SGD)
    fit(stale, everything, SGD)
    assert not differing(clean.model.params(), stale.model.params())


# --- pacing: every number moves by lr times the sum of the paces -------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "paces"),
    [
        ({}, 4.0),
        ({"warmup_steps": 2}, 0.5 + 1 + 1 + 1),
        ({"warmup_steps": 8}, 1 / 8 + 2 / 8 + 3 / 8 + 4 / 8),
        ({"decay": "cosine"}, 1 + (2 + 2**0.5) / 4 + 0.5 + (2 - 2**0.5) / 4),
        ({"decay": "cosine", "warmup_steps": 2}, 0.5 + (2 + 2**0.5) / 4 + 0.5 + (2 - 2**0.5) / 4),
        ({"steps": 0}, 0.0),
        ({"accumulate": 3}, 4.0),
        ({"max_grad_norm": 1.0}, 4 * 0.5),  # four ones have norm 2
        ({"max_grad_norm": 5.0}, 4.0),
    ],
)
def test_how_far_a_number_moves(changes, paces):
    assert moved(replace(SGD, **changes)).tolist() == pytest.approx([0.1 * paces] * 4, abs=1e-5)


def test_the_plan_scales_the_rate_by_name():
    def rate(name):
        return 3.0 if PERSONAL(name) else 0.0

    client = made(Plan(rate=rate, loss=total))
    fit(client, under("embedding.", "null_embedding."), replace(SGD, warmup_steps=2))
    assert client.model.params()[EMBEDDING].tolist() == [pytest.approx([1 - 3 * 0.1 * 3.5] * 4, abs=1e-6)]
    assert not client.model.params()[NULL_EMBEDDING].any()


def test_penalties_pull_but_are_not_reported():
    """Towards 0 with mu = 0.5 and lr = 0.1, one step moves 1 by 0.1 * (1 + 0.5)."""
    pull = proximal({EMBEDDING: torch.zeros(1, 4)}, 0.5)
    assert moved(replace(SGD, steps=1), Plan(penalties=(pull,))).tolist() == pytest.approx([0.15] * 4)
    assert moved(replace(SGD, steps=1, accumulate=2), Plan(penalties=(pull, pull))).tolist() == pytest.approx([0.2] * 4)
    client = made(Plan(penalties=(pull,), loss=total))
    assert fit(client, PERSONAL, replace(SGD, steps=1)).loss == 4.0


def test_the_loss_is_the_mean_over_steps():
    client = made(Plan(loss=total))
    assert fit(client, PERSONAL, replace(SGD, steps=2, accumulate=3)).loss == pytest.approx((4.0 + 3.6) / 2)
    assert math.isnan(fit(client, PERSONAL, replace(SGD, steps=0)).loss)


# --- what the model is shown -------------------------------------------------------------------------------------


def shown(monkeypatch, how, images):
    batches, client = [], made(images=images)
    condition = client.model.condition
    monkeypatch.setattr(client.model, "condition", lambda batch: batches.append(batch) or condition(batch))
    fit(client, everything, how)
    return batches


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.25, 420, 580), (1.0, 2000, 2000)])
def test_the_share_of_examples_that_see_the_null_vector(monkeypatch, share, low, high):
    """2000 draws at 0.25: 500, and four standard errors are 78."""
    batches = shown(monkeypatch, Training(steps=20, lr=1e-3, batch_size=100, condition_dropout=share), IMAGES)
    assert low <= sum(int(batch.unconditional.sum()) for batch in batches) <= high


def test_images_come_as_floats_with_their_captions_and_all_are_drawn(monkeypatch):
    pixels = torch.tensor([[0, 0], [51, 51], [255, 255]], dtype=torch.uint8)
    value = {"black": -1.0, "grey": -0.6, "white": 1.0}
    batches = shown(monkeypatch, Training(steps=10, lr=1e-3, batch_size=4), Images(pixels, captions=tuple(value)))
    assert {caption for batch in batches for caption in batch.captions} == set(value)
    for batch in batches:
        assert batch.images[:, 0].tolist() == pytest.approx([value[caption] for caption in batch.captions], abs=1e-6)


# --- randomness and precision ------------------------------------------------------------------------------------


def test_the_clients_generator_decides_and_the_global_one_is_left_alone():
    how = Training(steps=3, lr=0.01, batch_size=2)
    clients = [made(seed=seed) for seed in (1, 1, 2)]
    state = torch.get_rng_state()
    losses = [fit(client, everything, how).loss for client in clients]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1] != losses[2]
    assert not differing(clients[0].model.params(), clients[1].model.params())


def test_bfloat16_is_for_the_passes_and_not_for_the_weights():
    losses = {}
    for precision in ("float32", "bfloat16"):
        client = made()
        losses[precision] = fit(client, everything, Training(steps=5, lr=1e-3, batch_size=8, precision=precision)).loss
        assert all(value.dtype == torch.float32 for value in client.model.params().values())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


# --- moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_moments_handed_back_continue_as_if_nothing_had_happened(optimizer):
    how = Training(steps=4, lr=0.01, batch_size=2, optimizer=optimizer, weight_decay=0.1)
    whole, parts = made(), made()
    fit(whole, everything, replace(how, steps=8))
    moments = fit(parts, everything, how).moments
    fit(parts, everything, how, moments)
    assert not differing(whole.model.params(), parts.model.params())


def test_moments_are_named_and_the_callers_own_are_left_alone():
    client, how = made(), Training(steps=2, lr=0.01, batch_size=2)
    moments = fit(client, PERSONAL, how).moments
    assert moments.keys() == {f"moments.{slot}.{EMBEDDING}" for slot in ("step", "exp_avg", "exp_avg_sq")}
    before = {name: value.clone() for name, value in moments.items()}
    again = fit(client, PERSONAL, how, moments).moments
    assert not differing(before, moments)
    assert again[f"moments.step.{EMBEDDING}"] == 4


def test_without_moments_a_stretch_starts_afresh():
    fresh, kept, how = made(), made(), Training(steps=3, lr=0.01, batch_size=2)
    for client in (fresh, kept):
        moments = fit(client, everything, how).moments
        fit(client, everything, how, moments if client is kept else None)
    assert EMBEDDING in differing(fresh.model.params(), kept.model.params())


def test_moments_of_what_stays_put_are_not_used():
    client, how = made(), Training(steps=1, lr=0.01, batch_size=2)
    moments = fit(client, everything, how).moments
    assert fit(client, PERSONAL, how, moments).moments.keys() == {n for n in moments if n.endswith("." + EMBEDDING)}


def test_all_moments_lie_on_the_parameters_own_device():
    """The fused optimizer needs its step count there too."""
    moving = {"w": torch.nn.Parameter(torch.zeros(2, device="meta"))}
    (optimizer,) = _optimizers(moving, Training(1, 0.1, 1), Plan())
    _restore([optimizer], moving, {"moments.step.w": torch.tensor(3.0), "moments.exp_avg.w": torch.zeros(2)})
    assert {value.device.type for value in optimizer.state[moving["w"]].values()} == {"meta"}


def test_a_plan_may_give_some_parameters_another_optimizer():
    """One step of Adam moves by the rate, one of SGD by rate times gradient; both happen in the same step."""
    names = {EMBEDDING: "adam", NULL_EMBEDDING: "sgd"}
    client = made(Plan(loss=lambda model, batch: 3 * total(model, batch), optimizer=names.get))
    before = client.model.params()
    fitted = fit(client, names.__contains__, Training(1, 0.1, 1, max_grad_norm=None))
    after = client.model.params()
    assert torch.allclose(before[EMBEDDING] - after[EMBEDDING], torch.full((1, 4), 0.1))
    assert torch.allclose(before[NULL_EMBEDDING] - after[NULL_EMBEDDING], torch.full((1, 4), 0.3))
    assert {name for name in fitted.moments if name.endswith("." + NULL_EMBEDDING)} == set()


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_client(value):
    client = made(Plan(loss=lambda model, batch: model.live()[EMBEDDING].sum() * value))
    with pytest.raises(FederationError, match="client 'c0': the loss is not finite after 1 steps; lower the learning"):
        fit(client, PERSONAL, SGD)


def test_a_diverging_run_is_stopped():
    with pytest.raises(FederationError, match="not finite"):
        fit(made(), everything, replace(SGD, steps=50, lr=1e6))


def test_a_training_lists_all_its_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        Training(
            steps=-1,
            lr=0.0,
            batch_size=0,
            weight_decay=-0.1,
            warmup_steps=-2,
            max_grad_norm=0.0,
            accumulate=0,
            condition_dropout=1.5,
        )
    for problem in (
        "steps is -1",
        "lr is 0.0",
        "batch_size is 0",
        "weight_decay is -0.1",
        "warmup_steps is -2",
        "max_grad_norm is 0.0",
        "accumulate is 0",
        "condition_dropout is 1.5",
    ):
        assert problem in str(caught.value)


# --- several clients in one batch --------------------------------------------------------------------------------


def unet(place):
    return preset("tiny", schedule(), size=8, channels=1, embedding_width=6, place=place)


MODELS = {
    "mlp": lambda: MLPDenoiser((2,), schedule(), width=8, num_blocks=1, embedding_width=4),
    "mixture": lambda: MixtureDenoiser(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]]), schedule()),
    "time": lambda: unet("time"),
    "blocks": lambda: unet("blocks"),
    "input": lambda: unet("input"),
    "gate": lambda: unet("gate"),
}
TOGETHER = Training(steps=6, lr=0.05, batch_size=3, condition_dropout=0.3)


def people(model, sizes=(9, 2, 1), scales=(1.0, 1.0, 1.0)):
    """Clients that share a model, each with its own images and generator; alone they are c0, c1, ... as well."""
    clients = []
    for k, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        images = Images(scale * torch.randn(size, *model.sample_shape, generator=stream(k, "images")))
        clients.append(Client(f"c{k}", ClientData(images, images), model, stream(k, "draws")))
    return clients


def codes(model, count=3):
    return torch.randn(count, model.live()[EMBEDDING].shape[1], generator=stream(0, "codes"))


def side_by_side(model, clients, how):
    """What the loop leaves of all clients in one batch."""
    model.load({**model.initial(stream(0)), EMBEDDING: codes(model, len(clients))}, len(clients))
    fitted = fit_together(clients, PERSONAL, how)
    return fitted, model.params()[EMBEDDING]


def one_by_one(model, clients, how):
    fitted, vectors = [], []
    for client, code in zip(clients, codes(model, len(clients)), strict=True):
        model.load({**model.initial(stream(0)), EMBEDDING: code[None]})
        fitted.append(fit(client, PERSONAL, how))
        vectors.append(model.params()[EMBEDDING])
    return fitted, torch.cat(vectors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": 0.01, "optimizer": "sgd", "lr": 5.0},
        {"accumulate": 2, "optimizer": "adamw", "weight_decay": 0.1, "warmup_steps": 3, "decay": "cosine"},
    ],
    ids=["adam", "clipped", "everything"],
)
@pytest.mark.parametrize("name", MODELS)
def test_each_client_ends_as_it_would_alone(name, changes):
    """With fewer images than a batch, with one image, and with as many as three batches."""
    model, how = MODELS[name](), replace(TOGETHER, **changes)
    alone, together = people(model), people(model)
    fitted, vectors = one_by_one(model, alone, how)
    fitted_together, vectors_together = side_by_side(model, together, how)
    torch.testing.assert_close(vectors_together, vectors, atol=2e-4, rtol=1e-4)
    assert (vectors - codes(model)).abs().amax(dim=1).min() > 1e-3
    for one, other in zip(fitted, fitted_together, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        torch.testing.assert_close(other.moments, one.moments, atol=1e-4, rtol=1e-3)
    assert all(torch.equal(a.rng.get_state(), b.rng.get_state()) for a, b in zip(alone, together, strict=True))


def test_what_they_share_keeps_its_bits():
    model = MODELS["mlp"]()
    model.load({**model.initial(stream(0)), EMBEDDING: codes(model)}, 3)
    before = model.params()
    fit_together(people(model), PERSONAL, TOGETHER)
    assert differing(before, model.params()) == {EMBEDDING}


def test_the_order_of_the_clients_does_not_matter():
    model = MODELS["mlp"]()
    code = codes(model, 1)
    ends = []
    for order in ([0, 1, 2], [2, 0, 1]):
        clients = people(model)
        model.load({**model.initial(stream(0)), EMBEDDING: code.repeat(3, 1)}, 3)
        fit_together([clients[k] for k in order], PERSONAL, TOGETHER)
        ends.append(dict(zip(order, model.params()[EMBEDDING], strict=True)))
    for k in range(3):
        torch.testing.assert_close(ends[0][k], ends[1][k], atol=1e-5, rtol=1e-5)


def test_gradients_are_clipped_client_by_client():
    """One step of SGD at rate 1 is as long as the clipped gradient: the whole norm for each of them. Were it one norm
    for all, the client with the huge images would leave next to nothing to the others."""
    model = MODELS["mlp"]()
    how = Training(1, 1.0, 4, optimizer="sgd", max_grad_norm=1e-3)
    _, vectors = side_by_side(model, people(model, scales=(1.0, 1000.0, 1.0)), how)
    assert (vectors - codes(model)).norm(dim=1).tolist() == pytest.approx([1e-3] * 3, rel=1e-2)


def test_a_gradient_below_the_limit_is_left_as_it_is():
    model = MODELS["mlp"]()
    how = Training(1, 1.0, 4, optimizer="sgd", max_grad_norm=None)
    _, free = side_by_side(model, people(model), how)
    _, limited = side_by_side(model, people(model), replace(how, max_grad_norm=1e6))
    assert torch.equal(free, limited)


def test_who_has_no_finite_loss_is_named():
    model = MODELS["mlp"]()
    clients = people(model, scales=(1.0, math.inf, 1.0))
    with pytest.raises(Diverged, match="client 'c1': the loss is not finite after 1 steps") as caught:
        side_by_side(model, clients, TOGETHER)
    assert caught.value.client == "c1"


def test_whose_vector_is_not_finite_is_named():
    """The step is finite for gradients near 1, and not for those of images that are larger by ten orders."""
    model = MODELS["mlp"]()
    how = Training(1, 1e32, 4, optimizer="sgd", max_grad_norm=None)
    with pytest.raises(Diverged, match="client 'c2': a trained parameter is not finite"):
        side_by_side(model, people(model, scales=(1.0, 1.0, 1e10)), how)


@pytest.mark.parametrize(
    ("rows", "train", "plan", "found"),
    [
        (2, PERSONAL, Plan(), r"3 clients are to train \(c0, c1, c2\), and their model holds 2; load one model"),
        (1, PERSONAL, Plan(), "their model holds 1"),
        (3, everything, Plan(), r"not per client \(input\.weight, input\.bias, time\.weight, \.\.\.\); train these"),
        (3, nothing, Plan(), "nothing to train"),
        (3, PERSONAL, Plan(penalties=(proximal({}, 0.1),)), "a loss or penalties, which see one client's model"),
        (3, PERSONAL, Plan(loss=total), "a loss or penalties, which see one client's model"),
    ],
)
def test_what_cannot_train_together_is_refused(rows, train, plan, found):
    model = MODELS["mlp"]()
    model.load({**model.initial(stream(0)), EMBEDDING: codes(model, rows)}, rows)
    with pytest.raises(ConfigError, match=found):
        fit_together([replace(client, plan=plan) for client in people(model)], train, TOGETHER)


def test_clients_with_different_plans_are_refused():
    model = MODELS["mlp"]()
    first, *others = people(model)
    model.load({**model.initial(stream(0)), EMBEDDING: codes(model)}, 3)
    with pytest.raises(ConfigError, match="have plans of their own"):
        fit_together([first, *(replace(client, plan=Plan(rate=lambda name: 2.0)) for client in others)], PERSONAL, SGD)


def test_captions_are_everybodys_or_nobodys():
    """In one batch with a client that has none, they would stand beside the wrong images."""
    model, batches = MODELS["mlp"](), []
    clients = people(model)
    captioned = [
        replace(c, data=replace(c.data, train=replace(c.data.train, captions=(c.name,) * len(c.data.train))))
        for c in clients
    ]
    with pytest.raises(ConfigError, match="c0, c1, c2 are to train together, but only some have captions"):
        side_by_side(model, [*clients[:2], captioned[2]], SGD)
    condition = model.condition
    model.condition = lambda batch: batches.append(batch) or condition(batch)
    side_by_side(model, captioned, replace(SGD, steps=1))
    assert batches[0].captions == ("c0", "c0", "c1", "c1", "c2", "c2")
    assert batches[0].clients.tolist() == [0, 0, 1, 1, 2, 2]


def test_one_client_is_not_trained_for_others_beside_it():
    """A method that does not know of them is stopped, rather than train the first alone."""
    model = MODELS["mlp"]()
    first, *others = people(model)
    model.load({**model.initial(stream(0)), EMBEDDING: codes(model)}, 3)
    with pytest.raises(ConfigError, match="client 'c0' has 2 others beside it, and `fit` trains one client"):
        fit(replace(first, beside=tuple(others)), PERSONAL, SGD)


@pytest.mark.parametrize(("precision", "fused"), [("float32", True), ("bfloat16", False)])
def test_attention_in_bfloat16_goes_by_plain_products_on_a_cpu(precision, fused):
    seen = []

    def loss(model, batch):
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return total(model, batch)

    fit(made(Plan(loss=loss)), PERSONAL, replace(SGD, precision=precision))
    assert seen == [fused] * SGD.steps and torch.backends.cuda.flash_sdp_enabled()

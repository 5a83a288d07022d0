"""Denoising training written out in full: no optimizer, no schedule, no clipping that someone else wrote."""

import math

import torch


def plain_fit(model, moving, images, rng, how):
    """The literal twin of `fit` for noise prediction. Changes `moving` in place; returns the mean loss."""
    beta = torch.linspace(1e-4, 0.02, model.schedule.num_timesteps)
    alpha_bar = torch.cumprod(1 - beta, 0)
    first = {name: torch.zeros_like(p) for name, p in moving.items()}
    second = {name: torch.zeros_like(p) for name, p in moving.items()}
    losses = []
    for step in range(1, how.steps + 1):
        gradients = {name: torch.zeros_like(p) for name, p in moving.items()}
        for _ in range(how.accumulate):
            index = torch.randint(len(images), (how.batch_size,), generator=rng)
            t = torch.randint(model.schedule.num_timesteps, (how.batch_size,), generator=rng)
            dropped = torch.rand(how.batch_size, generator=rng) < how.condition_dropout
            noise = torch.randn(how.batch_size, *images.shape[1:], generator=rng)
            x_t = torch.stack(
                [
                    alpha_bar[t[i]] ** 0.5 * images[index[i]] + (1 - alpha_bar[t[i]]) ** 0.5 * noise[i]
                    for i in range(how.batch_size)
                ]
            )
            own, null = model.part.embedding.weight[0], model.part.null_embedding.weight[0]
            vectors = torch.stack([null if dropped[i] else own for i in range(how.batch_size)])
            if model.part.embedding_projection is not None:
                vectors = vectors @ model.part.embedding_projection.weight.T
            loss = ((model.forward(x_t, t, vectors) - noise) ** 2).mean()
            found = torch.autograd.grad(loss, list(moving.values()), materialize_grads=True)
            for name, gradient in zip(moving, found, strict=True):
                gradients[name] += gradient / how.accumulate
            losses.append(loss.item())
        if how.max_grad_norm is not None:
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
            gradients = {name: g * min(1.0, how.max_grad_norm / (norm + 1e-6)) for name, g in gradients.items()}
        lr = how.lr
        if how.warmup_steps:
            lr *= min(1.0, step / how.warmup_steps)
        if how.decay == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * (step - 1) / how.steps))
        with torch.no_grad():
            for name, p in moving.items():
                g = gradients[name]
                if how.optimizer == "adamw":
                    p -= lr * how.weight_decay * p
                else:
                    g = g + how.weight_decay * p
                if how.optimizer == "sgd":
                    p -= lr * g
                    continue
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                p -= lr * (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)) ** 0.5 + 1e-8)
    return sum(losses) / len(losses)

"""What a LoRA step on a text-to-image model costs, beside the same step written out with diffusers and peft alone.

    python benchmarks/lora.py [MODEL] [--device cuda]

Adapters of rank 4 on every attention layer of the U-Net, 12 pictures with captions, AdamW. Two loops stand beside ours:
one that puts pictures and captions through their encoders in every step, as diffusers' training scripts do, and one to
which latents and the captions' vectors are given. All begin with an adapter that adds nothing, and take turns in one
process, in an order that is turned round from one repeat to the next. Medians over repeats are written with the
versions. About 4 CPU-minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig

from personae.backbone.pipeline import open_pipeline
from personae.backbone.shipped import model_folder
from personae.core import Client, ClientData, Images, Training, everything, stream
from personae.data.emoji import emoji
from personae.local.fit import fit
from personae.personal.lora import Lora
from personae.recipe.environment import versions

PICTURES, STEPS, RANK, RATE = 12, 20, 4, 1e-3
BATCHES = (1, 4, 16)
REACH = 0.95
"""Of the samples a second of the plain loop, at least."""


def ours(folder: Path, images: Images, batch: int, device: str) -> Callable[[], float]:
    model = open_pipeline(folder, lora=Lora(RANK)).to(device)
    model.load(model.initial(stream(0, "adapters")))
    how = Training(STEPS, RATE, batch, optimizer="adamw", weight_decay=1e-2, condition_dropout=0.0)
    client = Client("own", ClientData(images, images), model, stream(0, "steps"))
    return lambda: fit(client, everything, how).loss


def plain(folder: Path, images: Images, batch: int, device: str, encoded: bool) -> Callable[[], float]:
    """`encoded`: latents and the captions' vectors are made once, before the clock starts."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    vae, unet, text, tokenizer = (
        pipe.vae.to(device),
        pipe.unet.to(device),
        pipe.text_encoder.to(device),
        pipe.tokenizer,
    )
    for network in (vae, unet, text):
        network.requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers))
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2, fused=True)
    tokens = tokenizer(
        list(images.captions), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids.to(device)
    pixels = images.floats().to(device)

    def latents_of(index: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return vae.encode(pixels[index]).latent_dist.mean * vae.config.scaling_factor

    def vectors_of(index: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return text(tokens[index])[0]

    every = torch.arange(len(images))
    latents, vectors = latents_of(every), vectors_of(every)

    def steps() -> float:
        unet.train()
        total = 0.0
        for _ in range(STEPS):
            index = torch.randint(len(images), (batch,))
            x_0 = latents[index] if encoded else latents_of(index)
            words = vectors[index] if encoded else vectors_of(index)
            noise = torch.randn_like(x_0)
            t = torch.randint(scheduler.config.num_train_timesteps, (batch,), device=device)
            predicted = unet(scheduler.add_noise(x_0, noise, t), t, encoder_hidden_states=words).sample
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(x_0, noise, t) if velocity else noise
            loss = F.mse_loss(predicted.float(), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        return total / STEPS

    return steps


def measured(folder: Path, device: str, repeats: int, threads: int) -> dict[str, Any]:
    pack = emoji(seed=0).images
    images = pack[torch.linspace(0, len(pack) - 1, PICTURES).long()]
    found: dict[str, Any] = {"versions": versions(), "threads": threads, "repeats": repeats}
    found["device"] = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    for batch in BATCHES:
        loops = {
            "ours": ours(folder, images, batch, device),
            "plain": plain(folder, images, batch, device, encoded=False),
            "plain, encoded before": plain(folder, images, batch, device, encoded=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in loops}
        for repeat in range(repeats + 1):  # the first one does not count
            for name in list(loops)[:: 1 if repeat % 2 else -1]:
                started = time.perf_counter()
                loops[name]()
                if device != "cpu":
                    torch.cuda.synchronize()
                rates[name].append(STEPS * batch / (time.perf_counter() - started))
        found[str(batch)] = {name: values[1:] for name, values in rates.items()}
    return found


def table(found: dict[str, Any]) -> str:
    """A section per device."""
    return "\n".join(line for device in sorted(found) for line in _section(device, found[device]))


def _section(device: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## {device}",
        "",
        "| pictures a step | ours, pictures a second | beside the plain loop | beside it, encoded before | to reach |",
        "|---|---|---|---|---|",
    ]
    for batch in BATCHES:
        rates = found[str(batch)]
        ratios = [
            [ours / theirs for ours, theirs in zip(rates["ours"], rates[name], strict=True)]
            for name in ("plain", "plain, encoded before")
        ]
        lines.append(f"| {batch} | {_spread(rates['ours'])} | {_spread(ratios[0])} | {_spread(ratios[1])} | {REACH} |")
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = "" if found["device"] == device else f"{found['device']}, "
    return [
        *lines,
        "",
        f"Medians of {found['repeats']} interleaved repeats of {STEPS} steps, with the smallest and the largest; "
        f"ratios of pictures a second. Rank {RANK} on every attention layer. {where}{found['threads']} "
        f"thread{'s' if found['threads'] > 1 else ''}; {names}.",
        "",
    ]


def _spread(values: list[float]) -> str:
    """Median, and the smallest and largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-t2i", help="A pipeline's folder, or a shipped model's name.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "lora.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    found[arguments.device] = measured(
        model_folder(arguments.model), arguments.device, arguments.repeats, arguments.threads
    )
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(table(found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()

"""How other tools name the parts that we call `<network>.<layer>.lora_A` and `.lora_B`.

    unet.mid_block.attentions.0.proj.lora_A.weight                   diffusers
    unet.mid_block.attentions.0.proj.lora.down.weight                diffusers before peft; also `.processor.to_q_lora.`
    base_model.model.mid_block.attentions.0.proj.lora_A.weight       peft, one file per network
    lora_unet_mid_block_attentions_0_proj.lora_down.weight           kohya; where a dot was, nobody can tell

A network is "unet.", "text_encoder." or XL's "text_encoder_2."; a layer's name is the bare model's, a text encoder's
begins with "text_model.". kohya calls the text encoder `lora_te_`, XL's two `lora_te1_` and `lora_te2_`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from personae.personal.lora import LEVEL, TEXT, TEXT_2, UNET, A, B

NETWORKS = (UNET, TEXT, TEXT_2)
ALPHA = ".alpha"

FLAT = {UNET: "lora_unet_", TEXT: "lora_te_", TEXT_2: "lora_te2_"}
FIRST_OF_TWO = "lora_te1_"
SDXL = (FIRST_OF_TWO, FLAT[TEXT_2], TEXT_2)
SDXL_BLOCKS = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|label_emb)_")

# In this order: the first that fits a key's end says what it is.
TAILS: Mapping[str, str] = {
    "a bias": r"\.lora_(?:[AB](?:\.\w+)?|up|down)\.bias",
    "DoRA": r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)*)",
    "LoHa": r"\.hada_\w+(?:\.\w+)*",
    "LoKr": r"\.lokr_\w+(?:\.\w+)*",
    "OFT": r"\.b?oft_\w+(?:\.\w+)*",
    "a LoCon's middle factor": r"\.lora_mid\.weight",
    "a difference in full": r"\.(?:diff|diff_b|set_weight)",
    A: r"(?:\.lora_A(?:\.\w+)?(?:\.weight)?|[._]lora\.down\.weight|\.lora_(?:down|linear_layer\.down)\.weight)",
    B: r"(?:\.lora_B(?:\.\w+)?(?:\.weight)?|[._]lora\.up\.weight|\.lora_(?:up|linear_layer\.up)\.weight)",
    ALPHA: r"\.alpha",
}
PATTERNS = {part: re.compile(rf"(.+?){tail}") for part, tail in TAILS.items()}

# Pieces of layers' names that have an underscore of their own.
WHOLE = re.compile(
    r"(?:down_blocks|up_blocks|mid_block|transformer_blocks|to_(?:q|k|v|out)|proj_(?:in|out)|conv_(?:in|out|shortcut)|"
    r"time_(?:emb_proj|embedding)|linear_[12]|text_model|self_attn|text_projection|(?:q|k|v|out)_proj)(?=_|$)|[^_]+"
)


def taken_apart(key: str) -> tuple[str, str] | None:
    """A key's layer, which kohya's names leave flat, and what the tensor is to it: a key of TAILS. None: no adapter's.

    An adapter that is neither named for a network nor flat belongs to the text encoder if it looks like one's.
    """
    for part, pattern in PATTERNS.items():
        if found := pattern.fullmatch(key):
            layer = found[1]
            return (layer if is_flat(layer) else _dotted(layer)), part
    return None


def is_flat(layer: str) -> bool:
    return layer.startswith((*FLAT.values(), FIRST_OF_TWO))


def is_sdxl(layer: str) -> bool:
    return layer.startswith(SDXL) or bool(SDXL_BLOCKS.match(layer))


def _dotted(layer: str) -> str:
    layer = layer.removeprefix("base_model.model.").replace(".processor.", ".")
    network = next((network for network in NETWORKS if layer.startswith(network)), None)
    if network is None:
        network = TEXT if looks_like_text([layer]) else UNET
    layer = layer.removeprefix(network)
    if network != UNET:
        layer = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", layer)
        inside = network == TEXT or looks_like_text([layer])  # the second's projection stands beside
        return network + (LEVEL + layer.removeprefix(LEVEL) if inside else layer)
    return UNET + re.sub(r"\.to_out$", ".to_out.0", layer)


def looks_like_text(names: Sequence[str]) -> bool:
    """True for layers of a text encoder that are not called so."""
    return any(re.match(rf"(?:base_model\.model\.)?(?:{LEVEL})?encoder\.layers\.", name) for name in names)


def flat(layer: str, two: bool = False) -> str:
    """kohya's name of a layer; `two` says that the model has two text encoders."""
    network = next(network for network in NETWORKS if layer.startswith(network))
    front = FIRST_OF_TWO if two and network == TEXT else FLAT[network]
    return front + layer.removeprefix(network).replace(".", "_")


def resolved(layer: str, places: Mapping[str, Sequence[str]] | None) -> tuple[str, str]:
    """(our name of a layer, "") or ("", why there is none).

    `places` has the model's layers by their flat names, XL's first text encoder as if it were the only one. Without a
    model, a flat name is cut where such names are cut.
    """
    told, layer = layer, re.sub(f"^{FIRST_OF_TWO}", FLAT[TEXT], layer)
    if places is None:
        if SDXL_BLOCKS.match(layer):
            return "", "SDXL's own names of a U-Net's layers are not supported yet"
        return (_guessed(layer) if is_flat(layer) else layer), ""
    found = places.get(layer if is_flat(layer) else flat(layer), ())
    if told.startswith(SDXL) and not any(place.startswith(FLAT[TEXT_2]) for place in places):
        return "", "it is for one of SDXL's two text encoders, for which the model has no place"
    if not is_flat(layer):
        return (layer, "") if layer in found else ("", "the model has no place for it")
    if len(found) > 1:
        return "", f"it may be {' or '.join(found)}"
    if not found:
        sdxl = " (SDXL's own names are not supported yet)" if SDXL_BLOCKS.match(layer) else ""
        return "", "the model has no place for it" + sdxl
    return found[0], ""


def _guessed(layer: str) -> str:
    network = next(network for network, front in FLAT.items() if layer.startswith(front))
    return network + ".".join(WHOLE.findall(layer.removeprefix(FLAT[network])))

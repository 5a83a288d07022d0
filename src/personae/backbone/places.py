"""Where one vector per client may enter a U-Net, beside its time embedding.

One class per place. An instance holds the weights that all clients share for one module of the U-Net: `reaches` says
which modules those are, `forward` bends such a module's output by one vector per image, and `fold` writes one vector
into the module's own weights for good, so that an ordinary U-Net draws that client's distribution. No place has a bias:
a zero vector leaves the module's output in its bits.

Letters in shapes: `B` batch, `D` the vector's width, `C H W` the module's output, `L` = H * W pixels, `R` rank.

Source: SPIRE (arXiv:2506.12303) says "activation modulation in intermediate layers"; all four readings are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from personae.errors import ConfigError

GATE_RANK = 4
"""How many rank-one directions the clients share in each gated convolution: our choice."""


class Blocks(nn.Module):
    """The second norm of a residual block, scaled by 1 + s and shifted.

    Shapes: weight [2C, D]: first the scale's rows, then the shift's.
    """

    needs = "residual blocks with a group norm"

    @staticmethod
    def reaches(name: str, module: nn.Module) -> bool:
        return name.endswith(".norm2") and isinstance(module, nn.GroupNorm)

    def __init__(self, norm: nn.GroupNorm, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * norm.num_channels, width))

    def forward(
        self,
        vectors: Float[Tensor, "B D"],
        norm: nn.GroupNorm,
        x: Float[Tensor, "B C H W"],
        output: Float[Tensor, "B C H W"],
    ) -> Float[Tensor, "B C H W"]:
        scale, shift = F.linear(vectors, self.weight)[:, :, None, None].chunk(2, dim=1)
        return output * (1 + scale) + shift

    def fold(self, vector: Float[Tensor, "1 D"], norm: nn.GroupNorm) -> None:
        scale, shift = F.linear(vector, self.weight)[0].chunk(2)
        norm.bias.mul_(1 + scale).add_(shift)
        norm.weight.mul_(1 + scale)


class Input(nn.Module):
    """Constant planes beside the image under a 1x1 first layer: a shift of the first convolution.

    Shapes: weight [C, D].
    """

    needs = "first convolution"

    @staticmethod
    def reaches(name: str, module: nn.Module) -> bool:
        return name == "conv_in"

    def __init__(self, conv: nn.Conv2d, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(conv.out_channels, width))

    def forward(
        self,
        vectors: Float[Tensor, "B D"],
        conv: nn.Conv2d,
        x: Float[Tensor, "B ..."],
        output: Float[Tensor, "B C H W"],
    ) -> Float[Tensor, "B C H W"]:
        return output + F.linear(vectors, self.weight)[:, :, None, None]

    def fold(self, vector: Float[Tensor, "1 D"], conv: nn.Conv2d) -> None:
        assert conv.bias is not None, "the first convolution of a UNet2DModel has a bias"
        conv.bias.add_(F.linear(vector, self.weight)[0])


class Token(nn.Module):
    """One more key and value beside the pixels' in an attention layer.

    A pixel sees a + p v: `a` is its attention over the pixels, as without a client; v the token's value; p the softmax
    weight of the token's key among the pixels' keys and its own. Departure from a plain longer sequence, which gives
    (1 - p) a + p v: there even a zero vector's token would take weight from the pixels and change the model.
    At the start p is near 1 / (L + 1), so this place begins with less influence than the others.

    Shapes: weight [2C, D]: first the key's rows, then the value's.
    Idea: the added keys and values of diffusers' `AttnAddedKVProcessor`.
    """

    needs = 'attention layers (the presets "tiny_attention", "small" and "cifar" have some)'

    @staticmethod
    def reaches(name: str, module: nn.Module) -> bool:
        return isinstance(module, Attention)

    def __init__(self, attention: Attention, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * attention.inner_dim, width))

    def forward(
        self,
        vectors: Float[Tensor, "B D"],
        attention: Attention,
        x: Float[Tensor, "B C H W"],
        output: Float[Tensor, "B C H W"],
    ) -> Float[Tensor, "B C H W"]:
        # Queries and keys are made once more, so that the layer's own attention stays diffusers'.
        pixels = x.flatten(2)
        if attention.group_norm is not None:
            pixels = attention.group_norm(pixels)
        pixels = pixels.transpose(1, 2)
        key, value = F.linear(vectors, self.weight)[:, None].chunk(2, dim=2)
        query, keys = attention.to_q(pixels), torch.cat([attention.to_k(pixels), key], dim=1)
        values = torch.cat([torch.zeros_like(keys[:, :-1]), value], dim=1)
        split = [part.unflatten(2, (attention.heads, -1)).transpose(1, 2) for part in (query, keys, values)]
        change = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        change = F.linear(change, attention.to_out[0].weight).transpose(1, 2).reshape(output.shape)
        return output + change / attention.rescale_output_factor

    def fold(self, vector: Float[Tensor, "1 D"], attention: Attention) -> None:
        foldable = ", ".join(place for place in PLACES if place != "token")
        raise ConfigError(
            'place "token" cannot be exported: no weights of an ordinary U-Net stand for one more key and value. '
            f"Sample from the run itself, or train with one of {foldable}"
        )


class Gate(nn.Module):
    """The second convolution of a residual block, changed by sum_i (g e)_i a_i b_i^T for the vector e.

    The directions a_i and b_i are shared, and so is g; a client's own are the coefficients g e. Of a block's two
    convolutions we take the second: it sees the image and the time, and ends what the block adds.

    Shapes: g [R, D]; a [C, R]; b [R, C, h, w] for a kernel of h x w.
    """

    needs = "residual blocks"

    @staticmethod
    def reaches(name: str, module: nn.Module) -> bool:
        return name.endswith(".conv2") and isinstance(module, nn.Conv2d)

    def __init__(self, conv: nn.Conv2d, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(GATE_RANK, width))
        self.a = nn.Parameter(torch.zeros(conv.out_channels, GATE_RANK))
        self.b = nn.Parameter(torch.zeros(GATE_RANK, conv.in_channels, *conv.kernel_size))

    def forward(
        self,
        vectors: Float[Tensor, "B D"],
        conv: nn.Conv2d,
        x: Float[Tensor, "B ..."],
        output: Float[Tensor, "B C H W"],
    ) -> Float[Tensor, "B C H W"]:
        coefficients = F.linear(vectors, self.g)[:, :, None, None]
        seen = F.conv2d(x, self.b, stride=conv.stride, padding=conv.padding)
        return output + F.conv2d(coefficients * seen, self.a[:, :, None, None])

    def fold(self, vector: Float[Tensor, "1 D"], conv: nn.Conv2d) -> None:
        coefficients = F.linear(vector, self.g)[0]
        conv.weight.add_(torch.einsum("or,r,rihw->oihw", self.a, coefficients, self.b))


Head = Blocks | Input | Token | Gate
HEADS: dict[str, type[Head]] = {"blocks": Blocks, "input": Input, "token": Token, "gate": Gate}
PLACES = ("time", *HEADS)


def heads(unet: UNet2DModel, place: str, width: int) -> dict[str, Head]:
    """The shared weights by the name of the module that they belong to; none for "time".

    Raises: ConfigError, when the place is unknown, or the U-Net has nothing of the kind.
    """
    if place not in PLACES:
        raise ConfigError(f"place is {place!r}; expected one of {', '.join(PLACES)}")
    if place == "time":
        return {}
    kind = HEADS[place]
    found = {name: kind(module, width) for name, module in unet.named_modules() if kind.reaches(name, module)}
    if not found:
        others = ", ".join(other for other in PLACES if other != place)
        raise ConfigError(
            f"place is {place!r}, but this U-Net has no {kind.needs}; "
            f"take a backbone with them, or another place: {others}"
        )
    return found

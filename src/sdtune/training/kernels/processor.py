"""diffusers' attention with the projections of one input as one, PEFT's LoRA on them included."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import nn

from sdtune.training.kernels.attention import attention
from sdtune.training.kernels.launch import usable
from sdtune.training.kernels.lora_linear import LoraCopies, LoraGroup


class Projections:
    """Layers that read the same input; a group where all are frozen and of a kind that it knows, else one by one."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.made_for = _state(self.layers)
        self.group = _group(self.layers)

    def are(self, layers: Sequence[Any]) -> bool:
        """They are these, with the adapters that they had, where they were."""
        return self.made_for == _state(layers) and (self.group is None or self.group.whole)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.group is None or not self.group.takes(x):
            return tuple(layer(x) for layer in self.layers)
        return self.group(x)


class FusedAttnProcessor:
    """AttnProcessor2_0, with one product for q, k and v of self-attention and for k and v of cross-attention."""

    def __init__(self) -> None:
        self.projections: list[Projections] = []
        # A CUDA graph goes on with the tensors it was recorded with: adapters that come back find theirs again.
        self.known: list[Projections] = []

    @staticmethod
    def fits(attn: Attention) -> bool:
        without = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
        return (
            all(not getattr(attn, name, None) for name in without)
            and not attn.residual_connection
            and attn.rescale_output_factor == 1
            and not attn.upcast_attention
            and not attn.upcast_softmax
            and attn.scale == (attn.inner_dim // attn.heads) ** -0.5
        )

    def bind(self, attn: Attention) -> list[LoraGroup]:
        """See whether the layers are as they were; the groups whose adapters must be copied.

        PEFT puts adapters on layers, switches them off, merges them and changes their scale without a word to us.
        """
        inputs = [attn.to_q, attn.to_k, attn.to_v]
        sets = [inputs[:1], inputs[1:]] if attn.is_cross_attention else [inputs]
        sets.append([attn.to_out[0]])
        # A sample may be drawn first, without gradients, for which tensors could not be used later.
        with torch.inference_mode(False):
            self.projections = [self._projections(layers) for layers in sets]
        return [one.group for one in self.projections if one.group is not None and one.group.width]

    def _projections(self, layers: Sequence[Any]) -> Projections:
        for one in self.known:
            if one.are(layers):
                return one
        # Weights that were moved took their graph with them.
        self.known = [one for one in self.known if one.group is None or one.group.whole]
        self.known.append(Projections(layers))
        return self.known[-1]

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys.shape[1], len(keys))
            attention_mask = attention_mask.view(len(keys), attn.heads, -1, attention_mask.shape[-1])
        projections = self.projections if usable(hidden_states) else []
        if not projections:
            query, key, value = attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys)
        elif attn.is_cross_attention:
            (query,), (key, value) = projections[0](hidden_states), projections[1](keys)
        else:
            query, key, value = projections[0](hidden_states)
        query, key, value = (one.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for one in (query, key, value))
        attended = attention(query, key, value, attention_mask).transpose(1, 2).flatten(2)
        result = projections[-1](attended)[0] if projections else attn.to_out[0](attended)
        dropped: torch.Tensor = attn.to_out[1](result)
        return dropped


class Renewal:
    """Before the UNet's forward pass: the attentions' layers are looked at, and their adapters copied together."""

    def __init__(self, attentions: Sequence[Attention]) -> None:
        self.attentions, self.copies = list(attentions), LoraCopies()

    def __call__(self, *_: Any) -> None:
        processors = ((attn, attn.processor) for attn in self.attentions)
        self.copies([group for attn, own in processors if type(own) is FusedAttnProcessor for group in own.bind(attn)])


def _adapter(layer: Any) -> str | None:
    """The name of the adapter that the layer computes with, if it is one LoRA and nothing else."""
    if type(layer) is not LoraLayer or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    plain = (
        name in layer.lora_A
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
    )
    return name if plain else None


def _state(layers: Sequence[Any]) -> list[Any]:
    """What a group depends on: it must be made anew where this has changed."""
    return [(layer, name := _adapter(layer), name and layer.scaling[name], _linear(layer, name)) for layer in layers]


def _linear(layer: Any, name: str | None) -> tuple[Any, ...] | None:
    """The frozen linear below, and what is of it; None if it is another kind of layer, or trained itself."""
    linear = layer.base_layer if name else layer
    if type(linear) is not nn.Linear or any(weight.requires_grad for weight in linear.parameters()):
        return None
    return linear, linear.weight.dtype, linear.weight.device


def _group(layers: Sequence[Any]) -> LoraGroup | None:
    """The layers as a group; None if one is trained itself, or has an adapter that a group does not know."""
    names = [_adapter(layer) for layer in layers]
    linears = [_linear(layer, name) for layer, name in zip(layers, names, strict=True)]
    # A single layer without an adapter is one product already.
    if None in linears or len({linear[1:] for linear in linears if linear}) > 1 or (len(layers) == 1 and not names[0]):
        return None
    pairs = list(zip(layers, names, strict=True))
    return LoraGroup(
        [linear[0].weight for linear in linears if linear],
        [linear[0].bias for linear in linears if linear],
        [layer.lora_A[name].weight if name else None for layer, name in pairs],
        [layer.lora_B[name].weight if name else None for layer, name in pairs],
        [layer.scaling[name] if name else 1.0 for layer, name in pairs],
    )

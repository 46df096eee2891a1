"""diffusers' modules with the kernels in them: their parameters, names and answers, by fewer passes over memory.

A module becomes one of these by its ``__class__``, so that nothing of it moves. Each computes as its parent does where
its tensors are not on a GPU. Hidden states go through in channels_last from end to end: what attention reads,
[batch, pixels, channels], is the same memory.
"""

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from torch import nn
from torch.nn import functional

from sdtune.training.kernels.geglu import geglu
from sdtune.training.kernels.group_norm import group_norm
from sdtune.training.kernels.launch import usable
from sdtune.training.kernels.layer_norm import add_layer_norm
from sdtune.training.kernels.residual import add_bias


class FusedResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """Two kernels of norm and SiLU, with the time embedding and the first convolution's bias; one of the residual."""

    @staticmethod
    def fits(block: ResnetBlock2D) -> bool:
        return (
            block.time_embedding_norm == "default"
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.upsample is None
            and block.downsample is None
            and block.output_scale_factor == 1
            and all(type(norm) is nn.GroupNorm and norm.affine for norm in (block.norm1, block.norm2))
        )

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not usable(input_tensor):
            result: torch.Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return result
        hidden_states, residual = _norm(self.norm1, input_tensor, silu=True)
        hidden_states, bias = _convolution(self.conv1, hidden_states)
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden_states, _ = _norm(self.norm2, hidden_states, silu=True, shift=shift, offset=bias)
        hidden_states, bias = _convolution(self.conv2, self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            residual = _pointwise(self.conv_shortcut, residual)
        return hidden_states + residual if bias is None else add_bias(hidden_states, residual, bias)


class FusedTransformer2DModel(Transformer2DModel):  # type: ignore[misc]
    """Projections as matrix products of pixels; the residual's gradient is added in the norm's kernel."""

    @staticmethod
    def fits(model: Transformer2DModel) -> bool:
        return bool(model.is_input_continuous) and type(model.norm) is nn.GroupNorm

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        # The UNet has made biases of masks before; what else comes is left to diffusers.
        masks = (attention_mask, encoder_attention_mask)
        if not usable(hidden_states) or any(mask is not None and mask.ndim == 2 for mask in masks):
            return super().forward(
                hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels,
                cross_attention_kwargs, attention_mask, encoder_attention_mask, return_dict,
            )  # fmt: skip
        height, width = hidden_states.shape[2:]
        hidden_states, residual = _norm(self.norm, hidden_states)
        if self.use_linear_projection:
            hidden_states = self.proj_in(_tokens(hidden_states))
        else:
            hidden_states = _tokens(_pointwise(self.proj_in, hidden_states))
        for block in self.transformer_blocks:
            inputs = (
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels,
            )  # fmt: skip
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states = block(*inputs)
        if self.use_linear_projection:
            output = _image(self.proj_out(hidden_states), height, width)
        else:
            output = _pointwise(self.proj_out, _image(hidden_states, height, width))
        output = output + residual
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class FusedBasicTransformerBlock(BasicTransformerBlock):  # type: ignore[misc]
    """Residual additions and norms by one kernel each."""

    @staticmethod
    def fits(block: BasicTransformerBlock) -> bool:
        norms = (block.norm1, block.norm2, block.norm3)
        return (
            block.norm_type == "layer_norm"
            and block.pos_embed is None
            and block.attn2 is not None
            and not hasattr(block, "fuser")
            and all(type(norm) is nn.LayerNorm and norm.elementwise_affine and norm.bias is not None for norm in norms)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if not usable(hidden_states) or self._chunk_size is not None or hidden_states.ndim != 3:
            result: torch.Tensor = super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
            return result
        more = cross_attention_kwargs or {}
        normed, hidden_states = _add_norm(self.norm1, hidden_states, None)
        own = encoder_hidden_states if self.only_cross_attention else None
        attended = self.attn1(normed, encoder_hidden_states=own, attention_mask=attention_mask, **more)
        normed, hidden_states = _add_norm(self.norm2, attended, hidden_states)
        attended = self.attn2(
            normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **more
        )
        normed, hidden_states = _add_norm(self.norm3, attended, hidden_states)
        return self.ff(normed) + hidden_states  # type: ignore[no-any-return]


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """Product and GELU by one kernel."""

    @staticmethod
    def fits(module: GEGLU) -> bool:
        return True

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        projected: torch.Tensor = self.proj(hidden_states)
        return geglu(projected)


class FusedNormSilu(nn.GroupNorm):
    """The UNet's last norm, and the SiLU that it calls after it."""

    @staticmethod
    def fits(norm: nn.Module | None, activation: nn.Module | None) -> bool:
        return type(norm) is nn.GroupNorm and norm.affine and isinstance(activation, nn.SiLU)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _norm(self, input, silu=True)[0]


def _norm(
    norm: nn.GroupNorm,
    x: torch.Tensor,
    silu: bool = False,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, shift, offset)


def _add_norm(norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


def _convolution(conv: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The convolution without its bias, and that; with it and None where the layer has an adapter."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or conv.bias is None:
        return conv(x), None
    return functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups), conv.bias


def _pointwise(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A convolution of single pixels, as the matrix product that it is: with its bias in one kernel."""
    if type(conv) is not nn.Conv2d or conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1:
        result: torch.Tensor = conv(x)
        return result
    return _image(functional.linear(_tokens(x), conv.weight.flatten(1), conv.bias), *x.shape[2:])


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """[batch, channels, height, width] as [batch, pixels, channels]: the same memory in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[batch, pixels, channels] as [batch, channels, height, width] in channels_last."""
    image: torch.Tensor = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return image

"""Multimodal diffusion transformer of SD3 (arXiv 2403.03206).

Image and text have separate streams of weights and share one attention.

Shapes: z_t (B, C, H, W) with H and W divisible by the patch size, t (B,) in [0, 1], cond.text
(B, T, J), cond.pooled (B, P); the output has the shape of z_t and is exactly zero at
initialisation.  Padding tokens are attended to, as in SD3: the conditioner makes T the same for
every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lpl_pretrain.config.model import MMDiTConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.denoiser import DenoiserOutput, check_hidden_blocks
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.models.layers import (
    PatchEmbed,
    PatchTransformer,
    TimestepEmbedder,
    mlp,
    modulate,
    norm,
    unpatchify,
)


class MMDiT(PatchTransformer):
    config: MMDiTConfig

    def __init__(
        self, config: MMDiTConfig, channels: int, height: int, width: int, text: TextShape
    ) -> None:
        super().__init__()
        self.set_latent_grid(config, height, width)
        self.x_embedder = PatchEmbed(
            None, config.patch_size, channels, config.width, strict_img_size=False
        )
        self.t_embedder = TimestepEmbedder(config.width)
        self.text_embedder = nn.Linear(text.width, config.width)
        self.pooled_embedder = nn.Sequential(
            nn.Linear(text.pooled_width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
        )
        self.blocks = nn.ModuleList(
            JointBlock(config, last=i == config.depth - 1) for i in range(config.depth)
        )
        self.final_norm = norm(config.width, rms=False)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))
        self.final_linear = nn.Linear(config.width, config.patch_size**2 * channels)
        self._initialise()

    def forward(
        self, z_t: Tensor, t: Tensor, cond: Conditioning, hidden_blocks: tuple[int, ...] = ()
    ) -> DenoiserOutput:
        check_hidden_blocks(hidden_blocks, len(self.blocks))
        assert cond.text is not None and cond.pooled is not None
        dtype = self.x_embedder.proj.weight.dtype
        rows, columns = z_t.shape[-2] // self.patch, z_t.shape[-1] // self.patch
        image = self.x_embedder(z_t.to(dtype)) + self.positions(rows, columns)
        text = self.text_embedder(cond.text.to(dtype))
        condition = self.t_embedder(t) + self.pooled_embedder(cond.pooled.to(dtype))
        hidden = {}
        for index, block in enumerate(self.blocks):
            image, text = block(image, text, condition)
            if index in hidden_blocks:
                hidden[index] = image
        shift, scale = self.final_modulation(condition).chunk(2, dim=1)
        output = self.final_linear(modulate(self.final_norm(image), shift, scale))
        return DenoiserOutput(unpatchify(output, self.patch, rows, columns), hidden)

    def _initialise(self) -> None:
        """Initialise as DiT does.

        Xavier for matrices, normal(0.02) for embeddings, zero for every gate and for the output.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        parameters = dict(self.named_parameters())
        nn.init.xavier_uniform_(parameters["x_embedder.proj.weight"].data.flatten(1))
        nn.init.zeros_(parameters["x_embedder.proj.bias"])
        for name, parameter in parameters.items():
            if name.startswith(("t_embedder.mlp", "pooled_embedder")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if "modulation" in name or name.startswith("final_linear"):
                nn.init.zeros_(parameter)


class JointBlock(nn.Module):
    """Block with one attention over the tokens of image and text.

    The last block's text output is not used, so its text stream ends with the attention.
    """

    def __init__(self, config: MMDiTConfig, *, last: bool) -> None:
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config, context_pre_only=last)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        image_mod = self.image.modulation(condition)
        text_mod = self.text.modulation(condition)
        image_qkv = self.image.project_qkv(image, *image_mod[:2])
        text_qkv = self.text.project_qkv(text, *text_mod[:2])
        query, key, value = (
            torch.cat(pair, dim=2) for pair in zip(image_qkv, text_qkv, strict=True)
        )
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        num_image_tokens = image.shape[1]
        image = self.image.add_attention_output(
            image, attended[:, :num_image_tokens], *image_mod[2:]
        )
        if not self.text.context_pre_only:
            text = self.text.add_attention_output(
                text, attended[:, num_image_tokens:], *text_mod[2:]
            )
        return image, text


class Stream(nn.Module):
    """Weights of a block for one kind of tokens.

    `context_pre_only` (diffusers' name): the tokens are attended to and not updated any more.
    """

    def __init__(self, config: MMDiTConfig, *, context_pre_only: bool = False) -> None:
        super().__init__()
        width = config.width
        head_width = width // config.heads
        self.heads = config.heads
        self.context_pre_only = context_pre_only
        self.norm1 = norm(width, rms=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(head_width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(width, (2 if context_pre_only else 6) * width)
        )
        if not context_pre_only:
            self.proj = nn.Linear(width, width)
            self.norm2 = norm(width, rms=False)
            self.mlp = mlp(width, config.mlp_ratio, swiglu=False)

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, width) each: shift and scale before attention; then, unless `context_pre_only`, its
        gate, and shift, scale and gate of the MLP.
        """
        return self.adaLN_modulation(condition).chunk(2 if self.context_pre_only else 6, dim=1)

    def project_qkv(
        self, tokens: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value (B, heads, N, width / heads)."""
        mixed = self.qkv(modulate(self.norm1(tokens), shift, scale)).unflatten(
            -1, (3, self.heads, -1)
        )
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype), value

    def add_attention_output(
        self,
        tokens: Tensor,
        attended: Tensor,
        gate_a: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate_m: Tensor,
    ) -> Tensor:
        """Add the gated attention output (B, N, width), then the gated MLP."""
        tokens = tokens + gate_a[:, None] * self.proj(attended)
        return tokens + gate_m[:, None] * self.mlp(modulate(self.norm2(tokens), shift, scale))

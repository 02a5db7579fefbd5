"""CLIP as an extractor: embeddings of pictures for CMMD (arXiv 2401.09603), and of captions for
CLIPScore (arXiv 2104.08718).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation.extractor import Extractor, Features, resized, sha256_of

MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of OpenAI's pictures


def clip(config: ExtractorConfig, folder: Path, device: torch.device) -> Extractor:
    """Raises ConfigError."""
    try:
        found: Any = transformers.CLIPModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        network, loaded = found
        if missing := sorted(
            loaded["missing_keys"]
        ):  # transformers draws them at random, with a warning
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        weights_sha256 = sha256_of(folder / "model.safetensors")
    except (
        Exception
    ) as problem:  # transformers, tokenizers and safetensors have errors of many kinds
        raise ConfigError(
            f"extractors.{config.label}.weights={folder}: transformers cannot load it: "
            f"{str(problem)[:300]}"
        ) from None
    network = network.eval().requires_grad_(False).to(device)
    side, longest = (
        network.config.vision_config.image_size,
        network.config.text_config.max_position_embeddings,
    )
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def extract(network: Any, pixels: Tensor) -> Features:
        images = (resized(pixels, side).clamp(0, 255) / 255 - mean) / std
        return {"pooled": _embedding(network.get_image_features(pixel_values=images))}

    @torch.no_grad()
    def embed_text(captions: list[str]) -> Tensor:
        tokens = tokenizer(
            captions, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        return _embedding(network.get_text_features(**tokens))

    return Extractor(
        config=config,
        suffix="" if config.name is None else f"_{config.name}",
        dimension=network.config.projection_dim,
        weights_sha256=weights_sha256,
        preprocessing=f"bicubic, antialiased, to {side} px; mean {MEAN}, std {STD}",
        network=network,
        extract=extract,
        embed_text=embed_text,
    )


def clip_score(pictures: Tensor, captions: Tensor) -> float:
    """Mean of 100 max(cos, 0) of (N, D) embeddings, float64 (arXiv 2104.08718, equation 1, in the
    scale that tools print).
    """
    cosine = torch.nn.functional.cosine_similarity(pictures.double(), captions.double(), dim=1)
    return 100 * cosine.clamp(min=0).mean().item()


def _embedding(found: Any) -> Tensor:
    """transformers 5 gives a record, 4 the tensor."""
    return (found if isinstance(found, Tensor) else found.pooler_output).float()

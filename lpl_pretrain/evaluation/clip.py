"""CLIP as an extractor: embeddings of images for CMMD (arXiv 2401.09603), and of captions for
CLIPScore (arXiv 2104.08718).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.config import extractors
from lpl_pretrain.config.hashing import file_sha256
from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation.extractor import (
    MAX_ERROR_LENGTH,
    Extractor,
    ExtractorSpec,
    Features,
    resize_bicubic,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each color channel over OpenAI's training images."""
STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of each color channel over OpenAI's training images."""


def load_clip(config: ExtractorConfig, device: torch.device) -> Extractor:
    """Load a CLIPModel and its tokenizer from a local folder.  Raises ConfigError."""
    folder = Path(str(config.weights))
    try:
        network, tokenizer = _read_folder(folder)
        weights_sha256 = file_sha256(folder / "model.safetensors")
    except Exception as error:
        # transformers, tokenizers and safetensors raise errors of many kinds
        raise ConfigError(
            f"extractors.{config.label}.weights={folder}: transformers cannot load it: "
            f"{str(error)[:MAX_ERROR_LENGTH]}"
        ) from None
    network = network.eval().requires_grad_(False).to(device)
    side = network.config.vision_config.image_size
    max_tokens = network.config.text_config.max_position_embeddings
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(STD, device=device).view(3, 1, 1)

    def extract(network: Any, pixels: Tensor) -> Features:
        images = (resize_bicubic(pixels, side).clamp(0, 255) / 255 - mean) / std
        return {"pooled": _embedding(network.get_image_features(pixel_values=images))}

    @torch.no_grad()
    def embed_text(captions: list[str]) -> Tensor:
        tokens = tokenizer(
            captions, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
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


def _read_folder(folder: Path) -> tuple[Any, Any]:
    """(CLIPModel, tokenizer).  Raises ValueError for absent tensors, and transformers' errors."""
    import transformers

    loaded: Any = transformers.CLIPModel.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    network, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers would draw them at random, with no more than a warning
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return network, tokenizer


def _embedding(output: Any) -> Tensor:
    """Unpack an embedding: transformers 5 returns a record, transformers 4 the tensor itself."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()


CLIP = ExtractorSpec(extractors.CLIP, load_clip)

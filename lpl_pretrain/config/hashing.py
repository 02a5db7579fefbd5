"""Hashes that identify frozen networks and files: of a configuration and weights, from the files
alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from lpl_pretrain.config.model_json import read_model_json
from lpl_pretrain.errors import ConfigError

WEIGHTS = "diffusion_pytorch_model.safetensors"
DESCRIPTIVE = ("_class_name", "_diffusers_version", "_name_or_path")


@lru_cache(maxsize=8)
def autoencoder_identity(folder: Path) -> str:
    """sha256 over config.json (without the keys that only describe the file) and the weights.
    Raises ConfigError.
    """
    config, weights = folder / "config.json", folder / WEIGHTS
    for path in (config, weights):
        if not os.path.isfile(path):
            raise ConfigError(
                f"autoencoder {folder}: {path.name} not found; wanted a folder as diffusers' "
                "save_pretrained writes it"
            )
    values = read_model_json(f"autoencoder {folder}", config).values
    settings = {key: value for key, value in values.items() if key not in DESCRIPTIVE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    _add_content(digest, weights, f"autoencoder {folder}")
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal; the file may be larger than the memory."""
    digest = hashlib.sha256()
    _update_from_file(digest, Path(path))
    return digest.hexdigest()


def _update_from_file(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)


def _add_content(digest: Any, path: Path, where: str) -> None:
    """Adds the content of a file to `digest`.  Raises ConfigError."""
    try:
        _update_from_file(digest, path)
    except OSError as error:
        raise ConfigError(f"{where}: {path.name} cannot be read: {error.strerror}") from None


TEXT_ENCODER_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".bin")
"""Configuration, weights, vocabularies."""


@lru_cache(maxsize=8)
def text_encoder_identity(folder: Path, where: str) -> str:
    """sha256 over the files that transformers may read.  `where` is the key, for errors.  Raises
    ConfigError.
    """
    if not os.path.isfile(folder / "config.json"):
        raise ConfigError(
            f"{where}.folder={folder}: config.json not found; wanted a text encoder "
            "and its tokenizer as transformers' save_pretrained writes them"
        )
    digest = hashlib.sha256()
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{where}.folder={folder}: cannot be listed: {error.strerror}") from None
    for path in files:
        if path.is_file() and path.suffix in TEXT_ENCODER_SUFFIXES:
            digest.update(path.name.encode())
            _add_content(digest, path, f"{where}.folder={folder}")
    return digest.hexdigest()

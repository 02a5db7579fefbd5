"""`lpl-pretrain data show FOLDER`: what is in a data folder, and a sheet of its pictures."""

from __future__ import annotations

from pathlib import Path

from lpl_pretrain.config.dataset import is_url, read_index


def show(folder: str, *, autoencoder: str | None, output: str | None, pictures: int) -> None:
    from lpl_pretrain.encoding.show import contact_sheet, describe  # torch: not for --help
    from lpl_pretrain.models.autoencoder import load_autoencoder

    print(describe(folder))
    if pictures == 0:
        return
    path = Path(output or ("contact_sheet.png" if is_url(folder) else f"{folder}/contact_sheet.png"))
    contact_sheet(folder, load_autoencoder(autoencoder or read_index(folder).autoencoder.name), path, pictures)
    print(f"  pictures     {path}")

"""`lpl-pretrain data show FOLDER`: what is in a data folder, and a sheet of its pictures."""

from __future__ import annotations

from lpl_pretrain.config.dataset import is_url, read_index
from lpl_pretrain.config.paths import expand


def show(folder: str, *, autoencoder: str | None, output: str | None, pictures: int) -> None:
    from lpl_pretrain.encoding.show import contact_sheet, describe  # torch: not for --help
    from lpl_pretrain.models.autoencoder import load_autoencoder

    folder = folder if is_url(folder) else str(expand(folder))
    print(describe(folder))
    if pictures == 0:
        return
    path = expand(output or ("contact_sheet.png" if is_url(folder) else f"{folder}/contact_sheet.png"))
    contact_sheet(folder, load_autoencoder(autoencoder or read_index(folder).autoencoder.name), path, pictures)
    print(f"  pictures     {path}")

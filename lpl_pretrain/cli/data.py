"""`lpl-pretrain data show FOLDER`: what is in a data folder, and a sheet of its pictures; `data
seal`: its checksums.
"""

from __future__ import annotations

from lpl_pretrain.config.dataset import read_index
from lpl_pretrain.config.paths import expand, is_url


def show(folder: str, *, autoencoder: str | None, output: str | None, pictures: int) -> None:
    from lpl_pretrain.encoding.show import contact_sheet, describe  # torch: not for --help
    from lpl_pretrain.models.autoencoder import load_autoencoder

    folder = folder if is_url(folder) else str(expand(folder))
    print(describe(folder))
    if pictures == 0:
        return
    path = expand(
        output or ("contact_sheet.png" if is_url(folder) else f"{folder}/contact_sheet.png")
    )
    contact_sheet(
        folder, load_autoencoder(autoencoder or read_index(folder).autoencoder.name), path, pictures
    )
    print(f"  pictures     {path}")


def seal(folder: str) -> None:
    from lpl_pretrain.encoding.seal import seal as add_digests
    from lpl_pretrain.runtime.log import set_up_logging

    set_up_logging(0)
    was = read_index(folder).format_version
    index = add_digests(folder)
    if was == index.format_version:
        print(f"{folder}: has its checksums already (format {was}); left alone")
    else:
        print(
            f"{folder}: {index.samples} samples compared with the index; format {was} is now "
            f"{index.format_version}"
        )

"""Rebuild the emoji images in `lpl_pretrain/assets/emoji/` from their npm package, byte for byte.

    python tools/build_emoji.py                     # fetch the package with `npm pack` (74 MB)
    python tools/build_emoji.py --package FOLDER    # unpacked emoji-datasource-google 16.0.0
    python tools/build_emoji.py --check             # rebuild elsewhere, compare with shipped files

Each base image (no skin-tone variants, which would put near-duplicates into both splits) is
composited on white and stored as a WebDataset sample `<key>.png/.cls/.txt/.json`.  A keyed hash of
the image's key assigns it to train or held-out.  The bytes of a PNG depend on the zlib inside
Pillow; `origin.json` holds the version that made the shipped files.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import PIL
import webdataset
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
ASSETS = Path(__file__).resolve().parent.parent / "lpl_pretrain" / "assets" / "emoji"
HELD_OUT_ONE_IN = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--package", type=Path, help="unpacked npm package; fetched with `npm pack` when absent"
    )
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; compare with the files in --output"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        package = args.package or fetch_package(Path(scratch))
        built = Path(scratch) / "built" if args.check else args.output
        origin = build(package, built)
        if args.check:
            compare(origin, args.output)
    print(json.dumps(origin, indent=2))


def fetch_package(folder: Path) -> Path:
    try:
        name = subprocess.run(
            ["npm", "pack", PACKAGE, "--silent"],
            cwd=folder,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.split()[-1]
    except FileNotFoundError:
        sys.exit(
            f"npm is not installed: install it, or unpack {PACKAGE} yourself and pass "
            "--package FOLDER"
        )
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def build(package: Path, output: Path) -> dict:
    """Write train.tar, held_out.tar and origin.json into `output`; return the latter."""
    output.mkdir(parents=True, exist_ok=True)
    records = [r for r in json.loads((package / "emoji.json").read_text()) if r["has_img_google"]]
    records.sort(key=lambda r: r["unified"])
    categories = sorted({r["category"] for r in records})
    counts = {"train": 0, "held_out": 0}
    writers = {
        split: webdataset.TarWriter(str(output / f"{split}.tar"), mtime=0, user="lpl", group="lpl")
        for split in counts
    }
    for record in records:
        key = Path(record["image"]).stem
        split = split_of(key)
        counts[split] += 1
        writers[split].write(
            {
                "__key__": key,
                "png": png_on_white(package / "img" / "google" / "64" / record["image"]),
                "cls": str(categories.index(record["category"])).encode(),
                "txt": record["name"].lower().encode(),
                "json": json.dumps(
                    {
                        "class_name": record["category"],
                        "subcategory": record["subcategory"],
                        "unified": record["unified"],
                    },
                    sort_keys=True,
                ).encode(),
            }
        )
    for writer in writers.values():
        writer.close()
    origin = {
        "npm_package": PACKAGE,
        "licence": "images: Noto Emoji, Apache-2.0 (LICENSE); emoji.json metadata: MIT",
        "pillow": PIL.__version__,
        "classes": categories,
        "files": {
            f"{split}.tar": {"samples": count, "sha256": sha256(output / f"{split}.tar")}
            for split, count in counts.items()
        },
    }
    (output / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
    return origin


def split_of(key: str) -> str:
    digest = hashlib.sha256(f"lpl-pretrain emoji split:{key}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def png_on_white(path: Path) -> bytes:
    image = Image.open(path).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False, compress_level=9)
    return buffer.getvalue()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(origin: dict, shipped: Path) -> None:
    expected = json.loads((shipped / "origin.json").read_text())
    if origin["files"] == expected["files"]:
        return
    sys.exit(
        f"rebuilt files differ from {shipped}: {origin['files']} against {expected['files']}; they "
        f"were made with Pillow {expected['pillow']}, this is {origin['pillow']} (another zlib "
        "writes other PNG bytes)"
    )


if __name__ == "__main__":
    main()

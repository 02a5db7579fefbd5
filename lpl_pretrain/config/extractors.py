"""Feature extractors, as far as a configuration needs to know them: kind, outputs, weights.

evaluation/registry.py adds the function that loads each.  Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Output = Literal["features", "spatial", "logits", "joint"]
"""Feature kinds that a metric can ask an extractor for.

features: one vector an image, (N, D), of a network trained on images alone
spatial:  the first channels of a convolution, flattened
logits:   class scores, (N, classes)
joint:    one vector an image, (N, D), in a space that captions are embedded into as well
"""

FID_WEIGHTS_SHA256_START = "6726825d"
FID_WEIGHTS_HELP = (
    "download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth "
    "(91 MiB; sha256 begins 6726825d; torch-fidelity's weights-inception-2015-12-05-6726825d.pth "
    "serves too), put it anywhere, such as ~/weights/, and set the extractor's weights to its "
    "path; or use kind: efficientnet_lite0, which needs no download"
)


@dataclass(frozen=True, slots=True)
class ExtractorInfo:
    """One kind of extractor; its loader is the ExtractorSpec of the same kind."""

    kind: str
    """Value of an extractor's key `kind`."""
    outputs: frozenset[Output]
    weights: Literal["package", "file", "folder"]
    """Source of the weights: a package that is installed with this one, or a path."""
    weights_help: str = ""
    """Remedy for absent weights; `{network}` stands for the extractor's `network`."""
    needs_network: bool = False
    """Whether the configuration must name a `network`."""


EFFICIENTNET_LITE0 = ExtractorInfo("efficientnet_lite0", frozenset({"features"}), "package")
INCEPTION = ExtractorInfo(
    "inception", frozenset({"features", "spatial", "logits"}), "file", FID_WEIGHTS_HELP
)
TIMM = ExtractorInfo(
    "timm",
    frozenset({"features"}),
    "file",
    "save timm's {network} as .safetensors, put it anywhere, and set weights to its path",
    needs_network=True,
)
CLIP = ExtractorInfo(
    "clip",
    frozenset({"joint"}),
    "folder",
    "set weights to a folder of a CLIPModel and its tokenizer, as transformers' save_pretrained "
    "writes them",
)

EXTRACTORS: dict[str, ExtractorInfo] = {
    info.kind: info for info in (EFFICIENTNET_LITE0, INCEPTION, TIMM, CLIP)
}

"""Checks of features before a metric compares them: number, width, finite values."""

from __future__ import annotations

from torch import Tensor

from lpl_pretrain.errors import DataError

MAX_NAMED_ROWS = 8


def check_pair(a: Tensor, b: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Apply `check_features` to two sets (N, D) and (M, D) that are to be compared."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{a.shape[1]} and {b.shape[1]} features an image: take both sets from one extractor"
        )
    return check_features(a, at_least=at_least), check_features(b, at_least=at_least)


def check_features(features: Tensor, *, at_least: int) -> Tensor:
    """Convert (N, D) to float64, on its device.  Raises DataError for N < `at_least`, or NaN."""
    rows = features.detach().double()
    if len(rows) < at_least:
        raise DataError(
            f"features of {len(rows)} images; this score needs at least {at_least}: add images"
        )
    if bad := nonfinite_rows(rows):
        raise DataError(
            f"features of images {bad[:MAX_NAMED_ROWS]} are not finite: the images, or the "
            "extractor's outputs, contain NaN or infinity"
        )
    return rows


def nonfinite_rows(rows: Tensor) -> list[int]:
    """Indices of rows that contain NaN or infinity."""
    return (~rows.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()

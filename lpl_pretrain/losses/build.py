"""Loss terms of a run, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from lpl_pretrain.losses.denoising import build_denoising
from lpl_pretrain.losses.lpl.build import build_lpl
from lpl_pretrain.losses.term import LossTerm, TermContext
from lpl_pretrain.losses.variational_bound import build_variational_bound

TERMS: list[Callable[[TermContext], LossTerm | None]] = [
    build_denoising,
    build_variational_bound,
    build_lpl,
]
"""Builders in the order of the sum; each returns None where the configuration does not ask for its
term.  A new term is one file and one entry here.
"""


def build_terms(context: TermContext) -> list[LossTerm]:
    """Terms that the configuration asks for, the diffusion loss first.  Raises ConfigError."""
    terms = [build(context) for build in TERMS]
    return [term for term in terms if term is not None]

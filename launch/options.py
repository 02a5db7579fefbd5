"""Options of every command that submits a job: --cluster, --nodes, --set, --dry-run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import click
from click.core import ParameterSource

from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.load import load_config

CLUSTER = click.option("--cluster", required=True, metavar="PROFILE", help="configs/cluster/*.yaml")
NODES = click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
CHANGES = click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the profile."
)
DRY_RUN = click.option(
    "--dry-run",
    is_flag=True,
    help="Print the script and the resolved configuration, and submit nothing.",
)


@dataclass(frozen=True)
class Target:
    """Values of the options above."""

    cluster: str
    nodes: int
    changes: tuple[str, ...]
    dry_run: bool

    @cached_property
    def profile(self) -> ClusterProfile:
        return load_config(ClusterProfile, self.cluster, self.changes)


def on_cluster(command: Callable[..., None], *, nodes: bool = True) -> Callable[..., None]:
    """Add the options, whose values the command gets as `target`.

    Without `nodes` there is no such option, and the command uses one node.
    """

    @wraps(command)
    def with_target(
        *arguments: Any,
        cluster: str,
        changes: tuple[str, ...],
        dry_run: bool,
        nodes: int = 1,
        **options: Any,
    ) -> None:
        command(*arguments, target=Target(cluster, nodes, changes, dry_run), **options)

    decorated: Callable[..., None] = with_target
    for option in (DRY_RUN, CHANGES, NODES, CLUSTER):  # click shows the last one first
        if nodes or option is not NODES:
            decorated = option(decorated)
    return decorated


def given_options(context: click.Context, command: click.Command) -> list[str]:
    """Options of `command` that the user gave, as arguments of a command line."""
    arguments: list[str] = []
    for option in command.params:
        name = str(option.name)
        if not isinstance(option, click.Option):
            continue
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        values = context.params[name] if option.multiple else [context.params[name]]
        for value in values:
            arguments += [option.opts[0], *map(str, value if option.nargs > 1 else [value])]
    return arguments

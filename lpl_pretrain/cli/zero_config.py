"""`lpl-pretrain zero-config`: what is accepted of a DeepSpeed JSON that was written elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from lpl_pretrain.config.zero.foreign import Adapted, adapt_file
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.atomic import atomic_write


def run(file: str, output: str | None) -> None:
    """Writes the accepted JSON to `output`, or to stdout and the changes to stderr.

    Never overwrites a file.  Raises ConfigError.
    """
    if output is not None and Path(output).exists():
        raise ConfigError(f"--output {output}: is there already; name another file, or remove it")
    adapted = adapt_file(file)
    if output is None:
        click.echo(adapted.dump(), nl=False)
    else:
        try:
            with atomic_write(Path(output)) as temporary:
                temporary.write_text(adapted.dump())
        except OSError as error:
            raise ConfigError(
                f"--output {output}: {error.strerror}; name a file that can be written"
            ) from error
    for line in [*map(str, adapted.changes), use(adapted, output)]:
        click.echo(line, err=output is None)


def use(adapted: Adapted, output: str | None) -> str:
    """Keys to write in a run's configuration for the accepted file."""
    if adapted.is_builtin:
        return (
            f"use it as parallel.strategy=zero{adapted.stage}, whose built-in tuning it is: no "
            "file is needed"
        )
    return (
        f"use it as parallel.strategy=zero parallel.zero_config={output or 'FILE'} (stage "
        f"{adapted.stage})"
    )

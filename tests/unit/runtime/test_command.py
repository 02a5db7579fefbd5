"""Command line that messages recommend to resume."""

from __future__ import annotations

import pytest

from lpl_pretrain.runtime.command import command_line, shorten


@pytest.mark.parametrize(
    "arguments, shortened",
    [
        (["/venv/bin/lpl-pretrain", "train", "x.yaml"], ["lpl-pretrain", "train", "x.yaml"]),
        (["/src/lpl_pretrain/__main__.py", "train"], ["python", "-m", "lpl_pretrain", "train"]),
        (["/src/launch/__main__.py", "watch"], ["python", "-m", "launch", "watch"]),
        (["/venv/bin/torchrun", "--nproc-per-node", "2"], ["torchrun", "--nproc-per-node", "2"]),
        (
            ["-m", "torch.distributed.run", "-m", "x"],
            ["python", "-m", "torch.distributed.run", "-m", "x"],
        ),
    ],
)
def test_folders_of_programs_are_stripped(arguments, shortened):
    assert shorten(arguments) == shortened


def test_arguments_are_quoted_for_a_shell(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr("sys.argv", ["/bin/lpl-pretrain", "train", "a b.yaml", "x={a: 1}"])
    assert command_line() == "lpl-pretrain train 'a b.yaml' 'x={a: 1}'"

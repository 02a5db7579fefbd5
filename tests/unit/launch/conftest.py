"""Programs in place of SLURM's commands."""

from __future__ import annotations

import os

import pytest

SBATCH = """#!/bin/sh
if [ "$1" = --parsable ]; then cat "$2" > {folder}/submitted.sh; echo '4711;cluster'
else cat "$1" >> {folder}/singles.sh; echo Submitted batch job 4712; fi
"""


SQUEUE = "#!/bin/sh\necho '4711_0 RUNNING\n4711_1 PENDING'\n"


@pytest.fixture
def slurm_programs(tmp_path, monkeypatch):
    """Programs that say what SLURM would."""
    for name, text in {
        "sbatch": SBATCH.format(folder=tmp_path),
        "squeue": SQUEUE,
        "scancel": "#!/bin/sh\n",
    }.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path

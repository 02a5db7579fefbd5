"""Folders whose names are special to a shell, to sbatch or to srun, on a real SLURM cluster."""

from __future__ import annotations

import pytest

from launch.batch_script import array_batch_script, batch_script
from launch.job import JobSpec
from lpl_pretrain.config.cluster import ClusterProfile

NAMES = [
    'it\'s a "run" #1 $(touch canary) `touch canary`; touch canary &',
    "--uid=0 ${HOME} {a,b} [c] *? ~ ! < > | ( ) = : é \U0001f600",
]


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_job_uses_folders_with_special_characters(cluster, tmp_path, name, array):
    """The job runs echo; a task of an array finds its folder through a link."""
    work, run = tmp_path / f"work %u %j {name}", tmp_path / name
    work.mkdir()
    profile = ClusterProfile(python="/bin/echo", environment={"X": name}, setup=("pwd",))
    spec = JobSpec("train", ["train"], run, 1, cwd=str(work))
    spec.folder.path.mkdir(parents=True)
    links = tmp_path / f"links {name}"
    links.mkdir()
    (links / "0").symlink_to(spec.folder.path)
    (tmp_path / "script.sh").write_text(
        array_batch_script([spec], profile, 1, links) if array else batch_script(spec, profile)
    )
    job = cluster.run("sbatch", "--parsable", str(tmp_path / "script.sh")).stdout.strip()
    folder = str(links / "%a") if array else str(spec.folder.path)
    log = spec.folder.path / (f"{job}_0_0_log.out" if array else f"{job}_0_log.out")
    here = str(links) + "/0" if array else folder
    wanted = [str(work), f"-u -m submitit.core._submit {folder}", f"-m launch.epilog {here} 0"]
    cluster.wait(
        lambda: log.exists() and len(log.read_text().splitlines()) == len(wanted),
        30,
        f"the job's lines in {log}",
    )
    assert log.read_text().splitlines() == wanted
    assert {path.name for path in tmp_path.iterdir()} == {
        work.name,
        run.name,
        links.name,
        "script.sh",
    }
    assert not list(tmp_path.rglob("canary"))

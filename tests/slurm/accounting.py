"""A test cluster with accounting: slurmdbd and its MariaDB, each on a machine of its own."""

from __future__ import annotations

import subprocess

from tests.slurm.cluster import Cluster
from tests.slurm.network import ADDRESS

DATABASE, ACCOUNTANT = ADDRESS.format(number=2), ADDRESS.format(number=3)
# clients of slurmdbd do not read AuthInfo: AccountingStoragePass is how they learn munge's socket
SLURM_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=accountant
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,qos
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
DbdHost=accountant
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounts
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/accountant.log
"""
INIT_SQL = """\
CREATE DATABASE accounts;
CREATE USER slurm@'%' IDENTIFIED BY 'slurm';
GRANT ALL ON accounts.* TO slurm@'%';
"""
# nothing need outlive the tests
FAST = (
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-log-file-size=8M",
    "--performance-schema=OFF",
    "--skip-log-bin",
)


class AccountedCluster(Cluster):
    """Jobs belong to account `lab`, whose quality of service may be `normal` or `urgent`; sacct is
    the real one.
    """

    def _configure(self) -> None:
        super()._configure()
        (self.folder / "bin" / "sacct").unlink()
        with (self.folder / "slurm.conf").open("a") as file:
            file.write(SLURM_CONF.format(folder=self.folder))
        with (self.folder / "hosts").open("a") as file:
            file.write(f"{ACCOUNTANT} accountant\n")
        (self.folder / "slurmdbd.conf").touch(0o600)
        (self.folder / "slurmdbd.conf").write_text(
            SLURMDBD_CONF.format(folder=self.folder, database=DATABASE)
        )
        (self.folder / "init.sql").write_text(INIT_SQL)

    def _start_head(self) -> None:
        data = [f"--datadir={self.folder}/database", "--user=root"]
        made = ["mariadb-install-db", "--no-defaults", *data, "--skip-test-db", *FAST[1:2]]
        subprocess.run(made, check=True, capture_output=True)
        files = [f"--socket={self.folder}/run/database", f"--init-file={self.folder}/init.sql"]
        server = [
            "/usr/sbin/mariadbd",
            "--no-defaults",
            *data,
            *files,
            f"--bind-address={DATABASE}",
            "--skip-name-resolve",
            *FAST,
        ]
        self._start("database", DATABASE, *server)
        probe = [
            "mariadb",
            "--no-defaults",
            "-h",
            DATABASE,
            "-uslurm",
            "-pslurm",
            "-e",
            "SELECT 1",
            "accounts",
        ]
        self.wait(
            lambda: self.run(*probe, check=False, machine="database").returncode == 0, 30, "MariaDB"
        )
        self._start("accountant", ACCOUNTANT, "/usr/sbin/slurmdbd", "-D")
        self.wait(
            lambda: self._sacctmgr("list", "qos", check=False).returncode == 0, 30, "slurmdbd"
        )
        for entity in (
            "cluster test",
            "account lab",
            "qos urgent",
            "user root account=lab qos=normal,urgent",
        ):
            self._sacctmgr("-i", "add", *entity.split())
        super()._start_head()

    def _sacctmgr(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("sacctmgr", *words, check=check, machine="accountant")

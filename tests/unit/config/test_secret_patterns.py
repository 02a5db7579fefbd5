"""Secrets do not stand in a profile, from where they would get into scripts and job.json; other
values do.
"""

from __future__ import annotations

import pytest

from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.load import validate
from lpl_pretrain.config.secret_patterns import looks_secret, secret_in_line
from lpl_pretrain.errors import ConfigError

RANDOM = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bD1fG3hJ5"
SECRET_NAMES = [
    "GH_PAT",
    "CREDENTIALS",
    "CRED",
    "CREDS",
    "AUTH",
    "BASIC_AUTH",
    "DB_PWD",
    "PASS",
    "MYSQL_PASS",
    "PASSWORD",
    "PGPASSWORD",
    "PASSPHRASE",
    "PRIVATE",
    "SIGNATURE",
    "STORAGE_SAS",
    "SENTRY_DSN",
    "COOKIE",
    "SESSION",
    "WEBHOOK",
    "WEBHOOK_URL",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "SLURM_JWT",
    "GITHUBTOKEN",
    "dbPassword",
    "MyApiKey",
    "api_key",
    "API_KEY_2",
    "TOKEN2",
    "APIKEY",
    "SSH_PRIVATE_KEY",
]
SECRET_VALUES = [
    "postgres://user:hunter2@db.site/name",
    "redis://:hunter2@host",
    f"https://{RANDOM}@git.site/x",
    "ghp_" + "a1B2" * 9,
    "github_pat_11ABCDEFG0aBcDeFgHiJkL",
    "hf_" + "aB3d" * 8,
    "sk-proj-" + "aB3d" * 8,
    "sk_live_" + "aB3d" * 6,
    "AKIAIOSFODNN7EXAMPLE",
    "xoxb-123456789012-abcdef",
    "AIza" + "aB3d" * 9,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
    "glpat-" + "aB3d" * 5,
    "Authorization: Bearer abcdefgh",
    "Bearer abcdefgh",
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    "https://hooks.slack.com/services/T0/B0/x",
    "https://a.blob.core/x?sv=1&sig=abcdefghij",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "0123456789abcdef0123456789abcdef01234567",
    RANDOM,
]
ORDINARY = {
    "NCCL_SOCKET_IFNAME": "eth0",
    "NCCL_IB_HCA": "mlx5_0,mlx5_1",
    "NCCL_ALGO": "PAT",
    "KEYBOARD": "us",
    "KEYSTONE": "x",
    "MONKEY": "george",
    "HOTKEYS": "x",
    "COMPASS": "north",
    "PASSIVE": "x",
    "PASSTHROUGH": "x",
    "AUTHOR": "me",
    "TOKENIZERS_PARALLELISM": "false",
    "MAX_NEW_TOKENS": "4096",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HOME": "/scratch/hf",
    "HF_ENDPOINT": "https://hf-mirror.site",
    "OMP_NUM_THREADS": "8",
    "PATH": "/usr/local/cuda-12.4/bin:/usr/bin",
    "LD_LIBRARY_PATH": "/opt/amazon/efa/lib64:/opt/nccl-2.21/lib",
    "CUDA_VISIBLE_DEVICES": "GPU-8f6d1c0e-1a2b-3c4d-5e6f-7a8b9c0d1e2f",
    "XDG_SESSION_TYPE": "tty",
    "DESKTOP_SESSION": "gnome",
    "PWD": "/home/me",
    "SSH_AUTH_SOCK": "/tmp/agent",
    "I_MPI_PIN_DOMAIN": "omp",
    "http_proxy": "http://proxy.site:3128",
    "GIT_COMMIT": "70ba3100c0ffee70ba3100c0ffee70ba3100c0ff",
    "IMAGE": "docker://registry.site/pytorch@sha256:" + "0af3" * 16,
    "REPOSITORY": "ssh://git@git.site/x/y",
    "AWS_SHARED_CREDENTIALS_FILE": "/home/me/.aws/credentials",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,garbage_collection_threshold:0.6",
    "TORCH_EXTENSIONS_DIR": "/scratch/SomeUser1/TorchExtensions_py311_cu121",
    "IDENTIFIER": "SomeVeryLongCamelCaseIdentifier123456",
    "BUILD": "intel-oneapi-compilers-2023-gcc-12-Release",
}
SECRET_LINES = [
    "export TOKEN=hunter2",
    "TOKEN=hunter2; export TOKEN",
    "export A=1 DB_PASSWORD=hunter2",
    'eval "export TOKEN=hunter2"',
    "# export TOKEN=hunter2",
    "echo don't; TOKEN=hunter2",
    "huggingface-cli login --token hunter2",
    "wandb login 0123456789abcdef0123456789abcdef01234567",
    "curl -H 'Authorization: Bearer hunter2hunter2' https://x",
    "git clone https://me:hunter2@git.site/x",
]
ORDINARY_LINES = [
    "module load cuda/12.1.1-GCC-12.3.0",
    "module load PyTorch/2.1.2-foss-2023a-CUDA-12.1.1",
    "spack load /abcdefghijklmnopqrstuvwxyz123456",
    "export HF_TOKEN=$(cat ~/.hf_token)",
    "export HF_TOKEN=$(< ~/.hf_token)",
    'export HF_TOKEN="$MY_TOKEN"',
    "source ~/secrets.sh",
    "conda activate /scratch/me/envs/lpl",
    "export NCCL_DEBUG=INFO TOKENIZERS_PARALLELISM=false",
    "echo it's ok",
    "git checkout 70ba310",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name):
    assert looks_secret(name, "hunter2")
    assert not looks_secret(name, "") and not looks_secret(name, "0"), "a switch is none"


@pytest.mark.parametrize("value", SECRET_VALUES)
def test_values_of_secrets(value):
    assert looks_secret("SETTING", value) and looks_secret("SETTING", f"a={value} b")


@pytest.mark.parametrize(("name", "value"), ORDINARY.items(), ids=ORDINARY)
def test_other_variables_are_none(name, value):
    assert looks_secret(name, value) is None


@pytest.mark.parametrize("line", SECRET_LINES)
def test_lines_with_secrets(line):
    assert secret_in_line(line)


@pytest.mark.parametrize("line", ORDINARY_LINES)
def test_other_lines_have_none(line):
    assert secret_in_line(line) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": {"GH_PAT": "hunter2"}}, r"environment\.GH_PAT: looks like a secret"),
        (
            {"environment": {"DB_PASSWORD": 12345678}},
            r"environment\.DB_PASSWORD: looks like a secret",
        ),
        (
            {"environment": {"URL": "postgres://u:hunter2@db"}},
            r"environment\.URL: looks like a secret \(a password in a URL\)",
        ),
        ({"setup": ["true", "export HF_TOKEN=hunter2"]}, "setup: HF_TOKEN: looks like a secret"),
        ({"setup": "export HF_TOKEN=hunter2"}, "setup: HF_TOKEN: looks like a secret"),
        (
            {"container": ["run", "--env", "HF_TOKEN=hunter2", "image"]},
            "container: HF_TOKEN: looks like a secret",
        ),
        (
            {"container": ["run", "--env=HF_TOKEN=hunter2"]},
            "container: HF_TOKEN: looks like a secret",
        ),
        (
            {"container": ["run", "--docker-password", "hunter2"]},
            "container: docker_password: looks like a secret",
        ),
        (
            {"container": ["run", "-e", "X=ghp_" + "hunter2" * 4]},
            "container: X: looks like a secret",
        ),
    ],
)
def test_a_profile_with_a_secret_is_refused_and_the_secret_is_not_printed(changes, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        validate(ClusterProfile, changes, where="profile.yaml")
    assert "hunter2" not in str(refusal.value) and "12345678" not in str(refusal.value)


def test_a_profile_of_ordinary_things():
    container = [
        "apptainer",
        "exec",
        "--nv",
        "--no-auth",
        "--env",
        "NCCL_DEBUG=INFO",
        "/images/lpl.sif",
    ]
    validate(
        ClusterProfile,
        {"environment": ORDINARY, "setup": ORDINARY_LINES, "container": container},
        where="x",
    )

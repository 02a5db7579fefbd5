"""Who may know whom, read from the imports: data flows one way, and each heavy dependency has one
address.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lpl_pretrain"

# room -> rooms it may import; `errors` is open to everyone
ALLOWED = {
    "config": set(),
    "runtime": {"config"},
    "diffusion": {"config"},
    "models": {"config", "diffusion"},
    "losses": {"config", "diffusion", "models"},
    "ema": {"config"},
    "data": {"config", "runtime"},
    "encoding": {"config", "runtime", "models", "data"},
    "parallel": {"config", "runtime"},
    "checkpoint": {"config", "runtime", "parallel", "ema"},
    "trainer": {
        "config",
        "runtime",
        "diffusion",
        "models",
        "losses",
        "data",
        "ema",
        "parallel",
        "checkpoint",
        "planning",
    },
    "evaluation": {"config", "runtime", "diffusion", "models", "data", "encoding", "checkpoint"},
    "planning": {"config"},
    "preflight": {"config", "runtime", "models"},
    "report": {"config", "data", "runtime"},
    "cli": {
        "config",
        "runtime",
        "models",
        "diffusion",
        "data",
        "encoding",
        "parallel",
        "trainer",
        "evaluation",
        "planning",
        "preflight",
        "report",
        "checkpoint",
        "ema",
    },
}
HEAVY = {
    "deepspeed": {"parallel/deepspeed_zero.py"},
    "diffusers": {"models/autoencoder.py", "models/unet.py", "diffusion/samplers.py"},
    "timm": {"models/layers.py", "evaluation/features.py"},
    "transformers": {"models/text.py", "evaluation/clip.py"},
    "torchao": {"parallel/float8.py"},
    "webdataset": set(),
    "wandb": {"runtime/mirror.py"},
    "submitit": set(),
    "matplotlib": {"report/"},
    "jinja2": {"report/"},
}
NO_TORCH = {
    "config",
    "errors.py",
    "cli/main.py",
    "cli/train.py",
    "runtime/world.py",
    "runtime/preempt.py",
}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b too."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_rooms_know_only_lower_rooms(path):
    room = name_of(path).split("/")[0]
    if room not in ALLOWED:
        return  # files at the root of the package
    known = {name.split(".")[1] for name in imports(path) if name.startswith("lpl_pretrain.")} - {
        room,
        "errors",
        "__version__",
    }
    assert known <= ALLOWED[room], f"{name_of(path)} knows {sorted(known - ALLOWED[room])}"


def test_rooms_form_no_cycle():
    """The table above is itself acyclic: a topological order exists."""
    left = dict(ALLOWED)
    while left:
        free = [room for room, knows in left.items() if not knows & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for room in free:
            del left[room]


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_heavy_dependencies_have_one_address(path):
    for name in {name.split(".")[0] for name in imports(path)} & HEAVY.keys():
        assert any(name_of(path).startswith(place) for place in HEAVY[name]), (
            f"{name_of(path)} imports {name}"
        )


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_configuration_is_read_without_torch(path):
    if not any(
        name_of(path) == place or name_of(path).startswith(place + "/") for place in NO_TORCH
    ):
        return
    everything = imports(path, top_level_only=name_of(path).startswith("cli"))
    assert not {
        name
        for name in everything
        if name.split(".")[0] in {"torch", "diffusers", "timm", "deepspeed"}
    }


def test_environment_is_read_in_one_place():
    readers = {
        name_of(p) for p in files() if "os.environ" in p.read_text() or "os.getenv" in p.read_text()
    }
    assert readers <= {"runtime/world.py"}


def test_no_pickles():
    """Nothing from a data shard or a checkpoint is ever unpickled."""
    for path in files():
        assert not {name.split(".")[0] for name in imports(path)} & {
            "pickle",
            "dill",
            "cloudpickle",
            "marshal",
            "shelve",
        }, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True"
                    for k in node.keywords
                ), f"{path}: torch.load"


def test_package_never_imports_launch():
    assert not {p for p in files() for name in imports(p) if name.split(".")[0] == "launch"}


def test_has_teeth(tmp_path):
    """The reader of imports sees imports inside functions, aliases and `from` forms."""
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from lpl_pretrain import trainer\n    import deepspeed.ops as o\n"
    )
    assert {"lpl_pretrain.trainer", "deepspeed.ops"} <= imports(file)
    assert not imports(file, top_level_only=True)

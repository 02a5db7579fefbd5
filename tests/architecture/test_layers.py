"""Import rules between packages, checked on the source: packages import in one direction, modules
form no cycle, and each heavy dependency is imported in one module.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lpl_pretrain"

# package -> packages it may import; every package may import `errors`
ALLOWED = {
    "config": set(),
    "runtime": {"config"},
    "diffusion": {"config"},
    "models": {"config", "diffusion"},
    "losses": {"config", "diffusion", "models", "planning"},
    "ema": {"config"},
    "data": {"config", "runtime"},
    "encoding": {"config", "runtime", "models", "data"},
    "parallel": {"config", "runtime"},
    "checkpoint": {"config", "runtime", "parallel", "ema"},
    "trackers": {"config", "runtime"},
    "trainer": {
        "config",
        "trackers",
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
        "trackers",
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
    "deepspeed": {"parallel/deepspeed_"},
    "diffusers": {"models/autoencoder.py", "models/unet.py", "diffusion/samplers.py"},
    "timm": {"models/layers.py", "evaluation/timm_networks.py"},
    "transformers": {"models/text.py", "evaluation/clip.py"},
    "torchao": {"parallel/float8.py"},
    "webdataset": set(),
    "wandb": {"trackers/wandb.py"},
    "tensorboard": {"trackers/tensorboard.py"},
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


def module_imports(package: Path) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports, anywhere in its file."""
    paths = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imports(path) & paths.keys() - {name} for name, path in paths.items()}


def cycle(graph: dict[str, set[str]]) -> set[str]:
    """Nodes on a cycle or between two cycles; edges to nodes outside the graph are ignored."""
    left = {node: targets & graph.keys() for node, targets in graph.items()}
    while True:
        targets_of_any = set().union(*left.values())
        ends = {node for node, targets in left.items() if not targets or node not in targets_of_any}
        if not ends:
            return set(left)
        left = {node: targets - ends for node, targets in left.items() if node not in ends}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_packages_import_only_lower_packages(path):
    package = name_of(path).split("/")[0]
    if package not in ALLOWED:
        return  # files at the root of lpl_pretrain
    own = {package, "errors", "__version__"}
    imported = {name.split(".")[1] for name in imports(path) if name.startswith("lpl_pretrain.")}
    forbidden = imported - own - ALLOWED[package]
    assert not forbidden, f"{name_of(path)} imports {sorted(forbidden)}"


def test_packages_form_no_cycle():
    """The table above is itself acyclic: a topological order exists."""
    assert cycle(ALLOWED) == set()


def test_modules_form_no_cycle():
    """Imports inside functions count too: a cycle that only they close is one for the reader."""
    assert cycle(module_imports(PACKAGE)) == set()


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


def test_module_cycles_have_teeth(tmp_path):
    """A cycle that is closed inside a function, or through a package's __init__, is reported."""
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("import json\n")
    (package / "high.py").write_text("from toy import low\n")
    assert cycle(module_imports(package)) == set()
    (package / "low.py").write_text("def f():\n    from toy.high import g\n")
    assert cycle(module_imports(package)) == {"toy.low", "toy.high"}
    (package / "low.py").write_text("from toy import thing\n")
    (package / "__init__.py").write_text("from toy.high import thing\n")
    assert cycle(module_imports(package)) == {"toy", "toy.low", "toy.high"}

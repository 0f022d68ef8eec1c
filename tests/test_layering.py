"""House rules that a parser can check: imports point one way, libraries have their place, nothing local is named."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# From the top down; a module may import what stands in a lower row, and its own package.
ROWS = (
    ("cli",),
    ("arguments",),
    ("commands",),
    ("plan", "doctor"),
    ("training",),
    ("objectives", "generation", "convert"),
    ("models", "data"),
    ("kernels",),
    ("sharding",),
    ("metrics", "rng", "precision", "distributed", "backend"),
    ("config",),
    ("errors",),
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
# Inside training, likewise.
TRAINING_ROWS = (
    ("train",), ("restore", "lower"), ("evaluate", "checkpoint"), ("step",), ("state",), ("optim", "lora"),
)  # fmt: skip
TRAINING_ROW = {name: row for row, names in enumerate(TRAINING_ROWS) for name in names}

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "torch", "ml_collections"}
WITHOUT_JAX = ("__init__", "cli", "arguments", "commands", "doctor", "backend", "errors", "config")


def unit(path: Path) -> str:
    """The file's part of the package: "models" of llm_jax/models/layers.py, "rng" of llm_jax/rng.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_load_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports: "jax.sharding.Mesh" for `from jax.sharding import Mesh`."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}: write the full name in place of a relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif not (at_load_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
                yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def own_imports(path: Path) -> list[str]:
    """ "models.layers.Linear" for `from llm_jax.models.layers import Linear`."""
    found = (name.removeprefix("llm_jax.") for name in imports(path) if name.startswith("llm_jax."))
    return [name for name in found if not name.startswith("__")]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_down(path):
    mine = unit(path)
    if mine == "__init__":
        assert own_imports(path) == []
        return
    assert mine in ROW, f"llm_jax/{mine} has no row in this test: where does it stand?"
    for name in own_imports(path):
        other = name.partition(".")[0]
        foundation = ROW[mine] == ROW[other] == ROW["metrics"]
        assert mine == other or ROW[other] > ROW[mine] or foundation, f"{mine} must not import {other}: {name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("training/*.py")), ids=lambda path: path.stem)
def test_training_reads_from_train_down(path):
    mine = TRAINING_ROW.get(path.stem, -1)
    for name in own_imports(path):
        parts = name.split(".")
        if parts[0] == "training" and path.stem in TRAINING_ROW and parts[1] in TRAINING_ROW:
            assert TRAINING_ROW[parts[1]] > mine, f"training/{path.stem} must not import training/{parts[1]}"


def test_no_module_imports_itself_through_others():
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}

    def targets(path: Path) -> set[str]:
        names = own_imports(path)
        return {m for name in names for m in (name, name.rpartition(".")[0]) if m in modules}

    graph = {module: targets(path) - {module} for module, path in modules.items()}
    while leaves := [module for module, uses in graph.items() if not uses & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_linen_is_imported_in_models_alone(path):
    names = [name for name in imports(path) if name == "flax.linen" or name.startswith("flax.linen.")]
    assert unit(path) == "models" or not names


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_meshes_are_made_in_sharding_alone(path):
    code = ast.parse(path.read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(code) if isinstance(node, ast.Call)]
    made = {"Mesh", "AbstractMesh", "make_mesh"} & set(calls)
    assert unit(path) == "sharding" or not made


@pytest.mark.parametrize("path", [path for path in FILES if unit(path) in WITHOUT_JAX], ids=str)
def test_the_command_line_starts_without_jax(path):
    heavy = {name for name in imports(path, at_load_only=True) if name.partition(".")[0] in HEAVY}
    assert not heavy


@pytest.mark.parametrize(
    "part, strangers",
    [
        ("models", {"optax", "orbax", "grain", "tokenizers", "transformers", "huggingface_hub"}),
        ("data", {"flax", "optax", "orbax"}),
        ("kernels", {"flax", "optax", "orbax", "grain"}),
    ],
)
def test_parts_know_only_their_own_libraries(part, strangers):
    for path in PACKAGE.glob(f"{part}/**/*.py"):
        known = {name.partition(".")[0] for name in imports(path)}
        assert not known & strangers, path


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_import_only_ml_collections_and_each_other(path):
    assert {name.partition(".")[0] for name in imports(path)} <= {"ml_collections", "configs"}


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_this_machine_or_a_package_index():
    index_hosts = "|".join(("py" + r"pi\.org", "pythonhosted" + r"\.org", "npm" + r"js\.org", "find-" + "links"))
    patterns = {
        "a folder of one machine": re.compile(rb"(?<![\w.$}])/(?:root|work|home|Users|opt)/\w"),
        "a package index": re.compile(index_hosts.encode()),
    }
    for path in tracked_files():
        content = path.read_bytes()
        for what, pattern in patterns.items():
            match = pattern.search(content)
            assert not match, f"{path.relative_to(ROOT)} names {what}: {match[0]!r}"


def test_no_file_is_called_utils():
    assert not [name for name in NAMES if name.endswith(("utils.py", "helpers.py"))]

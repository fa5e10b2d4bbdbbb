"""The shape of the package: direction of imports, light import, and what the wheel holds."""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest

import lumen as lm
from tests import zygote

ROOT = Path(__file__).parents[2]

HEAVY = (
    "accelerate",
    "aim",
    "clearml",
    "comet_ml",
    "datasets",
    "dp_accounting",
    "deepspeed",
    "hydra",
    "jax",
    "jaxlib",
    "lightning",
    "matplotlib",
    "mlflow",
    "optax",
    "orbax",
    "pandas",
    "peft",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "sympy",
    "tensorboardX",
    "tensorstore",
    "torch._dynamo",
    "torch._inductor",
    "torchao",
    "torchmetrics",
    "trackio",
    "transformers",
    "wandb",
)


OPTIONAL = ("lumen.bridges.", "lumen.cli.", "lumen.parallel.deepspeed.", "lumen.parallel.pipeline.", "lumen.planner.")


def run(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False)


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    return run(
        "-c",
        "from importlinter.cli import lint_imports_command as c; c(['--no-cache', '--no-logo'])",
        cwd=root,
    )


def test_imports_point_down() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("tree.py", "from lumen import core", "Imports point down only"),
        ("tree.py", "def f():\n    from lumen.core import rules", "Imports point down only"),
        ("core/rules.py", "import lumen", "Nothing inside imports through the front door"),
        ("train/fit.py", "def f():\n    import lumen.planner.plan", "`import lumen` loads no optional module"),
        ("stray.py", "", "Imports point down only"),
    ],
    ids=["up", "up inside a function", "front door", "an optional module", "a module without a layer"],
)
def test_the_linter_sees_a_wrong_import(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "lumen", tmp_path / "lumen", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "lumen" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert contract in result.stdout


@pytest.fixture(scope="module")
def loaded() -> list[str]:
    """The modules that `import lumen` loads beyond torch's."""
    code = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import lumen\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = zygote.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, bare=True)
    assert result.returncode == 0, result.stderr
    names: list[str] = json.loads(result.stdout)
    return names


def test_import_loads_nothing_heavy_beyond_torch(loaded: list[str]) -> None:
    assert "lumen" in loaded
    heavy = [name for name in loaded if name.startswith(tuple(f"{h}." for h in HEAVY)) or name in HEAVY]
    assert heavy == [], "import these on first use instead (inside the function that needs them)"


def test_import_loads_no_optional_module(loaded: list[str]) -> None:
    assert "lumen.train.runner" in loaded
    optional = [name for name in loaded if f"{name}.".startswith(OPTIONAL)]
    assert optional == [], "import these in lumen/__init__.py on first use: see _LAZY_MODULES"


def test_names_of_optional_modules_are_public_and_typed() -> None:
    assert lm._LAZY_MODULES.keys() <= set(lm.__all__) == set(dir(lm))
    assert {name: getattr(lm, name).__name__.rpartition(".")[2] for name in lm._LAZY_MODULES} == {
        name: name for name in lm._LAZY_MODULES
    }
    (types_only,) = [node for node in ast.parse(Path(lm.__file__).read_text()).body if is_type_checking(node)]
    imported = {alias.name for node in types_only.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == lm._LAZY_MODULES.keys()
    with pytest.raises(AttributeError, match="module 'lumen' has no attribute 'plans'"):
        _ = lm.plans


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_types_ship() -> None:
    assert resources.files("lumen").joinpath("py.typed").is_file()


def test_the_wheel_holds_lumen_only(tmp_path: Path) -> None:
    result = run("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("lumen_torch-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lumen"}
    shipped = {name for name in names if name.startswith("lumen/")}
    files = [*(ROOT / "lumen").rglob("*.py"), ROOT / "lumen" / "py.typed"]
    ours = {path.relative_to(ROOT).as_posix() for path in files}
    assert shipped == ours
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def train_imports(tree: ast.Module) -> set[str]:
    """The modules of `lumen.train` that a module of it imports, for type checking as well."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    return {name.split(".")[2] for name in names if name.startswith("lumen.train.")}


def test_modules_of_train_are_small_and_import_in_no_circle() -> None:
    trees = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "lumen" / "train").glob("*.py")}
    for name, tree in trees.items():
        assert max((node.end_lineno or 0 for node in tree.body), default=0) <= 400, name
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno + 1 <= 200, node.name
                stores = [x for x in ast.walk(node) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)]
                attributes = {x.attr for x in stores if isinstance(x.value, ast.Name) and x.value.id == "self"}
                assert len(attributes) <= 12, (node.name, attributes)
    waiting = {name: train_imports(tree) & set(trees) for name, tree in trees.items()}
    while free := [name for name, imports in waiting.items() if not imports & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting, "these modules import each other, or what does"


def test_no_file_is_above_400_lines_and_no_class_above_200() -> None:
    long = []
    for path in sorted((ROOT / "lumen").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.count("\n")
        long += [f"{path.relative_to(ROOT)}: {lines} lines"] if lines > 400 else []
        for node in ast.walk(ast.parse(source)):
            size = (node.end_lineno or 0) - node.lineno + 1 if isinstance(node, ast.ClassDef) else 0
            long += [f"{path.relative_to(ROOT)}: class {node.name}, {size} lines"] if size > 200 else []
    assert not long, "\n".join(["Split these by idea:", *long])

"""No line of the package reads a file in a way that could run code from it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "nrcg").rglob("*.py"))
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
NEVER = {"pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.unsafe_load", "eval", "exec"}
UNSAFE_MODULES = {"dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe_lines(source: str) -> list[int]:
    """Numbers of the lines that load without a guard, or import a module that does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keyword, wanted = SAFE.get(name, (None, None))
            given = {entry.arg: entry.value for entry in node.keywords}.get(keyword)
            guarded = isinstance(given, ast.Constant) and given.value is wanted
            if name in NEVER or (keyword is not None and not guarded):
                found.append(node.lineno)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            from_pickle = isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch.serialization")
            if from_pickle or UNSAFE_MODULES & {module.split(".")[0] for module in modules}:
                found.append(node.lineno)
    return found


def test_no_unguarded_load():
    assert {str(path): lines for path in SOURCES if (lines := unsafe_lines(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(content)",
        "from pickle import load",
        "from torch.serialization import load",
        "import joblib",
        "eval(text)",
    ],
)
def test_the_check_finds_what_it_should(line):
    assert unsafe_lines(f"x = 1\n{line}\n") == [2]


@pytest.mark.parametrize(
    "line", ["torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)", "model.eval()"]
)
def test_the_check_lets_guarded_loads_pass(line):
    assert unsafe_lines(line) == []

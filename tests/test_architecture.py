"""The house's rules, read from the code: imports go downwards, files and functions stay small, the library is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nrcg"
WINGS = (
    *("config", "data", "diffusion", "classifiers", "guidance", "training", "evaluation", "explain", "report"),
    *("tracking", "pipeline", "steps", "cli"),
)
"""From the ground up."""
BESIDE = {"diffusion": {"classifiers"}, "classifiers": {"diffusion"}}
"""Wings of one floor, which do not import each other either."""
PIPELINE_EXTRA = ("snakemake", "mlflow", "dvc", "cleanfid", "scipy", "matplotlib", "jinja2", "pyarrow", "rich")
MOST_LINES, MOST_FUNCTION_LINES, MOST_RULE_LINES = 450, 70, 150

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in SOURCES} - {module, "nrcg"}


def wing(module: str) -> str:
    """The wing of a module, empty for those beside the wings."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


def test_every_folder_is_a_wing_of_the_plan():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} <= set(WINGS)


def test_imports_go_downwards_only():
    def upward(module: str) -> list[str]:
        own, wanted = wing(module), [name for name in imports(module) if wing(name)]
        if not own:
            return wanted
        floor = WINGS.index(own)
        return [name for name in wanted if WINGS.index(wing(name)) > floor or wing(name) in BESIDE.get(own, ())]

    assert {module: names for module in SOURCES if module != "nrcg" and (names := upward(module))} == {}


def test_no_circle_of_imports():
    left = {module: imports(module) for module in SOURCES}
    while leaves := [module for module, wanted in left.items() if not wanted & left.keys()]:
        for leaf in leaves:
            del left[leaf]
    assert not left, f"import each other: {sorted(left)}"


def test_files_and_functions_stay_small():
    large = []
    for module, path in SOURCES.items():
        text = path.read_text()
        if (count := len(text.splitlines())) > MOST_LINES:
            large.append(f"{module}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = node.end_lineno - node.lineno + 1
                if count > MOST_FUNCTION_LINES:
                    large.append(f"{module}.{node.name}: {count} lines")
    assert not large


def test_rules_hold_little_code():
    assert len((ROOT / "workflow/rules/common.smk").read_text().splitlines()) <= MOST_RULE_LINES


def run_without_extras(code: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run Python code where the packages of the extra `pipeline` cannot be imported."""
    blocked = f"import sys\nfor name in {PIPELINE_EXTRA!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], cwd=cwd, capture_output=True, text=True, timeout=250)


def documented_imports() -> list[str]:
    """Every import statement of the package in the README and the docs of the library."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [re.findall(r"^(?:from nrcg\S* import .*|import nrcg.*)$", page.read_text(), re.M) for page in pages]
    return sorted({line.split("  #")[0] for lines in found for line in lines})


def test_documented_imports_need_no_extra(tmp_path):
    statements = documented_imports()
    assert "from nrcg import EMA, ClassifierGuidance, GuidedDDPMPipeline, load_classifier" in statements
    modules = [f"import {name}" for name in SOURCES if wing(name) in WINGS[: WINGS.index("report")]]
    done = run_without_extras("\n".join([*statements, *modules, "print('all')"]), tmp_path)
    assert done.returncode == 0 and done.stdout == "all\n", done.stderr


def test_public_names_exist():
    import nrcg

    assert all(getattr(nrcg, name) is not None for name in nrcg.__all__)


def test_what_snakemake_and_help_import_is_light(tmp_path):
    """Torch and MLflow take seconds, numpy a part of one."""
    code = (
        "import sys, nrcg, nrcg.config, nrcg.devices, nrcg.tracking, nrcg.cli\n"
        "print({'torch', 'numpy', 'mlflow'} & set(sys.modules))\n"
        "import nrcg.evaluation.features, nrcg.data.sportballs, nrcg.data.arrays\n"
        "print({'torch', 'mlflow', 'diffusers', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "set()\nset()\n", done.stderr

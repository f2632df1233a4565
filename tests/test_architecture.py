"""The import order of the package, enforced on its sources: the data's way, and nothing that points back up it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lrsa"

# A part imports itself and what stands in its row: never a part below it.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "data": {"config"},
    "attention": {"config", "data"},
    "cache": {"config", "data", "attention"},
    "models": {"config", "data", "attention", "cache"},
    "training": {"config", "data", "attention", "cache", "models"},
    "evaluation": {"config", "data", "attention", "cache", "models"},
    "results": {"config"},  # records and tables are read where nothing can be run
    "benchmark": {"config", "data", "attention", "cache", "models", "training", "evaluation", "results"},
}
# What entries share: imports any part, and of this row what stands before it.
SUPPORT = ("validation", "tracking", "sweep")
ENTRIES = ("train", "evaluate", "table", "report", "bench", "cost")  # import all of that, but no other entry
STANDALONE = ("bundle",)  # packaging: imports no part
# Single modules that a part may use although it may not import the part they belong to.
EXCEPTIONS = {"evaluation": {"lrsa.results.statistics"}}

BACKENDS = ("reference", "gather", "flex", "flash4")
REGISTRIES = {"ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "AttentionInterface", "AttentionMaskInterface"}
BRIDGE = "lrsa.attention.huggingface"
DUMPING_GROUNDS = {"utils", "util", "helpers", "misc", "common"}
MAX_LINES = 400  # about 300 is the aim


def part_of(name: str) -> str:
    """First name below `lrsa`; "" for `lrsa` itself."""
    return name.partition(".")[2].split(".")[0]


@dataclass(frozen=True)
class Module:
    """One source file: dotted name, text, and whether it is a package's `__init__`."""

    name: str
    source: str
    is_package: bool = False

    @property
    def part(self) -> str:
        return part_of(self.name)


def find_modules() -> dict[str, Module]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = names[-1] == "__init__"
        name = ".".join(names[:-1] if is_package else names)
        modules[name] = Module(name, path.read_text(encoding="utf-8"), is_package)
    return modules


def find_imports(module: Module, known: set[str]) -> Iterator[str]:
    """Dotted names below `lrsa` that the module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(module.source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.name.split(".")
            package = package[: len(package) - node.level + module.is_package] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            # `from lrsa.attention import gather` imports a module, `... import kept_tokens` a name of one
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] == "lrsa")


def violations(module: Module, known: set[str]) -> list[str]:
    found = []
    allowed = MAY_IMPORT.get(module.part, set())
    for target in find_imports(module, known):
        part = part_of(target)
        if not part or part == module.part:  # `import lrsa`, `from lrsa import __version__`, or within the part
            continue
        if module.part == "":
            permitted = target == BRIDGE
        elif module.part in SUPPORT:
            permitted = part in (*MAY_IMPORT, *SUPPORT[: SUPPORT.index(module.part)])
        elif module.part in ENTRIES:
            permitted = part in MAY_IMPORT or part in SUPPORT
        else:
            permitted = part in allowed or target in EXCEPTIONS.get(module.part, set())
        if not permitted:
            found.append(f"{module.name} imports {target}")
    if module.name in {f"lrsa.attention.{name}" for name in BACKENDS}:
        others = {f"lrsa.attention.{name}" for name in BACKENDS} - {module.name}
        found += [f"backend {module.name} imports {t}" for t in find_imports(module, known) if t in others]
    if module.name != BRIDGE:
        names = {node.id for node in ast.walk(ast.parse(module.source)) if isinstance(node, ast.Name)}
        names |= {a.name for n in ast.walk(ast.parse(module.source)) if isinstance(n, ast.ImportFrom) for a in n.names}
        found += [f"{module.name} touches {name}: only {BRIDGE} may" for name in sorted(names & REGISTRIES)]
    return found


MODULES = find_modules()


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_order(name: str) -> None:
    assert violations(MODULES[name], set(MODULES)) == []


@pytest.mark.parametrize("name", MODULES)
def test_module_has_a_place_and_a_size(name: str) -> None:
    module = MODULES[name]
    assert module.part in {"", *MAY_IMPORT, *SUPPORT, *ENTRIES, *STANDALONE}, (
        f"{name}: no layer; add it to the order on purpose"
    )
    assert name.split(".")[-1] not in DUMPING_GROUNDS, f"{name}: name it after what it does"
    lines = module.source.count("\n")
    assert lines <= MAX_LINES, f"{name} has {lines} lines; split it (aim: about 300, limit: {MAX_LINES})"


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("lrsa.data.sources", "from lrsa.attention import api", "lrsa.data.sources imports lrsa.attention.api"),
        (
            "lrsa.training.module",
            "def f():\n    import lrsa.evaluation",
            "lrsa.training.module imports lrsa.evaluation",
        ),
        ("lrsa.evaluation.grid", "from ..training import module", "lrsa.evaluation.grid imports lrsa.training"),
        ("lrsa.evaluation.grid", "from lrsa.results import store", "lrsa.evaluation.grid imports lrsa.results"),
        ("lrsa.results.tables", "from lrsa.models import f", "lrsa.results.tables imports lrsa.models"),
        ("lrsa.train", "from lrsa.evaluate import main", "lrsa.train imports lrsa.evaluate"),
        ("lrsa.tracking", "import lrsa.train", "lrsa.tracking imports lrsa.train"),
        ("lrsa.tracking", "import lrsa.sweep", "lrsa.tracking imports lrsa.sweep"),
        ("lrsa.models", "import lrsa.tracking", "lrsa.models imports lrsa.tracking"),
        ("lrsa.bundle.wheels", "import lrsa.models", "lrsa.bundle.wheels imports lrsa.models"),
        ("lrsa.attention.gather", "from . import flex", "backend lrsa.attention.gather imports lrsa.attention.flex"),
        (
            "lrsa.models",
            "from transformers import AttentionInterface",
            f"lrsa.models touches AttentionInterface: only {BRIDGE} may",
        ),
    ],
    ids=lambda value: value if str(value).startswith("lrsa.") and " " not in str(value) else "",
)
def test_the_check_itself_catches(name: str, source: str, expected: str) -> None:
    known = {"lrsa.attention", "lrsa.attention.api", "lrsa.attention.flex", "lrsa.results"}
    assert violations(Module(name, source), known) == [expected]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lrsa.evaluation.grid", "from lrsa.results.statistics import bootstrap_mean"),
        ("lrsa.evaluation.grid", "from lrsa.results import statistics"),
        ("lrsa.train", "from lrsa.evaluation import grid\nfrom lrsa.tracking import start_wandb"),
        ("lrsa.sweep.plan", "from lrsa.validation import check_train"),
        ("lrsa.results.record", "from lrsa import __version__"),
        ("lrsa.attention.api", "from . import gather, reference"),
    ],
)
def test_the_check_itself_permits(name: str, source: str) -> None:
    assert violations(Module(name, source), {"lrsa.results", "lrsa.results.statistics"}) == []

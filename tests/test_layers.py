"""The house rules that a reader would otherwise have to check by eye."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cosup_jax"
LAYERS = (  # low to high; a module imports strictly lower ones
    "errors wording dotted model.families costs.hlo runtime.quiet runtime.compiling",
    "runtime.liveness costs.kernels runtime.paths",
    "runtime.processes runtime.bucket",
    "config runtime.workdir runtime.notices",
    "freeze costs.roofline dependencies",
    "config_files",
    "hf.names",
    "hf.gguf",
    "hf.gguf_tokenizer",
    "model.rotary model.adapters sharding",
    "model.fused",
    "model.attention",
    "data.* evaluation.* model.transformer optim runtime.telemetry runtime.observe"
    " contract report.tables hf.configs hf.sentence",
    "report.plots report.style answer.records",
    "report.answers ntp contrast microbatch towers hf.* search.index data.pipeline",
    "nsp bank search.vectors pretrained",
    "cosup",
    "official",
    "step checkpoint",
    "search.encoder probe",
    "answer.advance",
    "answer.decode",
    "answer.retrieve answer.cited search.corpus",
    "held_out report.page show",
    "answer.asked",
    "answer.answering",
    "answer.sample assemble",
    "parity",
    "rehearsal",
    "speed.clock",
    "speed.*",
    "train benchmark validate prepare export preflight encode",
    "mine answer.library",
    "answer.pair",
    "generate",
    "evaluate",
    "studies.run studies.verdict studies.scales",
    "studies.arms",
    "studies.geometry studies.gradients studies.evidence studies.equal_ratio",
    "studies.spaces studies.results",
    "studies.plane",
    "studies.measures studies.page",
    "studies.design",
    "study",
    "main",
)
DATA_ORDERS = (  # low to high, within data/
    ("schema", "problems", "rows", "formats", "sources"),
    ("schema", "tokenizer", "markup", "checks", "ingest", "sources"),
    ("schema", "world_facts", "world_text", "world", "sources"),
    ("batch", "schema", "tokenizer", "markup", "tokens", "packing", "blocks", "plan"),
)
BANNED_IMPORTS = {"torch", "tensorflow", "clu"}
# There `config` is HF's config.json, where an absent key has a default.
FOREIGN_CONFIG = {"hf.configs", "hf.gguf"}
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("cosup_jax", "configs", "launch", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in ("", ".py", ".sh")
)


def layer(module: str) -> int:
    """Index into LAYERS; an exact name counts before its package's."""
    for name in (module, module.split(".")[0] + ".*"):
        for number, names in enumerate(LAYERS):
            if name in names.split():
                return number
    raise AssertionError(f"{module} has no layer: give it one in LAYERS and in docs/house.md")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def is_module(name: str) -> bool:
    return (PACKAGE / (name.replace(".", "/") + ".py")).is_file()


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported, at the top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def own_imports(tree: ast.AST) -> set[str]:
    found = set()
    for name in imported(tree):
        own = name.removeprefix("cosup_jax.")
        if own != name:
            found |= {m for m in (own, own.rpartition(".")[0]) if m and is_module(m)}
    return found


def may_import(importer: str, other: str) -> bool:
    if layer(other) != layer(importer):
        return layer(other) < layer(importer)
    packages = importer.split(".")[0], other.split(".")[0]
    if packages == ("evaluation", "evaluation"):
        return True
    if packages == ("data", "data"):
        names = importer.split(".")[1], other.split(".")[1]
        if names[0] == names[1]:
            return True  # within data/formats
        for order in DATA_ORDERS:
            if set(names) <= set(order):
                return order.index(names[1]) < order.index(names[0])
        return True
    return False


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    """Catches a leaf that reaches for the trainer: from then on nothing can be tested alone."""
    if path.name == "__init__.py":
        assert not own_imports(ast.parse(path.read_text())), "a package imports nothing"
        return
    importer = module_name(path)
    layer(importer)
    for other in own_imports(ast.parse(path.read_text())):
        assert may_import(importer, other), f"{importer} may not import {other}"


def test_data_modules_import_in_a_circle_nowhere():
    """Catches a cycle inside data/, where the two orders leave some pairs open."""
    edges = {
        module_name(path): {n for n in own_imports(ast.parse(path.read_text())) if "data." in n}
        for path in (PACKAGE / "data").rglob("*.py")
    }
    while edges:
        free = [name for name, others in edges.items() if not others & set(edges)]
        assert free, f"a circle among {sorted(edges)}"
        for name in free:
            del edges[name]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_keeps_to_the_style(path):
    """Catches a heavy import, a module without a docstring, relative imports, 400 lines, utils."""
    text = path.read_text()
    tree = ast.parse(text)
    names = imported(tree)
    assert path.stem != "utils", "name it after what it does"
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(tree) or not text.strip(), "says nothing about itself"
    assert not {name.split(".")[0] for name in names} & BANNED_IMPORTS
    assert not [name for name in names if name.startswith(".")], "imports are absolute"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_config_has_no_get(path):
    """Catches `config.get("typo", default)`, which silently returns the default."""
    if module_name(path) in FOREIGN_CONFIG:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            got = node.func.attr == "get" and re.match(r"(self\._?)?config\b", owner)
            assert not got, f"line {node.lineno}: {owner}.get"


def test_what_is_named_of_a_module_is_there():
    """Catches `processes.codedigest()`, a name that moved, in a line that no quick test reaches."""
    missing = []
    for path in [*MODULES, *(ROOT / "tests").glob("*.py")]:
        tree = ast.parse(path.read_text())
        ours = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cosup_jax"):
                package = importlib.import_module(node.module)
                for alias in node.names:
                    value = getattr(package, alias.name, None)
                    if value is None:
                        value = importlib.import_module(f"{node.module}.{alias.name}")
                    if inspect.ismodule(value):
                        ours[alias.asname or alias.name] = value
        rebound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        rebound |= {
            n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = ours.get(node.value.id) if node.value.id not in rebound else None
                if module and not hasattr(module, node.attr):
                    missing.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not missing


def test_no_file_names_a_private_path():
    """Catches a path of the author's machine: it works here and nowhere else."""
    private = re.compile(r"(?<![\w.~})])/(?:home|root|Users|tmp|var)/\w|" + re.escape(str(ROOT)))
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in SOURCES
        if path.name != Path(__file__).name
        for match in private.finditer(path.read_text())
    ]
    assert not found


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    """Bug: a page or a heading moves, and what pointed at it leads nowhere."""
    slug = lambda heading: re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    for place, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name} links to {place}, which is not there"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in map(slug, headings), f"{page.name}: {place} has no #{heading}"

# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a machine can check: imports, licences, what an import may cost."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "weights_core": ROOT / "core/src/weights_core",
    "weights_parallel_shards": ROOT / "plugins/parallel_shards/src/weights_parallel_shards",
    "weights_consumable": ROOT / "plugins/consumable/src/weights_consumable",
    "weights_gms": ROOT / "plugins/gms/src/weights_gms",
    "weights_presharded": ROOT / "plugins/presharded/src/weights_presharded",
    "weights_transformers": ROOT / "engines/transformers/src/weights_transformers",
    "weights_vllm": ROOT / "engines/vllm/src/weights_vllm",
}
SOURCES = sorted(
    p
    for folder in ("core", "plugins", "engines", "tests", "examples", "benchmarks")
    for p in (ROOT / folder).rglob("*.py")
)


def imports(path, *, top_level_only):
    """Modules that a file imports when it is itself imported, or anywhere; not for type checkers."""

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if top_level_only and isinstance(child, ast.FunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from visit(child)

    return set(visit(ast.parse(path.read_text())))


def module_graph(*, top_level_only):
    graph = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            graph[".".join(p for p in parts if p != "__init__")] = path
    return {
        name: {m for m in imports(path, top_level_only=top_level_only) if m in graph and m != name}
        for name, path in graph.items()
    }


def test_no_import_cycles():
    graph = module_graph(top_level_only=True)
    for name, needs in graph.items():  # a package imports what it re-exports; that is no cycle
        needs.discard(name.rpartition(".")[0])
        needs.discard("weights_core")
    assert list(TopologicalSorter(graph).static_order())


def test_imports_point_one_way():
    graph = module_graph(top_level_only=False)
    order = ["types", "weightset", "engine", "hooks", "planning", "chain", "session", "host", "api", "cli"]
    for rank, name in enumerate(order):
        later = {f"weights_core.{other}" for other in order[rank + 1 :]}
        assert not graph[f"weights_core.{name}"] & later, name


def test_plugins_import_the_core_and_no_other_plugin():
    for name, needs in module_graph(top_level_only=False).items():
        package = name.partition(".")[0]
        allowed = {package, "weights_core"}
        assert {n.partition(".")[0] for n in needs} <= allowed, name


def test_the_core_knows_no_plugin_and_no_engine_by_name():
    names = (
        "gms",
        "presharded",
        "consumable",
        "parallel_shards",
        "vllm",
        "sglang",
        "tensorrt",
        "transformers",
    )
    for path in PACKAGES["weights_core"].rglob("*.py"):
        tree = ast.parse(path.read_text())
        strings = [
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        docs = {
            ast.get_docstring(n, clean=False)
            for n in ast.walk(tree)
            if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
        }
        for text in strings:
            if text not in docs:
                assert not any(name in text.lower() for name in names), (path.name, text)


@pytest.mark.parametrize(
    "module",
    [
        "weights_core",
        "weights_core.cli",
        "weights_parallel_shards.plugin",
        "weights_consumable.plugin",
        "weights_gms.plugin",
        "weights_presharded.plugin",
        "weights_transformers",
        "weights_vllm.plugin",
    ],
)
def test_importing_loads_no_torch_and_installs_no_handler(module):
    code = (
        f"import sys, logging; import {module}; assert 'torch' not in sys.modules; "
        "assert not logging.getLogger('weights').handlers and not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_its_module_is_imported_only_when_it_is_used():
    code = """
import sys, weights_core
assert not [m for m in sys.modules if m.startswith("weights_core.")]
assert sorted(weights_core.__all__) == weights_core.__all__
assert set(weights_core.__all__) <= set(dir(weights_core))
for name in weights_core.__all__:
    assert getattr(weights_core, name) is getattr(weights_core, name)
try:
    weights_core.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explaining_needs_no_plugin_to_import_torch():
    code = """
import sys
from weights_core import EngineInfo, LoadRequest, PluginHost
from weights_core.planning import make_plan
request = LoadRequest(checkpoint=sys.argv[1], engine=EngineInfo(name="x", version="1"))
plan = make_plan(PluginHost.discover().hooks(request), request)
assert plan.sources[-1] == "disk", plan
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)


def test_every_source_file_names_its_licence():
    missing = [p for p in SOURCES if not p.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")]
    assert not missing


def test_every_plugin_of_ours_is_tried_on_its_contract():
    for project in (ROOT / "core", *(ROOT / "plugins").iterdir(), ROOT / "examples/weights-hello"):
        tests = "\n".join(path.read_text() for path in (project / "tests").glob("test_contract*.py"))
        assert re.search(r"^class Test\w+\(\w+Contract\)", tests, re.MULTILINE), project

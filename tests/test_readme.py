"""README and the pages in docs: their Python runs, their commands run, and what they name exists.

Conventions, which every fenced block follows:
- python: a script of its own, run in an empty folder. A text block marked `<!-- prints -->` after it is its output.
- console: each line that starts with "$ " is run in the repository's root, unless the block is marked
  `<!-- not run: reason -->`. Lines after a command are its output, in full.
- text: a figure, or what its mark says.
"""

from __future__ import annotations

import ast
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gpu_cache
from gpu_cache import rpc
from gpu_cache.config import ALIGNMENT, CacheConfig, variable
from gpu_cache.report import schema
from gpu_cache.rpc import clearing, rtensor
from gpu_cache.rpc.client import memory, ray_objects, same_host
from gpu_cache.rpc.client.requester import HttpSettings
from gpu_cache.rpc.server import requests
from gpu_cache.rpc.server import same_host as server_same_host
from gpu_cache.rpc.wire import records
from tests.support.sim_memory_mutants import MEMORY_MUTANTS
from tests.support.sim_mutation_mutants import MUTATION_MUTANTS
from tests.support.sim_order_mutants import ORDER_MUTANTS
from tests.support.sim_tier_mutants import TIER_MUTANTS
from tests.test_imports import RANKS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from bench.workloads import NAMES, make_workload
from demo import report, session

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
CONTRIBUTING, CHANGELOG = ((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md"))
FIGURES = tomllib.loads((ROOT / "docs/figures.toml").read_text())["figure"]
DEADLINE_S = 120


class Block(NamedTuple):
    mark: str  # of the comment on the line before; "" for none
    language: str
    text: str
    page: str = ""


FENCE = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = [Block(*found, page) for page, text in PAGES.items() for found in FENCE.findall(text)]
SCRIPTS = [
    (block.text, following.text if following.mark == "prints" else None)
    for block, following in zip(BLOCKS, [*BLOCKS[1:], Block("", "", "")], strict=True)
    if block.language == "python" and not block.mark.startswith("not run: ")
]
COMMANDS = [
    tuple(command.partition("\n")[::2])
    for block in BLOCKS
    if block.language == "console" and not block.mark.startswith("not run: ")
    for command in re.split(r"^\$ ", block.text, flags=re.M)[1:]
]


def run(command: list[str], cwd: Path) -> str:
    """What a command prints; it must succeed and be silent on stderr."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_CACHE_", "AREAL_"))}
    environ |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as reports:
        environ["GPU_CACHE_STATS_DIR"] = reports
        done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
        assert os.listdir(reports) == [], "who ends leaves no report"
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def table_under(heading: str) -> list[list[str]]:
    """The cells of the first table under the title of a page, without its head."""
    (text,) = (text for text in PAGES.values() if text.startswith(f"# {heading}\n"))
    lines = text.partition("\n|")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    """What stands between backquotes."""
    return re.findall(r"`([^`]+)`", text)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def attribute(path: str, of: Any) -> Any:
    for name in path.split("."):
        of = getattr(of, name)
    return of


def test_every_block_is_of_a_known_kind() -> None:
    assert sum(text.count("\n```") for text in PAGES.values()) == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} == {"python", "console", "text"}
    kinds = re.compile(r"|prints|the demo's table|not run: .+")
    assert [block.mark for block in BLOCKS if not kinds.fullmatch(block.mark)] == []
    assert len(SCRIPTS) >= 3
    assert len(COMMANDS) >= 4


@pytest.mark.scripts
@pytest.mark.parametrize(("script", "output"), SCRIPTS, ids=range(len(SCRIPTS)))
def test_python_runs_and_prints_what_it_says(script: str, output: str | None, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(script)
    printed = run([sys.executable, "-W", "error", "script.py"], tmp_path)
    assert printed == output or output is None


@pytest.mark.scripts
@pytest.mark.parametrize(("command", "output"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_command_runs_and_prints_what_it_says(command: str, output: str) -> None:
    printed = run(["bash", "-c", command], ROOT)
    assert printed == output or not output.strip()


def test_the_ten_line_example_has_ten_lines() -> None:
    assert len([line for line in SCRIPTS[0][0].splitlines() if line]) <= 10


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    for text in (*PAGES.values(), CONTRIBUTING):
        assert set(re.findall(r"[`$] ?make (\w+)", text)) <= targets
    assert {"demo", "test"} <= set(re.findall(r"[`$] ?make (\w+)", README))


def test_every_variable_that_is_named_exists_and_none_is_missing() -> None:
    name = re.compile(r"\b(?:GPU_CACHE|AREAL)(?:_[A-Z0-9]+)+\b")
    sources = list((ROOT / "gpu_cache").rglob("*.py"))
    known = {found for path in sources for found in name.findall(path.read_text())}
    known |= {variable(field) for field in CacheConfig.__dataclass_fields__}
    assert set(name.findall("".join(PAGES.values()))) == known
    of_tests = set(name.findall((ROOT / "tests/conftest.py").read_text()))
    assert set(name.findall(CONTRIBUTING)) <= known | of_tests


def test_every_option_that_is_named_exists() -> None:
    sources = [ROOT / "Makefile", *(ROOT / "gpu_cache").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    code = "".join(path.read_text() for path in sources)
    known = set(re.findall(r"--[a-z][a-z-]+", code))
    for name, text in PAGES.items():
        inline = re.findall(r"`[^`\n]*`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
        lines = [*inline, *(block.text for block in BLOCKS if block.language == "console" and block.page == name)]
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines))) <= known, name


def test_every_route_that_is_named_exists() -> None:
    app = (ROOT / "gpu_cache/rpc/server/app.py").read_text()
    served = {
        (method.upper(), re.sub(r"{\w+[^}]*}", "<id>", path))
        for method, path in re.findall(r'web\.(get|post|put|delete)\("([^"]+)"', app)
    }
    for text in (*PAGES.values(), CONTRIBUTING):
        assert set(re.findall(r"\b(GET|POST|PUT|DELETE) (/[\w/<>]+)", text)) <= served


def test_every_error_has_its_row_and_counts_as_the_page_says() -> None:
    errors = {
        name: attribute(name, module)
        for module in (gpu_cache, rtensor)
        for name in module.__all__
        if name.endswith("Error")
    }
    text = PAGES["docs/errors.md"]
    assert {name for name in errors if f"`{name}`" not in text} == set()
    for named, counted, *_ in table_under("Errors"):
        for name in quoted(named):
            assert errors[name].reason == quoted(counted)[0], name


def test_every_error_that_users_meet_is_public() -> None:
    public = {attribute(name, module) for module in (gpu_cache, rtensor) for name in module.__all__}
    kinds = [gpu_cache.GpuCacheError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind for kind in kinds if kind.__module__.startswith("gpu_cache.")} <= public


def test_the_configuration_table_is_that_of_the_code() -> None:
    rows = table_under("Configuration")
    assert [quoted(row[0]) for row in rows] == [[field] for field in CacheConfig.__dataclass_fields__]
    for field, name, default, _ in ([*map("".join, map(quoted, row[:3])), row[3]] for row in rows):
        assert name == variable(field)
        given = CacheConfig() if default == "None" else CacheConfig(**{field: default})  # type: ignore[arg-type]
        assert getattr(given, field) == getattr(CacheConfig(), field), field
        assert (default == "None") == (getattr(CacheConfig(), field) is None), field


def test_every_name_in_the_api_table_exists_and_no_public_one_is_missing() -> None:
    named: dict[str, set[str]] = collections.defaultdict(set)
    module = ""
    for module_cell, names_cell, _ in table_under("API"):
        module = module_cell.strip("`") or module
        named[module] |= set(quoted(names_cell))
    for module, names in named.items():
        for name in names:
            assert attribute(name, importlib.import_module(module)), f"{module}.{name}"
    assert set(gpu_cache.__all__) <= named["gpu_cache"]
    assert set(rpc.__all__) <= named["gpu_cache.rpc"]
    assert set(rtensor.__all__) - {"RTensor"} <= named["gpu_cache.rpc.rtensor"]


def test_every_link_into_the_repository_leads_somewhere() -> None:
    others = {"CONTRIBUTING.md": CONTRIBUTING, "CHANGELOG.md": CHANGELOG}
    anchors = {
        name: {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}
        for name, text in (PAGES | others).items()
    }
    for name, text in (PAGES | others).items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            path, _, heading = target.partition("#")
            found = (ROOT / name).parent / path if path else ROOT / name
            assert found.exists(), f"{name}: {target}"
            assert not heading or heading in anchors[str(found.resolve().relative_to(ROOT))], f"{name}: {target}"


def test_readme_is_short_and_names_every_page() -> None:
    assert len(README) <= 10_000
    assert set(re.findall(r"\((docs/\w[\w-]*\.md)\)", README)) == PAGES.keys() - {"README.md"}


def test_readme_says_what_and_why_before_how() -> None:
    order = ["**Why.**", "![", "## Status", "## Install", "## Ten lines", "## Beside AReaL", "## Demo", "## The tool"]
    places = [README.index(one) for one in [*order, "## More"]]
    assert places == sorted(places)
    assert README.count("![") == 1


def test_the_site_has_every_page() -> None:
    navigation = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    written_elsewhere = {"index.md", "contributing.md", "changelog.md", "reference.md"}
    assert sorted(set(navigation) - written_elsewhere) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert len(set(navigation)) == len(navigation)


def test_every_file_that_is_named_exists() -> None:
    for text in (*PAGES.values(), CONTRIBUTING, CHANGELOG):
        for path in re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|md|txt|toml))`", text):
            is_there = any((folder / path).is_file() for folder in (ROOT, ROOT / "gpu_cache"))
            assert is_there or list((ROOT / "tests").rglob(path)), path
        of_the_repository = r"(?<![\w/.-])((?:tests|scripts|docs|dashboards|packaging)/[\w./*-]*[\w*])"
        for path in set(re.findall(of_the_repository, text)) - {"packaging/smi/dist/*"}:  # a release makes that one
            assert list(ROOT.glob(path)), path


def test_a_figure_of_several_places_is_the_same_in_each() -> None:
    for figure in FIGURES:
        assert figure["what"]
        assert figure["source"]
        assert len(figure["places"]) > 1, figure["what"]
        for name, words in figure["places"].items():
            text = " ".join((ROOT / name).read_text().split())
            assert words.replace("{}", figure["value"]) in text, f"{name}: {figure['what']}"


OF_THE_SOCKET = server_same_host.Limits()
# Words of a page around a limit, and the limit as the code has it.
LIMITS = [
    ("areal.md", "a body of {} GiB", requests.DEFAULT_MAX_BODY_BYTES >> 30),
    ("areal.md", "{:,} ids", records.MAX_IDS),
    ("areal.md", "{} answers at once", requests.DEFAULT_MAX_RESPONSES),
    ("how-it-works.md", "A run is at most {} MiB", CacheConfig().run_bytes >> 20),
    ("limits.md", "up to {} MiB", ray_objects.GROUP_BYTES >> 20),
    ("monitoring.md", "has not reported for {:.0f} s", schema.HUNG_AFTER_S),
    ("ray.md", "an object of up to {} MiB", ray_objects.GROUP_BYTES >> 20),
    ("ray.md", "A shard of {} KiB or more", ray_objects.ALONE_BYTES >> 10),
    ("security.md", "under way ({}, unless told otherwise)", requests.DEFAULT_MAX_RESPONSES),
    ("trainer.md", "It waits {:.0f} s for an owner over HTTP", HttpSettings.delete_timeout_s),
    ("trainer.md", "and {:.0f} s for a consumer", clearing.DEFAULT_TIMEOUT_S),
    ("transports.md", "at steps of {} bytes", ALIGNMENT),
    ("transports.md", "a record of {} bytes for each", records.RECORD_BYTES),
    ("transports.md", "more than {:.0f} s to come in full", OF_THE_SOCKET.request_s),
    ("transports.md", "an answer more than {:.0f} s to leave", OF_THE_SOCKET.answer_s),
    ("transports.md", "It serves {} connections", OF_THE_SOCKET.num_clients),
    ("transports.md", "tries memory again after {:.0f} s", memory._AGAIN_S),
    ("transports.md", "asks for at most {} MiB at once", same_host._PROXIED_BYTES >> 20),
    ("transports.md", "the time it has left, and at most {:.0f} s", memory._PROXY_PATIENCE_S),
]


def test_limits_that_pages_name_are_those_of_the_code() -> None:
    for name, words, limit in LIMITS:
        assert words.format(limit) in " ".join(PAGES[f"docs/{name}"].split()), f"{name}: {words}"


def test_figures_of_the_benchmark_are_those_of_its_rows() -> None:
    rows = {(row["workload"], row["path"]): row for row in json.loads((ROOT / "docs/benchmark.json").read_text())}
    sources = [(figure, figure["source"].partition("benchmark.json: ")[2].split()) for figure in FIGURES]
    found = [(figure, words) for figure, words in sources if words]
    assert len(found) == 4
    for figure, (workload, path, column) in found:
        places = len(figure["value"].partition(".")[2])
        assert f"{rows[workload, path][column] * figure.get('factor', 1):.{places}f}" == figure["value"], figure["what"]


def test_the_performance_page_has_the_workloads_of_the_benchmark() -> None:
    *rows, scale = table_under("Performance")
    assert [quoted(name) for name, *_ in rows] == [[name] for name in NAMES]
    assert quoted(scale[0]) == ["scale"]
    for (_, _, num_shards, megabytes, _), workload in zip(rows, map(make_workload, NAMES), strict=True):
        assert (num_shards, megabytes) == (f"{workload.num_shards:,}", f"{workload.nbytes / 1e6:.0f}")


def test_no_page_names_a_workload_by_a_number() -> None:
    for name, text in PAGES.items():
        assert not re.search(r"\bW\d\b", text), name


def test_the_planted_faults_of_the_reliability_page_are_those_of_the_tests() -> None:
    text = PAGES["docs/reliability.md"]
    rows = re.findall(r"^\| (.*?) \| \d/\d", text, re.M)
    titles = [mutant.title for mutant in (*ORDER_MUTANTS, *MEMORY_MUTANTS, *MUTATION_MUTANTS, *TIER_MUTANTS)]
    assert sorted(rows) == sorted(titles)
    assert f"| {len(titles)} planted faults" in text


def test_contributing_lists_what_ci_runs() -> None:
    listed = CONTRIBUTING.partition("CI runs ")[2].partition("\n\n")[0]
    ran = re.findall(r"^ *make (\w+)", (ROOT / ".ci/run").read_text(), re.M)
    assert sorted(re.findall(r"`make (\w+)`", listed)) == sorted(ran)
    versions = re.findall(r'"(3\.\d+)"', (ROOT / ".github/workflows/ci.yml").read_text())
    assert re.findall(r"3\.\d+", listed) == versions


def test_contributing_names_folders_and_markers_that_exist() -> None:
    folders = {text for text in quoted(CONTRIBUTING) if re.fullmatch(r"[\w./]+/[\w./]*", text) and "." not in text[1:]}
    made = {"site/"}
    assert [
        name for name in folders - made if not any((base / name).exists() for base in (ROOT, ROOT / "gpu_cache"))
    ] == []
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    known = {marker.partition(":")[0] for marker in markers}
    for text in (*PAGES.values(), CONTRIBUTING):
        assert set(re.findall(r"(?:pytest|ARGS=\").*?-m (\w+)", text)) <= known


def test_the_house_in_contributing_is_that_of_the_code() -> None:
    house = CONTRIBUTING.partition("```text\n")[2].partition("```")[0]
    lines = re.findall(r"^  (\w.*)$", house, re.M)
    shown = {
        name.removesuffix(".py").removesuffix("/") for line in lines for name in re.split(" {3,}", line)[0].split()
    }
    package = ROOT / "gpu_cache"
    found = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert shown == found - {"__init__"}
    listed = re.findall(r"`(\w+)`", CONTRIBUTING.partition("Imports point down this list: ")[2].partition(".")[0])
    ranks = [next(number for number, names in enumerate(RANKS) if name in names) for name in listed]
    assert ranks == sorted(ranks)


def test_refusals_beside_areal_are_those_of_the_code() -> None:
    code = (ROOT / "gpu_cache/rpc/adopt.py").read_text()
    rows = PAGES["docs/areal.md"].partition("## When it refuses\n")[2].partition("\n\n## ")[0].splitlines()
    said = [quoted(row.split(" | ")[0])[0] for row in rows if "`" in row.split(" | ")[0]]
    assert len(said) == 4
    for text in said:
        longest = max(re.split(r"\.\.\.|GPU_CACHE_AREAL", text), key=len)
        assert longest.strip(": ") in code, text


def test_the_demos_table_has_the_rows_that_the_demo_prints() -> None:
    shown = next(block.text for block in BLOCKS if block.mark == "the demo's table")
    figures: dict[str, Any] = collections.defaultdict(int, uncached_steps=session.Plan().uncached_steps)
    assert re.findall(r"^│ (.*?) +│", shown, re.M) == list(report.rows(figures))


def test_the_way_of_a_shard_in_contributing_names_code_that_exists() -> None:
    way = CONTRIBUTING.partition("## The way of a shard\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\d+\. (.*)$", way, re.M)
    assert len(lines) == 15
    for line in lines:
        quoted_texts = re.findall(r"`([^`]+)`", line)
        trees = [ast.parse((ROOT / "gpu_cache" / text).read_text()) for text in quoted_texts if text.endswith(".py")]
        defined = {
            node.name
            for tree in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for text in quoted_texts:
            if re.fullmatch(r"[A-Za-z_.]+", text) and not text.endswith(".py"):
                assert set(text.split(".")) <= defined, f"{line}: {text}"

"""The command line: what is written where, and the exit code."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu_cache.smi import options
from gpu_cache.smi.main import main
from gpu_cache.smi.query import FIELDS
from tests.support.smi_machine import Machine, Run, add_strange, add_trainers, machine, matches_golden
from tests.support.smi_nvml import FakeNvml
from tests.support.smi_reports import report

ROOT = Path(__file__).parents[2]
WIDTHS = pytest.mark.parametrize("width", [80, 100])


def tool(*arguments: str, folder: Path, script: str = "-m gpu_cache.smi") -> subprocess.CompletedProcess[str]:
    """The tool as a process of its own."""
    environ = os.environ | {"GPU_CACHE_STATS_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *script.split(), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("app", "missing"), [((), ("torch", "textual")), (("app",), ("torch",))])
def test_torch_is_never_imported_and_textual_by_the_full_screen_alone(
    node: Machine, app: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    add_trainers(node.folder)
    modules = {path.stem for path in (ROOT / "gpu_cache/smi").glob("*.py")} - {"__init__", "app"} | set(app)
    imports = ", ".join(f"gpu_cache.smi.{name}" for name in sorted(modules))
    code = f"""
import sys, {imports}
from gpu_cache.smi.main import main
for mode in ("--by=gpu", "--json", "--prom", "--dmon", "--check", "--watch"):
    main([mode, "--count=1", "--dir={node.folder.path}"])
assert not [name for name in sys.modules if name.split(".")[0] in {missing}]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "actor/0" in done.stdout


def test_it_runs_as_a_module_and_as_a_script_of_a_checkout(tmp_path: Path) -> None:
    for script in ("-m gpu_cache.smi", "scripts/gpu_cache_smi.py"):
        done = tool("--version", folder=tmp_path, script=script)
        assert (done.stdout, done.stderr, done.returncode) == ("gpu-cache-smi 0.1.0\n", "", 0)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich/__init__.py").write_text("raise ModuleNotFoundError('No module named rich')")
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "gpu_cache.smi"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "gpu-cache-smi: No module named rich; pip install 'rtensor-data-plane[smi]'\n"


def test_a_variable_with_a_bad_time_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPU_CACHE_STATS_DEAD_S", "1h")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("gpu-cache-smi: GPU_CACHE_STATS_DEAD_S='1h': must be a number of seconds")


def test_a_reader_that_goes_away_ends_it_in_silence(tmp_path: Path) -> None:
    environ = os.environ | {"GPU_CACHE_STATS_DIR": str(tmp_path)}
    command = f"{sys.executable} -m gpu_cache.smi --json -l 0.25 | head -c 1"
    (tmp_path / "x-0-1-0a1b2c.json").write_text(json.dumps(report(0)))
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{", "")


def test_a_closed_stdout_or_stderr_is_no_failure_and_neither_stands_in_for_the_other(tmp_path: Path) -> None:
    for closed in (">&-", "2>&-"):
        command = f"{sys.executable} -m gpu_cache.smi --dir={tmp_path} --query-proc=pid --format=csv,noheader {closed}"
        command = f"{command} && {sys.executable} -m gpu_cache.smi --nonsense {closed}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.returncode) == ("", 2)
        assert "Error" not in done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse has another form from Python 3.13 on")
@WIDTHS
def test_help(node: Machine, width: int) -> None:
    done = node.run("--help", width=width)
    assert matches_golden(f"help_{width}.txt", done.out)
    assert (done.err, done.code) == ("", 0)


def test_help_names_every_option() -> None:
    parser = options.parser()
    known = {name for action in parser._actions for name in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", parser.format_help()))
    assert known <= named
    assert {name for name in named if name.startswith("--")} <= known


@pytest.mark.parametrize("kind", list(FIELDS))
def test_help_of_queries(node: Machine, kind: str) -> None:
    assert matches_golden(f"help_query_{kind}.txt", node.run(f"--help-query-{kind}").out)


def test_a_query_is_the_specifications(node: Machine) -> None:
    add_trainers(node.folder)
    query = "--query-proc=gpu.index,pid,role,pool.used,hit_ratio,fetch.rate,oldest.age"
    assert node.run(query, "-i", "0,3,5").out == (
        "gpu.index, pid, role, pool.used [MiB], hit_ratio [%], fetch.rate [GB/s], oldest.age [s]\n"
        "0, 41873, actor/0, 12288 MiB, 96.8 %, 11.4 GB/s, 38 s\n"
        "3, 41876, actor/3, 14460 MiB, 96.5 %, 11.1 GB/s, 4322 s\n"
        "5, 41878, actor/5, 9216 MiB, 91.2 %, [N/A], 127 s\n"
    )
    bare = node.run("--query-proc=gpu.index,pid,pool.used,oldest.age", "--format=csv,noheader,nounits", "-i", "0,3")
    assert bare.out == "0, 41873, 12288, 38\n3, 41876, 14460, 4322\n"


@WIDTHS
@pytest.mark.parametrize("kind", list(FIELDS))
def test_every_field_can_be_asked_for(node: Machine, kind: str, width: int) -> None:
    add_trainers(node.folder)
    done = node.run(f"--query-{kind}={','.join(FIELDS[kind])}", width=width)
    assert matches_golden(f"query_{kind}.txt", done.out)  # the width plays no part


@WIDTHS
def test_json(node: Machine, width: int) -> None:
    add_trainers(node.folder)
    done = node.run("--json", "-i", "3,6", width=width)
    user = pwd.getpwuid(os.getuid()).pw_name
    assert matches_golden("document.json", done.out.replace(f'"user": "{user}"', '"user": "USER"'))
    assert (done.err, done.code) == ("", 0)


def test_json_has_the_specifications_keys(node: Machine) -> None:
    add_trainers(node.folder)
    found = json.loads(node.run("--json").out)
    assert found["query_time"] == "2026-11-22T12:15:54.102Z"
    assert len(found["processes"]) == len(found["gpus"]) == 8
    first = found["processes"][0]
    assert (first["pid"], first["hit_ratio"], first["fetch_bytes_per_second"]) == (41873, 0.968, 11.4e9)
    assert first["oldest_entry_age_seconds"] == 38.2
    hung = found["processes"][5]
    assert (hung["fetch_bytes_per_second"], hung["oldest_entry_age_seconds"]) == (None, 127.0)
    assert found["processes"][7] == found["processes"][7] | {"state": "dead", "lookups": None, "sources": {}}
    codes = ["outlived_clear", "no_report", "ended_without_cleanup"]
    assert [problem["code"] for problem in found["problems"]] == codes
    assert found["problems"][0]["message"] == ("12 entries (2.1GiB) survived 2+ clears; oldest 1h12m")


def test_json_in_a_loop_is_one_line_each(node: Machine) -> None:
    add_trainers(node.folder)
    lines = node.run("--json", "--loop-ms", "250", "-c", "2").out.splitlines()
    assert [json.loads(line)["hostname"] for line in lines] == ["gpu-a-017"] * 2


@WIDTHS
def test_dmon(node: Machine, width: int) -> None:
    add_trainers(node.folder)
    assert matches_golden(f"dmon_{width}.txt", node.run("--dmon", width=width).out)


def test_tables_repeat_with_a_blank_line_between(node: Machine) -> None:
    add_trainers(node.folder)
    once, twice = node.run().out, node.run("-l", "0.25", "-c", "2").out
    assert twice == f"{once}\n{once}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "01234576"),
        (["-i", "3"], "3"),
        (["--id", "GPU-604ac76c-d9cf-fef3-62e9-d92044ab6e54,0"], "04"),
        (["--pid", "41875"], "2"),
        (["--role", "actor/1,actor/7"], "17"),
        (["--role", "critic"], ""),
    ],
)
def test_filters(node: Machine, arguments: list[str], expected: str) -> None:
    add_trainers(node.folder)
    done = node.run("--query-proc=gpu.index", "--format=csv,noheader", *arguments)
    assert done.out.replace("\n", "") == expected


def test_a_filter_by_gpu_holds_for_the_box_of_devices(node: Machine) -> None:
    add_trainers(node.folder)
    out = node.run("-i", "6", "--by", "gpu").out
    assert [line[4] for line in out.splitlines() if "NVIDIA" in line] == ["6"]


def test_a_filter_by_source(node: Machine) -> None:
    add_trainers(node.folder)
    done = node.run("--query-source=node", "--format=csv,noheader", "--source", "gpu-a-023,local")
    assert done.out == "gpu-a-023:35221\nlocal\n"


def test_check_is_silent_when_all_is_well(node: Machine) -> None:
    node.folder.add(report(0), host_pid=41873)
    done = node.run("--check")
    assert (done.out, done.err, done.code) == ("", "", 0)


def test_check_tells_that_a_switch_for_areal_has_no_effect(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_AREAL", "1")
    done = node.run("--check")
    assert done.code == 3
    assert done.out.startswith("WARN  AReaL: not installed here (GPU_CACHE_AREAL=1)")
    monkeypatch.setenv("GPU_CACHE_AREAL", "0")
    assert node.run("--check").code == 0


def test_check_tells_what_is_wrong(node: Machine) -> None:
    add_strange(node.folder)
    done = node.run("--check")
    assert done.code == 3
    assert [line.split(":")[0] for line in done.out.splitlines() if line[0] != " "] == [
        "WARN  gpu 5 pid 41878",
        "NOTE  gpu 6 pid 41879",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--query-proc=pid,nonsense"],
        ["--query-gpu="],
        ["--format=xml"],
        ["--json", "--dmon"],
        ["-l", "0.1"],
        ["-l", "x"],
        ["--count", "0"],
        ["--serve", "nowhere:1"],
        ["--serve", "70000"],
        ["--by", "moon"],
        ["--nonsense"],
        ["--leaks", "1"],
        ["--timeline", "/nonexistent"],
    ],
)
def test_a_bad_argument_is_2(node: Machine, arguments: list[str]) -> None:
    done = node.run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("gpu-cache-smi: ")


def test_an_unexpected_error_is_1_with_a_traceback_on_demand(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "observer", object())
    done = node.run()
    assert (done.code, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert "Traceback" in node.run("--debug").err


def test_interrupting_a_loop_is_0(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert node.run("-l", "1").code == 0


@pytest.mark.parametrize(("failure", "code"), [(9, 9), (12, 12), (15, 9)])
def test_strict_tells_of_nvml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: int, code: int
) -> None:
    with machine(tmp_path, monkeypatch, capsys, FakeNvml(failure=failure)) as node:
        node.folder.add(report(0), host_pid=41873)
        assert [node.run().code, node.run("--strict").code, node.run("--json").code] == [0, code, 0]
        assert node.run("--json").err == ""
        assert node.run("--json", "--strict").err.startswith("gpu-cache-smi: NVML not available: ")


def test_reports_that_may_not_be_read_are_4(node: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = node.folder.add(report(0), host_pid=41873)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gpu_cache.smi.folder.os.open", refuse)
    done = node.run()
    assert (done.code, done.out) == (4, "")
    assert f"none may be read ({path}: Permission denied)" in done.err
    assert node.run("--check").code == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-l", "abc"], "argument -l/--loop: 'abc' is no number of seconds, 0.25 or more"),
        (["--loop-ms", "abc"], "argument --loop-ms: 'abc' is no number of milliseconds, 250 or more"),
        (["-c", "0"], "argument -c/--count: '0' is no whole number, 1 or more"),
        (["--serve", "http"], "argument --serve: 'http' is no port: a number up to 65535"),
        (
            ["--query-proc=pid,hit_rate"],
            "argument --query-proc: no field 'hit_rate'; did you mean hit_ratio? (--help-query-proc lists them)",
        ),
        (["--quer-proc=pid"], "no option --quer-proc=pid; did you mean --query-proc?"),
        (["--zzz"], "no option --zzz"),
    ],
)
def test_a_bad_argument_is_refused_in_words(node: Machine, arguments: list[str], message: str) -> None:
    found = node.run(*arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err == f"gpu-cache-smi: {message}\nHint: gpu-cache-smi --help\n"


@pytest.mark.parametrize("option", ["--record", "--timeline"])
def test_a_file_that_cannot_be_opened_is_named_once(node: Machine, option: str) -> None:
    found = node.run(option, "/nonexistent/run.jsonl", "-c", "1")
    assert found == Run(2, "", "gpu-cache-smi: /nonexistent/run.jsonl: No such file or directory\n")


def test_a_timeline_that_cannot_be_written_is_named(node: Machine, tmp_path: Path) -> None:
    add_trainers(node.folder)
    node.run("--record", str(tmp_path / "run"), "-l", "0.25", "-c", "1")
    found = node.run("--timeline", str(tmp_path / "run"), "-o", "/nonexistent/page.html")
    assert found == Run(2, "", "gpu-cache-smi: /nonexistent/page.html: No such file or directory\n")


def test_dmon_tells_a_death_once(node: Machine) -> None:
    add_trainers(node.folder)
    lines = node.run("--dmon", "--loop-ms", "250", "-c", "3").out.splitlines()
    assert [sum(word in line.split() for line in lines) for word in ("actor/0", "dead")] == [3, 1]


def test_a_list_names_gpus_processes_users_and_commands(node: Machine) -> None:
    node.folder.add(report(3), host_pid=41876)
    node.folder.add(report(0, device="cpu", gpu_uuid=None), host_pid=41999)
    (node.folder.procfs / "41876").mkdir()
    (node.folder.procfs / "41876/cmdline").write_bytes(b"python\0train.py\0--name\0\x1b[31m\0")
    lines = node.run("-L").out.splitlines()
    user = pwd.getpwuid(os.getuid()).pw_name
    assert lines[3] == "GPU 3: NVIDIA H200 (UUID: GPU-604ac76c-d9cf-fef3-62e9-d92044ab6e53)"
    assert lines[4] == f"  pid 41876  actor/3  ok  {user}  python train.py --name ?[31m"
    assert lines[-2:] == ["cpu: host memory", f"  pid 41999  actor/0  ok  {user}  -"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_locale_is_too_small(node: Machine, encoding: str) -> None:
    node.folder.now = time.time()
    node.folder.add(report(0, role="rôle-\u4e2d"), host_pid=41873)
    for arguments in ([], ["-L"], ["--watch", "0.25", "-c", "1"], ["--json"], ["--dmon"]):
        command = [sys.executable, "-m", "gpu_cache.smi", "--dir", str(node.folder.path), *arguments]
        environ = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        assert b"actor" not in done.stdout
        assert len(done.stdout) > 50

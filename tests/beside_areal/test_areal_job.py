"""AReaL's own servers, controller and codec, with the switch on in all, in one, or in none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from tests.support.free_port import free_port

pytestmark = pytest.mark.areal
JOB = Path(__file__).parent / "job"
NUM_ROWS, NUM_TOKENS = 4, 20_000
PAYLOAD_BYTES = NUM_ROWS * (NUM_TOKENS * (1 + 8 + 4 + 2) + 4)
DEADLINE_S = 120.0
_no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# By which processes have the switch on, of owner, consumer and controller.
EVERYWHERE, NOWHERE = (True, True, True), (False, False, False)
IN_ONE = [(True, False, False), (False, True, False), (False, False, True)]
CASES = [EVERYWHERE, *IN_ONE, NOWHERE]
# Of AReaL's trainer; "reward" is a consumer that no controller knows of.
ROLES = ("rollout", "actor", "critic", "ref", "teacher", "reward")
NUM_STEPS = 4
LEAKS = ("--leaks", "reward/0")


def environment(is_on: bool) -> dict[str, str]:
    """Of a process that finds the engine, and the packages where they are installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GPU_CACHE_")}
    return kept | {"PYTHONPATH": str(JOB)} | ({"GPU_CACHE_AREAL": "1"} if is_on else {})


class Family:
    """Processes with the switch on, or off: forks of one that has imported AReaL."""

    def __init__(self, folder: Path, is_on: bool) -> None:
        self._folder, self._is_on, self._num_logs, self.said = folder, is_on, 0, ""
        command = [sys.executable, str(JOB / "family.py")]
        log = (folder / f"family-{is_on}.log").open("w")
        self._process = subprocess.Popen(
            command,
            env=environment(is_on) | {"GPU_CACHE_STATS_DIR": str(folder / "reports")},
            cwd=folder,
            stdin=PIPE,
            stdout=PIPE,
            stderr=log,
            text=True,
        )
        log.close()

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)

    def start(self, program: str, *arguments: str) -> Path:
        """Start a program; returns the file in which its output is going to be."""
        self._num_logs += 1
        log = self._folder / f"{self._is_on}-{self._num_logs}.log"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([program, str(log), *arguments]) + "\n")
        self._process.stdin.flush()
        while not (said := self._process.stdout.readline()).startswith("child "):  # AReaL's log goes there too
            assert said, (self._folder / f"family-{self._is_on}.log").read_text()
            self.said += said
        return log

    def serve(self, role: str = "role") -> str:
        """Start one of AReaL's servers, and wait for it; returns its address."""
        port = free_port()
        log = self.start(
            "areal.infra.rpc.rpc_server", "--host", "127.0.0.1", "--port", str(port), "--experiment-name", "test",
            "--trial-name", "test", "--role", role, "--worker-index", str(port if role == "role" else 0),
            "--nfs-record-root", str(self._folder / "names"), "--fileroot", str(self._folder),
        )  # fmt: skip
        wait_for(f"127.0.0.1:{port}", log)
        return f"127.0.0.1:{port}"

    def run(self, program: str, *arguments: str) -> list[Any]:
        """Run a program of the job; returns what it printed."""
        log = self.start(str(JOB / program), *arguments)
        deadline = time.monotonic() + DEADLINE_S
        while "DONE" not in (said := log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline, said
            assert "Traceback" not in said, said
            time.sleep(0.05)
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def wait_for(address: str, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            _no_proxy.open(f"http://{address}/health", timeout=10).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What a controller saw in each case, by the case; and what the import of AReaL said with the switch on."""
    folder, found = tmp_path_factory.mktemp("job"), {}
    with Family(folder, True) as on, Family(folder, False) as off:
        family_of = {True: on, False: off}
        owner_of = {is_on: family.serve() for is_on, family in family_of.items()}
        consumer_of = {is_on: family.serve() for is_on, family in family_of.items()}
        for is_on, family in family_of.items():
            cases = [case for case in CASES if case[2] is is_on]
            pairs = [[owner_of[case[0]], consumer_of[case[1]]] for case in cases]
            answers = family.run("controller.py", json.dumps(pairs), str(NUM_ROWS), str(NUM_TOKENS))
            found |= dict(zip(cases, answers, strict=True))
            found["written", is_on] = family.run("writers.py", owner_of[is_on])[0]
        at = {role: on.serve(role) for role in ROLES}
        found["roles"] = on.run("roles.py", json.dumps(at), str(NUM_STEPS), "2", "100")
        found["leaks"], found["check"] = (smi(folder, *arguments) for arguments in (LEAKS, ("--check",)))
        found["said"] = on.said
    return found


def smi(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of `gpu-cache-smi`, with no GPU driver, once reports show the last clear."""
    time.sleep(1.2)
    command = [sys.executable, "-m", "gpu_cache.smi", "--dir", str(folder / "reports"), "--ascii", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(False), check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("case", CASES)
def test_handles_of_one_server_are_read_exactly_by_the_other_and_by_both_ends(seen: Any, case: Any) -> None:
    assert seen[case]["is_exact"] == [True, True, True]
    assert seen[case]["num_shards"] == 5 * NUM_ROWS


@pytest.mark.parametrize("case", CASES)
def test_areals_own_clear_leaves_nothing_anywhere(seen: Any, case: Any) -> None:
    for who in ("owner", "consumer", "controller"):
        facts = seen[case][who]
        assert (facts["num_tensors"], facts["total_bytes"], facts["num_entries"]) == (0, 0, 0), who


@pytest.mark.parametrize("case", CASES)
def test_pickles_of_handles_are_read_with_and_without_the_switch(seen: Any, case: Any) -> None:
    assert seen[case]["unpickled"] == ["a h:1 [2, 3] meta"] * 3


@pytest.mark.parametrize("case", CASES)
def test_each_process_has_the_handles_that_its_switch_says(seen: Any, case: Any) -> None:
    for who, is_on in zip(("owner", "consumer", "controller"), case, strict=True):
        facts = seen[case][who]
        assert facts["is_ours_imported"] is is_on, who
        assert facts["rtensor"] == ("gpu_cache.rpc.rtensor" if is_on else "areal.infra.rpc.rtensor")


@pytest.mark.parametrize("case", CASES)
def test_handles_have_the_form_that_areals_codec_gives_them(seen: Any, case: Any) -> None:
    assert seen[case]["has_areals_form"]


def test_localized_handles_stay_small_in_areals_messages(seen: Any) -> None:
    assert seen[EVERYWHERE]["localized_message_bytes"] == seen[EVERYWHERE]["message_bytes"] < 10_000
    assert seen[NOWHERE]["localized_message_bytes"] > PAYLOAD_BYTES


def test_frames_are_binary_and_the_owner_reads_its_own_without_a_request(seen: Any) -> None:
    health = seen[EVERYWHERE]["health"]
    assert health["status"] == "healthy"
    assert health["sent_payload_bytes"] == 2 * PAYLOAD_BYTES, "the consumer's read, and the controller's"
    assert health["sent_body_bytes"] < 1.02 * health["sent_payload_bytes"]
    assert "incarnation" not in seen[NOWHERE]["health"]


def test_one_line_of_the_log_names_the_replaced_modules(seen: Any) -> None:
    (said,) = [line for line in seen["said"].splitlines() if " uses gpu_cache " in line]
    assert "INFO: AReaL 1.0.4 uses gpu_cache " in said


def test_the_doctor_tells_a_server_with_the_switch_from_one_without(seen: Any) -> None:
    found = {what: text for what, text, is_good in seen[EVERYWHERE]["doctor"] if is_good}
    assert found["AReaL"].endswith(", its names were checked")
    assert found["switch"] == "on (GPU_CACHE_AREAL=1)"
    assert found["areal.infra.rpc.rtensor"].startswith("is gpu_cache.rpc.rtensor in ")
    assert found["areal.infra.rpc.guard.data_blueprint"].startswith("is gpu_cache.rpc.server.blueprint in ")
    assert found["frames"].startswith("binary, incarnation ")
    alone = {what: text for what, text, is_good in seen[False, False, True]["doctor"] if is_good}
    assert alone["frames"] == "JSON: the server is AReaL's own, and its process has the switch off"


def test_areals_clears_leave_nothing_in_any_role_not_even_in_the_teacher_that_they_forget(seen: Any) -> None:
    steps = seen["roles"]
    assert len(steps) == NUM_STEPS
    for facts in steps:
        left = {role: (one["num_tensors"], one["num_entries"]) for role, one in facts.items() if role != "reward"}
        assert left == dict.fromkeys(("rollout", "actor", "critic", "ref", "teacher", "controller"), (0, 0))


def test_a_consumer_that_areal_forgets_is_shown_as_a_leak_with_its_role(seen: Any) -> None:
    entries = [facts["reward"]["num_entries"] for facts in seen["roles"]]
    assert entries == [10, 20, 30, 40]
    status, shown = seen["leaks"]
    assert status == 0
    assert "reward/0" in shown
    assert seen["roles"][0]["rollout"]["num_tensors"] == 0, "the owner has nothing of it any more"
    status, shown = seen["check"]
    assert status == 3
    assert "20 entries" in shown, "of the first two steps, which survived two clears"


@pytest.mark.parametrize("is_on", [True, False])
def test_areals_own_code_writes_into_what_it_reads(seen: Any, is_on: bool) -> None:
    assert seen["written", is_on]["written"] == ["prox_logp", "ref_logp", "rewards"]
    assert seen["written", is_on]["is_first_result_right"]


def test_the_next_reader_gets_the_bytes_that_areal_wrote_into(seen: Any) -> None:
    with_switch, without = seen["written", True], seen["written", False]
    assert with_switch["differs_for_the_next_reader"] == []
    assert with_switch["is_next_result_right"]
    assert without["differs_for_the_next_reader"] == ["prox_logp", "ref_logp", "rewards"], "AReaL's own buffer"
    assert not without["is_next_result_right"]


def test_areal_moves_what_is_on_its_device_without_a_copy(seen: Any) -> None:
    assert seen["written", True]["is_moved_without_a_copy"]


def test_a_process_that_has_not_initialised_cuda_reads_host_memory_and_does_not_initialise_it(seen: Any) -> None:
    found = seen["written", True]
    assert found["device"].startswith("cpu: this process has not initialised CUDA")
    assert not found["has_cuda"]

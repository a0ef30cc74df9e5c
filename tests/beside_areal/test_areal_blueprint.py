"""Our blueprint for AReaL's servers, under werkzeug and under FastAPI's WSGIMiddleware, over real sockets."""

from __future__ import annotations

import contextlib
import gc
import http.client
import importlib
import json
import os
import socket
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gpu_cache.rpc import RTensor, rtensor, runtime
from gpu_cache.rpc.server import requests
from gpu_cache.rpc.wire.frame import CONTENT_TYPE, Frame, decode_frame
from gpu_cache.rpc.wire.serialization import deserialize_value, serialize_value
from tests.support.areal_fixtures import remote
from tests.support.wire_tensors import same_bits

flask = pytest.importorskip("flask", reason="needs Flask and AReaL: make areal")
fastapi, uvicorn, serving = map(pytest.importorskip, ("fastapi", "uvicorn", "werkzeug.serving"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Starlette's, of its middleware
    wsgi = importlib.import_module("fastapi.middleware.wsgi")
blueprint = importlib.import_module("gpu_cache.rpc.server.blueprint")

pytestmark = pytest.mark.areal
TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.randn(700_000),  # of several pieces
    "c": torch.ones(3, dtype=torch.float8_e4m3fn),
    "empty": torch.empty(0, 4),
}
Serve = Callable[[Any], str]


@contextlib.contextmanager
def under_werkzeug(app: Any) -> Iterator[str]:
    server = serving.make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


@contextlib.contextmanager
def under_fastapi(app: Any) -> Iterator[str]:
    outer = fastapi.FastAPI()
    outer.mount("/", wsgi.WSGIMiddleware(app))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(outer, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def application() -> Any:
    app = flask.Flask("test")
    app.register_blueprint(blueprint.data_bp)
    return app


@pytest.fixture(params=[under_werkzeug, under_fastapi], ids=["werkzeug", "fastapi"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    for shard_id, tensor in TENSORS.items():
        rtensor.store(shard_id, tensor)
    with request.param(application()) as found:
        yield found


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(address: str, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    connection = http.client.HTTPConnection(address, timeout=30)
    with contextlib.closing(connection):
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        shown = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, sent, {"Content-Type": "application/json"} | shown)
        return Reply(connection.getresponse())


def test_a_batch_is_read_in_both_forms(address: str) -> None:
    ids = list(TENSORS)
    binary = ask(address, "POST", "/data/batch", {"shard_ids": [*ids, "a"]}, Accept=CONTENT_TYPE)
    assert (binary.status, binary.headers["Content-Type"]) == (200, CONTENT_TYPE)
    found = decode_frame(bytearray(binary.body))
    assert found.keys() == TENSORS.keys()
    assert all(same_bits(found[shard_id], TENSORS[shard_id]) for shard_id in ids)
    assert b'"serials": ' in binary.body.partition(b"data_offsets")[0].replace(b'\\"', b'"')
    as_json = ask(address, "POST", "/data/batch", {"shard_ids": ["a", "b", "a"]})
    assert as_json.headers["Content-Type"] == "application/octet-stream"
    assert all(map(same_bits, deserialize_value(as_json.json), [TENSORS["a"], TENSORS["b"], TENSORS["a"]]))
    assert same_bits(deserialize_value(ask(address, "GET", "/data/c").json), TENSORS["c"])
    assert binary.headers["X-Shard-Incarnation"] == as_json.headers["X-Shard-Incarnation"] != ""


def test_our_client_reads_and_clears(address: str) -> None:
    handles = [remote(address, shard_id, tensor) for shard_id, tensor in TENSORS.items()]
    assert all(map(same_bits, RTensor.localize(handles), TENSORS.values()))
    cleared = ask(address, "DELETE", "/data/clear", {"shard_ids": ["a", 7, "unknown", "b"]})
    assert cleared.json == {"status": "ok", "cleared_count": 2, **runtime.current().store.stats()}
    assert rtensor.storage_stats()["num_tensors"] == 2
    assert rtensor.fetch_buffer_stats() == {"num_entries": 2}, "the owner's own cache is cleared too"
    missing = ask(address, "POST", "/data/batch", {"shard_ids": ["a", "c", "b"]}, Accept=CONTENT_TYPE)
    assert (missing.status, missing.json["missing_shard_ids"]) == (400, ["a", "b"])
    assert ask(address, "POST", "/data/batch", {"shard_ids": ["a", "c"]}).json["missing_shard_ids"] == ["a"]
    assert ask(address, "GET", "/data/a").json == {"status": "error", "message": "Shard a not found"}
    assert set(ask(address, "POST", "/data/reclaim").json) == {"status", "trimmed"}


def test_our_client_of_this_host_reads_memory_and_clears_nothing_under_a_reader(address: str) -> None:
    store = runtime.current().store
    for shard_id, copy in zip(TENSORS, store.copies(list(TENSORS.values())), strict=True):
        store.put(shard_id, copy)
    for _ in range(2):
        handles = [remote(address, shard_id, tensor) for shard_id, tensor in TENSORS.items()]
        assert all(map(same_bits, RTensor.localize(handles), TENSORS.values()))
        rtensor.clear_fetch_buffer()
    assert runtime.current().cache._index.report()["sources"][address]["transport"] == "shm"
    assert ask(address, "DELETE", "/data/clear", {"shard_ids": ["a"]}).json["cleared_count"] == 1


def test_tensors_are_stored_in_both_forms(address: str) -> None:
    tensor = torch.randn(5).to(torch.bfloat16)
    assert ask(address, "PUT", "/data/x", serialize_value(tensor)).json == {"status": "ok", "shard_id": "x"}
    frame = b"".join(map(bytes, Frame([("deep/y", tensor)])))
    assert ask(address, "PUT", "/data/deep/y", frame, Content_Type=CONTENT_TYPE).status == 200
    assert same_bits(rtensor.fetch("x"), tensor)
    assert same_bits(rtensor.fetch("deep/y"), tensor)
    for bad in (b"{", b"7", json.dumps({"type": "tensor"}).encode()):
        refused = ask(address, "PUT", "/data/z", bad)
        assert (refused.status, refused.json["status"]) == (400, "error")
    assert ask(address, "PUT", "/data/z", frame, Content_Type=CONTENT_TYPE).status == 400
    assert "z" not in rtensor._storage


@pytest.mark.parametrize("shard_id", ["/a", "//", "a//b", "a/", "a b\n", "é?#%2F"])
def test_an_id_of_any_letters_is_one_path(address: str, shard_id: str) -> None:
    path = f"/data/{urllib.parse.quote(shard_id, safe='')}"
    tensor = torch.eye(3)
    assert ask(address, "PUT", path, serialize_value(tensor)).status == 200
    assert same_bits(rtensor.fetch(shard_id), tensor)
    assert same_bits(deserialize_value(ask(address, "GET", path).json), tensor)


def test_bad_lists_are_refused_by_upstreams_words(address: str) -> None:
    for bad in (b"", b"[]", {"shard_ids": "a"}, {"shard_ids": [1]}):
        reply = ask(address, "POST", "/data/batch", bad)
        assert (reply.status, reply.json["message"]) == (400, requests.NO_IDS_TO_READ)
    assert ask(address, "DELETE", "/data/clear", {}).json["message"] == "'shard_ids' must be a list"
    assert ask(address, "POST", "/data/batch", {"shard_ids": ["a"] * 70_000}).status == 413


def test_the_token_is_asked_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_RPC_TOKEN", "s3cret")
    refused = ask(address, "GET", "/data/a")
    assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert ask(address, "GET", "/data/a", Authorization="Bearer s3cre").status == 401
    assert ask(address, "GET", "/data/a", Authorization="Bearer s3cret").status == 200
    assert same_bits(remote(address, "a", TENSORS["a"]).to_local(), TENSORS["a"])


def test_a_web_page_of_elsewhere_is_refused(address: str) -> None:
    assert ask(address, "GET", "/data/a", Origin="http://evil.example").status == 403
    assert ask(address, "GET", "/data/a", Host="evil.example").status == 403


def test_too_long_a_body_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprint, "_MAX_BODY_BYTES", 1000)
    assert ask(address, "PUT", "/data/x", b"x" * 1001).status == 413
    assert ask(address, "PUT", "/data/x", serialize_value(torch.ones(3))).status == 200


def test_too_long_an_answer_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_cache.rpc.server.answers.MAX_ARRAY_BYTES", 1000)
    assert ask(address, "POST", "/data/batch", {"shard_ids": ["b"] * 4}).status == 413


def test_the_function_that_areals_tests_patch_is_called_for_each_id(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> Any:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(blueprint, "serialize_value", broken)
        failed = [ask(address, "GET", "/data/a"), ask(address, "POST", "/data/batch", {"shard_ids": ["a"]})]
    monkeypatch.setattr(rtensor, "fetch", broken)
    failed += [ask(address, "GET", "/data/a"), ask(address, "POST", "/data/batch", {"shard_ids": ["a"]})]
    assert [(reply.status, reply.json["message"]) for reply in failed] == [(500, "broken on purpose")] * 4
    rtensor._storage.clear()
    rtensor._storage_stats.clear()
    assert not rtensor._storage_stats


def test_clients_beyond_the_limit_get_503(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sending = requests.Sending(0)
    monkeypatch.setattr(blueprint, "_sending", sending)
    refused = ask(address, "GET", "/data/a")
    assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
    assert sending.figures()["num_busy_refusals"] == 1


def test_a_client_that_was_refused_has_its_turn_on_its_next_connection(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = requests.Sending(1)
    monkeypatch.setattr(blueprint, "_sending", sending)
    place = sending.begin("other")
    assert ask(address, "GET", "/data/a", X_Shard_Client="first").status == 503
    sending.end(place, None, 0)
    assert ask(address, "GET", "/data/a", X_Shard_Client="late").status == 503, "the free place is kept"
    assert ask(address, "GET", "/data/a").status == 503, "also from clients without a name"
    assert ask(address, "GET", "/data/a", X_Shard_Client="first").status == 200


def test_shards_expire_where_a_variable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rtensor.store("old", torch.ones(3))
    monkeypatch.setattr(blueprint, "_expiry", None)
    monkeypatch.setenv("GPU_CACHE_SHARD_TTL", "0.1s")
    application()
    wait_until(lambda: "old" not in rtensor._storage)
    wait_until(lambda: blueprint._figures()["expired_shards"] == 1)
    (thread,) = [one for one in threading.enumerate() if one.name == "areal-shard-expiry"]
    thread.ask_to_end()  # type: ignore[attr-defined]
    thread.join(30)


@pytest.mark.parametrize(
    ("name", "message"),
    [("GPU_CACHE_SHARD_TTL", "'soon' is not a time above 0"), ("GPU_CACHE_FREEZE_HEAP", "must be 0 or 1"),
     ("GPU_CACHE_SHM", "must be 0 or 1")],
)  # fmt: skip
def test_a_server_refuses_a_bad_variable_by_its_name(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprint, "_expiry", None)
    monkeypatch.setenv(name, "soon")
    with pytest.raises(ValueError, match=f"{name}='soon': {message}"):
        application()


def test_each_place_is_given_back(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sending = requests.Sending(2)
    monkeypatch.setattr(blueprint, "_sending", sending)
    for _ in range(3):
        assert ask(address, "GET", "/data/a").status == 200
        assert ask(address, "GET", "/data/unknown").status == 404
    host, port = address.split(":")
    for _ in range(2):  # clients that go before the answer is there
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(b"GET /data/b HTTP/1.1\r\nHost: localhost\r\n\r\n")
            leaving.recv(10)
    wait_until(lambda: sending.figures()["num_responses"] == 0)
    assert sending.figures()["sent_payload_bytes"] >= 3 * TENSORS["a"].nbytes


def test_a_request_for_headers_alone_keeps_no_place(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sending = requests.Sending(1)
    monkeypatch.setattr(blueprint, "_sending", sending)
    gc.disable()  # a server's cycles keep such answers
    try:
        statuses = [ask(address, method, "/data/a").status for method in ("HEAD", "HEAD", "GET")]
    finally:
        gc.enable()
    assert statuses == [200] * 3


def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sending = requests.Sending(2)
    monkeypatch.setattr(blueprint, "_sending", sending)
    monkeypatch.setattr(blueprint, "_STALLED_S", 0.2)
    rtensor.store("large", torch.zeros(8 << 20))
    with under_werkzeug(application()) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as stalled:
            stalled.sendall(b"GET /data/large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: sending.figures()["num_responses"] == 1)
            wait_until(lambda: sending.figures()["num_responses"] == 0)
    assert sending.figures()["sent_payload_bytes"] == 0


def test_a_body_that_stops_coming_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprint, "_STALLED_S", 0.2)
    with under_werkzeug(application()) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(b"PUT /data/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
            assert b" 408 " in slow.recv(1 << 16)


def test_chunks_that_are_none_are_the_clients_fault() -> None:
    with under_werkzeug(application()) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as odd:
            odd.sendall(b"PUT /data/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
            assert b" 400 " in odd.recv(1 << 16)


def test_figures_are_in_the_health_of_areals_guard() -> None:
    class Guard:
        hooks: list[Callable[[], dict[str, Any]]] = []  # noqa: RUF012

        def register_health_hook(self, hook: Callable[[], dict[str, Any]]) -> None:
            self.hooks.append(hook)

    app = flask.Flask("test")
    app.config["guard_state"] = Guard()
    app.register_blueprint(blueprint.data_bp)
    figures = Guard.hooks[0]()
    assert {"incarnation", "num_tensors", "total_bytes", "sent_body_bytes", "num_busy_refusals"} <= set(figures)
    assert "status" not in figures


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_forked_server_is_another_one() -> None:
    def first_serial() -> list[str]:
        rtensor._storage["x"] = torch.ones(3)
        client = application().test_client()
        answer = client.post("/data/serials", json={"shard_ids": ["x"]}, base_url="http://localhost")
        return [answer.headers["X-Shard-Incarnation"], *answer.json["serials"]]

    reader, writer = os.pipe()
    told = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            os.write(writer, json.dumps(first_serial()).encode())
            os._exit(0)
        os.waitpid(child, 0)
        told.append(json.loads(os.read(reader, 1000)))
    os.close(reader)
    os.close(writer)
    (one, serial), (other, same_serial) = told
    assert serial == same_serial
    assert len({one, other, blueprint._incarnation}) == 3


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("setting", "is_frozen"), [(None, True), ("0", False), ("no", False)])
def test_the_first_engine_takes_the_heap_out_of_collections(
    setting: str | None, is_frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, answers = application(), iter([("no such class", 500), ("made", 200), ("made", 200)])
    app.add_url_rule("/create_engine", "create_engine", lambda: next(answers), methods=["POST"])
    monkeypatch.setattr(blueprint, "_has_engine", False)
    if setting is not None:
        monkeypatch.setenv(blueprint.FREEZE_VARIABLE, setting)
    client, counts = app.test_client(), []
    gc.unfreeze()
    for _ in range(3):
        client.post("/create_engine")
        counts.append(gc.get_freeze_count())
        gc.unfreeze()
    assert [count > 0 for count in counts] == [False, is_frozen, False]

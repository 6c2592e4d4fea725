"""What was accepted is done, and done once, however the server ends: by closing, in between, by SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from service.causal_models import VOCABULARY, llama
from service.server import NAME, free_port, service_in
from torch import Tensor
from waiting import PATIENCE, until

from lorica.errors import LoricaError
from lorica.service import Client, Datum, wire
from lorica.service.errors import GoneError, UserError
from lorica.service.state.runs import check_checkpoint
from lorica.service.state.service import Service
from lorica.service.state.tenants import Tenant, Tenants

pytest.importorskip("tinker", reason="the SDK is not installed: pip install 'lorica[service]'")

WHO = Tenant()


def learn(run: str, seq: int, seed: int) -> bytes:
    random = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(2):
        tokens = torch.randint(0, VOCABULARY, (12,), generator=random).tolist()
        inputs = {"target_tokens": {"data": tokens[1:], "dtype": "int64"}}
        data.append({"model_input": {"chunks": [{"tokens": tokens[:-1]}]}, "loss_fn_inputs": inputs})
    body = {
        "model_id": run,
        "seq_id": seq,
        "forward_backward_input": {"data": data, "loss_fn": "cross_entropy"},
    }
    return wire.learn_of(body, forward_only=False)


def begun(service: Service) -> str:
    """A session with a run; gives the run's id."""
    session = service.create_session(WHO, {})
    body = {"base_model": NAME, "lora_config": {"rank": 3}}
    wait(service, service.accept(WHO, session, 0, "create", json.dumps(body).encode()))
    return f"{session}:train:0"


def step(service: Service, run: str, n: int) -> list[str]:
    """Two calls of forward_backward, and a step."""
    first = [service.accept(WHO, run, 3 * n + i, "learn", learn(run, 3 * n + i, 7 * n + i)) for i in (1, 2)]
    adam = json.dumps({"adam_params": {"learning_rate": 0.02}}).encode()
    return [*first, service.accept(WHO, run, 3 * n + 3, "step", adam)]


def wait(service: Service, call_id: str) -> Any:
    promise = service.promise(WHO, call_id)
    if promise is not None:
        promise.result(timeout=PATIENCE)
    call = service.result(WHO, call_id)
    assert call.failed is None, call.result
    return call.result


def weights(service: Service, run: str) -> tuple[Tensor, Tensor, Tensor]:
    learner = service._runs[run].ready()
    return learner.flat.clone(), learner.square.clone(), learner.gradient.clone()


@pytest.mark.parametrize("snapshot", [0.0, 1e9])
def test_a_service_that_ends_at_any_call_goes_on_with_the_same_bits(tmp_path: Path, snapshot: float) -> None:
    whole = service_in(tmp_path / "whole")
    run = begun(whole)
    for n in range(4):
        wait(whole, step(whole, run, n)[-1])
    wait(whole, whole.accept(WHO, run, 13, "learn", learn(run, 13, 99)))
    wanted = weights(whole, run)
    seed = json.loads(whole.registry.one("runs", run)["made"])["seed"]
    whole.close()

    service = service_in(tmp_path / "cut", snapshot=snapshot)
    session = service.create_session(WHO, {})
    body = {"base_model": NAME, "lora_config": {"rank": 3, "seed": seed}}
    calls = [service.accept(WHO, session, 0, "create", json.dumps(body).encode())]
    wait(service, calls[0])
    run = f"{session}:train:0"
    for n in range(4):
        calls += step(service, run, n)
        if n % 2:
            wait(service, calls[-1 - n // 2])  # some of it is done, some is not
        service.close()
        service = service_in(tmp_path / "cut", snapshot=snapshot)
    calls.append(service.accept(WHO, run, 13, "learn", learn(run, 13, 99)))
    for call in calls:  # every call that was accepted has its result, and asking again does nothing
        assert wait(service, call)
    assert service.accept(WHO, run, 12, "step", b"{}") == calls[12]
    for got, want in zip(weights(service, run), wanted, strict=True):
        assert torch.equal(got, want)
    left = sorted(path.name for path in (tmp_path / "cut" / "runs").rglob("snapshot-*"))
    assert left == ([] if snapshot else ["snapshot-12"])
    service.close()


def test_an_idle_session_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    service = service_in(tmp_path)
    run = begun(service)
    wait(service, step(service, run, 0)[-1])
    before = weights(service, run)
    service.finish_session(WHO, run.partition(":")[0])
    until(lambda: run not in service._runs, "the run's leaving")
    assert service.registry.one("runs", run)["snapshot"] == 3
    wait(service, service.accept(WHO, run, 4, "learn", learn(run, 4, 1)))
    assert torch.equal(weights(service, run)[0], before[0])
    service.close()


def test_checkpoints_are_whole_and_named(tmp_path: Path) -> None:
    service = service_in(tmp_path)
    run = begun(service)
    path = f"tinker://{run}/weights/one"
    for seq, body in ((1, {"path": "one"}), (2, {"path": "one", "overwrite": True})):
        call = service.accept(WHO, run, seq, "save", json.dumps(body).encode())
        assert json.loads(wait(service, call))["path"] == path
    for seq, body in ((3, {"path": "one"}), (4, {"path": "../x"}), (5, {"path": "two", "ttl_seconds": 5})):
        call = service.accept(WHO, run, seq, "save", json.dumps(body).encode())
        promise = service.promise(WHO, call)
        if promise is not None:
            promise.result(timeout=PATIENCE)
        assert service.result(WHO, call).failed == "user"
    row = service.registry.one("checkpoints", path)
    folder = service.checkpoints.folder(row)
    assert row["size"] == sum(file.stat().st_size for file in folder.iterdir())
    assert [p.name for p in folder.parent.iterdir()] == ["one"]
    with pytest.raises(GoneError):
        service.result(Tenant("other"), f"{run}:1")
    service.checkpoints.remove(row)
    assert not folder.exists()
    service.close()
    for wrong in ("", ".hidden", "a/b", "x" * 129, 3):
        with pytest.raises(UserError):
            check_checkpoint(wrong)


def test_weights_without_a_name_go_with_their_session(tmp_path: Path) -> None:
    service = service_in(tmp_path)
    run = begun(service)
    session = run.partition(":")[0]
    paths = []
    for seq, body in ((1, {"sampling_session_seq_id": 7}), (2, {"path": "kept"})):
        call = service.accept(WHO, run, seq, "publish", json.dumps(body).encode())
        paths.append(json.loads(wait(service, call))["path"])
    unnamed, kept = (service.registry.one("checkpoints", path) for path in paths)
    assert [folder.name for folder in service.checkpoints.published.iterdir()] == [f"{session}-train-0.kept"]
    assert kept["expires"] is None
    service.registry.change("checkpoints", unnamed["path"], expires=time.time() + 60)
    prompt = {"prompt": {"chunks": [{"tokens": [5]}]}, "sampling_params": {"max_tokens": 1}}
    assert wait(service, service.accept(WHO, f"{session}:sample:7", 0, "sample", json.dumps(prompt).encode()))
    assert service.registry.one("checkpoints", unnamed["path"])["expires"] > time.time() + 3600
    service.finish_session(WHO, session)
    assert [service.checkpoints.folder(row).exists() for row in (unnamed, kept)] == [False, True]
    with pytest.raises(GoneError):
        service.registry.one("checkpoints", unnamed["path"])
    service.close()


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of "test"
    file.write_text(f"# ours\ntml-one name=one runs=2 tokens=50\nsha256:{digest} name=two bytes=9\n")
    tenants = Tenants.read(file)
    assert tenants.find("tml-one") == Tenant("one", runs=2, tokens=50)
    assert tenants.find("test") == Tenant("two", bytes=9)
    assert tenants.find("tml-two") is tenants.find(None) is None
    one = tenants.named("one")
    assert tenants.spend(one, 40) == 0
    assert 0 < tenants.spend(one, 40) <= 60
    assert Tenants().find("anything") == Tenant()
    for wrong in ("tml-one", "tml-one name=a size=3", "tml-one name=a runs=x", "sha256:12 name=a", ""):
        file.write_text(wrong)
        with pytest.raises(LoricaError):
            Tenants.read(file)


def running(process: Path) -> bool:
    """Whether a process is there and no zombie, by its folder under /proc."""
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Server:
    """A server in a process of its own, always at one address; when it is gone, the next one begins."""

    def __init__(self, folder: Path) -> None:
        """Start it."""
        self.folder, self.port = folder, free_port()
        command = [
            sys.executable,
            str(Path(__file__).with_name("server.py")),
            str(self.folder),
            str(self.port),
        ]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen([*command, "0.2"], env=env, stderr=subprocess.DEVNULL)
        self.wait()

    def wait(self) -> None:
        """Wait until it answers."""
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/healthz"):
                    return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.1)

    def kill(self) -> None:
        """End it as the kernel does; its engines end by themselves."""
        pid = int((self.folder / "pid").read_text())
        children = Path(f"/proc/{pid}/task/{pid}/children")
        engines = [Path(f"/proc/{pid}") for pid in children.read_text().split()] if children.exists() else []
        assert not children.exists() or len(engines) == 2
        os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(running, engines)), "the end of the server's engines")

    def end(self) -> None:
        """The last kill."""
        self.process.kill()
        self.process.wait()
        self.kill()


@pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
def test_a_client_goes_on_over_a_kill(tmp_path: Path) -> None:
    import tinker

    types = tinker.types
    rows = [[(5 * n + i) % VOCABULARY for i in range(14)] for n in range(6)]
    with Client(llama(), name=NAME) as alone:
        own = alone.create(2, seed=1)
        wanted = []
        for tokens in rows:
            datum = Datum.of(tokens[:-1], target_tokens=tokens[1:])
            wanted.append(own.forward_backward([datum] * 3, "cross_entropy").result().loss)
            own.optim_step(learning_rate=1e-2)
        last = own.sample([4], max_tokens=8, seed=0).result().sequences[0]
    server = Server(tmp_path)
    client = tinker.ServiceClient(base_url=f"http://127.0.0.1:{server.port}", api_key="tml-any")
    run = client.create_lora_training_client(base_model=NAME, rank=2, seed=1).result()
    futures = []
    for n, tokens in enumerate(rows):
        inputs: Any = {"target_tokens": tokens[1:]}
        datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
        futures.append(run.forward_backward([datum] * 3, "cross_entropy"))
        step = run.optim_step(types.AdamParams(learning_rate=1e-2))
        if n == 3:  # with calls that wait, that run, and that are on their way
            server.kill()
            server.wait()
        if n % 2:
            step.result(timeout=PATIENCE)
    assert [future.result(timeout=PATIENCE).metrics["loss:sum"] for future in futures] == wanted
    path = run.save_weights_for_sampler("end").result(timeout=PATIENCE).path
    drawn = client.create_sampling_client(model_path=path).result()
    sample = drawn.sample(types.ModelInput.from_ints([4]), 1, types.SamplingParams(max_tokens=8, seed=0))
    sequence = sample.result().sequences[0]
    assert sequence.tokens == last.tokens
    torch.testing.assert_close(torch.tensor(sequence.logprobs), torch.tensor(last.logprobs), rtol=0, atol=0)
    client.close("success").result()
    server.end()

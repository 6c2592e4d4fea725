"""The official SDK, unmodified, over loopback: two tenants, files, futures, quotas, errors."""

from __future__ import annotations

import io
import json
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from service.causal_models import VOCABULARY, llama
from service.server import NAME, service_in
from torch import Tensor

import lorica
from lorica.service import Client, Datum
from lorica.service.http import serving
from lorica.service.state.tenants import Tenant, Tenants

tinker = pytest.importorskip("tinker", reason="the SDK is not installed: pip install 'lorica[service]'")
types = tinker.types

pytestmark = pytest.mark.filterwarnings(
    "ignore:DEPRECATED:FutureWarning", "ignore:Sparse CSR tensor support is in beta"
)

TENANTS = {
    "tml-first": Tenant("first"),
    "tml-second": Tenant("second"),
    "tml-small": Tenant("small", runs=1, tokens=100, bytes=200_000),
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("state")
    with serving(service_in(folder, Tenants.of(TENANTS))) as url:
        yield url
        for client in CLIENTS:
            client.close("success").result()
        CLIENTS.clear()


CLIENTS: list[Any] = []
"""Those that the tests made: each sends heartbeats until it is closed."""


def sessions(address: str, key: str) -> Any:
    client = tinker.ServiceClient(base_url=address, api_key=key)
    CLIENTS.append(client)
    return client


def rows(seed: int, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        n = int(torch.randint(1, 30, (), generator=random))
        tokens = torch.randint(0, VOCABULARY, (n + 1,), generator=random)
        found.append((tokens[:-1], tokens[1:], (torch.rand(n, generator=random) > 0.3).float()))
    return found


def theirs(data: list[tuple[Tensor, Tensor, Tensor]]) -> list[Any]:
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens.tolist()),
            loss_fn_inputs={"target_tokens": target, "weights": weights},
        )
        for tokens, target, weights in data
    ]


def ours(data: list[tuple[Tensor, Tensor, Tensor]]) -> list[Datum]:
    return [Datum.of(tokens, target_tokens=target, weights=weights) for tokens, target, weights in data]


def fetched(address: str, key: str, path: str, folder: Path) -> lorica.Adapter:
    """A checkpoint as a value, by the addresses of its files."""
    found = tinker.RestClient(base_url=address, api_key=key)
    folder.mkdir()
    urls = found.get_external_weights_urls(path).result().urls
    for name, url in urls.items():
        with urllib.request.urlopen(url) as answer:
            (folder / name).write_bytes(answer.read())
    return lorica.read(folder)


def flat(adapter: lorica.Adapter) -> Tensor:
    return torch.cat([t.flatten() for _, f in sorted(adapter.factors.items()) for t in (f.A, f.B)])


def test_two_tenants_get_what_each_gets_alone(address: str, tmp_path: Path) -> None:
    clients = {key: sessions(address, key) for key in ("tml-first", "tml-second")}
    params = types.SamplingParams(max_tokens=6, seed=5)
    runs, losses = {}, {key: [] for key in clients}
    for i, (key, client) in enumerate(clients.items()):
        runs[key] = client.create_lora_training_client(base_model=NAME, rank=4 + i, seed=i).result()
    for step in range(3):
        futures = []
        for i, (key, run) in enumerate(runs.items()):  # at once, then each after the other's
            futures.append((key, run.forward_backward(theirs(rows(10 * step + i, 3)), "cross_entropy")))
            run.optim_step(types.AdamParams(learning_rate=1e-2, weight_decay=0.1))
        for key, future in futures:
            losses[key].append(future.result().metrics["loss:sum"])
    for i, (key, run) in enumerate(runs.items()):
        path = run.save_weights_for_sampler("final").result().path
        served = fetched(address, key, run.save_weights_external("out").result().path, tmp_path / str(i))
        with Client(llama(), name=NAME) as alone:
            own = alone.create(4 + i, seed=i)
            for step in range(3):
                told = own.forward_backward(ours(rows(10 * step + i, 3)), "cross_entropy")
                own.optim_step(learning_rate=1e-2, weight_decay=0.1)
                assert told.result().loss == losses[key][step]
            assert torch.equal(flat(own.adapter().result()), flat(served))
            sampler = clients[key].create_sampling_client(model_path=path).result()
            prompt = types.ModelInput.from_ints([3, 4, 5])
            drawn = sampler.sample(
                prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2
            ).result()
            same = own.sample([3, 4, 5], max_tokens=6, seed=5, num_samples=2).result()
            assert [s.tokens for s in drawn.sequences] == [s.tokens for s in same.sequences]
            whole = torch.tensor([3, 4, 5, *drawn.sequences[0].tokens])
            pair = [(whole[:-1], whole[1:], torch.ones(len(whole) - 1))]
            seen = run.forward(theirs(pair), "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
            said = [*drawn.prompt_logprobs[1:], *drawn.sequences[0].logprobs]
            torch.testing.assert_close(seen.to_torch(), torch.tensor(said), atol=1e-5, rtol=0)
    base = clients["tml-first"].create_sampling_client(base_model=NAME).result()
    assert len(base.sample(types.ModelInput.from_ints([7]), 1, params).result().sequences[0].tokens) <= 6


def test_a_state_goes_on_with_the_same_bits(address: str, tmp_path: Path) -> None:
    client = sessions(address, "tml-first")
    run = client.create_lora_training_client(base_model=NAME, rank=4, seed=9).result()
    path = None
    for step in range(4):
        run.forward_backward(theirs(rows(step, 2)), "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=1e-2))
        if step == 1:
            path = run.save_state("middle", user_metadata={"step": "2"}).result().path
    again = client.create_training_client_from_state_with_optimizer(path).result()
    cold = client.create_training_client_from_state(path).result()
    for step in (2, 3):
        for each in (again, cold):
            each.forward_backward(theirs(rows(step, 2)), "cross_entropy")
            each.optim_step(types.AdamParams(learning_rate=1e-2))
    ends = []
    for i, each in enumerate((run, again, cold)):
        saved = each.save_weights_external("end").result().path
        ends.append(flat(fetched(address, "tml-first", saved, tmp_path / str(i))))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    rest = tinker.RestClient(base_url=address, api_key="tml-first")
    listed = rest.list_checkpoints(run.model_id).result().checkpoints
    assert {c.checkpoint_id for c in listed} == {"weights/middle", "external_weights/end"}
    assert {c.checkpoint_id: c.user_metadata for c in listed}["weights/middle"] == {"step": "2"}
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert len(rest.list_checkpoints(run.model_id).result().checkpoints) == 1
    with pytest.raises(tinker.RequestFailedError, match="there is no checkpoint"):
        client.create_training_client_from_state(path).result()


def test_losses_of_a_clients_own_and_sparse_targets(address: str) -> None:
    client = sessions(address, "tml-first")
    one, two = (client.create_lora_training_client(base_model=NAME, rank=2, seed=0).result() for _ in "ab")
    data = rows(3, 2)

    def own(given: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in given]
        return -sum((w * p).sum() for w, p in zip(weights, logprobs, strict=True)), {"mine": 1.0}  # type: ignore[return-value]

    mine = one.forward_backward_custom(theirs(data), own).result()
    usual = two.forward_backward(theirs(data), "cross_entropy").result()
    assert mine.metrics["mine"] == 1.0
    assert mine.metrics["loss:sum"] == pytest.approx(usual.metrics["loss:sum"], rel=1e-5)
    norms = [run.optim_step(types.AdamParams()).result().metrics for run in (one, two)]
    assert norms[0]["grad_norm:mean"] == pytest.approx(norms[1]["grad_norm:mean"], rel=1e-4)
    wide = torch.zeros(5, 20, dtype=torch.long)
    weights = torch.zeros(5, 20)
    wide[:, 0], weights[:, 0] = torch.arange(5) + 10, 0.5
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3, 4, 5]),
        loss_fn_inputs={"target_tokens": wide, "weights": weights},
    )
    assert datum.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    thin = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3, 4, 5]),
        loss_fn_inputs={"target_tokens": wide[:, 0].contiguous(), "weights": weights[:, 0].contiguous()},
    )
    sparse, dense = (two.forward([d], "cross_entropy").result().metrics["loss:sum"] for d in (datum, thin))
    assert sparse == pytest.approx(dense, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "inputs", "tokens", "says"),
    [
        ("gspo", {}, [1, 2], "'gspo' is not carried"),
        ("stable_reinforce", {}, [1, 2], "'stable_reinforce' is not carried"),
        ("ppo", {}, [1, 2], "needs loss_fn_inputs"),
        ("cross_entropy", {"target_tokens": [1]}, [1, 2], "target_tokens must be"),
        ("cross_entropy", {}, [1, VOCABULARY], f"token {VOCABULARY}"),
        ("cross_entropy", {}, [1] * 65, "65 tokens"),
    ],
)
def test_wrong_calls_fail_as_the_users(
    address: str, loss: str, inputs: dict[str, Any], tokens: list[int], says: str
) -> None:
    run = sessions(address, "tml-first").create_lora_training_client(base_model=NAME, rank=2).result()
    given = {"target_tokens": [0] * len(tokens), **inputs}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=given)
    with pytest.raises(tinker.RequestFailedError, match=says) as caught:
        run.forward_backward([datum], loss).result()
    assert str(caught.value.category) == "user"
    fine = run.forward_backward(theirs(rows(0, 1)), "cross_entropy").result()  # and the run goes on
    assert fine.metrics["num_sequences:sum"] == 1


def test_what_is_not_carried_is_named(address: str) -> None:
    client = sessions(address, "tml-first")
    for wrong, says in (({"rank": 0}, "rank"), ({"base_model": "other"}, "'other' is not served here")):
        with pytest.raises(tinker.RequestFailedError, match=says):
            client.create_lora_training_client(**{"base_model": NAME, "rank": 2, **wrong}).result()
    run = client.create_lora_training_client(base_model=NAME, rank=2).result()
    image = types.ImageChunk(data=b"abc", format="png", expected_tokens=3)
    picture = types.ModelInput(chunks=[image])
    with pytest.raises(tinker.RequestFailedError, match="holds image"):
        run.forward_backward(
            [types.Datum(model_input=picture, loss_fn_inputs={"target_tokens": [1, 2, 3]})], "cross_entropy"
        ).result()
    sampler = client.create_sampling_client(base_model=NAME).result()
    prompt = types.ModelInput.from_ints([1, 2])
    for params, says in (({"max_tokens": 900}, "do not fit"), ({"stop": ["\n"]}, "no tokenizer")):
        with pytest.raises(tinker.RequestFailedError, match=says):
            sampler.sample(prompt, 1, types.SamplingParams(**params)).result()


def test_tenants_see_their_own_and_have_their_share(address: str) -> None:
    first, small = sessions(address, "tml-first"), sessions(address, "tml-small")
    run = small.create_lora_training_client(base_model=NAME, rank=2).result()
    with pytest.raises(tinker.RequestFailedError, match="may train 1 adapters"):
        small.create_lora_training_client(base_model=NAME, rank=2).result()
    path = run.save_state("mine").result().path
    with pytest.raises(tinker.RequestFailedError, match="there is no checkpoint"):
        first.create_training_client_from_state(path).result()
    states = [run.save_state(f"more{i}") for i in range(9)]
    with pytest.raises(tinker.RequestFailedError, match="bytes"):
        states[-1].result()
    others = tinker.RestClient(base_url=address, api_key="tml-second")
    seen = others.list_training_runs(limit=99).result().training_runs
    assert run.model_id not in {each.training_run_id for each in seen}
    with pytest.raises(tinker.NotFoundError):
        others.get_training_run(run.model_id).result()
    with pytest.raises(tinker.AuthenticationError):
        tinker.ServiceClient(base_url=address, api_key="tml-nobody").create_sampling_client(
            base_model=NAME
        ).result()
    body = {"model_id": run.model_id, "seq_id": 99, "forward_backward_input": {"data": [], "loss_fn": "ppo"}}
    tokens = {"model_input": {"chunks": [{"tokens": [1] * 60}]}, "loss_fn_inputs": {}}
    codes = []
    for _ in range(3):
        body["forward_backward_input"] = {"data": [tokens], "loss_fn": "cross_entropy"}
        codes.append(post(address, "forward_backward", body, "tml-small")[0])
    assert codes == [200, 429, 429]
    assert post(address, "retrieve_future", {"request_id": f"{run.model_id}:99"}, "tml-second")[0] == 410


def post(address: str, path: str, body: dict[str, Any], key: str = "tml-first") -> tuple[int, bytes]:
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/api/v1/{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_numbers_make_calls_idempotent_and_ordered(address: str) -> None:
    """Retried and overtaken requests, as JSON."""
    session = json.loads(post(address, "create_session", {"tags": []})[1])["session_id"]
    made = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": NAME,
        "lora_config": {"rank": 2, "seed": 4},
    }
    ids = {json.loads(post(address, "create_model", made)[1])["request_id"] for _ in range(3)}
    assert len(ids) == 1
    assert post(address, "retrieve_future", {"request_id": ids.pop()})[0] == 200
    run = f"{session}:train:0"
    data = rows(1, 3)
    with Client(llama(), name=NAME) as alone:
        own = alone.create(2, seed=4)
        own.forward_backward(ours(data), "cross_entropy")
        wanted = own.optim_step(learning_rate=1e-2).result()["grad_norm"]
    step = {"model_id": run, "seq_id": 4, "adam_params": {"learning_rate": 1e-2}}
    last = json.loads(post(address, "optim_step", step)[1])["request_id"]  # before what it is to follow
    for seq in (2, 3, 1, 3):
        chunk = theirs(data)[seq - 1 : seq]
        given = {"data": [datum_as_json(d) for d in chunk], "loss_fn": "cross_entropy"}
        body = {"model_id": run, "seq_id": seq, "forward_backward_input": given}
        assert post(address, "forward_backward", body)[0] == 200
    told = json.loads(post(address, "retrieve_future", {"request_id": last})[1])
    assert told["metrics"]["grad_norm:mean"] == wanted
    assert post(address, "retrieve_future", {"request_id": "nothing:1"})[0] == 410
    post(address, "unload_model", {"model_id": run})
    time.sleep(0.1)
    late = json.loads(post(address, "optim_step", {**step, "seq_id": 6})[1])["request_id"]
    assert json.loads(post(address, "retrieve_future", {"request_id": late})[1])["category"] == "user"


def datum_as_json(datum: Any) -> dict[str, Any]:
    chunks = [{"type": "encoded_text", "tokens": list(datum.model_input.chunks[0].tokens)}]
    inputs = {
        name: {"data": value.data, "dtype": value.dtype, "shape": value.shape}
        for name, value in datum.loss_fn_inputs.items()
    }
    return {"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs}


def test_an_archive_holds_pefts_files(address: str) -> None:
    run = sessions(address, "tml-first").create_lora_training_client(base_model=NAME, rank=2).result()
    run.save_state("all").result()
    url = f"{address}/api/v1/training_runs/{run.model_id}/checkpoints/weights/all/archive"
    request = urllib.request.Request(url, headers={"X-API-Key": "tml-first"})
    with urllib.request.urlopen(request) as answer, tarfile.open(fileobj=io.BytesIO(answer.read())) as tar:
        assert set(tar.getnames()) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}

"""Every public method of the SDK's clients: `docs/guide/sdk.md` says what becomes of it, and it does."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
from service.causal_models import VOCABULARY, llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorica.service import Base, Service
from lorica.service.http import serving

tinker = pytest.importorskip("tinker", reason="the SDK is not installed: pip install 'lorica[service]'")
types = tinker.types

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED", "ignore:.*experimental", "ignore:.*will not be")

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "sdk.md"
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")


def listed() -> dict[str, str]:
    """The page's tables of methods: `Client.method` → what is said of it."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        client, _, text = section.partition("\n")
        for names, said in re.findall(r"^\| (`.*?) \| (.*?) \|$", text, flags=re.MULTILINE):
            if client in CLIENTS:
                found |= {f"{client}.{name}": said for name in re.findall(r"`(\w+)`", names)}
    return found


def test_the_page_has_every_method() -> None:
    public = {
        f"{client}.{name}"
        for client in CLIENTS
        for name in dir(getattr(tinker, client))
        if not name.startswith("_")
    }
    assert public - set(listed()) == set(), "methods of the SDK that the page lacks"
    assert set(listed()) - public == set(), "methods on the page that the SDK lacks"
    assert {re.split("[:;]", said)[0] for said in listed().values()} == {"carried", "client", "refused"}


class World:
    """A server, and one of each client."""

    def __init__(self, url: str) -> None:
        self.url, self.names = url, itertools.count()
        self.where = {"base_url": url, "api_key": "tml-any"}
        self.service = tinker.ServiceClient(**self.where, project_id="here")
        self.rest, self.admin = tinker.RestClient(**self.where), tinker.AdminClient(**self.where)

    @cached_property
    def training(self) -> Any:
        return self.service.create_lora_training_client(base_model="tiny", rank=2, seed=0).result()

    @cached_property
    def sampling(self) -> Any:
        return self.service.create_sampling_client(base_model="tiny").result()

    def name(self) -> str:
        return f"kept{next(self.names)}"

    def state(self) -> str:
        return self.training.save_state(self.name()).result().path

    @cached_property
    def path(self) -> str:
        return self.state()

    @property
    def session(self) -> str:
        return self.service.holder.get_session_id()

    def client_of(self, method: str) -> Any:
        client = {
            "ServiceClient": self.service,
            "TrainingClient": self.training,
            "SamplingClient": self.sampling,
        }
        return {**client, "RestClient": self.rest, "AdminClient": self.admin}[method.partition(".")[0]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(folder / "base")
    base = Base(llama(), "tiny", AutoTokenizer.from_pretrained(folder / "base"))
    with serving(Service(base, folder / "state")) as url:
        made = World(url)
        yield made
        made.service.close("success").result()


PROMPT = types.ModelInput.from_ints([1, 2, 3])
DATA = [
    types.Datum(model_input=PROMPT, loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]})
]


def negative(data: Any, logprobs: Any) -> Any:
    return -sum(each.sum() for each in logprobs), {}


def traced(logprobs: Any, weights: Any) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/traced:sum": loss}


DAYS = ("2026-07-13T00:00:00Z", "2026-07-14T00:00:00Z")

# What each method is called with; nothing, where it is not here.
GIVEN: dict[str, Callable[[World], tuple[Any, ...]]] = {
    "ServiceClient.create_lora_training_client": lambda w: ("tiny", 2),
    "ServiceClient.create_training_client_from_state": lambda w: (w.path,),
    "ServiceClient.create_training_client_from_state_with_optimizer": lambda w: (w.path,),
    "ServiceClient.create_sampling_client": lambda w: (w.path,),
    "ServiceClient.create_custom_loss": lambda w: (traced, {"logprobs": 1, "weights": 1}),
    "ServiceClient.copy_weights": lambda w: (w.path,),
    "TrainingClient.forward": lambda w: (DATA, "cross_entropy"),
    "TrainingClient.forward_backward": lambda w: (DATA, "cross_entropy"),
    "TrainingClient.forward_backward_custom": lambda w: (DATA, negative),
    "TrainingClient.optim_step": lambda w: (types.AdamParams(),),
    "TrainingClient.save_state": lambda w: (w.name(),),
    "TrainingClient.load_state": lambda w: (w.path,),
    "TrainingClient.load_state_with_optimizer": lambda w: (w.path,),
    "TrainingClient.save_weights_for_sampler": lambda w: (w.name(),),
    "TrainingClient.save_weights_external": lambda w: (w.name(),),
    "TrainingClient.create_sampling_client": lambda w: (w.path,),
    "SamplingClient.create": lambda w: (w.service.holder,),
    "SamplingClient.sample": lambda w: (PROMPT, 1, types.SamplingParams(max_tokens=1)),
    "SamplingClient.compute_logprobs": lambda w: (PROMPT,),
    "SamplingClient.on_queue_state_change": lambda w: (tinker.lib.api_future_impl.QueueState.ACTIVE, None),
    "RestClient.get_training_run": lambda w: (w.training.model_id,),
    "RestClient.get_training_run_by_tinker_path": lambda w: (w.path,),
    "RestClient.get_weights_info_by_tinker_path": lambda w: (w.path,),
    "RestClient.list_checkpoints": lambda w: (w.training.model_id,),
    "RestClient.get_external_weights_urls": lambda w: (
        w.training.save_weights_external(w.name()).result().path,
    ),
    "RestClient.delete_checkpoint": lambda w: (w.training.model_id, "/".join(w.state().split("/")[-2:])),
    "RestClient.delete_checkpoint_from_tinker_path": lambda w: (w.state(),),
    "RestClient.copy_weights": lambda w: (w.path, "there"),
    "RestClient.publish_checkpoint_from_tinker_path": lambda w: (w.path,),
    "RestClient.unpublish_checkpoint_from_tinker_path": lambda w: (w.path,),
    "RestClient.set_checkpoint_ttl_from_tinker_path": lambda w: (w.path, 7200),
    "RestClient.get_session": lambda w: (w.session,),
    "RestClient.assign_session_project": lambda w: (w.session, "there"),
    "RestClient.search_sessions": lambda w: (types.SessionSearchRequest(),),
    "RestClient.get_sampler": lambda w: (w.rest.get_session(w.session).result().sampler_ids[0],),
    "RestClient.export_session_trace": lambda w: (w.session,),
    "RestClient.get_billing_usage": lambda w: DAYS,
    "AdminClient.get_billing_usage": lambda w: DAYS,
}


def called(world: World, method: str) -> Any:
    """What a method gives, after all waiting."""
    name = method.partition(".")[2]
    client = world.client_of(method)
    if method == "ServiceClient.close":  # the others go on with theirs
        client = tinker.ServiceClient(**world.where)
    if method == "SamplingClient.from_sampler_handle":
        return client.from_sampler_handle(client.get_sampler_handle(), api_key="tml-any")
    found = getattr(client, name)
    if not callable(found):
        return found
    given = GIVEN.get(method.removesuffix("_async"), lambda _: ())(world)
    given = ("success",) if method == "ServiceClient.close" else given
    more = {"base_model": "tiny"} if method == "SamplingClient.create" else {}
    told: Any = found(*given, **more)
    if inspect.iscoroutine(told):
        return asyncio.run(awaited(told))
    return told.result() if hasattr(told, "result") else told


async def awaited(coroutine: Any) -> Any:
    told = await coroutine
    return await told if inspect.isawaitable(told) else told


@pytest.mark.parametrize("method", sorted(listed()))
def test_each_method(world: World, method: str) -> None:
    said = listed()[method]
    if said.startswith("refused"):
        with pytest.raises((tinker.TinkerError, RuntimeError), match=re.findall("`(.*?)`", said)[0]):
            called(world, method)
        return
    if method == "SamplingClient.get_tokenizer":  # here the name of the base is no folder
        with pytest.raises(OSError, match="offline mode"):
            called(world, method)
        return
    told = called(world, method)
    assert not isinstance(told, Future)
    if method.endswith("_async"):
        assert type(told) is type(called(world, method.removesuffix("_async")))


IMAGE = types.ModelInput(chunks=[types.ImageChunk(data=b"abc", format="png", expected_tokens=3)])
SAMPLE = (PROMPT, 1, types.SamplingParams(max_tokens=1))
REFUSED: dict[str, tuple[Callable[[World], Any], str]] = {
    "an image to learn": (
        lambda w: w.training.forward_backward(
            [types.Datum(model_input=IMAGE, loss_fn_inputs={"target_tokens": [1, 2, 3]})], "cross_entropy"
        ),
        "holds image",
    ),
    "an image to answer": (lambda w: w.sampling.sample(IMAGE, *SAMPLE[1:]), "holds image"),
    **{
        name: (lambda w, name=name: w.training.forward_backward(DATA, name), f"'{name}' is not carried")
        for name in ("gspo", "stable_reinforce", "custom")
    },
    "alternatives": (lambda w: w.sampling.sample(*SAMPLE, prompt_alt_tokens_k=2), "prompt_alt_tokens_k"),
    "targets": (
        lambda w: w.sampling.sample(
            *SAMPLE, target_prompt_logprobs=types.TensorData(data=[1, 2], dtype="int64", shape=[2, 1])
        ),
        "target_prompt_logprobs",
    ),
    "the last ones": (lambda w: w.sampling.compute_logprobs(PROMPT, 1), "prompt_logprobs_last_n"),
    "stability": (
        lambda w: (
            w.service.create_sampling_client(base_model="tiny", record_stability_info=True)
            .result()
            .sample(*SAMPLE)
        ),
        "record_stability_info",
    ),
    "inflight": (
        lambda w: w.training.save_weights_and_get_sampling_client(kind="inflight"),
        "kind='inflight'",
    ),
    "an optimizer": (
        lambda w: w.service.create_lora_training_client("tiny", 2, optimizer=types.DimuonOptimizerConfig()),
        "optimizer 'dimuon'",
    ),
    "an optimizer's step": (
        lambda w: w.training.optim_step(types.DimuonParams(learning_rate=0.1)),
        "dimuon",
    ),
    "encryption": (
        lambda w: w.training.save_weights_external("sealed", age_encryption_recipients=["age1"]),
        "age_encryption_recipients",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_are_not_carried_are_named(world: World, name: str) -> None:
    call, says = REFUSED[name]
    with pytest.raises(tinker.RequestFailedError, match=says) as caught:
        call(world).result()
    assert str(caught.value.category) == "user"
    assert world.training.forward(DATA, "cross_entropy").result().loss_fn_outputs  # and the run goes on


def test_a_traced_loss_runs_at_the_client_alone(world: World) -> None:
    client = tinker.ServiceClient(**world.where)
    run = client.create_lora_training_client("tiny", 2).result()
    handle = client.create_custom_loss(traced, {"logprobs": 1, "weights": 1}).result()
    assert handle.loss_id is None
    told = run.forward_backward_custom(DATA, handle).result().metrics
    usual = run.forward(DATA, "cross_entropy").result().metrics["loss:sum"]
    assert told["custom/traced:sum"] == pytest.approx(usual, rel=1e-5)
    client.close("success").result()


def test_a_client_that_would_have_the_server_do_it_is_told(world: World) -> None:
    client = tinker.ServiceClient(**world.where)
    client.holder._client_config = client.holder.get_client_config().model_copy(
        update={"custom_loss_server_side": True}
    )
    with pytest.raises(tinker.UnprocessableEntityError, match="custom losses on the server are not carried"):
        client.create_custom_loss(traced, {"logprobs": 1, "weights": 1}).result()
    client.close("success").result()


@pytest.mark.parametrize(
    ("path", "flag", "says"),
    [
        ("retrieve_futures", "sample_use_retrieve_futures", "one poll for all of a sampler's futures"),
        ("join_sampling_session", "sample_join_sampling_session", "numbered clones of a sampler"),
        ("create_custom_loss", "custom_loss_server_side", "custom losses on the server"),
        ("auth/token", "pjwt_auth_enabled", "tokens in exchange for keys"),
    ],
)
def test_what_the_sdk_is_told_not_to_ask(world: World, path: str, flag: str, says: str) -> None:
    assert getattr(world.service.holder.get_client_config(), flag) is False
    answer = httpx.post(f"{world.url}/api/v1/{path}", json={}, headers={"x-api-key": "tml-any"})
    assert answer.status_code == 422
    assert says in answer.json()["detail"]

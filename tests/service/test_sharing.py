"""What of the SDK's clients is carried beside training and sampling, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from service.server import NAME, service_in
from waiting import until

from lorica.service.http import serving
from lorica.service.state.tenants import Tenant, Tenants

tinker = pytest.importorskip("tinker", reason="the SDK is not installed: pip install 'lorica[service]'")
types = tinker.types

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED", "ignore:.*experimental")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tenants = Tenants.of({"tml-one": Tenant("one"), "tml-two": Tenant("two")})
    with serving(service_in(tmp_path_factory.mktemp("state"), tenants)) as url:
        yield url


@pytest.fixture(scope="module")
def one(address: str) -> Iterator[Any]:
    client = tinker.ServiceClient(base_url=address, api_key="tml-one", project_id="p1")
    yield client
    client.close("success").result()


def test_what_is_published_others_read_and_copy(address: str, one: Any) -> None:
    run = one.create_lora_training_client(base_model=NAME, rank=2, seed=0).result()
    path = run.save_weights_for_sampler("shared").result().path
    mine, others = (tinker.RestClient(base_url=address, api_key=key) for key in ("tml-one", "tml-two"))
    with pytest.raises(tinker.NotFoundError):
        others.get_weights_info_by_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError):
        others.publish_checkpoint_from_tinker_path(path).result()
    mine.publish_checkpoint_from_tinker_path(path).result()
    assert mine.list_checkpoints(run.model_id).result().checkpoints[0].public
    assert others.get_weights_info_by_tinker_path(path).result().lora_rank == 2
    copied = others.copy_weights(path, "archive", ttl_seconds=7200).result()
    mine.unpublish_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError):
        others.get_weights_info_by_tinker_path(path).result()
    mine.delete_checkpoint_from_tinker_path(path).result()
    (listed,) = others.list_user_checkpoints().result().checkpoints  # the copy outlives what it is of
    assert (listed.tinker_path, listed.public, listed.checkpoint_type) == (copied, False, "sampler")
    client = tinker.ServiceClient(base_url=address, api_key="tml-two")
    sampler, params = (
        client.create_sampling_client(model_path=copied).result(),
        types.SamplingParams(max_tokens=2),
    )
    drawn = sampler.sample(types.ModelInput.from_ints([5]), 1, params).result()
    assert drawn.sequences[0].tokens
    client.close("success").result()
    for wrong, says in ((path, "no checkpoint"), ("tinker://../../x/weights/y", "no checkpoint")):
        with pytest.raises(tinker.NotFoundError, match=says):
            others.copy_weights(wrong, "archive").result()


def test_sessions_are_searched_and_labelled(address: str, one: Any) -> None:
    rest, ids = tinker.RestClient(base_url=address, api_key="tml-one"), []
    for i in range(3):
        made = tinker.ServiceClient(
            base_url=address, api_key="tml-one", display_name=f"Nightly {i}", user_metadata={"i": str(i)}
        )
        ids.append(made.holder.get_session_id())
        made.close("success").result()
    rest.assign_session_project(ids[0], "p9").result()

    def found(**asked: Any) -> list[str]:
        request = types.SessionSearchRequest(**asked)
        return [each.session_id for each in rest.search_sessions(request).result().sessions]

    assert found(display_name="night") == ids[::-1]
    assert found(user_metadata={"i": "1"}) == [ids[1]]
    assert found(project_ids=["p9"]) == [ids[0]]
    page = rest.search_sessions(types.SessionSearchRequest(display_name="nightly", limit=2)).result()
    assert found(display_name="nightly", cursor=page.next_cursor) == [ids[0]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda rest: rest.export_session_trace("any"), "traces of sessions"),
        (lambda rest: rest.get_current_checkpoint_storage_usage(), "billing"),
        (lambda rest: rest.whoami(), "JWT"),
        (
            lambda rest: rest.copy_weights("tinker://x/weights/y", "p", weights_access_token="t"),
            "access_token",
        ),
    ],
)
def test_what_is_not_carried_is_named(address: str, call: Callable[[Any], Any], says: str) -> None:
    with pytest.raises((tinker.TinkerError, RuntimeError), match=says):
        call(tinker.RestClient(base_url=address, api_key="tml-one")).result()


def test_a_sample_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    service, who = service_in(tmp_path), Tenant()
    session = service.create_session(who, {})
    sampler = service.create_sampler(who, session, 0, None)
    body = b'{"prompt": {"chunks": [{"tokens": [5]}]}, "num_samples": 64, "sampling_params": {"stop": []}}'
    call = service.accept(who, sampler, 0, "sample", body)
    service.cancel(who, call)
    until(lambda: service.result(who, call).result is not None, "the sample's end")
    assert service.result(who, call).failed == "user"
    service.cancel(who, call)
    service.close()

"""Threads and tasks that choose among the adapters of one model: each has its own choice, or is refused."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import Toy, shake, tokens, transformer
from torch import Tensor

import lorica
from lorica import LoraConfig
from lorica.errors import StateError

NAMES = ("one", "two", "head")
PASSES = 40


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads take turns between any two steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def adapted() -> Any:
    torch.manual_seed(0)
    model = Toy()
    lorica.adapt(model, LoraConfig(r=2, target_modules=["up", "embed"]), "one")
    lorica.adapt(model, LoraConfig(r=3, target_modules=["up", "down"], use_dora=True), "two")
    lorica.adapt(model, LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]), "head")
    shake(model)
    lorica.active(model, "one")
    return model.eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model(tokens())


def choices(model: Any) -> dict[str, Callable[[], Any]]:
    """Ways to choose, each with what it gives when nobody else is there."""
    return {
        **{name: lambda name=name: lorica.active(model, name) for name in NAMES},
        "both": lambda: lorica.active(model, ["one", "two"]),
        "none": lambda: lorica.disabled(model),
        "mixed": lambda: lorica.mixed(model, ["one", None, "head"]),
    }


def expected(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, choose in choices(model).items():
        with choose():
            found[name] = run(model)
    return found


def in_threads(*tasks: Callable[[], object]) -> None:
    """Run functions at once in threads of their own; the first error is raised."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


def test_each_thread_computes_with_its_own_choice() -> None:
    model = adapted()
    want, made = expected(model), choices(model)
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(PASSES):
            with made[name]():
                if not torch.allclose(run(model), want[name], atol=1e-6):
                    wrong.append(name)

    def default() -> None:
        found = [torch.allclose(run(model), want["one"], atol=1e-6) for _ in range(PASSES)]
        wrong.extend("the model's own" for right in found if not right)

    in_threads(*(lambda name=name: work(name) for name in made), default)
    assert not wrong
    assert torch.equal(run(model), want["one"])
    assert not model.lorica_state.owners
    assert not model.lorica_state.inside


def test_a_plain_call_in_a_thread_holds_there() -> None:
    model = adapted()
    want = expected(model)
    both = threading.Barrier(2)

    def work(name: str) -> None:
        lorica.active(model, name)
        both.wait(20)
        for _ in range(PASSES):
            torch.testing.assert_close(run(model), want[name])

    in_threads(lambda: work("two"), lambda: work("head"))
    assert torch.equal(run(model), want["one"])


def test_each_task_computes_with_its_own_choice() -> None:
    model = adapted()
    want, made = expected(model), choices(model)

    async def work(name: str, *, block: bool) -> None:
        for _ in range(10):
            if block:
                with made[name]():
                    for _ in range(3):
                        await asyncio.sleep(0)
                        torch.testing.assert_close(run(model), want[name])
            else:
                made[name]()
                await asyncio.sleep(0)
                torch.testing.assert_close(run(model), want[name])

    async def default() -> None:
        for _ in range(40):
            await asyncio.sleep(0)
            torch.testing.assert_close(run(model), want["one"])

    async def blocks() -> None:
        await asyncio.gather(*(work(name, block=True) for name in made), default())

    async def plain() -> None:
        await asyncio.gather(*(work(name, block=False) for name in made))

    asyncio.run(blocks())
    assert torch.equal(run(model), want["one"])
    assert not model.lorica_state.owners
    asyncio.run(plain())


def test_those_that_chose_nothing_follow_the_model() -> None:
    model = adapted()
    want = expected(model)
    with ThreadPoolExecutor(2) as pool:
        for name in (*NAMES, "both"):
            with choices(model)[name]():
                assert torch.equal(pool.submit(run, model).result(), want[name])
        lorica.active(model, "two")
        assert torch.equal(pool.submit(run, model).result(), want["two"])


def test_a_context_is_taken_along() -> None:
    model = adapted()
    want = expected(model)

    def outer() -> None:
        with lorica.active(model, "two"), ThreadPoolExecutor(1) as pool:
            torch.testing.assert_close(
                pool.submit(contextvars.copy_context().run, run, model).result(), want["two"]
            )
            torch.testing.assert_close(pool.submit(run, model).result(), want["one"])

    in_threads(outer)


def test_blocks_within_blocks_and_errors_come_back() -> None:
    model = adapted()
    want = expected(model)

    def work() -> None:
        with lorica.active(model, "two"):
            try:
                with lorica.mixed(model, ["one", None, "head"]):
                    torch.testing.assert_close(run(model), want["mixed"])
                    raise ZeroDivisionError
            except ZeroDivisionError:
                torch.testing.assert_close(run(model), want["two"])
            with lorica.disabled(model):
                torch.testing.assert_close(run(model), want["none"])
            torch.testing.assert_close(run(model), want["two"])
        torch.testing.assert_close(run(model), want["one"])

    in_threads(work)


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"bias": "lora_only", "use_dora": True}]
)
def test_parameters_in_the_base_s_place_are_not_exchanged_under_others(fields: dict[str, Any]) -> None:
    model = adapted()
    lorica.adapt(model, LoraConfig(r=2, target_modules=["down"], **fields), "own")
    shake(model)
    lorica.active(model, "own")
    own = run(model)
    said: list[str] = []

    def elsewhere() -> None:
        with lorica.active(model, "own"):  # what stands there already
            torch.testing.assert_close(run(model), own)
        for choose in (lambda: lorica.active(model, "one"), lambda: lorica.disabled(model)):
            with pytest.raises(StateError, match="'own' stand in the base's place, one for all threads") as e:
                choose()
            said.append(str(e.value))
        torch.testing.assert_close(run(model), own)

    in_threads(elsewhere)
    assert len(said) == 2

    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with lorica.active(model, "own"):
            entered.set()
            leave.wait(20)
            torch.testing.assert_close(run(model), own)

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait(20)
    with pytest.raises(StateError, match="while another thread or task is inside"):
        lorica.active(model, "one")
    for change in (lorica.merge, lorica.detach, lambda model: lorica.switch(model, "one")):
        with pytest.raises(StateError, match="while another thread or task is inside"):
            change(model)
    torch.testing.assert_close(run(model), own)
    leave.set()
    thread.join()
    with lorica.active(model, "one"):
        assert not torch.allclose(run(model), own)
    assert torch.equal(run(model), own)


def test_a_choice_that_what_stands_there_belies_is_refused_when_it_is_used() -> None:
    model = adapted()
    lorica.adapt(model, LoraConfig(r=2, target_modules=["down"], bias="all"), "own")
    lorica.active(model, "one")
    chosen, changed, found = threading.Event(), threading.Event(), []

    def work() -> None:
        lorica.active(model, "two")
        chosen.set()
        changed.wait(20)
        with pytest.raises(StateError, match=r"parameters of 'own' now stand.*choose again"):
            run(model)
        lorica.active(model, "own")
        found.append(run(model))

    thread = threading.Thread(target=work)
    thread.start()
    chosen.wait(20)
    lorica.active(model, "own")
    changed.set()
    thread.join()
    assert torch.equal(found[0], run(model))


def test_a_merged_model_computes_the_same_in_every_thread() -> None:
    model = adapted()
    want = expected(model)["two"]
    ready, merged = threading.Event(), threading.Event()

    def work() -> None:
        lorica.active(model, "head")
        ready.set()
        merged.wait(20)
        torch.testing.assert_close(run(model), want, rtol=1e-4, atol=1e-5)
        with pytest.raises(StateError, match="while 'two' is merged"):
            lorica.active(model, "one")

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        ready.wait(20)
        lorica.merge(model, "two")
        merged.set()
        future.result()


def test_a_thread_trains_the_adapter_that_it_chose() -> None:
    model = adapted().train()

    def work(name: str) -> None:
        with lorica.active(model, name):
            model(tokens()).sum().backward()

    in_threads(lambda: work("two"))
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads
    assert all(".two" in name for name in grads)


def test_a_model_is_at_home_where_it_is_adapted() -> None:
    found: list[Any] = []

    def work() -> None:
        model = lorica.adapt(Toy(), LoraConfig(r=2, target_modules=["down"], bias="all"))
        shake(model)
        with lorica.disabled(model):
            base = run(model)
        assert not torch.allclose(run(model), base)
        found.append((model, base))

    in_threads(work)
    model, base = found[0]
    with lorica.disabled(model):  # that thread is over; this one takes its place
        assert torch.equal(run(model), base)


def test_copies_and_pickles_keep_the_choice_alone() -> None:
    model = adapted()
    want = expected(model)

    def work() -> None:
        with lorica.active(model, "two"):
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                torch.testing.assert_close(run(twin), want["two"])
                lorica.active(twin, "head")
                torch.testing.assert_close(run(twin), want["head"])
                torch.testing.assert_close(run(model), want["two"])

    in_threads(work)
    assert torch.equal(run(model), want["one"])


@torch.no_grad()
def test_experts_seen_by_two_threads_at_once() -> None:
    model = transformer("mixtral")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for name in ("one", "two"):
        lorica.adapt(model, LoraConfig(r=1, target_modules=[], target_parameters=targets), name)
    shake(model)
    ids, want = tokens(), {}
    for name in ("one", "two"):
        with lorica.active(model, name):
            want[name] = model(ids).logits

    @torch.no_grad()
    def work(name: str) -> None:
        for _ in range(8):
            with lorica.active(model, name):
                torch.testing.assert_close(model(ids).logits, want[name])

    in_threads(lambda: work("one"), lambda: work("two"))

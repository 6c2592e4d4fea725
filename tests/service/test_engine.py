"""What a run gets depends on its own calls alone: bits in company, chunks, order, files, samples."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from service.causal_models import VOCABULARY, gpt2, llama
from torch import Tensor, nn

import lorica
from lorica.errors import ConfigError
from lorica.service import Client, Datum
from lorica.service import client as client_module
from lorica.service.engine import lanes
from lorica.service.engine.several import memory
from lorica.service.engine.several.engines import usual
from lorica.service.engine.several.memory import can_fork
from lorica.service.errors import ServiceDown, UserError


def rows(seed: int, count: int, longest: int = 40) -> list[Datum]:
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        n = int(torch.randint(1, longest, (), generator=random))
        tokens = torch.randint(0, VOCABULARY, (n + 1,), generator=random)
        weights = (torch.rand(n, generator=random) > 0.3).float()
        found.append(Datum.of(tokens[:-1], target_tokens=tokens[1:], weights=weights))
    return found


def trained(
    model: nn.Module, who: list[int], tokens: int = 2048, engines: int = 1
) -> dict[int, tuple[list, Tensor, list]]:
    """Losses, final weights and samples of some of three tenants, who train and sample at once."""
    with Client(model, tokens=tokens, engines=engines) as client:
        runs = {i: client.create([4, 8, 2][i], seed=i, train_unembed=i != 2) for i in who}
        losses: dict[int, list] = {i: [] for i in who}
        samples: dict[int, list] = {i: [] for i in who}
        for step in range(3):
            for i, run in runs.items():
                losses[i].append(run.forward_backward(rows(10 * step + i, 3 + i), "cross_entropy"))
                if i == 1:  # gradients of several calls add up
                    losses[i].append(run.forward_backward(rows(50 + step, 2), "cross_entropy"))
                run.optim_step(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=5.0)
                samples[i].append(run.sample([3, 4, 5], max_tokens=6, num_samples=2, seed=step))
        return {
            i: (
                [future.result().loss for future in losses[i]],
                run._learner.flat if run.adapter().result() else torch.empty(0),
                [[(s.tokens, s.logprobs) for s in f.result().sequences] for f in samples[i]],
            )
            for i, run in runs.items()
        }


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("engines", [1, 2])
def test_company_changes_no_bit(build: Callable[[], nn.Module], engines: int) -> None:
    together = trained(build(), [0, 1, 2], tokens=100, engines=engines)  # passes that cut calls in two
    for i in (0, 1, 2):
        losses, weights, samples = trained(build(), [i])[i]
        assert together[i][0] == losses
        assert torch.equal(together[i][1], weights)
        assert together[i][2] == samples
    assert not torch.equal(together[0][1][:64], together[1][1][:64])


def test_without_addresses_to_share_engines_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    alone = trained(llama(), [0])[0]
    monkeypatch.setattr(memory, "arena", refuse)
    together = trained(llama(), [0, 1], engines=2)
    assert together[0][0] == alone[0]
    assert torch.equal(together[0][1], alone[1])
    assert together[0][2] == alone[2]


def test_runs_are_divided_among_engines_and_move_when_they_have_nothing_to_do() -> None:
    with Client(llama(), engines=2) as client:
        engines = client.engine._engines
        held = [threading.Event() for _ in range(3)]
        waits = [client.engine.call(f"{i}", event.wait) for i, event in enumerate(held)]
        where = dict(client.engine._places)
        assert sorted(where.values()) == [0, 0, 1]
        run, other = client.create(2, seed=0), client.create(2, seed=1)
        held[1].set()
        assert waits[1].result()
        # Where nobody waits: the engine that is free.
        assert run.forward_backward(rows(0, 1), "cross_entropy").result().loss > 0
        assert [engine.passes for engine in engines] == [0, 1]
        for event in held:
            event.set()
        assert all(waiting.result() for waiting in waits)
        while client.engine._runs != [0, 0]:
            time.sleep(0.001)
        assert other.forward_backward(rows(0, 1), "cross_entropy").result().loss > 0
        assert [engine.passes for engine in engines] == [1, 1]
    assert not client.engine._places
    assert client.engine._runs == client.engine._requests == [0, 0]


@pytest.mark.skipif(not can_fork(), reason="no engine has a process here")
@pytest.mark.parametrize("task", ["learns", "draws"])
def test_an_engine_whose_process_is_lost_is_told(task: str) -> None:
    with Client(llama(), engines=2) as client:
        lucky, lost = client.create(2, seed=0), client.create(2, seed=1)
        process = client.engine._engines[1]._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        if task == "learns":
            futures: list[Any] = [run.forward_backward(rows(0, 1), "cross_entropy") for run in (lucky, lost)]
        else:
            futures = [client.sample([1], max_tokens=3) for _ in range(2)]
        futures[0].result()
        with pytest.raises(ServiceDown, match="the engine"):
            futures[1].result()
        for ask in (lambda: lucky.optim_step(), lambda: client.sample([1])):
            with pytest.raises(ServiceDown, match="an engine has stopped"):
                ask()


def test_torchs_threads_are_divided_among_engines() -> None:
    torch.set_num_threads(2)
    try:
        with Client(llama(), engines=2) as client:
            assert torch.get_num_threads() == 1
            assert client.engine.call("run", torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        assert usual(client.base.device) == 2
    finally:
        torch.set_num_threads(1)
    with pytest.raises(ConfigError, match="at least 1 engine"):
        Client(llama(), engines=0)


class Sociable(nn.Module):
    """A norm through which the sequences of a batch see one another."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + 0.1 * x.mean(0))


def test_sequences_go_abreast_only_where_the_model_keeps_them_apart() -> None:
    model = llama()
    with Client(model) as client:
        assert client.base.abreast.most(1) == client.base.abreast.most(16) == 64
        assert client.base.abreast.filled(17) == 24
    vars(model)["_modules"]["model"].norm = Sociable(model.get_submodule("model.norm"))
    with Client(model) as client:
        assert client.base.abreast.most(16) == 1
        assert client.base.abreast.filled(17) == 17
        run = client.create(2, seed=0)
        alone = run.forward(rows(1, 1), "cross_entropy").result().logprobs[0]
        assert torch.equal(
            run.forward([*rows(1, 1), *rows(2, 3)], "cross_entropy").result().logprobs[0], alone
        )


def test_a_sequence_that_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(llama()) as client:
        good, bad = client.create(2, seed=0), client.create(2, seed=1)
        engine_base = client.engine._engines[0].base
        read = engine_base.read

        def choosy(tokens: Tensor, *args: Any, **more: Any) -> Any:
            if (tokens == 90).any():
                raise RuntimeError("not this token")
            return read(tokens, *args, **more)

        monkeypatch.setattr(engine_base, "read", choosy)
        data = [Datum.of([token] * 8, target_tokens=[1] * 8) for token in (5, 90)]
        futures = [
            run.forward_backward([d], "cross_entropy") for run, d in zip((good, bad), data, strict=True)
        ]
        drawn = [
            run.sample([token] * 8, max_tokens=3, temperature=0, stop=[])
            for run, token in ((good, 5), (bad, 90))
        ]
        assert futures[0].result().loss > 0
        assert len(drawn[0].result().sequences[0].tokens) == 3
        for future in (futures[1], drawn[1]):
            with pytest.raises(RuntimeError, match="not this token"):
                future.result()
        assert all(not g.any() for pair in bad.gradient().result().values() for g in pair)


def test_a_product_that_fails_ends_one_request_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    together = lanes.together

    def choosy(module: Any, parts: Any) -> Any:
        if any(part.x.shape[-2] == 5 for part in parts):
            raise RuntimeError("not these rows")
        return together(module, parts)

    prompts = [[token] * length for token, length in ((5, 3), (6, 5), (7, 4))]
    with Client(llama()) as client:
        alone = [client.sample(prompt, max_tokens=4, seed=1, stop=[]).result() for prompt in prompts]
        monkeypatch.setattr(lanes, "together", choosy)
        good, bad, other = [client.sample(prompt, max_tokens=4, seed=1, stop=[]) for prompt in prompts]
        with pytest.raises(RuntimeError, match="not these rows"):
            bad.result()
        for future, before in ((good, alone[0]), (other, alone[2])):
            assert future.result().sequences[0].tokens == before.sequences[0].tokens
        assert client.engine.alive


def test_what_python_gives_is_read_or_refused() -> None:
    prompts: tuple[Any, ...] = (torch.tensor([5, 6]), torch.tensor([5, 6]).numpy(), (5, 6))
    refused: tuple[tuple[Any, dict[str, Any]], ...] = (
        ([5.5, 6], {}),
        ("56", {}),
        ([5], {"max_tokens": 2.5}),
        ([5], {"temperature": "warm"}),
        ([5], {"seed": 0.5}),
    )
    with Client(llama()) as client:
        run = client.create(2, seed=0)
        plain = client.sample([5, 6], max_tokens=3, temperature=0, stop=7).result().sequences[0]
        for prompt in prompts:
            same = run.sample(prompt, max_tokens=3, temperature=0, stop=[7]).result().sequences[0]
            assert same.tokens == plain.tokens
        assert client_module._draw({"stop": "END"}).stop == ("END",)
        for prompt, settings in refused:
            with pytest.raises(UserError):
                client.sample(prompt, **settings)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="Datum"):
            run.forward_backward([[5, 6]], "cross_entropy")  # type: ignore[list-item]
    with pytest.raises(UserError, match="tokens"):
        Datum.of([5.5, 6], target_tokens=[6, 7])  # type: ignore[list-item]
    with pytest.raises(UserError, match="target_tokens"):
        Datum.of([5, 6], target_tokens=[6.5, 7])
    assert Datum.of([], target_tokens=[6.0]).inputs["target_tokens"].dtype == torch.long


def test_no_sample_is_drawn_from_nan() -> None:
    with Client(llama()) as client:
        run, other = client.create(2, seed=0), client.create(2, seed=1)
        run.forward_backward(rows(0, 2), "cross_entropy")
        run.optim_step(learning_rate=1e30).result()
        drawn = [each.sample([5, 6], max_tokens=2, stop=[]) for each in (run, other)]
        with pytest.raises(UserError, match="NaN or infinity"):
            drawn[0].result()
        assert len(drawn[1].result().sequences[0].tokens) == 2


def test_a_prompt_of_one_token_has_no_logprobs_of_its_own() -> None:
    with Client(llama()) as client:
        scored = client.sample([5], max_tokens=0, prompt_logprobs=True, topk_prompt=2).result()
        assert scored.prompt_logprobs is not None
        assert scored.prompt_logprobs.shape == (0,)
        assert scored.topk_prompt is not None
        assert [part.shape for part in scored.topk_prompt] == [(0, 2), (0, 2)]
        assert (
            len(client.sample([5], max_tokens=2, prompt_logprobs=True, stop=[]).result().sequences[0].tokens)
            == 2
        )


def test_seven_chunks_are_one() -> None:
    data = rows(0, 14)
    flat = []
    for size in (2, 14):
        with Client(llama()) as client:
            run = client.create(4, seed=0)
            losses = [run.forward_backward(data[i : i + size], "cross_entropy") for i in range(0, 14, size)]
            run.optim_step(learning_rate=1e-2)
            run.forward_backward(data[:1], "cross_entropy").result()
            flat.append((sum(f.result().loss for f in losses), run._learner.flat, run._learner.gradient))
    assert flat[0][0] == pytest.approx(flat[1][0], rel=1e-12)
    assert torch.equal(flat[0][1], flat[1][1])
    assert torch.equal(flat[0][2], flat[1][2])


def test_where_rows_do_not_stand_alone_products_are_taken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(lanes, "rows_stand_alone", lambda weight: len(asked.append(1) or []))
    together = trained(llama(), [0, 1])
    assert asked
    assert torch.equal(together[0][1], trained(llama(), [0])[0][1])


def test_optimizer_is_torchs_and_gradients_are_zero_after_a_step() -> None:
    with Client(llama()) as client:
        run = client.create(2, seed=0)
        before = run.adapter().result()
        plain = {path: [f.A.clone(), f.B.clone()] for path, f in before.factors.items()}
        parameters = [t.requires_grad_() for pair in plain.values() for t in pair]
        adam = torch.optim.AdamW(parameters, lr=0.03, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
        for step in range(3):
            if step != 1:  # a step without a gradient decays and coasts
                run.forward_backward(rows(step, 2), "cross_entropy")
            gradient = run.gradient().result()
            for path, (A, B) in plain.items():
                A.grad, B.grad = gradient[path]
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            told = run.optim_step(
                learning_rate=0.03, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2, grad_clip_norm=1.0
            ).result()
            assert told["grad_norm"] == pytest.approx(float(norm))
            for path, f in run.adapter().result().factors.items():
                torch.testing.assert_close(f.A, plain[path][0].detach())
                torch.testing.assert_close(f.B, plain[path][1].detach())
            assert all(not g.any() for pair in run.gradient().result().values() for g in pair)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_files_are_pefts_and_go_on_with_the_same_bits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with Client(llama(), name="tiny") as client:
        run = client.create(4, seed=0)
        for step in range(2):
            run.forward_backward(rows(step, 2), "cross_entropy")
            run.optim_step(learning_rate=1e-2)
        run.save(tmp_path / "full").result()
        again = client.load(tmp_path / "full")
        cold = client.load(tmp_path / "full", optimizer=False)
        for each in (run, again, cold):
            each.forward_backward(rows(5, 2), "cross_entropy")
            each.optim_step(learning_rate=1e-2)
        flat = [each._learner.flat for each in (run, again, cold) if each.adapter().result()]
        assert torch.equal(flat[0], flat[1])
        assert not torch.equal(flat[0], flat[2])
        run.save(tmp_path / "plain", optimizer=False).result()
        with pytest.raises(lorica.LoricaError, match="without its optimizer"):
            client.load(tmp_path / "plain")
        datum = rows(7, 1)[0]
        ours = run.forward([datum], "cross_entropy").result().logprobs[0]
    # peft asks a model for what transformers renamed.
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "plain")).eval()
    with torch.no_grad():
        logp = theirs(input_ids=datum.tokens[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(ours, logp.gather(1, datum.inputs["target_tokens"][:, None])[:, 0])


@pytest.mark.parametrize("build", [llama, gpt2])
def test_samples_have_the_logprobs_of_forward(build: Callable[[], nn.Module]) -> None:
    with Client(build()) as client:
        run = client.create(4, seed=0)
        for step in range(4):
            run.forward_backward(rows(step, 4), "cross_entropy")
            run.optim_step(learning_rate=2e-2)
        drawn = run.sample(
            [5, 6, 7], max_tokens=20, num_samples=3, seed=1, prompt_logprobs=True, topk=4, topk_prompt=2
        )
        drawn = drawn.result()
        for sample in drawn.sequences:
            tokens = torch.tensor([5, 6, 7, *sample.tokens])
            seen = run.forward([Datum.of(tokens[:-1], target_tokens=tokens[1:])], "cross_entropy")
            logp = seen.result().logprobs[0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), logp[2:], atol=1e-5, rtol=0)
            torch.testing.assert_close(drawn.prompt_logprobs, logp[:2], atol=1e-5, rtol=0)
            for token, value, (ids, values) in zip(sample.tokens, sample.logprobs, sample.top, strict=True):
                assert values == sorted(values, reverse=True)
                assert token not in ids or values[ids.index(token)] == value
        assert len({tuple(s.tokens) for s in drawn.sequences}) == 3
        assert drawn.topk_prompt is not None
        assert drawn.topk_prompt[0].shape == (2, 2)
        greedy = run.sample([5, 6], max_tokens=5, temperature=0, topk=1).result().sequences[0]
        assert [ids[0] for ids, _ in greedy.top] == greedy.tokens
        stop = run.sample([5, 6], max_tokens=5, temperature=0, stop=[greedy.tokens[2]]).result().sequences[0]
        assert stop.tokens == greedy.tokens[: greedy.tokens.index(greedy.tokens[2]) + 1]
        assert stop.stop_reason == "stop"
        base = client.sample([5, 6], max_tokens=0, prompt_logprobs=True).result()
        assert base.sequences[0].tokens == []
        for wrong in ({"max_tokens": 1000}, {"top_p": 0.0}, {"temperature": -1.0}, {"stop": ["text"]}):
            with pytest.raises(UserError):
                client.sample([5], **wrong)


def test_draws_follow_the_distribution() -> None:
    from lorica.service.engine.drawing import Draw, choose

    random = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0])
    for draw, kept in (
        (Draw(temperature=0.7), 4),
        (Draw(top_k=2), 2),
        (Draw(top_p=0.6), 1),
        (Draw(top_p=0.8), 2),
    ):
        counts = torch.bincount(
            torch.tensor(choose(logits.expand(4000, -1), [draw] * 4000, [random] * 4000)), minlength=4
        )
        want = torch.zeros(4)
        want[:kept] = (logits / draw.temperature)[:kept].softmax(0)
        assert (counts / 4000 - want).abs().max() < 0.03


def test_the_base_is_as_it_was_and_a_closed_client_says_so() -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Client(model) as client:
        run = client.create(2, seed=0)
        run.forward_backward(rows(0, 2), "cross_entropy")
        run.optim_step(learning_rate=0.1).result()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(ServiceDown):
        run.forward_backward(rows(0, 1), "cross_entropy")
    lorica.adapt(model, lorica.LoraConfig(target_modules="all-linear"))
    with pytest.raises(UserError, match="carries adapters"):
        Client(model)


def test_a_quantized_base_is_refused_by_name() -> None:
    kind: Any = pytest.importorskip("bitsandbytes", reason="pip install 'lorica[quantized]'").nn.Linear4bit
    model = llama()
    model.set_submodule("model.layers.0.mlp.up_proj", kind(64, 64, bias=False).to("cpu"))
    with pytest.raises(UserError, match=r"quantized \(model\.layers\.0\.mlp\.up_proj\)"):
        Client(model)


def test_layers_are_chosen_by_their_sort() -> None:
    with Client(llama()) as client:
        for off, gone in (("train_attn", "q_proj"), ("train_mlp", "up_proj"), ("train_unembed", "lm_head")):
            config = client.create(2, **{off: False}).adapter().result().lora
            assert isinstance(config.target_modules, list)
            assert gone not in config.target_modules
            assert config.lora_alpha == 32
        with pytest.raises(UserError, match="nothing to train"):
            client.create(2, train_attn=False, train_mlp=False, train_unembed=False)
        with pytest.raises(UserError, match="rank"):
            client.create(0)

"""Reinforcement learning through the service, with its official SDK: a reward that rises.

`lorica serve --train` serves a small decoder that is made here: it answers `first 3 7 =` and `last 3 7 =`
rightly, and `reply 3 7 =` with any digit. Policies then learn what `reply` means (the second digit, and no
more) from a reward alone, a function of texts in plain Python; all at once, each with a session of its own.
Before and after they are asked questions that none of them learns from.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorica.errors import require

DIGITS = [str(digit) for digit in range(10)]
WORDS = ["<pad>", ".", "=", "first", "last", "reply", *DIGITS]
LOSS, CLIP = "ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
STEPS, SEEDS, QUESTIONS, SAMPLES, PASSES, RANK, RATE = 40, 3, 16, 8, 2, 16, 3e-3
LAST = 5
"""Steps over which the reward at the end is taken: one step alone is noise."""
LOW, HIGH = 0.2, 0.8
PLOT = harness.RESULTS / "service_rl.png"


@dataclass(frozen=True)
class Learned:
    """One policy's way.

    Args:
        seed: of its adapter, its questions and its samples.
        rewards: mean over the samples of each step, drawn before it.
        before: share of the held-out questions that the base answers rightly, greedily.
        after: the same of the policy.
    """

    seed: int
    rewards: list[float]
    before: float
    after: float

    @property
    def end(self) -> float:
        """Mean reward of the last steps."""
        last = self.rewards[-LAST:]
        return sum(last) / len(last)


def main() -> None:
    """Learn with every seed, and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each policy (default {STEPS})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"one policy each (default {SEEDS})")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder, "base"))
        with serving(Path(folder)) as address, ThreadPoolExecutor(options.seeds) as pool:
            found = list(pool.map(lambda seed: learn(address, seed, options.steps), range(options.seeds)))
    seconds = time.monotonic() - begun
    for each in found:
        print(
            f"seed {each.seed}: reward {each.rewards[0]:.2f} to {each.end:.2f}; "
            f"held out {each.before:.0%} to {each.after:.0%}"
        )
    print(f"{seconds:.0f} s")
    if options.steps < STEPS or options.seeds < SEEDS:
        print(f"not written: a result takes {STEPS} steps and {SEEDS} seeds")
        return
    starts, ends = [each.rewards[0] for each in found], [each.end for each in found]
    if max(starts) > LOW or min(ends) < HIGH:
        sys.exit(f"the reward must rise from at most {LOW} to at least {HIGH}; it went {starts} to {ends}")
    plot(found)
    publish(found, seconds)


def make_base(folder: Path) -> None:
    """Train and save a decoder that knows the form of all questions, and the answers of two of the three."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token=".")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
    ends: dict[str, Any] = {
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **heads, **ends))
    steps = 800
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        operation, one, two, any_digit = (torch.randint(n, (128,)) for n in (3, 10, 10, 10))
        answer = torch.stack([one, two, any_digit]).gather(0, operation[None])[0]
        fixed = torch.ones_like(one)
        rows = torch.stack([3 + operation, 6 + one, 6 + two, 2 * fixed, 6 + answer, fixed], dim=1)
        logits = model(input_ids=rows[:, :-1]).logits[:, 3:]
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`lorica serve --train`, as a process of its own; gives its address."""
    words = ["serve", str(folder / "base"), "--port", "0", "--train", str(folder / "state")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "lorica", *words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        with process.stdout as told:
            found = re.search(r"http://\S+:\d+", told.readline())
            if found is None:
                sys.exit(f"the server did not start:\n{(folder / 'log').read_text()}")
            yield found[0]
    finally:
        process.terminate()
        process.wait()


def reward(question: str, answer: str) -> float:
    """1 for the second digit of the question and nothing else, or 0."""
    _, _, second, _ = question.split()
    return float(answer == f"{second} .")


def questions() -> tuple[list[str], list[str]]:
    """Those to learn from, and those held out."""
    every = [f"reply {one} {two} =" for one, two in itertools.product(DIGITS, DIGITS)]
    random.Random(0).shuffle(every)
    return every[20:], every[:20]


def learn(address: str, seed: int, steps: int) -> Learned:
    """Train a policy: sample groups of answers, judge them, weigh each by how much it beats its group."""
    tinker = require("tinker", extra="service")
    types, dice = tinker.types, random.Random(seed)
    asked_of, held_out = questions()
    with tinker.ServiceClient(base_url=address, api_key="tml-any") as client:
        made = client.create_lora_training_client("base", rank=RANK, seed=seed, train_unembed=False)
        policy = made.result()
        tokenizer = policy.get_tokenizer()

        def answers(sampler: Any, asked: Sequence[str], count: int, **settings: Any) -> list[Any]:
            params = types.SamplingParams(max_tokens=2, **settings)
            prompts = [types.ModelInput.from_ints(tokenizer.encode(question)) for question in asked]
            futures = [sampler.sample(prompt, count, params) for prompt in prompts]
            return [future.result().sequences for future in futures]

        def right(sampler: Any) -> float:
            drawn = answers(sampler, held_out, 1, temperature=0.0)
            said = [tokenizer.decode(group[0].tokens) for group in drawn]
            return sum(map(reward, held_out, said)) / len(held_out)

        before, rewards = right(client.create_sampling_client(base_model="base").result()), []
        for step in range(steps):
            sampler = policy.save_weights_and_get_sampling_client().result()
            asked = dice.sample(asked_of, QUESTIONS)
            groups = answers(sampler, asked, SAMPLES, seed=1000 * seed + step)
            data, got, calls = [], [], []
            for question, group in zip(asked, groups, strict=True):
                judged = [reward(question, tokenizer.decode(sample.tokens)) for sample in group]
                mean = sum(judged) / len(judged)
                got.append(mean)
                data += [
                    example(types, tokenizer.encode(question), sample, one - mean)
                    for sample, one in zip(group, judged, strict=True)
                    if one != mean
                ]
            rewards.append(sum(got) / len(got))
            for _ in range(PASSES if data else 0):  # after the first the policy is not the sampler's any more
                calls.append(policy.forward_backward(data, LOSS, CLIP))
                calls.append(policy.optim_step(types.AdamParams(learning_rate=RATE)))
            for call in calls:
                call.result()
        after = right(policy.save_weights_and_get_sampling_client().result())
    return Learned(seed, [round(each, 4) for each in rewards], before, after)


def example(types: Any, prompt: list[int], sample: Any, advantage: float) -> Any:
    """What a policy learns from one sample: of the prompt nothing, of each token of the answer alike."""
    tokens, unseen = [*prompt, *sample.tokens], [0.0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": tokens[1:],
        "logprobs": unseen + list(sample.logprobs),
        "advantages": unseen + [advantage] * len(sample.tokens),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def plot(found: Sequence[Learned]) -> None:
    """Draw the reward over steps."""
    figure = require("matplotlib.figure", extra="study").Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    for each in found:
        panel.plot(each.rewards, lw=1, label=f"seed {each.seed}")
    panel.set_xlabel("step")
    panel.set_ylabel("mean reward of the samples")
    panel.set_ylim(0, 1)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    temporary = PLOT.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(PLOT)


def publish(found: Sequence[Learned], seconds: float) -> None:
    """Write the result."""
    shown = [*range(0, STEPS, 5), STEPS - 1]
    rows = [
        [
            f"seed {each.seed}",
            *(f"{each.rewards[step]:.2f}" for step in shown),
            f"{each.before:.0%}",
            f"{each.after:.0%}",
        ]
        for each in found
    ]
    starts, ends = [each.rewards[0] for each in found], [each.end for each in found]
    after = [each.after for each in found]
    harness.publish(
        "service_rl",
        title="Reinforcement learning through the service",
        claim=(
            "The meaning of a word, learned from a reward alone by the official SDK against "
            f"`lorica serve --train`, {len(found)} policies at once in {seconds:.0f} s: mean reward "
            f"{min(starts):.2f} to {max(starts):.2f} at first, {min(ends):.2f} to {max(ends):.2f} over the "
            f"last {LAST} of {STEPS} steps. Of the questions that none learned from, the base answers "
            f"{found[0].before:.0%} rightly, the policies {min(after):.0%} to {max(after):.0%}. "
            f"![reward over steps](results/{PLOT.name})"
        ),
        tables=[
            {
                "caption": "Mean reward of a step's samples; right greedy answers to the questions held out",
                "columns": ["", *(f"step {step}" for step in shown), "held out, base", "held out, policy"],
                "rows": rows,
            }
        ],
        data={"seconds": round(seconds), "policies": [asdict(each) for each in found]},
        settings={
            "model": "Llama, 2 × 64, made on the spot",
            "r": RANK,
            "questions a step": QUESTIONS,
            "samples a question": SAMPLES,
            "loss": LOSS,
            "passes over the samples": PASSES,
            "learning rate": RATE,
        },
        device="cpu",
    )


if __name__ == "__main__":
    main()

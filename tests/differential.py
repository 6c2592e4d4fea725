"""A random life of adapters, lived with `peft` and with `lorica.peft`, and judged by dense weights.

    seed ──▶ model, configurations, verbs ──▶ peft ────────┐
                                     └──────▶ lorica.peft ──┼──▶ outputs, gradients, files, counts
                                                 dense ─────┘

What lorica computes must be what the dense weights compute, gradients too: in float32, or where that cannot
tell (it loses three digits in some of these models), in float64. As long as PEFT does so as well,
the two must agree in files and counts; from where it does not, lorica goes on by itself. A verb that either
library refuses ends the case.
"""

from __future__ import annotations

import copy
import random
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from dense import Dense
from lives import BASES, configuration
from torch import Tensor

import lorica.peft
from lorica.errors import LoricaError
from lorica.model.merging.merged import behind_merge

TOLERANCE = 2e-4
_BESIDE = re.compile(r"\.base_layer\.weight$|\.(modules_to_save|original_module)\..*bias$")


@dataclass
class Life:
    """What happened in one case.

    Args:
        verbs: each verb that ran, with its arguments.
        counted: verbs that ran, by name; refusals; and where PEFT left the definition.
        left: the story up to there.
    """

    seed: int
    verbs: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    left: str = ""


class Mismatch(AssertionError):
    """lorica and the judge, or lorica and PEFT, differ."""


class _Over(Exception):
    """A verb was refused, or PEFT left the definition: the two cannot go on side by side."""


class Pair:
    """The same model under both libraries, and what it must compute.

    Args:
        seed: fixes everything.
        peft: the peer's module.
    """

    def __init__(self, seed: int, peft: Any) -> None:
        self.draw = random.Random(seed)
        self.life = Life(seed)
        self.name = self.draw.choice(sorted(BASES))
        self.base = BASES[self.name]
        self.libraries = (peft, lorica.peft)
        self.models: list[Any] = []
        self.dense = Dense(self.base.make().requires_grad_(False))
        self.names: list[str] = []
        self.unlike: set[str] = set()
        """Adapters whose product alone is the same in both: combined by SVD, or of another form."""
        self.apart = False
        """Whether PEFT has left the definition, and lorica goes on by itself."""

    def run(self, verbs: int) -> Life:
        """Live; raises `Mismatch` with the whole story."""
        try:
            self.add()
            for _ in range(verbs):
                verb = self.draw.choice(VERBS)
                verb(self)
            self.unload()
        except _Over:
            pass
        except Exception as error:
            story = "\n".join(f"  {line}" for line in self.life.verbs)
            kind = "differs" if isinstance(error, Mismatch) else "raises"
            raise Mismatch(f"seed {self.life.seed}, {self.name}, {kind}: {error}\n{story}") from error
        return self.life

    # What can be done

    def add(self) -> None:
        """Put a new adapter on, and give it the same values in both."""
        if len(self.names) == 3:
            return
        name = "abc"[len(self.names)]
        # PEFT's files leave out an attention's in_proj_bias.
        first = not self.names
        biases = first and self.name not in ("attention", "plain", "encoder")
        given = configuration(self.draw, self.base, first=first, biases=biases)
        self.life.verbs.append(f"add {name}: {given}")

        def put(p: Any, model: Any) -> Any:
            config = p.LoraConfig(**given)
            if model is None:
                return p.get_peft_model(self.base.make(), config, adapter_name=name).eval()
            model.add_adapter(name, config)
            return model.eval()

        self.models = self.both("add", put)
        self.names.append(name)
        core = self.models[1].get_base_model()
        with lorica.active(core, name):
            self.dense.noticed(core, name)
        for model in self.models[self.apart :]:
            fill(model, name, biases="bias" in given)
        self.check()
        self.compare_files(name)

    def activate(self) -> None:
        """Let others act."""
        names = self.draw.sample(self.names, self.draw.randint(1, len(self.names)))
        self.do("activate", lambda p, m: m.base_model.set_adapter(names), names)
        self.check()

    def disable(self) -> None:
        """Let none act, for a while."""
        contexts = [model.disable_adapter() for model in self.models[self.apart :]]
        self.life.verbs.append("disable")
        for context in contexts:
            context.__enter__()
        try:
            self.check()
        finally:
            for context in contexts:
                context.__exit__(None, None, None)
        self.check()

    def merge(self) -> None:
        """Merge what acts, look, and take it back."""
        self.do("merge", lambda p, m: m.merge_adapter(safe_merge=True))
        self.check(gradients=False)
        self.do("unmerge", lambda p, m: m.unmerge_adapter())
        self.check()

    def exchange(self) -> None:
        """Save with each, load with the other."""
        name = self.draw.choice(self.names)
        self.do("alone", lambda p, m: m.base_model.set_adapter([name]), name)
        outputs = self.check(gradients=False)
        with tempfile.TemporaryDirectory() as top:
            folders = [Path(top, side) / name for side in ("peft", "lorica")]
            self.life.verbs.append(f"exchange {name}")
            for model, folder in [*zip(self.models, folders, strict=True)][self.apart :]:
                model.save_pretrained(folder.parent, selected_adapters=[name])
            peft, lorica = self.libraries
            self.close("what it wrote itself", self.loaded(lorica, folders[1]), outputs)
            if not self.apart:
                self.close("what PEFT wrote", self.loaded(lorica, folders[0]), outputs)
                theirs = [self.loaded(peft, folder) for folder in folders]
                # PEFT cannot read what it writes of biases in layers that another adapter has wrapped too.
                if not near(theirs[1], outputs):
                    self.close("what PEFT reads of lorica's", theirs[1], theirs[0])
        self.life.counted["exchanged"] += 1

    def loaded(self, library: Any, folder: Path) -> Tensor:
        """What a fresh model computes with the adapter in a folder."""
        return self.output(
            self.only(library, lambda p: p.PeftModel.from_pretrained(self.base.make(), folder))
        )

    def reload(self) -> None:
        """Save one and load it again beside itself."""
        if len(self.names) == 3:
            return
        source, name = self.draw.choice(self.names), "abc"[len(self.names)]

        def put(p: Any, model: Any) -> None:
            with tempfile.TemporaryDirectory() as top:
                model.save_pretrained(top, selected_adapters=[source])
                model.load_adapter(str(Path(top, source)), name)
            model.eval()

        self.do("reload", put, source, name)
        self.names.append(name)
        self.unlike.add(name)
        self.check()
        self.do("activate", lambda p, m: m.base_model.set_adapter([name]), [name])
        self.check()

    def combine(self) -> None:
        """A weighted combination of two."""
        if not 2 <= len(self.names) < 3:
            return
        kind, new = self.draw.choice(["linear", "cat", "svd"]), "abc"[len(self.names)]
        weights = [self.draw.choice([0.5, 1.0, 2.0, -1.0]) for _ in self.names]

        def put(p: Any, model: Any) -> None:
            model.add_weighted_adapter(self.names, weights, new, combination_type=kind)

        self.do("combine", put, kind, weights)
        self.names.append(new)
        self.unlike.add(new)
        self.do("activate", lambda p, m: m.base_model.set_adapter([new]), [new])
        self.check()

    def delete(self) -> None:
        """Take one off."""
        if len(self.names) < 2:
            return
        name = self.names[-1]
        self.do("delete", lambda p, m: m.delete_adapter(name), name)
        self.names.remove(name)
        self.dense.rests = {key: rest for key, rest in self.dense.rests.items() if key[0] != name}
        self.do("activate", lambda p, m: m.base_model.set_adapter([self.names[0]]), self.names[0])
        self.check()

    def count(self) -> None:
        """Compare what trains, and how much."""
        self.do("activate", lambda p, m: m.base_model.set_adapter([self.names[0]]), self.names[0])
        if self.apart or self.unlike & {
            *self.names
        }:  # a start that was reloaded has twice the rank in lorica
            return
        counts = [model.get_nb_trainable_parameters() for model in self.models]
        # Where one adapter trains all biases, PEFT trains those of the others' copies too.
        idle = re.compile(rf"\.modules_to_save\.(?!{self.names[0]}\.).*\bbias$")
        named = self.models[0].named_parameters()
        too_many = sum(p.numel() for key, p in named if p.requires_grad and idle.search(key))
        if (counts[0][0] - too_many, counts[0][1]) != counts[1]:
            raise Mismatch(f"(trained, all) parameters: PEFT {counts[0]}, lorica {counts[1]}")

    def unload(self) -> None:
        """Merge for good; what is left is the base's own class and keys."""
        outputs = self.check(gradients=False)
        bases = self.both("merge_and_unload", lambda p, m: m.merge_and_unload())
        self.life.verbs.append("merge_and_unload")
        self.close("merged for good", first(bases[1](**self.base.inputs)), outputs)
        if [*bases[1].state_dict()] != [*self.base.make().state_dict()]:
            raise Mismatch("keys after merge_and_unload")
        self.life.counted["unloaded"] += 1

    # How both are compared

    def do(self, verb: str, act: Callable[[Any, Any], Any], *told: Any) -> None:
        self.life.verbs.append(" ".join([verb, *map(str, told)]))
        self.both(verb, act)

    def both(self, verb: str, act: Callable[[Any, Any], Any]) -> list[Any]:
        """Do something under each; a refusal ends the case."""
        results = []
        for i, library in enumerate(self.libraries):
            if i == 0 and self.apart:
                results.append(self.models[0])
                continue
            model = self.models[i] if self.models else None
            results.append(self.only(library, lambda p, model=model: act(p, model), verb))
        self.life.counted[verb] += 1
        return results

    def only(self, library: Any, act: Callable[[Any], Any], verb: str = "load") -> Any:
        try:
            return act(library)
        except LoricaError as error:
            self.life.counted[f"lorica refuses: {verb}: {str(error)[:160]!r}"] += 1
            self.life.left = f"seed {self.life.seed}, {self.name}: " + " / ".join(self.life.verbs)
            raise _Over from None
        except Exception as error:
            if library is lorica.peft:
                raise
            self.life.counted[f"PEFT fails: {verb}: {type(error).__name__}: {str(error)[:100]}"] += 1
            raise _Over from None

    def acting(self) -> Sequence[str]:
        state = self.models[1].base_model.adapter_state
        return state.merged or state.active

    def output(self, model: Any) -> Tensor:
        return first(model(**self.base.inputs))

    def expected(self) -> Tensor:
        core = self.models[1].get_base_model()
        names = self.acting()
        with behind_merge(core):
            return first(self.dense(core, names=names, **self.base.inputs))

    def check(self, *, gradients: bool = True) -> Tensor:
        """Outputs and gradients of lorica against the judge, and PEFT's, as long as it agrees with that."""
        ours, want = self.output(self.models[1]), self.expected()
        self.close("outputs against dense weights", ours, want)
        with torch.no_grad():
            self.close("outputs without gradients", self.output(self.models[1]), want)
        due = of_adapters(self.models[1], want) if gradients and want.requires_grad else {}
        if due:
            found = of_adapters(self.models[1], ours)
            if not all(near(found[name], gradient) for name, gradient in due.items()):
                self.life.counted["gradients that float32 cannot tell: in float64"] += 1
                found, due = self.in_double()
            for name, gradient in due.items():
                self.close(f"gradient of {name}", found[name], gradient)
        self.life.counted["checked"] += 1
        self.life.counted["gradients"] += len(due)
        if not self.apart and not self.agrees(want, due):
            self.life.counted[f"PEFT leaves the definition: {self.life.verbs[-1].split(':')[0]}"] += 1
            self.life.left = f"seed {self.life.seed}, {self.name}: " + " / ".join(self.life.verbs)
            self.apart = True
        self.life.counted["compared"] += not self.apart
        return want

    def in_double(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradients of lorica and those of the judge in float64, where what differs is no rounding."""
        model, judge = copy.deepcopy(self.models[1]).double(), copy.deepcopy(self.dense)
        judge.base.double()
        judge.rests = {key: rest.double() for key, rest in judge.rests.items()}
        core, names = model.get_base_model(), self.acting()
        with behind_merge(core):
            want = first(judge(core, names=names, **self.base.inputs))
        return of_adapters(model, self.output(model)), of_adapters(model, want)

    def agrees(self, want: Tensor, due: dict[str, Tensor]) -> bool:
        """Whether PEFT computes what the judge does, and its gradients."""
        try:
            theirs = self.output(self.models[0])
        except Exception as error:
            self.life.counted[f"PEFT fails: forward: {type(error).__name__}"] += 1
            return False
        found = of_adapters(self.models[0], theirs) if due and theirs.requires_grad else {}
        alike = [name for name in due.keys() & found.keys() if not self.unlike & {*name.split(".")}]
        self.life.counted["gradients of both"] += len(alike)
        return near(theirs, want) and all(near(found[n].flatten(), due[n].flatten()) for n in alike)

    def compare_files(self, name: str) -> None:
        """Keys and values of what each writes; another form is allowed where a start was taken out of W0."""
        if self.apart or self.models[1].peft_config[name].init_lora_weights in ("pissa", "olora"):
            return
        states: list[dict[str, Tensor]] = []
        with tempfile.TemporaryDirectory() as top:
            for side, model in zip(("peft", "lorica"), self.models, strict=True):
                model.save_pretrained(Path(top, side), selected_adapters=[name])
                (file,) = Path(top, side).rglob("*.safetensors")
                tensors = safetensors.torch.load_file(file)
                # PEFT writes an adapted embedding's own table too, which is the base's.
                # Of a module trained whole it counts both biases, the copy's too, as the base's.
                states.append({k: t for k, t in tensors.items() if not _BESIDE.search(k)})
        self.life.counted["files"] += 1
        if states[0].keys() != states[1].keys():
            raise Mismatch(f"keys of the files of {name}: {sorted(states[0].keys() ^ states[1].keys())[:6]}")
        for key, value in states[0].items():
            self.close(f"{key} in the file", states[1][key], value)

    def close(self, what: str, got: Tensor, want: Tensor) -> None:
        if got.shape != want.shape or not near(got, want):
            worst = (got - want).abs().max().item() if got.shape == want.shape else "another shape"
            raise Mismatch(f"{what}: off by {worst}, of {want.abs().max().item():.3g}")


VERBS = [
    Pair.add,
    Pair.activate,
    Pair.activate,
    Pair.disable,
    Pair.merge,
    Pair.exchange,
    Pair.reload,
    Pair.combine,
    Pair.delete,
    Pair.count,
]


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= TOLERANCE * (1 + want.abs().max()))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"]


@torch.no_grad()
def fill(model: Any, name: str, *, biases: bool) -> None:
    """Give what one adapter trains values that follow from its keys, so that both libraries have the same."""
    for key, parameter in model.named_parameters():
        own = name in key.split(".")
        bias = biases and parameter.requires_grad and "bias" in key.rpartition(".")[2] and "lora_" not in key
        if own or bias:
            seed = zlib.crc32(key.replace(".base_layer", "").encode())
            values = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(values if not bias or own else parameter + values)


def of_adapters(model: Any, y: Tensor) -> dict[str, Tensor]:
    """Gradients of everything in adapters that trains, by name."""
    named = {
        key: p
        for key, p in model.named_parameters()
        if p.requires_grad and ("lora_" in key or "modules_to_save" in key)
    }
    loss = (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum()
    found = torch.autograd.grad(loss, [*named.values()], allow_unused=True, materialize_grads=True)
    return {key.replace(".base_layer", ""): g for key, g in zip(named, found, strict=True)}


def told(lives: Sequence[Life]) -> str:
    """How often what was done, refused and found in PEFT."""
    total: Counter[str] = Counter()
    for life in lives:
        total.update(life.counted)
    return "\n".join(f"{count:6d}  {what}" for what, count in total.most_common())

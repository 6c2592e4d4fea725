"""Second derivatives and tangents of every layer, against autograd and `torch.func` on a dense weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import KINDS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import lorica
from lorica.errors import StateError
from lorica.functional import dropout, lora_linear
from lorica.layers import LoraLayer
from lorica.layers.quantized.product import packed_linear
from lorica.tune.population.joint_layers import Segment, joint_linear

D_IN, D_OUT, R = 4, 3, 2
Function = Callable[..., Tensor]
OPERANDS = ("x", "weight", "bias", "A", "B")


def operands(trained: Sequence[str], tokens: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, W, b, A and B."""
    shapes = ((tokens, D_IN), (D_OUT, D_IN), (D_OUT,), (R, D_IN), (D_OUT, R))
    x, W, b, A, B = (
        torch.randn(shape, dtype=torch.float64, requires_grad=name in trained)
        for name, shape in zip(OPERANDS, shapes, strict=True)
    )
    return x, W, b, A, B


def penalty(y: Tensor, asked: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Gradients of a loss and of the size of its gradients: what a gradient penalty trains by."""
    loss = (y.sin() * torch.arange(1, y.numel() + 1).view(y.shape) / y.numel()).sum() + y.square().mean()
    first = torch.autograd.grad(loss, asked, create_graph=True, materialize_grads=True, allow_unused=True)
    again = sum(g.square().sum() for g in first) + loss
    assert isinstance(again, Tensor)
    return (
        *first,
        *torch.autograd.grad(again, asked, materialize_grads=True, allow_unused=True, **options),
    )


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def plain_packed(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float, p: float) -> Tensor:
    W = W.detach()
    return packed_linear(x, lambda x: (x @ W.t()).add_(b.detach()), lambda: W, b, A, B, scale, p)


def joint(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float, p: float) -> Tensor:
    assert p == 0
    parts = [Segment(x, A, B, scale), Segment(2 * x), Segment(x.sin(), A.cos(), B, scale)]
    return torch.cat(joint_linear(parts, W.detach(), b.detach()))


def joint_expected(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    W, b = W.detach(), b.detach()
    first = oracle.lora_linear(x, W, b, A, B, scale)
    return torch.cat([first, 2 * x @ W.t() + b, oracle.lora_linear(x.sin(), W, b, A.cos(), B, scale)])


class TestArithmetic:
    @given(
        trained=st.sets(st.sampled_from(OPERANDS), min_size=1),
        tokens=st.integers(0, 5),
        dropped=st.booleans(),
    )
    def test_lora_linear(self, trained: set[str], tokens: int, dropped: bool) -> None:
        torch.manual_seed(0)
        given = operands([*trained], tokens)
        asked = [t for t in given if t.requires_grad]
        torch.manual_seed(1)
        y = lora_linear(*given, 0.7, 0.4 if dropped else 0.0)
        torch.manual_seed(1)
        keep = dropout(torch.ones_like(given[0]), 0.4) if dropped else None
        close(penalty(y, asked), penalty(oracle.lora_linear(*given, 0.7, keep), asked))

    @given(
        trained=st.sets(st.sampled_from(("x", "bias", "A", "B")), min_size=1),
        dropped=st.booleans(),
    )
    def test_packed_linear(self, trained: set[str], dropped: bool) -> None:
        torch.manual_seed(0)
        given = operands([*trained])
        asked = [t for t in given if t.requires_grad]
        torch.manual_seed(1)
        y = plain_packed(*given, 0.7, 0.4 if dropped else 0.0)
        torch.manual_seed(1)
        keep = dropout(torch.ones_like(given[0]), 0.4) if dropped else None
        close(penalty(y, asked), penalty(oracle.lora_linear(*given, 0.7, keep), asked))

    @given(trained=st.sets(st.sampled_from(("x", "A", "B")), min_size=1))
    def test_joint_linear(self, trained: set[str]) -> None:
        torch.manual_seed(0)
        given = operands([*trained])
        asked = [t for t in given if t.requires_grad]
        close(penalty(joint(*given, 0.7, 0.0), asked), penalty(joint_expected(*given, 0.7), asked))

    @pytest.mark.parametrize("function", [lora_linear, plain_packed, joint])
    def test_by_differences(self, function: Any) -> None:
        given = operands(["x", "A", "B"])
        assert torch.autograd.gradgradcheck(
            lambda x, A, B: function(x, *given[1:3], A, B, 0.7, 0.0),
            (
                given[0],
                *given[3:],
            ),
        )

    @pytest.mark.parametrize("trained", [["B"], ["x", "B"], ["x", "A", "B"]])
    def test_a_third_derivative(self, trained: list[str]) -> None:
        given = operands(trained)
        asked = [t for t in given if t.requires_grad]

        def thrice(y: Tensor) -> tuple[Tensor, ...]:
            value = y.pow(4).sum()
            for _ in range(2):
                found = torch.autograd.grad(value, asked, create_graph=True)
                value = sum((g.square().sum() for g in found), start=torch.zeros(()))
            return torch.autograd.grad(value, asked)

        close(thrice(lora_linear(*given, 0.7)), thrice(oracle.lora_linear(*given, 0.7)))

    def test_gradients_by_batches(self) -> None:
        given = operands(["x", "A", "B"])
        asked = [given[0], *given[3:]]
        along = torch.randn(4, 5, D_OUT, dtype=torch.float64)
        got, want = (
            torch.autograd.grad(f(*given, 0.7), asked, along, is_grads_batched=True)
            for f in (lora_linear, oracle.lora_linear)
        )
        close(got, want)

    def test_what_a_frozen_A_keeps(self) -> None:
        kept: list[Tensor] = []
        given = operands(["x", "B"])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            lora_linear(*given, 0.7)
        assert not any(t.data_ptr() == given[0].data_ptr() for t in kept)

    def test_under_autocast(self) -> None:
        x, W, b, A, B = (
            t.detach().float().requires_grad_(t.requires_grad) for t in operands(["x", "A", "B"])
        )
        asked = [x, A, B]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = penalty(lora_linear(x, W, b, A, B, 0.7), asked)
        want = penalty(oracle.lora_linear(x, W, b, A, B, 0.7), asked)
        for one, other in zip(got, want, strict=True):
            assert (one - other).norm() < 0.1 * other.norm()

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_tangents(self, grad: bool) -> None:
        given = operands(["A", "B"])
        tangents = [torch.randn_like(t) for t in given]
        found = []
        for function in (lora_linear, oracle.lora_linear):
            with torch.set_grad_enabled(grad), forward_ad.dual_level():
                x, W, b, A, B = map(forward_ad.make_dual, given, tangents)
                found.append(tuple(forward_ad.unpack_dual(function(x, W, b, A, B, 0.7))))
        assert found[0][1] is not None
        close(*found)

    def test_tangents_of_a_packed_product_are_refused(self) -> None:
        given = operands(["A", "B"])
        with forward_ad.dual_level(), pytest.raises(StateError, match="forward-mode derivatives"):
            plain_packed(forward_ad.make_dual(given[0], given[0]), *given[1:], 0.7, 0.0)


MAKES = {"lora": {}, "dora": {"use_dora": True}}


def adapted(case: str, **settings: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model with an adapter that is not zero, the base, and an input."""
    kind = KINDS[case]
    torch.manual_seed(2)
    base = kind.make().double().eval()
    model = copy.deepcopy(base)
    config = lorica.LoraConfig(r=2, target_modules=[*kind.targets], init_lora_weights=False, **settings)
    return lorica.adapt(model, config, seed=0), base, kind.x()


def dense(model: nn.Module, base: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The base with the weights that the adapter makes of its own, from the parameters given."""
    weights = dict(base.named_parameters())
    result: dict[str, Tensor] = {**weights}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        A, B = (parameters[f"{path}.{leaf}"] for leaf in layer.factor_names("default"))
        by_columns = isinstance(layer, nn.Embedding) or "Conv1D" in type(layer).__name__
        W0 = weights[f"{path}.{layer.weight_name}"].detach()
        matrix = (W0.mT if by_columns else W0.flatten(1)) + layer.scaling["default"] * B.flatten(
            1
        ) @ A.flatten(1)
        magnitude = parameters.get(f"{path}.lora_magnitude_vector.default.weight")
        if magnitude is not None:  # the norm is a constant
            matrix = magnitude[:, None] * matrix / matrix.norm(dim=1, keepdim=True).detach()
        result[f"{path}.{layer.weight_name}"] = matrix.mT if by_columns else matrix.view(W0.shape)
    return functional_call(base, result, (x,))


def size(y: Tensor) -> Tensor:
    return (y.sin() * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()


@pytest.fixture
def differentiable_attention() -> Iterator[None]:
    """The only of torch's attention kernels that has second derivatives and tangents."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("differentiable_attention")
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("case", KINDS)
class TestLayers:
    def test_a_gradient_penalty(self, case: str, make: str) -> None:
        model, base, x = adapted(case, **MAKES[make])
        factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if x.is_floating_point():
            x = x.requires_grad_()
        asked = [*factors.values(), *([x] if x.requires_grad else [])]
        close(penalty(model(x), asked), penalty(dense(model, base, factors, x), asked))

    def test_hessian_vector_products(self, case: str, make: str) -> None:
        model, base, x = adapted(case, **MAKES[make])
        factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        along = tuple(torch.randn_like(p) for p in factors.values())

        def ours(*values: Tensor) -> Tensor:
            return size(functional_call(model, dict(zip(factors, values, strict=True)), (x,)))

        def plain(*values: Tensor) -> Tensor:
            return size(dense(model, base, dict(zip(factors, values, strict=True)), x))

        given = tuple(factors.values())
        want = torch.autograd.functional.hvp(plain, given, along)
        got = torch.autograd.functional.hvp(ours, given, along)
        assert any(bool(h.abs().max() > 1e-3) for h in got[1])
        close(got, want)
        if make == "lora":  # torch.func sees through the detached norm of DoRA as autograd does, but slowly
            gradient = torch.func.grad(plain, tuple(range(len(given))))
            close(got[1], torch.func.vjp(gradient, *given)[1](along))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("grad", [True, False])
    def test_tangents(self, case: str, make: str, grad: bool) -> None:
        if not grad and KINDS[case].read:
            pytest.skip("torch's fused kernels, which run without gradients, have no tangents")
        model, base, x = adapted(case, **MAKES[make])
        factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        tangents = {n: torch.randn_like(p) for n, p in factors.items()}
        found = []
        for function in (
            lambda values: functional_call(model, values, (x,)),
            lambda values: dense(model, base, values, x),
        ):
            with torch.set_grad_enabled(grad), forward_ad.dual_level():
                duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in factors.items()}
                found.append(tuple(forward_ad.unpack_dual(function(duals))))
        assert found[0][1] is not None
        close(*found)


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_whole_hessian(vectorize: bool) -> None:
    model, base, x = adapted("two linears")
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n]
    factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    given = tuple(factors[n] for n in names)

    def ours(*values: Tensor) -> Tensor:
        return size(functional_call(model, dict(zip(names, values, strict=True)), (x,)))

    def plain(*values: Tensor) -> Tensor:
        return size(dense(model, base, factors | dict(zip(names, values, strict=True)), x))

    got = torch.autograd.functional.hessian(ours, given, vectorize=vectorize)
    close(got, torch.func.hessian(plain, tuple(range(len(given))))(*given))


class Tied(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)).tanh())


def test_trained_rows_of_a_table() -> None:
    base = Tied()
    config = lorica.LoraConfig(r=2, target_modules=["body"], trainable_token_indices=[2, 5])
    model = lorica.adapt(copy.deepcopy(base), config)
    rows = model.get_parameter("embed.token_adapter.trainable_tokens_delta.default")
    tokens = torch.tensor([[2, 3, 5, 2]])
    table = base.embed.weight.detach().index_copy(0, torch.tensor([2, 5]), rows)
    expected = functional_call(base, {"embed.weight": table}, (tokens,))
    close(penalty(model(tokens), [rows]), penalty(expected, [rows]))


def test_in_a_mixed_batch() -> None:
    model, _, x = adapted("two linears")
    config = lorica.LoraConfig(r=1, target_modules=["0", "2"], init_lora_weights=False, use_dora=True)
    lorica.adapt(model, config, "other", seed=1)
    asked = [p for p in model.parameters() if p.requires_grad]
    names = ["default", None, "other"]
    with lorica.mixed(model, names):
        got = penalty(model(x), asked)
    alone = []
    for i, name in enumerate(names):
        with lorica.active(model, name or ()):
            alone.append(model(x[i : i + 1]))
    close(got, penalty(torch.cat(alone), asked))

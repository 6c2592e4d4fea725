"""PEFT's methods of combining adapters, by their names and with their results.

linear, ties, dare_linear, dare_ties, magnitude_prune      on A and on B, each by itself
svd, ties_svd, dare_linear_svd, dare_ties_svd, ...         on B·A, then cut to a rank
cat                                                        the sum itself
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from lorica import inits
from lorica.adapter import Adapter, Factors
from lorica.algebra.compression import per_group
from lorica.algebra.exact import side_by_side
from lorica.algebra.sparsify import MajoritySign, drop_and_rescale, elected_mean, trim, weighted_sum
from lorica.algebra.spectrum import Spectrum, Term, blocks_of_sum, spectrum
from lorica.algebra.terms import Terms
from lorica.config.checks import check_count, check_seed, check_share, is_number
from lorica.errors import AdapterError, ConfigError, lines, listing, nearest

_SVD = ("svd_rank", "svd_clamp", "svd_driver")
_PRUNING: dict[str, tuple[str, ...]] = {
    "ties": ("density", "majority_sign_method"),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "majority_sign_method", "seed"),
    "magnitude_prune": ("density",),
}
# Method → the options it takes.
METHODS: dict[str, tuple[str, ...]] = {
    "cat": (),
    "linear": (),
    "svd": _SVD,
    **_PRUNING,
    **{f"{name}_svd": (*options, *_SVD) for name, options in _PRUNING.items()},
}


class Options(NamedTuple):
    """A method's options; None for an option that was not given."""

    density: float | None
    majority_sign_method: MajoritySign | None
    svd_rank: int | None
    svd_clamp: float | None
    svd_driver: str | None
    seed: int | None


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "cat",
    *,
    density: float | None = None,
    majority_sign_method: MajoritySign | None = None,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_driver: str | None = None,
    seed: int | None = None,
    keep: int | None = None,
) -> Adapter:
    """Combine adapters by one of the methods of PEFT's ``add_weighted_adapter``, with the same result.

    With s for an adapter's scale and w for its weight:

    - ``cat``: the sum ``Σ w·s·B·A`` itself, as `concatenate` makes it; ranks add up.
    - ``svd``: the sum cut to `svd_rank`; no update of that rank is nearer to it.
    - ``linear``: ``(Σ √|w·s|·B)·(Σ ±√|w·s|·A)``. For one adapter that is the sum. For more it is not: each B
      is multiplied by each A, and n² − n of the n² products are of factors that were never trained together.
      It keeps the rank.
    - ``magnitude_prune``: as ``linear``, from A and B whose smallest elements are zeroed first.
    - ``ties``: likewise; for each element, the values that agree with the majority's sign are averaged.
    - ``dare_linear``, ``dare_ties``: as ``linear`` and ``ties``, from A and B whose elements are dropped at
      random; the others are divided by `density`.
    - ``ties_svd`` and so on: the same with each product ``s·B·A`` instead of A and B, cut to `svd_rank`. Here
      (and with `svd_clamp`) that d_out × d_in product is formed, one layer at a time.

    All of them add up biases on B (`lora_bias`). `error` measures the distance of a result from the sum.

    Two things differ from PEFT 0.21. The result has a scale of 1 with `use_rslora` too, where PEFT's is √r
    too large; and a rank too high for a layer is lowered to the layer's highest, where PEFT's adapter fails.

    Args:
        adapters: at least one, for one base. Methods on A and B need one rank in each layer.
        weights: a number per adapter, of either sign; None takes 1 for each.
        method: see above.
        density: share of elements to keep, in (0, 1]; the pruning methods need it.
        majority_sign_method: ``"total"`` (default): an element's sign is the sum's; ``"frequency"``: it is
            that of most adapters. For ``ties`` and ``dare_ties``.
        svd_rank: rank of each layer of the result, at most; None takes the highest of the adapters.
        svd_clamp: quantile in (0, 1]: elements of U·S and Vh are clamped to that quantile of all of them.
            None does not clamp.
        svd_driver: cuSOLVER's method for `torch.linalg.svd`; only for adapters on a GPU.
        seed: of the elements that DARE drops; each layer draws its own. None takes one from torch's global
            generator.
        keep: index of the adapter whose head, biases and task the result has; None if no two adapters differ
            in them.

    Returns:
        The combination, with a scale of 1 and in float32 or the higher precision of an adapter.

    Raises:
        AdapterError: kinds, shapes or ranks of layers differ, an adapter has magnitudes (DoRA), or heads,
            biases or tasks differ and `keep` is None.
        ConfigError: there is no such method, it does not take an option that was given, or a value is out of
            range.

    Warns:
        LoricaWarning: the adapters name different bases.

    Source: Yadav et al., 2023 (TIES); Yu et al., 2023 (DARE).
    """
    options = Options(density, majority_sign_method, svd_rank, svd_clamp, svd_driver, seed)
    terms = Terms.of(adapters, weights)
    _check(method, options, terms)
    if options.seed is None and method.startswith("dare"):
        options = options._replace(seed=inits.draw_seed())

    def join(path: str, updates: Sequence[Term], like: Factors) -> Factors:
        if method == "cat":
            return side_by_side(path, updates, like)
        random = None if options.seed is None else inits.generator(options.seed, path)
        mix = partial(_mix, method.removesuffix("_svd"), options, random)
        if "svd_rank" in METHODS[method]:
            found = _spectrum(mix, updates, like, options, lean=method == "svd")
            return _clamped(
                found.cut(per_group(options.svd_rank or terms.rank, like, path)), options
            ).factors(like)
        return _of_factors(mix, updates, like)

    return terms.join(join, keep)


Mix = Callable[[list[Tensor], list[float]], Tensor]
"""Tensors of one shape, and their weights → their mixture."""


def _mix(
    method: str, options: Options, random: torch.Generator | None, tensors: list[Tensor], weights: list[float]
) -> Tensor:
    if options.density is not None:
        density = float(options.density)
        tensors = [
            trim(t, density) if random is None else drop_and_rescale(t, density, random) for t in tensors
        ]
    stack = torch.stack(tensors)
    if method.endswith("ties"):
        return elected_mean(stack, weights, options.majority_sign_method or "total")
    return weighted_sum(stack, weights)


def _of_factors(mix: Mix, updates: Sequence[Term], like: Factors) -> Factors:
    """A mixture of the A, and one of the B."""
    shares = [w * f.scale for f, w in updates]
    roots = [math.sqrt(abs(share)) for share in shares]
    A = mix([f.A.to(like.A) for f, _ in updates], list(map(math.copysign, roots, shares)))
    B = mix([f.B.to(like.B) for f, _ in updates], roots)
    return dataclasses.replace(like, A=A, B=B, scale=1.0)


def _spectrum(mix: Mix, updates: Sequence[Term], like: Factors, options: Options, *, lean: bool) -> Spectrum:
    """Singular values and vectors of a mixture of the ``s·B·A``; `lean` takes a sum's from the factors.

    Clamping depends on the signs of the vectors, which are arbitrary. To have PEFT's signs, the product
    itself is decomposed, as in PEFT.
    """
    if lean and options.svd_clamp is None and options.svd_driver is None:
        return spectrum(*blocks_of_sum(updates))
    blocks = [(f.scale, *f.blocks()) for f, _ in updates]
    products = [(B.to(like.B) @ A.to(like.A)) * scale for scale, B, A in blocks]
    mixture = mix(products, [w for _, w in updates])
    return Spectrum(*torch.linalg.svd(mixture, full_matrices=False, driver=options.svd_driver))


def _clamped(found: Spectrum, options: Options) -> Spectrum:
    """The spectrum with the elements of U·S and Vh clamped to their quantile."""
    if options.svd_clamp is None:
        return found
    left, right = found.U * found.S.unsqueeze(1), found.Vh
    bound = torch.quantile(torch.cat([left.flatten(), right.flatten()]), options.svd_clamp)
    return Spectrum(left.clamp(-bound, bound), torch.ones_like(found.S), right.clamp(-bound, bound))


def _check(method: str, options: Options, terms: Terms) -> None:
    """Refuse an unknown method, options it does not take, and values out of range."""
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(
            f"there is no method {method!r}{nearest(method, METHODS)}; there are {listing(METHODS)}"
        )
    takes = METHODS[method]
    extra = [name for name, value in options._asdict().items() if value is not None and name not in takes]
    if extra:
        raise ConfigError(f"{method} takes no {listing(extra)}; it takes {listing(takes) or 'no options'}")
    density, majority, rank, clamp, driver, seed = options
    if "density" in takes and (density is None or not is_number(density) or not 0 < density <= 1):
        raise ConfigError(
            f"{method} needs density, the share of elements to keep, in (0, 1], not {density!r:.80}"
        )
    if majority not in (None, *get_args(MajoritySign)):
        raise ConfigError(f"majority_sign_method must be one of {get_args(MajoritySign)}, not {majority!r}")
    if rank is not None:
        check_count("svd_rank", rank)
    if clamp is not None:
        check_share("svd_clamp", clamp, "a quantile")
    check_seed(seed)
    if driver is not None and any(
        f.A.device.type != "cuda" for a in terms.adapters for f in a.factors.values()
    ):
        raise ConfigError(
            "svd_driver chooses among cuSOLVER's methods, and the adapters are not on a GPU; leave it out"
        )
    if method != "cat" and "svd_rank" not in takes:
        _check_ranks(method, terms)


def _check_ranks(method: str, terms: Terms) -> None:
    ranks = {path: sorted({f.r for f, _ in terms.at(path)}) for path in terms.paths}
    unlike = [f"{path}: {' and '.join(map(str, found))}" for path, found in ranks.items() if len(found) > 1]
    if unlike:
        raise AdapterError(
            f"{method} mixes A with A and B with B, so they need one rank in each layer; these differ:\n"
            f"{lines(unlike)}\nUse cat, or a method whose name ends in svd"
        )

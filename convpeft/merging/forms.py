"""Work out in which form one adapted layer merges, and its kernels in float64; no model is looked at or changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Place, exact
from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry
from ..convolution.kernels import Chain, ConvKernel, add_kernels, balanced, compose, embed_on_grid, times
from ..errors import GeometryError, MergeError, ShapeMismatch
from ..hosts.slots import Entry, base_class

Form = Literal["absorbed", "single", "factored", "kept"]

_NOT_FINITE = "its own weight or bias is not finite"


@dataclass(frozen=True)
class Job:
    """One adapted layer with its active adapters, and the module that takes the merged result.

    Attributes:
        name: of the adapted module.
        target_name: of the module that takes the result: itself, or the last step of a Sequential.
        layer, target: the two modules.
        adapters: active ones on this layer, in order.
        entry: the adapted entry of the module's output.
    """

    name: str
    target_name: str
    layer: nn.Module
    target: nn.Module
    adapters: tuple[Adapter, ...]
    entry: Entry


@dataclass(frozen=True)
class Operands:
    """What the form of one layer is worked out from, of a model or of files.

    Attributes:
        name: of the adapted module.
        class_name: of the module that takes the merged result.
        host: that module's own kernel in float64; None where it has none.
        computed: which of its tensors is no parameter that a merge could replace, in words; empty if all are.
        adapters: on this layer, in order.
        entry: the adapted entry of the module's output.
        coefficients: that the adapters' updates are multiplied with; unset, each counts as it is.
    """

    name: str
    class_name: str
    host: ConvKernel | None
    computed: str
    adapters: tuple[Adapter, ...]
    entry: Entry = None
    coefficients: tuple[float, ...] = ()

    @classmethod
    def of(cls, job: Job) -> Operands:
        """Return those of an adapted layer of a model."""
        computed = _computed(job.target) if isinstance(job.target, PLAIN_HOSTS) else ""
        class_name = base_class(job.target).__name__
        return cls(job.name, class_name, host_kernel(job.target), computed, job.adapters, job.entry)

    def chains(self, place: Place) -> list[Chain]:
        """Return the adapters' equivalent convolutions at one place, each times its coefficient.

        Raises:
            MergeError: if an adapter has none, or none with this layer.
        """
        coefficients = self.coefficients or (1.0,) * len(self.adapters)
        pairs = zip(self.adapters, coefficients, strict=True)
        return [times(self._chain(adapter), factor) for adapter, factor in pairs if adapter.site.place == place]

    def _chain(self, adapter: Adapter) -> Chain:
        """Return an adapter's chain, which may depend on the host's own kernel."""
        if adapter.site.place == "output" or not adapter.reads_host:
            return adapter.chain()
        if self.host is None or not _is_finite(self.host):
            raise MergeError(self.computed if self.host is None else _NOT_FINITE)
        return adapter.chain(self.host)


@dataclass(frozen=True)
class Merged:
    """The merged form of one layer, or the reason why it has none.

    Attributes:
        form: ``absorbed`` (same kernel size), ``single`` (one larger kernel), ``factored`` (plain chains added) or ``kept``.
        kernel: of the merged layer, for the first two; for ``single`` on an output the one convolution to add.
        chains: to add, for ``factored``.
        beside: the chains read the layer's input (else its output).
        before, after: the layer's kernels as text, for the plan.
        macs_before, macs_single, macs_factored: multiply-accumulates for one output position; None when there is no such form.
        reason: why this form, or why none.
        otherwise: the chain to add where the layer's forward turns out not to be the convolution of its weight; None where
            ``form`` asked for one kernel.
    """

    form: Form
    kernel: ConvKernel | None = None
    chains: tuple[Chain, ...] = ()
    beside: bool = True
    before: str = "–"
    after: str = "–"
    macs_before: int = 0
    macs_single: int | None = None
    macs_factored: int | None = None
    reason: str = ""
    otherwise: Merged | None = None

    @property
    def macs_after(self) -> int | None:
        """Multiply-accumulates of the chosen form, for one output position."""
        return self.macs_factored if self.form == "factored" else self.macs_single

    def kept(self, reason: str) -> Merged:
        """Return the same layer, not merged, with the reason."""
        return replace(self, form="kept", kernel=None, chains=(), reason=reason, otherwise=None)


def solve(job: Job, form: str) -> Merged:
    """Return the merged form of a layer's active adapters; ``kept`` with a reason when there is none.

    Args:
        job: the layer.
        form: ``auto`` takes fewer multiply-accumulates, ``single`` and ``factored`` insist. A kernel that does not grow
            is absorbed in any case: nothing is cheaper.
    """
    return solve_kernels(Operands.of(job), form)


def solve_kernels(operands: Operands, form: str) -> Merged:
    """Return the merged form of one layer from its kernels alone; see ``solve``."""
    host, refused = operands.host, Merged("kept", before=operands.class_name)
    try:
        beside, after = operands.chains("parallel"), operands.chains("output")
    except (MergeError, GeometryError) as error:
        return refused.kept(str(error))
    kernels = [step for chain in (*beside, *after) for step in chain]
    if not all(_is_finite(kernel) for kernel in kernels):
        return refused.kept("an adapter has non-finite weights")
    if operands.computed:
        return refused.kept(operands.computed)
    if host is not None and not _is_finite(host):
        return refused.kept(_NOT_FINITE)
    if host is not None and operands.entry is None and _is_foldable(host, after):
        beside += [(compose([host, *chain]),) for chain in after]
        return _beside(host, beside, form)
    if beside and after:
        return refused.kept("it has adapters beside it and on its output that do not fold into one kernel")
    return _beside(host, beside, form) if beside and host else _after(operands.class_name, after, form)


def host_kernel(layer: nn.Module) -> ConvKernel | None:
    """Return a convolution's or Linear's own kernel in float64, or None for other modules and computed tensors."""
    if not isinstance(layer, PLAIN_HOSTS) or _computed(layer):
        return None
    geometry = ConvGeometry.of(layer)
    weight = geometry.as_kernel(exact(layer.weight))
    return ConvKernel(weight, None if layer.bias is None else exact(layer.bias), geometry)


def _computed(layer: nn.Module) -> str:
    """Return which of a layer's tensors is no parameter that a merge could replace, in words; empty if all are."""
    for name in ("weight", "bias"):
        needed = name == "weight" or getattr(layer, name, None) is not None
        if needed and layer._parameters.get(name) is None:
            return f"its {name} is not a plain parameter (parametrised, weight-normed or pruned)"
    return ""


def _is_finite(kernel: ConvKernel) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in (kernel.weight, kernel.bias) if part is not None)


def _is_zero(kernel: ConvKernel) -> bool:
    return not any(bool(part.any()) for part in (kernel.weight, kernel.bias) if part is not None)


def _is_foldable(host: ConvKernel, after: Sequence[Chain]) -> bool:
    """Return whether output chains fold into the layer whose output they read: 1x1 after anything, groups alike."""
    return all(step.geometry.is_pointwise and step.geometry.groups == host.geometry.groups for c in after for step in c)


def _beside(host: ConvKernel, chains: Sequence[Chain], form: str) -> Merged:
    geometry = host.geometry
    base = Merged("kept", before=str(geometry), macs_before=geometry.macs)
    try:
        kernels = [compose(chain) for chain in chains]
        plain = [_on_host_grid(chain, geometry) for chain in chains]
    except (GeometryError, ShapeMismatch) as error:
        return base.kept(str(error))
    useful = [number for number, kernel in enumerate(kernels) if not _is_zero(kernel)]
    counted = useful or range(len(chains))  # a plan made before training shows what the adapters will cost
    try:
        single, refusal = add_kernels(host, [kernels[number] for number in counted]), ""
    except (GeometryError, ShapeMismatch) as error:
        single, refusal = None, str(error)
    kept = [balanced(plain[number]) for number in counted]
    factored = geometry.macs + sum(chain_macs(chain) for chain in kept)
    rows = replace(base, macs_single=None if single is None else single.geometry.macs, macs_factored=factored)
    if not useful:
        return replace(rows, form="absorbed", kernel=host, after=str(geometry), reason="the adapters add nothing")
    if single is None and form == "single":
        return rows.kept(f"{refusal}; form='factored' can merge it")
    limit = refusal or f"one kernel ({single and single.geometry}) would cost more"
    reason = "asked for" if form == "factored" else limit
    after = f"{geometry} + {' + '.join(describe(chain) for chain in kept)}"
    chain = replace(rows, form="factored", chains=_with_bias(kept, host.bias), after=after, reason=reason)
    return chain if single is None else _one_or_chain(single, chain, geometry, form)


def _one_or_chain(single: ConvKernel, chain: Merged, host: ConvGeometry, form: str) -> Merged:
    """Return the form that was asked for, or the cheaper one."""
    assert chain.macs_factored is not None
    grows = single.geometry != host
    if grows and (form == "factored" or (form == "auto" and single.geometry.macs > chain.macs_factored)):
        return chain
    reason = "asked for" if form == "single" else "one kernel costs no more than the chain"
    return replace(
        chain,
        form="single" if grows else "absorbed",
        kernel=single,
        chains=(),
        after=str(single.geometry),
        reason=reason if grows else "the kernel does not grow",
        otherwise=None if form == "single" else chain,
    )


def _with_bias(chains: Sequence[Chain], bias: Tensor | None) -> tuple[Chain, ...]:
    """Return the chains with the host's bias in the last step of the first.

    The host keeps none, so a norm that is fused into it later, past the chains, shows as a bias it should not have.
    """
    (*steps, last), *others = chains
    if bias is None:
        return tuple(chains)
    whole = bias if last.bias is None else last.bias + bias
    return ((*steps, replace(last, bias=whole)), *others)


def _after(class_name: str, chains: Sequence[Chain], form: str) -> Merged:
    factored = sum(chain_macs(chain) for chain in chains)
    single = _one_kernel(chains)
    rows = Merged(
        "kept",
        beside=False,
        before=class_name,
        macs_single=None if single is None else single.geometry.macs,
        macs_factored=factored,
    )
    if single is not None and (form == "single" or (form == "auto" and single.geometry.macs <= factored)):
        after = f"{class_name} + {single.geometry}"
        return replace(rows, form="single", chains=((single,),), after=after, reason="one convolution on the output")
    after = f"{class_name} + {' + '.join(describe(chain) for chain in chains)}"
    chains = tuple(balanced(chain) for chain in chains)
    return replace(rows, form="factored", chains=chains, after=after, reason="a plain chain on the output")


def _one_kernel(chains: Sequence[Chain]) -> ConvKernel | None:
    first, *rest = (compose(chain) for chain in chains)
    smallest = replace(first.geometry.resized((1, 1)))
    start = ConvKernel(first.weight.new_zeros(smallest.weight_shape()), None, smallest)
    return add_kernels(start, [first, *rest])


def chain_macs(chain: Chain) -> int:
    """Return multiply-accumulates for one output position; steps before a stride run that much more often."""
    total = 0
    for position, step in enumerate(chain):
        more_often = 1
        for later in chain[position + 1 :]:
            more_often *= later.geometry.stride[0] * later.geometry.stride[1]
        total += step.geometry.macs * more_often
    return total


def describe(chain: Chain) -> str:
    """Return a chain as text."""
    return " · ".join(str(step.geometry) for step in chain)


def _on_host_grid(chain: Chain, host: ConvGeometry) -> Chain:
    """Grow each spatial step evenly from the host's kernel, so that a plain layer has a padding for it.

    TF-style padding of a grown kernel is worked out from the grown kernel itself; where the host's is always zero, the
    step needs none of it.

    Raises:
        GeometryError: if no plain layer looks at the step's pixels.
    """
    return tuple(step if step.geometry.is_pointwise else _grown(step, host.settled()) for step in chain)


def _grown(step: ConvKernel, host: ConvGeometry) -> ConvKernel:
    own = step.geometry
    geometry = host.grown(own.kernel_size).with_channels(own.in_channels, own.out_channels, own.groups)
    return ConvKernel(embed_on_grid(step.weight, host.kernel_size, geometry.kernel_size), step.bias, geometry)

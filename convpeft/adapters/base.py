"""What every adapter kind says of itself; one file per family beside this one implements it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..convolution.geometry import ConvGeometry
from ..convolution.kernels import Chain, ConvKernel
from ..convolution.low_rank import Factors
from ..errors import NotMergeable
from .options import AdapterOptions

Place = Literal["parallel", "output"]


@dataclass(frozen=True)
class Site:
    """Where an adapter sits.

    Attributes:
        place: ``parallel`` (sees the layer's input) or ``output`` (sees the module's output).
        geometry: of the host layer when parallel; 1x1 on the output's channels otherwise.
    """

    place: Place
    geometry: ConvGeometry


class Host(NamedTuple):
    """The layer an adapter sits beside, lent for one call: by reference, never kept and never registered.

    Attributes:
        weight: of the layer, as it is shown now (a base checkpoint loaded since, an adapter's own unfrozen values, ...).
        bias: of the layer, or None.
        output: what the layer itself made of this very input, without any adapter.
    """

    weight: Tensor
    bias: Tensor | None
    output: Tensor


class Adapter(nn.Module):
    """A small trainable module that adds ``f`` to its host: ``y = host(x) + f(x)`` or ``y = z + f(z)``.

    A subclass names its ``places``, its ``hosts`` (the layers it can sit beside) and its ``Options``. It starts as the
    identity: ``f`` is exactly zero when fresh. It returns its equivalent plain convolutions from ``chain``, or gives the
    reason why none exist in ``merge_refusal``. Geometry is never retyped: ``self.site.geometry`` carries all of it.

    A parallel kind whose update depends on the layer's own weight (DoRA, say) sets ``reads_host``, on the class or on
    the object. It is then called as ``adapter(x, host)`` with a ``Host``, and ``chain(host)`` is given the layer's kernel.
    Nothing of the layer is stored in the adapter, so copies, files and the user's own ``load_state_dict`` need no care.
    A layer whose weight is computed, or whose forward is not the convolution of its weight, is refused at plan time for
    such a kind.

    A kind with more than one way to compute its update sets ``form`` to the name of the chosen one, for the plan.

    Args:
        site: where the adapter sits.
        options: an instance of ``Options``, already checked.
    """

    kind: ClassVar[str] = ""
    places: ClassVar[tuple[Place, ...]] = ()
    hosts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    Options: ClassVar[type[AdapterOptions]] = AdapterOptions
    merge_refusal: ClassVar[str | None] = None
    reads_host: bool = False
    form: str | None = None

    def __init__(self, site: Site, options: AdapterOptions) -> None:
        super().__init__()
        self.site = site
        self.options: Any = options

    @classmethod
    def refuses(cls, site: Site, options: Any) -> str | None:
        """Return why this kind cannot serve ``site``, as a sentence for the user, or None when it can."""
        return None

    def chain(self, host: ConvKernel | None = None) -> Chain:
        """Return the equivalent plain convolutions, run in turn, as float64 kernels.

        ``kernels.compose`` makes the single kernel of them, so a kind writes its algebra once.

        Args:
            host: the layer's own weight and bias in float64, given to a kind that ``reads_host``, and to no other.

        Raises:
            NotMergeable: if none exist; the text says why.
        """
        raise NotMergeable(self.merge_refusal or f"kind {self.kind!r} gives no equivalent convolution")

    def factors(self) -> Factors | None:
        """Return the update as two factors ``B(A x)``, A on the host's own kernel, where that is all there is to it now.

        A frozen convolution then computes it together with its own output (``convolution.nodes``); None: ``forward`` runs.
        """
        return None

    def auxiliary_loss(self) -> Tensor | None:
        """Return a scalar to add to the loss (load balancing, say), or None."""
        return None

    def no_decay(self) -> set[str]:
        """Return the names of own parameters without weight decay: norms, biases and scales."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def extra_repr(self) -> str:
        """Show place, geometry and options when the model is printed."""
        return f"{self.site.place}, {self.site.geometry}, {self.options}"


def exact(tensor: Tensor) -> Tensor:
    """Return a detached float64 copy, for the algebra of a merge."""
    return tensor.detach().to(torch.float64, copy=True)

"""``Adapter``, the base class of every kind, and what it is told about the layer it sits on."""

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
    """The place and the geometry an adapter is built for.

    Attributes:
        place: ``parallel`` (reads the layer's input) or ``output`` (reads the module's output).
        geometry: the host layer's if parallel; otherwise 1x1 over the output's channels.
    """

    place: Place
    geometry: ConvGeometry


class Host(NamedTuple):
    """The tensors of an adapter's layer, passed by reference for one call and not stored.

    Attributes:
        weight: the layer's current weight (from the base checkpoint loaded last, or an adapter's unfrozen copy).
        bias: the layer's current bias, or None.
        output: the layer's own output for this input, without any adapter.
    """

    weight: Tensor
    bias: Tensor | None
    output: Tensor


class Entrance(NamedTuple):
    """The weights of an adapter that read its input.

    Attributes:
        weight: A, of shape ``(hidden, in / groups, kh, kw)``; each row is one direction of the input.
        reads: what of the host's kernel a row is: ``kernel`` (all of it), ``centre`` (its centre alone), or ``pixel`` (any
            one position: further layers of the adapter spread over the others).
    """

    weight: nn.Parameter
    reads: Literal["kernel", "centre", "pixel"]


class Adapter(nn.Module):
    """A small trainable module that adds ``f`` to its host: ``y = host(x) + f(x)`` or ``y = z + f(z)``.

    A subclass defines its ``places``, its ``hosts`` (the layer classes it works beside) and its ``Options``. A fresh
    adapter is the identity: ``f`` is exactly zero. ``chain`` returns the equivalent plain convolutions, or
    ``merge_refusal`` says why there are none. Every setting of the host layer is in ``self.site.geometry``. A kind that
    needs images (N, C, H, W) names the parts that do in ``image_parts``, and channels-last hosts are refused.

    A parallel kind whose update depends on the layer's weight (DoRA, say) sets ``reads_host``, on the class or on the
    object. It is then called as ``adapter(x, host)`` with a ``Host``, and ``chain(host)`` gets the layer's kernel. The
    adapter stores nothing of the layer, so copies, files and ``load_state_dict`` work as for any module. For such a
    kind, a layer whose weight is computed, or whose forward is not the convolution with it, is refused at plan time.

    A kind with several ways to compute its update sets ``form`` to the name of the chosen one; the plan shows it.

    Args:
        site: the place and geometry to build for.
        options: an instance of ``Options``, already checked.
    """

    kind: ClassVar[str] = ""
    places: ClassVar[tuple[Place, ...]] = ()
    hosts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    Options: ClassVar[type[AdapterOptions]] = AdapterOptions
    merge_refusal: ClassVar[str | None] = None
    image_parts: ClassVar[str | None] = None
    tries_itself: ClassVar[bool] = False  # ``refuses`` builds and runs adapters
    reads_host: bool = False
    form: str | None = None

    def __init__(self, site: Site, options: AdapterOptions) -> None:
        super().__init__()
        self.site = site
        self.options: Any = options

    @classmethod
    def refuses(cls, site: Site, options: Any) -> str | None:
        """Return why this kind cannot serve ``site``, as a sentence for the user, or None when it can."""
        if cls.image_parts is None or not site.geometry.linear:
            return None
        host = "layer" if "parallel" in cls.places else "output"
        return f"its {cls.image_parts} need an image (N, C, H, W), and this {host}'s channels are the last axis"

    def chain(self, host: ConvKernel | None = None) -> Chain:
        """Return the equivalent plain convolutions, to be run one after the other, as float64 kernels.

        ``kernels.compose`` folds them into one kernel.

        Args:
            host: the layer's own weight and bias in float64; given only to a kind that ``reads_host``.

        Raises:
            NotMergeable: if there are none; the text says why.
        """
        raise NotMergeable(self.merge_refusal or f"kind {self.kind!r} gives no equivalent convolution")

    def factors(self) -> Factors | None:
        """Return the factors if the whole update is now ``B(A x)`` with A of the host's kernel size, else None.

        A frozen convolution computes such an update in its own autograd node (``convolution.nodes``); for None,
        ``forward`` runs.
        """
        return None

    def auxiliary_loss(self) -> Tensor | None:
        """Return a scalar to add to the training loss (load balancing, say), or None."""
        return None

    def no_decay(self) -> set[str]:
        """Return the names of the adapter's parameters to train without weight decay: norms, biases and scales."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def entrance(self) -> Entrance | None:
        """Return the weights that read the input, A of LoRA, whose directions ``initialise`` may choose; None without such."""
        return None

    def rising(self) -> set[str]:
        """Return the names of the weights that start at zero and end the update: B of LoRA, U of Rep-MoNA (``up``).

        LoRA+ trains these faster than all others, ``param_groups(up_mult=)``.
        """
        return {name for name, weight in self.named_parameters() if name.split(".")[0] == "up" and weight.ndim > 1}

    def extra_repr(self) -> str:
        """Return the place, geometry and options, to be shown when the model is printed."""
        return f"{self.site.place}, {self.site.geometry}, {self.options}"


def exact(tensor: Tensor) -> Tensor:
    """Return a detached float64 copy, as the kernel algebra of a merge needs it."""
    return tensor.detach().to(torch.float64, copy=True)

"""The methods of the installed ``peft`` as adapter kinds: ``peft:loha``, ``peft:lokr``, ``peft:oft``, ``peft:hra``, ...

A method is used as a change of the layer's weight: peft's own layer holds the parameters, and convpeft convolves with
the changed weight in the layer's own geometry, which not all peft layers keep. ``probe`` tries a method on each layer
shape; where it does not compute what it claims, the shape is refused.

This module, and with it peft, is imported when a kind ``peft:<method>`` is first used.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...convolution.geometry import ConvGeometry
from ...convolution.kernels import Chain, ConvKernel
from ...errors import NotMergeable, UnknownKind, brief, closest, shown
from ..base import Adapter, Host, Site
from ..options import AdapterOptions, probability
from .layers import Change, build_layer, change_of, peft_config, peft_types
from .probe import probe

_MOST = 2**16  # of any int option: a file must not make a layer allocate more memory than it can need

_NOT_OPTIONS = {  # fields of a peft configuration that select layers, or that convpeft handles itself
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "feedforward_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip

_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class PeftOptions(AdapterOptions):
    """Options of every ``peft:`` kind; a method adds the fields of peft's configuration, under peft's names.

    Attributes:
        dropout: dropout probability on the update's input, in training. It replaces peft's own dropout options, which
            act in peft's forward and would have no effect here.
    """

    dropout: float = 0.0

    @property
    def method(self) -> str:
        """The name of the peft method, in lower case."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the arguments of peft's configuration."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name != "dropout"}

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range; peft checks its own last."""
        yield from probability(self, "dropout")
        large = [name for name, value in self.settings().items() if isinstance(value, int) and value > _MOST]
        yield from (f"{name} must be at most {_MOST:,}, not {shown(getattr(self, name))}" for name in large)
        if getattr(self, "boft_n_butterfly_factor", 1) != 1:
            yield "boft_n_butterfly_factor must be 1: more needs a CUDA extension that peft compiles on the spot"
        if self.method == "adalora":
            yield "adalora moves its ranks in a callback of peft's training loop, which nothing calls here; use lora"
        elif not large:
            try:
                peft_config(self.method, self.settings())
            except Exception as error:  # whatever peft raises for values that it does not expect
                yield f"peft refuses these options: {brief(str(error)) or type(error).__name__}"

    def __reduce__(self) -> Any:
        return _options_of, (self.method, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


class PeftAdapter(Adapter):
    """``f(x) = conv(x, W' - W, b' - b)``: the peft method changes the layer's weight W to W' and its bias b to b'.

    The convolution has the layer's own stride, padding, padding mode, dilation and groups, even where peft's layer
    drops them, and merges exactly. The adapter holds the method's parameters and buffers only; the layer's weight is
    passed for one call, not stored. Its cost is a second convolution as large as the layer's own.
    """

    places = ("parallel",)
    reads_host = True
    tries_itself = True
    method: str = ""

    def __init__(self, site: Site, options: PeftOptions) -> None:
        super().__init__(site, options)
        self.layer = build_layer(self.method, options.settings(), site.geometry)
        self.dropout = nn.Dropout(options.dropout)

    @classmethod
    def refuses(cls, site: Site, options: PeftOptions) -> str | None:
        """Return why the method cannot be used on a layer of this shape, found by trying it (see ``probe``)."""
        return probe(cls.method, tuple(options.settings().items()), _plain_shape(site.geometry))

    def forward(self, x: Tensor, host: Host | None = None) -> Tensor:
        """Return the update, shaped like the host's output."""
        if host is None:
            raise TypeError("a peft adapter reads its layer: call it as adapter(x, host), as the layer itself does")
        change = self._change(host.weight, host.bias)
        return self.site.geometry.convolve(self.dropout(x), change.weight, change.bias)

    def _change(self, weight: Tensor, bias: Tensor | None) -> Change:
        return change_of(self.method, self.layer, weight, bias)

    def chain(self, host: ConvKernel | None = None) -> Chain:
        """Return ``W' - W`` and ``b' - b``, computed in float64 throughout."""
        if host is None:
            raise NotMergeable("a peft kind has no kernel of its own: it depends on the layer's weight, chain(host)")
        weight = host.weight.flatten(1) if host.geometry.linear else host.weight
        adapter = copy.deepcopy(self).to(dtype=torch.float64).eval()
        with torch.no_grad():
            change = adapter._change(weight, host.bias)
        return (ConvKernel(change.weight.reshape(host.geometry.weight_shape()), change.bias, host.geometry),)

    def no_decay(self) -> set[str]:
        """Return norms, biases and the multiplicative scales of IA3 and BOFT, which decay would pull to 0, not to 1."""
        scales = {name for name, _ in self.named_parameters() if "ia3_l" in name or "boft_s" in name}
        return super().no_decay() | scales

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _uninitialised, (self.method,), self.__dict__


def peft_methods() -> tuple[str, ...]:
    """Return the methods of the installed peft that wrap layers: the names after ``peft:``, sorted.

    Those that support neither convolutions nor linear layers are refused at plan time.

    Example:
        >>> {"loha", "lokr", "oft", "hra"} <= set(peft_methods())
        True
    """
    return tuple(sorted(peft_types()))


@cache
def peft_adapter(method: str) -> type[Adapter]:
    """Return the adapter class of a peft method.

    Raises:
        UnknownKind: if the installed peft has no such method, with the nearest names.
    """
    known = peft_methods()
    if method not in known:
        import peft

        near = closest(method, known)
        raise UnknownKind(
            f"unknown kind {shown('peft:' + method)}. {f'Closest: {near}. ' if near else ''}"
            f"The installed peft {peft.__version__} has: {', '.join(known)}."
        )
    body = {
        "method": method,
        "kind": f"peft:{method}",
        "Options": _options_class(method),
        "__doc__": PeftAdapter.__doc__,
    }
    return type(f"Peft{method.title().replace('_', '')}", (PeftAdapter,), body)


@cache
def _options_class(method: str) -> type[PeftOptions]:
    """Return a method's options class: the plain fields of peft's configuration, with peft's defaults."""
    config = peft_types()[method]
    hints = typing.get_type_hints(config)
    own: list[Any] = []
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        plain = field.init and field.default is not dataclasses.MISSING and _is_plain(hint)
        if plain and field.name not in _NOT_OPTIONS and "dropout" not in field.name:
            fits = hint if field.default is not None else typing.Optional[hint]  # noqa: UP045  # hint may be a Union
            own.append((field.name, fits, dataclasses.field(default=field.default)))
    name = f"Peft{method.title().replace('_', '')}Options"
    return make_dataclass(name, own, bases=(PeftOptions,), frozen=True, namespace={"method": method})


def _is_plain(hint: Any) -> bool:
    """Return whether a spec file can hold values of this type: numbers, texts, or a choice of them."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType):
        return all(_is_plain(argument) for argument in typing.get_args(hint))
    return hint in _PLAIN


def _options_of(method: str, values: dict[str, Any]) -> PeftOptions:
    return _options_class(method)(**values)


def _uninitialised(method: str) -> Adapter:
    """Return an adapter without attributes, for unpickling."""
    kind = peft_adapter(method)
    return kind.__new__(kind)


def _plain_shape(geometry: ConvGeometry) -> ConvGeometry:
    """Return a geometry with only the channels, groups and kernel size: a method's parameters depend on no more."""
    channels = geometry.in_channels, geometry.out_channels
    return ConvGeometry(*channels, geometry.kernel_size, groups=geometry.groups, linear=geometry.linear)

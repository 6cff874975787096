"""DDP and FSDP2 around an adapted model, in two processes over gloo: the gradients of one process, and honest refusals."""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import convpeft
from tests.cases import assert_relative
from tests.detector import LORA, Untouched, detector, images
from tests.usage.test_copies import SPECS, two_adapters

pytestmark = pytest.mark.slow
PROCESSES = 2


def run(work, *arguments) -> None:
    """Call ``work(rank, *arguments)`` in two processes; what one raises is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_started, args=(port, work, arguments), nprocs=PROCESSES)


def _started(rank: int, port: int, work, arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def built(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Return the same model twice and a batch, alike in all processes, in training mode."""
    torch.manual_seed(0)
    model = two_adapters(name).train()
    return model, copy.deepcopy(model), images(4)


def backward(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()


def assert_means(model: nn.Module, reference: nn.Module, halves: tuple[torch.Tensor, ...]) -> None:
    """Gradients must be the means of those that one process gets for each half of the batch."""
    reference.zero_grad()
    for half in halves:
        backward(reference, half)
    for (name, parameter), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            torch.testing.assert_close(whole, other.grad / PROCESSES, rtol=1e-9, atol=1e-12, msg=name)


def _ddp(rank: int) -> None:
    for name in SPECS:
        model, reference, x = built(name)
        halves = x.chunk(PROCESSES)
        for key in ("a", "b"):  # wrapped again after the switch: DDP fixes what it synchronises
            convpeft.set_active(model, key)
            convpeft.set_active(reference, key)
            wrapped = DistributedDataParallel(model)
            for _ in range(2):  # the second pass would fail over a parameter without a gradient
                model.zero_grad()
                backward(wrapped, halves[rank])
            assert_means(model, reference, halves)
            assert convpeft.active_adapters(wrapped) == (key,)
        with convpeft.disabled(wrapped), torch.no_grad():
            convpeft.set_active(reference, None)
            assert torch.equal(wrapped.eval()(x), reference.eval()(x))


def _fsdp(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    wrapped = ((), ("body.0", "body.1"), ("body.0.conv", "body.1.conv"))
    for number, name in enumerate(SPECS):
        for parts in wrapped if number == 0 else wrapped[number % 3 :][:1]:
            model, reference, x = built(name)
            expected = folder / f"{name}-whole-{rank}.safetensors"
            convpeft.save_adapter(reference, expected, name="a")
            for part in parts:
                fully_shard(model.get_submodule(part), mesh=mesh)
            fully_shard(model, mesh=mesh)
            found = folder / f"{name}-{len(parts)}-{rank}.safetensors"
            convpeft.save_adapter(model, found, name="a")
            assert found.read_bytes() == expected.read_bytes()
            halves = x.chunk(PROCESSES)
            backward(model, halves[rank])
            assert_means(model, reference, halves)
            _switches(model, reference, x)
            if any(part.endswith("conv") for part in parts):
                convpeft.set_active(model, "a")
                with pytest.raises(
                    convpeft.HostError, match=r"body\.0\.conv: its class was extended after inject\(\), to FSDP"
                ):
                    convpeft.eject(model)
            convpeft.save_adapter(model, found, name="a")
            assert load_file(found).keys() == load_file(expected).keys()


def _switches(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> None:
    """Adapters that unfroze something cannot be exchanged, and nothing is half done then."""
    model.eval(), reference.eval()
    reference.load_state_dict({key: _whole(value) for key, value in model.state_dict().items()})
    for names in (None, "b"):
        with pytest.raises(convpeft.StateError, match=r"sharded by FSDP2.*score.* cannot be exchanged"):
            convpeft.set_active(model, names)
        assert convpeft.active_adapters(model) == ("a",)
        with torch.no_grad():
            assert_relative(_whole(model(x)), reference(x))


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _fsdp_light(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    for name in ("a", "b"):
        convpeft.inject(model, {"rules": [{"match": "*", "kind": "rep_mona", "rank": 1}]}, name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".convpeft." in key:
                parameter.normal_(0, 0.3)
    reference, x = copy.deepcopy(model), images()
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    for names in ("a", None, ["a", "b"], "b"):
        convpeft.set_active(model, names)
        convpeft.set_active(reference, names)
        with torch.no_grad():
            assert_relative(_whole(model(x)), reference(x))


def _late(rank: int, folder: Path) -> None:
    """Adapters that come after the wrapper are refused, whichever handle is given, and the model trains on as it did."""
    model, _, x = built(next(iter(SPECS)))
    path = convpeft.save_adapter(model, folder / f"{rank}.safetensors", name="a")
    for make in (detector, lambda: two_adapters(next(iter(SPECS)))):
        torch.manual_seed(0)
        model = make()
        before = Untouched(model)
        wrapped = DistributedDataParallel(model)
        around = nn.Sequential(nn.Identity(), wrapped)
        text = (
            r"is wrapped in DistributedDataParallel already.*bare model first and wrap it then.*the model is unchanged"
        )
        for given in (wrapped, model, around):
            with pytest.raises(convpeft.HostError, match=text):
                convpeft.inject(given, {"rules": [LORA]}, name="late")
            with pytest.raises(convpeft.HostError, match=text):
                convpeft.load_adapter(given, path, name="late")
        assert convpeft.plan(wrapped, {"rules": [LORA]}).layers[0].name == "body.0.conv"
        before.check()
        wrapped(x).sum().backward()
        del wrapped, around, given
        convpeft.inject(model, {"rules": [LORA]}, name="late")  # nobody holds the wrapper any more
        assert convpeft.active_adapters(model) == ("late",)
    part = detector()
    part.body[0] = DistributedDataParallel(part.body[0].requires_grad_())
    with pytest.raises(convpeft.HostError, match=text):
        convpeft.inject(part, {"rules": [LORA]})
    convpeft.inject(part.neck, {"rules": [{"match": "0", "kind": "lora", "rank": 1}]})  # a part that DDP has nothing of


def _under_ddp(rank: int, folder: Path) -> None:
    _ddp(rank)
    _late(rank, folder)


def test_ddp_needs_no_search_for_unused_parameters_and_adapters_that_come_after_it_are_refused(tmp_path):
    run(_under_ddp, tmp_path)


def _late_shards(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in ("", "neck"):
        model = detector()
        fully_shard(model.get_submodule(part), mesh=mesh)
        with pytest.raises(convpeft.HostError, match="is wrapped in FSDPModule already"):
            convpeft.inject(model, {"rules": [LORA]})


def _under_fsdp2(rank: int, folder: Path) -> None:
    _fsdp(rank, folder)
    _fsdp_light(rank)
    _late_shards(rank)


def test_fsdp2_trains_saves_switches_adapters_alone_and_refuses_what_it_would_undo_or_what_comes_after(tmp_path):
    run(_under_fsdp2, tmp_path)

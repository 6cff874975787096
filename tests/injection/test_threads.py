"""A model has one state at a time: a pass of another thread sees it from beginning to end, or somebody is refused in words."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convpeft
from convpeft import StateError
from tests.cases import bits, same_bits
from tests.detector import LORA, A, B, detector, images, scrambled

X = images()
NAMES = ("a", "b", None)


def model_of_two() -> nn.Module:
    model = detector()
    convpeft.inject(model, A, name="a")
    convpeft.inject(model, B, name="b")
    return scrambled(model).eval()


def answers(model: nn.Module) -> dict:
    found = {}
    with torch.no_grad():
        for name in NAMES:
            with convpeft.using(model, name):
                found[name] = model(X)
    return found


def tried(call: Callable[[], Tensor]) -> Tensor | str:
    try:
        with torch.no_grad():
            return call()
    except StateError as error:
        return str(error)


class Pause(nn.Module):
    """Stops in the middle of a pass until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list = []

    def forward(self, x: Tensor) -> Tensor:
        for begun, go_on in self.told:
            begun.set()
            assert go_on.wait(20)
        return x


class InAPass:
    """A pass of another thread, stopped half-way while the ``with`` block runs."""

    def __init__(self, model: nn.Module, run: Callable[[], Tensor]) -> None:
        self.pause, self.run = next(m for m in model.modules() if isinstance(m, Pause)), run

    def __enter__(self) -> InAPass:
        begun, self.go_on = threading.Event(), threading.Event()
        self.pause.told.append((begun, self.go_on))
        self.pool = ThreadPoolExecutor(1, "server")
        self.result = self.pool.submit(tried, self.run)
        assert begun.wait(20)
        return self

    def __exit__(self, *error: object) -> None:
        self.go_on.set()
        self.answer = self.result.result(20)
        self.pool.shutdown()
        self.pause.told.clear()


def pausing() -> nn.Module:
    model = detector()
    model.neck.append(Pause())
    convpeft.inject(model, A, name="a")
    convpeft.inject(model, B, name="b")
    return scrambled(model).eval()


CHANGES = {
    "set_active": lambda model: convpeft.set_active(model, "a"),
    "using": lambda model: convpeft.using(model, "a").__enter__(),
    "disabled": lambda model: convpeft.disabled(model).__enter__(),
    "route": lambda model: convpeft.route(model, ["a", "b"]).__enter__(),
    "eject one": lambda model: convpeft.eject(model, "a"),
    "eject": convpeft.eject,
    "inject": lambda model: convpeft.inject(model, {"rules": [LORA]}, name="c"),
    "merge": lambda model: convpeft.merge(model, inplace=True, strict=False),
}


class TestChangesUnderAPass:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("part", [False, True], ids=["the model", "a part"])
    def test_are_refused_and_the_pass_gives_its_answer(self, change, part):
        model = pausing()
        feature = torch.randn(2, 8, 8, 8, dtype=torch.float64)
        run = (lambda: model.neck(feature)) if part else (lambda: model(X))
        with torch.no_grad():
            expected, before = run(), bits(model)
        with (
            InAPass(model, run) as other,
            pytest.raises(StateError, match=r"thread 'server_0' is running this Detector.*the model is unchanged"),
        ):
            CHANGES[change](model)
        assert torch.equal(other.answer, expected)
        assert same_bits(bits(model), before)
        assert convpeft.active_adapters(model) == ("b",)
        CHANGES[change](model)  # once the pass is over

    def test_loading_is_refused_too(self, tmp_path):
        model = pausing()
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors", name="a")
        with InAPass(model, lambda: model(X)), pytest.raises(StateError, match="is running this Detector"):
            convpeft.load_adapter(model, path, name="c")
        convpeft.load_adapter(model, path, name="c")
        assert convpeft.active_adapters(model) == ("c",)

    def test_a_first_inject(self):
        model = detector()
        model.neck.append(Pause())
        expected, before = model(X), bits(model)
        with InAPass(model, lambda: model(X)) as other, pytest.raises(StateError, match="is running this Detector"):
            convpeft.inject(model, A)
        assert torch.equal(other.answer, expected)
        assert same_bits(bits(model), before)

    def test_what_changes_nothing_is_allowed(self, tmp_path):
        model = pausing()
        with InAPass(model, lambda: model(X)):
            assert convpeft.active_adapters(model) == ("b",)
            convpeft.save_adapter(model, tmp_path / "a.safetensors", name="a")
            assert torch.isfinite(model.eval().stem(X)).all()
        convpeft.set_active(model, "a")

    def test_a_pass_of_a_wrapper_counts(self):
        model = pausing()
        wrapper = nn.Sequential(model)
        with InAPass(model, lambda: wrapper(X)), pytest.raises(StateError, match="is running this Detector"):
            convpeft.set_active(wrapper, "a")

    def test_a_pass_of_another_model_does_not(self):
        model, other = pausing(), pausing()
        with InAPass(other, lambda: other(X)):
            convpeft.set_active(model, "a")
        assert convpeft.active_adapters(model) == ("a",)

    def test_a_thread_that_waits_for_jobs_does_not(self):
        class Server(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.jobs = nn.Conv2d(3, 4, 1).double(), queue.Queue()

            def serve(self) -> None:
                while self.jobs.get() is not None:
                    pass

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x)

        model = Server()
        thread = threading.Thread(target=model.serve)
        thread.start()
        try:
            convpeft.inject(model, {"rules": [{"match": "conv", "kind": "lora", "rank": 2}]})
            convpeft.set_active(model, None)
        finally:
            model.jobs.put(None)
            thread.join(20)
        assert not thread.is_alive()


class TestBlocks:
    @pytest.mark.parametrize(
        ("block", "text"),
        [
            (lambda model: convpeft.using(model, "a"), r"is inside convpeft\.using\(\.\.\.\) or convpeft\.disabled"),
            (convpeft.disabled, r"is inside convpeft\.using"),
            (lambda model: convpeft.route(model, ["a", "b"]), r"is inside convpeft\.route"),
        ],
        ids=["using", "disabled", "route"],
    )
    def test_belong_to_their_thread(self, block, text):
        model = model_of_two()
        before, expected = bits(model), answers(model)
        with torch.no_grad(), ThreadPoolExecutor(1, "other") as pool, block(model):
            inside = model(X)
            for call in (lambda: model(X), *(lambda each=each: each(model) for each in CHANGES.values())):
                with pytest.raises(StateError, match=f"thread 'MainThread' {text}.*"):
                    pool.submit(call).result(20)
            assert torch.equal(model(X), inside)
        assert same_bits(bits(model), before)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(tried, lambda: model(X)).result(20), expected["b"])

    @pytest.mark.parametrize("threads", [2, 8])
    def test_many_threads_inside_one_route(self, threads):
        model = detector()
        plain = bits(model)
        convpeft.inject(model, A, name="a")
        convpeft.inject(model, B, name="b")
        scrambled(model).eval()
        expected = answers(model)
        wanted = torch.cat([expected["a"][:1], expected["b"][1:]])
        with torch.no_grad(), ThreadPoolExecutor(threads) as pool, convpeft.route(model, ["a", "b"]):
            others = [pool.submit(tried, lambda: model(X)) for _ in range(20)]
            mine = [model(X) for _ in range(20)]
            texts = [other.result(20) for other in others]
        assert all(torch.allclose(answer, wanted, atol=1e-12) for answer in mine)
        assert all("is inside convpeft.route(...), and this" in text for text in texts)
        convpeft.eject(model)
        assert same_bits(bits(model), plain)

    def test_every_thread_its_own_block(self):
        """Each answer is that of the adapter asked for, or a refusal; some are answered, and nothing is lost."""
        model = model_of_two()
        before, expected = bits(model), answers(model)

        def ask(number: int) -> tuple:
            name = NAMES[number % 3]

            def answer() -> Tensor:
                with convpeft.using(model, name):
                    return model(X)

            return name, tried(answer)

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, range(160)))
        wrong = [
            name for name, answer in found if isinstance(answer, Tensor) and not torch.equal(answer, expected[name])
        ]
        assert not wrong
        assert any(isinstance(answer, Tensor) for _, answer in found)
        assert same_bits(bits(model), before)
        assert convpeft.active_adapters(model) == ("b",)

    def test_a_block_in_a_thread_that_has_ended_is_over(self):
        model = model_of_two()
        held = []

        def enter() -> None:
            held.append(convpeft.using(model, "a"))
            held[0].__enter__()

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert torch.isfinite(model(X)).all()
        held[0].__exit__(None, None, None)
        assert convpeft.active_adapters(model) == ("b",)


class TestServing:
    def test_passes_side_by_side_are_all_right(self):
        model = model_of_two()
        for name, expected in answers(model).items():
            convpeft.set_active(model, name)
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda _: tried(lambda: model(X)), range(40)))
            assert all(torch.equal(answer, expected) for answer in found)

    def test_switching_while_others_run(self):
        """Every answer belongs to one adapter, whoever is refused."""
        model = model_of_two()
        before, expected = bits(model), answers(model)
        stop = threading.Event()

        def ask() -> list:
            found = []
            while not stop.is_set():
                found.append(tried(lambda: model(X)))
            return found

        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(ask) for _ in range(2)]
            for number in range(300):
                refused = tried(partial(convpeft.set_active, model, NAMES[number % 3]))
                assert refused is None or "is running this Detector" in str(refused)
            stop.set()
            found = [answer for each in asked for answer in each.result(20)]
        given = [answer for answer in found if isinstance(answer, Tensor)]
        assert given
        assert all(any(torch.equal(answer, each) for each in expected.values()) for answer in given)
        convpeft.set_active(model, "b")
        assert same_bits(bits(model), before)


class TestHelpers:
    """Threads that torch itself starts for a pass belong to the thread of the pass."""

    def test_replicas_of_data_parallel_run_inside_a_block(self):
        model = model_of_two()
        expected = answers(model)["a"]
        with torch.no_grad(), convpeft.using(model, "a"), ThreadPoolExecutor(1) as pool:
            replica = replica_of(model)
            assert torch.equal(pool.submit(tried, lambda: replica(X)).result(20), expected)

    def test_a_layer_run_anew_by_autograd(self):
        """Autograd's threads are simulated by a backward pass in another thread: on a CPU it starts none."""
        model = model_of_two().train()
        expected = []
        for recompute in (False, True):
            model.zero_grad()
            with convpeft.using(model, "a"), ThreadPoolExecutor(1) as pool:
                convpeft.set_active(model, "a")
                x = X.clone().requires_grad_()
                y = checkpoint(model.stem, x, use_reentrant=False) if recompute else model.stem(x)
                loss = model.score(model.box(model.neck(model.body[1](model.body[0](y)))).mean((2, 3))).square().sum()
                pool.submit(loss.backward).result(20)
            expected.append(x.grad)
        assert torch.equal(*expected)


def replica_of(model: nn.Module) -> nn.Module:
    """Return a replica as ``nn.DataParallel`` makes it, with the very tensors."""
    made = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
    for module in model.modules():
        replica = made[id(module)]
        replica._modules = {name: made[id(child)] for name, child in module._modules.items()}
        replica._parameters, replica._buffers = dict(module._parameters), dict(module._buffers)
    return made[id(model)]

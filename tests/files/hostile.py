"""Hostile adapter files, drawn from a seed, and what loading each of them does; run in a process with limits.

``python -m tests.files.hostile COUNT SEED`` writes one JSON line: how many were refused and loaded, and what was wrong.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import convpeft
from convpeft.files.fingerprints import digest
from convpeft.files.reading import DTYPES
from tests.adapter_files import SPEC, base, bits, condition, parts, picture, put_together, trained
from tests.cases import same_bits

MOST_SECONDS, MOST_MEGABYTES, MOST_TEXT = 2.0, 64, 20_000
SECONDS = "s of processor time"
VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 1024, 65_536, 10**9, 2**31, 2**63, 10**40, 10**399, 0.5, -2.5, 1e38, 1e308,
    float("nan"), float("inf"), "", "x", "../../etc/passwd", "http://127.0.0.1:9/x", "os", "lora", "peft:hra", "a" * 3000,
    [], {}, [[]], [3, 5], [1] * 3000, [3] * 60_000, [2**40], {"a": 1}, [[[[[[[1]]]]]]], {"x": {"x": {"x": {}}}},
]  # fmt: skip
METHODS = [
    "shadow", "hra", "peanut", "poly", "xlora", "lora", "oft", "boft", "vera", "loha", "lokr", "adamss", "nothing",
    "fourierft", "gralora", "ia3", "hira", "randlora", "shira", "waveft", "../x", "",
]  # fmt: skip
OPTIONS = [
    "r", "alpha", "depth", "n_frequency", "boft_block_size", "boft_n_butterfly_factor", "shadow_model", "n_skills",
    "megatron_core", "act_fn", "num_cayley_neumann_terms", "init_weights", "init_lora_weights", "target_modules",
]  # fmt: skip


class Taken:
    """A file taken apart: header, metadata, and bytes of its tensors."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        self.header, self.metadata, self.data = parts(path)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {}
        for key, entry in self.header.items():
            begin, end = entry["data_offsets"]
            content = torch.frombuffer(bytearray(self.data[begin:end]), dtype=DTYPES[entry["dtype"]])
            found[key] = content.reshape(entry["shape"])
        return found


def written(path: Path, tensors: dict[str, torch.Tensor], metadata: Any) -> Path:
    """Write a file with other tensors, every digest right."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data = {}, b""
    for key, tensor in tensors.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[key] = {**entry, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    if isinstance(metadata, dict):
        metadata = {**metadata, "content": digest(sorted(tensors.items()))}
    return put_together(path, header, metadata, data)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places_of(item, (*path, key)))]


def put(data: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        data = data[key]
    data[place[-1]] = value[:] if isinstance(value, list) and len(value) > 9 else copy.deepcopy(value)


def bytes_changed(draw: random.Random, taken: Taken, path: Path) -> str:
    raw = bytearray(taken.raw)
    for _ in range(draw.randint(1, 4)):
        at = draw.choice([draw.randrange(len(raw)), draw.randrange(8), draw.randrange(8, 600)])
        what = draw.randrange(4)
        if what == 0:
            raw[at] = draw.randrange(256)
        elif what == 1:
            del raw[at : at + draw.randint(1, 50)]
        elif what == 2:
            raw[at:at] = draw.randbytes(draw.randint(1, 50))
        else:
            raw[at : at + 40] = raw[draw.randrange(len(raw)) :][:40]
    path.write_bytes(raw)
    return "bytes"


def header_changed(draw: random.Random, taken: Taken, path: Path) -> str:
    header = copy.deepcopy(taken.header)
    place = draw.choice([place for place in places_of(header) if place])
    value = draw.choice([*VALUES, "F16", "F64", "F8_E4M3", "I64", [2, 2], [-1, 3], [0, 10**12], [2**63, 0]])
    put(header, place, value)
    put_together(path, header, taken.metadata, taken.data)
    return f"header {place} = {str(value)[:40]}"


def metadata_changed(draw: random.Random, taken: Taken, path: Path) -> str:
    metadata, said = copy.deepcopy(taken.metadata), []
    for _ in range(draw.randint(1, 2)):
        place, value = draw.choice([place for place in places_of(metadata) if place]), draw.choice(VALUES)
        put(metadata, place, value)
        said.append(f"{place} = {str(value)[:40]}")
    put_together(path, taken.header, metadata, taken.data)
    return f"metadata {said}"


def tensor_changed(draw: random.Random, taken: Taken, path: Path) -> str:
    tensors = taken.tensors()
    key = draw.choice(list(tensors))
    how = draw.randrange(4)
    if how == 0:
        tensors[key] = tensors[key].to(draw.choice(list(DTYPES.values())))
    elif how == 1:
        tensors[key] = torch.zeros(draw.choice([(0,), (70_000,), (1, 1, 1, 1), (), (3, 0, 5)]))
    elif how == 2:
        tensors[key] = tensors[key].flatten()
    else:
        tensors[f"adapter:{draw.choice(['stem', 'body', 'x'])}:{draw.choice(['down', 'layer.hra_u.default'])}"] = (
            torch.ones(9)
        )
    written(path, tensors, taken.metadata)
    return f"tensor {key} {how}"


def kind_changed(draw: random.Random, taken: Taken, path: Path) -> str:
    metadata, tensors = copy.deepcopy(taken.metadata), taken.tensors()
    layer = draw.choice(list(metadata["layers"]))
    kind = f"peft:{draw.choice(METHODS)}"
    options = {draw.choice(OPTIONS): draw.choice(VALUES) for _ in range(draw.randint(0, 2))}
    metadata["layers"][layer].update(kind=kind, options=copy.deepcopy(options))
    if draw.random() < 0.5:
        metadata["spec"]["rules"][0] = {"match": "**", "kind": kind, **options}
    if draw.random() < 0.5:
        tensors[f"adapter:{layer}:layer.{draw.choice(METHODS)}_u.default"] = torch.zeros(draw.choice([8, 70_000]))
    written(path, tensors, metadata)
    return f"kind {layer} {kind} {str(options)[:80]}"


def texts_grown(draw: random.Random, taken: Taken, path: Path) -> str:
    metadata, how = copy.deepcopy(taken.metadata), draw.randrange(6)
    if how == 0:
        metadata["spec"]["rules"][0]["match"] = draw.choice(["**." * 900 + "z", "*a" * 4000, "{a,b}" * 300, "{" * 4000])
    elif how == 1:
        metadata["spec"]["rules"] = metadata["spec"]["rules"] * 4000
    elif how == 2:
        metadata["base"]["layers"].update({f"layer{n}": "0" * 32 for n in range(20_000)})
    elif how == 3:
        metadata["layers"].update({f"stem{n}": metadata["layers"]["stem"] for n in range(400)})
    elif how == 4:
        metadata["owned"].update({f"n{n}": 1.0 for n in range(30_000)})
    else:
        text = draw.choice(["[" * 900_000, '{"a":' * 90_000, "[[],[]," * 900_000, '"' + "é" * 3_000_000, "1" * 900_000])
        header = f'{{"__metadata__":{{"convpeft":{text}'.encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + taken.data)
        return "texts header"
    put_together(path, taken.header, metadata, taken.data)
    return f"texts {how}"


CHANGES = [bytes_changed, header_changed, metadata_changed, metadata_changed, tensor_changed, kind_changed, texts_grown]
WEIGHTS = [3, 3, 5, 5, 3, 5, 0.5]
WATCHED: list[str] = []
WATCHING = [False]


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what a load has no business with."""
    if WATCHING[0] and event.startswith(
        ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "pickle.")
    ):
        WATCHED.append(f"{event} {arguments}"[:200])
    elif WATCHING[0] and event == "open" and not isinstance(arguments[0], int):
        name = str(arguments[0])
        if not name.startswith(("/proc/", "/sys/")) and not name.endswith((".safetensors", ".py", ".pyc", "None")):
            WATCHED.append(f"open {name}"[:200])


def tried(model: torch.nn.Module, path: Path, picture: torch.Tensor) -> tuple[str, str]:
    """Return ``("refused" or "loaded", what is wrong or nothing)`` for one file."""
    started, WATCHED[:] = time.process_time(), []
    WATCHING[0] = True
    try:
        convpeft.load_adapter(model, path)
    except convpeft.ConvPeftError as error:
        outcome, wrong = "refused", "" if len(str(error)) < MOST_TEXT else f"a text of {len(str(error)):,}"
    except Exception as error:
        return "refused", f"{type(error).__name__}: {error}"[:300]
    else:
        outcome, wrong = "loaded", ""
    finally:
        WATCHING[0] = False
    seconds = time.process_time() - started
    if seconds > MOST_SECONDS:
        wrong = f"{seconds:.1f} {SECONDS}"
    if WATCHED:
        wrong = WATCHED[0]
    if outcome == "loaded":
        try:
            model(picture)
        except convpeft.ConvPeftError:  # which entry of an output there is shows when the model runs
            pass
        except Exception as error:
            wrong = f"forward: {type(error).__name__}: {error}"[:300]
        convpeft.eject(model)
    return outcome, wrong


def run(count: int, seed: int) -> dict[str, Any]:
    """Return what loading so many files does."""
    draw, folder = random.Random(seed), Path(tempfile.mkdtemp())
    taken = Taken(convpeft.save_adapter(trained(base()), folder / "screw.safetensors"))
    peft = {"rules": [*SPEC["rules"][:3], {"match": "proj", "kind": "peft:hra", "r": 2}]}
    other = Taken(convpeft.save_adapter(trained(base(), peft), folder / "peft.safetensors"))
    model, x, path = base(), picture(), folder / "a.safetensors"
    convpeft.load_adapter(model, folder / "peft.safetensors")  # imports peft
    convpeft.eject(model)
    before, plain, found, wrong = condition(model), bits(model), {"refused": 0, "loaded": 0}, []
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.addaudithook(watch)
    for number in range(count):
        change = draw.choices(CHANGES, WEIGHTS)[0]
        said = change(draw, draw.choice([taken, taken, other]), path)
        memory = max(memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # what making the file took
        outcome, problem = tried(model, path, x)
        for _ in range(2):  # a neighbour on the machine takes time too, what hangs does so again
            if problem.endswith(SECONDS):
                outcome, problem = tried(model, path, x)
        found[outcome] += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        problem = problem or (f"{grown:.0f} MB" if grown > MOST_MEGABYTES else "")
        if not problem and not same_bits(plain, bits(model)):
            problem = "the model is another"
        if problem:
            wrong.append(f"{number}: {said}: {problem}")
    if condition(model) != before:
        wrong.append("the model is not as it was")
    return {**found, "wrong": wrong}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))

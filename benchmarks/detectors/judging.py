"""Take convpeft, peft and LyCORIS through the same steps on each family, and tell who fails where and why."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .peers import LycorisLora, PeftLora
from .steps import STEPS, Bench, Convpeft, Library, built, every_layer

Step = Callable[[Bench], None]


def convpeft_for(step: Step) -> Library:
    """Return convpeft, for any step."""
    return Convpeft()


def peft_for(step: Step) -> Library:
    """Return peft: on every layer where that is the question, else on those it can adapt."""
    return PeftLora(all_layers=step is every_layer)


def lycoris_for(step: Step) -> Library:
    """Return LyCORIS: on every layer where that is the question, else on those it can adapt."""
    return LycorisLora(all_layers=step is every_layer)


LIBRARIES: dict[str, Callable[[Step], Library]] = {
    "convpeft": convpeft_for,
    "peft": peft_for,
    "LyCORIS": lycoris_for,
}


def judge(name: str, library: str, step: Step) -> str | None:
    """Return None where a library passes a step on a family, else why it does not, in one line."""
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            step(Bench(name, LIBRARIES[library](step), Path(folder)))
    except Exception as error:  # another library may raise anything; that is the result
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return None


Results = dict[tuple[str, str, str], str | None]


def run(names: Sequence[str]) -> Results:
    """Return what each library came to, by library, family and step."""
    results: Results = {}
    jobs = [(library, name, step) for name in names for library in LIBRARIES for step in STEPS]
    for library, name, step in tqdm(jobs, desc="steps"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[library, name, step] = judge(name, library, STEPS[step])
        if (library, step) == (list(LIBRARIES)[-1], list(STEPS)[-1]):
            built.cache_clear()
    return results

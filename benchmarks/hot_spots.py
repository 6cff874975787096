"""Find where a training step's time goes, and what stands in the way of a shorter one.

torch's profiler over full fine-tuning and adapters in turn; each operation's own time, in groups, medians over rounds.
Profiling lengthens small operations, so compare shares, and take times from the other scripts. Example:
``python -m benchmarks.hot_spots --scale s --images 4 --size 256``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from .commands import add_batch_options, add_model_options, finish, parsed, parser, setting_of
from .reports import Grid, ratio, shown
from .runner import Case
from .training_step import FULL, LORA, NECK, PEER, REP_MONA, choices
from .worlds import another, base_model, batch_of, title_of, training_case

GROUPS: dict[str, tuple[str, ...]] = {  # the first that is part of an operation's name takes it
    "convolutions, backward": ("convolution_backward", "conv2d_backward", "conv_depthwise2d_backward"),
    "convolutions, forward": ("mkldnn_convolution", "cudnn_convolution", "conv2d_forward", "_conv_depthwise2d"),
    "norms": ("batch_norm", "layer_norm", "group_norm"),
    "activations": ("silu", "sigmoid", "gelu", "softmax"),
    "matrix products": ("aten::mm", "bmm", "addmm"),
    "copies": ("aten::copy_", "aten::fill_", "aten::cat", "aten::zero_", "aten::clone"),
}
REST, TOTAL = "everything else", "step, profiled"


def group_of(operation: str) -> str:
    """Return the group of an operation by its name."""
    return next((group for group, parts in GROUPS.items() if any(part in operation for part in parts)), REST)


def spent(case: Case, device: str) -> dict[str, float]:
    """Return the seconds of one step by group; everything else is what no group explains of the step's duration."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    started = time.perf_counter()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        case.step()
        if device == "cuda":
            torch.cuda.synchronize()
        total = time.perf_counter() - started
    seconds = dict.fromkeys([*GROUPS, REST], 0.0)
    operations = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    for event in operations:  # kernels have lines of their own beside the operations that launch them
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        seconds[group_of(event.key)] += own / 1e6
    seconds[REST] = max(0.0, total - sum(seconds[group] for group in GROUPS))
    return {**seconds, TOTAL: total}


def grid(title: str, names: Sequence[str], rounds: list[list[dict[str, float]]]) -> Grid:
    """Return the table of medians: a row for each group, a column for each case, shares of the first one's step.

    Args:
        title: of the table.
        names: of the cases.
        rounds: what each case spent, by round.
    """
    middle = [
        {group: statistics.median(one[number][group] for one in rounds) for group in rounds[0][number]}
        for number in range(len(names))
    ]
    whole = middle[0][TOTAL]
    rows = [
        (group, *(f"{shown(own[group])} ({ratio(own[group] / whole)})" for own in middle))
        for group in (*GROUPS, REST, TOTAL)
    ]
    note = f"In brackets: relative to the whole step of {names[0]}."
    return Grid(title, ("own time of", *names), tuple(rows), (note,))


def main() -> None:
    """Measure and report."""
    made = parser(__doc__, rounds=5)
    add_model_options(made)
    add_batch_options(made, images=4, size=256)
    made.add_argument("--cases", nargs="+", default=[PEER, LORA, NECK, REP_MONA], choices=list(choices(True)))
    options = parsed(made)
    setting = setting_of(options)
    base, batch = base_model(options.scale, setting), batch_of(options.images, options.size, setting)
    cases = [training_case(FULL, another(base), batch, setting)]
    for name in options.cases:
        attached = choices(True)[name][1](another(base))
        cases.append(training_case(name, attached.model, batch, setting, attached.beside))
    rounds = []
    for number in tqdm(range(options.warm_up + options.rounds), desc="rounds", disable=None):
        found = [spent(case, options.device) for case in cases]
        if number >= options.warm_up:
            rounds.append(found)
    where = title_of(options.scale, options.images, options.size)
    finish("hot_spots", options, grids=[grid(f"Where a step's time goes, {where}", [c.name for c in cases], rounds)])


if __name__ == "__main__":
    main()

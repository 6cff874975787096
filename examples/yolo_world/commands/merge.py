"""Merge adapters into a plain checkpoint, and into ONNX if asked, and check what was written.

    python -m examples.yolo_world merge --adapter runs/screw/last.safetensors --out runs/screw/merged
    python -m examples.yolo_world merge --weights W --adapter A --names scratch dent --form single --onnx --out DIR

In ``--out``: ``merged.pt`` (a whole model that ``--weights`` and ultralytics take), ``merged.safetensors`` (its tensors,
without pickle), ``merge.json``, and ``merged.onnx`` for the classes asked for, at ``--image-size`` and batch 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import io
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from tqdm import tqdm

import convpeft
from convpeft.hosts.chains import carries_chains
from convpeft.integrations.ultralytics import fuse

from ..data.files import write_atomically
from ..training.model import copy_model, use_classes
from .options import check_options, command_parser
from .proofs import CheckError, check_merged, compare_outputs, example_images, is_plain, raw_output
from .report import readable_size, versions, write_json
from .session import CommandError, ask_classes, load_adapters, load_base, open_session, run_command


def write_model(model: nn.Module, folder: Path) -> list[Path]:
    """Write a plain detector as ``merged.pt``, in ultralytics' form, and its tensors as ``merged.safetensors``."""
    model = copy_model(model).cpu()
    content = io.BytesIO()
    torch.save({"model": model, "train_args": {}}, content)
    write_atomically(folder / "merged.pt", content.getvalue())
    tensors = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
    write_atomically(folder / "merged.safetensors", safetensors_bytes(tensors))
    return [folder / "merged.pt", folder / "merged.safetensors"]


def fused_for_export(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU with its norms fused into its convolutions, its head set to give boxes and scores only."""
    model = copy_model(model).cpu().eval()
    with contextlib.suppress(convpeft.HostError):  # a chain that cannot take a norm: the exporter keeps that norm
        fuse(model)
    head: Any = model.model[-1]
    head.export, head.format, head.dynamic = True, "onnx", False
    return model


def export_onnx(model: nn.Module, images: Tensor, path: Path) -> collections.Counter[str]:
    """Write a detector in eval mode as ONNX for inputs shaped like ``images``, and return its operators with their counts.

    The classes are those the model was told last (``use_classes``); their features are constants of the file.

    Raises:
        CommandError: if the packages for it are missing, or torch is too old.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise CommandError(f"--onnx needs {error.name}: pip install 'convpeft[commands]'.") from error
    if "optimize" not in inspect.signature(torch.onnx.export).parameters:
        raise CommandError(f"--onnx needs torch 2.6 or newer, and this is {torch.__version__}.")
    raw_output(model, images)  # the head lays out its grid for this size, which makes it a constant
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (images,), dynamo=True, optimize=True, verbose=False, input_names=["images"], output_names=["output"]
            )  # fmt: skip
    finally:
        logger.setLevel(level)
    unfinished = path.with_suffix(".part")
    program.save(unfinished)  # type: ignore[union-attr]
    unfinished.replace(path)
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """Return the output of an ONNX file in onnxruntime on the CPU.

    Raises:
        CommandError: if onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise CommandError("--onnx needs onnxruntime: pip install 'convpeft[commands]'.") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def check_operators(base: collections.Counter[str], merged: collections.Counter[str], *, chains: bool) -> str:
    """Return a sentence on the operators that the merged model has and the base has not.

    Args:
        base: operators of the base, with counts.
        merged: of the merged model.
        chains: whether the merge left chains of convolutions beside or after layers, which may add Conv and Add.

    Raises:
        CheckError: if the merged model has other operators than it may.
    """
    more, fewer = merged - base, base - merged
    if set(more) - ({"Conv", "Add"} if chains else set()) or fewer:
        said = ", ".join([f"{n} {op} more" for op, n in more.items()] + [f"{n} {op} fewer" for op, n in fewer.items()])
        raise CheckError(
            f"the merged model's operators are not the base's: {said}. The merge left "
            f"{'chains, which allow more Conv and Add' if chains else 'no chains, so there must be no difference'}."
        )
    if not more:
        return f"the same {sum(base.values())} operators as the base"
    return (
        f"the base's {sum(base.values())} operators and {', '.join(f'{n} {op}' for op, n in sorted(more.items()))} more"
    )


def has_chains(model: nn.Module) -> bool:
    """Return whether a merge left chains of convolutions in the model."""
    return any(carries_chains(module) for module in model.modules())


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = command_parser(
        "merge",
        "Merge adapters into plain layers; write a checkpoint, and ONNX, and check both.",
        model=("adapter", "names"),
        out=Path("runs/merge"),
    )
    add = parser.add_argument_group("merge").add_argument
    add("--form", choices=("auto", "single", "factored"), default="auto",
        help="auto takes what costs less, single leaves every layer one kernel (default auto)")  # fmt: skip
    add("--partial", action="store_true", help="merge what merges and leave the rest adapted, instead of refusing")
    add("--onnx", action="store_true", help="write merged.onnx too, and compare it in onnxruntime")
    add("--tolerance", type=float, default=1e-4,
        help="largest difference of the ONNX file's scores, and of its boxes as shares of the image (default 1e-4)")  # fmt: skip
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; exits with a message if one is missing or out of range."""
    parser = make_parser()
    args = check_options(parser, parser.parse_args(arguments))
    if not args.adapter:
        parser.error("--adapter says which files to merge; several are merged as their sum")
    if not 0 <= args.tolerance < math.inf:
        parser.error("--tolerance must not be negative")
    return args


def write_onnx(args: argparse.Namespace, bare: nn.Module, merged: nn.Module, bar: Any) -> dict[str, Any]:
    """Write and check ``merged.onnx`` and return what was found; ``bare`` is the base with the same classes.

    Raises:
        CheckError: if its output or its operators are not what they must be.
    """
    images, path = example_images(args.image_size), args.out / "merged.onnx"
    exported = fused_for_export(merged)
    expected = raw_output(copy_model(merged).cpu(), images)
    bar.set_description("export to ONNX")
    operators = export_onnx(exported, images, path)
    bar.update()
    found = compare_outputs(expected, run_onnx(path, images))
    bar.set_description("export the base, to compare")
    spare = path.with_name(".base.onnx")
    base = export_onnx(fused_for_export(bare), images, spare)
    spare.unlink()
    bar.update()
    if not found.within(args.tolerance, args.image_size):
        raise CheckError(
            f"{path} differs from the merged model by {found.pixels:.2e} pixels and {found.scores:.2e} in the scores; --tolerance "
            f"{args.tolerance:g} allows {args.tolerance * args.image_size:.2e} and {args.tolerance:.2e}."
        )
    said = check_operators(base, operators, chains=has_chains(merged))
    return {"difference": found, "operators": operators, "base_operators": base, "summary": said, "file": path}


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return what ``merge.json`` holds."""
    session = open_session(args)
    classes, features = ask_classes(args, session)
    model = load_base(args, features, session).model
    bare = copy_model(model)
    names = load_adapters(model, args.adapter)
    convpeft.set_active(model, names)
    for each in (bare, model):
        use_classes(each, features.of(classes)).eval()
    bar = tqdm(total=5 if args.onnx else 3, desc="plan", unit="stage", leave=False)
    plan = convpeft.plan_merge(model, form=args.form)
    session.say(f"{plan}")
    bar.update()
    bar.set_description("merge")
    merged = convpeft.merge(model, form=args.form, strict=not args.partial)
    bar.update()
    bar.set_description("check in float64")
    images = example_images(args.image_size).to(session.accelerator.device)
    relative = check_merged(model, args.form, images, strict=not args.partial)
    bar.update()
    files = write_model(merged, args.out)
    results: dict[str, Any] = {"rows": plan.rows, "plain": is_plain(merged), "float64": relative, "classes": classes,
                               "options": vars(args), "versions": versions()}  # fmt: skip
    if args.onnx:
        results["onnx"] = write_onnx(args, bare, merged, bar)
    bar.close()
    write_json(args.out / "merge.json", results)
    say_results(session.say, results, files, relative)
    return results


def say_results(say: Any, results: dict[str, Any], files: Sequence[Path], relative: float) -> None:
    """Print what was written and what the checks found."""
    plain = "plain layers only" if results["plain"] else "some layers stay adapted: loading it needs convpeft"
    sizes = ", ".join(f"{path} ({readable_size(path.stat().st_size)})" for path in files)
    say(f"merged: {plain}; {relative:.1e} from the adapted model in float64, relative; {sizes}")
    if "onnx" in results:
        found = results["onnx"]
        difference = found["difference"]
        say(
            f"{found['file']} ({readable_size(found['file'].stat().st_size)}): {found['summary']}; largest difference in onnxruntime "
            f"{difference.pixels:.1e} pixels, {difference.scores:.1e} in the scores"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status: 0, or 2 if something was refused or a check failed."""
    return run_command(parse(arguments), execute)

"""Files whose tensors do not fit are refused by name."""

from __future__ import annotations

import json
import struct

import torch
from safetensors.torch import load_file, save_file

from tests.adapter_files import assert_refused, parts, put_together


def test_tensors_that_are_missing_extra_or_of_another_shape_or_dtype_are_refused(original, tmp_path):
    tensors, metadata, path = load_file(original), parts(original)[1], tmp_path / "a.safetensors"

    def written(changed):
        save_file(changed, path)
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        return put_together(path, json.loads(raw[8 : 8 + length]), metadata, raw[8 + length :])

    key = "adapter:stem:down"
    rest = {name: tensor for name, tensor in tensors.items() if name != key}
    assert_refused(written(rest), f"1 tensors do not fit.*{key} is missing")
    assert_refused(written({**tensors, "more": torch.zeros(2)}), "more is not expected")
    assert_refused(written({**rest, key: tensors[key].flatten()}), rf"{key} is \(6,\) in the file, \(2, 3, 1, 1\) here")
    assert_refused(written({**rest, key: tensors[key].long()}), f"{key} has dtype I64 in the file, float32 here")
    counter = "own:norm:num_batches_tracked"
    assert_refused(written({**tensors, counter: torch.tensor(7.0)}), f"{counter} has dtype F32 in the file, int64 here")
    assert_refused(written({**rest, key: tensors[key].half()}), "its tensors are not the ones that were saved")
    swapped = {**tensors, key: tensors[key].flip(0).contiguous()}
    assert_refused(written(swapped), "its tensors are not the ones that were saved")

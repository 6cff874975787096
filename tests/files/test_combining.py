"""Several adapters in one file: the exact sum, or the nearest of a rank, with the error that is said."""

from __future__ import annotations

import pytest
import torch

import convpeft
from tests.files.test_file_merge import net, saved

LAYERS = ["stem", "reflect", "grouped", "up", "proj"]
LORA = {
    "rules": [
        {"match": LAYERS, "kind": "lora", "rank": 6},
        {"match": "block", "kind": "lora", "rank": 2, "place": "output"},
    ]
}
LINEAR = {"rules": [{"match": "stem", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3]}, {"match": "reflect", "kind": "lora", "rank": 2, "pointwise": True}]}  # fmt: skip
DOUBLE = torch.float64


def updates(path) -> dict[str, torch.Tensor]:
    """Return what a file's adapter adds to each weight, from ``merge`` of the loaded model."""
    model, plain = net(DOUBLE), net(DOUBLE).state_dict()
    convpeft.load_adapter(model, path)
    return {key: tensor - plain[key] for key, tensor in convpeft.merge(model).state_dict().items() if "num" not in key}


def two(folder, spec=LORA, other=LORA):
    return saved(net(DOUBLE), folder, "a", spec, 1), saved(net(DOUBLE), folder, "b", other, 2)


def norm(tensors) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


@pytest.mark.parametrize("other", [LORA, LINEAR], ids=["lora", "others"])
def test_linear_is_the_weighted_sum(tmp_path, other):
    files = two(tmp_path, LORA, other)
    done = convpeft.combine(files, [0.75, -2.0], out=tmp_path / "c.safetensors", name="both")
    first, second, found = (updates(path) for path in (*files, tmp_path / "c.safetensors"))
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, 0.75 * first[key] - 2 * second[key], rtol=1e-11, atol=1e-11)
    assert done.error < 1e-14
    said = convpeft.inspect_adapter(done.path)
    assert (said.name, {layer.kind for layer in said.layers.values()}) == ("both", {"lora"})
    assert done.ranks["grouped"] == (12 if other is LORA else 6)
    assert convpeft.plan(net(), said.spec).layers  # the spec in it makes the same layers


def test_unset_weights_are_the_mean(tmp_path):
    files = two(tmp_path)
    convpeft.combine(files, out=tmp_path / "c.safetensors")
    convpeft.combine(files, [0.5, 0.5], out=tmp_path / "d.safetensors")
    first, second = (updates(tmp_path / f"{name}.safetensors") for name in "cd")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_svd_is_the_nearest_of_its_rank_and_says_the_error(tmp_path):
    files = two(tmp_path)
    done = convpeft.combine(files, [1, 1], out=tmp_path / "c.safetensors", method="svd", rank=2)
    exact = {key: a + b for (key, a), b in zip(updates(files[0]).items(), updates(files[1]).values(), strict=True)}
    found = updates(done.path)
    for layer, weight in {"stem": "stem.weight", "reflect": "reflect.weight", "proj": "proj.weight"}.items():
        values = torch.linalg.svdvals(exact[weight].flatten(1))
        nearest = float(values[2:].norm() / values.norm())
        apart = norm([exact[weight] - found[weight]]) / norm([exact[weight]])
        assert apart == pytest.approx(nearest, rel=1e-9)
        assert done.errors[layer] == pytest.approx(nearest, rel=1e-9)
        assert done.ranks[layer] == 2
    groups = exact["grouped.weight"].reshape(2, 6, -1)
    nearest = torch.linalg.svdvals(groups)[:, 1:].norm() / groups.norm()
    assert done.errors["grouped"] == pytest.approx(float(nearest), rel=1e-9)
    assert 0.05 < done.error < 1
    assert f"{done.error:.3g}" in str(done)


def test_ties_keeps_what_agrees(tmp_path):
    files = two(tmp_path)
    convpeft.combine(files, [1, 3], out=tmp_path / "c.safetensors", method="ties", rank=99, density=0.25)
    first, second, found = (updates(path)["proj.weight"] for path in (*files, tmp_path / "c.safetensors"))
    for row in range(first.shape[0]):
        for column in range(first.shape[1]):
            entries = []
            for update, weight in ((first, 1), (second, 3)):
                largest = update.abs().flatten().sort(descending=True).values[round(update.numel() * 0.25) - 1]
                value = float(update[row, column])
                entries.append((value if abs(value) >= largest else 0.0, weight))
            vote = sum(value * weight for value, weight in entries)
            agreeing = [(value, weight) for value, weight in entries if value * vote > 0]
            mean = sum(v * w for v, w in agreeing) / sum(w for _, w in agreeing) if agreeing else 0.0
            assert float(found[row, column]) == pytest.approx(mean, abs=1e-12)


def test_dare_keeps_a_share_scaled_up_and_the_seed_decides(tmp_path):
    spec = {"rules": [{"match": "reflect", "kind": "lora", "rank": 6}]}
    files = two(tmp_path, spec, spec)

    def combined(seed, weights=(1, 0)):
        convpeft.combine(
            files, weights, out=tmp_path / "c.safetensors", method="dare", rank=99, density=0.25, seed=seed
        )
        return updates(tmp_path / "c.safetensors")["reflect.weight"]

    first, found = updates(files[0])["reflect.weight"], combined(0)
    ratio = found / first
    kept = ratio.abs() > 1e-6
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 4.0), rtol=1e-9, atol=0)
    assert 0.15 < float(kept.double().mean()) < 0.35
    assert torch.equal(found, combined(0))
    assert not torch.equal(found, combined(1))


def test_unfrozen_tensors_take_a_mean(tmp_path):
    spec = {"rules": [{"match": "stem", "kind": "lora", "rank": 2}], "unfreeze": ["head"], "norm": "adapt"}
    files = two(tmp_path, spec, spec)
    done = convpeft.combine(files, [0.25, 0.75], out=tmp_path / "c.safetensors")
    first, second, found = (updates(path) for path in (*files, done.path))
    for key in ("head.weight", "head.bias", "norm.weight"):
        torch.testing.assert_close(found[key], 0.25 * first[key] + 0.75 * second[key], rtol=1e-11, atol=1e-11)
    with pytest.raises(convpeft.AdapterConflict, match=r"only a mean can be taken.*add up to 1, not 2"):
        convpeft.combine(files, [1, 1], out=tmp_path / "d.safetensors")
    other = saved(net(DOUBLE), tmp_path, "other", LORA)
    with pytest.raises(
        convpeft.AdapterConflict, match=r"other.safetensors has norm frozen|has no tensor like|has norm"
    ):
        convpeft.combine([files[0], other], out=tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_what_is_no_kernel_of_its_layer_is_refused_and_named(tmp_path):
    rules = [
        {"match": "reflect", "kind": "lora", "rank": 2, "dora": True},
        {"match": "head", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3]},
        {"match": "block", "kind": "bottleneck", "reduction": 2},
        {"match": "stem", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3], "branch_norm": True},
    ]
    path = saved(net(), tmp_path, "a", {"rules": rules})
    with pytest.raises(convpeft.MergeError, match=r"layers cannot be combined; nothing was written") as caught:
        convpeft.combine([path], [1], out=tmp_path / "c.safetensors")
    reasons = caught.value.reasons
    assert "depends on the layer's weight" in reasons["reflect"]
    assert "kernel of (3, 3) does not fit into the layer's of (1, 1)" in reasons["head"]
    assert "GELU" in reasons["block"]
    assert "adds a bias" in reasons["stem"]
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "mean"}, "method must be one of linear, svd, ties, dare"),
        ({"method": "svd"}, "needs a rank of at least 1, not None"),
        ({"rank": 3}, "linear keeps everything"),
        ({"weights": [1]}, "1 weights for 2 adapter files"),
        ({"weights": [1, float("inf")]}, "not a finite number"),
        ({"method": "ties", "rank": 2, "weights": [1, -1]}, "weights must be positive"),
        ({"method": "dare", "rank": 2, "density": 0}, "density must be more than 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, match):
    with pytest.raises(convpeft.OptionError, match=match):
        convpeft.combine(two(tmp_path), options.pop("weights", None), out=tmp_path / "c.safetensors", **options)


def test_another_base_is_refused(tmp_path):
    path, other = saved(net(), tmp_path, "a", LORA), saved(net(seed=9), tmp_path, "b", LORA)
    with pytest.raises(convpeft.BaseMismatch, match="made on different bases") as caught:
        convpeft.combine([path, other], out=tmp_path / "c.safetensors")
    assert "stem" in caught.value.layers

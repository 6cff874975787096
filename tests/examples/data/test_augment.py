"""The example's augmentation: boxes follow the pixels, and the same place in the stream gives the same item."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchvision")
cv2 = pytest.importorskip("cv2")

from examples.yolo_world.data.augment import Augmentation, Strengths, add_augmentation_options, augmentation_of  # noqa: E402
from examples.yolo_world.data.images import Picture, PictureImages  # noqa: E402
from examples.yolo_world.training import stream  # noqa: E402

STILL = Strengths().times(0)
CENTRE = torch.tensor([[0.5, 0.5, 0.25, 0.125]])


def alone(**strengths: float) -> Augmentation:
    """Return an augmentation with only the given changes."""
    return Augmentation(dataclasses.replace(STILL, **strengths))


def bright(box: tuple[int, int, int, int], size: int = 64) -> torch.Tensor:
    image = torch.zeros(3, size, size)
    image[:, box[1] : box[3], box[0] : box[2]] = 1
    return image


def centred(box: tuple[int, int, int, int], size: int = 64) -> torch.Tensor:
    left, top, right, bottom = box
    return torch.tensor([[left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)]]) / (2 * size)


def corners(boxes: torch.Tensor, size: int = 64) -> torch.Tensor:
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1) * size


def bounds(image: torch.Tensor, least: float = 0.5) -> torch.Tensor:
    rows, columns = torch.where(image.mean(0) > least)
    return torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()


def test_no_strength_changes_nothing_bit_for_bit():
    image, boxes, labels = torch.rand(3, 32, 32), torch.tensor([[0.5, 0.5, 0.25, 0.5], [0.25, 0.25, 0.5, 0.5]]), torch.tensor([3, 1])  # fmt: skip
    found = Augmentation(STILL)(image, boxes, labels, 5)
    assert torch.equal(found[0], image)
    assert torch.equal(found[1], boxes)
    assert torch.equal(found[2], labels)


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ({"flip_x": 1.0}, lambda image: image.flip(2)),
        ({"flip_y": 1.0}, lambda image: image.flip(1)),
        ({"quarter_turn": 1.0}, lambda image: image.rot90(1, (1, 2))),
        ({"flip_x": 1.0, "flip_y": 1.0}, lambda image: image.flip(1, 2)),
    ],
)
def test_flips_and_turns_are_exact(strengths, expected):
    box = (10, 4, 30, 8)
    image = bright(box) * torch.rand(3, 64, 64).clamp(min=0.6)
    found, boxes, labels = alone(**strengths)(image, centred(box), torch.tensor([2]), 1)
    assert torch.equal(found, expected(image))
    torch.testing.assert_close(corners(boxes), bounds(found, 0.3))
    assert labels.tolist() == [2]


@settings(max_examples=60, deadline=None)
@given(key=st.integers(0, 2**63 - 1), left=st.integers(18, 34), top=st.integers(18, 34))
def test_an_affine_map_moves_the_box_with_the_pixels(key, left, top):
    box = (left, top, left + 12, top + 9)
    moved = alone(flip_x=0.5, flip_y=0.5, quarter_turn=0.5, translate=0.1, scale=0.3)
    image, boxes, _ = moved(bright(box), centred(box), torch.tensor([0]), key)
    assert (corners(boxes) - bounds(image)).abs().max() <= 1  # the edge of a bilinear image is known to the pixel


@settings(max_examples=60, deadline=None)
@given(key=st.integers(0, 2**63 - 1))
def test_a_turned_or_sheared_box_holds_all_its_pixels(key):
    box = (20, 24, 40, 36)
    image, boxes, _ = alone(degrees=30, shear=10, translate=0.05)(bright(box), centred(box), torch.tensor([0]), key)
    found, inside = corners(boxes)[0], bounds(image)[0]
    assert (found[:2] <= inside[:2] + 1).all()
    assert (found[2:] >= inside[2:] - 1).all()
    assert (found - inside).abs().max() <= 3  # a turned rectangle's corner tips are fainter than half


@settings(max_examples=100, deadline=None)
@given(key=st.integers(0, 2**63 - 1), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_a_box_is_kept_while_enough_of_it_is_inside(key, share, seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(6, 2, generator=generator) * 0.7
    sides = torch.rand(6, 2, generator=generator) * 0.2 + 0.1
    boxes, labels = torch.cat([places + sides / 2, sides], 1), torch.arange(6)
    shift = Augmentation(dataclasses.replace(STILL, translate=0.6, min_visible=share, min_side=0))
    whole, before, everything = dataclasses.replace(shift, strengths=dataclasses.replace(shift.strengths, min_visible=0))(torch.zeros(3, 50, 50), boxes, labels, key)  # fmt: skip
    image, kept, left = shift(torch.zeros(3, 50, 50), boxes, labels, key)
    # A pure shift keeps sizes, so what is visible is what is left of the area; boxes wholly outside are never kept.
    visible = before[:, 2:].prod(1) / boxes[everything, 2:].prod(1)
    assert torch.equal(left, everything[visible >= share]) or (visible - share).abs().min() < 1e-6
    assert torch.equal(kept, before[[i in left.tolist() for i in everything.tolist()]])
    assert ((corners(kept, 1) > -1e-6) & (corners(kept, 1) < 1 + 1e-6)).all()
    assert torch.equal(image, whole)


def test_a_box_that_leaves_the_image_goes_with_its_label():
    boxes = torch.tensor([[0.05, 0.5, 0.06, 0.2], [0.5, 0.5, 0.2, 0.2], [0.95, 0.5, 0.06, 0.2]])
    shift = alone(translate=0.4)
    outcomes = {
        tuple(shift(torch.zeros(3, 64, 64), boxes, torch.tensor([7, 8, 9]), key)[2].tolist()) for key in range(40)
    }
    assert outcomes >= {(7, 8), (8, 9)}
    assert all(8 in found for found in outcomes)


def test_a_small_box_that_is_not_cut_is_kept():
    tiny = torch.tensor([[0.5, 0.5, 1 / 64, 1 / 64]])
    assert len(alone(flip_x=1.0)(torch.zeros(3, 64, 64), tiny, torch.tensor([0]), 0)[1]) == 1
    cut = torch.tensor([[1.5 / 64, 0.5, 3 / 64, 0.5]])
    sides = {len(alone(translate=2 / 64, min_visible=0.0, min_side=2.5)(torch.zeros(3, 64, 64), cut, torch.tensor([0]), key)[1]) for key in range(30)}  # fmt: skip
    assert sides == {0, 1}


def test_colours_change_within_their_strength_and_boxes_do_not():
    grey = torch.full((3, 16, 16), 0.5)
    values = [float(alone(brightness=0.2)(grey, CENTRE, torch.tensor([0]), key)[0].mean()) for key in range(200)]
    assert 0.4 - 1e-6 <= min(values) < 0.41
    assert 0.59 < max(values) <= 0.6 + 1e-6
    for name, strength in (("contrast", 0.9), ("saturation", 0.9), ("hue", 0.4)):
        image = torch.rand(3, 16, 16)
        changed, boxes, _ = alone(**{name: strength})(image, CENTRE, torch.tensor([0]), 3)
        assert (changed - image).abs().max() > 0.01
        assert torch.equal(boxes, CENTRE)
        assert 0 <= changed.min() <= changed.max() <= 1


def test_new_ground_is_grey():
    image, _, _ = alone(scale=0.5)(torch.ones(3, 64, 64), CENTRE, torch.tensor([0]), next(k for k in range(50) if float(alone(scale=0.5)(torch.ones(3, 64, 64), CENTRE, torch.tensor([0]), k)[0].min()) < 0.9))  # fmt: skip
    torch.testing.assert_close(image[:, 0, 0], torch.full((3,), 114 / 255))


def test_no_boxes_are_no_problem():
    _, boxes, labels = Augmentation()(torch.rand(3, 32, 32), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 9)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


def test_the_key_alone_decides():
    image, labels = torch.rand(3, 48, 48), torch.tensor([0])
    strong = Augmentation(Strengths().times(2))
    first = strong(image, CENTRE, labels, 11)
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.get_rng_state()
    again = strong(image, CENTRE, labels, 11)
    assert all(map(torch.equal, first, again))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(strong(image, CENTRE, labels, 12)[0], first[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PictureImages:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    pictures = []
    for index in range(5):
        path = folder / f"{index}.png"
        cv2.imwrite(str(path), rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
        pictures.append(Picture(path, 60, 40, ((10, 10, 30, 20), (35, 5, 50, 30)), (index % 3, 1), "a"))
    return PictureImages(pictures, ("a", "b", "c"), size=32, augmentation=Augmentation())


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_stream_gives_the_same_item_at_a_place_whatever_came_before(data):
    whole = stream.Stream(data, seed=3)
    straight = [whole[position] for position in range(20)]
    torch.manual_seed(1234)
    killed_and_resumed = stream.Stream(data, seed=3)
    assert all(equal(killed_and_resumed[position], straight[position]) for position in reversed(range(9, 20)))
    other = stream.Stream(data, seed=4)
    assert not any(torch.equal(other[position]["img"], item["img"]) for position, item in enumerate(straight))
    same_image = [item["img"] for position, item in enumerate(straight) if whole.place(position)[1] == 0]
    assert len(same_image) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(same_image) for b in same_image[:i])


def test_workers_change_nothing_in_the_batches(data):
    texts = torch.zeros(1, 3, 512)
    alone_, helped = (
        list(stream.batches(data, texts, 7, stream.Positions(2, 6, 3), workers=workers)) for workers in (0, 2)
    )
    assert all(map(equal, alone_, helped))
    assert len(alone_) == 4


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"flip_x": 1.5}, "flip_x is 1.5, it must lie between 0 and 1"),
        ({"degrees": -1}, "degrees is -1, it must lie between 0 and 180"),
        ({"scale": 1.0}, "scale is 1, it must lie below 1"),
        ({"hue": float("nan")}, "hue is nan"),
        ({"hue": 0.6, "min_visible": 2}, "min_visible is 2.*hue is 0.6, it must lie between 0 and 0.5"),
    ],
)
def test_strengths_out_of_range_are_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        Strengths(**wrong)


def options(*arguments: str) -> Augmentation | None:
    parser = argparse.ArgumentParser()
    add_augmentation_options(parser)
    return augmentation_of(parser.parse_args(list(arguments)))


def test_the_options_say_how_strong():
    assert options() == Augmentation()
    assert options("--augment", "0") is None
    assert options("--augment", "0", "--augment-flip-x", "1") == alone(flip_x=1.0)
    assert options("--augment", "2", "--augment-degrees", "0").strengths == dataclasses.replace(Strengths().times(2), degrees=0.0)  # fmt: skip
    with pytest.raises(ValueError, match="--augment is -1"):
        options("--augment", "-1")
    with pytest.raises(ValueError, match="shear is 90"):
        options("--augment-shear", "90")

"""Open a data set, whatever its form: an MVTec AD folder, COCO JSON, or a folder of labelme JSON files.

    splits = open_dataset(Path("mvtec_ad/screw"), size=640, augmentation=Augmentation())
    splits = open_dataset(Path("coils/annotations.json"), size=640, classes=load_class_texts(Path("classes.json")))
    for line in splits.notes:
        print(line)

Both sides are ``DetectionImages``: images, boxes and class indices as training and evaluation take them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import coco, labelme, mvtec
from .images import MEMORY, Augment, DataError, DetectionImages, Picture, PictureImages
from .mvtec import DefectImages
from .texts import ClassTexts

SPLITS = ("auto", "given", "hash")
FORMS = (
    "an MVTec AD folder (a category with test/ and ground_truth/, or the folder that holds categories), a COCO JSON file or a "
    "folder with annotations/*.json for train and val, or a folder of labelme JSON files"
)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The two sides of a data set; they share no image.

    Attributes:
        train: images to learn from, augmented if that was asked for.
        test: images to test on, never augmented.
        texts: the classes in the order of the labels, with their synonyms.
        form: ``mvtec``, ``coco`` or ``labelme``.
        title: the categories' or the file's name.
        notes: sentences on what was dropped, cut, left out or not used; to be printed.
    """

    train: DetectionImages
    test: DetectionImages
    texts: ClassTexts
    form: str
    title: str
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels."""
        return self.texts.names


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What ``open_dataset`` was asked for; its arguments explain each."""

    path: Path
    size: int
    split: str
    seed: int
    train_share: float
    min_area: int
    classes: ClassTexts | None
    categories: tuple[str, ...]
    images: Path | None
    drop_others: bool
    augmentation: Augment | None
    good_limit: int
    memory: int


def is_category(path: Path) -> bool:
    """Return whether a folder is a category in MVTec AD's layout."""
    return (path / "test").is_dir() and ((path / "ground_truth").is_dir() or (path / "train" / "good").is_dir())


def labelme_sides(path: Path) -> dict[str, Path]:
    """Return a folder's subfolders with labelme files by side, or the folder itself as ``all``, or nothing."""
    if any(labelme.looks_like_labelme(coco.read_json(file)) for file in path.glob("*.json")):
        return {"all": path}
    found: dict[str, Path] = {}
    for side, names in coco.SIDE_NAMES.items():
        for name in names:
            if side not in found and any(map(labelme.looks_like_labelme, map(coco.read_json, (path / name).glob("*.json")))):  # fmt: skip
                found[side] = path / name
    return found


def recognise(path: Path) -> str:
    """Return the form of the data at ``path``: ``mvtec``, ``coco`` or ``labelme``.

    Raises:
        DataError: if there is nothing, or it is none of them.
    """
    if not path.exists():
        raise DataError(f"{path} is not there. The data must be {FORMS}.")
    if path.is_file():
        content = coco.read_json(path) if path.suffix.lower() == ".json" else None
        if labelme.looks_like_labelme(content):
            raise DataError(f"{path} is one labelme file; give the folder that holds them all, {path.parent}.")
        if content is None or not coco.looks_like_coco(content):
            raise DataError(f"{path} is no COCO JSON file. The data must be {FORMS}.")
        return "coco"
    if is_category(path) or any(is_category(folder) for folder in path.iterdir() if folder.is_dir()):
        return "mvtec"
    if coco.find_files(path, lambda file: coco.looks_like_coco(coco.read_json(file))):
        return "coco"
    if labelme_sides(path):
        return "labelme"
    raise DataError(f"{path} holds no data set that is known here. The data must be {FORMS}.")


def open_dataset(
    path: Path,
    *,
    size: int,
    split: str = "auto",
    seed: int = 0,
    train_share: float = 0.6,
    min_area: int = 25,
    classes: ClassTexts | None = None,
    categories: Sequence[str] = (),
    images: Path | None = None,
    drop_others: bool = False,
    augmentation: Augment | None = None,
    good_limit: int = 16,
    memory: int = MEMORY,
) -> Splits:
    """Return the training and the test side of a data set, its form recognised; everything that can be checked is.

    Args:
        path: folder or file in one of the forms.
        size: height and width the images are resized to, a multiple of 32; the aspect is not kept.
        split: ``given`` takes the data's own train and val (or valid, test) files or folders, ``hash`` cuts all images by a
            hash of seed and name, within each class; ``auto`` takes what is given, else the hash. MVTec AD has no split that a
            detector could learn from and is always cut by the hash.
        seed: of the split; another seed gives another one.
        train_share: part of the images that trains, where they are cut by the hash.
        min_area: smallest defect: pixels of a mask's part, or of a box, of the original image.
        classes: the classes in order, with synonyms; default: MVTec AD's defects or labelme's labels sorted, COCO's by id.
        categories: which categories of an MVTec AD folder, learned together; default: all.
        images: folder of a COCO file's images; default: looked for near the file.
        drop_others: leave out boxes of classes that are not in ``classes``, instead of refusing the data.
        augmentation: changes the training images.
        good_limit: at most so many of MVTec AD's ``train/good``, and of ``test/good``, per category.
        memory: bytes of pixels that each side keeps (COCO and labelme; MVTec AD's are all kept).

    Raises:
        DataError: if the data are none of the forms, or empty; an image is missing, unreadable or of another size than its
            boxes were drawn on; an id or label points to nothing; or train and test share an image.
    """
    if split not in SPLITS:
        raise DataError(f"split is {split!r}, it must be one of {', '.join(SPLITS)}.")
    if not 0 < train_share < 1:
        raise DataError(f"train_share is {train_share:g}, it must lie between 0 and 1.")
    wanted = Wanted(
        Path(path), size, split, seed, train_share, min_area, classes, tuple(categories), images, drop_others,
        augmentation, good_limit, memory,
    )  # fmt: skip
    form = recognise(wanted.path)
    if categories and form != "mvtec":
        raise DataError(f"{path} is {form} data, it has no categories to choose from (--categories).")
    if images is not None and form != "coco":
        raise DataError(f"{path} is {form} data, its images cannot lie elsewhere (--image-folder).")
    return {"mvtec": open_mvtec, "coco": open_coco, "labelme": open_labelme}[form](wanted)


def finish(wanted: Wanted, form: str, title: str, texts: ClassTexts, train: Any, test: Any, notes: Sequence[str]) -> Splits:  # fmt: skip
    """Return the splits with the notes that all forms share.

    Raises:
        DataError: if a side is empty.
    """
    lines = list(notes)
    for name, side in (("train", train), ("test", test)):
        if not len(side):
            raise DataError(f"{wanted.path}: no image is left for {name}; at least two are needed, one on each side.")
        if side.left_out:
            lines.append(f"{name}: {len(side.left_out)} images left out, since every box of theirs was dropped")
        counts = collections.Counter(label for labels in side.labels for label in labels.tolist())
        absent = [text for place, text in enumerate(texts.names) if not counts[place]]
        if absent:
            lines.append(f"{name}: no box of {', '.join(absent)}")
    return Splits(train, test, texts, form, title, tuple(lines))


def open_mvtec(wanted: Wanted) -> Splits:
    """Return the splits of one or more categories in MVTec AD's layout, learned together over all their classes."""
    path = wanted.path
    if is_category(path):
        root, names = path.absolute().parent, (path.absolute().name,)
        if wanted.categories and wanted.categories != names:
            raise DataError(
                f"{path} is the category {names[0]} itself, not the folder of {', '.join(wanted.categories)}."
            )
    else:
        root, names = path, wanted.categories or tuple(mvtec.list_categories(path))
    if wanted.split == "given":
        raise DataError(f"{path}: MVTec AD has no defects in its train folders, so there is no given split to take.")
    found = [
        mvtec.read_category(root, name, train_share=wanted.train_share, seed=wanted.seed, good_limit=wanted.good_limit)
        for name in names
    ]
    defects = sorted({label for category in found for label in category.classes})
    texts, places = coco.match_classes(defects, wanted.classes, str(path), drop_others=wanted.drop_others)
    notes = []
    for name in names:
        for side in ("train", "test"):
            there = len(mvtec.images_in(root / name / side / "good"))
            if there > wanted.good_limit:
                notes.append(f"{name}/{side}/good: {wanted.good_limit} of {there} images used")
    dropped = [
        s for category in found for s in (*category.train, *category.test) if s.defect and s.defect not in places
    ]
    if dropped:
        notes.append(f"{len(dropped)} images dropped, of classes that are not in the list")
    sides = [
        DefectImages(
            [s for category in found for s in getattr(category, side) if s.defect is None or s.defect in places],
            texts.names, size=wanted.size, min_area=wanted.min_area,
            augmentation=wanted.augmentation if side == "train" else None, label_of=places,
        )
        for side in ("train", "test")
    ]  # fmt: skip
    return finish(wanted, "mvtec", "+".join(names), texts, *sides, notes)


def open_coco(wanted: Wanted) -> Splits:
    """Return the splits of COCO files."""
    if wanted.path.is_file():
        files = {"all": wanted.path}
    else:
        files = coco.find_files(wanted.path, lambda file: coco.looks_like_coco(coco.read_json(file)))
    contents = {side: (path, coco.read_coco(path)) for side, path in files.items()}
    names = [name for _, content in contents.values() for name in coco.category_names(content)]
    texts = wanted.classes
    if texts is None:
        texts = coco.match_classes(names, None, "", drop_others=False)[0]
    return open_contents(wanted, "coco", contents, texts, wanted.images)


def open_labelme(wanted: Wanted) -> Splits:
    """Return the splits of labelme files, by way of COCO."""
    folders = labelme_sides(wanted.path)
    entries = {side: labelme.read_folder(folder) for side, folder in folders.items()}
    texts = wanted.classes
    if texts is None:
        labels = {shape["label"].strip() for side in entries.values() for entry in side for shape in entry.shapes}
        texts = ClassTexts(tuple((label,) for label in sorted(labels)))
    contents, notes = {}, []
    for side, folder in folders.items():
        done = labelme.convert(entries[side], folder, texts, drop_others=wanted.drop_others)
        contents[side] = (folder / "labelme", done.content)
        phrase = coco.describe_dropped(done.dropped)
        notes += [f"{folder.name}: {phrase}"] if phrase else []
        notes += [f"{folder.name}: left out, since every shape was dropped: {path.name}" for path in done.left_out]
        used = {entry.image.resolve() for entry in entries[side]}
        bare = [path for path in mvtec.images_in(folder) if path.resolve() not in used]
        notes += [f"{folder.name}: {len(bare)} images not used, since they have no JSON file"] if bare else []
    return open_contents(wanted, "labelme", contents, texts, None, notes)


def open_contents(
    wanted: Wanted, form: str, contents: dict[str, tuple[Path, dict[str, Any]]], texts: ClassTexts,
    images: Path | None, notes: Sequence[str] = (),
) -> Splits:  # fmt: skip
    """Return the splits of COCO dictionaries by side, or of one as ``all``, each with the file it came from."""
    lines = list(notes)
    sides: dict[str, coco.CocoSide] = {}
    for name, (path, content) in contents.items():
        _, places = coco.match_classes(coco.used_names(content), texts, str(path), drop_others=wanted.drop_others)
        folder = path.parent if form == "labelme" else images
        sides[name] = coco.read_side(path, content, texts, places, min_area=wanted.min_area, images=folder)
        phrase = coco.describe_dropped(sides[name].dropped)
        lines += [f"{path.name if form == 'coco' else path.parent.name}: {phrase}"] if phrase else []
    given = set(sides) == {"train", "test"}
    if wanted.split == "given" and not given:
        raise DataError(
            f"{wanted.path} has no files or folders for both train and val, so there is no given split to take."
        )
    if given:
        check_apart(sides["train"].pictures, sides["test"].pictures, wanted.path)
    if given and wanted.split != "hash":
        parts = [(side.pictures, side.left_out) for side in (sides["train"], sides["test"])]
    else:
        everything = [
            dataclasses.replace(picture, name=f"{name}/{picture.name}" if len(sides) > 1 else picture.name)
            for name, side in sides.items()
            for picture in side.pictures
        ]
        left_out = [picture for side in sides.values() for picture in side.left_out]
        train, test = coco.split_pictures(everything, wanted.train_share, wanted.seed)
        parts = [(tuple(train), tuple(left_out)), (tuple(test), ())]
    built = [
        PictureImages(
            pictures, texts.names, size=wanted.size, left_out=left_out, memory=wanted.memory,
            augmentation=wanted.augmentation if number == 0 else None,
        )
        for number, (pictures, left_out) in enumerate(parts)
    ]  # fmt: skip
    return finish(wanted, form, wanted.path.stem if wanted.path.is_file() else wanted.path.name, texts, *built, lines)


def check_apart(train: Sequence[Picture], test: Sequence[Picture], path: Path) -> None:
    """Check that the two sides share no image.

    Raises:
        DataError: naming how many they share.
    """
    shared = sorted({p.image.resolve() for p in train} & {p.image.resolve() for p in test})
    if shared:
        raise DataError(
            f"{path}: train and test share {len(shared)} images, {shared[0].name} for one; scores would mean nothing. "
            "Take them out of one side."
        )

"""The folders of FlyingChairs and MPI Sintel as they are unpacked: pairs of images and their flow.

Source: Dosovitskiy et al., "FlowNet", ICCV 2015; Butler et al., "A naturalistic open source movie
for optical flow evaluation", ECCV 2012.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from experiments.data.flow_files import Flow, read_flo, read_image
from experiments.data.images import Pixels

CHAIRS_SPLIT_FILE = "FlyingChairs_train_val.txt"
_SPLITS = {"train": "1", "validation": "2"}


class MissingFlowError(FileNotFoundError):
    """An optical flow data set is missing or incomplete."""


@dataclass(frozen=True)
class FlowFiles:
    """The three files of one example.

    Attributes:
      first: image.
      second: image, the next one in time.
      flow: from the first to the second.
    """

    first: Path
    second: Path
    flow: Path


class FlowPairs:
    """Examples by number, read from disk when asked for."""

    def __init__(self, files: list[FlowFiles]) -> None:
        """Holds the names."""
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Pixels, Pixels, Flow]:
        """Reads both images and the flow.

        Raises:
          ValueError: a file is damaged, or the three differ in size; the message names it.
        """
        names = self.files[index]
        first, second = read_image(names.first), read_image(names.second)
        flow = read_flo(names.flow)
        for name, read in ((names.second, second), (names.flow, flow)):
            if read.shape[:2] != first.shape[:2]:
                raise ValueError(
                    f"{name} is {read.shape[1]} x {read.shape[0]} pixels, but {names.first} is "
                    f"{first.shape[1]} x {first.shape[0]}"
                )
        return first, second, flow


def open_chairs(folder: Path, split: Literal["train", "validation"]) -> FlowPairs:
    """Opens FlyingChairs: `data/00001_img1.ppm`, `data/00001_img2.ppm`, `data/00001_flow.flo`, ...

    The official split is a text file with a line for each example, 1 for training and 2 for
    validation; it is in `folder` or in `folder/data`.

    Raises:
      MissingFlowError: folder, split or a file is missing; says what to get and where to put it.
      ValueError: the split has not one line for each example.
    """
    # Numbers have leading zeros, so sorted names are in the order of the split's lines.
    flows = sorted((folder / "data").glob("*_flow.flo"))
    if not flows:
        raise MissingFlowError(
            f"found no FlyingChairs in {folder}: no file matches data/*_flow.flo. Unpack "
            "FlyingChairs.zip (lmb.informatik.uni-freiburg.de) and give its folder FlyingChairs_"
            "release as --data-dir"
        )
    places = [folder / CHAIRS_SPLIT_FILE, folder / "data" / CHAIRS_SPLIT_FILE]
    found = [place for place in places if place.is_file()]
    if not found:
        raise MissingFlowError(
            f"{places[0]} is missing: download the official split from where FlyingChairs.zip is"
        )
    marks = found[0].read_text("utf-8").split()
    if len(marks) != len(flows):
        raise ValueError(f"{found[0]} has {len(marks)} lines, but there are {len(flows)} examples")
    chosen = [
        FlowFiles(_sibling(flow, "img1.ppm"), _sibling(flow, "img2.ppm"), flow)
        for flow, mark in zip(flows, marks, strict=True)
        if mark == _SPLITS[split]
    ]
    return FlowPairs(_all_there(chosen))


def open_sintel(folder: Path, rendering: Literal["clean", "final"]) -> FlowPairs:
    """Opens Sintel's training scenes: `training/clean/alley_1/frame_0001.png`, ...

    A scene of n frames makes n - 1 examples; `training/flow/alley_1/frame_0001.flo` is the flow
    from its first frame to its second.

    Raises:
      MissingFlowError: the folder or a file is missing; says which.
    """
    images = folder / "training" / rendering
    scenes = sorted(path for path in images.glob("*") if path.is_dir())
    if not scenes:
        raise MissingFlowError(
            f"found no Sintel in {folder}: there are no scenes in training/{rendering}. Unpack "
            "MPI-Sintel-complete.zip (sintel.is.tue.mpg.de) and give its folder as --data-dir"
        )
    chosen = []
    for scene in scenes:
        frames = sorted(scene.glob("*.png"))
        flows = folder / "training" / "flow" / scene.name
        chosen += [
            FlowFiles(first, second, flows / f"{first.stem}.flo")
            for first, second in pairwise(frames)
        ]
    return FlowPairs(_all_there(chosen))


def _sibling(flow: Path, ending: str) -> Path:
    return flow.with_name(flow.name.replace("flow.flo", ending))


# Checked for all examples at once, so that a gap shows before training and not hours into it.
def _all_there(files: list[FlowFiles]) -> list[FlowFiles]:
    for names in files:
        for path in (names.first, names.second, names.flow):
            if not path.is_file():
                raise MissingFlowError(f"{path} is missing: the data set is incomplete")
    return files

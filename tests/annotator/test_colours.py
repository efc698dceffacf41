"""Colours of labels and masks."""

import numpy as np

from annotator.segmentation.colours import (
    ADE20K,
    COCO,
    colour_labels,
    distinct_colours,
    palette_for,
)


def test_palettes_are_those_of_the_data_sets():
    assert ADE20K.shape == (150, 3) and COCO.shape == (133, 3)
    assert ADE20K[[0, 2, 12]].tolist() == [[120, 120, 120], [6, 230, 230], [150, 5, 61]]  # wall, sky, person
    assert COCO[[0, 2, 119]].tolist() == [[220, 20, 60], [0, 0, 142], [70, 130, 180]]  # person, car, sky
    assert COCO[-1].tolist() == [250, 141, 255]  # rug
    assert palette_for(150) is ADE20K and palette_for(133) is COCO and len(palette_for(19)) == 19


def test_labels_without_a_class_are_black():
    labels = np.array([[0, 132, 133], [-1, 255, 2]])
    coloured = colour_labels(labels, COCO)
    assert coloured.dtype == np.uint8
    assert coloured.tolist() == [[COCO[0].tolist(), COCO[132].tolist(), [0] * 3], [[0] * 3, [0] * 3, COCO[2].tolist()]]


def test_distinct_colours_differ_and_are_not_black():
    colours = distinct_colours(300).astype(int)
    assert (distinct_colours(5) == colours[:5]).all() and distinct_colours(0).shape == (0, 3)
    assert len(np.unique(colours, axis=0)) == 300 and colours.max(axis=1).min() > 100
    first = colours[:12]
    apart = np.abs(first[:, None] - first[None]).max(axis=2) + np.eye(12) * 255
    assert apart.min() >= 40

"""What DWPose's two networks take and give: people's boxes by YOLOX, and 133 points a person by RTMPose (SimCC).

Reading order: `letterbox` and `boxes_of_people`, `crop_person` and `points_of_person`, `poses`.
Z. Ge et al., "YOLOX", 2021; T. Jiang et al., "RTMPose", 2023; Z. Yang et al., "Effective Whole-body Pose Estimation
with Two-stages Distillation" (DWPose), ICCVW 2023.
"""

import cv2
import numpy as np

GREY = 114  # of the border that YOLOX was trained with
STRIDES = (8, 16, 32)
PERSON = 0  # its class in COCO
BOX_SCORE, BOX_OVERLAP = 0.3, 0.45
BOX_MARGIN = 1.25  # a crop's size over that of the box
SIMCC_RATIO = 2.0  # bins a pixel
MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)  # of ImageNet, RGB
STD = np.array([58.395, 57.12, 57.375], dtype=np.float32)
POINT_SCORE = 0.3
# Where the 18 joints of OpenPose are among COCO's 17; -1 is the neck, halfway between the shoulders.
BODY = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6
FACE, LEFT_HAND, RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)


def letterbox(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, float]:
    """The picture (H, W, 3), uint8, RGB, as YOLOX sees it, and by what factor it was scaled.

    Returns:
        (1, 3, height, width), float32, BGR, 0 to 255, the picture at the top left on grey; and the factor.
    """
    factor = min(height / image.shape[0], width / image.shape[1])
    size = max(int(image.shape[1] * factor), 1), max(int(image.shape[0] * factor), 1)
    canvas = np.full((height, width, 3), GREY, dtype=np.uint8)
    canvas[: size[1], : size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return canvas[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32), factor


def boxes_of_people(output: np.ndarray, height: int, width: int, factor: float) -> np.ndarray:
    """Boxes of people (n, 4), x0, y0, x1, y1 in the picture, the surest first.

    Args:
        output: of YOLOX: (1, anchors, 5 + classes), centre and size relative to the anchor, objectness, class scores;
            or (1, n, 5) of a network that suppresses overlaps itself: boxes in pixels and their scores.
        height, width: of the network's input.
        factor: by which the picture was scaled.
    """
    output = output[0].astype(np.float64)
    if output.shape[1] == 5:
        order = np.argsort(-output[:, 4], kind="stable")
        return output[order[output[order, 4] > BOX_SCORE], :4] / factor
    cells, sides = [], []
    for stride in STRIDES:
        y, x = np.mgrid[: height // stride, : width // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        sides.append(np.full((x.size, 1), stride))
    strides = np.concatenate(sides)
    scores = output[:, 4] * output[:, 5 + PERSON]
    candidates = scores > BOX_SCORE
    centre = ((output[:, :2] + np.concatenate(cells)) * strides)[candidates]
    size = (np.exp(output[:, 2:4]) * strides)[candidates]
    corner = (centre - size / 2) / factor
    size = size / factor
    kept = cv2.dnn.NMSBoxes(np.hstack([corner, size]).tolist(), scores[candidates].tolist(), BOX_SCORE, BOX_OVERLAP)
    return np.hstack([corner, corner + size])[np.asarray(kept, dtype=np.int64).ravel()]


def crop_person(
    image: np.ndarray, box: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One person as RTMPose sees it: the box with a margin, in the shape of the network's input.

    Args:
        image: (H, W, 3), uint8, RGB.
        box: x0, y0, x1, y1 in the picture.

    Returns:
        (1, 3, height, width), float32, RGB, normalised; the crop's corner (x, y) and size (w, h) in the picture.
    """
    centre = (box[:2] + box[2:]) / 2
    wide, high = (box[2:] - box[:2]) * BOX_MARGIN
    size = np.array([max(wide, high * width / height), max(high, wide * height / width)])
    corner = centre - size / 2
    scale = width / size[0]
    to_crop = np.array([[scale, 0, -corner[0] * scale], [0, scale, -corner[1] * scale]])
    crop = cv2.warpAffine(image, to_crop, (width, height), flags=cv2.INTER_LINEAR)
    return ((crop - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32), corner, size


def points_of_person(
    simcc_x: np.ndarray, simcc_y: np.ndarray, corner: np.ndarray, size: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The points of one person, in the picture.

    Args:
        simcc_x, simcc_y: (1, points, bins): how likely each column and row of the crop is.
        corner, size, height, width: of the crop, see `crop_person`.

    Returns:
        (points, 2), x and y; (points,), scores: the lower one of both axes.
    """
    found = np.stack([simcc_x[0].argmax(axis=1), simcc_y[0].argmax(axis=1)], axis=1) / SIMCC_RATIO
    scores = np.minimum(simcc_x[0].max(axis=1), simcc_y[0].max(axis=1))
    return found / (width, height) * size + corner, scores


def poses(points: np.ndarray, scores: np.ndarray, height: int, width: int) -> dict:
    """People in the form that `annotator.openpose.draw_pose` takes, relative to the picture's size.

    Args:
        points, scores: (people, 133, 2) and (people, 133): COCO-WholeBody's points, in pixels.
        height, width: of the picture.

    Returns:
        bodies (candidate and subset), hands and faces; points below the score 0.3 are -1 and are not drawn.
    """
    relative = points / (width, height)
    shown = scores > POINT_SCORE
    neck = (relative[:, LEFT_SHOULDER] + relative[:, RIGHT_SHOULDER]) / 2
    neck_shown = shown[:, LEFT_SHOULDER] & shown[:, RIGHT_SHOULDER]
    joints = np.concatenate([relative[:, :17], neck[:, None]], axis=1)[:, BODY]  # (people, 18, 2)
    joints_shown = np.concatenate([shown[:, :17], neck_shown[:, None]], axis=1)[:, BODY]
    joint_scores = np.concatenate([scores[:, :17], neck_shown[:, None]], axis=1)[:, BODY]
    index = np.arange(joints_shown.size).reshape(joints_shown.shape)
    total = (joint_scores * joints_shown).sum(axis=1)
    people = np.column_stack([np.where(joints_shown, index, -1), total, joints_shown.sum(axis=1)])
    marked = np.where(shown[:, :, None], relative, -1.0)
    hands = np.concatenate([marked[:, LEFT_HAND], marked[:, RIGHT_HAND]])
    return {
        "bodies": {"candidate": joints.reshape(-1, 2).tolist(), "subset": people.tolist()},
        "hands": hands.tolist(),
        "faces": marked[:, FACE].tolist(),
    }

"""Where hands and faces are, judged by the joints from `assemble_people`. Boxes are squares, in whole pixels."""

import numpy as np

MIN_SIDE = 20
LEFT_ARM, RIGHT_ARM = (5, 6, 7), (2, 3, 4)  # shoulder, elbow, wrist
NOSE = 0
# How many times its distance from the nose a face reaches: eyes, ears.
FACE_REACH = {14: 3.0, 15: 3.0, 16: 1.5, 17: 1.5}


def hand_boxes(candidates: np.ndarray, people: np.ndarray, height: int, width: int) -> list[tuple[int, int, int, bool]]:
    """Boxes around the hands of which shoulder, elbow and wrist were found: x, y, side, whether it is a left hand.

    Person by person, left before right.
    """
    boxes = []
    for person in people.astype(int):
        for arm in (LEFT_ARM, RIGHT_ARM):
            if (person[list(arm)] < 0).any():
                continue
            shoulder, elbow, wrist = (candidates[person[joint], :2] for joint in arm)
            side = 1.5 * max(np.linalg.norm(wrist - elbow), 0.9 * np.linalg.norm(elbow - shoulder))
            x, y = np.maximum(wrist + 0.33 * (wrist - elbow) - side / 2, 0).tolist()
            side = min(side if x + side <= width else width - x, side if y + side <= height else height - y)
            if side >= MIN_SIDE:
                boxes.append((int(x), int(y), int(side), arm is LEFT_ARM))
    return boxes


def face_boxes(candidates: np.ndarray, people: np.ndarray, height: int, width: int) -> list[tuple[int, int, int]]:
    """Boxes around the faces of which the nose and at least one eye or ear were found: x, y, side.

    A box may reach beyond the picture: only one whose middle lies beyond is cut, at the picture's border.
    """
    boxes = []
    for person in people.astype(int):
        found = [joint for joint in FACE_REACH if person[joint] >= 0]
        if person[NOSE] < 0 or not found:
            continue
        nose = candidates[person[NOSE], :2]
        half = max(FACE_REACH[joint] * np.abs(nose - candidates[person[joint], :2]).max() for joint in found)
        x, y = np.maximum(nose - half, 0).tolist()
        side = min(2 * half if x + half <= width else width - x, 2 * half if y + half <= height else height - y)
        if side >= MIN_SIDE:
            boxes.append((int(x), int(y), int(side)))
    return boxes

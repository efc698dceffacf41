"""From joints to people: which joints does a limb connect, and which limbs belong together.

Cao et al., section 2.3 and 2.4: a limb's score is the integral of its part affinity field along the line between two
joints; the best limbs win, and limbs that share a joint make a person.
"""

from collections.abc import Callable

import numpy as np

from annotator.openpose.model import BODY_JOINTS

# Joint numbers: 0 nose, 1 neck, 2-4 right shoulder, elbow, wrist, 5-7 left, 8-10 right hip, knee, ankle, 11-13 left,
# 14 right eye, 15 left eye, 16 right ear, 17 left ear. The last two limbs only help to assemble.
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
         (0, 14), (14, 16), (0, 15), (15, 17), (2, 16), (5, 17))  # fmt: skip
# The first of the two channels that hold x and y of each limb's part affinity field (PAF).
LIMB_CHANNELS = (12, 20, 14, 16, 22, 24, 0, 2, 4, 6, 8, 10, 28, 30, 34, 32, 36, 18, 26)
FOUNDING_LIMBS = 17  # only these make a new person

SAMPLES = 10  # points along a limb at which its PAF is read
PAF_THRESHOLD = 0.05
SAMPLES_NEEDED = 9  # of them above the threshold
MIN_JOINTS = 4
MIN_MEAN_SCORE = 0.4

TOTAL, COUNT = BODY_JOINTS, BODY_JOINTS + 1  # columns of a person's row after the joints
_PAIRS_AT_ONCE = 2**17  # bounds the memory for pictures with very many joints

PartAffinityField = Callable[[int], np.ndarray]


def _score_pairs(paf: np.ndarray, starts: np.ndarray, ends: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Score of the limb between each start and each end, and whether it can be one: both (starts, ends).

    Sums run in the order of the points, as the reference's do: equal limbs stay equal, so that ties fall alike.
    """
    vector = (ends[None, :, :2] - starts[:, None, :2]).transpose(2, 0, 1)  # (2, s, e)
    length = np.maximum(np.sqrt(vector[0] ** 2 + vector[1] ** 2), 0.001)  # (s, e)
    unit = vector / length
    steps = np.arange(SAMPLES)[:, None, None] / (SAMPLES - 1)
    x, y = (np.rint(starts[:, axis, None] + steps * vector[axis]).astype(np.int64) for axis in (0, 1))  # (10, s, e)
    along = paf[y, x]  # (10, s, e, 2)
    along = along[..., 0] * unit[0] + along[..., 1] * unit[1]  # (10, s, e), float64
    score = along.sum(axis=0) / SAMPLES + np.minimum(0.5 * height / length - 1, 0)
    return score, ((along > PAF_THRESHOLD).sum(axis=0) >= SAMPLES_NEEDED) & (score > 0)


def connect_joints(paf: np.ndarray, starts: np.ndarray, ends: np.ndarray, height: int) -> list[tuple]:
    """The limbs of one type: the best first, each joint used once.

    Args:
        paf: (H, W, 2), x and y of the limb's part affinity field, at the picture's size.
        starts, ends: (n, 4) candidates, see `find_body_peaks`.
        height: of the picture; limbs longer than half of it are held to be less likely.

    Returns:
        the candidates' numbers and the score of each limb.
    """
    found = []
    rows = max(1, _PAIRS_AT_ONCE // max(1, len(ends)))
    for row in range(0, len(starts), rows):
        score, possible = _score_pairs(paf, starts[row : row + rows], ends, height)
        first, second = np.nonzero(possible)
        found.append((first + row, second, score[first, second]))
    first, second, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(-score, kind="stable")
    limbs, used_starts, used_ends = [], set(), set()
    for i, j, value in zip(first[order].tolist(), second[order].tolist(), score[order].tolist(), strict=True):
        if i not in used_starts and j not in used_ends:
            used_starts.add(i)
            used_ends.add(j)
            limbs.append((int(starts[i, 3]), int(ends[j, 3]), value))
    return limbs


def assemble_people(peaks: list[np.ndarray], paf: PartAffinityField, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Joints to people.

    A limb belongs to the people that hold one of its joints, which are two at most: the limbs are a tree, but for the
    last two. It gives a single person its second joint, merges two people that have no joint in common, and founds a
    new one if there is none. If two have joints in common, the first one gets the second joint.

    Args:
        peaks: for each of 18 joints (n, 4), see `find_body_peaks`.
        paf: gives (H, W, 2), x and y of the part affinity field, for the first of its two channels; called only for limbs that have
            candidates at both ends.
        height: of the picture.

    Returns:
        candidates (n, 4): x, y, value, number; and people (p, 20): for each joint its candidate or -1, then the total
        score and the number of joints.
    """
    candidates = np.concatenate(peaks)
    people: list[np.ndarray] = []
    for limb, ((a, b), channel) in enumerate(zip(LIMBS, LIMB_CHANNELS, strict=True)):
        if not len(peaks[a]) or not len(peaks[b]):
            continue
        for first, second, score in connect_joints(paf(channel), peaks[a], peaks[b], height):
            holders = [i for i, row in enumerate(people) if row[a] == first or row[b] == second]
            if not holders:
                if limb < FOUNDING_LIMBS:
                    row = np.full(BODY_JOINTS + 2, -1.0)
                    row[[a, b]] = first, second
                    row[TOTAL] = candidates[first, 2] + candidates[second, 2] + score
                    row[COUNT] = 2
                    people.append(row)
                continue
            row, others = people[holders[0]], [people[i] for i in holders[1:]]
            if others and not np.any((row[:TOTAL] >= 0) & (others[0][:TOTAL] >= 0)):
                row[:TOTAL] += others[0][:TOTAL] + 1
                row[TOTAL:] += others[0][TOTAL:]
                row[TOTAL] += score
                del people[holders[1]]
            elif others or row[b] != second:
                row[b] = second
                row[TOTAL] += candidates[second, 2] + score
                row[COUNT] += 1
    rows = np.array(people).reshape(-1, BODY_JOINTS + 2)
    return candidates, rows[(rows[:, COUNT] >= MIN_JOINTS) & (rows[:, TOTAL] / rows[:, COUNT] >= MIN_MEAN_SCORE)]

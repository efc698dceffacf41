"""Time of what the annotators do besides running networks, on one thread; and of a folder of pictures on all of them.

    python -m tests.benchmarks.bench_annotators [--side 768] [--repeats 5]
    python -m tests.benchmarks.bench_annotators --folder hed [--pictures 200] [--batch 8] [--device cpu]
    python -m tests.benchmarks.bench_annotators --folder canny --pictures 2000

Beside OpenPose's steps and M-LSD's decoding stands the same mathematics written down plainly, with SciPy and loops;
both run in turn, the quickest of each counts. Without SciPy the plain steps that blur are left out.

With `--folder` the command makes the maps of a folder of pictures of 512 pixels. Beside it stands a plain loop over the network
alone, on as many pictures and with random weights; and the growth of memory from the first tenth of the pictures to the end.
"""

import argparse
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file

from annotator import describe, load
from annotator.__main__ import main as annotate
from annotator.canny import CannyDetector
from annotator.mlsd.decode import decode_lines, draw_lines
from annotator.openpose import OpenposeDetector
from annotator.openpose.assembly import LIMB_CHANNELS, LIMBS, assemble_people
from annotator.openpose.drawing import COLOURS, draw_body_1_0
from annotator.openpose.model import BODY_JOINTS, HAND_POINTS, STRIDE
from annotator.openpose.peaks import find_body_peaks, find_hand_peaks
from annotator.openpose.resizing import enlarge, enlarge_one_by_one, scale
from annotator.pictures import save_png
from annotator.scribble import ScribbleDetector, fake_scribble
from annotator.shuffle import ContentShuffleDetector
from tests.annotator.cases import open_cases
from tests.benchmarks.memory import peak_memory

try:
    from scipy import ndimage
except ImportError:
    ndimage = None

FOLDER_SHARE = 0.9  # of the throughput of the network alone, for a folder
BUDGET = 0.2  # of the plain time, for all of OpenPose's steps together
Work = Callable[[], object]


class FromMaps(OpenposeDetector):
    """The detector of version 1.0 with a body's network that gives made-up maps at once."""

    def __init__(self, maps: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.maps = maps
        super().__init__("cpu", weights=__file__, version="1.0")

    def load_network(self, name: str, path: Path) -> torch.nn.Module:
        network = torch.nn.Module()
        network.forward = lambda x: self.maps
        return network


def plain_resize(maps: np.ndarray, seen: Sequence[int], height: int, width: int) -> np.ndarray:
    """A network's maps (h, w, C) at the picture's size."""
    large = cv2.resize(maps, (0, 0), fx=STRIDE, fy=STRIDE, interpolation=cv2.INTER_CUBIC)[: seen[0], : seen[1]]
    return cv2.resize(large, (width, height), interpolation=cv2.INTER_CUBIC)


def plain_peaks(heatmaps: np.ndarray) -> list[np.ndarray]:
    found, count = [], 0
    for joint in range(BODY_JOINTS):
        heatmap = heatmaps[:, :, joint].astype(np.float64)
        blurred = ndimage.gaussian_filter(heatmap, sigma=3)
        around = np.pad(blurred, 1)
        neighbours = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
        ys, xs = np.nonzero(np.logical_and.reduce([blurred >= other for other in neighbours] + [blurred > 0.1]))
        numbers = range(count, count + len(ys))
        peaks = [(x, y, heatmap[y, x], number) for y, x, number in zip(ys, xs, numbers, strict=True)]
        found.append(np.array(peaks).reshape(-1, 4))
        count += len(ys)
    return found


def plain_assembly(peaks: list[np.ndarray], fields: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of joints by itself; then people, in a table that grows row by row."""
    candidates, people = np.concatenate(peaks), np.zeros((0, 20))
    for limb, ((a, b), channel) in enumerate(zip(LIMBS, LIMB_CHANNELS, strict=True)):
        possible = []
        for i, start in enumerate(peaks[a]):
            for j, end in enumerate(peaks[b]):
                vector = end[:2] - start[:2]
                length = max(0.001, math.hypot(*vector))
                along = []
                for x, y in zip(np.linspace(start[0], end[0], 10), np.linspace(start[1], end[1], 10), strict=True):
                    field = fields[round(y), round(x), channel : channel + 2]
                    along.append(field[0] * vector[0] / length + field[1] * vector[1] / length)
                score = sum(along) / 10 + min(0.5 * height / length - 1, 0)
                if sum(value > 0.05 for value in along) > 8 and score > 0:
                    possible.append((score, i, j))
        used_starts, used_ends = set(), set()
        for score, i, j in sorted(possible, key=lambda found: found[0], reverse=True):
            if i in used_starts or j in used_ends:
                continue
            used_starts.add(i)
            used_ends.add(j)
            first, second = peaks[a][i, 3], peaks[b][j, 3]
            value = candidates[int(second), 2]
            holders = np.flatnonzero((people[:, a] == first) | (people[:, b] == second))
            if len(holders) == 2 and not ((people[holders[0], :18] >= 0) & (people[holders[1], :18] >= 0)).any():
                people[holders[0], :18] += people[holders[1], :18] + 1
                people[holders[0], 18:] += people[holders[1], 18:]
                people[holders[0], 18] += score
                people = np.delete(people, holders[1], axis=0)
            elif len(holders) == 2 or (len(holders) == 1 and people[holders[0], b] != second):
                people[holders[0], b] = second
                people[holders[0], 18:] += value + score, 1
            elif not len(holders) and limb < 17:
                row = np.full((1, 20), -1.0)
                row[0, [a, b]] = first, second
                row[0, 18:] = candidates[int(first), 2] + value + score, 2
                people = np.concatenate([people, row])
    return candidates, people[(people[:, 19] >= 4) & (people[:, 18] / people[:, 19] >= 0.4)]


def plain_drawing(canvas: np.ndarray, candidates: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Each limb is mixed over the whole canvas."""
    for joint in range(BODY_JOINTS):
        for person in people:
            if person[joint] >= 0:
                x, y = candidates[int(person[joint]), :2].astype(int).tolist()
                cv2.circle(canvas, (x, y), 4, COLOURS[joint], thickness=-1)
    for limb in range(17):
        for person in people:
            ends = person[list(LIMBS[limb])].astype(int)
            if (ends < 0).any():
                continue
            (x0, y0), (x1, y1) = candidates[ends, :2]
            outline = cv2.ellipse2Poly(
                (int((x0 + x1) / 2), int((y0 + y1) / 2)), (int(math.hypot(x0 - x1, y0 - y1) / 2), 4),
                int(math.degrees(math.atan2(y0 - y1, x0 - x1))), 0, 360, 1,
            )  # fmt: skip
            opaque = cv2.fillConvexPoly(canvas.copy(), outline, COLOURS[limb])
            canvas = cv2.addWeighted(canvas, 0.4, opaque, 0.6, 0)
    return canvas


def plain_hand_peaks(heatmaps: np.ndarray) -> np.ndarray:
    points = []
    for heatmap in heatmaps:
        labels, count = ndimage.label(ndimage.gaussian_filter(heatmap, sigma=3) > 0.05, np.ones((3, 3)))
        if not count:
            points.append((0, 0))
            continue
        part = 1 + np.argmax([heatmap[labels == label].sum() for label in range(1, count + 1)])
        points.append(np.unravel_index(np.where(labels == part, heatmap, 0).argmax(), heatmap.shape)[::-1])
    return np.array(points)


def plain_lines(output: np.ndarray, thr_v: float, thr_d: float) -> np.ndarray:
    """The best 200 of all peaks, one by one."""
    score = 1 / (1 + np.exp(-output[0].astype(np.float64)))
    peak = score == cv2.dilate(score, np.ones((3, 3)))
    order = np.argsort(-np.where(peak, score, 0), axis=None, kind="stable")[:200]
    lines = []
    for y, x in zip(*np.unravel_index(order, score.shape), strict=True):
        dx0, dy0, dx1, dy1 = output[1:5, y, x]
        if score[y, x] > thr_v and math.hypot(dx0 - dx1, dy0 - dy1) > thr_d:
            lines.append([2 * (x + dx0), 2 * (y + dy0), 2 * (x + dx1), 2 * (y + dy1)])
    return np.array(lines).reshape(-1, 4)


def report(name: str, ours: Work, plain: Work | None, repeats: int) -> tuple[float, float]:
    """Times both in turn, prints one line; seconds of the quickest run of each."""
    quickest = [math.inf, math.inf]
    for _ in range(repeats):
        for which, work in enumerate((ours, plain)):
            if work is not None:
                start = time.perf_counter()
                work()
                quickest[which] = min(quickest[which], time.perf_counter() - start)
    beside = f"{quickest[1]:12.4f} {quickest[0] / quickest[1]:8.2f}" if plain else f"{'-':>12} {'-':>8}"
    print(f"{name:<44} {quickest[0]:10.4f} {beside}")
    return quickest[0], quickest[1]


def bench_bodies(name: str, case: str, side: int, repeats: int) -> float | None:
    """The steps of OpenPose on a scene enlarged to `side` pixels; time of all in units of the plain one."""
    arrays, _ = open_cases("openpose")
    maps = torch.from_numpy(arrays[f"{case}/L1"]), torch.from_numpy(arrays[f"{case}/L2"])
    shape = arrays[f"{case}/input"].shape[:2]
    height, width = (round(n * side / min(shape)) for n in shape)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    seen = scale(image, 184 / height, "1.0").shape
    fields, heatmaps = (np.ascontiguousarray(m[0].permute(1, 2, 0).numpy()) for m in maps)
    large_fields, large = (plain_resize(m, seen, height, width) for m in (fields, heatmaps))
    planes = list(np.ascontiguousarray(large.transpose(2, 0, 1))[:BODY_JOINTS])
    peaks = find_body_peaks(planes)
    candidates, people = assemble_people(peaks, lambda c: large_fields[:, :, c : c + 2], height)
    np.testing.assert_allclose(plain_assembly(peaks, large_fields, height)[1], people, atol=1e-9)

    def resize() -> None:
        for _ in enlarge_one_by_one(heatmaps, BODY_JOINTS, seen, height, width, "1.0"):
            pass
        for (a, b), channel in zip(LIMBS, LIMB_CHANNELS, strict=True):
            if len(peaks[a]) and len(peaks[b]):
                enlarge(fields[:, :, channel : channel + 2], seen, height, width, "1.0")

    def plain() -> np.ndarray:
        cv2.resize(image, (0, 0), fx=184 / height, fy=184 / height, interpolation=cv2.INTER_CUBIC)
        found = plain_peaks(plain_resize(heatmaps, seen, height, width))
        found = plain_assembly(found, plain_resize(fields, seen, height, width), height)
        return plain_drawing(np.zeros_like(image), *found)

    detector = FromMaps(maps)
    title = f"openpose, {name}, {width}x{height}"
    report(
        f"{title}: resizing", resize,
        lambda: [plain_resize(m, seen, height, width) for m in (heatmaps, fields)], repeats,
    )  # fmt: skip
    if ndimage:
        for ours, other in zip(peaks, plain_peaks(large), strict=True):
            np.testing.assert_array_equal(ours, other)
        np.testing.assert_array_equal(detector(image)[0], plain())
    plain_blur = (lambda: plain_peaks(large)) if ndimage else None
    report(f"{title}: peaks", lambda: find_body_peaks(planes), plain_blur, repeats)
    report(
        f"{title}: assembly", lambda: assemble_people(peaks, lambda c: large_fields[:, :, c : c + 2], height),
        lambda: plain_assembly(peaks, large_fields, height), repeats,
    )  # fmt: skip
    report(
        f"{title}: drawing", lambda: draw_body_1_0(np.zeros_like(image), candidates, people),
        lambda: plain_drawing(np.zeros_like(image), candidates, people), repeats,
    )  # fmt: skip
    ours, other = report(f"{title}: all", lambda: detector(image), plain if ndimage else None, repeats)
    return ours / other if ndimage else None


def bench_folder(condition: str, count: int, batch: int, device: str) -> int:
    """Pictures a second of the command and of the network alone, and memory."""
    info = describe(condition)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = [condition, str(folder / "photos"), str(folder / "maps"), "--resolution", "512"]
        if info.network:
            random = info.detector_class.__new__(info.detector_class)
            random.weights = folder / "random.safetensors"
            save_file({k: v.contiguous() for k, v in random.build_network().state_dict().items()}, random.weights)
            command += ["--weights", str(random.weights), "--batch", str(batch), "--device", device]
        photo = cv2.resize(open_cases("canny")[0]["astronaut/input"], (512, 512), interpolation=cv2.INTER_CUBIC)
        for number in range(count):
            save_png(folder / "photos" / f"{number:05}.png", np.roll(photo, number, axis=1))

        baseline = 0.0
        if info.network:
            detector = load(condition, device, random.weights).detector
            x = torch.stack([detector.prepare(photo)] * batch)
            detector.run(x)  # the first call is slower
            start = time.perf_counter()
            for _ in range(0, count, batch):
                detector.run(x)
            if detector.device.type == "cuda":
                torch.cuda.synchronize()
            baseline = time.perf_counter() - start
            print(f"{condition}, the network alone: {count / baseline:.2f} pictures a second")
            del detector

        tenth: list[int] = []

        def watch() -> None:
            while not tenth and sum(1 for _ in (folder / "maps").glob("*.png")) < count // 10:
                time.sleep(0.05)
            tenth.append(peak_memory())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.perf_counter()
        status = annotate(command)
        seconds = time.perf_counter() - start
        tenth.append(0)
        print(f"{condition}, the command: {count / seconds:.2f} pictures a second, loading included")
        print(f"peak memory: {tenth[0] / 2**20:.0f} MiB after a tenth, {peak_memory() / 2**20:.0f} MiB in the end")
        if baseline:
            print(
                f"throughput of the network alone that the command reaches: {baseline / seconds:.2f} (at least {FOLDER_SHARE})"
            )
        return status or int(bool(baseline) and baseline / seconds < FOLDER_SHARE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=768, help="shorter side of the picture in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement; the quickest counts")
    parser.add_argument("--folder", metavar="NAME", help="measure this condition on a folder instead")
    parser.add_argument("--pictures", type=int, default=200, help="in the folder")
    parser.add_argument("--batch", type=int, default=8, help="pictures that the network sees at once")
    parser.add_argument("--device", default="cpu", help="of the network")
    args = parser.parse_args(argv)
    if args.folder:
        return bench_folder(args.folder, args.pictures, args.batch, args.device)
    if args.side < 64 or args.repeats < 1:
        parser.error("--side must be at least 64, --repeats at least 1")
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if ndimage is None:
        print("SciPy is not installed: no plain times for the steps that blur")
    print(f"{'seconds of one call':<44} {'here':>10} {'plain':>12} {'ratio':>8}")
    ratios = [
        bench_bodies(name, case, args.side, args.repeats)
        for name, case in (("two people", "two_people"), ("a crowd", "photo_astronaut"))
    ]
    random = np.random.RandomState(0)
    spots = np.zeros((HAND_POINTS, 256, 256))
    rows, columns = random.randint(20, 236, (2, HAND_POINTS))
    spots[np.arange(HAND_POINTS), rows, columns] = 500.0
    spots = np.stack([cv2.GaussianBlur(spot, (0, 0), 9) for spot in spots]) + random.rand(*spots.shape) * 0.02
    rough = np.stack([cv2.GaussianBlur(random.rand(256, 256), (0, 0), 12) - 0.46 for _ in range(HAND_POINTS)])
    for name, hand in (("a hand's points", spots), ("the same in rough maps", rough)):
        plain_hand = (lambda hand=hand: plain_hand_peaks(hand)) if ndimage else None
        if ndimage:
            np.testing.assert_array_equal(find_hand_peaks(hand), plain_hand_peaks(hand))
        report(f"openpose, {name}, 256x256", lambda hand=hand: find_hand_peaks(hand), plain_hand, args.repeats)

    output = torch.from_numpy(np.random.RandomState(0).randn(5, args.side // 2, args.side // 2).astype(np.float32))
    np.testing.assert_allclose(plain_lines(output.numpy(), 0.1, 0.1), decode_lines(output), atol=1e-3)
    report("M-LSD, decoding", lambda: decode_lines(output), lambda: plain_lines(output.numpy(), 0.1, 0.1), args.repeats)
    lines = decode_lines(output)
    report("M-LSD, drawing", lambda: draw_lines(lines, args.side, args.side), None, args.repeats)
    image = cv2.resize(np.random.RandomState(0).randint(0, 256, (48, 48, 3), dtype=np.uint8), (args.side,) * 2)
    for name, work in (
        ("canny", lambda: CannyDetector()(image)),
        ("scribble", lambda: ScribbleDetector()(image)),
        ("fake scribble from soft edges", lambda: fake_scribble(image)),
        ("shuffle", lambda: ContentShuffleDetector()(image, seed=0)),
    ):
        report(f"{name}, {args.side}x{args.side}", work, None, args.repeats)
    if None in ratios:
        return 0
    print(f"openpose in all: {', '.join(f'{ratio:.2f}' for ratio in ratios)} of the plain time (at most {BUDGET})")
    return 0 if max(ratios) <= BUDGET else 1


if __name__ == "__main__":
    sys.exit(main())

"""Tiny ONNX networks in the shapes of DWPose's two files, made by hand so that what they find is known."""

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

OPSET, IR_VERSION = 18, 9


def _save(path: Path, nodes: list, inputs: list[int], outputs: dict[str, list[int]], constants: dict) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def yolox(path: Path, boxes: list[tuple[float, float, float, float, int, float]], side: int = 64) -> Path:
    """A detector that sees the same boxes in every picture: centre and size in its input's pixels, class, score."""
    cells = [(y, x, s) for s in (8, 16, 32) for y in range(side // s) for x in range(side // s)]
    output = np.zeros((1, len(cells), 85), dtype=np.float32)
    for anchor, (cx, cy, width, height, label, score) in enumerate(boxes):
        y, x, stride = cells[anchor]
        output[0, anchor, :4] = cx / stride - x, cy / stride - y, np.log(width / stride), np.log(height / stride)
        output[0, anchor, [4, 5 + label]] = 1.0, score
    return _save(path, _plus_constant("boxes", "output"), [1, 3, side, side], {"output": list(output.shape)},
                 {"boxes": output, "zero": np.zeros(1, np.float32)})  # fmt: skip


def _plus_constant(constant: str, output: str) -> list:
    """A constant, plus the input's mean times 0."""
    return [
        helper.make_node("ReduceMean", ["input"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", [constant, "nothing"], [output]),
    ]


def brightest(path: Path, height: int = 64, width: int = 48, shift: int = 0) -> Path:
    """A pose network that finds all 133 points at the brightest column and row of its crop.

    Its scores are the brightness, normalised as pictures are, but for the points from 91 on (the hands), which have `shift` more.
    """
    more = np.zeros((1, 133, 1), dtype=np.float32)
    more[:, 91:] = shift
    nodes, outputs = [], {}
    for name, axes, bins in (("simcc_x", "rows", 2 * width), ("simcc_y", "columns", 2 * height)):
        nodes += [
            helper.make_node("ReduceMax", ["input", axes], [f"{name}_line"], keepdims=0),
            helper.make_node("Reshape", [f"{name}_line", "as_image"], [f"{name}_image"]),
            helper.make_node("Resize", [f"{name}_image", "", "twice"], [f"{name}_wide"], mode="nearest"),
            helper.make_node("Reshape", [f"{name}_wide", "as_line"], [f"{name}_bins"]),
            helper.make_node("Add", [f"{name}_bins", "more"], [name]),
        ]
        outputs[name] = [1, 133, bins]
    constants = {
        "rows": np.array([1, 2]), "columns": np.array([1, 3]), "as_image": np.array([1, 1, 1, -1]),
        "as_line": np.array([1, 1, -1]), "twice": np.array([1, 1, 1, 2], dtype=np.float32), "more": more,
    }  # fmt: skip
    return _save(path, nodes, [1, 3, height, width], outputs, constants)

"""Segmentation by any model of transformers: classes, single objects, or both, as colours."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from annotator.library import LOCAL, HubModelDetector
from annotator.segmentation.colours import colour_labels, distinct_colours, palette_for, stack_masks

KINDS = ("Semantic", "Universal", "Instance")  # of models in transformers
Task = Literal["semantic", "instance", "panoptic"]


class SegmentationDetector(HubModelDetector):
    """A colour for what each pixel shows (H, W, 3).

    Semantic: the class's colour, in the palette of ADE20K (150 classes) or COCO (133), else in distinct colours. Instance: each
    object in a colour of its own, the rest black. Panoptic: each object and each region in a colour of its own.

    Args:
        weights: id or folder of any semantic, instance, panoptic or universal segmentation model of transformers.
    """

    model = "shi-labs/oneformer_coco_swin_large"

    def load_model(self, path: Path, **processor_options: Any) -> tuple[Any, Iterable[str]]:
        config = self.transformers.AutoConfig.from_pretrained(path, **LOCAL)
        mappings = {kind: f"MODEL_FOR_{kind.upper()}_SEGMENTATION_MAPPING" for kind in KINDS}
        kinds = [kind for kind, mapping in mappings.items() if type(config) in getattr(self.transformers, mapping)]
        if not kinds:
            raise ValueError(f"{config.model_type} is no segmentation model")
        self.auto_class = f"AutoModelFor{kinds[0]}Segmentation"
        # OneFormer's processor would fetch names of classes, which only its training needs, from elsewhere on the hub.
        if any('"class_info_file"' in file.read_text(errors="replace") for file in path.glob("*processor_config.json")):
            processor_options["class_info_file"] = ""
        network, missing = super().load_model(path, **processor_options)
        if network.config.model_type == "oneformer":  # which is told its task in words
            tokenizer = self.transformers.AutoTokenizer.from_pretrained(path, **LOCAL)
            length = network.config.task_seq_len
            self.processor = self.transformers.OneFormerProcessor(self.processor, tokenizer, task_seq_length=length)
        return network, missing

    def load(self, **parameters: Any) -> None:
        super().load(**parameters)
        if "task" in parameters:
            self.decoder(parameters["task"])

    def decoder(self, task: str) -> Any:
        """What makes segments of the network's output; ValueError if the model gives none of this kind."""
        found = getattr(self.processor, f"post_process_{task}_segmentation", None)
        if found is None:
            raise ValueError(f"the model {self.network.config.model_type} gives no {task} segmentation")
        return found

    def predict(
        self, images: list[np.ndarray], task: Task = "semantic", threshold: float = 0.5, **parameters: Any
    ) -> list[np.ndarray]:
        """For each picture (H, W), int: classes, or numbers of segments, largest first; -1 for nothing."""
        decode = self.decoder(task)
        sizes = [image.shape[:2] for image in images]
        outputs = self.network(**self.inputs_for(images, task))
        if task == "semantic":
            return [labels.cpu().numpy() for labels in decode(outputs, target_sizes=sizes)]
        # Said, or the library warns that it is not.
        fuse: dict[str, Any] = {"label_ids_to_fuse": set()} if task == "panoptic" else {}
        results = decode(outputs, target_sizes=sizes, threshold=threshold, **fuse)
        return [
            stack_masks([(result["segmentation"] == one["id"]).cpu().numpy() for one in result["segments_info"]], size)
            for result, size in zip(results, sizes, strict=True)
        ]

    def inputs_for(self, images: list[np.ndarray], task: str) -> dict[str, Any]:
        """What the network takes for pictures of one size; OneFormer is told the task."""
        told = {"task_inputs": [task] * len(images)} if self.network.config.model_type == "oneformer" else {}
        return self.inputs(images, **told)

    def decode(
        self,
        output: np.ndarray,
        size: tuple[int, int],
        task: Annotated[Task, "what gets a colour of its own: a class, an object, or both"] = "semantic",
        threshold: Annotated[float, 0.0, 1.0, "score above which an object counts"] = 0.5,
    ) -> np.ndarray:
        labels = output[: size[0], : size[1]]
        if task == "semantic":
            return colour_labels(labels, palette_for(self.network.config.num_labels))
        return colour_labels(labels, distinct_colours(labels.max(initial=0) + 1))

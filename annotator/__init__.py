"""Condition extractors of ControlNet: from a photograph to the hint of a model.

One package a detector (`annotator.canny.CannyDetector`, ...), and a registry of all conditions by name:

    import annotator
    annotator.list_annotators()
    annotator.load("canny").make_hint("photo.jpg", low_threshold=80).hint

Nothing is loaded or fetched before `load` or a detector's constructor is called.
"""

from annotator.detector import Parameter, use_version
from annotator.registry import Annotator, AnnotatorInfo, Hint, describe, list_annotators, load

__all__ = ["Annotator", "AnnotatorInfo", "Hint", "Parameter", "describe", "list_annotators", "load", "use_version"]

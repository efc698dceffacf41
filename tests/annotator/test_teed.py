"""TEED against the published network with the same made-up weights, and its detector."""

import numpy as np
import torch

from annotator.teed.model import TED
from tests.annotator.cases import assert_close, case_state_dict, open_cases, open_manifest

ARRAYS, META = open_cases("teed")
MANIFEST = "5_model"


def test_outputs_equal_those_of_the_published_network():
    network = TED().eval()
    network.load_state_dict(case_state_dict(MANIFEST, META["cases"]["photo"]))
    assert list(network.state_dict()) and sorted(network.state_dict()) == sorted(open_manifest(MANIFEST))
    image = torch.from_numpy(ARRAYS["photo/input"]).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        outputs = network(image)[0]
    assert_close(outputs, ARRAYS["photo/outputs"], 1e-4)
    assert np.abs(ARRAYS["photo/outputs"]).max() > 10

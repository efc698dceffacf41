"""Tensors without content on a device that need not be there, for tests of where models put what."""

from contextlib import contextmanager

import pytest
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_tensors():
    """FakeTensorMode in which modules can be moved: torch swaps the content of fake parameters, which fails for some of them."""

    def replace_all(module, convert, recurse=True):
        for child in module.children() if recurse else ():
            child._apply(convert)
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(convert(value.detach()), requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = convert(value)
        return module

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(nn.Module, "_apply", replace_all)
        yield

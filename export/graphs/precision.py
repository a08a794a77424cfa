"""What a bundle's tensors are in, as types of torch."""

import torch

from stiv_deploy.runtime.bundle.contract import Precision


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype of a bundle's precision."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[precision]

"""Torch tensors to and from the wire's numpy arrays: the only place where the two meet.

`to_array` gives what `protocol.codec.encode` accepts (bfloat16 as its bits), `to_tensor` takes what `decode` returns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from privatelora.protocol.codec import Array, WireDtype

TORCH_DTYPES = {
    WireDtype.FLOAT32: torch.float32,
    WireDtype.BFLOAT16: torch.bfloat16,
    WireDtype.FLOAT16: torch.float16,
    WireDtype.INT8: torch.float32,  # the codec quantises float32 rows
}


def to_array(tensor: Tensor, dtype: WireDtype) -> Array:
    """The tensor's values in the form that the codec writes as `dtype`."""
    tensor = tensor.detach().to("cpu", TORCH_DTYPES[dtype]).contiguous()
    return (tensor.view(torch.uint16) if dtype is WireDtype.BFLOAT16 else tensor).numpy()


def to_tensor(array: Array, dtype: WireDtype, compute: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The array that the codec read as `dtype`, as a tensor of the compute dtype."""
    tensor = torch.from_numpy(np.require(array, requirements="W"))  # copies only what is read-only
    if dtype is WireDtype.BFLOAT16:
        tensor = tensor.view(torch.bfloat16)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, compute, non_blocking=True)

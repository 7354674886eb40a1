"""Running out of memory: how it is recognized, and what to say."""

import os
import platform
import sys

import torch


def grow_in_place() -> None:
    """Gaussians become more and more, and what they leave is too small for their successors: let PyTorch put
    pieces of GPU memory beside each other. To be called before it has any; who has settings keeps them."""
    able = sys.platform == "linux" and "microsoft" not in platform.release().lower()  # Windows cannot
    if able and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def out_of_memory(error: BaseException) -> bool:
    """PyTorch has its own error for GPUs; on the host it and C++ have others."""
    text = str(error)
    on_host = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "bad_alloc" in text)
    return on_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def in_short(error: BaseException) -> str:
    """PyTorch says much about its memory; what to do is not among it."""
    return f"{str(error).partition('. ')[0]}; smaller photos (-r), or --data_device cpu, may help"

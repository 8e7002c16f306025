"""MFU, model FLOPs utilization (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the FLOPs that a model needs,
as a fraction of the device's peak."""

import re

import torch

from data.batches import sampled_positions
from data.shards.prepare import Prepared
from model import cost
from model.transformer import ModelConfig

# 1e12 FLOPs per second of dense matrix products, as the vendors' data sheets state them without sparsity, by what
# torch.cuda.get_device_name() says. float32 is that of the plain units: PyTorch does not use TF32 unless told to.
# A name that is not here has no peak: that of another model with a similar name would give a wrong MFU in silence.
PEAKS = {
    r"NVIDIA (H100 80GB HBM3|H200|GH200 480GB)": {"fp8": 1978.9, "bf16": 989.4, "fp16": 989.4, "fp32": 66.9},
    r"NVIDIA H100 NVL": {"bf16": 835.5, "fp16": 835.5, "fp32": 60.0},
    r"NVIDIA H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "fp32": 51.2},
    r"(NVIDIA )?A100(-SXM4-40GB|-SXM4-80GB|-PCIE-40GB| 80GB PCIe)": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5},
    r"NVIDIA A10": {"bf16": 125.0, "fp16": 125.0, "fp32": 31.2},
    r"NVIDIA L40S": {"bf16": 362.0, "fp16": 362.0, "fp32": 91.6},
    r"NVIDIA L4": {"bf16": 121.0, "fp16": 121.0, "fp32": 30.3},
    r"(Tesla|NVIDIA) T4": {"fp16": 65.0, "fp32": 8.1},
    r"Tesla V100-SXM2-(16|32)GB": {"fp16": 125.0, "fp32": 15.7},
    r"NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "fp32": 82.6},
    r"NVIDIA GeForce RTX 3090": {"bf16": 71.0, "fp16": 71.0, "fp32": 35.6},
}


def flops_of(config: ModelConfig, corpus: Prepared, document_mask: bool) -> cost.Flops:
    """FLOPs per token of a model on this corpus. With document_mask, pairs of query and key count within documents
    only, as a sample of the training windows holds them: a kernel that computes the others and hides them reaches a
    lower MFU."""
    tokenizer, length = corpus.tokenizer, config.context_length
    documents = sampled_positions(corpus.train, length, tokenizer.end_of_text) if document_mask else None
    return cost.flops(config, tokenizer.vocab_size, documents)


def peak_flops(device: torch.device, precision: str, stated: float | None) -> float | None:
    """Peak FLOPs per second of a device: as stated; else as the table knows this GPU in this precision (fp8, bf16, fp16
    or fp32); else None, as for every CPU."""
    if stated is not None or device.type != "cuda":
        return stated
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(gpu: str, precision: str) -> float | None:
    """Peak FLOPs per second by the GPU's name; None where the table does not have it."""
    for name, peaks in PEAKS.items():
        if re.fullmatch(name, gpu) and precision in peaks:
            return peaks[precision] * 1e12
    return None

"""Measurements at the start of a training process, for the lines that open it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from data.shards.prepare import Prepared
from model.cost import active_parameters, has_experts
from model.transformer import TransformerLM
from training.run.conf_differences import attention_differences
from training.run.config import Run


class Measured(NamedTuple):
    """What the opening lines name that is no setting."""

    parameters: int
    cache_bytes: int  # of the KV cache, per token, in float32
    bytes_per_token: float  # of the validation text
    threads: int | None  # of a CPU; None on another device
    attention_differences: Mapping[str, Any] = {}  # settings of the attention that differ from conf/
    active_parameters: int | None = None  # that one token meets, where there are experts


def measure(run: Run, corpus: Prepared, model: TransformerLM, device: torch.device) -> Measured:
    """Measure the model and the validation text. Reads the whole of it."""
    text_bytes = corpus.tokenizer.byte_lengths[corpus.val.read(0, len(corpus.val))].sum()
    return Measured(
        parameters=sum(p.numel() for p in model.parameters()),
        cache_bytes=sum(layer.bytes_per_token for layer in model.make_caches(1, 1)),
        bytes_per_token=text_bytes / len(corpus.val),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        attention_differences=attention_differences(run.model),
        active_parameters=active_parameters(model) if has_experts(model) else None,
    )

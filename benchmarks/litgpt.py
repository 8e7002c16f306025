"""litgpt as its users run it, installed or from a checkout of it."""

import sys
import types
from collections.abc import Mapping
from pathlib import Path

from torch import nn


def litgpt_of(checkout: Path | None, shape: Mapping[str, int]) -> nn.Module:
    """A model in Llama's form, LM head and embedding tied, as in the models that it is held against. shape: n_layers,
    n_heads, d_model, context_length, vocab. checkout: unset, litgpt is installed. Raises ImportError."""
    if checkout is not None:
        _find_in(checkout)
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        n_layer=shape["n_layers"],
        n_head=shape["n_heads"],
        n_embd=shape["d_model"],
        block_size=shape["context_length"],
        padded_vocab_size=-(-shape["vocab"] // 64) * 64,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=-(-8 * shape["d_model"] // 96) * 32,
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def _find_in(checkout: Path) -> None:
    """Have its `model` and `config` imported from there alone: the package imports lightning and what else loads
    checkpoints, of which `model` uses one function, when weights are loaded."""
    loaded = sys.modules.get("litgpt")
    if loaded is not None and list(loaded.__path__) == [str(checkout / "litgpt")]:
        return
    package = types.ModuleType("litgpt")
    package.__path__ = [str(checkout / "litgpt")]
    converter = types.ModuleType("litgpt.scripts.convert_hf_checkpoint")
    converter.qkv_reassemble = None
    sys.modules |= {"litgpt": package, converter.__name__: converter}

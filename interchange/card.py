"""The model card of an exported run: README.md, as model hubs show it."""

from pathlib import Path

import yaml

from common.hf_names import folder_of, is_published
from interchange.form import Form
from training.metrics_file import read_metrics
from training.run.checkpoint import best, newest
from training.run.folder import read_config

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [headroom]
---
# {name}

{what}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
```

{trained}"""
IN_FAMILY = (
    "A language model of {model_type} shape, trained with Headroom and exported in {dtype}. Opened without its code:"
)
WITH_CODE = (
    "A language model trained with Headroom and exported in {dtype}. `{code}` computes it, with torch and transformers "
    "alone; read it before you trust it:"
)
TRAINED = """## How it was trained

| | |
|---|---|
| steps | {steps:,} |
| tokens | {tokens:,} |
| data | {data} |
| seed | {seed} |
| validation loss, nats per token | {val_loss} |
| bits per byte | {val_bpb} |

Its settings, all of them:

```yaml
{settings}```
"""


def card(run: Path, which: str, form: Form, dtype: str) -> str:
    """Of a run, with the figures of the checkpoint; of a published model, without. which: latest or best."""
    trained = "" if is_published(run) else _trained(run, which)
    if form.code is None:
        what, trust = IN_FAMILY.format(model_type=form.model_type, dtype=dtype), ""
    else:
        what, trust = WITH_CODE.format(code=form.code.name, dtype=dtype), ", trust_remote_code=True"
    return CARD.format(name=folder_of(run).resolve().name, what=what, trust=trust, trained=trained)


def _trained(run: Path, which: str) -> str:
    found = (newest if which == "latest" else best)(run, ())
    step = found.manifest.step
    row = next((row for row in read_metrics(run / "metrics.jsonl") if row["step"] == step), {})
    settings = read_config(run)[0]
    return TRAINED.format(
        steps=step,
        tokens=row.get("tokens", 0),
        data=settings["data"]["_target_"].rpartition(".")[2].removesuffix("Corpus"),
        seed=settings["seed"],
        val_loss=_number(row.get("val_loss")),
        val_bpb=_number(row.get("val_bpb")),
        settings=yaml.safe_dump(settings, sort_keys=False),
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"

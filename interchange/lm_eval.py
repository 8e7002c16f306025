"""An adapter to lm-evaluation-harness: runs and published models as the model `headroom`, through their own caches.

    python -m interchange.lm_eval --model headroom --model_args run=runs/NAME --tasks TASK --include_path FOLDER

Takes what `lm_eval` takes; model arguments: `run`, a run's folder or hf:DIR; `checkpoint`, latest or best; `device`.
Needs the package lm-eval, which `pip install -e '.[eval]'` brings. Texts are encoded without special tokens; what goes
before an empty context is the end of text, with which documents begin in training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from common.cli import one_line_errors
from common.errors import UserError
from generation.batch_writer import Sample, write
from generation.options import check_is_folder
from generation.sampler import Sampler
from generation.state import GenerationState
from runtime.device import choose_device
from training.run.folder import find_run
from training.run.load import load_run

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as missing:
    with one_line_errors():
        raise UserError("lm-eval is not installed: pip install -e '.[eval]' brings it") from missing

MAX_NEW_TOKENS = 256  # the harness's own, where a task states none
GIVEN = {"batch_size", "max_batch_size"}
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts; context and continuation in tokens


@register_model("headroom")
class HeadroomLM(TemplateLM):
    """A model in float32, one text at a time."""

    def __init__(self, run: str = "latest", checkpoint: str = "latest", device: str = "auto", **others: Any):
        """others: batch_size and the like, which the harness gives to every model. Raises UserError."""
        super().__init__()
        unknown = others.keys() - GIVEN
        if unknown or checkpoint not in ("latest", "best"):
            wrong = ", ".join(sorted(unknown)) or f"checkpoint={checkpoint}"
            raise UserError(f"--model_args {wrong}: run, checkpoint (latest, best) and device are what there is")
        folder = find_run("run", run, with_checkpoint=True)
        check_is_folder(folder)
        self._device = choose_device(device)
        self.model, self.text_tokenizer = load_run(folder, self._device, checkpoint)
        self.max_length = self.model.config.context_length
        self.name = str(folder)

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text_tokenizer.encode(string).tolist()

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation, the sum of ln p of its tokens, and whether each is the likeliest."""
        found = []
        for _, context, continuation in tqdm(requests, disable=disable_tqdm):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit into the context of {self.name}, of "
                    f"{self.max_length}: take a task of shorter ones, or a model of a longer context"
                )
            tokens = torch.tensor([context + continuation], device=self._device)[:, -(self.max_length + 1) :]
            hidden = self.model(tokens[:, :-1]).x[:, -len(continuation) :]
            logits = self.model.logits(hidden)[0].float()
            targets = tokens[0, -len(continuation) :]
            likelihoods = logits.log_softmax(-1).gather(1, targets[:, None])
            found.append((likelihoods.sum().item(), bool((logits.argmax(-1) == targets).all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context that do not overlap."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text that goes on, up to a stop string of the task. Of a context that is too long, its end is read."""
        return [self._written(*request.args) for request in tqdm(requests, disable=disable_tqdm)]

    def _written(self, context: str, asked: dict[str, Any]) -> str:
        until = asked.get("until") or []
        count = asked.get("max_gen_toks", asked.get("max_new_tokens", MAX_NEW_TOKENS))
        drawn = {
            name: asked[name]
            for name in ("temperature", "top_k", "top_p", "min_p")
            if asked.get("do_sample") and name in asked
        }
        room = self.max_length - count
        if room < 1:
            raise UserError(
                f"the task wants {count} tokens, and the context of {self.name} holds {self.max_length}: state a "
                "smaller max_gen_toks by --gen_kwargs"
            )
        prompt = (self.tok_encode(context) or [self.eot_token_id])[-room:]
        state = GenerationState(self.model, [prompt], [0])
        sample = Sample(0, len(prompt), self.text_tokenizer, [until] if isinstance(until, str) else until)
        for _ in write(
            self.model, self.text_tokenizer, Sampler(**({"temperature": 0.0} | drawn)), state, [sample], count
        ):
            pass
        return sample.text


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    with one_line_errors():
        cli_evaluate()


if __name__ == "__main__":
    main()

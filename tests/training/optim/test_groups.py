"""Groups of parameters by patterns of their names: their rates, their decay, and what is frozen."""

import pytest
import torch
import yaml

from common.errors import UserError
from model import cost
from model.kernels.sdpa import SDPA
from model.transformer import TransformerLM
from tests.support import (
    QUICK,
    SMOKE,
    batches,
    call,
    composed_run,
    composed_tree,
    small_model,
    training_state,
)
from tests.training.runs import assert_same_run, rewind, tensors
from training.metrics_file import read_metrics
from training.optim.qk_clip import QKClip
from training.run.config import Run, compose, pop_command_settings
from training.step import train_step
from training.step_memory import memory

OPTIMIZERS = ("muon", "adamw", "sgd", "adafactor")
every_optimizer = pytest.mark.parametrize("optim", OPTIMIZERS)
MLP_FASTER = "optim.groups=[{match: 'layers.*.mlp.*', lr: 0.004}]"
MLP_FROZEN = "optim.groups=[{match: 'layers.*.mlp.*', train: false}, {match: embedding.weight, train: false}]"


def model() -> TransformerLM:
    return small_model("attention=mla", "attention.qk_norm=latent", "model.bias=true", kernel=SDPA())


def after_a_step(*settings: str) -> dict[str, torch.Tensor]:
    """How far each parameter moves in a step, from weights that are the same for all."""
    optim, mine = composed_run("optim.lr=0.001", *settings).optim, model()
    optim.freeze(mine)
    before = {name: p.detach().clone() for name, p in mine.named_parameters()}
    train_step(training_state(mine, optim.build(mine)), batches(4, 4), 1.0)
    return {name: p.detach() - before[name] for name, p in mine.named_parameters()}


@every_optimizer
def test_groups_lr_is_the_rate_of_what_they_match_and_of_nothing_else(optim):
    """Of Muon's matrices it takes the place of muon_lr, of biases that of bias_lr."""
    settings = (f"optim={optim}", "optim.weight_decay=0")
    equal = [*settings, *(["optim.muon_lr=0.001"] if optim == "muon" else [])]
    equal += ["optim.bias_lr=0.001"] if optim in ("muon", "adamw") else []
    usual, faster = after_a_step(*equal), after_a_step(*equal, MLP_FASTER)
    assert sum(".mlp." in name for name in usual) > 4
    for name, moved in usual.items():
        torch.testing.assert_close(faster[name], 4 * moved if ".mlp." in name else moved, rtol=2e-3, atol=3e-7)


@every_optimizer
def test_groups_weight_decay_is_of_matrices_and_of_vectors_matched_alone(optim):
    """A pattern of more than vectors leaves them without decay."""
    settings = (f"optim={optim}", "optim.weight_decay=0")
    usual = after_a_step(*settings)

    def changed(pattern: str) -> set[str]:
        found = after_a_step(*settings, f"optim.groups=[{{match: '{pattern}', weight_decay: 0.5}}]")
        return {name for name in found if not torch.equal(found[name], usual[name])}

    matrices = {name for name, p in model().named_parameters() if p.ndim >= 2}
    assert changed("layers.0.*") == {name for name in matrices if name.startswith("layers.0.")}
    norms = {name for name in usual if name.endswith("norm.weight")}
    assert changed("*norm.weight") == norms and len(norms) > 4


@pytest.mark.parametrize(
    ("optim", "precision"),
    [("muon", "fp32"), ("muon", "bf16"), ("adamw", "bf16"), ("sgd", "fp32"), ("adafactor", "fp32")],
)
def test_groups_frozen_parameters_stay_and_have_no_state(optim, precision):
    optim, mine, before = composed_run(f"optim={optim}", MLP_FROZEN).optim, model(), dict(model().named_parameters())
    optim.freeze(mine)
    optimizer = optim.build(mine)
    state = training_state(mine, optimizer, precision, clip_norm=1.0)
    norms = [train_step(state, batches(4, 2), 1.0).grad_norm for _ in range(3)]
    assert max(norms) < 3 * norms[0]  # gradients of what is frozen would add up
    frozen = {name for name in before if ".mlp." in name or name == "embedding.weight"}
    assert {name for name, p in mine.named_parameters() if torch.equal(p, before[name])} == frozen
    assert all((name in frozen) == (p not in optimizer.state) for name, p in mine.named_parameters())
    on_meta = cost.on_meta(mine.config, 100)
    optim.freeze(on_meta)
    assert optim.state_bytes(on_meta) == sum(v.nbytes for kept in optimizer.state.values() for v in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_groups_predicted_memory_has_no_gradients_of_what_is_frozen(precision):
    free, frozen = (
        memory(composed_run(*SMOKE, f"precision={precision}", *groups), 100, torch.device("cpu"))
        for groups in ((), (MLP_FROZEN,))
    )
    mine = cost.on_meta(composed_run(*SMOKE).model, 100)
    numbers = sum(p.numel() for name, p in mine.named_parameters() if ".mlp." in name or name == "embedding.weight")
    assert free.gradients - frozen.gradients == 4 * numbers and free.weights == frozen.weights
    assert free.peak - frozen.peak >= 4 * numbers


def test_groups_first_that_matches_counts():
    groups = "[{match: '*.up_proj.*', lr: 0.5}, {match: 'layers.*.mlp.*', lr: 0.25}]"
    mine = model()
    optimizer = composed_run("optim=adamw", "optim.lr=0.001", f"optim.groups={groups}").optim.build(mine)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate[p] for name, p in mine.named_parameters()}
    assert rates["layers.1.mlp.up_proj.weight"] == 0.5 and rates["layers.1.mlp.down_proj.bias"] == 0.25
    assert rates["layers.1.attention.o_proj.weight"] == rates["norm.weight"] == 0.001


def test_qk_clip_leaves_frozen_parameters_alone():
    mine, twin = model(), model()
    composed_run("optim.groups=[{match: '*.q_proj.*', train: false}]").optim.freeze(mine)
    QKClip(mine, 1e-3)(torch.ones(2, 4), torch.tensor(False))
    changed = {name for (name, a), b in zip(mine.named_parameters(), twin.parameters(), strict=True)
               if not torch.equal(a, b)}  # fmt: skip
    assert changed == {f"layers.{i}.attention.kv_up.weight" for i in (0, 1)}


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(["optim=muon", "precision=fp32", MLP_FROZEN], marks=pytest.mark.slow),
        ["optim=muon", "precision=bf16", "optim.qk_clip=0.05", "attention.qk_norm=latent", MLP_FROZEN],
        pytest.param(["optim=sgd", "precision=fp32", MLP_FROZEN], marks=pytest.mark.slow),
        ["optim=adamw", "precision=fp32", MLP_FASTER],
    ],
    ids=lambda choice: " ".join(choice[:2]),
)
def test_groups_run_resumed_is_bit_exact(workplace, monkeypatch, choice):
    options = [*QUICK, "attention=mla", *choice, "micro_batch_size=1", "steps=8"]
    options += ["save_every=3", "model.zero_init=false"]
    options = list({option.partition("=")[0]: option for option in options}.values())
    assert call("train", [*options, "eval_every=4", "model.n_layers=1", "run_dir=whole"], monkeypatch) == 0
    rewind(workplace / "whole", workplace / "killed", step=3)
    assert call("train", ["resume=killed"], monkeypatch) == 0
    assert_same_run(workplace / "whole", workplace / "killed", step=8)
    early, late = (tensors(workplace / "whole", step) for step in (3, 8))
    same = {name for name, tensor in early.items() if torch.equal(tensor, late[name])}
    frozen = (
        {name for name in early if ".mlp." in name or name == "embedding.weight"} if MLP_FROZEN in choice else set()
    )
    assert same == frozen and not any(name.partition("/")[0] in frozen for name in late if "/" in name)
    assert read_metrics(workplace / "whole/metrics.jsonl")[-1]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        (
            "[{match: 'layers.*.mpl.*', lr: 0.1}]",
            r"""mpl.* matches no .* did you mean 'optim.groups=\[{match: "layers.\*.mlp.\*", lr: 0.1}\]'\?$""",
        ),
        (
            "[{match: 'layers.*', lr: 0.1}, {match: norm.wieght, train: false}]",
            r"""mean 'optim.groups=\[{match: "layers.\*", lr: 0.1}, {match: "norm.weight", train: false}\]'""",
        ),
        ("[{match: layers.9.mlp.*, lr: 0.1}]", "matches no parameter; layers are 0 to .*"),
        ("[{match: zzz, lr: 0.1}]", "matches no parameter; names are embedding.weight, .*, norm.weight and the like"),
        (
            "[{match: '*', lr: 0.1}, {match: 'layers.*', lr: 0.2}]",
            "{match: .*, lr: 0.2} matches only what groups before it match",
        ),
        ("[{match: '*', train: false}]", "optim.groups freeze all parameters"),
        ("[{match: '*', train: false, lr: 0.1}]", r"match=\* with train=false has no use for lr=0.1"),
        ("[{match: layers.0.*}]", r"match=layers.0.\* changes nothing: give lr, weight_decay or train: false"),
        ("[{mach: '*', lr: 0.1}]", r"mach=\*: no such key of a group; did you mean match"),
        ("[{lr: 0.1}]", "optim.groups.0.match is not set: give that entry its match, as {match: ...}"),
        ("[{match: '*', lr: -1}]", "optim.groups.0.lr=-1: give more than 0"),
        ("3", "optim.groups=3: give a list"),
        ("[3]", "optim.groups.0=3: give a dict"),
    ],
    ids=str,
)
def test_groups_that_do_not_fit_are_refused_in_one_line(groups, line):
    tree = composed_tree()
    pop_command_settings(tree)
    tree["optim"]["groups"] = yaml.safe_load(groups)
    with pytest.raises(UserError, match=line) as refused:
        Run.from_tree(tree)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("match", ["*", "*.indexer.*"])
def test_groups_that_freeze_all_that_an_indexers_warmup_trains_are_refused(match):
    warm = ("attention=dsa", "attention.indexer.stage=warmup")
    line = "optim.groups freeze all parameters of the indexer, which attention.indexer.stage=warmup trains alone: leave"
    with pytest.raises(UserError, match=line) as refused:
        composed_run(*warm, f"optim.groups=[{{match: '{match}', train: false}}]")
    assert "\n" not in str(refused.value)
    composed_run(*warm, "optim.groups=[{match: '*.q_proj.*', train: false}]")


def test_groups_typed_as_anything_but_a_list_are_refused_in_one_line():
    line = r"optim.groups is a list: give it as a whole, as 'optim.groups=\[{match: .*, lr: "
    for groups in ("{match: '*', lr: 0.1}", "{}"):
        with pytest.raises(UserError, match=line) as refused:
            compose(f"optim.groups={groups}")
        assert "\n" not in str(refused.value)


def test_groups_changed_on_resume_are_refused_and_in_fine_tuning_are_not(workplace, monkeypatch, capsys):
    assert call("train", [*QUICK, "steps=2", "save_every=1", "run_dir=run"], monkeypatch) == 0
    assert call("train", ["resume=run", "steps=4", MLP_FROZEN], monkeypatch) == 2
    assert "optim.groups" in capsys.readouterr().err.splitlines()[-1]
    assert call("train", ["init_from=run", "steps=2", "run_dir=tuned", *QUICK, MLP_FROZEN], monkeypatch) == 0

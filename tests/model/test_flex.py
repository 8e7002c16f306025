"""The flex kernel against the naive twin. It compiles for seconds, so few situations are compiled, and the blocks it is
told to skip are compared with the mask by themselves."""

import pytest
import torch

from common.errors import Unsupported
from model.kernels import flex
from model.kernels.flex import BLOCK, Flex
from model.kernels.naive import Naive
from model.mask import CAUSAL, Mask, Pattern
from tests.model.test_kernels import attend, inputs
from tests.support import call, logits_of, relative_error, small_model, some_tokens

T = 2 * BLOCK + 44
INDICES = torch.arange(T)[None].expand(2, -1)
DOCS = (torch.arange(T) // 77)[None].expand(2, -1)
RAGGED = torch.stack([torch.arange(T), torch.arange(T) - 50])
SPARSE = Pattern(window=20, dilation=2, global_tokens=3, random_blocks=0.2, block_size=16)
MASKS = {
    "window": Mask(INDICES, INDICES, contiguous=True, pattern=Pattern(window=40)),
    "sparse": Mask(INDICES, INDICES, contiguous=True, pattern=SPARSE),
    "encoder": Mask(INDICES, INDICES, contiguous=True, pattern=Pattern(causal=False, window=150)),
    "documents": Mask(INDICES % 77, INDICES % 77, contiguous=False, pattern=CAUSAL, q_doc=DOCS, k_doc=DOCS),
    "padding": Mask(RAGGED, RAGGED, contiguous=False, pattern=Pattern(window=33)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_flex_blocks_are_skipped_exactly_if_the_mask_hides_them(mask):
    by_index = mask.contiguous and mask.pattern.causal
    if by_index:
        blocks = flex._blocks_of(mask.pattern, 3 * BLOCK, torch.device("cpu"))
        positions = torch.arange(3 * BLOCK)[None]
        longer = Mask(positions, positions, contiguous=True, pattern=mask.pattern)
    else:
        longer = flex._lengthened(mask, 2)
        blocks = flex._blocks(longer)
    visible = longer.visible().unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK))
    some, whole = visible.any(4).any(2), visible.all(4).all(2)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), some)
    for row in ((b, i) for b in range(some.shape[0]) for i in range(3)):
        listed = blocks.full_kv_indices[row[0], 0, row[1], : blocks.full_kv_num_blocks[row[0], 0, row[1]]]
        assert sorted(listed.tolist()) == whole[row].nonzero()[:, 0].tolist()
    b, i, j = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in longer.visible().shape), indexing="ij"))
    pairs = torch.vmap(lambda b, i, j: blocks.mask_mod(b, b, i, j))(b, i, j)
    assert torch.equal(pairs, longer.visible().flatten())


@pytest.fixture
def known_instructions():
    """The processor's are taken for granted: PyTorch would compile and load a program for each kind, to see whether the
    compiler has them, which takes as long as all else. So would a compilation of the headers alone, for one program."""
    from torch._inductor import config

    with config.patch({"cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False}):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("names", [("sparse", "padding"), ("documents", "encoder")], ids=" ".join)
def test_flex_with_more_patterns_than_dynamos_limit_equals_naive(known_instructions, names):
    q, k, v = inputs(T, T, 4, 2, 16, 24)
    one_program = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    with torch.no_grad(), one_program:  # Flex lifts the limit for its own function
        for mask in (MASKS[name] for name in names):
            found, expected = (attend(kernel, q, k, v, mask, 0.4) for kernel in (Flex(), Naive()))
            real = (mask.q_pos >= 0).expand(2, -1)
            assert relative_error(found[real], expected[real]) <= 1e-5


def test_flex_lse_on_a_cpu_is_refused():
    q, k, _ = (x.detach() for x in inputs(T, T, 4, 2, 16, 24))
    with pytest.raises(Unsupported, match="kernel=flex returns no log-sum-exp on cpu: kernel=auto, naive or online"):
        attend(Flex(), q, k, None, MASKS["window"], 0.4, v_dim=12, lse=True)
    assert not Flex().gives_lse("cpu")


def test_flex_by_positions_equals_naive(monkeypatch):
    """For padding. Traced, without generated code, which takes eight seconds more."""
    monkeypatch.setattr(flex, "_compiled", lambda: torch.compile(flex._attend, backend="eager", dynamic=False))
    given, mask = inputs(T, T, 4, 2, 16, 24), MASKS["padding"]
    with torch.no_grad():
        found, expected = (attend(kernel, *given, mask, 0.4) for kernel in (Flex(), Naive()))
    real = (mask.q_pos >= 0).expand(2, -1)
    assert relative_error(found[real], expected[real]) <= 1e-5


def test_flex_in_a_model_equals_naive_and_compiles_once_per_length_bucket(known_instructions):
    """By indices, in a model, of values that are columns of the keys."""
    case = ("attention=mla", "attention.execution=absorbed", "attention.window=30", "model.context_length=512")
    models = [small_model(*case, kernel=kernel) for kernel in (Flex(), Naive())]
    one_program = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    with torch.no_grad(), one_program:  # Flex lifts the limit for its own function
        graphs_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for length in (130, 200, 255, 140):  # two layers, four lengths, one program
            tokens = some_tokens(2, length)
            assert relative_error(*(logits_of(model, tokens) for model in models)) <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs_before + 1


def test_flex_length_buckets_are_at_most_half_longer():
    lengths = [flex._length(n) for n in range(1, 5000)]
    assert all(n <= length < max(1.5 * n + BLOCK, 2 * BLOCK) for n, length in enumerate(lengths, start=1))
    assert len(set(lengths)) <= 12


def test_flex_decoding_runs_on_the_fused_kernel():
    q, k, v = inputs(1, 21, 4, 2, 8, 8)
    mask = Mask(torch.full((2, 1), 13), torch.arange(21)[None], contiguous=False, pattern=CAUSAL)
    assert relative_error(*(attend(kernel, q, k, v, mask, 0.4) for kernel in (Flex(), Naive()))) <= 1e-5


def test_flex_training_on_a_cpu_is_refused_before_a_run_folder_exists(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("train", ["experiment=smoke", "kernel=flex", "device=cpu"], monkeypatch) == 2
    assert "kernel=flex has no backward pass on a CPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    q, k, v = inputs(T, T, 2, 2, 8, 8)
    with pytest.raises(Unsupported, match="no backward pass on a CPU"):
        attend(Flex(), q, k, v, MASKS["window"], 0.4)


def test_flex_with_dropout_or_without_a_compiler_is_refused():
    q, k, v = (x.detach() for x in inputs(T, T, 2, 2, 8, 8))
    with pytest.raises(Unsupported, match=r"attention\.dropout=0"):
        attend(Flex(), q, k, v, MASKS["window"], 0.4, dropout=0.1)
    without = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent"), "force_disable_caches": True})
    with without, pytest.raises(Unsupported, match="cannot be compiled here") as refusal:
        attend(Flex(), q, k, v, MASKS["sparse"], 0.4)
    assert len(str(refusal.value).splitlines()) == 1

"""Checkpoints that several processes write together: whole or not at all, and read by any number of them."""

import errno
import json
import shutil
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from runtime.world import ONE, World
from tests.training.parallel.test_equality import PLANS, VOCAB, batches_of, run_of, state_of, weights
from tests.training.parallel.together import together
from training.run import checkpoint
from training.run.checkpoint import MODEL, OPTIMIZER
from training.run.config import Run
from training.run.tensor_files import read_tensors
from training.state import TrainState
from training.step import train_step

CORPUS = SimpleNamespace(tokenizer=SimpleNamespace(hash="tokens"), fingerprint="documents")
STEPS = 3


def saved(world: World, folder, model: str, plan: str) -> dict[str, torch.Tensor]:
    """Train some steps and save them -> the weights, whole; in the first process."""
    run = run_of(model, "muon", plan)
    state = state_of(run, world, torch.float32)
    for step in range(STEPS):
        train_step(state, batches_of(step, world), 1.0)
    checkpoint.save(folder, run, CORPUS, state, 4.0)
    return weights(state)


def loaded_state(world: World, folder, run: Run, vocab_size: int) -> TrainState:
    found = checkpoint.newest(folder, (MODEL, OPTIMIZER), checkpoint.share_of(run, vocab_size, world))
    return checkpoint._state_of(found, run, vocab_size, torch.device("cpu"), world)


def next_step(world: World, folder, model: str, plan: str) -> tuple[float, dict[str, torch.Tensor]]:
    state = loaded_state(world, folder, run_of(model, "muon", plan), VOCAB)
    return train_step(state, batches_of(STEPS, world), 1.0).loss.item(), weights(state)


def next_steps(world: World, folder, model: str) -> list[tuple]:
    return [next_step(world, folder, model, plan) for plan in PLANS]


@pytest.fixture(scope="module", params=["gqa", pytest.param("moe", marks=pytest.mark.slow)])
def stored(request, tmp_path_factory):
    """A folder with a checkpoint of two processes that share the model, what it is a model of, and its weights. Neither
    its vocabulary nor its heads divide evenly among them."""
    folder = tmp_path_factory.mktemp(request.param)
    for plan in PLANS:  # composed once, for all processes
        run_of(request.param, "muon", plan)
    return folder, request.param, together(2, saved, folder, request.param, "fsdp")[0]


def last(folder):
    return folder / f"checkpoints/step_{STEPS:08d}"


def test_sharded_checkpoint_holds_the_weights_and_no_pickle(stored):
    folder, _, expected = stored
    found = checkpoint.read(last(folder), (MODEL, OPTIMIZER))
    assert found.tensors[MODEL].keys() == expected.keys()
    assert all(torch.equal(found.tensors[MODEL][name], weight) for name, weight in expected.items())
    assert found.tensors[MODEL]["embedding.weight"].shape[0] == VOCAB  # the padding is not stored
    names = {path.name.partition("-model")[0] for path in last(folder).rglob("*") if path.is_file()}
    assert names == {"manifest.json", "shard-00001", "shard-00002"}
    sizes = [path.stat().st_size for path in (last(folder) / "optimizer").iterdir()]
    assert max(sizes) < 0.7 * sum(sizes)


def test_sharded_checkpoint_goes_on_in_one_process_and_in_others(stored, monkeypatch):
    # Where a processor has bfloat16 Muon multiplies in it, and what differs by rounding differs by its steps then.
    monkeypatch.setattr("training.optim.muon.multiplies_bf16", lambda _: False)
    folder, model, _ = stored
    losses, after = zip(*[next_step(ONE, folder, model, "none")], strict=True)
    for found in together(4, next_steps, folder, model)[0]:
        assert found[0] == pytest.approx(losses[0], abs=1e-5)
        assert all(torch.allclose(found[1][name], one, atol=1e-4) for name, one in after[0].items())
    same = [together(2, next_step, folder, model, "fsdp")[0] for _ in range(2)]
    assert same[0][0] == same[1][0]
    assert all(torch.equal(weight, same[1][1][name]) for name, weight in same[0][1].items())


def test_sharded_checkpoint_is_read_by_pytorchs_own_reader(stored):
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    folder, _, expected = stored
    found = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    load(found, storage_reader=HuggingFaceStorageReader(str(last(folder) / "model")), no_dist=True)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_sharded_checkpoint_is_read_without_a_copy_of_its_content(stored):
    folder, _, _ = stored
    manifest = checkpoint._read_manifest(last(folder))
    files = checkpoint._files_of(last(folder), OPTIMIZER, manifest)
    tracemalloc.start()
    read_tensors(files)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < sum(mark.size for _, mark in files) / 4


def check_damage_is_named(folder, tmp_path, spoil) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil(sorted((last(copy) / "model").iterdir())[1])
    with pytest.raises(UserError, match=r"is damaged|cannot be read") as fault:
        checkpoint.newest(copy, (MODEL,))
    assert "\n" not in str(fault.value) and "model/shard-00002" in str(fault.value)
    shutil.rmtree(copy)


def test_damaged_shard_is_one_line(stored, tmp_path):
    folder, _, _ = stored
    check_damage_is_named(folder, tmp_path, lambda file: file.unlink())
    check_damage_is_named(folder, tmp_path, lambda file: file.write_bytes(file.read_bytes()[:-1]))
    check_damage_is_named(folder, tmp_path, lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"))
    check_damage_is_named(folder, tmp_path, lambda file: file.write_bytes(b"\xff" * file.stat().st_size))
    header = json.dumps({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}).encode()
    check_damage_is_named(folder, tmp_path, lambda file: file.write_bytes(len(header).to_bytes(8, "little") + header))


def told(world: World, folder, plan: str) -> str:
    """What a process says of a checkpoint of which it reads its share."""
    with pytest.raises(UserError) as fault:
        loaded_state(world, folder, run_of("gqa", "muon", plan), VOCAB)
    return str(fault.value)


@pytest.mark.parametrize("plan", ["ddp", "fsdp"])
def test_damage_that_one_process_meets_is_told_in_all(stored, tmp_path, plan):
    folder, _, _ = stored
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = sorted((last(copy) / "optimizer").iterdir())[1]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    lines = together(2, told, copy, plan)
    assert lines[0] == lines[1] and "optimizer/shard-00002" in lines[0] and "is damaged" in lines[0]


def full_disk_in_the_second(world: World, folder) -> str:
    run = run_of("gqa", "adamw", "fsdp")
    state = state_of(run, world, torch.float32)
    train_step(state, batches_of(0, world), 1.0)
    if world.rank == 1:
        import os

        def fails(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = fails
    with pytest.raises(UserError) as fault:
        checkpoint.save(folder, run, CORPUS, state, 4.0)
    return str(fault.value)


def test_full_disk_of_one_process_is_told_in_all_and_leaves_no_trace(tmp_path):
    lines = together(2, full_disk_in_the_second, tmp_path)
    assert lines[0] == lines[1] and "process 1: No space left on device" in lines[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []

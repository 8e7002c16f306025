"""Checkpoints: saving and loading without pickle, tensors as safetensors, the rest as JSON.

checkpoints/step_00000200/model.safetensors      float32 weights, tied tensors once, the real vocabulary only
                          optimizer.safetensors  its tensors, as "<parameter>/<state>"
                          manifest.json          the fields of Manifest, with the size and hash of the other files

Where processes share the parameters, model/ and optimizer/ hold a file of each process instead (tensor_files.py).
"""

import functools
import hashlib
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from common.atomic_io import (
    NOT_THERE,
    NotRegularFile,
    atomic_folder,
    make_folder,
    read_regular,
    remove_atomic,
    write_atomic,
)
from common.checksummed_json import parse_verified, with_checksum
from common.errors import UserError, reason
from common.settings import MAX_COUNT, FrozenSettings
from data.shards.prepare import Prepared
from data.tokenizers.base import Tokenizer
from model.cost import on_meta
from model.transformer import ModelConfig, PaddedEmbedding, TransformerLM
from runtime.memory import free_memory
from runtime.precision import LossScale, Shard, is_divided
from runtime.world import ONE, World
from training.metrics_file import PICTURE, read_metrics
from training.optim.base import StateTensor
from training.run.config import Run, dump
from training.run.folder import (
    check_format,
    checkpoint_paths,
    read_config,
    read_tokenizer,
    resume_command,
    step_of,
    write_config,
)
from training.run.migrate import FORMAT, migrate, stated_format
from training.run.resume import check_same_documents, check_same_settings, check_steps
from training.run.tensor_files import (
    WHOLE,
    BadFile,
    FileMark,
    Piece,
    Share,
    kept_bytes,
    read_tensors,
    stated_tensors,
    together,
    write_pieces,
)
from training.state import TrainState

MODEL, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
MAX_MANIFEST_BYTES = 2**24
MAX_READ_ATTEMPTS = 20  # to read a checkpoint before the run in training removes it
MAX_SHOWN = 80  # characters of a value
MAX_NAMED = 3  # parameters
T = TypeVar("T")
log = logging.getLogger("headroom")


class Manifest(FrozenSettings):
    """The manifest of a checkpoint: all but its tensors."""

    format: int
    step: int = Field(ge=1, le=MAX_COUNT)  # updates done
    # Nats per token on the first eval_tokens of the validation set, where it was scored:
    val_loss: float | None = Field(ge=0)
    loss_scale: LossScale.State | None
    tokenizer: str  # its hash
    corpus: str  # its fingerprint
    config: dict[str, Any]  # the run's, as in config.yaml
    machine: dict[str, str | int]  # what the bits depend on besides
    files: dict[str, FileMark]


class Checkpoint(NamedTuple):
    path: Path
    manifest: Manifest
    tensors: dict[str, dict[str, Tensor]]  # of each file that was asked for, in memory of their own
    whole: dict[str, dict[str, Tensor]] | None = None  # where those are some rows: the whole ones, on the meta device

    def written(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file in the shapes in which they were written."""
        return self.tensors[name] if self.whole is None else self.whole[name]


class Damaged(UserError):
    """A checkpoint, or a file of it, is not what was written."""


class Removed(UserError):
    """A checkpoint is not there any more."""


def save(folder: Path, run: Run, corpus: Prepared, state: TrainState, val_loss: float | None) -> None:
    """Write checkpoints/step_XXXXXXXX of the run in `folder`, whole or not at all, then remove all but the last
    run.keep_last and the best. Call it in all processes that train it."""
    path = folder / "checkpoints" / f"step_{state.step:08d}"
    files = {MODEL: model_tensors(state), OPTIMIZER: _optimizer_tensors(state)}
    try:
        write(path, run, corpus, state, files, val_loss)
    except OSError as error:
        raise _write_error(folder, path, error) from None
    if state.world.is_first:
        _remove_old(folder, run, state)


def _remove_old(folder: Path, run: Run, state: TrainState) -> None:
    try:
        others = checkpoints_to_remove(folder, state.step, run.keep_last)
    except UserError as fault:
        others = []
        log.warning(f"{fault}; so none is removed")
    for other in others:
        try:
            remove_atomic(other)
        except OSError as error:
            log.warning(f"{other} cannot be removed: {reason(error)}")


def score(folder: Path, step: int, val_loss: float) -> None:
    """Give the checkpoint of a step the validation loss (nats per token) that it was saved without. Its tensors stay
    as they are, so that nothing can be lost of them. Raises UserError where its manifest cannot be read or written."""
    path = next(path for path in checkpoint_paths(folder) if step_of(path) == step)
    manifest = _read_manifest(path).model_copy(update={"format": FORMAT, "val_loss": _finite(val_loss)})
    try:
        write_atomic(path / MANIFEST, with_checksum(manifest.model_dump()).encode())
    except OSError as error:
        raise _write_error(folder, path, error) from None


def _write_error(folder: Path, path: Path, error: OSError) -> UserError:
    return UserError(
        f"the checkpoint {path} cannot be written: {reason(error)}; what was saved before stands, if anything was: "
        f"make room, then {resume_command(folder)}"
    )


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def write(
    path: Path,
    run: Run,
    corpus: Prepared,
    state: TrainState,
    files: Mapping[str, Mapping[str, Tensor | Piece]],
    val_loss: float | None = None,
) -> None:
    """Write tensors by file, and the manifest; call it in all processes that train the run. Raises OSError in all of
    them where one cannot write, and then leaves no trace."""
    world = state.world
    with _shared_folder(path, world) as writing:
        marks = {}
        for name, tensors in files.items():
            marks |= _write_file(writing, name, tensors, world)
        manifest = Manifest(
            format=FORMAT,
            step=state.step,
            val_loss=_finite(val_loss),
            loss_scale=state.loss_scale and state.loss_scale.state(),
            tokenizer=corpus.tokenizer.hash,
            corpus=corpus.fingerprint,
            config=dump(run),
            machine=_machine(state.device, run, world),
            files=marks,
        )
        content = with_checksum(manifest.model_dump())
        together(world, lambda: world.is_first and (writing / MANIFEST).write_text(content))


@contextmanager
def _shared_folder(path: Path, world: World) -> Iterator[Path]:
    """atomic_folder of the first process, for all to write into."""
    with ExitStack() as held:

        def make() -> Path | None:
            if not world.is_first:
                return None
            make_folder(path.parent)
            return held.enter_context(atomic_folder(path))

        yield world.from_first(together(world, make))
        together(world, held.close)


def _write_file(writing: Path, name: str, tensors: Mapping[str, Tensor | Piece], world: World) -> dict[str, FileMark]:
    """Write tensors to one file, or, where there are pieces, to a folder with a file of each process -> the marks of
    all, in every process."""
    if any(isinstance(tensor, Piece) for tensor in tensors.values()):
        folder = writing / folder_of(name)
        together(world, lambda: world.is_first and folder.mkdir())
        written = world.gathered(write_pieces(folder, tensors, world))
        return {file: mark for marks in written for file, mark in marks.items()}

    def write_whole() -> FileMark | None:
        if not world.is_first:
            return None
        content = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        (writing / name).write_bytes(content)
        return FileMark(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    return {name: world.from_first(together(world, write_whole))}


def steps_done(folder: Path) -> int:
    """The steps that a run has done, by its newest checkpoint's name; 0 where it has none. Raises UserError where they
    cannot be listed."""
    return max(map(step_of, checkpoint_paths(folder)), default=0)


def read(path: Path, names: Collection[str], share: Share = WHOLE) -> Checkpoint:
    """Read a checkpoint, with the tensors of the files named, or what a process is to keep of them. Raises Damaged
    where one of them, or the manifest, is not what was written, and UserError where one cannot be read, or was written
    in another format; in all processes that read together, whichever finds it."""

    def read_share() -> Checkpoint:
        manifest = _read_manifest(path)
        files = {name: _files_of(path, name, manifest) for name in names}
        tensors = {name: _tensors_of(path / name, of_name, share) for name, of_name in files.items()}
        if not share.divided:
            return Checkpoint(path, manifest, tensors)
        return Checkpoint(
            path, manifest, tensors, {name: _taken(stated_tensors, of_name) for name, of_name in files.items()}
        )

    return together(share.world, read_share, UserError)


def folder_of(name: str) -> str:
    """The folder of a file's pieces, where several processes wrote it."""
    return name.removesuffix(".safetensors")


def _files_of(path: Path, name: str, manifest: Manifest) -> list[tuple[Path, FileMark]]:
    """The file of this name, or those of the folder that stands in its place. Raises Damaged where the manifest knows
    neither."""
    within = f"{folder_of(name)}/"
    found = [(path / file, mark) for file, mark in sorted(manifest.files.items()) if file.startswith(within)]
    if not found and name not in manifest.files:
        raise Damaged(f"{path / name} is damaged: the manifest does not know it")
    return found or [(path / name, manifest.files[name])]


def _tensors_of(path: Path, files: Sequence[tuple[Path, FileMark]], share: Share) -> dict[str, Tensor]:
    size, free = _taken(functools.partial(kept_bytes, share=share), files), free_memory(torch.device("cpu"))
    if share.divided:  # and the other processes of this machine take theirs
        size *= int(os.environ.get("LOCAL_WORLD_SIZE", share.world.size))
    if free is not None and size > free:
        raise UserError(f"{path} takes {size:,} bytes of memory, {free:,} are free: take a machine with more")
    return _taken(functools.partial(read_tensors, share=share), files)


def _taken(take: Callable[[Sequence[tuple[Path, FileMark]]], T], files: Sequence[tuple[Path, FileMark]]) -> T:
    """take(files) -> its result. Raises Damaged, Removed or UserError for what it raises."""
    try:
        return take(files)
    except OSError as error:
        raise _read_error(Path(error.filename or files[0][0]), error) from None
    except BadFile as fault:
        raise Damaged(str(fault)) from None


def _file_content(file: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes. Raises what `_read_error` returns."""
    try:
        return read_regular(file, limit)
    except OSError as error:
        raise _read_error(file, error) from None


def _read_error(file: Path, error: OSError) -> UserError:
    """The exception to raise: Damaged where there is no such file, Removed where its folder has gone too, and another
    UserError where it cannot be read: what it holds may be whole."""
    if isinstance(error, NotRegularFile):
        return Damaged(f"{file} is damaged: {reason(error)}")
    if error.errno in NOT_THERE and not any(map(os.path.islink, (file, file.parent))):  # whose disk may be away
        kind = Damaged if os.path.lexists(file.parent) else Removed
        return kind(f"{file} cannot be read: {reason(error)}")
    return UserError(
        f"{file} cannot be read: {reason(error)}: make it readable, or move {file.parent} away to take the checkpoint "
        "before it"
    )


def newest(folder: Path, names: Collection[str], share: Share = WHOLE) -> Checkpoint | None:
    """The newest checkpoint of a run whose files, of those named, are whole; the damaged ones that were passed over are
    named in a warning. None where there is no checkpoint. Raises UserError where all are damaged, or one cannot be
    read. share: of processes that read it together."""
    return _retried(lambda: _newest(folder, names, share))


def _newest(folder: Path, names: Collection[str], share: Share) -> Checkpoint | None:
    # One list for all: a checkpoint that is just being written may be seen by some.
    paths = share.world.from_first(together(share.world, lambda: checkpoint_paths(folder), UserError))
    found, faults = _first_whole(reversed(paths), names, share)
    if found is None and faults:
        raise _none_whole(faults)
    for fault in faults:
        log.warning(f"{fault}; taking {found.path.name}, the newest whole checkpoint")
    return found


def _first_whole(
    paths: Iterable[Path], names: Collection[str], share: Share = WHOLE
) -> tuple[Checkpoint | None, list[str]]:
    """The first checkpoint that is whole, and the faults of those before it."""
    faults = []
    for path in paths:
        try:
            return read(path, names, share), faults
        except Damaged as fault:
            faults.append(str(fault))  # the exception itself would keep its frames alive, and the lock they hold
    return None, faults


def best(folder: Path, names: Collection[str] = ()) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss, of those saved where it was scored. A damaged manifest is named
    in a warning and passed over. Raises UserError where one cannot be read, or a file named is damaged."""
    return _retried(lambda: _best(folder, names))


def _best(folder: Path, names: Collection[str]) -> Checkpoint | None:
    losses = {}
    for path in checkpoint_paths(folder):
        try:
            losses[path] = _read_manifest(path).val_loss
        except Damaged as fault:
            log.warning(f"{fault}; the best is chosen among the others")
    path = _lowest(losses)
    try:
        return path and read(path, names)
    except Damaged as error:
        fault = str(error)
    whole, _ = _first_whole((other for other in reversed(checkpoint_paths(folder)) if other != path), names)
    if whole is None:
        raise _none_whole([fault])
    raise UserError(
        f"{fault}: --checkpoint latest takes {whole.path.name}, which is whole; or move {path} away, to take the best "
        "of the others"
    )


def _lowest(losses: Mapping[Path, float | None]) -> Path | None:
    scored = {path: loss for path, loss in losses.items() if loss is not None}
    return min(scored, key=scored.get, default=None)


def _retried(look: Callable[[], T]) -> T:
    """Call look(), again where a checkpoint was removed while it was read, as a run in training does."""
    for _ in range(MAX_READ_ATTEMPTS):
        with suppress(Removed):
            return look()
    return look()


def checkpoints_to_remove(folder: Path, step: int, keep_last: int) -> list[Path]:
    """The checkpoints, up to that of `step`, that are neither of the last keep_last nor the best. One whose loss cannot
    be told may be the best, so it is none of them. Raises UserError where they cannot be listed."""
    old, losses = [path for path in checkpoint_paths(folder) if step_of(path) <= step][:-keep_last], {}
    for path in checkpoint_paths(folder) if old else ():
        try:
            losses[path] = _read_manifest(path).val_loss
        except UserError as fault:
            if path in old:
                log.warning(f"{fault}; so it is kept, for it may be the best")
    lowest = _lowest(losses)
    return [path for path in old if path in losses and path != lowest]


def check_fits(folder: Path, run: Run) -> None:
    """Raise UserError where a run's settings or weights, as its newest checkpoint states them, are not those of `run`:
    before anything is prepared or built in the size that its config.yaml says. So it does where its data is said to be
    elsewhere and is other data there, and where all checkpoints are damaged."""
    tokenizer, faults = read_tokenizer(folder), []
    for path in reversed(checkpoint_paths(folder)):
        try:
            manifest = _read_manifest(path)
            weights = _taken(stated_tensors, _files_of(path, MODEL, manifest))
        except Damaged as fault:
            faults.append(str(fault))
            continue
        trained = settings_of(path, manifest)
        check_same_settings(folder, run, trained)
        if run.data != trained.data:  # in its places: to prepare what is there may take minutes
            check_same_documents(folder, run, manifest.corpus, run.data.fingerprint())
        shaped(path / MODEL, weights, run.model, tokenizer.vocab_size)
        return
    if faults:
        raise _none_whole(faults)


def _none_whole(faults: Sequence[str]) -> UserError:
    return UserError(f"{faults[0]}, and no other checkpoint is whole: bring one back, or start a new run")


def restore(folder: Path, run: Run, corpus: Prepared, device: torch.device, world: World = ONE) -> TrainState | None:
    """The state of the run's newest whole checkpoint; None, saying so, where there is none yet. Raises UserError, and
    then leaves the run as it was, where data or settings are not what the run began with, every checkpoint is damaged,
    or nothing is left to do."""
    found = _newest_of(folder, run, corpus, share_of(run, corpus.tokenizer.vocab_size, world))
    state = None
    if found is None:
        log.info(f"{folder} has no checkpoint yet: starting at step 0")
    else:
        _warn_of_other_machine(folder, found.manifest, _machine(device, run, world))
        state = _state_of(found, run, corpus.tokenizer.vocab_size, device, world)
        if state.step < run.steps:
            log.info(f"resuming {folder} after step {state.step}")
        else:
            log.info(f"{folder} is complete at step {state.step}, but for its last text and its picture")
    if world.is_first:
        write_config(folder, run)
    return state


def check_resumable(folder: Path, run: Run, corpus: Prepared) -> int:
    """The steps that a run has done by its newest whole checkpoint, all of which is read and nothing kept; 0 where it
    has none yet. Raises UserError where `restore` would, for all but the optimizer's tensors and numbers that are not
    finite."""
    vocab_size = corpus.tokenizer.vocab_size
    weights = on_meta(run.model, vocab_size).state_dict()
    found = _newest_of(folder, run, corpus, Share(divided=dict.fromkeys(weights, slice(0, 0))))
    if found is None:
        return 0
    shaped(found.path / MODEL, found.written(MODEL), run.model, vocab_size)
    return found.manifest.step


def _newest_of(folder: Path, run: Run, corpus: Prepared, share: Share) -> Checkpoint | None:
    """The newest whole checkpoint of a run that is to be resumed; None where there is none yet."""
    found = newest(folder, (MODEL, OPTIMIZER), share)
    if found is not None:  # before the tokenizer, which other documents may have changed
        check_same_documents(folder, run, found.manifest.corpus, corpus.fingerprint)
    check_tokenizer(folder, read_tokenizer(folder), corpus.tokenizer.hash)
    if found is None:
        check_no_checkpoint_lost(folder)
    else:
        _check_same_run(folder, run, corpus, found)
    return found


def share_of(run: Run, vocab_size: int, world: World) -> Share:
    """What a process of a run keeps of a checkpoint."""
    if not run.parallel.shards:
        return Share(world)
    matrices = {name: one for name, one in on_meta(run.model, vocab_size).named_parameters() if is_divided(one)}
    return Share(world, {name: Shard(one, one.shape, world.rank, world.size).rows() for name, one in matrices.items()})


def _state_of(found: Checkpoint, run: Run, vocab_size: int, device: torch.device, world: World) -> TrainState:
    """Build the state that a checkpoint holds, into memory that nothing was drawn for. found: read by `share_of`."""
    together(world, lambda: check_finite(found), UserError)
    state = state_with_weights(found, run, vocab_size, device, world)
    together(world, lambda: load_optimizer(found, state), UserError)
    if state.loss_scale is not None:
        state.loss_scale.load(found.manifest.loss_scale)
    state.step = found.manifest.step
    return state


def state_with_weights(found: Checkpoint, run: Run, vocab_size: int, device: torch.device, world: World) -> TrainState:
    """The state that begins with the weights of a checkpoint, which was read by `share_of`, and takes them for its own.
    Raises UserError where they are not those of the run's model."""
    if not run.parallel.shards:
        return TrainState.of(run, load_model(found, run.model, vocab_size).to(device), world)
    model = shaped(found.path / MODEL, found.written(MODEL), run.model, vocab_size)
    return TrainState.of(run, model, world, lambda name, _: found.tensors[MODEL].pop(name))


def load_model(found: Checkpoint, config: ModelConfig, vocab_size: int) -> TransformerLM:
    """Build the model of a checkpoint's weights, which it takes for its own. Raises UserError where they are not those
    of such a model."""
    model = shaped(found.path / MODEL, found.tensors[MODEL], config, vocab_size)
    model.load_state_dict(found.tensors[MODEL], assign=True)
    return model


def shaped(file: Path, weights: Mapping[str, Tensor], config: ModelConfig, vocab_size: int) -> TransformerLM:
    """Build a model on the meta device, without content. Raises UserError where the file's weights are not of its
    shapes; first of all, where they are not of its size, which could take minutes to build even so."""
    layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    embedding = weights.get("embedding.weight", torch.empty(0, 0, device="meta"))
    width = embedding.shape[-1] if embedding.ndim else 0
    if (layers, width) != (config.n_layers, config.d_model):
        raise UserError(
            f"{file} does not fit the run's settings: it holds {layers} layers and an embedding of width {width}, not "
            f"n_layers={config.n_layers} and d_model={config.d_model}: bring the run's own file back"
        )
    with torch.device("meta"):
        model = TransformerLM(config, vocab_size)
    _check_tensors(file, weights, model)
    return model


def check_weights(found: Checkpoint, config: ModelConfig, vocab_size: int) -> None:
    """Raise UserError where the weights of a checkpoint are not those of such a model. Builds none."""
    shaped(found.path / MODEL, found.tensors[MODEL], config, vocab_size)


def check_no_checkpoint_lost(folder: Path) -> None:
    """Raise UserError where a run without a checkpoint has written metrics beyond the step that the first is saved
    at: starting again would leave nothing of them."""
    rows, stored = read_metrics(folder / "metrics.jsonl"), read_config(folder)[0]
    every = stored["save_every"]
    if rows and (rows[-1]["step"] > every or rows[-1]["step"] == stored["steps"]):
        raise UserError(
            f"{folder} has no checkpoint, but its metrics.jsonl has {rows[-1]['step']} steps, and save_every={every}: "
            f"bring {folder}/checkpoints back, or start a new run"
        )


def check_finite(found: Checkpoint) -> None:
    """Raise UserError where weights are not finite: whatever is trained from them stays so."""
    for name, tensor in found.tensors[MODEL].items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{found.path}/{MODEL} holds numbers in {name} that are not finite: move the checkpoint away, to go on "
                "from an older one"
            )


def _check_tensors(file: Path, weights: Mapping[str, Tensor], model: TransformerLM) -> None:
    expected = model.state_dict()
    for name in {**expected, **weights}:
        if name not in weights:
            fault = f"it lacks {name}"
        elif name not in expected:
            fault = f"it holds {name}, which this model does not have"
        elif weights[name].shape != expected[name].shape:
            fault = f"{name} has shape {tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
        elif weights[name].dtype != expected[name].dtype:
            fault = f"{name} is {weights[name].dtype}, not {expected[name].dtype}"
        else:
            continue
        raise UserError(f"{file} does not fit the run's settings: {fault}: bring the run's own file back")


def settings_of(path: Path, manifest: Manifest) -> Run:
    """The settings that a checkpoint was trained with. Raises UserError where that is nothing that this program
    trains."""
    try:
        return Run.from_tree(manifest.config)
    except UserError as error:
        raise UserError(f"{error} (in {path / MANIFEST})") from None


def check_tokenizer(folder: Path, tokenizer: Tokenizer, expected: str) -> None:
    """Raise UserError where a run's tokenizer.json is not the tokenizer its tokens were made with."""
    if tokenizer.hash != expected:
        raise UserError(
            f"{folder}/tokenizer.json ({tokenizer.hash[:12]}) is not the tokenizer of its tokens ({expected[:12]}): "
            "bring the run's own tokenizer.json and data back, or start a new run"
        )


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    content = _file_content(file, MAX_MANIFEST_BYTES)
    try:
        content = parse_verified(content.decode())
        format = stated_format(content)
        check_format(path, format)
        if not isinstance(content.get("config"), dict):
            raise ValueError("its config holds no settings")
        migrated = migrate(content["config"], format)
        manifest = Manifest.model_validate(content | {"format": format, "config": migrated})
    except ValidationError as error:
        first = error.errors()[0]
        where, value = ".".join(map(str, first["loc"])), first["input"]
        shown = str(value)[:MAX_SHOWN] if isinstance(value, str | int | float) else type(value).__name__
        raise Damaged(f"{file} is damaged: {where}={shown}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise Damaged(f"{file} is damaged: {error}") from None
    if step_of(path) not in (-1, manifest.step):
        raise Damaged(f"{file} is damaged: it says step={manifest.step}, in a folder of another step")
    return manifest


def _check_same_run(folder: Path, run: Run, corpus: Prepared, found: Checkpoint) -> None:
    manifest = found.manifest
    check_tokenizer(folder, corpus.tokenizer, manifest.tokenizer)
    trained = settings_of(found.path, manifest)
    check_same_settings(folder, run, trained)
    check_steps(folder, run, trained.steps, manifest.step, is_finished(folder))
    if (manifest.loss_scale is None) != (run.precision != "fp16"):
        raise UserError(f"{found.path}/{MANIFEST} does not fit the run's settings: its loss_scale is that of others")


def _warn_of_other_machine(folder: Path, manifest: Manifest, machine: Mapping[str, str | int]) -> None:
    for name in {**machine, **manifest.machine}:
        before, now = manifest.machine.get(name), machine.get(name)
        if before != now:
            log.warning(f"{folder} ran with {name} {before}, this process has {now}: it goes on, not bit for bit")


def _machine(device: torch.device, run: Run, world: World) -> dict[str, str | int]:
    """The machine's properties that the bits of a run depend on, and its processes, where there are several."""
    cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    one = {"device": f"{device.type} {processor}", "threads": torch.get_num_threads(), "torch": torch.__version__}
    return one if world.size == 1 else one | {"processes": f"{world.size} of parallel={run.parallel.name}"}


def is_finished(folder: Path) -> bool:
    """Whether a run whose steps are all done has finished: its last act is to draw loss.png, and a process that resumes
    it removes the picture first."""
    return os.path.isfile(folder / PICTURE)


def load_optimizer(found: Checkpoint, state: TrainState) -> None:
    """Load a checkpoint's optimizer state, of which it holds the rows that this process has. A parameter that had no
    update, since it is frozen or got no gradient, has none. Raises UserError where it is not that of this optimizer
    after the checkpoint's steps."""
    tensors, written = found.tensors[OPTIMIZER], found.written(OPTIMIZER)
    names = _parameter_names(state)
    expected = _expected_state(found, state)
    for key in {**expected, **tensors}:
        fault = _shape_fault(key, written.get(key), expected.get(key)) or _numbers_fault(
            key, tensors[key], expected[key], found.manifest.step
        )
        if fault:
            raise UserError(f"{found.path}/{OPTIMIZER} does not fit this run's optimizer: {fault}")
    index = {name: i for i, name in enumerate(names)}
    state_by_index = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        state_by_index.setdefault(index[name], {})[part] = tensor
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": state_by_index, "param_groups": groups})


def _expected_state(found: Checkpoint, state: TrainState) -> dict[str, StateTensor]:
    """The tensors that a checkpoint must hold for the optimizer. Parameters that are trained and have none at all are
    named in a warning."""
    expected = {}
    without = []
    for name in _parameter_names(state):
        shard = state.precision.shards[name]
        kept = state.optimizer.state_layout(shard.local)
        layout = {f"{name}/{part}": tensor.in_place_of(shard.local.shape, shard.shape) for part, tensor in kept.items()}
        if found.tensors[OPTIMIZER].keys() & layout.keys():
            expected |= layout
        elif layout and shard.local.requires_grad:
            without.append(name)
    if without:
        more = f" and {len(without) - MAX_NAMED} more" if len(without) > MAX_NAMED else ""
        log.warning(
            f"{found.path}/{OPTIMIZER} holds nothing of {', '.join(without[:MAX_NAMED])}{more}: they had no update"
        )
    return expected


def _shape_fault(key: str, tensor: Tensor | None, kept: StateTensor | None) -> str | None:
    """Return why a tensor is not of the kind that an optimizer has; None where it is."""
    if tensor is None:
        return f"it lacks {key}"
    if kept is None:
        return f"it holds {key}, which this optimizer does not have"
    if tensor.shape != kept.shape:
        return f"{key} has shape {tuple(tensor.shape)}, not {tuple(kept.shape)}"
    if tensor.dtype != kept.dtype:
        return f"{key} is {tensor.dtype}, not {kept.dtype}"
    return None


def _numbers_fault(key: str, tensor: Tensor, kept: StateTensor, step: int) -> str | None:
    """Return why an optimizer does not have these numbers after `step` steps; None where it may."""
    if not (tensor >= kept.minimum).all():
        return f"{key} holds a number that is not at least {kept.minimum}"
    if kept.counts and not (tensor <= step and tensor == tensor.floor()):
        return f"{key} is {tensor.item():g}, in a checkpoint of {step} steps"
    return None


def _parameter_names(state: TrainState) -> list[str]:
    """The parameters' names in the optimizer's own order, which its state is indexed by."""
    name_of = {shard.local: name for name, shard in state.precision.shards.items()}
    return [name_of[parameter] for group in state.optimizer.param_groups for parameter in group["params"]]


def model_tensors(state: TrainState) -> dict[str, Tensor | Piece]:
    """The weights and buffers of a model as they are stored; of what is shared among processes, this one's rows."""
    stored_rows = {
        f"{name}.weight": module.vocab_size
        for name, module in state.model.named_modules()
        if isinstance(module, PaddedEmbedding)
    }
    weights = {name: _stored(shard, stored_rows.get(name)) for name, shard in state.precision.shards.items()}
    return weights | dict(state.model.named_buffers())


def _stored(shard: Shard, stored_rows: int | None = None) -> Tensor | Piece:
    if not shard.is_whole:
        return Piece.of(shard, stored_rows)
    return shard.local.detach() if stored_rows is None else shard.local.detach()[:stored_rows]


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor | Piece]:
    names = _parameter_names(state)
    state_by_index = state.optimizer.state_dict()["state"]
    return {
        f"{names[i]}/{part}": _stored(state.precision.shards[names[i]].beside(tensor))
        for i, parts in state_by_index.items()
        for part, tensor in parts.items()
        if tensor is not None  # such as the momentum of an SGD that has none
    }

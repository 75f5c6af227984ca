"""A Hugging Face checkpoint folder, opened strictly: its configuration, its shards, and whether they belong together.

Nothing here reads weights (but to compare what is stored twice), imports torch, or runs code that lies in the folder.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from plans.checkpoint.cache import find_snapshot
from plans.checkpoint.foreign import foreign_weights, holds_adapter
from plans.checkpoint.gguf import SUFFIX, open_gguf
from plans.checkpoint.names import (
    EMBEDDING,
    HEAD,
    canonical_names,
    final_norm,
    is_leftover,
    unit_of,
)
from plans.checkpoint.packed import check_packed
from plans.checkpoint.same import has_own_head
from plans.checkpoint.scales import check_scaled, check_scales_are_meant, is_stored
from plans.checkpoint.units import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    StoredTensor,
)
from plans.checkpoint.weights import Weights, incomplete, open_weights
from plans.config.config import ModelConfig, read_config
from plans.dtypes import STORED_DTYPES
from plans.errors import InputError, printable
from plans.reading.files import explain_os_error


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, a GGUF file, or a bare `config.json` (planning before downloading).

    Args:
        path: folder with `config.json` and safetensors files (or with `config.json` alone), a repository's folder in
            the Hugging Face cache, or the path of a configuration or a GGUF file (of a split one the first).

    Raises:
        InputError: a file is missing, malformed or contradicts another; the message names it.
        IntegrityError: a shard is truncated or its layout is broken.
        MachineError: a file cannot be read.
    """
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise (explain_os_error(error, path) if isinstance(error, OSError) else InputError(str(error))) from None
    if is_file and path.name == INDEX_NAME:
        raise InputError(
            "is the index of a checkpoint", where=path, hint=f"give its folder: {path.parent}", code="E-MISSING"
        )
    if is_file and path.suffix == ".json":
        return Checkpoint(path, None, read_config(path), (), {}, ())
    if is_file and path.suffix == SUFFIX:
        return open_gguf(path)
    if not is_dir:
        what = "is a file, not a checkpoint folder" if path.exists() else "no such file or folder"
        raise InputError(
            what,
            where=path,
            expected=f"a folder with {CONFIG_NAME} and *.safetensors, a .gguf file, or a {CONFIG_NAME}",
            code="E-MISSING",
        )
    return _open_folder(find_snapshot(path))


def _open_folder(folder: Path) -> Checkpoint:
    names = _list_folder(folder)
    if CONFIG_NAME not in names:
        raise foreign_weights(folder, names) or InputError(
            f"no {CONFIG_NAME} in the folder",
            where=folder,
            expected=f"{CONFIG_NAME} and {SINGLE_NAME} or {INDEX_NAME}",
            code="E-MISSING",
        )
    _check_links(folder, names)
    config = read_config(folder / CONFIG_NAME)
    weights = open_weights(folder, names, is_downloading=_is_downloading(folder))
    warnings = (*_code_warnings(config, names), *weights.warnings)
    if not weights.shards:
        return _without_weights(folder, names, config, warnings)
    if holds_adapter(names):
        warnings += ("an adapter lies beside the weights; it is not applied: merge it first if it is wanted",)
    tensors, left_out = _text_tensors(config, _merge(folder, weights))
    _check_units(folder, config, tensors, weights)
    entries = {name: stored.entry for name, stored in tensors.items()}
    if config.packing is not None:
        check_packed(entries, config.packing, where=folder)
    elif config.quantization is None:
        check_scales_are_meant(entries, where=folder)
    else:
        check_scaled(entries, where=folder)
    opened = Checkpoint(folder, folder, config, weights.shards, tensors, (*warnings, *left_out), weights.index_dtype)
    return _with_ties_compared(opened, folder)


def _list_folder(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise explain_os_error(error, folder) from None


def link_home(folder: Path) -> Path:
    """Return the folder that links inside a checkpoint may not leave: its own, or the repository of a snapshot."""
    home = folder.resolve()
    return home.parent.parent if home.parent.name == "snapshots" else home


def _check_links(folder: Path, names: set[str]) -> None:
    """Refuse links that lead nowhere or out of the folder; a Hugging Face snapshot may link into its own repository."""
    tree = link_home(folder)
    for name in sorted(names):
        path = folder / name
        if not (name in {CONFIG_NAME, INDEX_NAME} or name.endswith(".safetensors")) or not path.is_symlink():
            continue
        if not path.exists():
            raise incomplete(folder, f"{printable(name)} is a link to a file that is not there")
        if not path.resolve().is_relative_to(tree):
            raise InputError(
                f"{printable(name)} is a link out of the folder",
                where=folder,
                hint="copy the file into the folder",
                code="E-SYMLINK",
            )


def _is_downloading(folder: Path) -> bool:
    """Whether the Hugging Face cache that holds this snapshot has a blob under way."""
    home = folder.resolve()
    return home.parent.name == "snapshots" and any((home.parent.parent / "blobs").glob("*.incomplete"))


def _code_warnings(config: ModelConfig, names: set[str]) -> tuple[str, ...]:
    if config.runs_custom_code or any(name.endswith(".py") for name in names):
        return ("the checkpoint brings Python code of its own, or names some elsewhere; it is ignored and never run",)
    return ()


def _without_weights(folder: Path, names: set[str], config: ModelConfig, warnings: tuple[str, ...]) -> Checkpoint:
    """A folder with `config.json` alone is enough to plan; one with anything else in place of weights is explained."""
    unfinished = sorted(n for n in names if n.endswith((".incomplete", ".part")))
    if unfinished or _is_downloading(folder):
        raise incomplete(folder, f"no {SINGLE_NAME}" + (f", but {printable(unfinished[0])}" if unfinished else ""))
    foreign = foreign_weights(folder, names)
    if foreign is not None:
        raise foreign
    said = f"no weights in {printable(folder)}: sizes come from {CONFIG_NAME} alone, by formula"
    return Checkpoint(folder, None, config, (), {}, (*warnings, said))


def _merge(folder: Path, weights: Weights) -> Mapping[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in weights.shards:
        for name, entry in shard.header.tensors.items():
            if name in tensors:
                raise InputError(
                    f"{name} is in {tensors[name].file} and in {shard.name}", where=folder, code="E-DUPLICATE"
                )
            tensors[name] = StoredTensor(shard.name, entry, name)
    canonical = canonical_names(tensors, where=folder)
    return {canonical[name]: stored for name, stored in tensors.items()}


def _text_tensors(
    config: ModelConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[Mapping[str, StoredTensor], tuple[str, ...]]:
    """Leave out what the text part of a larger model does not use, and say so."""
    said: tuple[str, ...] = ()
    renamed = next(((stored.name, name) for name, stored in tensors.items() if stored.name != name), None)
    if renamed is not None:
        said = (f"names are read without what was put in front: {renamed[0]} is {renamed[1]}",)
    if config.part_of is None:
        return tensors, said
    text = {name: stored for name, stored in tensors.items() if unit_of(name) is not None or is_leftover(name)}
    others = [stored for name, stored in tensors.items() if name not in text]
    kinds = sorted({stored.name.removeprefix("model.").partition(".")[0] for stored in others})
    num_bytes = sum(stored.entry.size_bytes for stored in others)
    part = f"only the text part ({config.model_type}) of this {printable(config.part_of)} model is read"
    rest = f"; {len(others)} tensors ({num_bytes} bytes) of {', '.join(kinds[:5])} are left out" if others else ""
    return text, (*said, part + rest)


def _with_ties_compared(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A head of its own beside a claimed tie is counted, exported and run as what it is."""
    if not checkpoint.config.tie_word_embeddings or not any(n.startswith("lm_head.") for n in checkpoint.tensors):
        return checkpoint
    if not has_own_head(checkpoint, folder):
        return checkpoint
    said = f"{CONFIG_NAME} says the head is tied, but {HEAD} does not hold what {EMBEDDING} holds: both are used"
    config = replace(checkpoint.config, tie_word_embeddings=False)
    warnings = checkpoint.warnings if config.part_of else (*checkpoint.warnings, said)
    return replace(checkpoint, config=config, warnings=warnings)


def _check_units(folder: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor], weights: Weights) -> None:
    """Every unit must be there and nothing may lie beyond the last layer."""
    try:
        _check_layers(folder, config, tensors)
        _check_tables(folder, config, tensors)
    except InputError as error:
        if not weights.missing:
            raise
        raise InputError(
            f"lists {weights.missing}, which is missing, and {SINGLE_NAME} is not the whole model: {error.what}",
            where=folder / INDEX_NAME,
            hint="fetch it again",
            code="E-INDEX",
        ) from None


def _check_layers(folder: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
    owners = {unit_of(name) for name in tensors}
    present = {key[1] for key in owners if key and key[0] == "layer"}
    beyond = sorted(i for i in present if i >= config.num_hidden_layers + config.num_mtp_layers)
    gaps = sorted(set(range(config.num_hidden_layers)) - present)
    if beyond:
        raise InputError(
            f"holds layer {beyond[0]}, but {CONFIG_NAME} says num_hidden_layers {config.num_hidden_layers}",
            where=folder,
            code="E-LAYERS",
        )
    if gaps:
        found = "" if present else f"; its names are like {printable(min(tensors, default='none'))}"
        raise InputError(
            f"no tensors of layer {gaps[0]}{found}",
            where=folder,
            expected=f"layers 0 to {config.num_hidden_layers - 1}",
            code="E-LAYERS",
        )


def _check_tables(folder: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> None:
    is_packed = config.quantization is not None
    required = [EMBEDDING, final_norm(config.model_type)] + ([] if config.tie_word_embeddings else [HEAD])
    for name in required:
        if name not in tensors and not (is_packed and is_stored(name, tensors.keys())):
            says = "is false" + (
                "" if "tie_word_embeddings" in config.raw else f" by default ({CONFIG_NAME} says nothing)"
            )
            tied = f" and tie_word_embeddings {says}" if name == HEAD else ""
            raise InputError(f"no tensor {name}{tied}", where=folder, code="E-LAYERS")
    rows = [config.vocab_size, config.hidden_size]
    for name in (EMBEDDING, HEAD):
        stored = tensors.get(name)
        if stored is None or (is_packed and not STORED_DTYPES[stored.entry.dtype].is_float):
            continue  # packed: its shape is the format's business
        if list(stored.entry.shape) != rows:
            raise InputError(
                f"{name} has shape {list(stored.entry.shape)}, {CONFIG_NAME} says {rows}", where=folder, code="E-SHAPE"
            )

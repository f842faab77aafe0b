"""Any checkpoint as the recipes of the Hub's layout."""

from __future__ import annotations

from pathlib import Path

from ..configuration_skywork import SkyworkConfig, SkyworkMoeConfig
from ..headers import StoredTensor, read_headers
from ..untrusted import read_json
from .inspection import CONFIG_FILE, inspect_checkpoint, read_config, weight_files
from .layouts import hub_shapes, is_base_model, is_training_layout, layout_named, to_hub
from .megatron import is_megatron, read_megatron
from .recipes import Recipe, Source, unchanged

_IGNORED = "rotary_emb.inv_freq"


def read_source(folder: Path, config: SkyworkConfig | SkyworkMoeConfig | None = None) -> Source:
    """Find out what a checkpoint is, and that it is whole. Reads no weights.

    Args:
        folder: in the Hub's layout, the training layout, as a Llama, or of Megatron-LM.
        config: for Megatron's, which may not say enough of themselves.

    Raises:
        ValueError: a file is missing, cut off or no checkpoint, or tensors are missing, unexpected or of a shape that
            the config does not say. Names the first few.
    """
    if is_megatron(folder):
        return read_megatron(folder, config or _config_beside(folder))
    _check_whole(folder)
    files, _, _ = weight_files(folder)
    stored = read_headers(files)
    if is_base_model(stored):
        raise ValueError(
            f"{folder} holds a base model (names without `model.`), which has no head: give the checkpoint that it "
            "was made from, or save it with a new head, by AutoModelForCausalLM.from_pretrained and save_pretrained."
        )
    found = read_config(folder / CONFIG_FILE, is_training_layout(stored))
    layout = layout_named(read_json(folder / CONFIG_FILE)["model_type"], stored)
    recipes, ignored = _recipes(stored, list(hub_shapes(found)))
    return Source(layout, folder, found, recipes, ignored)


def _config_beside(folder: Path) -> SkyworkConfig | SkyworkMoeConfig | None:
    # Means what `config` means: the training layout's defaults, such as a gate of two layers, are not Megatron-LM's.
    file = folder / CONFIG_FILE
    return read_config(file) if file.exists() else None


def _check_whole(folder: Path) -> None:
    report = inspect_checkpoint(folder)
    wrong = {
        "files are missing": report.missing_shards,
        "tensors are missing": report.missing,
        "tensors are unexpected": report.unexpected,
        "contradictions": report.contradictions,
    }
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{folder}: {what}: {', '.join(names[:3])}{more}. `skywork-hf inspect` shows all; take the files and "
                "config.json from where the weights came from."
            )


def _recipes(stored: dict[str, StoredTensor], order: list[str]) -> tuple[list[Recipe], list[StoredTensor]]:
    """One recipe for each stored tensor, those beside a quantised weight after it, and what nothing is made of."""
    places = {name: place for place, name in enumerate(order)}
    by_module = {name.rpartition(".")[0]: place for name, place in places.items()}

    def place_of(name: str) -> tuple[int, str]:
        name = to_hub(name)
        module = name
        while name not in places and module not in by_module and "." in module:
            module = module.rpartition(".")[0]
        return places.get(name, by_module.get(module, len(places))), name

    kept = sorted(
        (tensor for name, tensor in stored.items() if not name.endswith(_IGNORED)), key=lambda t: place_of(t.name)
    )
    ignored = [tensor for name, tensor in stored.items() if name.endswith(_IGNORED)]
    return [unchanged(tensor, to_hub(tensor.name)) for tensor in kept], ignored

"""Upload a PEFT adapter to the Hub, with a model card: nothing but the adapter, its tokenizer and the card.

    python examples/push_adapter_to_hub.py adapter you/skywork-13b-chat-lora --base-model Skywork/Skywork-13B-base
    hf auth login       # and again: without a token nothing is sent, what would be is shown

`--base-model` is needed where the adapter was trained on a folder, which nobody else has under that name. A
`README.md` in the folder is the card, unless it is PEFT's empty form. The repository is private unless `--public`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# Not `training_args.bin`, a pickle, nor the Trainer's checkpoints.
UPLOADED = ("adapter_model*.safetensors*", "tokenizer*", "special_tokens_map.json", "chat_template*")
LICENCE = {
    "license": "other",
    "license_name": "skywork-community-license",
    "license_link": "https://github.com/SkyworkAI/Skywork/blob/main/Skywork%20Community%20License.pdf",
}
CARD = """# {title}

{kind} adapter for [{base}](https://huggingface.co/{base}), trained with skywork-hf.

```python
import skywork_hf  # the Auto classes know Skywork now
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto", device_map="experts")
tokenizer.add_chat_tokens(model)
model = PeftModel.from_pretrained(model, "{repo}")
```

| | |
|---|---|
{settings}
"""
SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules")
PEFTS_FORM = "[More Information Needed]"


def hub_name(name: str) -> str:
    """`name`, if a repository may be called so."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def read_config(folder: Path, base_model: str | None) -> dict[str, Any]:
    """The adapter's config, with the name of the base model that others can load.

    Raises:
        SystemExit: there is no adapter in the folder, or nobody else could find its base.
    """
    file = folder / "adapter_config.json"
    if not file.is_file() or not list(folder.glob("adapter_model*.safetensors")):
        raise SystemExit(f"{folder} holds no adapter: expected adapter_config.json and adapter_model.safetensors.")
    config = json.loads(file.read_text(encoding="utf-8"))
    base = base_model or config["base_model_name_or_path"]
    if Path(base).exists() or base.count("/") > 1:
        raise SystemExit(f"{file} names the base model {base}, a folder: give its name on the Hub by --base-model.")
    return config | {"base_model_name_or_path": base}


def card_of(folder: Path, config: dict[str, Any], repo: str) -> str:
    """The folder's `README.md`, or one that says what the adapter is and how to load it."""
    own = folder / "README.md"
    if own.is_file() and PEFTS_FORM not in own.read_text(encoding="utf-8"):
        return own.read_text(encoding="utf-8")
    base = config["base_model_name_or_path"]
    licence = LICENCE if base.startswith("Skywork/") else {}
    data = ModelCardData(base_model=base, library_name="peft", pipeline_tag="text-generation", **licence)
    text = CARD.format(
        title=repo.rpartition("/")[2],
        kind=config["peft_type"],
        base=base,
        repo=repo,
        settings="\n".join(f"| `{name}` | {setting(config[name])} |" for name in SETTINGS if name in config),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def setting(value: Any) -> str:
    return ", ".join(sorted(value)) if isinstance(value, list) else str(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="the folder that PEFT or the Trainer saved")
    parser.add_argument("repo", type=hub_name, help="the repository on the Hub, as you/name")
    base_help = "the base model on the Hub; default: what the adapter names"
    parser.add_argument("--base-model", type=hub_name, help=base_help)
    parser.add_argument("--public", action="store_true", help="the repository, if it is new, is for everybody to see")
    options = parser.parse_args(arguments)

    config = read_config(options.adapter, options.base_model)
    contents: dict[str, Path | bytes] = {
        file.name: file for pattern in UPLOADED for file in sorted(options.adapter.glob(pattern))
    }
    contents["adapter_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    contents["README.md"] = card_of(options.adapter, config, options.repo).encode()

    print(f"For https://huggingface.co/{options.repo}:")
    for name, content in contents.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"  {size / 2**30:9.6f} GiB  {name}")
    if get_token() is None:
        print(f"\nREADME.md:\n\n{contents['README.md'].decode()}")
        print("Nothing was sent, for there is no token: `hf auth login`, or set HF_TOKEN.")
        return
    api = HfApi()
    repo = api.create_repo(options.repo, private=not options.public, exist_ok=True).repo_id
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    print(f"Sent: {api.create_commit(repo, operations, commit_message='Upload the adapter').commit_url}")


if __name__ == "__main__":
    main()

"""Importing is all it takes, a second time and after another package too; no code of a checkpoint ever runs."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import checkpoint, tiny_moe_config
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

import skywork_hf
from skywork_hf import SkyworkConfig, SkyworkForCausalLM, SkyworkMoeConfig, SkyworkMoeForCausalLM, SkyworkTokenizer
from skywork_hf.registration import register

CLASSES = {
    "skywork-13b-tiny": (SkyworkConfig, SkyworkForCausalLM),
    "skywork-moe-tiny": (SkyworkMoeConfig, SkyworkMoeForCausalLM),
}


@pytest.fixture(params=CLASSES)
def hostile(request, tmp_path) -> tuple[Path, str]:
    """A released checkpoint whose remote code writes a file when it is imported."""
    folder = tmp_path / request.param
    shutil.copytree(checkpoint(request.param), folder)
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    kind = "_moe" if "moe" in request.param else ""
    for file in (f"configuration_skywork{kind}.py", f"modeling_skywork{kind}.py", "tokenization_skywork.py"):
        (folder / file).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": f"configuration_skywork{kind}.SkyworkConfig",
        "AutoModel": f"modeling_skywork{kind}.SkyworkModel",
        "AutoModelForCausalLM": f"modeling_skywork{kind}.SkyworkForCausalLM",
        "AutoModelForSequenceClassification": f"modeling_skywork{kind}.SkyworkForSequenceClassification",
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert "auto_map" in json.loads((folder / "tokenizer_config.json").read_text())
    return folder, request.param


@pytest.mark.parametrize("trust", [None, False, True])
def test_remote_code_is_neither_asked_for_nor_run(hostile, trust, monkeypatch):
    folder, name = hostile
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to trust remote code"))
    options = {} if trust is None else {"trust_remote_code": trust}
    config_class, model_class = CLASSES[name]
    assert type(AutoConfig.from_pretrained(folder, **options)) is config_class
    assert type(AutoTokenizer.from_pretrained(folder, **options)) is SkyworkTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model) is model_class
    assert type(AutoModel.from_pretrained(folder, **options)).__module__.startswith("skywork_hf.")
    assert not (folder.parent / "ran").exists()

    model.save_pretrained(folder.parent / "saved")
    AutoTokenizer.from_pretrained(folder, **options).save_pretrained(folder.parent / "saved")
    for file in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (folder.parent / "saved" / file).read_text()
    assert not list((folder.parent / "saved").glob("*.py"))


def test_registering_again_is_silent(caplog):
    logging.getLogger("skywork_hf").propagate = True
    before = {key: CONFIG_MAPPING[key] for key in ("skywork", "skywork_moe")}
    register()
    assert {key: CONFIG_MAPPING[key] for key in before} == before
    assert not caplog.records


class SomebodyElsesConfig(PreTrainedConfig):
    model_type = "skywork_moe"


class SomebodyElsesTokenizer(SkyworkTokenizer):
    pass


def test_names_that_another_package_took_are_taken_back_and_it_says_so(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    logger = logging.getLogger("skywork_hf.registration")
    logger.addHandler(caplog.handler)
    SomebodyElsesTokenizer.__name__ = "SkyworkTokenizer"
    AutoConfig.register("skywork_moe", SomebodyElsesConfig, exist_ok=True)
    AutoTokenizer.register(SomebodyElsesConfig, SomebodyElsesTokenizer)
    try:
        assert CONFIG_MAPPING["skywork_moe"] is SomebodyElsesConfig
    finally:
        register()
        logger.removeHandler(caplog.handler)
    assert "SomebodyElsesConfig" in caplog.text
    assert "skywork_moe" in caplog.text
    assert type(AutoConfig.from_pretrained(checkpoint("skywork-moe-tiny"))) is SkyworkMoeConfig
    assert type(AutoTokenizer.from_pretrained(checkpoint("skywork-moe-tiny"))) is SkyworkTokenizer


def test_public_names():
    for name in skywork_hf.__all__:
        assert getattr(skywork_hf, name).__doc__, name
    assert skywork_hf.__version__


def test_modeling_does_not_import_what_stands_above_it():
    """The arrows of the house point one way."""
    source = Path(skywork_hf.__file__).parent
    for file in [*source.glob("modeling_*.py"), *source.glob("configuration_*.py"), *source.glob("tokenization_*.py")]:
        text = file.read_text()
        for above in ("registration", "demo", "cli", "placement", "checkpoints", "training"):
            assert f"from .{above}" not in text, f"{file.name} imports {above}"


PROGRAM = """
import sys
from transformers import AutoConfig
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__, sys.argv[2:], __name__)
"""


@pytest.mark.parametrize("as_module", [False, True])
def test_a_program_that_knows_nothing_of_us(as_module, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    how = ["-m", "program"] if as_module else [str(tmp_path / "program.py")]
    arguments = [str(checkpoint("skywork-moe-tiny")), "--flag", "x"]
    run = subprocess.run(
        [sys.executable, "-m", "skywork_hf", *how, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "SkyworkMoeConfig ['--flag', 'x'] __main__"


def test_running_nothing_says_how():
    run = subprocess.run([sys.executable, "-m", "skywork_hf"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "usage: python -m skywork_hf SCRIPT.py" in run.stderr


def test_a_command_that_is_no_module_runs():
    run = subprocess.run(
        [sys.executable, "-m", "skywork_hf", "-m", "transformers", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "chat" in run.stdout


def test_fused_names_are_registered_for_our_model_type_only():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    mapping = get_checkpoint_conversion_mapping(tiny_moe_config().model_type)
    assert [converter.target_patterns for converter in mapping] == [
        ["block_sparse_moe.experts.gate_up_proj"],
        ["block_sparse_moe.experts.down_proj"],
    ]
    assert get_checkpoint_conversion_mapping("skywork") is None

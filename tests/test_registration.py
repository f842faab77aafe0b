"""Importing is all it takes, in any order and in processes that others start; other programs find our names where they
look; no code of a checkpoint ever runs, and no module needs an extra."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import checkpoint, tiny_dense_config, tiny_moe_config, tokens
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto, tokenization_auto

import skywork_hf
from skywork_hf import (
    SkyworkConfig,
    SkyworkForCausalLM,
    SkyworkForSequenceClassification,
    SkyworkModel,
    SkyworkMoeConfig,
    SkyworkMoeForCausalLM,
    SkyworkMoeModel,
    SkyworkTokenizer,
    registration,
)
from skywork_hf.registration import register

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "import_every_module.py"
EXTRAS = ("bitsandbytes", "gguf", "hypothesis", "llama_cpp", "matplotlib", "peft", "pytest", "sentencepiece", "triton")

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


def printed(program: str, *arguments: str, **options: Any) -> str:
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


# --- public names


def test_public_names():
    for name in skywork_hf.__all__:
        assert getattr(skywork_hf, name).__doc__, name
        assert name in dir(skywork_hf)
    assert skywork_hf.__version__
    assert pickle.loads(pickle.dumps(SkyworkMoeConfig)) is SkyworkMoeConfig
    with pytest.raises(AttributeError, match="no attribute 'SkyworkMoe'"):
        _ = skywork_hf.SkyworkMoe


def test_type_checkers_see_the_same_names_in_the_same_modules():
    [block] = [node for node in ast.parse(inspect.getsource(skywork_hf)).body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == skywork_hf._MODULES


def test_importing_costs_nothing_until_transformers_is_used():
    heavy = "sorted({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules))"
    assert printed(f"import sys, skywork_hf, skywork_hf.cli; dir(skywork_hf); print({heavy})") == "[]"


def test_no_module_needs_an_extra_to_import():
    blocked = f"import runpy, sys; sys.modules.update(dict.fromkeys({EXTRAS!r})); "
    assert "modules import." in printed(f"{blocked}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")


# --- names that other programs look up

FAMILIES = {
    SkyworkConfig: (SkyworkModel, SkyworkForCausalLM),
    SkyworkMoeConfig: (SkyworkMoeModel, SkyworkMoeForCausalLM),
}


def test_our_classes_are_found_by_name():
    for ours in (*FAMILIES, *(model for models in FAMILIES.values() for model in models), SkyworkTokenizer):
        assert getattr(transformers, ours.__name__) is ours
        assert getattr(sys.modules["transformers"], ours.__name__) is ours
    for config, (base, model) in FAMILIES.items():
        assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] == model.__name__
        assert modeling_auto.MODEL_MAPPING_NAMES[config.model_type] == base.__name__
        assert tokenization_auto.TOKENIZER_MAPPING_NAMES[config.model_type] == SkyworkTokenizer.__name__
        assert tokenization_auto.tokenizer_class_from_name(SkyworkTokenizer.__name__) is SkyworkTokenizer
    names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert names["skywork"] == SkyworkForSequenceClassification.__name__
    assert "skywork_moe" not in names


@pytest.mark.parametrize("make", [lambda: tiny_dense_config(), lambda: tiny_moe_config()])
def test_smoothed_labels_are_shifted(make, tmp_path):
    """The Trainer shifts them for the models whose names it knows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make())
    trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none"))
    ids = tokens()
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
        log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
    likelihoods = log_probabilities.gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(loss, -0.9 * likelihoods.mean() - 0.1 * log_probabilities.mean())


@pytest.mark.parametrize("name", CLASSES)
def test_a_released_config_names_the_class_that_it_is(name, tmp_path):
    config_class, model_class = CLASSES[name]
    assert json.loads((checkpoint(name) / "config.json").read_text())["architectures"] == ["SkyworkForCausalLM"]
    config = AutoConfig.from_pretrained(checkpoint(name))
    assert config.architectures == [model_class.__name__]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [model_class.__name__]
    assert config_class(architectures=["SkyworkMoeModel"]).architectures == [FAMILIES[config_class][0].__name__]


# --- the import hook

# After torch, which takes the time; each in a process of its own.
ORDERS = {
    "a module of ours first": "import skywork_hf.training.aux_loss, transformers",
    "transformers first, and used": "import transformers; from transformers import LlamaModel; import skywork_hf",
    "in threads": """
import threading, skywork_hf
programs = ["import transformers", "from skywork_hf import SkyworkConfig", "from transformers import AutoModel"] * 3
threads = [threading.Thread(target=exec, args=(program, {})) for program in programs]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import transformers
""",
}
EACH_ORDER = f"""
import json, os, sys
import torch, accelerate, huggingface_hub, tokenizers
for order, program in json.loads({json.dumps(ORDERS)!r}).items():
    if os.fork() == 0:
        exec(program)
        for module in (transformers, sys.modules["transformers"]):
            assert module.SkyworkMoeForCausalLM.__module__ == "skywork_hf.modeling_skywork_moe"
            assert module.AutoConfig.for_model("skywork_moe").model_type == "skywork_moe"
        from transformers.trainer import DEFAULT_CALLBACKS
        assert [callback.__name__ for callback in DEFAULT_CALLBACKS].count("ReportRouterLoad") == 1
        assert type(transformers.__spec__.loader).__module__ == "_frozen_importlib_external"
        print(order, flush=True)
        os._exit(0)
    os.wait()
"""


def test_it_registers_whatever_comes_first():
    assert printed(EACH_ORDER).splitlines() == list(ORDERS)


LIBRARY = """
import sys, types
if "switch_of_the_library" not in sys.modules:
    raise ImportError("not today")
sys.modules[__name__] = types.ModuleType(__name__)  # as transformers does
sys.modules[__name__].__spec__ = __spec__
"""


@pytest.fixture
def library(tmp_path, monkeypatch) -> list[Any]:
    """A library `library_of_names` that is waited for, and the modules that were registered in."""
    (tmp_path / "library_of_names.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    registered: list[Any] = []
    monkeypatch.setitem(registration._ONCE_LOADED, "library_of_names", registered.append)
    yield registered
    for name in ("library_of_names", "switch_of_the_library"):
        sys.modules.pop(name, None)


def test_the_hook_outlives_questions_errors_and_reloads(library):
    spec = importlib.util.find_spec("library_of_names")
    assert spec.loader.get_source("library_of_names") == LIBRARY  # a loader as any other
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module("library_of_names")
    assert not library
    sys.modules["switch_of_the_library"] = sys
    module = importlib.import_module("library_of_names")
    assert library == [module]
    assert isinstance(module.__spec__.loader, importlib.machinery.SourceFileLoader)
    module = importlib.reload(module)
    assert library[1:] == [module]
    register()
    assert library[2:] == [module]


def test_what_is_not_there_stays_so(library, tmp_path):
    (tmp_path / "library_of_names.py").unlink()
    importlib.invalidate_caches()
    assert importlib.util.find_spec("library_of_names") is None
    with pytest.raises(ModuleNotFoundError, match="library_of_names"):
        importlib.import_module("library_of_names")
    sys.modules["library_of_names"] = None  # how a library is blocked
    register()
    assert not library


def test_beside_a_finder_that_asks_all_others(library, monkeypatch):
    class Asking:
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
            if fullname != "library_of_names":
                return None
            others = [finder for finder in sys.meta_path if finder is not self]
            return next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)

    sys.modules["switch_of_the_library"] = sys
    for position in (0, len(sys.meta_path)):
        with monkeypatch.context() as patch:  # one at a time: two would ask each other for ever
            patch.setattr(sys, "meta_path", [*sys.meta_path[:position], Asking(), *sys.meta_path[position:]])
            sys.modules.pop("library_of_names", None)
            importlib.import_module("library_of_names")
    assert len(library) == 2


@pytest.mark.parametrize("constants", ["", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = ['llama']"])
def test_another_peft_may_be_as_it_likes(constants):
    module = type(sys)("peft.utils.constants")
    exec(constants, vars(module))
    before = dict(vars(module))
    registration._set_default_targets(module)
    assert vars(module) == before


# --- programs that do not import us

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
    # That of 5.19 wants `requests`, which transformers does not install.
    pytest.importorskip("transformers.cli.transformers", exc_type=ImportError)
    run = subprocess.run(
        [sys.executable, "-m", "skywork_hf", "-m", "transformers", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "chat" in run.stdout


CHILDREN = """
import multiprocessing, subprocess, sys
def child():
    print("skywork_hf" in sys.modules, flush=True)
    subprocess.run([sys.executable, "-c", "import sys; print('skywork_hf' in sys.modules)"], check=True)
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
"""


@pytest.mark.parametrize("build", ["build_wheel", "build_editable"])
def test_processes_that_a_program_starts_register_and_others_do_not(build, tmp_path):
    hook = f"import hatchling.build; print(hatchling.build.{build}({str(tmp_path)!r}))"
    wheel = tmp_path / printed(hook, cwd=ROOT).splitlines()[-1]
    venv.create(tmp_path / "venv")
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "program.py").write_text(CHILDREN)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for how, expected in ((["-m", "skywork_hf"], ["True"] * 2), ([], ["False"] * 2)):
        command = [tmp_path / "venv" / "bin" / "python", *how, tmp_path / "program.py"]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)
        assert run.stdout.split() == expected
        assert not run.stderr


def test_fused_names_are_registered_for_our_model_type_only():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    mapping = get_checkpoint_conversion_mapping(tiny_moe_config().model_type)
    assert [converter.target_patterns for converter in mapping] == [
        ["block_sparse_moe.experts.gate_up_proj"],
        ["block_sparse_moe.experts.down_proj"],
    ]
    assert get_checkpoint_conversion_mapping("skywork") is None

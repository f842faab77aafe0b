"""PEFT's adapters on the experts of both layouts survive a round trip."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYOUTS, tiny_moe_config
from transformers.conversion_mapping import get_model_conversion_mapping

from skywork_hf import SkyworkMoeForCausalLM

TARGETS = {
    "modular": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "fused": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_lora_of_the_experts_loads_back(layout, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = SkyworkMoeForCausalLM(tiny_moe_config(experts_layout=layout)).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.arange(3, 15).unsqueeze(0)
    lora = peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS[layout])
    adapted = peft.get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    base = SkyworkMoeForCausalLM.from_pretrained(tmp_path / "model", experts_layout=layout)
    assert not torch.allclose(base(ids).logits, adapted(ids).logits, atol=1e-2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)
    base = SkyworkMoeForCausalLM.from_pretrained(tmp_path / "model", experts_layout=layout)
    base.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(base(ids).logits, adapted(ids).logits)


def test_only_the_fused_layout_renames_weights():
    converted = {layout: SkyworkMoeForCausalLM(tiny_moe_config(experts_layout=layout)) for layout in LAYOUTS}
    assert get_model_conversion_mapping(converted["modular"], add_legacy=False) == []
    assert len(get_model_conversion_mapping(converted["fused"], add_legacy=False)) == 2

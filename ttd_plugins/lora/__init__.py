"""LoRA (arXiv 2106.09685) for any backbone, through peft: attach, merge, remove, save and load."""

from ttd_plugins.lora.attach import LoRABackbone, attach_lora
from ttd_plugins.lora.files import CONFIG_FILE, OWN_TYPE, PEFT_TYPE, WEIGHTS_FILE, load_lora, save_lora
from ttd_plugins.lora.handle import ADAPTER_NAME, PREFIX, TOWERS, LoRAHandle, Tower
from ttd_plugins.lora.scaling import scale_lora, scaled_lora

__all__ = [
    "ADAPTER_NAME",
    "CONFIG_FILE",
    "OWN_TYPE",
    "PEFT_TYPE",
    "PREFIX",
    "TOWERS",
    "WEIGHTS_FILE",
    "LoRABackbone",
    "LoRAHandle",
    "Tower",
    "attach_lora",
    "load_lora",
    "save_lora",
    "scale_lora",
    "scaled_lora",
]

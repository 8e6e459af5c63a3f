"""Building blocks for adapters: base classes, dense modes, LoRA for attention, tokenisation, downloads and exports.

The modules need torch alone, except :mod:`~ttd_plugins.toolkit.attention_lora`, which needs peft. Backbone libraries
are passed in by the adapter.
"""

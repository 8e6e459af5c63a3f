"""Parts that adapters of several families share; torch alone, except ``attention_lora``, which needs peft."""

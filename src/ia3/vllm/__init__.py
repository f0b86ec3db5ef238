"""(IA)³ adapters wherever vLLM takes LoRA adapters; `plugin.py` is where to begin. Nothing here serves."""

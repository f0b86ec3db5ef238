"""(IA)³ adapters wherever vLLM takes LoRA adapters. Start with `plugin.py`. The server is in `ia3.serve`."""

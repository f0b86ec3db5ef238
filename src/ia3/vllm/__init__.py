"""(IA)³ adapters in vLLM: the plugin, and the engine behind `ia3 serve --engine vllm`."""

"""The plugin for vLLM; its modules but this one import vLLM and run where it is installed."""

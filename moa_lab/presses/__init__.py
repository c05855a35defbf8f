"""Other people's ways to drop KV entries (presses of NVIDIA/kvpress), and ours, on the same questions in one harness.

kvpress wants an older transformers than this project: what runs there (`harness`, `kvpress_presses`, and all that they import) needs
of it plans, masks and records only. `preparing` runs here, and leaves a folder with the model and the questions for the other side.
"""

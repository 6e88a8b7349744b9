"""vLLM as the engine behind `serve --engine vllm`: what starts it, and what it needs to serve these models on a CPU.

    launch.py    a MODEL_DIR and our options -> the command of vLLM's server
    plugin.py    what vLLM loads in each of its processes: on a CPU, mends for hybrids, LatentMoE and MTP
    parsers.py   reasoning and tool parsers for its API, from the native engine's state machines

On a GPU vLLM serves a MODEL_DIR with no code of ours but the parsers. docs/vllm.md tells what is mended and why.
"""

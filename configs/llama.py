"""Llama. `shardtrain train configs/llama.py:tiny` reaches a held-out loss near that of gpt.py:tiny."""

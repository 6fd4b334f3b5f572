"""Llama: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

    shardtrain train configs/llama.py:tiny

trains 0.9 M parameters on the King James Bible on eight simulated devices. Expect a held-out loss near 2.96
nats per token (unigram entropy 5.17) after three minutes on two cores.
"""

from shardtrain.config import MeshSizes, Optimizer, RunConfig, Text
from shardtrain.models import LlamaConfig
from shardtrain.models.llama import B1, B8, B70


def tiny() -> RunConfig:
    """As gpt.py:tiny."""
    return RunConfig(
        model=LlamaConfig(vocab=512, sequence=128, embed=128, layers=4, heads=8, kv_heads=4, mlp=384),
        data=Text(source="king_james", tokenizer="bpe:512", sequence=128),
        optimizer=Optimizer(learning_rate=2e-3, warmup=30),
        mesh=MeshSizes(data=2, fsdp=2, tensor=2),
        global_batch=32,
        groups=8,  # so that any layout of eight devices can go on with the run
        steps=300,
        eval_every=100,
        checkpoint_every=100,
        devices="cpu:8",
        output="runs/llama-tiny",
        sample="And the LORD said unto ",
    )


def _large(model: LlamaConfig, mesh: MeshSizes, name: str, learning_rate: float) -> RunConfig:
    return RunConfig(
        model=model,
        data=Text(source="king_james", tokenizer="bpe:8192", sequence=4096),
        optimizer=Optimizer(learning_rate=learning_rate, warmup=2000),
        mesh=mesh,
        precision="bf16",
        global_batch=512,
        steps=100000,
        eval_every=1000,
        checkpoint_every=500,
        output=f"runs/{name}",
    )


def b1() -> RunConfig:
    """Llama 3.2 1B (untied head) over fsdp."""
    return _large(B1, MeshSizes(fsdp=-1), "llama-1b", 3e-4)


def b8() -> RunConfig:
    """Llama 3 8B over fsdp."""
    return _large(B8, MeshSizes(fsdp=-1), "llama-8b", 3e-4)


def b70() -> RunConfig:
    """Llama 3 70B over fsdp, with tensor parallelism inside hosts of eight."""
    return _large(B70, MeshSizes(fsdp=-1, tensor=8), "llama-70b", 1.5e-4)

"""Mixture of experts: Mixtral and a DeepSeekMoE.

    shardtrain train configs/moe.py:tiny

trains 1.9 M parameters, of which a token meets 0.7 M, on the King James Bible on eight simulated devices, data, expert
and tensor parallel at once.
"""

from shardtrain.config import MeshSizes, Optimizer, RunConfig, Text
from shardtrain.models import MoEConfig
from shardtrain.models.moe import DEEPSEEK_16B, MIXTRAL_8X7B


def tiny() -> RunConfig:
    """As gpt.py:tiny, with eight experts of which a token takes two."""
    return RunConfig(
        model=MoEConfig(vocab=512, sequence=128, embed=128, layers=4, heads=8, kv_heads=4, expert_mlp=128),
        data=Text(source="king_james", tokenizer="bpe:512", sequence=128),
        optimizer=Optimizer(learning_rate=2e-3, warmup=30),
        mesh=MeshSizes(data=2, expert=2, tensor=2),
        global_batch=32,
        groups=8,  # so that any layout of eight devices can go on with the run
        steps=300,
        eval_every=100,
        checkpoint_every=100,
        devices="cpu:8",
        output="runs/moe-tiny",
        sample="And the LORD said unto ",
    )


def _large(model: MoEConfig, mesh: MeshSizes, name: str, learning_rate: float) -> RunConfig:
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


def mixtral_8x7b() -> RunConfig:
    """Mixtral 8x7B (47 B parameters, 13 B active): one expert a device inside hosts of eight, fsdp across."""
    return _large(MIXTRAL_8X7B, MeshSizes(fsdp=-1, expert=8), "mixtral-8x7b", 3e-4)


def deepseek_16b() -> RunConfig:
    """DeepSeekMoE 16B (2.8 B active): 64 fine-grained experts and two shared ones, balanced by a bias."""
    return _large(DEEPSEEK_16B, MeshSizes(fsdp=-1, expert=8), "deepseek-16b", 4e-4)

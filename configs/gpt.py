"""GPT-2 and GPT-3.

    shardtrain train configs/gpt.py:tiny

trains a GPT of 0.9 M parameters on the King James Bible on eight simulated devices, data, fsdp and tensor parallel at
once. Expect a held-out loss near 3.57 nats per token (unigram entropy 5.17) after three minutes on two cores.
"""

from shardtrain.config import MeshSizes, Optimizer, RunConfig, Text
from shardtrain.models import GPTConfig
from shardtrain.models.gpt import B175, SMALL, XL


def tiny() -> RunConfig:
    """The default job."""
    return RunConfig(
        model=GPTConfig(vocab=512, sequence=128, embed=128, layers=4, heads=8),
        data=Text(source="king_james", tokenizer="bpe:512", sequence=128),
        optimizer=Optimizer(learning_rate=2e-3, warmup=30, weight_decay=0.1),
        mesh=MeshSizes(data=2, fsdp=2, tensor=2),
        rules="fsdp_tensor",
        global_batch=32,
        groups=8,  # so that any layout of eight devices can go on with the run
        steps=300,
        eval_every=100,
        checkpoint_every=100,
        devices="cpu:8",
        output="runs/gpt-tiny",
        sample="And the LORD said unto ",
    )


def small() -> RunConfig:
    """GPT-2, 124 M parameters, on 8 accelerators; loss as in the GPT-2 paper takes text of your own."""
    return RunConfig(
        model=SMALL,
        data=Text(source="king_james", tokenizer="bpe:8192", sequence=1024),
        optimizer=Optimizer(learning_rate=6e-4, warmup=700, weight_decay=0.1),
        mesh=MeshSizes(data=-1),
        precision="bf16",
        global_batch=512,
        steps=20000,
        eval_every=500,
        checkpoint_every=1000,
        output="runs/gpt-small",
    )


def xl() -> RunConfig:
    """GPT-2 XL, 1.5 B parameters: parameters and optimizer divided over fsdp. Its 25 heads do not divide."""
    return RunConfig(
        model=XL,
        data=Text(source="king_james", tokenizer="bpe:8192", sequence=1024),
        optimizer=Optimizer(learning_rate=2e-4, warmup=700),
        mesh=MeshSizes(fsdp=-1),
        precision="bf16",
        global_batch=512,
        steps=20000,
        eval_every=500,
        checkpoint_every=1000,
        output="runs/gpt-xl",
    )


def b175() -> RunConfig:
    """GPT-3, 175 B parameters, on 1,024 accelerators in hosts of eight."""
    return RunConfig(
        model=B175,
        data=Text(source="king_james", tokenizer="bpe:8192", sequence=2048),
        optimizer=Optimizer(learning_rate=6e-5, warmup=2000),
        mesh=MeshSizes(fsdp=-1, tensor=8),
        precision="bf16",
        global_batch=1536,
        steps=100000,
        eval_every=1000,
        checkpoint_every=500,
        output="runs/gpt-175b",
    )

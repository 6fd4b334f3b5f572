"""A small text and a config that trains in seconds."""

import gzip
import json
import pathlib

import pytest

from shardtrain.cli import main

CONFIG = '''"""A config of a user."""
from shardtrain.config import MeshSizes, Monitor, Optimizer, RunConfig, Text
from shardtrain.models import GPTConfig

def tiny():
    return RunConfig(
        model=GPTConfig(vocab=384, sequence=32, embed=32, layers=2, heads=4, dropout=0.1),
        data=Text(source="{text}", tokenizer="bpe:384", sequence=32, cache="{cache}"),
        optimizer=Optimizer(learning_rate=3e-3, warmup=2),
        mesh=MeshSizes(data=2, fsdp=2, tensor=2),
        global_batch=16, steps=6, eval_every=3, checkpoint_every=2, eval_rows=32,
        devices="cpu:8", output="{output}", monitor=Monitor(tensorboard=False), sample="In the ", sample_tokens=8,
    )

def number():
    return 3

def needs(argument):
    return None
'''


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Text and its tokenised cache, made once."""
    folder = tmp_path_factory.mktemp("cli")
    source = pathlib.Path(__file__).parents[2] / "shardtrain/data/text/king_james.txt.gz"
    (folder / "text.txt").write_bytes(gzip.decompress(source.read_bytes())[:60000])
    return folder


@pytest.fixture(scope="session")
def config_in(shared):
    """Writes the config in a folder, with an output folder beside it: `FILE.py:tiny`."""

    def write(folder):
        text = CONFIG.replace("{text}", str(shared / "text.txt")).replace("{cache}", str(shared / "cache"))
        (folder / "my_config.py").write_text(text.replace("{output}", str(folder / "run")))
        return f"{folder / 'my_config.py'}:tiny"

    return write


@pytest.fixture
def config(config_in, tmp_path):
    """`FILE.py:tiny` with an output folder of its own."""
    return config_in(tmp_path)


@pytest.fixture(scope="session")
def trained(config_in, tmp_path_factory):
    """One run, on the config's mesh."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", config_in(folder)]) == 0
    return folder / "run"


@pytest.fixture
def shardtrain(capfd):
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*arguments):
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def as_json(shardtrain):
    """The same with --json: exit code and the object; nothing else may be on stdout."""

    def call(*arguments):
        import sys

        stdout = sys.stdout
        saved = __import__("os").dup(1)
        try:
            code, out, _ = shardtrain(*arguments, "--json")
        finally:
            __import__("os").dup2(saved, 1)
            sys.stdout = stdout
        return code, json.loads(out)

    return call

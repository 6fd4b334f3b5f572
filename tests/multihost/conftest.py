"""A model that compiles in a second, data that notes who read what, and the launcher as users start it."""

import json
import os
import subprocess
import sys

import pytest

CONFIG = '''"""A small network on rows with a number each."""
import dataclasses, errno, os, time
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import shardtrain as st
from shardtrain.config import MeshSizes, Monitor, Optimizer, RunConfig, custom


class Net(nnx.Module):
    def __init__(self, rngs, width):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(8, width, rngs=rngs, kernel_init=st.logical(init, "embed", "mlp"))
        self.down = nnx.Linear(width, 8, rngs=rngs, kernel_init=st.logical(init, "mlp", "embed"))
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.gelu(self.up(x))))


def net(rngs, width=16):
    return Net(rngs, width)


def loss(model, batch, rngs):
    each = jnp.square(model(batch["x"]) - jnp.roll(batch["x"], 1, -1)).mean(-1)
    ids = batch["id"].astype(jnp.float32)
    return st.Loss(each.sum(), jnp.float32(each.size), {"ids": (ids.sum(), 1.0), "squares": ((ids**2).sum(), 1.0)})


class Noted(st.ArrayLoader):
    def sample(self, index):
        found = super().sample(index)
        with open(f"{os.environ['READS']}-{jax.process_count()}-{jax.process_index()}", "a") as file:
            file.write(f"{index} ")
        return found


def listening():
    """Addresses on which this process listens, as the kernel has them."""
    mine = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{n}")}
    found = []
    for family in ("tcp", "tcp6"):
        for line in open(f"/proc/self/net/{family}").read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(fields[1])
    return found


def data(config):
    with open(f"{os.environ['READS']}-listening-{jax.process_count()}-{jax.process_index()}", "w") as file:
        file.write(" ".join(listening()))
    x = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    return Noted({"x": x, "id": np.arange(200, dtype=np.int32)}, config.global_batch, seed=1)


def tiny():
    return RunConfig(
        model=custom(net, loss, data, width=16), mesh=MeshSizes(data=2, fsdp=2), global_batch=16, groups=4,
        optimizer=Optimizer(learning_rate=1e-2, decay="constant"), monitor=Monitor(tensorboard=False),
        steps=8, eval_every=0, checkpoint_every=2, devices="cpu:4", output="",
    )


def me():
    return int(os.environ.get("JAX_PROCESS_ID", "0"))


def waited():
    with open(f"{os.environ['READS']}-waited-{os.environ['SHARDTRAIN_ATTEMPT']}-{me()}", "w") as file:
        file.write(f"{os.getpid()} {os.environ.get('SHARDTRAIN_WAITED', 0)}")
    return tiny()


def another_config():
    return dataclasses.replace(tiny(), optimizer=Optimizer(learning_rate=1e-2 * (1 + me() / 4), decay="constant"))


def another_loss(model, batch, rngs):
    return loss(model, {**batch, "x": batch["x"] * (1 + me())}, rngs)


def another_program():
    return dataclasses.replace(tiny(), model=custom(net, another_loss, data, width=16))


def full_disk():
    """The disk is full when the first save is to be sealed, and process 0 learns of it half a second after the other."""
    from shardtrain.checkpoint import arrays, commit
    seal, meet, failed = commit.seal, arrays.meet, []

    def full(*args):
        failed.append(1)
        if len(failed) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(*args)

    def late(name):
        meet(name)
        if me() == 0 and not name.endswith("-written"):
            time.sleep(0.5)

    commit.seal, arrays.meet = full, late
    return tiny()


def no_room(process):
    """One process cannot write files of more than two kilobytes while the first save is on its way."""
    import resource
    from shardtrain.checkpoint import arrays
    start, finish, begun = arrays.start, arrays.finish, []

    def limited(path, state):
        begun.append(1)
        if me() == process and len(begun) == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        return start(path, state)

    def finished(*args):
        try:
            finish(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    arrays.start, arrays.finish = limited, finished
    return dataclasses.replace(tiny(), model=custom(net, loss, data, width=512), steps=12)


def no_room_on_the_first():
    return no_room(0)


def no_room_on_the_second():
    return no_room(1)
'''


class Launched:
    """How a launch went: its exit code, JSON, lines, and the run's metrics."""

    def __init__(self, done, output):
        self.code, self.err, self.output = done.returncode, done.stderr, output
        self.json = json.loads(done.stdout) if done.stdout.strip() else {}

    @property
    def rows(self):
        return [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]

    def curve(self, name="loss"):
        return [row[name] for row in self.rows if name in row]


def environment(folder):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return {**kept, "XLA_FLAGS": flags, "READS": str(folder / "reads")}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("multihost")
    (made / "my.py").write_text(CONFIG)
    return made


@pytest.fixture(scope="session")
def one_of():
    """Variables of one process that something else starts."""
    return environment


@pytest.fixture(scope="session")
def launch(folder):
    """`launch("name", "--processes", "2", train=["--steps", "4"])`: trains into FOLDER/name."""

    def run(name, *flags, train=(), config=None, timeout=280):
        output = folder / name
        command = [sys.executable, "-m", "shardtrain", "launch", "local", "--json", *flags, "--"]
        config = (config or "CONFIG:tiny").replace("CONFIG", str(folder / "my.py"))
        command += ["train", config, "--output", str(output), *train, "--json"]
        done = subprocess.run(
            command, env=environment(folder), capture_output=True, text=True, timeout=timeout
        )
        return Launched(done, output)

    return run

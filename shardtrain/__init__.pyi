from shardtrain.checkpoint import Checkpointer as Checkpointer
from shardtrain.data import ArrayLoader as ArrayLoader
from shardtrain.data import TokenLoader as TokenLoader
from shardtrain.errors import CheckpointError as CheckpointError
from shardtrain.errors import CompileError as CompileError
from shardtrain.errors import ConfigError as ConfigError
from shardtrain.errors import DataError as DataError
from shardtrain.errors import DependencyError as DependencyError
from shardtrain.errors import LaunchError as LaunchError
from shardtrain.errors import MeshError as MeshError
from shardtrain.errors import RunError as RunError
from shardtrain.errors import ShardingError as ShardingError
from shardtrain.errors import ShardTrainError as ShardTrainError
from shardtrain.mesh import Target as Target
from shardtrain.mesh import init_distributed as init_distributed
from shardtrain.mesh import make_mesh as make_mesh
from shardtrain.mesh import simulate_devices as simulate_devices
from shardtrain.parallel import presets
from shardtrain.parallel import schedules as schedules
from shardtrain.parallel import timeline as timeline
from shardtrain.parallel.attention import attention as attention
from shardtrain.parallel.fsdp import gather as gather
from shardtrain.parallel.groups import Loss as Loss
from shardtrain.parallel.lookup import lookup as lookup
from shardtrain.parallel.sequence import positions as positions
from shardtrain.parallel.stages import Stages as Stages
from shardtrain.plan.audit import audit as audit
from shardtrain.plan.expected import assert_collectives as assert_collectives
from shardtrain.plan.fit import Run as Run
from shardtrain.plan.fit import fit as fit
from shardtrain.plan.given import batch_spec as batch_spec
from shardtrain.plan.make import plan as plan
from shardtrain.plan.model import linen as linen
from shardtrain.plan.plan import Plan as Plan
from shardtrain.plan.verify import verify as verify
from shardtrain.sharding import Rules as Rules
from shardtrain.sharding import annotate as annotate
from shardtrain.sharding import constrain as constrain
from shardtrain.sharding import logical as logical
from shardtrain.train.guard import Guard as Guard
from shardtrain.train.state import TrainState as TrainState

__version__: str
rules = presets

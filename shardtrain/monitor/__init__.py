"""What a run is doing, and what it did: writers, throughput, progress, report."""

from shardtrain.monitor.progress import Progress
from shardtrain.monitor.report import loss_svg, sparkline, write_report
from shardtrain.monitor.throughput import Throughput
from shardtrain.monitor.writers import JsonlWriter, TensorBoardWriter, WandbWriter, Writer, read_jsonl

__all__ = [
    "JsonlWriter",
    "Progress",
    "TensorBoardWriter",
    "Throughput",
    "WandbWriter",
    "Writer",
    "loss_svg",
    "read_jsonl",
    "sparkline",
    "write_report",
]

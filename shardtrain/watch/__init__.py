"""Where each process is, who is stuck, who is slow, and what the time of a run went into. Imports no JAX.

The loop says the phase that it enters (`Watch.phase`); a thread carries that to a board every half second. Whoever reads
the board, the launcher or the processes themselves, judges by `verdict`.
"""

from shardtrain.watch.beats import PHASES, Beat, Seen, Verdict, parse_silence, verdict
from shardtrain.watch.board import Board, FolderBoard, Observer, where_it_was
from shardtrain.watch.ledger import Ledger, goodput_lines, read_goodput
from shardtrain.watch.stragglers import read_table, slow, table_lines, write_table
from shardtrain.watch.watch import Watch

__all__ = [
    "PHASES",
    "Beat",
    "Board",
    "FolderBoard",
    "Ledger",
    "Observer",
    "Seen",
    "Verdict",
    "Watch",
    "goodput_lines",
    "parse_silence",
    "read_goodput",
    "read_table",
    "slow",
    "table_lines",
    "verdict",
    "where_it_was",
    "write_table",
]

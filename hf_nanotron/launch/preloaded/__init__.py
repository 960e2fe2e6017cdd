"""Ranks that are copies of one process per host, which has imported what they need.

`ForkServer` starts that process (`serve.py`). torchrun starts `stand_in.py` as each rank: a process of a few
milliseconds that has the copy made, hands it its files and signals, and ends as it ends. So all that torchrun does with
a rank (environment, log files, signals, exit codes, restarts) is torchrun's own. A copy becomes what
`python -u PROGRAM` would be (`become.py`).
"""

from .fork_server import ForkServer as ForkServer, why_not_importable as why_not_importable
